"""FrameStep over the frame that numba compiles: packs the weights, keeps the rows' state, names the columns.

Weights that are bf16 numbers are kept as such, whatever the dtype they come in; all arithmetic is fp32.
"""

import threading
import weakref
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megakernel.cpu_kernel import HALF, PANEL, Columns, Frame, Scratch, Stack, State, frame
from megakernel.frame_step import PIECE, Row, RowStep
from megakernel.reference import MATRICES, FrameWeights, StackWeights, rope_table
from megakernel.sampler import Sampling
from megakernel.shape import Shape, StackShape

_Calls: TypeAlias = "SimpleQueue[tuple[Any, ...] | None]"


class CpuFrameStep(RowStep):
    """The frame in one call of compiled code, by `threads` threads of which the caller's is one."""

    def __init__(
        self, weights: FrameWeights, shape: Shape, rows: int, columns: int, positions: int, threads: int = 1
    ) -> None:
        super().__init__(shape, rows, columns, positions, torch.float32, torch.device("cpu"))
        self._team = _Team(threads)
        small = _are_bf16(weights)
        none = torch.zeros(0, shape.talker.hidden), torch.zeros(0)
        projection, bias = none if weights.projection is None else weights.projection
        final = Frame(
            codec_head=_panels(weights.codec_head, small),
            heads=np.stack([_panels(head, small) for head in weights.heads]),
            embeddings=_table(weights.embeddings),
            inputs=_table(weights.inputs),
            projection=_panels(projection, small),
            bias=bias.float().numpy(),
            vocab=shape.vocab,
            eos=shape.eos,
            suppress_from=shape.suppress_from,
        )
        self.weights = (
            _stack(weights.talker, shape.talker, positions, small),
            _stack(weights.predictor, shape.predictor, shape.codebooks, small),
            final,
        )
        p = shape.predictor
        self.predictor_kv = torch.zeros(p.layers, 2, columns, p.kv_heads, shape.codebooks, p.head_dim)
        state = (self.kv, self.predictor_kv, self.pending, self.history, self.done)
        self._state = State(*(x.numpy() for x in state))
        self._scratch = _scratch(self.weights, max(2 * columns, PIECE), positions, threads)

    @torch.inference_mode()
    def prefill(self, row: int, embeds: Tensor) -> None:
        start, count = self._prefilled(row, len(embeds)), len(embeds)
        self._run(
            np.full(count, row), np.arange(start, start + count), embeds, [], torch.zeros(0, self.shape.codebooks)
        )
        self.live[row].position += count

    @torch.inference_mode()
    def step(self, rows: Sequence[int], text: Tensor) -> Tensor:
        live = self._named(rows)
        position = np.array([state.position for state in live])
        codes = self._run(np.array(rows), position, text, live, self._uniforms(rows, live))
        self._advanced(live)
        return codes

    def _run(self, row: np.ndarray, position: np.ndarray, text: Tensor, live: list[Row], uniform: Tensor) -> Tensor:
        columns = Columns(
            row=row,
            position=position,
            text=_as(text, False),
            uniform=uniform.numpy(),
            early=np.array([state.frame < 2 for state in live], bool),
            knobs=np.array([_knobs(state.sampling) for state in live], np.float32).reshape(-1, 2, 4),
            penalty=np.array([state.sampling.repetition_penalty for state in live], np.float32),
        )
        codes = torch.zeros(len(live), self.shape.codebooks, dtype=torch.int64)
        self._team.run(*self.weights, self._state, columns, codes.numpy(), self._scratch)
        return codes


class _Team:
    """Threads that run a frame together; those beside the caller's end with the team."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._calls: list[_Calls] = [SimpleQueue() for _ in range(1, threads)]
        for t, calls in enumerate(self._calls, 1):
            threading.Thread(target=_help, args=(t, threads, calls, self._done), name=f"frame-{t}", daemon=True).start()
            weakref.finalize(self, calls.put, None)

    def run(self, *arguments: Any) -> None:
        """frame(t, threads, *arguments) on every thread t; the caller's is 0."""
        for calls in self._calls:
            calls.put(arguments)
        frame(0, self.threads, *arguments)
        for _ in self._calls:
            error = self._done.get()
            if error is not None:
                raise error


