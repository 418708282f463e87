"""The ways by which text becomes speech, each as one call: text and a typing speed in, (seconds, PCM) arrivals out.

In process, over our socket, over HTTP, and through Pipecat pipelines around either. Seconds count from when the first
text was handed over.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import aiohttp
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    StartFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.workers.runner import WorkerRunner

from bench.typed import typed
from pipecat_qwen3.backend import Backend, Request

Arrivals = list[tuple[float, bytes]]

TURN_S = 120.0
"""A turn that takes longer has failed."""


class Way(Protocol):
    """A way to speak."""

    name: str

    async def speak(self, text: str, rate: float | None, seed: int) -> Arrivals:
        """Speak a text that is written at `rate` tokens a second (None: there at once); returns when all is heard."""
        ...


class ByBackend:
    """Requests to a Backend: the engine in this process, or a server over one socket."""

    def __init__(self, name: str, backend: Backend, **settings: Any) -> None:
        self.name, self.backend, self.settings = name, backend, settings

    async def speak(self, text: str, rate: float | None, seed: int) -> Arrivals:
        """As in Way; with a rate the text is an iterator, so the layout is streaming."""
        arrivals: Arrivals = []
        began = time.perf_counter()
        request = Request(text if rate is None else typed(text, rate), seed=seed, **self.settings)
        async for chunk in self.backend.speak(request):
            arrivals.append((time.perf_counter() - began, chunk.pcm.tobytes()))
        return arrivals


class ByHttp:
    """POST /v1/audio/speech on a connection that is kept; takes whole texts only."""

    def __init__(self, name: str, url: str, session: aiohttp.ClientSession, **settings: Any) -> None:
        self.name, self._session = name, session
        self._url, self._settings = f"{url}/v1/audio/speech", settings

    async def speak(self, text: str, rate: float | None, seed: int) -> Arrivals:
        """As in Way."""
        if rate is not None:
            raise ValueError("HTTP takes the whole text at once")
        body = {"input": text, "response_format": "pcm", "seed": seed, **self._settings}
        arrivals: Arrivals = []
        began = time.perf_counter()
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{self._url} answered {response.status}: {await response.text()}")
            async for piece in response.content.iter_any():
                arrivals.append((time.perf_counter() - began, piece))
        return arrivals


class Ear(FrameProcessor):
    """Notes when audio passes, and when a turn is over."""

    def __init__(self) -> None:
        super().__init__(enable_direct_mode=True)
        self.arrivals: Arrivals = []
        self.errors: list[str] = []
        self.started, self.over = asyncio.Event(), asyncio.Event()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Every frame goes on."""
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            self.arrivals.append((time.perf_counter(), frame.audio))
        elif isinstance(frame, StartFrame):
            self.started.set()
        elif isinstance(frame, TTSStoppedFrame):
            self.over.set()
        await self.push_frame(frame, direction)


class ByPipeline:
    """A language model's reply through a running Pipecat pipeline of a service and what listens."""

    def __init__(self, name: str, worker: PipelineWorker, ear: Ear) -> None:
        self.name, self._worker, self._ear = name, worker, ear

    async def speak(self, text: str, rate: float | None, seed: int) -> Arrivals:
        """As in Way; the service draws its own seeds."""
        ear = self._ear
        ear.arrivals.clear()
        ear.over.clear()
        began = time.perf_counter()
        await self._worker.queue_frame(LLMFullResponseStartFrame())
        async for piece in typed(text, rate):
            await self._worker.queue_frame(LLMTextFrame(piece))
        await self._worker.queue_frame(LLMFullResponseEndFrame())
        async with asyncio.timeout(TURN_S):
            await ear.over.wait()
        if ear.errors:
            raise RuntimeError(f"{self.name}: {ear.errors[0]}")
        return [(at - began, audio) for at, audio in ear.arrivals]


@asynccontextmanager
async def pipeline(*processors: FrameProcessor) -> AsyncIterator[tuple[PipelineWorker, Ear]]:
    """A running pipeline of the processors with an Ear behind them; it ends with the context."""
    ear = Ear()
    worker = PipelineWorker(Pipeline([*processors, ear]), cancel_on_idle_timeout=False, enable_rtvi=False)
    worker.set_reached_upstream_filter((ErrorFrame,))

    @worker.event_handler("on_frame_reached_upstream")
    async def on_error(_: PipelineWorker, frame: Frame) -> None:
        if isinstance(frame, ErrorFrame):
            ear.errors.append(frame.error)
            ear.over.set()

    runner = WorkerRunner()
    await runner.add_workers(worker)
    running = asyncio.create_task(runner.run())
    try:
        await ear.started.wait()
        yield worker, ear
        await worker.queue_frame(EndFrame())
        async with asyncio.timeout(TURN_S):
            await running
    finally:
        if not running.done():
            await worker.cancel()
            await running
