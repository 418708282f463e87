"""FrameStep over the CUDA source: keeps the rows' state and the scratch, fills in the columns, calls a launcher.

The launcher decides where the source runs: on a GPU in one launch or as a graph of phases, or on the CPU in tests.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from megakernel import gpu, reference, schedule
from megakernel.frame_step import PIECE, FrameStep
from megakernel.gpu import CudaError
from megakernel.kernels import ATTENTION_PARTS, COLUMN, INSTANCES, PREFILL_COLUMNS, Args
from megakernel.pack import PackedWeights
from megakernel.sampler import Sampling
from megakernel.shape import Shape


class Launcher(ABC):
    """Runs tables of phases on the compiled source.

    shape     of the model that it was compiled for
    dtype     of the weights, keys and values that it reads
    most      voices that a launch can advance
    blocks    of the grid: the barrier counts them
    waits     whether the blocks of a launch wait for each other at `args.barrier`
    """

    shape: Shape
    dtype: torch.dtype
    most: int = INSTANCES[-1]
    blocks: int
    waits: bool
    cuts: dict[schedule.Part, schedule.Cut]

    @abstractmethod
    def launch(self, table: str, columns: int, args: Args) -> None:
        """Enqueue the table ("frame" or "prefill") on the instance for so many columns; does not wait for it."""


@dataclass
class _Voice:
    position: int
    frame: int
    seed: int
    sampling: Sampling


_Method = TypeVar("_Method", bound=Callable[..., object])


def _on_the_gpu(work: _Method) -> _Method:
    """A method whose calls on a GPU that has failed say so in one line, and what failed if the barrier knows it."""

    @wraps(work)
    def guarded(self: "KernelFrameStep", *arguments: object, **more: object) -> object:
        try:
            return work(self, *arguments, **more)
        except torch.AcceleratorError as error:
            first = str(error).partition("\n")[0]
            raise CudaError(self._despair() or f"{work.__name__}: {first}; {gpu.LOST}") from error

    return cast(_Method, guarded)


class KernelFrameStep(FrameStep):
    """The frame by the kernels. Its calls belong on one stream: scratch and counter are one.

    Raises ValueError for weights, a step, a prefill or a tensor that does not fit, before anything is launched, and
    CudaError once the GPU's context is lost.
    """

    def __init__(
        self,
        weights: PackedWeights,
        shape: Shape,
        rows: int,
        columns: int,
        positions: int,
        launcher: Launcher,
    ) -> None:
        self.weights, self.shape, self.launcher = weights, shape, launcher
        self.rows, self.columns, self.positions = rows, columns, positions
        talker, predictor = shape.talker, shape.predictor
        device, dtype = weights.codec_head.device, launcher.dtype
        reason = weights.unfit(shape, dtype)
        if reason is None and launcher.shape != shape:
            reason = f"the launcher was made for {launcher.shape}, but the model is {shape}"
        if reason is None and columns > launcher.most:
            reason = f"the launcher was made for at most {launcher.most} voices at once, but {columns} are wanted"
        if reason is not None:
            raise ValueError(reason)

        def room(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        self.kv = room(talker.layers, 2, rows, talker.kv_heads, positions, talker.head_dim, dtype=dtype)
        self.pending = room(rows, talker.hidden, dtype=dtype)
        self.history = room(rows, -(-shape.vocab // 32), dtype=torch.int32)
        self.done = room(rows, dtype=torch.int32)
        most = max(PREFILL_COLUMNS, next(n for n in INSTANCES if n >= columns))
        slots, wide = 2 * most, max(talker.hidden, predictor.hidden)
        stacks, cuts = (talker, predictor), launcher.cuts.values()
        split = max(max(cut.split_o, cut.split_down) for cut in cuts)
        self.text = room(most, talker.hidden, dtype=dtype)
        self.codes = room(most, shape.codebooks, dtype=torch.int32)
        self.columns_host = np.zeros(most, COLUMN)
        self._staging = torch.from_numpy(self.columns_host.view(np.int32).reshape(most, -1))
        self._columns = room(most, COLUMN.itemsize // 4, dtype=torch.int32)
        self._scratch = {
            "x0": room(slots, wide),
            "x1": room(slots, wide),
            "parts": room(split, slots, wide),
            "raw": room(slots, max(s.q_size + 2 * s.kv_size for s in stacks)),
            "attended": room(ATTENTION_PARTS, slots, max(s.q_size for s in stacks)),
            "attended_sums": room(ATTENTION_PARTS, slots, max(s.heads for s in stacks), 2),
            "inner": room(slots, max(s.intermediate for s in stacks), dtype=dtype),
            "logits": room(most, shape.vocab),
            "predictor_kv": room(
                predictor.layers, 2, most, predictor.kv_heads, shape.codebooks, predictor.head_dim, dtype=dtype
            ),
            "talker_rope": reference.rope_table(talker, positions, device),
            "predictor_rope": reference.rope_table(predictor, shape.codebooks, device),
            "barrier": room(1, dtype=torch.int32),
        }
        tables = {"frame": schedule.frame(shape), "prefill": schedule.prefill(shape)}
        self._tables = {
            name: torch.tensor(list(schedule.words(table)), dtype=torch.int32, device=device)
            for name, table in tables.items()
        }
        self.report = torch.zeros(4, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.uniforms: Tensor | None = None
        self.patience = 2_000_000_000
        """Nanoseconds that a block waits for the others before it reports and stops the launch."""
        self._arrived: int | None = 0  # None: a launch was broken off, perhaps after it was enqueued
        self._voices: dict[int, _Voice] = {}

    @_on_the_gpu
    @torch.inference_mode()
    def warm(self) -> None:
        """Launch every kernel once without a voice, so that no voice waits for what is made at first use; waits."""
        self.columns_host["row"] = -1
        least = next(size for size in INSTANCES if size >= self.columns)
        for columns in INSTANCES[: INSTANCES.index(least) + 1]:
            self._launch("frame", columns)
        self._launch("prefill", PREFILL_COLUMNS)
        self.codes.cpu()

    def _args(self, table: str) -> Args:
        w = self.weights
        tensors = {
            **{name: getattr(w, name) for name in ("talker", "predictor", "codec_head", "heads")},
            **{name: getattr(w, name) for name in ("talker_norms", "predictor_norms", "embeddings", "inputs")},
            "projection": None if w.projection is None else w.projection[0],
            "projection_bias": None if w.projection is None else w.projection[1],
            **{name: getattr(self, name) for name in ("kv", "pending", "history", "done", "text", "codes", "report")},
            "columns": self._columns,
            "uniforms": self.uniforms,
            "table": self._tables[table],
            **self._scratch,
        }
        args = Args(**{name: None if x is None else x.data_ptr() for name, x in tensors.items()})
        args.patience = self.patience
        args.phases, args.positions, args.rows = len(self._tables[table]), self.positions, self.rows
        args.prefill, args.arrived = table == "prefill", self._arrived or 0
        return args

    def _despair(self) -> str | None:
        """What a barrier that lost its patience has reported: no launch will ever work again."""
        block, phase, seen, wanted = (number % 2**32 for number in self.report.tolist())
        if not block:
            return None
        counts = f"{seen} arrivals, wanted {wanted}"
        return f"block {block - 1} waited in vain before phase {phase}: {counts}; {gpu.LOST}"

    def _launch(self, table: str, columns: int) -> None:
        reason = self._despair()
        if reason is not None:
            raise CudaError(reason)
        if self._arrived is None:
            self._scratch["barrier"].zero_()
            self._arrived = 0
        self._columns.copy_(self._staging, non_blocking=True)
        args, self._arrived = self._args(table), None
        self.launcher.launch(table, columns, args)
        arrivals = (len(self._tables[table]) - 1) * self.launcher.blocks if self.launcher.waits else 0
        self._arrived = (args.arrived + arrivals) % 2**32

    def _check(self, name: str, x: Tensor, *shape: int) -> None:
        """Refuse a tensor that is not [shape] in the weights' dtype on their device."""
        wanted = (shape, self.pending.dtype, self.pending.device)
        if (found := (tuple(x.shape), x.dtype, x.device)) != wanted:
            shapes = [f"{list(size)} in {str(dtype)[6:]} on {device}" for size, dtype, device in (wanted, found)]
            raise ValueError(f"{name} should be {shapes[0]}, but is {shapes[1]}")

    def _voice(self, row: int) -> _Voice:
        if row not in self._voices:
            raise ValueError(f"row {row} holds no voice; admit one first")
        return self._voices[row]

    @_on_the_gpu
    def admit(self, row: int, pending: Tensor, seed: int, sampling: Sampling) -> None:
        if not 0 <= row < self.rows:
            raise ValueError(f"a row should be one of 0..{self.rows - 1}, but is {row}")
        self._check("pending", pending, self.shape.talker.hidden)
        self._voices[row] = _Voice(0, 0, seed, sampling)
        self.pending[row] = pending
        self.history[row] = 0
        self.done[row] = 0

    def release(self, row: int) -> None:
        self._voices.pop(row, None)

    def position(self, row: int) -> int:
        return self._voice(row).position

    @_on_the_gpu
    def save_prefix(self, row: int) -> Tensor:
        return self.kv[:, :, row, :, : self.position(row)].clone()

    @_on_the_gpu
    def load_prefix(self, row: int, prefix: Tensor) -> None:
        voice, stack = self._voice(row), self.shape.talker
        length = prefix.shape[3] if prefix.ndim == 5 else 0
        self._check("prefix", prefix, stack.layers, 2, stack.kv_heads, min(length, self.positions), stack.head_dim)
        self.kv[:, :, row, :, :length] = prefix
        voice.position = length

    @_on_the_gpu
    @torch.inference_mode()
    def prefill(self, row: int, embeds: Tensor) -> None:
        length, voice = embeds.shape[0], self._voice(row)
        if not 1 <= length <= PIECE:
            raise ValueError(f"prefill takes 1 to {PIECE} positions a call, but got {length}")
        if voice.position + length > self.positions:
            raise ValueError(
                f"row {row} holds {self.positions} positions: {voice.position} are used and {length} more were asked "
                "for"
            )
        self._check("embeds", embeds, length, self.shape.talker.hidden)
        self.columns_host["row"] = -1
        used = self.columns_host[:length]
        used["row"], used["start"] = row, voice.position
        used["position"] = voice.position + np.arange(length)
        used["following"] = 0
        used["following"][0] = length
        self.text[:length] = embeds
        self._launch("prefill", PREFILL_COLUMNS)
        voice.position += length

    @_on_the_gpu
    @torch.inference_mode()
    def step(self, rows: Sequence[int], text: Tensor) -> Tensor:
        n = len(rows)
        if not 1 <= n <= self.columns:
            raise ValueError(f"a step advances 1 to {self.columns} voices, but {n} were named")
        if len(set(rows)) < n:
            raise ValueError(f"a step names a row once, but got rows {list(rows)}")
        voices = [self._voice(row) for row in rows]
        full = [row for row, voice in zip(rows, voices, strict=True) if voice.position >= self.positions]
        if full:
            raise ValueError(f"rows {full} hold {self.positions} positions and are full")
        self._check("text", text, n, self.shape.talker.hidden)
        self.columns_host["row"] = -1
        for column, row, voice in zip(self.columns_host, rows, voices, strict=False):
            self._fill(column, row, voice)
        self.text[:n] = text
        self._launch("frame", next(size for size in INSTANCES if size >= n))
        for voice in voices:
            voice.position += 1
            voice.frame += 1
        return self.codes[:n].long()

    def _fill(self, column: np.void, row: int, voice: _Voice) -> None:
        s, shape = voice.sampling, self.shape
        column["row"], column["position"], column["start"], column["following"] = row, voice.position, voice.position, 1
        column["frame"] = voice.frame
        column["seed_low"], column["seed_high"] = voice.seed & 0xFFFFFFFF, voice.seed >> 32 & 0xFFFFFFFF
        column["sample"] = s.do_sample | s.predictor_do_sample << 1
        column["temperature"], column["tail"], column["penalty"] = s.temperature, 1 - s.top_p, s.repetition_penalty
        column["top_k"] = min(s.top_k, shape.vocab) if s.top_k > 0 else shape.vocab
        column["other_temperature"], column["other_tail"] = s.predictor_temperature, 1 - s.predictor_top_p
        column["other_top_k"] = min(s.predictor_top_k, shape.codes) if s.predictor_top_k > 0 else shape.codes
