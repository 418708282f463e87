"""The official package at the published 0.6B size: speaks a few frames in fp32 and bf16, and writes its logits.

python -m tests.golden.real FOLDER OUT.npz --frames 6 --seed 0         (called by tests/parity.py)
"""

import argparse
import gc
import logging
from pathlib import Path

import numpy as np
import torch

from tests.golden.cases import REAL_REQUEST
from tests.golden.official import Official


def main() -> None:
    parser = argparse.ArgumentParser(description="Logits of the official package at the 0.6B size.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    request = REAL_REQUEST | {"max_frames": args.frames, "seed": args.seed}
    arrays: dict[str, np.ndarray] = {}
    forced = None
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        print(f"official: 0.6B in {name}", flush=True)
        official = Official(args.folder, dtype)
        [spoken] = official.speak([request])
        forced = spoken.codes if forced is None else forced
        first, later = official.logits(forced)
        arrays |= {
            f"{name}/codes": spoken.codes.numpy(),
            f"{name}/first": first.numpy(),
            f"{name}/later": later.numpy(),
        }
        del official
        gc.collect()
    np.savez(args.out, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
