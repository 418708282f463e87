"""Plants bugs in copies of the kernels' source, one at a time, and says whether each is found, and how.

    python -m tests.kernel_bugs [WORD ...]

prints a table, of the bugs that have all these words in their names, and fails if one of them stays unseen. The kernels
run on the CPU (megakernel/cucpu), each bug in a process of its own, which it may tear down.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megakernel import cucpu
from megakernel.cucpu import BadMemoryAccess, CucpuError, Deadlock, Divergence, Race
from megakernel.cucpu.launcher import SOURCES
from megakernel.frame_step import TorchFrameStep
from megakernel.kernel_step import KernelFrameStep
from megakernel.shape import Shape, StackShape
from tests.kernel_cases import PROJECTED, TestLauncher, kernel_step, small_shape, speak, spoken, voice, weights_of

SMALL = small_shape(StackShape(2, 64, 96, 4, 2, 32), StackShape(1, 64, 64, 4, 2, 32), 3)

CUT = {"blocks": 3, "threads": 64, "staged_bytes": 1}
"""More work items than blocks, and activations staged in several rounds."""

CACHED = {4: 0, 7: 100, 11: 130}
"""The trial's voices: row, and positions that are there before the prompt; 130 are cut into pieces of unequal sizes."""

POSITIONS = 136
"""Of each row: the voice in the last one fills it."""

COLUMNS = (0, 9, 11)
"""Where they stand, of 16: in both tiles of eight, and two of them drawn by one block."""


LIMIT_S = 1200
"""For one bug. Most take seconds; on a core shared with ten others, the slowest took 254."""

ROOT = Path(__file__).parent.parent


class WrongResult(Exception):
    """The kernels' codes, keys or values are not those of the twin."""


@dataclass(frozen=True)
class Bug:
    """One change of the source, and how it must be found.

    old, new  what stands once in the file, and what takes its place
    found     what the trial raises
    names     parts of source lines: one line of the report names all of them, as file:line
    orders    in which blocks run: first the plain one, then drawn ones; the first that finds it is enough
    quick     planted by `make test`, too
    """

    name: str
    file: str
    old: str
    new: str
    found: type[Exception]
    names: tuple[str, ...] = ()
    orders: int = 1
    shape: Shape = SMALL
    quick: bool = False

    @property
    def flavour(self) -> cucpu.Flavour:
        """The build that finds it."""
        return "tsan" if self.found is Race else "asan" if self.found is BadMemoryAccess else "plain"


def bug(name: str, file: str, old: str, new: str, found: type[Exception], *names: str, **more) -> Bug:
    """A Bug, the lines that its report names last."""
    return Bug(name, file, old, new, found, names, **more)


WAIT = "if (p > 0) barrier.wait(p);"
SYNC = "__syncthreads();"
NEXT = "p + 1 < args.phases ? args.table[p + 1]"

# what the reports name
SUMS_WRITTEN = "((float4*)sums)[(warp * BATCH * NT + i) * LANES + lane] = make_float4("
SUMS_READ = "+= d[j"
PRODUCT_WRITTEN = "to[0] = low, to[8] = high;"
HEAD_READ = "float4 a = *(const float4*)(head + 4 * j), b = "
STREAM_READ = "float4 v = *(const float4*)(x + size_t(slot) * WIDE + k);"
PARTS_READ = "float4 y = *(const float4*)(a.parts + (size_t(p) * SLOTS + slot) * WIDE + k);"
LOGITS_READ = "float x = a.logits[size_t(column) * VOCAB + i];"
HEAD_WRITTEN = "float4*)(head + "
ATTENDED_WRITTEN = "a.attended[at * HEAD_DIM + d] ="
ATTENDED_READ = "float4 x = *(const float4*)(a.attended + size_t(slot) * S::q + k);"
WARP_SUM_WRITTEN = "if (lane == 0) w.sums[warp][g][0] = highest"
WARP_SUM_READ = "w.sums[other][g]"
INNER_WRITTEN = "a.inner[size_t(slot) * S::inter + tile * 8 + row] ="
INNER_READ = "Quad load_quad(const Quad* p, bool real) { return real ? *p"
FED_WRITTEN = "to[k] = widen(from[k]);"


