"""Qwen3-TTS inside Pipecat voice agents: text in, 24 kHz speech out, frame by frame.

Names are imported on first use, so that a bot that talks to a remote server needs no torch, and a server no Pipecat.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipecat_qwen3.backend import Backend, Chunk, Request, Result, Stream
    from pipecat_qwen3.errors import TTSError
    from pipecat_qwen3.local import LocalBackend
    from pipecat_qwen3.remote import RemoteBackend
    from pipecat_qwen3.service import Qwen3TTSService
    from pipecat_qwen3.websocket_service import Qwen3WebsocketTTSService

__version__ = "0.1.0"

_HOME = {
    "Backend": "backend",
    "Chunk": "backend",
    "LocalBackend": "local",
    "Qwen3TTSService": "service",
    "Qwen3WebsocketTTSService": "websocket_service",
    "RemoteBackend": "remote",
    "Request": "backend",
    "Result": "backend",
    "Stream": "backend",
    "TTSError": "errors",
}

__all__ = [
    "Backend",
    "Chunk",
    "LocalBackend",
    "Qwen3TTSService",
    "Qwen3WebsocketTTSService",
    "RemoteBackend",
    "Request",
    "Result",
    "Stream",
    "TTSError",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
