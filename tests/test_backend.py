"""Stream: hand-over between threads and event loops, cancel, errors, results."""

import asyncio
import threading
import time

import numpy as np
import pytest

from pipecat_qwen3.backend import Chunk, Result, Stream
from pipecat_qwen3.errors import EngineError, TTSError


def chunk(n: int = 3) -> Chunk:
    return Chunk(np.zeros(n, np.int16), 0)


async def test_chunks_from_another_thread_wake_the_event_loop() -> None:
    stream = Stream(seed=3)

    def produce() -> None:
        for n in (1, 2, 3):
            time.sleep(0.02)
            stream.put(chunk(n))
        stream.finish(Result("eos", 3, 3))

    thread = threading.Thread(target=produce)
    thread.start()
    assert [len(c.pcm) async for c in stream] == [1, 2, 3]
    assert stream.result == Result("eos", 3, 3)
    thread.join()


def test_chunks_from_another_thread_wake_a_thread() -> None:
    stream = Stream()
    threading.Timer(0.02, lambda: (stream.put(chunk()), stream.finish(Result("cap", 1, 0)))).start()
    assert len(list(stream)) == 1
    assert stream.wait(1).end == "cap"


async def test_nothing_is_handed_out_after_a_cancel() -> None:
    flags: list[str] = []
    stream = Stream(on_cancel=lambda: flags.append("cancelled"))
    stream.put(chunk())
    stream.put(chunk())
    await anext(stream)
    stream.cancel()
    stream.cancel()
    stream.put(chunk())
    assert [c async for c in stream] == []
    assert flags == ["cancelled"]


async def test_a_cancel_wakes_whoever_waits() -> None:
    stream = Stream()
    waiting = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0.01)
    stream.cancel()
    assert await asyncio.wait_for(waiting, 1) is None


async def test_abandoning_the_iteration_leaves_nothing_behind() -> None:
    stream = Stream()
    waiting = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.sleep(0)
    stream.put(chunk())
    stream.finish(Result("eos", 1, 0))
    assert [len(c.pcm) async for c in stream] == [3]


async def test_an_error_is_raised_after_the_audio_that_came_before_it() -> None:
    stream = Stream()
    stream.put(chunk())
    stream.finish(Result("error", 1, 0, EngineError("it broke")))
    heard = []
    with pytest.raises(EngineError, match="it broke"):
        async for c in stream:
            heard.append(c)
    assert len(heard) == 1


def test_the_first_result_counts() -> None:
    stream = Stream()
    stream.finish(Result("eos", 1, 0))
    stream.finish(Result("error", 2, 0, EngineError("late")))
    assert stream.wait(1).end == "eos"


def test_waiting_has_a_limit() -> None:
    with pytest.raises(TimeoutError):
        Stream().wait(0.01)


def test_feeding_whole_text_is_refused() -> None:
    with pytest.raises(TTSError, match="whole text"):
        Stream().feed("more")
