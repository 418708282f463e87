"""Frames in, frames out: the Pipecat service over a FakeBackend, in real pipelines with real workers."""

import asyncio
import math
import subprocess
import sys
import threading
import types
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
import soxr
from loguru import logger
from pipecat.evals.tts import CachingTTSService
from pipecat.frames.frames import (
    AggregatedTextFrame,
    CancelFrame,
    EndFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    MetricsFrame,
    OutputAudioRawFrame,
    StartFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    TTSUpdateSettingsFrame,
)
from pipecat.metrics.metrics import MetricsData, TTFAMetricsData, TTFBMetricsData, TTSUsageMetricsData
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.service_switcher import ServiceSwitcher, ServiceSwitcherStrategyFailover
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregator
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.tts_service import TextAggregationMode
from pipecat.tests.utils import run_test
from pipecat.transcriptions.language import Language
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams
from pipecat.utils.errors import ErrorCategory
from pipecat.workers.runner import WorkerRunner

from pipecat_qwen3 import playback as playback_module
from pipecat_qwen3 import service as service_module
from pipecat_qwen3 import service_speech as speech_module
from pipecat_qwen3.backend import FRAME_SAMPLES, SAMPLE_RATE, Chunk, Result, Stream
from pipecat_qwen3.errors import (
    BackendError,
    BadRequestError,
    CheckpointError,
    DownloadError,
    EngineError,
    OverloadedError,
    TextTimeoutError,
    TTSError,
    UnknownNameError,
)
from pipecat_qwen3.service import Qwen3TTSService, Qwen3TTSSettings
from tests.fakes import FakeBackend

METRICS = PipelineParams(enable_metrics=True, enable_usage_metrics=True)

# -- helpers -------------------------------------------------------------------------------------------------


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    fake = FakeBackend()
    yield fake
    fake.close()


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Lines that the user sees, from WARNING on."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)


def turn(*texts: str) -> list[Frame]:
    """A reply of a language model."""
    return [LLMFullResponseStartFrame(), *(LLMTextFrame(text) for text in texts), LLMFullResponseEndFrame()]


def uninterruptible(text: str) -> TTSSpeakFrame:
    frame = TTSSpeakFrame(text)
    frame.interruptible = False
    return frame


def kinds(frames: list[Frame], *wanted: type[Frame]) -> list[type[Frame]]:
    """The types of the wanted frames, runs of one type as one."""
    seen = [type(frame) for frame in frames if isinstance(frame, wanted)]
    return [kind for i, kind in enumerate(seen) if i == 0 or kind != seen[i - 1]]


def metrics(frames: list[Frame], kind: type[MetricsData]) -> list:
    """Measurements of the service; the worker's initial frame of zeros left out."""
    return [
        data
        for frame in frames
        if isinstance(frame, MetricsFrame)
        for data in frame.data
        if isinstance(data, kind) and getattr(data, "value", 1) != 0
    ]


def samples(frames: Sequence[Frame]) -> np.ndarray:
    """int16 [n]: the audio of the frames."""
    audio = b"".join(frame.audio for frame in frames if isinstance(frame, TTSAudioRawFrame))
    return np.frombuffer(audio, np.int16)


def words(frames: list[Frame]) -> list[str]:
    return [frame.text for frame in frames if isinstance(frame, TTSTextFrame)]


async def speak(service: FrameProcessor, *frames: Frame) -> tuple[list[Frame], list[ErrorFrame]]:
    """Run a pipeline to its end; returns what came out below and the errors that went up."""
    down, up = await run_test(service, frames_to_send=frames, pipeline_params=METRICS, start_timeout=10)
    return list(down), [frame for frame in up if isinstance(frame, ErrorFrame)]


class Recorder(FrameProcessor):
    """Keeps the frames that pass and wakes who waits for one."""

    def __init__(self) -> None:
        super().__init__(enable_direct_mode=True)
        self.frames: list[Frame] = []
        self.changed = asyncio.Event()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if direction == FrameDirection.DOWNSTREAM:
            self.frames.append(frame)
            self.changed.set()
        await self.push_frame(frame, direction)

    async def until(self, condition: Callable[[list[Frame]], object]) -> None:
        """Wait until the recorded frames meet a condition."""
        async with asyncio.timeout(20):
            while not condition(self.frames):
                self.changed.clear()
                await self.changed.wait()

    def after(self, kind: type[Frame]) -> list[Frame]:
        """The frames after the last one of a kind."""
        last = max(i for i, frame in enumerate(self.frames) if isinstance(frame, kind))
        return self.frames[last + 1 :]


