"""The frame kernels, run on the CPU from the source that ships, against the torch twin, float64 and themselves."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megakernel import cucpu, reference, sampler, schedule
from megakernel.choose import Choice
from megakernel.cucpu.launcher import CpuLauncher
from megakernel.frame_step import FrameStep, TorchFrameStep
from megakernel.gpu import CudaError
from megakernel.kernel_step import KernelFrameStep
from megakernel.kernels import unfit
from megakernel.sampler import Sampling
from megakernel.schedule import Op, Part, Phase
from megakernel.shape import Shape, StackShape
from pipecat_qwen3.backend import Request
from pipecat_qwen3.local import LocalBackend
from tests.kernel_cases import (
    CODES,
    EOS,
    PLAIN,
    PROJECTED,
    SHAPES,
    WIDE,
    DisturbedStep,
    Voice,
    assert_as_good_as,
    cast,
    kernel_step,
    packed_weights,
    speak,
    spoken,
    voice,
    weights_of,
)

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(cucpu.unavailable() is not None, reason=cucpu.unavailable() or "")

LAUNCHERS = pytest.mark.parametrize("phases", [False, True], ids=["persistent", "by-phase"])


def plan_for(rows: Sequence[int], frames: int, seed: int = 0) -> list[list[int]]:
    """Which rows each step names: all at first and last, in any order, and any of them between."""
    choose = random.Random(seed)
    some = [choose.sample(rows, choose.randint(1, len(rows))) for _ in range(frames - 2)]
    return [choose.sample(rows, len(rows)), *some, choose.sample(rows, len(rows))]


# -- whole frames ------------------------------------------------------------------------------------------------------


def twin_step(shape: Shape, rows: int, columns: int, positions: int) -> TorchFrameStep:
    return TorchFrameStep(weights_of(shape, torch.float32), shape, rows, columns, positions)


@LAUNCHERS
@pytest.mark.parametrize(
    ("shape", "batch", "launcher"),
    [
        ("plain", 1, {}),
        ("plain", 3, {}),
        ("plain", 8, {}),
        ("plain", 32, {}),
        ("projected", 12, {}),
        ("wide", 9, {}),
        # four parts of each sum; more blocks than tiles; activations staged in several rounds
        ("projected", 12, {"blocks": 13, "threads": 64, "staged_bytes": 1}),
    ],
    ids=lambda value: str(value) if value != {} else "",
)
def test_a_frame_has_the_codes_of_the_twin(shape: str, batch: int, launcher: dict, phases: bool) -> None:
    sizes, rows = SHAPES[shape], batch + 2
    twin = twin_step(sizes, rows, batch, 640)
    step = kernel_step(sizes, rows, batch, 640, noise="nan", phases=phases, **launcher)
    places = random.Random(batch).sample(range(rows), batch)
    # from 65 cached positions on attention is cut into pieces, from 449 on into eight
    cached = (0, 100, 0, 530, 65)
    voices = {row: voice(sizes, i, cached[i % 5]) for i, row in enumerate(places)}
    plan = plan_for(places, frames=6)
    answers = []
    for each in (twin, step):
        for row, speaker in voices.items():
            speaker.join(each, row)
        answers.append(speak(each, voices, plan))
    expected, got = answers
    for row in places:
        assert step.position(row) == twin.position(row)
        assert torch.equal(spoken(got[row]), spoken(expected[row]))
        if len(spoken(got[row])) == len(got[row]):
            torch.testing.assert_close(step.pending[row], twin.pending[row], rtol=1e-5, atol=1e-5)
            known = step.position(row)
            torch.testing.assert_close(step.kv[:, :, row, :, :known], twin.kv[:, :, row, :, :known], rtol=0, atol=1e-4)


@LAUNCHERS
def test_a_row_of_4096_positions_is_filled_to_the_last(phases: bool) -> None:
    speaker, left = voice(PLAIN, 1, 4096 - 8 - 3), {}  # a prompt of 8, and 3 frames
    for name, step in (
        ("twin", twin_step(PLAIN, 2, 2, 4096)),
        ("kernel", kernel_step(PLAIN, 2, 2, 4096, phases=phases)),
    ):
        speaker.join(step, 1)
        codes = speak(step, {1: speaker}, [[1]] * 3)[1]
        assert step.position(1) == 4096
        left[name] = codes, step.save_prefix(1)
        with pytest.raises(ValueError, match=r"rows \[1\] hold 4096 positions and are full"):
            step.step([1], speaker.text[:1])
    assert len(spoken(left["kernel"][0])) == 3
    assert torch.equal(left["kernel"][0], left["twin"][0])
    torch.testing.assert_close(left["kernel"][1], left["twin"][1], rtol=0, atol=1e-4)


def test_the_voices_of_the_parity_test_end_and_do_not_end() -> None:
    twin, voices = twin_step(PLAIN, 32, 32, 640), {i: voice(PLAIN, i) for i in range(32)}
    for row, speaker in voices.items():
        speaker.join(twin, row)
    ended = sum(bool((codes[:, 0] == EOS).any()) for codes in speak(twin, voices, [list(voices)] * 6).values())
    assert 0 < ended < 16


@LAUNCHERS
def test_given_random_numbers_take_the_place_of_philox(phases: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, given = voice(PLAIN, 1), torch.rand(2, 4, PLAIN.codebooks, generator=torch.Generator().manual_seed(3))
    step, twin = kernel_step(PLAIN, phases=phases), twin_step(PLAIN, 4, 4, 64)
    speaker.join(step, 2)
    speaker.join(twin, 2)
    own = speak(twin, {2: speaker}, [[2]] * 2)[2]
    speaker.join(twin, 2)
    rows = iter(given)
    monkeypatch.setattr(twin, "_uniforms", lambda *_: next(rows)[:1])
    expected = speak(twin, {2: speaker}, [[2]] * 2)[2]
    got = []
    for frame, step.uniforms in enumerate(given):
        got.append(step.step([2], speaker.text[frame : frame + 1]))
    assert torch.equal(torch.cat(got), expected)
    assert not torch.equal(own, expected)


# -- the same bits -----------------------------------------------------------------------------------------------------


def state(step: DisturbedStep, row: int) -> list[Tensor]:
    """Everything that a row holds."""
    known = step.position(row)
    kept = (step.kv[:, :, row, :, :known], step.pending[row], step.history[row], step.done[row])
    return [tensor.clone() for tensor in kept]


def predictor_state(step: DisturbedStep, columns: int, column: int) -> Tensor:
    """The keys and values of a column's last frame: the scratch holds those of an instance's columns."""
    scratch = step._scratch["predictor_kv"]
    layers, two, most, *rest = scratch.shape
    own = scratch.flatten()[: scratch.numel() // most * columns].view(layers, two, columns, *rest)
    return own[:, :, column].clone()


def alone(shape: Shape, speaker: Voice, fp32: bool, frames: int) -> list[Tensor]:
    """What a voice leaves that is alone in its FrameStep, in the smallest instance, in one launch a frame."""
    step = kernel_step(shape, 1, 1, 640, fp32=fp32)
    speaker.join(step, 0)
    codes = speak(step, {0: speaker}, [[0]] * frames)[0]
    return [codes, *state(step, 0), predictor_state(step, 4, 0)]


@pytest.mark.parametrize("fp32", [True, False], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "width", "batch"),
    [
        ("plain", 4, 3),
        ("plain", 8, 7),
        ("plain", 16, 9),
        ("plain", 32, 11),
        pytest.param("projected", 16, 9, marks=pytest.mark.slow),
        pytest.param("wide", 16, 9, marks=pytest.mark.slow),
    ],
)
def test_a_voice_has_the_same_bits_alone_and_in_any_company(shape: str, width: int, batch: int, fp32: bool) -> None:
    """In every instance and with both launchers, in any row and column, whatever lies around."""
    sizes, frames = SHAPES[shape], 3
    dtype = torch.float32 if fp32 else torch.bfloat16
    company = [voice(sizes, 20 + i, (0, 0, 150)[i % 3], dtype) for i in range(batch)]
    expected = [alone(sizes, speaker, fp32, frames) for speaker in company]
    choose = random.Random(width)
    for phases, noise in ((False, "nan"), (True, "large")):
        step = kernel_step(sizes, 16, width, 640, noise=noise, fp32=fp32, phases=phases)
        rows = choose.sample(range(16), batch)
        step.width, step.at = width, choose.sample(range(width), batch)
        voices = dict(zip(rows, company, strict=True))
        for row, speaker in voices.items():
            speaker.join(step, row)
        codes = speak(step, voices, [rows] * frames)
        for row, column, bits in zip(rows, step.at, expected, strict=True):
            found = [codes[row], *state(step, row), predictor_state(step, width, column)]
            for a, b in zip(found, bits, strict=True):
                assert torch.equal(a, b)


def test_a_row_that_is_not_named_is_not_written() -> None:
    step = kernel_step(PLAIN, noise="large")
    for row in range(3):
        voice(PLAIN, row).join(step, row)
    before = [x.clone() for x in (step.kv[:, :, [0, 2, 3]], step.pending[[0, 2, 3]], step.history[[0, 2, 3]])]
    speak(step, {1: voice(PLAIN, 1)}, [[1]] * 3)
    after = (step.kv[:, :, [0, 2, 3]], step.pending[[0, 2, 3]], step.history[[0, 2, 3]])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("voices", "seeds"),
    [(3, range(4)), pytest.param(32, range(20), marks=pytest.mark.slow)],
    ids=["3 voices, 4 orders", "32 voices, 20 orders"],
)
def test_the_order_in_which_blocks_run_changes_no_bit(voices: int, seeds: range) -> None:
    together = {row: voice(PLAIN, row, (0, 90, 0)[row % 3]) for row in range(voices)}
    plan = plan_for(list(together), frames=3)

    def bits(order: int | None) -> list[Tensor]:
        step = kernel_step(PLAIN, voices, voices, 200, noise="nan", seed=order)
        for row, speaker in together.items():
            speaker.join(step, row)
        codes = speak(step, together, plan)
        return [x for row in together for x in (codes[row], *state(step, row))]

    expected = bits(None)
    for seed in seeds:
        assert all(torch.equal(a, b) for a, b in zip(bits(seed), expected, strict=True)), f"seed {seed}"


# -- bf16 --------------------------------------------------------------------------------------------------------------


def first_heads(step: TorchFrameStep, rows: list[int], text: Tensor, code0: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of code 0 [n, V], and of code 1 [n, K] after a code 0 that is given."""
    w = step.weights
    hidden = step._talker(rows, [step.live[row] for row in rows], step.pending[rows] + text)
    past = hidden if w.projection is None else reference.linear(hidden, *w.projection)
    out = step._predictor_pass(torch.stack([past, w.inputs[0][code0]], 1), 0)
    return reference.linear(hidden, w.codec_head), reference.linear(out, w.heads[0])


