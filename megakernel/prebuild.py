"""Compiles the kernels that a wheel brings along: the official models on the GPUs that most voices run on.

    make cubins

On other GPUs, and for other models, the kernels are compiled at first use, which takes up to a minute.
"""

from megakernel import build, launch
from megakernel.gpu import Gpu
from megakernel.kernels import INSTANCES
from megakernel.shape import Shape, StackShape

_PREDICTOR = StackShape(5, 1024, 3072, 16, 8, 128)
MODELS = (
    Shape(StackShape(28, 1024, 3072, 16, 8, 128), _PREDICTOR, 16, 2048, 3072, 2150, False),
    Shape(StackShape(28, 2048, 6144, 16, 8, 128), _PREDICTOR, 16, 2048, 3072, 2150, True),
)
"""The 0.6B and the 1.7B."""

GPUS = (("NVIDIA A100", "sm_80", 108, 166_912), ("NVIDIA H100 or H200", "sm_90", 132, 232_448))
"""Name, architecture, multiprocessors, and shared memory that a block can have."""


def main() -> None:
    """Compile all of them, and print what was made."""
    wanted = []
    for name, arch, multiprocessors, shared in GPUS:
        gpu = Gpu(0, name, (int(arch[3]), int(arch[4:])), multiprocessors, shared, 0, True, (13, 0), "")
        staged = launch.staged_bytes(gpu)
        for shape in MODELS:
            wanted += [(launch.defines(shape, multiprocessors, staged, n, "persistent"), arch) for n in INSTANCES]
    paths = build.prebuild(wanted)
    size = sum(path.stat().st_size for path in paths)
    print(f"{len(paths)} cubins, {size / 1e6:.1f} MB, in {build.CUBINS}")


if __name__ == "__main__":
    main()
