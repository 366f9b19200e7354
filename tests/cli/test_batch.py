"""dolly batch as a process: answers that stay, whatever ends it, and that are those of an uninterrupted run."""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from modelscope_dolly.batch import answer_rows
from modelscope_dolly.batch.answer_rows import Progress, row_seed
from modelscope_dolly.batch.input_rows import InputRows
from modelscope_dolly.cli import main
from tests.support.forked_commands import ForkedCommands
from tests.support.paths import ROOT

NANO = ROOT / "train" / "recipes" / "nano.jsonl"
ROWS, NEW_TOKENS = 60, 12


@pytest.fixture(scope="module")
def model(checkpoint_dir) -> str:
    return str(checkpoint_dir)


@pytest.fixture
def source(tmp_path) -> Path:
    """Records, with two lines that ask nothing."""
    lines = NANO.read_text(encoding="utf-8").splitlines()[: ROWS - 2]
    lines.insert(7, '{"instruction": ""}')
    lines.insert(33, "not JSON")
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def commands(checkpoint_dir, tmp_path) -> Iterator[ForkedCommands]:
    with ForkedCommands(checkpoint_dir, tmp_path / "printed.txt") as forked:
        yield forked


def answers_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def batch(source: Path, output: Path, model: str, *more: str, seed: int | None = 5) -> list[str]:
    seeds = [] if seed is None else ["--seed", str(seed)]
    shape = ["--max-new-tokens", str(NEW_TOKENS), "--slots", "8"]
    return ["batch", str(source), str(output), "--model", model, *shape, *seeds, *more]


def test_killed_at_any_moment_the_same_command_ends_with_the_bytes_of_an_uninterrupted_run(
    model, source, tmp_path, commands
):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert commands.run(*batch(source, whole, model, "--order", "input")) == 1, commands.printed
    command, rng, counts = batch(source, output, model, "--order", "input"), random.Random(0), [0]

    def lines() -> list[bytes]:
        return output.read_bytes().split(b"\n")[:-1] if output.exists() else []

    for number in range(8):
        process, more = commands.start(*command), rng.randint(1, 10)
        if number % 4 == 0:
            time.sleep(rng.uniform(0, 0.5))  # while it loads, perhaps
        else:
            while len(lines()) < min(58, counts[-1] + more):
                time.sleep(0.001)
        assert commands.kill(process) in (-signal.SIGKILL, 1)
        indices = [json.loads(line)["index"] for line in lines()]
        assert len(set(indices)) == len(indices) >= counts[-1]
        counts.append(len(indices))
    assert commands.run(*command) == 1, commands.printed
    assert output.read_bytes() == whole.read_bytes()
    assert Path(f"{output.with_suffix('')}.errors.jsonl").read_bytes() == (tmp_path / "whole.errors.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if "killed" in path.name) == [
        "killed.batch.json", "killed.errors.jsonl", "killed.jsonl",
    ]  # fmt: skip
    assert any(0 < count < 58 for count in counts), "no kill met it at work"


