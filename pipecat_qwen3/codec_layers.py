"""The codec decoder's layers as plain torch modules with the official parameter names; whole sequences in, whole out.

Trainable and slow: `codec.py` makes the streaming form from them. Every layer is causal without look-ahead. Kernel
sizes, dilations and epsilons below are constants of the official decoder, which no checkpoint's config states.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipecat_qwen3.config import CodecConfig

DILATIONS = (1, 3, 9)
"""Of the three residual units of every decoder block."""


class CausalConv(nn.Module):
    """Convolution of [N, C, L] with zeros on the left alone: output l sees inputs up to l."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, groups=groups)
        self.past = (kernel - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, L] -> [N, C', L]."""
        return self.conv(F.pad(x, (self.past, 0)))


class CausalUpsample(nn.Module):
    """Transposed convolution [N, C, L] -> [N, C', rate * L]; what it would add behind the last input is cut off."""

    def __init__(self, inputs: int, outputs: int, kernel: int, rate: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(inputs, outputs, kernel, stride=rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, L] -> [N, C', rate * L]."""
        return self.conv(x)[..., : x.shape[-1] * self.rate]


class SnakeBeta(nn.Module):
    """x + sin(x * exp(alpha))^2 / (exp(beta) + 1e-9) in each channel (arXiv:2006.08195 with a magnitude)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Frequency and magnitude, [channels] each."""
        return self.alpha.exp(), 1.0 / (self.beta.exp() + 1e-9)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, L] -> [N, C, L]."""
        frequency, magnitude = self.factors()
        return x + magnitude[:, None] * torch.sin(x * frequency[:, None]).square()


class Codebook(nn.Module):
    """Running sums of the vectors that chose an entry, and how many did; buffers, since no gradient makes them."""

    embedding_sum: Tensor
    cluster_usage: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("embedding_sum", torch.randn(size, dim))

    def entries(self) -> Tensor:
        """[size, dim]: the mean of each entry's vectors; a usage below 1e-5 counts as 1e-5."""
        return self.embedding_sum / self.cluster_usage.clamp(min=1e-5)[:, None]


class _QuantizerLayer(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self._codebook = Codebook(size, dim)


class _QuantizerLayers(nn.Module):
    def __init__(self, count: int, size: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_QuantizerLayer(size, dim) for _ in range(count))


class ResidualQuantizer(nn.Module):
    """`count` codebooks behind one pair of projections. `input_proj` serves the encoder and is only carried here."""

    def __init__(self, count: int, size: int, width: int) -> None:
        super().__init__()
        dim = width // 2
        self.input_proj = nn.Conv1d(width, dim, 1, bias=False)
        self.output_proj = nn.Conv1d(dim, width, 1, bias=False)
        self.vq = _QuantizerLayers(count, size, dim)

    def tables(self) -> Tensor:
        """[count, size, width]: every entry, already projected."""
        entries = torch.stack([layer._codebook.entries() for layer in self.vq.layers])  # type: ignore[union-attr]
        return entries @ self.output_proj.weight[:, :, 0].T


class SplitQuantizer(nn.Module):
    """The first codebook (semantic) and the others (acoustic), each with projections of its own."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        size, width = config.codebook_size, config.codebook_dim
        self.rvq_first = ResidualQuantizer(1, size, width)
        self.rvq_rest = ResidualQuantizer(config.codebooks - 1, size, width)

    def tables(self) -> Tensor:
        """[codebooks, codebook_size, codebook_dim]: a frame's latent is the sum of one row of each."""
        return torch.cat((self.rvq_first.tables(), self.rvq_rest.tables()))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes [N, C, T] int -> latents [N, codebook_dim, T]."""
        tables = self.tables()
        return torch.stack([F.embedding(codes[:, c], tables[c]) for c in range(len(tables))]).sum(0).transpose(1, 2)


class LayerScale(nn.Module):
    """One factor a channel on a residual branch, small at the start of training (arXiv:2103.17239)."""

    def __init__(self, channels: int, initial: float = 0.01) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """[..., channels] -> [..., channels]."""
        return self.scale * x


def rotary_rates(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angle [head_dim / 2] fp32 of one position in each pair of dimensions."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., 1, head_dim] fp32 of positions [...], to be used beside [..., heads, head_dim]."""
    angles = positions[..., None, None].float() * rotary_rates(head_dim, theta, positions.device)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [N, T, heads, head_dim] by its positions; dimension i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    """Causal attention over the last `window` positions, this one among them; no biases, no norms on q and k."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[N, T, hidden], cos and sin [T, 1, head_dim], mask [T, T] True where seen -> [N, T, hidden]."""
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)), cos, sin)
        k = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        return self.o_proj(attend(q, k, v, mask))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [N, T, heads, D] on k and v [N, P, kv_heads, D]; mask broadcasts to [N, 1, T, P]. Returns [N, T, heads * D]."""
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, each branch behind a LayerScale."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config.hidden, config.intermediate)
        self.input_layernorm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.self_attn_layer_scale = LayerScale(config.hidden)
        self.mlp_layer_scale = LayerScale(config.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """As Attention.forward."""
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), cos, sin, mask))
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    """Sliding-window transformer over frames, between two projections."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.input_proj = nn.Linear(config.latent, config.hidden)
        self.output_proj = nn.Linear(config.hidden, config.latent)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, latent] -> [N, T, latent]; positions count from 0."""
        positions = torch.arange(x.shape[1], device=x.device)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        behind = positions[:, None] - positions
        mask = (behind >= 0) & (behind < self.config.window)
        x = self.input_proj(x)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.output_proj(self.norm(x))


class ConvNeXt(nn.Module):
    """Depthwise convolution, norm, and a pointwise GELU network, scaled and added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = CausalConv(channels, channels, 7, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, L] -> [N, C, L]."""
        y = self.norm(self.dwconv(x).transpose(1, 2))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).transpose(1, 2)


class ResidualUnit(nn.Module):
    """Snake, dilated convolution, snake, pointwise convolution, added to the input."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1 = SnakeBeta(channels)
        self.conv1 = CausalConv(channels, channels, 7, dilation)
        self.act2 = SnakeBeta(channels)
        self.conv2 = CausalConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, L] -> [N, C, L]."""
        return x + self.conv2(self.act2(self.conv1(self.act1(x))))


class DecoderBlock(nn.Module):
    """Snake, upsampling by `rate` to half the channels, three residual units."""

    def __init__(self, channels: int, rate: int) -> None:
        super().__init__()
        half = channels // 2
        units = [ResidualUnit(half, dilation) for dilation in DILATIONS]
        self.block = nn.ModuleList([SnakeBeta(channels), CausalUpsample(channels, half, 2 * rate, rate), *units])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, L] -> [N, C / 2, rate * L]."""
        for layer in self.block:
            x = layer(x)
        return x
