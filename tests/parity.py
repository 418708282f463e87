"""Compares with the official qwen_tts, live: makes it an environment, runs both on fresh checkpoints, prints a table.

    python -m tests.parity [--seed N] [--no-real]

Tiny random checkpoints and the embedded voice in fp32: every mode, layout and kind of sampling; codes must be equal,
prompts within 1e-5, samples within 1e-4. Then a few frames at the published 0.6B size in bf16, teacher-forced along the
official fp32 codes: our error must be at most twice the official package's own. Leaves with 0 if all of it holds.

An utterance's codes are compared up to the first close decision (golden/official.py says what is close): what follows
it hangs on the order of fp32 sums.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipecat_qwen3.backend import FRAME_SAMPLES, Request
from pipecat_qwen3.checkpoint import EMBEDDED
from pipecat_qwen3.delivery import FADE_SAMPLES
from pipecat_qwen3.local import LocalBackend
from tests.golden.cases import REAL_REQUEST
from tests.ours import Ours
from tests.random_checkpoint import make

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".parity"
PYTHON = HOME / "venv" / "bin" / "python"

# The official wheel's own requirements include gradio, sox, onnxruntime and torchaudio, of which the 12 Hz models use
# none, and an exact accelerate; so it comes last and alone.
STEPS = (
    ["torch==2.13.0"],
    ["transformers==4.57.3", "librosa", "soundfile"],
    ["--no-deps", "qwen_tts==0.1.1"],
)

PROMPT_LIMIT, SAMPLE_LIMIT, BF16_SLACK = 1e-5, 1e-4, 2.0
REAL_FRAMES = 6
REAL_GB = 3


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    measured: str
    wanted: str
    holds: bool


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare with the official qwen_tts, live.")
    parser.add_argument("--seed", type=int, help="of checkpoints and voices; a new one each time by default")
    parser.add_argument(
        "--no-real", action="store_true", help=f"leave out the 0.6B size ({REAL_GB} GB of disk, minutes)"
    )
    parser.add_argument("--python", type=Path, help="an environment that has the official package; made by default")
    args = parser.parse_args()
    seed = 2 + secrets.randbelow(100_000) if args.seed is None else args.seed  # the goldens have seed 1
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    python = args.python or environment()
    HOME.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        say(f"seed {seed}; the same again: make parity ARGS='--seed {seed}'")
        rows = compare_tiny(python, seed, Path(scratch))
        if not args.no_real:
            rows += compare_real(python, seed, Path(scratch))
    width = max(len(row.what) for row in rows)
    print()
    for row in rows:
        print(f"{'ok ' if row.holds else 'BAD'}  {row.what:{width}}  {row.measured:>28}   wanted {row.wanted}")
    return 0 if all(row.holds for row in rows) else 1


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def environment() -> Path:
    """Python of a virtual environment with the official package in .parity/, made if it is not there."""
    stamp, wanted = HOME / "venv" / "installed", json.dumps(STEPS)
    if stamp.exists() and stamp.read_text() == wanted:
        return PYTHON
    say("making an environment for the official package in .parity/ (minutes, once)")
    shutil.rmtree(HOME / "venv", ignore_errors=True)
    install = [str(PYTHON), "-m", "pip", "install", "-q"]
    torch_index = os.environ.get("TORCH_INDEX")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(HOME / "venv")], check=True)
        for step in STEPS:
            say(f"pip install {' '.join(step)}")
            index = ["--index-url", torch_index] if torch_index and step is STEPS[0] else []
            subprocess.run([*install, *index, *step], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"the official package cannot be installed: {' '.join(error.cmd)} failed, see above") from None
    stamp.write_text(wanted)
    return PYTHON


def official(python: Path, *command: str) -> None:
    """Run a module of tests/golden in the official environment; its progress lines are shown."""
    keep = ("official:", "Traceback", "Error", "error")
    process = subprocess.Popen(
        [str(python), "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(keep):
            say(line.rstrip())
    if process.wait() != 0:
        raise SystemExit(f"python -m {' '.join(command)} failed:\n{''.join(lines[-30:])}")


def compare_tiny(python: Path, seed: int, scratch: Path) -> list[Row]:
    """Every case of tests/golden/cases.py on tiny checkpoints of this seed, in fp32."""
    official(
        python,
        "tests.golden.make",
        *("--out", str(scratch), "--checkpoints", str(scratch), "--seed", str(seed), "--waveforms"),
    )
    told = json.loads((scratch / "goldens.json").read_text(encoding="utf-8"))
    cases = [case for case in told["cases"] if not case["clone"]]
    rows = []
    with np.load(scratch / "goldens.npz") as arrays:
        for checkpoint in dict.fromkeys(case["checkpoint"] for case in cases):
            say(f"ours: {checkpoint}")
            model = EMBEDDED if checkpoint == EMBEDDED else str(scratch / checkpoint)
            backend = LocalBackend.open(model, device="cpu", dtype="fp32")
            its = [case for case in cases if case["checkpoint"] == checkpoint]
            rows += _tiny_rows(checkpoint, Ours(backend, its), its, arrays)
            backend.close()
    return rows


def _tiny_rows(checkpoint: str, ours: Ours, cases: Sequence[dict[str, Any]], arrays: Any) -> list[Row]:
    prompts, samples = [0.0], [0.0]
    utterances, others, frames, compared = 0, 0, 0, 0
    for case in cases:
        if f"{case['name']}/0/prompt" in arrays:
            for mine, name in zip(ours.prompt(Request(**case["requests"][0])), ("prompt", "trailing"), strict=True):
                prompts.append(prompt_error(mine.numpy(), arrays[f"{case['name']}/0/{name}"]))
        for row, (ended, certain) in enumerate(zip(case["ended"], case["certain"], strict=True)):
            official_codes, official_wav = arrays[f"{case['name']}/{row}/codes"], arrays[f"{case['name']}/{row}/wav"]
            pcm, result = ours.spoken[case["name"], row]
            codes = official_codes[:0] if result.codes is None else result.codes
            equal = np.array_equal(codes[:certain], official_codes[:certain])
            if certain > len(official_codes):  # no close decision: the end counts too
                equal = equal and len(codes) == len(official_codes) and ended == (result.end == "eos")
            utterances, others = utterances + 1, others + (not equal)
            frames, compared = frames + len(official_codes), compared + min(certain, len(official_codes))
            if not equal:
                say(f"ours: other codes than the official ones: {checkpoint}, {case['name']}, row {row}")
                continue
            heard = min(certain * FRAME_SAMPLES, len(pcm) - FADE_SAMPLES, len(official_wav))
            samples.append(float(np.abs(pcm[:heard] / 32768 - official_wav[:heard]).max(initial=0)))
    worst, loudest = max(prompts), max(samples)
    sure = f"codes of {compared} of {frames} frames"
    return [
        Row(f"{checkpoint}: prompts", f"{worst:.1e}", f"<= {PROMPT_LIMIT:.0e}", worst <= PROMPT_LIMIT),
        Row(f"{checkpoint}: {sure}", f"{utterances - others} of {utterances} equal", "all equal", not others),
        Row(f"{checkpoint}: samples", f"{loudest:.1e}", f"<= {SAMPLE_LIMIT:.0e}", loudest <= SAMPLE_LIMIT),
    ]


def prompt_error(ours: np.ndarray, official: np.ndarray) -> float:
    """Largest difference, relative where embeddings exceed 1: the embedded voice's reach 58, in fp32 steps of 4e-6."""
    if ours.shape != official.shape:
        return float("inf")
    return float((np.abs(ours - official) / np.maximum(1, np.abs(official))).max())


