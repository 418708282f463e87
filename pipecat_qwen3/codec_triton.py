"""The calls of `codec_torch.py` as launches of Triton kernels, for a GPU: 82 a pass in the official geometry."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pipecat_qwen3 import codec_kernels
from pipecat_qwen3.codec_layers import rotary_rates
from pipecat_qwen3.codec_state import MAX_FRAMES, CodecState
from pipecat_qwen3.codec_stream import Depthwise, Product, Tail
from pipecat_qwen3.codec_torch import TorchPass
from pipecat_qwen3.config import CodecConfig

PROCESSORS = 132
"""Programs that a product should have: an H100's multiprocessors. The same on every GPU, so that its sums are."""

FEW_ROWS = 8
"""Up to so many rows a product is multiplied out in fp32, since tensor cores would work for 16 rows at least."""

KERNELS: Any = codec_kernels  # whose launches look like no Python call
_rates = lru_cache(rotary_rates)


class TritonPass(TorchPass):
    """One pass on a GPU (see TorchPass). It may be captured in a CUDA graph; the first one of a shape compiles."""

    max_frames = MAX_FRAMES
    exact = True
    """Make an fp32 product of three TF32 ones where tensor cores do it."""

    def __init__(self, config: CodecConfig, state: CodecState, rows: Tensor, frames: int) -> None:
        self._config, self._state, self._rows, self._frames = config, state, rows, frames
        self._old = state.tails.index_select(0, rows)
        self._first = torch.empty_like(rows)
        self._rates = _rates(config.head_dim, config.rope_theta, rows.device)
        self._tickets = torch.zeros(PROCESSORS, dtype=torch.int32, device=rows.device)

    def embed(self, codes: Tensor, tables: Tensor, first_entry: Tensor) -> Tensor:
        """As TorchPass.embed, and counts the frames."""
        voices, codebooks, frames = codes.shape
        width = tables.shape[1]
        x = tables.new_empty(voices, frames, width)
        KERNELS.embed[(voices * frames,)](
            codes.contiguous(), tables, first_entry, x, self._state.frames_done, self._first, self._rows,
            frames, codebooks, len(tables) // codebooks, width, BOOKS=_power(codebooks), BLOCK=_power(width),
        )  # fmt: skip
        return x

    def product(self, x: Tensor, p: Product, plus: Tensor | None = None) -> Tensor:
        """As TorchPass.product."""
        y = _room(x, p)
        self._launch(x, p, plus, *((y, None) if p.snake is None else (None, y)))
        return y

    def fork(self, x: Tensor, p: Product, plus: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As TorchPass.fork."""
        y, waved = _room(x, p), _room(x, p)
        self._launch(x, p, plus, y, waved)
        return y, waved

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """As TorchPass.attend; writes keys and values to the ring at once."""
        c, kv = self._config, self._state.kv
        y = qkv.new_empty(*qkv.shape[:2], c.heads * c.head_dim)
        KERNELS.attend[(len(qkv), c.kv_heads)](
            qkv, kv, y, self._rows, self._first, self._rates,
            self._frames, layer, c.layers, kv.shape[1], c.window, c.head_dim**-0.5,
            HEADS=c.kv_heads, GROUP=c.heads // c.kv_heads, HALF=c.head_dim // 2, SLOTS=_power(kv.shape[1]), num_warps=8,
        )  # fmt: skip
        return y

    def depthwise(self, x: Tensor, d: Depthwise) -> Tensor:
        """As TorchPass.depthwise."""
        voices, steps, width = x.shape
        y = torch.empty_like(x)
        KERNELS.depthwise[(voices * steps,)](
            x, d.weight, d.bias, y, *self._tails(d.tail), voices, steps, width, d.eps,
            KERNEL=len(d.weight), BLOCK=_power(width),
        )  # fmt: skip
        return y

    def finish(self) -> None:
        """Nothing is left to write."""

    def _launch(self, x: Tensor, p: Product, plus: Tensor | None, y: Tensor | None, waved: Tensor | None) -> None:
        voices, steps, inputs = x.shape
        outputs = _outputs(p)
        rows, columns, depth, shares = tile(p, voices * steps, inputs)
        partial = x.new_empty(shares, voices * steps, outputs) if shares > 1 else None
        KERNELS.product[(-(voices * steps // -rows), -(outputs // -columns), shares)](
            x, p.weight, p.bias, plus, y, waved, *(p.snake or (None, None)), *self._tails(p.tail), partial,
            self._tickets, voices, steps, inputs, outputs, outputs // p.rate, p.kernel, p.dilation, p.eps,
            THEN=p.then, ROWS=rows, COLUMNS=columns, DEPTH=depth, EVEN=inputs % depth == 0,
            DOT=voices * steps > FEW_ROWS, EXACT=self.exact,
        )  # fmt: skip

    def _tails(self, tail: Tail | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int]:
        """Old tails, new tails, their rows, the layer's offset, and the floats of a voice."""
        if tail is None:
            return None, None, None, 0, 0
        return self._old, self._state.tails, self._rows, tail.offset, self._old.shape[1]


class Tf32Pass(TritonPass):
    """A TritonPass whose products round their inputs to 11 bits where tensor cores do them."""

    exact = False


def tile(p: Product, rows: int, inputs: int) -> tuple[int, int, int, int]:
    """Rows, columns and inputs that a program of a product takes at a time, and the programs that share the inputs."""
    even, outputs = max(inputs & -inputs, 16), _outputs(p)
    if rows <= FEW_ROWS:
        columns = 8 if rows <= 4 and outputs >= 16 * PROCESSORS else 4
        return _power(rows), columns, min(512 if rows <= 2 else 256, even), 1
    height, width = 16 if rows <= 16 else 32, min(max(_power(outputs), 16), 64)
    depth = min(32 if p.then == "gate" else 64, even)  # two tiles of weights beside the inputs spill beyond that
    if p.eps is not None:
        return height, width, depth, 1
    programs = rows // -height * (outputs // -width)
    return height, width, depth, max(1, min(round(PROCESSORS / programs), p.kernel * inputs // (4 * depth)))


def _outputs(p: Product) -> int:
    return len(p.weight) // (2 if p.then == "gate" else 1)


def _room(x: Tensor, p: Product) -> Tensor:
    return x.new_empty(x.shape[0], p.rate * x.shape[1], _outputs(p) // p.rate)


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
