"""Trained weights in, a checkpoint folder in the official layout out: bfloat16, configs and tokenizer of the base.

    python -m training.export BASE OUT [--talker RUN/last.pt …] [--codec RUN/last.pt …]

Of several files the mean is exported, weighted where they are given as FILE=SHARE: of runs that went on from each
other's weights it is better than any one. A voice's folder may stand for the file of its talker. Without --talker or
--codec that part is the base's own. What the base holds beside them (the codec's unused encoder) is copied, so the
folder loads in the official `qwen_tts` package too. What the decoder is fed is sharpened on the way (--sharpen): its
training makes it smooth, and who hears it needs the formants.
"""

import argparse
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.codebooks import Codebooks
from training.steps import leave, load, on_signals, there

LIMIT_MB = 25.0

SHARPEN = 1.25
"""Gain of `Codebooks.sharpening` in what is exported; README.md says how it was chosen."""


def weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """The averaged weights of a trainer's file, or those of a checkpoint's folder, under their official names."""
    if path.is_dir() and (path / "model.safetensors").is_file():
        tensors = load_file(path / "model.safetensors")
        found = {name: x.float() for name, x in tensors.items() if name.startswith(prefix)}
        if not found:
            raise SystemExit(f"{path} has no weights {prefix}*; give the last.pt of a trainer")
        return found
    if not path.is_file():
        raise SystemExit(f"{path} holds no weights; give the last.pt of a trainer, or a voice's folder")
    saved = load(path, ("average",), "train_talker or training.train_codec", map_location="cpu")
    return {prefix + name: x for name, x in saved["average"].items()}


def averaged(runs: Sequence[str], prefix: str) -> dict[str, Tensor]:
    """The weights of trainers' files or checkpoints' folders, FILE or FILE=SHARE, under their official names."""
    files = [(path, float(share or 1)) for path, _, share in (run.partition("=") for run in runs)]
    whole = sum(share for _, share in files)
    mean: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for path, share in files:
        for name, x in weights(Path(path), prefix).items():
            mean[name] = mean[name] + x * (share / whole)
    return mean


def write(base: Path, out: Path, fresh: dict[str, Tensor], resized: tuple[str, ...] = ()) -> None:
    """Write the base's model.safetensors with the fresh tensors in their places.

    Refuses names that it lacks, and other shapes but for names that begin as `resized` says.
    """
    tensors = load_file(base / "model.safetensors")
    for name, x in fresh.items():
        if name not in tensors or (tensors[name].shape != x.shape and not name.startswith(resized)):
            raise SystemExit(
                f"{base / 'model.safetensors'} has no {name} of shape {tuple(x.shape)}; was another base trained?"
            )
    merged = tensors | fresh
    halved = {n: (x.bfloat16() if x.is_floating_point() else x).contiguous() for n, x in merged.items()}
    save_file(halved, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner alone


def sharpened(decoder: dict[str, Tensor], sharpening: Tensor) -> dict[str, Tensor]:
    """A codec's weights whose quantizer gives what it gave, sharpened [64, 64]."""
    names = [f"decoder.quantizer.{part}.output_proj.weight" for part in ("rvq_first", "rvq_rest")]
    return decoder | {name: (decoder[name][:, :, 0] @ sharpening)[..., None] for name in names}


def export(
    base: Path, out: Path, talker: Sequence[str], codec: Sequence[str], sharpening: Tensor | None = None
) -> float:
    """Write the folder; returns its size in MB (10^6 bytes)."""
    if not (base / "model.safetensors").is_file():
        raise SystemExit(f"{base} is no voice: it has no model.safetensors; give a folder like pipecat_qwen3/embedded")
    tokenizer, mean, decoder = "speech_tokenizer", averaged(talker, "talker."), averaged(codec, "decoder.")
    shutil.copytree(base, out, dirs_exist_ok=True)
    write(base, out, mean)
    write(base / tokenizer, out / tokenizer, decoder if sharpening is None else sharpened(decoder, sharpening))
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6


def main() -> None:
    """Export, and say how large the folder is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("base", type=there)
    parser.add_argument("out", type=Path)
    parser.add_argument("--talker", nargs="+", default=[], metavar="FILE[=SHARE]")
    parser.add_argument("--codec", nargs="+", default=[], metavar="FILE[=SHARE]")
    parser.add_argument("--codebooks", type=there, help="of the recordings that --codec was trained on")
    parser.add_argument("--sharpen", type=float, default=SHARPEN, help="gain of the decoder's formants; 1 for none")
    options = parser.parse_args()
    on_signals(leave)
    if bool(options.codec) != (options.codebooks is not None):
        parser.error("--codec and --codebooks belong together: what the decoder is fed is sharpened")
    sharpening = Codebooks.load(options.codebooks).sharpening(options.sharpen) if options.codebooks else None
    size = export(options.base, options.out, options.talker, options.codec, sharpening)
    print(f"{options.out}: {size:.1f} MB" + (f", more than {LIMIT_MB:.0f}" if size > LIMIT_MB else ""))


if __name__ == "__main__":
    main()
