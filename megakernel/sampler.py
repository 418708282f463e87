"""Logits and a random stream in, one code a voice out: the sampling rule that every implementation shares.

Order, as the official code runs it: repetition penalty, EOS ban, suppression, temperature, top-k, top-p, draw.
Every operation is within a row, so a voice's draw does not depend on its company.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
"""Partial sums of the cumulative distribution run inside blocks of so many codes, then over the blocks."""


@dataclass(frozen=True)
class Sampling:
    """How one voice is sampled. top_k 0 keeps all, top_p 1 keeps all; predictor_* are for codes 1..C-1."""

    do_sample: bool = True
    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.05
    predictor_do_sample: bool = True
    predictor_temperature: float = 0.9
    predictor_top_k: int = 50
    predictor_top_p: float = 1.0


@dataclass
class Knobs:
    """The parameters of one head for B columns: sample [B] bool, temperature and tail = 1 - top_p [B] fp32, top_k [B].

    What the host must know to leave out work that no column needs stands beside them.
    """

    sample: Tensor
    temperature: Tensor
    top_k: Tensor
    tail: Tensor
    any_sample: bool
    all_sample: bool
    most_k: int
    any_top_k: bool
    any_top_p: bool


def knobs(rows: list[tuple[bool, float, int, float]], vocab: int, device: torch.device) -> Knobs:
    """Knobs of columns given as (do_sample, temperature, top_k, top_p)."""
    kept = [min(k, vocab) if k > 0 else vocab for _, _, k, _ in rows]
    sampling = [s for s, _, _, _ in rows]
    return Knobs(
        sample=torch.tensor(sampling, device=device),
        temperature=torch.tensor([t for _, t, _, _ in rows], dtype=torch.float32, device=device),
        top_k=torch.tensor(kept, device=device),
        tail=torch.tensor([1 - p for _, _, _, p in rows], dtype=torch.float32, device=device),
        any_sample=any(sampling),
        all_sample=all(sampling),
        most_k=max(kept),
        any_top_k=min(kept) < vocab,
        any_top_p=any(p < 1 for _, _, _, p in rows),
    )


def uniforms(seeds: Tensor, frames: Tensor, draws: int) -> Tensor:
    """The random numbers of one frame: (Philox4x32-10(key=seed, counter=(frame, draw))[0] >> 8) * 2^-24 in [0, 1).

    seeds [B] int64 (its two 32-bit halves are the key), frames [B] int64 -> [B, draws] fp32
    Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = 0xFFFFFFFF
    b = seeds.shape[0]
    k0, k1 = (seeds & low)[:, None], ((seeds >> 32) & low)[:, None]
    c0 = (frames & low)[:, None].expand(b, draws)
    c1 = torch.arange(draws, device=seeds.device)[None].expand(b, draws)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # A product of two 32-bit numbers wraps in int64, but its bits are right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return (c0 >> 8).float() * 2.0**-24


def restrict(logits: Tensor, history: Tensor, penalty: Tensor, ban_eos: Tensor, eos: int, suppress_from: int) -> Tensor:
    """What only code 0 knows: repetition penalty, EOS ban, suppression of control ids.

    logits [B,V] fp32; history [B,V] True for the code-0 ids this voice has spoken; penalty [B]; ban_eos [B] bool.
    The penalty divides positive logits and multiplies negative ones, once per id, over the whole history.
    """
    scale = penalty[:, None]
    logits = torch.where(history, torch.where(logits < 0, logits * scale, logits / scale), logits)
    end = logits[:, eos].masked_fill(ban_eos, float("-inf"))
    logits[:, suppress_from:] = float("-inf")
    logits[:, eos] = end
    return logits


def pick(logits: Tensor, k: Knobs, uniform: Tensor) -> Tensor:
    """Choose one id a column: arg-max where a column does not sample, else a draw.

    logits [B,V] fp32, uniform [B] fp32 -> [B] int64
    Top-k keeps every logit >= the k-th largest (ties stay); top-p drops the smallest logits whose cumulative
    probability is <= 1 - p, as transformers does.
    """
    if not k.any_sample:
        return logits.argmax(-1)
    scaled = logits / k.temperature[:, None]
    if k.any_top_k:
        kth = scaled.topk(k.most_k, sorted=True).values.gather(1, k.top_k[:, None] - 1)
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    if k.any_top_p:
        scaled = _top_p(scaled, k.tail)
    drawn = draw(scaled, uniform)
    return drawn if k.all_sample else torch.where(k.sample, drawn, logits.argmax(-1))


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF in index order: the first id whose cumulative weight exceeds uniform * total. -> [B] int64."""
    b, v = logits.shape
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    if v % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - v % BLOCK))
    within = weights.view(b, -1, BLOCK).cumsum(-1)
    after = within[:, :, -1].cumsum(-1)
    before = torch.cat([after.new_zeros(b, 1), after[:, :-1]], -1)
    # Partial sums are rounded, and not monotone across blocks: an id without weight must not win by that.
    cumulative = (before[:, :, None] + within).view(b, -1).masked_fill(weights == 0, 0)
    total = cumulative.amax(-1)
    target = torch.minimum(uniform * total, total.nextafter(total.new_zeros(())))
    return (cumulative > target[:, None]).int().argmax(-1)


def _top_p(logits: Tensor, tail: Tensor) -> Tensor:
    ascending, order = logits.sort(dim=-1, stable=True)
    drop = ascending.softmax(-1).cumsum(-1) <= tail[:, None]
    drop[:, -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
