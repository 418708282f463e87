"""Shards in, endless batches of random pieces of their recordings out: codes, waves at 24 kHz and phones."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from training import codec_loss
from training.features import FRAME
from training.flite import RATE
from training.steps import load

MARGIN = 320
"""Samples at 16 kHz read on the left of a crop, so that resampling is in its stride where the crop begins."""

Piece = tuple[Tensor, Tensor, Tensor]
"""Codes, wave and phones, of one recording or of a batch."""


class Crops(IterableDataset[Piece]):
    """Endless batches of random pieces of the recordings, the voices in a chosen proportion."""

    def __init__(self, paths: list[Path], count: int, frames: int, rms_share: float, seed: int) -> None:
        self.count, self.frames, self.rms_share, self.seed = count, frames, rms_share, seed
        self.rng = random.Random(seed)
        self.items: tuple[list[Piece], list[Piece]] = ([], [])
        for path in paths:
            shard = load(path, ("wave", "codes"), "data with --codebooks", mmap=True)
            lengths = shard["frames"].tolist()
            waves = shard["wave"].split([n * FRAME for n in lengths])
            parts = shard["codes"].split(lengths), waves, shard["phones"].split(lengths)
            for voice, *piece in zip(shard["voices"].tolist(), *parts, strict=True):
                if len(piece[0]) >= frames:
                    self.items[voice].append((piece[0], piece[1], piece[2]))

    def __iter__(self) -> Iterator[Piece]:
        worker = get_worker_info()
        if worker is not None:
            self.rng = random.Random(f"{self.seed} {worker.id}")
        while True:
            yield self.draw()

    def draw(self) -> Piece:
        """A batch: waves are [count, frames * 1920] in [-1, 1] at 24 kHz.

        Codes are int64 [count, 8, frames]; phones, one every 20 ms, int64 [count, 4 frames].
        """
        codes, waves, phones = [], [], []
        for _ in range(self.count):
            chosen, samples, spoken = self.rng.choice(self.items[int(self.rng.random() < self.rms_share)])
            start = 0 if self.rng.random() < 0.15 else self.rng.randint(0, len(chosen) - self.frames)
            first = max(0, start * FRAME - MARGIN)
            piece = samples[first : (start + self.frames) * FRAME + MARGIN].float().div(32768).numpy()
            resampled = soxr.resample(piece, RATE, codec_loss.RATE)[(start * FRAME - first) * 3 // 2 :]
            resampled = resampled[: self.frames * FRAME * 3 // 2]
            codes.append(chosen[start : start + self.frames].T.long())
            waves.append(torch.from_numpy(np.pad(resampled, (0, self.frames * FRAME * 3 // 2 - len(resampled)))))
            phones.append(spoken[start : start + self.frames].flatten().long())
        return torch.stack(codes), torch.stack(waves).float(), torch.stack(phones)
