"""Runs compiled kernels: in this process, or (asan, tsan) in one of their own that gets copies of the buffers."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megakernel.cucpu import checked
from megakernel.cucpu.errors import CucpuError, Deadlock, Divergence, LaunchRefused, Trapped

OUTCOMES: dict[int, type[CucpuError]] = {1: LaunchRefused, 2: Deadlock, 3: Divergence, 4: Trapped}
"""By the code that cucpu_launch returns; 0 is success."""

REPORT_BYTES = 1 << 16


class Library:
    """Kernels that were built together, in one flavour."""

    def __init__(self, path: Path, flavour: str) -> None:
        self.path = path
        self.flavour = flavour
        if flavour == "plain":
            self._library = ctypes.CDLL(str(path))
            self._library.cucpu_args_size.restype = ctypes.c_size_t

    def launch(
        self,
        kernel: str,
        args: ctypes.Structure,
        blocks: int,
        threads: int,
        shared_bytes: int = 0,
        resident: int | None = None,
        seed: int | None = None,
        deadlock_s: float = 5.0,
        buffers: Sequence[Tensor] = (),
    ) -> None:
        """Run one launch to its end.

        args          the kernel's Args; its c_void_p fields are addresses of CPU tensors (tensor.data_ptr()), or null
        shared_bytes  dynamic shared memory of a block
        resident      how many blocks run at once; each further one starts when one has finished. None: all
        seed          None: blocks take turns in order. Else every choice is drawn from it, the same in every run
        deadlock_s    of the launch's own clock, in which only polls take time: 10 us each
        buffers       asan, tsan: the contiguous CPU tensors that args points into. They are copied there and back

        Raises LaunchRefused, Deadlock, Divergence, Trapped; asan BadMemoryAccess, tsan Race, both Crashed.
        """
        request = checked.Request(
            kernel,
            args,
            blocks,
            threads,
            shared_bytes,
            resident or 0,
            0 if seed is None else seed + 1,
            deadlock_s,
            buffers,
        )
        if self.flavour == "plain":
            self._launch_here(request)
        else:
            checked.launch(self.path, request, OUTCOMES)

    def _launch_here(self, request: checked.Request) -> None:
        name = request.kernel.encode()
        wanted = self._library.cucpu_args_size(name)
        if wanted and wanted != ctypes.sizeof(request.args):
            raise LaunchRefused(
                f"kernel {request.kernel} takes {wanted} bytes of arguments, got {ctypes.sizeof(request.args)}"
            )
        report = ctypes.create_string_buffer(REPORT_BYTES)
        code = self._library.cucpu_launch(
            name,
            ctypes.byref(request.args),
            ctypes.c_uint(request.blocks),
            ctypes.c_uint(request.threads),
            ctypes.c_size_t(request.shared_bytes),
            ctypes.c_uint(request.resident),
            ctypes.c_uint64(request.seed),
            ctypes.c_double(request.deadlock_s),
            report,
            ctypes.c_size_t(REPORT_BYTES),
        )
        if code:
            raise OUTCOMES[code](report.value.decode())
