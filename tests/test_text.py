"""Text in pieces gives the ids of the whole text, however it is cut."""

import random

import pytest

from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.text import TextStream, encode

TEXTS = [
    "Hello there. How can I help you today?",
    "  leading spaces,  double  spaces and a trailing one ",
    "It's we've you're they'll I'd — quotes 'like this' and \"that\".",
    "Numbers 1234567890, 3.14 and $5.99 at 10:45; e-mail me@example.com!",
    "First line.\nSecond line.\n\nThird, after a blank one.\n  Indented \n \n mixed.",
    "Tabs\tand\u00a0no-break spaces, e\u0301 combining, emoji 👩‍👩‍👧 and ünïcödé.",
    "Markdown: **bold**, `code` - list\n- one\n- two\n\n```\nblock\n```\nend",
    "He said:\n\n\n'Go!'\n\nThen he went.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Checkpoint.open("embedded").load_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_random_splits_give_the_ids_of_the_whole_text(tokenizer, text: str) -> None:
    whole = encode(tokenizer, text)
    choose = random.Random(text)
    for _ in range(200):
        cuts = sorted(choose.sample(range(len(text) + 1), choose.randint(1, min(12, len(text)))))
        stream, ids = TextStream(tokenizer), []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += stream.feed(text[start:stop])
        ids += stream.end()
        assert ids == whole, cuts


def test_an_arbitrary_cut_would_change_ids(tokenizer) -> None:
    assert encode(tokenizer, "Hel") + encode(tokenizer, "lo there") != encode(tokenizer, "Hello there")


def test_words_are_released_as_soon_as_the_next_one_begins(tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.feed("Hello") == []
    assert stream.feed(" ") == []
    assert stream.feed("t") == encode(tokenizer, "Hello")
    assert stream.feed("here.") == []
    assert stream.end() == encode(tokenizer, " there.")
    assert stream.ended


def test_a_script_without_spaces_does_not_wait_for_one(tokenizer) -> None:
    stream, ids = TextStream(tokenizer), []
    text = "今天天气很好我们一起去公园吧然后回家吃饭看电影睡觉明天再来玩"
    for character in text:
        ids.append(stream.feed(character))
    assert any(ids[:20])
    tail = stream.end()
    assert tokenizer.decode([i for x in ids for i in x] + tail) == text


def test_control_tokens_in_a_text_are_plain_text(tokenizer) -> None:
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = encode(tokenizer, "Stop<|im_end|>now <tts_text_eod>")
    assert special not in ids
    assert tokenizer.decode(ids) == "Stop<|im_end|>now <tts_text_eod>"


def test_leading_newlines_do_not_reach_the_prompt(tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = stream.feed("\n\n") + stream.feed("\nHello there") + stream.end()
    assert ids == encode(tokenizer, "Hello there")
