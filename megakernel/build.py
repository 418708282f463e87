"""CUDA sources and a checkpoint's sizes in, a cubin out: shipped with the package, cached, or compiled by NVRTC.

Needs neither a GPU nor a driver nor the CUDA toolkit. The sources include nothing but each other. NVRTC is a library:
torch's CUDA wheels bring it, and cuda-bindings, which calls it.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CSRC = Path(__file__).parent / "csrc"
CUBINS = Path(__file__).parent / "cubins"
MAIN = "frame.cu"

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What is compiled for. A cubin runs on its own and on all later minor versions of its major version."""

OPTIONS = ("-std=c++17", "--no-source-include", "--ptxas-options=-v")
"""Besides the architecture. Arithmetic is as written: no fast-math."""

log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """There is no cubin, and why; one line."""


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


@dataclass(frozen=True)
class Cubin:
    """Machine code of one architecture.

    kernels  by name of the entry point
    cuda     version of the NVRTC that made it, (13, 0); an older major version of the driver cannot load it
    origin   "prebuilt", "cached" or "compiled"
    """

    image: bytes
    arch: str
    kernels: dict[str, Figures]
    cuda: tuple[int, int]
    origin: str


def arch_for(name: str, capability: tuple[int, int]) -> str:
    """The architecture to compile for on a GPU of this name and compute capability. Raises BuildError."""
    major, minor = capability
    fitting = [arch for arch in ARCHITECTURES if arch[3:-1] == str(major) and int(arch[-1]) <= minor]
    if not fitting:
        found = f"{name} is sm_{major}{minor}, and the CUDA kernels are made for {', '.join(ARCHITECTURES)}"
        raise BuildError(f"{found} and what runs their code; torch serves this GPU (--backend torch)")
    return fitting[-1]


def compile(defines: Mapping[str, object], arch: str, folder: Path = CSRC) -> Cubin:
    """The machine code of `folder`/frame.cu; prebuilt or cached, if these very sources were compiled before.

    defines  macros; True is 1, and a float gets its f
    arch     one of ARCHITECTURES
    folder   frame.cu and all that it includes

    Safe in several processes at once. Raises BuildError: nothing is prebuilt and NVRTC is missing, or the first error in
    the sources.
    """
    sources = _read(folder)
    flags = [f"-D{name}={_macro(value)}" for name, value in sorted(defines.items())]
    key = _key(sources, flags, arch)
    missing = None
    try:
        cuda = nvrtc_version()
    except BuildError as error:
        cuda, missing = None, error
    prebuilt = _load(CUBINS / f"{key}.cubin", "prebuilt")
    # NVRTC comes with torch, and torch's major version is one that the driver knows
    if prebuilt is not None and (cuda is None or prebuilt.cuda[0] <= cuda[0]):
        return prebuilt
    if cuda is None:
        raise BuildError(f"the CUDA kernels must be compiled for {arch}, but {missing}")
    path = cache_folder() / "cuda-{}.{}".format(*cuda) / f"{key}.cubin"
    cubin = _load(path, "cached")
    if cubin is None:
        cubin = _compile(sources, flags, arch, cuda, line_info=True)
        try:
            _save(cubin, path)
        except OSError as error:
            log.warning("the compiled kernels cannot be kept: %s; PIPECAT_QWEN3_CACHE names another folder", error)
    return cubin


def prebuild(wanted: Iterable[tuple[Mapping[str, object], str]], folder: Path = CUBINS) -> list[Path]:
    """Compile frame.cu for each (defines, arch) into `folder`, which then holds nothing else; returns the files.

    Without line numbers, which would bring along the working folder's name. Raises BuildError.
    """
    cuda, sources = nvrtc_version(), _read(CSRC)
    paths = []
    for defines, arch in wanted:
        flags = [f"-D{name}={_macro(value)}" for name, value in sorted(defines.items())]
        paths.append(folder / f"{_key(sources, flags, arch)}.cubin")
        _save(_compile(sources, flags, arch, cuda, line_info=False), paths[-1])
    for stale in set(folder.glob("*.cubin")) - set(paths):
        stale.unlink()
    return paths


