"""A run's record in, lines of a Markdown table out, or one figure in words. Times are told in milliseconds."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]


def stages(record: Record, voices: str = "") -> list[str]:
    """Every stage beside its floor, of every batch or of one: "8"."""
    rows = [
        [str(row["batch"]), row["stage"], _ms(row["floor_ms"]), *_median_p95(row["wall_ms"]), _over(row)]
        for row in record["stages"]
        if voices in ("", str(row["batch"]))
    ]
    return _table(["voices", "ms a frame", "floor", "median", "p95", "x floor"], rows)


def stage(record: Record, choice: str) -> str:
    """One median of `stages`: "1, talker"."""
    batch, name = _parts(choice, 2)
    (row,) = [row for row in record["stages"] if (str(row["batch"]), row["stage"]) == (batch, name)]
    return f"{_ms(statistics.median(row['wall_ms']))} ms"


def step(record: Record) -> list[str]:
    """A line for each number of positions and voices."""
    rows = [
        [str(row["context"]), str(row["batch"]), _ms(row["floor_ms"]), *_median_p95(row["wall_ms"]), _over(row)]
        for row in record["rows"]
    ]
    return _table(["positions", "voices", "floor, ms", "median", "p95", "x floor"], rows)


def codec(record: Record) -> list[str]:
    """Every way to decode, of what is used here."""
    rows = [
        [row["way"], str(row["voices"]), _ms(row["floor_ms"]), *_median_p95(row["ms"])]
        for row in record["stages"]
        if row["kind"] == "used"
    ]
    return _table(["decoding", "voices", "floor, ms a frame", "median", "p95"], rows)


def first_audio(record: Record) -> list[str]:
    """Median and 95th percentile of each of the three firsts, a line for each way and typing speed."""
    rows = []
    for way, rate in _distinct(record["runs"], "way", "rate"):
        some = [run for run in record["runs"] if (run["way"], run["rate"]) == (way, rate)]
        cells = [_both(some, key) for key in ("first_byte_s", "first_playable_s", "first_audible_s")]
        stalled = sum(run["underruns"] > 0 for run in some)
        rows.append([way, "whole" if rate is None else f"{rate:g}", *cells, f"{stalled} of {len(some)}"])
    head = ["way", "tokens/s", "first byte, ms: median (p95)", "first playable", "first audible", "with underruns"]
    return _table(head, rows)


def wait(record: Record, choice: str) -> str:
    """One median of `first_audio`: "in process, whole, first_audible_s"."""
    way, speed, key = choice.rsplit(", ", 2)
    rate = None if speed == "whole" else float(speed)
    return f"{_median_s([run for run in record['runs'] if (run['way'], run['rate']) == (way, rate)], key)} ms"


def first_audio_floor(record: Record) -> str:
    """What a machine of these ceilings needs at least."""
    return f"{_ms(sum(record['floor_ms'].values()))} ms"


def barge_in(record: Record) -> list[str]:
    """Median and 95th percentile, a line for each way and number of voices."""
    rows = []
    for way, voices in _distinct(record["runs"], "way", "voices"):
        some = [run for run in record["runs"] if (run["way"], run["voices"]) == (way, voices)]
        cells = [_both(some, key) for key in ("last_sample_s", "row_free_s", "done_s")]
        rows.append([way, str(voices), *cells, str(max(run["late_samples"] for run in some))])
    head = ["way", "voices", "last sample, ms: median (p95)", "row free", "server says done", "samples that came late"]
    return _table(head, rows)


def stop(record: Record, choice: str) -> str:
    """One median of `barge_in`: "pipeline, 1, last_sample_s"."""
    way, voices, key = choice.rsplit(", ", 2)
    some = [run for run in record["runs"] if (run["way"], str(run["voices"])) == (way, voices)]
    return f"{_median_s(some, key)} ms"


def memory(record: Record) -> list[str]:
    """What tensors are for, what one row takes, and what the process held."""
    row = record["row_mb"]
    rows = [[name, f"{mb:.2f}"] for name, mb in record["parts_mb"].items()]
    rows += [[f"of these, one of {row['rows']:g} rows", f"{row['KV'] + row[STATE]:.2f}"]]
    for when, held in record["held_mb"].items():
        rows += [[f"process, {when}: {kind}", f"{mb:.0f}"] for kind, mb in held.items()]
    return _table(["", "MB"], rows)


STATE = "codec's state"


def heard(record: Record) -> list[str]:
    """Word errors by voice and group of sentences: of flite's recordings, and of ours in both text layouts."""
    rows = []
    for voice in dict.fromkeys(name.split()[0] for name in record["figures"]):
        for head, groups in GROUPS.items():
            wers = [_word_error(record, voice, layout, groups) for layout in ("flite", "whole", "streaming")]
            rows.append([f"{voice}, {head}", *(f"{100 * wer:.1f}" for wer in wers)])
    return _table(["word error in %", "flite", "whole text", "streaming text"], rows)


