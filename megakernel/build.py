"""The kernels' sources and a checkpoint's sizes in, a cubin out: shipped with the package, cached, or compiled now.

Needs neither a GPU nor a driver nor the CUDA toolkit; torch's CUDA wheels bring the compiler.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from megakernel import nvrtc
from megakernel.nvrtc import BuildError, Figures

CSRC = Path(__file__).parent / "csrc"
CUBINS = Path(__file__).parent / "cubins"
MAIN = "frame.cu"

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What is compiled for. A cubin runs on its own and on all later minor versions of its major version."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cubin:
    """Machine code of one architecture.

    kernels  figures by name of the entry point
    cuda     version of the NVRTC that made it, (13, 0)
    origin   "prebuilt", "cached" or "compiled"
    """

    image: bytes
    kernels: dict[str, Figures]
    arch: str
    cuda: tuple[int, int]
    origin: str


def arch_for(name: str, capability: tuple[int, int]) -> str:
    """The architecture to compile for on a GPU of this name and compute capability. Raises BuildError."""
    major, minor = capability
    fitting = [arch for arch in ARCHITECTURES if arch[3:-1] == str(major) and int(arch[-1]) <= minor]
    if not fitting:
        known = ", ".join(ARCHITECTURES)
        raise BuildError(f"{name} is sm_{major}{minor}, the CUDA kernels are made for {known}; use --backend torch")
    return fitting[-1]


def compile(defines: Mapping[str, object], arch: str, folder: Path = CSRC, line_info: bool = False) -> Cubin:
    """The machine code of `folder`/frame.cu: prebuilt or cached, if these very sources were compiled before.

    defines    macros; True is 1, and a float gets its f
    arch       one of ARCHITECTURES
    folder     frame.cu and all that it includes
    line_info  for profilers: more than doubles the image and changes no instruction

    Safe in several threads and processes at once. Raises BuildError: nothing is prebuilt and NVRTC is missing, or the
    first error in the sources.
    """
    sources, flags = _sources(folder), [*_flags(defines), *(["-lineinfo"] if line_info else [])]
    key = _key(sources, flags, arch)
    cuda, missing = None, None
    try:
        cuda = nvrtc.version()
    except BuildError as error:
        missing = error
    prebuilt = _load(CUBINS / f"{key}.cubin", "prebuilt")
    # NVRTC comes with torch, and a driver that serves this torch knows the same major version of CUDA
    if prebuilt is not None and (cuda is None or prebuilt.cuda[0] <= cuda[0]):
        return prebuilt
    if cuda is None:
        raise BuildError(f"the CUDA kernels must be compiled for {arch}, but {missing}")
    path = cache_folder() / "cuda-{}.{}".format(*cuda) / f"{key}.cubin"
    cubin = _load(path, "cached")
    if cubin is None:
        cubin = Cubin(*nvrtc.translate(sources, MAIN, arch, flags), arch, cuda, "compiled")
        try:
            _save(cubin, path)
        except OSError as error:
            log.warning("the compiled kernels cannot be kept: %s; PIPECAT_QWEN3_CACHE names another folder", error)
    return cubin


def prebuild(wanted: Iterable[tuple[Mapping[str, object], str]], folder: Path = CUBINS) -> list[Path]:
    """Compile frame.cu for each (defines, arch) into `folder`, which then holds no other cubins; returns the files.

    The same sources give the same bytes. Raises BuildError.
    """
    cuda, sources = nvrtc.version(), _sources(CSRC)

    def make(defines: Mapping[str, object], arch: str) -> Path:
        flags = _flags(defines)
        path = folder / f"{_key(sources, flags, arch)}.cubin"
        _save(Cubin(*nvrtc.translate(sources, MAIN, arch, flags), arch, cuda, "prebuilt"), path)
        return path

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = list(pool.map(make, *zip(*wanted, strict=True)))
    for stale in set(folder.glob("*.cubin")) - set(paths):
        stale.unlink()
    return paths


def cache_folder() -> Path:
    """Where compiled kernels are kept; deleting it is safe."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("PIPECAT_QWEN3_CACHE") or Path(home, "pipecat-qwen3"), "kernels")


def _sources(folder: Path) -> dict[str, str]:
    """All files of CUDA C++ by name."""
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix in (".cu", ".cuh", ".h")}


def _flags(defines: Mapping[str, object]) -> list[str]:
    return [f"-D{name}={_macro(value)}" for name, value in sorted(defines.items())]


def _macro(value: object) -> str:
    if isinstance(value, float):
        return f"{value!r}f"
    return str(int(value)) if isinstance(value, bool) else str(value)


def _key(sources: dict[str, str], flags: list[str], arch: str) -> str:
    return hashlib.sha256(json.dumps([sources, nvrtc.OPTIONS, flags, arch]).encode()).hexdigest()[:32]


def _save(cubin: Cubin, path: Path) -> None:
    """The image, then a line with the rest, which tools that read cubins do not mind. Whole or not at all."""
    kernels = {name: asdict(figures) for name, figures in cubin.kernels.items()}
    digest = hashlib.sha256(cubin.image).hexdigest()
    rest = json.dumps({"arch": cubin.arch, "cuda": cubin.cuda, "kernels": kernels, "sha256": digest})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # others may be making the same file
        made = Path(folder, path.name)
        made.write_bytes(cubin.image + b"\n" + rest.encode())
        made.replace(path)


def _load(path: Path, origin: str) -> Cubin | None:
    """None if there is no such file, or it is damaged."""
    try:
        image, _, line = path.read_bytes().rpartition(b"\n")
        rest = json.loads(line)
        kernels = {name: Figures(**figures) for name, figures in rest["kernels"].items()}
        major, minor = rest["cuda"]
        intact = hashlib.sha256(image).hexdigest() == rest["sha256"]
        return Cubin(image, kernels, rest["arch"], (major, minor), origin) if intact else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
