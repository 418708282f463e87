"""RemoteBackend against a real server on loopback: streams, errors, vanishing peers, barge-ins."""

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from pipecat_qwen3 import protocol
from pipecat_qwen3 import remote as remote_module
from pipecat_qwen3.backend import Backend, Chunk, Request, Stream
from pipecat_qwen3.errors import (
    BadRequestError,
    ConnectionFailedError,
    EngineError,
    OverloadedError,
    TTSError,
    UnauthorizedError,
    UnknownNameError,
)
from pipecat_qwen3.remote import RemoteBackend
from pipecat_qwen3.server_speaker import Limits
from tests.fakes import FakeBackend
from tests.serving import Served, serving


@pytest.fixture
def fake() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def server(fake: FakeBackend) -> Iterator[Served]:
    with serving(lambda: fake) as served:
        yield served


@pytest.fixture
def remote(server: Served) -> Iterator[RemoteBackend]:
    backend = RemoteBackend.open(server.ws)
    yield backend
    backend.close()


def pcm(chunks: list[Chunk]) -> np.ndarray:
    at = 0
    for chunk in chunks:
        assert chunk.first_sample == at
        at += len(chunk.pcm)
    return np.concatenate([chunk.pcm for chunk in chunks])


async def pieces(*texts: str) -> AsyncIterator[str]:
    for text in texts:
        yield text
        await asyncio.sleep(0.01)


class Wire:
    """A cable to a server: when it is cut, nothing passes and nobody is told."""

    def __init__(self, port: int) -> None:
        self.cut = threading.Event()
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.ws = f"ws://127.0.0.1:{self._listener.getsockname()[1]}/v1/audio/speech/ws"

    def __enter__(self) -> "Wire":
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for end in [self._listener, *self._ends]:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, sink)))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.cut.is_set():
                    sink.sendall(data)


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_is_a_backend_that_knows_what_the_server_knows(remote: RemoteBackend) -> None:
    assert isinstance(remote, Backend)
    assert (remote.voices, remote.languages, remote.model) == (("rms", "slt"), ("english",), "fake")
    assert remote.ready


def test_speech_words_and_result_are_those_of_the_server(fake: FakeBackend, remote: RemoteBackend) -> None:
    stream = remote.speak(Request("Hello there, friend.", voice="slt", seed=5))
    chunks = list(stream)
    assert np.array_equal(pcm(chunks), fake.speech("Hello there, friend."))
    assert [word for chunk in chunks for word in chunk.words] == fake.words("Hello there, friend.")
    assert stream.result is not None
    assert (stream.result.end, stream.result.seed, stream.result.error) == ("eos", 5, None)
    assert stream.result.frames * 1920 == len(pcm(chunks))


def test_every_field_of_a_request_arrives(fake: FakeBackend, remote: RemoteBackend) -> None:
    asked = Request(
        "Hello.", "rms", "english", "softly", "streaming", 2**63 - 1, True, 0.5, 3, 0.25, 1.5, 0.75, 4, 0.125, 9,
        (2, 3), None, True, 2.5,
    )  # fmt: skip
    list(remote.speak(asked))
    assert fake.requests == [asked]


async def test_text_may_come_in_pieces_and_be_cut_inside_an_emoji(fake: FakeBackend, remote: RemoteBackend) -> None:
    stream = remote.speak(Request(pieces("Hel", "lo \ud83d", "\ude00 the", "re")))
    chunks = [chunk async for chunk in stream]
    assert np.array_equal(pcm(chunks), fake.speech("Hello 😀 there"))


async def test_a_failing_text_ends_its_voice_on_both_sides(fake: FakeBackend, remote: RemoteBackend) -> None:
    async def broken() -> AsyncIterator[str]:
        yield "Hello"
        raise ValueError("the model is gone")

    with pytest.raises(BadRequestError, match="the model is gone"):
        _ = [chunk async for chunk in remote.speak(Request(broken()))]
    async with asyncio.timeout(5):
        while not fake.cancelled:  # noqa: ASYNC110 - the server knows no event of this loop
            await asyncio.sleep(0.01)


def test_what_the_server_refuses_is_raised_as_what_it_is(fake: FakeBackend, remote: RemoteBackend) -> None:
    with pytest.raises(UnknownNameError, match="nobody"):
        list(remote.speak(Request("Hello.", voice="nobody")))
    with pytest.raises(BadRequestError, match="empty"):
        remote.speak(Request("  "))
    with pytest.raises(BadRequestError, match="seed"):
        remote.speak(Request("Hello.", seed=-1))
    fake.fail = OverloadedError("no room")
    with pytest.raises(OverloadedError, match="no room"):
        list(remote.speak(Request("Hello.")))
    fake.fail, fake.fail_after = EngineError("it broke"), 2
    stream = remote.speak(Request("Hello there."))
    with pytest.raises(EngineError, match="it broke"):
        list(stream)


