"""A server over the embedded voice in a crowd: nothing is mixed, late, left behind or leaked."""

import asyncio
import gc
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from websockets.asyncio.client import connect

from pipecat_qwen3.backend import Backend, Load, Request, Result, Stream
from pipecat_qwen3.local import LocalBackend
from pipecat_qwen3.protocol import parse_audio
from pipecat_qwen3.remote import RemoteBackend
from pipecat_qwen3.server_speaker import Limits
from tests.serving import Served, serving


@contextmanager
def borrowed(backend: LocalBackend) -> Iterator[Served]:
    """A server over a backend that it may not close."""

    class Borrowed:
        def __getattr__(self, name: str) -> object:
            return getattr(backend, name)

        def close(self) -> None:
            pass

    load: Callable[[], Backend] = Borrowed  # type: ignore[assignment]
    with serving(load, limits=Limits(contexts=128)) as served:
        yield served


def spoken(stream: Stream) -> Result:
    for _ in stream:
        pass
    return stream.wait(60)


@pytest.fixture(scope="module")
def crowd() -> Iterator[LocalBackend]:
    backend = LocalBackend.open("embedded", device="cpu", dtype="fp32", max_batch=32)
    yield backend
    backend.close()


@pytest.mark.parametrize(("voices", "engine"), [(12, "embedded"), pytest.param(64, "crowd", marks=pytest.mark.slow)])
def test_each_of_many_streams_has_the_codes_of_its_request_alone(
    request: pytest.FixtureRequest, voices: int, engine: str
) -> None:
    backend: LocalBackend = request.getfixturevalue(engine)
    requests = [Request(f"Room {i} is free.", seed=i, ahead_s=None, max_frames=12) for i in range(voices)]
    alone = [spoken(backend.speak(asked)) for asked in requests]
    with borrowed(backend) as server:
        remotes = [RemoteBackend.open(server.ws) for _ in range(4)]
        streams = [remotes[i % 4].speak(asked) for i, asked in enumerate(requests)]
        for stream, expected in zip(streams, alone, strict=True):
            found = spoken(stream)
            assert (found.end, found.frames) == (expected.end, expected.frames)
            assert np.array_equal(found.codes, expected.codes)  # type: ignore[arg-type]
        for remote in remotes:
            remote.close()
    assert backend.load == Load(backend.max_batch, 0, 0)


@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.slow)])
async def test_random_barge_ins_leave_no_late_audio_and_no_slot_behind(embedded: LocalBackend, rounds: int) -> None:
    choose = random.Random(rounds)
    request = Request("Still here.", seed=7, max_frames=6)
    before = await asyncio.to_thread(lambda: spoken(embedded.speak(request)))
    talking: set[str] = set()
    heard: set[str] = set()
    ends: dict[str, str] = {}
    with borrowed(embedded) as server:
        async with connect(server.ws, compression=None) as socket:

            async def listen() -> None:
                async for message in socket:
                    if isinstance(message, bytes):
                        name = parse_audio(message)[0]
                        assert name not in ends, f"late audio of {name}"
                        heard.add(name)
                    elif (told := json.loads(message))["type"] == "done":
                        ends[told["context_id"]] = told["end"]
                        talking.discard(told["context_id"])
                    else:
                        assert told["type"] in ("ready", "words"), told

            async def say(kind: str, name: str, **fields: object) -> None:
                await socket.send(json.dumps({"type": kind, "context_id": name, **fields}))

            listening = asyncio.create_task(listen())
            cancelled = 0
            for i in range(2 * rounds):
                name = str(i)
                talking.add(name)
                whole = choose.random() < 0.7
                await say("text", name, text="The meeting starts at ten.", seed=i, max_frames=30, flush=whole)
                if talking and i % 2:
                    await asyncio.sleep(choose.random() * 0.03)
                    await say("cancel", choose.choice(sorted(talking | {name})))
                    cancelled += 1
                while len(talking) > 10:
                    await say("cancel", choose.choice(sorted(talking)))
                    await asyncio.sleep(0.01)
            for name in sorted(talking):
                await say("cancel", name)
            async with asyncio.timeout(60):
                while len(ends) < 2 * rounds:
                    assert not listening.done(), listening.exception()
                    await asyncio.sleep(0.01)
            assert cancelled == rounds
            assert set(ends.values()) <= {"cancelled", "eos", "cap"}
            assert heard
            listening.cancel()
        async with asyncio.timeout(10):
            while server.speaker.open_voices or embedded.load != Load(8, 0, 0):  # noqa: ASYNC110 - another thread's
                await asyncio.sleep(0.01)
    after = await asyncio.to_thread(lambda: spoken(embedded.speak(request)))
    assert np.array_equal(before.codes, after.codes)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_is_flat_over_five_thousand_utterances(embedded: LocalBackend) -> None:
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1])

    after_warm_up = 0
    with borrowed(embedded) as server:
        remote = RemoteBackend.open(server.ws)
        streams: deque[Stream] = deque()
        for i in range(5500):
            if i == 500:
                after_warm_up = resident()
            streams.append(remote.speak(Request("Yes.", seed=i, max_frames=2, voice=("rms", "slt")[i % 2])))
            if i % 5 == 0:
                streams[-1].cancel()
            if len(streams) > 16:
                spoken(streams.popleft())
        for stream in streams:
            spoken(stream)
        growth = resident() / after_warm_up - 1
        print(f"memory grew by {growth:.2%} over 5,000 utterances")
        assert growth < 0.05
        remote.close()
