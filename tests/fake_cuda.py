"""Runs a program on a CUDA driver without a GPU (fake_cuda.c): in go the program and what the driver answers, out comes
what it was asked to do. The bindings are the real ones, so that what they hand over is seen byte by byte.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Ran(NamedTuple):
    """What the program printed, and what the driver noted, in lines."""

    printed: list[str]
    asked: list[str]


class FakeCuda:
    """The driver, compiled into a folder by the system's C compiler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source, library = Path(__file__).parent / "fake_cuda.c", folder / "libcuda.so.1"
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
        subprocess.run(["cc", *flags, "-o", str(library), str(source)], check=True)

    def run(self, program: str, **answers: object) -> Ran:
        """Run Python code in a process of its own; `answers` are the FAKE_… settings of fake_cuda.c."""
        log = self.folder / "asked.txt"
        log.write_text("")
        settings = {f"FAKE_{name}": str(value) for name, value in {"LOG": log, **answers}.items()}
        environment = {**os.environ, **settings, "LD_LIBRARY_PATH": str(self.folder)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Ran(done.stdout.splitlines(), log.read_text().splitlines())
