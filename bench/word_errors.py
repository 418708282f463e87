"""Heard utterances in, word error rates and end errors out, each beside flite's; and two runs' difference.

All intervals come from drawing whole sentences again and again (bootstrap), since the words of one sentence go wrong
together.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

LATE_S, EARLY_S = 2.0, -1.0
"""So much longer than flite's speech is a runaway, so much shorter was cut short."""

DRAWS = 2000


class Spoken(NamedTuple):
    """One utterance as it was heard.

    words, errors, flite_errors   of the sentence; wrong in ours; wrong in flite's recording, where there is one
    longer_s                      by how many seconds ours is longer than flite's
    end, seconds                  how the speech ended (backend.End) and its length
    """

    sentence: str
    group: str
    voice: str
    layout: str
    sampling: str
    words: int
    heard: str
    errors: int
    flite_errors: int | None
    longer_s: float | None
    end: str
    seconds: float

    @property
    def condition(self) -> str:
        """How it was spoken."""
        return f"{self.voice} {self.layout} {self.sampling}"


def drawn(sums: np.ndarray) -> np.ndarray:
    """Sums [2000, …] over as many sentences as there are, drawn with repetition, of per-sentence values [S, …]."""
    picks = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), DRAWS)
    return picks @ sums


def error_rate(errors: Sequence[float], words: Sequence[float]) -> tuple[float, float]:
    """Word error rate and the half width of its 95 % interval."""
    sums = np.array([errors, words], float).T
    totals = drawn(sums)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], (2.5, 97.5))
    return float(sums[:, 0].sum() / sums[:, 1].sum()), float(high - low) / 2


def summary(spoken: Sequence[Spoken]) -> dict[str, Any]:
    """The figures of some utterances; a sentence that was spoken several times is drawn with all its takes."""
    sentences: dict[str, np.ndarray] = {}
    for s in spoken:
        sentences.setdefault(s.sentence, np.zeros(2))
        sentences[s.sentence] += s.errors, s.words
    rate, interval = error_rate(*zip(*sentences.values(), strict=True))
    flite = [(s.flite_errors, s.words) for s in spoken if s.flite_errors is not None]
    return {
        "sentences": len(sentences),
        "words": sum(s.words for s in spoken),
        "wer": round(rate, 4),
        "wer_interval": round(interval, 4),
        "flite_wer": round(sum(e for e, _ in flite) / sum(w for _, w in flite), 4) if flite else None,
        **ends([(s.end, s.longer_s) for s in spoken]),
    }


def ends(utterances: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    """How well utterances ended: of each its end (backend.End) and by how many seconds it is longer than flite's."""
    longer = np.array([longer_s for _, longer_s in utterances if longer_s is not None])
    away = sum(end != "eos" or (longer_s or 0.0) > LATE_S for end, longer_s in utterances)
    return {
        "end_error_s": round(float(np.median(np.abs(longer))), 3) if len(longer) else None,
        "end_bias_s": round(float(longer.mean()), 3) if len(longer) else None,
        "runaways_per_1000": round(1000 * away / len(utterances), 1),
        "cut_short_per_1000": round(1000 * float((longer < EARLY_S).mean()), 1) if len(longer) else None,
    }


def tables(spoken: Sequence[Spoken]) -> dict[str, dict[str, Any]]:
    """Summaries by condition, and within each by group of sentences."""
    found = {}
    for condition in dict.fromkeys(s.condition for s in spoken):
        here = [s for s in spoken if s.condition == condition]
        found[condition] = summary(here)
        for group in dict.fromkeys(s.group for s in here):
            found[f"{condition} {group}"] = summary([s for s in here if s.group == group])
    return found


def compare(ours: Iterable[Spoken], theirs: Iterable[Spoken]) -> dict[str, dict[str, Any]]:
    """Word error rates of two runs over the utterances that both have, and their paired difference (theirs - ours).

    By condition, by group over all conditions, and of everything. A sentence counts once: what it was spoken as in
    several voices and layouts is drawn together. Of several takes in one condition the mean counts.
    """
    first, second = takes(ours), takes(theirs)
    parts: dict[str, list[tuple[Spoken, float, float]]] = {}
    for key, (s, errors) in second.items():
        if key in first:
            for name in (s.condition, f"all {s.group}", "all"):
                parts.setdefault(name, []).append((s, first[key][1], errors))
    return {name: difference(parts[name]) for name in sorted(parts, key=lambda n: (n.startswith("all"), n == "all"))}


def takes(spoken: Iterable[Spoken]) -> dict[tuple[str, str], tuple[Spoken, float]]:
    """By sentence and condition: one of its utterances, and the mean of their errors."""
    found: dict[tuple[str, str], list[Spoken]] = {}
    for s in spoken:
        found.setdefault((s.sentence, s.condition), []).append(s)
    return {key: (rows[0], sum(s.errors for s in rows) / len(rows)) for key, rows in found.items()}


def difference(pairs: Sequence[tuple[Spoken, float, float]]) -> dict[str, Any]:
    """Two word error rates and the second less the first with its 95 % interval, of utterances and their two errors."""
    sentences: dict[str, np.ndarray] = {}
    for s, first, second in pairs:
        sentences.setdefault(s.sentence, np.zeros(3))
        sentences[s.sentence] += first, second, s.words
    sums = np.array(list(sentences.values()))
    totals, whole = drawn(sums), sums.sum(0)
    low, high = np.percentile((totals[:, 1] - totals[:, 0]) / totals[:, 2], (2.5, 97.5))
    return {
        "utterances": len(pairs),
        "first": round(whole[0] / whole[2], 4),
        "second": round(whole[1] / whole[2], 4),
        "difference": round((whole[1] - whole[0]) / whole[2], 4),
        "interval": [round(low, 4), round(high, 4)],
    }
