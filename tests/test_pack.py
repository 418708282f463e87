"""The kernels' weight layout against the fragment layout of PTX mma.m16n8k16, written down from its manual."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megakernel.pack import interleave, pack_frame, pack_matrix, unpack_matrix
from megakernel.shape import Shape
from tests.kernel_cases import PLAIN, PROJECTED, weights_of


def fragment_rows_and_columns() -> tuple[np.ndarray, np.ndarray]:
    """Of the eight elements that each lane holds of a 16 x 16 matrix A: row and column, [32, 8] each.

    PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": with groupID = lane >> 2 and
    threadID_in_group = lane % 4, element i lies in row groupID for i of 0, 1, 4, 5, else groupID + 8, and in column
    threadID_in_group * 2 + (i & 1), from i = 4 on + 8.
    """
    lane, i = np.arange(32)[:, None], np.arange(8)[None]
    row = lane // 4 + np.where(i % 4 < 2, 0, 8)
    return row, lane % 4 * 2 + (i & 1) + np.where(i < 4, 0, 8)


def mma(a_lanes: np.ndarray, b_lanes: np.ndarray) -> np.ndarray:
    """What the instruction computes from a [32, 8] and b [32, 4] elements of the lanes: A B, [16, 8]."""
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    a[fragment_rows_and_columns()] = a_lanes
    lane, i = np.arange(32)[:, None], np.arange(4)[None]
    b[lane % 4 * 2 + (i & 1) + np.where(i < 2, 0, 8), lane // 4 + 0 * i] = b_lanes
    return a @ b


def product(packed: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
    """As the kernel multiplies: packed [N K] times eight columns x [8, K] -> [N, 8]."""
    k = x.shape[1]
    tiles = packed.reshape(n // 16, k // 16, 32, 8)
    out = np.zeros((n, 8))
    lane, e = np.arange(32)[:, None], np.arange(4)[None]
    for row in range(n // 16):
        for column in range(k // 16):
            b_lanes = x[lane // 4, 16 * column + 4 * (lane % 4) + e]  # four neighbours a lane
            out[16 * row : 16 * row + 16] += mma(tiles[row, column], b_lanes)
    return out


@pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 16), (16, 80), (96, 64)])
def test_a_packed_matrix_multiplies_as_the_kernel_reads_it(n: int, k: int) -> None:
    random = np.random.default_rng(0)
    weight, x = random.standard_normal((n, k)), random.standard_normal((8, k))
    packed = pack_matrix(torch.from_numpy(weight)).numpy()
    np.testing.assert_allclose(product(packed, x, n), weight @ x.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unpacking_is_the_inverse_of_packing(dtype: torch.dtype) -> None:
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack_matrix(weight)
    assert (packed.shape, packed.dtype) == ((48 * 80,), dtype)
    assert torch.equal(unpack_matrix(packed, 48, 80), weight)
    assert not torch.equal(packed.view(48, 80), weight)


@pytest.mark.parametrize("sizes", [(24, 32), (32, 24)])
def test_a_matrix_that_is_not_whole_tiles_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"this one is \[{sizes[0]}, {sizes[1]}\]"):
        pack_matrix(torch.zeros(sizes))


def test_every_tile_of_gate_up_holds_eight_gates_above_their_ups() -> None:
    inner = 40
    names = torch.arange(2 * inner)[:, None].expand(-1, 3)  # gates 0..39, ups 40..79
    for tile, rows in enumerate(interleave(names).split(16)):
        gates = torch.arange(8 * tile, 8 * tile + 8)
        assert torch.equal(rows[:, 0], torch.cat([gates, gates + inner]))


def matrices(packed: Tensor, *sizes: tuple[int, int]) -> list[Tensor]:
    """The matrices that a packed tensor holds one after the other, and nothing else."""
    parts = packed.split([n * k for n, k in sizes])
    return [unpack_matrix(part, n, k) for part, (n, k) in zip(parts, sizes, strict=True)]


@pytest.mark.parametrize("shape", [PLAIN, PROJECTED], ids=["plain", "projected"])
def test_everything_that_a_frame_reads_is_packed_in_the_order_of_the_kernels(shape: Shape) -> None:
    weights = weights_of(shape, torch.bfloat16)
    packed = pack_frame(weights, shape)
    for part, stack, sizes in (
        (packed.talker, weights.talker, shape.talker),
        (packed.predictor, weights.predictor, shape.predictor),
    ):
        h, i = sizes.hidden, sizes.intermediate
        kinds = [(sizes.q_size + 2 * sizes.kv_size, h), (h, sizes.q_size), (2 * i, h), (h, i)]
        found = matrices(part, *kinds * sizes.layers)
        for n, layer in enumerate(stack.layers):
            qkv, o, gate_up, down = found[4 * n : 4 * n + 4]
            assert torch.equal(qkv, layer.qkv)
            assert torch.equal(o, layer.o)
            assert torch.equal(gate_up, interleave(layer.gate_up))
            assert torch.equal(down, layer.down)
    assert torch.equal(unpack_matrix(packed.codec_head, *weights.codec_head.shape), weights.codec_head)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            matrices(packed.heads, *[(shape.codes, shape.predictor.hidden)] * 3), weights.heads, strict=True
        )
    )
    assert torch.equal(packed.embeddings, weights.embeddings)
    assert torch.equal(packed.inputs, weights.inputs)
    assert (packed.projection is None) == (weights.projection is None)
    if packed.projection is not None and weights.projection is not None:
        matrix, bias = weights.projection
        assert torch.equal(unpack_matrix(packed.projection[0], *matrix.shape), matrix)
        assert torch.equal(packed.projection[1], bias.float())


def test_norms_lie_in_fp32_layer_by_layer_and_the_final_one_last() -> None:
    weights = weights_of(PROJECTED, torch.bfloat16)
    packed, sizes = pack_frame(weights, PROJECTED), PROJECTED.talker
    assert packed.talker_norms.dtype == torch.float32
    h, d = sizes.hidden, sizes.head_dim
    *found, last = packed.talker_norms.split([h, h, d, d] * sizes.layers + [h])
    for n, layer in enumerate(weights.talker.layers):
        expected = (layer.input_norm, layer.post_norm, layer.qk_norm[0], layer.qk_norm[-1])
        assert all(torch.equal(a, b.float()) for a, b in zip(found[4 * n : 4 * n + 4], expected, strict=True))
    assert torch.equal(last, weights.talker.norm.float())
