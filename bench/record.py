"""What all benches share at their two ends: options and a header go in front, the run's JSON comes last."""

import argparse
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.machine import RESULTS, facts

PACKAGES = ("pipecat-qwen3", "torch", "transformers", "pipecat-ai", "numpy", "websockets", "uvicorn", "aiohttp")
"""Whose versions are kept with a result."""


def options(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every bench takes; `doc` is the module's docstring, of which the first line is shown."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=(doc or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the run's JSON instead of tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: bench/results)")
    parser.add_argument("--note", default="", help="kept in the JSON, for instance what else the machine was doing")
    return parser


def engine_options(name: str, doc: str | None) -> argparse.ArgumentParser:
    """As `options`, and what a bench takes that opens an engine."""
    parser = options(name, doc)
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hugging Face name")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--max-batch", type=int, default=8, help="voices that the engine is built for")
    return parser


class Record:
    """One run: says what it finds as it goes (with --json nothing), and keeps it."""

    def __init__(self, bench: str, args: argparse.Namespace, device: torch.device) -> None:
        self.bench, self.args, self.device = bench, args, device
        self.machine = facts(device)
        self.say(
            f"{self.machine['gpu'] or self.machine['cpu']}, {self.machine['cores']} cores, torch "
            f"{self.machine['torch']}, load {self.machine['load_average'][0]}"
        )

    def say(self, text: object) -> None:
        """Print, unless the JSON is what is printed."""
        if not self.args.json:
            print(text, flush=True)

    def finish(self, label: str, **measured: Any) -> dict[str, Any]:
        """Write BENCH-LABEL-TIME.json with what was measured; returns all of it."""
        settings = {k: _plain(v) for k, v in vars(self.args).items() if k not in ("json", "results", "note")}
        record = {
            "bench": self.bench,
            "machine": self.machine | {"load_average_after": facts(self.device)["load_average"]},
            "versions": versions(PACKAGES),
            "note": self.args.note,
            "settings": settings | {"device": str(self.device)},
            **measured,
        }
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        path = self.args.results / f"{self.bench}-{label}-{stamp}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
        self.say(f"raw samples: {path}")
        if self.args.json:
            json.dump(record, sys.stdout)
        return record


def _plain(value: Any) -> Any:
    """A setting for JSON; folders and files by their own names alone, since where they lay says nothing."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and Path(value.rpartition("=")[2]).is_absolute()):
        return Path(value).name
    return value


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Installed version of each package, None where there is none."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def label(model: str, dtype: torch.dtype, device: torch.device) -> str:
    """MODEL-DTYPE-DEVICE, for file names."""
    return f"{Path(model).name}-{str(dtype)[6:].replace('bfloat', 'bf').replace('float', 'fp')}-{device.type}"
