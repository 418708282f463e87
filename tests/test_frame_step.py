"""FrameStep on a host: a voice's keys, values and codes are the same bits in any company; rows do not mix."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megakernel.cpu_step import CpuFrameStep
from megakernel.frame_step import RowStep, TorchFrameStep
from megakernel.sampler import Sampling
from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.talker import decode_weights

MODELS = ["tiny", "tiny-projected", "embedded", "embedded-bf16"]


@pytest.fixture(scope="module", params=[f"{model} {step}" for model in MODELS for step in ("torch", "numba")])
def make_step(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Callable[[], RowStep]:
    model, kind = request.param.split()
    folder = "embedded" if model.startswith("embedded") else tiny("custom_voice", model)
    talker = Checkpoint.open(folder).load_talker(torch.bfloat16 if model.endswith("bf16") else torch.float32)
    weights, step = decode_weights(talker), TorchFrameStep if kind == "torch" else CpuFrameStep
    return lambda: step(weights, talker.config.shape, rows=32, columns=32, positions=64)


class Solo:
    """One voice: its prompt, its text, its sampling, and everything it produced."""

    def __init__(self, step: RowStep, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        hidden, dtype = step.shape.talker.hidden, step.pending.dtype
        self.seed = seed
        self.prefix = (torch.randn(9 + seed % 5, hidden, generator=g) * 0.2).to(dtype)
        self.text = (torch.randn(40, hidden, generator=g) * 0.2).to(dtype)
        self.pending = (torch.randn(hidden, generator=g) * 0.2).to(dtype)
        self.sampling = Sampling(
            seed % 3 > 0, 0.9, 50 if seed % 2 else 0, 0.8 if seed % 4 == 1 else 1.0, 1.05, seed % 5 > 0
        )
        self.codes: list[torch.Tensor] = []
        self.hidden: list[torch.Tensor] = []

    def join(self, step: RowStep, row: int) -> None:
        step.admit(row, self.pending, self.seed, self.sampling)
        step.prefill(row, self.prefix)


def advance(step: RowStep, voices: dict[int, Solo]) -> None:
    text = torch.stack([v.text[len(v.codes)] for v in voices.values()])
    codes = step.step(list(voices), text)
    for b, (row, voice) in enumerate(voices.items()):
        voice.codes.append(codes[b].clone())
        voice.hidden.append(step.kv[:, :, row, :, step.position(row) - 1].clone())


def test_codes_and_hidden_states_are_bitwise_the_same_in_any_company(make_step: Callable[[], RowStep]) -> None:
    alone = []
    for seed in range(12):
        step = make_step()
        solo = Solo(step, seed)
        solo.join(step, 0)
        for _ in range(10):
            advance(step, {0: solo})
        alone.append(solo)
    step = make_step()
    step.kv.normal_(std=100)  # what must not be read is noise
    vars(step)["predictor_kv"].normal_(std=100)
    choose = random.Random(0)
    together = [Solo(step, seed) for seed in range(12)]
    rows = dict(zip(choose.sample(range(32), 12), together, strict=True))
    waiting = list(rows.items())
    live: dict[int, Solo] = {}
    while waiting or live:
        for _ in range(choose.randint(0, 3)):
            if waiting:
                row, voice = waiting.pop()
                voice.join(step, row)
                live[row] = voice
        named = choose.sample(list(live), choose.randint(1, len(live))) if live else []
        if named:
            advance(step, {row: live[row] for row in named})
        for row in [row for row, v in live.items() if len(v.codes) == 10]:
            step.release(row)
            del live[row]
    for solo, voice in zip(alone, together, strict=True):
        assert torch.equal(torch.stack(solo.hidden), torch.stack(voice.hidden))
        assert torch.equal(torch.stack(solo.codes), torch.stack(voice.codes))


def test_a_row_that_is_not_named_is_neither_read_nor_written(make_step: Callable[[], RowStep]) -> None:
    step = make_step()
    for row in (2, 5):
        Solo(step, row).join(step, row)
    before = [x.clone() for x in (step.kv[:, :, 5], step.pending[5], step.history[5], step.done[5])]
    text = torch.zeros(1, step.shape.talker.hidden, dtype=step.pending.dtype)
    for _ in range(3):
        step.step([2], text)
    after = (step.kv[:, :, 5], step.pending[5], step.history[5], step.done[5])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert step.position(5) == Solo(step, 5).prefix.shape[0]


def test_a_saved_prefix_gives_the_same_bits_as_its_prefill(make_step: Callable[[], RowStep]) -> None:
    step = make_step()
    first, second = Solo(step, 4), Solo(step, 4)
    first.join(step, 0)
    prefix = step.save_prefix(0)
    step.admit(9, second.pending, second.seed, second.sampling)
    step.load_prefix(9, prefix)
    for _ in range(5):
        advance(step, {0: first, 9: second})
    assert torch.equal(torch.stack(first.codes), torch.stack(second.codes))
    assert torch.equal(torch.stack(first.hidden), torch.stack(second.hidden))


def test_a_voice_that_said_eos_says_nothing_else(make_step: Callable[[], RowStep]) -> None:
    step = make_step()
    voice = Solo(step, 1)
    voice.join(step, 0)
    step.done[0] = True
    advance(step, {0: voice})
    assert voice.codes[0][0] == step.shape.eos


def test_the_history_holds_what_was_spoken_and_is_forgotten_on_admission(
    make_step: Callable[[], RowStep],
) -> None:
    step = make_step()
    voice = Solo(step, 1)
    voice.join(step, 0)
    for _ in range(4):
        advance(step, {0: voice})
    assert set(step.history[0].nonzero()[:, 0].tolist()) == {int(c[0]) for c in voice.codes}
    voice.join(step, 0)
    assert not step.history[0].any()


def test_misuse_is_named(make_step: Callable[[], RowStep]) -> None:
    step = make_step()
    voice = Solo(step, 0)
    voice.join(step, 0)
    hidden = step.shape.talker.hidden
    with pytest.raises(ValueError, match="1 to 16 positions"):
        step.prefill(0, torch.zeros(17, hidden))
    for _ in range(3):
        step.prefill(0, torch.zeros(16, hidden, dtype=step.pending.dtype))
    with pytest.raises(ValueError, match="row 0 holds 64 positions"):
        step.prefill(0, torch.zeros(16, hidden, dtype=step.pending.dtype))
    step.live[0].position = 64
    with pytest.raises(ValueError, match=r"rows \[0\] hold 64 positions and are full"):
        step.step([0], torch.zeros(1, hidden, dtype=step.pending.dtype))
