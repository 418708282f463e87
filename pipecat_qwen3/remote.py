"""A `pipecat-qwen3 serve` somewhere else as a Backend: Requests in, its audio on Streams out. Needs no torch.

All voices of a RemoteBackend share one socket, all RemoteBackends of a process one network thread; docs/protocol.md
tells what is said.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import math
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from pydantic import ValidationError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException

from pipecat_qwen3 import protocol
from pipecat_qwen3.backend import Chunk, Request, Result, Stream
from pipecat_qwen3.errors import (
    BadRequestError,
    ConnectionFailedError,
    EngineError,
    OverloadedError,
    TTSError,
    UnauthorizedError,
)

logger = logging.getLogger(__name__)

GOING_AWAY = 1001
"""Close code of a server that wants its clients to connect again, perhaps to another one."""

PING_S = 5.0
"""How often the server is asked whether it lives; one that says nothing for two of these is given up."""

CLOSE_S = 1.0
"""A server may take so long to say goodbye."""

BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses between attempts to reconnect, the last one again and again; who wants to speak ends a pause."""

LASTING_S = 0.1
"""A connection that was over sooner was none: the pauses go on to grow."""


@functools.cache
def _network() -> asyncio.AbstractEventLoop:
    """The process's network loop, on a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="pipecat-qwen3-network", daemon=True).start()
    return loop


@dataclass
class _Context:
    """One utterance on the wire."""

    stream: Stream
    settings: dict[str, Any]
    samples: int = 0
    flushed: bool = False
    half: str = ""
    unanswered: list[str] | None = field(default_factory=list)
    stop_reading: Callable[[], None] = field(default=lambda: None)

    def finish(self, result: Result) -> None:
        """It is over: read no more text."""
        self.stop_reading()
        self.stream.finish(result)


class RemoteBackend:
    """A server as a Backend. It connects on first use, and again whenever the connection breaks."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        connect_s: float = 5.0,
        ping_s: float = PING_S,
        on_change: Callable[[TTSError | None], None] | None = None,
    ) -> None:
        """Connect to nothing yet.

        url        ws://HOST:PORT/v1/audio/speech/ws or wss://…
        api_key    what the server has in PIPECAT_QWEN3_API_KEY
        connect_s  an attempt to connect may take so long
        ping_s     how often the server is asked whether it lives; one that says nothing for two of these is given up
        on_change  called on the network thread, with None when connected, with the reason when that is over
        """
        if not url.startswith(("ws://", "wss://")):
            raise BadRequestError(f"url should begin with ws:// or wss://, but is {url!r}")
        self.url = url
        self.voices: tuple[str, ...] = ()
        self.languages: tuple[str, ...] = ()
        self.model = url
        self.ready = False
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connect_s, self._ping_s, self._on_change = connect_s, ping_s, on_change
        self._closed = False
        self._ids = itertools.count(1)
        self._contexts: dict[str, _Context] = {}
        self._settled: Future[None] = Future()
        self._loop = _network()
        self._outbox: asyncio.Queue[str] = asyncio.Queue()
        self._wanted = asyncio.Event()
        self._starting = threading.Lock()
        self._running: Future[None] | None = None
        self._usable = False
        self._ended = threading.Event()

    @classmethod
    def open(cls, url: str, *, api_key: str | None = None, connect_s: float = 5.0, ping_s: float = PING_S) -> Self:
        """Connect; blocks until then. Raises ConnectionFailedError or UnauthorizedError."""
        backend = cls(url, api_key=api_key, connect_s=connect_s, ping_s=ping_s)
        backend._start()
        try:
            backend._settled.result()
        except BaseException:
            backend.close()
            raise
        return backend

    async def connected(self) -> None:
        """Make the first attempt to connect. Raises ConnectionFailedError or UnauthorizedError."""
        self._start()
        await asyncio.shield(asyncio.wrap_future(self._settled))

    def speak(self, request: Request) -> Stream:
        """Send an utterance off and return its stream at once; what the server refuses, the iteration raises.

        Without a connection, one attempt is made to get it. A text given as an async iterator is read by a task on
        the running event loop. Raises BadRequestError, or EngineError when closed.
        """
        if self._closed:
            raise EngineError("this connection was closed; open another one")
        self._start()
        text = request.text
        if isinstance(text, str) and not text.strip():
            raise BadRequestError("the text is empty; give at least one word")
        seed = request.seed if request.seed is not None else secrets.randbits(63)
        settings = {name: getattr(request, name) for name in protocol.SETTINGS} | {"seed": seed}
        try:
            protocol.Settings.model_validate(settings)
        except ValidationError as error:
            raise BadRequestError(protocol.one_line(error)) from None
        name = f"{next(self._ids)}"
        whole = isinstance(text, str)
        stream = Stream(
            seed,
            on_cancel=lambda: self._soon(self._cancel, name),
            on_feed=None if whole else lambda piece: self._soon(self._feed, name, _checked(piece)),
            on_end=lambda: self._soon(self._end, name),
        )
        context = _Context(stream, settings)
        if isinstance(text, str):
            self._soon(self._begin, name, context, well_formed(text))
        else:
            context.stop_reading = self._read(text, stream, name)
            self._soon(self._begin, name, context, None)
        return stream

    def close(self) -> None:
        """End every voice and the connection, and wait a second at most for the latter; idempotent."""
        if self._closed:
            return
        self._closed, self.ready = True, False
        if self._running is not None:
            self._running.cancel()
        self._soon(self._fail_all, EngineError("the connection was closed while this voice was speaking"))
        if not self._settled.done():
            self._settled.set_exception(EngineError("the connection was closed before it was there"))
            self._settled.exception()
        if self._running is not None:
            self._ended.wait(CLOSE_S)

    # -- the caller's thread ---------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._starting:
            if self._running is None and not self._closed:
                self._running = asyncio.run_coroutine_threadsafe(self._run(), self._loop)

    def _soon(self, work: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(work, *arguments)

    def _read(self, text: AsyncIterator[str], stream: Stream, name: str) -> Callable[[], None]:
        """Feed a stream from an iterator on the caller's loop; returns what stops that, from any thread."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise BadRequestError("a text iterator is read by an event loop: call speak() from a coroutine") from None

        async def read() -> None:
            try:
                async for piece in text:
                    stream.feed(piece)
                stream.end()
            except TTSError as error:
                self._soon(self._give_up, name, error)
            except Exception as error:
                failed = BadRequestError(f"the text iterator failed: {type(error).__name__}: {error}")
                self._soon(self._give_up, name, failed)

        task = loop.create_task(read())

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(task.cancel)

        return stop

    # -- the network thread ----------------------------------------------------------------------------------

    def _begin(self, name: str, context: _Context, whole: str | None) -> None:
        if self._closed:
            context.finish(_failed(context, EngineError("this connection was closed")))
            return
        self._contexts[name] = context
        if whole is not None:
            context.flushed = True
            self._say(context, protocol.text(name, whole, context.settings, flush=True))
        if not self.ready:
            self._wanted.set()

    def _feed(self, name: str, piece: str) -> None:
        context = self._contexts.get(name)
        if context is None or context.flushed:
            return
        # JSON deltas may cut an emoji between its two surrogates: the first one waits for the second.
        piece = context.half + piece
        cut = len(piece) - 1 if piece and "\ud800" <= piece[-1] <= "\udbff" else len(piece)
        context.half = piece[cut:]
        if piece[:cut]:
            self._say(context, protocol.text(name, well_formed(piece[:cut]), context.settings))

    def _end(self, name: str) -> None:
        context = self._contexts.get(name)
        if context is None or context.flushed:
            return
        context.flushed = True
        # With a text, so that the server knows the context even if nothing was fed.
        self._say(context, protocol.text(name, well_formed(context.half), context.settings, flush=True))

    def _say(self, context: _Context, message: str) -> None:
        """Send a text, and keep it until the server has begun to answer."""
        if context.unanswered is not None:
            context.unanswered.append(message)
        self._outbox.put_nowait(message)

    def _cancel(self, name: str) -> None:
        context = self._contexts.get(name)
        if context is not None:
            context.stop_reading()
            self._outbox.put_nowait(protocol.cancel(name))
            if not self.ready or context.unanswered == []:  # the server has never heard of it
                del self._contexts[name]
                context.finish(Result("cancelled", 0, context.stream.seed))

    def _give_up(self, name: str, error: TTSError) -> None:
        context = self._contexts.pop(name, None)
        if context is not None:
            self._outbox.put_nowait(protocol.cancel(name))
            context.finish(_failed(context, error))

    async def _run(self) -> None:
        try:
            await self._keep_connected()
        finally:
            self._ended.set()

    async def _keep_connected(self) -> None:
        pauses = iter(BACKOFF_S)
        while True:
            connected_at = math.inf
            try:
                async with self._connect() as socket:
                    self._greet(json.loads(await asyncio.wait_for(socket.recv(), self._connect_s)))
                    connected_at = self._loop.time()
                    writing = asyncio.create_task(self._write(socket))
                    try:
                        async for message in socket:
                            self._take(message)
                    finally:
                        writing.cancel()
                error: TTSError = ConnectionFailedError(f"{self.url} closed the connection {_close_reason(socket)}")
                lasted = self._loop.time() - connected_at > LASTING_S
                if socket.close_code == GOING_AWAY and lasted and self._say_again():
                    continue
            except InvalidStatus as refused:
                error = self._refused(refused.response.status_code)
            except Exception as broken:
                reason = str(broken) or type(broken).__name__
                what = "the connection broke" if self.ready else "no connection"
                error = ConnectionFailedError(f"{what} to {self.url}: {reason}")
            self._lost(error)
            if self._loop.time() - connected_at > LASTING_S:
                pauses = iter(BACKOFF_S)
            pause = None if isinstance(error, UnauthorizedError) else next(pauses, BACKOFF_S[-1])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), pause)
            self._wanted.clear()

    def _connect(self) -> connect:
        return connect(
            self.url,
            additional_headers=self._headers,
            subprotocols=[protocol.SUBPROTOCOL],  # type: ignore[list-item]
            compression=None,
            max_size=None,
            open_timeout=self._connect_s,
            ping_interval=self._ping_s,
            ping_timeout=self._ping_s,
            close_timeout=CLOSE_S,
        )

    def _refused(self, status: int) -> TTSError:
        if status in (401, 403):
            return UnauthorizedError(f"{self.url} wants another API key (HTTP {status}); set api_key")
        if status == 429:
            return OverloadedError(f"{self.url} has no room for another connection (HTTP 429); try again later")
        return ConnectionFailedError(f"{self.url} refused the connection with HTTP {status}")

    def _greet(self, hello: dict[str, Any]) -> None:
        if hello["type"] != "ready" or hello["protocol"] != protocol.VERSION:
            raise ValueError(f"protocol {protocol.VERSION} was expected, but {str(hello)[:80]} came")
        self.voices, self.languages = tuple(hello["voices"]), tuple(hello["languages"])
        self.model, self.ready = hello["model"], True
        if not self._settled.done():
            self._settled.set_result(None)
        self._usable = True
        self._tell(None)

    async def _write(self, socket: ClientConnection) -> None:
        with contextlib.suppress(WebSocketException):  # the reading side sees the same end
            while True:
                await socket.send(await self._outbox.get())

    def _lost(self, error: TTSError) -> None:
        was_usable, self._usable, self.ready = self._usable, False, False
        self._outbox = asyncio.Queue()
        self._wanted.clear()
        self._fail_all(error)
        if not self._settled.done():
            self._settled.set_exception(error)
        logger.log(logging.WARNING if was_usable else logging.DEBUG, "%s", error)
        if was_usable:
            self._tell(error)

    def _say_again(self) -> bool:
        """A server that asked us to connect again has not begun what it has not answered; False if it has."""
        if any(context.unanswered is None for context in self._contexts.values()):
            return False
        self.ready = False
        self._outbox = asyncio.Queue()
        for context in self._contexts.values():
            for message in context.unanswered or ():
                self._outbox.put_nowait(message)
        return True

    def _tell(self, error: TTSError | None) -> None:
        if self._on_change is not None and not self._closed:
            self._on_change(error)

    def _fail_all(self, error: TTSError) -> None:
        contexts, self._contexts = list(self._contexts.values()), {}
        for context in contexts:
            context.finish(_failed(context, error))

    def _take(self, message: str | bytes) -> None:
        """Hand a message of the server to its stream; one for a stream that is over is dropped."""
        if isinstance(message, bytes):
            name, pcm = protocol.parse_audio(message)
            if context := self._contexts.get(name):
                context.unanswered = None
                context.stream.put(Chunk(pcm, context.samples))
                context.samples += len(pcm)
            return
        told = json.loads(message)
        name = told.get("context_id", "")
        context = self._contexts.get(name)
        if context is None:
            return
        match told["type"]:
            case "words":
                found = tuple((word, at) for word, at in told["words"])
                context.stream.put(Chunk(np.zeros(0, np.int16), context.samples, found))
            case "done":
                del self._contexts[name]
                result = Result(told["end"], 0, context.stream.seed)
                context.finish(protocol.parse_spoken(told["utterances"][-1]) if told["utterances"] else result)
            case "error":
                del self._contexts[name]
                if not context.flushed:
                    self._outbox.put_nowait(protocol.cancel(name))  # frees the name there
                context.finish(_failed(context, protocol.raised(told["code"], told["message"])))


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced: what JSON can carry."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _checked(piece: str) -> str:
    if not isinstance(piece, str):
        raise BadRequestError(f"a piece of text should be a string, but is {piece!r}")
    return piece


def _failed(context: _Context, error: TTSError) -> Result:
    return Result("error", 0, context.stream.seed, error)


def _close_reason(socket: ClientConnection) -> str:
    return f"({socket.close_code} {socket.close_reason})".replace(" )", ")")
