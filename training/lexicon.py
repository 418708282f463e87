"""A tokenizer in, a first text embedding for each of its tokens out: a random projection of how the token sounds.

With it the talker starts with "night" and "knight" close to each other and far from "ninth". Phones come from flite's
lexicon and letter-to-sound rules; what has no sound gets a vector of its own.
"""

import re
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.flite import pronounce

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FROM_FRONT = (1.0, 1.0, 0.9, 0.8, 0.7, 0.6)
FROM_BACK = (0.8, 0.7, 0.6, 0.5)
"""Weights of the first six and the last four phones by their places."""


def features(token: str) -> dict[tuple[object, ...], float]:
    """What a token's embedding is made of, with weights: phones by place, pairs, stresses, length, spelling."""
    word = token.strip().lower()
    found: dict[tuple[object, ...], float] = {
        ("space", token[:1] == " "): 0.35,
        ("capital", token.strip()[:1].isupper()): 0.2,
    }
    if not re.fullmatch(r"[a-z']+|[0-9]", word) or not word.strip("'"):
        return found | {("symbol", word): 1.0}
    marked = pronounce(DIGITS[int(word)] if word.isdigit() else word)
    phones = [re.sub(r"\d", "", p) for p in marked]
    stresses = [p[-1] for p in marked if p[-1].isdigit()]
    sounds: dict[tuple[object, ...], float] = {("length", min(len(phones), 12)): 0.8}
    for place, (phone, weight) in enumerate(zip(phones, FROM_FRONT, strict=False)):
        sounds["front", place, phone] = weight
    for place, (phone, weight) in enumerate(zip(reversed(phones), FROM_BACK, strict=False)):
        sounds["back", place, phone] = weight
    for place, stress in enumerate(stresses[:4]):
        sounds["stress", place, stress] = 0.4
    for before, phone in zip(["", *phones], phones, strict=False):
        sounds["any", phone] = sounds.get(("any", phone), 0.0) + 0.4
        if before:
            sounds["pair", before, phone] = sounds.get(("pair", before, phone), 0.0) + 0.3
    scale = 1.1 / (1.2 + 0.25 * len(phones)) ** 0.5
    return found | {feature: weight * scale for feature, weight in sounds.items()}


def text_embeddings(tokenizer: "PreTrainedTokenizerBase", rows: int, width: int, seed: int = 5) -> Tensor:
    """First embeddings [rows, width] of unit variance; rows that are no plain token stay random."""
    generator = torch.Generator().manual_seed(seed)

    @cache
    def direction(feature: tuple[object, ...]) -> Tensor:
        return torch.randn(width, generator=generator)

    table = torch.randn(rows, width, generator=generator) * 0.7
    for index in range(min(rows, len(tokenizer))):
        token = str(tokenizer.decode([index]))
        if index in tokenizer.all_special_ids or token.startswith("<|"):
            continue
        parts = [weight * direction(feature) for feature, weight in features(token).items()]
        table[index] = torch.stack(parts).sum(0) + 0.1 * torch.randn(width, generator=generator)
    return table / table.std()
