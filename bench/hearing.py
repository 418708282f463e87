"""Pieces of PCM and when each arrived in, what a listener heard out: first byte, first playable, first audible sample.

The listener's player has no buffer: it begins with the first whole sample, and waits whenever it has played all it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipecat_qwen3.backend import SAMPLE_RATE
from pipecat_qwen3.delivery import SILENCE, WINDOW

SAMPLE_BYTES = 2

SLACK_S = 0.001
"""A piece that is late by less is no underrun: clocks and threads are no finer."""


@dataclass(frozen=True)
class Heard:
    """Seconds from when the request began; None for what never came.

    first_byte_s      any audio byte
    first_playable_s  a whole sample
    first_audible_s   when the first 10 ms above -40 dBFS (as in Pipecat's time to first audio) are played
    silence_s         audio before that
    audio_s           all of it
    total_s           the last byte
    stalled_s         the player waited so long in all, `underruns` times
    """

    first_byte_s: float | None
    first_playable_s: float | None
    first_audible_s: float | None
    silence_s: float
    audio_s: float
    total_s: float | None
    stalled_s: float
    underruns: int


def hear(arrivals: Sequence[tuple[float, bytes]]) -> Heard:
    """Play (seconds, PCM16 mono 24 kHz) pieces as they arrive; a piece may end in the middle of a sample."""
    arrivals = [(at, piece) for at, piece in arrivals if piece]
    pcm = b"".join(piece for _, piece in arrivals)
    samples = np.frombuffer(pcm[: len(pcm) // SAMPLE_BYTES * SAMPLE_BYTES], "<i2") / 32768.0
    ends = np.cumsum([len(piece) for _, piece in arrivals], dtype=int) // SAMPLE_BYTES
    begins = [0, *ends][: len(ends)]
    plays, until, stalled, underruns = [], None, 0.0, 0
    for (at, _), begin, end in zip(arrivals, begins, ends, strict=True):
        if until is not None and at > until + SLACK_S:
            stalled, underruns = stalled + at - until, underruns + 1
        start = at if until is None else max(at, until)
        plays.append(start)
        until = start + (end - begin) / SAMPLE_RATE if end else None
    loud = _first_loud(samples)
    audible = None
    if loud is not None:
        piece = int(np.searchsorted(ends, loud, side="right"))
        audible = plays[piece] + (loud - begins[piece]) / SAMPLE_RATE
    return Heard(
        first_byte_s=arrivals[0][0] if arrivals else None,
        first_playable_s=next((at for (at, _), end in zip(arrivals, ends, strict=True) if end), None),
        first_audible_s=audible,
        silence_s=(len(samples) if loud is None else loud) / SAMPLE_RATE,
        audio_s=len(samples) / SAMPLE_RATE,
        total_s=arrivals[-1][0] if arrivals else None,
        stalled_s=stalled,
        underruns=underruns,
    )


def _first_loud(samples: np.ndarray) -> int | None:
    """First sample of the first window of 10 ms that is no silence; samples are in [-1, 1]."""
    windows = samples[: len(samples) // WINDOW * WINDOW].reshape(-1, WINDOW)
    loud = np.sqrt(np.square(windows).mean(-1)) > SILENCE
    return int(loud.argmax()) * WINDOW if loud.any() else None
