"""A GPU in, its ceilings and the price of a frame's parts out: copy, product, barriers, streaming, graph nodes."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu_place import Place, Row
from bench.machine import facts
from megakernel import build, cucpu, cuda_kernel, nvrtc
from megakernel.build import CSRC, Cubin
from megakernel.cuda_kernel import Kernel, Launch
from megakernel.nvrtc import BuildError

SOURCE = Path(__file__).parent / "gpu_probe.cu"
BARRIERS = {"none": 0, "counter": 1, "flags": 2, "tree": 3}
"""By the numbers of gpu_probe.cu."""

FRAGMENT_BYTES = 16
MEETINGS, ROUNDS, NODES = 2000, 120, 300
STREAMS = [(16, 16), (8, 24), (16, 32)]
"""(loads a thread keeps in flight, tiles between two barriers): 9, 13 and 17 MB on 132 multiprocessors."""


def ceilings(place: Place) -> Iterator[Row]:
    """What this machine is, and its copy and bf16 product at best; random data, medians."""
    yield {"facts": facts(place.device), "gpu": None if place.dry else vars(place.gpu)}
    size = place.few(2 << 30, 1 << 20)
    x = torch.randn(size // 4, device=place.device)
    y = torch.empty_like(x)
    ms = place.times(lambda: y.copy_(x), place.few(30, 2))
    yield {"what": "copy", "bytes": 2 * size, "ms": ms}
    ms = place.times(x.sum, place.few(30, 2))
    yield {"what": "read", "bytes": size, "ms": ms}
    n = place.few(8192, 64)
    a, b = (torch.randn(n, n, device=place.device).bfloat16() for _ in range(2))
    ms = place.times(lambda: a @ b, place.few(30, 2))
    yield {"what": "product", "flops": 2 * n**3, "ms": ms}


class ProbeArgs(ctypes.Structure):
    """Args of gpu_probe.cu."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weights", "counters", "seen", "result")],
        *[(name, ctypes.c_int32) for name in ("barrier", "rounds", "tiles", "early")],
    ]


@dataclass
class Probe:
    """The compiled kernels for some threads a block and loads in flight, and the memory that they use."""

    place: Place
    threads: int
    ahead: int
    weights: Tensor

    def __post_init__(self) -> None:
        defines = {"THREADS": self.threads, "AHEAD": self.ahead}
        self.blocks = 3 if self.place.dry else self.place.gpu.multiprocessors
        self.counters = torch.zeros(2048, dtype=torch.int32, device=self.place.device)
        self.seen, self.result = torch.zeros_like(self.counters), torch.zeros_like(self.counters)
        self.tile_bytes = FRAGMENT_BYTES * self.blocks * self.threads
        if self.place.dry:
            self._library = cucpu.build(SOURCE, defines, "plain", [CSRC])
        else:
            on = self.place.gpu
            arch = build.arch_for(on.name, on.capability)
            self.kernels = cuda_kernel.load(_compile(arch, defines), on)

    def run(self, kernel: str, barrier: str = "none", rounds: int = 1, tiles: int = 0, early: bool = False) -> int:
        """One launch, after clearing the counters; what it left in `result`."""
        self.prepare(kernel, barrier, rounds, tiles, early)()
        return int(self.result[0]) % 2**32

    def prepare(
        self, kernel: str, barrier: str, rounds: int, tiles: int = 0, early: bool = False
    ) -> Callable[[], object]:
        """A launch as a call; each one is a fresh meeting of blocks."""
        launch = None if self.place.dry else Launch(self.kernels[kernel], self.blocks, self.threads, cooperative=True)
        args = self.args(barrier, rounds, tiles, early)

        def run() -> None:
            self.counters.zero_()
            self.result.zero_()
            if launch is None:
                self._library.launch(kernel, args, self.blocks, self.threads)
            else:
                launch(args, torch.cuda.current_stream().cuda_stream)

        return run

    def args(self, barrier: str, rounds: int, tiles: int, early: bool, skip_bytes: int = 0) -> ProbeArgs:
        """For a launch that begins so many bytes into the weights."""
        tensors = (self.weights, self.counters, self.seen, self.result)
        weights, *rest = (tensor.data_ptr() for tensor in tensors)
        return ProbeArgs(weights + skip_bytes, *rest, BARRIERS[barrier], rounds, tiles, early)


