"""The socket protocol word by word, with a client that knows nothing of ours; nari's too; and fuzz."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from pipecat_qwen3 import protocol
from pipecat_qwen3.backend import Request
from pipecat_qwen3.errors import BadRequestError, EngineError
from pipecat_qwen3.server_speaker import Limits
from tests.fakes import FakeBackend
from tests.serving import Served, serving

HELLO = "Hello there, friend."


@pytest.fixture
def fake() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def server(fake: FakeBackend) -> Iterator[Served]:
    with serving(lambda: fake) as served:
        yield served


class Client:
    """Sends JSON, sorts what comes by context."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.audio: dict[str, bytes] = {}
        self.told: list[dict[str, Any]] = []

    def send(self, kind: str, context: str | None = None, **fields: Any) -> None:
        where = {} if context is None else {"context_id": context}
        self.socket.send(json.dumps({"type": kind, **where, **fields}))

    def until(self, kind: str, context: str | None = None) -> dict[str, Any]:
        while True:
            message = self.socket.recv(timeout=10)
            if isinstance(message, bytes):
                name = message[1 : 1 + message[0]].decode()
                self.audio[name] = self.audio.get(name, b"") + message[1 + message[0] :]
                continue
            self.told.append(json.loads(message))
            if self.told[-1]["type"] == kind and context in (None, self.told[-1].get("context_id")):
                return self.told[-1]

    def heard(self, context: str) -> np.ndarray:
        return np.frombuffer(self.audio[context], "<i2")

    def words(self, context: str) -> list[tuple[str, float]]:
        told = [message for message in self.told if message["type"] == "words" and message["context_id"] == context]
        return [(word, at) for message in told for word, at in message["words"]]


@contextmanager
def client(server: Served, **options: Any) -> Iterator[Client]:
    with connect(server.ws, compression=None, max_size=None, **options) as socket:
        yield Client(socket)


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_server_speaks_first_and_says_what_it_is(server: Served) -> None:
    with client(server) as it:
        assert it.until("ready") == {
            "type": "ready",
            "protocol": 1,
            "model": "fake",
            "voices": ["rms", "slt"],
            "languages": ["english"],
            "sample_rate": 24000,
        }


def test_the_subprotocol_is_confirmed_to_those_who_offer_it(server: Served) -> None:
    with client(server, subprotocols=["pipecat-qwen3.v1"]) as it:
        assert it.socket.subprotocol == "pipecat-qwen3.v1"
    with client(server) as it:
        assert it.socket.subprotocol is None


def test_a_text_with_its_flush_is_spoken_with_words_and_done(fake: FakeBackend, server: Served) -> None:
    with client(server) as it:
        it.send("text", "a", text=HELLO, flush=True, voice="alloy", seed=7, codes=True)
        done = it.until("done", "a")
        assert np.array_equal(it.heard("a"), fake.speech(HELLO))
        assert it.words("a") == [(word, round(at, 4)) for word, at in fake.words(HELLO)]
        assert done["end"] == "eos"
        assert [(u["end"], u["seed"], u["frames"] * 1920) for u in done["utterances"]] == [
            ("eos", 7, len(fake.speech(HELLO)))
        ]
    assert fake.requests == [Request(HELLO, voice="rms", seed=7)]


def test_text_in_pieces_is_one_utterance(fake: FakeBackend, server: Served) -> None:
    with client(server) as it:
        for piece in ("Hel", "lo the", "re, friend."):
            it.send("text", "a", text=piece)
        it.send("flush", "a")
        it.until("done", "a")
        assert np.array_equal(it.heard("a"), fake.speech(HELLO))
    assert len(fake.requests) == 1


def test_other_settings_in_the_middle_begin_another_utterance_of_the_context(fake: FakeBackend, server: Served) -> None:
    with client(server) as it:
        it.send("text", "a", text="Hello there. ", voice="rms")
        it.send("text", "a", text="How are ", voice="slt")
        it.send("text", "a", text="you?", voice="slt", flush=True)
        done = it.until("done", "a")
        first, second = fake.speech("Hello there. "), fake.speech("How are you?")
        assert np.array_equal(it.heard("a"), np.concatenate([first, second]))
        later = [(word, round(at + len(first) / 24000, 4)) for word, at in fake.words("How are you?")]
        assert it.words("a") == [*((word, round(at, 4)) for word, at in fake.words("Hello there. ")), *later]
        assert len(done["utterances"]) == 2
    assert [request.voice for request in fake.requests] == ["rms", "slt"]


