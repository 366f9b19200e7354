"""Several sources: counts of each, shares and repeats, duplicates across them, and what the split gives away."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.support.record_files import GOOD, as_csv, jsonl, write
from tests.support.training_runs import material, write_recipe
from train.config import build
from train.data.data_report import PROBLEMS_FILE
from train.data.sources import read_records
from train.data.validate import check_records, shown_in_an_epoch, split, with_split
from train.prepare import prepare
from train.recipe_file import read_recipe


def rows(count: int, word: str) -> list[dict]:
    return [{"instruction": f"{word} {number}?", "response": f"{number} {word}."} for number in range(count)]


@pytest.fixture
def mix(tmp_path) -> list:
    """Ten records with a bad line, and six of alpaca's columns of which half is taken, twice in an epoch."""
    alpaca = [{"instruction": row["instruction"], "output": row["response"]} for row in rows(6, "b")]
    return [
        write(tmp_path / "a.jsonl", jsonl(rows(10, "a")) + b"no\n"),
        {"path": write(tmp_path / "b.csv", as_csv(alpaca, ("instruction", "output"))), "share": 0.5, "repeat": 2},
    ]


def test_the_report_counts_each_source(mix, tokenizer):
    checked = check_records(read_records(mix, seed=1), tokenizer, 2048)
    report = with_split(checked, split(13, 4, 1)[1])
    first, second = report.sources
    assert (first.layout, first.rows, first.taken, first.kept, first.repeat) == ("dolly", 11, 11, 10, 1)
    assert (second.layout, second.rows, second.taken, second.kept, second.repeat) == ("alpaca", 6, 3, 3, 2)
    assert first.held_out + second.held_out == 4
    text = str(report)
    assert text.startswith("2 sources: 14 records, 13 kept with")
    assert "a.jsonl (dolly): 11 records, 10 kept, " in text
    assert "b.csv (alpaca): 6 records, 3 taken, 3 kept" in text and "each shown 2 times in an epoch" in text
    assert f"{first.name}, line 11: not_json" in text
    assert json.loads(json.dumps(report.as_dict()))["sources"][1]["taken"] == 3


def test_a_repeat_shows_training_records_again_and_never_one_that_is_held_out(mix, tokenizer):
    checked = check_records(read_records(mix, seed=1), tokenizer, 2048)
    train, test = split(13, 4, 1)
    shown = Counter(shown_in_an_epoch(train, checked.repeats))
    assert set(shown) == set(train) and not set(shown) & set(test)
    assert shown == {index: 2 if checked.records[index].source else 1 for index in train}


def test_columns_of_an_entry_win_over_those_of_the_recipe(tmp_path, tokenizer):
    one = write(tmp_path / "a.csv", "q,a\nWhy?,So.\n")
    other = write(tmp_path / "b.csv", "ask,say\nHow?,Thus.\n")
    entry = {"path": other, "columns": {"instruction": "ask", "response": "say"}}
    sources = read_records([one, entry], {"instruction": "q", "response": "a"})
    assert [record.response for record in check_records(sources, tokenizer, 2048).records] == ["So.", "Thus."]


LONG = "Dew is water that the cool air of the morning leaves on grass, on leaves and on spiders' webs."


def test_duplicates_are_found_across_sources_and_dropped_on_request(tmp_path, tokenizer):
    near = {"instruction": "What is dew", "response": LONG.upper()}
    dataset = [
        write(tmp_path / "a.jsonl", jsonl([{**GOOD, "response": LONG}, rows(1, "a")[0]])),
        write(tmp_path / "b.jsonl", jsonl([near, *rows(1, "a"), *rows(1, "b")])),
    ]
    checked = check_records(read_records(dataset), tokenizer, 2048)
    assert [(it.source, it.line, it.kind, it.detail.split("/")[0]) for it in checked.report.problems] == [
        (1, 1, "near_duplicate", "100 % like line 1 of "),
        (1, 2, "duplicate", "equal to line 2 of "),
    ]
    assert len(checked.records) == 5
    lean = check_records(read_records(dataset), tokenizer, 2048, deduplicate=True, strict=True)
    assert [(record.source, record.line) for record in lean.records] == [(0, 1), (0, 2), (1, 3)]
    assert lean.report.dropped["removed_duplicate"] == lean.report.dropped["removed_near_duplicate"] == 1
    assert lean.duplicates == [] and lean.report.unusable == 0


def test_a_held_out_record_that_is_trained_on_elsewhere_is_a_leak(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", jsonl([*rows(3, "a"), rows(3, "a")[1], *rows(2, "b")]))
    checked = check_records(read_records(path), tokenizer, 2048)
    assert with_split(checked, [1, 3, 4]).noted["leak"] == 0  # both are held out
    for held_out, other in ((3, 2), (1, 4)):
        report = with_split(checked, [held_out])
        [leak] = [problem for problem in report.problems if problem.kind == "leak"]
        assert (leak.line, report.noted["leak"]) == (held_out + 1, 1)
        assert leak.detail == f"held out, and the training record in line {other} says the same"


def test_a_mix_of_one_file_is_that_file(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path))
    alone = prepare(build(recipe).config, 1)
    listed = prepare(build({**recipe, "dataset": [{"path": recipe["dataset"]}]}).config, 1)
    assert (alone.sha256, alone.plan.hash) == (listed.sha256, listed.plan.hash)
    twice = prepare(build({**recipe, "dataset": {"path": recipe["dataset"], "repeat": 2}}).config, 1)
    assert len(twice.examples) == 2 * len(alone.examples) and twice.held_out == alone.held_out


def test_refused_records_are_all_in_a_file(tmp_path, capfd):
    from train.finetune import main

    records = (material() / "records.jsonl").read_bytes() + b"no\n" * 30
    recipe = write_recipe(tmp_path, dataset=write(tmp_path / "bad.jsonl", records), strict=True)
    assert main([str(recipe)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    path = tmp_path / "run" / PROBLEMS_FILE
    assert line.endswith(f"Repair them, or turn strict off to drop them; all of them are in {path}")
    assert line.count("not_json,") == 10 and "and 20 more" in line
    listed = [json.loads(text) for text in path.read_text().splitlines()]
    assert len(listed) == 30 and listed[-1]["line"] == 70 and listed[0]["source"].endswith("bad.jsonl")
    assert [it.name for it in (tmp_path / "run").iterdir()] == [PROBLEMS_FILE]
