"""What the Pipecat services, the server and the command line hold: a Backend, its Requests and its Streams.

In goes a Request, out comes a Stream of Chunks. Nothing here knows torch, CUDA, Pipecat or sockets.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from pipecat_qwen3.errors import TTSError

SAMPLE_RATE = 24_000
"""Samples a second of every Qwen3-TTS-12Hz codec."""

FRAME_SAMPLES = 1_920
"""Samples of one frame: 80 ms."""

MAX_LEAD_S = 60.0
"""What an utterance waits for at most because of the speech before it."""

Layout = Literal["whole", "streaming"]
End = Literal["eos", "cap", "runaway", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """One utterance to speak. None means: what the checkpoint's own files say.

    text        the text, or an async iterator of pieces as a language model writes them
    voice       a speaker of a CustomVoice checkpoint
    language    a language name, or "auto"; None is the only language of the checkpoint, else "auto"
    instruct    how to speak, in words (not on 0.6B checkpoints; the whole voice in a VoiceDesign one)
    layout      "whole": all text is read before the first frame; "streaming": one text token a frame.
                None is "whole" for a string and "streaming" for an iterator
    seed        of the voice's own random stream, 0..2^63-1; None draws one, told in Stream.seed
    greedy      switches both sampling switches off and changes nothing else
    predictor_* the same for codes 1..C-1
    max_frames  speak at most so many frames; replaces the length cap and switches the runaway detector off
    ramp        frames of the 1st, 2nd, … chunk; the last value goes on
    ahead_s     run at most so many seconds ahead of the playback; None for files: no limit
    skip_silence drop leading silence, told in Result.skipped_samples
    lead_s      seconds of earlier speech (at most MAX_LEAD_S) that the listener still has to hear first: they count as
                run ahead
    """

    text: str | AsyncIterator[str]
    voice: str | None = None
    language: str | None = None
    instruct: str | None = None
    layout: Layout | None = None
    seed: int | None = None
    greedy: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    predictor_temperature: float | None = None
    predictor_top_k: int | None = None
    predictor_top_p: float | None = None
    max_frames: int | None = None
    ramp: tuple[int, ...] = (1, 1, 2, 4, 8)
    ahead_s: float | None = 10.0
    skip_silence: bool = False
    lead_s: float = 0.0


@dataclass(frozen=True)
class Profile:
    """What a server aims at.

    ramp      chunk sizes where a client names none: sound at once, or few and large calls of the codec
    ahead_s   seconds ahead of the playback where a client names none: a deep buffer uses idle moments
    prefills  pieces of new voices' prompts, of 16 positions each, that may be read between two frames: that long the
              voices that speak wait
    """

    ramp: tuple[int, ...]
    ahead_s: float
    prefills: int


PROFILES = {
    "latency": Profile(ramp=(1, 1, 2, 4, 8), ahead_s=10.0, prefills=1),
    "throughput": Profile(ramp=(4, 8, 16), ahead_s=30.0, prefills=8),
}


@dataclass(frozen=True)
class Load:
    """How busy an engine is: rows that voices hold, of how many, and voices that wait for one."""

    rows: int
    used: int
    waiting: int


@dataclass(frozen=True)
class Chunk:
    """A piece of speech.

    pcm           int16 [samples], 24 kHz mono
    first_sample  index of pcm[0] in the utterance
    words         (word, seconds from the utterance's first sample) of the words that begin up to this chunk's end
    """

    pcm: np.ndarray
    first_sample: int
    words: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """How an utterance ended.

    frames          spoken frames (the end-of-speech id is none)
    codes           int16 [frames, codebooks], what was spoken
    skipped_samples leading silence that was dropped on request
    restarts        times the talker ended before its text, the rest of which was then spoken as from a new prompt
    error           set when end is "error"
    """

    end: End
    frames: int
    seed: int
    error: TTSError | None = None
    skipped_samples: int = 0
    restarts: int = 0
    codes: np.ndarray | None = field(default=None, repr=False, compare=False)


class Stream:
    """One utterance being spoken: `async for chunk in stream`, or `for chunk in stream` in a thread of its own.

    `cancel`, `feed` and `end` set flags, are safe from any thread and return at once. A cancelled stream yields
    nothing more. When the iteration is over, `result` says how it ended; an error is raised by the iteration. After a
    cancel the iteration is over at once, and `result` is there when the engine has noticed.
    """

    def __init__(
        self,
        seed: int = 0,
        on_cancel: Callable[[], None] = lambda: None,
        on_feed: Callable[[str], None] | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.seed = seed
        self.result: Result | None = None
        self.cancelled = False
        self.first_taken_at: float | None = None
        self._on_cancel, self._on_feed, self._on_end = on_cancel, on_feed, on_end
        self._chunks: deque[Chunk] = deque()
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    # -- the consumer's side ---------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ask for the end. No chunk is handed out after this call; the voice's row is free at the next frame."""
        with self._changed:
            if self.cancelled or self.result is not None:
                self.cancelled = True
                self._chunks.clear()
                return
            self.cancelled = True
            self._chunks.clear()
            self._wake()
        self._on_cancel()

    def feed(self, text: str) -> None:
        """Append text to an open text stream. Raises TTSError if this stream was opened with whole text."""
        if self._on_feed is None:
            raise TTSError("this stream was opened with its whole text; open it with an async iterator to feed it")
        self._on_feed(text)

    def end(self) -> None:
        """Say that no more text will come."""
        self._on_end()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        loop = asyncio.get_running_loop()
        while True:
            waiter: asyncio.Future[None] = loop.create_future()
            with self._changed:
                chunk, over = self._take()
                if chunk is None and not over:
                    self._waiters.append((loop, waiter))
            if chunk is not None:
                return chunk
            if over:
                self._raise_error()
                raise StopAsyncIteration
            await waiter

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            with self._changed:
                while True:
                    chunk, over = self._take()
                    if chunk is not None or over:
                        break
                    self._changed.wait()
            if chunk is None:
                self._raise_error()
                return
            yield chunk

    def wait(self, timeout: float | None = None) -> Result:
        """Block until the utterance is over and say how it ended; for threads, never for an event loop."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.result is not None, timeout):
                raise TimeoutError(f"the utterance is not over after {timeout} s")
            assert self.result is not None
            return self.result

    # -- the producer's side ---------------------------------------------------------------------------------

    def put(self, chunk: Chunk) -> None:
        """Hand a chunk to the consumer; dropped after a cancel."""
        with self._changed:
            if not self.cancelled:
                self._chunks.append(chunk)
                self._wake()

    def finish(self, result: Result) -> None:
        """Say how the utterance ended; the first word counts."""
        with self._changed:
            if self.result is None:
                self.result = result
                self._wake()

    def _take(self) -> tuple[Chunk | None, bool]:
        if self.cancelled:
            return None, True
        if self._chunks:
            if self.first_taken_at is None:
                self.first_taken_at = time.monotonic()
            return self._chunks.popleft(), False
        return None, self.result is not None

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, waiter in self._waiters:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_release, waiter)
        self._waiters.clear()

    def _raise_error(self) -> None:
        if not self.cancelled and self.result is not None and self.result.error is not None:
            raise self.result.error


def _release(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


@runtime_checkable
class Backend(Protocol):
    """Something that speaks: the engine in this process, or a server."""

    @property
    def voices(self) -> tuple[str, ...]:
        """Names that Request.voice accepts; empty where the checkpoint has no speakers."""
        ...

    @property
    def languages(self) -> tuple[str, ...]:
        """Names that Request.language accepts, without "auto"."""
        ...

    @property
    def model(self) -> str:
        """The model as it was asked for."""
        ...

    @property
    def ready(self) -> bool:
        """True when warm: a request will be spoken without loading or compiling anything."""
        ...

    def speak(self, request: Request) -> Stream:
        """Start an utterance and return at once. Raises BadRequestError before anything is queued."""
        ...

    def close(self) -> None:
        """End every voice and free everything; idempotent."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A Backend that knows how busy it is."""

    @property
    def load(self) -> Load:
        """Now."""
        ...
