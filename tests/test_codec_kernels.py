"""The Triton kernels against plain torch: on a GPU as they are compiled, elsewhere in Triton's interpreter."""

# pyright: reportGeneralTypeIssues=false

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton: Any = pytest.importorskip("triton")
tl = triton.language

from pipecat_qwen3.codec import FoldedCodec  # noqa: E402
from pipecat_qwen3.codec_kernels import sine_cosine  # noqa: E402
from pipecat_qwen3.codec_state import CodecState  # noqa: E402
from pipecat_qwen3.codec_stream import Product, Snake, Tail  # noqa: E402
from pipecat_qwen3.codec_torch import TorchPass  # noqa: E402
from pipecat_qwen3.codec_triton import FEW_ROWS, TritonPass, tile  # noqa: E402
from tests.test_codec import TINY, make_decoder, random_codes  # noqa: E402

SMALL = replace(TINY, layers=1, upsample_rates=(3,), decoder_dim=8, window=4)

FORMS = {
    "a projection": {},
    "a norm before": {"eps": 1e-5, "bias": False},
    "gates": {"eps": 1e-5, "bias": False, "then": "gate"},
    "a gelu": {"then": "gelu"},
    "a residual": {"plus": True, "bias": False},
    "a convolution": {"kernel": 3},
    "a dilated convolution and its snake": {"kernel": 7, "dilation": 9, "snake": True},
    "an upsampling, before its snake too": {"kernel": 2, "rate": 3, "snake": True, "fork": True},
    "a residual, before its snake too": {"plus": True, "snake": True, "fork": True},
    "one clamped sample": {"kernel": 7, "outputs": 1, "then": "clamp"},
    "inputs that no tile divides": {"kernel": 3, "dilation": 3, "inputs": 20, "outputs": 70},
    "inputs that programs share": {"kernel": 7, "inputs": 128, "snake": True, "plus": True, "fork": True},
}


def make_product(
    inputs: int = 32,
    outputs: int = 24,
    kernel: int = 1,
    rate: int = 1,
    bias: bool = True,
    snake: bool = False,
    then: str = "",
    **others: Any,
) -> Product:
    torch.manual_seed(0)
    rows = rate * outputs * (2 if then == "gate" else 1)
    past = (kernel - 1) * others.get("dilation", 1)
    return Product(
        torch.randn(rows, kernel * inputs) / (kernel * inputs) ** 0.5,
        torch.randn(rows) if bias else None,
        kernel,
        rate=rate,
        tail=Tail(5 * 16, past, inputs) if kernel > 1 else None,
        then=then,  # type: ignore[arg-type]
        snake=Snake(torch.rand(outputs) * 3, torch.rand(outputs)) if snake else None,
        **others,
    )


