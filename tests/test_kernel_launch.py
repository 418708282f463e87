"""The launchers and who chooses them, against a CUDA driver of ours: what is launched, captured, refused; no GPU."""

import ctypes
import re
from typing import NamedTuple

import pytest

from bench.gpu_place import DRY
from megakernel import build, cuda_kernel, prebuild, schedule
from megakernel.gpu import Gpu
from megakernel.kernels import Args
from megakernel.launch import THREADS, PersistentLauncher, PhaseArgs
from tests.fake_cuda import FakeCuda, Ran

pytest.importorskip("cuda.bindings.driver", reason="the bindings are there on Linux alone")

START = """
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from bench.gpu_place import DRY
from megakernel import build, gpu, launch
from megakernel.choose import UnavailableError, choose, make_step
from megakernel.kernels import Args
from megakernel.nvrtc import Figures
from megakernel.sampler import Sampling
from tests.kernel_cases import random_weights

def compiled(defines, arch):
    print(defines["THREADS"], defines["EOS"]) if defines["EOS"] != DRY.eos else None
    entry = next(name for name, number in launch.ENTRIES.items() if number == defines["ENTRY"])
    return build.Cubin(b"\177ELF", {entry: Figures(168, 0, 0, 0)}, arch, (13, 0), "compiled")

build.compile = compiled  # the driver takes anything
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0x55)
weights = random_weights(DRY, torch.bfloat16)

class Graph:
    captured = replayed = 0

    def replay(self):
        Graph.replayed += 1

@contextmanager
def capture(graph, capture_error_mode):
    Graph.captured += 1
    yield

torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture

def chosen(name):
    try:
        return choose(name, "cuda", torch.bfloat16, DRY, 4)
    except UnavailableError as error:
        print(error)

def speak(step, frames=1):
    step.admit(0, torch.zeros(64).bfloat16(), 0, Sampling())
    for _ in range(frames):
        step.step([0], torch.zeros(1, 64).bfloat16())
"""

COOPERATIVE, PROGRAMMATIC = "attribute 2=1", "attribute 6=1"  # numbers: enum CUlaunchAttributeID
LOST = "a kernel that ran before has failed, and this process cannot use the GPU any more; restart it"


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    return FakeCuda(tmp_path_factory.mktemp("driver"))


def run(fake: FakeCuda, program: str, takes: type[ctypes.Structure] = Args, **answers: object) -> Ran:
    """A program on a driver whose kernel takes these arguments."""
    return fake.run(START + program, arguments=ctypes.sizeof(takes), **answers)


class Launched(NamedTuple):
    """One launch: kernel and grid, attributes, the arguments."""

    grid: str
    attributes: str
    args: Args
    phase: int


def launched(ran: Ran, takes: type[ctypes.Structure] = Args) -> list[Launched]:
    found = []
    for line in ran.asked:
        if " grid " not in line:
            continue
        grid, _, rest = line.partition(" shared ")
        _, _, rest = rest.partition("stream 0x55 ")
        attributes, _, data = rest.partition("arguments ")
        made = takes.from_buffer_copy(bytes.fromhex(data))
        args, index = (made.args, made.index) if isinstance(made, PhaseArgs) else (made, 0)
        assert isinstance(args, Args)
        found.append(Launched(grid, attributes.strip(), args, index))
    return found


def test_a_frame_is_one_cooperative_launch_told_where_the_counter_stands(fake: FakeCuda) -> None:
    ran = run(
        fake,
        """
choice = chosen("auto")
print(choice.name, choice.reason)
step = make_step(choice, weights, DRY, 8, 4, 64)
speak(step, 2)
print(step.text.data_ptr(), step.kv.data_ptr())
""",
    )
    assert ran.printed[0] == "persistent the fastest"
    text, kv = map(int, ran.printed[1].split())
    lines = launched(ran)
    grid = f"persistent grid 132,1,1 block {THREADS},1,1"
    assert [line[:2] for line in lines] == [(grid, COOPERATIVE)] * 4  # two to warm, two frames
    frame, prefill = len(schedule.frame(DRY)), len(schedule.prefill(DRY))
    assert [line.args.phases for line in lines] == [frame, prefill, frame, frame]
    assert [line.args.prefill for line in lines] == [0, 1, 0, 0]
    arrived = [0, frame - 1, frame + prefill - 2, 2 * frame + prefill - 3]
    assert [line.args.arrived for line in lines] == [132 * n for n in arrived]
    assert {(line.args.text, line.args.kv, line.args.positions, line.args.rows) for line in lines} == {
        (text, kv, 64, 8)
    }


