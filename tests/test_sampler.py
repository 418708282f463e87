"""The sampling rule against Random123's known answers, transformers' processors, and float64."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from megakernel.sampler import draw, knobs, pick, restrict, uniforms

CPU = torch.device("cpu")


# Random123's kat_vectors for philox4x32-10 with a counter whose upper half is zero, or the whole output checked by us
# through the published all-zero vector.
def test_philox_gives_the_published_answer_for_the_zero_key_and_counter() -> None:
    random = uniforms(torch.tensor([0]), torch.tensor([0]), 1)
    assert random.item() == (0x6627E8D5 >> 8) * 2.0**-24


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> int:
    """Philox4x32-10 in Python integers, written from the paper."""
    (k0, k1), (a, b, c, d) = key, counter
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k0, right % 2**32, (left >> 32) ^ d ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a


def test_philox_equals_integer_arithmetic_for_large_seeds_frames_and_draws() -> None:
    assert (
        philox((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)) == 0x408F276D
    )  # Random123's second published answer
    seeds = [1, 2**31, 2**32 + 5, 2**63 - 1]
    frames = [0, 7, 2**20, 2**31]
    random = uniforms(torch.tensor(seeds), torch.tensor(frames), 16)
    for row, (seed, frame) in enumerate(zip(seeds, frames, strict=True)):
        for d in range(16):
            expected = (philox((seed % 2**32, seed >> 32), (frame, d, 0, 0)) >> 8) * 2.0**-24
            assert random[row, d].item() == expected


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 4
    spoken = torch.tensor([[5, 5, 9], [1, 2, 3], [60, 61, 1]])
    history = torch.zeros(3, 64, dtype=torch.bool).scatter(1, spoken, True)
    ours = restrict(logits.clone(), history, torch.full((3,), 1.3), torch.zeros(3, dtype=torch.bool), 62, 64)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(spoken, logits.clone())  # type: ignore[arg-type]
    assert torch.equal(ours, theirs)


def test_control_ids_and_an_early_end_are_never_possible() -> None:
    logits = torch.zeros(2, 40)
    none = torch.zeros(2, 40, dtype=torch.bool)
    out = restrict(logits, none, torch.ones(2), torch.tensor([True, False]), eos=30, suppress_from=20)
    assert out[:, :20].isfinite().all()
    assert out[0, 20:].isinf().all()
    assert out[1].isfinite().nonzero()[-1].item() == 30


@pytest.mark.parametrize(("k", "p"), [(0, 0.8), (50, 1.0), (7, 0.5), (1, 1.0), (5000, 0.999), (0, 0.05)])
def test_top_k_and_top_p_keep_what_transformers_keeps(k: int, p: float) -> None:
    logits = torch.randn(4, 512, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, 100] = logits[:, 200]  # a tie
    expected = logits / 0.7
    if k:
        expected = TopKLogitsWarper(k)(None, expected)  # type: ignore[arg-type]
    if p < 1:
        expected = TopPLogitsWarper(p)(None, expected)  # type: ignore[arg-type]
    kept = expected.isfinite()
    setting = knobs([(True, 0.7, k, p)] * 4, 512, CPU)
    seen = torch.zeros_like(kept)
    for u in torch.linspace(0, 1, 2001)[:-1]:
        seen.scatter_(1, pick(logits, setting, u.expand(4))[:, None], True)
    assert not (seen & ~kept).any()
    likely = (expected.softmax(-1) > 2e-3) & kept
    assert (seen | ~likely).all()


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(2)) * 2
    u = torch.rand(64, generator=torch.Generator().manual_seed(3))
    cumulative = logits.double().softmax(-1).cumsum(-1)
    got = draw(logits, u)
    for row in range(64):
        low = cumulative[row, got[row] - 1] if got[row] else 0.0
        assert low - 1e-5 <= u[row] <= cumulative[row, got[row]] + 1e-5


def test_draw_never_takes_an_impossible_code_at_either_end() -> None:
    logits = torch.full((2, 64), float("-inf"))
    logits[:, 7] = 1.0
    logits[:, 41] = 1.0
    assert draw(logits, torch.tensor([0.0, 1.0 - 2.0**-24])).tolist() == [7, 41]


def test_no_rounding_of_the_partial_sums_lets_an_impossible_code_win() -> None:
    g = torch.Generator().manual_seed(6)
    logits = torch.randn(64, 3072, generator=g)
    logits[:, 2048:] = float("-inf")
    logits[:, 2150] = torch.randn(64, generator=g)
    for logits_ in (logits, logits.masked_fill(logits < logits.topk(50).values[:, -1:], float("-inf"))):
        cumulative = logits_.double().softmax(-1).cumsum(-1).float()
        edges = torch.cat([cumulative[:, 31::32], torch.ones(64, 1)], 1)
        for u in [x for e in edges.T for x in (e, e.nextafter(torch.zeros(())), (e + 6e-8).clamp(max=1 - 2**-24))]:
            got = draw(logits_, u.clamp(max=1 - 2**-24))
            assert logits_.gather(1, got[:, None]).isfinite().all()


def test_a_column_draws_the_same_whatever_stands_beside_it() -> None:
    logits = torch.randn(6, 512, generator=torch.Generator().manual_seed(4)) * 3
    u = torch.rand(6, generator=torch.Generator().manual_seed(5))
    settings = [
        (True, 0.9, 50, 1.0),
        (False, 1.0, 0, 1.0),
        (True, 0.3, 0, 0.7),
        (True, 2.0, 3, 1.0),
        (True, 1.0, 0, 1.0),
    ]
    settings.append((False, 0.1, 5, 0.1))
    together = pick(logits, knobs(settings, 512, CPU), u)
    alone = [pick(logits[i : i + 1], knobs([settings[i]], 512, CPU), u[i : i + 1]) for i in range(6)]
    assert together.tolist() == [int(x) for x in alone]
