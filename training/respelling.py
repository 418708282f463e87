"""Utterances in, the same with some words cut anywhere, into tokens that no vocabulary has.

A talker that has learnt its vocabulary's tokens one by one reads a rare one badly. Here words, drawn anew in each pass,
come whole or cut at any letter, as tokens that exist for that pass alone and have nothing but the features of what
their letters sound like in that word: so it learns to read what tokens are composed of. Contractions stay as they are:
the lexicon has no "don't", and its "don" is another word.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.lexicon import Features, Vocabulary
from training.rows import Utterance
from training.spelling import Letters, Phones, Spellings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE_WHOLE, SHARE_CUT = 0.2, 0.5
"""Shares of the words that are respelt: of those that are one token anyway, and of the others."""

WHOLE = 0.4
"""Share of respelt words that stay in one piece; the others are cut into two, long ones perhaps into three."""

SHORTEST, LONG = 3, 8
"""Letters of the shortest word that is respelt, and of the shortest that is cut into three."""


class Respelling:
    """Cuts words by chance; remembers the tokens of this pass."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocabulary: Vocabulary, spellings: Spellings) -> None:
        self.vocabulary, self.spellings = vocabulary, spellings
        self.texts = [str(tokenizer.decode([index])) for index in range(vocabulary.rows)]
        self.tokens: dict[tuple[str, Phones], int] = {}

    def _cut(self, text: str, letters: Letters, rng: random.Random) -> list[int]:
        """Tokens of a word, as it stands in the text, with perhaps a space before it, and its letters' phones."""
        count, space = len(letters), len(text) - len(letters)
        pieces = 1 if rng.random() < WHOLE else rng.choice((2, 3)) if count >= LONG else 2
        ends = [*sorted(rng.sample(range(1, count), pieces - 1)), count]
        found = []
        for begin, end in zip([0, *ends], ends, strict=False):
            phones = tuple(phone for letter in letters[begin:end] for phone in letter)
            piece = (text[begin + space if begin else 0 : end + space], phones)
            found.append(self.tokens.setdefault(piece, self.vocabulary.rows + len(self.tokens)))
        return found

    def _respell(self, utterance: Utterance, rng: random.Random) -> Utterance:
        ids, owners, words = list[int](), list[int](), utterance.token_words
        begin = 0
        while begin < len(words):
            end, text = begin + 1, self.texts[utterance.ids[begin]]
            while end < len(words) and words[end] == words[begin] and self.texts[utterance.ids[end]].isalpha():
                text += self.texts[utterance.ids[end]]
                end += 1
            spelling, part = self.spellings.get(text.strip().lower()), utterance.ids[begin:end]
            contracted = (
                end < len(words) and words[end] == words[begin] and self.texts[utterance.ids[end]].startswith("'")
            )
            share = SHARE_WHOLE if len(part) == 1 else SHARE_CUT
            if spelling and not contracted and len(spelling.letters) >= SHORTEST and rng.random() < share:
                part = self._cut(text, spelling.letters, rng)
            ids += part
            owners += [words[begin]] * len(part)
            begin = end
        return utterance._replace(ids=ids, token_words=owners)

    def recut(self, utterances: Sequence[Utterance], rng: random.Random) -> tuple[list[Utterance], Features]:
        """The utterances of a pass, and the features of the vocabulary's tokens and of the pass's own."""
        self.tokens.clear()
        found = [self._respell(utterance, rng) for utterance in utterances]
        return found, self.vocabulary.features_with(self.tokens)
