"""What reaches the CUDA driver, and what its refusals become; the driver is one of ours, without a GPU."""

import os
import re
import struct
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

from tests.fake_cuda import ROOT, FakeCuda, Ran

pytest.importorskip("cuda.bindings.driver", reason="the bindings are there on Linux alone")

START = """
import ctypes, sys
from pathlib import Path
from megakernel import build, cuda_kernel, gpu
from megakernel.gpu import CudaError

class Arguments(ctypes.Structure):
    _fields_ = [("weights", ctypes.c_void_p), ("out", ctypes.c_void_p), ("arrived", ctypes.c_void_p),
                ("launched", ctypes.c_uint)]

def load():
    sizes = {"THREADS": 128, "STEPS": 3, "EPSILON": 1e-6}
    found = gpu.facts(0)
    arch = build.arch_for(found.name, found.capability)
    return cuda_kernel.load(build.compile(sizes, arch, Path("tests/toy")), found)

arguments = Arguments(0x1122334455667788, 2, 3, 4)
"""

GRID = "grid 132,1,1 block 128,1,1"
A100 = {"name": "NVIDIA A100-SXM4-80GB", "major": 8, "multiprocessors": 108, "shared": 166912}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    return FakeCuda(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["PIPECAT_QWEN3_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def run(fake: FakeCuda, program: str, **answers: object) -> Ran:
    return fake.run(START + program, **answers)


def refusal(fake: FakeCuda, program: str, **answers: object) -> str:
    """The CudaError of a program, which is one line."""
    wrapped = f"try:\n    {program}\nexcept CudaError as error:\n    print(error)"
    (line,) = run(fake, wrapped, **answers).printed
    return line


def packed(*numbers: int) -> str:
    return struct.pack("<QQQII", *numbers, 0).hex()


# -- facts --------------------------------------------------------------------------------------------------------


def test_the_facts_are_the_drivers(fake: FakeCuda) -> None:
    (h100,) = run(fake, "print(gpu.facts(0))").printed
    assert h100 == (
        "Gpu(index=0, name='NVIDIA H100 80GB HBM3', capability=(9, 0), multiprocessors=132, shared_bytes=232448, "
        "l2_bytes=52428800, cooperative=True, cuda=(13, 0), shared_by='')"
    )
    (shared,) = run(fake, "print(gpu.facts(0))", mps=1, version=12080, cooperative=0).printed
    assert "cooperative=False, cuda=(12, 8), shared_by='MPS'" in shared
    (part,) = run(fake, "print(gpu.facts(0))", name="NVIDIA A100-SXM4-40GB MIG 1g.5gb").printed
    assert "shared_by='MIG'" in part


def test_an_old_driver_is_not_asked_what_it_does_not_know(fake: FakeCuda) -> None:
    program = "print(gpu.facts(0).shared_by, load()['steps'].argument_bytes)"
    ran = run(fake, program, version=12020)
    assert (ran.printed, ran.asked) == ([" None"], [])


# -- launches -----------------------------------------------------------------------------------------------------


def test_a_launch_hands_over_grid_stream_and_arguments_as_they_are_then(fake: FakeCuda) -> None:
    ran = run(
        fake,
        """
launch = cuda_kernel.Launch(load()["steps"], 132, 128, 2048)
launch(arguments, 0x77)
arguments.launched = 5
launch(arguments, 0)
""",
    )
    start = f"steps {GRID} shared 2048"
    assert ran.asked[1:] == [
        f"{start} stream 0x77 arguments {packed(0x1122334455667788, 2, 3, 4)}",
        f"{start} stream (nil) arguments {packed(0x1122334455667788, 2, 3, 5)}",
    ]


COOPERATIVE, PROGRAMMATIC = "attribute 2=1", "attribute 6=1"  # numbers: enum CUlaunchAttributeID


@pytest.mark.parametrize(
    ("options", "machine", "attributes"),
    [
        ("cooperative=True", {}, [COOPERATIVE]),
        ("overlap=True", {}, [PROGRAMMATIC]),
        ("cooperative=True, overlap=True", {}, [COOPERATIVE, PROGRAMMATIC]),
        ("overlap=True", A100, []),
    ],
)
def test_a_launch_can_be_cooperative_and_from_sm_90_on_overlap(
    fake: FakeCuda, options: str, machine: dict[str, object], attributes: list[str]
) -> None:
    ran = run(fake, f"cuda_kernel.Launch(load()['steps'], 100, 128, {options})(arguments, 1)", **machine)
    _, _, attached = ran.asked[-1].partition("stream 0x1 ")
    assert attached == " ".join([*attributes, f"arguments {packed(0x1122334455667788, 2, 3, 4)}"])


def test_a_kernel_may_have_the_most_shared_memory_that_any_launch_asked_for(fake: FakeCuda) -> None:
    ran = run(
        fake,
        """
steps = load()["steps"]
big = cuda_kernel.Launch(steps, 132, 128, 200_000, cooperative=True)
small = cuda_kernel.Launch(steps, 132, 128, 100_000)
big(arguments, 1), small(arguments, 1)
""",
    )
    assert ran.asked[1] == "steps may have 200000 bytes"
    assert [line.split("arguments")[0] for line in ran.asked[2:]] == [
        f"steps {GRID} shared 200000 stream 0x1 {COOPERATIVE} ",
        f"steps {GRID} shared 100000 stream 0x1 ",
    ]


def test_another_thread_launches_once_it_has_made_the_gpu_current(fake: FakeCuda) -> None:
    program = """
from threading import Thread
launch = cuda_kernel.Launch(load()["steps"], 1, 128)
def attempt():
    try:
        launch(arguments, 1)
    except CudaError as error:
        print(error)
    gpu.make_current(0)
    launch(arguments, 1)
thread = Thread(target=attempt)
thread.start(), thread.join()
"""
    ran = run(fake, program)
    assert ran.printed == [
        "launching 1 blocks of kernel steps: CUDA_ERROR_INVALID_CONTEXT; the GPU is not current in this thread; call "
        "gpu.make_current() in it first"
    ]
    assert len(ran.asked) == 2


# -- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "machine", "reason"),
    [
        ("132, 128, 2048", {}, "None"),
        (
            "133, 128, 2048",
            {},
            "kernel steps wants 133 blocks of 128 threads, .* run at once, NVIDIA H100 .* holds 132",
        ),
        ("133, 128", {"each": 2}, "None"),
        ("132, 128", {"multiprocessors": 60, "mps": 1}, ".* holds 60 in the part that MPS leaves"),
        ("132, 128", {"cooperative": 0}, "NVIDIA H100 .* cannot launch cooperatively; use --backend graph"),
        ("132, 128, 232432", {}, "None"),
        ("132, 128, 232433", {}, "kernel steps needs 232449 bytes of shared memory a block, NVIDIA H100 .* has 232448"),
    ],
)
def test_blocks_that_cannot_run_at_once_are_told_why(
    fake: FakeCuda, grid: str, machine: dict[str, object], reason: str
) -> None:
    (line,) = run(fake, f"print(cuda_kernel.cooperative_fits(load()['steps'], {grid}))", **machine).printed
    assert re.fullmatch(reason, line), line


def test_a_cooperative_launch_that_does_not_fit_is_never_made(fake: FakeCuda) -> None:
    line = refusal(fake, "cuda_kernel.Launch(load()['steps'], 200, 128, cooperative=True)")
    assert line.startswith("kernel steps wants 200 blocks")


def test_arguments_of_another_size_than_the_kernels_are_refused(fake: FakeCuda) -> None:
    line = refusal(fake, "cuda_kernel.Launch(load()['steps'], 1, 128)(arguments, 1)", arguments=40)
    assert line == "kernel steps takes 40 bytes of arguments, Arguments has 32; the two layouts differ"


@pytest.mark.parametrize(
    ("program", "answer", "line"),
    [
        ("gpu.facts(0)", {"cuInit": 100}, "looking at GPU 0: CUDA_ERROR_NO_DEVICE; .* use --device cpu"),
        ("gpu.facts(3)", {"cuDeviceGet": 101}, "looking at GPU 3: CUDA_ERROR_INVALID_DEVICE; there is no GPU of .*"),
        ("load()", {"cuDevicePrimaryCtxRetain": 2}, "opening GPU 0: CUDA_ERROR_OUT_OF_MEMORY; .* see nvidia-smi .*"),
        (
            "load()",
            {"cuModuleLoadData": 200, "version": 12060},
            r"loading the sm_90 kernels of CUDA \d+\.\d+ onto NVIDIA H100 80GB HBM3 \(driver for CUDA 12.6\): "
            "CUDA_ERROR_INVALID_IMAGE; .*update it or use --backend torch",
        ),
        ("load()", {"cuModuleLoadData": 209}, "loading .*: CUDA_ERROR_NO_BINARY_FOR_GPU; .*use --backend torch"),
        ("load()", {"cuModuleGetFunction": 2}, "loading .*: CUDA_ERROR_OUT_OF_MEMORY; .*"),
        (
            "cuda_kernel.Launch(load()['steps'], 132, 128, cooperative=True)(arguments, 1)",
            {"cuLaunchKernelEx": 720},
            "launching 132 blocks of kernel steps: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE; .* --backend graph",
        ),
        (
            "cuda_kernel.Launch(load()['steps'], 132, 128)(arguments, 1)",
            {"cuLaunchKernelEx": 719},
            "launching .*: CUDA_ERROR_LAUNCH_FAILED; a kernel that ran before has failed, .*; restart it",
        ),
        (
            "cuda_kernel.Launch(load()['steps'], 132, 128)(arguments, 1)",
            {"cuLaunchKernelEx": 900},
            "launching .*: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; see CUresult .*",
        ),
    ],
)
def test_a_refusal_says_what_was_wanted_what_came_and_what_to_do(
    fake: FakeCuda, program: str, answer: dict[str, object], line: str
) -> None:
    assert re.fullmatch(line, refusal(fake, program, **answer))


# -- machines without any of it -----------------------------------------------------------------------------------


def plainly(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(find_library("cuda") is not None, reason="this machine has a driver")
def test_a_machine_without_a_driver_is_told_so() -> None:
    program = "from megakernel import gpu\ntry:\n    gpu.facts(0)\nexcept gpu.CudaError as error:\n    print(error)"
    (line,) = plainly(program)
    assert line.startswith("looking at GPU 0: no usable NVIDIA driver; install or update it, or use the CPU (")


def test_the_modules_can_be_imported_where_there_are_no_bindings(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["cuda.bindings"] = None
from megakernel import build, cuda_kernel, gpu
try:
    gpu.facts(0)
except gpu.CudaError as error:
    print(error)
"""
    assert plainly(program) == ["looking at GPU 0: cuda-bindings is not installed; pip install cuda-bindings"]
    imported = plainly(
        "import sys, megakernel.cuda_kernel; print(*(name for name in sys.modules if name.startswith('cuda')))"
    )
    assert imported == [""]
