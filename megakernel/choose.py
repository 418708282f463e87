"""What was asked for and what is here in, the FrameStep to run out, with the reason why not a better one."""

from dataclasses import dataclass

import torch

from megakernel import gpu, kernels
from megakernel.frame_step import FrameStep, TorchFrameStep
from megakernel.gpu import CudaError
from megakernel.kernel_step import KernelFrameStep, Launcher
from megakernel.nvrtc import BuildError
from megakernel.pack import pack_frame
from megakernel.reference import FrameWeights
from megakernel.shape import Shape

BACKENDS = ("auto", "persistent", "graph", "numba", "torch")


class UnavailableError(RuntimeError):
    """A launcher that was asked for by name and cannot be had here."""


@dataclass(frozen=True)
class Choice:
    """What runs the frame, and why not something better; a launcher is for the CUDA source."""

    name: str
    reason: str
    launcher: Launcher | None = None


def choose(wanted: str, device: str, dtype: torch.dtype, shape: Shape, columns: int) -> Choice:
    """Decide on persistent or graph (a GPU's), numba (a CPU's) or torch, and compile what that takes.

    Only "auto" falls back. Raises UnavailableError for a name that cannot be had.
    """
    if wanted not in BACKENDS:
        raise UnavailableError(f"backend should be one of {', '.join(BACKENDS)}, but is {wanted!r}")
    if wanted == "torch":
        return Choice("torch", "asked for by name")
    if device == "cpu" and wanted in ("auto", "numba"):
        lacking = _no_numba()
        if lacking is None:
            return Choice("numba", "asked for by name" if wanted == "numba" else "the fastest on a CPU")
        if wanted == "numba":
            raise UnavailableError(f"backend 'numba' cannot be had: {lacking}; use --backend torch or auto")
        return Choice("torch", lacking)
    if wanted == "numba":
        raise UnavailableError(f"backend 'numba' runs on a CPU and the device is {device}; use --backend auto")
    reason = _unfit(device, dtype, shape)
    if reason is None:
        from megakernel.launch import GraphLauncher, PersistentLauncher

        named = wanted != "auto"
        reasons = []
        for name, launcher in (("persistent", PersistentLauncher), ("graph", GraphLauncher)):
            if wanted not in ("auto", name):
                continue
            try:
                made = launcher(shape, gpu.facts(), columns)
            except (BuildError, CudaError) as error:
                reasons.append(f"{name}: {error}")
                continue
            return Choice(name, "asked for by name" if named else "; ".join(reasons) or "the fastest", made)
        reason = "; ".join(reasons)
    if wanted != "auto":
        raise UnavailableError(f"backend {wanted!r} cannot be had: {reason}; use --backend torch or auto")
    return Choice("torch", reason)


def _no_numba() -> str | None:
    try:
        from megakernel import cpu_step  # noqa: F401
    except Exception as error:  # numba raises what it likes where Python or numpy is too new for it
        return f"numba cannot be had ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None


def _unfit(device: str, dtype: torch.dtype, shape: Shape) -> str | None:
    if device != "cuda":
        return f"the CUDA launchers (persistent, graph) need an NVIDIA GPU and the device is {device}"
    if dtype != torch.bfloat16:
        return f"the CUDA launchers (persistent, graph) compute in bf16 and the dtype is {str(dtype).partition('.')[2]}"
    return kernels.unfit(shape)


def make_step(
    choice: Choice, weights: FrameWeights, shape: Shape, rows: int, columns: int, positions: int, threads: int = 1
) -> FrameStep:
    """The FrameStep of a choice; it keeps copies of the weights in the layout that it reads. `threads` are numba's."""
    if choice.name == "numba":
        from megakernel.cpu_step import CpuFrameStep

        return CpuFrameStep(weights, shape, rows, columns, positions, threads)
    if choice.launcher is None:
        return TorchFrameStep(weights, shape, rows, columns, positions)
    step = KernelFrameStep(pack_frame(weights, shape), shape, rows, columns, positions, choice.launcher)
    step.warm()
    return step
