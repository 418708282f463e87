"""Runs the CUDA kernels' own source on the CPU, for tests: comes in a .cu, goes out a kernel that can be called.

    library = build(Path("frame.cu"), {"HIDDEN": 64})
    library.launch("frame", args, blocks=8, threads=512)

Every CUDA thread is a fiber, all in one OS thread, so that a launch is exact and repeatable: barriers and warp
collectives mean what they mean on a GPU, a deadlock is found and reported thread by thread, and `seed` draws an
adversarial order of blocks. The asan flavour finds accesses outside buffers, the tsan flavour missing barriers, also
where the result happens to be right. There are no timings to be had from it, and it needs g++ on x86-64 Linux. What
kernels may use is in cucpu.h.
"""

from megakernel.cucpu.build import Flavour, build, unavailable
from megakernel.cucpu.errors import (
    BadMemoryAccess,
    BuildFailed,
    Crashed,
    CucpuError,
    Deadlock,
    Divergence,
    LaunchRefused,
    Race,
    Trapped,
)
from megakernel.cucpu.launch import Library

__all__ = [
    "BadMemoryAccess",
    "BuildFailed",
    "Crashed",
    "CucpuError",
    "Deadlock",
    "Divergence",
    "Flavour",
    "LaunchRefused",
    "Library",
    "Race",
    "Trapped",
    "build",
    "unavailable",
]
