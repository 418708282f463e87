"""The codec's layers go in as trained, and come out in the form that streams: matrix products over steps.

Activations lie channels-last [N, L, C], so that a layer is one product over the rows of its input, and upsampling is a
reshape. Norm weights and layer scales are multiplied into their neighbours, and a snake belongs to the product before
it, so that a pass has little to do beside its products. Who computes them is `codec_torch.py` or `codec_kernels.py`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipecat_qwen3.codec_layers import (
    CausalConv,
    CausalUpsample,
    ConvNeXt,
    DecoderBlock,
    ResidualUnit,
    SnakeBeta,
    TransformerLayer,
)


class Tail(NamedTuple):
    """Where a layer's last inputs lie in a voice's flat tails: `steps` times `channels` floats from `offset` on."""

    offset: int
    steps: int
    channels: int


class Snake(NamedTuple):
    """x + (size * sin(frequency * x))^2 in each of C' channels."""

    frequency: Tensor
    size: Tensor


@dataclass(frozen=True)
class Product:
    """y = then(norm(x) W + bias) + plus, and snake(y), at every step of x [N, L, C].

    weight    [outputs, kernel * C], oldest step first; with "gate": the gates' rows, then as many of the values
    kernel    inputs that one output sees, `dilation` steps apart
    rate      steps of y for each of x; outputs are rate * C', one step after the other
    tail      where the inputs before x are kept; None where kernel is 1
    eps       of an RMS norm of x without weights, None for no norm
    """

    weight: Tensor
    bias: Tensor | None = None
    kernel: int = 1
    dilation: int = 1
    rate: int = 1
    tail: Tail | None = None
    eps: float | None = None
    then: Literal["", "gelu", "gate", "clamp"] = ""
    snake: Snake | None = None


class Depthwise(NamedTuple):
    """Causal depthwise convolution of [N, L, C], then a layer norm without weights; weight [kernel, C], bias [C]."""

    weight: Tensor
    bias: Tensor
    tail: Tail
    eps: float


class TransformerStream(NamedTuple):
    """TransformerLayer: attention goes between the first two products, each pair is added to its input."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product


class UpsampleStream(NamedTuple):
    """CausalUpsample and ConvNeXt: `narrow` of `wide` of `depthwise` is added to what `up` makes."""

    up: Product
    depthwise: Depthwise
    wide: Product
    narrow: Product


class BlockStream(NamedTuple):
    """DecoderBlock without its first snake, but with the one behind it: an upsampling, and a pair for each unit."""

    up: Product
    units: list[tuple[Product, Product]]


def linear(layer: nn.Module, norm: nn.Module | None = None) -> Product:
    """nn.Linear behind nn.RMSNorm, or behind nothing."""
    assert isinstance(layer, nn.Linear)
    if norm is None:
        return Product(layer.weight, layer.bias)
    assert isinstance(norm, nn.RMSNorm)
    return Product(layer.weight * norm.weight, layer.bias, eps=norm.eps)


def conv(
    layer: nn.Module, tail: Tail | None = None, snake: nn.Module | None = None, then: Literal["", "clamp"] = ""
) -> Product:
    """CausalConv, or CausalUpsample as a causal convolution with `rate` times the channels; and the snake behind it.

    Upsampling: out[t * rate + j] = sum_m W[:, :, m * rate + j]^T x[t - m] + b, so all j are one product over x[t - m],
    and what must be remembered is inputs: fewer floats than the overlap of outputs, and free of the bias.
    """
    assert isinstance(layer, CausalConv | CausalUpsample)
    assert layer.conv.bias is not None
    weight, bias, rate = layer.conv.weight, layer.conv.bias, 1
    if isinstance(layer, CausalUpsample):
        rate = layer.rate
        by_step = weight.unflatten(2, (-1, rate)).flip(2)  # [C, C', kernel, rate], oldest step first
        weight, bias = by_step.permute(3, 1, 0, 2).flatten(0, 1), bias.repeat(rate)
    factors = None
    if snake is not None:
        assert isinstance(snake, SnakeBeta)
        frequency, magnitude = snake.factors()
        factors = Snake(frequency, magnitude.sqrt())
    kernel = weight.shape[2]
    weight = weight.permute(0, 2, 1).flatten(1)
    return Product(weight, bias, kernel, layer.conv.dilation[0], rate, tail, then=then, snake=factors)


def transformer(layer: nn.Module, eps: float) -> TransformerStream:
    """Norm weights go into the products behind them, layer scales into those before them."""
    assert isinstance(layer, TransformerLayer)
    attention, mlp = layer.self_attn, layer.mlp
    qkv = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
    gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    out = attention.o_proj.weight * layer.self_attn_layer_scale.scale[:, None]
    down = mlp.down_proj.weight * layer.mlp_layer_scale.scale[:, None]
    return TransformerStream(
        Product(qkv * layer.input_layernorm.weight, eps=eps),
        Product(out),
        Product(gate_up * layer.post_attention_layernorm.weight, eps=eps, then="gate"),
        Product(down),
    )


def upsample(up: nn.Module, block: nn.Module, tail: Tail) -> UpsampleStream:
    """The norm's weights go into the first product behind it, gamma into the second."""
    assert isinstance(block, ConvNeXt)
    wide, narrow, norm = block.pwconv1, block.pwconv2, block.norm
    convolution = conv(block.dwconv)
    assert convolution.bias is not None
    return UpsampleStream(
        conv(up),
        Depthwise(convolution.weight.T.contiguous(), convolution.bias, tail, norm.eps),
        Product(wide.weight * norm.weight, wide.weight @ norm.bias + wide.bias, then="gelu"),
        Product(narrow.weight * block.gamma[:, None], narrow.bias * block.gamma),
    )


def block(layer: nn.Module, name: str, layout: dict[str, Tail], behind: nn.Module) -> BlockStream:
    """DecoderBlock `name` with the snake `behind` it: the next block's first layer, or the decoder's last snake."""
    assert isinstance(layer, DecoderBlock)
    _, up, *units = layer.block
    assert all(isinstance(unit, ResidualUnit) for unit in units)
    snakes = [*(unit.act1 for unit in units), behind]
    pairs = [
        (conv(unit.conv1, layout[f"{name}.block.{i}.conv1"], unit.act2), conv(unit.conv2, snake=snakes[i - 1]))  # type: ignore[arg-type]
        for i, unit in enumerate(units, start=2)
    ]
    return BlockStream(conv(up, layout[f"{name}.block.1"], snakes[0]), pairs)  # type: ignore[arg-type]
