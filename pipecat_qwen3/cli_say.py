"""`say`: a text in; a WAV, its codes and the measured times out."""

import asyncio
import json
import os
import secrets
import sys
import unicodedata
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipecat_qwen3.backend import Request
from pipecat_qwen3.cli_audio import WavFile, check_writable
from pipecat_qwen3.cli_progress import Progress
from pipecat_qwen3.cli_recorder import Spoken
from pipecat_qwen3.errors import BadRequestError

if TYPE_CHECKING:
    from pipecat_qwen3.local import LocalBackend

INTERRUPTED = 130

_SHORT = {
    "cap": "the length limit was reached before the speech had ended: the end of the text may be missing",
    "runaway": "the model did not stop after its text, so it was stopped; try another --seed",
}
"""What an end that nobody asked for means."""


def run(args: Namespace) -> int:
    """The command `say`: speak TEXT, or prompt for lines if there is none and a person is there."""
    if args.text is None:
        return _prompt(args)
    text = read_text(args.text)
    wav = WavFile(Path("out.wav" if args.out is None else args.out))
    if args.codes is not None:
        check_writable(Path(args.codes))
    _check_apart(args)
    from pipecat_qwen3.cli_speech import speak

    with Progress() as progress:
        backend = open_backend(args, progress)
        try:
            progress.speaking(text, args.max_frames)
            spoken = asyncio.run(speak(backend, request_of(args, text), wav, progress.heard))
            wav.close()
        finally:
            wav.stop()
            backend.close()
    if args.codes is not None:
        _write_codes(Path(args.codes), spoken.codes)
    facts = facts_of(args, backend, spoken)
    print(json.dumps({**facts, "out": str(wav.path)}) if args.json else f"{wav.path}: {describe(facts)}")
    if spoken.end in _SHORT and args.max_frames is None:
        print(f"pipecat-qwen3: {_SHORT[spoken.end]}", file=sys.stderr)
    return INTERRUPTED if spoken.interrupted else 0


def _check_apart(args: Namespace) -> None:
    """Refuse to write the codes over the audio, or either over the text."""
    files = {"-o": Path("out.wav" if args.out is None else args.out)}
    if args.codes is not None:
        files["--codes"] = Path(args.codes)
    if args.text.startswith("@"):
        files["TEXT"] = Path(os.path.expanduser(args.text[1:]))
    seen: dict[Path, str] = {}
    for option, path in files.items():
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise BadRequestError(f"{other} and {option} name the same file {path}; give each its own")


def read_text(source: str) -> str:
    """The text that an argument names: itself, `-` for standard input, or `@file`. Raises BadRequestError."""
    try:
        if source == "-":
            return speakable(b"" if sys.stdin is None else sys.stdin.buffer.read())
        if source.startswith("@"):
            return speakable(Path(os.path.expanduser(source[1:])).read_bytes())
    except OSError as error:
        name = "standard input" if source == "-" else source[1:] or "a file without a name"
        raise BadRequestError(f"cannot read {name}: {error.strerror or error}") from None
    return speakable(source.encode(errors="surrogateescape"))


def speakable(text: bytes) -> str:
    """UTF-8 as a text with something to say in it. Raises BadRequestError."""
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequestError("the text is not UTF-8; convert it first") from None
    decoded = "".join(c for c in decoded if c.isspace() or unicodedata.category(c) != "Cc")
    if not any(character.isalnum() for character in decoded):
        raise BadRequestError("there is nothing to speak: the text has no letter and no digit")
    return decoded.strip()


def open_backend(args: Namespace, progress: Progress) -> "LocalBackend":
    """Load and warm the model that the arguments ask for; imports torch, after all that can fail without it."""
    from pipecat_qwen3.local import LocalBackend

    return LocalBackend.open(
        args.model, max_batch=1, device=args.device, dtype=args.dtype, backend=args.backend, progress=progress.loading
    )


def request_of(args: Namespace, text: str) -> Request:
    """The arguments as a Request without a run-ahead limit; one seed for all sentences of the text."""
    return Request(
        text,
        voice=args.voice,
        language=args.language,
        instruct=args.instruct,
        layout="streaming" if args.stream_text else "whole",
        seed=secrets.randbits(32) if args.seed is None else args.seed,
        greedy=args.greedy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        max_frames=args.max_frames,
        ahead_s=None,
    )


def facts_of(args: Namespace, backend: "LocalBackend", spoken: Spoken) -> dict[str, object]:
    """What was spoken, by whom, how fast."""
    return {
        "frames": spoken.frames,
        "audio_s": round(spoken.audio_s, 3),
        "wall_s": round(spoken.wall_s, 4),
        "rtf": _rounded(spoken.rtf, 4),
        "first_byte_ms": _rounded(spoken.first_byte_s, 2, 1000),
        "first_audible_ms": _rounded(spoken.first_audible_s, 2, 1000),
        "seed": spoken.results[0].seed if spoken.results else args.seed,
        "end": spoken.end,
        "model": backend.model,
        "voice": _voice(args.voice, backend.voices),
        "layout": "streaming" if args.stream_text else "whole",
        "backend": backend.backend_name,
        "device": backend.device.type,
        "dtype": {"bfloat16": "bf16", "float32": "fp32"}[str(backend.dtype).removeprefix("torch.")],
        "load_s": round(backend.load_s, 2),
    }


def describe(facts: dict[str, object]) -> str:
    """The same for a person."""

    def ms(name: str) -> str:
        return "never" if facts[name] is None else f"{facts[name]:.0f} ms"

    rtf = "" if facts["rtf"] is None else f", real-time factor {facts['rtf']:.3f}"
    return "\n  ".join(
        [
            f"{facts['audio_s']:.2f} s, {facts['frames']} frames, end {facts['end']}",
            f"first byte {ms('first_byte_ms')}, first audible sample {ms('first_audible_ms')}{rtf}",
            f"{facts['model']}, voice {facts['voice']}, {facts['layout']} layout, seed {facts['seed']}",
            f"{facts['backend']} on {facts['device']} in {facts['dtype']}, loaded in {facts['load_s']:.1f} s",
        ]
    )


def _prompt(args: Namespace) -> int:
    if sys.stdin is None or not sys.stdin.isatty():
        raise BadRequestError("no TEXT was given and standard input is not a terminal; pass TEXT, - or @FILE")
    for option in ("json", "codes"):
        if getattr(args, option):
            raise BadRequestError(f"--{option} needs a TEXT")
    from pipecat_qwen3 import cli_talk

    return cli_talk.run(args)


def _voice(asked: str | None, voices: tuple[str, ...]) -> str | None:
    """The voice that speaks, as the checkpoint spells it; the first one if none was asked for."""
    return next((voice for voice in voices if asked is None or voice.lower() == asked.lower()), None)


def _rounded(value: float | None, digits: int, factor: float = 1) -> float | None:
    return None if value is None else round(value * factor, digits)


def _write_codes(path: Path, codes: np.ndarray) -> None:
    try:
        with path.open("wb") as file:  # np.save would append .npy to another name
            np.save(file, codes)
    except OSError as error:
        raise BadRequestError(f"cannot write {path}: {error.strerror or error}") from None