def cache_folder() -> Path:
    """Where compiled kernels are kept; deleting it is safe."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("PIPECAT_QWEN3_CACHE") or Path(home, "pipecat-qwen3"), "kernels")


def nvrtc_version() -> tuple[int, int]:
    """(13, 0). Raises BuildError if it is not installed."""
    major, minor = _call("nvrtcVersion")
    return major, minor


def _read(folder: Path) -> dict[str, str]:
    """All sources by name."""
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix in (".cu", ".cuh", ".h")}


def _key(sources: dict[str, str], flags: list[str], arch: str) -> str:
    return hashlib.sha256(json.dumps([sources, OPTIONS, flags, arch]).encode()).hexdigest()[:32]


def _macro(value: object) -> str:
    if isinstance(value, float):
        return f"{value!r}f"
    return str(int(value)) if isinstance(value, bool) else str(value)


def _compile(sources: dict[str, str], flags: list[str], arch: str, cuda: tuple[int, int], line_info: bool) -> Cubin:
    """Headers are handed over by name, so that no folder is searched for them."""
    headers = [name for name in sources if name != MAIN]
    texts = [sources[name].encode() for name in headers]
    options = [*OPTIONS, f"--gpu-architecture={arch}", *flags, *(["-lineinfo"] if line_info else [])]
    (program,) = _call(
        "nvrtcCreateProgram",
        sources[MAIN].encode(),
        MAIN.encode(),
        len(headers),
        texts,
        [name.encode() for name in headers],
    )
    try:
        failure = None
        try:
            _call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
        except BuildError as error:
            failure = error
        report = _output("nvrtcGetProgramLog", program).decode(errors="replace").replace("\0", "")
        if failure is not None:
            first = next((line.strip() for line in report.splitlines() if re.search(r"\berror\b", line)), failure)
            raise BuildError(f"the CUDA kernels do not compile for {arch} with CUDA {cuda[0]}.{cuda[1]}: {first}")
        return Cubin(_output("nvrtcGetCUBIN", program), arch, _figures(report), cuda, "compiled")
    finally:
        _call("nvrtcDestroyProgram", program)


def _output(name: str, program: Any) -> bytes:
    (size,) = _call(f"{name}Size", program)
    buffer = bytearray(size)
    _call(name, program, buffer)
    return bytes(buffer)


def _call(name: str, *arguments: Any) -> tuple[Any, ...]:
    """Call a function of NVRTC; returns what it gives besides its result code. Raises BuildError."""
    try:
        from cuda.bindings import nvrtc  # pyright: ignore[reportMissingImports]  # Linux only

        result, *values = getattr(nvrtc, name)(*arguments)
    except ImportError as error:
        raise BuildError("cuda-bindings is not installed: pip install cuda-bindings nvidia-cuda-nvrtc") from error
    except RuntimeError as error:  # the library itself is loaded by the first call
        raise BuildError("NVRTC is not installed: pip install nvidia-cuda-nvrtc") from error
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"{name} gave {result.name}")
    return tuple(values)


def _figures(report: str) -> dict[str, Figures]:
    """From the report of `ptxas -v`, one paragraph a kernel."""
    found = {}
    for paragraph in report.split("Compiling entry function '")[1:]:

        def number(pattern: str, text: str = paragraph) -> int:
            return sum(int(figure) for figure in re.findall(pattern, text))

        found[paragraph.partition("'")[0]] = Figures(
            registers=number(r"Used (\d+) registers"),
            spills=number(r"(\d+) bytes spill"),
            stack=number(r"(\d+) bytes stack frame"),
            shared=number(r"(\d+) bytes smem"),
        )
    return found


def _save(cubin: Cubin, path: Path) -> None:
    """The image, then a line with the rest: tools that read cubins do not mind it. Whole or not at all."""
    rest = {"arch": cubin.arch, "cuda": cubin.cuda, "sha256": hashlib.sha256(cubin.image).hexdigest()}
    rest["kernels"] = {name: asdict(figures) for name, figures in cubin.kernels.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # others may be making the same file
        made = Path(folder, path.name)
        made.write_bytes(cubin.image + b"\n" + json.dumps(rest).encode())
        made.replace(path)


def _load(path: Path, origin: str) -> Cubin | None:
    """None if there is no such file, or it is damaged."""
    try:
        image, _, line = path.read_bytes().rpartition(b"\n")
        rest = json.loads(line)
        if hashlib.sha256(image).hexdigest() != rest["sha256"]:
            return None
        kernels = {name: Figures(**figures) for name, figures in rest["kernels"].items()}
        return Cubin(image, rest["arch"], kernels, (rest["cuda"][0], rest["cuda"][1]), origin)
    except (OSError, ValueError, KeyError, TypeError):
        return None
