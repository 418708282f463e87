"""Codes in, how well they say a text out: a network hears phones in codes, and the text's phones are laid over them.

    python -m training.judge DATA… --codebooks BOOKS.pt --out judge.pt

No audio is needed: the codes stand for spectra. Two frames to either side are all that it hears at once, so it knows
sounds and not words. The talker learns from its opinion (`reinforce`).
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.codebooks import BOOKS, DIMENSIONS, ENTRIES, Codebooks
from training.data import HELD_OUT, Shard
from training.flite import PHONES
from training.steps import fit, fit_options, load, shards, there

WIDTH, KERNEL = 256, 3
SLOTS = 4
"""Phones heard in a frame, one every 20 ms."""

FRAMES = 4096
"""Of a batch, in a row: an utterance ends in silence, so its neighbour does no harm."""

NOISE = 0.15
"""Deviation of the noise on the vectors, in theirs: what is barely like a phone shall not be taken for it."""

WORST = -5.0
"""The least that the log probability of a phone in a slot counts."""

PAUSE = 0
"""Of PHONES."""


class Judge(nn.Module):
    """Codes [N, 8] of frames in a row -> log probabilities [N, 4, 41] of the phone in every 20 ms."""

    books: Tensor

    def __init__(self, books: Tensor | None = None) -> None:
        super().__init__()
        books = torch.zeros(BOOKS, ENTRIES, DIMENSIONS) if books is None else books
        self.register_buffer("books", books / books[0].std().clamp(min=1e-9))
        self.layers = nn.ModuleList(nn.Conv1d(wide, WIDTH, KERNEL, padding=KERNEL // 2) for wide in (DIMENSIONS, WIDTH))
        self.phones = nn.Linear(WIDTH, SLOTS * len(PHONES))

    @classmethod
    def load(cls, path: Path) -> "Judge":
        """Read one that `python -m training.judge` wrote, frozen."""
        judge = cls()
        judge.load_state_dict(load(path, judge.state_dict(), "judge"))
        return judge.requires_grad_(False).eval()

    def forward(self, codes: Tensor) -> Tensor:
        """Also with noise on the vectors while it is in training."""
        x = torch.stack([book[code] for book, code in zip(self.books, codes.long().unbind(1), strict=True)]).sum(0)
        if self.training:
            x = x + NOISE * x.std() * torch.randn_like(x)
        x = x.T[None]
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.phones(x[0].T).view(-1, SLOTS, len(PHONES)).log_softmax(-1)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _align(heard: np.ndarray, phones: np.ndarray) -> np.ndarray:
    """The phone's index in each slot on the best monotonic way; pauses, every second one at most, may be left out."""
    slots, count = len(heard), len(phones)
    best = np.full((slots, count), -np.inf, np.float32)
    came = np.zeros((slots, count), np.int32)
    best[0, 0], best[0, 1] = heard[0, phones[0]], heard[0, phones[1]]
    for t in range(1, slots):
        for s in range(count):
            where = s
            if s >= 1 and best[t - 1, s - 1] > best[t - 1, where]:
                where = s - 1
            if s >= 2 and phones[s - 1] == PAUSE and best[t - 1, s - 2] > best[t - 1, where]:
                where = s - 2
            best[t, s] = best[t - 1, where] + heard[t, phones[s]]
            came[t, s] = where
    s = count - 1 if best[-1, count - 1] > best[-1, count - 2] else count - 2
    way = np.zeros(slots, np.int32)
    for t in range(slots - 1, -1, -1):
        way[t] = s
        s = came[t, s]
    return way


def marks(heard: Tensor, words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """How well each word is said in heard [N, 4, 41], and which word each frame belongs to: [words], int [N].

    A mark is the mean log probability of the word's phones, each of -5 to 0; what is heard in the pause after it (and
    before the first word) and is none is taken off. words: each word's phones as indices into PHONES.
    """
    phones, word_of = [PAUSE], [0]
    for index, word in enumerate(words):
        phones += [*word, PAUSE]
        word_of += [index] * (len(word) + 1)
    flat = heard.flatten(0, 1).clamp(min=WORST).numpy()
    names, owner = np.array(phones, np.int32), np.array(word_of)
    way = _align(flat, names)
    scores, lengths = flat[np.arange(len(flat)), names[way]], np.bincount(way, minlength=len(names))
    sums = np.bincount(way, scores, len(names))
    # a phone that found no room counts as the worst, a pause by the sum of its slots
    each = np.where(names == PAUSE, sums, np.where(lengths > 0, sums / np.maximum(1, lengths), WORST))
    sizes = np.bincount(owner, names != PAUSE, len(words))
    return np.bincount(owner, each, len(words)) / np.maximum(1, sizes), owner[way[SLOTS // 2 :: SLOTS]]


def batches(paths: Sequence[Path], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pieces of the shards: codes [4096, 8] and phones [4096, 4]."""
    rng = random.Random(seed)
    parts = [load(path, ("codes", "phones"), "data with --codebooks", mmap=True) for path in paths]
    codes = torch.cat([part["codes"] for part in parts])
    phones = torch.cat([part["phones"] for part in parts])
    while True:
        start = rng.randrange(max(1, len(codes) - FRAMES))
        yield codes[start : start + FRAMES].long(), phones[start : start + FRAMES].long()


def share_right(judge: Judge, shard: Shard) -> float:
    """Share of a shard's 20 ms whose phone is heard, in per cent."""
    return 100 * float((judge(shard["codes"]).argmax(-1) == shard["phones"]).float().mean())


def main() -> None:
    """Train a judge; nothing is done where it is there already."""
    parser = fit_options(main.__doc__, 1500)
    parser.add_argument("--codebooks", type=there, required=True)
    options = parser.parse_args()
    if options.out.exists():
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    judge = Judge(Codebooks.load(options.codebooks).books)
    pieces = batches(shards(options.data)[:60], 0)
    unseen = load(options.data[0] / HELD_OUT, ("codes", "phones"), "data with --codebooks")

    def loss() -> Tensor:
        codes, phones = next(pieces)
        return F.nll_loss(judge.train()(codes).flatten(0, 1), phones.flatten())

    fit(judge, options, loss, lambda: share_right(judge.eval(), unseen))


if __name__ == "__main__":
    main()