def unless_after(op: str) -> str:
    """The wait, but for the one after an operation."""
    return f"if (p > 0 && args.table[p - 1].op() != {op}) barrier.wait(p);"


BUGS = [
    # between blocks
    bug("nobody waits at the grid barrier", "frame.cu", WAIT, "", Race, PRODUCT_WRITTEN, HEAD_READ, quick=True),
    bug("one block does not wait", "frame.cu", WAIT, "if (p > 0 && blockIdx.x != 1) barrier.wait(p);", Race),
    bug("no barrier after qkv", "frame.cu", WAIT, unless_after("QKV"), Race, PRODUCT_WRITTEN, HEAD_READ, orders=9),
    bug(
        "no barrier after attention",
        "frame.cu",
        WAIT,
        unless_after("ATTENTION"),
        Race,
        ATTENDED_WRITTEN,
        ATTENDED_READ,
        orders=9,
    ),
    bug("no barrier after o", "frame.cu", WAIT, unless_after("O"), Race, PRODUCT_WRITTEN, PARTS_READ, orders=9),
    bug(
        "no barrier after gate-up", "frame.cu", WAIT, unless_after("GATE_UP"), Race, INNER_WRITTEN, INNER_READ, orders=9
    ),
    bug("no barrier after down", "frame.cu", WAIT, unless_after("DOWN"), Race, PRODUCT_WRITTEN, PARTS_READ, orders=9),
    bug("no barrier after head", "frame.cu", WAIT, unless_after("HEAD"), Race, PRODUCT_WRITTEN, LOGITS_READ, orders=9),
    bug("no barrier after sample", "frame.cu", WAIT, unless_after("SAMPLE"), Race, FED_WRITTEN, STREAM_READ, orders=9),
    bug(
        "a block arrives before its threads are done",
        "frame.cu",
        f"{SYNC}\n        if (threadIdx.x == 0) add_release",
        "if (threadIdx.x == 0) add_release",
        Race,
        PRODUCT_WRITTEN,
        HEAD_READ,
    ),
    bug(
        "threads leave the barrier before their first one",
        "frame.cu",
        f"            }}\n        }}\n        {SYNC}",
        "            }\n        }",
        Race,
        PRODUCT_WRITTEN,
        HEAD_READ,
    ),
    bug("a barrier for one block too few", "frame.cu", "target += BLOCKS;", "target += BLOCKS - 1;", Race),
    bug("a barrier for one block too many", "frame.cu", "target += BLOCKS;", "target += BLOCKS + 1;", Deadlock),
    bug(
        "the kernel resets the counter",
        "frame.cu",
        "    GridBarrier barrier{args, args.arrived};",
        "    if (blockIdx.x == 0 && threadIdx.x == 0) *args.barrier = 0;\n    GridBarrier barrier{args, 0};",
        Deadlock,
        "pause(++polls);",
        orders=20,
        quick=True,
    ),
    bug(
        "a poll that acquires nothing",
        "platform.h",
        "return cucpu::load_acquire(p);",
        "return __atomic_load_n(p, __ATOMIC_RELAXED);",
        Race,
        PRODUCT_WRITTEN,
        HEAD_READ,
    ),
    bug(
        "an arrival that releases nothing",
        "platform.h",
        "cucpu::add_release(p, v);",
        "__atomic_fetch_add(p, v, __ATOMIC_RELAXED), cucpu::changed_memory();",
        Race,
        PRODUCT_WRITTEN,
        HEAD_READ,
    ),
    # between the threads of a block
    bug(
        "columns are used before they are there",
        "frame.cu",
        f"    {SYNC}\n    return w;",
        "    return w;",
        Race,
        "((u32*)w.columns)[i] =",
        "bool active(int slot)",
    ),
    bug(
        "sums are overwritten before they are read",
        "product.cuh",
        f"if (batch > 0) {SYNC}",
        "",
        Race,
        SUMS_WRITTEN,
        SUMS_READ,
        quick=True,
    ),
    bug(
        "sums are read before they are there",
        "product.cuh",
        f"between();\n        {SYNC}",
        "between();",
        Race,
        SUMS_WRITTEN,
        SUMS_READ,
    ),
    bug(
        "a barrier in a branch",
        "product.cuh",
        f"if (batch > 0) {SYNC}",
        f"if (batch > 0 && warp == 0) {SYNC}",
        Divergence,
        f"(batch > 0 && warp == 0) {SYNC}",
    ),
    bug(
        "activations are staged while the last round goes on",
        "phases.cuh",
        f"        if (from > first) {{\n            {SYNC}",
        "        if (from > first) {",
        Race,
        "w.squares[warp][8 * nt + g] = sum;",
        "sum += w.squares[i][column];",
        quick=True,
    ),
    bug(
        "the next round's sums overwrite the last one's",
        "phases.cuh",
        f"            if (from > 0) {{\n                {SYNC}",
        "            if (from > 0) {",
        Race,
        SUMS_WRITTEN,
        SUMS_READ,
    ),
    bug(
        "the projection overwrites the sums of the head",
        "phases.cuh",
        f"#if PROJECTED\n            {SYNC}",
        "#if PROJECTED",
        Race,
        SUMS_WRITTEN,
        SUMS_READ,
        shape=PROJECTED,
    ),
    bug(
        "attention reads new positions before they are there",
        "attention.cuh",
        f"        }}\n        {SYNC}\n    }}\n    for (int i = 0; i < c.fresh",
        "        }\n    }\n    for (int i = 0; i < c.fresh",
        Race,
        HEAD_WRITTEN,
        HEAD_READ,
    ),
    bug(
        "warps are put together before they are done",
        "attention.cuh",
        f"        {SYNC}\n        for (int o = threadIdx.x;",
        "        for (int o = threadIdx.x;",
        Race,
        WARP_SUM_WRITTEN,
        WARP_SUM_READ,
    ),
    bug(
        "attention goes on before its sums are read",
        "attention.cuh",
        f"        }}\n        {SYNC}\n    }}\n}}",
        "        }\n    }\n}",
        Race,
        HEAD_WRITTEN,
        "x += w.acc[other][g][d] * factor;",
    ),
    bug(
        "a histogram is filled before it is empty",
        "sample.cuh",
        f"w.bins[i] = 0;\n        {SYNC}",
        "w.bins[i] = 0;",
        Race,
        "w.bins[i] = 0;",
        "atomicAdd(&w.bins[key >> shift & 255u], 1u);",
    ),
    bug(
        "the values of a reduction are overwritten",
        "sample.cuh",
        f"w.warp_indices[i]}});\n    {SYNC}",
        "w.warp_indices[i]});",
        Race,
        "w.warp_values[threadIdx.x / LANES] = mine",
        "mine = better(mine, Best{w.warp_values[i], w.warp_indices[i]});",
    ),
    bug(
        "codes are summed before the last is there",
        "phases.cuh",
        f"        }} else {{\n            {SYNC}",
        "        } else {",
        Race,
        "codes[code] = drawn;",
        "int spoken = codes[g]",
    ),
    # what is read and written
    bug(
        "heads of the next code",
        "phases.cuh",
        "a.heads + (p.code() - 1) * CODE_HEAD_SIZE, a.predictor_norms",
        "a.heads + p.code() * CODE_HEAD_SIZE, a.predictor_norms",
        BadMemoryAccess,
        "Fragment load_weights(const Fragment* p, bool real = true) { return real ? *p",
        quick=True,
    ),
    bug(
        "embeddings of the next codebook",
        "phases.cuh",
        "a.inputs + (size_t(code) * CODES + entry)",
        "a.inputs + (size_t(code + 1) * CODES + entry)",
        BadMemoryAccess,
    ),
    bug(
        "an empty column is drawn",
        "phases.cuh",
        "if (c.row < 0) continue;\n        int drawn",
        "int drawn",
        BadMemoryAccess,
        "if (a.history[size_t(c.row) * VOCAB_WORDS + i / 32]",
    ),
    bug(
        "keys are read past the position",
        "attention.cuh",
        "to = from + size < c.start ? from + size : c.start;",
        "to = from + size;",
        WrongResult,
        quick=True,
    ),
    bug(
        "a position is appended one row too far",
        "attention.cuh",
        "* c.positions + c.start + i) * HEAD_DIM;",
        "* c.positions + c.start + i + 1) * HEAD_DIM;",
        BadMemoryAccess,
        "*(Quad*)(head + 4 * j) = narrow4(",
    ),
    bug(
        "a prompt sees its future",
        "attention.cuh",
        "visible = last ? i + 1 : 0",
        "visible = last ? c.fresh : 0",
        WrongResult,
    ),
    bug(
        "a voice attends to the row of its column",
        "phases.cuh",
        "keys + (talker ? c.row : column) * row_size",
        "keys + column * row_size",
        WrongResult,
    ),
    bug(
        "weights are read ahead for the phase after the next",
        "frame.cu",
        NEXT,
        NEXT.replace("1", "2"),
        WrongResult,
        quick=True,
    ),
    bug(
        "the last round's weights are multiplied again",
        "phases.cuh",
        "            read_ahead(b.ahead, shelf<M, NT>(weights));\n        }\n        stage",
        "        }\n        stage",
        WrongResult,
    ),
    bug(
        "the random numbers of the next frame",
        "sample.cuh",
        "philox(c.frame, g,",
        "philox(c.frame + 1, g,",
        WrongResult,
    ),
    bug(
        "a part of each sum is left out",
        "phases.cuh",
        "for (int p = 0; p < SPLIT; p++) {",
        "for (int p = 1; p < SPLIT; p++) {",
        WrongResult,
    ),
]


