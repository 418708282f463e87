"""The codec's layers in the form that streams: new steps [N, L, C] and what the voices remember go in, new steps out.

Each class is made from the layer of `codec_layers` that its docstring names, with fp32 weights repacked once.
Activations lie channels-last, so that every layer is one matrix product on rows and upsampling is a reshape. Norm
weights and layer scales are multiplied into their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipecat_qwen3.codec_layers import (
    CausalConv,
    CausalUpsample,
    ConvNeXt,
    DecoderBlock,
    ResidualUnit,
    SnakeBeta,
    Transformer,
    TransformerLayer,
    attend,
    rotary,
    rotate,
)

UNFOLD_FLOATS = 1 << 18
"""Largest unfolded input of a convolution that becomes one matrix product: 1 MB.

Measured on one AVX-512 thread: below it a product takes 0.3-1 times the time of a convolution (which is slow when
short and dilated), above it the copy leaves the cache and the product takes up to 2.5 times as long.
"""


@dataclass(frozen=True)
class Tail:
    """Where a layer's last inputs lie in a voice's flat tails: `steps` times `channels` floats from `offset` on."""

    offset: int
    steps: int
    channels: int


class Tails:
    """The tails `flat` [N, F] of one call's voices, by the layer's official name."""

    def __init__(self, flat: Tensor, layout: dict[str, Tail]) -> None:
        self.flat, self.layout = flat, layout

    def before(self, name: str, x: Tensor) -> Tensor:
        """Join layer `name`'s tail and x [N, L, C] to [N, steps + L, C]; the last steps of that are the next tail."""
        place = self.layout[name]
        size = place.steps * place.channels
        tail = self.flat[:, place.offset : place.offset + size].view(-1, place.steps, place.channels)
        joined = torch.cat((tail, x), 1)
        tail.copy_(joined[:, -place.steps :])
        return joined


def _windows(x: Tensor, kernel: int, dilation: int) -> Tensor:
    """View x [N, (kernel - 1) * dilation + L, C] as [N, L, kernel, C], oldest step first."""
    n, length, channels = x.shape
    steps = length - (kernel - 1) * dilation
    strides = (length * channels, channels, dilation * channels, 1)
    return x.contiguous().as_strided((n, steps, kernel, channels), strides)