def test_each_answer_is_that_of_ask_with_the_seed_in_its_line(model, source, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(batch(source, output, model)) == 1
    told = capsys.readouterr()
    assert told.out.startswith(f"{output}: 58 of 60 rows answered, 60 rows and ") and "2 cannot be: " in told.out
    rows = {row["index"]: row for row in answers_in(output)}
    assert set(rows) == set(range(ROWS)) - {7, 33}
    records = source.read_text(encoding="utf-8").splitlines()
    for index in (0, 8, 59):
        record = json.loads(records[index])
        context = tmp_path / "context.txt"
        context.write_text(record["context"], encoding="utf-8")
        ask = ["ask", record["instruction"], "--model", model, "--max-new-tokens", str(NEW_TOKENS), "--json"]
        assert main([*ask, "--seed", str(rows[index]["seed"]), "--context", str(context)]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert {name: alone[name] for name in rows[index] if name != "index"} == {
            name: value for name, value in rows[index].items() if name != "index"
        }
    problems = answers_in(tmp_path / "out.errors.jsonl")
    assert [(row["index"], row["line"]) for row in problems] == [(7, 8), (33, 34)]
    assert "instruction is empty" in problems[0]["error"] and "not JSON" in problems[1]["error"]


def test_what_is_complete_stays_and_another_run_is_refused_by_name(model, source, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(batch(source, output, model, seed=None)) == 1
    capsys.readouterr()
    before = output.read_bytes()
    assert main(batch(source, output, model, "--json", seed=None)) == 1  # the seed that was drawn is kept
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rows"], facts["answered"], facts["bad"], facts["new_rows"]) == (ROWS, 58, 2, 0)
    assert output.read_bytes() == before
    other = tmp_path / "other.jsonl"
    other.write_text(source.read_text(encoding="utf-8") + '{"text": "One more."}\n', encoding="utf-8")
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "manifest.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config))  # other bytes
    for changed, says in [
        (batch(source, output, model, "--top-p", "0.5"), "settings top_p is 0.5, was 0.92"),
        (batch(source, output, model, "--greedy"), "settings do_sample is False, was True"),
        (batch(source, output, model, "--quantize", "int8"), "model quantize is 'int8', was None"),
        (batch(other, output, model), "input sha256 is "),
        (batch(source, output, str(copy)), "model files_sha256 is "),
        (batch(source, output, model, "--format", "lines"), "input format is 'lines', was 'jsonl'"),
        (batch(source, output, model), "settings seed is 5, was "),
    ]:
        assert main(changed) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if "another run" in line]
        assert says in line and "--overwrite" in line
        assert output.read_bytes() == before
    assert main(batch(source, output, model, "--greedy", "--overwrite")) == 1
    rows = answers_in(output)
    assert len(rows) == 58 and all(row["seed"] is None for row in rows)


def test_a_file_that_no_batch_has_made_is_left_alone(model, source, tmp_path, capsys):
    output = tmp_path / "notes.jsonl"
    output.write_text("my notes")
    assert main(batch(source, output, model)) == 2
    assert "notes.jsonl: exists, and no notes.batch.json says what made it" in capsys.readouterr().err
    assert output.read_text() == "my notes"


@pytest.mark.parametrize(
    ("name", "output", "more", "says"),
    [
        ("in.jsonl", "out.txt", [], "its name must end in .jsonl"),
        ("in.jsonl", "in.jsonl", [], "would be written over the input"),
        ("in.jsonl", "no/such/out.jsonl", [], "no such directory"),
        ("in.jsonl", "directory.jsonl", [], "not a file"),
        ("none.jsonl", "out.jsonl", [], "none.jsonl: no such file"),
        ("in.jsonl", "out.jsonl", ["--order", "random"], "unknown order 'random'"),
        ("in.jsonl", "out.jsonl", ["--slots", "0"], "slots is 0"),
        ("in.jsonl", "out.jsonl", ["--format", "csv"], "unknown format 'csv'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    model, source, tmp_path, capsys, monkeypatch, name, output, more, says
):
    (tmp_path / "directory.jsonl").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["batch", name, output, "--model", model, *more]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dolly: ") and says in line
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_says_what_is_there_and_a_second_run_at_the_same_time_is_refused(
    model, source, tmp_path, commands, capsys
):
    output = tmp_path / "out.jsonl"
    command = batch(source, output, model, "--max-new-tokens", "200", "--slots", "2")
    process = commands.start(*command)
    while not (output.exists() and output.stat().st_size):
        time.sleep(0.01)
    assert main(command) == 2
    assert f"another run is at work here: process {process} on" in capsys.readouterr().err
    assert commands.kill(process, signal.SIGINT) == 130
    count = len(answers_in(output))
    assert f"dolly: stopped: {count} of 60 rows are answered; the same command goes on\n" in commands.printed
    assert "Traceback" not in commands.printed and not (tmp_path / "out.lock").exists()
    process = commands.start(*command)
    while len(output.read_bytes().splitlines()) == count:
        time.sleep(0.01)
    assert commands.kill(process, signal.SIGTERM) == 143


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(model, source, tmp_path):
    """A limit on the size of files, as a full disk would be."""
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "modelscope_dolly.cli", *batch(source, output, model)]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "out.jsonl: cannot be written (File too large); its " in line and "the same command goes on" in line
    kept = answers_in(output)
    assert 0 < len(kept) < 58
    assert main(command[3:]) == 1
    assert answers_in(output)[: len(kept)] == kept and len(answers_in(output)) == 58


def test_standard_input_is_one_instruction_a_line_and_must_be_the_same_again(model, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    command = ["batch", "-", str(output), "--model", model, "--greedy", "--max-new-tokens", "5", "--order", "input"]

    def piped(text: str) -> int:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        return main(command)

    for _ in range(2):  # the second time nothing is left to do
        assert piped("Name a colour.\n\nName a river.\n") == 0
        assert [row["index"] for row in answers_in(output)] == [0, 1]
    capsys.readouterr()
    assert piped("Name a colour.\n") == 2
    assert "input rows is 1, was 2" in capsys.readouterr().err


def test_only_so_many_rows_are_read_ahead(model, tmp_path, monkeypatch):
    """However many there are: twice as many as there are slots."""
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("Name a colour.\n" * 200)
    ahead = []

    def read(self, skip):
        for row in rows_of(self, skip):
            count = len(output.read_bytes().splitlines()) if output.exists() else 0
            ahead.append(row.index - count)
            yield row

    rows_of = InputRows.read
    monkeypatch.setattr(InputRows, "read", read)
    assert main(["batch", str(source), str(output), "--model", model, "--max-new-tokens", "3", "--slots", "4"]) == 0
    assert len(ahead) == 200 and max(ahead) < 4 * answer_rows.AHEAD


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(answer_rows.time, "monotonic", lambda: now[0])
    progress = Progress(1000, 100, lines.append)
    for _ in range(9):
        now[0] += 10.0
        progress.add(50)
    progress.close()
    assert lines == [
        "104 of 1,000 rows, 5.0 tokens/s, 2:29:20 left", "108 of 1,000 rows, 5.0 tokens/s, 2:28:40 left"
    ]  # fmt: skip


def test_seeds_of_rows_differ_between_rows_and_runs():
    seeds = {row_seed(seed, index) for seed in range(30) for index in range(30)}
    assert len(seeds) == 900 and max(seeds) < 2**32
    assert row_seed(5, 0) == 4069051389  # that of a run which another version goes on with


def test_what_ask_prints_of_choices_and_log_probabilities_stands_in_the_line(model, tmp_path):
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("Is it a colour?\nIs it a river?\n")
    command = ["batch", str(source), str(output), "--model", model, "--json", "--logprobs", "1", "--order", "input"]
    assert main([*command, "--choices", "yes,no"]) == 0
    for row in answers_in(output):
        assert row["text"] in ("yes", "no") and [choice["text"] for choice in row["choices"]] == ["yes", "no"]
        assert len(row["logprobs"]) == row["new_tokens"]
