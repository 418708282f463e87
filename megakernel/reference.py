"""The arithmetic of a frame in plain torch, one function per phase: weights and activations in, activations out.

This is the oracle of every kernel and of the CPU's compiled frame, the fallback, and what training differentiates
through. It works in any float dtype; norm statistics, RoPE and softmax are computed in fp32 or better. Letters: see
megakernel/README.md.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megakernel.shape import StackShape

MATRICES = ("qkv", "o", "gate_up", "down")
"""Fields of LayerWeights that are matrices."""

PACKED_FOR = 8
"""Rows that oneDNN is told to expect; any number may come."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [N,T,heads,D], k [N,T,kv_heads,D], v) -> [N,T,heads*D]; appends k and v to whatever it keeps."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, projections stacked so that a phase is one matrix product.

    qkv [q_size + 2 kv_size, H], qk_norm [heads + kv_heads, D] (the two per-head norms, repeated),
    o [H, q_size], gate_up [2 I, H], down [H, I], input_norm and post_norm [H]
    """

    input_norm: Tensor
    qkv: Tensor
    qk_norm: Tensor
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class StackWeights:
    """A transformer stack: its layers and its final norm [H]."""

    layers: Sequence[LayerWeights]
    norm: Tensor


@dataclass(frozen=True)
class FrameWeights:
    """Everything a frame reads.

    codec_head  [V, H]        logits of code 0
    heads       [C-1, K, Hp]  logits of codes 1..C-1 (when packed, a list of C-1 matrices)
    embeddings  [C, K, H]     what code g adds to the talker's next input
    inputs      [C-1, K, Hp]  what the predictor is fed for code g: `embeddings`, projected where the checkpoint
                              projects (one table row is projected once, here, instead of at every frame: exact)
    projection  weight [Hp, H] and bias [Hp] for the talker's hidden state, or None where H = Hp
    """

    talker: StackWeights
    predictor: StackWeights
    codec_head: Tensor
    heads: Tensor | Sequence[Tensor]
    embeddings: Tensor
    inputs: Tensor
    projection: tuple[Tensor, Tensor] | None


def packed(weight: Tensor) -> Tensor:
    """A matrix [N, K] laid out as oneDNN multiplies it, for `linear` alone; the matrix itself where that cannot be.

    F.linear packs its weight anew at every call. Measured on one AVX-512 core with 2 to 8 rows: packed weights take
    0.4 to 0.6 of its time where they come from memory, 0.6 to 0.75 where they come from a cache, and from two rows on
    a row's bits do not depend on the row count (F.linear: from four on in fp32).
    """
    if weight.device.type != "cpu" or platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available():
        return weight
    known = weight.dtype == torch.float32
    known = known or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR) if known else weight


def pack(w: FrameWeights) -> FrameWeights:
    """The weights of a frame with every matrix packed: copies, for decoding only."""

    def stack(s: StackWeights) -> StackWeights:
        return StackWeights([replace(x, **{n: packed(getattr(x, n)) for n in MATRICES}) for x in s.layers], s.norm)

    return replace(
        w,
        talker=stack(w.talker),
        predictor=stack(w.predictor),
        codec_head=packed(w.codec_head),
        heads=[packed(head) for head in w.heads],
        projection=None if w.projection is None else (packed(w.projection[0]), w.projection[1]),
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times a matrix [N, K], packed or not, plus a bias [N] -> [..., N]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in fp32 or better.

    On a CPU, torch fuses the layer norm but not the RMS norm (six operations). The layer norm of (x, -x) is the RMS
    norm, since its mean is 0: a frame of the embedded voice takes 4 % (fp32) to 10 % (bf16) less time.
    """
    if torch.compiler.is_compiling():  # one fused loop; the detour by the layer norm compiles into slow ones
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), None, eps) * weight
    return F.layer_norm(torch.stack([x, -x], -2), (2, x.shape[-1]), None, None, eps)[..., 0, :] * weight


