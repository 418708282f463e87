"""The socket protocol nari.speech.v1 of nari-qwen3-tts: one streamed request on a socket, spoken by our backend.

The events and their fields are those of that project's docs/websocket.md and of its benchmark's client.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.websockets import WebSocket

from pipecat_qwen3.backend import SAMPLE_RATE
from pipecat_qwen3.errors import BadRequestError, EngineError, OverloadedError, TTSError
from pipecat_qwen3.protocol import one_line
from pipecat_qwen3.server_socket import Sender, receive
from pipecat_qwen3.server_speaker import OPENAI_MODELS, Speaker

SUBPROTOCOL = "nari.speech.v1"

_AUDIO = {"encoding": "pcm_s16le", "sample_rate": SAMPLE_RATE, "channels": 1}


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Start(_Message):
    """How to speak; what our engine has no knob for is refused unless it asks for what happens anyway."""

    type: Literal["request.start"]
    model: str | None = None
    voice: str | None = None
    language: str | None = None
    instruct: str | None = None
    instruction: str | None = None
    instructions: str | None = None
    response_format: Literal["pcm", "pcm16", "pcm_s16le"] = "pcm"
    seed: int | None = Field(None, ge=0, lt=2**63)
    do_sample: bool = True
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    subtalker_dosample: bool = True
    subtalker_temperature: float | None = None
    subtalker_top_k: int | None = None
    subtalker_top_p: float | None = None
    max_new_tokens: int | None = Field(None, ge=1)
    ignore_eos: Literal[False] = False
    skip_fixed_bootstrap_audio: bool = True
    stream_chunk_schedule: tuple[Annotated[int, Field(ge=1, le=128)], ...] | None = Field(None, max_length=32)

    def settings(self) -> dict[str, Any]:
        """The same under a Request's names. Raises BadRequestError."""
        if self.do_sample != self.subtalker_dosample:
            raise BadRequestError("do_sample and subtalker_dosample should be equal; both false is greedy")
        how = [text for text in (self.instruct, self.instruction, self.instructions) if text]
        if len(how) > 1:
            raise BadRequestError("give one of instruct, instruction and instructions, but not several")
        settings: dict[str, Any] = {
            "voice": self.voice,
            "language": self.language,
            "instruct": how[0] if how else None,
            "seed": self.seed,
            "greedy": not self.do_sample,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "predictor_temperature": self.subtalker_temperature,
            "predictor_top_k": self.subtalker_top_k,
            "predictor_top_p": self.subtalker_top_p,
            "max_frames": self.max_new_tokens,
            "skip_silence": self.skip_fixed_bootstrap_audio,
        }
        if self.stream_chunk_schedule:
            settings["ramp"] = self.stream_chunk_schedule
        return settings


class Append(_Message):
    """More text."""

    type: Literal["input_text.append"]
    sequence: int = Field(ge=0)
    text: str = Field(min_length=1)


class End(_Message):
    """No more text."""

    type: Literal["input_text.end"]
    sequence: int = Field(ge=0)


class Cancel(_Message):
    """Be silent."""

    type: Literal["response.cancel"]


_CLIENT = TypeAdapter(Annotated[Start | Append | End | Cancel, Field(discriminator="type")])


