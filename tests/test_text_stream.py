"""An answer as it grows: streamed text is a beginning of the whole text, whatever the ids."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from modelscope_dolly.prompt import DollyTokenizer
from modelscope_dolly.text_stream import TextStream
from tests.support.texts import BYTE_IDS, TEXT, TYPED_KEYS, examples


def stream(tokenizer: DollyTokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[TextStream, list[str], bool]:
    """Push like the engine, up to the first True: the answer, its text after each push, whether a push was True."""
    answer = TextStream(tokenizer, stop)
    texts, ended = [], False
    for token_id in ids:
        ended = answer.push(token_id)
        assert answer.texts.popleft() == answer.text
        texts.append(answer.text)
        if ended:
            break
    answer.finish()
    return answer, texts, ended


def first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    return min((text.find(one) for one in stop if one in text), default=None)


def assert_streams(tokenizer: DollyTokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> None:
    answer, texts, ended = stream(tokenizer, ids, stop)
    whole = tokenizer.decode(ids[: len(texts)])
    assert answer.text == whole[: first_stop(whole, stop)].strip()
    assert all(not text or answer.text.startswith(text) for text in texts)  # so no half character is ever shown
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(texts))
    assert not any(one in text for one in stop for text in (*texts, answer.text))
    # The engine stops at the very token that completed a stop string; a U+FFFD at the end is not complete.
    settled = [tokenizer.decode(ids[: n + 1]).rstrip("\ufffd") for n in range(len(ids))]
    complete = [n for n, text in enumerate(settled) if first_stop(text, stop) is not None]
    assert ended == bool(complete)
    assert len(texts) == (complete[0] + 1 if complete else len(ids))


@examples
@given(TEXT)
def test_streamed_text_only_grows_into_the_whole_text(tokenizer, text):
    assert_streams(tokenizer, tokenizer.encode_text(text))


@examples
@given(st.lists(st.integers(0, 1023)) | st.lists(BYTE_IDS))
def test_any_ids_stream_without_a_half_character(tokenizer, ids):
    assert_streams(tokenizer, ids)
    words = [token_id for token_id in ids if token_id not in tokenizer.special_ids]
    assert stream(tokenizer, ids)[0].text == stream(tokenizer, words)[0].text  # control tokens do not show


@examples
@given(st.data(), TEXT | TYPED_KEYS, st.lists(BYTE_IDS, max_size=4))
def test_stop_strings_end_the_answer_and_never_show(tokenizer, data, text, noise):
    ids = tokenizer.encode_text(text) + noise
    whole = tokenizer.decode(ids)
    begins = st.integers(0, max(0, len(whole) - 1))
    pieces = st.builds(lambda begin, length: whole[begin : begin + length] or "x", begins, st.integers(1, 12))
    stop = data.draw(st.lists(pieces | st.text(alphabet="ab\n#\ufffd", min_size=1), min_size=1, max_size=3))
    assert_streams(tokenizer, ids, tuple(stop))


def test_answer_of_control_tokens_alone_is_empty(tokenizer):
    answer, texts, ended = stream(tokenizer, sorted(tokenizer.special_ids))
    assert (answer.text, set(texts), ended) == ("", {""}, False)


def test_half_a_character_is_not_a_stop_string(tokenizer):
    answer, texts, ended = stream(tokenizer, tokenizer.encode_text("a🙂b"), ("\ufffd",))
    assert (answer.text, ended) == ("a🙂b", False)
    assert texts[0] == "a"
