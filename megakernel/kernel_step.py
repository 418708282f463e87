"""FrameStep over the CUDA source: keeps the rows' state and the scratch, fills in the columns, calls a launcher.

The launcher decides where the source runs: on a GPU in one launch or as a graph of phases, or on the CPU in tests.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megakernel import reference, schedule
from megakernel.frame_step import PIECE, FrameStep
from megakernel.kernels import ATTENTION_PARTS, COLUMN, INSTANCES, PREFILL_COLUMNS, Args
from megakernel.pack import PackedWeights
from megakernel.sampler import Sampling
from megakernel.shape import Shape


class Launcher(ABC):
    """Runs tables of phases on the compiled source.

    blocks    of the grid: the barrier counts them
    waits     whether the blocks of a launch wait for each other at `args.barrier`
    """

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


class KernelFrameStep(FrameStep):
    """The frame by the kernels.

    Raises ValueError for a step, a prefill or a tensor that does not fit, before anything is launched.
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
        device, dtype = weights.codec_head.device, weights.codec_head.dtype

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
        self._arrived = 0
        self._voices: dict[int, _Voice] = {}

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
        args.prefill, args.arrived = table == "prefill", self._arrived
        return args

    def _launch(self, table: str, columns: int) -> None:
        block, phase, seen, wanted = self.report.tolist()
        if block:
            raise RuntimeError(
                f"block {block - 1} waited in vain before phase {phase}: {seen} arrivals, wanted {wanted}; "
                "the GPU's context is lost, restart the process"
            )
        self._columns.copy_(self._staging, non_blocking=True)
        self.launcher.launch(table, columns, self._args(table))
        if self.launcher.waits:
            self._arrived = (self._arrived + (len(self._tables[table]) - 1) * self.launcher.blocks) % 2**32

    def _check(self, name: str, x: Tensor, *shape: int) -> None:
        """Refuse a tensor that is not [shape] in the weights' dtype on their device."""
        wanted = (shape, self.pending.dtype, self.pending.device)
        if (found := (tuple(x.shape), x.dtype, x.device)) != wanted:
            shapes = [f"{list(size)} in {str(dtype)[6:]} on {device}" for size, dtype, device in (wanted, found)]
            raise ValueError(f"{name} should be {shapes[0]}, but is {shapes[1]}")

    def admit(self, row: int, pending: Tensor, seed: int, sampling: Sampling) -> None:
        self._check("pending", pending, self.shape.talker.hidden)
        self._voices[row] = _Voice(0, 0, seed, sampling)
        self.pending[row] = pending
        self.history[row] = 0
        self.done[row] = 0

    def release(self, row: int) -> None:
        self._voices.pop(row, None)

    def position(self, row: int) -> int:
        return self._voices[row].position

    def save_prefix(self, row: int) -> Tensor:
        return self.kv[:, :, row, :, : self._voices[row].position].clone()

    def load_prefix(self, row: int, prefix: Tensor) -> None:
        self.kv[:, :, row, :, : prefix.shape[3]] = prefix
        self._voices[row].position = prefix.shape[3]

    @torch.inference_mode()
    def prefill(self, row: int, embeds: Tensor) -> None:
        length, voice = embeds.shape[0], self._voices[row]
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

    @torch.inference_mode()
    def step(self, rows: Sequence[int], text: Tensor) -> Tensor:
        n = len(rows)
        if not 1 <= n <= self.columns:
            raise ValueError(f"a step advances 1 to {self.columns} voices, but {n} were named")
        voices = [self._voices[row] for row in rows]
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