def test_contexts_of_one_socket_are_spoken_side_by_side(fake: FakeBackend, server: Served) -> None:
    fake.pace = 0.2
    with client(server) as it:
        texts = {f"context-{i}": f"This is number {i}." for i in range(20)}
        for name, text in texts.items():
            it.send("text", name, text=text, flush=True)
        for _ in texts:
            it.until("done")
        for name, text in texts.items():
            assert np.array_equal(it.heard(name), fake.speech(text))


def test_a_cancelled_context_is_silent_at_once_and_its_name_is_free(fake: FakeBackend, server: Served) -> None:
    fake.pace = 1.0
    with client(server) as it:
        it.send("text", "a", text="A sentence that will not be heard to its end.")
        it.send("flush", "a")
        it.until("words", "a")
        it.send("cancel", "a")
        assert it.until("done", "a")["end"] == "cancelled"
        until(lambda: not server.speaker.open_voices)
        before = len(it.audio["a"])
        fake.pace = None
        it.send("text", "a", text="Bye.", flush=True)
        it.until("done", "a")
        assert np.array_equal(np.frombuffer(it.audio["a"][before:], "<i2"), fake.speech("Bye."))


def test_flush_and_cancel_of_what_is_over_or_never_was_are_ignored(server: Served) -> None:
    with client(server) as it:
        it.until("ready")
        it.send("flush", "nobody")
        it.send("cancel", "nobody")
        it.send("ping", id=7)
        assert it.until("pong") == {"type": "pong", "id": 7}
        assert [message["type"] for message in it.told] == ["ready", "pong"]


def test_a_context_without_text_is_done_without_audio(server: Served) -> None:
    with client(server) as it:
        it.send("text", "a", text="  ", flush=True)
        assert it.until("done", "a")["utterances"] == []


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('"x"', "object"),
        ("{}", "type"),
        ('{"type":"sing"}', "sing"),
        ('{"type":"text"}', "context_id"),
        ('{"type":"text","context_id":"a"}', "text: Field required"),
        ('{"type":"text","context_id":"a","text":7}', "string"),
        ('{"type":"text","context_id":"a","text":"x","speed":2}', "no field 'speed'"),
        ('{"type":"text","context_id":"a","text":"x","voice":3}', "voice"),
        ('{"type":"text","context_id":"a","text":"x","seed":-1}', "seed"),
        ('{"type":"text","context_id":"","text":"x"}', "context_id"),
        ('{"type":"text","context_id":"' + "x" * 65 + '","text":"x"}', "context_id"),
        ('{"type":"text","context_id":"' + "ö" * 64 + '","text":"x"}', "64 bytes"),
        ('{"type":"text","context_id":"a","text":"\\ud800"}', "hex escape"),
        ('{"type":"text","context_id":"a\\ud800","text":"x"}', "hex escape"),
        ('{"type":"text","context_id":"a","text":"x","lead_s":61}', "lead_s"),
        ('{"type":"flush","context_id":"a","text":"x"}', "no field 'text'"),
        ('{"type":"ping","id":[]}', "id"),
        ("[" * 10000, "recursion"),
    ],
)
def test_a_message_that_is_none_is_answered_with_what_is_wrong(server: Served, message: str, says: str) -> None:
    with client(server) as it:
        it.until("ready")
        it.socket.send(message)
        error = it.until("error")
        assert error["code"] == "bad_request"
        assert says in error["message"]
        assert "\n" not in error["message"]
        it.send("ping")
        it.until("pong")  # and the socket lives on
    with pytest.raises(BadRequestError):
        protocol.parse(message)


