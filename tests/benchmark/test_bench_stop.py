"""dolly bench that is stopped: what was measured is told, nothing is left behind. Real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from modelscope_dolly.benchmark import peers, suite
from modelscope_dolly.benchmark.repeats import spread
from modelscope_dolly.cli import main
from modelscope_dolly.cli.bench import interrupt_once
from modelscope_dolly.errors import HardwareError
from tests.support.models import TINY
from tests.support.signals import interruptible

DOLLY = [sys.executable, "-m", "modelscope_dolly.cli", "bench", "--dtype", "fp32", "--threads", "1"]
SMALL = ["--prompt-tokens", "8", "--new-tokens", "4", "--shape", TINY]


class Running:
    """A command on a terminal of its own, which shows its progress there."""

    def __init__(self, arguments: list[str], place: Path):
        self.place, (self.terminal, theirs) = place, pty.openpty()
        environment = {**os.environ, "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*DOLLY, *arguments], stdout=subprocess.PIPE, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=interruptible,
        )  # fmt: skip
        os.close(theirs)
        self.said = b""

    def read_until(self, text: str) -> None:
        while text.encode() not in self.said:
            self.said += os.read(self.terminal, 1024)

    def stop(self, number: int) -> tuple[int, str]:
        """Send a signal; exit code and standard output. Nothing of the process may be left."""
        os.killpg(self.process.pid, number)  # as a terminal does
        out = self.process.stdout.read().decode()
        self.process.stdout.close()
        code = self.process.wait()
        try:
            while more := os.read(self.terminal, 1024):
                self.said += more
        except OSError:  # how Linux says that nobody writes any more
            pass
        os.close(self.terminal)
        assert b"Traceback" not in self.said
        assert self.left() == [] and list(self.place.iterdir()) == []
        return code, out

    def left(self) -> list[psutil.Process]:
        """Processes of this command that do not end."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(self.place):
                    found.append(process)
        return psutil.wait_procs(found, timeout=60)[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_rows_of_finished_batches_are_told(number, code, tmp_path):
    running = Running([*SMALL, "--batch", "1,2", "--repeats", "2", "--peers", "none", "--json"], tmp_path)
    running.read_until("dolly fp32: batch 2: warm-up")
    got, out = running.stop(number)
    found = json.loads(out)
    assert got == code and [(row["engine"], row["batch"]) for row in found["rows"]] == [("dolly", 1)]
    assert found["not_measured"] == ["dolly fp32 at batch 2"] and found["stopped"] == number.name
    assert found["rows"][0]["peak_bytes"] > 0 and "answers" not in found["rows"][0]


def test_rows_of_mixed_requests_are_told(tmp_path):
    arguments = ["--mixed", "6", "--slots", "2", "--repeats", "1", "--quantize", "none,int8", "--peers", "none"]
    running = Running([*SMALL, *arguments], tmp_path)
    running.read_until("dolly int8: repeat 1")
    code, out = running.stop(signal.SIGINT)
    assert code == 130 and out.splitlines()[-1] == "stopped by SIGINT; not measured: dolly int8"
    [row] = [line for line in out.splitlines() if line.startswith("dolly ")]
    assert "±" not in row and "each measured once" in out  # one repeat has no spread


def test_starts_that_were_complete_are_told(tmp_path):
    running = Running([*SMALL, "--cold", "--repeats", "2"], tmp_path)
    running.read_until("start 2 of 2, files from memory")
    code, out = running.stop(signal.SIGTERM)
    assert code == 143
    assert out.splitlines()[-1] == (
        "stopped by SIGTERM; not measured: fp32 from memory, compared before; fp32 from memory; fp32 from disk"
    )
    [row] = [line for line in out.splitlines() if line.startswith("fp32 ")]
    assert "~ 1 of 2 starts" in row


def test_without_any_figure_one_line_says_so(tmp_path):
    running = Running([*SMALL, "--batch", "1", "--peers", "none"], tmp_path)
    running.read_until("the machine's limit: bandwidth")
    assert running.stop(signal.SIGINT) == (130, "")
    assert "stopped by SIGINT before anything was measured" in running.said.decode()


def test_figures_survive_an_error_of_our_own_engine(monkeypatch, capsys):
    def fails(_, found):
        lengths = {"lengths": [2, 3], "slots": 1, "missing": {}}
        row = {"engine": "dolly", "format": "int8", "seconds": spread([2.0]), "requests_per_s": 1.0}
        row |= {"tokens_per_s": 2.5, "useful_share": 1.0, "disturbed": []}
        found |= {"mixed": {**lengths, "rows": [row]}, "not_measured": ["dolly int4"], "settings": {"repeats": 1}}
        found |= {"date": "today", "machine": {"device": "a CPU", "kind": "cpu", "threads": 1, "instructions": [],
                                               "versions": {}}}  # fmt: skip
        raise HardwareError("too large")

    monkeypatch.setattr(suite, "run_benchmark", fails)
    assert main(["bench", "--mixed", "2"]) == 2
    out, err = capsys.readouterr()
    assert "dolly   int8" in out and out.splitlines()[-1] == "ended by an error; not measured: dolly int4"
    assert err == "dolly: too large\n"


def test_a_child_and_its_children_end_when_nobody_holds_their_input():
    """So they do where the parent was killed. Their output ends when the last of them has gone."""
    program = (
        "import signal, subprocess; from modelscope_dolly.benchmark import peers\n"
        "peers.read_job(); subprocess.Popen(['sleep', '1000']); print('ready', flush=True); signal.pause()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    # a program given with -c has no arguments: the job is read from standard input
    print("{}", file=process.stdin, flush=True)
    assert process.stdout.readline() == "ready\n"
    try:
        assert process.communicate(timeout=60) == ("", None)  # closes its input
        assert process.returncode == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def not_ignored():
    """A background job of a script starts with SIGINT ignored, and interrupt_once leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_counts_and_the_next_do_not_disturb(not_ignored):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interrupt_once() as received:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # while things are put away
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_job_may_be_longer_than_a_command_line():
    """Linux allows 131,072 bytes for one argument."""
    job = json.dumps({"engine": "hf", "probe": True, "prompts": {"1": [[12345] * 25000]}})
    assert len(job) > 150_000
    command = [sys.executable, peers.__file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    print(job, file=process.stdin, flush=True)
    assert (process.wait(), process.stderr.read()) == (0, "")
    process.stdin.close()
    process.stderr.close()
