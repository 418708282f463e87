"""Speech in, words out: pocketsphinx, whose English model comes inside its wheel, and the word error rate."""

import re
from functools import cache

import numpy as np
import soxr
from pocketsphinx import Decoder

from pipecat_qwen3.backend import SAMPLE_RATE


@cache
def _decoder() -> Decoder:
    return Decoder(loglevel="FATAL")


def hear(pcm: np.ndarray) -> str:
    """What a recogniser without a grammar hears in int16 [samples] at 24 kHz."""
    audio = soxr.resample(pcm.astype(np.float32) / 32768, SAMPLE_RATE, 16_000)
    decoder = _decoder()
    decoder.start_utt()
    decoder.process_raw((np.clip(audio, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    heard = decoder.hyp()
    return heard.hypstr if heard else ""


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Substitutions, insertions and deletions from `said` to `heard`, and the words of `said` (Levenshtein)."""
    wanted, got = (re.findall(r"[a-z']+", text.lower()) for text in (said, heard))
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(got, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1], len(wanted)
