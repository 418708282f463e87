"""One transformer layer's parameters under their official names, and their stacking for megakernel.reference.

Shared by the talker and the code predictor; computes nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megakernel.reference import LayerWeights, StackWeights
from megakernel.shape import StackShape


class Norm(nn.Module):
    """The weight of an RMSNorm, [size]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class SelfAttention(nn.Module):
    """q, k, v and o projections without bias; q and k are normed per head."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.q_proj = nn.Linear(shape.hidden, shape.q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_size, bias=False)
        self.o_proj = nn.Linear(shape.q_size, shape.hidden, bias=False)
        self.q_norm = Norm(shape.head_dim)
        self.k_norm = Norm(shape.head_dim)


class Mlp(nn.Module):
    """gate, up and down projections of a SwiGLU, without bias."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)


class DecoderLayer(nn.Module):
    """One layer's parameters."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.self_attn = SelfAttention(shape)
        self.mlp = Mlp(shape)
        self.input_layernorm = Norm(shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden)

    def weights(self, shape: StackShape) -> LayerWeights:
        """The stacked form; differentiable."""
        attn, mlp = self.self_attn, self.mlp
        return LayerWeights(
            input_norm=self.input_layernorm.weight,
            qkv=torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]),
            qk_norm=torch.cat([_heads(attn.q_norm, shape.heads), _heads(attn.k_norm, shape.kv_heads)]),
            o=attn.o_proj.weight,
            post_norm=self.post_attention_layernorm.weight,
            gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=mlp.down_proj.weight,
        )


def stack_weights(layers: Iterable[nn.Module], norm: Norm, shape: StackShape) -> StackWeights:
    """Layers and final norm of a module as megakernel.reference wants them."""
    return StackWeights([layer.weights(shape) for layer in layers], norm.weight)  # type: ignore[operator]


def _heads(norm: Norm, heads: int) -> Tensor:
    return norm.weight[None].expand(heads, -1)
