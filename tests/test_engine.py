"""The engine with the embedded voice: many voices, joins and cancels, text as a stream, guards, chunks."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from megakernel import gpu
from pipecat_qwen3.backend import FRAME_SAMPLES, Backend, Chunk, Load, Request, Stream
from pipecat_qwen3.codec_runner import Samples
from pipecat_qwen3.delivery import Delivery
from pipecat_qwen3.errors import (
    BackendError,
    BadRequestError,
    EngineError,
    OverloadedError,
    TextTimeoutError,
    TTSError,
    UnknownNameError,
)
from pipecat_qwen3.local import LocalBackend
from pipecat_qwen3.words import Rate, WordTimes

SENTENCES = [
    "Hello there. How can I help you today?",
    "Your table is booked for two.",
    "The meeting starts at ten.",
    "I am sorry to hear that.",
    "Please hold the line.",
    "Yes.",
    "The weather will be cold and dry tomorrow.",
]


def pcm(stream: Stream) -> np.ndarray:
    chunks = list(stream)
    at = 0
    for chunk in chunks:
        assert chunk.pcm.dtype == np.int16
        assert chunk.first_sample == at
        at += len(chunk.pcm)
    return np.concatenate([c.pcm for c in chunks]) if chunks else np.zeros(0, np.int16)


def requests(count: int, seed: int = 0) -> list[Request]:
    choose = random.Random(seed)
    return [
        Request(
            text=choose.choice(SENTENCES),
            voice=choose.choice(["slt", "rms"]),
            language=choose.choice([None, "auto", "english"]),
            layout=choose.choice(["whole", "streaming"]),
            seed=choose.randrange(2**63),
            greedy=choose.random() < 0.3,
            temperature=choose.choice([None, 0.2, 0.9]),
            top_k=choose.choice([None, 0, 5]),
            top_p=choose.choice([None, 0.8]),
            repetition_penalty=choose.choice([None, 1.2]),
            predictor_temperature=choose.choice([None, 0.5]),
            max_frames=choose.choice([None, 5, 20, 30]),
            ahead_s=None,
        )
        for _ in range(count)
    ]


def test_it_is_a_backend(embedded: LocalBackend) -> None:
    assert isinstance(embedded, Backend)
    assert embedded.voices == ("rms", "slt")
    assert embedded.languages == ("english",)
    assert embedded.ready


def test_a_sentence_ends_by_itself_and_is_as_long_as_it_says(embedded: LocalBackend) -> None:
    stream = embedded.speak(Request(text=SENTENCES[0], seed=1, ahead_s=None))
    audio = pcm(stream)
    result = stream.wait()
    assert (result.end, result.error, result.seed) == ("eos", None, 1)
    assert result.codes is not None
    assert result.codes.shape == (result.frames, 8)
    assert len(audio) == result.frames * FRAME_SAMPLES
    assert 20 < result.frames < 80


@pytest.mark.parametrize("count", [32])
def test_random_requests_that_join_and_leave_say_what_each_says_alone(embedded: LocalBackend, count: int) -> None:
    wanted = requests(count)
    alone = []
    for request in wanted:
        stream = embedded.speak(request)
        list(stream)
        alone.append(stream.wait().codes)
    choose = random.Random(1)
    streams: list[Stream] = []
    cancelled: list[Stream] = []
    for request in wanted:
        streams.append(embedded.speak(request))
        if choose.random() < 0.4:  # company that comes and goes
            noise = embedded.speak(Request(text=choose.choice(SENTENCES), ahead_s=None))
            cancelled.append(noise)
        time.sleep(choose.random() * 0.05)
        if cancelled and choose.random() < 0.7:
            cancelled.pop(choose.randrange(len(cancelled))).cancel()
    for stream in cancelled:
        stream.cancel()
    for stream, expected in zip(streams, alone, strict=True):
        list(stream)
        codes = stream.wait().codes
        assert codes is not None
        assert expected is not None
        assert np.array_equal(codes, expected)


def test_no_company_changes_the_samples_beyond_rounding(embedded: LocalBackend) -> None:
    request = Request(text=SENTENCES[0], seed=5, ahead_s=None)
    alone = pcm(embedded.speak(request))
    others = [embedded.speak(Request(text=t, ahead_s=None)) for t in SENTENCES]
    together = pcm(embedded.speak(request))
    for other in others:
        other.cancel()
    assert np.abs(alone.astype(int) - together.astype(int)).max() <= 3


def test_the_ramp_shapes_the_chunks_and_not_the_samples(embedded: LocalBackend) -> None:
    def speak(ramp: tuple[int, ...]) -> tuple[list[int], np.ndarray]:
        chunks = list(embedded.speak(Request(text=SENTENCES[2], seed=3, ramp=ramp, ahead_s=None)))
        return [len(c.pcm) // FRAME_SAMPLES for c in chunks], np.concatenate([c.pcm for c in chunks])

    sizes, audio = speak((1, 1, 2, 4, 8))
    assert sizes[:4] == [1, 1, 2, 4]
    assert all(s == 8 for s in sizes[4:-1])
    other_sizes, other = speak((3,))
    assert all(s == 3 for s in other_sizes[:-1])
    assert np.abs(audio.astype(int) - other.astype(int)).max() <= 3


def test_a_live_voice_never_waits_for_a_chunk_that_its_playback_does_not_cover(embedded: LocalBackend) -> None:
    stream = embedded.speak(Request(text=SENTENCES[0], seed=3, ramp=(1, 8), ahead_s=0.4))
    started = time.monotonic()
    produced = 0.0
    for chunk in stream:
        time.sleep(max(0.0, produced - (time.monotonic() - started)))
        produced += len(chunk.pcm) / 24_000
    assert stream.wait().end == "eos"


def test_run_ahead_is_limited_by_the_playback(embedded: LocalBackend) -> None:
    stream = embedded.speak(Request(text=SENTENCES[0], seed=3, ahead_s=0.4))
    iterator = iter(stream)
    next(iterator)
    time.sleep(0.5)
    taken = stream._chunks
    waiting = sum(len(c.pcm) for c in taken) / 24_000
    assert waiting <= 0.5 + 0.4 + 0.08
    assert stream.result is None
    for _ in iterator:
        pass
    assert stream.wait().end == "eos"


def test_what_the_listener_has_still_to_hear_counts_as_run_ahead(embedded: LocalBackend) -> None:
    begun = time.monotonic()
    stream = embedded.speak(Request(text=SENTENCES[5], seed=3, ahead_s=0.4, lead_s=1.0))
    next(iter(stream))
    assert time.monotonic() - begun >= 0.6
    assert stream.wait(10).end == "eos"


def test_a_voice_that_may_not_speak_yet_holds_no_row(own: LocalBackend) -> None:
    waiting = [own.speak(Request(text="Hi", ahead_s=1.0, lead_s=60.0)) for _ in range(own.load.rows + 1)]
    assert own.speak(Request(text="Hi", max_frames=2)).wait(10).end == "cap"
    assert own.load.waiting == len(waiting)
    for stream in waiting:
        stream.cancel()
        assert stream.wait(10).end == "cancelled"


@pytest.mark.parametrize("frame", [1, 2, 6])
def test_a_cancel_while_a_frame_is_made_ends_the_voice(own: LocalBackend, frame: int) -> None:
    step, made = own.engine.step.step, 0

    def cancelled_meanwhile(rows: Sequence[int], text: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == frame:
            stream.cancel()
        return step(rows, text)

    own.engine.step.step = cancelled_meanwhile  # type: ignore[method-assign]
    stream = own.speak(Request(text="Hi", seed=1, max_frames=6, ahead_s=None, ramp=(4,)))
    assert stream.wait(10).end == "cancelled"
    assert own.speak(Request(text="Hi", max_frames=2)).wait(10).end == "cap"
    assert own.load.used == 0


def test_the_playback_begins_behind_the_speech_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = Stream()
    delivery = Delivery(stream, Request("", lead_s=2.0, ahead_s=10.0), WordTimes(Rate()))
    assert delivery.ahead(10) == pytest.approx(2.8)
    stream.put(Chunk(np.zeros(FRAME_SAMPLES, np.int16), 0))
    next(iter(stream))
    now[0] = 101.5
    assert delivery.ahead(10) == pytest.approx(1.3)
    now[0] = 102.5  # half a second of it has been heard
    assert delivery.ahead(10) == pytest.approx(0.3)


@pytest.mark.parametrize(("profile", "most"), [("latency", 1), ("throughput", 8)])
def test_a_profile_says_how_much_may_be_read_between_two_frames(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, profile: str, most: int
) -> None:
    backend = LocalBackend.open(str(tiny()), device="cpu", dtype="fp32", max_batch=8, profile=profile)
    step, done, asked = backend.engine.step, "", threading.Event()
    prefill, advance = step.prefill, step.step

    def reading(*arguments):
        nonlocal done
        done += "p"
        prefill(*arguments)

    def speaking(*arguments):
        nonlocal done
        done += "s"
        asked.wait(60)  # so that all begin to be read while the speaker has most of its frames before it
        return advance(*arguments)

    monkeypatch.setattr(step, "prefill", reading)
    monkeypatch.setattr(step, "step", speaking)
    speaker = backend.speak(Request(text="word " * 60, max_frames=150, seed=0, ahead_s=None))
    while "s" not in done:
        time.sleep(0.01)
    done = ""
    streams = [backend.speak(Request(text="word " * 60, max_frames=2, seed=i, ahead_s=None)) for i in range(7)]
    asked.set()
    for stream in streams:
        list(stream)
    between = [len(run) for run in done.split("s")[:-1]]
    assert max(between) == most
    speaker.cancel()
    backend.close()


def test_the_engine_says_how_busy_it_is(own: LocalBackend) -> None:
    assert own.load == Load(rows=2, used=0, waiting=0)
    streams = [own.speak(Request(text="Hi", max_frames=900)) for _ in range(5)]
    for stream in streams[:2]:
        next(iter(stream))
    assert own.load == Load(rows=2, used=2, waiting=3)
    for stream in streams:
        stream.cancel()
    for stream in streams:
        stream.wait(5)
    assert own.load == Load(rows=2, used=0, waiting=0)


def test_cancel_returns_at_once_yields_nothing_more_and_frees_the_row(embedded: LocalBackend) -> None:
    for text in SENTENCES * 3:
        stream = embedded.speak(Request(text=text))
        for _ in stream:
            stream.cancel()
        assert stream.wait(5).end == "cancelled"
    deadline = time.monotonic() + 5
    while len(embedded.engine._free) < embedded.engine.step.rows and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(embedded.engine._free) == embedded.engine.step.rows


def test_a_voice_that_waits_for_a_row_can_be_cancelled(embedded: LocalBackend) -> None:
    blockers = [embedded.speak(Request(text=SENTENCES[0])) for _ in range(embedded.engine.step.rows)]
    waiting = embedded.speak(Request(text=SENTENCES[0]))
    waiting.cancel()
    assert waiting.wait(5).end == "cancelled"
    for stream in blockers:
        stream.cancel()


async def pieces(text: str, pause: float = 0.0) -> AsyncIterator[str]:
    for word in text.split(" "):
        await asyncio.sleep(pause)
        yield word + " " if word != text.split(" ")[-1] else word


async def test_text_as_a_stream_gives_the_codes_of_the_whole_text(embedded: LocalBackend) -> None:
    text = "The meeting starts at ten on Monday."
    whole = embedded.speak(Request(text=text, layout="streaming", seed=9))
    async for _ in whole:
        pass
    slow = embedded.speak(Request(text=pieces(text, pause=0.15), seed=9))
    first_chunk = None
    async for _ in slow:
        first_chunk = first_chunk or time.monotonic()
    assert slow.result is not None
    assert whole.result is not None
    assert slow.result.end == "eos"
    assert np.array_equal(slow.result.codes, whole.result.codes)  # type: ignore[arg-type]


async def test_the_talker_starts_at_the_first_token_and_stalls_for_the_next(embedded: LocalBackend) -> None:
    gate = asyncio.Event()

    async def text() -> AsyncIterator[str]:
        yield "Hello there"
        await gate.wait()
        yield ", my friend."

    stream = embedded.speak(Request(text=text(), seed=2))
    chunk = await asyncio.wait_for(anext(stream), 5)
    assert len(chunk.pcm) == FRAME_SAMPLES
    await asyncio.sleep(0.3)
    early = len(stream._chunks)
    await asyncio.sleep(0.3)
    assert len(stream._chunks) == early  # it waits and never pads
    gate.set()
    async for _ in stream:
        pass
    assert stream.result is not None
    assert stream.result.end == "eos"


async def test_voices_that_wait_for_text_leave_room_for_one_that_has_some(embedded: LocalBackend) -> None:
    async def silent() -> AsyncIterator[str]:
        await asyncio.sleep(60)
        yield "Too late."

    idle = [embedded.speak(Request(text=silent(), seed=1)) for _ in range(2 * embedded.engine.step.rows)]
    await asyncio.sleep(0.2)
    speaking = embedded.speak(Request(text="Hello there.", seed=2, ahead_s=None))
    assert [chunk async for chunk in speaking]
    assert speaking.wait().end == "eos"
    for stream in idle:
        stream.cancel()


async def test_a_text_iterator_that_fails_ends_the_voice_with_one_line(embedded: LocalBackend) -> None:
    async def text() -> AsyncIterator[str]:
        yield "Hello there my "
        raise RuntimeError("the language model broke")

    stream = embedded.speak(Request(text=text()))
    with pytest.raises(BadRequestError, match="the language model broke"):
        async for _ in stream:
            pass


async def test_a_text_stream_without_a_word_ends_without_audio(embedded: LocalBackend) -> None:
    async def text() -> AsyncIterator[str]:
        yield ""

    stream = embedded.speak(Request(text=text()))
    assert [c async for c in stream] == []
    assert stream.result is not None
    assert (stream.result.end, stream.result.frames) == ("eos", 0)


async def test_late_text_ends_with_an_error(embedded: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipecat_qwen3.engine.TEXT_TIMEOUT_S", 0.2)

    async def text() -> AsyncIterator[str]:
        yield "Hello there "
        await asyncio.sleep(30)

    stream = embedded.speak(Request(text=text()))
    with pytest.raises(TextTimeoutError, match="end the text stream"):
        async for _ in stream:
            pass


async def every(*items) -> AsyncIterator[str]:
    for item in items:
        yield item


async def finish(stream: Stream) -> Stream:
    with contextlib.suppress(TTSError):
        async for _ in stream:
            pass
    return stream


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (lambda: Request(text=every("Hello ", 5, " there")), "a piece of text should be a string, but is 5"),
        (lambda: Request(text=every("Hello ", None, " there")), "a piece of text should be a string, but is None"),
        (lambda: Request(text=every("word " * 1200), layout="whole"), "shorten the text"),
    ],
)
async def test_one_voice_with_bad_text_ends_alone(embedded: LocalBackend, wanted, says: str) -> None:
    bystander = embedded.speak(Request(text=SENTENCES[0], seed=1, ahead_s=None))
    bad = await finish(embedded.speak(wanted()))
    await finish(bystander)
    assert bad.result is not None
    assert isinstance(bad.result.error, BadRequestError)
    assert says in str(bad.result.error)
    assert bystander.wait(5).end == "eos"


async def test_a_failure_inside_one_voice_ends_that_voice_alone(
    embedded: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = embedded.engine.step.prefill

    def broken(row, embeds):
        if any(u.row == row and u.stream.seed == 13 for u in embedded.engine._resident):
            raise RuntimeError("out of luck")
        prefill(row, embeds)

    monkeypatch.setattr(embedded.engine.step, "prefill", broken)
    streams = [embedded.speak(Request(text=SENTENCES[1], seed=s, ahead_s=None)) for s in (1, 13, 2)]
    ends = [(await finish(stream)).wait(5).end for stream in streams]
    assert ends == ["eos", "error", "eos"]


async def test_an_emoji_cut_between_its_surrogates_is_one_emoji(embedded: LocalBackend) -> None:
    stream = embedded.speak(Request(text=every("Fine \ud83d", "\ude00 thanks", " \ud83d"), seed=1))
    words = [w async for chunk in stream for w, _ in chunk.words]
    assert words[:3] == ["Fine", "😀", "thanks"]
    assert stream.result is not None
    assert stream.result.end == "eos"


async def test_whitespace_alone_is_nothing_to_speak(embedded: LocalBackend) -> None:
    stream = await finish(embedded.speak(Request(text=every(" ", "  ", " \t "))))
    assert stream.result is not None
    assert (stream.result.end, stream.result.frames) == ("eos", 0)


def test_an_iterator_without_an_event_loop_is_refused(embedded: LocalBackend) -> None:
    with pytest.raises(BadRequestError, match="call speak\\(\\) from a coroutine"):
        embedded.speak(Request(text=every("Hello")))


@pytest.mark.parametrize("layout", ["whole", "streaming"])
async def test_a_text_that_stalls_sleeps_and_times_out(
    embedded: LocalBackend, monkeypatch: pytest.MonkeyPatch, layout
) -> None:
    monkeypatch.setattr("pipecat_qwen3.engine.TEXT_TIMEOUT_S", 0.5)
    ticks = 0
    tick = embedded.engine._tick

    def counted() -> bool:
        nonlocal ticks
        ticks += 1
        return tick()

    monkeypatch.setattr(embedded.engine, "_tick", counted)

    async def text() -> AsyncIterator[str]:
        yield "Hello there "
        await asyncio.sleep(30)

    stream = await finish(embedded.speak(Request(text=text(), layout=layout)))
    assert stream.result is not None
    assert isinstance(stream.result.error, TextTimeoutError)
    assert ticks < 60


async def test_a_voice_that_waits_for_text_hands_over_all_it_has_made(embedded: LocalBackend) -> None:
    gate = asyncio.Event()

    async def text() -> AsyncIterator[str]:
        yield "The weather will be cold and dry tomorrow in the north "
        await gate.wait()
        yield "and the south."

    stream = embedded.speak(Request(text=text(), seed=4))
    samples = 0
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(1.0):
                samples += len((await anext(stream)).pcm)
    (voice,) = embedded.engine._resident
    assert samples == len(voice.codes) * FRAME_SAMPLES > 0
    gate.set()
    await finish(stream)


async def test_a_chunk_larger_than_the_credit_does_not_stall(embedded: LocalBackend) -> None:
    stream = embedded.speak(Request(text=SENTENCES[1], seed=1, ramp=(8,), ahead_s=0.5))
    await asyncio.wait_for(finish(stream), 10)
    assert stream.result is not None
    assert stream.result.end == "eos"


def test_audio_that_nobody_takes_gives_the_row_back(embedded: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipecat_qwen3.engine.UNTAKEN_S", 0.3)
    stream = embedded.speak(Request(text=SENTENCES[0], seed=1, ahead_s=0.5))
    assert stream.wait(5).end == "error"
    assert len(embedded.engine._free) == embedded.engine.step.rows


async def test_a_text_whose_reader_is_cancelled_ends(embedded: LocalBackend) -> None:
    async def text() -> AsyncIterator[str]:
        yield "Hello there "
        raise asyncio.CancelledError

    stream = await finish(embedded.speak(Request(text=text())))
    assert stream.result is not None
    assert "cancelled before the text had ended" in str(stream.result.error)


async def test_cancelling_stops_reading_the_text(embedded: LocalBackend) -> None:
    closed = asyncio.Event()

    async def text() -> AsyncIterator[str]:
        try:
            while True:
                yield "and so on "
                await asyncio.sleep(0.05)
        finally:
            closed.set()

    stream = embedded.speak(Request(text=text()))
    await anext(stream)
    stream.cancel()
    await asyncio.wait_for(closed.wait(), 5)


async def test_the_end_of_the_speech_stops_reading_the_text(embedded: LocalBackend) -> None:
    closed = asyncio.Event()

    async def text() -> AsyncIterator[str]:
        try:
            while True:
                yield "and so on "
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    stream = embedded.speak(Request(text=text(), max_frames=3))
    async for _ in stream:
        pass
    assert stream.result is not None
    assert stream.result.end == "cap"
    await asyncio.wait_for(closed.wait(), 5)


def test_max_frames_is_exact_and_says_cap(embedded: LocalBackend) -> None:
    for n in (1, 2, 7):
        stream = embedded.speak(Request(text=SENTENCES[0], max_frames=n, ahead_s=None))
        audio = pcm(stream)
        assert (stream.wait().end, stream.wait().frames, len(audio)) == ("cap", n, n * FRAME_SAMPLES)


def test_a_cut_fades_out_over_its_last_five_milliseconds(embedded: LocalBackend) -> None:
    base = Request(text=SENTENCES[0], seed=1, ahead_s=None)
    whole = pcm(embedded.speak(base)).astype(float)
    for n in (6, 9, 12):
        cut = pcm(embedded.speak(Request(text=SENTENCES[0], seed=1, ahead_s=None, max_frames=n))).astype(float)
        end = n * FRAME_SAMPLES
        assert abs(cut[-1]) <= 1
        assert np.abs(cut[: end - 120] - whole[: end - 120]).max() <= 3
        expected = whole[end - 120 : end] * np.linspace(1, 0, 120)
        assert np.abs(cut[end - 120 :] - expected).max() <= 3


@pytest.fixture
def in_torch() -> Iterator[LocalBackend]:
    """The embedded voice on torch, whose sampling a test can bend."""
    backend = LocalBackend.open("embedded", device="cpu", dtype="fp32", max_batch=1, backend="torch")
    yield backend
    backend.close()


def _without_eos(logits, history, penalty, ban_eos, eos, suppress_from):
    logits = logits.clone()
    logits[:, suppress_from:] = float("-inf")
    return logits


def test_a_voice_without_end_is_stopped_and_says_so(in_torch: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakernel.frame_step.restrict", _without_eos)  # some requests in a thousand are like this
    stream = in_torch.speak(Request(text="Yes.", seed=1, ahead_s=None, greedy=True))
    frames = len(pcm(stream)) // FRAME_SAMPLES
    result = stream.wait()
    assert result.end in ("runaway", "cap")
    assert frames == result.frames <= 50 + 15 * 4


def test_one_code_for_three_seconds_is_a_runaway(in_torch: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(logits, history, penalty, ban_eos, eos, suppress_from):
        logits = _without_eos(logits, history, penalty, ban_eos, eos, suppress_from)
        logits[:, 17] += 1000
        return logits

    monkeypatch.setattr("megakernel.frame_step.restrict", stuck)
    for layout in ("whole", "streaming"):
        stream = in_torch.speak(Request(text=SENTENCES[0], seed=1, ahead_s=None, layout=layout))  # type: ignore[arg-type]
        list(stream)
        result = stream.wait()
        assert result.end == "runaway"
        assert 38 <= result.frames <= 60
    limited = in_torch.speak(Request(text=SENTENCES[0], seed=1, ahead_s=None, max_frames=70))
    list(limited)
    assert (limited.wait().end, limited.wait().frames) == ("cap", 70)


def test_leading_silence_is_skipped_on_request_and_reported(embedded: LocalBackend) -> None:
    base = Request(text=SENTENCES[0], seed=1, ahead_s=None)
    whole = pcm(embedded.speak(base))
    stream = embedded.speak(Request(text=SENTENCES[0], seed=1, ahead_s=None, skip_silence=True))
    skipped = pcm(stream)
    dropped = stream.wait().skipped_samples
    assert len(whole) == len(skipped) + dropped
    assert np.abs(whole[dropped:].astype(int) - skipped.astype(int)).max() <= 3
    first_loud = next(
        i for i in range(0, len(whole), 240) if np.sqrt(np.square(whole[i : i + 240] / 32767).mean()) > 0.01
    )
    assert dropped in (first_loud, first_loud - 240)


def test_words_arrive_in_order_within_the_audio(embedded: LocalBackend) -> None:
    stream = embedded.speak(Request(text=SENTENCES[0], seed=1, ahead_s=None))
    made, words = 0, []
    for chunk in stream:
        made += len(chunk.pcm)
        words += [(w, t) for w, t in chunk.words if t <= made / 24_000 + 1e-9]
    assert [w for w, _ in words] == SENTENCES[0].split()
    assert [t for _, t in words] == sorted(t for _, t in words)


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (Request(text=""), BadRequestError, "text is empty"),
        (Request(text=" \n "), BadRequestError, "text is empty"),
        (Request(text="Hi", voice="nobody"), UnknownNameError, "no voice 'nobody'; this checkpoint has slt, rms"),
        (
            Request(text="Hi", language="klingon"),
            UnknownNameError,
            "no language 'klingon'; this checkpoint has auto, english",
        ),
        (Request(text="Hi", temperature=0.0), BadRequestError, "temperature should be a number from 0.001 to 100"),
        (Request(text="Hi", temperature=float("nan")), BadRequestError, "temperature should be a number from 0.001"),
        (Request(text="Hi", temperature=1e-38), BadRequestError, "for no sampling at all set greedy"),
        (Request(text="Hi", temperature="0.9"), BadRequestError, "but is '0.9'"),  # type: ignore[arg-type]
        (Request(text="Hi", top_p=1.5), BadRequestError, "top_p should be a number from 0.001 to 1, but is 1.5"),
        (Request(text="Hi", top_k=-1), BadRequestError, "top_k should be an integer from 0"),
        (Request(text="Hi", top_k=40.0), BadRequestError, "top_k should be an integer"),  # type: ignore[arg-type]
        (Request(text="Hi", seed=1.5), BadRequestError, "seed should be an integer"),  # type: ignore[arg-type]
        (Request(text="Hi", ramp=(1.5,)), BadRequestError, "ramp should hold"),  # type: ignore[arg-type]
        (Request(text="Hi", voice=7), BadRequestError, "voice should be a string"),  # type: ignore[arg-type]
        (Request(text=7), BadRequestError, "text should be a string or an async iterator"),  # type: ignore[arg-type]
        (Request(text="Hi", repetition_penalty=0.0), BadRequestError, "repetition_penalty"),
        (Request(text="Hi", seed=-1), BadRequestError, "seed should be an integer from 0"),
        (Request(text="Hi", max_frames=0), BadRequestError, "max_frames should be an integer from 1"),
        (Request(text="Hi", ramp=()), BadRequestError, "ramp should hold"),
        (Request(text="Hi", ahead_s=-1.0), BadRequestError, "ahead_s should be a number above 0"),
        (Request(text="Hi", lead_s=float("nan")), BadRequestError, "lead_s should be a number from 0"),
        (Request(text="Hi", lead_s=61), BadRequestError, "lead_s should be a number from 0 to 60"),
        (Request(text="Hi", layout="fast"), BadRequestError, "layout should be"),  # type: ignore[arg-type]
        (Request(text="word " * 600), BadRequestError, "speak it sentence by sentence"),
    ],
)
def test_bad_requests_are_refused_with_one_line(embedded: LocalBackend, request_: Request, error, says: str) -> None:
    with pytest.raises(error, match=says.replace("(", r"\(")) as caught:
        embedded.speak(request_)
    assert isinstance(caught.value, TTSError)
    assert "\n" not in str(caught.value)


@pytest.fixture
def own(tiny: Callable[..., Path]) -> Iterator[LocalBackend]:
    backend = LocalBackend.open(str(tiny()), device="cpu", dtype="fp32", max_batch=2)
    yield backend
    backend.close()


def test_a_full_queue_is_refused(own: LocalBackend) -> None:
    own.engine._max_waiting = 3
    hold = threading.Event()
    tick = own.engine._tick
    own.engine._tick = lambda: hold.wait(10) and tick()  # type: ignore[method-assign]
    own.engine.wake()
    time.sleep(0.05)
    streams = []
    with pytest.raises(OverloadedError, match="try again later"):
        for _ in range(10):
            streams.append(own.speak(Request(text="Hi", max_frames=2)))
    hold.set()
    for stream in streams:
        list(stream)


def test_a_failing_step_ends_the_voices_with_an_error_and_the_engine_goes_on(own: LocalBackend) -> None:
    step = own.engine.step.step
    failures = iter([RuntimeError("the device is lost")])

    def broken(rows, text):
        for failure in failures:
            raise failure
        return step(rows, text)

    own.engine.step.step = broken  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="the device is lost"):
        list(own.speak(Request(text="Hello", max_frames=3)))
    again = own.speak(Request(text="Hello", max_frames=3))
    list(again)
    assert again.wait().frames == 3


@pytest.mark.parametrize("where", ["step", "prefill"])
def test_when_the_gpu_is_lost_all_voices_end_and_no_other_is_taken(own: LocalBackend, where: str) -> None:
    def lost(*_: object) -> None:
        raise gpu.CudaError(f"stepping: CUDA_ERROR_LAUNCH_FAILED; {gpu.LOST}\nCompile with TORCH_USE_CUDA_DSA")

    setattr(own.engine.step, where, lost)
    with pytest.raises(EngineError, match="restart it") as caught:
        list(own.speak(Request(text="Hello", max_frames=3)))
    assert "\n" not in str(caught.value)
    own.engine._thread.join(10)
    assert not own.ready
    with pytest.raises(EngineError, match="restart it"):
        list(own.speak(Request(text="Hello", max_frames=3)))


class Beside(Samples):
    """Samples that are never ready by themselves, as from a codec that works beside the talker."""

    def ready(self) -> bool:
        return False


def test_a_codec_that_works_beside_the_talker_says_the_same_and_loses_nothing(
    embedded: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests(8, seed=5)
    expected = [(pcm(stream), stream.wait()) for stream in map(embedded.speak, wanted)]
    decode, delivered_late = embedded.engine.codec.decode, []

    def later(codes: torch.Tensor, rows: list[int]) -> Beside:
        delivered_late.append(rows)
        samples = decode(codes, rows)
        samples.__class__ = Beside
        return samples  # type: ignore[return-value]

    monkeypatch.setattr(embedded.engine.codec, "decode", later)
    streams = [embedded.speak(request) for request in wanted]
    for stream, (audio, result) in zip(streams, expected, strict=True):
        np.testing.assert_allclose(pcm(stream).astype(int), audio.astype(int), atol=2)
        assert (stream.wait().end, stream.wait().frames) == (result.end, result.frames)
    assert delivered_late
    cut = embedded.speak(Request(text=SENTENCES[0], seed=1, ahead_s=None))
    next(iter(cut))
    cut.cancel()
    assert cut.wait().end == "cancelled"
    assert sorted(embedded.engine._free) == list(range(embedded.engine.step.rows))


def test_closing_ends_speaking_voices_and_is_idempotent(own: LocalBackend) -> None:
    stream = own.speak(Request(text="Hello", max_frames=10_000))
    next(iter(stream))
    own.close()
    own.close()
    assert not own.ready
    assert stream.wait(5).end == "error"
    with pytest.raises(EngineError, match="closed"):
        own.speak(Request(text="Hello"))


def test_concurrent_submits_from_many_threads_all_complete(embedded: LocalBackend) -> None:
    results: list[str] = []

    def run(n: int) -> None:
        stream = embedded.speak(Request(text=SENTENCES[n % len(SENTENCES)], seed=n, ahead_s=None))
        list(stream)
        results.append(stream.wait().end)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(24)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert results == ["eos"] * 24


def test_what_cannot_be_opened_is_refused_with_one_line() -> None:
    for kwargs, says in (
        ({"max_batch": 0}, "max_batch should be an integer in 1..32"),
        ({"max_batch": 1.5}, "max_batch should be an integer in 1..32"),
        ({"positions": 10}, "positions should be an integer in 64"),
        ({"device": "tpu"}, "device should be auto, cpu or cuda"),
        ({"dtype": "fp16"}, "dtype should be auto, bf16 or fp32"),
        ({"backend": "graph"}, "backend 'graph' cannot be had"),
        ({"profile": "fast"}, "profile should be one of latency, throughput, but is 'fast'"),
        ({"model": "nothing-here"}, "no model 'nothing-here'"),
    ):
        with pytest.raises(TTSError, match=says):
            LocalBackend.open(**{"device": "cpu", **kwargs})  # type: ignore[arg-type]


def test_cuda_asked_for_by_name_is_refused_where_there_is_none() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(BackendError, match="device cuda cannot be had"):
        LocalBackend.open(device="cuda")
