"""Bytes of one connection in, requests for the application out: uvicorn's own protocols, with bounds for hostile peers.

A peer that never finishes a request, sends one without end, or does not read what it asks for is given up here; uvicorn
would wait for it, and keep what it sends.
"""

import asyncio
import contextlib
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from pipecat_qwen3.server_speaker import Limits

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None

LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

REQUEST_BYTES = 1 << 20
"""Head, body, their framing and trailers of one request, as they come: far more than any client needs."""

SPARE_FILES = 64
"""Open files that are left to everything but connections."""


class HttpConnection(HttpToolsProtocol):
    """Until a request is complete: so much time, so many bytes, and where there are too many peers, the oldest goes.

    waiting  those of all connections that have not asked for anything yet, the oldest first
    """

    def __init__(self, limits: Limits, waiting: "dict[HttpConnection, None]", **options: Any) -> None:
        super().__init__(**options)
        self._limits, self._waiting = limits, waiting
        self._deadline: asyncio.TimerHandle | None = None
        self._bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A peer is there."""
        super().connection_made(transport)
        self._waiting[self] = None
        self._expect()
        if len(self.connections) > most_connections(self._limits):
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        self._bytes += len(data)
        if self._bytes > REQUEST_BYTES:
            self.transport.abort()
        else:
            super().data_received(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._expect()

    def on_headers_complete(self) -> None:
        """Its head is there; a WebSocket has nothing more."""
        if self.parser is not None and self.parser.should_upgrade() and self._should_upgrade():
            self._complete()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All of it is there."""
        self._complete()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone."""
        self._complete()
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._limits.read_s, self._late)

    def _complete(self) -> None:
        self._bytes = 0
        self._waiting.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self.flow.read_paused:  # we do not read, so that the peer cannot go on
            self._expect()
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(LATE)
        self.transport.close()


class SocketConnection(WebSocketsSansIOProtocol):
    """A peer that takes nothing is not read from either: each of its pings would be a pong that waits here."""

    def pause_writing(self) -> None:
        """What we send piles up."""
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It flows again."""
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()

    async def receive(self) -> Any:
        """The next message; what comes behind it is read when the peer takes what we send."""
        message = await super().receive()
        if not self.writable.is_set() and not self.disconnected:
            self.transport.pause_reading()
        return message


def http_connection(limits: Limits) -> Any:
    """What makes an HttpConnection, as uvicorn calls it."""
    return partial(HttpConnection, limits, {})


def most_connections(limits: Limits) -> int:
    """Open connections, with those that ask for nothing or are refused: what the process may have open files for."""
    most = 4 * limits.connections
    if resource is None:
        return most
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if files == resource.RLIM_INFINITY else min(most, max(files // 2, files - SPARE_FILES))


def raise_open_files() -> None:
    """Ask for as many open files as this user may have; what a shell allows is often too few for a server."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below the one it tells
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
