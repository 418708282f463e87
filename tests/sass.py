"""What compiled kernels are made of: a Cubin in, counts of instructions out; and what every kernel must hold to."""

import re
import subprocess
from collections import Counter
from functools import cache
from importlib.metadata import files
from pathlib import Path
from tempfile import TemporaryDirectory

from megakernel.build import Cubin

REGISTERS = 65536
"""Of a multiprocessor, on every architecture from sm_80 on (CUDA C++ Programming Guide, 'Compute Capabilities')."""

SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""KB of shared memory that a block can have (same table)."""


def instructions(cubin: Cubin) -> dict[str, Counter[str]]:
    """How often each instruction stands in each kernel, with its modifiers: {"frame": {"LDG.E.128.CONSTANT": 8}}."""
    found: dict[str, Counter[str]] = {}
    kernel = ""
    for line in _disassemble(cubin.image).splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            kernel = section[1]
            found[kernel] = Counter()
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            found[kernel][instruction[1]] += 1
    return found


@cache
def _disassemble(image: bytes) -> str:
    tool = next(file for file in files("nvidia-cuda-nvdisasm") or [] if file.name == "nvdisasm").locate()
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(image)
        return subprocess.run([str(tool), "--print-code", str(path)], capture_output=True, text=True, check=True).stdout


def count(kernel: Counter[str], instruction: str) -> int:
    """Instructions with this name and all these modifiers, in any order: count(kernel, "LDG.128")."""
    name, *modifiers = instruction.split(".")
    return sum(
        times
        for found, times in kernel.items()
        if found.split(".")[0] == name and set(modifiers) <= set(found.split(".")[1:])
    )


def acquires(kernel: Counter[str]) -> int:
    """Loads and fences that see what others wrote before; each should be followed by throwing away L1, CCTL.IVALL."""
    return sum(count(kernel, name) for name in ("LD.STRONG.GPU", "LDG.STRONG.GPU", "MEMBAR.SC.SYS"))


def assert_sound(cubin: Cubin, threads: int, shared_bytes: int) -> None:
    """No kernel spills, and a block of any of them fits on a multiprocessor.

    shared_bytes  dynamic shared memory of a block
    """
    for name, figures in cubin.kernels.items():
        assert figures.spills == 0, f"{name} spills {figures.spills} bytes on {cubin.arch}"
        assert figures.registers <= REGISTERS // threads, f"{name} has {figures.registers} registers on {cubin.arch}"
        assert figures.shared + shared_bytes <= SHARED[cubin.arch] * 1024, f"{name} needs too much shared memory"
    for name, kernel in instructions(cubin).items():
        local = count(kernel, "LDL") + count(kernel, "STL")
        assert local == 0, f"{name} keeps values in local memory on {cubin.arch}, {local} accesses"
