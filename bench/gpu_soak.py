"""Thousands of frames with voices that come and go while other work runs; each says what it says alone."""

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu_place import Place, Row
from bench.gpu_voices import Voice, company
from bench.machine import settle
from megakernel.frame_step import FrameStep
from megakernel.kernel_step import KernelFrameStep
from megakernel.pack import pack_frame

FRAMES = 10_000
STRETCH = 500
"""Frames between two looks at what happened; the GPU is not waited for in between."""

PAUSE_S = 3.0
"""Left for the end when the time does not suffice."""


def soak(place: Place) -> Iterator[Row]:
    """A row every STRETCH frames, then the check."""
    shape, columns, rows = place.shape("0.6b"), place.few(8, 4), place.few(12, 6)
    wanted, stretch, longest = place.few(FRAMES, 36), place.few(STRETCH, 12), place.few(48, 8)
    packed = pack_frame(place.weights(shape), shape)
    step = KernelFrameStep(packed, shape, rows, columns, 40 + longest, place.launcher("persistent", shape, columns))
    voices = [Voice.make(seed, longest, shape, place.device) for seed in range(place.few(24, 4))]
    alone = {voice.seed: _alone(step, voice) for voice in voices}
    other = Other(place.device)
    said: dict[int, list[Tensor]] = {}
    wrong = torch.zeros((), dtype=torch.int64, device=place.device)
    frames = compared = 0
    slowest = 0.0
    turns = company(voices, rows, columns, seed=1)
    while frames < wanted and place.seconds_left > PAUSE_S:
        marks: list[Any] = []
        crowds: list[int] = []
        began = time.perf_counter()
        for turn in islice(turns, min(stretch, wanted - frames)):
            other.work()
            for row, voice in turn.joined.items():
                voice.join(step, row)
                said[row] = []
            marks.append(place.mark())
            codes = step.step(list(turn.named), turn.text)
            marks.append(place.mark())
            for row, code in zip(turn.named, codes, strict=True):
                said[row].append(code)
            for row in turn.leaving:
                voice, _ = turn.named[row]
                wrong += (torch.stack(said[row]) != alone[voice.seed][: len(said[row])]).any()
                compared += 1
                step.release(row)
            crowds.append(len(turn.named))
        ms = place.ms_between(marks)[::2]
        at = int(np.argmax(ms))
        slowest = max(slowest, ms[at])
        yield {
            "frames": len(ms),
            "ms": [round(float(np.percentile(ms, p)), 4) for p in (50, 95, 99)],
            "slowest": {"ms": ms[at], "frame": frames + at, "voices": crowds[at], "mhz": place.clock_mhz()},
            "wall_s": round(time.perf_counter() - began, 3),
        }
        frames += len(ms)
    settle(place.device)
    reports = step.report.tolist()
    yield {
        "check": "soak",
        "frames": frames,
        "wanted": wanted,
        "voices": compared,
        "wrong_voices": int(wrong),
        "barrier_report": reports,
        "slowest_ms": slowest,
        "ok": int(wrong) == 0 and compared > 0 and not any(reports),
    }


def _alone(step: FrameStep, voice: Voice) -> Tensor:
    """[F, C], what the voice says when nobody else is there."""
    voice.join(step, 0)
    codes = [step.step([0], text[None])[0] for text in voice.text]
    step.release(0)
    return torch.stack(codes)


class Other:
    """Copies and matrix products on a stream of their own; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        if self.stream is not None:
            self.copied = [torch.randn(4 << 20, device=device) for _ in range(2)]
            self.factors = [torch.randn(2048, 2048, dtype=torch.bfloat16, device=device) for _ in range(3)]
            settle(device)

    def work(self) -> None:
        """Enqueue about a hundred microseconds of it."""
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                for _ in range(3):
                    self.copied[1].copy_(self.copied[0])
                    torch.mm(self.factors[0], self.factors[1], out=self.factors[2])
