"""POST /v1/audio/speech in the shape of OpenAI's API in, an audio file out, streamed as it is made.

What OpenAI's clients send is understood; what only we have has the name it has in a Request.
"""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from pipecat_qwen3.audio_formats import MIME, Encoder, Format, encoder
from pipecat_qwen3.backend import SAMPLE_RATE, Request
from pipecat_qwen3.errors import (
    BadRequestError,
    EngineError,
    OverloadedError,
    TextTimeoutError,
    TTSError,
    UnauthorizedError,
    UnknownNameError,
)
from pipecat_qwen3.protocol import SETTINGS, Settings
from pipecat_qwen3.server_speaker import OPENAI_MODELS, Speaker, Voice

logger = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[TTSError], int, str], ...] = (
    (BadRequestError, 400, "invalid_request_error"),
    (UnauthorizedError, 401, "authentication_error"),
    (TextTimeoutError, 408, "invalid_request_error"),
    (OverloadedError, 429, "rate_limit_error"),
    (EngineError, 503, "server_error"),
    (TTSError, 500, "server_error"),
)
"""Status and OpenAI's kind of each error, the special before the general."""


class SpeechRequest(Settings):
    """What to say and how. Fields that are not listed here are refused."""

    input: Annotated[str, Field(min_length=1, description="The text to speak.")]
    model: Annotated[str | None, Field(description="The loaded model, one of OpenAI's names for it, or nothing.")] = (
        None
    )
    voice: Annotated[  # type: ignore[assignment]
        str | Annotated[dict[Literal["id"], str], Field(min_length=1)] | None, Field(description="See /v1/voices.")
    ] = None
    instructions: Annotated[str | None, Field(description="OpenAI's name of `instruct`.")] = None
    response_format: Format = "mp3"
    stream_format: Literal["audio", "sse"] = "audio"
    speed: Annotated[float, Field(description="1.0, the only speed there is.", ge=1.0, le=1.0)] = 1.0
    stream: Annotated[bool | None, Field(description="Taken and ignored: the answer always streams.")] = None
    non_streaming_mode: Annotated[bool | None, Field(description="true is layout whole, false is streaming.")] = None
    # An HTTP client may have no player, so nothing is held back for one that is slow.
    ahead_s: float | None = None

    @field_validator("speed", mode="before")
    @classmethod
    def _only_speed(cls, speed: Any) -> Any:
        if isinstance(speed, int | float) and not isinstance(speed, bool) and speed != 1.0:
            raise ValueError("this model speaks at speed 1.0 only; leave speed out")
        return speed

    def to_request(self, speaker: Speaker) -> Request:
        """The Request that it stands for. Raises BadRequestError or UnknownNameError."""
        if len(self.input) > speaker.limits.text:
            raise BadRequestError(f"input should have at most {speaker.limits.text} characters, not {len(self.input)}")
        if self.model not in (None, speaker.backend.model, *OPENAI_MODELS):
            raise UnknownNameError(f"the model here is {speaker.backend.model!r}, but {self.model!r} was asked for")
        if self.instruct and self.instructions and self.instruct != self.instructions:
            raise BadRequestError("give instruct or instructions, but not two different ones")
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings["instruct"] = self.instruct or self.instructions or None
        if isinstance(self.voice, dict):
            settings["voice"] = self.voice["id"]
        if self.layout is None and self.non_streaming_mode is not None:
            settings["layout"] = "whole" if self.non_streaming_mode else "streaming"
        return speaker.request(self.input, settings)


class SpeechResponse(Response):
    """Speech as it is made. Nothing is sent before the first sample, so that a failure until then has a status."""

    def __init__(self, speaker: Speaker, request: Request, asked: SpeechRequest, arrived: float) -> None:
        self.background = None
        self._speaker, self._request, self._arrived = speaker, request, arrived
        self._format: Format = asked.response_format
        self._sse = asked.stream_format == "sse"
        self._characters = len(asked.input)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Speak into the connection; a client that leaves, or does not read, ends the voice."""
        try:
            voice = self._speaker.speak(self._request, self._arrived)
        except TTSError as error:
            await failure(error)(scope, receive, send)
            return
        gone = asyncio.create_task(_until_gone(receive, voice))
        try:
            await self._send(voice, scope, receive, send)
        except TimeoutError:
            logger.warning("a reader took nothing and is dropped", extra={"seconds": self._speaker.limits.write_s})
        finally:
            voice.cancel()
            gone.cancel()

    async def _send(self, voice: Voice, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(message: Message) -> None:
            async with asyncio.timeout(self._speaker.limits.write_s):
                await send(message)

        started = False
        try:
            async with aclosing(self._pieces(voice)) as pieces:
                async for piece in pieces:
                    if not started:
                        started = True
                        await write({"type": "http.response.start", "status": 200, "headers": self._headers()})
                    await write({"type": "http.response.body", "body": piece, "more_body": True})
        except TTSError as error:
            if not started:
                await failure(error)(scope, receive, write)
            else:
                # The answer stays without its end, which every HTTP client reports as a broken transfer.
                logger.error("speech broke off", extra={"code": error.code, "error": str(error)})
            return
        if voice.cancelled:  # by a client that has left, or because the server ends
            if not started:
                await failure(EngineError("the server ended before this voice could speak"))(scope, receive, write)
            return
        if not started:
            await write({"type": "http.response.start", "status": 200, "headers": self._headers()})
        await write({"type": "http.response.body", "body": b"", "more_body": False})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        mime = "text/event-stream" if self._sse else MIME[self._format]
        told = {"content-type": mime, "cache-control": "no-store", "x-sample-rate": str(SAMPLE_RATE)}
        return [(name.encode(), value.encode()) for name, value in told.items()]

    async def _pieces(self, voice: Voice) -> AsyncGenerator[bytes]:
        encoding = encoder(self._format)
        async for piece in _encoded(voice, encoding):
            yield _event({"type": "speech.audio.delta", "audio": _base64(piece)}) if self._sse else piece
        if self._sse and not voice.cancelled:
            frames = voice.result.frames if voice.result else 0
            # Tokens are what OpenAI's clients look for: characters in and frames out are what is counted here.
            usage = {
                "input_tokens": self._characters,
                "output_tokens": frames,
                "total_tokens": self._characters + frames,
            }
            yield _event({"type": "speech.audio.done", "usage": usage})


async def _encoded(voice: Voice, encoding: Encoder) -> AsyncIterator[bytes]:
    async for chunk in voice:
        if len(chunk.pcm) and (piece := encoding.encode(chunk.pcm)):
            yield piece
    if not voice.cancelled and (rest := encoding.finish()):
        yield rest


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def _until_gone(receive: Receive, voice: Voice) -> None:
    """Cancel the voice as soon as its client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    voice.cancel()


def failure(error: TTSError) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    status, kind = next((status, kind) for known, status, kind in _STATUS if isinstance(error, known))
    return refusal(status, str(error), error.code, kind)


def refusal(status: int, message: str, code: str, kind: str = "invalid_request_error") -> JSONResponse:
    """An answer that says no."""
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    headers |= {"www-authenticate": "Bearer"} if status == 401 else {}
    content = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(content, status, headers)


async def speech(speaker: Speaker, asked: SpeechRequest) -> Response:
    """Answer a request for speech."""
    arrived = time.monotonic()
    try:
        speaker.admit()
        return SpeechResponse(speaker, asked.to_request(speaker), asked, arrived)
    except TTSError as error:
        return failure(error)
