"""Compile the codec's kernels for an H100 as every graph of the official geometry would launch them; needs no GPU.

    python -m tests.compile_codec

Prints the registers, stack and shared memory of each.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipecat_qwen3 import codec_kernels, codec_triton
from pipecat_qwen3.codec import CodecDecoder, FoldedCodec
from pipecat_qwen3.codec_state import MAX_FRAMES, CodecState
from tests.test_codec import OFFICIAL

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
ALIGNED = [["tt.divisibility", 16]]


class Recorder:
    """In place of a kernel: keeps how it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *values: Any, num_warps: int = 4, **constants: Any) -> None:
        signature, fixed, hints = {}, {}, {}
        named = dict(zip(self.kernel.arg_names, values, strict=False)) | constants
        for i, (name, value) in enumerate(named.items()):
            free = name in self.kernel.do_not_specialize
            if value is None or name.isupper() or (type(value) is int and value == 1 and not free):
                signature[name], fixed[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], hints[i,] = POINTERS[value.dtype], ALIGNED
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0 and not free:
                    hints[i,] = ALIGNED
        self.launches[str((signature, fixed, hints))] = ASTSource(self.kernel, signature, fixed, hints), num_warps


def main() -> None:
    names = ("embed", "product", "depthwise", "attend")
    recorders = {name: Recorder(getattr(codec_kernels, name)) for name in names}
    codec_triton.KERNELS = SimpleNamespace(**recorders)
    with torch.device("meta"):
        codec = FoldedCodec(CodecDecoder(OFFICIAL), codec_triton.TritonPass)
        for voices in (1, 2, 4, 8, 16, 32):
            for frames in (1, 2, 4, MAX_FRAMES):
                codes = torch.zeros(voices, OFFICIAL.codebooks, frames, dtype=torch.int32)
                codec.decode(codes, CodecState.zeros(OFFICIAL, 33), torch.zeros(voices, dtype=torch.int64))
    for name, recorder in recorders.items():
        for source, warps in recorder.launches.values():
            made = triton.compile(source, target=HOPPER, options={"num_warps": warps})
            registers, stack = _usage(made.asm["cubin"])
            print(f"{name} registers={registers} stack={stack} shared={made.metadata.shared}")


def _usage(cubin: bytes) -> tuple[str, str]:
    """Registers of a thread, and bytes of its stack, into which registers spill."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found
    return found[1], found[2]


if __name__ == "__main__":
    main()
