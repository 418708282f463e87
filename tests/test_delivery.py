"""Chunks on their way to a listener: what is left of a frame after its silence, without an engine."""

import numpy as np
import pytest

from bench.hearing import Heard, hear
from pipecat_qwen3.backend import FRAME_SAMPLES, SAMPLE_RATE, Request, Stream
from pipecat_qwen3.delivery import Delivery
from pipecat_qwen3.words import Rate, WordTimes

FRAME_COST_S = 0.03


def spoken(silent_ms: int, frames: int = 4) -> np.ndarray:
    """So much silence and then a tone, `frames` frames in all."""
    samples = 0.3 * np.sin(np.arange(frames * FRAME_SAMPLES) * 0.1).astype(np.float32)
    samples[: silent_ms * SAMPLE_RATE // 1000] = 0
    return samples


def delivered(samples: np.ndarray, **settings) -> list[tuple[float, bytes]]:
    """(seconds, PCM) of each chunk when a frame is made each FRAME_COST_S."""
    stream, arrivals = Stream(), []
    delivery = Delivery(stream, Request("", skip_silence=True, **settings), WordTimes(Rate()))
    chunks = iter(stream)
    frames = samples.reshape(-1, FRAME_SAMPLES)
    for number, frame in enumerate(frames, 1):
        before = delivery.seconds
        delivery.deliver(frame.copy(), False, FRAME_COST_S)
        if number == len(frames):
            delivery.last_words(natural=True)
        if delivery.seconds > before:
            arrivals.append((number * FRAME_COST_S, next(chunks).pcm.tobytes()))
    return arrivals


def listened(arrivals: list[tuple[float, bytes]]) -> Heard:
    heard = hear(arrivals)
    assert heard.silence_s <= 0.01
    return heard


@pytest.mark.parametrize("silent_ms", [0, 10, 30, 50, 60, 70, 79, 80, 85, 140, 155])
def test_the_first_word_has_no_gap_however_much_silence_is_skipped(silent_ms: int) -> None:
    samples = spoken(silent_ms)
    heard = listened(delivered(samples))
    assert heard.underruns == 0
    assert heard.audio_s == pytest.approx(len(samples) / SAMPLE_RATE - silent_ms / 1000, abs=0.0201)


@pytest.mark.parametrize(("silent_ms", "frames"), [(0, 1), (40, 1), (50, 2), (75, 2), (110, 2), (150, 3)])
def test_only_what_would_be_over_too_soon_waits_for_the_next_frame(silent_ms: int, frames: int) -> None:
    assert listened(delivered(spoken(silent_ms))).first_byte_s == pytest.approx(frames * FRAME_COST_S)


def test_a_file_has_no_listener_to_wait_for() -> None:
    assert delivered(spoken(75), ahead_s=None)[0][0] == pytest.approx(FRAME_COST_S)


def test_speech_that_ends_at_once_is_handed_out() -> None:
    heard = listened(delivered(spoken(70, frames=1)))
    assert heard.audio_s == pytest.approx(0.02)
