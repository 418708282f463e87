"""A frame as a table of phases: what runs in which order, what each phase reads and writes, and what it costs.

`frame` and `prefill` make the tables that both launchers walk, with a barrier of all blocks after every phase.
`verify` proves a table: everything read was written before, by the same block or behind a barrier, and nothing is
overwritten that another block may still be reading. `weight_bytes` is the floor: what must come from memory.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from megakernel.shape import Shape, StackShape


class Op(IntEnum):
    """What a phase does; the numbers are those of csrc/sizes.h."""

    QKV = 0
    ATTENTION = 1
    O = 2  # noqa: E741
    GATE_UP = 3
    DOWN = 4
    HEAD = 5
    SAMPLE = 6


class Part(IntEnum):
    """Whose phase it is; the predictor's first pass feeds two positions."""

    TALKER = 0
    PREDICTOR_FIRST = 1
    PREDICTOR = 2


LAYER = (Op.QKV, Op.ATTENTION, Op.O, Op.GATE_UP, Op.DOWN)


class Phase(NamedTuple):
    """One entry: `code` is the code that is being predicted, 0 in the talker."""

    op: Op
    part: Part
    layer: int
    code: int

    @property
    def word(self) -> int:
        """The entry as the kernel reads it."""
        return self.op | self.part << 4 | self.layer << 8 | self.code << 16

    def __str__(self) -> str:
        return f"{self.op.name.lower()} of {self.part.name.lower()} layer {self.layer}, code {self.code}"


def prefill(shape: Shape) -> list[Phase]:
    """The talker's layers alone: appends prompt positions to a row's KV. Nothing needs the last layer's output."""
    phases = [Phase(op, Part.TALKER, layer, 0) for layer in range(shape.talker.layers) for op in LAYER]
    return phases[:-3]


def frame(shape: Shape) -> list[Phase]:
    """A whole frame: the talker's step, code 0, then C-1 passes of the predictor."""
    phases = [Phase(op, Part.TALKER, layer, 0) for layer in range(shape.talker.layers) for op in LAYER]
    phases += [Phase(Op.HEAD, Part.TALKER, 0, 0), Phase(Op.SAMPLE, Part.TALKER, 0, 0)]
    for code in range(1, shape.codebooks):
        part = Part.PREDICTOR_FIRST if code == 1 else Part.PREDICTOR
        phases += [Phase(op, part, layer, code) for layer in range(shape.predictor.layers) for op in LAYER]
        phases += [Phase(Op.HEAD, part, 0, code), Phase(Op.SAMPLE, part, 0, code)]
    return phases


@dataclass(frozen=True)
class Cut:
    """How a stack's work is cut: blocks of the grid, parts of the sums of o and down."""

    blocks: int
    split_o: int
    split_down: int


