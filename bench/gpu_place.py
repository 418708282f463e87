"""Where the steps of bench.gpu run: a GPU, or the kernels' CPU runtime in a dry run; launchers, weights, time there."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.geometry import PREDICTOR, PUBLISHED, _random_frame
from bench.machine import settle
from megakernel import gpu, launch
from megakernel.cucpu.launcher import CpuLauncher
from megakernel.gpu import Gpu
from megakernel.kernel_step import KernelFrameStep, Launcher
from megakernel.kernels import INSTANCES
from megakernel.reference import FrameWeights
from megakernel.schedule import Phase, words
from megakernel.shape import Shape, StackShape

Row = dict[str, Any]
"""What a step found out about one case; a check has `ok`."""

LAUNCHERS = ("persistent", "graph")


@dataclass(frozen=True)
class Variant:
    """A way to compile the kernels: threads of a block, and macros on top of the usual ones."""

    threads: int = launch.THREADS
    extra: Mapping[str, object] = field(default_factory=dict)


SHIPPED = Variant()
VARIANTS = {
    "256 threads": Variant(256),
    "512 threads": Variant(512),
}
"""What the step `variants` compares: one line a flag that is to be decided."""

TINY = Shape(
    talker=StackShape(layers=3, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=32),
    predictor=StackShape(layers=2, hidden=48, intermediate=64, heads=4, kv_heads=1, head_dim=32),
    codebooks=16,
    codes=2048,
    vocab=3072,
    eos=2150,
    projected=True,
)
DRY = replace(TINY, codebooks=4, codes=64, vocab=1088, eos=166)
"""Every size of a dry run: a frame takes 50 ms on the CPU runtime."""


class Skipped(Exception):
    """A step that cannot run here, and why, in one line."""


@dataclass(frozen=True)
class Place:
    """A GPU, or with `dry` this machine's CPU.

    work    a folder that the steps of a run share
    until   time.monotonic() at which the step will be stopped
    """

    dry: bool
    work: Path
    until: float

    @property
    def device(self) -> torch.device:
        """Of weights and state."""
        return torch.device("cpu" if self.dry else "cuda")

    @cached_property
    def gpu(self) -> Gpu:
        """Raises CudaError in a dry run."""
        return gpu.facts()

    @property
    def seconds_left(self) -> float:
        """Until the step is stopped."""
        return self.until - time.monotonic()

    def name(self, geometry: str) -> str:
        """Of what is run where this geometry was asked for."""
        return "dry" if self.dry else geometry

    def shape(self, geometry: str) -> Shape:
        """Of "tiny" or a published size; always DRY in a dry run."""
        if self.dry:
            return DRY
        if geometry == "tiny":
            return TINY
        talker = PUBLISHED[geometry]
        projected = talker.hidden != PREDICTOR.hidden
        return replace(TINY, talker=talker, predictor=PREDICTOR, projected=projected)

    def weights(self, shape: Shape) -> FrameWeights:
        """Random, bf16, the same every time: norms around 1, and logits with a standard deviation of 3."""
        torch.manual_seed(0)
        w = _random_frame(shape, torch.bfloat16, self.device)
        for stack, sizes in ((w.talker, shape.talker), (w.predictor, shape.predictor)):
            stack.norm.uniform_(0.7, 1.3)
            for layer in stack.layers:
                layer.input_norm.uniform_(0.7, 1.3)
                layer.post_norm.uniform_(0.7, 1.3)
                for norms in layer.qk_norm.split([sizes.heads, sizes.kv_heads]):
                    norms[:] = norms[0].clone().uniform_(0.7, 1.3)  # one norm, repeated for every head
        for head in (w.codec_head, w.heads):
            assert isinstance(head, Tensor)
            head.mul_(3)
        return w

    def launcher(self, name: str, shape: Shape, columns: int, variant: Variant = SHIPPED) -> Launcher:
        """ "persistent" or "graph". In a dry run the variant is left aside, and blocks run in a random order."""
        if self.dry:
            return CpuLauncher(shape, blocks=2, threads=64, phases=name == "graph", fp32=False, seed=0)
        made = {"persistent": launch.PersistentLauncher, "graph": launch.GraphLauncher}[name]
        return made(shape, self.gpu, columns, variant.threads, variant.extra)

    def few(self, real: int, dry: int) -> int:
        """A count, or in a dry run the smaller one."""
        return dry if self.dry else real

    def mark(self) -> Any:
        """A moment in the current stream's work."""
        if self.dry:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms_between(self, marks: Sequence[Any]) -> list[float]:
        """Milliseconds from each mark to the next; waits for the GPU."""
        settle(self.device)
        return [round(1e3 * (b - a) if self.dry else a.elapsed_time(b), 5) for a, b in pairwise(marks)]

    def times(self, run: Callable[[], object], count: int, warm: int = 2) -> list[float]:
        """Milliseconds of each of `count` runs, one right after the other, after some that do not count."""
        for _ in range(warm):
            run()
        marks = [self.mark()]
        for _ in range(count):
            run()
            marks.append(self.mark())
        return self.ms_between(marks)

    def race(
        self, runs: Mapping[str, Callable[[], object]], rounds: int, count: int, warm: int = 2
    ) -> dict[str, list[list[float]]]:
        """`times` of several, taking turns: label -> [rounds][count] ms."""
        taken: dict[str, list[list[float]]] = {label: [] for label in runs}
        for _ in range(rounds):
            for label, run in runs.items():
                taken[label].append(self.times(run, count, warm))
        return taken

    def clock_mhz(self) -> int | None:
        """Of the multiprocessors now, or None where nobody says."""
        try:
            return None if self.dry else torch.cuda.clock_rate()
        except Exception:  # NVIDIA's management library is missing, or may not be asked here
            return None


def columns_for(voices: int) -> list[int]:
    """The compiled instances that so many voices can need."""
    most = next(n for n in INSTANCES if n >= voices)
    return [n for n in INSTANCES if n <= most]


@contextmanager
def walking(step: KernelFrameStep, phases: Sequence[Phase]) -> Iterator[None]:
    """While open, `step.step` walks this table instead of a frame's."""
    usual = step._tables["frame"]
    step._tables["frame"] = torch.tensor(list(words(phases)), dtype=torch.int32, device=usual.device)
    try:
        yield
    finally:
        step._tables["frame"] = usual


def logits_of(step: KernelFrameStep) -> Tensor:
    """fp32 [columns, V], of the head that was walked last; the first K of a row are a code predictor's."""
    return step._scratch["logits"]


def cast(value: Any, dtype: torch.dtype) -> Any:
    """FrameWeights, or any part of them, in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, list | tuple):
        return type(value)(cast(item, dtype) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: cast(getattr(value, f.name), dtype) for f in fields(value)})
    return value
