"""A telephone carrier over a WebSocket, as Twilio is one: mu-law at 8 kHz, 20 ms a message, and what the bot sends."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from bots.offline import hear
from bots.script import everything
from tests.talking import PATIENCE_S, Bot, recorded

SAID = tuple(line for line in everything() if line.startswith(("hello i am", "ask me for a capital", "the capital of")))
FRAME = 160
"""Bytes of mu-law in 20 ms at 8 kHz, what carriers send at a time."""


def to_mu_law(samples: np.ndarray) -> bytes:
    """int16 [n] as G.711 mu-law."""
    levels = np.minimum(np.abs(samples.astype(np.int32)), 32635) + 132
    exponent = np.floor(np.log2(levels)).astype(np.int32) - 7
    code = (exponent << 4) | ((levels >> (exponent + 3)) & 15)
    return (~(code | np.where(samples < 0, 0x80, 0)) & 0xFF).astype(np.uint8).tobytes()


def from_mu_law(data: bytes) -> np.ndarray:
    """G.711 mu-law as int16 [n]."""
    code = ~np.frombuffer(data, np.uint8) & 0xFF
    levels = ((((code & 15).astype(np.int32) << 3) + 132) << ((code >> 4) & 7)) - 132
    return np.where(code & 0x80, -levels, levels).astype(np.int16)


class Call:
    """One call: what the carrier sends and what it is sent."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self.events: list[dict[str, Any]] = []

    async def talk(self, name: str) -> None:
        """Send a recording as the line carries it, then silence."""
        line = to_mu_law(np.frombuffer(recorded(name, 8_000), np.int16))
        for start in range(0, len(line), FRAME):
            payload = base64.b64encode(line[start : start + FRAME]).decode()
            await self._socket.send(json.dumps({"event": "media", "streamSid": "MZ1", "media": {"payload": payload}}))
            await asyncio.sleep(0.02)

    async def until(self, *, seconds: float = 0.0, event: str = "media") -> None:
        """Read on until so much speech has come since now, or an event has."""
        heard = 0.0
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = json.loads(await self._socket.recv())
                self.events.append(message)
                if message["event"] == "media":
                    heard += len(base64.b64decode(message["media"]["payload"])) / 8_000
                if message["event"] == event and heard >= seconds:
                    return

    async def until_heard(self, words: str) -> None:
        """Read on until a recogniser hears the words in what has come since `events` was cleared."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.events or words not in understood(self.speech()):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await self.until(seconds=0.25)

    def speech(self) -> np.ndarray:
        """int16 [n] at 8 kHz: what was sent to the caller."""
        return from_mu_law(b"".join(base64.b64decode(e["media"]["payload"]) for e in self.events if "media" in e))


@asynccontextmanager
async def calling(bot: Bot) -> AsyncIterator[Call]:
    async with connect(f"ws://127.0.0.1:{bot.port}/ws", max_size=None, max_queue=None) as socket:
        await socket.send(json.dumps({"event": "connected", "protocol": "Call", "version": "1.0.0"}))
        start = {"streamSid": "MZ1", "callSid": "CA1", "accountSid": "AC1", "customParameters": {}}
        await socket.send(json.dumps({"event": "start", "streamSid": "MZ1", "start": start}))
        yield Call(socket)


def understood(samples: np.ndarray) -> str:
    return hear(np.pad(samples, (0, 4_000)).tobytes(), 8_000, SAID)
