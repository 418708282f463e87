"""A geometry in, checks of the kernels out: launcher against launcher, logits against float64, codes against torch.

All weights are random, and rows hold large noise where nothing may be read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu_place import LAUNCHERS, Place, Row, cast, logits_of, walking
from bench.gpu_voices import Voice, company
from megakernel import sampler, schedule
from megakernel.frame_step import FrameStep, TorchFrameStep
from megakernel.kernel_step import KernelFrameStep
from megakernel.pack import PackedWeights, pack_frame
from megakernel.reference import FrameWeights
from megakernel.sampler import Knobs, Sampling
from megakernel.schedule import Op
from megakernel.shape import Shape

POSITIONS = 128
TRIES = 256
"""Draws from disturbed logits that decide whether a decision hangs on noise."""

ON_NOISE = 0.2
"""Share of decisions that may hang on noise: more, and the comparison would say nothing."""


@dataclass(frozen=True)
class Side:
    """What both sides of a comparison are made of."""

    place: Place
    shape: Shape
    weights: FrameWeights
    packed: PackedWeights
    columns: int

    @classmethod
    def make(cls, place: Place, geometry: str) -> "Side":
        """Random weights, for up to eight voices at once."""
        shape = place.shape(geometry)
        weights = place.weights(shape)
        return cls(place, shape, weights, pack_frame(weights, shape), place.few(8, 4))

    def kernel(self, launcher: str, rows: int) -> KernelFrameStep:
        """A step by the kernels, with noise in all rows."""
        made = self.place.launcher(launcher, self.shape, self.columns)
        step = KernelFrameStep(self.packed, self.shape, rows, self.columns, POSITIONS, made)
        torch.manual_seed(1)
        step.kv.normal_(std=100)
        return step

    def twin(self, dtype: torch.dtype, rows: int) -> TorchFrameStep:
        """The same in torch."""
        return TorchFrameStep(cast(self.weights, dtype), self.shape, rows, self.columns, POSITIONS)

    def voices(self, count: int, frames: int) -> list[Voice]:
        """Number 0, 1, ..."""
        return [Voice.make(seed, frames, self.shape, self.place.device) for seed in range(count)]


def parity(place: Place, geometry: str) -> Iterator[Row]:
    """Rows of three kinds of check."""
    side = Side.make(place, geometry)
    name = place.name(geometry)
    yield {"geometry": name} | launchers_agree(side, place.few(64, 10))
    for launcher in LAUNCHERS:
        errors = logit_errors(side, launcher)
        yield from ({"geometry": name} | row for row in errors)
        noise = max(row["kernel_worst"] + row["torch_worst"] for row in errors)
        yield {"geometry": name} | codes_agree(side, launcher, noise)


def touch(place: Place) -> Iterator[Row]:
    """A few small frames through every kernel, for tools that make them slow."""
    yield launchers_agree(Side.make(place, "tiny"), 6)


@torch.inference_mode()
def launchers_agree(side: Side, frames: int) -> Row:
    """Persistent and graph, bit for bit: every code, and everything that is kept, with voices that come and go."""
    rows = side.columns + 3
    steps = [side.kernel(launcher, rows) for launcher in LAUNCHERS]
    different = 0
    for turn in islice(company(side.voices(12, 24), rows, side.columns, seed=0), frames):
        codes = []
        for step in steps:
            for row, voice in turn.joined.items():
                voice.join(step, row)
            codes.append(step.step(list(turn.named), turn.text))
            for row in turn.leaving:
                step.release(row)
        different += int((codes[0] != codes[1]).sum())
    kept = ("kv", "pending", "history", "done")
    same = {name: torch.equal(getattr(steps[0], name), getattr(steps[1], name)) for name in kept}
    return {
        "check": "persistent = graph",
        "frames": frames,
        "different_codes": different,
        "same": same,
        "ok": different == 0 and all(same.values()),
    }


@torch.inference_mode()
def logit_errors(side: Side, launcher: str) -> list[Row]:
    """Relative errors of the logits against float64 in the same state, of the kernel and of torch in bf16.

    Every frame's inputs are given. Frames stop in turn at the talker's head and at one of the predictor's; the
    twins take the codes that the kernel drew.
    """
    shape, n = side.shape, side.columns
    frames = side.place.few(2, 1) * 2 * (shape.codebooks - 1)
    voices = [
        replace(voice, sampling=Sampling(repetition_penalty=1), pending=torch.zeros_like(voice.pending))
        for voice in side.voices(n, frames)
    ]
    kernel, rows = side.kernel(launcher, n), list(range(n))
    twins = {"torch": side.twin(torch.bfloat16, n), "float64": side.twin(torch.float64, n)}
    steps: list[FrameStep] = [kernel, *twins.values()]
    for step in steps:
        for row, voice in enumerate(voices):
            dtype = step.pending.dtype if isinstance(step, TorchFrameStep) else torch.bfloat16
            replace(voice, prefix=voice.prefix.to(dtype)).join(step, row)
    sums: dict[tuple[str, str], float] = {}
    for frame in range(frames):
        code = 0 if frame % 2 else 1 + frame // 2 % (shape.codebooks - 1)
        text = torch.stack([voice.text[frame] for voice in voices])
        with walking(kernel, _up_to_head(shape, code)):
            codes = kernel.step(rows, text)
        found = {"kernel": logits_of(kernel)[:n, : shape.codes].double()}
        for name, twin in twins.items():
            found[name] = _forced(twin, rows, text, codes)[code][:n, : shape.codes].double()
            twin.pending.zero_()
        kernel.done.zero_()
        exact = found.pop("float64")
        part = "predictor" if code else "talker"
        sums[part, "norm"] = sums.get((part, "norm"), 0.0) + float(exact.square().sum())
        for name, logits in found.items():
            off = logits - exact
            sums[part, name] = sums.get((part, name), 0.0) + float(off.square().sum())
            sums[part, name + "_worst"] = max(sums.get((part, name + "_worst"), 0.0), float(off.abs().max()))
    rows_out = []
    for part in ("talker", "predictor"):
        kernel_error, torch_error = ((sums[part, name] / sums[part, "norm"]) ** 0.5 for name in ("kernel", "torch"))
        rows_out.append(
            {
                "check": f"{part} logits against float64",
                "launcher": launcher,
                "frames": frames // 2,
                "kernel": kernel_error,
                "torch": torch_error,
                "kernel_worst": sums[part, "kernel_worst"],
                "torch_worst": sums[part, "torch_worst"],
                "ok": kernel_error <= 2 * torch_error,
            }
        )
    return rows_out


def _up_to_head(shape: Shape, code: int) -> list[schedule.Phase]:
    """A frame's table, cut off behind the head of a code."""
    table = schedule.frame(shape)
    head = next(i for i, phase in enumerate(table) if phase.op is Op.HEAD and phase.code == code)
    return table[: head + 1]


