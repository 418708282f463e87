"""What is going on, as one line on stderr that vanishes; nothing at all if stderr is no terminal."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from pipecat_qwen3.backend import FRAME_SAMPLES, SAMPLE_RATE

CHARACTERS_A_SECOND = 15
"""How fast people speak: only the length of the bar depends on it."""


class Progress:
    """A bar for loading and speaking; use it as a context."""

    def __init__(self) -> None:
        self._bar = Bar(
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            refresh_per_second=5,
            transient=True,
            disable=sys.stderr is None or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("loading", total=1)
        self._began = time.perf_counter()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.stop()

    def loading(self, what: str) -> None:
        """Say what is being done before the speech."""
        self._bar.update(self._task, description=what)

    def speaking(self, text: str, max_frames: int | None) -> None:
        """Speech of `text` begins, which will take about a second for fifteen characters."""
        self._began = time.perf_counter()
        samples = len(text) * SAMPLE_RATE // CHARACTERS_A_SECOND
        total = min(samples, max_frames * FRAME_SAMPLES) if max_frames else samples
        self._bar.update(self._task, description="speaking", total=total, completed=0)

    def heard(self, samples: int) -> None:
        """So many samples have come."""
        seconds = samples / SAMPLE_RATE
        speed = seconds / max(time.perf_counter() - self._began, 1e-6)
        self._bar.update(
            self._task, description=f"{seconds:.1f} s of speech, {speed:.1f} x real time", completed=samples
        )