def plant(bug: Bug, folder: Path) -> None:
    """Write a copy of the source with the bug. Raises ValueError if its place is not found once."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in SOURCES.iterdir():
        text, copy = path.read_text(), folder / path.name
        if path.name == bug.file:
            if text.count(bug.old) != 1:
                raise ValueError(f"{bug.name}: {bug.file} has {text.count(bug.old)} times {bug.old!r}")
            text = text.replace(bug.old, bug.new)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)


def trial(
    shape: Shape,
    flavour: cucpu.Flavour = "plain",
    sources: Path = SOURCES,
    seed: int | None = None,
    phases: bool = False,
) -> None:
    """Three voices of different lengths say three frames; raises what is wrong with them."""

    class Launcher(TestLauncher):
        """From these sources."""

    Launcher.sources = sources
    noise = "nan" if flavour == "plain" else None  # what is found by another build is found without
    step = kernel_step(shape, 12, 12, POSITIONS, noise, Launcher, flavour=flavour, seed=seed, phases=phases, **CUT)
    step.width, step.at, step.patience = 16, COLUMNS, 10**12
    for row, (codes, known) in say(step, shape).items():
        wanted, remembered = expected(shape)[row]
        if not torch.equal(spoken(codes), spoken(wanted)):
            raise WrongResult(f"row {row} said {codes.tolist()} instead of {wanted.tolist()}")
        if len(spoken(codes)) == len(codes) and not torch.allclose(known, remembered, rtol=0, atol=1e-4):
            raise WrongResult(f"row {row} remembers something else: {(known - remembered).abs().max()}")


def say(step: KernelFrameStep | TorchFrameStep, shape: Shape) -> Mapping[int, tuple[Tensor, Tensor]]:
    """What each of the trial's voices says, and the keys and values that it leaves."""
    voices = {row: voice(shape, 1 + i, cached) for i, (row, cached) in enumerate(CACHED.items())}
    for row, speaker in voices.items():
        speaker.join(step, row)
    codes = speak(step, voices, [list(voices)] * 3)
    return {row: (codes[row], step.kv[:, :, row, :, : step.position(row)]) for row in voices}


