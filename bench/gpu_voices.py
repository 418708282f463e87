"""Made-up voices for bench.gpu: a number goes in, a prompt, a text and a sampling come out; and who speaks when."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megakernel.frame_step import PIECE, FrameStep
from megakernel.sampler import Sampling
from megakernel.shape import Shape


@dataclass(frozen=True)
class Voice:
    """All that a voice is given: prefix [P, H] bf16, pending [H], text [F, H]."""

    seed: int
    prefix: Tensor
    pending: Tensor
    text: Tensor
    sampling: Sampling

    @classmethod
    def make(cls, seed: int, frames: int, shape: Shape, device: torch.device) -> "Voice":
        """The same numbers on every device; 1 to 40 prompt positions, and every way of sampling in turn."""
        g = torch.Generator().manual_seed(seed)

        def rows(count: int) -> Tensor:
            return (0.2 * torch.randn(count, shape.talker.hidden, generator=g)).to(device, torch.bfloat16)

        sampling = Sampling(
            do_sample=seed % 3 > 0,
            top_k=50 if seed % 2 else 0,
            top_p=0.8 if seed % 4 == 1 else 1.0,
            predictor_do_sample=seed % 5 > 0,
        )
        return cls(seed, rows(1 + seed * 17 % 40), rows(1)[0], rows(frames), sampling)

    def join(self, step: FrameStep, row: int) -> None:
        """Take a free row: admit and prefill."""
        step.admit(row, self.pending, self.seed, self.sampling)
        for piece in self.prefix.split(PIECE):
            step.prefill(row, piece)


@dataclass(frozen=True)
class Turn:
    """One frame: rows and the voices that join before it; rows that speak, with voice and frame number; who leaves."""

    joined: dict[int, Voice]
    named: dict[int, tuple[Voice, int]]
    leaving: list[int]

    @property
    def text(self) -> Tensor:
        """[len(named), H]."""
        return torch.stack([voice.text[frame] for voice, frame in self.named.values()])


def company(voices: Sequence[Voice], rows: int, most: int, seed: int) -> Iterator[Turn]:
    """Voices that join, wait, speak (1 to `most` at a time) and leave at random, in any row, for ever."""
    choose = random.Random(seed)
    here: dict[int, tuple[Voice, int]] = {}
    leaves: dict[int, int] = {}
    while True:
        joined: dict[int, Voice] = {}
        while len(here) < rows and (not here or choose.random() < 0.3):
            row = choose.choice([r for r in range(rows) if r not in here])
            joined[row] = choose.choice(voices)
            here[row] = (joined[row], 0)
            leaves[row] = choose.randint(1, len(joined[row].text))
        speakers = choose.sample(sorted(here), choose.randint(1, min(most, len(here))))
        named = {row: here[row] for row in speakers}
        here.update({row: (voice, frame + 1) for row, (voice, frame) in named.items()})
        leaving = [row for row in speakers if here[row][1] == leaves[row]]
        yield Turn(joined, named, leaving)
        for row in leaving:
            del here[row]
