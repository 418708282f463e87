"""Ours beside other implementations: the same texts, as many frames, each in its own environment, by turns in one run.

    python -m bench.peers [--frames 25] [--rounds 3] [--sides ours qwen-tts] [--checkpoint FOLDER]

A random checkpoint of the published 0.6B size whose speech never ends, so that every side makes all the frames; each
side as its own README says is fastest. With the codec, and with one that gives zeros at once: what the language model
takes. Environments are made in --venvs (minutes, gigabytes, once) with pinned versions; --python SIDE=PATH uses another
one. A side that cannot run here is named with its reason. Prints the floor first; raw samples go to bench/results.
"""

import argparse
import itertools
import json
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import report_tables
from bench.floor import Ceiling, works
from bench.geometry import build
from bench.record import Record, label, options
from pipecat_qwen3.device import pick_device, pick_dtype
from pipecat_qwen3.errors import program

ROOT = Path(__file__).parent.parent
VENVS = ROOT / "build" / "peers"

TEXTS = (
    "Your table is booked for two at eight. Shall I send you the address?",
    "The weather will be cold and dry tomorrow. You will want a warm coat.",
)

GGUF = "its weights are GGUF files; make them as docs/benchmarks.md says and give --gguf TALKER CODEC"


class Peer(NamedTuple):
    """Another implementation.

    install  device -> arguments of pip, in order; pip's cache and TORCH_INDEX (for torch) work as usual
    why      why it is not run on other devices
    """

    install: Mapping[str, tuple[tuple[str, ...], ...]]
    why: str = ""


# Its own requirements hold what the 12 Hz models do not use (gradio, sox, onnxruntime); so it comes last and alone.
_QWEN_TTS = (
    ("torch==2.13.0",),
    ("transformers==4.57.3", "accelerate==1.12.0", "librosa", "soundfile"),
    ("--no-deps", "qwen-tts==0.1.1"),
)

PEERS = {
    "qwen-tts": Peer({"cpu": _QWEN_TTS, "cuda": _QWEN_TTS}),
    "faster-qwen3-tts": Peer({"cuda": (("torch==2.13.0",), ("faster-qwen3-tts==0.5.4",))}, "its graphs need CUDA"),
    "qwentts.cpp": Peer(
        {"cpu": (("realtimetts-qwen-native-cpu==0.4.2", "numpy"),), "cuda": (("qwentts-cpp-python==0.5.0", "numpy"),)}
    ),
}
"""By the name of what is compared."""

SIDES = ("ours", *PEERS)


