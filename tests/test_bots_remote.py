"""The agent in an environment without torch: a server speaks for it, and all it can lack is said in one line."""

from collections.abc import Iterator

import pytest

from tests.fakes import FakeBackend
from tests.serving import Served, serving
from tests.talking import Bot, talking

KEY = "a-key-of-the-test"
NO_TORCH = "sys.modules['torch'] = None"


@pytest.fixture(scope="module")
def backend() -> Iterator[FakeBackend]:
    fake = FakeBackend(languages=("english",))
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def server(backend: FakeBackend) -> Iterator[Served]:
    with serving(lambda: backend, api_key=KEY) as served:
        yield served


async def test_the_agent_talks_where_torch_cannot_be_imported(server: Served, backend: FakeBackend) -> None:
    with Bot("remote_agent", "--url", server.ws, before=NO_TORCH, env={"PIPECAT_QWEN3_API_KEY": KEY}) as bot:
        async with talking(bot) as talker:
            there = await talker.server_message("voices")
            assert (there["voices"], there["model"]) == (list(backend.voices), "fake")
            await talker.event("bot-stopped-speaking")
            await talker.speak("capital_of_germany")
            assert "Berlin" in await talker.reply("Berlin")
            assert talker.told("latency")[0]["total_ms"] > 0
    greeting, answer = backend.requests
    assert not isinstance(greeting.text, str), "each reply goes to the server word by word"
    assert not isinstance(answer.text, str)


def test_a_wrong_key_is_said_in_one_line(server: Served) -> None:
    bot = Bot("remote_agent", "--url", server.ws, "--api-key", "wrong", before=NO_TORCH)
    assert bot.ended() != 0
    assert "wants another API key" in bot.lines[-1]


def test_a_server_that_is_not_there_is_said_in_one_line() -> None:
    bot = Bot("remote_agent", "--url", "ws://127.0.0.1:1/v1/audio/speech/ws", before=NO_TORCH)
    assert bot.ended() != 0
    assert "127.0.0.1:1" in bot.lines[-1]
    assert bot.lines[-1].endswith("start pipecat-qwen3 serve there, or choose --url")
