"""Socket messages in, checked values out, and back: the protocol that docs/protocol.md describes.

Shared by the server and its clients. Knows no socket, no engine, no web framework.
"""

import base64
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipecat_qwen3.backend import MAX_LEAD_S, Layout, Result
from pipecat_qwen3.errors import (
    BackendError,
    BadRequestError,
    CheckpointError,
    ConnectionFailedError,
    DownloadError,
    EngineError,
    OverloadedError,
    TextTimeoutError,
    TTSError,
    UnauthorizedError,
    UnknownNameError,
)

VERSION = 1

SUBPROTOCOL = f"pipecat-qwen3.v{VERSION}"
"""What a client offers in Sec-WebSocket-Protocol; a client that offers nothing gets it too."""

MAX_CONTEXT_ID = 64
"""Bytes of a context id in UTF-8."""


ERRORS: dict[str, type[TTSError]] = {
    kind.code: kind
    for kind in (
        TTSError,
        BadRequestError,
        UnknownNameError,
        CheckpointError,
        DownloadError,
        BackendError,
        OverloadedError,
        TextTimeoutError,
        EngineError,
        ConnectionFailedError,
        UnauthorizedError,
    )
}
"""What each code on the wire is here."""


# Lax about the array itself, because JSON has no tuples, but not about what is in it.
Ramp = Annotated[tuple[Annotated[int, Field(strict=True)], ...], Field(strict=False, min_length=1, max_length=32)]


class Settings(BaseModel):
    """How to speak: the fields of a Request other than its text, under the same names. None: the server's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    voice: str | None = None
    language: str | None = None
    instruct: str | None = None
    layout: Layout | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    greedy: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    predictor_temperature: float | None = None
    predictor_top_k: int | None = None
    predictor_top_p: float | None = None
    max_frames: int | None = None
    ramp: Ramp | None = None
    ahead_s: float | None = 10.0
    skip_silence: bool = False
    lead_s: float = Field(0.0, ge=0, le=MAX_LEAD_S)


SETTINGS = tuple(Settings.model_fields)

ContextId = Annotated[str, Field(min_length=1, max_length=MAX_CONTEXT_ID)]


class Text(Settings):
    """More text of a context, with the settings it is to be spoken with."""

    type: Literal["text"]
    context_id: ContextId
    text: str
    flush: bool = False
    codes: bool = False

    def settings(self) -> dict[str, Any]:
        """The settings as keyword arguments of a Request; without ahead_s if nothing was said of it."""
        said = [name for name in SETTINGS if name != "ahead_s" or name in self.model_fields_set]
        return {name: getattr(self, name) for name in said}


class Flush(BaseModel):
    """The text of a context is complete."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["flush"]
    context_id: ContextId


class Cancel(BaseModel):
    """A context is to be silent from now on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["cancel"]
    context_id: ContextId


class Ping(BaseModel):
    """Wants a pong with the same id."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["ping"]
    id: Annotated[str, Field(max_length=64)] | int | None = None


ClientMessage = Text | Flush | Cancel | Ping

_CLIENT = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])


def parse(raw: str) -> ClientMessage:
    """A client's text message. Raises BadRequestError, which says what is wrong with it in one line."""
    try:
        message = _CLIENT.validate_json(raw)
    except ValidationError as error:
        raise BadRequestError(one_line(error)) from None
    if isinstance(message, Text | Flush | Cancel) and len(message.context_id.encode()) > MAX_CONTEXT_ID:
        raise BadRequestError(f"context_id should have at most {MAX_CONTEXT_ID} bytes")
    return message


def context_of(raw: str) -> str | None:
    """The context that a message wrongly formed in other ways belongs to, if that can be read."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    context = found.get("context_id") if isinstance(found, dict) else None
    if not isinstance(context, str) or any("\ud800" <= c <= "\udfff" for c in context):
        return None  # what no answer can name
    return context if 0 < len(context) <= MAX_CONTEXT_ID else None


def one_line(error: ValidationError) -> str:
    """The first complaint of a validation in words: where, what was wanted, what came."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("text", "flush", "cancel", "ping", "body"))
    if first["loc"][-1:] in (("text",), ("flush",)) and len(first["loc"]) > 1:
        where = str(first["loc"][-1])
    if first["type"] == "extra_forbidden":
        return f"there is no field {where!r} here"
    came = "" if first["type"] in ("missing", "json_invalid") else f", but is {_short(first['input'])}"
    return f"{where + ': ' if where else ''}{first['msg'][:200]}{came}"


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "…"


