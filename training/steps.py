"""What the programs of the recipe share: the learning rate's way, the list of shards, how they are stopped."""

import argparse
import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

INTERRUPTED = 130
"""Exit status of a program that was stopped and can go on."""


def rate(step: int, steps: int, warm: int, hold: float) -> float:
    """Factor on the learning rate: linear warm-up, constant until `hold` of the steps, then a cosine to 1 %."""
    fraction = step / steps
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, fraction - hold) / (1 - hold))))
    return min(1.0, (step + 1) / warm) * max(0.01, falling)


def there(path: str) -> Path:
    """A file or folder of the command line, for argparse, which says in one line if it is not there."""
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"there is no {path}")
    return Path(path)


def load(path: Path, holds: Iterable[str], maker: str, **options: Any) -> dict[str, Any]:
    """The dictionary of a file that a program of the recipe wrote; exits with one line if it is of another kind."""
    try:
        found = torch.load(path, weights_only=True, **options)
    except Exception as error:  # the unpickler raises anything for bytes that are no pickle
        raise SystemExit(f"{path} is no file of training.{maker}: it cannot be read ({type(error).__name__})") from None
    missing = [name for name in holds if not isinstance(found, dict) or name not in found]
    if missing:
        raise SystemExit(f"{path} is no file of training.{maker}: it holds no {', '.join(missing[:3])}")
    return found


def load_json(path: Path, maker: str) -> dict[str, Any]:
    """The object of a JSON file that a program of the recipe wrote; exits with one line if it is of another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} is no file of training.{maker}: it cannot be read ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{path} is no file of training.{maker}: it holds no object")
    return found


def shards(folders: Sequence[Path]) -> list[Path]:
    """Numbered shards of all folders; exits with one line if there are none."""
    found = [path for folder in folders for path in sorted(folder.glob("[0-9]*.pt"))]
    if not found:
        names = " ".join(map(str, folders))
        raise SystemExit(f"no recordings in {names}; make some: python -m training.data {names} --help")
    return found


def fit_options(what: str | None, steps: int) -> argparse.ArgumentParser:
    """What every program takes that calls `fit`."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("data", type=there, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def fit(
    network: nn.Module, options: argparse.Namespace, loss: Callable[[], Tensor], share_right: Callable[[], float]
) -> None:
    """Train a small network and write --out: --steps at --lr, each on the loss [] of a new batch.

    Every minute and at the end it is said what share of held-out material, in per cent, the network gets right.
    """
    on_signals(leave)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, fused=True)
    said = time.monotonic()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate(step, options.steps, 100, 0.3)
        found = loss()
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        optimizer.step()
        if time.monotonic() - said > 60 or step + 1 == options.steps:
            with torch.no_grad():
                right = share_right()
            line = {"step": step + 1, "loss": round(found.item(), 4), "held out, %": round(right, 1)}
            print(json.dumps(line), flush=True)
            said = time.monotonic()
    torch.save(network.state_dict(), options.out.with_suffix(".part"))
    options.out.with_suffix(".part").rename(options.out)


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
