"""The critic hears what a distance forgives, the decoder feels it, and a trainer that goes on has the same critic."""

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training import critic
from training.features import MELS
from training.listener import Listener
from training.train_codec import LISTENED, Trainer, counted

EXPECTED = torch.zeros(2, 16, MELS)
"""What codes let expect of two pieces of two frames."""


def rough(some: torch.Generator) -> Tensor:
    return 0.1 * torch.randn(2, 3840, generator=some)


def smooth(some: torch.Generator) -> Tensor:
    """Waves as loud as `rough` ones whose spectra are flat: one click in every window."""
    clicks = torch.zeros(2, 3840)
    clicks[:, int(torch.randint(0, 60, (), generator=some)) :: 100] = 1.0
    return clicks


def test_smooth_spectra_are_told_from_rough_ones() -> None:
    some = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    judge = critic.Critic()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=critic.LEARNING_RATE)
    mistakes = torch.ones(())
    for _ in range(40):
        mistakes = judge.mistakes(critic.picture(smooth(some), EXPECTED), critic.picture(rough(some), EXPECTED))
        optimizer.zero_grad()
        mistakes.backward()
        optimizer.step()
    same = judge.mistakes(critic.picture(rough(some), EXPECTED), critic.picture(rough(some), EXPECTED))
    assert mistakes < 0.2 < 0.5 <= same


def test_silence_is_judged_with_finite_gradients() -> None:
    waves = torch.zeros(2, 3840, requires_grad=True)
    complaint, _ = critic.Critic().complaint(critic.picture(waves, EXPECTED), critic.picture(waves.detach(), EXPECTED))
    complaint.backward()
    assert waves.grad is not None
    assert waves.grad.isfinite().all()


def trainer(run: Path, weight: float, listeners: int = 1) -> Trainer:
    run.mkdir(exist_ok=True)
    ears = [run / f"listener{number}.pt" for number in range(listeners)]
    for path in ears:
        torch.save(Listener().state_dict(), path)
    said = {"base": "embedded", "init": None, "seed": 0, "device": "cpu", "compile": False, "critic": weight}
    schedule = {"lr": 1e-3, "steps": 10, "warm": 1, "hold": 0.5}
    return Trainer(argparse.Namespace(**said, **schedule, run=run, listener=ears))


def test_the_decoder_learns_otherwise_with_a_critic_which_a_later_run_takes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(critic, "WARM", 1)
    codes, waves = torch.randint(0, 512, (2, 8, 2)), rough(torch.Generator().manual_seed(0))
    learnt: list[Trainer] = []
    losses: dict[str, float] = {}
    for weight in (0.0, 1.0):
        one = trainer(tmp_path / str(weight), weight)
        for _ in range(3):
            losses = one.learn(codes, waves)
        one.save()
        learnt.append(one)
    assert losses["opinion"] > 0
    without, judged = (one.decoder.state_dict() for one in learnt)
    assert any(not torch.equal(x, judged[name]) for name, x in without.items())
    torch.testing.assert_close(trainer(tmp_path / "1.0", 1.0).critic.state_dict(), learnt[1].critic.state_dict())


def test_what_several_listeners_hear_is_their_mean(tmp_path: Path) -> None:
    learner, some = trainer(tmp_path, 0.0, listeners=2), torch.Generator().manual_seed(0)
    made, wanted = smooth(some), rough(some)
    together, apart = learner.heard(made, wanted), []
    for one in learner.listeners.copy():
        learner.listeners = [one]
        apart.append(learner.heard(made, wanted))
    assert apart[0] != apart[1]
    torch.testing.assert_close(together, (apart[0] + apart[1]) / 2)


@pytest.mark.parametrize(("apart", "pull"), [(0.8, 1.0), (1.0, 1.0), (2.0, 0.25), (10.0, 0.01)])
def test_listeners_who_hear_no_speech_say_little(apart: float, pull: float) -> None:
    heard = torch.tensor(apart, requires_grad=True)
    counted(heard).backward()
    torch.testing.assert_close(heard.grad, torch.tensor(LISTENED * pull))
