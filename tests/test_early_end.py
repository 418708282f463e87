"""A talker that ends its speech before it has read all of the text: the rest is spoken all the same."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch

from pipecat_qwen3.backend import Load, Request, Stream
from pipecat_qwen3.local import LocalBackend

TEXT = "Your table is booked for two at eight. Is there anything else that I can do for you?"


@pytest.fixture
def backend() -> Iterator[LocalBackend]:
    opened = LocalBackend.open("embedded", device="cpu", dtype="fp32", max_batch=4)
    yield opened
    opened.close()


class Talker:
    """The engine's step, which ends the speech at the given frames of all that it makes, and keeps what it read."""

    def __init__(self, backend: LocalBackend, *ends: int) -> None:
        self._step, self._eos = backend.engine.step.step, backend.config.ids.codec_eos
        self._texts, self._ends = backend.engine.prompter.texts, ends
        self.read: list[int] = []
        self.asked: list[int] = []
        self.frames = 0
        backend.engine.step.step = self.step  # type: ignore[method-assign]
        backend.engine.prompter.texts = self.texts  # type: ignore[method-assign]

    def texts(self, ids: list[int]) -> torch.Tensor:
        self.asked = ids
        return self._texts(ids)

    def step(self, rows: list[int], text: torch.Tensor) -> torch.Tensor:
        self.read += self.asked
        codes = self._step(rows, text)
        self.frames += 1
        if self.frames in self._ends:
            codes[:, 0] = self._eos
        return codes


async def pieces(*texts: str) -> AsyncIterator[str]:
    for text in texts:
        yield text


async def heard(stream: Stream) -> list[str]:
    return [word for chunk in [chunk async for chunk in stream] for word, _ in chunk.words]


def text_read(backend: LocalBackend, talker: Talker) -> str:
    ids = backend.config.ids
    return str(backend.tokenizer.decode([i for i in talker.read if i not in (ids.tts_eos, ids.tts_pad)]))


async def test_what_was_not_spoken_of_a_text_is_spoken_from_a_new_prompt(
    backend: LocalBackend, caplog: pytest.LogCaptureFixture
) -> None:
    talker = Talker(backend, 6, 13)
    stream = backend.speak(Request(pieces(TEXT), seed=7))
    assert await heard(stream) == TEXT.split()
    assert stream.result
    assert (stream.result.end, stream.result.restarts) == ("eos", 2)
    assert stream.result.frames == talker.frames - 3  # the end of speech is no frame
    read = text_read(backend, talker)
    assert read.startswith("Your table is booked for")  # of which half a second was spoken: from there on once more
    assert read.endswith(" Is there anything else that I can do for you?")
    assert all(word in read for word in TEXT.split())
    assert talker.read.count(backend.config.ids.tts_eos) == 1
    assert sum("ended before its text" in record.message for record in caplog.records) == 2
    assert backend.load == Load(4, 0, 0)


async def test_text_that_comes_after_an_early_end_is_spoken_too(backend: LocalBackend) -> None:
    talker = Talker(backend, 3)
    more = asyncio.Event()

    async def text() -> AsyncIterator[str]:
        yield "Your table is booked "
        await more.wait()
        yield "for two."

    stream = backend.speak(Request(text(), seed=7))
    hearing = asyncio.create_task(heard(stream))
    async with asyncio.timeout(10):
        # Three of the first prompt, two of the second, which waits for more.
        while talker.frames < 5:  # noqa: ASYNC110 - the talker's thread knows no event of ours
            await asyncio.sleep(0.01)
    more.set()
    assert await hearing == ["Your", "table", "is", "booked", "for", "two."]
    assert stream.result
    assert (stream.result.end, stream.result.restarts) == ("eos", 1)
    assert text_read(backend, talker).endswith("is booked for two.")


async def test_a_full_stop_that_is_left_over_is_not_spoken_alone(backend: LocalBackend) -> None:
    talker = Talker(backend, 3)
    end = asyncio.Event()

    async def text() -> AsyncIterator[str]:
        yield "Yes ... "
        yield "... "
        await end.wait()

    stream = backend.speak(Request(text(), seed=7))
    hearing = asyncio.create_task(heard(stream))
    async with asyncio.timeout(10):
        while talker.frames < 3:  # noqa: ASYNC110 - the talker's thread knows no event of ours
            await asyncio.sleep(0.01)
    end.set()
    assert await hearing == ["Yes", "...", "..."]
    assert stream.result
    assert (stream.result.end, stream.result.frames) == ("eos", 2)
    assert backend.load == Load(4, 0, 0)


@pytest.mark.parametrize("layout", ["whole", "streaming"])
async def test_a_text_given_as_a_whole_ends_where_the_talker_ends_it(backend: LocalBackend, layout: Any) -> None:
    Talker(backend, 6)
    stream = backend.speak(Request(TEXT, seed=7, layout=layout))
    await heard(stream)
    assert stream.result
    assert (stream.result.end, stream.result.frames, stream.result.restarts) == ("eos", 5, 0)
