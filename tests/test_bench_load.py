"""The load generator: arrivals that wait for nobody, a player without buffer, floor, curve and plot."""

import asyncio
import json
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import load
from pipecat_qwen3.errors import OverloadedError
from pipecat_qwen3.remote import RemoteBackend
from tests.fakes import FakeBackend
from tests.serving import serving


def heard(fake: FakeBackend, text: str = "Hello there, friend.") -> load.Heard:
    with serving(lambda: fake) as server:
        remote = RemoteBackend.open(server.ws)
        found = asyncio.run(load.listen(remote, text, 0, time.perf_counter(), 0.0))
        remote.close()
    return found


def test_a_player_without_buffer_runs_dry_where_the_server_is_slower_than_speech() -> None:
    slow = heard(FakeBackend(pace=2.0))
    assert slow.end == "eos"
    assert slow.underruns >= 3
    assert slow.stalled > 0.2
    assert slow.audio == pytest.approx(1.2)
    assert slow.first_byte is not None
    assert slow.first_audible is not None
    assert slow.total >= slow.first_audible >= slow.first_byte >= 0.16


def test_arrivals_do_not_wait_for_answers() -> None:
    def dues(pace: float | None) -> list[float]:
        with serving(lambda: FakeBackend(pace=pace, seconds_per_char=0.01)) as server:
            remote = RemoteBackend.open(server.ws)
            answers = asyncio.run(load.run_rate(remote, rate=20, seconds=0.6, seed=3))
            remote.close()
        assert {answer.end for answer in answers} == {"eos"}
        return [answer.due for answer in answers]

    quick, slow = dues(None), dues(2.0)
    assert len(quick) >= 5
    assert slow == pytest.approx(quick)


def test_a_run_prints_the_floor_first_and_keeps_every_sample(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(load, "RESULTS", tmp_path)
    fake = FakeBackend(seconds_per_char=0.01)
    with serving(lambda: fake) as server:
        options = ["--url", server.ws, "--rates", "20", "--seconds", "0.5", "--api-key", "a secret"]
        monkeypatch.setattr("sys.argv", ["load", *options])
        asyncio.run(load.main())
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:3] == ["req/s", "alone", "20"]
    kept = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert kept["machine"]["commit"]
    assert len(kept["requests"]["alone"]) == 14
    assert len(kept["requests"]["20"]) == kept["points"][0]["requests"] > 2
    assert kept["points"][0]["completed"] == kept["floor"]["completed"] == 1
    assert "a secret" not in json.dumps(kept)
    assert ET.parse(next(tmp_path.glob("*.svg"))).getroot().tag.endswith("svg")


def test_what_is_refused_counts_as_not_completed(tmp_path: Path) -> None:
    refused = heard(FakeBackend(fail=OverloadedError("full")))
    assert refused.end == "overloaded"
    point = load.finite(load.summary(1.0, [refused]))
    assert (point["completed"], point["first_byte_p50"]) == (0, None)
    load.plot([load.summary(1.0, [refused])], tmp_path / "nothing.svg")
