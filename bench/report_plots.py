"""A run's record in, a plot as SVG out, which names the run's file in its metadata. Needs matplotlib."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]

BLUE, RED, GREY = "#2864a8", "#c23b22", "#8a8a8a"


def first_audio(record: Record, image: Path, name: str) -> None:
    """The distribution of the first audible sample: every run a dot, every case a row, its median a bar."""
    runs = [run for run in record["runs"] if run["first_audible_s"] is not None]
    cases = list(dict.fromkeys((run["way"], run["rate"]) for run in runs))[::-1]
    figure, axes = _canvas(7.5, 0.9 + 0.24 * len(cases))
    for row, (way, rate) in enumerate(cases):
        ms = [1e3 * run["first_audible_s"] for run in runs if (run["way"], run["rate"]) == (way, rate)]
        axes.plot(ms, [row] * len(ms), "o", color=BLUE, alpha=0.45, markersize=4, markeredgewidth=0)
        axes.plot([statistics.median(ms)] * 2, [row - 0.36, row + 0.36], color=RED, linewidth=2)
    axes.axvline(sum(record["floor_ms"].values()), color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(cases)), [f"{way}, {'whole' if r is None else f'{r:g}/s'}" for way, r in cases])
    axes.set_xlabel("ms to the first audible sample (bar: median; dashed: floor)")
    axes.set_xlim(left=0)
    _save(figure, image, name)


def step(record: Record, image: Path, name: str) -> None:
    """Milliseconds a frame over voices, a line for each number of positions, above their floors."""
    figure, axes = _canvas(7.0, 4.0)
    rows = record["rows"]
    colours = mpl.colormaps["viridis"]
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    for i, context in enumerate(contexts):
        some = sorted((row for row in rows if row["context"] == context), key=lambda row: row["batch"])
        voices = [row["batch"] for row in some]
        colour = colours(0.15 + 0.7 * i / max(1, len(contexts) - 1))
        medians = [statistics.median(row["wall_ms"]) for row in some]
        worst = [float(np.percentile(row["wall_ms"], 95)) for row in some]
        axes.plot(voices, medians, "o-", color=colour, label=f"{context} positions")
        axes.fill_between(voices, medians, worst, color=colour, alpha=0.15, linewidth=0)
        axes.plot(voices, [row["floor_ms"] for row in some], "--", color=colour, linewidth=1)
    axes.set_xlabel("voices that advance together")
    axes.set_ylabel("ms a frame (shaded: to p95; dashed: floor)")
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["batch"] for row in rows}))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    _save(figure, image, name)


def load(record: Record, image: Path, name: str) -> None:
    """How waits grow with the requests a second, and the share of requests that stalled."""
    figure, axes = _canvas(7.0, 4.0)
    points = record["points"]
    rates = [point["rate"] for point in points]
    for key, colour, told in (("first_byte", BLUE, "first byte"), ("first_audible", RED, "first audible")):
        axes.plot(rates, [point[f"{key}_p50"] for point in points], "o-", color=colour, label=f"{told}, median")
        axes.plot(rates, [point[f"{key}_p95"] for point in points], "o--", color=colour, label=f"{told}, p95")
    if "floor" in record:
        alone = record["floor"]["first_audible_p50"]
        axes.axhline(alone, color=GREY, linestyle=":", label="first audible, one at a time")
    axes.set_yscale("log")
    axes.set_xlabel("requests a second (Poisson)")
    axes.set_ylabel("ms")
    stalls = axes.twinx()
    stalls.bar(
        rates, [100 * point["with_underruns"] for point in points], width=0.06 * max(rates), color=GREY, alpha=0.3
    )
    stalls.set_ylabel("% with underruns (grey)")
    stalls.set_ylim(0, 100)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    _save(figure, image, name)


PLOTS: dict[str, Callable[[Record, Path, str], None]] = {
    "first_audio-plot": first_audio,
    "step-plot": step,
    "load-plot": load,
}


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    return figure, axes


def _save(figure: Figure, image: Path, name: str) -> None:
    """The same record gives the same file."""
    with mpl.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        figure.savefig(image, format="svg", metadata={"Source": name, "Date": None}, facecolor="white")
