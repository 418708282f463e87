"""Text in pieces, token ids out: the same ids as for the whole text, however it was cut.

The tokenizer splits text before it merges, so text may be released up to the last whitespace run without changing any
id (an arbitrary cut changes earlier ids in more than half of all cases). Knows no tensors.
"""

import re
import threading
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A run that starts with a newline may belong to the punctuation before it, so it is no boundary.
_BOUNDARY = re.compile(r"(?<=\S)[^\S\r\n]\s*(?=\S)")

# A fast tokenizer sets its truncation and padding at every call and fails when two threads do so at once.
_ONE_AT_A_TIME = threading.Lock()

_RUN = 16
_HELD = 4


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of user text; a control token spelt out in it is plain text. Safe from any thread."""
    with _ONE_AT_A_TIME:
        return tokenizer(well_formed(text), add_special_tokens=False, split_special_tokens=True).input_ids  # type: ignore[return-value]


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced: what UTF-8 and the tokenizer can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextStream:
    """Grows by `feed`, closes by `end`; both return the ids that no later text can change."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._held = ""
        self._started = False
        self.ended = False

    def feed(self, text: str) -> list[int]:
        """Append text and return the ids that are now certain."""
        self._held += text
        if not self._started:
            # The prompt's template ends in a newline, with which leading newlines would merge.
            self._held = self._held.lstrip("\r\n")
        cut = _safe_cut(self._held)
        return self._release(cut)

    def end(self) -> list[int]:
        """No more text will come: the remaining ids."""
        self.ended = True
        if not self._started and not self._held.strip():
            return []  # whitespace alone is nothing to speak
        return self._release(len(self._held))

    def again(self, text: str) -> tuple["TextStream", list[int]]:
        """Another stream that begins with `text` and ends, or goes on, as this one; and the first ids of it."""
        other = TextStream(self._tokenizer)
        ids = other.feed(text)
        return other, ids + other.end() if self.ended else ids

    def says_something(self, ids: Sequence[int]) -> bool:
        """Whether there is a letter or digit in these ids; half a character counts as one."""
        return any(c.isalnum() or c == "\ufffd" for c in self._tokenizer.decode(list(ids)))

    def _release(self, cut: int) -> list[int]:
        ready, self._held = self._held[:cut], self._held[cut:]
        if not ready:
            return []
        self._started = True
        return encode(self._tokenizer, ready)


def _safe_cut(text: str) -> int:
    """Where `text` may be cut: before its last whitespace run, or inside a long run of a script without spaces."""
    cut = 0
    for match in _BOUNDARY.finditer(text):
        cut = match.start()
    run = text[cut:]
    if len(run) > _RUN and all(ord(c) >= 0x2E80 for c in run[-_HELD - 1 :]):
        cut = len(text) - _HELD
        while cut and unicodedata.combining(text[cut]):
            cut -= 1
    return cut
