"""The talker as a torch module with the official parameter names: for training, loading and export.

In go summed text and codec embeddings, out come hidden states and logits of code 0. It computes nothing itself: the
arithmetic is megakernel.reference, on weights stacked as the decode loop wants them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megakernel import reference
from megakernel.reference import FrameWeights, LayerWeights, StackWeights
from megakernel.shape import StackShape
from pipecat_qwen3.code_predictor import CodePredictor
from pipecat_qwen3.config import ModelConfig
from pipecat_qwen3.decoder_layer import DecoderLayer, Norm, stack_weights


class TalkerModel(nn.Module):
    """talker.model: embeddings, layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stack = config.shape.talker
        self.text_embedding = nn.Embedding(config.text_vocab, config.text_hidden)
        self.codec_embedding = nn.Embedding(config.shape.vocab, stack.hidden)
        self.layers = nn.ModuleList(DecoderLayer(stack) for _ in range(stack.layers))
        self.norm = Norm(stack.hidden)


class TextProjection(nn.Module):
    """talker.text_projection: fc1, SiLU, fc2, both with bias; text_hidden -> hidden."""

    def __init__(self, text_hidden: int, hidden: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(text_hidden, text_hidden)
        self.linear_fc2 = nn.Linear(text_hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., text_hidden] -> [..., hidden]."""
        return self.linear_fc2(F.silu(self.linear_fc1(x)))


class Talker(nn.Module):
    """The `talker.` tensors of a checkpoint, code predictor included."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TalkerModel(config)
        self.text_projection = TextProjection(config.text_hidden, config.shape.talker.hidden)
        self.codec_head = nn.Linear(config.shape.talker.hidden, config.shape.vocab, bias=False)
        self.code_predictor = CodePredictor(config.shape)

    @property
    def stack_shape(self) -> StackShape:
        """Sizes of the talker's own stack."""
        return self.config.shape.talker

    def forward(self, embeds: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Whole sequences for training: embeds [N,T,H], key_mask [N,T] bool -> hidden [N,T,H] after the final norm."""
        weights = stack_weights(self.model.layers, self.model.norm, self.stack_shape)
        return reference.causal(embeds, weights, self.stack_shape, key_mask)

    def text(self, ids: Tensor) -> Tensor:
        """Projected text embeddings: ids [...] int64 -> [..., H]."""
        return self.text_projection(self.model.text_embedding(ids))

    @torch.inference_mode()
    def text_table(self, device: torch.device | str | None = None, rows_at_once: int = 4096) -> Tensor:
        """text_projection(text_embedding) of the whole vocabulary, [text_vocab, H]: once, instead of at every token.

        Only the result, and `rows_at_once` rows of the embedding, ever lie on the device.
        """
        project = copy.deepcopy(self.text_projection).to(device)
        rows = self.model.text_embedding.weight.split(rows_at_once)
        return torch.cat([project(some.to(device)) for some in rows])


@torch.inference_mode()
def decode_weights(talker: Talker, device: torch.device | str | None = None) -> FrameWeights:
    """The tensors a frame reads, stacked and folded from the module; they are copies and in no state_dict."""
    shape, predictor = talker.config.shape, talker.code_predictor

    def move(x: Tensor) -> Tensor:
        return x.detach().to(device)

    def moved(w: StackWeights) -> StackWeights:
        layers = [LayerWeights(**{name: move(x) for name, x in vars(layer).items()}) for layer in w.layers]
        return StackWeights(layers, move(w.norm))

    tables: list[Tensor] = [talker.model.codec_embedding.weight[: shape.codes]]
    tables += [table.get_parameter("weight") for table in predictor.model.codec_embedding]
    embeddings = move(torch.stack(tables))
    projection = predictor.small_to_mtp_projection
    inputs = embeddings[:-1]
    if not isinstance(projection, nn.Identity):
        inputs = move(torch.stack([predictor.project(table) for table in tables[:-1]]))
    return FrameWeights(
        talker=moved(stack_weights(talker.model.layers, talker.model.norm, shape.talker)),
        predictor=moved(stack_weights(predictor.model.layers, predictor.model.norm, shape.predictor)),
        codec_head=move(talker.codec_head.weight),
        heads=move(torch.stack([head.get_parameter("weight") for head in predictor.lm_head])),
        embeddings=embeddings,
        inputs=inputs,
        projection=None if isinstance(projection, nn.Identity) else (move(projection.weight), move(projection.bias)),
    )
