"""A Speaker in, the web application out: speech over HTTP and sockets, voices, health, metrics.

Knows no talker, no codec and no torch.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from pipecat_qwen3 import __version__, metrics
from pipecat_qwen3.audio_formats import FORMATS, MIME
from pipecat_qwen3.errors import TTSError
from pipecat_qwen3.server_gate import Gate
from pipecat_qwen3.server_http import SpeechRequest, failure, refusal, speech
from pipecat_qwen3.server_nari import SUBPROTOCOL as NARI
from pipecat_qwen3.server_nari import NariSession
from pipecat_qwen3.server_socket import Session
from pipecat_qwen3.server_speaker import Speaker

_ERROR = {"application/json": {"schema": {"type": "object", "required": ["error"]}}}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_AUDIO = {mime: _BINARY for mime in (*(MIME[name] for name in FORMATS), "text/event-stream")}


def create_app(speaker: Speaker, api_key: str | None = None) -> FastAPI:
    """The application. It loads the speaker's backend when it starts and closes it when it ends.

    api_key  asked for in `Authorization: Bearer KEY` everywhere but at /health and /ready; None asks for none
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        speaker.start()
        yield
        speaker.close()

    app = FastAPI(title="pipecat-qwen3", version=__version__, lifespan=lifespan)
    app.add_middleware(Gate, speaker=speaker, api_key=api_key)
    _add_errors(app)

    @app.post(
        "/v1/audio/speech",
        response_class=Response,
        responses={
            200: {"description": "Audio, or events with stream_format=sse.", "content": _AUDIO},
            "4XX": {"description": "What was wrong.", "content": _ERROR},
            503: {"description": "Not warm yet.", "content": _ERROR},
        },
    )
    async def audio_speech(asked: SpeechRequest) -> Response:
        """Speak a text; the audio streams as it is made."""
        return await speech(speaker, asked)

    @app.websocket("/v1/audio/speech/ws")
    async def audio_speech_socket(socket: WebSocket) -> None:
        session = NariSession if socket.scope["subprotocols"][:1] == [NARI] else Session
        try:
            await session(socket, speaker).run()
        except TTSError as error:  # before the socket was accepted
            await socket.send_denial_response(failure(error))

    refused = {"4XX": {"description": "What was wrong.", "content": _ERROR}, 503: {"description": "Not warm yet."}}

    @app.get("/v1/models", responses=refused)
    async def models() -> dict[str, Any]:
        """The one model that is loaded."""
        return {"object": "list", "data": [_model(speaker)]}

    @app.get("/v1/models/{name:path}", responses=refused)
    async def model(name: str) -> Response:
        """The same, by name."""
        if name != speaker.backend.model:
            return refusal(404, f"the model here is {speaker.backend.model!r}", "unknown_name")
        return JSONResponse(_model(speaker))

    @app.get("/v1/voices", responses=refused)
    async def voices() -> dict[str, Any]:
        """Voices, the default one first, languages, and what OpenAI's voice names are here."""
        backend = speaker.backend
        return {"voices": list(backend.voices), "languages": list(backend.languages), "aliases": dict(speaker.aliases)}

    @app.get("/health", responses={503: {"description": "The backend has failed; restart the process."}})
    async def health() -> Response:
        """The process lives, and can speak or will be able to."""
        return JSONResponse({"status": "failed"}, 503) if speaker.broken else JSONResponse({"status": "ok"})

    @app.get("/ready", responses={503: {"description": "Loading, shutting down, or failed."}})
    async def ready() -> Response:
        """Warm: a request is spoken without loading or compiling anything."""
        waiting = "failed" if speaker.broken else "draining" if speaker.draining else "loading"
        state = "ready" if speaker.ready else waiting
        return JSONResponse({"status": state}, 200 if speaker.ready else 503)

    @app.get("/metrics", responses={"4XX": {"description": "No key.", "content": _ERROR}})
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(speaker.metrics.text(), media_type=metrics.CONTENT_TYPE)

    return app


def _model(speaker: Speaker) -> dict[str, Any]:
    return {"id": speaker.backend.model, "object": "model", "created": 0, "owned_by": "qwen"}


def _add_errors(app: FastAPI) -> None:
    """Every refusal has OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        unknown = first["type"] == "extra_forbidden"
        message = f"there is no field {where!r} here" if unknown else f"{where}: {first['msg']}"
        return refusal(400, message, "bad_request")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        answer = refusal(error.status_code, str(error.detail), "bad_request")
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(TTSError)
    async def ours(_: Request, error: TTSError) -> Response:
        return failure(error)
