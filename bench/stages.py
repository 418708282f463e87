"""Milliseconds a frame of prefill, frame step and codec, beside what the machine allows; then speech.

    python -m bench.stages [--geometry 0.6b] [--dtype bf16] [--threads 1] [--batch 1 8]

Prints the ceilings first, then median and 95th percentile of every stage and its ratio to the floor, then first byte,
first audible sample and real-time factor of a sentence. Raw samples go to bench/results.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.floor import Ceiling, works
from bench.geometry import PUBLISHED, Model, build
from bench.machine import facts, write
from bench.watch import Watch
from megakernel import frame_step
from megakernel.choose import choose, make_step
from megakernel.frame_step import PIECE, FrameStep, TorchFrameStep
from pipecat_qwen3.backend import SAMPLE_RATE, Request
from pipecat_qwen3.codec import CodecState
from pipecat_qwen3.delivery import SILENCE, WINDOW
from pipecat_qwen3.device import pick_device, pick_dtype
from pipecat_qwen3.errors import program
from pipecat_qwen3.local import LocalBackend

SENTENCE = "Hello there. How can I help you today?"

PROMPT = 2 * PIECE
"""Positions before the first frame: about the prompt of a short sentence."""

WARM = 5
"""Frames that do not count."""

PARTS = ("prefill", "talker", "predictor", "sampling", "step")
STAGES = ("prefill", "step", "codec", "rest", "frame", "codec x8", *(f"torch: {part}" for part in PARTS))


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.backends.cudnn.allow_tf32 = False
    say = print if not args.json else (lambda *_: None)
    machine = facts(device)
    name = f"{args.geometry.split('/')[-1]}-{str(dtype)[6:].replace('bfloat', 'bf').replace('float', 'fp')}"
    load = machine["load_average"][0]
    say(f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, {args.threads} threads, load {load}")
    model = build(args.geometry, dtype, device)
    ceiling = Ceiling.measure(model, device)
    say(_ceiling_text(ceiling))
    stages = []
    for batch in args.batch:
        stages += measure(model, batch, max(args.max_batch, batch), args.frames, ceiling, device)
        say(_stage_text([row for row in stages if row["batch"] == batch], name))
    speech = []
    if model.real:
        speech = speak(args, device)
        say(_speech_text(speech))
    record = {
        "bench": "stages",
        "machine": machine | {"load_average_after": facts(device)["load_average"]},
        "settings": vars(args) | {"dtype": str(dtype)[6:], "device": str(device)},
        "ceiling": ceiling.record(),
        "stages": stages,
        "speech": speech,
    }
    path = write(f"stages-{name}-{device.type}-t{args.threads}", record)
    say(f"raw samples: {path.relative_to(path.parents[2])}")
    if args.json:
        json.dump(record, sys.stdout)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=(__doc__ or "").split("\n")[0])
    sizes = ", ".join(PUBLISHED)
    parser.add_argument("--geometry", default="embedded", help=f"embedded, {sizes} (random weights), or a checkpoint")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--frames", type=int, default=100, help="frames that count")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="voices that advance together")
    parser.add_argument(
        "--max-batch", type=int, default=8, help="voices that the step is built for, as in LocalBackend"
    )
    parser.add_argument("--sentences", type=int, default=7, help="utterances of each layout at the end")
    parser.add_argument("--json", action="store_true", help="print the run's JSON instead of tables")
    return parser.parse_args()


@torch.inference_mode()
def measure(
    model: Model, batch: int, columns: int, frames: int, ceiling: Ceiling, device: torch.device
) -> list[dict[str, Any]]:
    """Time `frames` frames of `batch` voices; one row a stage with floor and raw samples in ms a frame.

    What the engine would run here comes first, then the parts of a frame in plain torch, which has them apart.
    """
    choice = choose("auto", device.type, model.weights.codec_head.dtype, model.shape, columns)
    room = (model.weights, model.shape, batch, columns, PROMPT + WARM + frames + 1)
    watch, rows = Watch(device), list(range(batch))
    codec, named = CodecState.zeros(model.codec_config, batch, device), torch.tensor(rows, device=device)
    step = make_step(choice, *room, torch.get_num_threads())
    text = _prompted(model, step, rows, watch, "prefill", -(-frames // 5))
    for _ in range(WARM + frames):
        with watch.lap("frame", rest="rest"):
            with watch.span("step"):
                codes = step.step(rows, text).clamp(max=model.shape.codes - 1)
                codes.cpu()
            with watch.span("codec"):
                model.codec.decode(codes[:, :, None], codec, named).cpu()
    random = torch.Generator().manual_seed(0)
    eight = torch.randint(model.shape.codes, (batch, model.shape.codebooks, 8), generator=random).to(device)
    for _ in range(WARM + -(-frames // 8)):
        with watch.lap("codec x8"):
            model.codec.decode(eight, codec, named).cpu()
    del step
    twin = TorchFrameStep(*room)
    text = _prompted(model, twin, rows, watch, "torch: prefill", -(-frames // 5))
    with ExitStack() as timing:
        timing.enter_context(watch.inside(twin, "_talker", "torch: talker"))
        timing.enter_context(watch.inside(twin, "_predictor", "torch: predictor"))
        for part in ("uniforms", "restrict", "pick"):
            timing.enter_context(watch.inside(frame_step, part, "torch: sampling"))
        for _ in range(WARM + frames):
            with watch.lap("torch: step"):
                twin.step(rows, text).cpu()
    work = works(model, batch, PROMPT + frames // 2)
    floors: dict[str, float | None] = {stage: ceiling.ms(w) for stage, w in work.items()}
    floors["step"] = sum(ceiling.ms(work[stage]) for stage in ("talker", "predictor"))
    floors["frame"] = floors["step"] + ceiling.ms(work["codec"])
    result = []
    for stage in STAGES:
        part = 8 if stage == "codec x8" else 1
        floor = floors.get(stage.removeprefix("torch: "))
        result.append(
            {
                "batch": batch,
                "stage": f"{stage} ({choice.name})" if stage == "step" else stage,
                "floor_ms": None if floor is None else round(floor / part, 4),
                "wall_ms": [round(x / part, 4) for x in watch.wall[stage][WARM:]],
                "cpu_ms": [round(x / part, 4) for x in watch.cpu[stage][WARM:]],
            }
        )
    return result


def _prompted(model: Model, step: FrameStep, rows: list[int], watch: Watch, label: str, laps: int) -> Tensor:
    """Give each row a voice with a prompt, after `laps` timed prefills of the first one; a text [n, H] of zeros."""
    weight = model.weights.codec_head
    random = torch.Generator().manual_seed(0)
    pieces = (0.2 * torch.randn(PROMPT, weight.shape[1], generator=random)).to(weight).split(PIECE)
    for _ in range(WARM + laps):
        step.admit(0, pieces[0][0], 0, model.sampling)
        with watch.lap(label):
            step.prefill(0, pieces[0])
    for row in rows:
        step.admit(row, pieces[0][row % PIECE], row, model.sampling)
        for piece in pieces:
            step.prefill(row, piece)
    return torch.zeros(len(rows), weight.shape[1], dtype=weight.dtype, device=weight.device)


def speak(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A sentence through LocalBackend, whole and streaming in turn; seconds from the call of `speak`."""
    backend = LocalBackend.open(args.geometry, max_batch=args.max_batch, device=device.type, dtype=args.dtype)
    try:
        runs = []
        for seed in range(args.sentences):
            for layout in ("whole", "streaming"):
                runs.append(
                    {"layout": layout, "seed": seed}
                    | _listen(backend, Request(SENTENCE, layout=layout, seed=seed, ahead_s=None))
                )
        return runs
    finally:
        backend.close()


