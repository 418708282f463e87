"""Text and produced audio in, word start times out: an estimate from the position in the text.

The speaking rate starts at 15 characters a second and is corrected by every utterance that ends naturally. Times are
monotone and never lie beyond the audio. Knows no tensors.
"""

import re
from dataclasses import dataclass

# A run without spaces; of scripts that are written without them, every character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff][^\w\s]*|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")

_LEARN = 0.3


@dataclass
class Rate:
    """Characters a second of one speaker, shared by its utterances."""

    characters_per_second: float = 15.0

    def correct(self, characters: int, seconds: float) -> None:
        """Move towards what an utterance that ended naturally has shown; implausible ones teach nothing."""
        seen = characters / seconds if seconds > 0 else 0.0
        if 3 <= seen <= 60:
            self.characters_per_second += _LEARN * (seen - self.characters_per_second)


class WordTimes:
    """Word times of one utterance, whose text may still be growing."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._text = ""
        self._at = 0
        self._last = 0.0
        self._left = -1
        self._complete = False

    def feed(self, text: str) -> None:
        """Append text."""
        self._text += text

    def end(self) -> None:
        """No more text will come: the last word is whole."""
        self._complete = True

    def until(self, seconds: float) -> tuple[tuple[str, float], ...]:
        """The words that begin before `seconds` of produced audio and were not given out before."""
        words = []
        for match in _WORD.finditer(self._text, self._at):
            start = match.start() / self._rate.characters_per_second
            whole = self._complete or match.end() < len(self._text)
            if start >= seconds or not whole:
                break
            self._last = max(self._last, start)
            words.append((match.group(), self._last))
            self._at = match.end()
        return tuple(words)

    def unspoken(self, seconds: float) -> str:
        """The text from the first word on that begins after `seconds` of audio; at least a word less at every call."""
        starts = (match.start() for match in _WORD.finditer(self._text))
        reached = max(seconds * self._rate.characters_per_second, self._left + 1)
        self._left = next((start for start in starts if start >= reached), len(self._text))
        return self._text[self._left :]

    def rest(self, seconds: float, natural: bool) -> tuple[tuple[str, float], ...]:
        """The words left when the speech ends at `seconds`: spread over the audio that remains.

        natural   the voice said all of its text; otherwise the words that were not reached are not given out
        """
        if not natural:
            return self.until(seconds)
        left = list(_WORD.finditer(self._text, self._at))
        spoken = len(self._text.rstrip())
        if left:
            first = min(self._last, seconds)
            span, begin = seconds - first, left[0].start()
            length = max(1, spoken - begin)
            # An empty start would repeat the last word's time: begin one word further when something was said.
            offset = span / (len(left) + 1) if self._at else 0.0
            times = [first + offset + (span - offset) * (m.start() - begin) / length for m in left]
            words = tuple((m.group(), t) for m, t in zip(left, times, strict=True))
        else:
            words = ()
        self._rate.correct(spoken, seconds)
        self._at = len(self._text)
        return words
