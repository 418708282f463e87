"""Milliseconds a frame against voices that advance together and positions that each holds, beside the floor.

    python -m bench.step [--geometry 0.6b] [--batch 1 2 4 8] [--context 50 200 800]

The frame step that the engine would run here: the kernels on a GPU, numba's frame on a CPU (--backend chooses). The
codec is not part of it (`bench.codec`). Prints the floor first; raw samples go to bench/results.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.floor import Ceiling, Work, works
from bench.geometry import PUBLISHED, Model, build
from bench.record import Record, label, options
from bench.watch import Watch
from megakernel.choose import BACKENDS, choose, make_step
from megakernel.frame_step import FrameStep
from pipecat_qwen3.device import pick_device, pick_dtype
from pipecat_qwen3.errors import program

WARM = 5
"""Frames that do not count."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    record = Record("step", args, device)
    model = build(args.geometry, dtype, device)
    ceiling = Ceiling.measure(model, device)
    record.say(f"ceilings: read {ceiling.fresh_gbs:.1f} GB/s over a frame's weights, copy {ceiling.copy_gbs:.1f} GB/s")
    choice = choose(args.backend, device.type, dtype, model.shape, args.max_batch)
    record.say(f"backend {choice.name}: {choice.reason}")
    positions = max(args.context) + WARM + args.frames + 1
    step = make_step(choice, model.weights, model.shape, max(args.batch), args.max_batch, positions, args.threads)
    record.say(head())
    rows = []
    for context, batch in itertools.product(args.context, args.batch):
        rows.append(measure(model, step, batch, context, args.frames, ceiling, device))
        record.say(line(rows[-1]))
    name = label(args.geometry, dtype, device)
    return record.finish(
        f"{name}-{choice.name}",
        dtype=str(dtype)[6:],
        backend={"name": choice.name, "reason": choice.reason},
        ceiling=ceiling.record(),
        rows=rows,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options("step", __doc__)
    sizes = ", ".join(PUBLISHED)
    parser.add_argument("--geometry", default="embedded", help=f"embedded, {sizes} (random weights), or a checkpoint")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], help="voices that advance together")
    parser.add_argument(
        "--context", type=int, nargs="+", default=[50, 200, 800], help="positions that each voice holds"
    )
    parser.add_argument(
        "--max-batch", type=int, default=8, help="voices that the step is built for, as in LocalBackend"
    )
    parser.add_argument("--frames", type=int, default=60, help="frames that count, of each case")
    args = parser.parse_args(argv)
    if max(args.batch) > args.max_batch:
        parser.error(f"--batch {max(args.batch)} needs --max-batch of at least that, but it is {args.max_batch}")
    return args


@torch.inference_mode()
def measure(
    model: Model, step: FrameStep, batch: int, context: int, frames: int, ceiling: Ceiling, device: torch.device
) -> dict[str, Any]:
    """One case: floor and raw samples in ms a frame of all voices, the codes on the host included."""
    stack = model.shape.talker
    dtype = model.weights.codec_head.dtype
    random = torch.Generator().manual_seed(0)
    prefix = torch.randn(stack.layers, 2, stack.kv_heads, context, stack.head_dim, generator=random).to(device, dtype)
    text = (0.2 * torch.randn(batch, stack.hidden, generator=random)).to(device, dtype)
    named = list(range(batch))
    for row in named:
        step.admit(row, text[row], row, model.sampling)
        step.load_prefix(row, prefix)
    watch = Watch(device)
    for _ in range(WARM + frames):
        with watch.lap("frame"):
            step.step(named, text).cpu()
    for row in named:
        step.release(row)
    work = works(model, batch, context + frames // 2)
    return {
        "batch": batch,
        "context": context,
        "bytes": sum(_bytes(work[stage]) for stage in ("talker", "predictor")),
        "floor_ms": round(sum(ceiling.ms(work[stage]) for stage in ("talker", "predictor")), 4),
        "wall_ms": [round(x, 4) for x in watch.wall["frame"][WARM:]],
        "cpu_ms": [round(x, 4) for x in watch.cpu["frame"][WARM:]],
    }


def _bytes(work: Work) -> int:
    return work.fresh + work.again


def head() -> str:
    """Of the table that `line` fills."""
    return f"{'ms a frame: voices':>18}{'positions':>11}{'floor':>9}{'median':>9}{'p95':>9}{'CPU':>9}{'x floor':>9}"


def line(row: dict[str, Any]) -> str:
    """One case of the table."""
    median, p95 = statistics.median(row["wall_ms"]), float(np.percentile(row["wall_ms"], 95))
    cpu, floor = statistics.median(row["cpu_ms"]), row["floor_ms"]
    return f"{row['batch']:>18}{row['context']:>11}{floor:9.3f}{median:9.2f}{p95:9.2f}{cpu:9.2f}{median / floor:9.1f}"


if __name__ == "__main__":
    program(main)