@asynccontextmanager
async def live(*processors: FrameProcessor) -> AsyncIterator[tuple[PipelineWorker, Recorder]]:
    """A running pipeline that ends by itself, with a recorder behind the given processors."""
    recorder = Recorder()
    worker = PipelineWorker(
        Pipeline([*processors, recorder]), params=METRICS, cancel_on_idle_timeout=False, enable_rtvi=False
    )
    runner = WorkerRunner()
    await runner.add_workers(worker)
    running = asyncio.create_task(runner.run())
    await recorder.until(lambda frames: any(isinstance(frame, StartFrame) for frame in frames))
    try:
        yield worker, recorder
        await worker.queue_frame(EndFrame())
        async with asyncio.timeout(20):
            await running
    finally:
        if not running.done():
            await worker.cancel()
            await running


async def spoken_to(backend: FakeBackend) -> None:
    """Wait until a backend has been asked to speak."""
    async with asyncio.timeout(20):
        while not backend.streams:  # noqa: ASYNC110 - the backend knows no event of this loop
            await asyncio.sleep(0)


def count(kind: type[Frame], at_least: int = 1) -> Callable[[list[Frame]], bool]:
    return lambda frames: sum(isinstance(frame, kind) for frame in frames) >= at_least


# -- what comes out ------------------------------------------------------------------------------------------


def test_importing_the_service_loads_no_torch():
    code = "import pipecat_qwen3.service, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_a_turn_is_started_measured_spoken_and_stopped_in_this_order(backend):
    down, errors = await speak(Qwen3TTSService(backend=backend), *turn("Hello there. ", "How are you?"))
    assert kinds(down, TTSStartedFrame, TTSAudioRawFrame, TTSStoppedFrame, LLMFullResponseEndFrame) == [
        TTSStartedFrame,
        TTSAudioRawFrame,
        TTSStoppedFrame,
        LLMFullResponseEndFrame,
    ]
    started = next(i for i, frame in enumerate(down) if isinstance(frame, TTSStartedFrame))
    measured = next(i for i, frame in enumerate(down) if metrics([frame], TTFBMetricsData))
    heard = next(i for i, frame in enumerate(down) if isinstance(frame, TTSAudioRawFrame))
    said = next(i for i, frame in enumerate(down) if isinstance(frame, TTSTextFrame))
    assert started < measured < heard < said
    assert not errors
    contexts = {f.context_id for f in down if isinstance(f, TTSStartedFrame | TTSAudioRawFrame | TTSStoppedFrame)}
    assert len(contexts) == 1
    assert None not in contexts


async def test_audio_is_what_the_backend_spoke(backend):
    down, _ = await speak(Qwen3TTSService(backend=backend), *turn("Hello there. ", "How are you?"))
    spoken = np.concatenate([backend.speech("Hello there."), backend.speech("How are you?")])
    assert np.array_equal(samples(down), spoken)
    assert {f.sample_rate for f in down if isinstance(f, TTSAudioRawFrame)} == {SAMPLE_RATE}


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 44100, 48000])
async def test_any_sample_rate_keeps_every_sample_of_every_utterance(backend, rate):
    texts = "Hello there, my friend.", "How are you?"
    service = Qwen3TTSService(backend=backend, sample_rate=rate)
    down, _ = await speak(service, *(TTSSpeakFrame(text) for text in texts))
    for text, context in zip(
        texts, dict.fromkeys(f.context_id for f in down if isinstance(f, TTSStartedFrame)), strict=True
    ):
        frames = [f for f in down if isinstance(f, TTSAudioRawFrame) and f.context_id == context]
        assert {f.sample_rate for f in frames} == {rate}
        whole = soxr.resample(backend.speech(text), SAMPLE_RATE, rate, quality="HQ")
        got = samples(frames).astype(int)
        assert abs(len(got) - len(whole)) <= 1
        n = min(len(got), len(whole))
        assert abs(got[:n] - whole[:n]).max() <= 2  # rounding and dither of the last bit


async def test_without_a_sample_rate_the_pipeline_decides(backend):
    service = Qwen3TTSService(backend=backend, sample_rate=None)
    params = PipelineParams(audio_out_sample_rate=16000)
    down, _ = await run_test(service, frames_to_send=[TTSSpeakFrame("Hello.")], pipeline_params=params)
    assert {f.sample_rate for f in down if isinstance(f, TTSAudioRawFrame)} == {16000}


async def test_leading_silence_is_skipped_in_the_first_sentence_of_a_turn_only(backend):
    await speak(Qwen3TTSService(backend=backend), *turn("One here. ", "Two here. "), *turn("Three."))
    assert [request.skip_silence for request in backend.requests] == [True, False, True]
    await speak(Qwen3TTSService(backend=backend, skip_silence=False), *turn("Four."))
    assert backend.requests[-1].skip_silence is False


