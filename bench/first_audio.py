"""How long a listener waits: first byte, first playable and first audible sample by every way that text can take.

    python -m bench.first_audio [--model M] [--repeats 5] [--rates 20 50 100]

In process, over our socket and over HTTP to a server in a process of its own, and through Pipecat pipelines around the
first two; the whole text at once, and token by token at the speeds of language models. Seconds count from when the
first text is handed over. The ways take turns in one run. Prints the floor first; raw samples go to bench/results.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import Any

import aiohttp
import torch
from loguru import logger
from pipecat.services.tts_service import TextAggregationMode

from bench import report_tables, typed
from bench.floor import Ceiling, works
from bench.geometry import build
from bench.hearing import hear
from bench.record import Record, engine_options, label
from bench.served import serving, socket_url
from bench.ways import ByBackend, ByHttp, ByPipeline, Way, pipeline
from pipecat_qwen3.device import pick_device, pick_dtype
from pipecat_qwen3.errors import TTSError, program
from pipecat_qwen3.local import LocalBackend
from pipecat_qwen3.remote import RemoteBackend
from pipecat_qwen3.service import Qwen3TTSService
from pipecat_qwen3.service_speech import SpeechService
from pipecat_qwen3.websocket_service import Qwen3WebsocketTTSService

TEXTS = (
    "Your table is booked for two at eight. Shall I send you the address?",
    "Hello there, and welcome back. How can I help you today?",
    "I am sorry to hear that. Let me see what I can do about it.",
    "The weather will be cold and dry tomorrow. You will want a warm coat.",
)

WAYS = ("in process", "socket", "http", "pipeline", "pipeline, tokens", "pipeline, socket", "pipeline, socket, tokens")
"""A Pipecat service speaks sentence by sentence, unless `tokens` are handed on as they come."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _arguments(argv)
    logger.disable("pipecat")
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    record = Record("first_audio", args, device)
    floor = floor_ms(args.model, dtype, device)
    record.say(
        f"floor: prefill of up to 16 positions {floor['prefill']:.2f} + one frame {floor['frame']:.2f} "
        f"+ its codec {floor['codec']:.2f} = {sum(floor.values()):.2f} ms"
    )
    runs, missing = asyncio.run(_measure(args, device, dtype))
    for line in report_tables.first_audio({"runs": runs}):
        record.say(line)
    for way, reason in missing.items():
        record.say(f"not measured: {way}: {reason}")
    texts = [{"text": text, "tokens": typed.tokens(text)} for text in TEXTS]
    name = label(args.model, dtype, device)
    return record.finish(name, dtype=str(dtype)[6:], texts=texts, floor_ms=floor, runs=runs, missing=missing)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = engine_options("first_audio", __doc__)
    parser.add_argument("--repeats", type=int, default=5, help="utterances of each case that count")
    parser.add_argument("--rates", type=float, nargs="*", default=[20, 50, 100], help="tokens a second, besides whole")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--url", help="a server that runs already, http://HOST:PORT, instead of one of our own")
    parser.add_argument(
        "--keep-silence", action="store_true", help="keep the silence that the model begins with, which is skipped else"
    )
    return parser.parse_args(argv)


def floor_ms(model: str, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The least milliseconds until the first samples: weights read once, products at the machine's best."""
    built = build(model, dtype, device)
    ceiling = Ceiling.measure(built, device)
    work = works(built, 1, 16)
    least = {stage: ceiling.ms(work[stage]) for stage in ("prefill", "talker", "predictor", "codec")}
    frame = least["talker"] + least["predictor"]
    return {"prefill": round(least["prefill"], 4), "frame": round(frame, 4), "codec": round(least["codec"], 4)}


async def _measure(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every way in turn, `repeats` times and once before that does not count; and why some could not be."""
    runs: list[dict[str, Any]] = []
    async with AsyncExitStack() as stack:
        ways, missing = await _open(args, device, dtype, stack)
        for repeat in range(-1, args.repeats):
            text = TEXTS[repeat % len(TEXTS)]
            for name, way in ways.items():
                for rate in _rates(name, args.rates):
                    heard = hear(await way.speak(text, rate, seed=repeat + 1))
                    if repeat >= 0:
                        times = {k: v if v is None else round(v, 6) for k, v in asdict(heard).items()}
                        runs.append(
                            {"way": name, "rate": rate, "text": repeat % len(TEXTS), "seed": repeat + 1} | times
                        )
    return runs, missing


def _rates(way: str, rates: Sequence[float]) -> list[float | None]:
    return [None] if way == "http" else [None, *rates]


async def _open(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, stack: AsyncExitStack
) -> tuple[dict[str, Way], dict[str, str]]:
    """Everything that the asked ways need, warm."""
    skip = not args.keep_silence
    ways: dict[str, Way] = {}
    missing: dict[str, str] = {}
    wanted = set(args.ways)
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    local = url = None
    if wanted & {"in process", "pipeline", "pipeline, tokens"}:
        local = await asyncio.to_thread(
            LocalBackend.open, args.model, max_batch=args.max_batch, device=device.type, dtype=kind
        )
        stack.callback(local.close)
    if wanted & {"socket", "http", "pipeline, socket", "pipeline, socket, tokens"}:
        url = args.url or stack.enter_context(
            serving(args.model, device=device.type, dtype=kind, max_batch=args.max_batch)
        )
    if local and "in process" in wanted:
        ways["in process"] = ByBackend("in process", local, skip_silence=skip)
    if url and "socket" in wanted:
        remote = await asyncio.to_thread(RemoteBackend.open, socket_url(url))
        stack.callback(remote.close)
        ways["socket"] = ByBackend("socket", remote, skip_silence=skip)
    if url and "http" in wanted:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        ways["http"] = ByHttp("http", url, session, skip_silence=skip)
    for name in args.ways:
        if name.startswith("pipeline"):
            try:
                ways[name] = await stack.enter_async_context(_piped(name, local, url, skip))
            except TTSError as error:
                missing[name] = str(error)
    return {name: ways[name] for name in WAYS if name in ways}, missing


@asynccontextmanager
async def _piped(name: str, local: LocalBackend | None, url: str | None, skip: bool) -> AsyncIterator[Way]:
    mode = TextAggregationMode.TOKEN if name.endswith("tokens") else TextAggregationMode.SENTENCE
    service: SpeechService
    if "socket" in name:
        assert url
        service = Qwen3WebsocketTTSService(url=socket_url(url), skip_silence=skip, text_aggregation_mode=mode)
    else:
        service = Qwen3TTSService(backend=local, skip_silence=skip, text_aggregation_mode=mode)
    async with pipeline(service) as (worker, ear):
        yield ByPipeline(name, worker, ear)


if __name__ == "__main__":
    program(main)
