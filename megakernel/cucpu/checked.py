"""A launch under AddressSanitizer or ThreadSanitizer: in a process of its own, with copies of the buffers.

The sanitizers must be in a process from its start, so a launch is written to a file, driver.cpp runs it, and the
buffers are read back. Pointers, the c_void_p fields of args, are translated on the way.
"""

import bisect
import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megakernel.cucpu import reports
from megakernel.cucpu.errors import BadMemoryAccess, Crashed, CucpuError, LaunchRefused, Race

TIMEOUT_S = 600

SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # a stopped launch leaves its threads where they are
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "history_size=7",
}


@dataclass(frozen=True)
class Request:
    """What the driver is asked to launch."""

    kernel: str
    args: ctypes.Structure
    blocks: int
    threads: int
    shared_bytes: int
    resident: int
    seed: int
    deadlock_s: float
    buffers: Sequence[Tensor]

    def write(self, path: Path) -> None:
        """The file that driver.cpp reads."""
        pointers = self._pointers()
        head = (self.kernel, self.blocks, self.threads, self.shared_bytes, self.resident, self.seed, self.deadlock_s)
        counts = (ctypes.sizeof(self.args), len(self.buffers), len(pointers))
        lines = [(*head, *counts), [buffer.nbytes for buffer in self.buffers], *pointers]
        with path.open("wb") as file:
            file.write(" ".join(str(number) for line in lines for number in line).encode() + b"\n")
            file.write(bytes(self.args))
            for buffer in self.buffers:
                file.write(ctypes.string_at(buffer.data_ptr(), buffer.nbytes))

    def _pointers(self) -> list[tuple[int, int, int]]:
        """(byte of args, buffer, offset in it) of every address in args."""
        for index, buffer in enumerate(self.buffers):
            if buffer.device.type != "cpu" or not buffer.is_contiguous():
                raise LaunchRefused(f"buffers must be contiguous CPU tensors; number {index} is not")
        order = sorted(range(len(self.buffers)), key=lambda index: self.buffers[index].data_ptr())
        starts = [self.buffers[index].data_ptr() for index in order]
        for first, second, start in zip(order, order[1:], starts[1:], strict=False):
            if self.buffers[first].data_ptr() + self.buffers[first].nbytes > start:
                raise LaunchRefused(f"buffers {first} and {second} share memory; pass the tensor that holds both")
        found = []
        for at, name in _pointer_fields(type(self.args)):
            (address,) = struct.unpack_from("Q", bytes(self.args), at)
            nearest = bisect.bisect_right(starts, address) - 1
            if nearest >= 0 and address - starts[nearest] < self.buffers[order[nearest]].nbytes:
                found.append((at, order[nearest], address - starts[nearest]))
            elif address:
                raise LaunchRefused(f"args{name} points into none of the buffers; pass buffers=[...] with all tensors")
        return found


def _pointer_fields(kind: type, at: int = 0, name: str = "") -> Iterator[tuple[int, str]]:
    """(byte, name) of every c_void_p in a structure."""
    if issubclass(kind, ctypes.c_void_p):
        yield at, name
    elif issubclass(kind, ctypes.Structure):
        for field, inner, *_ in kind._fields_:
            yield from _pointer_fields(inner, at + getattr(kind, field).offset, f"{name}.{field}")


def launch(program: Path, request: Request, outcomes: dict[int, type[CucpuError]]) -> None:
    """Run the driver; the buffers get what the kernel left in them, unless it raises what Library.launch says."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request", Path(folder) / "outcome"
        request.write(asked)
        # ThreadSanitizer wants its memory at fixed places, which address randomisation may have taken.
        fixed = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
        done = subprocess.run(
            [*fixed, str(program), str(asked), str(answered)],
            env={**os.environ, **SANITIZERS},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
        outcome = answered.read_bytes() if answered.exists() else b""
    head, _, rest = outcome.partition(b"\n")
    message = rest.decode() if head not in (b"", b"0") else ""
    report = done.stderr + message
    if found := reports.races(report):
        raise Race(found, report)
    if found := reports.bad_access(report):
        raise BadMemoryAccess(found, report)
    if message:
        raise outcomes[int(head)](message, report)
    if done.returncode != 0 or not head:
        raise Crashed(f"the launch died with exit status {done.returncode}: {done.stderr[-2000:]}", report)
    at = 0
    for buffer in request.buffers:
        ctypes.memmove(buffer.data_ptr(), rest[at : at + buffer.nbytes], buffer.nbytes)
        at += buffer.nbytes
