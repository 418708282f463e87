"""A codec and a kernel that fills the GPU: how long both take in turn, side by side, and where room is left for one.

The kernel stands in for the talker's: it reads as many bytes as a frame of the 0.6B and holds whole multiprocessors.
"""

import time
from typing import Any, cast

import torch
import triton
import triton.language as tl

from pipecat_qwen3.codec import CodecDecoder
from pipecat_qwen3.codec_runner import open_codec

FRAME_BYTES = 3_310_000_000
"""Weights that a frame of the 0.6B reads, the code predictor's 15 times."""

ROOM = 16
"""Multiprocessors left to the codec."""


BLOCK = tl.constexpr(32 * 1024)
"""Floats that 32 warps hold at a time: a multiprocessor's registers, so that no other program fits beside."""


@triton.jit
def read(x, sums, size):
    """Add up x [size], a share in each program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        total += tl.load(x + start + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def beside(decoder: CodecDecoder, laps: int) -> list[dict[str, Any]]:
    """Milliseconds until one frame of one voice and the stand-in are done, each way `laps` times."""
    block, launch = BLOCK.value, cast(Any, read)  # a launch takes more than its function
    x = torch.randn(FRAME_BYTES // 16 // block * block, device="cuda")  # a quarter, read four times
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    sums = torch.empty(processors, device="cuda")
    codes = torch.randint(decoder.config.codebook_size, (1, decoder.config.codebooks, 1), device="cuda")
    codec = decoder.fold()
    inline, own = open_codec(codec, 1, 1, own_stream=False), open_codec(codec, 1, 1)
    ways = [
        ("stand-in alone", processors, None),
        ("codec alone", 0, inline),
        ("one stream", processors, inline),
        ("codec on its own stream", processors, own),
        (f"stand-in alone, {ROOM} multiprocessors left", processors - ROOM, None),
        (f"codec on its own stream, {ROOM} multiprocessors left", processors - ROOM, own),
    ]
    result = []
    for what, programs, runner in ways:
        ms = []
        for _ in range(3 + laps):
            torch.cuda.synchronize()
            began = time.perf_counter()
            if runner is not None:
                runner.decode(codes, [0])
            for _ in range(4 if programs else 0):
                launch[(programs,)](x, sums, x.numel(), num_warps=32)
            torch.cuda.synchronize()
            ms.append(round(1e3 * (time.perf_counter() - began), 4))
        result.append({"what": what, "ms": ms[3:]})
    return result