async def test_a_later_sentence_says_how_much_of_the_turn_has_still_to_be_heard(backend, monkeypatch):
    monkeypatch.setattr(playback_module, "monotonic", lambda: 0.0)
    await speak(Qwen3TTSService(backend=backend), *turn("One here. ", "Two here. ", "Three."))
    one, two = (len(backend.speech(text)) / SAMPLE_RATE for text in ("One here.", "Two here."))
    assert [request.lead_s for request in backend.requests] == pytest.approx([0.0, one, one + two])


async def test_a_slow_engine_keeps_its_context(backend):
    backend.pace, backend.chunk_samples = 2.0, SAMPLE_RATE // 5
    service = Qwen3TTSService(backend=backend, stop_frame_timeout_s=0.2)
    down, errors = await speak(service, *turn("Hello there."))
    assert [type(f) for f in down if isinstance(f, TTSStartedFrame | TTSStoppedFrame)] == [
        TTSStartedFrame,
        TTSStoppedFrame,
    ]
    assert np.array_equal(samples(down), backend.speech("Hello there."))
    assert not errors


async def test_pipecats_evals_can_speak_with_it(backend, tmp_path):
    inner = Qwen3TTSService(backend=backend)
    caching = CachingTTSService(
        inner,
        cache_key="fake",
        cache_dir=tmp_path,
        sample_rate=SAMPLE_RATE,
        push_start_frame=True,
        push_stop_frames=True,
    )
    down, errors = await speak(caching, TTSSpeakFrame("Hello there."))
    assert np.array_equal(samples(down), backend.speech("Hello there."))
    assert not errors
    again, _ = await speak(
        CachingTTSService(inner, cache_key="fake", cache_dir=tmp_path, sample_rate=SAMPLE_RATE),
        TTSSpeakFrame("Hello there."),
    )
    assert np.array_equal(samples(again), samples(down))
    assert len(backend.requests) == 1


# -- words and the conversation ------------------------------------------------------------------------------


async def test_word_times_run_through_the_sentences_of_a_turn(backend, monkeypatch):
    monkeypatch.setattr(playback_module, "monotonic", lambda: 0.0)
    down, _ = await speak(Qwen3TTSService(backend=backend), *turn("Hello there. ", "How are you?"))
    spoken = [frame for frame in down if isinstance(frame, TTSTextFrame)]
    base = spoken[0].pts or 0
    times = [round(((frame.pts or 0) - base) / 1e9, 3) for frame in spoken]
    first = len(backend.speech("Hello there.")) / SAMPLE_RATE
    expected = backend.words("Hello there.") + [(word, first + t) for word, t in backend.words("How are you?")]
    assert [frame.text for frame in spoken] == [word for word, _ in expected]
    assert times == pytest.approx([t for _, t in expected], abs=2e-3)


