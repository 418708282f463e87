"""Real ears for bots without a key: speech in, what Whisper heard out. The model is loaded once for all clients.

Pipecat's own Whisper service loads it anew for each of them, on the event loop, where all others fall silent meanwhile.
"""

import importlib
import threading
from functools import cache, partial
from typing import Any

import numpy as np
import soxr

from bots.local_stt import LocalSTTService

MODEL = "Systran/faster-distil-whisper-medium.en"
"""English, as in Pipecat's service. Any other of faster-whisper does; the multilingual ones find the language."""

RATE = 16_000
"""Samples a second that Whisper wants."""

SPEECH = 0.4
"""A stretch that is less likely than this to be no speech is speech, as in Pipecat's service."""


class SharedWhisperSTTService(LocalSTTService):
    """Hears with the one Whisper of this process."""

    def __init__(self, name: str | None = None) -> None:
        """Load nothing; `model()` has."""
        name = name or MODEL
        super().__init__(partial(hear, name=name), model=name, language=None, ttfs_p99_latency=2.0)


_one_at_a_time = threading.Lock()


def hear(audio: bytes, rate: int, name: str = MODEL) -> str:
    """What is said in PCM16 mono, "" if nothing is."""
    samples = soxr.resample(np.frombuffer(audio, np.int16).astype(np.float32) / 32768, rate, RATE)
    with _one_at_a_time:  # it decodes while the segments are read
        segments, _ = model(name).transcribe(samples)
        return " ".join(segment.text.strip() for segment in segments if segment.no_speech_prob < SPEECH)


@cache
def model(name: str = MODEL) -> Any:
    """The process's Whisper; the first call loads it, and downloads it once. Raises SystemExit where that fails."""
    try:
        return importlib.import_module("faster_whisper").WhisperModel(name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SystemExit(
            f"whisper's model {name} could not be loaded ({reason}); it is downloaded once from Hugging Face: "
            "connect this machine, or copy its cache here and set HF_HOME, or leave --stt out"
        ) from None
