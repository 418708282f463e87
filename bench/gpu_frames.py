"""Milliseconds a frame and microseconds a phase: a geometry in, raw samples and the bytes they had to read out.

Whoever is compared takes turns in one process. A frame reads 0.9 to 5 GB of weights, many times what a cache holds,
so nothing is flushed between frames.
"""

import time
from collections.abc import Callable, Iterator, Mapping

import torch

from bench.gpu_place import LAUNCHERS, VARIANTS, Place, Row, walking
from megakernel import schedule
from megakernel.frame_step import FrameStep, TorchFrameStep
from megakernel.kernel_step import KernelFrameStep, Launcher
from megakernel.pack import PackedWeights, pack_frame
from megakernel.reference import FrameWeights
from megakernel.sampler import Sampling
from megakernel.schedule import Part, Phase
from megakernel.shape import Shape

CASES = {
    "0.6b": [(batch, kv) for kv in (100, 1000, 4000) for batch in (1, 8, 32, 4, 16)],
    "1.7b": [(batch, kv) for kv in (100, 1000) for batch in (1, 8, 32)],
}
"""(voices, positions that each holds), the most wanted first."""

ROUNDS, FRAMES, TORCH_FRAMES = 4, 20, 3


def frames(place: Place, geometry: str) -> Iterator[Row]:
    """Persistent, graph and torch for every case."""
    shape = place.shape(geometry)
    weights = place.weights(shape)
    packed = pack_frame(weights, shape)
    launchers = {name: place.launcher(name, shape, place.few(32, 4)) for name in LAUNCHERS}
    for batch, kv in [(1, 20), (3, 20)] if place.dry else CASES[geometry]:
        yield from _case(place, geometry, shape, packed, launchers, batch, kv, weights)


def variants(place: Place, geometry: str) -> Iterator[Row]:
    """Both launchers in every variant of the compilation."""
    shape = place.shape(geometry)
    packed = pack_frame(place.weights(shape), shape)
    launchers = {
        f"{name}, {label}": place.launcher(name, shape, place.few(8, 4), variant)
        for label, variant in VARIANTS.items()
        for name in LAUNCHERS
    }
    for batch, kv in [(1, 20)] if place.dry else [(1, 100), (8, 100), (1, 1000)]:
        yield from _case(place, geometry, shape, packed, launchers, batch, kv, None)


def _case(
    place: Place,
    geometry: str,
    shape: Shape,
    packed: PackedWeights,
    launchers: Mapping[str, Launcher],
    batch: int,
    kv: int,
    torch_weights: FrameWeights | None,
) -> Iterator[Row]:
    rounds, count = place.few(ROUNDS, 2), place.few(FRAMES, 2)
    positions = kv + 8 + rounds * (count + 2)
    case: Row = {"geometry": place.name(geometry), "batch": batch, "kv": kv, "bytes": _frame_bytes(shape, batch, kv)}
    try:
        runs: dict[str, Callable[[], object]] = {}
        for label, launcher in launchers.items():
            step = KernelFrameStep(packed, shape, batch, batch, positions, launcher)
            runs[label] = _speaking(place, step, shape, batch, kv)
        taken = place.race(runs, rounds, count)
        host = {label: _host_ms(place, run) for label, run in runs.items()}
        if torch_weights is not None:
            twin = TorchFrameStep(torch_weights, shape, batch, batch, positions)
            runs = {"torch": _speaking(place, twin, shape, batch, kv)}
            taken |= place.race(runs, 1, place.few(TORCH_FRAMES, 1), warm=1)
    except torch.OutOfMemoryError as error:
        yield case | {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
        return
    for label, ms in taken.items():
        yield case | {"launcher": label, "ms": ms, "host_ms": host.get(label)}


def _speaking(place: Place, step: FrameStep, shape: Shape, batch: int, kv: int) -> Callable[[], object]:
    """The next frame of `batch` voices, each of which holds `kv` random positions."""
    torch.manual_seed(2)
    stack = shape.talker
    size = (stack.layers, 2, stack.kv_heads, kv, stack.head_dim)
    prefix = torch.randn(size, dtype=torch.bfloat16, device=place.device)
    text = (0.2 * torch.randn(batch, stack.hidden, device=place.device)).bfloat16()
    rows = list(range(batch))
    for row in rows:
        step.admit(row, text[row], row, Sampling())
        step.load_prefix(row, prefix)
    return lambda: step.step(rows, text)


def _host_ms(place: Place, run: Callable[[], object]) -> float:
    """Of one call: above the GPU's own time, Python is what limits."""
    place.times(run, 1, warm=0)
    began = time.perf_counter()
    run()
    return round(1e3 * (time.perf_counter() - began), 4)


def _frame_bytes(shape: Shape, batch: int, kv: int) -> int:
    weights = sum(schedule.weight_bytes(phase, shape) for phase in schedule.frame(shape))
    return weights + batch * schedule.kv_bytes(shape, kv)


def phases(place: Place, geometry: str) -> Iterator[Row]:
    """What each kind of phase adds to a frame: frames with and without it in turn, in either launcher.

    So every other phase finds the caches, and the loads that run ahead, as they are in a frame. The numbers that such
    a frame computes mean nothing.
    """
    shape, kv = place.shape(geometry), place.few(300, 10)
    packed = pack_frame(place.weights(shape), shape)
    rounds, count, warm = place.few(3, 1), place.few(15, 1), place.few(2, 0)
    for batch in (3,) if place.dry else (1, 8):
        steps = {}
        for name in LAUNCHERS:
            launcher = place.launcher(name, shape, place.few(8, 4))
            steps[name] = KernelFrameStep(packed, shape, batch, batch, kv + 2 * rounds * (count + warm), launcher)
        for kind, own in kinds(shape).items():
            others = [phase for phase in schedule.frame(shape) if phase not in own]
            size = sum(schedule.weight_bytes(phase, shape) for phase in own)
            size += batch * schedule.kv_bytes(shape, kv) if kind == "talker attention" else 0
            for name, step in steps.items():
                run = _speaking(place, step, shape, batch, kv)
                ms: dict[str, list[list[float]]] = {"whole": [], "without": []}
                for _ in range(rounds):
                    ms["whole"].append(place.times(run, count, warm))
                    with walking(step, others):
                        ms["without"].append(place.times(run, count, warm))
                case = {"geometry": place.name(geometry), "batch": batch, "kv": kv, "kind": kind, "launcher": name}
                yield case | {"count": len(own), "bytes": size} | ms


def kinds(shape: Shape) -> dict[str, list[Phase]]:
    """The phases of a frame by what they do and for whom; the predictor's first pass is with the others."""
    found: dict[str, list[Phase]] = {}
    for phase in schedule.frame(shape):
        part = "talker" if phase.part is Part.TALKER else "predictor"
        found.setdefault(f"{part} {phase.op.name.lower().replace('_', '-')}", []).append(phase)
    return found