async def test_words_after_a_gap_are_as_late_as_their_audio(backend, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(playback_module, "monotonic", lambda: now[0])
    async with live(Qwen3TTSService(backend=backend)) as (worker, recorder):
        await worker.queue_frames([LLMFullResponseStartFrame(), LLMTextFrame("Hello there. H")])
        await recorder.until(lambda frames: words(frames) == ["Hello", "there."])
        now[0] = 60.0
        await worker.queue_frames([LLMTextFrame("ow are you?"), LLMFullResponseEndFrame()])
        await recorder.until(count(TTSStoppedFrame))
    spoken = [frame for frame in recorder.frames if isinstance(frame, TTSTextFrame)]
    assert ((spoken[2].pts or 0) - (spoken[0].pts or 0)) / 1e9 == pytest.approx(60.0, abs=2e-3)


def test_words_that_follow_their_audio_keep_its_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(playback_module, "monotonic", lambda: now[0])
    playback = playback_module.Playback()
    second = np.zeros(SAMPLE_RATE, np.int16)
    assert playback.words_of(Chunk(second, 0, (("Hello", 0.0),))) == [("Hello", 0.0)]
    now[0] = 5.0  # all of it has been heard, and then the engine says what the end of it was
    assert playback.words_of(Chunk(second[:0], SAMPLE_RATE, (("there.", 0.75),))) == [("there.", 0.75)]
    assert playback.words_of(Chunk(second, 0, (("Bye.", 0.5),))) == [("Bye.", 5.5)]


class Loudspeaker(BaseOutputTransport):
    """An output transport that takes as long as the audio lasts."""

    def __init__(self) -> None:
        super().__init__(TransportParams(audio_out_enabled=True, audio_out_end_silence_secs=0))

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        await asyncio.sleep(frame.num_frames / frame.sample_rate)
        return True


def said(context: LLMContext) -> list[str]:
    return [str(m.get("content")) for m in context.get_messages() if isinstance(m, dict) and m["role"] == "assistant"]


@pytest.mark.parametrize(
    "texts",
    [
        ("Hello there, my friend. ", "It costs 42.50, or so. ", "Bye!"),
        ("Good day! ", "😀 ... ", "How are you?"),
        ("你好，世界。", "我很好！"),
        ("Comment ça va ? ", "Bien."),
    ],
)
async def test_the_conversation_holds_every_word_once_in_order(backend, texts):
    backend.seconds_per_char = 0.01
    context = LLMContext()
    chinese = not texts[0].isascii() and texts[0].endswith("。")
    settings = Qwen3TTSSettings(language=Language.ZH if chinese else None)
    backend.languages = ("english", "chinese")
    service = Qwen3TTSService(backend=backend, settings=settings)
    async with live(service, Loudspeaker(), LLMAssistantAggregator(context)) as (worker, _):
        await worker.queue_frames(turn(*texts))
    assert said(context) == ["".join(texts).strip()]


async def test_after_a_barge_in_the_conversation_holds_what_was_heard(backend):
    context = LLMContext()
    texts = "One two three four five six. ", "Seven eight nine ten. ", "Eleven twelve."
    ear = Recorder()  # the transport releases a word when it is heard
    chain = Qwen3TTSService(backend=backend), Loudspeaker(), ear, LLMAssistantAggregator(context)
    async with live(*chain) as (worker, recorder):
        await worker.queue_frames(turn(*texts))
        await ear.until(count(TTSTextFrame, 3))
        await worker.queue_frame(InterruptionFrame())
        await recorder.until(count(InterruptionFrame))
    assert len(backend.requests) == 3  # everything had been synthesised
    assert said(context) == [" ".join(words(ear.frames))]
    assert "".join(texts).startswith(said(context)[0])
    assert len(words(ear.frames)) < 6


# -- metrics -------------------------------------------------------------------------------------------------


async def test_a_turn_has_one_ttfb_one_ttfa_and_the_characters_of_each_sentence(backend):
    down, _ = await speak(Qwen3TTSService(backend=backend), *turn("Hello there. ", "How are you?"))
    assert len(metrics(down, TTFBMetricsData)) == 1
    (ttfa,) = metrics(down, TTFAMetricsData)
    assert ttfa.leading_silence < 0.02
    assert [usage.value for usage in metrics(down, TTSUsageMetricsData)] == [12, 12]


@pytest.mark.parametrize("first", ["...", "Fails here."])
async def test_ttfb_belongs_to_the_first_speech_of_a_turn(backend, first):
    backend.fail = OverloadedError("full")
    async with live(Qwen3TTSService(backend=backend)) as (worker, recorder):
        await worker.queue_frames([LLMFullResponseStartFrame(), LLMTextFrame(first + " H")])
        await recorder.until(count(TTSAudioRawFrame))
        assert not metrics(recorder.frames, TTFBMetricsData)
        backend.fail = None
        await worker.queue_frames([LLMTextFrame("ello there. "), LLMTextFrame("Bye now."), LLMFullResponseEndFrame()])
        await recorder.until(count(TTSStoppedFrame))
    assert [request.text for request in backend.requests][-2:] == ["Hello there.", "Bye now."]
    assert len(metrics(recorder.frames, TTFBMetricsData)) == 1


async def test_no_ttfb_without_a_first_byte(backend):
    backend.pace = math.inf
    async with live(Qwen3TTSService(backend=backend)) as (worker, recorder):
        await worker.queue_frames(turn("Hello there."))
        await recorder.until(count(TTSStartedFrame))
        await worker.queue_frame(InterruptionFrame())
        await recorder.until(count(InterruptionFrame))
        backend.pace, backend.fail = None, OverloadedError("full")
        await worker.queue_frames(turn("Hello again."))
        await recorder.until(count(TTSStoppedFrame))
    assert not metrics(recorder.frames, TTFBMetricsData)
    assert not metrics(recorder.frames, TTFAMetricsData)


# -- interruption --------------------------------------------------------------------------------------------


async def test_an_interruption_ends_the_speech_and_the_next_turn_speaks(backend):
    backend.pace = 0.2
    async with live(Qwen3TTSService(backend=backend, sample_rate=16000)) as (worker, recorder):
        await worker.queue_frames(turn("This is a long sentence that goes on and on. ", "And a second one."))
        await recorder.until(count(TTSAudioRawFrame, 3))
        await worker.queue_frame(InterruptionFrame())
        await recorder.until(count(InterruptionFrame))
        assert [request.text for request in backend.cancelled] == ["This is a long sentence that goes on and on."]
        backend.pace = None
        await worker.queue_frames(turn("Hello."))
        await recorder.until(count(TTSStoppedFrame))
    after = recorder.after(InterruptionFrame)
    assert len(samples(after)) == pytest.approx(len(backend.speech("Hello.")) * 16000 / SAMPLE_RATE, abs=1)
    assert words(after) == ["Hello."]
    assert len(backend.requests) == 2


async def test_an_interruption_waits_for_nobody_even_if_the_engine_never_answers(backend):
    backend.pace = math.inf
    async with live(Qwen3TTSService(backend=backend)) as (worker, recorder):
        await worker.queue_frames(turn("Hello there."))
        await recorder.until(count(TTSStartedFrame))
        await worker.queue_frame(InterruptionFrame())
        turns = 0
        while not count(InterruptionFrame)(recorder.frames):
            await asyncio.sleep(0)  # a turn of the loop: nothing that needs time can happen
            turns += 1
            assert turns < 200
        assert backend.streams[0].cancelled


async def test_uninterruptible_speech_is_spoken_to_its_end(backend):
    backend.pace = 0.2
    async with live(Qwen3TTSService(backend=backend)) as (worker, recorder):
        await worker.queue_frame(uninterruptible("Please hold the line."))
        await recorder.until(count(TTSAudioRawFrame, 2))
        await worker.queue_frame(InterruptionFrame())
        await recorder.until(count(TTSStoppedFrame))
    assert np.array_equal(samples(recorder.frames), backend.speech("Please hold the line."))
    assert words(recorder.frames) == ["Please", "hold", "the", "line."]
    assert not backend.cancelled


async def test_an_interruption_reaches_speech_that_only_the_end_of_the_call_flushed(backend):
    backend.pace = math.inf
    service = Qwen3TTSService(backend=backend)
    async with live(service) as (worker, recorder):
        await worker.queue_frames([LLMFullResponseStartFrame(), LLMTextFrame("So long, and thanks.")])
        await worker.queue_frame(EndFrame())  # speaks the rest, and is no frame that an interruption may cancel
        await spoken_to(backend)
        await service.queue_frame(InterruptionFrame())
        await recorder.until(count(EndFrame))
    assert [request.text for request in backend.cancelled] == ["So long, and thanks."]


@pytest.mark.parametrize("hook", ["stop", "cancel", "cleanup"])
async def test_every_teardown_ends_the_speech_and_can_be_repeated(backend, hook):
    backend.pace = math.inf
    service = Qwen3TTSService(backend=backend)
    speech = asyncio.create_task(anext(service.run_tts("Hello there.", "context"), None))
    await spoken_to(backend)
    teardown = {
        "stop": lambda: service.stop(EndFrame()),
        "cancel": lambda: service.cancel(CancelFrame()),
        "cleanup": service.cleanup,
    }[hook]
    await teardown()
    assert len(backend.cancelled) == 1
    assert await speech is None
    await teardown()
    await service.cleanup()
    assert len(backend.cancelled) == 1
    assert backend.ready  # the backend belongs to the process


async def test_nothing_is_kept_of_contexts_that_are_over(backend):
    service = Qwen3TTSService(backend=backend)
    async with live(service) as (worker, recorder):
        for number in range(1, 4):
            await worker.queue_frames(turn("Hello there. ", "Bye."))
            await recorder.until(count(TTSStoppedFrame, number))
        backend.pace = math.inf
        await worker.queue_frames(turn("Hello there."))
        await recorder.until(count(TTSStartedFrame, 4))
        await worker.queue_frame(InterruptionFrame())
        await recorder.until(count(InterruptionFrame))
        assert not service._playbacks


# -- text that cannot be spoken, errors ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, TextAggregationMode.TOKEN])
async def test_three_utterances_without_a_sample_are_no_failure(backend, monkeypatch, mode):
    def silence(request):
        stream = Stream(1)
        stream.finish(Result("runaway", 40, 1, skipped_samples=40 * FRAME_SAMPLES))
        return stream

    monkeypatch.setattr(backend, "speak", silence)
    service = Qwen3TTSService(backend=backend, text_aggregation_mode=mode)
    async with live(service) as (worker, recorder):
        for n in range(3):
            await worker.queue_frames(turn("Hm."))
            await recorder.until(count(TTSStoppedFrame, n + 1))
        assert service.is_usable


async def test_three_silent_texts_are_no_failure(backend):
    service = Qwen3TTSService(backend=backend)
    down, errors = await speak(service, *(TTSSpeakFrame(text) for text in ("...", "😀", " — ", "Hello.")))
    assert not errors
    assert service.is_usable
    silence = np.zeros(3 * SAMPLE_RATE // 50, np.int16)
    assert np.array_equal(samples(down), np.concatenate([silence, backend.speech("Hello.")]))
    assert [request.text for request in backend.requests] == ["Hello."]


@pytest.mark.parametrize(
    ("error", "category", "usable"),
    [
        (BadRequestError("too long"), ErrorCategory.APPLICATION, True),
        (UnknownNameError("no such voice"), ErrorCategory.INVALID_REQUEST, False),
        (OverloadedError("full"), ErrorCategory.RATE_LIMIT, True),
        (TextTimeoutError("no text came"), ErrorCategory.APPLICATION, True),
        (EngineError("a tick failed"), ErrorCategory.SERVER, True),
        (TTSError("odd"), ErrorCategory.SERVER, True),
    ],
)
async def test_an_error_says_what_it_is_and_whether_the_service_lives(backend, error, category, usable):
    backend.fail = error
    service = Qwen3TTSService(backend=backend)
    down, errors = await speak(service, *turn("Hello there."))
    (reported,) = errors
    assert (reported.category, reported.error) == (category, f"Qwen3-TTS cannot speak: {error}")
    assert service.is_usable == usable
    assert kinds(down, TTSStartedFrame, TTSStoppedFrame) == [TTSStartedFrame, TTSStoppedFrame]
    assert not metrics(down, TTFBMetricsData)


async def test_transient_errors_in_a_row_leave_the_service_usable(backend):
    backend.fail = OverloadedError("full")
    service = Qwen3TTSService(backend=backend)
    async with live(service) as (worker, recorder):
        for number in range(1, 5):
            await worker.queue_frames(turn("Hello there."))
            await recorder.until(count(TTSStoppedFrame, number))
        backend.fail = None
        await worker.queue_frames(turn("Hello again."))
        await recorder.until(count(TTSStoppedFrame, 5))
    assert len(samples(recorder.frames)) == 4 * SAMPLE_RATE // 50 + len(backend.speech("Hello again."))


async def test_an_error_in_the_middle_keeps_what_was_spoken(backend):
    backend.fail, backend.fail_after = EngineError("a tick failed"), 3
    down, errors = await speak(Qwen3TTSService(backend=backend), *turn("Hello there."))
    assert len(samples(down)) == 3 * backend.chunk_samples + SAMPLE_RATE // 50
    assert len(errors) == 1
    assert len(metrics(down, TTFBMetricsData)) == 1


async def test_a_dead_engine_is_permanent_and_later_turns_end_at_once(backend):
    backend.close()
    service = Qwen3TTSService(backend=backend, stop_frame_timeout_s=60)
    async with asyncio.timeout(20):
        down, errors = await speak(service, *turn("Hello there."), *turn("Anyone?"))
    assert [error.category for error in errors] == [ErrorCategory.SERVER]
    assert not service.is_usable
    assert len(backend.requests) == 1
    assert sum(isinstance(frame, TTSStoppedFrame) for frame in down) == 2


async def test_an_engine_that_never_answers_is_given_up(backend, monkeypatch):
    monkeypatch.setattr(speech_module, "_PATIENCE_S", 0.1)
    backend.pace = math.inf
    down, errors = await speak(
        Qwen3TTSService(backend=backend, stop_frame_timeout_s=0.1), uninterruptible("Hello there.")
    )
    assert [error.category for error in errors] == [ErrorCategory.SERVER]
    assert len(backend.cancelled) == 1
    assert count(TTSStoppedFrame)(down)


async def test_a_permanent_error_lets_a_switcher_fail_over(backend):
    broken = Qwen3TTSService(backend=backend, settings=Qwen3TTSSettings(voice="nobody"))
    spare = Qwen3TTSService(backend=backend, settings=Qwen3TTSSettings(voice="slt"))
    switcher = ServiceSwitcher([broken, spare], ServiceSwitcherStrategyFailover)
    async with live(switcher) as (worker, recorder):
        await worker.queue_frame(TTSSpeakFrame("Hello there."))
        await recorder.until(count(TTSStoppedFrame))
        await worker.queue_frame(TTSSpeakFrame("Hello again."))
        await recorder.until(count(TTSStoppedFrame, 2))
    assert [request.voice for request in backend.requests] == ["nobody", "slt"]


@pytest.mark.parametrize("end", ["runaway", "cap"])
async def test_a_bad_end_is_a_warning_that_says_what_happened(backend, log, end):
    backend.end = end
    _, errors = await speak(Qwen3TTSService(backend=backend), *turn("Hello there."))
    (line,) = log
    assert "[Hello there.]" in line
    assert "0.7 s" in line
    assert {"runaway": "did not stop", "cap": "length limit"}[end] in line
    assert not errors


# -- settings ------------------------------------------------------------------------------------------------


async def test_settings_are_complete_and_quiet(backend, log):
    service = Qwen3TTSService(backend=backend)
    service.settings.validate_complete()
    await speak(service, *turn("Hello."))
    assert not log


async def test_a_change_acts_on_the_next_sentence(backend, log):
    settings = Qwen3TTSSettings(voice="rms", language=Language.EN_GB, seed=7, temperature=0.5)
    update = Qwen3TTSSettings(
        voice="slt", instruct="whisper", top_k=5, top_p=0.9, repetition_penalty=1.1, layout="streaming"
    )
    await speak(
        Qwen3TTSService(backend=backend, settings=settings),
        LLMFullResponseStartFrame(),
        LLMTextFrame("Hello there. H"),
        TTSUpdateSettingsFrame(delta=update),
        LLMTextFrame("ow are you?"),
        LLMFullResponseEndFrame(),
    )
    first, second = backend.requests
    assert (first.voice, first.language, first.seed, first.temperature) == ("rms", "english", 7, 0.5)
    assert (first.instruct, first.top_k, first.top_p, first.layout) == (None, None, None, None)
    assert (second.voice, second.language, second.seed, second.temperature) == ("slt", "english", 7, 0.5)
    assert (second.instruct, second.top_k, second.top_p) == ("whisper", 5, 0.9)
    assert (second.repetition_penalty, second.layout) == (1.1, "streaming")
    assert not log


async def test_a_change_of_model_is_refused_with_a_warning(backend, log):
    service = Qwen3TTSService(backend=backend)
    await speak(service, TTSUpdateSettingsFrame(delta=Qwen3TTSSettings(model="other")), *turn("Hello."))
    (line,) = log
    assert "[model]" in line
    assert service.settings.model == "fake"


@pytest.mark.parametrize(
    ("given", "spoken", "splitter"),
    [
        (None, None, "en"),
        ("auto", "auto", "en"),
        (Language.EN, "english", "en"),
        (Language.EN_US, "english", "en"),
        ("pt-BR", "portuguese", "pt"),
        ("German", "german", "de"),
        (Language.ZH_CN_SICHUAN, "chinese", "zh"),
        (Language.JA_JP, "japanese", "ja"),
        (Language.SW, "sw", "sw"),
        ("klingon", "klingon", "klingon"),
    ],
)
async def test_languages_are_named_as_the_model_names_them(backend, given, spoken, splitter):
    at_start = Qwen3TTSService(backend=backend, settings=Qwen3TTSSettings(language=given))
    assert (at_start.settings.given_fields()["language"], at_start.text_aggregation_language) == (spoken, splitter)
    later = Qwen3TTSService(backend=backend, settings=Qwen3TTSSettings(language=Language.FR))
    await speak(later, TTSUpdateSettingsFrame(delta=Qwen3TTSSettings(language=given)))
    assert (later.settings.given_fields()["language"], later.text_aggregation_language) == (spoken, splitter)


@pytest.mark.parametrize("wrong", [Qwen3TTSSettings(voice="nobody"), Qwen3TTSSettings(language=Language.SW)])
async def test_an_unknown_name_lasts_until_the_settings_change(backend, wrong):
    service = Qwen3TTSService(backend=backend, settings=wrong)
    async with live(service) as (worker, recorder):
        await worker.queue_frames(turn("Hello there."))
        await recorder.until(count(TTSStoppedFrame))
        assert not service.is_usable
        right = Qwen3TTSSettings(voice="slt", language=Language.EN)
        await worker.queue_frames([TTSUpdateSettingsFrame(delta=right), *turn("Hello again.")])
        await recorder.until(count(TTSStoppedFrame, 2))
    assert service.is_usable
    assert np.array_equal(samples(recorder.frames)[SAMPLE_RATE // 50 :], backend.speech("Hello again."))


def test_options_that_do_not_exist_are_refused(backend):
    with pytest.raises(UnknownNameError, match=r"no option voice; pass settings=Qwen3TTSService.Settings\(voice=...\)"):
        Qwen3TTSService(backend=backend, voice="slt")
    with pytest.raises(UnknownNameError, match="no option speed"):
        Qwen3TTSService(backend=backend, speed=2)


# -- the shared engine ---------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch, backend) -> list[tuple]:
    """Stands in for the local backend: records who loads what, on which thread; raises what `backend.fail` holds."""
    calls: list[tuple] = []

    class LocalBackend:
        @classmethod
        def shared(cls, model: str, *, device: str, dtype: str) -> FakeBackend:
            calls.append((model, device, dtype, threading.current_thread() is threading.main_thread()))
            if backend.fail:
                raise backend.fail
            return backend

    module = types.ModuleType("pipecat_qwen3.local")
    module.__dict__["LocalBackend"] = LocalBackend
    monkeypatch.setitem(sys.modules, "pipecat_qwen3.local", module)
    return calls


@pytest.mark.parametrize(
    "options", [{"model": "some/model"}, {"settings": Qwen3TTSSettings(model="some/model")}], ids=["option", "setting"]
)
async def test_the_shared_engine_is_loaded_off_the_loop(backend, loads, options):
    down, errors = await speak(Qwen3TTSService(dtype="fp32", **options), *turn("Hello there."))
    assert loads == [("some/model", "auto", "fp32", False)]
    assert np.array_equal(samples(down), backend.speech("Hello there."))
    assert not errors


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (DownloadError("offline"), ErrorCategory.CONNECTIVITY),
        (CheckpointError("config.json is missing"), ErrorCategory.INVALID_REQUEST),
        (BackendError("no CUDA device"), ErrorCategory.INVALID_REQUEST),
        (ImportError("no module named torch"), ErrorCategory.UNKNOWN),
    ],
)
async def test_an_engine_that_cannot_be_had_is_one_error_and_no_hang(backend, loads, error, category):
    backend.fail = error
    service = Qwen3TTSService(stop_frame_timeout_s=60)
    async with asyncio.timeout(20):
        down, errors = await speak(service, *turn("Hello there."), *turn("Anyone?"))
    (reported,) = errors
    assert (reported.category, reported.error) == (category, f"Qwen3-TTS cannot load 'embedded': {error}")
    assert not service.is_usable
    assert len(loads) == 1
    assert not samples(down).size
    assert sum(isinstance(frame, LLMFullResponseEndFrame) for frame in down) == 2


async def test_without_an_engine_new_settings_change_nothing(backend, loads):
    backend.fail = DownloadError("offline")
    service = Qwen3TTSService()
    update = TTSUpdateSettingsFrame(delta=Qwen3TTSSettings(voice="slt"))
    _, errors = await speak(service, update, *turn("Hello there."))
    assert [error.error for error in errors][1:] == [
        "Qwen3-TTS cannot speak: no engine was loaded; the error at the start says why"
    ]
    assert not service.is_usable


@pytest.fixture
def gate(loads, backend, monkeypatch) -> threading.Event:
    """Loading ends when this is set."""
    gate = threading.Event()

    def shared(model: str, *, device: str, dtype: str) -> FakeBackend:
        gate.wait(20)
        return backend

    monkeypatch.setattr(sys.modules["pipecat_qwen3.local"], "LocalBackend", types.SimpleNamespace(shared=shared))
    return gate


async def test_a_slow_load_says_what_to_do(gate, log, monkeypatch):
    monkeypatch.setattr(service_module, "_SLOW_LOAD_S", 0.0)
    service = Qwen3TTSService()
    asyncio.get_running_loop().call_later(0.1, gate.set)
    down, _ = await speak(service, *turn("Hello."))
    assert any("LocalBackend.open()" in line for line in log)
    assert samples(down).size


async def test_a_pipeline_that_gives_up_leaves_the_load_alone(gate, monkeypatch):
    monkeypatch.setattr(service_module, "_SLOW_LOAD_S", 0.0)
    service = Qwen3TTSService()
    worker = PipelineWorker(Pipeline([service]), setup_timeout_secs=0.1, enable_rtvi=False)
    runner = WorkerRunner()
    await runner.add_workers(worker)
    async with asyncio.timeout(20):
        await runner.run()
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "pipecat-qwen3-load":
            await asyncio.to_thread(thread.join, 20)
    assert service._loading
    assert await asyncio.wrap_future(service._loading)


async def test_text_reaches_the_client_before_it_is_spoken(backend):
    down, _ = await speak(Qwen3TTSService(backend=backend), TTSSpeakFrame("Hello there."))
    assert kinds(down, AggregatedTextFrame, TTSStartedFrame)[:2] == [AggregatedTextFrame, TTSStartedFrame]


@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_a_process_that_exits_while_the_model_loads_exits_cleanly(delay):
    code = f"import time; from pipecat_qwen3 import Qwen3TTSService; s = Qwen3TTSService(); time.sleep({delay})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
