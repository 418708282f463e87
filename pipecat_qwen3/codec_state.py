"""A CodecConfig goes in, what the codec remembers of each voice comes out: rows of arrays, changed in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipecat_qwen3.codec_layers import DILATIONS
from pipecat_qwen3.codec_stream import Tail
from pipecat_qwen3.config import CodecConfig

MAX_FRAMES = 8
"""Frames of one pass of the kernels, which put them all into the ring before they read it."""


def tail_layout(config: CodecConfig) -> dict[str, Tail]:
    """Official name of each convolution with a memory -> the place of its last inputs in CodecState.tails."""
    sizes = {"pre_conv": (2, config.codebook_dim)}
    for i in range(len(config.upsampling_ratios)):
        sizes[f"upsample.{i}.1.dwconv"] = (6, config.latent)
    sizes["decoder.0"] = (6, config.latent)
    blocks = len(config.upsample_rates)
    for i in range(blocks):
        width = config.decoder_dim >> i
        sizes[f"decoder.{i + 1}.block.1"] = (1, width)
        for j, dilation in enumerate(DILATIONS, start=2):
            sizes[f"decoder.{i + 1}.block.{j}.conv1"] = (6 * dilation, width // 2)
    sizes[f"decoder.{blocks + 2}"] = (6, config.decoder_dim >> blocks)
    layout: dict[str, Tail] = {}
    offset = 0
    for name, (steps, channels) in sizes.items():
        layout[name] = Tail(offset, steps, channels)
        offset += steps * channels
    return layout


@dataclass
class CodecState:
    """What the codec remembers of each voice: 5.7 MB a row in the official geometry, 0.1 MB in the embedded one.

    tails        [S, F] fp32          last inputs of every convolution, side by side as tail_layout says
    kv           [S, R, L, 2, Hkv, D] rotated keys, and values, of the last R frames; frame p is at p mod R
    frames_done  [S] int64            frames decoded so far

    R = window - 1 + MAX_FRAMES, so that the frames of a pass displace none that they see.
    """

    tails: Tensor
    kv: Tensor
    frames_done: Tensor

    @classmethod
    def zeros(
        cls,
        config: CodecConfig,
        rows: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> CodecState:
        """`rows` voices that have not begun: the official decoder starts from zeros as well."""
        width = sum(tail.steps * tail.channels for tail in tail_layout(config).values())
        ring = (config.window - 1 + MAX_FRAMES, config.layers, 2, config.kv_heads, config.head_dim)
        return cls(
            tails=torch.zeros(rows, width, device=device, dtype=dtype),
            kv=torch.zeros(rows, *ring, device=device, dtype=dtype),
            frames_done=torch.zeros(rows, device=device, dtype=torch.int64),
        )

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything there is, each with a leading row index."""
        return self.tails, self.kv, self.frames_done

    @property
    def row_bytes(self) -> int:
        """Bytes of one voice."""
        return sum(array[0].numel() * array.element_size() for array in self.arrays)

    def reset(self, row: int) -> None:
        """Forget one voice."""
        for array in self.arrays:
            array[row].zero_()

    def copy_row(self, src: int, dst: int, source: CodecState | None = None) -> None:
        """Make row `dst` a copy of row `src` of this state, or of `source`, which may keep primed voices."""
        for mine, theirs in zip(self.arrays, (source or self).arrays, strict=True):
            mine[dst].copy_(theirs[src])
