"""What a run leaves for people."""

from __future__ import annotations

import json

import pytest

from modelscope_dolly.errors import CheckpointError
from train.data.batch_plan import packed_plan
from train.training.callbacks import Progress
from train.training.report import draw_loss, read_metrics, running_mean, summary


@pytest.fixture
def run(tmp_path):
    rows = []
    for step in range(1, 41):
        rows.append({"step": step, "loss": 5 / step, "lr": 1e-5, "tokens": 100, "seconds": 0.5})
        if step % 10 == 0:
            rows.append({"step": step, "eval_loss": 3.0 if step == 40 else 6 / step})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_metrics_are_told_apart(run):
    steps, evaluations = read_metrics(run)
    assert [row["step"] for row in steps] == list(range(1, 41))
    assert [row["step"] for row in evaluations] == [10, 20, 30, 40]


def test_loss_is_drawn_as_a_png(run):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (it is in the extra `train`)")
    path = draw_loss(run)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_summary_names_speed_first_last_and_best(run):
    text = summary(run)
    for part in ("40 steps, 4,000 tokens in 20 s: 200 a second", "5.0000 at the first", "0.1250 at the last",
                 "held-out loss 3.0000 at the last evaluation, 0.2000 at the best (step 30)"):  # fmt: skip
        assert part in text


def test_a_picture_is_whole_or_absent(run, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed (it is in the extra `train`)")
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        draw_loss(run)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"] and pyplot.get_fignums() == []


def test_without_metrics_there_is_nothing_to_draw_and_a_line_says_so(tmp_path):
    assert read_metrics(tmp_path) == ([], []) and draw_loss(tmp_path) is None
    assert summary(tmp_path) == f"no steps in {tmp_path / 'metrics.jsonl'}"
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be read: Is a directory"):
        read_metrics(tmp_path)


def test_running_mean_looks_back_only():
    assert running_mean([4.0, 2.0, 0.0, 6.0], 2) == [4.0, 3.0, 1.0, 3.0]
    assert running_mean([], 5) == []


class State:
    global_step, max_steps = 0, 6


class Arguments:
    process_index = 0


def test_without_a_terminal_progress_is_whole_lines(capsys):
    plan = packed_plan([10] * 12, 1, 1, 2, 1, 100)
    progress, state = Progress(plan), State()
    progress.on_train_begin(Arguments(), state, None)
    for step in range(1, 7):
        state.global_step = step
        progress.on_log(Arguments(), state, None, logs={"loss": 1.0 / step})
    progress.on_log(Arguments(), state, None, logs={"eval_loss": 0.5})
    progress.on_train_end(Arguments(), state, None)
    out, err = capsys.readouterr()
    assert err == "" and "\r" not in out
    assert out.splitlines()[0].startswith("step 6/6: loss 0.1667, ") and "100 % useful" in out
    assert out.splitlines()[-1] == "step 6: held-out loss 0.5000"


def test_other_processes_say_nothing(capsys):
    plan = packed_plan([10] * 4, 1, 1, 2, 2, 100)
    progress, state, other = Progress(plan), State(), Arguments()
    other.process_index = 1
    state.global_step = state.max_steps
    progress.on_train_begin(other, state, None)
    progress.on_log(other, state, None, logs={"loss": 1.0})
    assert capsys.readouterr() == ("", "")
