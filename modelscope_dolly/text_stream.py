"""From the ids of an answer, as they are drawn, to text that only grows (incremental detokenisation)."""

from __future__ import annotations

import codecs
from collections import deque

from modelscope_dolly.prompt import DollyTokenizer

_REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one answer.

    `push` takes an id; what it costs does not grow with the answer. `text` only ever grows: it holds back half a UTF-8
    character, white space at the end, and whatever might still become a stop string. Control tokens never show. After
    the last id, `finish` makes `text` the whole answer, stripped as the reference does.

    Args:
        tokenizer: whose tokens are bytes.
        stop: strings that end the answer; the text before the first one is the answer.
        strip: leave out white space around the text, as the reference does; a raw prompt is continued without that.

    Attributes:
        text: so far.
        texts: `text` after each push, for a reader in another thread, who takes them from the left.
    """

    def __init__(self, tokenizer: DollyTokenizer, stop: tuple[str, ...] = (), strip: bool = True):
        self._tokenizer, self._stop, self._strip = tokenizer, stop, strip
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # decoded, and not shown yet; a stop string that is still to come begins in here or later
        self.text = ""
        self.texts: deque[str] = deque()

    def push(self, token_id: int) -> bool:
        """Take the next id; True when a stop string has ended the answer."""
        self._held += self._bytes.decode(self._tokenizer.token_bytes(token_id))
        settled = self._held.rstrip(_REPLACEMENT)
        end = self._first_stop(settled)
        self._show(settled[: len(settled) - self._possible_stop(settled)] if end is None else settled[:end])
        self.texts.append(self.text)
        return end is not None

    def finish(self) -> None:
        """No more ids will come."""
        self._held += self._bytes.decode(b"", final=True)
        self._show(self._held[: self._first_stop(self._held)])
        self._held = ""

    def _show(self, settled: str) -> None:
        """Add the beginning of what is held, but for white space around the text."""
        if not self._strip:
            self.text += settled
            self._held = self._held[len(settled) :]
            return
        shown = settled.rstrip()
        kept = self._held[len(shown) :] if self.text or shown else self._held[len(settled) :]
        self.text += shown if self.text else shown.lstrip()
        self._held = kept

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that could grow into a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