def _forced(twin: TorchFrameStep, rows: Sequence[int], text: Tensor, codes: Tensor) -> list[Tensor]:
    """One frame of the twin with these codes [n, C] in place of its own; the logits of each."""
    seen: list[Tensor] = []

    def forced(logits: Tensor, *_: object) -> Tensor:
        seen.append(logits.clone())
        return codes[:, len(seen) - 1]

    with patch("megakernel.frame_step.pick", forced):
        twin.step(rows, text.to(twin.pending.dtype))
    return seen


@torch.inference_mode()
def codes_agree(side: Side, launcher: str, noise: float) -> Row:
    """Every code that the kernel draws is the one that torch draws in its place, or hangs on noise.

    noise  largest error of a logit: what torch's logits may be off by when a decision is looked at again
    """
    frames, n = side.place.few(32, 4), side.columns
    kernel, twin = side.kernel(launcher, n), side.twin(torch.bfloat16, n)
    voices = dict(enumerate(side.voices(n, frames)))
    count = {"decisions": 0, "equal": 0, "on_noise": 0, "wrong": 0}
    for row, voice in voices.items():
        voice.join(kernel, row)
        voice.join(twin, row)
    for frame in range(frames):
        rows = list(voices)
        if not rows:
            break
        text = torch.stack([voice.text[frame] for voice in voices.values()])
        codes = kernel.step(rows, text)
        judge = _Judge(codes, noise, count)
        with patch("megakernel.frame_step.pick", judge):
            twin.step(rows, text)
        for row, first in zip(rows, codes[:, 0].tolist(), strict=True):
            if first == side.shape.eos:
                del voices[row]
    few = count["on_noise"] <= ON_NOISE * count["decisions"]
    ok = count["wrong"] == 0 and few
    return {"check": "codes against torch", "launcher": launcher, "noise": noise, **count, "ok": ok}


@dataclass
class _Judge:
    """Stands in for the twin's pick: compares with the kernel's codes [n, C], and hands those out."""

    codes: Tensor
    noise: float
    count: dict[str, int]
    asked: int = 0

    def __call__(self, logits: Tensor, k: Knobs, uniform: Tensor) -> Tensor:
        theirs = self.codes[:, self.asked]
        self.asked += 1
        own = sampler.pick(logits.clone(), k, uniform)
        self.count["decisions"] += len(own)
        self.count["equal"] += int((own == theirs).sum())
        for column in (own != theirs).nonzero()[:, 0].tolist():
            hangs = self._hangs(logits[column], k, uniform[column], theirs[column], column)
            self.count["on_noise" if hangs else "wrong"] += 1
        return theirs

    def _hangs(self, logits: Tensor, k: Knobs, uniform: Tensor, theirs: Tensor, column: int) -> bool:
        """Whether errors as large as those measured lead from these logits [V] to the other code."""
        disturbed = logits + self.noise * (2 * torch.rand(TRIES, len(logits), device=logits.device) - 1)
        one: dict[str, Any] = {
            name: getattr(k, name)[column].expand(TRIES) for name in ("sample", "temperature", "top_k", "tail")
        }
        return bool((sampler.pick(disturbed, replace(k, **one), uniform.expand(TRIES)) == theirs).any())
