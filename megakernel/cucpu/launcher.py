"""The frame's source on the CPU as a launcher of KernelFrameStep: for tests and dry runs, on machines without a GPU."""

import ctypes
from pathlib import Path

import torch

from megakernel import cucpu, kernels, schedule
from megakernel.kernel_step import Launcher
from megakernel.kernels import Args
from megakernel.schedule import Part
from megakernel.shape import Shape

SOURCES = Path(__file__).parent.parent / "csrc"


class PhaseArgs(ctypes.Structure):
    """One phase of a table as a launch of its own."""

    _fields_ = [("args", Args), ("index", ctypes.c_int32)]


class CpuLauncher(Launcher):
    """Runs the persistent kernel, or (phases) one kernel a phase, on cucpu.

    seed     draws the order in which blocks run, anew for every launch; None: in order
    fp32     compiles the instance with float elements
    """

    def __init__(
        self,
        shape: Shape,
        blocks: int = 4,
        threads: int = 128,
        phases: bool = False,
        fp32: bool = True,
        seed: int | None = None,
        staged_bytes: int = 1 << 14,
        flavour: cucpu.Flavour = "plain",
    ) -> None:
        self.shape, self.blocks, self.threads, self.waits = shape, blocks, threads, not phases
        self.fp32, self.seed, self.staged_bytes = fp32, seed, staged_bytes
        self.dtype = torch.float32 if fp32 else torch.bfloat16
        self.flavour: cucpu.Flavour = flavour
        self.cuts = {
            Part.TALKER: schedule.cut(shape.talker, blocks, threads // 32),
            Part.PREDICTOR: schedule.cut(shape.predictor, blocks, threads // 32),
        }
        self.cuts[Part.PREDICTOR_FIRST] = self.cuts[Part.PREDICTOR]
        self.resident: int | None = None
        self._libraries: dict[int, cucpu.Library] = {}

    def instance(self, columns: int) -> cucpu.Library:
        """The instance for so many columns, compiled on first use."""
        if columns not in self._libraries:
            defines = kernels.definitions(
                self.shape,
                self.cuts[Part.TALKER],
                self.cuts[Part.PREDICTOR],
                columns,
                self.threads,
                self.staged_bytes,
                self.fp32,
            )
            self._libraries[columns] = cucpu.build(SOURCES / "frame.cu", defines, self.flavour, [SOURCES])
        return self._libraries[columns]

    def launch(self, table: str, columns: int, args: Args) -> None:
        library = self.instance(columns)
        shared = kernels.shared_bytes(self.shape, columns, self.threads, self.staged_bytes)
        if self.seed is not None:
            self.seed += 1
        if self.waits:
            library.launch("persistent", args, self.blocks, self.threads, shared, self.resident, self.seed)
            return
        for index in range(args.phases):
            library.launch("phase", PhaseArgs(args, index), self.blocks, self.threads, shared, None, self.seed)
