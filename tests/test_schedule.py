"""The table of phases: complete, proven, and true of the kernels; the proof finds any barrier that is missing."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megakernel import cucpu, schedule
from megakernel.cucpu.launcher import SOURCES, PhaseArgs
from megakernel.kernel_step import KernelFrameStep
from megakernel.kernels import Args, shared_bytes
from megakernel.schedule import Access, Op, Part, Phase
from megakernel.shape import Shape
from pipecat_qwen3.config import read_model_config
from tests.kernel_cases import PLAIN, PROJECTED, SHAPES, TestLauncher, kernel_step, packed_weights, speak, voice
from tests.random_checkpoint import GENERATION, model_config

EMBEDDED = Path(__file__).parent.parent / "pipecat_qwen3" / "embedded"
BLOCKS = (1, 5, 108, 132, 170)
WARPS = 8


def published(folder: Path, size: str) -> Shape:
    """The shape of a published checkpoint, from its config."""
    ids = dict.fromkeys(("assistant", "<|im_end|>", "<|im_start|>", "<tts_text_bos>", "<tts_text_eod>", "<tts_pad>"), 0)
    config = model_config("custom_voice", size, ids)  # type: ignore[arg-type]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return read_model_config(folder).shape


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shape]:
    found = {size: published(tmp_path_factory.mktemp("config"), size) for size in ("0.6b", "1.7b")}
    return {**found, "embedded": read_model_config(EMBEDDED).shape}


NAMES = pytest.mark.parametrize("name", ["0.6b", "1.7b", "embedded"])


def fewer_layers(shape: Shape) -> Shape:
    """Two layers and four codebooks: every kind of neighbours that the whole frame has."""
    talker, predictor = (replace(stack, layers=2) for stack in (shape.talker, shape.predictor))
    return replace(shape, talker=talker, predictor=predictor, codebooks=4)


# -- what the table holds ----------------------------------------------------------------------------------------------


def test_a_frame_has_the_phases_of_every_layer_pass_and_code(shapes: dict[str, Shape]) -> None:
    published = 28 * 5 + 2 + 15 * (5 * 5 + 2)
    for name, phases, pieces in (("0.6b", published, 137), ("1.7b", published, 137), ("embedded", 111, 22)):
        frame = schedule.frame(shapes[name])
        assert len(frame) == len(set(frame)) == phases
        assert len(schedule.prefill(shapes[name])) == pieces
        assert [phase.code for phase in frame if phase.op is Op.SAMPLE] == list(range(shapes[name].codebooks))


def test_a_phase_s_word_is_what_the_kernel_takes_apart() -> None:
    source = (SOURCES / "sizes.h").read_text()
    for kind in (Op, Part):
        found = re.search(rf"enum {kind.__name__} {{(.*?)}}", source)
        assert found
        assert found[1].replace(" ", "").split(",") == [each.name for each in kind]
        assert [each.value for each in kind] == list(range(len(kind)))
    fields = dict(re.findall(r"int (\w+)\(\) const { return word ([^;]*); }", source))
    assert fields == {"op": "& 15", "part": ">> 4 & 15", "layer": ">> 8 & 255", "code": ">> 16"}
    word = Phase(Op.DOWN, Part.PREDICTOR, 27, 15).word
    assert (word & 15, word >> 4 & 15, word >> 8 & 255, word >> 16) == (Op.DOWN, Part.PREDICTOR, 27, 15)
    assert list(schedule.words(schedule.frame(PLAIN))) == [phase.word for phase in schedule.frame(PLAIN)]


def test_a_phase_is_named_in_words() -> None:
    assert str(Phase(Op.GATE_UP, Part.PREDICTOR_FIRST, 3, 1)) == "gate_up of predictor_first layer 3, code 1"


# Figures of the published models: 2 bytes times their parameters, those of the predictor's layers once a code.
@pytest.mark.parametrize(("name", "gigabytes"), [("0.6b", 3.309), ("1.7b", 5.258)])
def test_a_frame_reads_the_weights_of_the_published_models(
    shapes: dict[str, Shape], name: str, gigabytes: float
) -> None:
    shape = shapes[name]
    read = sum(schedule.weight_bytes(phase, shape) for phase in schedule.frame(shape))
    assert read / 1e9 == pytest.approx(gigabytes, abs=5e-4)
    assert schedule.kv_bytes(shape, positions=1) == 28 * 2 * 1024 * 2


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_bytes_of_a_frame_are_those_of_the_packed_weights(shape: Shape) -> None:
    packed = packed_weights(shape, torch.bfloat16)
    once = packed.talker.nbytes + packed.codec_head.nbytes + packed.heads.nbytes
    once += 0 if packed.projection is None else packed.projection[0].nbytes
    expected = once + packed.predictor.nbytes * (shape.codebooks - 1)
    assert sum(schedule.weight_bytes(phase, shape) for phase in schedule.frame(shape)) == expected


# -- how work is cut ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", BLOCKS)
@NAMES
def test_a_part_of_a_sum_is_whole_tiles_and_leaves_every_warp_one(
    shapes: dict[str, Shape], name: str, blocks: int
) -> None:
    for stack in (shapes[name].talker, shapes[name].predictor):
        cut = schedule.cut(stack, blocks, WARPS)
        for parts, k in ((cut.split_o, stack.q_size), (cut.split_down, stack.intermediate)):
            assert k % (16 * parts) == 0
            assert parts == 1 or k // 16 // parts >= WARPS


def test_sums_are_cut_where_there_are_more_blocks_than_tiles(shapes: dict[str, Shape]) -> None:
    small, large = (shapes[name].talker for name in ("0.6b", "1.7b"))
    assert schedule.cut(small, 132, WARPS) == schedule.Cut(132, 2, 2)  # 64 tiles in two parts keep 128 blocks busy
    assert schedule.cut(large, 132, WARPS) == schedule.Cut(132, 1, 1)  # 128 tiles
    assert schedule.cut(small, 1, WARPS) == schedule.Cut(1, 1, 1)


# -- the proof ---------------------------------------------------------------------------------------------------------


def cuts(shape: Shape, blocks: int) -> dict[Part, schedule.Cut]:
    talker, predictor = (schedule.cut(stack, blocks, WARPS) for stack in (shape.talker, shape.predictor))
    return {Part.TALKER: talker, Part.PREDICTOR_FIRST: predictor, Part.PREDICTOR: predictor}


def removable(table: Sequence[Phase], shape: Shape, blocks: int) -> list[tuple[Phase, Phase]]:
    """The neighbours between which no barrier is needed."""
    barriers = range(len(table) - 1)
    kept = [i for i in barriers if not schedule.verify(table, shape, cuts(shape, blocks), [i])]
    return [(table[i], table[i + 1]) for i in kept]


@pytest.mark.parametrize("blocks", BLOCKS)
@NAMES
def test_the_tables_are_sound(shapes: dict[str, Shape], name: str, blocks: int) -> None:
    for table in (schedule.frame(shapes[name]), schedule.prefill(shapes[name])):
        assert schedule.verify(table, shapes[name], cuts(shapes[name], blocks)) == []


@pytest.mark.parametrize("blocks", BLOCKS)
@NAMES
def test_no_barrier_can_be_dropped_where_there_is_more_than_one_block(
    shapes: dict[str, Shape], name: str, blocks: int
) -> None:
    """One block could do without those before phases that read only what their own block has written."""
    shape = fewer_layers(shapes[name])
    for table in (schedule.frame(shape), schedule.prefill(shape)):
        found = removable(table, shape, blocks)
        alone = [pair for pair in pairwise(table) if pair[1].op in (Op.ATTENTION, Op.SAMPLE)]
        print(f"{name}, {blocks} blocks, {len(table) - 1} barriers, removable: {len(found)}")
        assert found == (alone if blocks == 1 else [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0.6b", "1.7b"])
def test_no_barrier_of_a_whole_published_frame_can_be_dropped(shapes: dict[str, Shape], name: str) -> None:
    assert removable(schedule.frame(shapes[name]), shapes[name], 132) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda table: table[2:], r"phase 0 \(o of talker layer 0, code 0\) reads attended, which nothing has written"),
        (lambda table: table[:1] + table[2:], "reads attended, which nothing has written"),
        (lambda table: [table[1], table[0], *table[2:]], "reads raw, which nothing has written"),
        (lambda table: table[:11] + table[12:], r"phase 11 .* reads x1\+, which nothing has written"),
    ],
    ids=["starts late", "no attention", "swapped", "no code 0"],
)
def test_a_table_that_reads_what_was_not_written_is_refused(
    change: Callable[[list[Phase]], list[Phase]], why: str
) -> None:
    table = change(schedule.frame(PLAIN))
    assert re.search(why, schedule.verify(table, PLAIN, cuts(PLAIN, 4))[0])


def test_what_goes_wrong_without_a_barrier_is_said() -> None:
    table, sizes = schedule.frame(PLAIN), cuts(PLAIN, 4)
    assert "phase 3 (gate_up of talker layer 0, code 0) reads parts, which another block may not have written yet" in (
        schedule.verify(table, PLAIN, sizes, dropped=[2])
    )
    assert "phase 5 (qkv of talker layer 1, code 0) overwrites x1, which another block may still be reading" in (
        schedule.verify(table, PLAIN, sizes, dropped=[3, 4])
    )


# -- whether the kernels do what the table says ------------------------------------------------------------------------


class Watch(TestLauncher):
    """Runs a frame of one voice phase by phase; what a phase does not read holds NaN, what it writes must be said."""

    stray: list[str]

    def launch(self, table: str, columns: int, args: Args) -> None:
        if table == "prefill":
            return super().launch(table, columns, args)
        library, self.stray = self.instance(columns), []
        shared = shared_bytes(self.shape, columns, self.threads, self.staged_bytes)
        for index, phase in enumerate(schedule.frame(self.shape)):
            reads, writes = schedule.accesses(phase, self.shape, self.cuts)
            buffers = Buffers(self.step, columns, phase.part)
            kept = buffers.mask(reads)
            saved = {name: tensor.clone() for name, tensor in buffers.tensors.items()}
            for name, tensor in buffers.tensors.items():
                tensor[~kept[name]] = NOTHING
            before = {name: tensor.clone() for name, tensor in buffers.tensors.items()}
            library.launch("phase", PhaseArgs(args, index), self.blocks, self.threads, shared)
            said = buffers.mask(writes)
            for name, tensor in buffers.tensors.items():
                written = tensor != before[name]
                if not torch.equal(written, said[name]):
                    extra, missing = (written & ~said[name]).sum(), (said[name] & ~written).sum()
                    self.stray.append(f"{phase}: {name}: {extra} unsaid, {missing} not written")
                tensor[~written] = saved[name][~written]
        return None


NOTHING = 0x7FC0_1234
"""A NaN that no computation makes; codes hold it, too."""


class Buffers:
    """The scratch of a voice in column 0 as int32, by the names and in the units of schedule.accesses."""

    def __init__(self, step: KernelFrameStep, columns: int, part: Part) -> None:
        shape = step.shape
        stack = shape.talker if part is Part.TALKER else shape.predictor
        slots, wide = 2 * columns, max(shape.talker.hidden, shape.predictor.hidden)
        self.stack, self.slots, self.wide = stack, slots, wide
        self.columns = columns
        self.tensors = {
            name: step._scratch[name].view(torch.int32).flatten()
            for name in ("x0", "x1", "parts", "raw", "attended", "inner", "logits")
        }
        self.tensors["pending"] = step.pending[0].view(torch.int32)
        self.tensors["codes"] = step.codes.flatten()

    def places(self, access: Access) -> tuple[str, Tensor]:
        """The buffer, and the indices of the values that an access touches."""
        name, stack = access.buffer.rstrip("+"), self.stack
        slot = self.columns if access.buffer.endswith("+") else 0
        units = torch.from_numpy(access.units)
        size, at = 16, units * 16
        if name in ("x0", "x1"):
            at = at + slot * self.wide
        elif name == "parts":
            tiles = stack.hidden // 16
            at = (units // tiles * self.slots + slot) * self.wide + units % tiles * 16
        elif name == "raw":
            at = at + slot * (stack.q_size + 2 * stack.kv_size)
        elif name == "attended":
            size = stack.head_dim
            at = units * size + slot * stack.q_size
        elif name == "inner":
            size = 8
            at = units * size + slot * stack.intermediate
        elif name == "codes":
            size, at = 1, units
        return name, (at[:, None] + torch.arange(size)).flatten()

    def mask(self, accesses: list[Access]) -> dict[str, Tensor]:
        """Which values of each buffer these accesses touch. Keys and values are left out: they outlive a frame."""
        masks = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in self.tensors.items()}
        for access in accesses:
            if "_kv" not in access.buffer:
                name, places = self.places(access)
                masks[name][places] = True
        return masks


@pytest.mark.skipif(cucpu.unavailable() is not None, reason=cucpu.unavailable() or "")
@pytest.mark.parametrize("shape", [PLAIN, PROJECTED], ids=["plain", "projected"])
def test_the_kernels_read_and_write_what_the_table_says(shape: Shape) -> None:
    speaker, answers = voice(shape, 1), []
    for kind in (TestLauncher, Watch):
        step = kernel_step(shape, 1, 1, kind=kind, phases=True)
        speaker.join(step, 0)
        answers.append(speak(step, {0: speaker}, [[0]] * 2)[0])
        if isinstance(step.launcher, Watch):
            assert step.launcher.stray == []
    assert torch.equal(*answers)
