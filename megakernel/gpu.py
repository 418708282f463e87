"""What a GPU can do, and launches on it: a Cubin in, kernels out, which are enqueued on any stream, captured or not.

Calls the CUDA driver through cuda-bindings and needs no torch: a stream is its handle, `torch.cuda.Stream.cuda_stream`.
Shares torch's context, the primary one of the device.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from megakernel.build import Cubin, Figures

SHARED_BY_DEFAULT = 48 * 1024
"""Dynamic shared memory of a block, in bytes, that needs no permission (CUDA C++ Programming Guide, 'Shared Memory')."""

LOST = "a kernel that ran before has failed, and this process cannot use the GPU any more; restart it"
ADVICE = {
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible (see nvidia-smi and CUDA_VISIBLE_DEVICES); use --device cpu",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of this number (see nvidia-smi and CUDA_VISIBLE_DEVICES)",
    "CUDA_ERROR_INVALID_CONTEXT": "the GPU is not current in this thread; call gpu.make_current() in it first",
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU's memory is full; see nvidia-smi for what else uses it",
    "CUDA_ERROR_INVALID_IMAGE": "the driver does not understand them; update the driver or use --backend torch",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "they are for another GPU or need a newer driver; use --backend torch",
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
    """One GPU, or the slice of it that this process sees.

    shared_bytes  shared memory that a block can have, static and dynamic
    cooperative   it can hold back a launch until all its blocks can run at once
    cuda          newest CUDA version that the driver knows, (13, 0)
    shares        who may be using the same GPU: "" or "MIG" or "MPS"
    """

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int
    cooperative: bool
    cuda: tuple[int, int]
    shares: str


def facts(index: int = 0) -> Gpu:
    """What the driver says of a GPU; `index` counts as torch's devices do. Raises CudaError."""
    wanted = f"looking at GPU {index}"
    _call(wanted, "cuInit", 0)
    version = _call(wanted, "cuDriverGetVersion")
    device = _call(wanted, "cuDeviceGet", index)
    name = _call(wanted, "cuDeviceGetName", 256, device).decode(errors="replace").rstrip("\0 ")

    def attribute(name: str) -> int:
        which = getattr(_driver(wanted).CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return _call(wanted, "cuDeviceGetAttribute", which, device)

    return Gpu(
        index=index,
        name=name,
        capability=(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
        multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
        shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        l2_bytes=attribute("L2_CACHE_SIZE"),
        cooperative=bool(attribute("COOPERATIVE_LAUNCH")),
        cuda=(version // 1000, version % 1000 // 10),
        shares="MIG" if " MIG " in f"{name} " else "MPS" if attribute("MPS_ENABLED") else "",
    )


def make_current(index: int) -> None:
    """Make a GPU the calling thread's own, as torch.cuda.set_device does. Raises CudaError."""
    _call(f"making GPU {index} current", "cuCtxSetCurrent", _context(index))


@dataclass(frozen=True)
class Kernel:
    """An entry point, loaded onto a GPU for as long as the process lives."""

    name: str
    gpu: Gpu
    figures: Figures
    function: Any

    def blocks_at_once(self, threads: int, shared_bytes: int = 0) -> int:
        """How many blocks of this many threads and bytes of dynamic shared memory the GPU runs at once."""
        wanted = f"counting the resident blocks of kernel {self.name}"
        _allow(self, shared_bytes)
        each = _call(wanted, "cuOccupancyMaxActiveBlocksPerMultiprocessor", self.function, threads, shared_bytes)
        return each * self.gpu.multiprocessors


def load(cubin: Cubin, gpu: Gpu) -> dict[str, Kernel]:
    """Load all kernels, by name; makes the GPU current in the calling thread. Raises CudaError."""
    made, known = ("{}.{}".format(*version) for version in (cubin.cuda, gpu.cuda))
    wanted = f"loading the {cubin.arch} kernels of CUDA {made} onto {gpu.name} (driver for CUDA {known})"
    make_current(gpu.index)
    module = _call(wanted, "cuModuleLoadData", cubin.image)
    return {
        name: Kernel(name, gpu, figures, _call(f"{wanted}: {name}", "cuModuleGetFunction", module, name.encode()))
        for name, figures in cubin.kernels.items()
    }


def cooperative_fits(kernel: Kernel, blocks: int, threads: int, shared_bytes: int = 0) -> str | None:
    """Why these blocks cannot all run at once, in one line, or None if they can. Raises CudaError."""
    gpu = kernel.gpu
    shared = _too_much_shared(kernel, shared_bytes)
    if shared is not None:
        return shared
    if not gpu.cooperative:
        return f"{gpu.name} cannot launch cooperatively; use --backend graph"
    holds = kernel.blocks_at_once(threads, shared_bytes)
    if holds < blocks:
        slice_of = f", as a part that {gpu.shares} gives away" if gpu.shares else ""
        size = f"{threads} threads, {kernel.figures.registers} registers and {shared_bytes} bytes of shared memory"
        return f"kernel {kernel.name} needs {blocks} blocks of {size} at once, {gpu.name} holds {holds}{slice_of}"
    return None


class Launch:
    """A kernel with its grid and arguments, to be enqueued any number of times.

    arguments     the kernel's one parameter, handed over by value: each call takes what the structure holds by then
    shared_bytes  dynamic shared memory of a block
    cooperative   all blocks run at once, or nothing does
    overlap       it may start before the kernel before it has ended, and waits itself (griddepcontrol.wait) before it
                  touches what that one writes. From sm_90 on; before, it starts when the other has ended

    Raises CudaError, also if `arguments` have not the size that the kernel takes.
    """

    def __init__(
        self,
        kernel: Kernel,
        arguments: ctypes.Structure,
        blocks: int,
        threads: int,
        shared_bytes: int = 0,
        cooperative: bool = False,
        overlap: bool = False,
    ) -> None:
        self._wanted = f"launching kernel {kernel.name}, {blocks} x {threads} threads"
        driver = _driver(self._wanted)
        size = _call(self._wanted, "cuFuncGetParamInfo", kernel.function, 0)[1]
        if size != ctypes.sizeof(arguments):
            got = ctypes.sizeof(arguments)
            raise CudaError(f"{self._wanted}: it takes {size} bytes of arguments, got {got}; their layouts differ")
        reason = cooperative_fits(kernel, blocks, threads, shared_bytes) if cooperative else None
        if reason is not None:
            raise CudaError(f"{self._wanted}: {reason}")
        _allow(kernel, shared_bytes)
        attributes = []
        if cooperative:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attributes[-1].value.cooperative = 1
        if overlap and kernel.gpu.capability >= (9, 0):
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._config = config
        self._function = kernel.function
        self.arguments = arguments
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))

    def __call__(self, stream: int) -> None:
        """Enqueue on a stream, or record into the graph that it captures; does not wait for the GPU."""
        self._config.hStream = stream
        _call(self._wanted, "cuLaunchKernelEx", self._config, self._function, ctypes.addressof(self._pointers), 0)


def _too_much_shared(kernel: Kernel, shared_bytes: int) -> str | None:
    needs, has = kernel.figures.shared + shared_bytes, kernel.gpu.shared_bytes
    if needs <= has:
        return None
    return f"kernel {kernel.name} needs {needs} bytes of shared memory a block, {kernel.gpu.name} has {has}"


def _allow(kernel: Kernel, shared_bytes: int) -> None:
    """Let a kernel have this much dynamic shared memory."""
    reason = _too_much_shared(kernel, shared_bytes)
    if reason is not None:
        raise CudaError(f"{reason}; use --backend torch")
    if shared_bytes > SHARED_BY_DEFAULT:
        wanted = f"giving kernel {kernel.name} {shared_bytes} bytes of shared memory"
        which = _driver(wanted).CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call(wanted, "cuFuncSetAttribute", kernel.function, which, shared_bytes)


@cache
def _context(index: int) -> Any:
    """The primary context, which torch uses too."""
    wanted = f"opening GPU {index}"
    _call(wanted, "cuInit", 0)
    return _call(wanted, "cuDevicePrimaryCtxRetain", _call(wanted, "cuDeviceGet", index))


def _driver(wanted: str) -> Any:
    """The bindings; they are there without a driver too. Raises CudaError."""
    try:
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]  # Linux only
    except ImportError as error:
        raise CudaError(f"{wanted}: cuda-bindings is not installed; pip install cuda-bindings") from error
    return driver


def _call(wanted: str, name: str, *arguments: Any) -> Any:
    """Call a function of the driver; returns its value, a tuple if there are several. Raises CudaError."""
    driver = _driver(wanted)
    try:
        result, *values = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # libcuda is loaded by the first call, and is missing or too old
        line = str(error).splitlines()[0]
        raise CudaError(
            f"{wanted}: no usable NVIDIA driver ({line}); install or update it, or use --device cpu"
        ) from error
    if result != driver.CUresult.CUDA_SUCCESS:
        advice = ADVICE.get(result.name, "see the list of CUresult in the CUDA driver's manual")
        raise CudaError(f"{wanted}: {result.name}; {advice}")
    return values[0] if len(values) == 1 else tuple(values)