class Conv:
    """CausalConv, or CausalUpsample as a causal convolution with `rate` times the channels.

    Upsampling: out[t * rate + j] = sum_m W[:, :, m * rate + j]^T x[t - m] + b, so all j are one product over x[t - m],
    and what must be remembered is inputs: fewer floats than the overlap of outputs, and free of the bias.
    """

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, CausalConv | CausalUpsample)
        assert layer.conv.bias is not None
        weight, bias = layer.conv.weight, layer.conv.bias
        self.dilation, self.rate = layer.conv.dilation[0], 1
        if isinstance(layer, CausalUpsample):
            self.rate = layer.rate
            by_step = weight.unflatten(2, (-1, self.rate)).flip(2)  # [C, C', kernel, rate], oldest step first
            weight, bias = by_step.permute(3, 1, 0, 2).flatten(0, 1), bias.repeat(self.rate)
        self.weight, self.bias = weight.permute(0, 2, 1).contiguous(), bias
        """[rate * C', kernel, C] and [rate * C']."""

    def __call__(self, x: Tensor) -> Tensor:
        """[N, (kernel - 1) * dilation + L, C] -> [N, rate * L, C']."""
        outputs, kernel, _ = self.weight.shape
        if kernel == 1:
            y = F.linear(x, self.weight[:, 0], self.bias)
        elif x.numel() * kernel <= UNFOLD_FLOATS:
            y = F.linear(_windows(x, kernel, self.dilation).flatten(2), self.weight.flatten(1), self.bias)
        else:  # as an image of height 1, which lies channels-last in memory as x does
            image, weight = x.transpose(1, 2).unsqueeze(2), self.weight.permute(0, 2, 1).unsqueeze(2)
            y = F.conv2d(image, weight, self.bias, dilation=(1, self.dilation)).squeeze(2).transpose(1, 2)
        return y.reshape(y.shape[0], -1, outputs // self.rate)


class Snake:
    """SnakeBeta with its exponentials taken."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, SnakeBeta)
        self.frequency, self.magnitude = layer.factors()

    def __call__(self, x: Tensor) -> Tensor:
        """[N, L, C] -> [N, L, C]."""
        wave = (x * self.frequency).sin_()
        return torch.addcmul(x, wave, wave * self.magnitude)


class Unit:
    """ResidualUnit."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        assert isinstance(layer, ResidualUnit)
        self.name = f"{name}.conv1"
        self.act1, self.conv1 = Snake(layer.act1), Conv(layer.conv1)
        self.act2, self.conv2 = Snake(layer.act2), Conv(layer.conv2)

    def __call__(self, x: Tensor, tails: Tails) -> Tensor:
        """[N, L, C] -> [N, L, C]."""
        y = self.conv1(tails.before(self.name, self.act1(x)))
        return self.conv2(self.act2(y)).add_(x)


class Block:
    """DecoderBlock."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        assert isinstance(layer, DecoderBlock)
        snake, upsample, *units = layer.block
        self.name = f"{name}.block.1"
        self.snake, self.upsample = Snake(snake), Conv(upsample)
        self.units = [Unit(unit, f"{name}.block.{i}") for i, unit in enumerate(units, start=2)]

    def __call__(self, x: Tensor, tails: Tails) -> Tensor:
        """[N, L, C] -> [N, rate * L, C / 2]."""
        x = self.upsample(tails.before(self.name, self.snake(x)))
        for unit in self.units:
            x = unit(x, tails)
        return x


class ConvNeXtStream:
    """ConvNeXt: the norm's weights go into the first product, gamma into the second."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        assert isinstance(layer, ConvNeXt)
        assert layer.dwconv.conv.bias is not None
        self.name, self.eps = f"{name}.dwconv", layer.norm.eps
        self.depthwise, self.bias = layer.dwconv.conv.weight[:, 0].T.contiguous(), layer.dwconv.conv.bias
        wide, narrow, norm = layer.pwconv1, layer.pwconv2, layer.norm
        self.wide, self.wide_bias = wide.weight * norm.weight, wide.weight @ norm.bias + wide.bias
        self.narrow, self.narrow_bias = narrow.weight * layer.gamma[:, None], narrow.bias * layer.gamma

    def __call__(self, x: Tensor, tails: Tails) -> Tensor:
        """[N, L, C] -> [N, L, C]."""
        windows = _windows(tails.before(self.name, x), len(self.depthwise), 1)
        y = (windows * self.depthwise).sum(2).add_(self.bias)
        y = F.layer_norm(y, y.shape[-1:], eps=self.eps)
        y = F.gelu(F.linear(y, self.wide, self.wide_bias))
        return F.linear(y, self.narrow, self.narrow_bias).add_(x)


class LayerStream:
    """TransformerLayer: norm weights go into the products behind them, layer scales into those before them."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, TransformerLayer)
        attention, mlp = layer.self_attn, layer.mlp
        qkv = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        self.qkv = qkv * layer.input_layernorm.weight
        self.out = attention.o_proj.weight * layer.self_attn_layer_scale.scale[:, None]
        self.gate_up = gate_up * layer.post_attention_layernorm.weight
        self.down = mlp.down_proj.weight * layer.mlp_layer_scale.scale[:, None]


class TransformerStream:
    """Transformer over a ring of the past frames' keys and values."""

    def __init__(self, module: Transformer) -> None:
        self.config = module.config
        self.layers = [LayerStream(layer) for layer in module.layers]
        self.entry, self.entry_bias = module.input_proj.weight, module.input_proj.bias
        self.exit, self.exit_bias = module.output_proj.weight * module.norm.weight, module.output_proj.bias

    def __call__(self, x: Tensor, kv: Tensor, rows: Tensor, done: Tensor) -> Tensor:
        """Frames x [N, T, latent] from number done [N] on -> [N, T, latent]; puts their keys and values into kv.

        kv [S, R, L, 2, Hkv, D] holds frame p of a row at p mod R; what no done frame has written is not read.
        """
        config, ring = self.config, kv.shape[1]
        q_heads, turned_heads = config.heads, config.heads + config.kv_heads
        now = done[:, None] + torch.arange(x.shape[1], device=x.device)  # [N, T]
        mask = self._mask(now, ring)
        cos, sin = rotary(now, config.head_dim, config.rope_theta)
        past, fresh = kv.index_select(0, rows), []
        x = F.linear(x, self.entry, self.entry_bias)
        for i, layer in enumerate(self.layers):
            qkv = F.linear(self._norm(x), layer.qkv).unflatten(-1, (-1, config.head_dim))
            turned = rotate(qkv[:, :, :turned_heads], cos, sin)
            fresh.append(torch.stack((turned[:, :, q_heads:], qkv[:, :, turned_heads:]), 2))
            keys, values = torch.cat((past[:, :, i], fresh[i]), 1).unbind(2)
            x = x + F.linear(attend(turned[:, :, :q_heads], keys, values, mask), layer.out)
            gate, up = F.linear(self._norm(x), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        kv[rows[:, None], now[:, -ring:] % ring] = torch.stack(fresh, 2)[:, -ring:]
        return F.linear(self._norm(x), self.exit, self.exit_bias)

    def _mask(self, now: Tensor, ring: int) -> Tensor:
        """[N, 1, T, R + T], True where frame now [N, T] sees what a ring slot holds, or a frame of this call."""
        last = now[:, :1] - 1
        then = last - (last - torch.arange(ring, device=now.device)) % ring  # newest frame of each slot; < 0: none yet
        seen = torch.cat((then, now), 1)[:, None]
        behind = now[:, :, None] - seen
        return ((seen >= 0) & (behind >= 0) & (behind < self.config.window))[:, None]

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.config.norm_eps)
