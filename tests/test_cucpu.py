"""The CPU runtime of the kernels: what it computes, and that it finds every mistake it is there to find."""

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megakernel import cucpu

pytestmark = pytest.mark.skipif(cucpu.unavailable() is not None, reason=cucpu.unavailable() or "")

SOURCES = Path(__file__).parent / "cucpu"
COLLECTIVES, PERSISTENT = SOURCES / "collectives.cu", SOURCES / "persistent.cu"

build = cache(cucpu.build)


def enumerators(source: Path, first: str) -> dict[str, int]:
    """The numbers of the C++ enum that begins with `first`."""
    found = re.search(r"enum \w*\s*\{(\s*" + first + r"[\s\w,]*)\}", source.read_text())
    assert found
    return {name: number for number, name in enumerate(re.findall(r"\w+", found[1]))}


def place(source: Path, comment: str) -> str:
    """file:line of the only line that ends in this comment."""
    (line,) = [n for n, text in enumerate(source.read_text().splitlines(), 1) if text.endswith(f"// {comment}")]
    return f"{source}:{line}"


def structure(name: str, pointers: Sequence[str], numbers: Sequence[tuple[str, type]] = ()) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [*[(p, ctypes.c_void_p) for p in pointers], *numbers]})


# -- warp operations ---------------------------------------------------------------------------------------------------

Product = structure("Product", ["a", "b", "d"])
Exchange = structure("Exchange", ["in", "wide", "out", "wide_out", "votes"])
Atomics = structure("Atomics", ["values", "sum", "low", "high", "any", "all", "last", "swapped", "fsum"])


@pytest.mark.parametrize(("kernel", "dtype"), [("product_bf16", torch.bfloat16), ("product_fp32", torch.float32)])
def test_the_matrix_product_has_the_fragment_layout_that_ptx_gives_mma_m16n8k16(kernel: str, dtype: torch.dtype):
    warps = 3
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(warps, 16, 16, generator=generator).to(dtype)
    b = torch.randn(warps, 16, 8, generator=generator).to(dtype)
    d = torch.randn(warps, 16, 8, generator=generator)
    # PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": row and column of element i of a lane
    lane = torch.arange(32)[:, None]
    group, within = lane // 4, lane % 4
    i = torch.arange(8)
    a_row = torch.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    a_column = within * 2 + (i & 1) + torch.where(i < 4, 0, 8)
    i = torch.arange(4)
    b_row, b_column = within * 2 + (i & 1) + torch.where(i < 2, 0, 8), group.expand(32, 4)
    d_row, d_column = torch.where(i < 2, group, group + 8), within * 2 + (i & 1)
    a_lanes, b_lanes, d_lanes = a[:, a_row, a_column], b[:, b_row, b_column], d[:, d_row, d_column]

    args = Product(a_lanes.data_ptr(), b_lanes.data_ptr(), d_lanes.data_ptr())
    build(COLLECTIVES).launch(kernel, args, blocks=1, threads=32 * warps)

    expected = d.double().numpy() + a.double().numpy() @ b.double().numpy()
    np.testing.assert_allclose(d_lanes.numpy(), expected[:, d_row, d_column], rtol=0, atol=4e-6)


