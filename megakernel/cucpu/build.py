"""Compiles kernel sources together with the runtime, by g++, into a cache; returns the Library that runs them.

What is in the cache is found by a hash of the preprocessed sources, the flags and the compiler's version, so an edit of
any header, ours or yours, compiles anew.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from megakernel.cucpu.errors import BuildFailed
from megakernel.cucpu.launch import Library

Flavour = Literal["plain", "asan", "tsan"]

HERE = Path(__file__).parent

COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
"""Kernels read the same memory as different types, and must round as written whatever the host can fuse."""

PLAIN = ("-O2", "-g1")
CHECKED = ("-O1", "-g", "-fno-omit-frame-pointer")
FLAVOURS: dict[Flavour, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": (PLAIN, ()),
    # alignment: a misaligned float4 faults on a GPU, and works on a CPU
    "asan": (CHECKED, ("-fsanitize=address,alignment,bounds,shift-exponent",)),
    "tsan": (CHECKED, ("-fsanitize=thread",)),
}
"""Flags of all files, and of all but the runtime: TSan must not see how the runtime switches between threads."""


def unavailable() -> str | None:
    """Why kernels cannot be run on this machine, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"cucpu needs Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    if shutil.which("g++") is None:
        return "cucpu compiles kernels with g++, which was not found: install g++"
    return None


def build(
    sources: Path | Iterable[Path],
    defines: Mapping[str, object] | None = None,
    flavour: Flavour = "plain",
    include: Iterable[Path] = (),
) -> Library:
    """Compile kernels for the CPU, or find them in the cache.

    sources   CUDA C++ files; each kernel in them is followed by CUCPU_KERNEL(name, Args)
    defines   macros; MK_CPU=1 is always there, True means 1
    flavour   plain runs in this process; asan (memory) and tsan (order) in a process of their own
    include   folders of headers; the folder of cucpu.h is always there

    Raises BuildFailed with the compiler's first error. The cache is $PIPECAT_QWEN3_CACHE/cucpu, by default
    ~/.cache/pipecat-qwen3/cucpu; deleting it is safe.
    """
    if flavour not in FLAVOURS:
        raise BuildFailed(f"cucpu knows the flavours {', '.join(FLAVOURS)}, not {flavour!r}")
    if reason := unavailable():
        raise BuildFailed(reason)
    common, instrument = FLAVOURS[flavour]
    macros = [f"-D{name}={_macro(value)}" for name, value in {"MK_CPU": 1, **(defines or {})}.items()]
    folders = [f"-I{folder}" for folder in (HERE, *include)]
    kernels = [sources] if isinstance(sources, Path) else list(sources)
    runtime = [*COMMON, *common, f"-DCUCPU_{flavour.upper()}"]
    units = [(source, [*COMMON, *common, *instrument, *macros, *folders]) for source in kernels]
    units.append((HERE / "runtime.cpp", runtime))
    if flavour != "plain":
        units.append((HERE / "driver.cpp", runtime))
    version = _run(["g++", "--version"], "g++")
    objects = [_object(version, source, flags) for source, flags in units]
    link = [*instrument, "-shared" if flavour == "plain" else "-rdynamic"]
    name = _hash(version, *map(str, objects), *link) + (".so" if flavour == "plain" else ".exe")
    arguments = ["g++", *link, *map(str, objects), "-o"]
    return Library(_cached(name, lambda path: _run([*arguments, path], "linking")), flavour)


def _object(version: str, source: Path, flags: list[str]) -> Path:
    """Compile one file."""
    compiler = ["g++", *flags, "-x", "c++", str(source)]
    name = _hash(version, _run([*compiler, "-E"], source.name), *flags) + ".o"
    return _cached(name, lambda path: _run([*compiler, "-c", "-o", path], source.name))


def _cached(name: str, make: Callable[[str], object]) -> Path:
    """Path of `name` in the cache; make(path) is called if it is not there."""
    root = os.environ.get("PIPECAT_QWEN3_CACHE") or Path.home() / ".cache" / "pipecat-qwen3"
    path = Path(root) / "cucpu" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # others may be making the same file
            made = Path(folder) / name
            make(str(made))
            made.replace(path)
    return path


def _run(command: list[str], what: str) -> str:
    """Output of a compiler call; raises BuildFailed with its first error line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildFailed(f"g++ could not compile {what}: {first.strip()}", done.stderr)
    return done.stdout


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _macro(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
