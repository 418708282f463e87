"""What the command line keeps of its utterances: their streams and results, and what they add up to.

A Recorder stands between the Pipecat service and the backend; a Spoken is what the user is told.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import numpy as np

from pipecat_qwen3.backend import FRAME_SAMPLES, SAMPLE_RATE, Backend, Request, Result, Stream
from pipecat_qwen3.errors import TTSError

_ENDS = ("eos", "cap", "runaway", "cancelled")
"""From good to bad; several sentences end as the worst of them."""


@dataclass
class Spoken:
    """What was spoken and when.

    results          one for each utterance, in order
    samples          at 24 kHz
    wall_s           from the text's entry into the pipeline to the last sample's exit
    first_byte_s     to the first sample, None if there was none
    first_audible_s  to the moment at which a listener hears sustained speech (10 ms windows above -40 dBFS for 50 ms,
                     as Pipecat's TTFA) if playback starts with the first byte
    """

    results: list[Result] = field(default_factory=list)
    samples: int = 0
    wall_s: float = 0.0
    first_byte_s: float | None = None
    first_audible_s: float | None = None
    interrupted: bool = False

    @property
    def end(self) -> str:
        """The worst end of all utterances: eos, cap, runaway, or cancelled."""
        return "cancelled" if self.interrupted else max((r.end for r in self.results), key=_ENDS.index)

    @property
    def frames(self) -> int:
        """Frames that were spoken; of an interrupted text, those that were heard."""
        made = sum(result.frames for result in self.results)
        return min(made, self.samples // FRAME_SAMPLES) if self.interrupted else made

    @property
    def codes(self) -> np.ndarray:
        """The spoken frames, int [frames, codebooks]."""
        made = [result.codes for result in self.results if result.codes is not None]
        return np.concatenate(made)[: self.frames] if made else np.zeros((0, 0), np.int16)

    @property
    def audio_s(self) -> float:
        """Seconds of audio."""
        return self.samples / SAMPLE_RATE

    @property
    def rtf(self) -> float | None:
        """Seconds of work for a second of audio, None without audio."""
        return self.wall_s / self.audio_s if self.samples else None


class Recorder:
    """A Backend that passes on what a Request of the service cannot say, and keeps the streams it hands out.

    request  everything but the text is taken from here
    """

    def __init__(self, backend: Backend, request: Request) -> None:
        self.backend, self.request = backend, request
        self.streams: list[Stream] = []
        self.refusal: TTSError | None = None
        self.interrupted = False

    @property
    def voices(self) -> tuple[str, ...]:
        """The backend's."""
        return self.backend.voices

    @property
    def languages(self) -> tuple[str, ...]:
        """The backend's."""
        return self.backend.languages

    @property
    def model(self) -> str:
        """The backend's."""
        return self.backend.model

    @property
    def ready(self) -> bool:
        """The backend's."""
        return self.backend.ready

    def speak(self, request: Request) -> Stream:
        """Speak the request's text in the way asked for on the command line; after a failure nothing more is spoken."""
        if self.failed:
            raise self.failed
        text = request.text
        if self.request.layout == "streaming" and isinstance(text, str):
            text = _word_by_word(text)
        try:
            stream = self.backend.speak(replace(self.request, text=text))
        except TTSError as error:
            self.refusal = error
            raise
        self.streams.append(stream)
        if self.interrupted:
            stream.cancel()
        return stream

    def interrupt(self) -> None:
        """Stop what is being spoken; returns at once."""
        self.interrupted = True
        for stream in self.streams:
            stream.cancel()

    @property
    def failed(self) -> TTSError | None:
        """The first error of any utterance."""
        errors = (stream.result.error for stream in self.streams if stream.result is not None)
        return self.refusal or next((error for error in errors if error), None)

    @property
    def room(self) -> float:
        """Samples that may be heard: after a failure those that were spoken, without the silence that marks it."""
        if not self.failed:
            return math.inf
        return FRAME_SAMPLES * sum(stream.result.frames for stream in self.streams if stream.result is not None)

    async def results(self) -> list[Result]:
        """How each utterance ended; a cancelled one ends with the engine's next frame."""
        return [await asyncio.to_thread(stream.wait, 60) for stream in self.streams]

    def close(self) -> None:
        """Leave the backend open: it belongs to the caller."""


def words_of(text: str) -> list[str]:
    """The text cut before each run of whitespace, as a language model might write it."""
    return re.findall(r"\s*\S+|\s+$", text)


async def _word_by_word(text: str) -> AsyncIterator[str]:
    for piece in words_of(text):
        yield piece
