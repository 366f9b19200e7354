"""Texts nobody would think of, for property tests."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT

KEYS = (*CONTROL_KEYS, END_OF_TEXT)
# Plain Unicode, and text dense in what is hard to stream: several bytes a character, joiners, white space, controls.
HARD = "ab e\u0301\u0308 \n\t\x00\x1f\u3000🙂👩\u200d👧漢字\ufffd#:<|"
TEXT = st.text() | st.text(alphabet=HARD)
BYTE_IDS = st.integers(1, 256)  # the byte alphabet of the nano tokenizer: most sequences are no UTF-8
examples = settings(deadline=None, max_examples=150)


def spliced(pieces: list[str], keys: list[str]) -> str:
    return "".join(part for pair in zip(pieces, keys, strict=False) for part in pair) + pieces[-1]


TYPED_KEYS = st.builds(spliced, st.lists(TEXT, min_size=1, max_size=5), st.lists(st.sampled_from(KEYS), min_size=1))
