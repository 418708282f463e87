"""The engine's speech in, words out: the benchmarks' recogniser, and how many words it got wrong."""

from functools import cache

import numpy as np

from bench.recognise import Hear, sphinx, word_errors, words_of
from bench.speak import at_16_khz


@cache
def _recogniser() -> Hear:
    return sphinx()


def hear(pcm: np.ndarray) -> str:
    """What a recogniser without a grammar hears in int16 [samples] at 24 kHz."""
    return _recogniser()(at_16_khz(pcm))


def errors_and_words(said: str, heard: str) -> tuple[int, int]:
    """Word errors from `said` to `heard`, and the words of `said`."""
    words = words_of(said)
    return word_errors(words, words_of(heard)), len(words)
