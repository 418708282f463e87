"""A model and a machine's ceilings in, the least milliseconds of each stage out: its bytes and its flops, nothing else.

Counted is what the voices need: weights read once a pass for the whole batch, keys and values once a voice, two flops a
weight and position. Padding rows, norms, softmax, sampling and launches are overhead by definition.
"""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.geometry import Model
from bench.machine import copy_gbs, matmul_gflops, read_gbs
from megakernel.frame_step import PIECE
from megakernel.reference import StackWeights
from pipecat_qwen3.codec import CodecState
from pipecat_qwen3.codec_torch import TorchPass


@dataclass(frozen=True)
class Work:
    """What a stage must do: bytes that come from wherever a whole frame's weights lie, bytes read again, flops."""

    fresh: int
    again: int
    flops: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Ceiling:
    """What the machine can do with the thread count of the run: GB/s and GFLOP/s.

    fresh  reading as many bytes as the weights of a whole frame have, again and again
    again  reading as many bytes as the code predictor has, which a frame reads C - 1 times
    """

    copy_gbs: float
    fresh_bytes: int
    fresh_gbs: float
    again_bytes: int
    again_gbs: float
    gflops: dict[str, float]

    @classmethod
    def measure(cls, model: Model, device: torch.device) -> "Ceiling":
        """Takes some seconds."""
        w = model.weights
        again = _bytes(*_matrices(w.predictor))
        fresh = again + _bytes(*_matrices(w.talker), w.codec_head, *w.heads, *_codec_tensors(model))
        return cls(
            copy_gbs=copy_gbs(device),
            fresh_bytes=fresh,
            fresh_gbs=read_gbs(fresh, device),
            again_bytes=again,
            again_gbs=read_gbs(again, device),
            gflops={str(d)[6:]: matmul_gflops(d, device) for d in (torch.float32, torch.bfloat16)},
        )

    def ms(self, work: Work) -> float:
        """The least time of a stage: bytes or flops, whichever takes longer."""
        reading = work.fresh / self.fresh_gbs + work.again / self.again_gbs
        return max(reading, work.flops / self.gflops[str(work.dtype)[6:]]) / 1e6

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(self).items()}


def works(model: Model, batch: int, position: int) -> dict[str, Work]:
    """Work of each stage of one frame of `batch` voices with `position` positions each; prefill is for one voice."""
    w, shape, dtype = model.weights, model.shape, model.weights.codec_head.dtype
    talker, predictor = _matrices(w.talker), _matrices(w.predictor)
    passes = shape.codebooks - 1
    kv = 2 * shape.talker.layers * shape.talker.kv_size * dtype.itemsize
    looks = shape.talker.layers * 4 * shape.talker.q_size
    talker_work = Work(
        fresh=_bytes(*talker, w.codec_head) + batch * position * kv,
        again=0,
        flops=batch * (_flops(*talker, w.codec_head) + position * looks),
        dtype=dtype,
    )
    predictor_work = Work(
        fresh=_bytes(*predictor, *w.heads),
        again=(passes - 1) * _bytes(*predictor),
        flops=batch * ((passes + 1) * _flops(*predictor) + _flops(*w.heads)),
        dtype=dtype,
    )
    return {
        "prefill": Work(_bytes(*talker), 0, PIECE * _flops(*talker), dtype),
        "talker": talker_work,
        "predictor": predictor_work,
        "codec": _codec_work(model, batch, 1),
        "codec x8": _codec_work(model, batch, 8),
    }


def _codec_work(model: Model, batch: int, frames: int) -> Work:
    """Flops as torch counts them in one call of its own operations; those of a GPU's Triton kernels it does not see."""
    codec, device = copy.copy(model.codec), model.codec.tables.device
    codec.passes = TorchPass
    state = CodecState.zeros(model.codec_config, batch, device)
    codes = torch.zeros(batch, model.shape.codebooks, frames, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter:
        codec.decode(codes, state, torch.arange(batch, device=device))
    return Work(_bytes(*_codec_tensors(model)), 0, counter.get_total_flops(), torch.float32)


def _matrices(stack: StackWeights) -> list[Tensor]:
    return [m for layer in stack.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]


def _codec_tensors(model: Model) -> list[Tensor]:
    """Every tensor of the folded codec but its tables, of which a frame reads C rows."""
    found: dict[int, Tensor] = {}

    def collect(value: object) -> None:
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)
        elif type(value).__module__.startswith("pipecat_qwen3.codec"):
            for item in vars(value).values():
                collect(item)

    collect(model.codec)
    return [t for t in found.values() if t is not model.codec.tables]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _flops(*tensors: Tensor) -> int:
    return 2 * sum(t.numel() for t in tensors)
