"""The Pipecat service that talks to a server on loopback: sentences, tokens, words, barge-ins, failures."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from pipecat.frames.frames import (
    ErrorFrame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSUpdateSettingsFrame,
)
from pipecat.metrics.metrics import TTFBMetricsData
from pipecat.pipeline.service_switcher import ServiceSwitcher, ServiceSwitcherStrategyFailover
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregator
from pipecat.services.tts_service import TextAggregationMode
from pipecat.utils.errors import ErrorCategory

from pipecat_qwen3.errors import BadRequestError, OverloadedError, UnknownNameError
from pipecat_qwen3.remote import LASTING_S
from pipecat_qwen3.server_speaker import Limits
from pipecat_qwen3.service import Qwen3TTSService
from pipecat_qwen3.websocket_service import Qwen3WebsocketTTSService
from tests.fakes import FakeBackend
from tests.serving import Served, serving
from tests.test_service import Loudspeaker, count, live, metrics, said, samples, speak, turn, words

TOKEN = TextAggregationMode.TOKEN


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def server(backend: FakeBackend) -> Iterator[Served]:
    with serving(lambda: backend) as served:
        yield served


def test_importing_the_service_loads_no_torch() -> None:
    code = "import pipecat_qwen3, sys; pipecat_qwen3.Qwen3WebsocketTTSService; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_sentences_are_spoken_as_the_server_speaks_them(backend: FakeBackend, server: Served) -> None:
    service = Qwen3WebsocketTTSService(url=server.ws, settings=Qwen3WebsocketTTSService.Settings(voice="slt"))
    down, errors = await speak(service, *turn("Hello there. ", "How are you?"))
    assert np.array_equal(
        samples(down), np.concatenate([backend.speech("Hello there."), backend.speech("How are you?")])
    )
    assert words(down) == ["Hello", "there.", "How", "are", "you?"]
    assert [request.voice for request in backend.requests] == ["slt", "slt"]
    assert len(metrics(down, TTFBMetricsData)) == 1
    assert not errors


async def test_tokens_are_one_utterance_that_starts_before_the_reply_is_complete(
    backend: FakeBackend, server: Served
) -> None:
    service = Qwen3WebsocketTTSService(url=server.ws, text_aggregation_mode=TOKEN)
    async with live(service) as (worker, recorder):
        await worker.queue_frames([LLMFullResponseStartFrame(), LLMTextFrame("Hel"), LLMTextFrame("lo the")])
        async with asyncio.timeout(10):
            while not backend.requests:  # noqa: ASYNC110 - the backend knows no event of this loop
                await asyncio.sleep(0.01)
        assert not isinstance(backend.requests[0].text, str)
        await worker.queue_frames([LLMTextFrame("re. How"), LLMTextFrame(" are you?"), LLMFullResponseEndFrame()])
        await recorder.until(count(LLMFullResponseEndFrame))
    assert len(backend.requests) == 1
    assert np.array_equal(samples(recorder.frames), backend.speech("Hello there. How are you?"))
    assert words(recorder.frames) == ["Hello", "there.", "How", "are", "you?"]
    assert count(TTSStartedFrame)(recorder.frames)
    assert sum(isinstance(frame, TTSStoppedFrame) for frame in recorder.frames) == 1
    assert len(metrics(recorder.frames, TTFBMetricsData)) == 1


async def test_a_speak_frame_in_token_mode_is_an_utterance_of_its_own(backend: FakeBackend, server: Served) -> None:
    service = Qwen3WebsocketTTSService(url=server.ws, text_aggregation_mode=TOKEN)
    down, errors = await speak(service, TTSSpeakFrame("One here."), TTSSpeakFrame("Two."))
    assert np.array_equal(samples(down), np.concatenate([backend.speech("One here."), backend.speech("Two.")]))
    assert not errors


async def test_in_token_mode_another_voice_goes_on_in_the_middle_of_the_reply(
    backend: FakeBackend, server: Served
) -> None:
    service = Qwen3WebsocketTTSService(url=server.ws, text_aggregation_mode=TOKEN)
    change = TTSUpdateSettingsFrame(delta=Qwen3WebsocketTTSService.Settings(voice="slt"))
    down, errors = await speak(
        service,
        *(LLMFullResponseStartFrame(), LLMTextFrame("Hello the"), LLMTextFrame("re. ")),
        change,
        *(LLMTextFrame("How are "), LLMTextFrame("you?"), LLMFullResponseEndFrame()),
    )
    assert [request.voice for request in backend.requests] == [None, "slt"]
    spoken = np.concatenate([backend.speech("Hello there. "), backend.speech("How are you?")])
    assert np.array_equal(samples(down), spoken)
    assert not errors


@pytest.mark.parametrize("mode", [None, TOKEN])
async def test_the_conversation_holds_every_word_once(backend: FakeBackend, server: Served, mode) -> None:
    backend.seconds_per_char = 0.01
    context = LLMContext()
    service = Qwen3WebsocketTTSService(url=server.ws, text_aggregation_mode=mode)
    async with live(service, Loudspeaker(), LLMAssistantAggregator(context)) as (worker, _):
        await worker.queue_frames(turn("Hello ", "there, my fri", "end. It costs ", "42.50, or so. By", "e!"))
    assert said(context) == ["Hello there, my friend. It costs 42.50, or so. Bye!"]


@pytest.mark.parametrize("mode", [None, TOKEN])
async def test_a_barge_in_ends_the_voice_on_the_server_and_no_late_audio_comes(
    backend: FakeBackend, server: Served, mode
) -> None:
    backend.pace = 0.5
    service = Qwen3WebsocketTTSService(url=server.ws, text_aggregation_mode=mode)
    async with live(service) as (worker, recorder):
        await worker.queue_frames(turn("One two three four five six seven eight nine ten eleven twelve thirteen."))
        await recorder.until(count(TTSAudioRawFrame))
        await worker.queue_frame(InterruptionFrame())
        await recorder.until(count(InterruptionFrame))
        async with asyncio.timeout(5):
            while server.speaker.open_voices:  # noqa: ASYNC110 - the server knows no event of this loop
                await asyncio.sleep(0.01)
        assert not [f for f in recorder.after(InterruptionFrame) if isinstance(f, TTSAudioRawFrame)]
        backend.pace = None
        await worker.queue_frames(turn("Good day."))
        await recorder.until(count(TTSStoppedFrame, 1))
    assert np.array_equal(samples(recorder.after(InterruptionFrame)), backend.speech("Good day."))


@pytest.mark.parametrize("mode", [None, TOKEN])
@pytest.mark.parametrize(
    ("failure", "category"),
    [
        (OverloadedError("no room"), ErrorCategory.RATE_LIMIT),
        (BadRequestError("what a text"), ErrorCategory.APPLICATION),
        (UnknownNameError("who is that"), ErrorCategory.INVALID_REQUEST),
    ],
)
async def test_what_the_server_refuses_is_an_error_of_its_category(
    backend: FakeBackend, server: Served, failure, category, mode
) -> None:
    backend.fail = failure
    service = Qwen3WebsocketTTSService(url=server.ws, text_aggregation_mode=mode)
    down, errors = await speak(service, *turn("Hello ", "there."))
    assert [(error.category, str(failure) in error.error) for error in errors] == [(category, True)]
    assert service.is_usable == (category != ErrorCategory.INVALID_REQUEST)
    assert len(samples(down)) == 480  # 20 ms of silence: a turn without audio would be another error


async def test_a_wrong_key_makes_the_service_unusable() -> None:
    with serving(FakeBackend, api_key="right") as served:
        service = Qwen3WebsocketTTSService(url=served.ws, api_key="wrong")
        _, errors = await speak(service, *turn("Hello."))
        assert errors[0].category == ErrorCategory.AUTHENTICATION
        assert not service.is_usable
        right = Qwen3WebsocketTTSService(url=served.ws, api_key="right")
        down, errors = await speak(right, *turn("Hello."))
        assert len(samples(down))
        assert not errors


@pytest.mark.parametrize("mode", [None, TOKEN])
async def test_after_the_server_is_gone_and_back_the_bot_speaks_again(mode) -> None:
    first = FakeBackend(pace=1.0)
    errors: list[ErrorFrame] = []
    with serving(lambda: first) as served:
        service = Qwen3WebsocketTTSService(url=served.ws, text_aggregation_mode=mode)
        service.add_event_handler("on_connection_error", lambda _, error: errors.append(error))
        async with live(service) as (worker, recorder):
            await worker.queue_frames(turn("A sentence that is long enough to be cut off."))
            await recorder.until(count(TTSAudioRawFrame))
            served.server.should_exit = served.server.force_exit = True
            await recorder.until(count(TTSStoppedFrame))  # the turn ends although its server is dead
            assert service.is_usable
            second = FakeBackend()
            with serving(lambda: second, port=served.port):
                before = len(recorder.frames)
                async with asyncio.timeout(10):
                    while not service._remote.ready:  # noqa: ASYNC110 - the network thread knows no event of ours
                        await asyncio.sleep(0.02)
                await worker.queue_frames(turn("Here again."))
                await recorder.until(count(TTSStoppedFrame, 2))
                assert np.array_equal(samples(recorder.frames[before:]), second.speech("Here again."))
    assert errors


@pytest.mark.parametrize("orderly", [False, True])
async def test_when_the_server_stays_away_a_switcher_fails_over_and_may_come_back(orderly: bool) -> None:
    spare = FakeBackend()
    with serving(FakeBackend) as served:
        service = Qwen3WebsocketTTSService(url=served.ws, give_up_s=0.3)
        switcher = ServiceSwitcher([service, Qwen3TTSService(backend=spare)], ServiceSwitcherStrategyFailover)
        async with live(switcher) as (worker, recorder):
            await worker.queue_frame(TTSSpeakFrame("Hello there."))
            await recorder.until(count(TTSStoppedFrame))
            assert not spare.requests
            if orderly:  # as at SIGTERM
                await asyncio.sleep(2 * LASTING_S)
                served.server.handle_exit(15, None)
            else:
                served.server.should_exit = served.server.force_exit = True
            async with asyncio.timeout(10):
                while service.is_usable:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            await worker.queue_frame(TTSSpeakFrame("Hello again."))
            await recorder.until(count(TTSStoppedFrame, 2))
            assert [request.text for request in spare.requests] == ["Hello again."]
            with serving(FakeBackend, port=served.port):
                async with asyncio.timeout(10):
                    while not service.is_usable:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
    spare.close()


async def test_options_of_the_local_service_are_refused(server: Served) -> None:
    for options in ({"nonsense": 1}, {"voice": "slt"}, {"backend": FakeBackend()}, {"device": "cpu"}):
        with pytest.raises((UnknownNameError, TypeError)):
            Qwen3WebsocketTTSService(url=server.ws, **options)  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match="ws://"):
        Qwen3WebsocketTTSService(url="http://127.0.0.1:8880")


async def test_a_text_that_is_too_long_for_the_server_is_said_so(backend: FakeBackend) -> None:
    with serving(lambda: backend, limits=Limits(text=20)) as served:
        service = Qwen3WebsocketTTSService(url=served.ws)
        _, errors = await speak(service, *turn("This sentence has more than twenty characters."))
        assert "at most 20 characters" in errors[0].error
        assert errors[0].category == ErrorCategory.APPLICATION
