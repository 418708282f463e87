"""The bot on the telephone: a fake carrier calls it over a WebSocket, as Twilio does, and hears and interrupts it."""

import asyncio
import json
from collections.abc import Iterator

import numpy as np
import pytest
from websockets.asyncio.client import connect

from tests.carrier import calling, from_mu_law, to_mu_law
from tests.talking import Bot


@pytest.fixture(scope="module")
def phone() -> Iterator[Bot]:
    with Bot("phone", "--voice", "slt") as bot:
        yield bot


def test_the_test_speaks_mu_law() -> None:
    samples = np.arange(-32000, 32000, 7, dtype=np.int16)
    assert np.abs(from_mu_law(to_mu_law(samples)).astype(int) - samples).max() <= 1024
    assert to_mu_law(np.zeros(1, np.int16)) == b"\xff"


async def test_a_caller_hears_the_greeting_and_the_answer(phone: Bot) -> None:
    async with calling(phone) as call:
        await call.until_heard("for a capital")
        call.events.clear()
        await call.talk("capital_of_germany")
        await call.until_heard("is berlin")
        assert {event["streamSid"] for event in call.events} == {"MZ1"}
        spectrum = np.abs(np.fft.rfft(call.speech().astype(float)))
        assert spectrum[: len(spectrum) // 2].sum() > spectrum[len(spectrum) // 2 :].sum(), "speech, at its own pitch"


async def test_a_caller_who_speaks_up_clears_the_line(phone: Bot) -> None:
    async with calling(phone) as call:
        await call.until_heard("for a capital")
        await call.talk("story")
        call.events.clear()
        await call.until(seconds=2.0)
        call.events.clear()
        talk = asyncio.create_task(call.talk("capital_of_france"))
        await call.until(event="clear")
        call.events.clear()
        await talk
        await call.until_heard("is paris")


async def test_a_call_by_another_carriers_protocol_is_refused_in_one_line(phone: Bot) -> None:
    async with connect(f"ws://127.0.0.1:{phone.port}/ws") as socket:
        await socket.send(json.dumps({"event": "connected"}))
        media = {"encoding": "PCMU", "sample_rate": 8000, "channels": 1}
        start = {"call_control_id": "c", "media_format": media, "custom_parameters": {}}
        await socket.send(json.dumps({"event": "start", "stream_id": "s", "start": start}))
        await socket.wait_closed()
    assert any("speaks Twilio's protocol, and telnyx called" in line for line in phone.lines)
