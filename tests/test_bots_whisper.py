"""Whisper for all clients of a bot, with a stand-in for the model, which has to be downloaded."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from pipecat.frames.frames import TranscriptionFrame

from bots import whisper
from bots.options import warm


class Whisper:
    """Counts how often it is loaded, and hears how long somebody speaks."""

    loaded: list[str] = []  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.loaded.append(name)

    def transcribe(self, samples: np.ndarray):
        assert samples.dtype == np.float32
        assert abs(samples).max() <= 1
        said = SimpleNamespace(text=f" {len(samples)} samples.", no_speech_prob=0.1)
        return iter([said, SimpleNamespace(text=" Thanks for watching!", no_speech_prob=0.9)]), None


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    package = ModuleType("faster_whisper")
    vars(package)["WhisperModel"] = Whisper
    monkeypatch.setitem(sys.modules, "faster_whisper", package)
    monkeypatch.setattr(Whisper, "loaded", [])
    whisper.model.cache_clear()
    yield package
    whisper.model.cache_clear()


async def heard(rate: int, seconds: float, model: str | None = None) -> list[str]:
    service = whisper.SharedWhisperSTTService(model)
    service._sample_rate = rate
    tone = (8000 * np.sin(np.arange(int(rate * seconds)))).astype(np.int16).tobytes()
    frames = [frame async for frame in service.run_stt(tone)]
    assert all(isinstance(frame, TranscriptionFrame) for frame in frames)
    return [frame.text for frame in frames if isinstance(frame, TranscriptionFrame)]


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
async def test_whisper_gets_its_own_rate_and_what_is_no_speech_is_dropped(package: ModuleType, rate: int) -> None:
    assert await heard(rate, 0.5) == ["8000 samples."]


async def test_the_model_is_loaded_once_and_before_the_first_client(package: ModuleType) -> None:
    warm(Namespace(stt="whisper", stt_model=None))
    assert Whisper.loaded == [whisper.MODEL]
    for _ in range(3):
        await heard(16_000, 0.1)
    assert Whisper.loaded == [whisper.MODEL]


async def test_another_model_of_whisper_can_be_chosen(package: ModuleType) -> None:
    warm(Namespace(stt="whisper", stt_model="large-v3-turbo"))
    await heard(16_000, 0.1, "large-v3-turbo")
    assert Whisper.loaded == ["large-v3-turbo"]


def test_a_model_that_cannot_be_loaded_is_said_in_one_line(package: ModuleType) -> None:
    def fail(name: str) -> None:
        raise OSError("no such host\nand much more")

    vars(package)["WhisperModel"] = fail
    with pytest.raises(SystemExit, match=r"could not be loaded \(no such host\).*Hugging Face") as end:
        warm(Namespace(stt="whisper", stt_model=None))
    assert "\n" not in str(end.value)
