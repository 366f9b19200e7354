"""Results on disk, the tables made of them, and the check against the card."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest

from modelscope_dolly.errors import SettingError
from modelscope_dolly.evaluation import store, tables
from modelscope_dolly.evaluation.comparison import (
    ResultRow,
    check_can_pass,
    differences,
    failures,
    measured_row,
    published_rows,
    reference_row,
    with_published,
)
from modelscope_dolly.evaluation.published import CORRECT, TASK_BY_NAME, TASK_NAMES
from modelscope_dolly.evaluation.store import RunIdentity, TaskResult

RUN = RunIdentity(
    model="dolly-v2-3b", revision=None, files_sha256="ab" * 32, dtype="bfloat16", softmax_dtype="float32",
    device="cpu", scorer="shared", batch_size="auto", limit=None, template="none", versions={"lm_eval": "0.4.13"},
)  # fmt: skip


def result(task: str, off: int = 0, run: RunIdentity = RUN, **changes) -> TaskResult:
    """The published count of dolly-v2-3b and a few more right answers."""
    right = dict(zip(TASK_NAMES, CORRECT["dolly-v2-3b"], strict=True))[task] + off
    values = dict(data="d" * 64, task_version="1.0", size=TASK_BY_NAME[task].size, exact=True)
    return TaskResult(task=task, run=run, correct={"acc": right, "acc_norm": right}, **{**values, **changes})


def whole(run: RunIdentity = RUN, **off: int) -> list[TaskResult]:
    return [result(name, off.get(name, 0), run) for name in TASK_NAMES]


def test_a_stored_result_comes_back(tmp_path):
    stored = result("piqa", speed={"seconds": 2.5}, finished="2026-01-01T00:00:00+00:00")
    path = store.write(tmp_path, stored, [{"doc_id": 0, "loglikelihoods": [-1.0, -2.0]}])
    assert store.read(path) == stored
    assert store.find(tmp_path, RUN, "piqa", "d" * 64, "1.0") == stored
    facts = json.loads(path.read_text())
    assert (
        facts["score"] == stored.card_correct / 1838 and facts["metric"] == "acc_norm" and facts["comparable"] is True
    )
    assert json.loads((path.parent / "piqa.samples.jsonl").read_text())["loglikelihoods"] == [-1.0, -2.0]


OTHERS = [
    {"model": "dolly-v2-7b"}, {"revision": "v2"}, {"files_sha256": "cd" * 32}, {"dtype": "float32"},
    {"softmax_dtype": "bfloat16"}, {"device": "NVIDIA H100"}, {"scorer": "hf"}, {"batch_size": "16"}, {"limit": 10},
    {"template": "dolly"}, {"versions": {"lm_eval": "0.4.12"}},
]  # fmt: skip


@pytest.mark.parametrize("change", OTHERS, ids=[next(iter(change)) for change in OTHERS])
def test_a_run_that_differs_in_anything_gets_no_stored_result(tmp_path, change):
    assert {field.name for field in dataclasses.fields(RunIdentity)} == {next(iter(change)) for change in OTHERS}
    store.write(tmp_path, result("piqa"), [])
    other = dataclasses.replace(RUN, **change)
    assert store.find(tmp_path, other, "piqa", "d" * 64, "1.0") is None
    # Not even where somebody moved the file into its directory.
    (tmp_path / RUN.directory).rename(tmp_path / other.directory)
    assert store.find(tmp_path, other, "piqa", "d" * 64, "1.0") is None


def test_other_data_other_task_version_or_lost_samples_are_run_again(tmp_path):
    path = store.write(tmp_path, result("piqa"), [])
    assert store.find(tmp_path, RUN, "piqa", "e" * 64, "1.0") is None
    assert store.find(tmp_path, RUN, "piqa", "d" * 64, "2.0") is None
    (path.parent / "piqa.samples.jsonl").unlink()
    assert store.find(tmp_path, RUN, "piqa", "d" * 64, "1.0") is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_result_is_one_clear_line(tmp_path, damage):
    path = store.write(tmp_path, result("piqa"), [])
    path.write_text(damage)
    with pytest.raises(Exception) as caught:
        store.find(tmp_path, RUN, "piqa", "d" * 64, "1.0")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_hub_names_make_directories_inside_the_output(tmp_path):
    for model in ("databricks/dolly-v2-3b", "../../etc", "/", "a b\n"):
        run = dataclasses.replace(RUN, model=model)
        path = store.write(tmp_path, result("piqa", run=run), [])
        assert path.parent.parent == tmp_path and path.parent.name == run.directory


def test_the_same_counts_reproduce_the_card():
    row, reference = measured_row(whole()), reference_row(None, "databricks/dolly-v2-3b")
    assert failures(row, reference) == []
    assert all(found.items == 0 for found in differences(row, reference).values())


def test_differences_are_in_items_and_standard_errors():
    found = differences(measured_row(whole(boolq=-50)), reference_row("dolly-v2-3b", ""))["boolq"]
    assert found.items == -50
    assert found.errors == pytest.approx(-50 / 3270 / 0.0086446, rel=1e-3)


@pytest.mark.parametrize(
    ("off", "says"),
    [
        ({"boolq": 49}, []),  # 1.498 points
        ({"boolq": 50}, ["boolq: +1.53 points"]),
        ({"openbookqa": -8}, ["openbookqa: -1.60 points"]),
        ({name: TASK_BY_NAME[name].size * 14 // 1000 for name in TASK_NAMES}, ["gmean: 0.559"]),
    ],
)
def test_check_allows_one_and_a_half_points_and_007(off, says):
    found = failures(measured_row(whole(**off)), reference_row("dolly-v2-3b", ""))
    assert len(found) == len(says)
    for message, start in zip(found, says, strict=True):
        assert message.startswith(start)


def test_check_fails_for_what_is_missing_or_not_comparable():
    reference = reference_row("dolly-v2-3b", "")
    assert failures(measured_row(whole()[:-1]), reference) == ["boolq: not run"]
    inexact = [dataclasses.replace(one, exact=one.task != "hellaswag") for one in whole()]
    assert failures(measured_row(inexact), reference) == ["not comparable: hellaswag is not the card's data"]
    limited = [dataclasses.replace(one, run=dataclasses.replace(RUN, limit=9), exact=None) for one in whole()]
    assert failures(measured_row(limited), reference) == ["not comparable: limit 9"]


def test_a_check_that_nobody_can_pass_is_refused():
    reference = reference_row("dolly-v2-3b", "")
    check_can_pass("x", reference, None, "none")
    for arguments, says in (
        (("x", reference, 5, "none"), "--limit"),
        (("x", reference, None, "dolly"), "--template dolly"),
        (("runs/final", None, None, "none"), "runs/final: the card has no row"),
    ):
        with pytest.raises(SettingError, match=says):
            check_can_pass(*arguments)
    with pytest.raises(SettingError, match="Did you mean 'dolly-v2-3b'"):
        reference_row("dolly-v2-3", "")


def test_rows_are_sorted_by_gmean_and_incomplete_ones_come_first():
    mine = measured_row(whole(boolq=10))
    half = measured_row(whole()[:3])
    assert half.gmean is None
    names = [(row.name, row.published) for row in with_published([mine, half])]
    at = names.index(("dolly-v2-3b", True))
    assert names[0] == ("dolly-v2-3b", False) and names[at + 1] == ("dolly-v2-3b", False)
    assert len(names) == 11


def limited_output(tmp_path):
    run = dataclasses.replace(RUN, limit=100)
    for name in TASK_NAMES:
        store.write(tmp_path, result(name, run=run, size=TASK_BY_NAME[name].size, exact=None), [])
    return tmp_path


def test_a_limit_is_told_wherever_the_result_appears(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    labels = []
    real = Axes.set_yticks
    monkeypatch.setattr(Axes, "set_yticks", lambda self, *a, **k: (labels.extend(a[1]), real(self, *a, **k))[1])
    files = tables.write_tables(limited_output(tmp_path), tables.all_rows(tmp_path))
    says = "NOT comparable: limit 100"
    assert [path.name for path in files] == ["table.md", "table.csv", "table.json", "plot.png"]
    assert says in (tmp_path / "table.md").read_text()
    assert any(says in label for label in labels)
    [line] = [
        row for row in csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())) if row["source"] != "card"
    ]
    assert (line["comparable"], line["why_not"]) == ("false", "limit 100")
    [row] = [row for row in json.loads((tmp_path / "table.json").read_text()) if row["source"] == "measured"]
    assert row["comparable"] is False and row["not_comparable_because"] == ["limit 100"]
    stored = json.loads(next(tmp_path.glob("*/piqa.json")).read_text())
    assert stored["comparable"] is False and stored["not_comparable_because"] == ["limit 100"]
    [mine] = [row for row in tables.all_rows(tmp_path) if not row.published]
    assert says in tables.text_table([mine])
    assert "NOT comparable" in tables.text_differences(mine, reference_row("dolly-v2-3b", ""))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_for_a_card_has_both_kinds_of_rows(tmp_path):
    for one in whole():
        store.write(tmp_path, one, [])
    lines = tables.markdown_table(tmp_path).splitlines()
    assert lines[0] == "| model | " + " | ".join(TASK_NAMES) + " | gmean |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:12]]
    [mine] = [row for row in cells if row[0] == "dolly-v2-3b"]
    [card] = [row for row in cells if row[0] == "dolly-v2-3b (card)"]
    assert mine[1:] == card[1:] and mine[-1] == "0.544886"
    assert len(cells) == 10


def test_no_results_is_said(tmp_path):
    with pytest.raises(SettingError, match="holds no results"):
        tables.markdown_table(tmp_path)


def test_a_plot_draws_intervals_inside_zero_and_one(tmp_path):
    row = ResultRow("tiny", {"piqa": (1, 2)}, published=False)
    assert tables.plot([*published_rows(), row], tmp_path / "plot.png").stat().st_size > 10_000


def test_another_revision_of_a_hub_model_has_another_name():
    run = dataclasses.replace(RUN, model="databricks/dolly-v2-3b", revision="v2")
    assert measured_row(whole(run)).name == "databricks/dolly-v2-3b@v2"
