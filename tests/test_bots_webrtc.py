"""Eight clients that others wrote (aiortc) type to the voice agent over WebRTC at once, as eight pages would."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import pytest

from tests.talking import PATIENCE_S, Bot, Talker
from tests.test_bots import CAPITALS, COUNT_ENGINES

aiortc = pytest.importorskip("aiortc", reason="needs the extra [bots]")

PLACES = {"Germany": "Berlin", "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}

QUIET = 100
"""Samples (int16) of 20 ms that are no louder than this are no speech."""


class Peer:
    """One client's data channel, in the shape of a Talker's socket, and what it hears."""

    def __init__(self) -> None:
        self.connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        self._channel = self.connection.createDataChannel("signalling", ordered=True)
        self._messages: asyncio.Queue[str] = asyncio.Queue()
        self._open = asyncio.Event()
        self._channel.on("open", self._open.set)
        self._channel.on("message", self._messages.put_nowait)
        self.connection.on("track", self._listen)
        self.tasks: list[asyncio.Task[None]] = []
        self.talker: Talker | None = None

    async def connect(self, url: str) -> None:
        # No microphone: where a bot cannot listen as fast as eight of them speak, it does not get to what is typed.
        self.connection.addTransceiver("audio", direction="recvonly")
        self.connection.addTransceiver("video", direction="recvonly")
        await self.connection.setLocalDescription(await self.connection.createOffer())
        local = self.connection.localDescription
        offer = {"sdp": local.sdp, "type": local.type}
        async with aiohttp.ClientSession() as http, http.post(url, json=offer) as answer:
            assert answer.status == 200, await answer.text()
            remote = await answer.json()
        await self.connection.setRemoteDescription(aiortc.RTCSessionDescription(remote["sdp"], remote["type"]))
        await self._open.wait()
        self.tasks.append(asyncio.create_task(self._keep_alive()))

    async def send(self, message: str) -> None:
        self._channel.send(message)

    async def recv(self) -> str:
        return await self._messages.get()

    def _listen(self, track: Any) -> None:
        if track.kind == "audio":
            self.tasks.append(asyncio.create_task(self._hear(track)))

    async def _hear(self, track: Any) -> None:
        with contextlib.suppress(aiortc.mediastreams.MediaStreamError):
            while True:
                frame = await track.recv()
                left = frame.to_ndarray().reshape(-1, len(frame.layout.channels))[:, 0]
                # Where the bot speaks slower than it should, silence is put between its words and into them.
                if self.talker is not None and np.abs(left).max() > QUIET:
                    self.talker.hears(frame.sample_rate, left)

    async def _keep_alive(self) -> None:
        while True:  # as the page's client does; a bot that misses it thinks that the page is gone
            self._channel.send(f"ping: {asyncio.get_running_loop().time()}")
            await asyncio.sleep(1)


@asynccontextmanager
async def calling(bot: Bot) -> AsyncIterator[Talker]:
    """A client that is connected and ready."""
    peer = Peer()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await peer.connect(f"http://127.0.0.1:{bot.port}/api/offer")
        talker = peer.talker = Talker(peer)
        await talker.say("client-ready", {"version": "1.2.0", "about": {"library": "test"}})
        await talker.event("bot-ready")
        yield talker
    finally:
        for task in peer.tasks:
            task.cancel()
        await asyncio.gather(*peer.tasks, return_exceptions=True)
        await peer.connection.close()


@pytest.fixture
def agent() -> Iterator[Bot]:
    with Bot("voice_agent", "-t", "webrtc", before=COUNT_ENGINES) as bot:
        yield bot


@pytest.mark.parametrize("clients", [1, pytest.param(8, marks=pytest.mark.slow)])
async def test_clients_over_webrtc_each_hear_their_own_answer_from_one_engine(agent: Bot, clients: int) -> None:
    asked = [list(PLACES)[number % len(PLACES)] for number in range(clients)]

    async def ask(country: str) -> str:
        async with calling(agent) as talker:
            await talker.type(f"What is the capital of {country}?")
            await talker.reply(PLACES[country])
            await asyncio.sleep(0.5)  # what is still in the jitter buffer
            return talker.heard(CAPITALS)

    heard = await asyncio.gather(*(ask(country) for country in asked))
    assert all(PLACES[country].lower() in words.split() for country, words in zip(asked, heard, strict=True)), heard
    assert agent.lines.count("an engine was made") == 1
