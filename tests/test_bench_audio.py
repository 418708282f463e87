"""What listeners wait for and how voices stop: the arithmetic against known arrivals, the benches at toy size."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipecat.metrics.metrics import TTFAMetricsData

from bench import barge_in, first_audio, typed, ways
from bench.hearing import hear
from pipecat_qwen3.backend import SAMPLE_RATE
from pipecat_qwen3.service import Qwen3TTSService
from tests.fakes import FakeBackend
from tests.serving import serving
from tests.test_service import metrics, samples, speak, turn

SECOND = SAMPLE_RATE * 2


def tone(seconds: float) -> bytes:
    return (8000 * np.sin(np.arange(round(seconds * SAMPLE_RATE)) / 10)).astype("<i2").tobytes()


def silence(seconds: float) -> bytes:
    return bytes(2 * round(seconds * SAMPLE_RATE))


# -- hearing -----------------------------------------------------------------------------------------------------------


def test_the_first_audible_sample_is_heard_when_it_is_played_not_when_it_arrives() -> None:
    heard = hear([(0.1, silence(0.3) + tone(0.2))])
    assert (heard.first_byte_s, heard.first_playable_s) == (0.1, 0.1)
    assert heard.first_audible_s == pytest.approx(0.4)
    assert heard.silence_s == pytest.approx(0.3)


def test_half_a_sample_is_a_byte_but_cannot_be_played() -> None:
    whole = tone(0.1)
    heard = hear([(0.1, whole[:1]), (0.2, whole[1:3]), (0.25, whole[3:])])
    assert (heard.first_byte_s, heard.first_playable_s) == (0.1, 0.2)
    assert heard.audio_s == pytest.approx(0.1)


def test_a_player_that_has_played_all_it_has_waits_and_is_late_from_then_on() -> None:
    heard = hear([(0.0, silence(0.1)), (0.3, silence(0.1)), (0.35, tone(0.1))])
    assert (heard.underruns, heard.stalled_s) == (1, pytest.approx(0.2))
    assert heard.first_audible_s == pytest.approx(0.4)


def test_what_is_never_heard_is_none() -> None:
    assert hear([]).first_byte_s is None
    quiet = hear([(0.1, silence(0.5))])
    assert quiet.first_audible_s is None
    assert quiet.silence_s == 0.5


@pytest.mark.parametrize("lead", [0.0, 0.1, 0.25])
async def test_silence_before_the_voice_is_as_long_as_pipecat_says(lead: float) -> None:
    class Late(FakeBackend):
        def speech(self, text: str) -> np.ndarray:
            return np.concatenate([np.zeros(round(lead * SAMPLE_RATE), np.int16), super().speech(text)])

    backend = Late()
    down, _ = await speak(Qwen3TTSService(backend=backend), *turn("Hello there."))
    backend.close()
    (theirs,) = metrics(down, TTFAMetricsData)
    assert hear([(0.0, samples(down).tobytes())]).silence_s == pytest.approx(theirs.leading_silence, abs=0.011)


# -- typing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*first_audio.TEXTS, "a_b  c\n d... “e” 42.50 ", "你好, 世界"])
def test_tokens_are_the_whole_text_in_pieces(text: str) -> None:
    assert "".join(typed.tokens(text)) == text
    assert max(map(len, typed.tokens(text))) < 15


async def test_typing_keeps_its_beat_however_slow_its_reader_is() -> None:
    began, count = time.perf_counter(), 0
    async for _ in typed.typed("one two three four five", 50):
        count += 1
        await asyncio.sleep(0.015)
    assert count == 5
    assert time.perf_counter() - began >= 4 / 50  # no token comes before its time


# -- the benches -------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint, few tokens, and a floor that costs nothing."""
    monkeypatch.setattr(first_audio, "TEXTS", ("One two.",))
    monkeypatch.setattr(first_audio, "floor_ms", lambda *_: {"prefill": 1.0, "frame": 1.0, "codec": 1.0})
    monkeypatch.setattr(barge_in, "floor_ms", lambda *_: {1: 1.0})
    return tiny("custom_voice")


def test_every_way_is_measured_whole_and_token_by_token(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeBackend()
    monkeypatch.setattr(first_audio.LocalBackend, "open", lambda *_, **__: FakeBackend())
    with serving(lambda: fake) as served:
        command = ["--model", str(toy), "--dtype", "fp32", "--device", "cpu"]
        command += ["--repeats", "1", "--rates", "100", "--url", served.http, "--results", str(tmp_path)]
        record = first_audio.main(command)
    cases = [(run["way"], run["rate"]) for run in record["runs"]]
    assert cases == [(way, rate) for way in first_audio.WAYS for rate in ([None] if way == "http" else [None, 100.0])]
    assert not record["missing"]
    for run in record["runs"]:
        assert 0 < run["first_byte_s"] <= run["first_playable_s"] <= run["total_s"]
        assert run["audio_s"] == pytest.approx(len(fake.speech("One two.")) / SAMPLE_RATE)
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert kept["runs"] == json.loads(json.dumps(record["runs"]))
    assert kept["machine"]["torch"] == kept["versions"]["torch"]
    assert kept["settings"]["rates"] == [100.0]


def test_an_interrupted_voice_gives_nothing_more_and_frees_its_row(toy: Path, tmp_path: Path) -> None:
    command = ["--model", str(toy), "--dtype", "fp32", "--device", "cpu", "--max-batch", "2"]
    with serving(lambda: FakeBackend(pace=0.5)) as served:
        command += ["--repeats", "1", "--voices", "1", "2", "--url", served.http, "--results", str(tmp_path)]
        record = barge_in.main(command)
    runs: dict[tuple[str, int], dict[str, Any]] = {(run["way"], run["voices"]): run for run in record["runs"]}
    assert list(runs) == [("in process", 1), ("in process", 2), ("socket", 1), ("socket", 2), *_PIPED]
    for (way, _), run in runs.items():
        assert (run["row_free_s"] is None) or "socket" not in way  # a server does not say when a row is free
        if way in ("in process", "socket"):
            assert run["late_samples"] == 0
        assert run["late_samples"] <= SAMPLE_RATE // 25  # one write of the transport
    assert runs["socket", 1]["done_s"] > 0


_PIPED = [("pipeline", 1), ("pipeline, socket", 1)]


def test_a_late_chunk_would_be_told() -> None:
    stops = barge_in._stops(1.0, [(0.5, 100), (1.5, 7), (1.75, 5)], None, remote=False)
    assert (stops["last_sample_s"], stops["late_samples"]) == (0.75, 12)


async def test_a_way_that_fails_says_so() -> None:
    backend = FakeBackend(fail=ValueError("broken"), fail_after=1)
    way = ways.ByBackend("in process", backend)
    with pytest.raises(Exception, match="broken"):
        await way.speak("Hello.", None, 0)
    backend.close()
