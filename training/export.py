"""Trained weights in, a checkpoint folder in the official layout out: bfloat16, configs and tokenizer of the base.

    python -m training.export BASE OUT [--talker RUN/last.pt …] [--codec RUN/last.pt …]

Of several files the mean is exported, weighted where they are given as FILE=SHARE: of runs that went on from each
other's weights it is better than any one. Without --talker or --codec that part is the base's own. What the base holds
beside them (the codec's unused encoder) is copied, so the folder loads in the official `qwen_tts` package too.
"""

import argparse
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT_MB = 25.0


def averaged(runs: Sequence[str], prefix: str) -> dict[str, Tensor]:
    """The averaged weights of trainers' files, FILE or FILE=SHARE, under their official names."""
    files = [(path, float(share or 1)) for path, _, share in (run.partition("=") for run in runs)]
    whole = sum(share for _, share in files)
    mean: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for path, share in files:
        for name, x in torch.load(path, weights_only=True, map_location="cpu")["average"].items():
            mean[prefix + name] = mean[prefix + name] + x * (share / whole)
    return mean


def write(base: Path, out: Path, fresh: dict[str, Tensor]) -> None:
    """Write the base's model.safetensors with the fresh tensors in their places; refuses names that it lacks."""
    tensors = load_file(base / "model.safetensors")
    for name, x in fresh.items():
        if name not in tensors or tensors[name].shape != x.shape:
            raise SystemExit(
                f"{base / 'model.safetensors'} has no {name} of shape {tuple(x.shape)}; was another base trained?"
            )
    merged = tensors | fresh
    halved = {n: (x.bfloat16() if x.is_floating_point() else x).contiguous() for n, x in merged.items()}
    save_file(halved, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner alone


def export(base: Path, out: Path, talker: Sequence[str], codec: Sequence[str]) -> float:
    """Write the folder; returns its size in MB (10^6 bytes)."""
    shutil.copytree(base, out, dirs_exist_ok=True)
    write(base, out, averaged(talker, "talker."))
    tokenizer = "speech_tokenizer"
    write(base / tokenizer, out / tokenizer, averaged(codec, "decoder."))
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6


def main() -> None:
    """Export, and say how large the folder is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--talker", nargs="+", default=[], metavar="FILE[=SHARE]")
    parser.add_argument("--codec", nargs="+", default=[], metavar="FILE[=SHARE]")
    options = parser.parse_args()
    size = export(options.base, options.out, options.talker, options.codec)
    print(f"{options.out}: {size:.1f} MB" + (f", more than {LIMIT_MB:.0f}" if size > LIMIT_MB else ""))


if __name__ == "__main__":
    main()
