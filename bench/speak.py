"""Sentences in, audio at 16 kHz out: from our engine, from recordings, and from flite, the embedded voice's teacher."""

import shutil
import subprocess
import tempfile
import wave
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import soxr

from bench.recognise import RATE, words_of
from pipecat_qwen3.backend import SAMPLE_RATE, Layout, Request, Result, Stream
from pipecat_qwen3.local import LocalBackend

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = ROOT / "training" / "held_out.tsv"
STRETCH = {"slt": 1.1, "rms": 1.0}
"""duration_stretch of flite's recordings, as in training."""

MARGIN_S = 0.05 + 0.14
"""Silence before and after the speech in training: what an utterance has at its two ends when its end comes in time."""

CHUNK_FRAMES = 16
"""Of a chunk of audio: large ones cost the codec least, and runaways into silence are still noticed."""


class Sentence(NamedTuple):
    """A text of a group ("agent", "unseen", …) and the words that it is spoken as."""

    group: str
    text: str
    words: list[str]


class Condition(NamedTuple):
    """How a sentence is spoken; sampling is "greedy" or "own" (what the checkpoint's generation_config says)."""

    voice: str
    layout: str
    sampling: str

    def __str__(self) -> str:
        return " ".join(self)


def read_sentences(count: int | None) -> list[Sentence]:
    """The held-out sentences, or `count` of them spread over all groups."""
    rows = [line.split("\t") for line in SENTENCES.read_text(encoding="utf-8").splitlines()[1:]]
    sentences = [Sentence(group, text, words_of(spoken or text)) for group, text, spoken in rows]
    if count is None or count >= len(sentences):
        return sentences
    return [sentences[i * len(sentences) // count] for i in range(count)]


def speak(
    backend: LocalBackend, texts: Sequence[str], how: Condition, chunk: int = CHUNK_FRAMES, seed: int = 0
) -> Iterator[Stream]:
    """The stream of each text in turn, with the seeds from `seed` on; the engine always has more to do meanwhile."""
    layout, greedy = cast(Layout, how.layout), how.sampling == "greedy"
    started: deque[Stream] = deque()
    for number, text in enumerate(texts, seed):
        request = Request(text, how.voice, layout=layout, seed=number, greedy=greedy, ramp=(chunk,), ahead_s=None)
        started.append(backend.speak(request))
        if len(started) > 2 * backend.max_batch:
            yield started.popleft()
    yield from started


def audio_of(stream: Stream) -> tuple[np.ndarray, Result]:
    """Wait for an utterance: its audio [samples] and how it ended."""
    pcm = np.concatenate([np.zeros(0, np.int16), *(chunk.pcm for chunk in stream)])
    return at_16_khz(pcm), stream.wait()


def at_16_khz(pcm: np.ndarray) -> np.ndarray:
    """int16 at the codec's rate -> float in [-1, 1] at 16 kHz."""
    return soxr.resample(pcm / 32768, SAMPLE_RATE, RATE)


def recorded(folder: Path, sentences: Sequence[Sentence], voice: str) -> Iterator[tuple[np.ndarray, Result]]:
    """The audio of FOLDER/VOICE/NUMBER.wav (24 kHz) for sentences by their number in the file."""
    numbers = {sentence.text: number for number, sentence in enumerate(read_sentences(None))}
    for sentence in sentences:
        with wave.open(str(folder / voice / f"{numbers[sentence.text]:03d}.wav")) as file:
            pcm = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        yield at_16_khz(pcm), Result("eos", 0, 0)


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