def cut(stack: StackShape, blocks: int, warps: int) -> Cut:
    """The cut that keeps the blocks busiest: a part must leave every warp at least one k-tile."""

    def split(rows: int, k: int) -> int:
        best, best_load = 1, 0.0
        for parts in (1, 2, 4):
            if k // 16 % parts or k // 16 // parts < warps:
                continue
            items = rows // 16 * parts
            load = items / (-(-items // blocks) * blocks)
            if load > best_load + 0.05:
                best, best_load = parts, load
        return best

    return Cut(blocks, split(stack.hidden, stack.q_size), split(stack.hidden, stack.intermediate))


ALL = -1
"""In place of a block: every block."""


class Access(NamedTuple):
    """Units (tiles of 16 values, heads or codes) of a buffer that a phase touches, and the block that does."""

    buffer: str
    units: np.ndarray
    blocks: np.ndarray


def _everywhere(buffer: str, units: int) -> Access:
    return Access(buffer, np.arange(units), np.full(units, ALL))


def _by_items(buffer: str, items: int, blocks: int) -> Access:
    at = np.arange(items)
    return Access(buffer, at, at % blocks)


class Accesses(NamedTuple):
    """What one phase reads and writes."""

    reads: list[Access]
    writes: list[Access]


def accesses(phase: Phase, shape: Shape, cuts: dict[Part, Cut]) -> Accesses:
    """What a phase reads and writes besides weights; the kernel's own words for the buffers (csrc/sizes.h, Args).

    Buffers of the predictor's first pass have a second half, `buffer+`, for the second position.
    """
    op, part, layer, code = phase
    stack = shape.talker if part is Part.TALKER else shape.predictor
    blocks = cuts[part].blocks
    tiles, halves = stack.hidden // 16, ["", "+"] if part is Part.PREDICTOR_FIRST else [""]
    voice = "talker" if part is Part.TALKER else "predictor"
    speaking = "+" if part is Part.PREDICTOR_FIRST else ""
    reads: list[Access] = []
    writes: list[Access] = []

    def summed(x: str, half: str, first: bool, parts: int) -> None:
        reads.append(_everywhere(x + half, tiles))
        if not first:
            reads.append(_everywhere("parts" + half, parts * tiles))

    for half in halves:
        if op is Op.QKV:
            first = layer == 0
            source = ("pending" if part is Part.TALKER else "x1") if first else "x0"
            summed(source, half, first, cuts[part].split_down)
            if part is Part.TALKER or not first:
                writes.append(_by_items("x1" + half, tiles, blocks))
            writes.append(_by_items("raw" + half, (stack.q_size + 2 * stack.kv_size) // 16, blocks))
        elif op is Op.ATTENTION:
            heads = np.arange(stack.kv_heads)
            each = stack.head_dim // 16
            owner = np.repeat(heads % blocks, each)
            for offset, group in ((0, stack.group), (stack.q_size // 16, 1), ((stack.q_size + stack.kv_size) // 16, 1)):
                units = np.arange(stack.kv_heads * each * group)
                reads.append(Access("raw" + half, offset + units, np.repeat(owner, group)))
            writes.append(Access(f"{voice}_kv{layer}", heads, heads % blocks))
            query_heads = np.arange(stack.heads)
            writes.append(Access("attended" + half, query_heads, query_heads // stack.group % blocks))
        elif op is Op.O:
            reads.append(_everywhere("attended" + half, stack.heads))
            writes.append(_by_items("parts" + half, tiles * cuts[part].split_o, blocks))
        elif op is Op.GATE_UP:
            summed("x1", half, False, cuts[part].split_o)
            writes.append(_by_items("x0" + half, tiles, blocks))
            writes.append(_by_items("inner" + half, stack.intermediate // 8, blocks))
        elif op is Op.DOWN:
            reads.append(_everywhere("inner" + half, stack.intermediate // 8))
            writes.append(_by_items("parts" + half, tiles * cuts[part].split_down, blocks))
    if op is Op.HEAD:
        summed("x0", speaking, False, cuts[part].split_down)
        writes.append(_by_items("logits", (shape.vocab if part is Part.TALKER else shape.codes) // 16, blocks))
        if part is Part.TALKER:
            writes.append(_by_items("x1", shape.predictor.hidden // 16, blocks))
    if op is Op.SAMPLE:
        own = np.zeros(1, int)  # column 0 is drawn by block 0; the others are like it
        logits = np.arange((shape.vocab if part is Part.TALKER else shape.codes) // 16)
        reads.append(Access("logits", logits, np.zeros_like(logits)))
        writes.append(Access("codes", own + code, own))
        if code < shape.codebooks - 1:
            units = np.arange(shape.predictor.hidden // 16)
            writes.append(Access("x1+" if code == 0 else "x1", units, np.zeros_like(units)))
        else:
            reads.append(Access("codes", np.arange(shape.codebooks - 1), np.zeros(shape.codebooks - 1, int)))
            units = np.arange(shape.talker.hidden // 16)
            writes.append(Access("pending", units, np.zeros_like(units)))
    return Accesses(reads, writes)


def verify(phases: Sequence[Phase], shape: Shape, cuts: dict[Part, Cut], dropped: Collection[int] = ()) -> list[str]:
    """What is wrong with a table without the barriers `dropped` (index of the phase before each); [] if it is sound."""
    never, before = -1, -2  # in place of the stretch between two barriers in which something was written
    state: dict[str, dict[str, np.ndarray]] = {}
    stretch, wrong = 0, []

    def buffer(name: str, units: int) -> dict[str, np.ndarray]:
        known = state.setdefault(name, {key: np.zeros(0, int) for key in ("written", "writer", "read", "reader")})
        fresh = np.full(max(0, units - len(known["read"])), never)
        known["written"] = np.concatenate([known["written"], np.where(name == "pending", before, fresh)])
        for key in ("writer", "read", "reader"):
            known[key] = np.concatenate([known[key], fresh])
        return known

    for number, phase in enumerate(phases):
        reads, writes = accesses(phase, shape, cuts)
        for name, units, blocks in reads:
            known = buffer(name, int(units.max()) + 1)
            if (known["written"][units] == never).any():
                wrong.append(f"phase {number} ({phase}) reads {name}, which nothing has written")
            now = known["written"][units] == stretch
            if (now & ((blocks == ALL) | (known["writer"][units] != blocks))).any():
                wrong.append(f"phase {number} ({phase}) reads {name}, which another block may not have written yet")
            same = known["read"][units] == stretch
            one = ~same | (known["reader"][units] == blocks)
            known["reader"][units] = np.where(one, blocks, ALL)
            known["read"][units] = stretch
        for name, units, blocks in writes:
            known = buffer(name, int(units.max()) + 1)
            if ((known["read"][units] == stretch) & (known["reader"][units] != blocks)).any():
                wrong.append(f"phase {number} ({phase}) overwrites {name}, which another block may still be reading")
            if ((known["written"][units] == stretch) & (known["writer"][units] != blocks)).any():
                wrong.append(f"phase {number} ({phase}) overwrites {name}, which another block may still be writing")
            known["written"][units] = stretch
            known["writer"][units] = blocks
        if number not in dropped:
            stretch += 1
    return wrong


def weight_bytes(phase: Phase, shape: Shape, element: int = 2) -> int:
    """Bytes of weights that a phase reads once, whatever the number of voices."""
    stack = shape.talker if phase.part is Part.TALKER else shape.predictor
    hidden = stack.hidden
    if phase.op is Op.HEAD:
        if phase.part is not Part.TALKER:
            return shape.codes * hidden * element
        return (shape.vocab + (shape.predictor.hidden if shape.projected else 0)) * hidden * element
    values = {
        Op.QKV: (stack.q_size + 2 * stack.kv_size) * hidden,
        Op.O: stack.q_size * hidden,
        Op.GATE_UP: 2 * stack.intermediate * hidden,
        Op.DOWN: stack.intermediate * hidden,
    }
    return values.get(phase.op, 0) * element


def kv_bytes(shape: Shape, positions: int, element: int = 2) -> int:
    """Bytes of keys and values that one voice's talker step reads."""
    return 2 * shape.talker.layers * shape.talker.kv_size * positions * element


def words(phases: Sequence[Phase]) -> Iterator[int]:
    """The table as the kernel reads it."""
    return (phase.word for phase in phases)
