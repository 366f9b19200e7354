"""The commands of the recipe with standard streams that are closed or full: as `dolly`, one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from train import bench, demo, finetune, memory_table, nano, plan, publish
from train.nano import write_base

NANO = str(ROOT / "train" / "recipes" / "nano.yaml")
COMMANDS = {module.__name__: module.main for module in (bench, demo, finetune, memory_table, nano, plan, publish)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    target = tmp_path_factory.mktemp("base") / "nano"
    write_base(target)
    return str(target)


@pytest.fixture(params=COMMANDS)
def name(request) -> str:
    return request.param


def test_a_closed_output_is_told(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert COMMANDS[name](["--help"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: standard output is closed")


def test_a_full_output_is_told(name, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            COMMANDS[name](["--help"])
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"{name}: standard output: No space left on device\n"


def test_without_standard_error_the_exit_code_is_left(name, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert COMMANDS[name](["--no-such-flag"]) == 2
    monkeypatch.setattr(sys, "stderr", None)
    assert COMMANDS[name](["--no-such-flag"]) == 2
    assert capsys.readouterr().out == ""


def shell(redirection: str, *words: str) -> tuple[int, str, str]:
    command = ["bash", "-c", f'"$@" {redirection}', "bash", sys.executable, "-m", *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [
        (">&-", 2, "train.plan: standard output is closed; to discard what is printed: > /dev/null"),
        (">/dev/full", 2, "train.plan: standard output: No space left on device"),
        (">&- <&- 2>&-", 2, ""),
    ],
)
def test_a_plan_by_a_shell(base, tmp_path, redirection, code, says):
    words = ("train.plan", NANO, "--model", base, "--output-dir", str(tmp_path / "run"))
    found, out, error = shell(redirection, *words)
    assert (found, out) == (code, "")
    assert error.splitlines()[-1:] == ([says] if says else [])  # libraries may have said something before


def test_a_command_that_reads_nothing_needs_no_standard_input(tmp_path):
    code, out, _ = shell("<&- 2>&-", "train.nano", str(tmp_path / "nano"))
    assert code == 0 and out.startswith("wrote ") and (tmp_path / "nano" / "config.json").exists()


def test_a_full_output_ends_a_training_run_on_one_line(base, tmp_path):
    """Of which nobody could read anything."""
    words = ("train.finetune", NANO, "--model", base, "--output-dir", str(tmp_path / "run"), "--max-steps", "1")
    code, out, error = shell(">/dev/full", *words)
    assert (code, out) == (2, "")
    assert error.splitlines()[-1] == "train.finetune: standard output: No space left on device"
