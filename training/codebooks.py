"""Acoustic vectors in, eight codes a frame out and back: PCA to 64 dimensions, then residual vector quantisation.

Book 0 is made for meaning: its entries are clusters of what a linear map predicts about the four phones of a frame
(plus a little of the vector itself), so that it hardly depends on the speaker. Books 1-7 quantise the rest; from book
2 on the assignment pays for rare codes and code 0 is the zero vector, so that the later books are predictable and not
noise. Fitted once by k-means; nothing is trained by gradient.

    python -m training.codebooks DATA_FOLDER OUT.pt
"""

import argparse
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.features import MELS
from training.steps import leave, load, on_signals, there

DIMENSIONS, ENTRIES, BOOKS = 64, 512, 8
MEANING_WEIGHT = 0.5
"""Weight of the (normalised) vector itself beside its phone prediction in the clusters of book 0."""

RATE_WEIGHT = 0.02
"""Price of a bit in units of the residual's variance, books 2-7."""


@dataclass(frozen=True)
class Codebooks:
    """The fitted codec of acoustic vectors.

    mean [648], basis [648, 64]          PCA: y = (x - mean) @ basis
    speaker_means [2, 64]                mean y of slt and rms, subtracted before the phones are predicted
    phone_map [64, 164]                  linear prediction of 4 x 41 phones; phone_scale, vector_scale: their std
    meaning [512, 228]                   cluster centres of book 0 in the space (phones, 0.5 * vector)
    books [8, 512, 64]                   what each code adds to y
    prices [8, 512]                      added to a code's squared distance when codes are chosen
    """

    mean: Tensor
    basis: Tensor
    speaker_means: Tensor
    phone_map: Tensor
    phone_scale: Tensor
    vector_scale: Tensor
    meaning: Tensor
    books: Tensor
    prices: Tensor

    def save(self, path: Path) -> None:
        """Write a file that `load` reads."""
        torch.save(asdict(self), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    @classmethod
    def load(cls, path: Path) -> "Codebooks":
        """Read what `save` wrote, or the same in half precision."""
        names = [field.name for field in fields(cls)]
        saved = load(path, names, "codebooks")
        return cls(**{name: saved[name].float() for name in names})

    def project(self, vectors: Tensor) -> Tensor:
        """PCA coordinates [N, 64] of acoustic vectors [N, 648]."""
        return (vectors - self.mean) @ self.basis

    def encode(self, vectors: Tensor, speaker: Tensor) -> Tensor:
        """Codes int64 [N, 8] of acoustic vectors [N, 648]; speaker [N] is 0 (slt) or 1 (rms)."""
        y = self.project(vectors)
        centred = y - self.speaker_means[speaker]
        meaning = _meaning_space(centred, self.phone_map, self.phone_scale, self.vector_scale)
        codes = [nearest(meaning, self.meaning)]
        residual = y - self.books[0][codes[0]]
        for book, price in zip(self.books[1:], self.prices[1:], strict=True):
            codes.append(nearest(residual, book, price))
            residual = residual - book[codes[-1]]
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Acoustic vectors [N, 648] of codes [N, 8]."""
        y = torch.stack([book[code] for book, code in zip(self.books, codes.unbind(1), strict=True)]).sum(0)
        return y @ self.basis.T + self.mean

    def sharpening(self, gain: float) -> Tensor:
        """A map [64, 64] of PCA coordinates that sharpens the formants.

        It multiplies each spectrum's distance from its own level and tilt (its cepstra from 2 on) by `gain`.
        """
        spectra, pitches = self.basis[: 8 * MELS].view(8, MELS, -1), self.basis[8 * MELS :]
        place = (torch.arange(MELS) + 0.5) / MELS
        low = F.normalize(torch.stack([torch.ones(MELS), torch.cos(math.pi * place)]))
        smooth = low.T @ (low @ spectra)
        return self.basis.T @ torch.cat([(smooth + gain * (spectra - smooth)).flatten(0, 1), pitches])


def _meaning_space(centred: Tensor, phone_map: Tensor, phone_scale: Tensor, vector_scale: Tensor) -> Tensor:
    return torch.cat([centred @ phone_map / phone_scale, centred / vector_scale * MEANING_WEIGHT], 1)


def nearest(points: Tensor, centres: Tensor, price: Tensor | None = None) -> Tensor:
    """Index [N] of the centre of least squared distance (plus price) to each point."""
    offset = (centres * centres).sum(1) + (0.0 if price is None else price)
    return torch.cat([(p @ centres.T * 2 - offset).argmax(1) for p in points.split(8192)])


def k_means(points: Tensor, rounds: int, rate_weight: float = 0.0, sample: int = 60_000) -> tuple[Tensor, Tensor]:
    """Centres [512, D] and prices [512] of points [N, D]; empty clusters restart at random points.

    With a rate weight, a code costs rate_weight * mean|x|^2 * -log2 p(code), and centre 0 stays the zero vector
    (entropy-constrained vector quantisation).
    """
    points = points[torch.randperm(len(points))[:sample]]
    centres = points[torch.randperm(len(points))[:ENTRIES]].clone()
    prices = torch.zeros(ENTRIES)
    unit = rate_weight * (points**2).sum(1).mean()
    for turn in range(rounds):
        if rate_weight:
            centres[0] = 0
        chosen = nearest(points, centres, prices)
        counts = torch.bincount(chosen, minlength=ENTRIES).float()
        empty = counts < 3
        centres = torch.zeros_like(centres).index_add(0, chosen, points) / counts.clamp(min=1)[:, None]
        centres[empty] = points[torch.randint(len(points), (int(empty.sum()),))]
        if rate_weight and turn >= 3:
            prices = unit * -torch.log2((counts + 0.5) / (len(points) + 0.5 * ENTRIES))
            if turn < rounds - 1:
                prices[empty] = prices[~empty].mean()
    if rate_weight:
        centres[0] = 0
    return centres, prices


def fit(vectors: Tensor, phones: Tensor, speaker: Tensor) -> Codebooks:
    """Fit to acoustic vectors [N, 648], phones [N, 4] and speakers [N]; half a minute for 160,000 frames."""
    mean = vectors.mean(0)
    centred = vectors - mean
    _, basis = torch.linalg.eigh(centred.T @ centred / len(centred))
    basis = basis.flip(1)[:, :DIMENSIONS].contiguous()
    y = centred @ basis
    speaker_means = torch.stack([y[speaker == s].mean(0) for s in (0, 1)])
    centred = y - speaker_means[speaker]
    targets = F.one_hot(phones.long(), 41).float().flatten(1)
    covariance = centred.T @ centred / len(y) + 1e-2 * torch.eye(DIMENSIONS)
    phone_map = torch.linalg.solve(covariance, centred.T @ (targets - targets.mean(0)) / len(y))
    phone_scale, vector_scale = (centred @ phone_map).std(), centred.std()
    points = _meaning_space(centred, phone_map, phone_scale, vector_scale)
    meaning, _ = k_means(points, rounds=15)
    chosen = nearest(points, meaning)
    counts = torch.bincount(chosen, minlength=ENTRIES).clamp(min=1)
    books = [torch.zeros(ENTRIES, DIMENSIONS).index_add(0, chosen, y) / counts[:, None]]
    prices = [torch.zeros(ENTRIES)]
    residual = y - books[0][chosen]
    for index in range(1, BOOKS):
        rate_weight = RATE_WEIGHT if index >= 2 else 0.0
        book, price = k_means(residual, rounds=16 if rate_weight else 12, rate_weight=rate_weight)
        chosen = nearest(residual, book, price)
        residual = residual - book[chosen]
        books.append(book)
        prices.append(price)
        share = torch.bincount(chosen, minlength=ENTRIES).float() / len(y)
        perplexity = torch.exp(-(share * (share + 1e-9).log()).sum())
        print(
            f"book {index}: residual variance {residual.var(0).sum() / y.var(0).sum():.4f}, perplexity {perplexity:.0f}"
        )
    return Codebooks(
        mean,
        basis,
        speaker_means,
        phone_map,
        phone_scale,
        vector_scale,
        meaning,
        torch.stack(books),
        torch.stack(prices),
    )


def left(codebooks: Codebooks, vectors: Tensor, speaker: Tensor) -> float:
    """Share of the variance of acoustic vectors [N, 648] that their codes do not give back, in PCA coordinates."""
    y = codebooks.project(vectors)
    made = codebooks.project(codebooks.decode(codebooks.encode(vectors, speaker)))
    return float((y - made).var(0).sum() / y.var(0).sum())


def main() -> None:
    """Fit to the first shards of recordings, and say what is lost on the held-out ones."""
    from training.data import HELD_OUT, read_shard, speakers_of, vectors_of

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("data", type=there)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=int, default=16)
    options = parser.parse_args()
    on_signals(leave)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shards = [read_shard(path) for path in sorted(options.data.glob("[0-9]*.pt"))[: options.shards]]
    vectors = torch.cat([vectors_of(shard) for shard in shards])
    phones = torch.cat([shard["phones"] for shard in shards])
    fitted = fit(vectors, phones, torch.cat([speakers_of(shard) for shard in shards]))
    unseen = read_shard(options.data / HELD_OUT)
    print(f"held out: residual variance {left(fitted, vectors_of(unseen), speakers_of(unseen)):.4f}")
    fitted.save(options.out)


if __name__ == "__main__":
    main()
