"""A byte-pair tokenizer and spellings in, further merges out: those after which letters tell most about their sound.

Byte pairs that are merely frequent cut "kettle" into k, et, tle, and none of these sounds there as it mostly does. Here
the pair is merged that takes most off what is left open when a token is known, summed over the words of a lexicon:
the entropy of its phones. So a word that is read by rule stays in pieces, and one that is not becomes a token.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from tokenizers import Tokenizer

from training.spelling import Letters, Phones, Spellings, plain

WEIGHT = 0.5
"""How much a word counts: its frequency to this power, so that rare words count too."""

FORMS, NAME_FORMS = (0.88, 0.02, 0.10), (0.20, 0.70, 0.10)
"""Shares of " word", " Word" and "Word", and those of a name."""

ALIKE = {"ax": "ah"}
"""Phones that are taken for one another."""

NOTHING = 1e-9
"""Weights below are what rounding leaves of a token that was merged away; the least of a form is 0.06."""

Pair = tuple[str, str]


class Form(NamedTuple):
    """A word as it stands in texts, the phones of its letters (and of the space before it) and how much it counts."""

    text: str
    letters: Letters
    weight: float


def forms(spellings: Spellings) -> list[Form]:
    """All words of a lexicon as they stand within sentences and at their beginning."""
    found = []
    for word, (letters, zipf, name) in spellings.items():
        weight = 10 ** (WEIGHT * max(1.0, zipf))
        lower, capital, first = (weight * share for share in (NAME_FORMS if name else FORMS))
        found.append(Form(f" {word}", ((), *letters), lower))
        found.append(Form(f" {word.capitalize()}", ((), *letters), capital))
        found.append(Form(word.capitalize(), letters, first))
    return found


def pieces(form: Form, tokens: list[str]) -> Iterator[tuple[str, Phones]]:
    """Each token of a form with its phones there."""
    begin = 0
    for token in tokens:
        yield token, tuple(phone for letter in form.letters[begin : begin + len(token)] for phone in letter)
        begin += len(token)


def alike(phones: Phones) -> Phones:
    """Without stress, and without the difference between unstressed vowels."""
    return tuple(ALIKE.get(phone, phone) for phone in plain(phones))


def weights() -> dict[Phones, float]:
    """Zeros, to be added to."""
    return defaultdict(float)


def entropy(counts: Mapping[Phones, float]) -> float:
    """Weighted entropy in bits: the sum of the counts times that of their distribution."""
    kept = [n for n in counts.values() if n > NOTHING]
    whole = sum(kept)
    return -sum(n * math.log2(n / whole) for n in kept)


class Merger:
    """Words cut into tokens, and what is left open about the tokens' phones."""

    def __init__(self, tokenizer: Tokenizer, words: list[Form]) -> None:
        cuts = tokenizer.encode_batch([form.text for form in words])
        self.weights = [form.weight for form in words]
        self.words = [
            [(token, alike(phones)) for token, phones in pieces(form, cut.tokens)]
            for form, cut in zip(words, cuts, strict=True)
        ]
        self.sounds: dict[str, dict[Phones, float]] = defaultdict(weights)
        self.where: dict[Pair, set[int]] = defaultdict(set)
        for index, (word, weight) in enumerate(zip(self.words, self.weights, strict=True)):
            for token, phones in word:
                self.sounds[token][phones] += weight
            self._note(index)
        self.open = {token: entropy(counts) for token, counts in self.sounds.items()}

    def _pairs(self, index: int) -> Iterator[Pair]:
        word = self.words[index]
        yield from ((a, b) for (a, _), (b, _) in pairwise(word))

    def _note(self, index: int) -> None:
        for pair in self._pairs(index):
            self.where[pair].add(index)

    def _places(self, index: int, pair: Pair) -> Iterator[int]:
        word, place = self.words[index], 0
        while place < len(word) - 1:
            if (word[place][0], word[place + 1][0]) == pair:
                yield place
                place += 1
            place += 1

    def gain(self, pair: Pair) -> float:
        """What is no longer open, in bits times weight, if this pair is merged."""
        left, right, both = weights(), weights(), weights()
        if pair[0] == pair[1]:
            return 0.0
        for index in self.where[pair]:
            word, weight = self.words[index], self.weights[index]
            for place in self._places(index, pair):
                first, second = word[place][1], word[place + 1][1]
                left[first] += weight
                right[second] += weight
                both[first + second] += weight
        gained = self.open[pair[0]] + self.open[pair[1]] - entropy(both)
        for token, gone in zip(pair, (left, right), strict=True):
            gained -= entropy({p: max(0.0, n - gone.get(p, 0.0)) for p, n in self.sounds[token].items()})
        return gained

    def merge(self, pair: Pair) -> set[Pair]:
        """Merge a pair everywhere; returns the pairs that there are now with the new token."""
        token, touched = pair[0] + pair[1], set[Pair]()
        for index in list(self.where[pair]):
            for old in self._pairs(index):
                self.where[old].discard(index)
            word, weight = self.words[index], self.weights[index]
            for place in reversed(list(self._places(index, pair))):
                (_, first), (_, second) = word[place : place + 2]
                word[place : place + 2] = [(token, first + second)]
                self.sounds[pair[0]][first] -= weight
                self.sounds[pair[1]][second] -= weight
                self.sounds[token][first + second] += weight
            self._note(index)
            touched |= {new for new in self._pairs(index) if token in new}
        for changed in (*pair, token):
            self.open[changed] = entropy(self.sounds[changed])
        return touched


def merges(tokenizer: Tokenizer, words: list[Form], count: int) -> list[Pair]:
    """The merges that bring `count` new tokens, best first, fewer if nothing is left open.

    A pair's gain is computed again when its turn comes, since every merge lowers that of others; that it may also raise
    some is not noticed. Left out are pairs that make a token which there is already, and those of two like tokens.
    """
    merger, vocabulary = Merger(tokenizer, words), set(tokenizer.get_vocab())
    heap = [(-merger.gain(pair), pair) for pair in merger.where]
    heapq.heapify(heap)
    found: list[Pair] = []
    while count > 0 and heap:
        _, pair = heapq.heappop(heap)
        gained = merger.gain(pair)
        if gained <= 1e-6 or pair[0] + pair[1] in vocabulary:
            continue
        if heap and gained < -heap[0][0]:
            heapq.heappush(heap, (-gained, pair))
            continue
        found.append(pair)
        count -= 1
        vocabulary.add(pair[0] + pair[1])
        for new in merger.merge(pair):
            heapq.heappush(heap, (-merger.gain(new), new))
    return found
