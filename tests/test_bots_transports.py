"""The voice agent over what is not WebRTC: a telephone line, and a browser's WebSocket that carries protobuf."""

import base64
import json
from collections.abc import Iterator

import pytest
from pipecat.frames.frames import InputAudioRawFrame, InputTransportMessageFrame, OutputTransportMessageFrame
from pipecat.serializers.protobuf import ProtobufFrameSerializer
from websockets.asyncio.client import ClientConnection, connect

from bots.script import GREETING, everything
from tests.carrier import calling
from tests.talking import Bot, Talker

ACCOUNT = {"TWILIO_ACCOUNT_SID": "AC1", "TWILIO_AUTH_TOKEN": "of the test"}


@pytest.fixture(scope="module")
def agent() -> Iterator[Bot]:
    with Bot("voice_agent", "--voice", "slt", env=ACCOUNT) as bot:
        yield bot


class Protobuf:
    """RTVI messages and speech in Pipecat's protobuf frames."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._serializer = socket, ProtobufFrameSerializer()

    async def send(self, message: str) -> None:
        data = await self._serializer.serialize(OutputTransportMessageFrame(json.loads(message)))
        assert data is not None
        await self._socket.send(data)

    async def recv(self) -> str:
        while True:
            frame = await self._serializer.deserialize(await self._socket.recv())
            if isinstance(frame, InputTransportMessageFrame):
                return json.dumps(frame.message)
            if isinstance(frame, InputAudioRawFrame):
                audio = {"sampleRate": frame.sample_rate, "audio": base64.b64encode(frame.audio).decode()}
                return json.dumps({"type": "eval-bot-audio", "data": audio})


async def test_a_browser_over_a_websocket_is_greeted_and_answered_aloud(agent: Bot) -> None:
    async with connect(f"ws://127.0.0.1:{agent.port}/ws-client", max_size=None, max_queue=None) as socket:
        talker = Talker(Protobuf(socket))
        await talker.say("client-ready", {"version": "1.2.0", "about": {"library": "test"}})
        assert GREETING in await talker.reply("capital")
        await talker.type("What is the capital of France?")
        assert "Paris" in await talker.reply("Paris")
        assert "paris" in talker.heard(everything()).split()


async def test_a_telephone_is_greeted_as_soon_as_it_rings_and_answered(agent: Bot) -> None:
    async with calling(agent) as call:
        await call.until_heard("for a capital")
        call.events.clear()
        await call.talk("capital_of_germany")
        await call.until_heard("is berlin")
