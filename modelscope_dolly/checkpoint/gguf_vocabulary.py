"""The tokenizer of a checkpoint in the form that GGUF stores and llama.cpp reads: tokens, their types, merges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.prompt import DollyTokenizer

#: How llama.cpp splits text into words before it merges: by the expression of GPT-2, which is GPT-NeoX's, too.
PRE_TOKENIZER = "gpt-2"
#: What llama.cpp takes for granted of a tokenizer with this pre-tokenizer. It applies no normalizer: text that is not
#: in NFC gives other tokens there (docs/serving.md).
_ASSUMED: dict[str, tuple] = {
    "model.type": ("BPE",),
    "model.byte_fallback": (False,),
    "model.ignore_merges": (False,),
    "model.continuing_subword_prefix": (None, ""),
    "model.end_of_word_suffix": (None, ""),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (True,),
    "normalizer.type": (None, "NFC"),
}


@dataclass(frozen=True)
class GGUFVocabulary:
    """One token and one type for each row of the embedding, and the merges in order of their rank.

    Attributes:
        tokens: byte-level spelling of an ordinary token, plain text of an added one, a placeholder for an unused row.
        types: gguf.TokenType of each token. Control tokens are recognised in a prompt and not printed; user-defined
            ones, such as GPT-NeoX's runs of spaces, are ordinary text that is looked for before anything is merged.
        merges: left and right part, with a space between.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]

    @property
    def size(self) -> int:
        """Bytes it takes in a file, roughly."""
        return sum(len(text.encode("utf-8")) + 12 for text in (*self.tokens, *self.merges))


def gguf_vocabulary(tokenizer: DollyTokenizer, rows: int) -> GGUFVocabulary:
    """The vocabulary of a network with this many rows in its embedding; ids without a token become placeholders.

    Raises:
        CheckpointError: llama.cpp would split text in another way than this tokenizer does.
    """
    from gguf import TokenType

    backend = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    _check(backend)
    ordinary = {token_id: token for token, token_id in backend["model"]["vocab"].items()}
    added = {token["id"]: token for token in backend["added_tokens"]}
    tokens, types = [], []
    for token_id in range(rows):
        if token_id in added:
            text = added[token_id]["content"]
            kind = TokenType.CONTROL if added[token_id]["special"] else TokenType.USER_DEFINED
        elif token_id in ordinary:
            text, kind = ordinary[token_id], TokenType.NORMAL
        else:
            text, kind = f"[PAD{token_id}]", TokenType.UNUSED
        tokens.append(text)
        types.append(int(kind))
    _check_spellings(tokens)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    return GGUFVocabulary(tokens, types, merges)


def _check(backend: Mapping[str, Any]) -> None:
    for name, allowed in _ASSUMED.items():
        part, key = name.split(".")
        found = (backend[part] or {}).get(key, False if allowed == (False,) else None)
        if found not in allowed:
            raise CheckpointError(
                f"tokenizer.json: {name} is {found!r}, llama.cpp reads {' or '.join(map(repr, allowed))} for a "
                "tokenizer of the GPT-NeoX kind and would make other tokens of the same text"
            )
    if not backend["model"]["merges"]:
        raise CheckpointError("tokenizer.json: the model has no merges, and llama.cpp loads no such tokenizer")
    for token in backend["added_tokens"]:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            raise CheckpointError(
                f"tokenizer.json: the added token {token['content']!r} is looked for with single_word, lstrip or "
                "rstrip, which llama.cpp does not do"
            )


def _check_spellings(tokens: list[str]) -> None:
    """llama.cpp finds a token by its text, so no two may have the same."""
    seen: dict[str, int] = {}
    for token_id, text in enumerate(tokens):
        if text in seen:
            raise CheckpointError(f"tokenizer.json: the tokens {seen[text]} and {token_id} are both spelled {text!r}")
        seen[text] = token_id
