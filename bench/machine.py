"""What a run happened on and what that machine can do at best: facts, bandwidth, matrix throughput; and the run's JSON.

Ceilings are the best of many tries, since anything slower says something about the moment, not about the machine.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

RESULTS = Path(__file__).parent / "results"

MATRICES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192)}
"""Sides of the square products that are tried; a cache favours the small ones, a GPU needs large ones."""

COPY_BYTES = 256 << 20


def facts(device: torch.device) -> dict[str, Any]:
    """Hardware, driver, software, commit and how busy the machine was, for a run's JSON."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "instructions": [k for k, v in _capabilities().items() if v is True and k.startswith(("avx", "amx"))],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "uncommitted": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def copy_gbs(device: torch.device) -> float:
    """Bandwidth of a copy too large for any cache, read and write counted: GB/s."""
    x = torch.ones(COPY_BYTES // 4, device=device)
    y = torch.empty_like(x)
    return 2 * COPY_BYTES / best_s(lambda: y.copy_(x), device) / 1e9


def read_gbs(size: int, device: torch.device) -> float:
    """Bandwidth of reading the same `size` bytes again and again: GB/s; caches help as they help such weights."""
    x = torch.ones(max(size, 4096) // 4, device=device)
    return x.numel() * 4 / best_s(x.sum, device) / 1e9


def matmul_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """The best throughput of a square matrix product: GFLOP/s."""
    best = 0.0
    for n in MATRICES[device.type]:
        x, w = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * n**3 / best_s(lambda x=x, w=w: F.linear(x, w), device) / 1e9)
    return best


def best_s(run: Callable[[], object], device: torch.device, tries: int = 30) -> float:
    """Seconds of the fastest of `tries` runs, after three that do not count."""
    seconds = []
    for _ in range(tries + 3):
        settle(device)
        began = time.perf_counter()
        run()
        settle(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[3:])


def settle(device: torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write(name: str, record: dict[str, Any]) -> Path:
    """Write a run's JSON into bench/results under its name and the time; returns where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{found.get('model name', 'unknown')} (family {found.get('cpu family')}, model {found.get('model')})"


def _capabilities() -> dict[str, Any]:
    probe = getattr(torch.cpu, "get_capabilities", None)  # torch >= 2.11
    return probe() if probe is not None else {}


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
