"""Which launcher runs: only "auto" falls back and says why; what was asked for by name and cannot be had is refused."""

from collections.abc import Callable

import pytest
import torch

from megakernel import gpu, launch
from megakernel.choose import UnavailableError, choose
from megakernel.gpu import CudaError, Gpu
from megakernel.nvrtc import BuildError
from megakernel.shape import Shape
from pipecat_qwen3.checkpoint import Checkpoint

H100 = Gpu(0, "NVIDIA H100", (9, 0), 132, 232448, 50 << 20, True, (13, 0), "")


@pytest.fixture(scope="module")
def shape() -> Shape:
    return Checkpoint.open("embedded").config.shape


def refusing(error: Exception) -> Callable[..., None]:
    def launcher(*_: object) -> None:
        raise error

    return launcher


def test_without_a_gpu_auto_is_numba_and_a_launcher_asked_for_by_name_is_refused(shape: Shape) -> None:
    choice = choose("auto", "cpu", torch.bfloat16, shape, 8)
    assert (choice.name, choice.launcher) == ("numba", None)
    assert "CPU" in choice.reason
    for wanted in ("persistent", "graph"):
        with pytest.raises(UnavailableError, match=f"'{wanted}' cannot be had: .*GPU.*; use --backend torch"):
            choose(wanted, "cpu", torch.bfloat16, shape, 8)
    with pytest.raises(UnavailableError, match="one of auto, persistent"):
        choose("fast", "cpu", torch.bfloat16, shape, 8)


def test_fp32_on_a_gpu_is_torch(shape: Shape) -> None:
    assert "bf16" in choose("auto", "cuda", torch.float32, shape, 8).reason


def test_a_grid_that_does_not_fit_falls_back_to_the_graph_and_says_why(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "facts", lambda: H100)
    monkeypatch.setattr(
        launch, "PersistentLauncher", refusing(CudaError("holds 66 blocks in the part that MIG leaves"))
    )
    monkeypatch.setattr(launch, "GraphLauncher", lambda *_: "the graph")
    choice = choose("auto", "cuda", torch.bfloat16, shape, 8)
    assert (choice.name, choice.launcher) == ("graph", "the graph")
    assert "MIG" in choice.reason
    with pytest.raises(UnavailableError, match="MIG"):
        choose("persistent", "cuda", torch.bfloat16, shape, 8)


def test_without_a_compiler_torch_runs_and_the_reason_names_it(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "facts", lambda: H100)
    for name in ("PersistentLauncher", "GraphLauncher"):
        monkeypatch.setattr(launch, name, refusing(BuildError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")))
    choice = choose("auto", "cuda", torch.bfloat16, shape, 8)
    assert choice.name == "torch"
    assert "pip install nvidia-cuda-nvrtc" in choice.reason
