"""Token ids in, text embeddings out, each a linear image of what its token sounds like plus a part of its own.

Takes the place of a talker's text embedding while it is trained (`compose`); `composed` gives back a table.
"""

import torch
from torch import Tensor, nn

from pipecat_qwen3.talker import Talker
from training.lexicon import Features

DROPOUT = 0.15
"""Share of the tokens of a batch that do without their own part: one that no speech was made of has none."""

RIDGE = 0.1
"""Weight of the squared directions when they are fitted to a table."""

NAME = "model.text_embedding."


class Composed(nn.Module):
    """Embeddings of V tokens, [V,W]: features times directions [features,W], plus own [V,W]."""

    def __init__(self, features: Features, table: Tensor) -> None:
        """Begin with a table [V,W]: directions as near to it as they come, and what is left as the tokens' own."""
        super().__init__()
        self.features = features
        known = features.dense().to(table)
        square = known.T @ known + RIDGE * torch.eye(features.count).to(table)
        self.directions = nn.Parameter(torch.linalg.solve(square, known.T @ table))
        self.own = nn.Parameter(table - known @ self.directions.detach())

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> [...,W]; while gradients are wanted, some tokens lack their own part."""
        tokens, places = ids.unique(return_inverse=True)  # sorted: tokens without a row of their own come last
        own = self.own[tokens[tokens < len(self.own)]]
        if torch.is_grad_enabled():
            own = own * (torch.rand(len(own), 1, device=ids.device) >= DROPOUT)
        own = nn.functional.pad(own, (0, 0, 0, len(tokens) - len(own)))
        return (self.features.embed(tokens, self.directions) + own)[places]


def compose(talker: Talker, features: Features) -> None:
    """Let a talker's text embeddings be composed from now on; a second time: of these features."""
    text = talker.model.text_embedding
    features = features.to(next(text.parameters()).device)
    if isinstance(text, Composed):
        text.features = features
    else:
        talker.model.text_embedding = Composed(features, text.weight.detach())  # type: ignore[assignment]


def composed(talker: Talker, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of such a talker under their official names; those of another as they are."""
    text = talker.model.text_embedding
    if not isinstance(text, Composed):
        return weights
    kept = {name: x for name, x in weights.items() if not name.startswith(NAME)}
    tokens = torch.arange(len(text.own), device=text.own.device)
    table = text.features.embed(tokens, weights[NAME + "directions"]) + weights[NAME + "own"]
    return kept | {NAME + "weight": table}
