"""A server in a thread of the test, on loopback, over whatever backend the test gives it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipecat_qwen3.backend import Backend
from pipecat_qwen3.server import create_app
from pipecat_qwen3.server_run import Server, listen
from pipecat_qwen3.server_speaker import Limits, Speaker


class Served:
    """Where a server listens, and what it knows."""

    def __init__(self, speaker: Speaker, port: int, server: Server) -> None:
        self.speaker, self.port, self.server = speaker, port, server
        self.http = f"http://127.0.0.1:{port}"
        self.ws = f"ws://127.0.0.1:{port}/v1/audio/speech/ws"


@contextmanager
def serving(
    load: Callable[[], Backend], *, limits: Limits | None = None, api_key: str | None = None, port: int = 0
) -> Iterator[Served]:
    """A server that is warm when the context begins, and gone when it ends."""
    speaker = Speaker(load, limits)
    warm = threading.Event()

    def loaded() -> Backend:
        backend = load()
        warm.set()
        return backend

    speaker._load = loaded
    listener = listen("127.0.0.1", port, 10.0)
    server = Server(create_app(speaker, api_key), speaker)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), name="served")
    thread.start()
    try:
        assert warm.wait(60)
        while not (speaker.ready and server.started):
            threading.Event().wait(0.01)
        yield Served(speaker, listener.getsockname()[1], server)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()
