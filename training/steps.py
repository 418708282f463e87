"""What the programs of the recipe share: the learning rate's way, the list of shards, how they are stopped."""

import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

INTERRUPTED = 130
"""Exit status of a program that was stopped and can go on."""


def rate(step: int, steps: int, warm: int, hold: float) -> float:
    """Factor on the learning rate: linear warm-up, constant until `hold` of the steps, then a cosine to 1 %."""
    fraction = step / steps
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, fraction - hold) / (1 - hold))))
    return min(1.0, (step + 1) / warm) * max(0.01, falling)


def shards(folders: Sequence[Path]) -> list[Path]:
    """Numbered shards of all folders."""
    return [path for folder in folders for path in sorted(folder.glob("[0-9]*.pt"))]


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """What happens at Ctrl-C and at SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def leave(_: int, __: FrameType | None) -> None:
    """A signal's handler that ends the program without a traceback."""
    raise SystemExit(INTERRUPTED)


class Stop:
    """Notes Ctrl-C and SIGTERM, so that a trainer can save after the step that it is in; a second one ends it."""

    def __init__(self) -> None:
        self.asked = False
        on_signals(self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
