"""The two launchers on a GPU: the whole table in one cooperative launch, or a CUDA graph of one small kernel a phase.

Both run the same device functions over the same table with the same grid, so their results are equal bit for bit.
"""

import ctypes
from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch

from megakernel import build, cuda_kernel, kernels, schedule
from megakernel.cuda_kernel import Kernel, Launch
from megakernel.gpu import Gpu
from megakernel.kernel_step import Launcher
from megakernel.kernels import INSTANCES, PREFILL_COLUMNS, Args
from megakernel.schedule import Part
from megakernel.shape import Shape

NONE: Mapping[str, object] = {}

THREADS = 256
"""Of a block; one block a multiprocessor. With 512 the compiler spills registers, and as many bytes are in flight."""

ENTRIES = {"persistent": 1, "phase": 2}
"""Entry points of frame.cu by the value of ENTRY that compiles them alone."""


class PhaseArgs(ctypes.Structure):
    """The argument of the kernel `phase`: a launch and the index of the phase in its table."""

    _fields_ = [("args", Args), ("index", ctypes.c_int32)]


def staged_bytes(gpu: Gpu) -> int:
    """Shared memory for a product's activations: what is left beside the rest of a block's."""
    return 1 << (17 if gpu.shared_bytes >= 220_000 else 16 if gpu.shared_bytes >= 160_000 else 15)


def defines(
    shape: Shape,
    blocks: int,
    staged: int,
    columns: int,
    entry: str,
    threads: int = THREADS,
    extra: Mapping[str, object] = NONE,
) -> dict[str, object]:
    """What frame.cu is compiled with; `extra` are macros on top of the usual ones."""
    talker, predictor = (schedule.cut(stack, blocks, threads // 32) for stack in (shape.talker, shape.predictor))
    usual = kernels.definitions(shape, talker, predictor, columns, threads, staged)
    return usual | {"ENTRY": ENTRIES[entry]} | dict(extra)


class GpuLauncher(Launcher):
    """One compiled kernel for each instance that `columns` voices can need, and for prefill.

    threads, extra    of a block, and macros: to compare with what ships

    Compiling takes up to a minute the first time; later the kernels come from the cache.
    Raises BuildError or CudaError: what keeps them from running here.
    """

    entry: str
    dtype = torch.bfloat16

    def __init__(
        self, shape: Shape, gpu: Gpu, columns: int, threads: int = THREADS, extra: Mapping[str, object] = NONE
    ) -> None:
        self.shape, self.gpu, self.blocks, self.threads = shape, gpu, gpu.multiprocessors, threads
        self.cuts = {
            Part.TALKER: schedule.cut(shape.talker, self.blocks, threads // 32),
            Part.PREDICTOR: schedule.cut(shape.predictor, self.blocks, threads // 32),
        }
        self.cuts[Part.PREDICTOR_FIRST] = self.cuts[Part.PREDICTOR]
        self.most = next(n for n in INSTANCES if n >= columns)
        wanted = sorted({n for n in INSTANCES if n <= self.most} | {PREFILL_COLUMNS})
        arch, staged = build.arch_for(gpu.name, gpu.capability), staged_bytes(gpu)

        def compiled(n: int) -> build.Cubin:
            return build.compile(defines(shape, self.blocks, staged, n, self.entry, threads, extra), arch)

        with ThreadPoolExecutor(4) as pool:
            cubins = list(pool.map(compiled, wanted))
        self.kernels: dict[int, Kernel] = {}
        self._launches: dict[int, Launch] = {}
        for n, cubin in zip(wanted, cubins, strict=True):
            self.kernels[n] = cuda_kernel.load(cubin, gpu)[self.entry]
            self._launches[n] = self._prepare(self.kernels[n], kernels.shared_bytes(shape, n, threads, staged))

    @abstractmethod
    def _prepare(self, kernel: Kernel, shared: int) -> Launch: ...


class PersistentLauncher(GpuLauncher):
    """A table in one cooperative launch; its blocks wait for each other between phases."""

    entry, waits = "persistent", True

    def _prepare(self, kernel: Kernel, shared: int) -> Launch:
        return Launch(kernel, self.blocks, self.threads, shared, cooperative=True)

    def launch(self, table: str, columns: int, args: Args) -> None:
        self._launches[columns](args, torch.cuda.current_stream().cuda_stream)


class GraphLauncher(GpuLauncher):
    """A table as a CUDA graph of its phases, captured on first use; on sm_90 a phase starts while the last ends."""

    entry, waits = "phase", False

    @cached_property
    def _graphs(self) -> dict[tuple[int, bytes], torch.cuda.CUDAGraph]:
        """By instance and arguments: a graph reads what its pointers were when it was captured."""
        return {}

    def _prepare(self, kernel: Kernel, shared: int) -> Launch:
        return Launch(kernel, self.blocks, self.threads, shared, overlap=True)

    def launch(self, table: str, columns: int, args: Args) -> None:
        key = columns, bytes(args)
        if key not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                stream = torch.cuda.current_stream().cuda_stream
                for index in range(args.phases):
                    self._launches[columns](PhaseArgs(args, index), stream)
            self._graphs[key] = graph
        self._graphs[key].replay()
