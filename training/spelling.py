"""Words in, the phones of each of their letters out: what a token sounds like within a word.

    python -m training.spelling spellings.json

flite says how a word sounds, not which of its letters make which sound. Letters and phones are aligned in order, each
letter with up to three phones, by expectation maximisation over the likeliest alignments (as in Black, Lenzo & Pagel
1998, "Issues in building general letter to sound rules"). "kettle" is k, eh1, t, -, ax0 l, -.
"""

import argparse
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from training import needs
from training.flite import pronounce
from training.steps import leave, load_json, on_signals
from training.text import capitalised, lexicon

Phones = tuple[str, ...]
"""flite's phones; a vowel ends with its stress, 0 or 1."""

Letters = tuple[Phones, ...]
"""The phones of each of a word's letters."""

LONGEST, ROUNDS, SAMPLE = 3, 5, 12_000
"""Phones of one letter; rounds of the expectation maximisation, and the words that it sees."""

RARE, IMPOSSIBLE = 12.0, 25.0
"""Costs, in nats, of phones that a letter was never seen with: up to two, and three."""

Costs = Mapping[str, Mapping[Phones, float]]


class Spelling(NamedTuple):
    """A word's letters, how common it is on Zipf's scale, and whether it is a name, which has a capital."""

    letters: Letters
    zipf: float
    name: bool


Spellings = dict[str, Spelling]
"""By words in lower case."""


def plain(phones: Phones) -> Phones:
    """Without stress."""
    return tuple(phone.rstrip("012") for phone in phones)


def align(word: str, phones: Phones, costs: Costs) -> Letters | None:
    """The cheapest way to deal phones out to a word's letters; none if there are too many phones."""
    sounds, count = plain(phones), len(phones)
    best = [0.0] + [math.inf] * count
    steps = []
    for letter in word:
        known, following, taken = costs.get(letter, {}), [math.inf] * (count + 1), [0] * (count + 1)
        for done, cost in enumerate(best):
            if cost < math.inf:
                for more in range(min(LONGEST, count - done) + 1):
                    unknown = RARE if more < LONGEST else IMPOSSIBLE
                    whole = cost + known.get(sounds[done : done + more], unknown)
                    if whole < following[done + more]:
                        following[done + more], taken[done + more] = whole, more
        best = following
        steps.append(taken)
    if best[count] == math.inf:
        return None
    parts, end = [], count
    for taken in reversed(steps):
        parts.append(phones[end - taken[end] : end])
        end -= taken[end]
    return tuple(reversed(parts))


def _first_costs(said: Sequence[tuple[str, Phones]]) -> Costs:
    """Of single phones, by how much more often than by chance they are in a word with the letter."""
    together: dict[str, Counter[str]] = defaultdict(Counter)
    often: Counter[str] = Counter()
    for word, phones in said:
        often.update(plain(phones))
        for letter in word:
            for phone in plain(phones):
                together[letter][phone] += 1
    every, costs = sum(often.values()), {}
    for letter, found in together.items():
        share = sum(found.values()) / every
        costs[letter] = {(phone,): 3 - 2 * math.log(n / often[phone] / share) for phone, n in found.items()} | {(): 4.0}
    return costs


def spell(said: Mapping[str, Phones], seed: int = 0) -> dict[str, Letters]:
    """Align words with their phones; the few that cannot be aligned are left out."""
    items = sorted(said.items())
    some = random.Random(seed).sample(items, min(SAMPLE, len(items)))
    costs = _first_costs(some)
    for _ in range(ROUNDS):
        counts: dict[str, Counter[Phones]] = defaultdict(Counter)
        for word, phones in some:
            for letter, part in zip(word, align(word, phones, costs) or (), strict=False):
                counts[letter][plain(part)] += 1
        costs = {
            letter: {part: -math.log(n / (1 + found.total())) for part, n in found.items()}
            for letter, found in counts.items()
        }
    found = ((word, align(word, phones, costs)) for word, phones in items)
    return {word: parts for word, parts in found if parts is not None}


def read_spellings(path: Path) -> Spellings:
    """The file of this program; exits with one line if it is of another kind."""
    found = load_json(path, "spelling")
    try:
        return {word: _spelling(word, *fields) for word, fields in found.items()}
    except (TypeError, ValueError, AttributeError):
        raise SystemExit(f"{path} is no file of training.spelling: its words are not spelt") from None


def _spelling(word: str, phones: str, zipf: float, name: bool) -> Spelling:
    letters = tuple(tuple(part.split()) for part in phones.split("|"))
    if len(letters) != len(word) or not re.fullmatch("[a-z]+", word) or not math.isfinite(zipf):
        raise ValueError(word)
    return Spelling(letters, zipf, name)


def main() -> None:
    """Write the spellings of the most common words and WordNet's."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", type=int, help="only so many, for a try")
    options = parser.parse_args()
    on_signals(leave)
    needs.check()
    common, names = lexicon(), capitalised()
    words = [word for word in common if re.fullmatch("[a-z]{1,20}", word)]
    said = {word: tuple(pronounce(word)) for word in words[: options.words]}
    spellings = spell({word: phones for word, phones in said.items() if phones})
    text = {
        word: ["|".join(" ".join(part) for part in letters), common[word], word in names]
        for word, letters in spellings.items()
    }
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(text, separators=(",", ":")), encoding="utf-8")
    part.rename(options.out)
    print(f"{len(spellings)} words")


if __name__ == "__main__":
    main()
