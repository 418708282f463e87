import os
import warnings

import pytest
import torch

from pipecat_qwen3 import device
from pipecat_qwen3.device import cpu_has_bf16, cuda_missing, pick_device, pick_dtype
from pipecat_qwen3.errors import BackendError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch report a GPU: gpu(cuda="13.0", found=True, capability=(9, 0), failure=None)."""

    def report(cuda="13.0", found=True, capability=(9, 0), failure=None, warning=None):
        def available() -> bool:
            if warning:
                warnings.warn(warning, UserWarning, stacklevel=1)
            return found

        def compute() -> None:
            if failure:
                raise failure

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something")
        monkeypatch.setattr(device, "_compute", compute)

    return report


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 1)])
def test_a_gpu_that_works_is_taken(gpu, capability):
    gpu(capability=capability)
    assert cuda_missing() is None
    assert pick_device("auto") == pick_device("cuda") == CUDA
    assert pick_device("cpu") == CPU


OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\nPlease update it"
NO_KERNEL = RuntimeError(
    "CUDA error: no kernel image is available for execution on the device\nCompile with TORCH_USE_"
)


@pytest.mark.parametrize(
    ("here", "why"),
    [
        ({"cuda": None}, "this torch is built without CUDA"),
        ({"found": False}, "torch finds no NVIDIA GPU, or its driver is too old for CUDA 13.0"),
        (
            {"found": False, "warning": OLD_DRIVER},
            "CUDA 13.0 (CUDA initialization: The NVIDIA driver on your system is",
        ),
        ({"capability": (7, 5)}, "NVIDIA Something is sm_75; bf16 needs sm_80 (Ampere) or later"),
        (
            {"failure": torch.OutOfMemoryError("CUDA out of memory. Tried")},
            "the GPU cannot be used (CUDA out of memory.",
        ),
        (
            {"failure": NO_KERNEL},
            "the GPU cannot be used (CUDA error: no kernel image is available for execution on the",
        ),
    ],
    ids=["no CUDA", "no GPU", "old driver", "old GPU", "full", "too new"],
)
def test_a_gpu_that_cannot_be_used_is_left_alone_by_auto_and_explained_when_named(gpu, here, why):
    gpu(**here)
    assert pick_device("auto") == CPU
    with pytest.raises(BackendError) as caught:
        pick_device("cuda")
    line = str(caught.value)
    assert line.startswith("device cuda cannot be had: ")
    assert why in line
    assert line.endswith("; use --device cpu or auto")
    assert "\n" not in line


def test_a_process_whose_gpu_is_broken_from_the_start_is_no_traceback(gpu, monkeypatch):
    def fail() -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert cuda_missing() == "the GPU cannot be used (Cannot re-initialize CUDA in forked subprocess.)"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"architecture": "arm64", "bf16": True}, torch.float32),
        ({}, torch.float32),
    ],
    ids=["AVX-512", "AVX-512 bf16", "AMX", "Arm", "unknown"],
)
def test_a_cpu_runs_bf16_only_where_it_has_the_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_dtype("auto", CPU) == expected
    assert pick_dtype("auto", CUDA) == torch.bfloat16
    assert pick_dtype("fp32", CUDA) == pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16


def test_an_older_torch_that_cannot_tell_runs_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_dtype("auto", CPU) == torch.float32


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="there is no /proc/cpuinfo to compare with")
def test_what_torch_says_of_this_cpu_is_what_the_kernel_says():
    with open("/proc/cpuinfo") as info:
        flags = info.read().split()
    assert cpu_has_bf16() == ("avx512_bf16" in flags or "amx_bf16" in flags)


@pytest.mark.parametrize("wanted", ["", "gpu", "CUDA", "cuda:1", "mps"])
def test_an_unknown_device_or_dtype_is_refused(wanted):
    with pytest.raises(BackendError, match=f"device should be auto, cpu or cuda, but is '{wanted}'"):
        pick_device(wanted)
    with pytest.raises(BackendError, match=f"dtype should be auto, bf16 or fp32, but is '{wanted}'"):
        pick_dtype(wanted, CPU)
