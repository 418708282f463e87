"""FrameStep: the one call everything above uses to advance voices by a frame, and its torch implementation.

In go resident rows, their prompts and one text embedding a column; out come C codes a column. FrameStep owns, per
resident row: KV, position, pending input, history, frame number, seed, sampling parameters, done flag.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megakernel import reference
from megakernel.reference import FrameWeights
from megakernel.sampler import Knobs, Sampling, knobs, pick, restrict, uniforms
from megakernel.shape import Shape

PIECE = 16
"""Positions of one prefill call at most; every piece is padded to it, so that its products have one row count."""

DRAWN = 64
"""Frames whose random numbers are drawn at once."""

WIDTHS = (2, 4, 8, 16, 32)
"""Row counts of the products of a step."""


class FrameStep(ABC):
    """Resident voices, advanced together.

    rows       S, voices that can be resident
    columns    voices that one step can advance at most
    positions  P, prompt and frames that one row can hold
    """

    rows: int
    columns: int
    positions: int

    @abstractmethod
    def admit(self, row: int, pending: Tensor, seed: int, sampling: Sampling) -> None:
        """Give a free row to a voice: pending [H] is its next input without the text embedding. Position is 0."""

    @abstractmethod
    def prefill(self, row: int, embeds: Tensor) -> None:
        """Append up to 16 prompt positions [T, H] to the row's KV."""

    @abstractmethod
    def save_prefix(self, row: int) -> Tensor:
        """A copy of everything prefilled into the row so far."""

    @abstractmethod
    def load_prefix(self, row: int, prefix: Tensor) -> None:
        """Start a freshly admitted row from a saved prefix."""

    @abstractmethod
    def step(self, rows: Sequence[int], text: Tensor) -> Tensor:
        """Advance the named rows one frame.

        rows     up to `columns` row numbers; a row that is not named is neither read nor written
        text     [len(rows), H], what each voice's text adds to its pending input
        returns  [len(rows), C] int64 on the device; code 0 = EOS says that the speech is over and the other codes of
                 that row mean nothing. A row stays done until it is admitted again
        """

    @abstractmethod
    def release(self, row: int) -> None:
        """Free a row; what it held may be overwritten."""

    @abstractmethod
    def position(self, row: int) -> int:
        """Positions that the row holds."""


@dataclass
class Row:
    """A voice that holds a row."""

    position: int
    frame: int
    seed: int
    sampling: Sampling


