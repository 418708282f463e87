from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipecat_qwen3.codec import FoldedCodec
from pipecat_qwen3.codec_graphs import HOST_BUFFERS, Cuda, GraphRunner
from pipecat_qwen3.codec_runner import CodecRunner, open_codec
from pipecat_qwen3.codec_state import CodecState
from pipecat_qwen3.errors import BadRequestError
from tests.test_codec import TINY, make_decoder, random_codes

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Late:
    """An event that nothing has reached until somebody waits for it."""

    def __init__(self) -> None:
        self.reached = False

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.reached = True


class Inline(Cuda):
    """A device that keeps the captured work and does it again."""

    def __init__(self) -> None:
        self.captured = 0
        self.events: list[Late] = []

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        work()
        return work

    @contextmanager
    def after_caller(self, codes: Tensor | None = None) -> Iterator[None]:
        yield

    def host(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def mark(self) -> Any:
        self.events.append(Late())
        return self.events[-1]


@pytest.fixture(scope="module")
def codec() -> FoldedCodec:
    return make_decoder("tiny").fold()


def graphs(codec: FoldedCodec, rows: int = 12, voices: int = 8) -> GraphRunner:
    return GraphRunner(codec, rows, voices, Inline())


def test_any_number_of_voices_and_frames_sounds_as_without_graphs(codec):
    runner, plain = graphs(codec, voices=9), CodecRunner(codec, 12)
    random = torch.Generator().manual_seed(0)
    for voices in range(1, 10):
        for frames in range(1, 10):
            rows = torch.randperm(12, generator=random)[:voices].tolist()
            codes = random_codes(TINY, voices, frames, seed=voices * frames)
            got, expected = runner.decode(codes, rows).wait(), plain.decode(codes, rows).wait()
            assert got.shape == (voices, frames * TINY.frame_samples)
            np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    for mine, theirs in zip(runner.state.arrays, plain.state.arrays, strict=True):
        torch.testing.assert_close(mine[:12], theirs, atol=1e-4, rtol=0)


def test_graphs_are_captured_once_for_each_power_of_two_and_never_later(codec):
    device = Inline()
    runner = GraphRunner(codec, 8, 5, device)
    assert device.captured == 4 * 4  # voices 1, 2, 4, 8; frames 1, 2, 4, 8
    runner.decode(random_codes(TINY, 5, 7), range(5)).wait()
    assert device.captured == 4 * 4


def test_empty_places_of_a_graph_touch_no_voice(codec):
    runner = graphs(codec, rows=8)
    for array in runner.state.arrays[:2]:
        array.normal_()
    before = [array.clone() for array in runner.state.arrays]
    runner.decode(random_codes(TINY, 5, 3), [6, 1, 0, 3, 7]).wait()
    for array, old in zip(runner.state.arrays, before, strict=True):
        assert torch.equal(array[[2, 4, 5]], old[[2, 4, 5]])


def test_results_may_be_read_late_and_in_any_order(codec):
    runner, plain = graphs(codec), CodecRunner(codec, 12)
    codes = [random_codes(TINY, 2, 3, seed) for seed in range(3 * HOST_BUFFERS)]
    expected = [plain.decode(c, [4, 5]).wait() for c in codes]
    results = [runner.decode(c, [4, 5]) for c in codes]
    assert not results[-1].ready()
    for i in [*range(1, len(codes), 2), *range(0, len(codes), 2)]:
        np.testing.assert_allclose(results[i].wait(), expected[i], atol=1e-5, rtol=0)
        assert results[i].ready()
    np.testing.assert_allclose(results[0].wait(), expected[0], atol=1e-5, rtol=0)


def test_results_that_nobody_reads_are_waited_for_only_when_their_memory_is_needed(codec):
    device = Inline()
    runner = GraphRunner(codec, 2, 1, device)
    for made in range(1, 3 * HOST_BUFFERS):
        runner.decode(random_codes(TINY, 1, 1), [0])
        assert [event.reached for event in device.events] == [i < made - HOST_BUFFERS for i in range(made)]
    codes = random_codes(TINY, 1, 2)
    runner.reset(0)
    expected = CodecRunner(codec, 1).decode(codes, [0]).wait()
    np.testing.assert_allclose(runner.decode(codes, [0]).wait(), expected, atol=1e-5, rtol=0)


def test_more_voices_than_the_largest_graph_take_several(codec):
    runner, plain = graphs(codec, voices=4), CodecRunner(codec, 12)
    codes, rows = random_codes(TINY, 11, 2), [3, 1, 0, 2, 11, 10, 9, 8, 4, 5, 6]
    np.testing.assert_allclose(runner.decode(codes, rows).wait(), plain.decode(codes, rows).wait(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [graphs, lambda codec: open_codec(codec, 12, 8)], ids=["graphs", "at once"])
def test_a_reset_row_begins_anew_and_a_copied_one_goes_on(codec, make):
    runner = make(codec)
    codes = random_codes(TINY, 1, 9)
    whole = runner.decode(codes, [3]).wait()
    runner.reset(3)
    first = runner.decode(codes[..., :4], [3]).wait()
    runner.copy_row(3, 7)
    second = runner.decode(codes[..., 4:], [7]).wait()
    np.testing.assert_allclose(np.concatenate((first, second), 1), whole, atol=1e-5, rtol=0)
    primed = CodecState.zeros(TINY, 2)
    codec.decode(codes[..., :4], primed, torch.tensor([1]))
    runner.copy_row(1, 0, source=primed)
    np.testing.assert_allclose(runner.decode(codes[..., 4:], [0]).wait(), second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [graphs, lambda codec: open_codec(codec, 12, 8)], ids=["graphs", "at once"])
def test_rows_that_do_not_fit_the_codes_are_refused_in_one_line(codec, make):
    runner = make(codec)
    with pytest.raises(BadRequestError, match=r"^rows should be .*2.*") as caught:
        runner.decode(random_codes(TINY, 2, 1), [0])
    assert "\n" not in str(caught.value)
    with pytest.raises(BadRequestError, match="codes should have the shape"):
        runner.decode(random_codes(TINY, 2, 1)[:, :1], [0, 1])
    assert not runner.state.frames_done[:12].any()


def test_on_a_cpu_nothing_is_captured(codec):
    assert type(open_codec(codec, 4, 4)) is CodecRunner


@NEEDS_GPU
@pytest.mark.parametrize("own_stream", [True, False])
def test_on_a_gpu_graphs_sound_as_the_cpu(own_stream):
    decoder = make_decoder("embedded")
    config, plain = decoder.config, CodecRunner(decoder.fold(), 6)
    runner = open_codec(decoder.cuda().fold(), 6, 4, own_stream)
    assert isinstance(runner, GraphRunner)
    random, results = torch.Generator().manual_seed(0), []
    for step in range(60):
        voices, frames = step % 4 + 1, step % 9 + 1
        rows = torch.randperm(6, generator=random)[:voices].tolist()
        codes = random_codes(config, voices, frames, seed=step)
        results.append((runner.decode(codes.cuda(), rows), plain.decode(codes, rows)))
    for got, expected in results:
        np.testing.assert_allclose(got.wait(), expected.wait(), atol=1e-4, rtol=0)


@NEEDS_GPU
def test_on_a_gpu_codes_out_of_range_are_clamped():
    decoder = make_decoder("tiny")
    runner = open_codec(decoder.cuda().fold(), 2, 1)
    codes = random_codes(TINY, 1, 1).fill_(TINY.codebook_size - 1).cuda()
    assert np.array_equal(runner.decode(codes + 7, [0]).wait(), runner.decode(codes, [1]).wait())


@NEEDS_GPU
def test_on_a_gpu_a_window_of_one_frame_has_no_past():
    torch.manual_seed(0)
    decoder = make_decoder("tiny")
    decoder.config = replace(TINY, window=1)
    decoder.pre_transformer.config = decoder.config
    codes = random_codes(TINY, 1, 6)
    expected = CodecRunner(decoder.fold(), 1).decode(codes, [0]).wait()
    got = open_codec(decoder.cuda().fold(), 1, 1).decode(codes.cuda(), [0]).wait()
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