@pytest.mark.parametrize(("machine", "attributes"), [({}, PROGRAMMATIC), ({"major": 8, "shared": 166912}, "")])
def test_a_graph_is_captured_once_and_anew_when_a_pointer_changes(
    fake: FakeCuda, machine: dict[str, object], attributes: str
) -> None:
    ran = run(
        fake,
        """
step = make_step(chosen("graph"), weights, DRY, 8, 4, 64)
print(Graph.captured, Graph.replayed)
speak(step, 3)
print(Graph.captured, Graph.replayed)
step.text = step.text.clone()
speak(step, 2)
print(Graph.captured, Graph.replayed, step.text.data_ptr())
""",
        PhaseArgs,
        **machine,
    )
    text = int(ran.printed[2].split()[-1])
    assert ran.printed == ["2 2", "2 5", f"3 7 {text}"]
    lines = launched(ran, PhaseArgs)
    frame, prefill = len(schedule.frame(DRY)), len(schedule.prefill(DRY))
    assert [line.phase for line in lines] == [*range(frame), *range(prefill), *range(frame)]
    assert {line[:2] for line in lines} == {(f"phase grid 132,1,1 block {THREADS},1,1", attributes)}
    assert [line.args.text == text for line in lines] == [False] * (frame + prefill) + [True] * frame
    assert {line.args.arrived for line in lines} == {0}


@pytest.mark.parametrize(("capability", "blocks", "shared"), [((9, 0), 132, 232448), ((8, 0), 108, 166912)])
def test_a_wheel_brings_what_its_gpus_ask_for(
    capability: tuple[int, int], blocks: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped: list[tuple[dict[str, object], str]] = []
    asked: list[tuple[dict[str, object], str]] = []
    monkeypatch.setattr(build, "prebuild", lambda wanted: shipped.extend(wanted) or [])
    prebuild.main()
    monkeypatch.setattr(build, "compile", lambda defines, arch: asked.append((defines, arch)))
    monkeypatch.setattr(cuda_kernel, "load", lambda *_: {"persistent": None})
    monkeypatch.setattr(PersistentLauncher, "_prepare", lambda *_: None)
    gpu = Gpu(0, "", capability, blocks, shared, 50 << 20, True, (13, 0), "")
    for shape in prebuild.MODELS:
        PersistentLauncher(shape, gpu, 32)
    assert len(asked) == 2 * 4
    assert all(order in shipped for order in asked)
    assert len(shipped) == 2 * len(asked)


def test_threads_and_macros_that_are_asked_for_are_compiled_and_launched(fake: FakeCuda) -> None:
    program = "launch.PersistentLauncher(DRY, gpu.facts(), 4, 128, {'EOS': 7}).launch('frame', 4, Args())"
    ran = run(fake, program)
    assert ran.printed == ["128 7"] * 2  # for a frame and for prefill
    assert launched(ran)[0].grid == "persistent grid 132,1,1 block 128,1,1"


def test_where_not_all_blocks_fit_at_once_auto_takes_the_graph_and_says_why(fake: FakeCuda) -> None:
    program = "choice = chosen('auto')\nprint(choice.name, choice.reason)\nchosen('persistent')"
    auto, refused = run(fake, program, PhaseArgs, each=0, mps=1).printed
    why = "persistent: kernel persistent wants 132 blocks of .* at once, NVIDIA H100 .* holds 0 in .* that MPS leaves"
    assert re.fullmatch(f"graph {why}", auto)
    assert re.fullmatch(f"backend 'persistent' cannot be had: {why}; use --backend torch or auto", refused)


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        ({"major": 7, "minor": 5, "name": "Tesla T4"}, "Tesla T4 is sm_75, the CUDA kernels are made for sm_80, .*"),
        ({"cuInit": 100}, "looking at GPU 0: CUDA_ERROR_NO_DEVICE; no NVIDIA GPU is visible .*"),
        ({"cuModuleLoadData": 209}, "loading the sm_90 kernels .*: CUDA_ERROR_NO_BINARY_FOR_GPU; .*"),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels_is_named_and_left_to_torch(
    fake: FakeCuda, machine: dict[str, object], why: str
) -> None:
    program = "choice = chosen('auto')\nprint(choice.name, choice.reason)\nchosen('graph')"
    auto, refused = run(fake, program, Args, **machine).printed
    assert re.fullmatch(f"torch persistent: {why}; graph: {why}", auto)
    assert re.fullmatch(f"backend 'graph' cannot be had: graph: {why}; use --backend torch or auto", refused)


def test_a_context_that_is_dead_is_told_in_one_line(fake: FakeCuda) -> None:
    program = """
choice = chosen("persistent")
try:
    make_step(choice, weights, DRY, 8, 4, 64)
except gpu.CudaError as error:
    print(error)
"""
    (line,) = run(fake, program, cuLaunchKernelEx=719).printed
    assert line == f"launching 132 blocks of kernel persistent: CUDA_ERROR_LAUNCH_FAILED; {LOST}"
