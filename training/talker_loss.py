"""A batch of rows in, the talker's and the code predictor's losses out.

The arithmetic is megakernel.reference; only attention is written out here, since torch's fused CPU kernel took 41 % of
a training step at these lengths and since one head's attention is itself trained. Beside the two real tasks (code 0 by
the talker, codes 1-7 by the code predictor) the talker's hidden state is asked for the frame's acoustic vector and
phones through two linear maps that are not exported.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megakernel import reference
from megakernel.shape import StackShape
from pipecat_qwen3.decoder_layer import DecoderLayer, Norm
from pipecat_qwen3.talker import Talker
from training.flite import PHONES
from training.rows import Batch

GUIDED_LAYER = 2
"""The layer whose first head is told which text tokens are being spoken."""

PREDICTOR_WEIGHTS = (0.5, 0.3, 0.2, 0.12, 0.1, 0.08, 0.08)
"""Weights of codes 1..7: the first ones are the audible ones."""

VECTOR_WEIGHT, PHONE_WEIGHT = 2.0, 0.4
HISTORY_NOISE = 0.10
"""Share of input frames whose code 0 is replaced by one of its six nearest neighbours (and twice that for the later
codes, which then come from another frame): in real life the history is the model's own, with its mistakes."""


class AuxiliaryHeads(nn.Module):
    """Linear maps from the talker's hidden state to acoustic vectors and phones; for training only."""

    def __init__(self, hidden: int, dimensions: int) -> None:
        super().__init__()
        self.vector = nn.Linear(hidden, dimensions)
        self.phones = nn.Linear(hidden, 4 * len(PHONES))


def attention_layer(
    layer: DecoderLayer, x: Tensor, shape: StackShape, cos: Tensor, sin: Tensor, mask: Tensor, watched: bool
) -> tuple[Tensor, Tensor | None]:
    """One layer [N,T,H] -> [N,T,H]; mask [T,T] is added to the scores. If watched: log attention [N,T,T] of head 0."""
    weights = layer.weights(shape)
    q, k, v = reference.qkv(x, weights, shape, cos, sin)
    n, t = x.shape[:2]
    rows = q.transpose(1, 2).reshape(n, shape.kv_heads, shape.group * t, shape.head_dim)
    scores = (rows @ k.permute(0, 2, 3, 1)).float().view(n, shape.kv_heads, shape.group, t, t)
    scores = scores * shape.head_dim**-0.5 + mask
    seen = scores.softmax(-1).to(v.dtype).view(n, shape.kv_heads, shape.group * t, t) @ v.transpose(1, 2)
    heads = seen.view(n, shape.heads, t, shape.head_dim).transpose(1, 2).reshape(n, t, shape.q_size)
    x = x + F.linear(heads, weights.o)
    return reference.swiglu(x, weights, shape), scores[:, 0, 0].log_softmax(-1) if watched else None


class TalkerLogits:
    """What one talker expects at each position of a batch."""

    def __init__(self, talker: Talker, compiled: bool) -> None:
        self.talker = talker
        self.layer: Callable[..., tuple[Tensor, Tensor | None]] = attention_layer
        if compiled:
            # The stack's sizes stay constants; as symbols they would keep the generated loops from being vectorised.
            torch._dynamo.config.specialize_int = True
            self.layer = torch.compile(attention_layer, dynamic=True)

    def _stack(
        self, layers: nn.ModuleList, norm: Norm, x: Tensor, shape: StackShape, watch: int
    ) -> tuple[Tensor, Tensor | None]:
        t = x.shape[1]
        cos, sin = reference.rope_table(shape, t, x.device)[:, :, None, :]
        mask = torch.full((t, t), -1e9, device=x.device).triu(1)
        log_attention = None
        for index, layer in enumerate(layers):
            x, watched = self.layer(layer, x, shape, cos, sin, mask, index == watch)
            log_attention = watched if index == watch else log_attention
        return reference.rms_norm(x, norm.weight, shape.norm_eps), log_attention

    def _inputs(self, batch: Batch, codes: Tensor) -> Tensor:
        """The talker's inputs [B,T,H]: text plus codec item plus the embeddings of the frame before."""
        talker = self.talker
        tables = talker.code_predictor.model.codec_embedding
        x = talker.text(batch.text)
        x = x + talker.model.codec_embedding(batch.codec.clamp(min=0)) * (batch.codec >= 0)[..., None]
        frames = talker.model.codec_embedding(codes[..., 0])
        for g, table in enumerate(tables, start=1):
            frames = frames + table(codes[..., g])
        index = batch.frame.clamp(min=0)[..., None].expand(-1, -1, frames.shape[-1])
        return x + frames.gather(1, index) * (batch.frame >= 0)[..., None]

    def code0_logits(self, batch: Batch) -> Tensor:
        """Logits [labels, V] of code 0 at all labelled positions, row by row, from the codes as they are."""
        talker = self.talker
        x = self._inputs(batch, batch.codes)
        with torch.autocast(batch.text.device.type, torch.bfloat16, enabled=self.autocast):
            hidden, _ = self._stack(talker.model.layers, talker.model.norm, x, talker.config.shape.talker, -1)
            return talker.codec_head(hidden[batch.label >= 0]).float()

    autocast = True
    """bfloat16 matrix products; tests switch it off."""


