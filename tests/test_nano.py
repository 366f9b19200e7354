"""The nano recipe: its records, and a few steps of its training."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from modelscope_dolly.checkpoint import open_checkpoint
from train import nano

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


def test_only_the_answer_and_its_end_are_learned(records):
    tokenizer = nano.build_tokenizer(records)
    examples = nano.build_examples(records, tokenizer)
    assert len(examples) == len(records)
    for (ids, labels), record in zip(examples, records, strict=True):
        learned = labels[labels != -100].tolist()
        assert learned == ids[-len(learned) :].tolist()
        assert learned[-1] == tokenizer.control.end
        assert tokenizer.decode(learned).strip() == record["response"]
        assert ids[-len(learned) - 1] == tokenizer.control.response


def test_padding_changes_neither_loss_nor_gradient(records):
    tokenizer = nano.build_tokenizer(records)
    examples = nano.build_examples(records[:3], tokenizer)
    model = nano.build_model(len(tokenizer.tokenizer)).eval()
    ids, labels = nano._pad(examples)
    together = model(input_ids=ids, labels=labels, use_cache=False).loss
    count = sum(int((label[1:] != -100).sum()) for _, label in examples)
    alone = sum(
        model(input_ids=i[None], labels=label[None], use_cache=False).loss * int((label[1:] != -100).sum())
        for i, label in examples
    )
    assert torch.allclose(together, alone / count, atol=1e-5)


def test_two_epochs_learn_and_repeat_exactly(records, tmp_path):
    tokenizer = nano.build_tokenizer(records)
    examples = nano.build_examples(records[:16], tokenizer)
    losses = []
    for _ in range(2):
        model = nano.build_model(len(tokenizer.tokenizer))
        losses.append([nano.train(model, examples, epochs=epochs) for epochs in (1, 3)])
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0]


def test_command_writes_a_checkpoint_and_refuses_to_overwrite_it(tmp_path, capsys):
    target = tmp_path / "nano"
    assert nano.main([str(target), "--epochs", "1"]) == 0
    assert open_checkpoint(target).parameters > 10**6
    assert nano.main([str(target), "--epochs", "1"]) == 2
    assert "exists already; pass --replace" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        nano.main([])
