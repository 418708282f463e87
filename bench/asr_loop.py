"""Sentences in, word error rates out: text -> our engine -> audio -> speech recognition -> text.

    python -m bench.asr_loop [--model M] [--sentences N] [--voice V] [--layout whole|streaming] [--asr sphinx|whisper]

Beside every condition stands the recogniser's own error on flite's recording of the same sentence (the voices slt and
rms were taught by flite; needs its command line program). The sentences are training/held_out.tsv: no training text
holds any of them. Sampling is the checkpoint's own unless --greedy. Results go to bench/results/ as JSON with every
sentence.
"""

import argparse
import csv
import json
import platform
import re
import shutil
import subprocess
import tempfile
import time
import wave
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
import torch

from pipecat_qwen3.backend import SAMPLE_RATE, Layout, Request
from pipecat_qwen3.local import LocalBackend

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = ROOT / "training" / "held_out.tsv"
STRETCH = {"slt": 1.1, "rms": 1.0}
"""duration_stretch of flite's recordings, as in training."""

LEAD_S, TAIL_S = 0.05, 0.14
"""Silence around the speech in training: what an utterance has at its two ends when its end comes in time."""

SAME = {"dr": "doctor", "mr": "mister", "mrs": "missus", "ok": "okay", "colour": "color", "grey": "gray"}
RECOGNISER_RATE = 16_000

Hear = Callable[[np.ndarray], str]
"""Audio [samples] at 16 kHz in, the words that were understood out."""


class Sentence(NamedTuple):
    """A text of a group ("plain", "unseen", …) and the words that it is spoken as."""

    group: str
    text: str
    words: list[str]


Utterance = tuple[Sentence, np.ndarray, str]
"""A sentence, its audio [samples] at 16 kHz, and how its speech ended."""


class Spoken(NamedTuple):
    """One utterance as it was heard: word errors of ours and of flite's, and by how many seconds ours is longer."""

    sentence: Sentence
    voice: str
    layout: str
    heard: str
    errors: int
    flite_errors: int | None
    longer_s: float | None
    end: str
    seconds: float


def words_of(text: str) -> list[str]:
    """Words as they are compared: lower case, one spelling."""
    found: list[str] = re.findall(r"[a-z']+", text.lower().replace("’", "'").replace(".m.", "m"))
    bare = [word.strip("'") for word in found]
    return [SAME.get(word, word) for word in bare if word]


