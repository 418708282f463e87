"""One pass of N voices and T frames through the codec's products in plain torch: what a CPU runs, and any device can.

`codec_kernels.py` has the same calls as Triton kernels; this is what they are compared with.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipecat_qwen3.codec_layers import attend, rotary, rotate
from pipecat_qwen3.codec_state import CodecState
from pipecat_qwen3.codec_stream import Depthwise, Product, Snake, Tail
from pipecat_qwen3.config import CodecConfig

UNFOLD_FLOATS = 1 << 18
"""Largest unfolded input of a convolution that becomes one matrix product: 1 MB.

Measured on one AVX-512 thread: below it a product takes 0.3-1 times the time of a convolution (which is slow when
short and dilated), above it the copy leaves the cache and the product takes up to 2.5 times as long.
"""


class TorchPass:
    """Holds what N voices remember, while their layers run in order; `finish` writes it back to their rows."""

    max_frames: int | None = None
    """Frames that one pass takes; None: any number."""

    def __init__(self, config: CodecConfig, state: CodecState, rows: Tensor, frames: int) -> None:
        self._config, self._state, self._rows = config, state, rows
        self._tails = state.tails.index_select(0, rows)
        self._past, self._fresh = state.kv.index_select(0, rows), []
        ring, first = state.kv.shape[1], state.frames_done.index_select(0, rows)[:, None]
        self._now = first + torch.arange(frames, device=rows.device)  # [N, T]
        then = first - 1 - (first - 1 - torch.arange(ring, device=rows.device)) % ring  # newest frame of each slot
        seen = torch.cat((then, self._now), 1)[:, None]
        behind = self._now[:, :, None] - seen
        self._mask = ((seen >= 0) & (behind >= 0) & (behind < config.window))[:, None]  # [N, 1, T, R + T]
        self._turn = rotary(self._now, config.head_dim, config.rope_theta)

    def embed(self, codes: Tensor, tables: Tensor, first_entry: Tensor) -> Tensor:
        """Codes [N, C, T] int -> [N, T, dim]: the sum of a row of each table; on a GPU, codes out of range are clamped.

        tables       [C * size, dim], one after the other; first_entry [C]: where each begins
        """
        if codes.device.type != "cpu":  # where nobody has looked at them
            codes = codes.clamp(0, len(tables) // len(first_entry) - 1)
        return F.embedding(codes.transpose(1, 2) + first_entry, tables).sum(2)

    def product(self, x: Tensor, p: Product, plus: Tensor | None = None) -> Tensor:
        """x [N, L, C] -> snake(y), or y where `p` has no snake, [N, rate * L, C'] (see Product); plus has y's shape."""
        y = self._apply(x, p, plus)
        return y if p.snake is None else _snaked(y, p.snake)

    def fork(self, x: Tensor, p: Product, plus: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As product; returns y and snake(y)."""
        assert p.snake is not None
        y = self._apply(x, p, plus)
        return y, _snaked(y, p.snake)

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """Queries, keys and values [N, T, (H + 2 Hkv) * D] of one layer -> [N, T, H * D]; layers come in order."""
        c, turned_heads = self._config, self._config.heads + self._config.kv_heads
        heads = qkv.unflatten(-1, (-1, c.head_dim))
        turned = rotate(heads[:, :, :turned_heads], *self._turn)
        self._fresh.append(torch.stack((turned[:, :, c.heads :], heads[:, :, turned_heads:]), 2))
        keys, values = torch.cat((self._past[:, :, layer], self._fresh[layer]), 1).unbind(2)
        return attend(turned[:, :, : c.heads], keys, values, self._mask)

    def depthwise(self, x: Tensor, d: Depthwise) -> Tensor:
        """x [N, L, C] -> [N, L, C] (see Depthwise)."""
        y = (_windows(self._before(d.tail, x), len(d.weight), 1) * d.weight).sum(2).add_(d.bias)
        return F.layer_norm(y, y.shape[-1:], eps=d.eps)

    def finish(self) -> None:
        """Write what the voices now remember to their rows of the state."""
        state, ring = self._state, self._state.kv.shape[1]
        newest = self._now[:, -ring:]
        state.kv[self._rows[:, None], newest % ring] = torch.stack(self._fresh, 2)[:, -ring:]
        state.tails.index_copy_(0, self._rows, self._tails)
        state.frames_done.index_copy_(0, self._rows, self._now[:, -1] + 1)

    def _apply(self, x: Tensor, p: Product, plus: Tensor | None) -> Tensor:
        if p.eps is not None:
            x = F.rms_norm(x, x.shape[-1:], eps=p.eps)
        y = self._map(x if p.tail is None else self._before(p.tail, x), p)
        if p.rate > 1:
            y = y.reshape(y.shape[0], p.rate * y.shape[1], -1)
        if p.then == "gelu":
            y = F.gelu(y)
        elif p.then == "gate":
            gate, value = y.chunk(2, -1)
            y = F.silu(gate) * value
        elif p.then == "clamp":
            y = y.clamp(-1.0, 1.0)
        return y if plus is None else y.add_(plus)

    def _map(self, x: Tensor, p: Product) -> Tensor:
        """[N, (kernel - 1) * dilation + L, C] -> [N, L, outputs]."""
        if p.kernel == 1:
            return F.linear(x, p.weight, p.bias)
        if x.numel() * p.kernel <= UNFOLD_FLOATS:
            return F.linear(_windows(x, p.kernel, p.dilation).flatten(2), p.weight, p.bias)
        # as an image of height 1, which lies channels-last in memory as x does
        image, weight = x.transpose(1, 2).unsqueeze(2), p.weight.unflatten(1, (1, p.kernel, -1)).permute(0, 3, 1, 2)
        return F.conv2d(image, weight, p.bias, dilation=(1, p.dilation)).squeeze(2).transpose(1, 2)

    def _before(self, place: Tail, x: Tensor) -> Tensor:
        """Join a tail and x [N, L, C] to [N, steps + L, C]; the last steps of that are the next tail."""
        tail = self._tails.narrow(1, place.offset, place.steps * place.channels).view(-1, place.steps, place.channels)
        joined = torch.cat((tail, x), 1)
        tail.copy_(joined[:, -place.steps :])
        return joined


def _snaked(x: Tensor, snake: Snake) -> Tensor:
    wave = (x * snake.frequency).sin_().mul_(snake.size)
    return torch.addcmul(x, wave, wave, out=wave)


def _windows(x: Tensor, kernel: int, dilation: int) -> Tensor:
    """View x [N, (kernel - 1) * dilation + L, C] as [N, L, kernel, C], oldest step first."""
    n, length, channels = x.shape
    steps = length - (kernel - 1) * dilation
    strides = (length * channels, channels, dilation * channels, 1)
    return x.contiguous().as_strided((n, steps, kernel, channels), strides)
