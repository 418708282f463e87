"""The device and number format to run on: what was asked for, or what is fastest here."""

import warnings

import torch

from pipecat_qwen3.errors import BackendError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_device(wanted: str) -> torch.device:
    """ "auto" is the first CUDA device, if there is one that works, else the CPU. Raises BackendError."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise BackendError(f"device should be auto, cpu or cuda, but is {wanted!r}")
    if wanted == "cpu":
        return torch.device("cpu")
    missing = cuda_missing()
    if missing is None:
        return torch.device("cuda")
    if wanted == "cuda":
        raise BackendError(f"device cuda cannot be had: {missing}; use --device cpu or auto")
    return torch.device("cpu")


def cuda_missing() -> str | None:
    """Why there is no CUDA device to run on, in one line, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        reason = f" ({_line(told[-1].message)})" if told else ""
        return f"torch finds no NVIDIA GPU, or its driver is too old for CUDA {torch.version.cuda}{reason}"
    try:
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        if major < 8:
            return f"{name} is sm_{major}{minor}; bf16 needs sm_80 (Ampere) or later"
        _compute()
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:  # taken by others, full, or unknown to this torch
        return f"the GPU cannot be used ({_line(error)})"
    return None


def _compute() -> None:
    """One kernel on the GPU, waited for."""
    torch.ones(1, device="cuda").add_(1).item()


def _line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 on CUDA and on CPUs with bf16 matrix instructions, else fp32. Raises BackendError."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" or cpu_has_bf16() else torch.float32
    if wanted not in DTYPES:
        raise BackendError(f"dtype should be auto, bf16 or fp32, but is {wanted!r}")
    return DTYPES[wanted]


def cpu_has_bf16() -> bool:
    """True with AVX-512 bf16 or AMX instructions; without them bf16 products are emulated and slower than fp32."""
    probe = getattr(torch.cpu, "get_capabilities", None)  # missing in older versions of torch
    found = probe() if probe is not None else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