class NariSession:
    """One request on one socket, which is closed behind its answer."""

    def __init__(self, socket: WebSocket, speaker: Speaker) -> None:
        self._socket, self._speaker = socket, speaker
        self._sender = Sender(socket, speaker.limits.write_s)
        self._id = f"ws-{uuid.uuid4().hex}"
        self._settings: dict[str, Any] | None = None
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._sequence = self._characters = 0
        self._speaking: asyncio.Task[None] | None = None
        self._ended = False

    async def run(self) -> None:
        """Serve the request; when the client leaves, its voice is cancelled."""
        self._speaker.admit()
        await self._socket.accept(SUBPROTOCOL)
        try:
            await self._sender.send({"type": "session.created", "protocol": SUBPROTOCOL, "audio": _AUDIO})
            async for raw in receive(self._socket, self._sender):
                try:
                    await self._take(_parse(raw, self._speaker.limits.body))
                except TTSError as error:
                    self._speaker.metrics.errors.labels(error.code).inc()
                    await self._fail(error)
                    return
        finally:
            if self._speaking is not None:
                self._speaking.cancel()
                await asyncio.gather(self._speaking, return_exceptions=True)

    async def _take(self, message: Start | Append | End | Cancel) -> None:
        match message:
            case Start():
                await self._start(message)
            case Append() | End():
                await self._text(message)
            case Cancel():
                await self._cancel()

    async def _start(self, message: Start) -> None:
        if self._settings is not None:
            raise BadRequestError("the request was configured already; open another socket for another one")
        ours = self._speaker.backend.model
        if message.model not in (None, ours, *OPENAI_MODELS):
            raise BadRequestError(f"the model here is {ours!r}, but {message.model!r} was asked for")
        self._settings = message.settings()
        await self._sender.send({"type": "request.configured"})

    async def _text(self, message: Append | End) -> None:
        if self._settings is None or self._ended:
            raise BadRequestError("text is taken between request.start and input_text.end")
        if message.sequence != self._sequence:
            raise BadRequestError(f"sequence should be {self._sequence}, but is {message.sequence}")
        self._sequence += 1
        if isinstance(message, Append):
            self._characters += len(message.text)
            if self._characters > self._speaker.limits.text:
                raise BadRequestError(f"the text should have at most {self._speaker.limits.text} characters")
            self._pieces.put_nowait(message.text)
        else:
            self._ended = True
            self._pieces.put_nowait(None)
        if self._speaking is None:
            self._speaking = asyncio.create_task(self._speak(self._settings))
        acknowledged = {"type": "input_text.ack", "event": message.type, "sequence": message.sequence}
        await self._sender.send({**acknowledged, "request_id": self._id})

    async def _cancel(self) -> None:
        if self._speaking is not None:
            self._speaking.cancel()
            await asyncio.gather(self._speaking, return_exceptions=True)
        await self._finish("cancelled", 0)

    async def _pump(self) -> AsyncIterator[str]:
        while (piece := await self._pieces.get()) is not None:
            yield piece

    async def _speak(self, settings: dict[str, Any]) -> None:
        voice, chunks = None, 0
        try:
            voice = self._speaker.speak(self._speaker.request(self._pump(), settings), time.monotonic())
            await self._sender.send({"type": "response.started", "request_id": self._id, "audio": _AUDIO})
            async for chunk in voice:
                if len(chunk.pcm):
                    chunks += 1
                    if not await self._sender.send(chunk.pcm.astype("<i2", copy=False).tobytes()):
                        return
            result = voice.result
            await self._finish("stop" if result is None or result.end == "eos" else result.end, chunks)
        except TTSError as error:
            await self._fail(error)
        finally:
            if voice is not None:
                voice.cancel()

    async def _finish(self, reason: str, chunks: int) -> None:
        told = {"type": "response.done", "request_id": self._id, "stop_reason": reason, "audio_chunks": chunks}
        await self._sender.send(told)
        await self._sender.close(1000, "response.done")

    async def _fail(self, error: TTSError) -> None:
        kind = "invalid_request_error" if isinstance(error, BadRequestError) else "server_error"
        told = {"type": kind, "code": error.code, "message": str(error)}
        await self._sender.send({"type": "error", "request_id": self._id, "error": told})
        await self._sender.close(1013 if isinstance(error, OverloadedError) else _close_code(error), "error")


def _close_code(error: TTSError) -> int:
    """1011 is the server's fault, 1008 the client's."""
    return 1011 if isinstance(error, EngineError) else 1008


def _parse(raw: str | bytes, limit: int) -> Start | Append | End | Cancel:
    if isinstance(raw, bytes) or len(raw) > limit:
        raise BadRequestError(f"a message should be JSON text of at most {limit} characters")
    try:
        return _CLIENT.validate_json(raw)
    except ValidationError as error:
        raise BadRequestError(one_line(error)) from None
