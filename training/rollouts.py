"""A voice and texts in, what it says of each in several turns, with every frame's advantage over the others, out."""

import random
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pipecat_qwen3.backend import Layout, Request, Stream
from pipecat_qwen3.codec_runner import Mute
from pipecat_qwen3.local import LocalBackend
from pipecat_qwen3.text import encode
from training.data import MAX_FRAMES, extent
from training.flite import PHONES, VOICES, record
from training.judge import Judge, marks
from training.rows import Choice, Utterance
from training.text import Texts

TEMPERATURE = 0.6
"""Of code 0; the later codes are drawn as the checkpoint draws them."""

TURNS = 8
"""Times that each text is said."""

UNIT, MOST = 0.3, 3.0
"""Marks are apart by so much for an advantage of 1; the largest advantage."""

HASTE = 3.0
"""Marks lost for being as long again as flite, or for saying nothing: who drawls is understood better."""

BATCH = 32


class Task(NamedTuple):
    """A text to be said in a voice, with its words' phones (indices into PHONES) and the frames that flite takes."""

    text: str
    voice: int
    words: list[bytes]
    frames: int


class Rollout(NamedTuple):
    """What was said once: as a training row, with the advantage of each of its labels [frames + 1].

    mark    how well the words are said
    longer  by how much it is longer than flite, as a share
    """

    choice: Choice
    advantages: Tensor
    mark: float
    longer: float


def tasks(seed: int, count: int) -> Iterator[Task]:
    """Generated texts, each in a voice drawn at random; those that no recording could be made of are left out."""
    source = Texts(seed)
    while count:
        text, voice = source.draw(), source.rng.randrange(len(VOICES))
        speech = record(text, VOICES[voice])
        found = extent(speech)
        if speech.words != len(text.split()) or found is None or found[1] > MAX_FRAMES:
            continue
        words: list[list[int]] = [[] for _ in range(speech.words)]
        for name, _, word in speech.phones:
            if word >= 0 and name in PHONES:
                words[word].append(PHONES.index(name))
        yield Task(text, voice, [bytes(word) for word in words], found[1])
        count -= 1


def rollouts(folder: Path, judge: Judge, asked: Iterator[Task], seed: int, device: str) -> Generator[list[Rollout]]:
    """Do each task TURNS times, in a layout drawn at random."""
    backend = LocalBackend.open(str(folder), device=device, max_batch=BATCH)
    backend.engine.codec = Mute()
    try:
        yield from _said(backend, judge, asked, random.Random(seed))
    finally:
        backend.close()


def _said(backend: LocalBackend, judge: Judge, asked: Iterator[Task], rng: random.Random) -> Iterator[list[Rollout]]:
    waiting = deque[tuple[Task, Layout, list[Stream]]]()
    for task in asked:
        layout = cast(Layout, rng.choice(("whole", "streaming")))
        voice, seeds = VOICES[task.voice], [rng.getrandbits(62) for _ in range(TURNS)]
        # one chunk an utterance: silence that the engine hears on its way would be a runaway
        how = {"layout": layout, "temperature": TEMPERATURE, "ramp": (1 << 20,), "ahead_s": None}
        streams = [backend.speak(Request(task.text, voice, seed=each, **how)) for each in seeds]
        waiting.append((task, layout, streams))
        if len(waiting) * TURNS > 2 * BATCH:
            yield _judged(backend, judge, *waiting.popleft())
    while waiting:
        yield _judged(backend, judge, *waiting.popleft())


def advantages(marked: Sequence[tuple[np.ndarray, np.ndarray]], longer: np.ndarray) -> list[Tensor]:
    """Of each turn at one text, given its words' marks, its frames' words and how much longer it is: [frames + 1].

    A word's mark less its mean over the turns; the end of speech belongs to the last word.
    """
    net = np.stack([mark for mark, _ in marked]) - HASTE * np.abs(longer)[:, None]
    ahead = np.clip((net - net.mean(0)) / UNIT, -MOST, MOST).astype(np.float32)
    return [torch.from_numpy(own[[*word_of, -1]]) for own, (_, word_of) in zip(ahead, marked, strict=True)]


def _judged(backend: LocalBackend, judge: Judge, task: Task, layout: Layout, streams: list[Stream]) -> list[Rollout]:
    ids = encode(backend.tokenizer, task.text)
    said = [torch.from_numpy(codes) for stream in streams if (codes := stream.wait().codes) is not None]
    if not said:
        return []
    with torch.inference_mode():
        marked = [marks(judge(codes), task.words) for codes in said]
    longer = np.array([len(codes) / task.frames - 1 for codes in said])
    blank = torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int16)
    rows = [
        Choice(Utterance(task.text, ids, [-1] * len(ids), codes, *blank, task.voice), layout, False) for codes in said
    ]
    means = [float(mark.mean()) for mark, _ in marked]
    return [Rollout(*each) for each in zip(rows, advantages(marked, longer), means, longer.tolist(), strict=True)]