class TalkerLoss(TalkerLogits):
    """The losses of one talker.

    books [8, 512, 64]: the codebooks; they define the acoustic vector of a frame and the neighbours of a code.
    """

    def __init__(self, talker: Talker, heads: AuxiliaryHeads, books: Tensor, compiled: bool) -> None:
        super().__init__(talker, compiled)
        self.heads, self.books = heads, books
        self.neighbours = torch.cdist(books[0], books[0]).argsort(1)[:, 1:7]

    def _noisy(self, codes: Tensor) -> Tensor:
        """Codes [B,N,8] as the model itself might have spoken them."""
        b, n, count = codes.shape
        device = codes.device
        flat = codes.reshape(-1, count)
        other = flat[torch.randint(len(flat), (b, n), device=device)]
        cut = torch.randint(1, count, (b, n, 1), device=device)
        late = (torch.arange(count, device=device) >= cut) & (torch.rand(b, n, 1, device=device) < 2 * HISTORY_NOISE)
        noisy = torch.where(late, other, codes)
        chance = torch.rand(b, n, device=device)
        near = self.neighbours[codes[..., 0], torch.randint(6, (b, n), device=device)]
        near = torch.where(chance < 0.1 * HISTORY_NOISE, other[..., 0], near)
        noisy[..., 0] = torch.where(chance < HISTORY_NOISE, near, codes[..., 0])
        return noisy

    def __call__(self, batch: Batch, noise: bool, guided: bool, share: float) -> dict[str, Tensor]:
        """Losses by name, each a mean: code0, end, guided, vector, phones [] and predictor [7]; accuracy [] is no loss.

        share   of the frames on which the code predictor is trained in this call
        """
        talker, config = self.talker, self.talker.config
        shape = config.shape
        device = batch.text.device.type
        x = self._inputs(batch, self._noisy(batch.codes) if noise else batch.codes)
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            hidden, log_attention = self._stack(
                talker.model.layers, talker.model.norm, x, shape.talker, GUIDED_LAYER if guided else -1
            )
            labelled = batch.label >= 0
            logits = talker.codec_head(hidden[labelled]).float()
        labels = batch.label[labelled]
        ends = labels == config.ids.codec_eos
        rows, columns = (batch.target >= 0).nonzero(as_tuple=True)
        frames = batch.target[rows, columns]
        codes, states = batch.codes[rows, frames], hidden[rows, columns]
        vectors = torch.stack([book[c] for book, c in zip(self.books, codes.unbind(1), strict=True)]).sum(0)
        vectors = vectors / self.books[0].std()
        phone_logits = self.heads.phones(states.float()).view(-1, len(PHONES))
        losses = {
            "code0": F.cross_entropy(logits, labels),
            "accuracy": (logits.argmax(-1) == labels).float().mean(),
            "end": F.cross_entropy(logits[ends], labels[ends]),
            "vector": F.mse_loss(self.heads.vector(states.float()), vectors),
            "phones": F.cross_entropy(phone_logits, batch.phones[rows, frames].flatten()),
            "guided": torch.zeros((), device=x.device),
        }
        if log_attention is not None:
            losses["guided"] = self._guided(batch, log_attention)
        if share < 1:
            some = torch.randperm(len(codes), device=x.device)[: max(8, int(share * len(codes)))]
            codes, states = codes[some], states[some]
        losses["predictor"] = self._predictor(codes, states)
        return losses

    def _guided(self, batch: Batch, log_attention: Tensor) -> Tensor:
        """-log of the attention that falls on the tokens of the word being spoken, over positions that have any."""
        index = batch.target.clamp(min=0)
        spoken = batch.words.gather(1, index).where(batch.target >= 0, -1)
        wanted = (spoken[:, :, None] == batch.token_words[:, None, :]).tril()
        some = wanted.any(-1)
        return -log_attention[some].masked_fill(~wanted[some], -1e4).logsumexp(-1).mean()

    def _predictor(self, codes: Tensor, states: Tensor) -> Tensor:
        """Cross-entropy [7] of codes 1..7, teacher-forced."""
        talker, predictor = self.talker, self.talker.code_predictor
        tables = list(predictor.model.codec_embedding)[:-1]
        later = [table(codes[:, g]) for g, table in enumerate(tables, start=1)]
        x = torch.stack([states.float(), talker.model.codec_embedding(codes[:, 0]), *later], 1)
        shape = talker.config.shape.predictor
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=self.autocast):
            y, _ = self._stack(predictor.model.layers, predictor.model.norm, predictor.project(x), shape, -1)
            return torch.stack(
                [
                    F.cross_entropy(head(y[:, g]).float(), codes[:, g])
                    for g, head in enumerate(predictor.lm_head, start=1)
                ]
            )


def total(losses: dict[str, Tensor], guided_weight: float) -> Tensor:
    """What the optimiser minimises."""
    weights = torch.tensor(PREDICTOR_WEIGHTS, device=losses["code0"].device)
    return (
        losses["code0"]
        + (losses["predictor"] * weights).sum()
        + guided_weight * losses["guided"]
        + VECTOR_WEIGHT * losses["vector"]
        + PHONE_WEIGHT * losses["phones"]
    )