def test_many_voices_share_a_socket_without_mixing(fake: FakeBackend, remote: RemoteBackend) -> None:
    fake.pace = 0.05
    texts = [f"This is voice number {i}" + "." * (i % 7) for i in range(40)]
    streams = [remote.speak(Request(text, seed=i)) for i, text in enumerate(texts)]
    for text, stream in zip(texts, streams, strict=True):
        chunks = list(stream)
        assert np.array_equal(pcm(chunks), fake.speech(text))
        assert [word for chunk in chunks for word in chunk.words] == fake.words(text)


def test_after_a_cancel_nothing_comes_and_the_server_knows(
    fake: FakeBackend, remote: RemoteBackend, server: Served
) -> None:
    fake.pace = 1.0
    stream = remote.speak(Request("A long sentence that will not be heard to its end."))
    next(iter(stream))
    stream.cancel()
    assert list(stream) == []
    until(lambda: fake.cancelled and not server.speaker.open_voices)
    assert stream.wait(5).end == "cancelled"


async def test_a_voice_that_the_server_never_heard_of_ends_at_its_cancel(remote: RemoteBackend) -> None:
    async def never() -> AsyncIterator[str]:
        await asyncio.sleep(60)
        yield "nothing"

    stream = remote.speak(Request(never()))
    until(lambda: bool(remote._contexts))
    stream.cancel()
    until(lambda: not remote._contexts)
    assert stream.wait(1).end == "cancelled"


def barge_in(remote: RemoteBackend, rounds: int, seed: int) -> None:
    choose = random.Random(seed)
    live: list[Stream] = []
    for i in range(rounds):
        live.append(remote.speak(Request(f"Sentence number {i} of many, and it is not short.", seed=i)))
        time.sleep(choose.random() * 0.01)
        if len(live) > 6:
            stream = live.pop(choose.randrange(len(live)))
            for _ in range(choose.randrange(3)):
                next(iter(stream), None)
            stream.cancel()
            assert next(iter(stream), None) is None
    for stream in live:
        stream.cancel()


def test_random_barge_ins_leave_no_voice_behind(fake: FakeBackend, remote: RemoteBackend, server: Served) -> None:
    fake.pace = 0.3
    barge_in(remote, 60, seed=1)
    until(lambda: not server.speaker.open_voices and not remote._contexts, 20)
    assert {stream.result.end for stream in fake.streams if stream.result} <= {"cancelled", "eos"}
    fake.pace = None
    assert np.array_equal(pcm(list(remote.speak(Request("Still here.")))), fake.speech("Still here."))


def test_a_client_that_vanishes_frees_its_voices(fake: FakeBackend, server: Served) -> None:
    fake.pace = 1.0
    remote = RemoteBackend.open(server.ws)
    for _ in range(5):
        remote.speak(Request("A long sentence that nobody will hear to its end."))
    until(lambda: server.speaker.open_voices == 5)
    remote.close()
    until(lambda: not server.speaker.open_voices)
    assert len(fake.cancelled) == 5


def test_when_the_server_goes_away_every_voice_errors_within_a_second(fake: FakeBackend, server: Served) -> None:
    fake.pace = 2.0
    remote = RemoteBackend.open(server.ws)
    streams = [remote.speak(Request("A long sentence that will break off.")) for _ in range(3)]
    next(iter(streams[0]))
    server.server.should_exit = server.server.force_exit = True
    until(lambda: not remote.ready)
    for stream in streams:
        assert isinstance(stream.wait(1).error, ConnectionFailedError)
    with pytest.raises(ConnectionFailedError):
        list(streams[0])
    began = time.monotonic()
    with pytest.raises(ConnectionFailedError, match="no connection"):
        list(remote.speak(Request("Anybody there?")))
    assert time.monotonic() - began < 5
    remote.close()


def test_it_connects_again_when_the_server_is_back(fake: FakeBackend) -> None:
    with serving(lambda: fake) as first:
        remote = RemoteBackend.open(first.ws)
        list(remote.speak(Request("Hello.")))
    until(lambda: not remote.ready)
    again = FakeBackend(voices=("ryan",))
    with serving(lambda: again, port=first.port):
        assert np.array_equal(pcm(list(remote.speak(Request("Hello.")))), again.speech("Hello."))
        assert remote.voices == ("ryan",)
        remote.close()


def test_a_server_that_neither_answers_nor_closes_is_given_up_and_found_again(
    fake: FakeBackend, server: Served
) -> None:
    fake.pace = 1.0
    with Wire(server.port) as wire:
        remote = RemoteBackend.open(wire.ws, ping_s=0.2)
        stream = remote.speak(Request("A long sentence whose end nobody will hear."))
        next(iter(stream))
        wire.cut.set()
        assert isinstance(error := stream.wait(20).error, ConnectionFailedError)
        assert "ping" in str(error)
        assert not remote.ready
        wire.cut.clear()
        fake.pace = None
        assert np.array_equal(pcm(list(remote.speak(Request("Hello.")))), fake.speech("Hello."))
        remote.close()