def compare_real(python: Path, seed: int, scratch: Path) -> list[Row]:
    """A few frames of a random checkpoint of the published 0.6B size, bf16 on disk."""
    free = shutil.disk_usage(scratch).free / 1e9
    if free < REAL_GB:
        raise SystemExit(
            f"the 0.6B size needs {REAL_GB} GB in {HOME}, but {free:.1f} GB are free; make room, or pass --no-real"
        )
    say("making a random checkpoint of the 0.6B size")
    folder = make(scratch / "real", "custom_voice", "0.6b", "bf16", seed)
    logits = scratch / "real.npz"
    official(python, "tests.golden.real", str(folder), str(logits), "--frames", str(REAL_FRAMES), "--seed", str(seed))
    say("ours: 0.6B in bf16")
    backend = LocalBackend.open(str(folder), device="cpu", dtype="bf16", max_batch=1)
    request: dict[str, Any] = REAL_REQUEST | {"max_frames": REAL_FRAMES, "seed": seed}
    ours = Ours(backend, [{"name": "real", "requests": [request]}])
    rows = []
    with np.load(logits) as arrays:
        oracle = torch.from_numpy(arrays["fp32/codes"])
        mine = ours.logits(Request(**request), oracle)
        count = backend.config.shape.codes
        for name, our_logits in zip(("first", "later"), mine, strict=True):
            exact, theirs = (arrays[f"{dtype}/{name}"][..., :count] for dtype in ("fp32", "bf16"))
            error, official_error = rms(our_logits.numpy()[..., :count] - exact), rms(theirs - exact)
            measured = f"{error:.4f} (official {official_error:.4f})"
            what = "code 0" if name == "first" else "other codes"
            rows.append(
                Row(f"0.6b bf16: logits of {what}", measured, "<= 2 x official", error <= BF16_SLACK * official_error)
            )
        _, result = ours.spoken["real", 0]
        for who, codes in (("ours", result.codes), ("official", arrays["bf16/codes"])):
            rows.append(
                Row(f"0.6b bf16: codes as in fp32, {who}", agreement(codes, oracle.numpy()), "(told only)", True)
            )
    backend.close()
    return rows


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def agreement(codes: np.ndarray | None, oracle: np.ndarray) -> str:
    """How many codes of a free run are the oracle's; after the first other one the runs go apart."""
    assert codes is not None
    n = min(len(codes), len(oracle))
    return f"{int((codes[:n] == oracle[:n]).sum())} of {oracle.size}"


if __name__ == "__main__":
    sys.exit(main())
