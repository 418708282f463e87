"""The weights of a frame in, the kernels' layout out: one 16-byte load a lane is a tensor-core fragment.

A matrix [N, K] becomes [N/16, K/16, 32 lanes, 8]. Lane 4 g + t of a 16 x 16 tile holds, in the register order of PTX
mma.m16n8k16, rows g and g + 8 at k = 4 t .. 4 t + 3. The instruction itself numbers these k as 2 t, 2 t + 1, 2 t + 8,
2 t + 9; permuting k alike in weights and activations changes nothing but lets a lane load four neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megakernel.reference import FrameWeights, LayerWeights, StackWeights
from megakernel.shape import Shape, StackShape


def pack_matrix(weight: Tensor) -> Tensor:
    """[N, K] -> [N/16 * K/16 * 256]; N and K multiples of 16. Raises ValueError for others."""
    n, k = weight.shape
    if n % 16 or k % 16:
        raise ValueError(f"a packed matrix has multiples of 16 rows and columns, but this one is [{n}, {k}]")
    tiles = weight.reshape(n // 16, 2, 8, k // 16, 4, 2, 2)  # tile, row half, g, k tile, t, pair, k within the pair
    return tiles.permute(0, 3, 2, 4, 5, 1, 6).contiguous().flatten()


def unpack_matrix(packed: Tensor, n: int, k: int) -> Tensor:
    """The inverse of pack_matrix: [N, K]."""
    return packed.view(n // 16, k // 16, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 3, 4, 6).reshape(n, k)


def interleave(gate_up: Tensor) -> Tensor:
    """gate_up [2 I, K] in groups of eight gates and their eight ups, so that one tile makes eight outputs."""
    gate, up = (half.unflatten(0, (-1, 8)) for half in gate_up.chunk(2))
    return torch.stack([gate, up], 1).flatten(0, 2)


@dataclass(frozen=True)
class PackedWeights:
    """Everything that the kernels read: matrices packed and concatenated, norms in fp32.

    talker, predictor   per layer qkv, o, gate-up, down
    norms               per layer input norm, post norm, q norm, k norm; then the final norm
    projection          weight and fp32 bias, or None
    """

    talker: Tensor
    predictor: Tensor
    codec_head: Tensor
    heads: Tensor
    projection: tuple[Tensor, Tensor] | None
    talker_norms: Tensor
    predictor_norms: Tensor
    embeddings: Tensor
    inputs: Tensor

    def unfit(self, shape: Shape, dtype: torch.dtype) -> str | None:
        """What a kernel for this shape and dtype would not find where it reads, in one line, or None."""
        talker, predictor, others = shape.talker, shape.predictor, shape.codebooks - 1
        device, between = self.codec_head.device, predictor.hidden if shape.projected else 0
        projection, bias = (None, None) if self.projection is None else self.projection
        wanted = {
            "talker": (self.talker, _layers_size(talker), dtype),
            "predictor": (self.predictor, _layers_size(predictor), dtype),
            "codec_head": (self.codec_head, shape.vocab * talker.hidden, dtype),
            "heads": (self.heads, others * shape.codes * predictor.hidden, dtype),
            "projection": (projection, between * talker.hidden, dtype),
            "projection's bias": (bias, between, torch.float32),
            "talker_norms": (self.talker_norms, _norms_size(talker), torch.float32),
            "predictor_norms": (self.predictor_norms, _norms_size(predictor), torch.float32),
            "embeddings": (self.embeddings, shape.codebooks * shape.codes * talker.hidden, dtype),
            "inputs": (self.inputs, others * shape.codes * predictor.hidden, dtype),
        }
        for name, (x, size, kind) in wanted.items():
            if x is None:
                if size:
                    return f"the packed weights should have a {name} of {size} values, but have none"
            elif (x.numel(), x.dtype, x.device, x.is_contiguous()) != (size, kind, device, True):
                found = f"{x.numel()} in {str(x.dtype)[6:]} on {x.device}{'' if x.is_contiguous() else ', with gaps'}"
                wanted_size = f"{size} values in {str(kind)[6:]} on {device}"
                return f"{name} of the packed weights should be {wanted_size}, but is {found}"
        return None


def _layers_size(s: StackShape) -> int:
    return s.layers * s.hidden * (2 * s.q_size + 2 * s.kv_size + 3 * s.intermediate)


def _norms_size(s: StackShape) -> int:
    return s.layers * 2 * (s.hidden + s.head_dim) + s.hidden


def _matrices(layer: LayerWeights) -> Tensor:
    order = (layer.qkv, layer.o, interleave(layer.gate_up), layer.down)
    return torch.cat([pack_matrix(matrix) for matrix in order])


def _stack(stack: StackWeights) -> Tensor:
    first = _matrices(stack.layers[0])
    packed = first.new_empty(len(stack.layers), first.numel())
    packed[0] = first
    for i, layer in enumerate(stack.layers[1:], start=1):
        packed[i] = _matrices(layer)
    return packed.flatten()


def _norms(stack: StackWeights, heads: int) -> Tensor:
    parts = []
    for layer in stack.layers:
        parts += [layer.input_norm, layer.post_norm, layer.qk_norm[0], layer.qk_norm[heads]]
    return torch.cat([part.float() for part in (*parts, stack.norm)])


def pack_frame(weights: FrameWeights, shape: Shape) -> PackedWeights:
    """Pack everything; the result has the weights' device and dtype."""
    projection = weights.projection
    return PackedWeights(
        talker=_stack(weights.talker),
        predictor=_stack(weights.predictor),
        codec_head=pack_matrix(weights.codec_head),
        heads=torch.cat([pack_matrix(head) for head in weights.heads]),
        projection=None if projection is None else (pack_matrix(projection[0]), projection[1].float()),
        talker_norms=_norms(weights.talker, shape.talker.heads),
        predictor_norms=_norms(weights.predictor, shape.predictor.heads),
        embeddings=weights.embeddings.contiguous(),
        inputs=weights.inputs.contiguous(),
    )
