"""NVIDIA's runtime compiler: CUDA C++ in, the machine code of one architecture and its figures out; no GPU needed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPTIONS = ("-std=c++17", "--no-source-include", "--device-as-default-execution-space", "--ptxas-options=-v")
"""Besides the architecture. Arithmetic is as written: no fast-math. No folder is searched for headers. What is not
annotated is device code, or else lambdas would be refused."""


class BuildError(RuntimeError):
    """There is no machine code, and why; one line."""


@dataclass(frozen=True)
class Figures:
    """What ptxas reports of one kernel: registers of a thread, and bytes.

    spills   stored to and loaded from local memory for want of registers
    stack    local memory of a thread
    shared   static shared memory of a block
    """

    registers: int
    spills: int
    stack: int
    shared: int


def version() -> tuple[int, int]:
    """(13, 0). Raises BuildError if NVRTC is not installed."""
    major, minor = _call("nvrtcVersion")
    return major, minor


def translate(
    sources: Mapping[str, str], main: str, arch: str, flags: Sequence[str] = ()
) -> tuple[bytes, dict[str, Figures]]:
    """Compile the source named `main`, which can include the others by their names and nothing else.

    arch     sm_90
    flags    further options of NVRTC
    returns  the image that a driver loads, and the figures of each kernel

    Raises BuildError with the first error of the compiler or of ptxas.
    """
    headers = [name for name in sources if name != main]
    options = [*OPTIONS, f"--gpu-architecture={arch}", *flags]
    (program,) = _call(
        "nvrtcCreateProgram",
        sources[main].encode(),
        main.encode(),
        len(headers),
        [sources[name].encode() for name in headers],
        [name.encode() for name in headers],
    )
    try:
        try:
            _call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
        except BuildError as error:
            lines = _report(program).splitlines()
            first = next((line.strip() for line in lines if re.search(r"\berror\b", line)), error)
            cuda = "{}.{}".format(*version())
            raise BuildError(f"the CUDA kernels do not compile for {arch} with CUDA {cuda}: {first}") from None
        return _output("nvrtcGetCUBIN", program), _figures(_report(program))
    finally:
        _call("nvrtcDestroyProgram", program)


def _report(program: Any) -> str:
    return _output("nvrtcGetProgramLog", program).decode(errors="replace").replace("\0", "")


def _output(name: str, program: Any) -> bytes:
    (size,) = _call(f"{name}Size", program)
    buffer = bytearray(size)
    _call(name, program, buffer)
    return bytes(buffer)


def _call(name: str, *arguments: Any) -> tuple[Any, ...]:
    """Call a function of NVRTC; returns what it gives besides its result code. Raises BuildError."""
    try:
        from cuda.bindings import nvrtc  # pyright: ignore  # compiled, and on Linux only

        result, *values = getattr(nvrtc, name)(*arguments)
    except ImportError as error:
        raise BuildError("cuda-bindings is not installed: pip install cuda-bindings nvidia-cuda-nvrtc") from error
    except RuntimeError as error:  # the first call loads the library
        raise BuildError("NVRTC is not installed: pip install nvidia-cuda-nvrtc") from error
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"{name} gave {result.name}")
    return tuple(values)


def _figures(report: str) -> dict[str, Figures]:
    """From what `ptxas -v` says, a paragraph a kernel."""
    found = {}
    for paragraph in report.split("Compiling entry function '")[1:]:

        def total(pattern: str, text: str = paragraph) -> int:
            return sum(int(number) for number in re.findall(pattern, text))

        found[paragraph.partition("'")[0]] = Figures(
            registers=total(r"Used (\d+) registers"),
            spills=total(r"(\d+) bytes spill"),
            stack=total(r"(\d+) bytes stack frame"),
            shared=total(r"(\d+) bytes smem"),
        )
    return found
