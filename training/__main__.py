"""The whole recipe: from nothing to a voice, each step resumable, so that the same command goes on where it stopped.

    python -m training WORK_FOLDER [--shards 150] [--jobs 2]

Runs the steps of README.md one after the other as programs of their own; WORK_FOLDER/voice is the result. With two
free cores the last-but-one pair (talker and codec) is quicker when started by hand side by side.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch


def step(name: str, *arguments: object) -> None:
    """Run `python -m training.NAME`; stops everything where it fails."""
    command = [sys.executable, "-m", f"training.{name}", *map(str, arguments)]
    print("+", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    """Make the voice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", type=int, default=150, help="of 400 utterances each")
    parser.add_argument("--jobs", type=int, default=2, help="processes that synthesise")
    parser.add_argument("--talker-steps", type=int, default=20_000)
    parser.add_argument("--codec-steps", type=int, default=15_000)
    options = parser.parse_args()
    work = options.work
    data, books, blank, voice = work / "data", work / "codebooks.pt", work / "blank", work / "voice"
    work.mkdir(parents=True, exist_ok=True)
    if not books.exists():
        step("data", data, "--shards", "0:16", "--jobs", options.jobs)
        step("codebooks", data, books)
    step("data", data, "--shards", f"0:{options.shards}", "--jobs", options.jobs, "--codebooks", books)
    if not (blank / "model.safetensors").exists():
        step("start", blank, "--codebooks", books)
    large = torch.cuda.is_available()
    talker = ["--positions", 60_000, "--workers", 4] if large else []
    codec = ["--crops", 64] if large else []
    runs = work / "talker", work / "codec"
    step(
        "train_talker",
        blank,
        data,
        "--run",
        runs[0],
        "--codebooks",
        books,
        "--steps",
        options.talker_steps,
        "--compile",
        *talker,
    )
    step("train_codec", blank, data, "--run", runs[1], "--steps", options.codec_steps, "--compile", *codec)
    step("export", blank, voice, "--talker", runs[0] / "last.pt", "--codec", runs[1] / "last.pt")
    step("evaluate_codec", voice, data, "--out", work / "resynthesis")


if __name__ == "__main__":
    main()
