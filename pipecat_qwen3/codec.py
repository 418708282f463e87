"""Codes and a CodecState go in, samples and the next state come out: whole or by any chunk size, the same samples.

CodecDecoder holds the weights under their official names (training, whole decode); `fold()` makes the FoldedCodec that
streams. Neither remembers anything of a voice. All arithmetic is fp32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipecat_qwen3.codec_layers import (
    DILATIONS,
    CausalConv,
    CausalUpsample,
    ConvNeXt,
    DecoderBlock,
    SnakeBeta,
    SplitQuantizer,
    Transformer,
)
from pipecat_qwen3.codec_stream import Block, Conv, ConvNeXtStream, Snake, Tail, Tails, TransformerStream
from pipecat_qwen3.config import CodecConfig
from pipecat_qwen3.errors import BadRequestError


class CodecDecoder(nn.Module):
    """The decoder's weights: its state_dict has the official `decoder.*` keys without that prefix."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        width, rates = config.decoder_dim, config.upsample_rates
        self.quantizer = SplitQuantizer(config)
        self.pre_conv = CausalConv(config.codebook_dim, config.latent, 3)
        self.pre_transformer = Transformer(config)
        self.upsample = nn.ModuleList(
            nn.Sequential(CausalUpsample(config.latent, config.latent, ratio, ratio), ConvNeXt(config.latent))
            for ratio in config.upsampling_ratios
        )
        blocks = [DecoderBlock(width >> i, rate) for i, rate in enumerate(rates)]
        last = width >> len(rates)
        self.decoder = nn.ModuleList(
            [CausalConv(config.latent, width, 7), *blocks, SnakeBeta(last), CausalConv(last, 1, 7)]
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Decode codes [N, C, T] int64 from the beginning to samples [N, frame_samples * T] in [-1, 1]; differentiable.

        Raises BadRequestError.
        """
        check_codes(codes, self.config)
        return self.forward_latents(self.quantizer(codes))

    def forward_latents(self, latents: Tensor) -> Tensor:
        """As forward, from the quantizer's output [N, codebook_dim, T] on: for training with continuous latents."""
        x = self.pre_transformer(self.pre_conv(latents).transpose(1, 2)).transpose(1, 2)
        for layer in (*self.upsample, *self.decoder):
            x = layer(x)
        return x[:, 0].clamp(-1.0, 1.0)

    @torch.no_grad()
    def fold(self) -> FoldedCodec:
        """The streaming form of these weights, in fp32. A copy: later changes of the module do not reach it."""
        return FoldedCodec(copy.deepcopy(self).float())


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
    """What the codec remembers of each voice: 5.2 MB a row in the official geometry, 0.1 MB in the embedded one.

    tails        [S, F] fp32          last inputs of every convolution, side by side as tail_layout says
    kv           [S, R, L, 2, Hkv, D] rotated keys, and values, of the last R = window - 1 frames; frame p is at p mod R
    frames_done  [S] int64            frames decoded so far
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
        ring = (max(config.window - 1, 1), config.layers, 2, config.kv_heads, config.head_dim)
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


class FoldedCodec:
    """A CodecDecoder's weights in the form that streams; frozen, remembers nothing, shared by all voices.

    tables  [codebooks * codebook_size, codebook_dim]: every codebook's entries, already projected
    """

    def __init__(self, decoder: CodecDecoder) -> None:
        self.config = config = decoder.config
        self.tables = decoder.quantizer.tables().flatten(0, 1)
        self.first_entry = torch.arange(config.codebooks, device=self.tables.device) * config.codebook_size
        self.layout = tail_layout(config)
        self.pre_conv = Conv(decoder.pre_conv)
        self.pre_transformer = TransformerStream(decoder.pre_transformer)
        self.upsample = [
            (Conv(up), ConvNeXtStream(block, f"upsample.{i}.1"))
            for i, (up, block) in enumerate(decoder.upsample)  # type: ignore[misc]
        ]
        first, *blocks, snake, last = decoder.decoder
        self.first, self.snake, self.last = Conv(first), Snake(snake), Conv(last)
        self.blocks = [Block(block, f"decoder.{i}") for i, block in enumerate(blocks, start=1)]

    @torch.no_grad()
    def decode(self, codes: Tensor, state: CodecState, rows: Tensor) -> Tensor:
        """Decode T more frames of N voices and advance their rows of the state in place; no other row is touched.

        codes    [N, C, T] int64 or int32
        state    fp32, on this codec's device; its voices may have come differently far
        rows     [N] int64, on that device, all different (a row that nobody will read may stand there twice)
        returns  [N, frame_samples * T] fp32 in [-1, 1]

        Raises BadRequestError for bad codes. Their range is read on a CPU only: on a GPU nothing waits for the device,
        the call may be captured in a CUDA graph, and codes out of range are clamped; call check_codes there where
        they come from outside.
        """
        if codes.device.type == "cpu":
            check_codes(codes, self.config)
        else:
            _check_layout(codes, self.config)
            codes = codes.clamp(0, self.config.codebook_size - 1)
        if rows.dtype != torch.int64 or rows.shape != codes.shape[:1]:
            raise BadRequestError(
                f"rows should be int64 [{codes.shape[0]}], one for each voice of codes, but are {rows.dtype} "
                f"{list(rows.shape)}; name one row for each voice"
            )
        tails = Tails(state.tails.index_select(0, rows), self.layout)
        done = state.frames_done.index_select(0, rows)

        x = F.embedding(codes.transpose(1, 2) + self.first_entry, self.tables).sum(2)
        x = self.pre_conv(tails.before("pre_conv", x))
        x = self.pre_transformer(x, state.kv, rows, done)
        for upsample, convnext in self.upsample:
            x = convnext(upsample(x), tails)
        x = self.first(tails.before("decoder.0", x))
        for block in self.blocks:
            x = block(x, tails)
        x = self.last(tails.before(f"decoder.{len(self.blocks) + 2}", self.snake(x)))

        state.tails.index_copy_(0, rows, tails.flat)
        state.frames_done.index_copy_(0, rows, done + codes.shape[2])
        return x[..., 0].clamp(-1.0, 1.0)


def check_codes(codes: Tensor, config: CodecConfig) -> None:
    """Refuse codes that are not integers [N >= 1, C, T >= 1] in 0..codebook_size - 1. Raises BadRequestError.

    Reads every value: where the codes lie on a GPU, this waits for it.
    """
    _check_layout(codes, config)
    low, high = (int(bound) for bound in torch.aminmax(codes))
    if low < 0 or high >= config.codebook_size:
        raise BadRequestError(
            f"codes should lie in 0..{config.codebook_size - 1}, but reach from {low} to {high}; "
            "cut padding and end-of-speech frames off first"
        )


def _check_layout(codes: Tensor, config: CodecConfig) -> None:
    if codes.dtype not in (torch.int64, torch.int32):
        raise BadRequestError(f"codes should be int64 or int32, but are {codes.dtype}; convert them with .long()")
    if codes.dim() != 3 or codes.shape[1] != config.codebooks or 0 in codes.shape:
        raise BadRequestError(
            f"codes should have the shape [voices, {config.codebooks}, frames], but have {list(codes.shape)}; "
            "put the codebooks before the frames"
        )