def _help(t: int, threads: int, calls: _Calls, done: "SimpleQueue[BaseException | None]") -> None:
    while (arguments := calls.get()) is not None:
        try:
            frame(t, threads, *arguments)
            done.put(None)
        except BaseException as error:
            done.put(error)
        del arguments


def _knobs(s: Sampling) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (
        (s.do_sample, s.temperature, s.top_k, 1 - s.top_p),
        (s.predictor_do_sample, s.predictor_temperature, s.predictor_top_k, 1 - s.predictor_top_p),
    )


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 or torch.equal(x, x.bfloat16().to(x.dtype))


def _are_bf16(w: FrameWeights) -> bool:
    """Whether no matrix loses anything as bf16."""
    layers = [*w.talker.layers, *w.predictor.layers]
    matrices = [getattr(layer, name) for layer in layers for name in MATRICES] + [w.codec_head, *w.heads]
    return all(map(_is_bf16, matrices)) and (w.projection is None or _is_bf16(w.projection[0]))


def _as(x: Tensor, small: bool) -> np.ndarray:
    if small:
        return x.detach().bfloat16().contiguous().view(torch.uint16).numpy()
    return x.detach().float().contiguous().numpy()


def _table(x: Tensor) -> np.ndarray:
    return _as(x, _is_bf16(x))


def _panels(x: Tensor, small: bool) -> np.ndarray:
    """[N, K] -> [panels, K, 64], with zeros for the outputs that the last panel lacks."""
    padded = F.pad(x, (0, 0, 0, -len(x) % PANEL))
    return _as(padded.view(-1, PANEL, x.shape[1]).mT, small)


def _gate_up(x: Tensor, small: bool) -> np.ndarray:
    """[2 I, H] -> panels of 32 gates and their 32 ups."""
    gate, up = (F.pad(y, (0, 0, 0, -len(y) % HALF)).unflatten(0, (-1, HALF)) for y in x.chunk(2))
    return _panels(torch.stack([gate, up], 1).flatten(0, 2), small)


def _stack(w: StackWeights, shape: StackShape, positions: int, small: bool) -> Stack:
    def norms(name: str) -> np.ndarray:
        return _as(torch.stack([getattr(layer, name) for layer in w.layers]), False)

    def panels(name: str) -> np.ndarray:
        return np.stack([_panels(getattr(layer, name), small) for layer in w.layers])

    return Stack(
        input_norm=norms("input_norm"),
        qkv=panels("qkv"),
        qk_norm=norms("qk_norm"),
        o=panels("o"),
        post_norm=norms("post_norm"),
        gate_up=np.stack([_gate_up(layer.gate_up, small) for layer in w.layers]),
        down=panels("down"),
        norm=_as(w.norm, False),
        rope=rope_table(shape, positions).numpy(),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        eps=shape.norm_eps,
    )


def _scratch(weights: tuple[Stack, Stack, Frame], most: int, positions: int, threads: int) -> Scratch:
    *stacks, f = weights

    def room(*sizes: int, dtype: type = np.float32) -> np.ndarray:
        return np.zeros(sizes, dtype)

    hidden = max(PANEL * s.o.shape[1] for s in stacks)
    outputs = max(PANEL * m.shape[-3] for s in stacks for m in (s.qkv, s.gate_up))
    logits = PANEL * max(f.codec_head.shape[0], f.heads.shape[1])
    return Scratch(
        x=room(most, hidden),
        normed=room(threads, most, hidden),
        y=room(most, max(outputs, PANEL * f.projection.shape[0])),
        z=room(most, max(s.o.shape[2] for s in stacks)),
        gated=room(most, max(HALF * s.gate_up.shape[1] for s in stacks)),
        logits=room(most, logits),
        scores=room(threads, positions),
        sums=room(threads, logits),
        order=room(threads, logits, dtype=np.int64),
        row=room(most, dtype=np.int64),
        at=room(most, dtype=np.int64),
        arrived=room(1, dtype=np.int64),
        met=room(threads, 8, dtype=np.int64),
    )