def test_a_wrong_message_ends_its_context_and_no_other(fake: FakeBackend, server: Served) -> None:
    fake.pace = 0.3
    with client(server) as it:
        it.send("text", "a", text="Hello there. This breaks off.")
        it.send("text", "b", text=HELLO, flush=True)
        it.send("text", "a", text="x", nonsense=1)
        assert it.until("error", "a")["code"] == "bad_request"
        it.send("text", "a", text="What the client sent before it knew.")
        it.until("done", "b")
        assert np.array_equal(it.heard("b"), fake.speech(HELLO))
        it.send("cancel", "a")  # now it knows, and the name is free
        it.send("text", "a", text="Again.", flush=True)
        it.until("done", "a")
        assert len(fake.requests) == 3


def test_an_engine_that_fails_is_an_error_of_the_context(fake: FakeBackend, server: Served) -> None:
    fake.fail, fake.fail_after = EngineError("it broke"), 2
    with client(server) as it:
        it.send("text", "a", text=HELLO, flush=True)
        assert it.until("error", "a") == {"type": "error", "context_id": "a", "code": "engine", "message": "it broke"}


def test_limits_hold(fake: FakeBackend) -> None:
    fake.pace = 5.0
    with serving(lambda: fake, limits=Limits(contexts=2, text=30, body=2000)) as server, client(server) as it:
        for name in ("a", "b", "c"):
            it.send("text", name, text="x")
        assert it.until("error", "c")["code"] == "overloaded"
        it.send("text", "a", text="y" * 30)
        assert "30 characters" in it.until("error", "a")["message"]
        it.socket.send("x" * 2001)
        with pytest.raises(ConnectionClosed, match="1009"):
            it.until("pong")
        until(lambda: not server.speaker.open_voices)


def test_a_client_that_stops_reading_is_dropped_and_its_voices_freed(fake: FakeBackend) -> None:
    fake.seconds_per_char = 30.0
    with serving(lambda: fake, limits=Limits(write_s=0.5)) as server:
        with connect(server.ws, compression=None, max_queue=1, max_size=None) as socket:
            socket.send(json.dumps({"type": "text", "context_id": "a", "text": HELLO, "flush": True}))
            until(lambda: server.speaker.open_voices == 1)
            until(lambda: server.speaker.open_voices == 0)
            socket.socket.close()
        with client(server) as it:
            it.send("text", "a", text="Hello.", max_frames=2, flush=True)
            it.until("done", "a")


def test_a_wrong_key_is_refused_before_the_socket_opens() -> None:
    with serving(FakeBackend, api_key="right") as server:
        with pytest.raises(InvalidStatus) as refused:
            connect(server.ws, additional_headers={"Authorization": "Bearer wrong"})
        assert refused.value.response.status_code == 401
        with client(server, additional_headers={"Authorization": "Bearer right"}) as it:
            it.until("ready")


# -- nari.speech.v1 ----------------------------------------------------------------------------------------------

NARI = {"subprotocols": ["nari.speech.v1"]}


def nari_text(it: Client, *pieces: str) -> None:
    for sequence, piece in enumerate(pieces):
        it.send("input_text.append", sequence=sequence, text=piece)
        assert it.socket.recv(timeout=10)


def nari_answer(it: Client) -> tuple[list[dict[str, Any]], np.ndarray]:
    told, audio = [], b""
    with pytest.raises(ConnectionClosed):
        while True:
            message = it.socket.recv(timeout=10)
            if isinstance(message, bytes):
                audio += message
            else:
                told.append(json.loads(message))
    return told, np.frombuffer(audio, "<i2")


def test_naris_own_example_works(fake: FakeBackend, server: Served) -> None:
    with client(server, **NARI) as it:
        assert it.socket.subprotocol == "nari.speech.v1"
        created = it.until("session.created")
        assert created["audio"] == {"encoding": "pcm_s16le", "sample_rate": 24000, "channels": 1}
        it.send("request.start", model="fake", voice="slt", language="english", seed=3, subtalker_top_k=5)
        it.until("request.configured")
        it.send("input_text.append", sequence=0, text="Hello there, ")
        it.send("input_text.append", sequence=1, text="friend.")
        it.send("input_text.end", sequence=2)
        told, audio = nari_answer(it)
    acknowledged = [(m["event"], m["sequence"]) for m in told if m["type"] == "input_text.ack"]
    assert acknowledged == [("input_text.append", 0), ("input_text.append", 1), ("input_text.end", 2)]
    assert [m["type"] for m in told if m["type"] != "input_text.ack"] == ["response.started", "response.done"]
    assert told[-1]["stop_reason"] == "stop"
    assert len({m["request_id"] for m in told}) == 1
    assert np.array_equal(audio, fake.speech(HELLO))
    request = fake.requests[0]
    assert (request.voice, request.seed, request.predictor_top_k, request.greedy) == ("slt", 3, 5, False)


