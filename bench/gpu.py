"""Everything there is to know about the kernels on a GPU, in one command of less than nine minutes.

    python -m bench.gpu [--dry-run] [--only STEP ...] [--budget 520]

Builds, checks parity, soaks, then times, the most wanted first; prints a table last. The JSON in bench/results (and in
the folder $OUT, if set) is written anew after every step, so that a killed run keeps what it has. Every step is a
process of its own with its own time limit: one that fails, hangs or loses the GPU's context costs itself alone.
--dry-run walks through the steps with a tiny model on the CPU runtime of the kernels, or skips them by name.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BUDGET_S = 520
LEAST_S = 10
"""With less than this left a step is not started: torch alone takes some seconds to import."""

CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


class Step(NamedTuple):
    """A generator of rows, `module.function`, with its arguments; and how it is run.

    seconds  its own limit
    dry      a dry run walks it
    beside   it uses the CPU alone, and runs while the next steps do
    needs    steps beside that must have ended before
    """

    work: str
    arguments: tuple[str, ...] = ()
    seconds: int = 60
    dry: bool = False
    beside: bool = False
    needs: tuple[str, ...] = ("build",)


STEPS = {
    "build": Step("gpu_build.compile_all", seconds=180, dry=True, beside=True, needs=()),
    "checkpoint": Step("gpu_speech.checkpoint", seconds=240, beside=True, needs=()),
    "ceilings": Step("gpu_probe.ceilings", seconds=40, dry=True, needs=()),
    "parity-tiny": Step("gpu_parity.parity", ("tiny",), dry=True),
    "parity-0.6b": Step("gpu_parity.parity", ("0.6b",)),
    "parity-1.7b": Step("gpu_parity.parity", ("1.7b",)),
    "soak": Step("gpu_soak.soak", seconds=80, dry=True),
    "frames-0.6b": Step("gpu_frames.frames", ("0.6b",), seconds=90, dry=True),
    "variants": Step("gpu_frames.variants", ("0.6b",), dry=True),
    "frames-1.7b": Step("gpu_frames.frames", ("1.7b",)),
    "phases": Step("gpu_frames.phases", ("0.6b",), dry=True),
    "probe": Step("gpu_probe.probe", seconds=50, dry=True, needs=()),
    "speech": Step("gpu_speech.speech", seconds=80, needs=("build", "checkpoint")),
    "faster": Step("gpu_speech.faster", seconds=80, needs=("checkpoint",)),
    "sanitize": Step("gpu_speech.sanitize", seconds=90),
}
"""In the order of their value."""

INSIDE = {"touch": Step("gpu_parity.touch")}
"""What other steps run."""


def main() -> None:
    args = _arguments()
    if args.step:
        _work(args)
        return
    if not args.dry_run:
        from megakernel import gpu

        try:
            gpu.facts()
        except gpu.CudaError as error:
            sys.exit(f"bench.gpu needs a GPU: {error}; --dry-run does without")
    sys.exit(0 if Suite(args).run() else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU, to see that the steps work")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: bench/results)")
    inner = parser.add_argument_group("what the command calls itself with")
    inner.add_argument("--step", nargs="+", choices=[*STEPS, *INSIDE])
    inner.add_argument("--rows", type=Path, help="where the rows go, a line each")
    inner.add_argument("--work", type=Path, help="a folder that steps share")
    inner.add_argument("--seconds", type=float, default=600)
    return parser.parse_args()


# -- a step, in a process of its own -------------------------------------------------------------------------------


def _work(args: argparse.Namespace) -> None:
    """Run steps and write what they say, a line at a time, to be read whenever this process ends."""
    import torch

    from bench.gpu_place import Place, Skipped

    torch.set_num_threads(1)
    place = Place(args.dry_run, args.work, time.monotonic() + args.seconds)
    with args.rows.open("a", encoding="utf-8") as out:

        def say(**values: Any) -> None:
            print(json.dumps(values, separators=(",", ":")), file=out, flush=True)

        for name in args.step:
            began, ended, reason = time.monotonic(), "done", ""
            step = (STEPS | INSIDE)[name]
            say(step=name, began=True)
            try:
                module, function = step.work.split(".")
                for row in getattr(importlib.import_module(f"bench.{module}"), function)(place, *step.arguments):
                    say(step=name, row=row)
            except Skipped as error:
                ended, reason = "skipped", str(error)
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                ended, reason = "failed", f"{type(error).__name__}: {lines[0]}"[:500]
            say(step=name, ended=ended, reason=reason, seconds=round(time.monotonic() - began, 2))


@dataclass
class Child:
    """A running process with some steps, in a group of its own so that all of it can be ended."""

    names: Sequence[str]
    process: "subprocess.Popen[bytes]"
    rows: Path
    log: Path
    until: float
    clocks: dict[str, str] | None

    @classmethod
    def start(cls, names: Sequence[str], seconds: float, dry: bool, folder: Path) -> "Child":
        """Run these steps, one after the other, for at most so many seconds; `folder` is the one that steps share."""
        rows, log = (folder / f"{names[0]}.{kind}" for kind in ("jsonl", "log"))
        command = [sys.executable, "-m", "bench.gpu", "--step", *names, "--rows", str(rows)]
        command += ["--work", str(folder), "--seconds", str(seconds), *(["--dry-run"] if dry else [])]
        with log.open("wb") as out:
            clocks = None if dry else _clocks()
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, process_group=0)
        return cls(names, process, rows, log, time.monotonic() + seconds, clocks)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Wait for it, but no longer than it may take; what its steps said: state, reason, seconds, rows."""
        reason = ""
        try:
            status = self.process.wait(max(0.1, self.until - time.monotonic()))
            reason = f"the process ended with status {status}: {_last_line(self.log)}"
        except subprocess.TimeoutExpired:
            reason = "its time was over"
        self.stop()
        found: dict[str, dict[str, Any]] = {}
        lines = self.rows.read_text(encoding="utf-8").splitlines() if self.rows.exists() else []
        for line in lines:
            try:
                said = json.loads(line)
            except ValueError:  # the process died while it wrote
                continue
            step = found.setdefault(said["step"], {"state": "stopped", "reason": reason, "rows": []})
            if "row" in said:
                step["rows"].append(said["row"])
            elif "ended" in said:
                step |= {"state": said["ended"], "reason": said["reason"], "seconds": said["seconds"]}
        for name in self.names:
            step = found.setdefault(name, {"state": "stopped", "reason": reason, "rows": []})
            step["clocks"] = [self.clocks, None if self.clocks is None else _clocks()]
        return found

    def stop(self) -> None:
        """End it and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


# -- the whole, in the process that was called ---------------------------------------------------------------------


class Suite:
    """Runs the steps one after the other, keeps the record, prints."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.dry, self.budget = args.dry_run, args.budget
        self.until = time.monotonic() + args.budget
        only = args.only or list(STEPS)
        wanted = {*only, "ceilings", *(need for name in only for need in STEPS[name].needs)}
        self.steps = {name: step for name, step in STEPS.items() if name in wanted}
        folders = [args.results, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])]
        name = f"gpu-{'dry-run-' if self.dry else ''}{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
        self.paths = [folder / name for folder in folders]
        self.record: dict[str, Any] = {"bench": "gpu", "dry_run": self.dry, "budget_s": args.budget, "steps": {}}
        self.running: list[Child] = []

    def run(self) -> bool:
        """All of it; whether every check held and nothing failed."""
        from bench.gpu_table import sound, table

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the children
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
            try:
                self._run_dry(Path(folder)) if self.dry else self._run_steps(Path(folder))
            finally:
                for child in self.running:
                    child.stop()
        print(table(self.record))
        print(f"\nraw samples: {', '.join(map(str, self.paths))}")
        return sound(self.record)

    def _run_dry(self, folder: Path) -> None:
        """What can be walked in one process, the rest by name."""
        walked = [name for name, step in self.steps.items() if step.dry]
        found: dict[str, dict[str, Any]] = {}
        if walked:
            self.running = [Child.start(walked, self.until - time.monotonic(), True, folder)]
            found = self.running[0].finish()
        for name in self.steps:
            self._keep({name: found.get(name, {"state": "skipped", "reason": "needs a GPU", "rows": []})})

    def _run_steps(self, folder: Path) -> None:
        for name, step in self.steps.items():
            for child in [child for child in self.running if child.names[0] in step.needs]:
                self._finish(child)
            left = self.until - time.monotonic()
            if left < LEAST_S:
                reason = f"no time was left of {self.budget:.0f} s"
                self._keep({name: {"state": "skipped", "reason": reason, "rows": []}})
                continue
            child = Child.start([name], min(step.seconds, left), False, folder)
            self.running.append(child)
            if not step.beside:
                self._finish(child)
        for child in list(self.running):
            self._finish(child)

    def _finish(self, child: Child) -> None:
        found = child.finish()
        self.running.remove(child)
        self._keep(found)

    def _keep(self, found: dict[str, dict[str, Any]]) -> None:
        """Put steps into the record and the files."""
        for name, step in found.items():
            for row in step["rows"]:
                if "facts" in row:
                    self.record["machine"] = row["facts"]
            self.record["steps"][name] = step
            took = f" in {step['seconds']:.1f} s" if "seconds" in step else ""
            print(f"{name}: {step['state']}{took}{': ' if step['reason'] else ''}{step['reason']}", flush=True)
        self.record["seconds"] = round(self.budget - (self.until - time.monotonic()), 1)
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.record, separators=(",", ":")) + "\n", encoding="utf-8")


def _clocks() -> dict[str, str]:
    """Clocks, power and temperature, as nvidia-smi tells them; {} where it is missing."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(
        zip(CLOCKS.split(","), (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False)
    )


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no message"


if __name__ == "__main__":
    main()
