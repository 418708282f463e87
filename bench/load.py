"""How many voices a server carries: open-loop Poisson arrivals over one socket, at rising rates.

    python -m bench.load --url ws://127.0.0.1:8880/v1/audio/speech/ws --rates 0.5,1,2,4 --seconds 30

Arrivals do not wait for answers (a closed loop would slow down with the server and hide its queue). Each request is
heard as by a player without buffer: playback begins with the first sample, and a chunk that comes after all before it
has been played is an underrun. First byte, which is whole samples and so the first playable one too, and first audible
sample are counted from the moment at which the request was due. Prints the floor first, which is the same requests one
at a time, then the saturation curve, and writes all samples (JSON) and a plot (SVG) to bench/results.

A run takes 7 requests to warm, 14 for the floor, and the seconds of each rate until its last answer.
"""

import argparse
import asyncio
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from bench.machine import RESULTS, facts
from pipecat_qwen3.backend import SAMPLE_RATE, Request
from pipecat_qwen3.errors import TTSError, program
from pipecat_qwen3.remote import RemoteBackend

TEXTS = (
    "Hello there. How can I help you today?",
    "Your table is booked for two at eight.",
    "I am sorry to hear that.",
    "Please hold the line.",
    "The weather will be cold and dry tomorrow.",
    "Yes.",
    "The meeting starts at ten, and it will take an hour.",
)

WINDOW = SAMPLE_RATE // 100


@dataclass
class Heard:
    """One request as its listener heard it; times in seconds from when it was due, None if that never came."""

    due: float
    first_byte: float | None = None
    first_audible: float | None = None
    total: float = 0.0
    audio: float = 0.0
    underruns: int = 0
    stalled: float = 0.0
    end: str = "error"


async def listen(backend: RemoteBackend, text: str, seed: int, due: float, began: float) -> Heard:
    """Speak one request and hear it."""
    heard = Heard(due - began)
    heard_until = 0.0
    try:
        stream = backend.speak(Request(text, seed=seed))
        async for chunk in stream:
            if not len(chunk.pcm):
                continue
            now = time.perf_counter() - due
            if heard.first_byte is None:
                heard.first_byte = heard_until = now
            if now > heard_until + 0.001:
                heard.underruns += 1
                heard.stalled += now - heard_until
                heard_until = now
            if heard.first_audible is None and (at := _audible(chunk.pcm)) is not None:
                heard.first_audible = heard_until + at / SAMPLE_RATE
            heard_until += len(chunk.pcm) / SAMPLE_RATE
            heard.audio += len(chunk.pcm) / SAMPLE_RATE
        heard.end = stream.result.end if stream.result else "error"
    except TTSError as error:
        heard.end = error.code
    heard.total = time.perf_counter() - due
    return heard


def _audible(pcm: np.ndarray) -> int | None:
    """First sample of the first 10 ms window above -40 dBFS."""
    for start in range(0, len(pcm) - WINDOW + 1, WINDOW):
        window = pcm[start : start + WINDOW].astype(float) / 32768
        if math.sqrt((window**2).mean()) > 0.01:
            return start
    return None


async def run_rate(backend: RemoteBackend, rate: float, seconds: float, seed: int) -> list[Heard]:
    """Requests at `rate` a second for so long, and all of their answers."""
    choose = random.Random(seed)
    began = due = time.perf_counter()
    tasks: list[asyncio.Task[Heard]] = []
    while (due := due - math.log1p(-choose.random()) / rate) < began + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(listen(backend, choose.choice(TEXTS), choose.randrange(2**31), due, began)))
    return [await task for task in tasks]


async def run_alone(backend: RemoteBackend, seed: int) -> list[Heard]:
    """Every text twice, one after the other: what no load can beat."""
    began = time.perf_counter()
    return [await listen(backend, text, seed + i, time.perf_counter(), began) for i, text in enumerate(TEXTS * 2)]


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def summary(rate: float, answers: list[Heard]) -> dict[str, float]:
    """One point of the curve; milliseconds."""
    good = [h for h in answers if h.end in ("eos", "cap", "runaway")]
    byte = [1000 * h.first_byte for h in good if h.first_byte is not None]
    audible = [1000 * h.first_audible for h in good if h.first_audible is not None]
    span = max((h.due + h.total for h in answers), default=0.0)
    return {
        "rate": rate,
        "requests": len(answers),
        "completed": len(good) / max(1, len(answers)),
        "first_byte_p50": percentile(byte, 0.5),
        "first_byte_p95": percentile(byte, 0.95),
        "first_audible_p50": percentile(audible, 0.5),
        "first_audible_p95": percentile(audible, 0.95),
        "with_underruns": sum(h.underruns > 0 for h in good) / max(1, len(good)),
        "stalled_p95": percentile([1000 * h.stalled for h in good], 0.95),
        "audio_seconds_a_second": sum(h.audio for h in good) / span if span else 0.0,
    }


