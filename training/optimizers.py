"""A talker and its auxiliary heads in, what moves their weights out: AdamW, or Muon for the hidden layers' matrices.

Muon (Jordan et al. 2024, as in `torch.optim`) makes a step's matrix orthogonal before it is taken; "match_rms_adamw"
(Liu et al. 2025) scales it so that AdamW's learning rate suits it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.95)


class Several:
    """Optimisers as one, each with parameters of its own."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all of them."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """Move all weights."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {str(number): part.state_dict() for number, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was; exits with one line if it was not of the same parts."""
        if state.keys() != {str(number) for number in range(len(self.parts))}:
            raise SystemExit("--muon was not the same when this run began; give it as then, or another --run")
        for number, part in enumerate(self.parts):
            part.load_state_dict(state[str(number)])


def optimizer(talker: nn.Module, heads: Iterable[nn.Parameter], lr: float, muon: bool) -> Several:
    """What trains a talker; with `muon` its matrices but embeddings and heads are Muon's."""
    matrices, hidden, others = [], [], list(heads)
    for name, parameter in talker.named_parameters():
        if parameter.dim() < 2 or "embedding" in name:
            others.append(parameter)
        else:
            (hidden if muon and "head" not in name else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
    if not muon:
        return Several(adam)
    return Several(adam, torch.optim.Muon(hidden, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"))
