"""The vocabulary of a GGUF file: complete, typed, and refused where llama.cpp would read it differently."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modelscope_dolly.checkpoint.tokenizer import read_tokenizer
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer
from tests.support.paths import SHARED_DATA, needs_shared_data
from tests.support.texts import TYPED_KEYS, examples

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed; it is in the extra `gguf`")

from modelscope_dolly.checkpoint.gguf_vocabulary import GGUFVocabulary, gguf_vocabulary  # noqa: E402

SPACES = "        "


def dolly_tokenizer(backend: Tokenizer) -> DollyTokenizer:
    return DollyTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
        )
    )


def changed(tokenizer: DollyTokenizer, change) -> DollyTokenizer:
    """The same tokenizer with a change to what tokenizer.json says."""
    state = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    change(state)
    return dolly_tokenizer(Tokenizer.from_str(json.dumps(state)))


@pytest.fixture(scope="module")
def with_spaces(tokenizer) -> DollyTokenizer:
    """As GPT-NeoX's own: a run of spaces is a token that is found before anything is merged, and is not special."""
    backend = Tokenizer.from_str(tokenizer.tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken(SPACES, special=False, normalized=True)])
    return dolly_tokenizer(backend)


def rebuilt(vocabulary: GGUFVocabulary) -> Tokenizer:
    """A tokenizer made of nothing but the vocabulary."""
    kinds = gguf.TokenType
    ordinary = {text: i for i, text in enumerate(vocabulary.tokens) if vocabulary.types[i] == kinds.NORMAL}
    added = [i for i, kind in enumerate(vocabulary.types) if kind in (kinds.CONTROL, kinds.USER_DEFINED)]
    everything = ordinary | {vocabulary.tokens[i]: i for i in added}
    backend = Tokenizer(models.BPE(everything, [tuple(merge.split(" ")) for merge in vocabulary.merges]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for i in added:
        special = vocabulary.types[i] == kinds.CONTROL
        token = AddedToken(vocabulary.tokens[i], special=special, normalized=not special)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
    return backend


def test_every_row_has_a_token_of_the_right_type(with_spaces):
    known = len(with_spaces.tokenizer)
    vocabulary = gguf_vocabulary(with_spaces, known + 5)
    kinds = gguf.TokenType
    assert len(vocabulary.tokens) == len(vocabulary.types) == known + 5
    for text, token_id in with_spaces.tokenizer.get_vocab().items():
        assert vocabulary.tokens[token_id] == text
    expected = dict.fromkeys((*CONTROL_KEYS, END_OF_TEXT), kinds.CONTROL) | {SPACES: kinds.USER_DEFINED}
    for text, kind in zip(vocabulary.tokens[:known], vocabulary.types[:known], strict=True):
        assert kind == expected.get(text, kinds.NORMAL)
    assert vocabulary.tokens[known:] == [f"[PAD{token_id}]" for token_id in range(known, known + 5)]
    assert vocabulary.types[known:] == [kinds.UNUSED] * 5


@examples
@given(text=TYPED_KEYS)
def test_nothing_else_is_needed_to_tokenize(with_spaces, text):
    text = text.replace(" ", SPACES + " ")
    vocabulary = gguf_vocabulary(with_spaces, len(with_spaces.tokenizer))
    expected = with_spaces.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
    assert rebuilt(vocabulary).encode(text, add_special_tokens=False).ids == expected


@needs_shared_data
def test_the_tokenizer_of_gpt_neox(tmp_path):
    shutil.copyfile(SHARED_DATA / "gpt-neox-20b-tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = read_tokenizer(tmp_path, add_keys=True)
    vocabulary = gguf_vocabulary(tokenizer, 50280)
    kinds = gguf.TokenType
    assert [vocabulary.types.count(kind) for kind in (kinds.CONTROL, kinds.USER_DEFINED, kinds.UNUSED)] == [5, 23, 0]
    assert tuple(vocabulary.tokens[50277:]) == CONTROL_KEYS and len(vocabulary.merges) == 50009
    text = "def f(x):\n            return 'naïve'  # 漢字 🙂\n"
    assert rebuilt(vocabulary).encode(text).ids == tokenizer.encode_text(text)


def _set(*path_and_value):
    *path, key, value = path_and_value

    def change(state: dict) -> None:
        for part in path:
            state = state[part]
        state[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("pre_tokenizer", "add_prefix_space", True), "pre_tokenizer.add_prefix_space is True"),
        (_set("pre_tokenizer", "use_regex", False), "pre_tokenizer.use_regex is False"),
        (_set("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer.type is 'Whitespace', llama.cpp reads 'Byte"),
        (_set("normalizer", {"type": "NFKC"}), "normalizer.type is 'NFKC', llama.cpp reads None or 'NFC'"),
        (_set("model", "ignore_merges", True), "model.ignore_merges is True"),
        (_set("model", "merges", []), "the model has no merges, and llama.cpp loads no such tokenizer"),
        (_set("added_tokens", 0, "lstrip", True), "looked for with single_word, lstrip or rstrip"),
    ],
)
def test_another_kind_of_tokenizer_is_refused(tokenizer, change, says):
    other = changed(tokenizer, change)
    with pytest.raises(CheckpointError) as caught:
        gguf_vocabulary(other, len(other.tokenizer))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_normalizer_it_is_taken(tokenizer):
    plain = changed(tokenizer, _set("normalizer", None))
    size = len(plain.tokenizer)
    assert gguf_vocabulary(plain, size) == gguf_vocabulary(tokenizer, size)


def test_two_tokens_of_the_same_spelling_are_refused(tokenizer):
    backend = Tokenizer.from_str(tokenizer.tokenizer.backend_tokenizer.to_str())
    rows = len(tokenizer.tokenizer) + 3
    backend.add_tokens([AddedToken(f"[PAD{rows - 1}]", special=False)])
    with pytest.raises(CheckpointError, match=rf"{rows - 3} and {rows - 1} are both spelled '\[PAD"):
        gguf_vocabulary(dolly_tokenizer(backend), rows)
