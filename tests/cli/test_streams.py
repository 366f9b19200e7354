"""Standard streams as a shell sets them up, closed, full, endless, or without text: one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from modelscope_dolly.cli import main, streams
from modelscope_dolly.errors import SettingError

DOLLY = [sys.executable, "-m", "modelscope_dolly.cli"]


def shell(redirection: str, *arguments: str, stdin: bytes = b"", **more: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command with this redirection."""
    command = ["bash", "-c", f'"$@" {redirection}', "bash", *DOLLY, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment | more)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def model(checkpoint_dir) -> str:
    return str(checkpoint_dir)


@pytest.mark.parametrize(
    ("redirection", "arguments", "says"),
    [
        (">&-", ["plan", "3b"], "standard output is closed"),
        (">&-", ["--help"], "standard output is closed"),
        (">/dev/full", ["plan", "3b"], "standard output: No space left on device"),
        (">/dev/full", ["--help"], "standard output: No space left on device"),
        (">/dev/full", ["ask", "hi", "--model", "MODEL", "--max-new-tokens", "4"], "standard output: No space left"),
        ("<&-", ["chat", "--model", "MODEL"], "standard input is closed"),
        ("<&-", ["ask", "-", "--model", "MODEL"], "standard input is closed"),
        ("</dev/zero", ["ask", "-", "--model", "MODEL"], "standard input: longer than 16,777,216 bytes"),
        ("", ["ask", "hi", "--context", "/dev/zero", "--model", "MODEL"], "/dev/zero: longer than"),
    ],
)
def test_a_stream_that_cannot_be_used_is_one_line_and_exit_code_2(model, redirection, arguments, says):
    code, out, error = shell(redirection, *[model if argument == "MODEL" else argument for argument in arguments])
    assert (code, out) == (2, "")
    [line] = error.splitlines()
    assert line.startswith("dolly: ") and says in line


def test_a_full_output_is_told_where_nothing_is_buffered():
    expected = (2, "", "dolly: standard output: No space left on device\n")
    assert shell(">/dev/full", "eval", "--published", PYTHONUNBUFFERED="1") == expected


def test_without_standard_error_the_exit_code_is_left_and_nothing_lands_elsewhere(model):
    code, out, _ = shell("2>&-", "check", "/nowhere")
    assert code == 1 and out.endswith("/nowhere: NOT usable\n")
    assert shell("2>&-", "ask", "hi", "--model", "/nowhere") == (2, "", "")
    assert shell("2>/dev/full", "ask", "hi", "--model", "/nowhere") == (2, "", "")


def test_what_chat_reads_before_bytes_that_are_no_text_is_answered(model):
    code, out, error = shell(
        "", "chat", "--model", model, "--max-new-tokens", "2", "--json", stdin=b"One.\n\n\xffx\nTwo.\n"
    )
    assert code == 2 and len(out.splitlines()) == 1
    assert error == "dolly: standard input: line 3: not UTF-8 (byte 0xff at 0)\n"


def test_a_path_that_is_no_text_is_shown_with_escapes(tmp_path):
    code, _, error = shell("", "check", os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n"), "--json")
    assert (code, error) == (1, "")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x" * 5000, "/dev/null/x", "loop", "with\nnewline"])
@pytest.mark.parametrize("command", [
    "check NAME", "plan NAME", "ask hi --model NAME", "ask hi --context NAME --model x", "quantize MODEL NAME/x",
    "quantize NAME new", "bench --keep NAME/x --shape x",
])  # fmt: skip
def test_a_name_that_no_file_can_have_is_one_line(name, command, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    words = [word.replace("NAME", name).replace("MODEL", model) for word in command.split(" ")]
    code = main(words)
    out, error = capsys.readouterr()
    if command == "quantize MODEL NAME/x" and name == "with\nnewline":  # a directory can
        assert code == 0
    elif command.startswith("check") and "\0" not in name and len(name) <= 4096:
        assert code == 1 and "problem" in out and len(out.splitlines()) == 2
    else:
        assert (code, out) == (2, "") and error.startswith("dolly: ") and error.count("\n") == 1
        assert error[:-1].isprintable()


def test_a_pipe_in_place_of_a_context_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"told\r\nso\n",))
    writer.start()
    assert streams.read_text(str(tmp_path / "pipe")) == "told\nso"
    writer.join()


def test_a_line_without_end_is_refused(monkeypatch):
    with open("/dev/zero") as endless, pytest.raises(SettingError, match="line 1: longer than 16,777,216 bytes"):
        monkeypatch.setattr(sys, "stdin", endless)
        next(streams.read_lines())
