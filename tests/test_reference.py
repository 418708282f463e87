"""The arithmetic of a frame against float64, against the official multimodal RoPE, and against itself in pieces."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megakernel import reference
from megakernel.frame_step import TorchFrameStep
from megakernel.reference import LayerWeights, StackWeights
from megakernel.sampler import Sampling
from megakernel.shape import StackShape
from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.talker import Talker, decode_weights

SHAPE = StackShape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=32)


def random_stack(dtype: torch.dtype, seed: int = 0) -> StackWeights:
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=g) / columns**0.5).to(dtype)

    def norm(*size: int) -> Tensor:
        return (1 + 0.1 * torch.randn(*size, generator=g)).to(dtype)

    s = SHAPE
    layers = [
        LayerWeights(
            input_norm=norm(s.hidden),
            qkv=matrix(s.q_size + 2 * s.kv_size, s.hidden),
            qk_norm=norm(s.heads + s.kv_heads, s.head_dim),
            o=matrix(s.hidden, s.q_size),
            post_norm=norm(s.hidden),
            gate_up=matrix(2 * s.intermediate, s.hidden),
            down=matrix(s.hidden, s.intermediate),
        )
        for _ in range(s.layers)
    ]
    return StackWeights(layers, norm(s.hidden))


def cast(w: StackWeights, dtype: torch.dtype) -> StackWeights:
    layers = [LayerWeights(**{k: v.to(dtype) for k, v in vars(layer).items()}) for layer in w.layers]
    return StackWeights(layers, w.norm.to(dtype))


def plain_stack(x: Tensor, w: StackWeights) -> Tensor:
    """The same stack written down naively, one head and one position at a time, in x's dtype throughout."""
    s, t = SHAPE, x.shape[0]

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + s.norm_eps).sqrt() * weight

    def rope(y: Tensor, position: int) -> Tensor:
        half = s.head_dim // 2
        out = y.clone()
        for i in range(half):
            angle = torch.tensor(position * s.rope_theta ** (-2 * i / s.head_dim), dtype=torch.float64)
            c, n = angle.cos().to(y.dtype), angle.sin().to(y.dtype)
            out[i], out[i + half] = y[i] * c - y[i + half] * n, y[i + half] * c + y[i] * n
        return out

    for layer in w.layers:
        y = norm(x, layer.input_norm) @ layer.qkv.T
        heads = y.view(t, s.heads + 2 * s.kv_heads, s.head_dim)
        out = torch.zeros(t, s.heads, s.head_dim, dtype=x.dtype)
        for h in range(s.heads):
            g = s.heads + h // s.group
            q = [rope(norm(heads[p, h], layer.qk_norm[h]), p) for p in range(t)]
            k = [rope(norm(heads[p, g], layer.qk_norm[g]), p) for p in range(t)]
            for p in range(t):
                scores = torch.stack([q[p] @ k[o] / s.head_dim**0.5 for o in range(p + 1)])
                out[p, h] = scores.softmax(0) @ heads[: p + 1, g + s.kv_heads]
        x = x + out.reshape(t, -1) @ layer.o.T
        y = norm(x, layer.post_norm) @ layer.gate_up.T
        gate, up = y.chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer.down.T
    return norm(x, w.norm)


def test_a_stack_equals_the_formulas_written_down_naively_in_float64() -> None:
    w = random_stack(torch.float32)
    x = torch.randn(9, SHAPE.hidden, generator=torch.Generator().manual_seed(1))
    expected = plain_stack(x.double(), cast(w, torch.float64))
    assert (reference.causal(x[None], w, SHAPE)[0] - expected).abs().max() < 2e-5


def test_bf16_is_as_good_as_a_plain_torch_bf16_stack() -> None:
    w = random_stack(torch.bfloat16, seed=3)
    x = torch.randn(24, SHAPE.hidden, generator=torch.Generator().manual_seed(2)).bfloat16()
    oracle = plain_stack(x.double(), cast(w, torch.float64))
    own = (plain_stack(x, w) - oracle).abs().mean()
    ours = (reference.causal(x[None], w, SHAPE)[0] - oracle).abs().mean()
    assert ours <= 2 * own


