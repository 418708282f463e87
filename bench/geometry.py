"""A geometry's name in, weights out: a checkpoint's own, or random ones of a published size, made in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megakernel.reference import FrameWeights, LayerWeights, StackWeights
from megakernel.sampler import Sampling
from megakernel.shape import Shape, StackShape
from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.codec import CodecDecoder, FoldedCodec
from pipecat_qwen3.config import CodecConfig
from pipecat_qwen3.talker import decode_weights

PREDICTOR = StackShape(layers=5, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128)

PUBLISHED = {
    "0.6b": StackShape(layers=28, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128),
    "1.7b": StackShape(layers=28, hidden=2048, intermediate=6144, heads=16, kv_heads=8, head_dim=128),
}
"""Talkers of the published checkpoints; their code predictor and codec are the same."""

CODEC = CodecConfig(
    codebooks=16,
    codebook_size=2048,
    codebook_dim=512,
    latent=1024,
    hidden=512,
    intermediate=1024,
    layers=8,
    heads=16,
    kv_heads=16,
    head_dim=64,
    window=72,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    decoder_dim=1536,
    upsample_rates=(8, 5, 4, 3),
    upsampling_ratios=(2, 2),
    sample_rate=24_000,
)


@dataclass(frozen=True)
class Model:
    """What a frame needs, and how its checkpoint samples. `real` is False where the weights are random."""

    weights: FrameWeights
    shape: Shape
    codec: FoldedCodec
    codec_config: CodecConfig
    sampling: Sampling
    real: bool


def build(geometry: str, dtype: torch.dtype, device: torch.device) -> Model:
    """The model of a published size ("0.6b", "1.7b") with random weights, or of a checkpoint. Raises TTSError."""
    if geometry in PUBLISHED:
        talker = PUBLISHED[geometry]
        projected = talker.hidden != PREDICTOR.hidden
        shape = Shape(talker, PREDICTOR, codebooks=16, codes=2048, vocab=3072, eos=2150, projected=projected)
        torch.manual_seed(0)
        codec = CodecDecoder(CODEC).eval().requires_grad_(False)
        return Model(_random_frame(shape, dtype, device), shape, codec.to(device).fold(), CODEC, Sampling(), real=False)
    checkpoint = Checkpoint.open(geometry)
    files = checkpoint.config.generation
    sampling = Sampling(
        files.do_sample,
        files.temperature,
        files.top_k,
        files.top_p,
        files.repetition_penalty,
        files.predictor_do_sample,
        files.predictor_temperature,
        files.predictor_top_k,
        files.predictor_top_p,
    )
    weights = decode_weights(checkpoint.load_talker(dtype), device)
    codec = checkpoint.load_codec().to(device).fold()
    return Model(weights, checkpoint.config.shape, codec, checkpoint.codec_config, sampling, real=True)


def _random_frame(shape: Shape, dtype: torch.dtype, device: torch.device) -> FrameWeights:
    def matrix(*size: int) -> Tensor:
        """Uniform, with a standard deviation of 1 / sqrt(inputs), which keeps activations near 1."""
        bound = (3 / size[-1]) ** 0.5
        return torch.empty(size, dtype=dtype, device=device).uniform_(-bound, bound)

    def ones(*size: int) -> Tensor:
        return torch.ones(size, dtype=dtype, device=device)

    def stack(s: StackShape) -> StackWeights:
        layers = [
            LayerWeights(
                input_norm=ones(s.hidden),
                qkv=matrix(s.q_size + 2 * s.kv_size, s.hidden),
                qk_norm=ones(s.heads + s.kv_heads, s.head_dim),
                o=matrix(s.hidden, s.q_size),
                post_norm=ones(s.hidden),
                gate_up=matrix(2 * s.intermediate, s.hidden),
                down=matrix(s.hidden, s.intermediate),
            )
            for _ in range(s.layers)
        ]
        return StackWeights(layers, ones(s.hidden))

    wide, narrow, books = shape.talker.hidden, shape.predictor.hidden, shape.codebooks
    return FrameWeights(
        talker=stack(shape.talker),
        predictor=stack(shape.predictor),
        codec_head=matrix(shape.vocab, wide),
        heads=matrix(books - 1, shape.codes, narrow),
        embeddings=matrix(books, shape.codes, wide),
        inputs=matrix(books - 1, shape.codes, narrow),
        projection=(matrix(narrow, wide), ones(narrow)) if shape.projected else None,
    )
