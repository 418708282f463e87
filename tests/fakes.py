"""A Backend without a model: text in, a tone of the right length out, paced and failing as a test asks."""

import asyncio
import queue
import re
import threading
from collections.abc import AsyncIterator, Sequence

import numpy as np

from pipecat_qwen3.backend import FRAME_SAMPLES, SAMPLE_RATE, Chunk, End, Request, Result, Stream
from pipecat_qwen3.errors import BadRequestError, EngineError, UnknownNameError, choices

_WORD = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff][^\\w\\s]*|[^\\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


class FakeBackend:
    """Speaks every text as a 220 Hz tone, in a thread per utterance, as an engine would.

    voices, languages  what a Request may name
    chunk_seconds      length of a chunk; the utterance itself is a whole number of 80 ms frames
    seconds_per_char   how long a character is spoken; a word begins where its first character stands
    pace               seconds to wait before each second of audio; None: at once, inf: never answers
    fail               raised by speak(), or after `fail_after` chunks
    end                how an utterance says it ended

    requests and streams record every call; `cancelled` lists the requests whose streams were cancelled in time.
    """

    def __init__(
        self,
        voices: Sequence[str] = ("rms", "slt"),
        languages: Sequence[str] = ("english",),
        chunk_seconds: float = 0.08,
        seconds_per_char: float = 0.06,
        pace: float | None = None,
        fail: Exception | None = None,
        fail_after: int | None = None,
        end: End = "eos",
    ) -> None:
        self.voices, self.languages, self.model = tuple(voices), tuple(languages), "fake"
        self.chunk_samples = round(chunk_seconds * SAMPLE_RATE)
        self.seconds_per_char, self.pace = seconds_per_char, pace
        self.fail, self.fail_after = fail, fail_after
        self.end: End = end
        self.ready = True
        self.requests: list[Request] = []
        self.streams: list[Stream] = []
        self.cancelled: list[Request] = []
        self._threads: list[threading.Thread] = []
        self._pumps: set[asyncio.Task[None]] = set()

    def speak(self, request: Request) -> Stream:
        """Start an utterance; raises `fail` if there is no `fail_after`."""
        self.requests.append(request)
        if not self.ready:
            raise EngineError("the engine was closed")
        for kind, name, names in (
            ("voice", request.voice, self.voices),
            ("language", request.language, (*self.languages, "auto")),
        ):
            if name is not None and name not in names:
                raise UnknownNameError(f"unknown {kind} {name!r}; there are: {choices(names)}")
        if isinstance(request.text, str) and not request.text.strip():
            raise BadRequestError("text should not be empty")
        if self.fail and self.fail_after is None:
            raise self.fail

        pieces: queue.Queue[str | None] = queue.Queue()
        stop = threading.Event()

        def on_cancel() -> None:
            self.cancelled.append(request)
            stop.set()
            pieces.put(None)

        given = isinstance(request.text, str)
        seed = 1 if request.seed is None else request.seed
        stream = Stream(seed, on_cancel, None if given else pieces.put, lambda: pieces.put(None))
        self.streams.append(stream)
        if isinstance(request.text, str):
            pieces.put(request.text)
            pieces.put(None)
        else:
            pump = asyncio.get_running_loop().create_task(_pump(request.text, stream))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)
        thread = threading.Thread(target=self._run, args=(request, stream, pieces, stop), daemon=True)
        self._threads.append(thread)
        thread.start()
        return stream

    def close(self) -> None:
        """Cancel every utterance and wait for the threads."""
        self.ready = False
        for stream in self.streams:
            if stream.result is None:
                stream.cancel()
        for thread in self._threads:
            thread.join(timeout=5)
        self._threads.clear()

    def speech(self, text: str) -> np.ndarray:
        """int16 [samples]: all that a text is spoken as, at 24 kHz."""
        frames = max(1, round(len(text) * self.seconds_per_char * SAMPLE_RATE / FRAME_SAMPLES))
        tone = np.sin(2 * np.pi * 220 / SAMPLE_RATE * np.arange(frames * FRAME_SAMPLES))
        return (8000 * tone).astype(np.int16)

    def words(self, text: str) -> list[tuple[str, float]]:
        """The words of a text, each with the second at which it begins."""
        return [(match[0], match.start() * self.seconds_per_char) for match in _WORD.finditer(text)]

    def _run(self, request: Request, stream: Stream, pieces: "queue.Queue[str | None]", stop: threading.Event) -> None:
        text = "".join(iter(pieces.get, None))
        pcm, words = self.speech(text), self.words(text)
        if request.max_frames is not None:
            pcm = pcm[: request.max_frames * FRAME_SAMPLES]
        for number, first in enumerate(range(0, len(pcm), self.chunk_samples)):
            chunk = pcm[first : first + self.chunk_samples]
            if self.fail and number == self.fail_after:
                error = self.fail if isinstance(self.fail, EngineError) else EngineError(str(self.fail))
                stream.finish(Result("error", first // FRAME_SAMPLES, stream.seed, error))
                return
            if self.pace is not None:
                wait = self.pace * len(chunk) / SAMPLE_RATE
                stop.wait(wait if wait < threading.TIMEOUT_MAX else None)
            if stop.is_set():
                stream.finish(Result("cancelled", first // FRAME_SAMPLES, stream.seed))
                return
            begun = [word for word in words if word[1] * SAMPLE_RATE < first + len(chunk)]
            del words[: len(begun)]
            stream.put(Chunk(chunk, first, tuple(begun)))
        if words:  # an engine owes the last words when the speech was shorter than it thought
            stream.put(Chunk(pcm[:0], len(pcm), tuple((word, len(pcm) / SAMPLE_RATE) for word, _ in words)))
        stream.finish(Result(self.end, len(pcm) // FRAME_SAMPLES, stream.seed))


async def _pump(text: AsyncIterator[str], stream: Stream) -> None:
    async for piece in text:
        stream.feed(piece)
    stream.end()