def official_multimodal_rope(x: Tensor, positions: Tensor, sections: list[int], interleaved: bool) -> Tensor:
    """Qwen's multimodal RoPE from its description: 3 position rows, each frequency takes its angle from one of them."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / (1e6 ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    angles = positions[:, :, None].float() * frequencies
    if interleaved:
        owner = [i % 3 if i < 3 * min(sections[1:]) else 0 for i in range(half)]
    else:
        owner = [row for row, size in enumerate(sections) for _ in range(size)]
    mixed = torch.stack([angles[row, :, i] for i, row in enumerate(owner)], -1)
    cos, sin = torch.cat([mixed, mixed], -1).cos(), torch.cat([mixed, mixed], -1).sin()
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


@pytest.mark.parametrize("interleaved", [True, False])
def test_multimodal_rope_with_equal_rows_is_plain_rope_bit_for_bit(interleaved: bool) -> None:
    shape = dataclasses.replace(SHAPE, head_dim=128)
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(5))
    rows = torch.arange(50)[None].expand(3, -1)
    cos, sin = reference.rope_table(shape, 50)
    expected = official_multimodal_rope(x, rows, [24, 20, 20], interleaved)
    assert torch.equal(reference.rotate(x, cos, sin), expected)
    different = torch.stack([rows[0], rows[0] + 1, rows[0]])
    assert not torch.equal(official_multimodal_rope(x, different, [24, 20, 20], interleaved), expected)


def open_tiny(folder: Path) -> tuple[Talker, TorchFrameStep]:
    talker = Checkpoint.open(folder).load_talker(torch.float32)
    return talker, TorchFrameStep(decode_weights(talker), talker.config.shape, rows=8, columns=8, positions=128)


@pytest.mark.parametrize("geometry", ["tiny", "tiny-projected"])
def test_training_forward_equals_prefill_and_steps(tiny: Callable[..., Path], geometry: str) -> None:
    talker, step = open_tiny(tiny("custom_voice", geometry))
    shape = talker.config.shape
    g = torch.Generator().manual_seed(0)
    prefix = torch.randn(21, shape.talker.hidden, generator=g) * 0.3
    text = torch.randn(12, shape.talker.hidden, generator=g) * 0.3
    pending = torch.randn(shape.talker.hidden, generator=g) * 0.3
    step.admit(3, pending, 7, Sampling(do_sample=False, predictor_do_sample=False))
    step.prefill(3, prefix[:16])
    step.prefill(3, prefix[16:])
    hidden: list[Tensor] = []
    inputs = [*prefix]
    talk = step._talker
    step._talker = lambda rows, live, x: hidden.append(talk(rows, live, x)) or hidden[-1]  # type: ignore[method-assign]
    codes = []
    for t in range(12):
        inputs.append(step.pending[3] + text[t])
        codes.append(step.step([3], text[t : t + 1])[0])
    embeds = torch.stack(inputs)
    with torch.no_grad():
        whole = talker(embeds[None])[0, 21:]
        stepped = torch.stack([h[0] for h in hidden])
        assert (whole - stepped).abs().max() < 1e-5
        assert not step.done[3]
        # The predictor, teacher-forced with the codes that were spoken, finds each of them the likeliest.
        spoken = torch.stack(codes)
        first = talker.model.codec_embedding(spoken[:, 0])
        logits = talker.code_predictor(whole, first, spoken[:, 1:])
    assert logits.shape == (12, shape.codebooks - 1, shape.codes)
    assert torch.equal(logits.argmax(-1), spoken[:, 1:])
    feedback = first + sum(
        table(spoken[:, i + 1]) for i, table in enumerate(talker.code_predictor.model.codec_embedding)
    )
    assert (feedback[-1] - step.pending[3]).abs().max() < 1e-5


def test_the_text_table_is_the_projection_of_every_row(tiny: Callable[..., Path]) -> None:
    talker = Checkpoint.open(tiny()).load_talker(torch.float32)
    table = talker.text_table(rows_at_once=100)
    ids = torch.tensor([0, 99, 100, 777, table.shape[0] - 1])
    assert (table[ids] - talker.text(ids)).abs().max() < 1e-5
