"""What building or running a kernel on the CPU can raise.

CucpuError
├── BuildFailed      g++ is missing or refused the source
├── LaunchRefused    no such kernel, wrong arguments, a warp mask that is not supported
├── Deadlock         threads poll for what never comes
├── Divergence       threads of one block or warp wait for each other at different places
├── Trapped          the kernel stopped itself
├── BadMemoryAccess  asan flavour: outside a buffer, or misaligned
├── Race             tsan flavour: two threads touched the same memory with no order between them
└── Crashed          asan and tsan flavours: the process died of something else
"""


class CucpuError(RuntimeError):
    """A kernel could not be built or run; `report` says all that is known, the message its first line or more."""

    def __init__(self, message: str, report: str = "") -> None:
        super().__init__(message)
        self.report = report or message


class BuildFailed(CucpuError):
    """The compiler is missing or refused the source; the message has its first error, `report` all."""


class LaunchRefused(CucpuError):
    """The launch, or a call in the kernel, asks for something that cucpu or the kernel does not have."""


class Deadlock(CucpuError):
    """Threads poll, and nothing changes any more; the message says where every thread waits, block by block."""


class Divergence(CucpuError):
    """Threads that must meet at one barrier or warp collective wait at different ones, or some have returned."""


class Trapped(CucpuError):
    """The kernel called its trap."""


class BadMemoryAccess(CucpuError):
    """AddressSanitizer's report: an access outside a buffer or of shared memory, or a misaligned one."""


class Race(CucpuError):
    """ThreadSanitizer's report: unordered accesses to the same memory."""


class Crashed(CucpuError):
    """The process of a checked launch died; `report` is what it wrote."""
