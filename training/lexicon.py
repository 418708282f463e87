"""A tokenizer and spellings in, what each of its tokens sounds like out, as weighted features: phones by their places.

A text embedding is a linear image of them: "night" and "knight" begin close to each other and far from "ninth", and a
token of which no speech was ever made is read like all others. Its phones are those that it has in the lexicon's words,
as often as there; a token that is in none of them has its own by flite's letter-to-sound rules, and what has no sound
gets a vector of its own.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training.flite import pronounce
from training.merges import Form, pieces, weights
from training.spelling import Phones, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FROM_FRONT = (1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5)
FROM_BACK = (0.8, 0.7, 0.6, 0.5, 0.4, 0.4)
"""Weights of the first ten and the last six phones by their places."""

LIKELIEST = 5
"""So many ways to say a token count."""

LETTERS, LETTER_WEIGHT = 3, 0.25
"""Of its spelling a token shows its first and last letters: what it sounds like may hang on its neighbours."""

PART = 0.03
"""How much a token counts where it was merged into a larger one: training cuts smaller pieces, too."""

Feature = tuple[object, ...]
Sounds = Mapping[Phones, float]


@dataclass(frozen=True)
class Features:
    """Weighted features of all tokens, as `torch.nn.functional.embedding_bag` takes them.

    indices, weights [n]; begin [V+1]: those of token t are begin[t] to begin[t+1]; count: of different features
    """

    indices: Tensor
    weights: Tensor
    begin: Tensor
    count: int

    def to(self, device: torch.device | str) -> "Features":
        """The same on a device."""
        return Features(self.indices.to(device), self.weights.to(device), self.begin.to(device), self.count)

    def embed(self, tokens: Tensor, directions: Tensor) -> Tensor:
        """Weighted sums [N,W] of directions [count,W] for tokens [N]."""
        begin, sizes = self.begin[tokens], self.begin[tokens + 1] - self.begin[tokens]
        starts = sizes.cumsum(0) - sizes
        places = torch.arange(int(sizes.sum()), device=tokens.device) + (begin - starts).repeat_interleave(sizes)
        weights = self.weights[places]
        return F.embedding_bag(self.indices[places], directions, starts, per_sample_weights=weights, mode="sum")

    def digest(self) -> str:
        """Changes with any of them."""
        parts = (self.indices, self.weights, self.begin)
        return hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in parts)).hexdigest()

    def dense(self) -> Tensor:
        """The same as a matrix [V,count]; 170 MB for the 19,120 tokens of the embedded voice."""
        rows, device = len(self.begin) - 1, self.begin.device
        tokens = torch.arange(rows, device=device).repeat_interleave(self.begin.diff())
        return torch.zeros(rows, self.count, device=device).index_put_((tokens, self.indices), self.weights, True)


def sounds(tokenizer: "PreTrainedTokenizerBase", lexicon: list[Form]) -> dict[str, dict[Phones, float]]:
    """How each token is said in a lexicon's words, and how often."""
    backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[assignment]
    parts: dict[str, tuple[str, str]] = {
        a + b: (a, b) for a, b in reversed(json.loads(backend.to_str())["model"]["merges"])
    }
    found: dict[str, dict[Phones, float]] = defaultdict(weights)
    cuts = backend.encode_batch([form.text for form in lexicon], add_special_tokens=False)
    for form, cut in zip(lexicon, cuts, strict=True):
        whole = list(cut.tokens)
        for token, phones in pieces(form, whole):
            found[token][phones] += form.weight
        while any(token in parts for token in whole):
            halves = [part for token in whole for part in parts.get(token, (token,))]
            fresh = [token in parts for token in whole for _ in parts.get(token, (token,))]
            for (token, phones), split in zip(pieces(form, halves), fresh, strict=True):
                found[token][phones] += form.weight * PART * split
            whole = halves
    return found