def to(where: str, value: Any) -> Any:
    """The value with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(where)
    if isinstance(value, Product):
        return replace(value, **{k: to(where, v) for k, v in vars(value).items()})
    if isinstance(value, Snake):
        return Snake(*(v.to(where) for v in value))
    return value


def state_for(p: Product, device: str) -> CodecState:
    state = CodecState.zeros(SMALL, 5, device)
    width = 5 * 16 + (p.tail.steps * p.tail.channels if p.tail else 0) + 16
    torch.manual_seed(1)
    state.tails = torch.randn(5, width).to(device)
    return state


@pytest.mark.parametrize("steps", [1, 4, 7, 12], ids=lambda steps: f"{steps} steps")
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_that_of_torch(form, steps):
    options = dict(FORMS[form])
    plus, fork = options.pop("plus", False), options.pop("fork", False)
    p = make_product(**options)
    inputs = p.weight.shape[1] // p.kernel
    state, rows = state_for(p, DEVICE), torch.tensor([3, 0])
    untouched = state.tails[[1, 2, 4]].clone()
    x = torch.randn(2, 2 * steps, inputs)
    outputs = len(p.weight) // p.rate // (2 if p.then == "gate" else 1)
    residual = torch.randn(2, 2 * steps * p.rate, outputs) if plus else None

    def run(passes: type[TorchPass], where: str, memory: CodecState, first: int, last: int) -> tuple[Tensor, ...]:
        one = passes(SMALL, memory, rows.to(where), 1)
        added = None if residual is None else residual[:, first * p.rate : last * p.rate].clone().to(where)
        made = (one.fork if fork else one.product)(x[:, first:last].contiguous().to(where), to(where, p), added)
        return tuple(part.cpu() for part in (made if isinstance(made, tuple) else (made,)))

    whole = run(TorchPass, "cpu", state_for(p, "cpu"), 0, 2 * steps)
    pieces = [run(TritonPass, DEVICE, state, i * steps, (i + 1) * steps) for i in (0, 1)]  # the second from new tails
    for expected, *made in zip(whole, *pieces, strict=True):
        torch.testing.assert_close(torch.cat(made, 1), expected, atol=2e-5, rtol=0)
    assert torch.equal(state.tails[[1, 2, 4]], untouched)


def test_the_forms_above_take_every_way_through_the_product():
    tiles = []
    for options in FORMS.values():
        p = make_product(**{name: value for name, value in options.items() if name not in ("plus", "fork")})
        tiles += [tile(p, 2 * steps, p.weight.shape[1] // p.kernel) for steps in (1, 4, 7, 12)]
    assert {rows for rows, *_ in tiles} == {2, 8, 16, 32}
    assert {shares > 1 for *_, shares in tiles} == {True, False}


def test_a_pass_is_that_of_torch_also_where_the_ring_goes_round():
    decoder = make_decoder(SMALL)
    codec = decoder.fold()
    fast = FoldedCodec(copy.deepcopy(decoder).to(DEVICE), TritonPass)
    states = CodecState.zeros(SMALL, 4), CodecState.zeros(SMALL, 4, DEVICE)
    for state in states:  # what no frame has written is not read
        state.kv.fill_(100.0)
    for i, (rows, frames) in enumerate((([2], 1), ([0, 2], 2), ([2, 3, 0], 8), ([0, 3], 8), ([3, 2], 1))):
        codes = random_codes(SMALL, len(rows), frames, seed=i)
        expected = codec.decode(codes, states[0], torch.tensor(rows))
        got = fast.decode(codes.int().to(DEVICE), states[1], torch.tensor(rows, device=DEVICE)).cpu()
        assert 0.01 < expected.std() < 0.9
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    for mine, theirs in zip(states[1].arrays, states[0].arrays, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, atol=1e-5, rtol=0)


def test_codes_out_of_range_are_clamped():
    fast = FoldedCodec(make_decoder(SMALL).to(DEVICE), TritonPass)
    tables = torch.randn(3 * 16, 8, device=DEVICE)
    one = TritonPass(SMALL, CodecState.zeros(SMALL, 1, DEVICE), torch.tensor([0], device=DEVICE), 2)
    codes = torch.tensor([[[-1, 16], [3, 2**30], [-(2**30), 15]]], device=DEVICE)
    got = one.embed(codes, tables, fast.first_entry)
    expected = tables[[0, 16 + 3, 32]].sum(0), tables[[15, 16 + 15, 32 + 15]].sum(0)
    torch.testing.assert_close(got[0], torch.stack(expected))


@triton.jit
def waves(x, sine, cosine, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    s, c = sine_cosine(tl.load(x + i))
    tl.store(sine + i, s)
    tl.store(cosine + i, c)


@pytest.mark.parametrize("most", [1.0, 100.0, 30_000.0])
def test_sines_are_exact_to_fp32_up_to_an_hour_of_frames(most):
    x = torch.cat((torch.linspace(-most, most, 4095), torch.zeros(1))).to(DEVICE)
    sine, cosine = torch.empty_like(x), torch.empty_like(x)
    waves[(1,)](x, sine, cosine, 4096)
    torch.testing.assert_close(sine.double(), x.double().sin(), atol=3e-7, rtol=0)
    torch.testing.assert_close(cosine.double(), x.double().cos(), atol=3e-7, rtol=0)


@pytest.mark.slow
def test_the_kernels_of_every_graph_compile_for_hopper_and_keep_to_its_registers():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_codec"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [dict(part.split("=") for part in line.split()[1:]) for line in done.stdout.splitlines()]
    assert len(lines) > 50
    assert FEW_ROWS == 8
    for line in lines:
        assert line["stack"] == "0", line  # nothing spilled
        assert int(line["shared"]) <= 227 * 1024, line