def read_sentences(count: int | None) -> list[Sentence]:
    """The held-out sentences, or `count` of them spread over all groups."""
    with SENTENCES.open(encoding="utf-8") as file:
        rows = [(r["group"], r["text"], r["spoken"]) for r in csv.DictReader(file, delimiter="\t")]
    sentences = [Sentence(group, text, words_of(spoken or text)) for group, text, spoken in rows]
    if count is None or count >= len(sentences):
        return sentences
    return [sentences[i * len(sentences) // count] for i in range(count)]


def word_errors(wanted: Sequence[str], heard: Sequence[str]) -> int:
    """Fewest substitutions, insertions and deletions that turn one into the other (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def sphinx() -> Hear:
    """pocketsphinx, whose English model comes inside its wheel."""
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=RECOGNISER_RATE, loglevel="FATAL")
    dither = np.random.RandomState(0)

    def hear(audio: np.ndarray) -> str:
        padded = np.pad(audio, (3200, 4800)) * 32767
        padded = padded + dither.randint(-4, 5, len(padded))  # digital silence confuses its noise estimate
        decoder.start_utt()
        decoder.process_raw(np.clip(padded, -32768, 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return found.hypstr if found else ""

    return hear


def whisper() -> Hear:
    """faster-whisper, for checkpoints whose voices pocketsphinx has no model for; `pip install faster-whisper`."""
    from faster_whisper import WhisperModel  # type: ignore[import-not-found]

    model = WhisperModel("small.en")

    def hear(audio: np.ndarray) -> str:
        segments, _ = model.transcribe(audio.astype(np.float32), language="en")
        return " ".join(segment.text for segment in segments)

    return hear


def flite(text: str, voice: str) -> np.ndarray | None:
    """flite's recording, float [samples] at 16 kHz, or None without flite or for another voice."""
    if voice not in STRETCH or shutil.which("flite") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        stretch = f"duration_stretch={STRETCH[voice]}"
        subprocess.run(["flite", "-voice", voice, "--setf", stretch, "-t", text, "-o", str(path)], check=True)
        with wave.open(str(path)) as file:
            return np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768


def speech_seconds(audio: np.ndarray) -> float:
    """From the first to the last 10 ms louder than 1 % of the loudest, at 16 kHz."""
    usable = len(audio) // 160 * 160
    level = np.sqrt((audio[:usable].reshape(-1, 160) ** 2).mean(1)) if usable else np.zeros(1)
    loud = np.flatnonzero(level > 0.01 * level.max())
    return 0.01 * float(loud[-1] - loud[0] + 1) if len(loud) else 0.0


def speak(
    backend: LocalBackend, sentences: Sequence[Sentence], voice: str, layout: Layout, **options: Any
) -> Iterable[Utterance]:
    """Speak sentences in one voice and layout, as many at once as the engine takes; options are Request's."""
    size = backend.max_batch
    for begin in range(0, len(sentences), size):
        group = sentences[begin : begin + size]
        streams = [
            backend.speak(Request(text=s.text, voice=voice, layout=layout, seed=begin + i, ahead_s=None, **options))
            for i, s in enumerate(group)
        ]
        for sentence, stream in zip(group, streams, strict=True):
            pcm = np.concatenate([chunk.pcm for chunk in stream])
            yield sentence, soxr.resample(pcm / 32768, SAMPLE_RATE, RECOGNISER_RATE), stream.wait().end


def original(sentence: Sentence, voice: str, hear: Hear) -> tuple[int, float] | tuple[None, None]:
    """Word errors and seconds of flite's own recording; heard once in a process."""
    key = (sentence.text, voice)
    if key not in _ORIGINALS:
        audio = flite(*key)
        if audio is None:
            return None, None
        _ORIGINALS[key] = word_errors(sentence.words, words_of(hear(audio))), speech_seconds(audio)
    return _ORIGINALS[key]


_ORIGINALS: dict[tuple[str, str], tuple[int, float]] = {}


def recorded(folder: Path, sentences: Sequence[Sentence], voice: str) -> Iterable[Utterance]:
    """Recordings FOLDER/VOICE/NUMBER.wav (24 kHz) of sentences by their number, instead of speaking them."""
    numbers = {sentence.text: number for number, sentence in enumerate(read_sentences(None))}
    for sentence in sentences:
        with wave.open(str(folder / voice / f"{numbers[sentence.text]:03d}.wav")) as file:
            pcm = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        yield sentence, soxr.resample(pcm / 32768, SAMPLE_RATE, RECOGNISER_RATE), "eos"


def listen(utterances: Iterable[Utterance], hear: Hear, voice: str, layout: str) -> list[Spoken]:
    """Hear utterances of one voice and layout."""
    spoken = []
    for sentence, audio, end in utterances:
        heard, seconds = hear(audio), len(audio) / RECOGNISER_RATE
        errors = word_errors(sentence.words, words_of(heard))
        flite_errors, flite_s = original(sentence, voice, hear)
        longer = None if flite_s is None else seconds - LEAD_S - TAIL_S - flite_s
        spoken.append(Spoken(sentence, voice, layout, heard, errors, flite_errors, longer, end, seconds))
    return spoken


def error_rate(spoken: Sequence[Spoken], of: Callable[[Spoken], int | None]) -> tuple[float, float] | None:
    """Word error rate and the half width of its 95 % interval by resampling whole sentences; None where unknown."""
    pairs = np.array([(of(s), len(s.sentence.words)) for s in spoken if of(s) is not None], float)
    if not len(pairs):
        return None
    drawn = pairs[np.random.default_rng(0).integers(len(pairs), size=(1000, len(pairs)))].sum(1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
    return float(pairs[:, 0].sum() / pairs[:, 1].sum()), float(high - low) / 2


def summary(spoken: Sequence[Spoken]) -> dict[str, Any]:
    """The figures of some utterances."""
    ours, theirs = error_rate(spoken, lambda s: s.errors), error_rate(spoken, lambda s: s.flite_errors)
    longer = [s.longer_s for s in spoken if s.longer_s is not None]
    away = [s for s in spoken if s.end != "eos" or (s.longer_s or 0) > 2.0]
    return {
        "sentences": len(spoken),
        "words": sum(len(s.sentence.words) for s in spoken),
        "wer": None if ours is None else round(ours[0], 4),
        "wer_interval": None if ours is None else round(ours[1], 4),
        "flite_wer": None if theirs is None else round(theirs[0], 4),
        "end_error_s": round(float(np.median(np.abs(longer))), 3) if longer else None,
        "end_bias_s": round(float(np.mean(longer)), 3) if longer else None,
        "runaways_per_1000": round(1000 * len(away) / len(spoken), 1),
    }


def tables(spoken: Sequence[Spoken]) -> dict[str, dict[str, Any]]:
    """Summaries by voice and layout, and within them by group of sentences."""
    found = {}
    for voice, layout in sorted({(s.voice, s.layout) for s in spoken}):
        here = [s for s in spoken if (s.voice, s.layout) == (voice, layout)]
        found[f"{voice} {layout}"] = summary(here)
        for group in dict.fromkeys(s.sentence.group for s in here):
            found[f"{voice} {layout} {group}"] = summary([s for s in here if s.sentence.group == group])
    return found


def percent(value: float | None) -> str:
    """A share as text."""
    return "    -" if value is None else f"{100 * value:5.1f}"


def main() -> None:
    """Speak, hear, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--sentences", type=int, help="how many, spread over all groups (default: all)")
    parser.add_argument("--voice", action="append", help="may be repeated (default: all)")
    parser.add_argument("--layout", choices=("whole", "streaming", "both"), default="both")
    parser.add_argument("--asr", choices=("sphinx", "whisper"), default="sphinx")
    parser.add_argument("--recordings", type=Path, help="hear FOLDER/VOICE/NUMBER.wav instead of speaking")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="where to write (default: bench/results/asr_loop_MODEL.json)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    hear = sphinx() if options.asr == "sphinx" else whisper()
    sentences, spoken, setting = read_sentences(options.sentences), [], {}
    if options.recordings:
        for voice in options.voice or STRETCH:
            spoken += listen(recorded(options.recordings, sentences, voice), hear, voice, "recorded")
    else:
        backend = LocalBackend.open(options.model, dtype=options.dtype, device=options.device)
        setting = {"device": str(backend.device), "dtype": str(backend.dtype)}
        layouts: tuple[Layout, ...] = ("whole", "streaming") if options.layout == "both" else (options.layout,)
        t = options.temperature
        sampling = {"greedy": options.greedy, "temperature": t, "predictor_temperature": t}
        for voice in options.voice or backend.voices:
            for layout in layouts:
                spoken += listen(speak(backend, sentences, voice, layout, **sampling), hear, voice, layout)
        backend.close()
    found = tables(spoken)
    print(f"{'':28} {'n':>4} {'WER %':>6} {'+-':>4} {'flite':>6} {'end error s':>11} {'runaways/1000':>13}")
    for name, row in found.items():
        end = "-" if row["end_error_s"] is None else f"{row['end_error_s']:.2f}"
        print(
            f"{name:28} {row['sentences']:4} {percent(row['wer']):>6} {percent(row['wer_interval']).strip():>4} "
            f"{percent(row['flite_wer']):>6} {end:>11} {row['runaways_per_1000']:13}"
        )
    name = re.sub(r"\W+", "_", Path(options.recordings or options.model).name) + ("_greedy" if options.greedy else "")
    path = options.json or ROOT / "bench" / "results" / f"asr_loop_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    record = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()} {platform.processor()}".strip(),
        "torch": torch.__version__,
        **setting,
        "options": {k: str(v) for k, v in vars(options).items() if v is not None},
        "minutes": round((time.monotonic() - began) / 60, 1),
        "figures": found,
        "utterances": [s._asdict() | {"sentence": s.sentence.text, "group": s.sentence.group} for s in spoken],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
