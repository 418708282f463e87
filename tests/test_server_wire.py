"""Peers that misbehave below HTTP: slow ones, endless ones, silent crowds, deaf ones; with bare sockets."""

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from pipecat_qwen3.server_speaker import Limits
from pipecat_qwen3.server_wire import REQUEST_BYTES, most_connections
from tests.fakes import FakeBackend
from tests.serving import Served, serving
from tests.test_server import HELLO, call, speech, until

HEAD = b"POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
UPGRADE = (
    b"GET /v1/audio/speech/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@contextmanager
def peer(server: Served, first: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(first)
        yield raw


def until_closed(raw: socket.socket) -> bytes:
    """What the server says until it ends the connection."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while data := raw.recv(65536):
            said += data
    return said


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"", b""),
        (b"GET /v1/mod", b""),
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n", b"a: b\r\n"),
        (HEAD + b"content-length: 9000\r\n\r\n{", b" "),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /health HTTP/1.1\r\n", b"a: b\r\n"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\n\r\n", b" "),
    ],
)
def test_a_request_that_is_never_complete_is_ended(first: bytes, drop: bytes) -> None:
    with serving(FakeBackend, limits=Limits(read_s=0.3)) as server, peer(server, first) as raw:
        with contextlib.suppress(ConnectionError):
            for _ in range(50):
                raw.sendall(drop)
                time.sleep(0.02)
        until_closed(raw)
        assert call(f"{server.http}/health").status == 200


def test_time_for_a_request_is_no_time_for_its_answer() -> None:
    fake = FakeBackend(pace=1.0)
    with serving(lambda: fake, limits=Limits(read_s=0.2)) as server:
        answer = speech(server)
    assert np.array_equal(np.frombuffer(answer.body, np.int16), fake.speech(HELLO))


@pytest.mark.parametrize(
    "first", [b"GET /", b"GET / HTTP/1.1\r\na: ", HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\na: "]
)
def test_a_request_without_end_is_ended(first: bytes) -> None:
    with serving(FakeBackend) as server, peer(server, first) as raw, pytest.raises(ConnectionError):
        for _ in range(100):
            raw.sendall(b"x" * (REQUEST_BYTES // 10))
            time.sleep(0.01)


def test_a_silent_crowd_keeps_nobody_out() -> None:
    with serving(FakeBackend, limits=Limits(connections=4)) as server, contextlib.ExitStack() as crowd:
        for _ in range(60):
            crowd.enter_context(peer(server))
        assert speech(server).status == 200
        until(lambda: len(server.server.server_state.connections) <= 16)


@pytest.mark.parametrize(("files", "most"), [(resource.RLIM_INFINITY, 2048), (20_000, 2048), (1024, 960), (100, 50)])
def test_connections_leave_open_files_for_the_rest(monkeypatch: pytest.MonkeyPatch, files: int, most: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert most_connections(Limits(connections=512)) == most


def test_pings_of_a_peer_that_reads_nothing_do_not_pile_up() -> None:
    with serving(FakeBackend) as server, peer(server, UPGRADE) as raw:
        assert b" 101 " in raw.recv(65536)
        raw.settimeout(1)
        with pytest.raises(TimeoutError):
            for _ in range(1000):
                raw.sendall((b"\x89\xfd\0\0\0\0" + b"x" * 125) * 500)  # 64 MB in all
        assert call(f"{server.http}/health").status == 200


def test_what_is_no_text_ends_its_socket_alone(caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeBackend) as server:
        for frame in (b"\x81\x83\0\0\0\0\xff\xfe\xfd", b"\x81\x02hi", b"\x83\x80\0\0\0\0", b"\x81\xff" + b"\x7f" * 12):
            with peer(server, UPGRADE) as raw:
                assert b" 101 " in raw.recv(65536)
                raw.sendall(frame)
                assert b"\x03" in until_closed(raw)[-80:]  # a close frame with a code of a thousand and something
        assert speech(server).status == 200