def rope_table(shape: StackShape, positions: int, device: torch.device | str | None = None) -> Tensor:
    """cos and signed sin of position * theta^(-2i/D), [2, positions, D] fp32, as `rotate` wants them.

    Both halves of D are written out; the sin of the first one is negated.

    The checkpoints' configs ask for interleaved multimodal RoPE over three position rows. In every speech mode the
    three rows are one row expanded (official get_rope_index: cumsum(mask) - 1, expanded to 3; in decoding: arange,
    likewise), and each frequency takes its angle from exactly one row: the result is plain 1-D RoPE, bit for bit.
    """
    d = shape.head_dim
    frequencies = 1.0 / (shape.rope_theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d))
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies[None]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of the last dimension (NeoX half split); cos and sin of rope_table, broadcast."""
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], -1) if torch.compiler.is_compiling() else x.roll(half, -1)
    return (x * cos + swapped * sin).to(x.dtype)


def qkv(x: Tensor, w: LayerWeights, shape: StackShape, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Phase qkv: norm, stacked projection, per-head norm of q and k, RoPE.

    x [N,T,H], cos and sin [T or N·T broadcastable, 1, D] -> q [N,T,heads,D], k and v [N,T,kv_heads,D]
    """
    n, t, _ = x.shape
    y = linear(rms_norm(x, w.input_norm, shape.norm_eps), w.qkv)
    y = y.view(n, t, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    qk, v = y[:, :, : shape.heads + shape.kv_heads], y[:, :, shape.heads + shape.kv_heads :]
    qk = rms_norm(qk, w.qk_norm, shape.norm_eps)
    qk = rotate(qk, cos, sin)
    return qk[:, :, : shape.heads], qk[:, :, shape.heads :], v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Phase attention: softmax(q k^T / sqrt(D)) v, the query heads of a group sharing one key head.

    q [N,T,heads,D], k and v [N,kv_heads,P,D], mask [T,P] True where a query may look (None: everywhere)
    -> [N,T,heads*D]
    """
    n, t, heads, d = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    rows = q.view(n, t, kv_heads, group, d).permute(0, 2, 3, 1, 4).reshape(n, kv_heads, group * t, d)
    spread = None if mask is None else mask.repeat(group, 1)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=spread)
    return out.view(n, kv_heads, group, t, d).permute(0, 3, 1, 2, 4).reshape(n, t, heads * d)


def swiglu(x: Tensor, w: LayerWeights, shape: StackShape) -> Tensor:
    """Phases gate-up and down: x + down(silu(gate) * up) of the normed x. x [N,T,H] -> [N,T,H]."""
    y = linear(rms_norm(x, w.post_norm, shape.norm_eps), w.gate_up)
    gate, up = y[..., : shape.intermediate], y[..., shape.intermediate :]
    return x + linear(F.silu(gate) * up, w.down)


def layer(x: Tensor, w: LayerWeights, shape: StackShape, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
    """One decoder layer: x [N,T,H] -> [N,T,H]; `attend` keeps the keys and values."""
    q, k, v = qkv(x, w, shape, cos, sin)
    x = x + linear(attend(q, k, v), w.o)
    return swiglu(x, w, shape)


def stack(
    x: Tensor, w: StackWeights, shape: StackShape, cos: Tensor, sin: Tensor, attend: Callable[[int], Attend]
) -> Tensor:
    """All layers and the final norm: x [N,T,H] -> [N,T,H]; `attend(i)` is layer i's."""
    for i, weights in enumerate(w.layers):
        x = layer(x, weights, shape, cos, sin, attend(i))
    return rms_norm(x, w.norm, shape.norm_eps)


def causal(x: Tensor, w: StackWeights, shape: StackShape, key_mask: Tensor | None = None) -> Tensor:
    """A whole sequence at once, from position 0, keeping nothing: for training and as an oracle.

    x [N,T,H], key_mask [N,T] True for real positions when sequences are padded on the right -> [N,T,H]
    """
    n, t, _ = x.shape
    cos, sin = rope_table(shape, t, x.device)[:, :, None, :]
    mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
    if key_mask is not None:
        mask = mask[None, None] & key_mask[:, None, None, :]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (y.transpose(1, 2).repeat_interleave(shape.group, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(n, t, shape.q_size)

    return stack(x, w, shape, cos, sin, lambda _: attend)
