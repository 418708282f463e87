"""Codes and a CodecState go in, samples and the next state come out: whole or by any chunk size, the same samples.

CodecDecoder holds the weights under their official names (training, whole decode); `fold()` makes the FoldedCodec that
streams. Neither remembers anything of a voice. All arithmetic is fp32.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil

import torch
from torch import Tensor, nn

from pipecat_qwen3.codec_layers import (
    CausalConv,
    CausalUpsample,
    ConvNeXt,
    DecoderBlock,
    SnakeBeta,
    SplitQuantizer,
    Transformer,
)
from pipecat_qwen3.codec_state import CodecState, tail_layout
from pipecat_qwen3.codec_stream import block, conv, linear, transformer, upsample
from pipecat_qwen3.codec_torch import TorchPass
from pipecat_qwen3.config import CodecConfig
from pipecat_qwen3.errors import BadRequestError

logger = logging.getLogger(__name__)


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
    def fold(self, tf32: bool = False) -> FoldedCodec:
        """The streaming form of these weights, in fp32. A copy: later changes of the module do not reach it.

        tf32  on a GPU, let products round their inputs to 11 bits: samples are then wrong by up to 2e-3 (-50 dB)
        """
        decoder = copy.deepcopy(self).float()
        return FoldedCodec(decoder, _passes(decoder.pre_conv.conv.weight.device, tf32))


class FoldedCodec:
    """A CodecDecoder's weights in the form that streams; frozen, remembers nothing, shared by all voices.

    tables  [codebooks * codebook_size, codebook_dim]: every codebook's entries, already projected
    passes  who computes the layers: TorchPass, or a class with its calls
    """

    def __init__(self, decoder: CodecDecoder, passes: type[TorchPass] = TorchPass) -> None:
        self.config = config = decoder.config
        self.passes = passes
        self.tables = decoder.quantizer.tables().flatten(0, 1)
        self.first_entry = torch.arange(config.codebooks, device=self.tables.device) * config.codebook_size
        layout, stack = tail_layout(config), decoder.pre_transformer
        self.pre_conv = conv(decoder.pre_conv, layout["pre_conv"])
        self.entry = linear(stack.input_proj)
        self.layers = [transformer(layer, config.norm_eps) for layer in stack.layers]
        self.exit = linear(stack.output_proj, stack.norm)
        self.upsample = [
            upsample(*pair, layout[f"upsample.{i}.1.dwconv"])  # type: ignore[misc]
            for i, pair in enumerate(decoder.upsample)
        ]
        first, *blocks, snake, last = decoder.decoder
        snakes = [*(layer.block[0] for layer in blocks), snake]  # type: ignore[index]
        self.first = conv(first, layout["decoder.0"], snakes[0])  # type: ignore[arg-type]
        self.blocks = [block(layer, f"decoder.{i}", layout, snakes[i]) for i, layer in enumerate(blocks, start=1)]  # type: ignore[arg-type]
        self.last = conv(last, layout[f"decoder.{len(blocks) + 2}"], then="clamp")

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.tables.device

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
            check_layout(codes, self.config)
        if rows.dtype != torch.int64 or rows.shape != codes.shape[:1]:
            raise BadRequestError(
                f"rows should be int64 [{codes.shape[0]}], one for each voice of codes, but are {rows.dtype} "
                f"{list(rows.shape)}; name one row for each voice"
            )
        most = self.passes.max_frames
        if most is None or codes.shape[2] <= most:
            return self._decode(codes, state, rows)
        return torch.cat([self._decode(piece, state, rows) for piece in codes.split(most, 2)], 1)

    def _decode(self, codes: Tensor, state: CodecState, rows: Tensor) -> Tensor:
        run = self.passes(self.config, state, rows, codes.shape[2])
        x = run.embed(codes, self.tables, self.first_entry)
        x = run.product(run.product(x, self.pre_conv), self.entry)
        for i, layer in enumerate(self.layers):
            x = run.product(run.attend(run.product(x, layer.qkv), i), layer.out, plus=x)
            x = run.product(run.product(x, layer.gate_up), layer.down, plus=x)
        x = run.product(x, self.exit)
        for stage in self.upsample:
            x = run.product(x, stage.up)
            x = run.product(run.product(run.depthwise(x, stage.depthwise), stage.wide), stage.narrow, plus=x)
        waved = run.product(x, self.first)
        for up, units in self.blocks:
            x, waved = run.fork(waved, up)
            for wide, point in units:
                x, waved = run.fork(run.product(waved, wide), point, plus=x)
        x = run.product(waved, self.last)
        run.finish()
        return x[..., 0]


def _passes(device: torch.device, tf32: bool) -> type[TorchPass]:
    if device.type == "cuda":
        try:
            from pipecat_qwen3.codec_triton import Tf32Pass, TritonPass
        except ImportError:  # torch comes without Triton outside Linux
            return TorchPass
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            logger.warning("the codec runs without its Triton kernels, which need a C compiler: install gcc, or set CC")
            return TorchPass
        return Tf32Pass if tf32 else TritonPass
    return TorchPass


def check_codes(codes: Tensor, config: CodecConfig) -> None:
    """Refuse codes that are not integers [N >= 1, C, T >= 1] in 0..codebook_size - 1. Raises BadRequestError.

    Reads every value: where the codes lie on a GPU, this waits for it.
    """
    check_layout(codes, config)
    low, high = (int(bound) for bound in torch.aminmax(codes))
    if low < 0 or high >= config.codebook_size:
        raise BadRequestError(
            f"codes should lie in 0..{config.codebook_size - 1}, but reach from {low} to {high}; "
            "cut padding and end-of-speech frames off first"
        )


def check_layout(codes: Tensor, config: CodecConfig) -> None:
    """As check_codes, without reading a value."""
    if codes.dtype not in (torch.int64, torch.int32):
        raise BadRequestError(f"codes should be int64 or int32, but are {codes.dtype}; convert them with .long()")
    if codes.dim() != 3 or codes.shape[1] != config.codebooks or 0 in codes.shape:
        raise BadRequestError(
            f"codes should have the shape [voices, {config.codebooks}, frames], but have {list(codes.shape)}; "
            "put the codebooks before the frames"
        )