def test_shuffles_and_votes_give_each_lane_what_cuda_says():
    threads = 64
    values = torch.randn(threads, generator=torch.Generator().manual_seed(2))
    wide = torch.arange(threads) * (1 << 40) + 1
    out, wide_out = torch.zeros(5, threads), torch.zeros_like(wide)
    votes = torch.zeros(3, threads, dtype=torch.int32)
    args = Exchange(*(tensor.data_ptr() for tensor in (values, wide, out, wide_out, votes)))

    build(COLLECTIVES).launch("exchange", args, blocks=1, threads=threads)

    for t in range(threads):
        lane, warp = t % 32, values[t // 32 * 32 : t // 32 * 32 + 32].tolist()
        sources = [5, (t * 7 + 3) % 32, lane ^ 12, lane - 3 if lane >= 3 else lane, lane + 9 if lane + 9 < 32 else lane]
        assert out[:, t].tolist() == [warp[source] for source in sources]
        assert wide_out[t] == wide[t ^ 1]
        ballot = sum(1 << i for i, value in enumerate(warp) if value > 0)
        assert votes[0, t].item() % 2**32 == ballot
        assert votes[1:, t].tolist() == [any(v > 1.5 for v in warp), all(v > -1.5 for v in warp)]


def atomics(seed: int | None) -> list[float]:
    """What the atomics leave, over 4 blocks of 64 threads."""
    values = torch.randint(0, 10_000, (256,), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    results = [torch.tensor([start], dtype=torch.int32) for start in (0, 10**6, -1, 0, -1, 0, -1)]
    results.append(torch.zeros(1))
    args = Atomics(values.data_ptr(), *(result.data_ptr() for result in results))
    build(COLLECTIVES).launch("atomics", args, blocks=4, threads=64, seed=seed)
    found = [result.item() for result in results]
    expected = values.numpy()
    assert found[0] == found[7] == expected.sum()
    assert found[1:5] == [
        expected.min(),
        expected.max(),
        np.bitwise_or.reduce(expected),
        np.bitwise_and.reduce(expected),
    ]
    assert found[5] in expected
    assert found[6] - 1 in expected
    return found


def test_atomics_lose_nothing_and_a_seed_draws_the_same_order_every_time():
    runs = {seed: atomics(seed) for seed in (None, *range(6))}
    assert all(atomics(seed) == found for seed, found in runs.items())
    assert len({found[5] for found in runs.values()}) > 1, "all seeds ended with the same thread"


# -- a persistent kernel -----------------------------------------------------------------------------------------------

NUMBERS = [(name, ctypes.c_int32) for name in ("layers", "hidden", "inter", "bug")]
Persistent = structure(
    "Persistent", ["norm", "up", "down", "x", "mid", "counter"], [("arrived", ctypes.c_uint32), *NUMBERS]
)
BUGS = enumerators(PERSISTENT, "NONE")
L, H, I = 2, 64, 96  # noqa: E741 - the letters of megakernel/README.md
THREADS = 64


class Model:
    """Random weights, one vector, and the counter that is never reset."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.norm = 1 + torch.randn(L, H, generator=generator) / 10
        self.up = torch.randn(L, I, H, generator=generator) / H**0.5
        self.down = torch.randn(L, H, I, generator=generator) / I**0.5
        self.x = torch.randn(H, generator=generator)
        self.mid = torch.full((I,), 1e9)
        self.counter = torch.zeros(1, dtype=torch.int32)

    def launch(
        self,
        bug: str = "NONE",
        flavour: cucpu.Flavour = "plain",
        seed: int | None = None,
        blocks: int = 2,
        resident: int | None = None,
    ) -> None:
        buffers = [self.norm, self.up, self.down, self.x, self.mid, self.counter]
        args = Persistent(*(b.data_ptr() for b in buffers), self.counter.item(), L, H, I, BUGS[bug])
        library = build(PERSISTENT, flavour=flavour)
        library.launch("persistent", args, blocks, THREADS, H * 4, resident, seed, buffers=buffers)

    def expected(self, x: np.ndarray) -> np.ndarray:
        """The layers in float64, from x [H]."""
        norm, up, down = (w.double().numpy() for w in (self.norm, self.up, self.down))
        for layer in range(L):
            normed = x / np.sqrt((x**2).mean() + 1e-6) * norm[layer]
            x = x + down[layer] @ np.maximum(up[layer] @ normed, 0)
        return x


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_a_persistent_kernel_is_right_in_any_order_of_blocks_and_never_resets_its_counter(seed: int | None):
    model = Model()
    expected = model.x.double().numpy()
    for launch in range(4):
        expected = model.expected(expected)
        model.launch(seed=seed, blocks=3)
        np.testing.assert_allclose(model.x.numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        assert model.counter.item() == (launch + 1) * 3 * 2 * L


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_a_correct_kernel_passes_the_sanitizers_and_its_results_come_back(flavour: cucpu.Flavour):
    model, plain = Model(), Model()
    plain.launch()
    model.launch(flavour=flavour, seed=1)
    np.testing.assert_allclose(model.x.numpy(), plain.x.numpy(), rtol=0, atol=1e-6)
    assert model.counter.item() == plain.counter.item()


def test_a_missing_grid_barrier_gives_wrong_results_in_some_order():
    wrong = 0
    for seed in range(5):
        model = Model()
        expected = model.expected(model.x.double().numpy())
        model.launch("NO_BARRIER", seed=seed, blocks=3)
        wrong += not np.allclose(model.x.numpy(), expected, rtol=0, atol=1e-3)
    assert wrong > 0


@pytest.mark.parametrize(
    ("bug", "reads", "writes"),
    [
        ("NO_BARRIER", "read mid", "write mid"),
        ("NO_WAIT", "read mid", "write mid"),
        ("NO_BLOCK_BARRIER", "read up", "write vector"),
        ("RESET", "arrive", "reset here"),
    ],
)
def test_the_tsan_flavour_names_both_lines_of_a_race(bug: str, reads: str, writes: str):
    with pytest.raises(cucpu.Race) as caught:
        Model().launch(bug, flavour="tsan")
    for comment in (reads, writes):
        assert place(PERSISTENT, comment) in str(caught.value)
    assert re.search(r"by block \d thread \d+", str(caught.value))


def test_a_counter_that_the_kernel_resets_deadlocks_in_some_order_and_the_report_says_where():
    reports = []
    for seed in range(20):
        try:
            Model().launch("RESET", seed=seed, blocks=3)
        except cucpu.Deadlock as error:
            reports.append(str(error))
    assert reports
    for report in reports:
        assert f"block 1 threads 0: {place(PERSISTENT, 'wait here')} (spinning)" in report
        assert f"block 1 threads 1-63: {place(PERSISTENT, 'meet again')} __syncthreads" in report


def test_more_blocks_than_are_resident_deadlock_and_the_report_names_those_that_never_started():
    with pytest.raises(cucpu.Deadlock) as caught:
        Model().launch(blocks=3, resident=2)
    assert "block 2: NOT RESIDENT (never started)" in str(caught.value)
    assert "block 1 threads 0: " in str(caught.value)
    with pytest.raises(cucpu.Deadlock, match="never calls"):
        Model().launch("NO_SPIN", blocks=3, resident=2)


def test_the_asan_flavour_names_the_line_and_the_thread_of_an_access_outside_a_buffer():
    with pytest.raises(cucpu.BadMemoryAccess) as caught:
        Model().launch("ONE_ROW_TOO_MANY", flavour="asan")
    assert place(PERSISTENT, "read up") in str(caught.value)
    assert re.search(rf"to the right of {L * I * H * 4}-byte region", str(caught.value))
    assert re.search(r"by block \d thread \d+", str(caught.value))


# -- mistakes ----------------------------------------------------------------------------------------------------------

Case = structure("Case", ["out"], [("number", ctypes.c_int32)])
CASES = enumerators(COLLECTIVES, "DIVERGENT")
START = 1 + torch.arange(128) / 256  # every other one is halfway between two bfloat16


def run(case: str, flavour: cucpu.Flavour = "plain", seed: int | None = None, deadlock_s: float = 5.0) -> Tensor:
    """Launch one case on 2 blocks of 64 threads; [128] what the threads left."""
    out = START.clone()
    args = Case(out.data_ptr(), CASES[case])
    library = build(COLLECTIVES, flavour=flavour)
    library.launch("mistakes", args, 2, 64, 64 * 4, seed=seed, deadlock_s=deadlock_s, buffers=[out])
    return out


def test_a_barrier_that_one_thread_misses_is_reported():
    with pytest.raises(cucpu.Divergence) as caught:
        run("DIVERGENT")
    assert f"threads 0-6, 8-63: {place(COLLECTIVES, 'divergent')} __syncthreads" in str(caught.value)
    assert re.search(r"threads 7: \S+ __syncwarp", str(caught.value))


def test_a_thread_that_returns_before_a_barrier_is_reported():
    with pytest.raises(cucpu.Divergence) as caught:
        run("EARLY_RETURN")
    assert f"threads 0-39, 41-63: {place(COLLECTIVES, 'early return')} __syncthreads" in str(caught.value)
    assert "threads 40: returned" in str(caught.value)


def test_two_barriers_are_not_one_although_every_thread_is_at_one():
    with pytest.raises(cucpu.Divergence) as caught:
        run("TWO_BARRIERS")
    assert place(COLLECTIVES, "upper") in str(caught.value)
    assert place(COLLECTIVES, "lower") in str(caught.value)


def test_lanes_that_call_different_collectives_are_reported():
    with pytest.raises(cucpu.Divergence, match=r"__ballot_sync.*__shfl_xor_sync|__shfl_xor_sync.*__ballot_sync"):
        run("MIXED")


def test_a_mask_of_fewer_than_32_lanes_is_refused():
    with pytest.raises(cucpu.LaunchRefused, match=f"{place(COLLECTIVES, 'half mask')}: .* 0x0000ffff"):
        run("HALF_MASK")


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_trap_ends_the_launch_with_its_message_and_thread(seed: int | None):
    with pytest.raises(cucpu.Trapped, match=r"three is not allowed \(trap by block 1 thread 3\)"):
        run("TRAP", seed=seed)


def test_time_passes_in_polls_so_that_a_kernel_s_own_timeout_comes_before_the_deadlock():
    with pytest.raises(cucpu.Trapped, match="two seconds are over"):
        run("TIMEOUT", deadlock_s=3.0)
    with pytest.raises(cucpu.Deadlock):
        run("TIMEOUT", deadlock_s=1.0)


def test_shared_memory_begins_as_nan_and_ends_where_the_launch_said():
    assert run("SHARED").isnan().all()
    with pytest.raises(cucpu.BadMemoryAccess) as caught:
        run("PAST_SHARED", flavour="asan")
    assert place(COLLECTIVES, "past shared") in str(caught.value)
    assert "by block 0 thread 63" in str(caught.value)


def test_a_misaligned_vector_load_is_reported():
    with pytest.raises(cucpu.BadMemoryAccess, match="misaligned address") as caught:
        run("MISALIGNED", flavour="asan")
    assert place(COLLECTIVES, "misaligned") in str(caught.value)


def test_a_warp_barrier_orders_memory_and_a_shuffle_does_not():
    assert (run("HANDED_OVER", flavour="tsan") == 1).all()
    with pytest.raises(cucpu.Race) as caught:
        run("NOT_HANDED_OVER", flavour="tsan")
    assert place(COLLECTIVES, "written") in str(caught.value)
    assert place(COLLECTIVES, "read") in str(caught.value)


def test_bfloat16_is_rounded_as_torch_rounds():
    assert torch.equal(run("ROUND"), START.bfloat16().float())


# -- building and asking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("void f() { __shared__ float x[4]; }", "no static __shared__ variables"),
        ("float f(const float* p) { return __ldg(p); }", "use a plain load"),
        ("void f() { __threadfence(); }", "no fences"),
        ("void f() { nonsense(); }", "tmp.cu:2:.*nonsense"),
    ],
)
def test_what_a_kernel_must_not_use_does_not_compile_and_one_line_says_why(code: str, why: str, tmp_path: Path):
    source = tmp_path / "tmp.cu"
    source.write_text(f'#include "cucpu.h"\n{code}\n')
    with pytest.raises(cucpu.BuildFailed, match=why) as caught:
        cucpu.build(source)
    assert "\n" not in str(caught.value)


def test_an_edited_header_or_another_definition_is_compiled_anew_and_nothing_else_is(tmp_path: Path):
    source, header = tmp_path / "tmp.cu", tmp_path / "value.h"
    source.write_text('#include "cucpu.h"\n#include "value.h"\nint value() { return VALUE + MORE; }\n')
    header.write_text("#define VALUE 1\n")
    first = cucpu.build(source, {"MORE": 1}).path
    made = first.stat().st_mtime_ns
    again = cucpu.build(source, {"MORE": 1}).path
    assert (again, again.stat().st_mtime_ns) == (first, made)
    other = cucpu.build(source, {"MORE": 2}).path
    header.write_text("#define VALUE 2\n")
    assert len({first, other, cucpu.build(source, {"MORE": 1}).path}) == 3


@pytest.mark.parametrize("flavour", ["plain", "asan"])
def test_a_launch_that_does_not_fit_its_kernel_is_refused(flavour: cucpu.Flavour):
    out = torch.zeros(64)
    case, product = Case(out.data_ptr(), CASES["SHARED"]), Product(None, None, None)
    library = build(COLLECTIVES, flavour=flavour)
    with pytest.raises(cucpu.LaunchRefused, match="no kernel named mistake;"):
        library.launch("mistake", case, 1, 64, buffers=[out])
    with pytest.raises(cucpu.LaunchRefused, match="takes 16 bytes of arguments, got 24"):
        library.launch("mistakes", product, 1, 64, buffers=[out])
    with pytest.raises(cucpu.LaunchRefused, match="got 1 of 48"):
        library.launch("mistakes", case, 1, 48, buffers=[out])


def test_a_pointer_into_no_buffer_is_refused_by_the_flavours_that_copy():
    out = torch.zeros(64)
    library = build(COLLECTIVES, flavour="asan")
    with pytest.raises(cucpu.LaunchRefused, match=r"args\.out points into none of the buffers"):
        library.launch("mistakes", Case(out.data_ptr(), 0), 1, 64, buffers=[torch.zeros(64)])
    with pytest.raises(cucpu.LaunchRefused, match="share memory"):
        library.launch("mistakes", Case(out.data_ptr(), 0), 1, 64, buffers=[out, out[3:5]])
