"""What memory goes where: weights, KV, codec state, one more voice, and what the process really holds.

    python -m bench.memory [--model M] [--voices 1 8]

Opens the model as an engine would and lets so many voices speak. Prints the floor first, which is the checkpoint's
files; the JSON goes to bench/results.
"""

import argparse
import gc
import itertools
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.record import Record, label, options
from megakernel.choose import BACKENDS
from pipecat_qwen3.backend import Request
from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.device import pick_device, pick_dtype
from pipecat_qwen3.errors import program
from pipecat_qwen3.local import LocalBackend

TEXT = "The weather will be cold and dry tomorrow, and you will want a warm coat and a hat."

STATE = "codec's state"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _arguments(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    record = Record("memory", args, device)
    held = {"imports": held_mb(device)}
    files = file_mb(Checkpoint.open(args.model).folder)
    record.say(f"floor: the checkpoint's files have {sum(files.values()):.1f} MB")
    backend = LocalBackend.open(
        args.model,
        max_batch=args.max_batch,
        device=device.type,
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        backend=args.backend,
        positions=args.positions,
    )
    try:
        gc.collect()
        held["open"] = held_mb(device)
        parts, row = parts_mb(backend), row_mb(backend)
        for voices in args.voices:
            speak(backend, voices, args.max_frames)
            held[f"after {voices} at once"] = held_mb(device)
        name = backend.backend_name
    finally:
        backend.close()
    record.say(table(parts, row, held))
    measured = {"files_mb": files, "parts_mb": parts, "row_mb": row, "held_mb": held, "backend": name}
    return record.finish(f"{label(args.model, dtype, device)}-{name}", dtype=str(dtype)[6:], **measured)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options("memory", __doc__)
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hugging Face name")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--max-batch", type=int, default=8, help="voices that the engine is built for")
    parser.add_argument("--positions", type=int, default=1024, help="prompt and frames that one voice can hold")
    parser.add_argument("--voices", type=int, nargs="+", default=[1, 8], help="voices that speak at once, in turn")
    parser.add_argument("--max-frames", type=int, help="at most so many frames each")
    return parser.parse_args(argv)


def parts_mb(backend: LocalBackend) -> dict[str, float]:
    """MB of tensors by what they are for; each memory counts once, where it is found first."""
    engine, seen = backend.engine, set[int]()
    step, codec, prompter = engine.step, engine.codec, engine.prompter
    return {
        "talker and code predictor": tensor_mb([vars(step)["weights"]], seen),
        "KV of all rows": tensor_mb([vars(step)["kv"]], seen),
        "rest of the frame step": tensor_mb([step], seen),
        "text embeddings": tensor_mb([prompter], seen),
        "codec's weights": tensor_mb([codec.codec], seen),
        "codec's state of all rows": tensor_mb([codec.state.arrays], seen),
        "cached prefixes": tensor_mb([engine._prefixes], seen),
    }


def row_mb(backend: LocalBackend) -> dict[str, float]:
    """MB of one resident voice."""
    kv: Tensor = vars(backend.engine.step)["kv"]
    rows = backend.engine.step.rows
    return {
        "rows": rows,
        "KV": round(_bytes(kv) / rows / 1e6, 3),
        STATE: round(backend.engine.codec.state.row_bytes / 1e6, 3),
    }


def tensor_mb(roots: Iterable[object], seen: set[int]) -> float:
    """MB of the tensors that can be reached from some objects and are not in `seen`, to which they are added."""
    return round(sum(_bytes(tensor) for root in roots for tensor in _tensors(root, seen)) / 1e6, 3)


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Tensors, and numpy's arrays as such, of our own objects and plain containers, one for each memory."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        key = id(value) if value.is_mkldnn else value.untyped_storage().data_ptr()
        if key not in seen:
            seen.add(key)
            yield value
        return
    if id(value) in seen:
        return
    inner: Iterable[object] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple | set):
        inner = value
    elif type(value).__module__.split(".")[0] in ("pipecat_qwen3", "megakernel") and hasattr(value, "__dict__"):
        inner = vars(value).values()
    else:
        return
    seen.add(id(value))
    yield from itertools.chain.from_iterable(_tensors(item, seen) for item in list(inner))


def _bytes(tensor: Tensor) -> int:
    """Of the memory behind a tensor; a packed one (oneDNN) has at least the bytes of its elements."""
    return tensor.numel() * tensor.element_size() if tensor.is_mkldnn else tensor.untyped_storage().nbytes()


def file_mb(folder: Path) -> dict[str, float]:
    """MB of each safetensors file of a checkpoint; the codec's holds its encoder too, which speaking does not load."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): round(path.stat().st_size / 1e6, 3) for path in files}


def held_mb(device: torch.device) -> dict[str, float]:
    """MB that the process holds now and held at most, and on a GPU what torch has of it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"peak": round(peak / 1e6, 1)}
    statm = Path("/proc/self/statm")
    if statm.exists():
        found["resident"] = round(int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6, 1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        found["gpu tensors"] = round(torch.cuda.memory_allocated(device) / 1e6, 1)
        found["gpu reserved"] = round(torch.cuda.memory_reserved(device) / 1e6, 1)
    return found


def speak(backend: LocalBackend, voices: int, max_frames: int | None) -> None:
    """Let so many voices speak at the same time, to their ends."""
    streams = [backend.speak(Request(TEXT, seed=i, max_frames=max_frames, ahead_s=None)) for i in range(voices)]
    for stream in streams:
        for _ in stream:
            pass


def table(parts: dict[str, float], row: dict[str, float], held: dict[str, dict[str, float]]) -> str:
    """Three small tables in MB."""
    lines = [f"{'MB of tensors':<34}{'':>10}", *(f"  {name:<32}{mb:>10.2f}" for name, mb in parts.items())]
    lines += [f"  {'all of them':<32}{sum(parts.values()):>10.2f}"]
    lines += [f"one of {row['rows']:.0f} rows: KV {row['KV']:.2f} MB, codec's state {row[STATE]:.2f} MB"]
    for when, found in held.items():
        lines.append(f"{'the process, ' + when:<34}" + "".join(f"  {kind} {mb:.0f}" for kind, mb in found.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    program(main)
