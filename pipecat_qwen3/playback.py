"""When the audio of one context will be heard, and at what rate: the clock of its words and its resampler.

Shared by the Pipecat services; knows neither a Backend nor a pipeline.
"""

import re
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
from pipecat.audio.utils import create_stream_resampler

from pipecat_qwen3.backend import SAMPLE_RATE, Chunk, Stream

_SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Han, Hiragana, Katakana: scripts that put no spaces between words."""


@dataclass
class Playback:
    """Where the audio of one context will be heard: the clock of its words.

    Seconds count from the context's first sample. Speech that arrives after everything before it has been heard
    is heard late, so the clock follows the wall where the audio runs dry.

    streams  utterances being spoken
    began    monotonic() when the first sample was handed over
    end      seconds at which all that was handed over will have been heard
    spoken   whether any of it was speech
    said     the words of the utterance that is being spoken, so far
    """

    streams: set[Stream] = field(default_factory=set)
    began: float | None = None
    end: float = 0.0
    spoken: bool = False
    said: list[str] = field(default_factory=list)

    def place(self, samples: int) -> float:
        """Append so many 24 kHz samples; returns the second at which the first of them will be heard."""
        if not samples:
            return self.end
        now = monotonic()
        if self.began is None:
            self.began = now
        start = max(self.end, now - self.began)
        self.end = start + samples / SAMPLE_RATE
        return start

    @property
    def lead_s(self) -> float:
        """Seconds of audio that were handed over and have not been heard."""
        return 0.0 if self.began is None else max(0.0, self.began + self.end - monotonic())

    def words_of(self, chunk: Chunk) -> list[tuple[str, float]]:
        """Append a chunk; returns its words with their seconds in the context. The last chunk may be words alone."""
        utterance = self.place(len(chunk.pcm)) - chunk.first_sample / SAMPLE_RATE
        self.said += [word for word, _ in chunk.words]
        return [(word, max(0.0, utterance + seconds)) for word, seconds in chunk.words]

    def unsaid(self, text: str) -> str:
        """What is left of an utterance's text behind the words that were said."""
        at = 0
        for word in self.said:
            at = max(at, text.find(word, at) + len(word))
        return text[at:].strip()


class Resampler:
    """24 kHz int16 samples in, PCM bytes at another rate out; one per utterance, so that none hears another's tail.

    Quality HQ: above what 16 bits can hold, and it gives 61 ms of a first chunk of 80 ms; VHQ gives nothing at 8 kHz.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._stream = create_stream_resampler(quality="HQ", clear_after_secs=None) if rate != SAMPLE_RATE else None

    async def __call__(self, pcm: np.ndarray) -> bytes:
        """Take int16 [samples], give what the filter lets go of; may be empty."""
        if self._stream is None or not len(pcm):
            return pcm.tobytes()
        return await self._stream.resample(pcm.tobytes(), SAMPLE_RATE, self._rate)

    async def flush(self) -> bytes:
        """The samples still held in the filter."""
        return await self._stream.flush() if self._stream else b""


def is_spaceless(text: str) -> bool:
    """Whether most letters of the text belong to a script without spaces between words."""
    return 2 * len(_SPACELESS.findall(text)) > sum(character.isalnum() for character in text)
