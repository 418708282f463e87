"""A random checkpoint in, what a listener waits for out: our engine, and faster-qwen3-tts if it is installed."""

import argparse
import importlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import stages
from bench.gpu_place import Place, Row, Skipped
from pipecat_qwen3.backend import FRAME_SAMPLES
from pipecat_qwen3.checkpoint import EMBEDDED

ROOT = Path(__file__).parent.parent
SENTENCES = 5


def checkpoint(place: Place) -> Iterator[Row]:
    """Write the official folder of a 0.6B with random weights: the same for every engine."""
    folder = place.work / "checkpoint"
    command = [sys.executable, "-m", "tests.random_checkpoint", str(folder), "--geometry", "0.6b", "--dtype", "bf16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"tests.random_checkpoint failed: {(done.stderr.splitlines() or ['no message'])[-1]}")
    yield {"digest": done.stdout.strip(), "bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors"))}


def speech(place: Place) -> Iterator[Row]:
    """First byte, first audible sample and real-time factor, one voice: the embedded one, then the random 0.6B."""
    for model in (EMBEDDED, str(place.work / "checkpoint")):
        settings = argparse.Namespace(geometry=model, max_batch=8, dtype="bf16", sentences=SENTENCES)
        for run in stages.speak(settings, place.device):
            yield {"model": Path(model).name} | run


def faster(place: Place) -> Iterator[Row]:
    """faster-qwen3-tts on the same checkpoint and sentence, with the chunk sizes that it has and that we start with."""
    for name in ("faster_qwen3_tts", "qwen_tts"):
        if find_spec(name) is None:
            raise Skipped(f"{name} is not installed here")
    package = importlib.import_module("faster_qwen3_tts")
    model = package.FasterQwen3TTS.from_pretrained(str(place.work / "checkpoint"), device="cuda", dtype=torch.bfloat16)
    model.warmup()
    for seed in range(SENTENCES + 1):
        for layout, chunk in (("whole", 12), ("streaming", 12), ("streaming", 1)):
            row = _listen(model, layout, chunk, seed)
            if seed:  # the first run of a kind still builds things
                yield row


def _listen(model: Any, layout: str, chunk: int, seed: int) -> Row:
    torch.manual_seed(seed)
    began = time.perf_counter()
    first, samples, frames, frames_ms = None, 0, 0, 0.0
    for pcm, _, timing in model.generate_custom_voice_streaming(
        text=stages.SENTENCE,
        speaker="ryan",
        language="english",
        non_streaming_mode=layout == "whole",
        chunk_size=chunk,
        max_new_tokens=100,
    ):
        first = first or time.perf_counter() - began
        samples += np.asarray(pcm).size
        frames, frames_ms = frames + timing["chunk_steps"], frames_ms + timing["decode_ms"]
    seconds = frames * FRAME_SAMPLES / 24_000
    return {
        "layout": layout,
        "chunk": chunk,
        "seed": seed,
        "first_byte_s": first and round(first, 5),
        "frames": frames,
        "samples": samples,
        "ms_a_frame": frames_ms / max(frames, 1),
        "rtf": round((time.perf_counter() - began) / max(seconds, 0.08), 4),
    }


def sanitize(place: Place) -> Iterator[Row]:
    """The step `touch` under each tool of compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skipped("compute-sanitizer is not on the PATH")
    for kind in ("memcheck", "synccheck", "racecheck"):
        rows = place.work / f"touch-{kind}.jsonl"
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu"]
        command += ["--step", "touch", "--rows", str(rows), "--work", str(place.work)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        summary = next((line for line in reversed(said) if "SUMMARY" in line), (said or ["it said nothing"])[-1])
        ended = rows.exists() and '"done"' in rows.read_text()
        yield {"tool": kind, "summary": summary.strip("= "), "ok": done.returncode == 0 and ended, "said": said[:20]}