def features(text: str, said: Sounds) -> dict[Feature, float]:
    """What a token with a sound is made of, with weights: phones by place, pairs, stresses, length, spelling."""
    word = text.strip()
    found = defaultdict[Feature, float](float)
    found["space", text[:1] == " "], found["capital", word[:1].isupper()] = 0.35, 0.2
    every = sum(said.values())
    for marked, often in sorted(said.items(), key=itemgetter(1), reverse=True)[:LIKELIEST]:
        phones, scale = plain(marked), often / every * 1.1 / (1.2 + 0.25 * len(marked)) ** 0.5
        found["length", min(len(phones), 12)] += 0.8 * scale
        for side, places, step in (("front", FROM_FRONT, 1), ("back", FROM_BACK, -1)):
            for place, (phone, mark, weight) in enumerate(zip(phones[::step], marked[::step], places, strict=False)):
                found[side, place, phone] += weight * scale
                if mark != phone:
                    found[side, "stress", place, mark[-1]] += 0.35 * weight * scale
        for before, phone in zip(("", *phones), phones, strict=False):
            found["any", phone] += 0.4 * scale
            if before:
                found["pair", before, phone] += 0.3 * scale
    if word.isalpha():
        for place in range(min(LETTERS, len(word))):
            found["first", place, word[place].lower()] += LETTER_WEIGHT
            found["last", place, word[-1 - place].lower()] += LETTER_WEIGHT
    return found


class Vocabulary:
    """What the tokens of a tokenizer are made of; special and unused ones have one feature each, their own.

    rows      so many tokens, the unused ones at its end included
    features  of all of them
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", rows: int, lexicon: list[Form]) -> None:
        said, names = sounds(tokenizer, lexicon), {index: token for token, index in tokenizer.get_vocab().items()}
        self.rows, self.numbers = rows, dict[Feature, int]()
        found: list[Mapping[Feature, float]] = []
        for index in range(rows):
            token = names.get(index)
            if token is None or index in tokenizer.all_special_ids or token.startswith("<|"):
                found.append({("special", index): 1.0})
            else:
                text = str(tokenizer.decode([index]))
                sound = said.get(token) or alone(text)
                found.append(features(text, sound) if sound else {("symbol", token): 1.0})
        for feature in (feature for each in found for feature in each):
            self.numbers.setdefault(feature, len(self.numbers))
        self.features = self._packed(found)

    def _packed(self, found: Iterable[Mapping[Feature, float]]) -> Features:
        """Features that no token of the vocabulary has are left out."""
        indices, weights, begin = list[int](), list[float](), [0]
        for each in found:
            for feature, weight in each.items():
                if feature in self.numbers:
                    indices.append(self.numbers[feature])
                    weights.append(weight)
            begin.append(len(indices))
        packed = torch.tensor(indices, dtype=torch.long), torch.tensor(weights, dtype=torch.float32)
        return Features(*packed, torch.tensor(begin), len(self.numbers))

    def features_with(self, others: Iterable[tuple[str, Phones]]) -> Features:
        """Those of the vocabulary, and behind them those of other tokens, each a text and how it is said."""
        more, own = self._packed(features(text, {phones: 1.0}) for text, phones in others), self.features
        indices, weights = torch.cat([own.indices, more.indices]), torch.cat([own.weights, more.weights])
        return Features(indices, weights, torch.cat([own.begin, more.begin[1:] + len(own.indices)]), own.count)


def alone(text: str) -> Sounds:
    """How a token is said that is in no word of the lexicon; empty if it has no sound."""
    word = text.strip().lower()
    if not re.fullmatch(r"[a-z']+|[0-9]", word) or not word.strip("'"):
        return {}
    return {tuple(pronounce(DIGITS[int(word)] if word.isdigit() else word)): 1.0}


def text_embeddings(found: Features, width: int, seed: int = 5) -> Tensor:
    """First embeddings [V,width] of unit variance: random directions for the features."""
    directions = torch.randn(found.count, width, generator=torch.Generator().manual_seed(seed))
    table = found.embed(torch.arange(len(found.begin) - 1), directions)
    return table / table.std()
