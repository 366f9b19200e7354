"""The C kernels under the address sanitizer and that of undefined behaviour, where the compiler has them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.paths import ROOT

SOURCES = [ROOT / "modelscope_dolly" / "kernels" / "csrc" / f"{name}.c" for name in ("linear", "attention")]
FLAGS = ("-O1", "-g", "-fPIC", "-shared", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CHILD = Path(__file__).with_name("sanitized_kernels.py")


def main(seconds: float, seed: int) -> int:
    """Fuzz for so long; returns the number of cases, 0 without sanitizers. Raises AssertionError for one that fails."""
    with tempfile.TemporaryDirectory() as temporary:
        library = build(Path(temporary))
        return run(library, seconds, seed) if library else 0


def build(place: Path) -> Path | None:
    """The kernels with sanitizers; None where the compiler has none, or there is no compiler."""
    compiler, library = os.environ.get("CC", "gcc"), place / "sanitized.so"
    if not shutil.which(compiler) or not _runtime(compiler):
        return None
    done = subprocess.run([compiler, *FLAGS, "-o", library, *SOURCES], capture_output=True, text=True)
    return library if done.returncode == 0 else None


def run(library: Path, seconds: float, seed: int) -> int:
    """Random calls in a process of their own."""
    environment = {
        **os.environ, "LD_PRELOAD": _runtime(os.environ.get("CC", "gcc")), "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(CHILD), str(library), str(seconds), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds + 300)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("case ")]
    case = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("case ")), "no case")
    assert done.returncode == 0, f"{case}: exit code {done.returncode}: {' | '.join(lines[:12])}"
    return int(done.stdout)


def _runtime(compiler: str) -> str:
    """The sanitizer's library, which must be in the process before any other; empty where there is none."""
    done = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    path = done.stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else ""