def farewell(peer: ServerConnection) -> None:
    """A server that greets and goes at once."""
    peer.send(json.dumps(protocol.hello("fake", ("rms",), ("english",), 24000)))
    peer.close(1001, "connect again")


def refusal(peer: ServerConnection) -> None:
    """One that has nothing to say."""
    peer.close(1011, "no")


@pytest.mark.parametrize("behaviour", [farewell, refusal])
def test_it_does_not_hammer_a_server_that_sends_it_away(
    monkeypatch: pytest.MonkeyPatch, behaviour: Callable[[ServerConnection], None]
) -> None:
    monkeypatch.setattr(remote_module, "BACKOFF_S", (0.01, 0.01, 600.0))
    calls: list[int] = []

    def counted(peer: ServerConnection) -> None:
        calls.append(1)
        behaviour(peer)

    with serve(counted, "127.0.0.1", 0) as hostile:
        thread = threading.Thread(target=hostile.serve_forever)
        thread.start()
        remote = RemoteBackend(f"ws://127.0.0.1:{hostile.socket.getsockname()[1]}")
        assert isinstance(remote.speak(Request("Anybody there?")).wait(20).error, ConnectionFailedError)
        until(lambda: len(calls) == 3)
        time.sleep(0.3)
        assert len(calls) == 3
        # Who wants to speak does not wait for ten minutes.
        assert isinstance(remote.speak(Request("And now?")).wait(20).error, ConnectionFailedError)
        assert len(calls) == 4
        remote.close()
        hostile.shutdown()
        thread.join()


def test_a_server_that_is_full_or_leaves_is_overloaded(server: Served) -> None:
    server.speaker.draining = True
    with pytest.raises(OverloadedError, match="429"):
        RemoteBackend.open(server.ws)


def test_nobody_there_and_a_wrong_key_are_said_so() -> None:
    with pytest.raises(ConnectionFailedError, match="no connection"):
        RemoteBackend.open("ws://127.0.0.1:9/v1/audio/speech/ws")
    with pytest.raises(BadRequestError, match="ws://"):
        RemoteBackend("http://127.0.0.1")
    with serving(FakeBackend, api_key="right") as served:
        with pytest.raises(UnauthorizedError):
            RemoteBackend.open(served.ws, api_key="wrong")
        RemoteBackend.open(served.ws, api_key="right").close()


def test_whatever_keeps_it_from_connecting_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> None:
        raise ImportError("connecting through a SOCKS proxy requires python-socks")

    monkeypatch.setattr(remote_module, "connect", connect)
    with pytest.raises(ConnectionFailedError, match=r"no connection to ws://localhost:1.*python-socks"):
        RemoteBackend.open("ws://localhost:1")


def test_closing_ends_everything_and_may_be_repeated(fake: FakeBackend, server: Served) -> None:
    fake.pace = 1.0
    remote = RemoteBackend.open(server.ws)
    stream = remote.speak(Request("A long sentence that will break off."))
    remote.close()
    remote.close()
    with pytest.raises(EngineError):
        list(stream)
    with pytest.raises(EngineError):
        remote.speak(Request("Hello."))


def test_a_draining_server_finishes_its_voices_and_takes_no_new_ones(fake: FakeBackend, server: Served) -> None:
    fake.pace = 0.5
    remote, idle = RemoteBackend.open(server.ws), RemoteBackend.open(server.ws)
    stream = remote.speak(Request("A sentence that may be finished."))
    first = next(iter(stream))
    server.server.handle_exit(15, None)
    until(lambda: not idle.ready)  # nobody speaks there: it may go elsewhere at once
    with pytest.raises(OverloadedError, match="shutting down"):
        list(remote.speak(Request("Too late.")))
    rest = list(stream)
    assert np.array_equal(pcm([first, *rest]), fake.speech("A sentence that may be finished."))
    until(lambda: not remote.ready)
    idle.close()
    remote.close()


def test_a_text_that_crosses_the_servers_farewell_is_spoken_by_the_next_one(fake: FakeBackend) -> None:
    with serving(lambda: fake, limits=Limits(socket_s=0.2)) as served:
        remote = RemoteBackend.open(served.ws)
        for i in range(40):  # some of them cross it
            assert np.array_equal(pcm(list(remote.speak(Request("Hello.")))), fake.speech("Hello."))
            time.sleep(0.003 * (i % 7))
        remote.close()


def test_the_error_tree_is_complete_on_the_wire() -> None:
    def tree(kind: type[TTSError]) -> set[type[TTSError]]:
        return {kind}.union(*(tree(child) for child in kind.__subclasses__()))

    assert {kind for kind in tree(TTSError) if kind.__module__.startswith("pipecat_qwen3")} == set(
        protocol.ERRORS.values()
    )
