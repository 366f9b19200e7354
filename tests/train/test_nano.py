"""The nano dolly: its records, its tokenizer, and the base that training starts from."""

from __future__ import annotations

from collections import Counter

import pytest

from modelscope_dolly.checkpoint.check import check_directory
from modelscope_dolly.checkpoint.reader import open_checkpoint
from train import demo, nano

CATEGORIES = {
    "open_qa", "general_qa", "closed_qa", "information_extraction", "summarization", "brainstorming", "classification",
    "creative_writing",
}  # fmt: skip


def test_records_cover_the_eight_categories(records):
    assert len(records) >= 120
    counts = Counter(record["category"] for record in records)
    assert set(counts) == CATEGORIES and min(counts.values()) >= 10
    assert len({record["instruction"] for record in records}) == len(records)
    assert "Explain to me the difference between nuclear fission and fusion." in {r["instruction"] for r in records}


def test_base_is_a_sound_checkpoint_and_always_the_same(tmp_path, capsys):
    for name in ("one", "two"):
        assert nano.main([str(tmp_path / name)]) == 0
    one, two = (open_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one.parameters == two.parameters > 10**6
    assert {finding.status for finding in check_directory(one.path)} == {"ok"}
    assert (one.path / "manifest.json").read_text() == (two.path / "manifest.json").read_text()


def test_base_that_exists_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    assert nano.main([str(tmp_path / "base")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("train.nano: ") and "exists already" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [([], "required: output"), (["a", "b"], "unknown argument 'b'"), (["/dev/null/a"], "cannot be written")],
)
def test_a_mistake_is_one_line(words, says, capsys):
    assert nano.main(words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("train.nano: ") and says in told


def test_a_mistake_in_the_command_of_the_demo_is_one_line(capsys):
    assert demo.main(["--outptu", "x"]) == 2
    assert capsys.readouterr().err.startswith("train.demo: unknown argument '--outptu'. Did you mean '--output'?")


def test_tokenizer_gives_back_every_record(records):
    tokenizer = nano.build_tokenizer(records)
    count = 0
    for record in records:
        ids, prompt = tokenizer.encode_example(record["instruction"], record["context"], record["response"])
        assert tokenizer.decode(ids[prompt:]).strip() == record["response"]
        count += 1
    assert count == len(records)