def line(name: str, point: dict[str, float]) -> str:
    """A point of the curve as a row of the table."""
    return (
        f"{name:>6} {point['requests']:4.0f} {point['completed']:5.0%} "
        f"{point['first_byte_p50']:6.0f}/{point['first_byte_p95']:<7.0f} "
        f"{point['first_audible_p50']:7.0f}/{point['first_audible_p95']:<8.0f} "
        f"{point['with_underruns']:9.0%} {point['audio_seconds_a_second']:9.2f}"
    )


def finite(point: dict[str, float]) -> dict[str, float | None]:
    """The same for JSON, which has no NaN: what nobody reached is null."""
    return {name: value if math.isfinite(value) else None for name, value in point.items()}


def plot(points: list[dict[str, float]], path: Path) -> None:
    """First byte and first audible sample (p50, p95) over the rate, logarithmic, as SVG."""
    lines = (
        ("first_byte_p50", "first byte p50", "#1f77b4", ""),
        ("first_byte_p95", "first byte p95", "#1f77b4", "6 4"),
        ("first_audible_p50", "first audible p50", "#d62728", ""),
        ("first_audible_p95", "first audible p95", "#d62728", "6 4"),
    )
    values = [p[name] for p in points for name, *_ in lines if math.isfinite(p[name]) and p[name] > 0]
    if not values:
        return
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    most = max(p["rate"] for p in points)

    def x(rate: float) -> float:
        return 60 + 500 * rate / most

    def y(ms: float) -> float:
        return 320 - 280 * (math.log10(ms) - low) / max(1, high - low)

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 370" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="760" height="370" fill="white"/>')
    for power in range(low, high + 1):
        parts.append(f'<path d="M60 {y(10**power):.1f}H560" stroke="#ddd"/>')
        parts.append(f'<text x="52" y="{y(10**power) + 4:.1f}" text-anchor="end">{10**power} ms</text>')
    for p in points:
        parts.append(f'<text x="{x(p["rate"]):.1f}" y="340" text-anchor="middle">{p["rate"]:g}</text>')
    parts.append('<text x="310" y="360" text-anchor="middle">requests a second (Poisson)</text>')
    for i, (name, label, colour, dash) in enumerate(lines):
        where = [f"{x(p['rate']):.1f},{y(p[name]):.1f}" for p in points if math.isfinite(p[name]) and p[name] > 0]
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" fill="none"'
        parts.append(f'<polyline points="{" ".join(where)}" {stroke}/>')
        parts.append(f'<path d="M580 {60 + 24 * i}h30" {stroke}/><text x="616" y="{64 + 24 * i}">{label}</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="ws://127.0.0.1:8880/v1/audio/speech/ws")
    parser.add_argument("--api-key")
    parser.add_argument("--rates", default="0.5,1,2,4", help="requests a second, one run each")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals at each rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="kept in the JSON: what the server runs on")
    args = parser.parse_args()
    backend = await asyncio.to_thread(RemoteBackend.open, args.url, api_key=args.api_key)
    for text in TEXTS:
        await listen(backend, text, 0, time.perf_counter(), 0.0)  # warm caches of prefixes and of connections
    print(
        f"{'req/s':>6} {'n':>4} {'done':>5} {'byte p50/p95':>14} {'audible p50/p95':>16} "
        f"{'underruns':>9} {'audio s/s':>9}"
    )
    alone = await run_alone(backend, args.seed)
    print(line("alone", summary(0.0, alone)), flush=True)
    points, raw = [], {}
    for rate in (float(part) for part in args.rates.split(",")):
        answers = await run_rate(backend, rate, args.seconds, args.seed)
        points.append(summary(rate, answers))
        raw[f"{rate:g}"] = [asdict(h) for h in answers]
        print(line(f"{rate:g}", points[-1]), flush=True)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = RESULTS / f"load-{Path(backend.model).name}-{stamp}.json"
    settings = {**vars(args), "model": backend.model}
    settings.pop("api_key")
    run = {
        "machine": facts(torch.device("cpu")),
        "settings": settings,
        "floor": finite(summary(0.0, alone)),
        "points": [finite(point) for point in points],
        "requests": {"alone": [asdict(h) for h in alone], **raw},
    }
    path.write_text(json.dumps(run) + "\n")
    plot(points, path.with_suffix(".svg"))
    print(path)
    await asyncio.to_thread(backend.close)


if __name__ == "__main__":
    program(lambda: asyncio.run(main()))
