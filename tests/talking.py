"""A bot as a process of its own, and the clients that talk to it: Pipecat's eval transport, and a telephone carrier."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import wave
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import soxr
from websockets.asyncio.client import connect

from bots.offline import hear

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "bots" / "evals" / "audio"
PATIENCE_S = 120.0
"""A machine that does other things as well may be so slow; nothing here is about speed."""


class Bot:
    """`python -m bots.NAME` on a free port; what it prints is in `lines`."""

    def __init__(self, name: str, *arguments: str, before: str = "", env: dict[str, str] | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        # As `-m` would, after a line of the test's own.
        argv = [f"bots.{name}", "--host", "127.0.0.1", "--port", str(self.port), *arguments]
        start = f"runpy.run_module('bots.{name}', run_name='__main__', alter_sys=True)"
        program = f"import runpy, sys\n{before}\nsys.argv = {argv!r}\n{start}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append(line.rstrip())
                if "Uvicorn running" in line:
                    self._listening.set()
        self._listening.set()

    def __enter__(self) -> Self:
        assert self._listening.wait(PATIENCE_S), self.log()
        assert self.process.poll() is None, self.log()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(20)

    def ended(self) -> int:
        """The exit status of a bot that ends by itself."""
        self.process.wait(PATIENCE_S)
        self._reader.join(20)
        return self.process.returncode

    def log(self) -> str:
        return "\n".join(self.lines)


class Wire(Protocol):
    """What carries RTVI messages."""

    async def send(self, message: str, /) -> None: ...

    async def recv(self) -> str | bytes: ...


class Talker:
    """One client, over the transport of Pipecat's evals or another one: types or speaks, and keeps what it gets."""

    def __init__(self, socket: Wire) -> None:
        self._socket = socket
        self.messages: list[dict[str, Any]] = []
        self._audio: list[tuple[int, np.ndarray]] = []

    async def say(self, kind: str, data: dict[str, Any] | None = None, message_id: str = "1") -> None:
        await self._socket.send(json.dumps({"label": "rtvi-ai", "type": kind, "id": message_id, "data": data or {}}))

    async def type(self, text: str) -> None:
        await self.say("send-text", {"content": text, "options": {"run_immediately": True, "audio_response": True}})

    async def ask(self, kind: str, data: dict[str, Any]) -> None:
        await self.say("client-message", {"t": kind, "d": data})

    async def speak(self, recording: str) -> None:
        """Play a recording as fast as one speaks, with silence behind it, at the rate that Pipecat's bots listen at."""
        for start in range(0, len(pcm := recorded(recording, 16_000)), 1280):
            audio = base64.b64encode(pcm[start : start + 1280]).decode()
            await self.say("raw-audio", {"base64Audio": audio, "sampleRate": 16_000, "numChannels": 1})
            await asyncio.sleep(0.04)

    async def until(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Read on to the first message that meets a condition."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = json.loads(await self._socket.recv())
                if message["type"] == "eval-bot-audio":
                    data = message["data"]
                    self.hears(data["sampleRate"], np.frombuffer(base64.b64decode(data["audio"]), np.int16))
                    continue
                self.messages.append(message)
                if condition(message):
                    return message

    def hears(self, rate: int, samples: np.ndarray) -> None:
        """Keep speech of the bot, int16."""
        self._audio.append((rate, samples))

    async def event(self, kind: str) -> dict[str, Any]:
        return await self.until(lambda message: message["type"] == kind)

    async def server_message(self, kind: str) -> dict[str, Any]:
        found = await self.until(lambda m: m["type"] == "server-message" and m["data"].get("type") == kind)
        return found["data"]

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The bot's own messages of a kind, so far."""
        own = [message["data"] for message in self.messages if message["type"] == "server-message"]
        return [message for message in own if message["type"] == kind]

    async def reply(self, part: str) -> str:
        """The sentences of the reply that holds `part`, once it has been spoken to its end."""
        said = ""
        while part not in said:
            message = await self.until(lambda message: message["type"] in ("bot-llm-started", "bot-llm-text"))
            said = "" if message["type"] == "bot-llm-started" else said + message["data"]["text"]
        self._audio.clear()
        await self.event("bot-stopped-speaking")
        return said

    def heard(self, sentences: list[str]) -> str:
        """What a recogniser for these sentences hears in the speech since the last `reply` began."""
        rate = self._audio[0][0]
        samples = np.concatenate([audio for _, audio in self._audio] + [np.zeros(rate // 2, np.int16)])
        return hear(samples.tobytes(), rate, tuple(sentences))


def recorded(name: str, rate: int) -> bytes:
    """PCM16 of a recording of the evals at another rate, and a second and a half of silence."""
    with wave.open(str(RECORDED / f"{name}.wav")) as file:
        samples = np.frombuffer(file.readframes(10**9), np.int16)
        samples = soxr.resample(samples.astype(np.float32), file.getframerate(), rate)
    return samples.astype(np.int16).tobytes() + bytes(3 * rate)


@asynccontextmanager
async def talking(bot: Bot) -> AsyncIterator[Talker]:
    """A client that is connected and ready."""
    async with connect(f"ws://127.0.0.1:{bot.port}/ws", max_size=None, max_queue=None) as socket:
        talker = Talker(socket)
        await talker.say("client-message", {"t": "eval-connect", "d": {"capture_bot_audio": True}}, "eval-connect")
        await talker.say("client-ready", {"version": "1.2.0", "about": {"library": "test"}})
        await talker.event("bot-ready")
        yield talker
