"""Compiles all that the steps of bench.gpu launch, on all cores, into the cache; out come figures of each instance."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context

from bench.gpu_place import LAUNCHERS, SHIPPED, VARIANTS, Place, Row, Variant, columns_for
from megakernel import build, launch
from megakernel.build import Cubin
from megakernel.cucpu.launcher import CpuLauncher
from megakernel.kernels import PREFILL_COLUMNS
from megakernel.nvrtc import BuildError
from megakernel.shape import Shape
from pipecat_qwen3.checkpoint import EMBEDDED, Checkpoint

VOICES = {"1.7b": 32, "0.6b": 32, EMBEDDED: 8, "tiny": 8}
"""How many voices a geometry is run with; what takes longest comes first."""


def compile_all(place: Place) -> Iterator[Row]:
    """One row an instance, as they are ready: registers and spilled bytes."""
    if place.dry:
        yield from _for_the_cpu(place)
        return
    shapes = {name: Checkpoint.open(name).config.shape if name == EMBEDDED else place.shape(name) for name in VOICES}
    wanted = [(name, SHIPPED, name, VOICES[name]) for name in VOICES]
    wanted += [("0.6b", variant, f"0.6b, {label}", 8) for label, variant in VARIANTS.items() if variant != SHIPPED]
    running: dict[Future[Cubin], Row] = {}
    # processes: NVRTC compiles one program at a time in each
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for name, variant, label, voices in wanted:
            for columns in sorted({*columns_for(voices), PREFILL_COLUMNS}):
                for entry in launch.ENTRIES:
                    defines, arch = _order(place, shapes[name], variant, columns, entry)
                    case = {"what": label, "entry": entry, "columns": columns, "shipped": variant == SHIPPED}
                    running[pool.submit(build.compile, defines, arch)] = case
        for future in as_completed(running):
            try:
                cubin = future.result()
            except BuildError as error:
                yield running[future] | {"ok": False, "error": str(error)}
                continue
            for figures in cubin.kernels.values():
                row = running[future] | {"origin": cubin.origin} | asdict(figures)
                yield row | ({"ok": figures.spills == 0} if row["shipped"] else {})


def _order(place: Place, shape: Shape, variant: Variant, columns: int, entry: str) -> tuple[dict[str, object], str]:
    """What GpuLauncher would compile."""
    on = place.gpu
    cut = (shape, on.multiprocessors, launch.staged_bytes(on), columns, entry)
    return launch.defines(*cut, variant.threads, variant.extra), build.arch_for(on.name, on.capability)


def _for_the_cpu(place: Place) -> Iterator[Row]:
    launcher = place.launcher(LAUNCHERS[0], place.shape("tiny"), 4)
    assert isinstance(launcher, CpuLauncher)
    with ThreadPoolExecutor() as pool:
        for columns, library in zip(
            (4, PREFILL_COLUMNS), pool.map(launcher.instance, (4, PREFILL_COLUMNS)), strict=True
        ):
            yield {"what": "dry", "entry": "both", "columns": columns, "origin": library.path.suffix, "ok": True}