@cache
def expected(shape: Shape) -> Mapping[int, tuple[Tensor, Tensor]]:
    """What the twin says and remembers."""
    return say(TorchFrameStep(weights_of(shape, torch.float32), shape, 12, 12, POSITIONS), shape)


def hunt(bug: Bug) -> tuple[bool, str]:
    """Whether the bug is found as it must be, and what was found."""
    return verdict([sys.executable, "-m", "tests.kernel_bugs", "--here", bug.name])


def verdict(command: list[str], limit_s: float = LIMIT_S) -> tuple[bool, str]:
    """What a hunt in a process of its own came to; one that dies or does not end has found nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return False, f"nothing in {limit_s} seconds"
    if done.returncode < 0:
        return False, f"the process died of {signal.Signals(-done.returncode).name}\n{done.stdout}{done.stderr}"
    return done.returncode == 0, done.stdout or done.stderr


def hunt_here(bug: Bug) -> tuple[bool, str]:
    """The same in this process."""
    cached = os.environ.get("PIPECAT_QWEN3_CACHE") or Path.home() / ".cache" / "pipecat-qwen3"
    folder = Path(cached) / "bugs" / re.sub(r"\W+", "-", bug.name)
    plant(bug, folder)
    report = "nothing"
    for order in range(bug.orders):
        try:
            trial(bug.shape, bug.flavour, folder, order - 1 if order else None)
        except (CucpuError, WrongResult) as error:
            report = f"{type(error).__name__}: {str(error).replace(f'{folder}/', '')}"
            if type(error) is bug.found and (line := telling(bug, report, folder)):
                return True, f"{bug.found.__name__}: {line.strip()}"
    return False, report


def telling(bug: Bug, report: str, folder: Path) -> str | None:
    """The line of a report that names all source lines that it should."""
    named = [re.compile("|".join(rf"{re.escape(p)}\b" for p in places(folder, part)) or "(?!)") for part in bug.names]
    lines = report.removeprefix(f"{bug.found.__name__}: ").splitlines()
    return next((line for line in lines if all(pattern.search(line) for pattern in named)), None)


def places(folder: Path, part: str) -> list[str]:
    """file:line of every source line that holds this text."""
    return [
        f"{path.name}:{number}"
        for path in folder.iterdir()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if part in line
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant bugs in the kernels and see them found.")
    parser.add_argument("word", nargs="*", help="only bugs that have all these words in their names")
    parser.add_argument("--here", metavar="BUG", help="only this bug, in this process: prints what is found")
    options = parser.parse_args()
    if reason := cucpu.unavailable():
        raise SystemExit(reason)
    torch.set_num_threads(1)
    if options.here:
        found, report = hunt_here(next(bug for bug in BUGS if bug.name == options.here))
        print(report)
        raise SystemExit(not found)
    unseen = []
    print(f"{'':2}{'bug':54}{'build':7}{'seconds':>8}  found")
    for bug in BUGS:
        if all(word in bug.name.split() for word in options.word):
            start = time.perf_counter()
            found, report = hunt(bug)
            took = f"{time.perf_counter() - start:8.1f}"
            print(f"{' ' if found else '!':2}{bug.name:54}{bug.flavour:7}{took}  {report.splitlines()[0]}", flush=True)
            unseen += [] if found else [bug.name]
    if unseen:
        raise SystemExit(f"not found as they should be: {', '.join(unseen)}")


if __name__ == "__main__":
    main()
