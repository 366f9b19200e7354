"""From the ids of an answer, as they are drawn, to text that only grows (detokenisation)."""

from __future__ import annotations

from modelscope_dolly.prompt import DollyTokenizer


class TextStream:
    """The text of one answer.

    `push` takes an id. `text` only ever grows: it holds back half a UTF-8 character, white space at the end, and
    whatever might still become a stop string. Control tokens never show. After the last id, `finish` makes `text` the
    whole answer, stripped as the reference does.

    Args:
        tokenizer: decodes. Its decoder is byte-level: the text of the first ids is a beginning of the whole text, but
            for an unfinished character at its end.
        stop: strings that end the answer; the text before the first one is the answer.

    Attributes:
        ids: that were pushed.
        text: so far.
        grew: whether the last push changed `text`.
    """

    def __init__(self, tokenizer: DollyTokenizer, stop: tuple[str, ...] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self.ids: list[int] = []
        self.text = ""
        self.grew = False

    def push(self, token_id: int) -> bool:
        """Take the next id; True when a stop string has ended the answer."""
        self.ids.append(token_id)
        decoded = self._tokenizer.decode(self.ids).rstrip("\ufffd")
        end = self._first_stop(decoded)
        if end is None:
            decoded = decoded[: len(decoded) - self._possible_stop(decoded)]
        text = decoded[:end].strip()
        self.grew = text != self.text
        self.text = text
        return end is not None

    def finish(self) -> None:
        """No more ids will come."""
        decoded = self._tokenizer.decode(self.ids)
        self.text = decoded[: self._first_stop(decoded)].strip()

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that could grow into a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
