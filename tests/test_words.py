"""Estimated word times are monotone, complete, and never beyond the audio."""

import itertools
import random

import pytest

from pipecat_qwen3.words import Rate, WordTimes

TEXT = "The quick brown fox jumps over the lazy dog, doesn't it?"


def run(text: str, seconds: float, step: float, natural: bool = True) -> list[tuple[str, float, float]]:
    """(word, time, audio produced when it was given out) of an utterance of `seconds`, in chunks of `step`."""
    words = WordTimes(Rate())
    words.feed(text)
    words.end()
    out, now = [], 0.0
    while now < seconds:
        now = min(seconds, now + step)
        out += [(w, t, now) for w, t in words.until(now)]
    return out + [(w, t, seconds) for w, t in words.rest(seconds, natural)]


@pytest.mark.parametrize("seconds", [0.4, 2.0, 3.7, 12.0])
@pytest.mark.parametrize("step", [0.08, 0.64, 20.0])
def test_every_word_comes_once_in_order_within_the_audio(seconds: float, step: float) -> None:
    out = run(TEXT, seconds, step)
    assert [w for w, _, _ in out] == TEXT.split()
    times = [t for _, t, _ in out]
    assert times == sorted(times)
    assert all(0 <= t <= made for _, t, made in out)


def test_fast_speech_spreads_the_rest_over_the_remaining_audio() -> None:
    out = run(TEXT, 1.0, 0.08)
    late = [t for _, t, made in out if made == 1.0 and t > 0.9]
    assert len(set(late)) == len(late)


def test_cut_speech_gives_no_words_that_were_not_reached() -> None:
    spoken = [w for w, _, _ in run(TEXT, 1.0, 0.08, natural=False)]
    assert spoken == TEXT.split()[: len(spoken)]
    assert 0 < len(spoken) < len(TEXT.split())


def test_a_growing_text_gives_out_whole_words_only() -> None:
    words = WordTimes(Rate())
    words.feed("Hel")
    assert words.until(9.0) == ()
    words.feed("lo wor")
    assert [w for w, _ in words.until(9.0)] == ["Hello"]
    words.feed("ld")
    words.end()
    assert [w for w, _ in words.until(9.0)] == ["world"]


def test_scripts_without_spaces_are_split_by_character() -> None:
    assert [w for w, _, _ in run("今天，天气好。", 3.0, 0.08)] == ["今", "天，", "天", "气", "好。"]


def test_the_rate_learns_from_natural_ends() -> None:
    rate = Rate()
    for _ in range(20):
        words = WordTimes(rate)
        words.feed(TEXT)
        words.end()
        words.rest(len(TEXT) / 10, natural=True)
    assert rate.characters_per_second == pytest.approx(10, abs=0.1)
    rate.correct(1000, 0.01)
    assert rate.characters_per_second == pytest.approx(10, abs=0.1)


def test_random_texts_and_lengths_keep_the_promises() -> None:
    choose = random.Random(0)
    for _ in range(300):
        words = ["".join(choose.choices("abcde.,", k=choose.randint(1, 9))) for _ in range(choose.randint(1, 20))]
        text = " ".join(words)
        seconds = choose.uniform(0.08, 10)
        out = run(text, seconds, choose.choice([0.08, 0.16, 0.64]))
        assert [w for w, _, _ in out] == text.split()
        assert all(a[1] <= b[1] + 1e-9 for a, b in itertools.pairwise(out))
        assert all(t <= made + 1e-9 for _, t, made in out)
