"""The code predictor as a torch module with the official parameter names: for training, loading and export.

In go the talker's hidden state and the codes of a frame, out come logits of codes 1..C-1.
"""

import torch
from torch import Tensor, nn

from megakernel import reference
from megakernel.shape import Shape
from pipecat_qwen3.decoder_layer import DecoderLayer, Norm, stack_weights


class CodePredictorModel(nn.Module):
    """talker.code_predictor.model: one embedding table for each of codes 1..C-1, layers, final norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        # The tables have the talker's width: their rows are summed into the talker's next input.
        width = shape.talker.hidden
        self.codec_embedding = nn.ModuleList(nn.Embedding(shape.codes, width) for _ in range(shape.codebooks - 1))
        self.layers = nn.ModuleList(DecoderLayer(shape.predictor) for _ in range(shape.predictor.layers))
        self.norm = Norm(shape.predictor.hidden)


class CodePredictor(nn.Module):
    """The `talker.code_predictor.` tensors of a checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = CodePredictorModel(shape)
        self.lm_head = nn.ModuleList(
            nn.Linear(shape.predictor.hidden, shape.codes, bias=False) for _ in range(shape.codebooks - 1)
        )
        self.small_to_mtp_projection = (
            nn.Linear(shape.talker.hidden, shape.predictor.hidden) if shape.projected else nn.Identity()
        )

    def project(self, x: Tensor) -> Tensor:
        """Talker width -> predictor width: every input of the predictor passes here. x [..., H] -> [..., Hp]."""
        return self.small_to_mtp_projection(x)

    def forward(self, hidden: Tensor, first: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits for training.

        hidden [N,H] (after the talker's final norm), first [N,H] embedding of code 0, codes [N,C-1] int64
        -> [N,C-1,K]; row g-1 predicts code g. Code C-1 is never an input.
        """
        tables = self.model.codec_embedding
        later = [table(codes[:, g]) for g, table in enumerate(list(tables)[:-1])]
        x = self.project(torch.stack([hidden, first, *later], 1))
        weights = stack_weights(self.model.layers, self.model.norm, self.shape.predictor)
        out = reference.causal(x, weights, self.shape.predictor)
        return torch.stack([head(out[:, g + 1]) for g, head in enumerate(self.lm_head)], 1)
