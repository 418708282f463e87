"""How fast a voice stops: from an interruption to the last sample that is handed out, and until its row is free.

    python -m bench.barge_in [--model M] [--repeats 10] [--voices 1 8]

In process and over our socket (`Stream.cancel`), alone and while other voices speak; and through Pipecat pipelines
(`InterruptionFrame`) that end in an output transport which plays in real time. Only the engine in this process says
when a row is free; a server says `done` as soon as it has passed the cancel on, so both are kept, each under its own
name. Prints the floor first, which is the frame under way; raw samples go to bench/results.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import torch
from loguru import logger
from pipecat.frames.frames import (
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    OutputAudioRawFrame,
    StartFrame,
)
from pipecat.pipeline.worker import PipelineWorker
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams

from bench import report_tables
from bench.floor import Ceiling, works
from bench.geometry import build
from bench.record import Record, engine_options, label
from bench.served import serving, socket_url
from bench.ways import pipeline
from pipecat_qwen3.backend import Backend, Request, Stream
from pipecat_qwen3.device import pick_device, pick_dtype
from pipecat_qwen3.errors import program
from pipecat_qwen3.local import LocalBackend
from pipecat_qwen3.remote import RemoteBackend
from pipecat_qwen3.service import Qwen3TTSService
from pipecat_qwen3.service_speech import SpeechService
from pipecat_qwen3.websocket_service import Qwen3WebsocketTTSService

TEXT = (
    "Well, there are many things that I could tell you about the weather of tomorrow, and of the day after it, and of "
    "the whole of the next week, which will be cold and dry in the north, and warm and wet in the south of it."
)
"""Long enough that the engine is at work when it is interrupted, and one sentence, so that it is one utterance."""

SPEAK_S = (0.1, 0.6)
"""The interruption comes at a random moment so long after the first audio."""

PATIENCE_S = 30.0

WAYS = ("in process", "socket", "pipeline", "pipeline, socket")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _arguments(argv)
    logger.disable("pipecat")
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    record = Record("barge_in", args, device)
    floors = floor_ms(args.model, dtype, device, args.voices)
    told = ", ".join(f"{ms:.2f} ms with {voices} voices" for voices, ms in floors.items())
    record.say(f"floor: half a frame and its codec on average, of {told}")
    runs = asyncio.run(_measure(args, device, dtype))
    for line in report_tables.barge_in({"runs": runs}):
        record.say(line)
    return record.finish(label(args.model, dtype, device), dtype=str(dtype)[6:], text=TEXT, floor_ms=floors, runs=runs)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = engine_options("barge_in", __doc__)
    parser.add_argument("--repeats", type=int, default=10, help="interruptions of each case")
    parser.add_argument("--voices", type=int, nargs="+", default=[1, 8], help="voices that speak at a time")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--url", help="a server that runs already, http://HOST:PORT, instead of one of our own")
    return parser.parse_args(argv)


def floor_ms(model: str, dtype: torch.dtype, device: torch.device, voices: Sequence[int]) -> dict[int, float]:
    """The least milliseconds of a frame with its codec: an interruption waits for the one that is under way."""
    built = build(model, dtype, device)
    ceiling = Ceiling.measure(built, device)
    found = {}
    for count in voices:
        work = works(built, count, 64)
        found[count] = round(sum(ceiling.ms(work[stage]) for stage in ("talker", "predictor", "codec")), 4)
    return found


async def _measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every case in turn, `repeats` times, and once before that does not count."""
    chance = random.Random(0)
    runs: list[dict[str, Any]] = []
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    async with AsyncExitStack() as stack:
        backends: dict[str, Backend] = {}
        url = None
        if {"in process", "pipeline"} & set(args.ways):
            local = backends["in process"] = await asyncio.to_thread(
                LocalBackend.open, args.model, max_batch=args.max_batch, device=device.type, dtype=kind
            )
            stack.callback(local.close)
        if {"socket", "pipeline, socket"} & set(args.ways):
            url = args.url or stack.enter_context(
                serving(args.model, device=device.type, dtype=kind, max_batch=args.max_batch)
            )
            remote = backends["socket"] = await asyncio.to_thread(RemoteBackend.open, socket_url(url))
            stack.callback(remote.close)
        piped = {}
        if "pipeline" in args.ways:
            piped["pipeline"] = await _Piped.open(Qwen3TTSService(backend=backends["in process"]), stack)
        if url and "pipeline, socket" in args.ways:
            piped["pipeline, socket"] = await _Piped.open(Qwen3WebsocketTTSService(url=socket_url(url)), stack)
        for repeat in range(-1, args.repeats):
            after = chance.uniform(*SPEAK_S)
            for way in args.ways:
                for voices in args.voices if way in backends else (1,):
                    stops = (
                        await cancel(backends[way], after, voices, repeat + 1)
                        if way in backends
                        else await piped[way].interrupt(after)
                    )
                    if repeat >= 0:
                        runs.append({"way": way, "voices": voices, "after_s": round(after, 4)} | stops)
    return runs


