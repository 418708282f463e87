"""Labelled calls in, ms per lap out: wall time (GPU time on CUDA) and CPU time, nested calls not counted twice."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from bench.machine import settle


@dataclass
class _Span:
    label: str
    start: Any
    cpu_start: float
    end: Any = None
    cpu_end: float = 0.0
    inner: "list[_Span]" = field(default_factory=list)


class Watch:
    """Adds up the time of each label over a lap, for instance over one frame.

    wall  label -> [laps] ms; on CUDA between events on the stream, waiting for launches included
    cpu   label -> [laps] ms of CPU time of the whole process: unlike wall time hardly touched by what else runs
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self._stack: list[_Span] = []

    @contextmanager
    def lap(self, label: str, rest: str | None = None) -> Iterator[None]:
        """One lap; `label` gets all of it, `rest` what no inner label took."""
        settle(self.device)
        with self.span(label) as whole:
            yield
        settle(self.device)
        wall: dict[str, float] = defaultdict(float)
        cpu: dict[str, float] = defaultdict(float)
        self._sum(whole, wall, cpu)
        if rest is not None:
            wall[rest], cpu[rest] = wall[label], cpu[label]
        wall[label], cpu[label] = self._ms(whole.start, whole.end), 1e3 * (whole.cpu_end - whole.cpu_start)
        for name in wall:
            self.wall[name].append(round(wall[name], 4))
            self.cpu[name].append(round(cpu[name], 4))

    @contextmanager
    def span(self, label: str) -> Iterator[_Span]:
        """Time under a label, inside a lap."""
        span = _Span(label, self._now(), time.process_time())
        if self._stack:
            self._stack[-1].inner.append(span)
        self._stack.append(span)
        try:
            yield span
        finally:
            self._stack.pop()
            span.end, span.cpu_end = self._now(), time.process_time()

    @contextmanager
    def inside(self, owner: object, name: str, label: str) -> Iterator[None]:
        """Put the time of `owner.name(...)` under `label` while the context is open."""
        inner: Callable[..., Any] = getattr(owner, name)
        own = vars(owner).get(name)

        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._stack:
                return inner(*args, **kwargs)
            with self.span(label):
                return inner(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            delattr(owner, name) if own is None else setattr(owner, name, own)

    def _sum(self, span: _Span, wall: dict[str, float], cpu: dict[str, float]) -> None:
        wall[span.label] += self._ms(span.start, span.end) - sum(self._ms(i.start, i.end) for i in span.inner)
        cpu[span.label] += 1e3 * (span.cpu_end - span.cpu_start - sum(i.cpu_end - i.cpu_start for i in span.inner))
        for inner in span.inner:
            self._sum(inner, wall, cpu)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)
