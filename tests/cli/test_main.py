"""The dolly command, as a process: output, exit codes, pipes and Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest

from modelscope_dolly.cli import main
from modelscope_dolly.generation import GenerationSettings
from tests.support.signals import interruptible

DOLLY = [sys.executable, "-m", "modelscope_dolly.cli"]


def dolly(*arguments: str, stdin: str | bytes = "", **environment: str) -> subprocess.CompletedProcess:
    given = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run([*DOLLY, *arguments], input=given, capture_output=True, env={**os.environ, **environment})
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


@pytest.fixture(scope="module")
def model(checkpoint_dir) -> str:
    return str(checkpoint_dir)


def test_ask_prints_the_answer_and_nothing_else(model):
    plain = dolly("ask", "Name a colour.", "--model", model, "--greedy", "--max-new-tokens", "12")
    assert (plain.returncode, plain.stderr) == (0, "")
    described = dolly(
        "ask", "-", "--greedy", "--max-new-tokens", "12", "--json", stdin="Name a colour.\n", DOLLY_MODEL=model
    )
    facts = json.loads(described.stdout)
    assert facts["text"] == plain.stdout.rstrip("\n")
    assert (facts["new_tokens"], facts["finish_reason"], facts["seed"]) == (12, "length", None)


def test_the_seed_in_the_json_repeats_the_answer(model):
    arguments = ("ask", "Name a colour.", "--model", model, "--json", "--max-new-tokens", "12")
    first = json.loads(dolly(*arguments).stdout)
    again = json.loads(dolly(*arguments, "--seed", str(first["seed"])).stdout)
    assert again["text"] == first["text"]


def test_context_comes_from_a_file_or_from_standard_input(model, tmp_path):
    file = tmp_path / "context.txt"
    file.write_text("The diary was written by Samuel Pepys.\n")
    arguments = ("ask", "Who wrote it?", "--model", model, "--greedy", "--max-new-tokens", "8", "--context")
    from_file, from_stdin = dolly(*arguments, str(file)), dolly(*arguments, "-", stdin=file.read_text())
    assert from_file.returncode == 0 and from_file.stdout == from_stdin.stdout


def test_chat_answers_each_line_on_its_own(model):
    lines = ["Name a colour.", "", "Name a river."]
    chat = dolly("chat", "--model", model, "--greedy", "--max-new-tokens", "8", "--json", stdin="\n".join(lines))
    assert chat.returncode == 0, chat.stderr
    answers = [json.loads(line)["text"] for line in chat.stdout.splitlines()]
    alone = [
        json.loads(dolly("ask", line, "--model", model, "--greedy", "--max-new-tokens", "8", "--json").stdout)["text"]
        for line in lines
        if line
    ]
    assert answers == alone


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ask", "hi"], "no model named"),
        (["ask", "hi", "--model", "no/such/place"], "no such directory"),
        (["ask", "", "--model", "anything"], "instruction is empty"),
        (["ask", "hi", "--model", "MODEL", "--device", "cuda:9"], "'cuda:9' was asked for"),
        (["ask", "hi", "--model", "MODEL", "--temperature", "0"], "temperature is 0"),
        (["ask", "hi", "--model", "MODEL", "--dtype", "int2"], "unknown dtype"),
        (["ask", "-", "--model", "MODEL", "--context", "-"], "only one of"),
        (["ask", "hi", "--model", "MODEL", "--context", "/no/such/file"], "cannot be read"),
        (["ask", b"\xff", "--model", "MODEL"], "lone surrogate"),
        (["plan", "no-such-size"], "no such directory"),
    ],
)
def test_what_a_user_can_repair_is_one_line_and_exit_code_2(model, arguments, says):
    done = dolly(*[model if argument == "MODEL" else argument for argument in arguments], DOLLY_MODEL="")
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("dolly: ") and says in line


def test_input_that_is_not_utf8_is_named(model):
    done = dolly("ask", "-", "--model", model, stdin=b"caf\xe9")
    assert done.returncode == 2 and "standard input: not UTF-8 (byte 0xe9 at 3)" in done.stderr


def test_unknown_flag_is_exit_code_2_and_the_nearest_is_named():
    done = dolly("ask", "hi", "--modle", "x")
    assert done.returncode == 2 and "unknown argument '--modle'. Did you mean '--model'?" in done.stderr
    assert dolly().returncode == 2


def test_check_tells_sound_from_unsound(model, tmp_path):
    sound = dolly("check", model)
    assert sound.returncode == 0 and sound.stdout.endswith("sound\n")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "config.json").write_text("{}")
    unsound = dolly("check", str(broken), "--json")
    report = json.loads(unsound.stdout)
    assert (unsound.returncode, report["sound"]) == (1, False)
    assert any(finding["subject"] == "manifest" and finding["status"] == "problem" for finding in report["findings"])


def test_reader_that_goes_away_is_no_error(model):
    command = [*DOLLY, "ask", "Name a colour.", "--model", model, "--max-new-tokens", "400", "--seed", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141
    assert errors == ""


@pytest.mark.parametrize(
    "command", [["ask", "Name a colour.", "--max-new-tokens", "1900"], ["chat", "--max-new-tokens", "1900"]]
)
def test_ctrl_c_ends_with_130_and_no_traceback(model, command):
    process = subprocess.Popen(
        [*DOLLY, *command, "--model", model, "--seed", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=interruptible,
    )
    process.stdin.write(b"Name a colour.\n")
    process.stdin.close()
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read(), process.stderr.read().decode()
    process.stdout.close(), process.stderr.close()
    assert process.wait() == 130
    assert "Traceback" not in rest[1]


def test_help_and_version_need_no_model_and_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *DOLLY[1:], "--help"], capture_output=True, text=True, check=True
    )
    for command in ("ask", "chat", "batch", "plan", "check", "quantize", "export", "bench", "eval"):
        assert command in done.stdout
    assert " torch" not in done.stderr
    assert dolly("--version").stdout.startswith("modelscope-dolly ")


@pytest.mark.parametrize("command", ["", "frob", "ask", "ask hi --modle x", "eval x --limit a"])
def test_a_mistake_in_the_command_line_is_one_line(command, capsys):
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("dolly: ") and told.count("\n") == 1


def test_help_names_the_defaults_of_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["ask", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("max_new_tokens", "top_p", "top_k", "temperature", "repetition_penalty"):
        [field] = [field for field in dataclasses.fields(GenerationSettings) if field.name == name]
        described = text.split(f"--{name.replace('_', '-')} {name.upper()} ")[1].split(" --")[0]
        assert f"(default: {field.default:g}" in described


def test_score_prints_a_line_for_each_answer_and_the_perplexity_of_all(checkpoint_dir, tmp_path, capsys):
    records = tmp_path / "in.jsonl"
    rows = [
        {"instruction": "Name a colour.", "response": "Red."},
        {"text": "Who?", "context": "Pepys.", "response": "P"},
    ]
    records.write_text("\n\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    command = ["score", str(records), "--model", str(checkpoint_dir), "--device", "cpu"]
    assert main(command) == 0
    out, error = capsys.readouterr()
    scores = [json.loads(line) for line in out.splitlines()]
    assert [score["record"] for score in scores] == [1, 2] and all(score["logprob"] < 0 for score in scores)
    assert all(score["perplexity"] == math.exp(-score["logprob"] / score["tokens"]) for score in scores)
    mean = sum(score["logprob"] for score in scores) / sum(score["tokens"] for score in scores)
    assert error.splitlines()[-1].endswith(f"perplexity {math.exp(-mean):.4f}")
    target = tmp_path / "out.jsonl"
    assert main([*command[:2], str(target), *command[2:], "--end"]) == 0
    ended = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    assert all(one["tokens"] > other["tokens"] for one, other in zip(ended, scores, strict=True))
    assert main([*command[:2], str(target), *command[2:]]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "problem"),
    [("{", "not JSON"), ('{"instruction": "a"}', "response must be"), ('{"response": "a"}', "'instruction'")],
)
def test_a_record_that_cannot_be_scored_is_named_with_its_line(line, problem, tmp_path, capsys):
    records = tmp_path / "in.jsonl"
    records.write_text('{"instruction": "a", "response": "b"}\n' + line, "utf-8")
    assert main(["score", str(records), "--model", "/nowhere"]) == 2
    error = capsys.readouterr().err
    assert f"{records}:2: " in error and problem in error and error.count("\n") == 1
