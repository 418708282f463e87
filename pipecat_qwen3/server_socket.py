"""Messages of one WebSocket in, audio, words and endings out: the server's side of docs/protocol.md.

Every context is a task of its own. Only the sender touches the socket, and nothing here waits for the engine but the
task whose voice it is.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pipecat_qwen3 import protocol
from pipecat_qwen3.backend import SAMPLE_RATE, Request
from pipecat_qwen3.errors import BadRequestError, OverloadedError, TTSError
from pipecat_qwen3.server_speaker import Speaker, Voice

logger = logging.getLogger(__name__)

GOING_AWAY, TOO_SLOW = 1001, 1008
"""Close codes: the server is shutting down; the client does not read."""


class Sender:
    """The one way onto a socket: messages leave whole and in order, and a reader that takes nothing is given up."""

    def __init__(self, socket: WebSocket, write_s: float) -> None:
        self._socket, self._write_s = socket, write_s
        self._turn = asyncio.Lock()
        self.dead = asyncio.Event()

    async def send(self, message: dict[str, Any] | bytes) -> bool:
        """Send a message; False if nobody reads any more."""
        if self.dead.is_set():
            return False
        try:
            async with asyncio.timeout(self._write_s), self._turn:
                if isinstance(message, bytes):
                    await self._socket.send_bytes(message)
                else:
                    await self._socket.send_text(json.dumps(message, ensure_ascii=False))
        except TimeoutError:
            logger.warning("a reader took nothing and is dropped", extra={"seconds": self._write_s})
            self.dead.set()
        except (WebSocketDisconnect, RuntimeError):  # Starlette raises RuntimeError once the socket is closed
            self.dead.set()
        return not self.dead.is_set()

    async def close(self, code: int, reason: str) -> None:
        """Close the socket behind all that was sent; idempotent."""
        async with self._turn:
            if self._socket.application_state is WebSocketState.CONNECTED and not self.dead.is_set():
                self.dead.set()
                await self._socket.close(code, reason)


async def receive(socket: WebSocket, sender: Sender) -> AsyncIterator[str | bytes]:
    """The client's messages until it leaves, or until it is given up for not reading."""
    dead = asyncio.create_task(sender.dead.wait())
    try:
        while True:
            message = asyncio.create_task(socket.receive())
            await asyncio.wait({message, dead}, return_when=asyncio.FIRST_COMPLETED)
            if not message.done():
                message.cancel()
                return
            event = message.result()
            if event["type"] == "websocket.disconnect":
                return
            yield event["text"] if event.get("text") is not None else event["bytes"]
    finally:
        dead.cancel()


@dataclass
class _Part:
    """Text of one context that is spoken with the same settings, without a break.

    whole   all of it, if it came with its end; otherwise it comes in pieces, None at the end
    """

    settings: dict[str, Any]
    codes: bool
    whole: str | None = None
    pieces: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)

    async def text(self) -> AsyncIterator[str]:
        while (piece := await self.pieces.get()) is not None:
            yield piece


class _Context:
    """The utterances of one context, one after the other."""

    def __init__(self, session: "Session", name: str, arrived: float) -> None:
        self.name = name
        self._session, self._arrived = session, arrived
        self._parts: asyncio.Queue[_Part | None] = asyncio.Queue()
        self._open: _Part | None = None
        self._characters = 0
        self._voice: Voice | None = None
        self.flushed = self.silent = self.failed = False
        self.task = asyncio.create_task(self._run())

    def feed(self, message: protocol.Text) -> None:
        """Take in more text; a change of settings ends the utterance so far and begins another."""
        if self.flushed or self.silent:
            return  # what follows the flush, or a failure that the client has not heard of yet
        self._characters += len(message.text)
        limit = self._session.speaker.limits.text
        if self._characters > limit:
            raise BadRequestError(
                f"a context should have at most {limit} characters, but has {self._characters}; begin another one"
            )
        if message.text:
            self._speak_later(message)
        if message.flush:
            self.flush()

    def _speak_later(self, message: protocol.Text) -> None:
        settings = message.settings()
        if self._open is not None and self._open.settings != settings:
            self._open.pieces.put_nowait(None)
            self._open = None
        if self._open is None:
            self._open = _Part(settings, message.codes, message.text if message.flush else None)
            self._parts.put_nowait(self._open)
        self._open.pieces.put_nowait(message.text)

    def flush(self) -> None:
        """No more text will come."""
        self.flushed = True
        if self._open is not None:
            self._open.pieces.put_nowait(None)
        self._parts.put_nowait(None)

    def cancel(self) -> None:
        """Be silent from now on; the row is free at the next frame."""
        self.silent = True
        self.flush()
        if self._voice is not None:
            self._voice.cancel()

    async def _run(self) -> None:
        utterances: list[dict[str, Any]] = []
        samples, end = 0, "eos"
        try:
            while (part := await self._parts.get()) is not None and not self.silent:
                if part.whole is not None and not part.whole.strip():
                    continue  # a context may end with white space; there is nothing to speak
                samples += await self._speak(part, samples)
                result = self._voice.result if self._voice else None
                if result is not None:
                    end = result.end
                    utterances.append(protocol.spoken(result, part.codes))
            if self.silent:
                end = "cancelled"
        except TTSError as error:
            await self.fail(error)
            return
        except Exception as error:
            logger.exception("a context failed")
            await self.fail(TTSError(f"the server failed: {type(error).__name__}"))
            return
        if not self.failed:
            self._session.forget(self)
            await self._session.sender.send(protocol.done(self.name, end, utterances))
        await self._session.leave_if_done()

    async def _speak(self, part: _Part, before: int) -> int:
        """Speak one part; returns its samples."""
        speaker, sender = self._session.speaker, self._session.sender
        request: Request = speaker.request(part.whole if part.whole is not None else part.text(), part.settings)
        voice = self._voice = speaker.speak(request, self._arrived)
        samples = 0
        try:
            async for chunk in voice:
                samples += len(chunk.pcm)
                if len(chunk.pcm) and not await sender.send(protocol.audio(self.name, chunk.pcm)):
                    break
                if chunk.words and not self.silent:
                    offset = before / SAMPLE_RATE
                    found = tuple((word, at + offset) for word, at in chunk.words)
                    await sender.send(protocol.words(self.name, found))
        finally:
            voice.cancel()
        return samples

    async def fail(self, error: TTSError) -> None:
        """End with an error. The name stays taken until the client has flushed or cancelled it."""
        if self.silent:
            return
        complete = self.flushed
        self.failed = True
        self.cancel()
        if complete:
            self._session.forget(self)
        await self._session.sender.send(protocol.error(error, self.name))


