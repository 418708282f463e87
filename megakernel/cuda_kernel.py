"""A Cubin in, kernels out, which are enqueued on any stream: at once, cooperatively, overlapped, or into a CUDA graph.

A stream is its handle, `torch.cuda.current_stream().cuda_stream`; the kernels share torch's context and memory.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

from megakernel import gpu
from megakernel.build import Cubin
from megakernel.gpu import CudaError, Gpu
from megakernel.nvrtc import Figures


@dataclass(frozen=True)
class Kernel:
    """An entry point, loaded onto a GPU for as long as the process lives.

    argument_bytes  size of its one parameter; None if the driver is too old to say
    """

    name: str
    gpu: Gpu
    figures: Figures
    function: Any
    argument_bytes: int | None


def load(cubin: Cubin, on: Gpu) -> dict[str, Kernel]:
    """Load all kernels, by name; makes the GPU current in the calling thread. Raises CudaError."""
    made, known = ("{}.{}".format(*version) for version in (cubin.cuda, on.cuda))
    wanted = f"loading the {cubin.arch} kernels of CUDA {made} onto {on.name} (driver for CUDA {known})"
    gpu.make_current(on.index)
    module = gpu.call(wanted, "cuModuleLoadData", cubin.image)
    kernels = {}
    for name, figures in cubin.kernels.items():
        function = gpu.call(wanted, "cuModuleGetFunction", module, name.encode())
        size = gpu.call(wanted, "cuFuncGetParamInfo", function, 0)[1] if on.cuda >= (12, 4) else None
        kernels[name] = Kernel(name, on, figures, function, size)
    return kernels


def cooperative_fits(kernel: Kernel, blocks: int, threads: int, shared_bytes: int = 0) -> str | None:
    """Why these blocks cannot all run at once, in one line, or None if they can.

    shared_bytes  dynamic shared memory of a block

    Raises CudaError if the driver cannot say.
    """
    on = kernel.gpu
    reason = _too_much_shared(kernel, shared_bytes)
    if reason is not None:
        return reason
    if not on.cooperative:
        return f"{on.name} cannot launch cooperatively; use --backend graph"
    _allow_shared(kernel, shared_bytes)
    wanted = f"counting the blocks of kernel {kernel.name} that run at once"
    each = gpu.call(wanted, "cuOccupancyMaxActiveBlocksPerMultiprocessor", kernel.function, threads, shared_bytes)
    holds = each * on.multiprocessors
    if holds >= blocks:
        return None
    part = f" in the part that {on.shared_by} leaves" if on.shared_by else ""
    needs = f"{threads} threads, {kernel.figures.registers} registers and {shared_bytes} bytes of shared memory"
    return f"kernel {kernel.name} wants {blocks} blocks of {needs} to run at once, {on.name} holds {holds}{part}"


class Launch:
    """A kernel with its grid, to be enqueued any number of times.

    shared_bytes  dynamic shared memory of a block
    cooperative   all blocks run at once, or nothing does
    overlap       it may start before the kernel before it has ended, and waits itself (griddepcontrol.wait) before it
                  touches what that one writes. From sm_90 on; below, it starts when the other has ended

    Raises CudaError, also for a cooperative launch that does not fit.
    """

    def __init__(
        self,
        kernel: Kernel,
        blocks: int,
        threads: int,
        shared_bytes: int = 0,
        cooperative: bool = False,
        overlap: bool = False,
    ) -> None:
        self.kernel = kernel
        self._wanted = f"launching {blocks} blocks of kernel {kernel.name}"
        reason = cooperative_fits(kernel, blocks, threads, shared_bytes) if cooperative else None
        if reason is not None:
            raise CudaError(reason)
        _allow_shared(kernel, shared_bytes)
        driver = gpu.driver(self._wanted)
        self._config = driver.CUlaunchConfig()
        self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = blocks, 1, 1
        self._config.blockDimX, self._config.blockDimY, self._config.blockDimZ = threads, 1, 1
        self._config.sharedMemBytes = shared_bytes
        attributes = []
        if cooperative:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attributes[-1].value.cooperative = 1
        if overlap and kernel.gpu.capability >= (9, 0):
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        self._config.attrs, self._config.numAttrs = attributes, len(attributes)

    def __call__(self, arguments: ctypes.Structure, stream: int) -> None:
        """Enqueue on a stream, or record into the graph that it captures; does not wait for the GPU.

        arguments  the kernel's one parameter, handed over by value: may be changed or forgotten afterwards

        Raises CudaError, also if the arguments have not the size of the kernel's.
        """
        size, takes = ctypes.sizeof(arguments), self.kernel.argument_bytes
        if takes is not None and size != takes:
            got = f"{type(arguments).__name__} has {size}"
            raise CudaError(
                f"kernel {self.kernel.name} takes {takes} bytes of arguments, {got}; the two layouts differ"
            )
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._config.hStream = stream
        gpu.call(self._wanted, "cuLaunchKernelEx", self._config, self.kernel.function, ctypes.addressof(parameters), 0)


def _too_much_shared(kernel: Kernel, shared_bytes: int) -> str | None:
    needs, has = kernel.figures.shared + shared_bytes, kernel.gpu.shared_bytes
    if needs <= has:
        return None
    return f"kernel {kernel.name} needs {needs} bytes of shared memory a block, {kernel.gpu.name} has {has}"


def _allow_shared(kernel: Kernel, shared_bytes: int) -> None:
    """Raise what a launch of the kernel may ask for, which is less than a block can have until someone asks."""
    reason = _too_much_shared(kernel, shared_bytes)
    if reason is not None:
        raise CudaError(reason)
    wanted = f"giving kernel {kernel.name} {shared_bytes} bytes of shared memory"
    which = gpu.driver(wanted).CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if shared_bytes > gpu.call(wanted, "cuFuncGetAttribute", which, kernel.function):
        gpu.call(wanted, "cuFuncSetAttribute", kernel.function, which, shared_bytes)