class RowStep(FrameStep):
    """What the steps on a host have in common: the rows' state in tensors, and the checks."""

    def __init__(
        self, shape: Shape, rows: int, columns: int, positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.rows, self.columns, self.positions = shape, rows, columns, positions
        talker = shape.talker
        self.kv = torch.zeros(
            talker.layers, 2, rows, talker.kv_heads, positions, talker.head_dim, dtype=dtype, device=device
        )
        self.pending = torch.zeros(rows, talker.hidden, dtype=dtype, device=device)
        self.history = torch.zeros(rows, shape.vocab, dtype=torch.bool, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.random = torch.zeros(rows, DRAWN, shape.codebooks, device=device)
        self.live: dict[int, Row] = {}

    def admit(self, row: int, pending: Tensor, seed: int, sampling: Sampling) -> None:
        self.live[row] = Row(0, 0, seed, sampling)
        self.pending[row] = pending
        self.history[row] = False
        self.done[row] = False

    def release(self, row: int) -> None:
        self.live.pop(row, None)

    def position(self, row: int) -> int:
        return self.live[row].position

    def save_prefix(self, row: int) -> Tensor:
        return self.kv[:, :, row, :, : self.live[row].position].clone()

    def load_prefix(self, row: int, prefix: Tensor) -> None:
        self.kv[:, :, row, :, : prefix.shape[3]] = prefix
        self.live[row].position = prefix.shape[3]

    def _prefilled(self, row: int, length: int) -> int:
        """The position at which a row takes `length` more. Raises ValueError."""
        start = self.live[row].position
        if not 1 <= length <= PIECE:
            raise ValueError(f"prefill takes 1 to {PIECE} positions a call, but got {length}")
        if start + length > self.positions:
            raise ValueError(
                f"row {row} holds {self.positions} positions: {start} are used and {length} more were asked for"
            )
        return start

    def _named(self, rows: Sequence[int]) -> list[Row]:
        """The rows of a step. Raises ValueError."""
        if not 1 <= len(rows) <= self.columns:
            raise ValueError(f"a step advances 1 to {self.columns} voices, but {len(rows)} were named")
        live = [self.live[row] for row in rows]
        full = [row for row, state in zip(rows, live, strict=True) if state.position >= self.positions]
        if full:
            raise ValueError(f"rows {full} hold {self.positions} positions and are full")
        return live

    def _uniforms(self, rows: Sequence[int], live: list[Row]) -> Tensor:
        """This frame's random numbers [n, C], drawn for many frames at once: that takes a hundred small operations."""
        device = self.random.device
        for row, state in zip(rows, live, strict=True):
            if state.frame % DRAWN == 0:
                frames = torch.arange(state.frame, state.frame + DRAWN, device=device)
                self.random[row] = uniforms(torch.full_like(frames, state.seed), frames, self.shape.codebooks)
        index = torch.tensor(rows, device=device)
        return self.random[index, torch.tensor([state.frame % DRAWN for state in live], device=device)]

    @staticmethod
    def _advanced(live: list[Row]) -> None:
        for state in live:
            state.position += 1
            state.frame += 1


class TorchFrameStep(RowStep):
    """The frame in plain torch, on any device.

    Products run over the least of WIDTHS that holds the named voices (one row if only one voice fits at all), of those
    at which this machine's products were seen to give a row the same bits. Attention reads each voice's own length,
    since another length gives other bits too. So a voice's codes do not depend on its company.
    """

    def __init__(self, weights: FrameWeights, shape: Shape, rows: int, columns: int, positions: int) -> None:
        device, dtype = weights.codec_head.device, weights.codec_head.dtype
        super().__init__(shape, rows, columns, positions, dtype, device)
        self.weights = reference.pack(weights)
        predictor = shape.predictor
        self.widths = _widths(self.weights, columns)
        width = self.widths[-1]
        self.predictor_kv = torch.zeros(
            predictor.layers,
            2,
            width,
            predictor.kv_heads,
            shape.codebooks,
            predictor.head_dim,
            dtype=dtype,
            device=device,
        )
        self.talker_rope = reference.rope_table(shape.talker, positions, device)
        self.predictor_rope = reference.rope_table(predictor, shape.codebooks, device)
        self.first_entry = torch.arange(shape.codebooks, device=device) * shape.codes
        self._knobs: dict[tuple[Sampling, ...], tuple[Knobs, Knobs, Tensor]] = {}

    @torch.inference_mode()
    def prefill(self, row: int, embeds: Tensor) -> None:
        length = embeds.shape[0]
        start = self._prefilled(row, length)
        x = F.pad(embeds, (0, 0, 0, PIECE - length))[None]
        at = torch.arange(start, start + PIECE, device=x.device).clamp(max=self.positions - 1)
        cos, sin = self.talker_rope[:, at, None]
        keys = torch.arange(start + length, device=x.device)
        mask = keys[None] <= at[:, None]

        def attend(i: int) -> reference.Attend:
            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                cache = self.kv[i, :, row]
                cache[0, :, start : start + length] = k[0, :length].transpose(0, 1)
                cache[1, :, start : start + length] = v[0, :length].transpose(0, 1)
                seen = cache[:, None, :, : start + length]
                return reference.attention(q, seen[0], seen[1], mask)

            return run

        reference.stack(x, self.weights.talker, self.shape.talker, cos, sin, attend)
        self.live[row].position += length

    @torch.inference_mode()
    def step(self, rows: Sequence[int], text: Tensor) -> Tensor:
        live, n = self._named(rows), len(rows)
        width = next(w for w in self.widths if w >= n)
        index = torch.tensor(rows, device=text.device)
        hidden = self._talker(rows, live, F.pad(self.pending[index] + text, (0, 0, 0, width - n)))

        first, rest, penalty = self._sampling(tuple(state.sampling for state in live))
        random = self._uniforms(rows, live)
        logits = reference.linear(hidden, self.weights.codec_head)[:n].float()
        early = torch.tensor([state.frame < 2 for state in live], device=text.device)
        logits = restrict(logits, self.history[index], penalty, early, self.shape.eos, self.shape.suppress_from)
        code0 = pick(logits, first, random[:, 0])

        done = self.done[index] | (code0 == self.shape.eos)
        self.done[index] = done
        codes, summed = self._predictor(hidden, code0.clamp(max=self.shape.codes - 1), rest, random)
        codes[:, 0] = torch.where(done, self.shape.eos, code0)
        self.history[index, code0] = True
        self.pending[index] = summed
        self._advanced(live)
        return codes

    def _talker(self, rows: Sequence[int], live: list[Row], x: Tensor) -> Tensor:
        """One talker step: x [width, H] -> hidden [width, H], after the final norm."""
        n, shape = len(rows), self.shape.talker
        at = torch.tensor([state.position for state in live] + [0] * (x.shape[0] - n), device=x.device)
        index = torch.tensor(rows, device=x.device)
        cos, sin = self.talker_rope[:, at, None, None]
        seen = [(row, state.position + 1) for row, state in zip(rows, live, strict=True)]

        def attend(i: int) -> reference.Attend:
            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                keys, values = self.kv[i]
                keys[index, :, at[:n]] = k[:n, 0]
                values[index, :, at[:n]] = v[:n, 0]
                queries = q.view(-1, 1, shape.kv_heads, shape.group, shape.head_dim)
                out = torch.zeros_like(queries)
                for b, (row, length) in enumerate(seen):
                    own = slice(row, row + 1)
                    out[b] = F.scaled_dot_product_attention(queries[b], keys[own, :, :length], values[own, :, :length])
                return out.view(q.shape[0], 1, shape.q_size)

            return run

        return reference.stack(x[:, None], self.weights.talker, shape, cos, sin, attend)[:, 0]

    def _predictor(self, hidden: Tensor, code0: Tensor, k: Knobs, random: Tensor) -> tuple[Tensor, Tensor]:
        """Codes 1..C-1 and the sum of all C embeddings: hidden [W,H], code0 [n] -> codes [n,C], sum [n,H].

        The first pass feeds two positions (the talker's hidden state, then code 0), each later pass one.
        """
        w, shape, n = self.weights, self.shape, len(code0)
        codes = torch.zeros(hidden.shape[0], shape.codebooks, dtype=torch.int64, device=hidden.device)
        codes[:n, 0] = code0
        past = hidden if w.projection is None else reference.linear(hidden, *w.projection)
        x = torch.stack([past, F.embedding(codes[:, 0], w.inputs[0])], 1)
        start = 0
        for g in range(1, shape.codebooks):
            logits = reference.linear(self._predictor_pass(x, start), w.heads[g - 1])
            codes[:n, g] = pick(logits[:n].float(), k, random[:, g])
            start = g + 1
            if start < shape.codebooks:
                x = F.embedding(codes[:, g : g + 1], w.inputs[g])
        codes = codes[:n]
        return codes, F.embedding(codes + self.first_entry, w.embeddings.flatten(0, 1)).sum(1)

    def _predictor_pass(self, x: Tensor, start: int) -> Tensor:
        """One pass over x [W,T,Hp] at positions start.. -> the last position's hidden state [W,Hp]."""
        width, t, _ = x.shape
        stop = start + t
        cos, sin = self.predictor_rope[:, start:stop, None]
        mask = torch.ones(t, stop, dtype=torch.bool, device=x.device).tril(start) if t > 1 else None

        def attend(i: int) -> reference.Attend:
            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                cache = self.predictor_kv[i, :, :width]
                cache[0, :, :, start:stop] = k.transpose(1, 2)
                cache[1, :, :, start:stop] = v.transpose(1, 2)
                return reference.attention(q, cache[0, :, :, :stop], cache[1, :, :, :stop], mask)

            return run

        return reference.stack(x, self.weights.predictor, self.shape.predictor, cos, sin, attend)[:, -1]

    def _sampling(self, sampling: tuple[Sampling, ...]) -> tuple[Knobs, Knobs, Tensor]:
        """Knobs of code 0 and of the others, and the repetition penalties; remembered."""
        if sampling not in self._knobs:
            if len(self._knobs) > 256:
                self._knobs.clear()
            device = self.pending.device
            first = [(s.do_sample, s.temperature, s.top_k, s.top_p) for s in sampling]
            rest = [
                (s.predictor_do_sample, s.predictor_temperature, s.predictor_top_k, s.predictor_top_p) for s in sampling
            ]
            self._knobs[sampling] = (
                knobs(first, self.shape.vocab, device),
                knobs(rest, self.shape.codes, device),
                torch.tensor([s.repetition_penalty for s in sampling], dtype=torch.float32, device=device),
            )
        return self._knobs[sampling]


def _widths(weights: FrameWeights, columns: int) -> list[int]:
    """Row counts for the products of a step: those of WIDTHS that give a row the same bits as the largest needed."""
    if columns == 1:
        return [1]
    largest = next((w for w in WIDTHS if w >= columns), columns)
    layers = (weights.talker.layers[0], weights.predictor.layers[0])
    matrices = [m for w in layers for m in (w.qkv, w.o, w.gate_up, w.down)] + [weights.codec_head, weights.heads[0]]
    if weights.projection is not None:
        matrices.append(weights.projection[0])
    random = torch.Generator().manual_seed(0)
    widths = [w for w in WIDTHS if w < largest]
    for matrix in matrices:
        x = torch.randn(2 * largest, matrix.shape[1], generator=random).to(matrix.device, matrix.dtype)
        one, two = reference.linear(x[:largest], matrix), reference.linear(x, matrix)  # two: the predictor's first pass
        widths = [
            w
            for w in widths
            if torch.equal(reference.linear(x[:w], matrix), one[:w])
            and torch.equal(reference.linear(x[: 2 * w], matrix), two[: 2 * w])
        ]
    return [*widths, largest]