def test_naris_cancel_ends_the_voice(fake: FakeBackend, server: Served) -> None:
    fake.pace = 1.0
    with client(server, **NARI) as it:
        it.until("session.created")
        it.send("request.start")
        it.send("input_text.append", sequence=0, text="A sentence that breaks off somewhere.")
        it.send("input_text.end", sequence=1)
        until(lambda: server.speaker.open_voices)
        it.send("response.cancel")
        told, _ = nari_answer(it)
    assert told[-1]["stop_reason"] == "cancelled"
    until(lambda: not server.speaker.open_voices)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"type": "input_text.append", "sequence": 0, "text": "x"}], "request.start"),
        ([{"type": "request.start", "ignore_eos": True}], "ignore_eos"),
        ([{"type": "request.start", "model": "other"}], "other"),
        ([{"type": "request.start", "instruct": "a", "instructions": "b"}], "not several"),
        ([{"type": "request.start"}, {"type": "request.start"}], "already"),
        ([{"type": "request.start"}, {"type": "input_text.append", "sequence": 1, "text": "x"}], "should be 0"),
        ([{"type": "request.start", "voice": "nobody"}, {"type": "input_text.end", "sequence": 0}], "nobody"),
    ],
)
def test_what_nari_would_refuse_is_refused_and_the_socket_closed(server: Served, messages, says) -> None:
    with client(server, **NARI) as it:
        for message in messages:
            it.socket.send(json.dumps(message))
        told, _ = nari_answer(it)
    assert told[-1]["type"] == "error"
    assert says in told[-1]["error"]["message"]


# -- fuzz --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["a", "b", "c", "", "ö" * 40, "x" * 70]) | st.text(max_size=10)
FIELDS = st.dictionaries(st.sampled_from([*protocol.SETTINGS, "flush", "codes", "nonsense"]), JSON, max_size=3)
MESSAGES = st.one_of(
    st.builds(
        lambda name, text, rest: {"type": "text", "context_id": name, "text": text, **rest},
        NAMES, st.text(max_size=30), FIELDS | st.just({}) | st.just({"flush": True}),
    ),
    st.builds(lambda kind, name: {"type": kind, "context_id": name}, st.sampled_from(["flush", "cancel"]), NAMES),
    st.builds(lambda kind, fields: {"type": kind, **fields}, st.sampled_from(["ping", "text", "sing"]), FIELDS),
    JSON,
).map(lambda message: json.dumps(message)) | st.text(max_size=50) | st.binary(max_size=50)  # fmt: skip


SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@pytest.mark.parametrize("frames", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["ours", "nari"])
def test_no_message_breaks_the_server(caplog: pytest.LogCaptureFixture, kind: str, frames: int) -> None:
    fake = FakeBackend(seconds_per_char=0.01)
    sent = 0
    with serving(lambda: fake) as server:

        @settings(max_examples=frames // 4, deadline=None, suppress_health_check=SLOW, database=None)
        @given(st.lists(MESSAGES, min_size=1, max_size=16))
        def fuzz(messages: list[str | bytes]) -> None:
            nonlocal sent
            sent += len(messages)
            with client(server, **(NARI if kind == "nari" else {})) as it:
                try:
                    for message in messages:
                        it.socket.send(message)
                    if kind == "ours":
                        it.send("ping", id="end")
                        while it.until("pong")["id"] != "end":
                            pass
                except ConnectionClosed:
                    assert kind == "nari"  # which closes behind an error

        while sent < frames:
            fuzz()
        until(lambda: not server.speaker.open_voices)
        with client(server) as it:
            it.send("text", "a", text=HELLO, flush=True)
            it.until("done", "a")
            assert np.array_equal(it.heard("a"), fake.speech(HELLO))
    assert not [record for record in caplog.records if record.exc_info or "failed" in record.message]
