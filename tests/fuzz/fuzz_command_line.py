"""Command lines nobody meant, in this process and, with closed and full streams, in processes of their own.

Exit code 0, 1, 2 or 141; with 2 exactly one line on standard error; a traceback never.
"""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelscope_dolly.benchmark import suite
from modelscope_dolly.benchmark.bench_options import BenchSettings
from modelscope_dolly.benchmark.bench_run import BenchRun
from modelscope_dolly.cli import main as dolly
from modelscope_dolly.errors import SettingError
from tests.fuzz.cases import run_cases
from tests.fuzz.directories import make_hostile, tiny_checkpoint
from tests.support.paths import ROOT

NUMBERS = ("0", "1", "2", "-1", "3.5", "1e-300", "1e300", "nan", "inf", "9" * 30, "9" * 5000, "٣", "x", "", "1_0")
NAMES = (
    "cpu",
    "gpu",
    "cuda:9",
    "cuda:" + "9" * 30,
    "meta",
    "fp32",
    "bf16",
    "int8",
    "none",
    "auto",
    "\x1b[2J",
    "a\nb",
    "",
)
PATHS = (
    "/dev/null/x", "/dev/full", "/dev/null", "/proc/self/mem", "x" * 300, "x" * 5000, "loop", "pipe", "file", "\udcff",
    "~nobody/x", ".", "..", "a\0b", "hostile", "hostile/config.json", "new", "owner/name", "3b", "64x1x1", "99999x2x1",
)  # fmt: skip
#: Options and what they take.
VALUES = {
    "--model": PATHS, "--draft": PATHS, "--adapter": PATHS,
    "--context": ("file", "loop", "x" * 300, "/dev/full", "-", "."),
    "--device": NAMES, "--dtype": NAMES, "--quantize": NAMES, "--threads": ("1", "20000", "40000", *NUMBERS),
    "--max-new-tokens": NUMBERS, "--temperature": NUMBERS, "--top-p": NUMBERS, "--top-k": NUMBERS,
    "--repetition-penalty": NUMBERS, "--stop": NAMES, "--seed": NUMBERS, "--on-overflow": NAMES,
    "--prompt-lookup": ("on", "off", "x"), "--revision": NAMES, "--to": NAMES, "--keep": PATHS, "--shape": PATHS,
    "--batch": NUMBERS, "--repeats": NUMBERS, "--mixed": NUMBERS, "--slots": NUMBERS, "--records": NUMBERS,
    "--data": PATHS, "--tokenizer": PATHS, "--gguf": PATHS, "--peers": NAMES, "--tasks": NAMES, "--limit": NUMBERS,
    "--batch-size": NUMBERS, "--output": PATHS, "--row": NAMES, "--prompt-tokens": NUMBERS, "--new-tokens": NUMBERS,
}  # fmt: skip
FLAGS = ("--json", "--greedy", "--verbose", "--write-manifest", "--published", "--cold", "--quality", "--lookup", "--x")
SHARED = ("--json", "--verbose")
GENERATION = (
    "--device", "--dtype", "--quantize", "--threads", "--draft", "--adapter", "--max-new-tokens", "--temperature",
    "--top-p", "--top-k", "--repetition-penalty", "--stop", "--seed", "--on-overflow", "--prompt-lookup", "--greedy",
    *SHARED,
)  # fmt: skip
#: Command -> (numbers of positional arguments, options it knows).
COMMANDS = {
    "ask": ((1,), (*GENERATION, "--context")),
    "chat": ((0,), GENERATION),
    "check": ((1,), ("--write-manifest", *SHARED)),
    "plan": ((1,), ("--revision", *SHARED)),
    "quantize": ((2,), ("--to", "--verbose")),
    "bench": ((0, 1), (
        "--shape", "--device", "--dtype", "--quantize", "--batch", "--threads", "--repeats", "--prompt-tokens",
        "--new-tokens", "--mixed", "--slots", "--seed", "--peers", "--gguf", "--data", "--records", "--tokenizer",
        "--keep", "--cold", "--quality", "--lookup", *SHARED,
    )),
    "compare": ((1, 2), ("--data", "--records", "--max-new-tokens", "--minutes", "--output", "--dtype", *SHARED)),
    "eval": ((0, 1), ("--tasks", "--limit", "--data", "--batch-size", "--output", "--row", "--published", *SHARED)),
}  # fmt: skip
#: What a shell does to the streams of a command.
REDIRECTIONS = (">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "| true", "")


def main(seconds: float, seed: int) -> int:
    """Fuzz for so long; returns the number of cases. Raises AssertionError for a case that fails."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as temporary, _bench_only_prepares():
        place = Path(temporary)
        model = str(tiny_checkpoint(place))
        os.chdir(place)
        Path("loop").symlink_to("loop")
        Path("file").write_text("some text")

        def case(rng: random.Random) -> None:
            subprocess.run(["rm", "-rf", "hostile", "new"], check=True)
            if rng.random() < 0.1:
                subprocess.run(["cp", "-r", model, "hostile"], check=True)
                make_hostile(Path("hostile"), rng)
            arguments = _arguments(rng, model)
            if rng.random() < 0.01:
                _in_a_process(rng, arguments)
            else:
                _here(rng, arguments)

        try:
            return run_cases(seconds, seed, case)
        finally:
            os.chdir(here)


@contextmanager
def _bench_only_prepares() -> Iterator[None]:
    """The measurements of `dolly bench` take minutes; its options are what is tried."""

    def prepare(settings: BenchSettings, results: dict) -> None:
        BenchRun(settings, results)
        raise SettingError("measures nothing here")

    before, suite.run_benchmark = suite.run_benchmark, prepare
    try:
        yield
    finally:
        suite.run_benchmark = before


def _arguments(rng: random.Random, model: str) -> list[str]:
    command = rng.choice(list(COMMANDS))
    counts, known = COMMANDS[command]
    arguments = [command]
    for _ in range(rng.choice(counts)):
        arguments.append(rng.choice(("-", "Name a colour.", model, model, *PATHS)))
    if command in ("ask", "chat"):
        arguments += ["--model", model, "--max-new-tokens", "2", "--threads", "1"]
    for _ in range(rng.randrange(4)):
        name = rng.choice(known) if rng.random() < 0.9 else rng.choice((*VALUES, *FLAGS))
        arguments += [name, rng.choice(VALUES[name])] if name in VALUES else [name]
    return arguments


def _here(rng: random.Random, arguments: list[str]) -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    content = rng.choice((b"", b"Name a colour.\n", b"a\nb\n\xff\n", rng.randbytes(50), b"\0", b"\r\n\n"))
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (content, b"", b"")]
    sys.stdin, sys.stdout, sys.stderr = streams
    try:
        code = dolly(arguments)
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for stream in streams[1:]:
            stream.flush()
    error = streams[2].buffer.getvalue().decode("utf-8", "replace")
    assert code in (0, 1, 2, 141), f"{arguments}: exit code {code}: {error[-500:]}"
    said = [line for line in error.splitlines() if line.startswith("dolly: ")]
    assert (code == 2) <= (len(said) == 1), f"{arguments}: exit code {code} with {error[-500:]!r}"
    assert code != 1 or arguments[0] in ("check", "eval"), f"{arguments}: exit code 1"
    assert "\x1b" not in error.replace("\x1b[A", ""), f"{arguments}: control characters"


def _in_a_process(rng: random.Random, arguments: list[str]) -> None:
    if any("\0" in argument for argument in arguments):
        return
    redirection = rng.choice(REDIRECTIONS)
    shell = f'"$@" {redirection}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, "-m", "modelscope_dolly.cli"]
    if arguments[0] == "bench":
        arguments = ["plan", "3b"]
    encoded = [argument.encode("utf-8", "surrogateescape") for argument in arguments]
    done = subprocess.run([*command, *encoded], input=b"Name a colour.\n", capture_output=True, env=environment)
    error = done.stderr.decode("utf-8", "replace")
    assert done.returncode in (0, 1, 2, 141), f"{arguments} {redirection}: exit code {done.returncode}: {error}"
    assert "Traceback" not in error and "Exception ignored" not in error, f"{arguments} {redirection}: {error}"
