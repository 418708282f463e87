"""This machine in; what can run on it, and why not more, out. Whatever is missing is a finding, never a crash."""

import importlib.metadata
import json
import platform
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from pipecat_qwen3 import __version__

_LIBRARIES = ("torch", "transformers", "pipecat-ai", "numpy", "numba", "safetensors")
_DRIVER = Path("/proc/driver/nvidia/version")
_CPU = Path("/proc/cpuinfo")


def run(args: Namespace) -> int:
    """The command `doctor`; the exit code is 1 if nothing can be spoken here."""
    findings = examine(args.model, args.device, args.dtype, args.backend)
    print(json.dumps(findings) if args.json else describe(findings))
    return 1 if findings["problems"] else 0


def examine(model: str, device: str, dtype: str, backend: str) -> dict[str, Any]:
    """All findings as plain values; `problems` lists what keeps the model from speaking."""
    problems: list[str] = []
    libraries = {name: _version(name) for name in _LIBRARIES}
    problems += [f"{name} is not installed" for name, version in libraries.items() if version is None]
    findings: dict[str, Any] = {
        "package": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": libraries,
        "cpu": cpu_name(),
        "driver": driver(),
        "model": model,
    }
    if libraries["torch"] is not None:
        try:
            findings |= _torch(model, device, dtype, backend, libraries, problems)
        except Exception as error:  # a broken installation fails in any way it likes
            problems.append(_line(error))
    return findings | {"problems": problems}


def describe(findings: dict[str, Any]) -> str:
    """The findings for a person."""
    libraries = ", ".join(f"{name} {version or 'missing'}" for name, version in findings["libraries"].items())
    lines = [
        ("pipecat-qwen3", f"{findings['package']}, Python {findings['python']}, {findings['system']}"),
        ("libraries", libraries),
        ("cpu", f"{findings['cpu']}{_bf16(findings)}"),
    ]
    if "cuda" in findings:
        cuda = findings["cuda"]
        lines.append(("gpu", cuda["name"] or f"none: {cuda['missing']}"))
        lines.append(("nvidia driver", findings["driver"] or "none"))
    if "backend" in findings:
        lines.append(("runs on", f"{findings['device']} in {findings['dtype']}"))
        lines.append(("backend", f"{findings['backend']} ({findings['backend_reason']})"))
    if "voices" in findings:
        lines.append(("model", f"{findings['model']}: voices {', '.join(findings['voices']) or 'none'}"))
        pool = findings["kv_pool"]
        size = f"{pool['bytes'] / 1e6:.0f} MB for {pool['rows']} voices of {pool['positions']} positions"
        lines.append(("kv pool", f"{size} (max_batch {pool['max_batch']})"))
    lines += [("problem", problem) for problem in findings["problems"]]
    return "\n".join(f"{name:<14} {value}" for name, value in lines)


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        names = [
            line.partition(":")[2].strip() for line in _CPU.read_text().splitlines() if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def driver() -> str | None:
    """Version of the NVIDIA kernel driver, or None."""
    try:
        words = _DRIVER.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _torch(
    model: str, device: str, dtype: str, backend: str, libraries: dict[str, str | None], problems: list[str]
) -> dict[str, Any]:
    import torch

    from megakernel.choose import UnavailableError
    from pipecat_qwen3.device import cpu_has_bf16, cuda_missing, pick_device, pick_dtype
    from pipecat_qwen3.errors import TTSError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an old driver; cuda_missing() says so in one line
        missing = cuda_missing()
    libraries["torch"] = torch.__version__  # pip's version lacks the build: +cpu, +cu130
    findings: dict[str, Any] = {
        "cpu_bf16": cpu_has_bf16(),
        "cuda": {
            "name": _gpu_name() if missing is None else None,
            "version": torch.version.cuda,
            "missing": missing,
        },
    }
    try:
        where = pick_device(device)
        number_format = pick_dtype(dtype, where)
        short = "bf16" if number_format == torch.bfloat16 else "fp32"
        findings |= {"device": where.type, "dtype": short}
        findings |= _model(model, where.type, number_format, backend)
    except (TTSError, UnavailableError) as error:
        problems.append(_line(error))
    return findings


def _gpu_name() -> str:
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _model(model: str, device: str, dtype: Any, backend: str) -> dict[str, Any]:
    import inspect

    from megakernel.choose import choose
    from pipecat_qwen3.checkpoint import Checkpoint, Tensors
    from pipecat_qwen3.local import LocalBackend

    checkpoint = Checkpoint.open(model)
    Tensors(checkpoint.folder)
    Tensors(checkpoint.folder / "speech_tokenizer")
    options = inspect.signature(LocalBackend.open).parameters
    max_batch, positions = options["max_batch"].default, options["positions"].default
    rows = max_batch if device == "cpu" else 4 * max_batch
    shape = checkpoint.config.shape
    choice = choose(backend, device, dtype, shape, max_batch)
    size = 2 * shape.talker.layers * shape.talker.kv_size * positions * rows * dtype.itemsize
    return {
        "backend": choice.name,
        "backend_reason": choice.reason,
        "voices": list(checkpoint.config.speakers),
        "kv_pool": {"max_batch": max_batch, "rows": rows, "positions": positions, "bytes": size},
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _bf16(findings: dict[str, Any]) -> str:
    if "cpu_bf16" not in findings:
        return ""
    return ", with bf16 instructions" if findings["cpu_bf16"] else ", without bf16 instructions"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