def first_heads_by_kernels(step: DisturbedStep, rows: list[int], text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of code 0 and of code 1, and the code 0 between them: the frame cut off behind either head."""
    frame, found = schedule.frame(step.shape), []
    for code in (0, 1):
        end = next(i for i, phase in enumerate(frame) if phase.op is Op.HEAD and phase.code == code)
        step._tables["frame"] = torch.tensor(list(schedule.words(frame[: end + 1])), dtype=torch.int32)
        drawn = step.step(rows, text)[:, 0]
        for row in rows:
            step._voices[row].position -= 1
        found.append(step._scratch["logits"][: len(rows)].clone())
    return found[0], found[1][:, : step.shape.codes], drawn


def assert_logits_are_as_good_as_torch(shape: Shape, batch: int, positions: int, **launcher) -> None:
    """The kernels' error against float64 is at most twice torch's own in bf16, at code 0 and at code 1."""
    weights = weights_of(shape, torch.bfloat16)
    step = kernel_step(shape, batch, batch, 256, noise="nan", fp32=False, **launcher)
    voices = [voice(shape, i, positions * (i % 2), torch.bfloat16) for i in range(batch)]
    rows, text = list(range(batch)), torch.stack([speaker.text[0] for speaker in voices])
    for row, speaker in enumerate(voices):
        speaker.join(step, row)
    *fast, code0 = first_heads_by_kernels(step, rows, text)
    others = []
    for dtype in (torch.bfloat16, torch.float64):
        twin = TorchFrameStep(cast(weights, dtype), shape, batch, batch, 256)
        for row, speaker in enumerate(voices):
            speaker.to(dtype).join(twin, row)
        others.append(first_heads(twin, rows, text.to(dtype), code0))
    for ours, torch_bf16, oracle in zip(fast, *others, strict=True):
        assert_as_good_as(ours, torch_bf16, oracle)


@LAUNCHERS
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_logits_are_as_good_as_those_of_torch(shape: str, phases: bool) -> None:
    assert_logits_are_as_good_as_torch(SHAPES[shape], 12, 150, phases=phases)


def one_layer(hidden: int, intermediate: int, projected: bool) -> Shape:
    """A published geometry with one layer a stack and two codebooks."""
    talker = StackShape(1, hidden, intermediate, 16, 8, 128)
    return Shape(talker, StackShape(1, 1024, 3072, 16, 8, 128), 2, 2048, 3072, 2150, projected)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(one_layer(1024, 3072, projected=False), id="0.6b"),
        pytest.param(one_layer(2048, 6144, projected=True), id="1.7b", marks=pytest.mark.slow),
    ],
)
def test_a_layer_of_a_published_geometry_is_as_good_as_torch(shape: Shape) -> None:
    assert_logits_are_as_good_as_torch(shape, 3, 100, blocks=6, threads=256, staged_bytes=65536)


def test_bf16_rounds_to_the_nearest_and_ties_to_even() -> None:
    """Values go from fp32 into the keys and values by the attention phase; here it runs alone."""
    step = kernel_step(PLAIN, fp32=False)
    step._tables["frame"] = torch.tensor([Phase(Op.ATTENTION, Part.TALKER, 0, 0).word], dtype=torch.int32)
    talker = PLAIN.talker
    bits = torch.randint(0x3E000000, 0x42000000, (64,), generator=torch.Generator().manual_seed(0))
    bits[:48] = bits[:48] // 0x10000 * 0x10000 + torch.tensor([0x7FFF, 0x8000, 0x8001]).repeat(16)
    values = bits.to(torch.int32).view(torch.float32) * torch.tensor([1.0, -1.0]).repeat(32)
    raw = step._scratch["raw"].flatten()[: talker.q_size + 2 * talker.kv_size]
    raw.fill_(1.0)
    raw[-talker.kv_size :] = values
    step.admit(2, torch.zeros(64, dtype=torch.bfloat16), 0, Sampling())
    step.step([2], torch.zeros(1, 64, dtype=torch.bfloat16))
    assert torch.equal(step.kv[0, 1, 2, :, 0].flatten(), values.bfloat16())


# -- prefill -----------------------------------------------------------------------------------------------------------


@LAUNCHERS
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_leaves_the_keys_and_values_of_the_twin(shape: str, phases: bool) -> None:
    sizes = SHAPES[shape]
    step = kernel_step(sizes, 3, 1, 150, noise="nan", phases=phases)
    twin = twin_step(sizes, 3, 1, 150)
    prompt = torch.randn(150, sizes.talker.hidden, generator=torch.Generator().manual_seed(0))
    for each in (step, twin):
        each.admit(1, prompt[0], 0, Sampling())
    for piece in prompt.split([16, 16, 1, 16, 16, 5, 16, 16, 16, 16, 16]):
        step.prefill(1, piece)
        twin.prefill(1, piece)
        known = step.position(1)
        torch.testing.assert_close(step.kv[:, :, 1, :, :known], twin.kv[:, :, 1, :, :known], rtol=0, atol=1e-4)
        assert step.kv[:, :, 1, :, known:].isnan().all()
    assert step.kv[:, :, [0, 2]].isnan().all()


@LAUNCHERS
def test_a_saved_prefix_gives_the_same_bits_as_its_prefill(phases: bool) -> None:
    step = kernel_step(PLAIN, 4, 4, 128, noise="large", phases=phases)
    first = voice(PLAIN, 4, 70)
    first.join(step, 0)
    prefix = step.save_prefix(0)
    step.admit(3, first.pending, first.seed, first.sampling)
    step.load_prefix(3, prefix)
    codes = speak(step, {0: first, 3: first}, [[0, 3]] * 4)
    assert torch.equal(codes[0], codes[3])
    assert all(torch.equal(a, b) for a, b in zip(state(step, 0), state(step, 3), strict=True))


# -- sampling ----------------------------------------------------------------------------------------------------------


@dataclass
class Draws:
    """Columns of logits with what is to be drawn from them: one SAMPLE phase, and the rule of megakernel.sampler."""

    logits: Tensor
    sampling: list[Sampling]
    frames: list[int]
    spoken: list[set[int]]
    seeds: list[int]

    def by_kernel(self, code: int, uniforms: Tensor | None) -> Tensor:
        n = len(self.logits)
        step = kernel_step(PLAIN, n, n)
        part = Part.PREDICTOR if code else Part.TALKER
        step._tables["frame"] = torch.tensor([Phase(Op.SAMPLE, part, 0, code).word], dtype=torch.int32)
        if uniforms is not None:
            given = torch.full((n, PLAIN.codebooks), float("nan"))
            given[:, code] = uniforms
            step.uniforms = given
        step._scratch["logits"][:n, : self.logits.shape[1]] = self.logits
        for row in range(n):
            step.admit(row, torch.zeros(PLAIN.talker.hidden), self.seeds[row], self.sampling[row])
            step._voices[row].frame = self.frames[row]
            for token in self.spoken[row]:
                step.history[row, token // 32] |= torch.tensor(1 << token % 32, dtype=torch.int64).to(torch.int32)
        drawn = step.step(list(range(n)), torch.zeros(n, PLAIN.talker.hidden))[:, code]
        if code == 0:
            known = [self.spoken[row] | {int(drawn[row])} for row in range(n)]
            assert [spoken_ids(step.history[row]) for row in range(n)] == known
        return drawn

    def by_rule(self, code: int, uniforms: Tensor | None) -> Tensor:
        n, s = len(self.logits), self.sampling
        if uniforms is None:
            uniforms = sampler.uniforms(torch.tensor(self.seeds), torch.tensor(self.frames), code + 1)[:, code]
        if code:
            rest = [(x.predictor_do_sample, x.predictor_temperature, x.predictor_top_k, x.predictor_top_p) for x in s]
            return sampler.pick(self.logits, sampler.knobs(rest, PLAIN.codes, CPU), uniforms)
        history = torch.zeros(n, PLAIN.vocab, dtype=torch.bool)
        for row, tokens in enumerate(self.spoken):
            history[row, list(tokens)] = True
        penalty = torch.tensor([x.repetition_penalty for x in s])
        early = torch.tensor([frame < 2 for frame in self.frames])
        logits = sampler.restrict(self.logits.clone(), history, penalty, early, EOS, PLAIN.suppress_from)
        first = [(x.do_sample, x.temperature, x.top_k, x.top_p) for x in s]
        return sampler.pick(logits, sampler.knobs(first, PLAIN.vocab, CPU), uniforms)


def spoken_ids(words: Tensor) -> set[int]:
    return {32 * i + bit for i, word in enumerate(words.tolist()) for bit in range(32) if word >> bit & 1}


def draws(logits: Tensor, sampling: Sampling, frame: int = 5, spoken_before: set[int] | None = None) -> Draws:
    n = len(logits)
    return Draws(logits, [sampling] * n, [frame] * n, [set(spoken_before or ())] * n, list(range(n)))


def evenly(n: int) -> Tensor:
    """Random numbers from 0 to almost 1."""
    return torch.linspace(0, 0.9999, n)


def sizes_of(code: int) -> int:
    return PLAIN.codes if code else PLAIN.vocab


def random_logits(code: int, n: int = 32, seed: int = 0) -> Tensor:
    return 3 * torch.randn(n, sizes_of(code), generator=torch.Generator().manual_seed(seed))


def assert_drawn_by_the_rule(case: Draws, code: int, uniforms: Tensor | None = None) -> Tensor:
    drawn = case.by_kernel(code, uniforms)
    assert torch.equal(drawn, case.by_rule(code, uniforms))
    return drawn


KNOBS = [
    pytest.param((False, 1.0, 0, 1.0), id="greedy"),
    pytest.param((True, 1.0, 0, 1.0), id="all"),
    pytest.param((True, 0.3, 0, 1.0), id="cold"),
    pytest.param((True, 1.7, 5, 1.0), id="top-5"),
    pytest.param((True, 0.9, 1, 1.0), id="top-1"),
    pytest.param((True, 0.9, 100_000, 1.0), id="top-more-than-there-are"),
    pytest.param((True, 1.0, 0, 0.8), id="top-p"),
    pytest.param((True, 1.0, 0, 0.01), id="top-p-of-one"),
    pytest.param((True, 1.0, 0, 1e-9), id="top-p-of-nothing"),
    pytest.param((True, 1.0, 0, 0.9999), id="top-p-of-almost-all"),
    pytest.param((True, 0.9, 7, 0.5), id="both"),
]


def sampling_for(code: int, knobs: tuple[bool, float, int, float], penalty: float = 1.0) -> Sampling:
    """The knobs for one head, and other ones for the other."""
    other = (not knobs[0], 0.5, 3, 0.7)
    first, rest = (other, knobs) if code else (knobs, other)
    return Sampling(*first, penalty, *rest)


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("knobs", KNOBS)
def test_a_code_is_drawn_by_the_rule(knobs: tuple[bool, float, int, float], code: int) -> None:
    sampling = sampling_for(code, knobs)
    assert_drawn_by_the_rule(draws(random_logits(code), sampling), code)
    same = random_logits(code, 1, seed=1).expand(32, -1)
    assert_drawn_by_the_rule(draws(same, sampling), code, evenly(32))


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("knobs", KNOBS)
def test_logits_that_are_exactly_equal_are_treated_alike(knobs: tuple[bool, float, int, float], code: int) -> None:
    generator = torch.Generator().manual_seed(2)
    few = torch.randint(-2, 3, (1, sizes_of(code)), generator=generator).float()
    for logits in (few, torch.zeros(1, sizes_of(code)), -few.abs()):
        case = draws(logits.expand(32, -1), sampling_for(code, knobs), frame=1)
        assert_drawn_by_the_rule(case, code, evenly(32))


def test_of_equal_logits_top_k_keeps_all_and_top_p_drops_the_first() -> None:
    flat = torch.zeros(32, CODES)
    every = assert_drawn_by_the_rule(draws(flat, sampling_for(1, (True, 1.0, 1, 1.0))), 1, evenly(32))
    assert (every.min(), every.max()) == (0, CODES - 1)
    half = assert_drawn_by_the_rule(draws(flat, sampling_for(1, (True, 1.0, 0, 0.5))), 1, evenly(32))
    assert (half.min(), half.max()) == (CODES // 2, CODES - 1)


def test_a_random_number_between_two_codes_draws_the_upper_one() -> None:
    flat = torch.zeros(32, CODES)
    drawn = assert_drawn_by_the_rule(draws(flat, sampling_for(1, (True, 1.0, 0, 1.0))), 1, torch.arange(32) / 32)
    assert drawn.tolist() == list(range(0, 64, 2))


def test_no_random_number_draws_an_impossible_code() -> None:
    case = draws(torch.full((32, CODES), float("-inf")), sampling_for(1, (True, 1.0, 0, 1.0)))
    case.logits[:, [7, 41]] = 1.0
    ends = torch.tensor([0.0, 1 - 2.0**-24]).repeat(16)
    assert assert_drawn_by_the_rule(case, 1, ends).tolist() == [7, 41] * 16


def test_no_rounding_of_the_partial_sums_lets_an_impossible_code_win() -> None:
    for seed in range(12):
        logits = random_logits(2, 1, seed)[0]
        logits[torch.randperm(CODES, generator=torch.Generator().manual_seed(seed))[:40]] = float("-inf")
        edges = logits.double().softmax(-1).cumsum(-1).float()[logits.isfinite()]
        near = [edges, edges.nextafter(torch.zeros(())), edges.nextafter(torch.ones(())), edges + 6e-8, edges - 6e-8]
        uniforms = torch.cat(near).clamp(0, 1 - 2.0**-24)
        for some in uniforms[: len(uniforms) // 32 * 32].split(32):
            drawn = draws(logits.expand(32, -1), sampling_for(2, (True, 1.0, 0, 1.0))).by_kernel(2, some)
            assert logits[drawn].isfinite().all()


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.5])
def test_repetition_is_punished_once_for_each_id_spoken(penalty: float, do_sample: bool) -> None:
    case = draws(random_logits(0, seed=3), sampling_for(0, (do_sample, 0.9, 0, 1.0), penalty))
    choose = random.Random(0)
    case.spoken = [{*choose.sample(range(CODES), 20), *([EOS] if i % 2 else [])} for i in range(32)]
    punished = assert_drawn_by_the_rule(case, 0)
    case.spoken = [set() for _ in range(32)]
    assert torch.equal(punished, case.by_rule(0, None)) == (penalty == 1.0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_speech_does_not_end_in_its_first_two_frames_and_control_ids_are_never_spoken(do_sample: bool) -> None:
    logits = random_logits(0, seed=4)
    logits[:, CODES:] += 20
    logits[:, EOS] += 40
    case = draws(logits, sampling_for(0, (do_sample, 1.0, 0, 1.0)))
    case.frames = [i // 4 for i in range(32)]
    drawn = assert_drawn_by_the_rule(case, 0)
    assert (drawn[:8] < CODES).all()
    assert (drawn[8:] == EOS).all()


@LAUNCHERS
def test_a_voice_that_said_eos_says_nothing_else_until_it_is_admitted_again(phases: bool) -> None:
    step = kernel_step(PLAIN, phases=phases)
    step._tables["frame"] = torch.tensor([Phase(Op.SAMPLE, Part.TALKER, 0, 0).word], dtype=torch.int32)
    said = []
    for row in (1, 3):
        step.admit(row, torch.zeros(64), 0, sampling_for(0, (False, 1.0, 0, 1.0)))
        step._voices[row].frame = 2
    for likeliest in ([7, 7], [EOS, 9], [11, 11]):
        step._scratch["logits"].zero_()
        step._scratch["logits"][[0, 1], likeliest] = 9.0
        said.append(step.step([1, 3], torch.zeros(2, 64))[:, 0].tolist())
    assert said == [[7, 7], [EOS, 9], [EOS, 11]]
    step.admit(1, torch.zeros(64), 0, sampling_for(0, (False, 1.0, 0, 1.0)))
    assert step.step([1], torch.zeros(1, 64))[0, 0] == 11


def test_random_numbers_are_those_of_large_seeds_and_frames() -> None:
    for code in (0, 3):
        case = draws(torch.zeros(32, sizes_of(code)), sampling_for(code, (True, 1.0, 0, 1.0)))
        case.seeds = [2**63 - 1 - i * 2**58 for i in range(32)]
        case.frames = [2 + 2**i for i in range(31)] + [2]
        assert assert_drawn_by_the_rule(case, code).unique().numel() > 15


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_no_numbers_hurt_nobody_else(do_sample: bool) -> None:
    for code in (0, 2):
        logits = random_logits(code, 4)
        logits[1] = float("nan")
        logits[2] = float("-inf")
        case = draws(logits, sampling_for(code, (do_sample, 0.9, 20, 0.9)))
        drawn, expected = case.by_kernel(code, None), case.by_rule(code, None)
        assert torch.equal(drawn[[0, 3]], expected[[0, 3]])
        assert (drawn >= 0).all()
        assert (drawn < sizes_of(code)).all()


# -- a voice that people hear ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
def test_the_embedded_voice_says_through_the_kernels_what_it_says_through_the_twin(
    embedded: LocalBackend, monkeypatch: pytest.MonkeyPatch, greedy: bool
) -> None:
    monkeypatch.setattr(
        "pipecat_qwen3.local.choose",
        lambda _name, _device, _dtype, shape, _batch: Choice("persistent", "a test", CpuLauncher(shape)),
    )
    kernels = LocalBackend.open("embedded", device="cpu", dtype="fp32", max_batch=4, positions=256)
    said = []
    for backend in (embedded, kernels):
        step, codes = backend.engine.step, []
        monkeypatch.setattr(step, "step", recorder(step, codes))
        stream = backend.speak(Request(text="Good morning.", seed=5, greedy=greedy, ahead_s=None))
        pcm = [chunk.pcm for chunk in stream]
        said.append((torch.cat(codes), torch.cat([torch.from_numpy(x) for x in pcm]), stream.wait(timeout=1).end))
    kernels.close()
    assert said[0][2] == said[1][2] == "eos"
    assert torch.equal(spoken(said[0][0], embedded.config.shape.eos), spoken(said[1][0], embedded.config.shape.eos))
    assert torch.equal(said[0][1], said[1][1])


def recorder(step: FrameStep, codes: list[Tensor]) -> Callable[[Sequence[int], Tensor], Tensor]:
    """`step.step`, which also keeps what it returns."""
    inner = step.step

    def advance(rows: Sequence[int], text: Tensor) -> Tensor:
        codes.append(inner(rows, text).clone())
        return codes[-1]

    return advance


# -- refusals and reports ----------------------------------------------------------------------------------------------


def test_misuse_is_named_before_anything_is_launched() -> None:
    step = kernel_step(PLAIN, positions=48)
    speaker = voice(PLAIN, 0)
    speaker.join(step, 0)
    before = step._arrived
    with pytest.raises(ValueError, match="1 to 16 positions a call, but got 17"):
        step.prefill(0, torch.zeros(17, 64))
    with pytest.raises(ValueError, match="1 to 4 voices, but 5 were named"):
        step.step([0] * 5, torch.zeros(5, 64))
    step._voices[0].position = 40
    with pytest.raises(ValueError, match="row 0 holds 48 positions: 40 are used and 9 more were asked for"):
        step.prefill(0, torch.zeros(9, 64))
    step._voices[0].position = 48
    with pytest.raises(ValueError, match=r"rows \[0\] hold 48 positions and are full"):
        step.step([0], torch.zeros(1, 64))
    step._voices[0].position = 0
    with pytest.raises(ValueError, match=r"text should be \[1, 64\] in float32 on cpu, but is \[2, 64\]"):
        step.step([0], torch.zeros(2, 64))
    with pytest.raises(ValueError, match=r"embeds should be .* float32 on cpu, but is .* bfloat16"):
        step.prefill(0, torch.zeros(3, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"text should be .* float32 on cpu, but is .* on meta"):
        step.step([0], torch.zeros(1, 64, device="meta"))
    with pytest.raises(ValueError, match=r"pending should be \[64\]"):
        step.admit(1, torch.zeros(3), 0, Sampling())
    with pytest.raises(ValueError, match=r"a row should be one of 0\.\.3, but is -1"):
        step.admit(-1, torch.zeros(64), 0, Sampling())
    with pytest.raises(ValueError, match=r"a step names a row once, but got rows \[0, 0\]"):
        step.step([0, 0], torch.zeros(2, 64))
    with pytest.raises(ValueError, match="row 2 holds no voice; admit one first"):
        step.step([2], torch.zeros(1, 64))
    with pytest.raises(ValueError, match=r"prefix should be \[2, 2, 2, 48, 32\] .*, but is \[2, 2, 2, 49, 32\]"):
        step.load_prefix(0, torch.zeros(2, 2, 2, 49, 32))
    assert step._arrived == before


def test_tensors_with_gaps_are_read_as_what_they_hold() -> None:
    said = []
    for gaps in (1, 3):
        step, speaker = kernel_step(PLAIN), voice(PLAIN, 1)
        spread = {name: getattr(speaker, name).repeat_interleave(gaps, -1)[..., ::gaps] for name in ("prompt", "text")}
        speaker = replace(speaker, pending=speaker.pending.repeat_interleave(gaps)[::gaps], **spread)
        assert speaker.text.is_contiguous() == (gaps == 1)
        speaker.join(step, 0)
        said.append(speak(step, {0: speaker}, [[0]] * 2)[0])
    assert torch.equal(*said)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"talker": torch.zeros(7)},
            r"talker of the packed weights should be \d+ values in float32 on cpu, but is 7 in",
        ),
        ({"heads": torch.zeros(3, 64, 128)[..., ::2]}, "heads of .* but is 12288 in float32 on cpu, with gaps"),
        (
            {"codec_head": torch.zeros(1088 * 64).bfloat16()},
            "codec_head of .* in float32 on cpu, but is .* in bfloat16",
        ),
        ({"inputs": torch.zeros(3, 64, 64, device="meta")}, "inputs of .* on cpu, but is 12288 in float32 on meta"),
        ({"predictor_norms": torch.zeros(320).bfloat16()}, "predictor_norms of .* float32 on cpu, but is .* bfloat16"),
        ({"projection": (torch.zeros(4096), torch.zeros(64))}, "projection of .* should be 0 values .* but is 4096"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_that_are_not_the_model_s_are_refused_by_name(change: dict, why: str) -> None:
    packed = replace(packed_weights(PLAIN, torch.float32), **change)
    with pytest.raises(ValueError, match=why):
        KernelFrameStep(packed, PLAIN, 4, 4, 64, CpuLauncher(PLAIN))


def test_weights_without_the_projection_that_the_model_has_are_refused() -> None:
    packed = replace(packed_weights(PROJECTED, torch.float32), projection=None)
    with pytest.raises(ValueError, match="should have a projection of 8192 values, but have none"):
        KernelFrameStep(packed, PROJECTED, 4, 4, 64, CpuLauncher(PROJECTED))


def test_a_launcher_of_another_model_or_for_fewer_voices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the launcher was made for Shape.*, but the model is Shape"):
        KernelFrameStep(packed_weights(PLAIN, torch.float32), PLAIN, 4, 4, 64, CpuLauncher(WIDE))
    with pytest.raises(ValueError, match="made for at most 32 voices at once, but 33 are wanted"):
        KernelFrameStep(packed_weights(PLAIN, torch.float32), PLAIN, 40, 33, 64, CpuLauncher(PLAIN))


@LAUNCHERS
def test_warming_launches_every_kernel_once_and_touches_no_row(phases: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step, launched = kernel_step(PLAIN, columns=6, phases=phases, noise="large"), []
    launch = step.launcher.launch
    monkeypatch.setattr(step.launcher, "launch", lambda *what: (launched.append(what[:2]), launch(*what)))
    before = [tensor.clone() for tensor in (step.kv, step.pending, step.history, step.done)]
    step.warm()
    assert launched == [("frame", 4), ("frame", 8), ("prefill", 16)]
    assert all(map(torch.equal, before, (step.kv, step.pending, step.history, step.done)))


@pytest.mark.parametrize("enqueued", [False, True])
def test_a_launch_that_is_broken_off_does_not_loosen_the_barrier(
    enqueued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker, said = voice(PLAIN, 1), []
    for broken in (False, True):
        step = kernel_step(PLAIN)
        speaker.join(step, 0)
        if broken:
            launch = step.launcher.launch

            def interrupted(*what: Any, launch: Any = launch) -> None:
                if enqueued:
                    launch(*what)
                raise KeyboardInterrupt

            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(step.launcher, "launch", interrupted)
                step.step([0], speaker.text[:1])
            speaker.join(step, 0)
        said.append(speak(step, {0: speaker}, [[0]] * 2)[0])
    assert torch.equal(*said)


@pytest.mark.parametrize("report", [[0, 0, 0, 0], [3, 7, -5, 2]])
def test_a_gpu_that_has_failed_is_told_in_one_line(report: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    step = kernel_step(PLAIN)
    step.admit(0, torch.zeros(64), 0, Sampling())

    def failed(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")

    monkeypatch.setattr(step, "_check", failed)  # the first call that reaches the GPU
    step.report[:] = torch.tensor(report)
    lost = "a kernel that ran before has failed, and this process cannot use the GPU any more; restart it"
    with pytest.raises(CudaError) as told:
        step.step([0], torch.zeros(1, 64))
    if report[0]:
        assert str(told.value) == f"block 2 waited in vain before phase 7: {2**32 - 5} arrivals, wanted 2; {lost}"
    else:
        assert str(told.value) == f"step: CUDA error: unspecified launch failure; {lost}"


def test_too_few_resident_blocks_are_reported_and_do_not_hang() -> None:
    step = kernel_step(PLAIN)
    step.launcher.resident = 3  # type: ignore[attr-defined]
    step.patience = 10**12
    step.admit(0, torch.zeros(64), 0, Sampling())
    with pytest.raises(cucpu.Deadlock) as caught:
        step.step([0], torch.zeros(1, 64))
    assert "block 3: NOT RESIDENT (never started)" in str(caught.value)
    assert re.search(r"block 0 threads 0: \S+frame\.cu:\d+ \(spinning\)", str(caught.value))


def test_a_barrier_that_has_lost_its_patience_says_where_it_waited_for_whom() -> None:
    step = kernel_step(PLAIN)
    step.admit(0, torch.zeros(64), 0, Sampling())
    speak(step, {0: voice(PLAIN, 0)}, [[0]])
    before = step._arrived or 0
    step.launcher.resident = 3  # type: ignore[attr-defined]
    with pytest.raises(cucpu.Trapped, match="the grid barrier timed out"):
        step.step([0], torch.zeros(1, 64))
    block, phase, seen, wanted = step.report.tolist()
    assert 1 <= block <= 3
    assert phase == 1
    assert (seen, wanted) == (before + 3, before + 4)
    with pytest.raises(RuntimeError, match=f"block {block - 1} waited in vain before phase 1: {seen} arrivals"):
        step.step([0], torch.zeros(1, 64))


@LAUNCHERS
def test_the_barrier_s_counter_may_wrap_around(phases: bool) -> None:
    speaker = voice(PLAIN, 1)
    codes = []
    for arrived in (0, 2**32 - 7, 2**31 - 7):
        step = kernel_step(PLAIN, phases=phases)
        step._arrived = arrived
        step._scratch["barrier"][0] = arrived - 2**32 if arrived >= 2**31 else arrived
        speaker.join(step, 0)
        codes.append(speak(step, {0: speaker}, [[0]] * 2)[0])
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"vocab": 1080}, "codec vocabulary that is a multiple of 16, but the model's is 1080"),
        ({"codes": 60}, "codebook that is a multiple of 16, but the model's is 60"),
        ({"talker": replace(PLAIN.talker, hidden=72)}, "hidden size that is a multiple of 16, but the model's is 72"),
        ({"predictor": replace(PLAIN.predictor, intermediate=8)}, "intermediate size .* the model's is 8"),
        ({"predictor": replace(PLAIN.predictor, head_dim=64)}, "one head_dim of .* they have 32 and 64"),
        ({"talker": replace(PLAIN.talker, norm_eps=1e-5)}, "one rms_norm_eps"),
    ],
)
def test_a_model_that_the_kernels_cannot_run_is_named(change: dict, why: str) -> None:
    assert re.search(why, unfit(replace(PLAIN, **change)) or "")


def test_models_that_the_kernels_can_run_are_taken() -> None:
    assert [unfit(shape) for shape in (*SHAPES.values(), one_layer(2048, 6144, projected=True))] == [None] * 4