class Session:
    """One client on one socket."""

    def __init__(self, socket: WebSocket, speaker: Speaker) -> None:
        self.speaker = speaker
        self.sender = Sender(socket, speaker.limits.write_s)
        self._socket = socket
        self._contexts: dict[str, _Context] = {}
        self._old = False

    async def run(self) -> None:
        """Serve the client until it leaves; then every voice of it is cancelled."""
        self.speaker.admit()
        backend = self.speaker.backend
        await self._socket.accept(
            protocol.SUBPROTOCOL if protocol.SUBPROTOCOL in self._socket.scope["subprotocols"] else None
        )
        self.speaker.on_drain.add(self.leave_if_done)
        ageing = asyncio.create_task(self._age())
        try:
            await self.sender.send(protocol.hello(backend.model, backend.voices, backend.languages, SAMPLE_RATE))
            async for message in receive(self._socket, self.sender):
                await self._take(message)
        finally:
            ageing.cancel()
            self.speaker.on_drain.discard(self.leave_if_done)
            contexts = list(self._contexts.values())
            self._contexts.clear()
            for context in contexts:
                context.cancel()
            self.sender.dead.set()
            await asyncio.gather(*(context.task for context in contexts), return_exceptions=True)

    def forget(self, context: _Context) -> None:
        """A context is over; its name is free."""
        self._contexts.pop(context.name, None)

    async def leave_if_done(self) -> None:
        """While the server drains, and when it is old, a socket is closed as soon as no voice of it speaks."""
        if (self.speaker.draining or self._old) and not self._contexts:
            await self.sender.close(GOING_AWAY, "connect again")

    async def _age(self) -> None:
        if self.speaker.limits.socket_s is not None:
            await asyncio.sleep(self.speaker.limits.socket_s)
            self._old = True
            await self.leave_if_done()

    async def _take(self, raw: str | bytes) -> None:
        name = None
        try:
            if isinstance(raw, bytes):
                raise BadRequestError("a client's messages should be text, but a binary one came")
            if len(raw) > self.speaker.limits.body:
                raise BadRequestError(f"a message should have at most {self.speaker.limits.body} characters")
            name = protocol.context_of(raw)
            message = protocol.parse(raw)
            match message:
                case protocol.Ping():
                    await self.sender.send({"type": "pong", "id": message.id})
                case protocol.Text():
                    self._context(message.context_id).feed(message)
                case protocol.Flush() | protocol.Cancel():
                    self._end(message)
        except TTSError as error:
            self.speaker.metrics.errors.labels(error.code).inc()
            context = self._contexts.get(name or "")
            if context is not None:
                await context.fail(error)
            else:
                await self.sender.send(protocol.error(error, name))

    def _context(self, name: str) -> _Context:
        context = self._contexts.get(name)
        if context is None:
            self.speaker.admit()
            if len(self._contexts) >= self.speaker.limits.contexts:
                raise OverloadedError(f"{self.speaker.limits.contexts} contexts are open on this socket already")
            context = self._contexts[name] = _Context(self, name, time.monotonic())
        return context

    def _end(self, message: protocol.Flush | protocol.Cancel) -> None:
        context = self._contexts.get(message.context_id)
        if context is None:
            return  # it is over already, and its `done` or `error` is on the way
        if context.failed:
            self.forget(context)  # and now the client knows
        elif isinstance(message, protocol.Cancel):
            context.cancel()
        else:
            context.flush()