def _listen(backend: LocalBackend, request: Request) -> dict[str, float]:
    """First byte; first audible: when the first loud 10 ms are heard if playback starts at once and never waits."""
    began, cpu_began = time.perf_counter(), time.process_time()
    arrivals: list[tuple[float, np.ndarray]] = []
    for chunk in backend.speak(request):
        arrivals.append((time.perf_counter() - began, chunk.pcm))
    took, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    samples = np.concatenate([pcm for _, pcm in arrivals]) / 32768.0
    windows = samples[: len(samples) // WINDOW * WINDOW].reshape(-1, WINDOW)
    loud = np.sqrt(np.square(windows).mean(-1)) > SILENCE
    first = int(loud.argmax()) * WINDOW if loud.any() else len(samples)
    ends = np.cumsum([len(pcm) for _, pcm in arrivals])
    arrival = arrivals[int(np.searchsorted(ends, first, side="right"))][0] if loud.any() else took
    seconds = len(samples) / SAMPLE_RATE
    return {
        "first_byte_s": round(arrivals[0][0], 5),
        "first_audible_s": round(max(arrival, arrivals[0][0] + first / SAMPLE_RATE), 5),
        "silence_s": round(first / SAMPLE_RATE, 3),
        "audio_s": round(seconds, 3),
        "rtf": round(took / seconds, 4),
        "cpu_rtf": round(cpu / seconds, 4),
    }


def _ceiling_text(c: Ceiling) -> str:
    products = ", ".join(f"{kind} {rate:.0f}" for kind, rate in c.gflops.items())
    return (
        f"ceilings: copy {c.copy_gbs:.1f} GB/s; read {c.fresh_gbs:.1f} GB/s over a frame's weights "
        f"({c.fresh_bytes / 1e6:.1f} MB), {c.again_gbs:.1f} GB/s over the predictor's ({c.again_bytes / 1e6:.1f} MB); "
        f"products {products} GFLOP/s"
    )


def _stage_text(rows: list[dict[str, Any]], name: str) -> str:
    lines = [
        f"\n{name}, voices: {rows[0]['batch']}, ms a frame (prefill: {PIECE} positions; x8: eight frames a call)",
        f"{'':<17}{'floor':>9}{'median':>9}{'p95':>9}{'CPU':>9}{'x floor':>9}",
    ]
    for row in rows:
        median, p95 = statistics.median(row["wall_ms"]), float(np.percentile(row["wall_ms"], 95))
        floor = row["floor_ms"]
        ratio = "" if floor is None else f"{median / floor:9.1f}"
        known = "" if floor is None else f"{floor:.3f}"
        lines.append(
            f"{row['stage']:<17}{known:>9}{median:9.2f}{p95:9.2f}{statistics.median(row['cpu_ms']):9.2f}{ratio}"
        )
    return "\n".join(lines)


def _speech_text(runs: list[dict[str, Any]]) -> str:
    lines = [
        f"\nspeech: {SENTENCE!r}",
        f"{'':<11}{'first byte':>16}{'first audible':>16}{'RTF':>14}{'CPU RTF':>9}   median (p95)",
    ]
    for layout in ("whole", "streaming"):
        some = [run for run in runs if run["layout"] == layout]

        def both(key: str, scale: float, digits: int, some: list[dict[str, Any]] = some) -> str:
            values = [scale * run[key] for run in some]
            return f"{statistics.median(values):.{digits}f} ({np.percentile(values, 95):.{digits}f})"

        cpu = statistics.median(run["cpu_rtf"] for run in some)
        byte, audible = both("first_byte_s", 1e3, 0), both("first_audible_s", 1e3, 0)
        lines.append(f"{layout:<11}{byte + ' ms':>16}{audible + ' ms':>16}{both('rtf', 1, 3):>14}{cpu:9.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    program(main)
