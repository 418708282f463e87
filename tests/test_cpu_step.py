"""The frame that numba compiles: TorchFrameStep's codes in fp32, the same bits by any number of threads."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megakernel import choose, cpu_kernel, sampler
from megakernel.cpu_step import CpuFrameStep
from megakernel.frame_step import RowStep, TorchFrameStep
from megakernel.reference import FrameWeights
from megakernel.sampler import Sampling
from megakernel.shape import Shape
from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.talker import decode_weights

SAMPLINGS = (
    Sampling(),
    Sampling(False, predictor_do_sample=False),
    Sampling(True, 0.7, 0, 0.8, 1.2, True, 1.1, 20, 0.9),
)


@pytest.fixture(scope="module", params=["tiny", "tiny-projected", "embedded"])
def model(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> tuple[FrameWeights, Shape]:
    return load("embedded" if request.param == "embedded" else tiny("custom_voice", request.param), torch.float32)


def load(folder: str | Path, dtype: torch.dtype) -> tuple[FrameWeights, Shape]:
    talker = Checkpoint.open(str(folder)).load_talker(dtype)
    return decode_weights(talker), talker.config.shape


def speak(step: RowStep, frames: int = 12) -> tuple[Tensor, Tensor]:
    """Codes [frames, 3, C] of three voices with prompts of 5, 16 and 22 positions, and their keys and values."""
    hidden, dtype = step.shape.talker.hidden, step.pending.dtype
    g = torch.Generator().manual_seed(1)
    noise = (0.2 * torch.randn(3, 64, hidden, generator=g)).to(dtype)
    rows = (4, 0, 2)
    for i, (row, length) in enumerate(zip(rows, (5, 16, 22), strict=True)):
        step.admit(row, noise[i, 63], 10**12 + i, SAMPLINGS[i])
        for piece in noise[i, :length].split(16):
            step.prefill(row, piece)
    codes = [step.step(rows, noise[:, 30 + t]) for t in range(frames)]
    return torch.stack(codes), step.kv.clone()


def test_its_codes_are_those_of_torch(model: tuple[FrameWeights, Shape]) -> None:
    weights, shape = model
    codes, kv = speak(CpuFrameStep(weights, shape, 5, 4, 64))
    expected, expected_kv = speak(TorchFrameStep(weights, shape, 5, 4, 64))
    assert torch.equal(codes, expected)
    assert (kv - expected_kv).abs().max() < 1e-4 * expected_kv.abs().max()
    assert len(codes[:, :, 1:].unique()) > 3


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(tiny: Callable[..., Path], threads: int) -> None:
    weights, shape = load(tiny("custom_voice", "tiny-projected"), torch.float32)
    alone, together = (speak(CpuFrameStep(weights, shape, 5, 4, 64, n), 3) for n in (1, threads))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_its_threads_end_with_it(tiny: Callable[..., Path]) -> None:
    before = set(threading.enumerate())
    step = CpuFrameStep(*load(tiny("custom_voice", "tiny"), torch.float32), 1, 1, 64, 3)
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    del step
    for thread in helpers:
        thread.join(10)
        assert not thread.is_alive()


def test_weights_that_are_bf16_stay_so_and_the_dtype_changes_no_bit() -> None:
    wide, narrow = (CpuFrameStep(*load("embedded", dtype), 5, 4, 64) for dtype in (torch.float32, torch.bfloat16))
    assert wide.weights[2].codec_head.dtype == wide.weights[1].down.dtype == wide.weights[2].inputs.dtype == np.uint16
    g = torch.Generator().manual_seed(1)
    pending, text = (torch.randn(2, 256, generator=g).bfloat16() for _ in range(2))
    for step in (wide, narrow):
        step.admit(3, pending[0], 1, Sampling())
        step.prefill(3, pending)
    for _ in range(8):
        assert torch.equal(wide.step([3], text[:1].float()), narrow.step([3], text[:1]))
    assert torch.equal(wide.kv, narrow.kv)


def test_weights_that_bf16_would_round_are_kept_in_fp32(tiny: Callable[..., Path]) -> None:
    weights, shape = load(tiny("custom_voice", "tiny"), torch.float32)
    weights.talker.layers[0].o.data[0, 0] += 1e-6
    step = CpuFrameStep(weights, shape, 5, 4, 64)
    assert step.weights[0].qkv.dtype == step.weights[2].codec_head.dtype == np.float32
    codes, _ = speak(step)
    assert torch.equal(codes, speak(TorchFrameStep(weights, shape, 5, 4, 64))[0])


@pytest.mark.parametrize(("vocab", "top_k", "top_p"), [(3072, 50, 1.0), (2048, 0, 0.9), (100, 7, 0.5), (33, 0, 1.0)])
def test_the_sampling_rule_is_the_samplers(vocab: int, top_k: int, top_p: float) -> None:
    g = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(300, vocab, generator=g)
    logits[::3] = logits[::3].round()  # ties
    uniform = torch.rand(300, generator=g)
    chosen = sampler.knobs([(True, 0.7, top_k, top_p)] * 300, vocab, torch.device("cpu"))
    expected = sampler.pick(logits, chosen, uniform)
    knobs = np.array([1, 0.7, top_k, 1 - top_p], np.float32)
    sums, order = np.zeros(vocab, np.float32), np.zeros(vocab, np.int64)
    found = [
        cpu_kernel._pick(row.clone().numpy(), knobs, np.float32(u), sums, order)
        for row, u in zip(logits, uniform.numpy(), strict=True)
    ]
    assert (torch.tensor(found) == expected).float().mean() > 0.99  # the last bit of exp may move a draw
    greedy = [cpu_kernel._pick(row.numpy(), 0 * knobs, np.float32(0), sums, order) for row in logits]
    assert greedy == logits.argmax(-1).tolist()


def test_without_numba_torch_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Checkpoint.open("embedded").config.shape
    assert choose.choose("auto", "cpu", torch.float32, shape, 8).name == "numba"
    monkeypatch.delitem(sys.modules, "megakernel.cpu_step")
    monkeypatch.delattr("megakernel.cpu_step")
    monkeypatch.setitem(sys.modules, "megakernel.cpu_kernel", None)
    choice = choose.choose("auto", "cpu", torch.float32, shape, 8)
    assert choice.name == "torch"
    assert "numba cannot be had (ModuleNotFoundError" in choice.reason
    with pytest.raises(choose.UnavailableError, match=r"'numba' cannot be had: .*; use --backend torch or auto"):
        choose.choose("numba", "cpu", torch.float32, shape, 8)


def test_numba_is_refused_for_a_gpu() -> None:
    shape = Checkpoint.open("embedded").config.shape
    with pytest.raises(choose.UnavailableError, match="'numba' runs on a CPU and the device is cuda"):
        choose.choose("numba", "cuda", torch.bfloat16, shape, 8)


def test_where_machine_code_cannot_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(x: int) -> int:
        return 2 * x

    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert cpu_kernel.exact(twice)(21) == 42
