"""The whole recipe: from nothing to a voice, each step resumable, so that the same command goes on where it stopped.

    python -m training WORK_FOLDER [--shards 150]

Runs the steps of README.md as programs of their own; WORK_FOLDER/voice is the result. Talker and codec are trained side
by side where there are two cores or a GPU. On a GPU the batches are larger and the steps fewer.
"""

import argparse
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from training import needs
from training.steps import leave, on_signals

SHARED_MEMORY = Path("/dev/shm")
"""Batches travel through it from the processes that build them; a container may have 64 MB of it."""

RUNNING: list[subprocess.Popen[str]] = []


def begin(name: str, *arguments: object, module: str = "training") -> threading.Thread:
    """Start `python -m MODULE.NAME`; the thread shows its lines under the step's name and ends with it."""
    command = [sys.executable, "-m", f"{module}.{name}", *map(str, arguments)]
    print("+", " ".join(command[1:]), flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    RUNNING.append(process)

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{name}: {line}", end="", flush=True)

    shown = threading.Thread(target=show)
    shown.start()
    return shown


def finish(*steps: threading.Thread) -> None:
    """Wait for all that was begun; where one step fails, the others are ended and so is everything."""
    while RUNNING:
        for process in RUNNING.copy():
            try:
                status = process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            RUNNING.remove(process)
            if status:
                raise SystemExit(status)
    for shown in steps:
        shown.join()


def together(side_by_side: bool, *commands: Sequence[object]) -> None:
    """Run steps, each given as its name and arguments, at the same time or one after the other."""
    begun = []
    for name, *arguments in commands:
        begun.append(begin(str(name), *arguments))
        if not side_by_side:
            finish(*begun)
    finish(*begun)


def step(name: str, *arguments: object, module: str = "training") -> None:
    """Run one step to its end."""
    finish(begin(name, *arguments, module=module))


def options() -> argparse.Namespace:
    """What the command line says; the defaults are those of the machine."""
    gpu, cores = torch.cuda.is_available(), torch.get_num_threads()
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).total > 1 << 30
    workers = max(1, cores // 2 - 1) if gpu and roomy else 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", type=int, default=150)
    parser.add_argument("--utterances", type=int, default=400, help="of a shard")
    parser.add_argument("--sentences", type=int, help="held-out ones (default: all)")
    parser.add_argument("--jobs", type=int, default=cores, help="processes that synthesise")
    parser.add_argument("--talker-steps", type=int, default=4_000 if gpu else 15_000)
    parser.add_argument("--codec-steps", type=int, default=10_000 if gpu else 15_000)
    parser.add_argument("--listener-steps", type=int, default=3000)
    parser.add_argument("--judge-steps", type=int, default=1500)
    parser.add_argument("--reinforce-steps", type=int, default=2000)
    parser.add_argument("--texts", type=int, default=1000, help="of a round in which the talker is reinforced")
    parser.add_argument("--positions", type=int, default=60_000 if gpu else 2000, help="of a batch of the talker")
    parser.add_argument("--crops", type=int, default=64 if gpu else 4, help="of a batch of the codec")
    parser.add_argument("--workers", type=int, default=workers, help="that build batches")
    parser.add_argument("--threads", type=int, default=1 if gpu else max(1, cores // 2), help="of each trainer")
    parser.add_argument("--eager", action="store_true", help="compile nothing: for a few steps only")
    parser.set_defaults(side_by_side=gpu or cores > 1)
    return parser.parse_args()


def run(o: argparse.Namespace) -> None:
    """All steps in order; those that are done already cost seconds."""
    data, books, pieces, blank = o.work / "data", o.work / "codebooks.pt", o.work / "tokenizer", o.work / "blank"
    spellings = o.work / "spellings.json"
    voice, ears, runs = o.work / "voice", o.work / "listener.pt", (o.work / "talker", o.work / "codec")
    taught, judge, reinforced = o.work / "taught", o.work / "judge.pt", o.work / "reinforced"
    sentences = ["--sentences", o.sentences] if o.sentences else []
    shards = ["--utterances", o.utterances, "--jobs", o.jobs, *sentences]
    o.work.mkdir(parents=True, exist_ok=True)
    if not spellings.exists():
        step("spelling", spellings)
    if not pieces.exists():
        step("tokenizer", pieces, "--spellings", spellings)
    if not books.exists():
        step("data", data, "--shards", f"0:{min(16, o.shards)}", *shards)
        step("codebooks", data, books)
    step("data", data, "--shards", f"0:{o.shards}", "--codebooks", books, *shards)
    if not blank.exists():
        step("start", blank, "--codebooks", books, "--tokenizer", pieces, "--spellings", spellings)
    together(
        o.side_by_side,
        ("listener", data, "--out", ears, "--steps", o.listener_steps, "--threads", o.threads),
        ("judge", data, "--codebooks", books, "--out", judge, "--steps", o.judge_steps, "--threads", o.threads),
    )
    both = ["--threads", o.threads, "--workers", o.workers, *([] if o.eager else ["--compile"])]
    talker = ["--run", runs[0], "--codebooks", books, "--steps", o.talker_steps, "--positions", o.positions, *both]
    talker += ["--muon", "--spellings", spellings]
    codec = ["--run", runs[1], "--listener", ears, "--steps", o.codec_steps, "--crops", o.crops, *both]
    together(o.side_by_side, ("train_talker", blank, data, *talker), ("train_codec", blank, data, *codec))
    trained = ["--talker", runs[0] / "last.pt", "--codec", runs[1] / "last.pt"]
    step("export", blank, taught, *trained, "--codebooks", books)
    talker = ["--run", reinforced, "--codebooks", books, "--judge", judge, "--threads", o.threads]
    talker += ["--steps", o.reinforce_steps, "--texts", o.texts, *([] if o.eager else ["--compile"])]
    step("reinforce", taught, data, *talker)
    step("export", taught, voice, "--talker", *(f"{run / 'last.pt'}=0.5" for run in (runs[0], reinforced)))
    figures, decoder = o.work / "resynthesis" / "figures.json", runs[1] / "last.pt"
    if not figures.exists() or figures.stat().st_mtime < decoder.stat().st_mtime:
        step("evaluate_codec", voice, data, "--out", figures.parent)
    heard = ["--json", o.work / "asr_loop.json", "--jobs", o.jobs, *sentences]
    step("asr_loop", "--model", voice, *heard, module="bench")


def main() -> None:
    """Make the voice."""
    o = options()
    needs.check()
    on_signals(leave)
    try:
        run(o)
    finally:
        for process in RUNNING:
            process.terminate()
        for process in RUNNING:
            process.wait()
    print(f"{o.work / 'voice'} is ready: python -m pipecat_qwen3 say --model {o.work / 'voice'} TEXT")


if __name__ == "__main__":
    main()
