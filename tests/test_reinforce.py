"""The judge hears what was said, the advantages follow its marks, and the talker follows the advantages."""

import argparse
import dataclasses
import random
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipecat_qwen3.backend import Layout
from pipecat_qwen3.checkpoint import Checkpoint
from tests.test_training import loss_of, utterance
from training.flite import PHONES
from training.judge import WORST, marks
from training.reinforce import Reinforcer, groups, policy_gain
from training.rollouts import Rollout, advantages
from training.rows import Batch, Choice, collate
from training.train_talker import shared_options

ROOT = Path(__file__).parents[1]

CAT, DOG = (bytes(PHONES.index(p) for p in word.split()) for word in ("k ae t", "d ao g"))


def heard(said: str, sure: float = 0.01) -> Tensor:
    """Log probabilities [N, 4, 41] of who hears exactly these phones, one every 20 ms."""
    slots = [PHONES.index(p) for p in said.split()]
    slots += [0] * (-len(slots) % 4)
    found = torch.full((len(slots), len(PHONES)), 1e-6)
    found[range(len(slots)), slots] = 1 - sure
    return found.log().view(-1, 4, len(PHONES))


def test_what_is_said_right_has_the_best_mark_at_any_speed() -> None:
    for said in ("pau k ae t d ao g pau", "k k ae ae ae t pau pau d ao ao g g g"):
        mark, _ = marks(heard(said), [CAT, DOG])
        assert mark == pytest.approx([0, 0], abs=0.05)


@pytest.mark.parametrize(
    ("said", "first", "second"),
    [
        ("pau k ae p d ao g pau", WORST / 3, 0),  # another phone
        ("pau k ae t d ao pau pau", 0, WORST / 3),  # one that is missing
        ("k ae t d ao g s s s pau pau pau", 0, WORST),  # more than the word
        ("s s k ae t pau d ao g pau pau pau", -1.12, 0),  # something before it, heard as part of its first phone
        ("k ae t pau pau pau pau pau", 0, WORST),  # cut short
    ],
)
def test_a_mistake_costs_the_word_that_it_is_in(said: str, first: float, second: float) -> None:
    mark, _ = marks(heard(said), [CAT, DOG])
    assert mark == pytest.approx([first, second], abs=0.06)


def test_frames_belong_to_the_words_that_they_say() -> None:
    said = "pau k k k ae ae ae ae t t pau pau pau d d d ao ao g g g pau pau pau"
    _, word_of = marks(heard(said), [CAT, DOG])
    assert word_of.tolist() == [0, 0, 0, 1, 1, 1]


def test_what_it_learns_from_is_brought_to_its_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint, books = Checkpoint.open("embedded"), ROOT / "training" / "embedded_codebooks.pt"
    command = [str(tmp_path), str(tmp_path), "--run", str(tmp_path), "--codebooks", str(books), "--device", "cpu"]
    options = shared_options(argparse.ArgumentParser()).parse_args(command)
    options.__dict__ |= {"base": "embedded", "lr": 1e-3, "steps": 9, "warm": 1, "hold": 0.5, "weight": 1.0}
    trainer = Reinforcer(options)
    trainer.begin_round()
    here = collate(checkpoint.config, [Choice(utterance(checkpoint), "whole", False)])
    monkeypatch.setattr(Batch, "to", lambda _, device: {trainer.device: here}[device])
    advantages = types.SimpleNamespace(to=lambda device: torch.ones(31, device=device))
    elsewhere = dataclasses.replace(here, **{name: x.to("meta") for name, x in vars(here).items()})
    found = trainer.reinforce(elsewhere, elsewhere, advantages)  # type: ignore[arg-type]
    assert found["gain"] == pytest.approx(1.0, abs=1e-3)
    assert trainer.step == 1


def test_a_frame_has_the_advantage_of_its_word_over_the_other_turns() -> None:
    marked = [(np.array([-0.2, -0.5]), np.array([0, 0, 1])), (np.array([-0.8, -0.5]), np.array([0, 1, 1, 1]))]
    better, worse = advantages(marked, np.zeros(2))
    torch.testing.assert_close(better, torch.tensor([1.0, 1.0, 0.0, 0.0]))  # one more: the end of speech
    torch.testing.assert_close(worse, torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0]))
    slow, quick = advantages(marked, np.array([0.2, -0.0]))
    torch.testing.assert_close(slow, torch.tensor([0.0, 0.0, -1.0, -1.0]))
    assert quick[0] == 0


def test_the_gradient_follows_the_advantage_until_a_probability_has_moved_enough() -> None:
    old = torch.zeros(5)
    new = torch.tensor([0.0, 0.0, 0.3, -0.3, -0.3], requires_grad=True)
    policy_gain(new, old, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])).backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None
    assert (new.grad.sign() == torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0])).all()


@pytest.mark.parametrize("layout", ["whole", "streaming"])
def test_code_0_is_judged_by_the_logits_that_it_was_drawn_from(layout: Layout) -> None:
    checkpoint = Checkpoint.open("embedded")
    loss = loss_of(checkpoint.load_talker(torch.float32))
    batch = collate(checkpoint.config, [Choice(utterance(checkpoint, n), layout, False) for n in (30, 20)])
    with torch.no_grad():
        logits = loss.code0_logits(batch)
        wanted = loss(batch, noise=False, guided=False, share=0.0)["code0"]
    torch.testing.assert_close(F.cross_entropy(logits, batch.label[batch.label >= 0]), wanted)
    assert len(logits) == 30 + 20 + 2


def test_a_batch_of_rollouts_keeps_every_one_and_its_size() -> None:
    checkpoint = Checkpoint.open("embedded")
    said = [
        Rollout(Choice(utterance(checkpoint, n), "whole", False), torch.zeros(n + 1), 0.0, 0.0) for n in range(10, 60)
    ]
    found = groups(said, 600, random.Random(0))
    assert sorted(len(r.advantages) for group in found for r in group) == list(range(11, 61))
    assert max(collate(checkpoint.config, [r.choice for r in group]).text.numel() for group in found) <= 600