async def cancel(backend: Backend, after: float, voices: int, seed: int) -> dict[str, float | int | None]:
    """Cancel one of `voices` streams, `after` seconds after its first audio; seconds from the cancel.

    last_sample_s  until the last chunk came, 0 if none did
    late_samples   samples that came afterwards
    row_free_s     until the engine said that its row is free; None: it was before, or a server has the engine
    done_s         until the server said `done`, with the way there and back; None: it had, or there is no server
    """
    others = [backend.speak(Request(TEXT, seed=1000 + i)) for i in range(voices - 1)]
    taking = [asyncio.create_task(_drain(other)) for other in others]
    stream = backend.speak(Request(TEXT, seed=seed))
    first = await anext(stream, None)
    arrivals: list[tuple[float, int]] = []

    async def take() -> None:
        async for chunk in stream:
            arrivals.append((time.perf_counter(), len(chunk.pcm)))

    taker = asyncio.create_task(take())
    await asyncio.sleep(after if first is not None else 0)
    over = stream.result is not None
    began = time.perf_counter()
    stream.cancel()
    await taker
    ended = await _ended(stream, over, began)
    for other in others:
        other.cancel()
    await asyncio.gather(*taking)
    for other in others:
        await asyncio.to_thread(other.wait, PATIENCE_S)
    return _stops(began, arrivals, ended, isinstance(backend, RemoteBackend))


async def _drain(stream: Stream) -> None:
    async for _ in stream:
        pass


async def _ended(stream: Stream, over: bool, began: float) -> float | None:
    """Seconds until a cancelled stream has its result; None where it had one before."""
    if over:
        return None
    await asyncio.to_thread(stream.wait, PATIENCE_S)
    return round(time.perf_counter() - began, 6)


def _stops(
    began: float, arrivals: Sequence[tuple[float, int]], ended: float | None, remote: bool
) -> dict[str, float | int | None]:
    late = [(at - began, samples) for at, samples in arrivals if at > began]
    return {
        "last_sample_s": round(late[-1][0], 6) if late else 0.0,
        "late_samples": sum(samples for _, samples in late),
        "row_free_s": None if remote else ended,
        "done_s": ended if remote else None,
    }


class Loudspeaker(BaseOutputTransport):
    """An output transport that takes as long as the audio lasts, and notes what it played when."""

    def __init__(self) -> None:
        super().__init__(TransportParams(audio_out_enabled=True, audio_out_end_silence_secs=0))
        self.played: list[tuple[float, int]] = []
        self.playing = asyncio.Event()

    async def start(self, frame: StartFrame) -> None:
        """Be ready at once."""
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        """Play; a barge-in cancels this."""
        self.played.append((time.perf_counter(), frame.num_frames))
        self.playing.set()
        await asyncio.sleep(frame.num_frames / frame.sample_rate)
        return True


class _Piped:
    """A bot that speaks through a loudspeaker until it is interrupted."""

    def __init__(self, worker: PipelineWorker, speaker: Loudspeaker, streams: list[Stream], remote: bool) -> None:
        self._worker, self._speaker, self._streams, self._remote = worker, speaker, streams, remote

    @classmethod
    async def open(cls, service: SpeechService, stack: AsyncExitStack) -> "_Piped":
        backend = service._backend
        assert backend is not None
        streams: list[Stream] = []
        stack.callback(_note_streams(backend, streams))
        speaker = Loudspeaker()
        worker, _ = await stack.enter_async_context(pipeline(service, speaker))
        return cls(worker, speaker, streams, isinstance(backend, RemoteBackend))

    async def interrupt(self, after: float) -> dict[str, float | int | None]:
        """As `cancel`, from when the InterruptionFrame is queued; a sample counts when the loudspeaker gets it."""
        speaker = self._speaker
        speaker.played.clear()
        speaker.playing.clear()
        self._streams.clear()
        await self._worker.queue_frames([LLMFullResponseStartFrame(), LLMTextFrame(TEXT), LLMFullResponseEndFrame()])
        async with asyncio.timeout(PATIENCE_S):
            await speaker.playing.wait()
        await asyncio.sleep(after)
        stream = self._streams[-1]
        over = stream.result is not None
        began = time.perf_counter()
        await self._worker.queue_frame(InterruptionFrame())
        ended = await _ended(stream, over, began)
        await asyncio.sleep(0.25)  # what is still under way would be heard by now
        return _stops(began, speaker.played, ended, self._remote)


def _note_streams(backend: Backend, streams: list[Stream]) -> Callable[[], None]:
    """Append every stream that the backend opens to a list, until the returned function is called."""
    inner = backend.speak

    def speak(request: Request) -> Stream:
        streams.append(stream := inner(request))
        return stream

    backend.speak = speak  # type: ignore[method-assign]
    return lambda: delattr(backend, "speak")


if __name__ == "__main__":
    program(main)
