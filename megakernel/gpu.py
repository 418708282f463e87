"""What a GPU can do, and every call of the CUDA driver, with errors in one line; shares its context with torch.

Knows the driver through cuda-bindings, and neither torch nor the kernels. Importing it needs no driver.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

LOST = "a kernel that ran before has failed, and this process cannot use the GPU any more; restart it"
ADVICE = {
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible (see nvidia-smi and CUDA_VISIBLE_DEVICES); use --device cpu",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of this number (see nvidia-smi and CUDA_VISIBLE_DEVICES)",
    "CUDA_ERROR_INVALID_CONTEXT": "the GPU is not current in this thread; call gpu.make_current() in it first",
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU's memory is full; see nvidia-smi for what else uses it",
    "CUDA_ERROR_INVALID_IMAGE": "the driver does not understand them; update it or use --backend torch",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "they are for another GPU or a newer driver; use --backend torch",
    "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": "not all blocks can run at once; use fewer or --backend graph",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "a block needs more registers or shared memory than there are",
    "CUDA_ERROR_NOT_SUPPORTED": "the GPU or its driver cannot do this; use --backend torch",
    "CUDA_ERROR_LAUNCH_FAILED": LOST,
    "CUDA_ERROR_LAUNCH_TIMEOUT": LOST,
    "CUDA_ERROR_ILLEGAL_ADDRESS": LOST,
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": LOST,
}
"""What to do, by the driver's result code."""


class CudaError(RuntimeError):
    """The driver is missing or refuses; one line with what was wanted, what came and what to do."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or the part of it that this process sees.

    shared_bytes  shared memory that a block can have, static and dynamic
    cooperative   it can hold a launch back until all its blocks run at once
    cuda          newest CUDA version that the driver knows, (13, 0)
    shared_by     "MIG" or "MPS" if others may use the rest of it at the same time, else ""
    """

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int
    cooperative: bool
    cuda: tuple[int, int]
    shared_by: str


def facts(index: int = 0) -> Gpu:
    """What the driver says of a GPU; `index` counts as torch's devices do. Raises CudaError."""
    wanted = f"looking at GPU {index}"
    call(wanted, "cuInit", 0)
    number = call(wanted, "cuDriverGetVersion")
    cuda = (number // 1000, number % 1000 // 10)
    device = call(wanted, "cuDeviceGet", index)
    name = call(wanted, "cuDeviceGetName", 256, device).partition(b"\0")[0].decode(errors="replace").strip()

    def attribute(name: str) -> int:
        which = getattr(driver(wanted).CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return call(wanted, "cuDeviceGetAttribute", which, device)

    shared_by = "MPS" if cuda >= (12, 4) and attribute("MPS_ENABLED") else ""  # older drivers do not know the question
    return Gpu(
        index=index,
        name=name,
        capability=(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
        multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
        shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        l2_bytes=attribute("L2_CACHE_SIZE"),
        cooperative=bool(attribute("COOPERATIVE_LAUNCH")),
        cuda=cuda,
        shared_by="MIG" if " MIG " in f"{name} " else shared_by,
    )


def make_current(index: int) -> None:
    """Make a GPU the calling thread's own, as torch.cuda.set_device does. Raises CudaError."""
    call(f"making GPU {index} current", "cuCtxSetCurrent", _context(index))


@cache
def _context(index: int) -> Any:
    """The primary context, which is torch's too."""
    wanted = f"opening GPU {index}"
    call(wanted, "cuInit", 0)
    return call(wanted, "cuDevicePrimaryCtxRetain", call(wanted, "cuDeviceGet", index))


def driver(wanted: str) -> Any:
    """The module of the driver's functions and types. Raises CudaError."""
    try:
        from cuda.bindings import driver  # pyright: ignore  # compiled, and on Linux only
    except ImportError as error:
        raise CudaError(f"{wanted}: cuda-bindings is not installed; pip install cuda-bindings") from error
    return driver


def call(wanted: str, name: str, *arguments: Any) -> Any:
    """Call a function of the driver; returns what it gives, a tuple if that is several things. Raises CudaError."""
    module = driver(wanted)
    try:
        result, *values = getattr(module, name)(*arguments)
    except RuntimeError as error:  # the first call loads libcuda, which may be missing or lack a function
        line = (str(error).splitlines() or [""])[0]
        raise CudaError(f"{wanted}: no usable NVIDIA driver; install or update it, or use the CPU ({line})") from error
    if result != module.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{wanted}: {result.name}; {ADVICE.get(result.name, 'see CUresult in the CUDA driver manual')}")
    return values[0] if len(values) == 1 else tuple(values)