class Missing(Exception):
    """A side that cannot run here, and why, in one line."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    record = Record("peers", args, device)
    checkpoint = args.checkpoint or _checkpoint(args.venvs, record)
    floor = floor_ms(str(checkpoint), dtype, device)
    record.say(f"floor: {floor['model']:.2f} ms a frame, and its codec {floor['codec']:.2f}")
    sides: list[dict[str, Any]] = []
    with ExitStack() as stack:
        running: list[tuple[dict[str, Any], Side]] = []
        for name in args.sides:
            side: dict[str, Any] = {"name": name, "runs": []}
            sides.append(side)
            try:
                python = _python(name, args, device)
                child = stack.enter_context(started(name, python, checkpoint, device, dtype, args))
            except Missing as reason:
                side["missing"] = str(reason)
                record.say(f"{name}: not run: {reason}")
                continue
            side |= {key: child.told[key] for key in ("version", "versions", "how", "loaded_mb")}
            record.say(f"{name} {side['version']}: {side['how']}, {side['loaded_mb']} MB at most while loading")
            running.append((side, child))
        for turn, text in itertools.product(range(-1, args.rounds), TEXTS):
            for side, child in running:
                if "missing" not in side:
                    try:
                        take_turn(side, child, text, turn, args.frames)
                    except Missing as reason:
                        side["missing"] = str(reason)
                        record.say(f"{side['name']}: stopped: {reason}")
    measured = {"dtype": str(dtype)[6:], "texts": TEXTS, "floor_ms": floor, "sides": sides}
    for line in report_tables.peers(measured):
        record.say(line)
    return record.finish(label("0.6b" if args.checkpoint is None else str(checkpoint), dtype, device), **measured)


def take_turn(side: dict[str, Any], child: "Side", text: str, turn: int, frames: int) -> None:
    """Every mode of a side speaks a text, with the codec and without. Raises Missing if the side breaks.

    Turn -1 is short and not kept: it builds things.
    """
    for mode, codec in itertools.product(child.told["modes"], child.told["codec"]):
        task = {"text": text, "frames": frames if turn >= 0 else 2, "seed": max(turn, 0), "mode": mode, "codec": codec}
        run = child.ask(task)
        if run["frames"] != task["frames"]:
            raise Missing(f"{task['frames']} frames were wanted, but {run['frames']} came")
        if turn >= 0:
            side["runs"].append({"text": TEXTS.index(text), "mode": mode, "codec": codec} | run)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options("peers", __doc__)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--frames", type=int, default=25, help="of every utterance")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side with every text that count")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every side on a CPU")
    parser.add_argument(
        "--checkpoint", type=Path, help="a CustomVoice folder; by default a random one of the 0.6B size"
    )
    parser.add_argument("--venvs", type=Path, default=VENVS, help="where environments and the checkpoint are kept")
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="SIDE=PATH", help="a Python that has the side's package"
    )
    parser.add_argument("--gguf", nargs=2, type=Path, metavar=("TALKER", "CODEC"), help="weights for qwentts.cpp")
    return parser.parse_args(argv)


def floor_ms(model: str, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The least milliseconds of one voice's frame, and of its codec decoding eight frames a call."""
    built = build(model, dtype, device)
    ceiling = Ceiling.measure(built, device)
    work = works(built, 1, 50)
    least = {stage: ceiling.ms(work[stage]) for stage in ("talker", "predictor", "codec x8")}
    return {"model": round(least["talker"] + least["predictor"], 4), "codec": round(least["codec x8"] / 8, 4)}


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def _checkpoint(folder: Path, record: Record) -> Path:
    """The random 0.6B, made once; its end-of-speech id is never among the 50 likeliest."""
    checkpoint = folder / "checkpoint-0.6b"
    if not (checkpoint / "endless").exists():
        record.say(f"making a random checkpoint of the 0.6B size in {checkpoint} (2.5 GB, once)")
        command = [
            sys.executable,
            "-m",
            "tests.random_checkpoint",
            str(checkpoint),
            "--geometry",
            "0.6b",
            "--dtype",
            "bf16",
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        endless(checkpoint)
    return checkpoint


def endless(checkpoint: Path) -> None:
    """Zero the row of the end-of-speech id in a random checkpoint's head: a logit of 0, where others reach 10."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["talker_config"]
    with (checkpoint / "model.safetensors").open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        (size,) = struct.unpack("<Q", data[:8])
        head = json.loads(data[8 : 8 + size])["talker.codec_head.weight"]
        begin, end = (8 + size + offset for offset in head["data_offsets"])
        row = (end - begin) // head["shape"][0]
        eos = begin + row * config["codec_eos_token_id"]
        data[eos : eos + row] = bytes(row)
    (checkpoint / "endless").touch()


# -- the sides ---------------------------------------------------------------------------------------------------------


def _python(name: str, args: argparse.Namespace, device: torch.device) -> Path:
    """The interpreter that has a side's package; makes its environment where there is none. Raises Missing."""
    if name == "ours":
        return Path(sys.executable)
    peer = PEERS[name]
    if device.type not in peer.install:
        raise Missing(f"it does not run on {device.type}: {peer.why}")
    if name == "qwentts.cpp" and args.gguf is None:
        raise Missing(GGUF)
    given = dict(pair.rsplit("=", 1) for pair in args.python)
    if name in given:
        return Path(given[name])
    home, install = args.venvs / f"{name}-{device.type}", peer.install[device.type]
    stamp, wanted = home / "installed", json.dumps(install)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"making an environment for {name} in {home} (minutes, once)", file=sys.stderr)
        commands = [[sys.executable, "-m", "venv", "--clear", str(home)]]
        for packages in install:
            index = os.environ.get("TORCH_INDEX") if packages[0].startswith("torch") else None
            commands.append(
                [
                    str(home / "bin" / "python"),
                    "-m",
                    "pip",
                    "install",
                    "-q",
                    *(["--index-url", index] if index else []),
                    *packages,
                ]
            )
        for command in commands:
            if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
                raise Missing(f"{' '.join(command[-3:])} failed")
        stamp.write_text(wanted, encoding="utf-8")
    return home / "bin" / "python"


@dataclass
class Side:
    """A running side; it does one task at a time, so that while one works the others wait."""

    process: "subprocess.Popen[str]"
    told: dict[str, Any]

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """Have an utterance made; frames, total_s and first_byte_s."""
        assert self.process.stdin is not None
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return _answer(self.process)


@contextmanager
def started(
    name: str, python: Path, checkpoint: Path, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> Iterator[Side]:
    """A side in a process of its own, with its model loaded. Raises Missing where that fails."""
    command = [str(python), str(ROOT / "bench" / "peer_sides.py"), name, str(checkpoint)]
    command += [device.type, str(dtype)[6:], str(args.threads), *map(str, args.gguf or ())]
    threads = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = {"PYTHONPATH": str(ROOT)} if name == "ours" else {}
    process = subprocess.Popen(
        command,
        cwd=ROOT if name == "ours" else checkpoint,  # so that no other side sees our packages
        env=os.environ | threads | paths,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Side(process, _answer(process))
        finally:
            process.kill()


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise Missing(f"its process ended with status {process.wait()}")
    answer = json.loads(line)
    if "error" in answer:
        raise Missing(answer["error"])
    return answer


if __name__ == "__main__":
    program(main)
