"""TOKEN mode in this process: a reply as the language model writes it is one utterance of the embedded voice."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from pipecat.frames.frames import (
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TextFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    TTSUpdateSettingsFrame,
)
from pipecat.metrics.metrics import TTFBMetricsData, TTSUsageMetricsData
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregator
from pipecat.services.tts_service import TextAggregationMode

from pipecat_qwen3.backend import SAMPLE_RATE, Request
from pipecat_qwen3.errors import EngineError, OverloadedError
from pipecat_qwen3.local import LocalBackend
from pipecat_qwen3.service import Qwen3TTSService
from tests.fakes import FakeBackend
from tests.test_service import Loudspeaker, Recorder, count, kinds, live, metrics, said, samples, speak, turn, words

TOKEN = TextAggregationMode.TOKEN
TOKENS = "The", " meet", "ing", " starts", " at", " ten", ".", " Please", " do", " not", " be", " late", "."
REPLY = "".join(TOKENS)


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    fake = FakeBackend()
    yield fake
    fake.close()


def service(backend: FakeBackend | LocalBackend, **settings) -> Qwen3TTSService:
    return Qwen3TTSService(backend=backend, text_aggregation_mode=TOKEN, settings=Qwen3TTSService.Settings(**settings))


# -- the embedded voice ------------------------------------------------------------------------------------------


async def test_a_reply_of_tokens_is_the_utterance_that_the_engine_makes_of_the_whole_text(
    embedded: LocalBackend,
) -> None:
    context = LLMContext()
    whole = embedded.speak(Request(REPLY, layout="streaming", seed=7, skip_silence=True))
    spoken = np.concatenate([chunk.pcm async for chunk in whole])
    ear = Recorder()
    chain = service(embedded, seed=7), ear, Loudspeaker(), LLMAssistantAggregator(context)
    async with live(*chain) as (worker, _):
        await worker.queue_frames(turn(*TOKENS))
    heard = samples(ear.frames)
    assert len(heard) == len(spoken)
    assert abs(heard.astype(int) - spoken).max() <= 4  # the last bits depend on how many frames are decoded at once
    assert words(ear.frames) == REPLY.split()
    assert said(context) == [REPLY]
    assert kinds(ear.frames, TTSStartedFrame, TTSAudioRawFrame, TTSStoppedFrame, LLMFullResponseEndFrame) == [
        TTSStartedFrame,
        TTSAudioRawFrame,
        TTSStoppedFrame,
        LLMFullResponseEndFrame,
    ]
    assert len(metrics(ear.frames, TTFBMetricsData)) == 1
    assert [usage.value for usage in metrics(ear.frames, TTSUsageMetricsData)] == [len(REPLY)]


async def test_speech_begins_before_the_reply_is_complete(embedded: LocalBackend) -> None:
    async with live(service(embedded)) as (worker, recorder):
        await worker.queue_frames([LLMFullResponseStartFrame(), *map(LLMTextFrame, TOKENS[:8])])
        await recorder.until(count(TTSAudioRawFrame))
        assert not count(TTSStoppedFrame)(recorder.frames)
        await worker.queue_frames([*map(LLMTextFrame, TOKENS[8:]), LLMFullResponseEndFrame()])
        await recorder.until(count(TTSStoppedFrame))
    assert words(recorder.frames) == REPLY.split()


async def test_after_a_barge_in_nothing_is_late_and_the_conversation_holds_what_was_heard(
    embedded: LocalBackend,
) -> None:
    context = LLMContext()
    mouth, ear = Recorder(), Recorder()  # before and behind the transport, which releases a word when it is heard
    chain = service(embedded), mouth, Loudspeaker(), ear, LLMAssistantAggregator(context)
    async with live(*chain) as (worker, recorder):
        await worker.queue_frames(turn(*TOKENS))
        await ear.until(count(TTSTextFrame, 3))
        await worker.queue_frame(InterruptionFrame())
        await recorder.until(count(InterruptionFrame))
        async with asyncio.timeout(5):
            while len(embedded.engine._free) < embedded.engine.step.rows:  # noqa: ASYNC110 - another thread's list
                await asyncio.sleep(0.01)
        assert not count(TTSAudioRawFrame)(mouth.after(InterruptionFrame))
        heard = words(ear.frames)
        assert said(context) == [" ".join(heard)]
        assert REPLY.startswith(said(context)[0])
        assert 3 <= len(heard) < len(REPLY.split())
        await worker.queue_frames(turn("Good", " day."))
        await mouth.until(lambda _: count(TTSStoppedFrame)(mouth.after(InterruptionFrame)))
    assert said(context)[1:] == ["Good day."]


# -- what a model would not do on demand ---------------------------------------------------------------------------


async def test_a_reply_with_nothing_to_speak_is_a_moment_of_silence(backend: FakeBackend) -> None:
    async with live(it := service(backend)) as (worker, recorder):
        await worker.queue_frames(turn("...", " ", "😀"))
        await recorder.until(count(TTSStoppedFrame))
        assert np.array_equal(samples(recorder.frames), np.zeros(SAMPLE_RATE // 50))
        assert not backend.requests
        assert not metrics(recorder.frames, TTFBMetricsData)
        await worker.queue_frames(turn(" — ", "Hel", "lo."))
        await recorder.until(count(TTSStoppedFrame, 2))
        assert it.is_usable
    assert np.array_equal(samples(recorder.frames)[SAMPLE_RATE // 50 :], backend.speech("— Hello."))
    assert len(metrics(recorder.frames, TTFBMetricsData)) == 1


async def test_a_new_voice_goes_on_in_the_middle_of_the_reply_and_its_words_behind_the_others(
    backend: FakeBackend,
) -> None:
    change = TTSUpdateSettingsFrame(delta=Qwen3TTSService.Settings(voice="slt"))
    down, errors = await speak(
        service(backend, voice="rms"),
        *(LLMFullResponseStartFrame(), LLMTextFrame("Hello the"), LLMTextFrame("re. ")),
        change,
        *(LLMTextFrame("How are "), LLMTextFrame("you?"), LLMFullResponseEndFrame()),
    )
    assert [(request.voice, request.skip_silence) for request in backend.requests] == [("rms", True), ("slt", False)]
    spoken = np.concatenate([backend.speech("Hello there. "), backend.speech("How are you?")])
    assert np.array_equal(samples(down), spoken)
    assert words(down) == ["Hello", "there.", "How", "are", "you?"]
    assert not errors


async def test_text_outside_a_turn_waits_for_nothing(backend: FakeBackend) -> None:
    async with live(service(backend)) as (worker, recorder):
        await worker.queue_frames([TextFrame("Hello."), TTSSpeakFrame("And bye.")])
        await recorder.until(count(TTSStoppedFrame, 2))
    spoken = [backend.speech("Hello."), backend.speech("And bye.")]
    assert np.array_equal(samples(recorder.frames), np.concatenate(spoken))


async def test_a_slow_language_model_keeps_its_context(backend: FakeBackend) -> None:
    it = Qwen3TTSService(backend=backend, text_aggregation_mode=TOKEN, stop_frame_timeout_s=0.2)
    async with live(it) as (worker, recorder):
        await worker.queue_frames([LLMFullResponseStartFrame(), LLMTextFrame("Hello ")])
        await recorder.until(count(TTSStartedFrame))
        await asyncio.sleep(0.6)
        await worker.queue_frames([LLMTextFrame("there."), LLMFullResponseEndFrame()])
        await recorder.until(count(TTSStoppedFrame))
    assert np.array_equal(samples(recorder.frames), backend.speech("Hello there."))
    assert sum(isinstance(frame, TTSStartedFrame) for frame in recorder.frames) == 1


async def test_an_engine_that_refuses_or_breaks_is_one_error_and_the_next_reply_is_spoken(
    backend: FakeBackend,
) -> None:
    async with live(it := service(backend)) as (worker, recorder):
        backend.fail = OverloadedError("full")
        await worker.queue_frames(turn("Hel", "lo ", "there."))
        await recorder.until(count(TTSStoppedFrame))
        backend.fail, backend.fail_after = EngineError("it broke"), 3
        await worker.queue_frames(turn("Hel", "lo ", "there."))
        await recorder.until(count(TTSStoppedFrame, 2))
        backend.fail = None
        await worker.queue_frames(turn("Hel", "lo ", "again."))
        await recorder.until(count(TTSStoppedFrame, 3))
        assert it.is_usable
        assert not it._replies
        assert not it._playbacks
    again = backend.speech("Hello again.")
    assert np.array_equal(samples(recorder.frames)[-len(again) :], again)
    assert len(samples(recorder.frames)) == SAMPLE_RATE // 50 + 3 * backend.chunk_samples + len(again)


async def test_a_dead_engine_is_permanent_and_later_replies_end_at_once(backend: FakeBackend) -> None:
    backend.close()
    it = Qwen3TTSService(backend=backend, text_aggregation_mode=TOKEN, stop_frame_timeout_s=60)
    async with asyncio.timeout(20):
        down, errors = await speak(it, *turn("Hello ", "there."), *turn("Any", "one?"))
    assert len(errors) == 1
    assert not it.is_usable
    assert sum(isinstance(frame, TTSStoppedFrame) for frame in down) == 2