def _compile(arch: str, defines: dict[str, int]) -> Cubin:
    sources = {path.name: path.read_text() for path in (SOURCE, CSRC / "platform.h")}
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    return Cubin(*nvrtc.translate(sources, SOURCE.name, arch, flags), arch, nvrtc.version(), "compiled")


def probe(place: Place) -> Iterator[Row]:
    """Rows of the three kinds; each number's work was checked once before it was timed."""
    if place.dry:
        yield _nvrtc_compiles()
    size = place.few(3 << 29, 1 << 20)
    weights = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=place.device)
    threads = place.few(256, 64)
    for ahead in (16, 8):
        p = Probe(place, threads, ahead, weights)
        if ahead == 16:
            yield from _barriers(place, p)
            yield from _nodes(place, p)
        yield from _streams(place, p)


def _nvrtc_compiles() -> Row:
    row: Row = {"what": "nvrtc", "arch": "sm_90"}
    try:
        cubin = _compile("sm_90", {"THREADS": 256, "AHEAD": 16})
    except BuildError as error:
        return (
            row | {"skipped": str(error)} if "not installed" in str(error) else row | {"ok": False, "error": str(error)}
        )
    return row | {"spills": sum(figures.spills for figures in cubin.kernels.values()), "ok": True}


def _barriers(place: Place, p: Probe) -> Iterator[Row]:
    meetings = place.few(MEETINGS, 5)
    for kind in BARRIERS:
        row: Row = {"what": "barrier", "kind": kind, "blocks": p.blocks, "threads": p.threads}
        if kind != "none":
            row["ok"] = p.run("checked", kind, place.few(200, 5)) == 0
        ms = place.times(p.prepare("barriers", kind, meetings), place.few(20, 1))
        yield row | {"us": [round(1e3 * x / meetings, 5) for x in ms]}


def _streams(place: Place, p: Probe) -> Iterator[Row]:
    for ahead, tiles in STREAMS:
        if ahead != p.ahead:
            continue
        rounds = min(place.few(ROUNDS, 2), p.weights.nbytes // (tiles * p.tile_bytes))
        read = p.weights.view(-1)[: rounds * tiles * p.tile_bytes // 4]
        expected = int(read.sum(dtype=torch.int64)) % 2**32
        for kind, early in (
            ("none", True),
            ("none", False),
            *((k, e) for k in BARRIERS if k != "none" for e in (True, False)),
        ):
            ok = p.run("stream", kind, rounds, tiles, early) == expected
            ms = place.times(p.prepare("stream", kind, rounds, tiles, early), place.few(8, 1))
            yield {
                "what": "stream",
                "kind": kind,
                "early": early,
                "in_flight": ahead * p.threads * FRAGMENT_BYTES,
                "between": tiles * p.tile_bytes,
                "rounds": rounds,
                "ms": ms,
                "ok": ok,
            }


def _nodes(place: Place, p: Probe) -> Iterator[Row]:
    """A graph of many nodes: empty ones, and ones that read their own weights."""
    if place.dry:
        read = p.weights[: 16 * p.tile_bytes // 4]
        ok = p.run("node", tiles=16) == int(read.sum(dtype=torch.int64)) % 2**32
        yield {"what": "node", "tiles": 16, "ok": ok}
        return
    for tiles in (0, 16):
        nodes = min(NODES, p.weights.nbytes // (16 * p.tile_bytes))
        read = p.weights[: nodes * tiles * p.tile_bytes // 4]
        for overlap, early in ((False, False), (True, False), (True, True)):
            graph = _capture(p, p.kernels["node"], nodes, tiles, overlap, early)
            p.result.zero_()
            graph.replay()
            ok = int(p.result[0]) % 2**32 == int(read.sum(dtype=torch.int64)) % 2**32
            ms = place.times(graph.replay, 20)
            yield {
                "what": "node",
                "bytes": tiles * p.tile_bytes,
                "overlap": overlap,
                "early": early,
                "us": [round(1e3 * x / nodes, 5) for x in ms],
                "ok": ok,
            }


def _capture(p: Probe, kernel: Kernel, nodes: int, tiles: int, overlap: bool, early: bool) -> torch.cuda.CUDAGraph:
    launch, graph = Launch(kernel, p.blocks, p.threads, overlap=overlap), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(nodes):
            args = p.args("none", 1, tiles, early, i * tiles * p.tile_bytes)
            launch(args, torch.cuda.current_stream().cuda_stream)
    return graph
