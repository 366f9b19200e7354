"""Examples of training over all of databricks-dolly-15k: those of the public preprocessing and collator.

The public code formats each record as one string, tokenizes it, drops what has 2048 tokens or more, and masks all
labels up to and including the first response key that it finds (databrickslabs/dolly, training/trainer.py, 905e58a).
"""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer, render_example
from tests.support.paths import SHARED_DATA, needs_shared_data
from train.data.collate import IGNORED, packed_batch
from train.data.sources import read_records
from train.data.validate import check_records

MAX_LENGTH = 2048


@pytest.fixture(scope="module")
def neox() -> DollyTokenizer:
    backend = Tokenizer.from_file(str(SHARED_DATA / "gpt-neox-20b-tokenizer.json"))
    backend.add_special_tokens([AddedToken(key, special=True, normalized=False) for key in CONTROL_KEYS])
    return DollyTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT))


@needs_shared_data
def test_all_examples_and_labels_are_those_of_the_reference(neox):
    data = SHARED_DATA / "databricks-dolly-15k.jsonl"
    checked = check_records(read_records(str(data)), neox, MAX_LENGTH)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    texts = [render_example(row["instruction"], row["context"], row["response"]) for row in rows]
    encoded = neox.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    reference = [encoding.ids for encoding in encoded if len(encoding.ids) < MAX_LENGTH]
    assert len(rows) == 15_015 and len(reference) == len(checked.ids) == 14_977
    assert list(map(list, checked.ids)) == reference
    assert sum(map(len, reference)) == 2_948_863
    labels = visited = 0
    for ids, prompt in zip(checked.ids, checked.prompt_lengths, strict=True):
        key = ids.index(neox.control.response)
        masked = [IGNORED] * (key + 1) + list(ids[key + 1 :])  # the reference collator's; the model shifts them by one
        ours = packed_batch([(ids, prompt)], 0)["labels"][0].tolist()
        assert ours == [*masked[1:], IGNORED]
        labels += len(ids) - prompt
        visited += 1
    assert (visited, labels) == (14_977, 1_213_472)