GROUPS = {
    "all": ("",),
    "known words": ("agent", "plain", "known", "pair"),
    "unseen words": ("unseen",),
    "digits": ("digits",),
}
"""Of held-out sentences."""


def word_error(record: Record, choice: str) -> str:
    """One of `heard`, over all sentences: "rms, whole"."""
    voice, layout = _parts(choice, 2)
    return f"{100 * _word_error(record, voice, layout, ('',)):.1f} %"


def _word_error(record: Record, voice: str, layout: str, groups: Sequence[str]) -> float:
    figures, ours = record["figures"], layout if layout != "flite" else "whole"
    sampling = "greedy" if f"{voice} {ours} greedy" in figures else "own"
    some = [figures[f"{voice} {ours} {sampling} {group}".strip()] for group in groups]
    errors = sum(one["words"] * one["flite_wer" if layout == "flite" else "wer"] for one in some)
    return errors / sum(one["words"] for one in some)


def load(record: Record) -> list[str]:
    """The saturation curve; above it the same requests one at a time, which no load can beat."""
    points = [*([record["floor"]] if "floor" in record else []), *record["points"]]
    rows = [
        [
            f"{p['rate']:g}" if p["rate"] else "one at a time",
            f"{p['requests']:.0f}",
            f"{p['completed']:.0%}",
            f"{p['first_byte_p50']:.0f} ({p['first_byte_p95']:.0f})",
            f"{p['first_audible_p50']:.0f} ({p['first_audible_p95']:.0f})",
            f"{p['with_underruns']:.0%}",
            f"{p['audio_seconds_a_second']:.1f}",
        ]
        for p in points
    ]
    head = ["requests/s", "n", "done", "first byte, ms: median (p95)", "first audible", "with underruns", "audio s/s"]
    return _table(head, rows)


def peers(record: Record) -> list[str]:
    """Who, in which version, and what a frame took with the codec and without: median (least-most)."""
    rows = []
    for side in record["sides"]:
        if "missing" in side:
            rows.append([side["name"], f"not run: {side['missing']}", "", "", "", ""])
            continue
        for mode in dict.fromkeys(run["mode"] for run in side["runs"]):
            some = [run for run in side["runs"] if run["mode"] == mode]
            with_codec = [run for run in some if run["codec"]]
            cells = [_spread_ms(with_codec), _spread_ms([run for run in some if not run["codec"]])]
            rtf = statistics.median(run["total_s"] / (FRAME_S * run["frames"]) for run in with_codec)
            firsts = [1e3 * run["first_byte_s"] for run in with_codec if run["first_byte_s"] is not None]
            first = _ms(statistics.median(firsts)) if firsts else "-"
            rows.append([f"{side['name']} {side['version']}", f"{mode}; {side['how']}", *cells, f"{rtf:.2f}", first])
    head = ["", "how", "ms a frame", "without codec", "RTF", "first byte, ms"]
    return _table(head, rows)


FRAME_S = 0.08
"""Of audio in a frame."""


def _spread_ms(runs: Sequence[Record]) -> str:
    ms = [1e3 * run["total_s"] / run["frames"] for run in runs]
    return f"{_ms(statistics.median(ms))} ({_ms(min(ms))}-{_ms(max(ms))})" if ms else "-"


def gpu(record: Record) -> list[str]:
    """The tables that the suite prints."""
    from bench.gpu_table import table

    return ["```", *table(record).splitlines(), "```"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


def _ms(value: float | None) -> str:
    """Three digits that count, and no more than the clock has."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def _median_p95(ms: Sequence[float]) -> tuple[str, str]:
    return _ms(statistics.median(ms)), _ms(float(np.percentile(ms, 95)))


def _over(row: Record) -> str:
    return f"{statistics.median(row['wall_ms']) / row['floor_ms']:.1f}" if row["floor_ms"] else "-"


def _both(runs: Sequence[Record], key: str) -> str:
    ms = [1e3 * run[key] for run in runs if run[key] is not None]
    return "{} ({})".format(*_median_p95(ms)) if ms else "-"


def _median_s(runs: Sequence[Record], key: str) -> str:
    return _ms(statistics.median(1e3 * run[key] for run in runs if run[key] is not None))


def _distinct(runs: Iterable[Record], *keys: str) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(run[key] for key in keys) for run in runs))


def _parts(choice: str, count: int) -> list[str]:
    parts = choice.split(", ")
    if len(parts) != count:
        raise ValueError(f"{count} parts were wanted, but {choice!r} came")
    return parts
