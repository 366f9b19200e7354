"""What a command that answers imports: a start is torch's own import, and little else."""

from __future__ import annotations

import subprocess
import sys

#: Half a second and more each. torch._dynamo is torch's compiler.
HEAVY = ("transformers", "modelscope", "accelerate", "torch._dynamo", "sympy", "triton", "datasets", "numpy.f2py")


def test_dolly_ask_imports_no_library_as_heavy_as_torch(checkpoint_dir):
    script = (
        "import sys; from modelscope_dolly.cli.main import main; code = main(sys.argv[2:]); "
        "print([name for name in sys.argv[1].split() if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    question = ["ask", "Name a colour.", "--model", str(checkpoint_dir), "--device", "cpu", "--max-new-tokens", "2"]
    for more in ([], ["--quantize", "int8"], ["--verify", "always"]):
        command = [sys.executable, "-c", script, " ".join(HEAVY), *question, *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "[]\n"), more
