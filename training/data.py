"""Texts in, shards of aligned recordings out: what flite said, cut to whole frames, with phones, words and codes.

A shard is one file of a dictionary (see `pack`); its content follows from its number alone, so shards can be made in
any order, by any number of processes, and a broken run goes on where it stopped.

    python -m training.data OUT_FOLDER --shards 0:60                      # recordings only, to fit the codebooks
    python -m training.data OUT_FOLDER --shards 0:60 --codebooks BOOKS.pt # adds the codes to all of them
"""

import argparse
import math
import signal
import time
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training import needs
from training.codebooks import Codebooks
from training.features import FRAME, acoustic_vectors
from training.flite import PHONES, RATE, VOICES, Recording, record
from training.steps import leave, load, on_signals, there
from training.text import Texts, held_out

MAX_FRAMES = 150
LEAD_S, TAIL_S = 0.05, 0.14
"""Silence kept before the first and after the last phone."""

HELD_OUT = "held_out.pt"
"""The file with the held-out sentences, beside the numbered shards."""

Shard = dict[str, Any]


def extent(speech: Recording) -> tuple[float, int] | None:
    """Where a recording's speech begins, in seconds, and its frames; None for silence alone."""
    spoken = [index for index, phone in enumerate(speech.phones) if phone.name != "pau"]
    if not spoken:
        return None
    start = max(0.0, (speech.phones[spoken[0] - 1].end if spoken[0] else 0.0) - LEAD_S)
    return start, math.ceil((speech.phones[spoken[-1]].end + TAIL_S - start) * RATE / FRAME)


def aligned(text: str, voice: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A recording cut to frames: int16 [frames * 1280], phones uint8 [frames, 4], words int16 [frames] (-1: none).

    None where flite's tokens are not the text's whitespace-separated words, or where the speech is too long.
    """
    speech = record(text, voice)
    found = extent(speech)
    if speech.words != len(text.split()) or found is None or found[1] > MAX_FRAMES:
        return None
    start, frames = found
    ends = np.array([p.end for p in speech.phones])
    wave = speech.samples[int(start * RATE) :][: frames * FRAME]
    wave = np.pad(wave, (0, frames * FRAME - len(wave))).astype(np.float32)
    wave[-160:] *= np.linspace(1, 0, 160)

    def segment(seconds: np.ndarray) -> np.ndarray:
        return np.minimum(np.searchsorted(ends, start + seconds), len(ends) - 1)

    phone_ids = np.array([PHONES.index(p.name) if p.name in PHONES else 0 for p in speech.phones], np.uint8)
    word_ids = np.array([p.word for p in speech.phones], np.int16)
    quarter = segment(0.02 * np.arange(4 * frames) + 0.01)
    middle = segment(0.08 * np.arange(frames) + 0.04)
    return wave.astype(np.int16), phone_ids[quarter].reshape(frames, 4), word_ids[middle]


def pack(texts: list[str], voices: list[int], parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Shard:
    """A shard of utterances.

    texts, voices [U] (0 slt, 1 rms), frames [U]; and of all frames in a row: wave [N * 1280], phones [N, 4], words [N]
    """
    waves, phones, words = zip(*parts, strict=True)
    return {
        "texts": texts,
        "voices": torch.tensor(voices, dtype=torch.uint8),
        "frames": torch.tensor([len(w) for w in words], dtype=torch.int32),
        "wave": torch.from_numpy(np.concatenate(waves)),
        "phones": torch.from_numpy(np.concatenate(phones)),
        "words": torch.from_numpy(np.concatenate(words)),
    }


def make_shard(number: int, utterances: int) -> Shard:
    """So many utterances, each in a voice drawn at random; the same number gives the same shard."""
    source = Texts(1_000_003 + number)
    texts, voices, parts = [], [], []
    while len(texts) < utterances:
        text, voice = source.draw(), int(source.rng.random() < 0.5)
        part = aligned(text, VOICES[voice])
        if part is not None:
            texts.append(text)
            voices.append(voice)
            parts.append(part)
    return pack(texts, voices, parts)


def make_held_out(sentences: int | None) -> Shard:
    """Held-out sentences (all, or so many from all groups) in both voices; all texts with slt first, then with rms."""
    texts = [text for _, text, _ in held_out()]
    if sentences is not None and sentences < len(texts):
        texts = [texts[i * len(texts) // sentences] for i in range(sentences)]
    parts = [part for voice in VOICES for text in texts if (part := aligned(text, voice)) is not None]
    if len(parts) < 2 * len(texts):
        raise SystemExit(f"flite could align only {len(parts)} of {2 * len(texts)} held-out recordings; see aligned()")
    return pack(2 * texts, [0] * len(texts) + [1] * len(texts), parts)


def vectors_of(shard: Shard) -> Tensor:
    """Acoustic vectors [N, 648] of all utterances of a shard."""
    waves = shard["wave"].float().div(32768).split((shard["frames"] * FRAME).tolist())
    return torch.cat([acoustic_vectors(wave) for wave in waves])


def speakers_of(shard: Shard) -> Tensor:
    """Voice [N] of each frame of a shard."""
    return shard["voices"].long().repeat_interleave(shard["frames"].long())


def add_codes(shard: Shard, codebooks: Codebooks) -> Shard:
    """The shard with codes int16 [N, 8]."""
    return shard | {"codes": codebooks.encode(vectors_of(shard), speakers_of(shard)).short()}


def read_shard(path: Path) -> Shard:
    """Read a shard's file."""
    return load(path, ("texts", "wave"), "data")


def write_shard(
    number: int | None, folder: Path, codebooks: Path | None, utterances: int, sentences: int | None
) -> None:
    """Make or complete one shard's file, None being the held-out sentences; does nothing where it is complete."""
    torch.set_num_threads(1)
    began, path = time.monotonic(), folder / (HELD_OUT if number is None else f"{number:04d}.pt")
    if path.exists():
        shard = read_shard(path)
    else:
        shard = make_held_out(sentences) if number is None else make_shard(number, utterances)
    if codebooks is not None and "codes" not in shard:
        shard = add_codes(shard, Codebooks.load(codebooks))
    elif path.exists():
        return
    torch.save(shard, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    seconds = float(shard["frames"].sum()) * 0.08
    print(
        f"{path.name}: {len(shard['texts'])} utterances, {seconds:.0f} s, made in {time.monotonic() - began:.1f} s",
        flush=True,
    )


def numbers(text: str) -> range:
    """The numbers of FIRST:END, for argparse."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text} is not FIRST:END, such as 0:60")
    return range(int(first), int(end))


def main() -> None:
    """Make the shards FIRST:END that are not there yet, and the held-out recordings."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", default=range(60), type=numbers, help="FIRST:END (default: 0:60)")
    parser.add_argument("--utterances", type=int, default=400, help="of a shard")
    parser.add_argument("--sentences", type=int, help="held-out ones (default: all)")
    parser.add_argument("--codebooks", type=there)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    needs.check()
    on_signals(leave)
    options.out.mkdir(parents=True, exist_ok=True)
    work = partial(
        write_shard,
        folder=options.out,
        codebooks=options.codebooks,
        utterances=options.utterances,
        sentences=options.sentences,
    )
    wanted = [None, *options.shards]
    if options.jobs == 1:
        for number in wanted:
            work(number)
        return
    with Pool(options.jobs, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for _ in pool.imap_unordered(work, wanted):
            pass


if __name__ == "__main__":
    main()
