"""Who goes first when not everybody can, and what an engine without work does."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipecat_qwen3.backend import Request, Stream
from pipecat_qwen3.local import LocalBackend

TEXT = "Your table is booked for two at eight."


@pytest.fixture
def backend() -> Iterator[LocalBackend]:
    opened = LocalBackend.open("embedded", device="cpu", dtype="fp32", max_batch=3)
    yield opened
    opened.close()


def record(backend: LocalBackend) -> list[list[int]]:
    """The rows of every step from now on."""
    rows_of_steps: list[list[int]] = []
    step = backend.engine.step.step

    def recorded(rows: list[int], text: torch.Tensor) -> torch.Tensor:
        rows_of_steps.append(list(rows))
        return step(rows, text)

    backend.engine.step.step = recorded  # type: ignore[method-assign]
    return rows_of_steps


def codes(stream: Stream) -> np.ndarray:
    """What was spoken; nobody takes the audio, so that no playback clock runs."""
    found = stream.wait(30).codes
    assert found is not None
    return found


def test_when_columns_are_short_the_voice_least_ahead_of_its_playback_goes_first(backend: LocalBackend) -> None:
    requests = [Request(TEXT, seed=seed, max_frames=20) for seed in range(3)]
    alone = [codes(backend.speak(request)) for request in requests]
    steps = record(backend)
    backend.engine.step.columns = 1
    first = backend.speak(requests[0])
    while len(steps) < 8:  # by which it leads then
        time.sleep(0.001)
    others = [backend.speak(request) for request in requests[1:]]
    for stream, expected in zip([first, *others], alone, strict=True):
        assert np.array_equal(codes(stream), expected)
    assert all(len(rows) == 1 for rows in steps)
    order = [rows[0] for rows in steps]
    assert len(order) == 60
    leader = order[0]
    begin = next(i for i, row in enumerate(order) if row != leader)
    lead = min(begin, 19)
    catching_up = order[begin : begin + 2 * lead - 4]
    assert leader not in catching_up
    assert min(catching_up.count(row) for row in set(order) - {leader}) >= lead - 4


def test_an_engine_without_work_sleeps(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    codes(backend.speak(Request(TEXT, seed=1, max_frames=3)))
    time.sleep(0.1)  # its last tick
    ticks: list[None] = []
    tick = backend.engine._tick

    def counted() -> bool:
        ticks.append(None)
        return tick()

    monkeypatch.setattr(backend.engine, "_tick", counted)
    time.sleep(0.5)
    assert not ticks
    codes(backend.speak(Request(TEXT, seed=1, max_frames=3)))
    assert ticks
