"""What the CUDA source must be told about a model and a machine, and what a launch is given.

`definitions` are the compiler's, `Args` and `COLUMN` are csrc/sizes.h's `Args` and `Column`, field by field.
"""

import ctypes
import math

import numpy as np

from megakernel.schedule import Cut
from megakernel.shape import Shape, StackShape

INSTANCES = (4, 8, 16, 32)
"""Columns that a compiled kernel can advance; a launch takes the smallest that holds the voices named."""

PREFILL_COLUMNS = 16
"""Columns of the instance that prefills: one position each."""

ATTENTION_PARTS = 8

COLUMN = np.dtype(
    [(name, np.int32) for name in ("row", "position", "start", "following")]
    + [(name, np.uint32) for name in ("frame", "seed_low", "seed_high")]
    + [("sample", np.int32)]
    + [(name, np.float32) for name in ("temperature", "tail", "penalty")]
    + [("top_k", np.int32), ("other_temperature", np.float32), ("other_tail", np.float32), ("other_top_k", np.int32)]
    + [("unused", np.int32)]
)

_POINTERS = [
    "talker", "predictor", "codec_head", "heads", "projection", "talker_norms", "predictor_norms",
    "projection_bias", "embeddings", "inputs", "talker_rope", "predictor_rope", "kv", "pending", "history", "done",
    "columns", "text", "uniforms", "codes", "x0", "x1", "parts", "raw", "attended", "attended_sums", "inner",
    "logits", "predictor_kv", "table", "barrier", "report",
]  # fmt: skip


class Args(ctypes.Structure):
    """One launch: addresses, then numbers."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in _POINTERS],
        ("patience", ctypes.c_uint64),
        *[(name, ctypes.c_int32) for name in ("phases", "positions", "rows", "prefill")],
        ("arrived", ctypes.c_uint32),
    ]


def unfit(shape: Shape) -> str | None:
    """Why the kernels cannot run a model of this shape, or None."""
    talker, predictor = shape.talker, shape.predictor
    multiples = {
        "hidden size": (talker.hidden, predictor.hidden),
        "intermediate size": (talker.intermediate, predictor.intermediate),
        "codec vocabulary": (shape.vocab,),
        "codebook": (shape.codes,),
    }
    for name, values in multiples.items():
        for value in values:
            if value % 16:
                return f"the kernels need a {name} that is a multiple of 16, but the model's is {value}"
    if talker.head_dim != predictor.head_dim or talker.head_dim not in (32, 64, 128, 256):
        found = f"{talker.head_dim} and {predictor.head_dim}"
        return f"the kernels need one head_dim of 32, 64, 128 or 256 for talker and predictor, but they have {found}"
    if talker.norm_eps != predictor.norm_eps:
        return "the kernels need one rms_norm_eps for talker and predictor"
    return None


def _stack(letter: str, stack: StackShape, cut: Cut) -> dict[str, object]:
    values = {
        "LAYERS": stack.layers,
        "HIDDEN": stack.hidden,
        "INTER": stack.intermediate,
        "HEADS": stack.heads,
        "KV_HEADS": stack.kv_heads,
        "SPLIT_O": cut.split_o,
        "SPLIT_DOWN": cut.split_down,
    }
    return {f"{letter}_{name}": value for name, value in values.items()}


def definitions(
    shape: Shape, talker: Cut, predictor: Cut, columns: int, threads: int, staged_bytes: int, fp32: bool = False
) -> dict[str, object]:
    """Macros of csrc/sizes.h. fp32 is the instance with float elements, for comparisons on the CPU."""
    return {
        "THREADS": threads,
        "BLOCKS": talker.blocks,
        "COLUMNS": columns,
        "STAGED_BYTES": staged_bytes,
        "SHARED_BYTES": shared_bytes(shape, columns, threads, staged_bytes),
        "HEAD_DIM": shape.talker.head_dim,
        **_stack("T", shape.talker, talker),
        **_stack("P", shape.predictor, predictor),
        "CODEBOOKS": shape.codebooks,
        "CODES": shape.codes,
        "VOCAB": shape.vocab,
        "EOS": shape.eos,
        "SUPPRESS_FROM": shape.suppress_from,
        "PROJECTED": int(shape.projected),
        "NORM_EPS": f"{shape.talker.norm_eps!r}f",
        "ATTENTION_SCALE": f"{1 / math.sqrt(shape.talker.head_dim)!r}f",
        **({"MK_FLOAT": 1} if fp32 else {}),
    }


def shared_bytes(shape: Shape, columns: int, threads: int, staged_bytes: int) -> int:
    """Dynamic shared memory of a block: sizeof(Work) of csrc/phases.cuh, which the compiler checks against it."""
    element, warps = 4, threads // 32
    stacks = (shape.talker, shape.predictor)
    column_tiles = min(4, -(-2 * columns // 8))
    least = max(s.hidden for s in stacks) // 16 * 32 * 4 * element
    staged = max(staged_bytes, least) if column_tiles > 1 else least
    sums = warps * 4 * 32 * 16
    head_dim = shape.talker.head_dim
    group = max(s.group for s in stacks)
    attention = 4 * (2 * 16 * head_dim + warps * group * (head_dim + 2))
    sample = 4 * ((max(shape.vocab, shape.codes) + 32) * 33 // 32 + 2 * warps + 256 + 8)
    return columns * COLUMN.itemsize + warps * 128 + max(staged + sums, attention, sample) + 512