# -- what the server says --------------------------------------------------------------------------------------


def hello(model: str, voices: tuple[str, ...], languages: tuple[str, ...], sample_rate: int) -> dict[str, Any]:
    """The server's first message."""
    return {
        "type": "ready",
        "protocol": VERSION,
        "model": model,
        "voices": list(voices),
        "languages": list(languages),
        "sample_rate": sample_rate,
    }


def audio(context_id: str, pcm: np.ndarray) -> bytes:
    """A binary message: one byte length of the context id, the id in UTF-8, int16 little-endian samples [n]."""
    name = context_id.encode()
    return bytes([len(name)]) + name + pcm.astype("<i2", copy=False).tobytes()


def parse_audio(message: bytes) -> tuple[str, np.ndarray]:
    """Context id and int16 [n] samples of a binary message."""
    start = 1 + message[0]
    return message[1:start].decode(), np.frombuffer(message[start:], "<i2").astype(np.int16, copy=False)


def words(context_id: str, found: tuple[tuple[str, float], ...]) -> dict[str, Any]:
    """Words that begin in the audio sent so far, with their seconds from the context's first sample."""
    return {"type": "words", "context_id": context_id, "words": [[word, round(at, 4)] for word, at in found]}


def spoken(result: Result, with_codes: bool) -> dict[str, Any]:
    """How one utterance of a context ended."""
    told: dict[str, Any] = {
        "end": result.end,
        "frames": result.frames,
        "seed": result.seed,
        "skipped_samples": result.skipped_samples,
        "restarts": result.restarts,
    }
    if with_codes and result.codes is not None:
        told["codes"] = base64.b64encode(result.codes.astype("<i2").tobytes()).decode()
        told["codebooks"] = result.codes.shape[1]
    return told


def parse_spoken(told: Mapping[str, Any]) -> Result:
    """The Result of an utterance from what the server said."""
    codes = None
    if "codes" in told:
        codes = np.frombuffer(base64.b64decode(told["codes"]), "<i2").reshape(-1, told["codebooks"]).astype(np.int16)
    counts = {"skipped_samples": told["skipped_samples"], "restarts": told.get("restarts", 0)}
    return Result(told["end"], told["frames"], told["seed"], **counts, codes=codes)


def done(context_id: str, end: str, utterances: list[dict[str, Any]]) -> dict[str, Any]:
    """Nothing more will come for a context."""
    return {"type": "done", "context_id": context_id, "end": end, "utterances": utterances}


def error(failure: TTSError, context_id: str | None = None) -> dict[str, Any]:
    """A failure; with a context id it ends that context."""
    told = {"type": "error", "code": failure.code, "message": str(failure)}
    return told if context_id is None else {**told, "context_id": context_id}


def raised(code: str, message: str) -> TTSError:
    """The error that a code and a message of the server stand for."""
    return ERRORS.get(code, TTSError)(message)


# -- what a client says ----------------------------------------------------------------------------------------

_DEFAULTS = {name: field.get_default() for name, field in Settings.model_fields.items()}


def text(context_id: str, piece: str, settings: Mapping[str, Any], flush: bool = False) -> str:
    """More text of a context; settings that equal the defaults are left out."""
    given = {name: value for name, value in settings.items() if value != _DEFAULTS[name]}
    message = {"type": "text", "context_id": context_id, "text": piece, "codes": True, **given}
    return json.dumps({**message, "flush": True} if flush else message)


def flush(context_id: str) -> str:
    """No more text will come for a context."""
    return json.dumps({"type": "flush", "context_id": context_id})


def cancel(context_id: str) -> str:
    """A context is to be silent."""
    return json.dumps({"type": "cancel", "context_id": context_id})
