"""An application in, a serving process out: one socket, one event loop, SIGTERM drains."""

import asyncio
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from pipecat_qwen3.errors import TTSError
from pipecat_qwen3.server_speaker import Speaker
from pipecat_qwen3.server_wire import SocketConnection, http_connection, raise_open_files

_PING_S = 10.0
"""A client that vanished without a word is noticed after two of these."""


def listen(host: str, port: int, write_s: float) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises TTSError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise TTSError(f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Without it the kernel would keep the last bytes for a client that lives but never reads, for ever.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2000 * write_s))
    return listener


class Server(uvicorn.Server):
    """Uvicorn, but the first SIGTERM or SIGINT lets the voices speak out; the second ends at once."""

    def __init__(self, app: ASGIApp, speaker: Speaker) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=http_connection(speaker.limits),
                ws=SocketConnection,
                log_config=None,
                access_log=False,
                server_header=False,
                ws_max_size=speaker.limits.body,
                ws_per_message_deflate=False,
                ws_ping_interval=_PING_S,
                ws_ping_timeout=_PING_S,
                timeout_graceful_shutdown=5,
                timeout_keep_alive=30,
            )
        )
        self._speaker = speaker
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._loop is None or self._speaker.draining:
            super().handle_exit(sig, frame)
            self.force_exit = self._speaker.draining
        else:
            self._loop.call_soon_threadsafe(self._drain)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal or `should_exit`."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def _drain(self) -> None:
        async def drain() -> None:
            await self._speaker.drain()
            self.should_exit = True

        self._draining = self._draining or asyncio.create_task(drain())

    def end(self) -> None:
        """End soon; safe from any thread."""
        self.should_exit = True


def serve(app: ASGIApp, speaker: Speaker, listener: socket.socket) -> None:
    """Serve until a signal says to end."""
    raise_open_files()
    server = Server(app, speaker)
    speaker.on_failure = server.end
    server.run(sockets=[listener])
