"""A record of bench.gpu in, the text that it prints last out: ceilings, checks, times beside their floors, verdicts."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]

TARGETS = {
    "H100": {("0.6b", 1): 1.3, ("0.6b", 8): 1.7, ("1.7b", 1): 2.2},
    "H200": {("0.6b", 1): 1.1, ("1.7b", 1): 1.7},
}
"""ms a frame that the persistent kernel should need at most, by GPU, geometry and voices, with short prompts."""


def sound(record: Record) -> bool:
    """Whether no step failed or was stopped, and every check held."""
    steps = record["steps"].values()
    return all(
        step["state"] in ("done", "skipped") and all(row.get("ok", True) for row in step["rows"]) for step in steps
    )


def table(record: Record) -> str:
    """Everything on about two screens; what did not run is named."""
    parts = [
        _heading(record),
        _section("checks", _checks(record)),
        _section("ms a frame: median (95th percentile)", _frames(record)),
        _section("variants of the compilation, ms a frame", _variants(record)),
        _section("what each kind of phase adds to a frame: us a phase, GB/s, ms", _phases(record)),
        _section("barriers, streams and nodes", _probe(record)),
        _section("speech, one voice: median (95th percentile)", _speech(record)),
        _section("verdicts", [[line] for line in _verdicts(record)]),
        _section("not run", [[f"{n}: {s['state']}, {s['reason']}"] for n, s in _steps(record) if s["state"] != "done"]),
    ]
    return "\n\n".join(part for part in parts if part)


def read_gbs(record: Record) -> float | None:
    """The floors' bandwidth: the best that any reading or copying kernel reached, GB/s."""
    rates = [
        row["bytes"] / _median(row["ms"]) / 1e6
        for row in _rows(record, "ceilings")
        if row.get("what") in ("copy", "read")
    ]
    for row in _rows(record, "probe"):
        if row.get("what") == "stream":
            rates.append(row["between"] * row["rounds"] / _median(row["ms"]) / 1e6)
    return max(rates, default=None)


def _heading(record: Record) -> str:
    machine = record.get("machine", {})
    where = machine.get("gpu") or machine.get("cpu") or "a machine that could not be asked"
    dry = ", DRY RUN: no time in it means anything" if record["dry_run"] else ""
    lines = [f"{where}, torch {machine.get('torch')}, driver {machine.get('driver')}, {record.get('seconds')} s{dry}"]
    said = []
    for row in _rows(record, "ceilings"):
        if "bytes" in row:
            said.append(f"{row['what']} {row['bytes'] / _median(row['ms']) / 1e6:.0f} GB/s")
        elif "flops" in row:
            said.append(f"bf16 product {row['flops'] / _median(row['ms']) / 1e9:.0f} TFLOP/s")
    best = read_gbs(record)
    if said and best:
        lines.append(f"ceilings: {', '.join(said)}; floors are bytes over {best:.0f} GB/s")
    return "\n".join(lines)


def _checks(record: Record) -> Iterator[list[str]]:
    for name, step in _steps(record):
        if name in ("build", "probe"):
            failed = [row for row in step["rows"] if row.get("ok") is False]
            if step["rows"]:
                yield [name, f"{len(step['rows'])} cases", "ok" if not failed else f"WRONG: {failed}"]
            continue
        for row in step["rows"]:
            if "ok" in row:
                what = row.get("check") or row.get("tool") or ""
                yield [name, f"{what} {row.get('launcher', '')}".strip(), _outcome(row), "ok" if row["ok"] else "WRONG"]


def _outcome(row: Record) -> str:
    if "kernel" in row:
        return f"error {row['kernel']:.2e}, torch's {row['torch']:.2e}"
    if "decisions" in row:
        return f"{row['decisions']} decisions, {row['on_noise']} on noise, {row['wrong']} wrong"
    if "voices" in row:
        told = f"{row['voices']} voices, {row['wrong_voices']} wrong, slowest frame {row['slowest_ms']:.2f} ms"
        return f"{row['frames']} of {row['wanted']} frames, {told}"
    if "different_codes" in row:
        return f"{row['frames']} frames, {row['different_codes']} different codes"
    return str(row.get("summary", ""))


def _frames(record: Record) -> Iterator[list[str]]:
    rows = [row for name in ("frames-0.6b", "frames-1.7b") for row in _rows(record, name)]
    labels = list(dict.fromkeys(row["launcher"] for row in rows if "launcher" in row))
    yield from _by_case(record, rows, labels)


def _variants(record: Record) -> Iterator[list[str]]:
    for row in _rows(record, "build"):
        if "spills" in row and not row["shipped"]:
            spilled = f"{row['registers']} registers, {row['spills']} bytes spilled"
            yield [row["what"], row["entry"], f"{row['columns']} columns", spilled]
    rows = _rows(record, "variants")
    yield from _by_case(record, rows, list(dict.fromkeys(row["launcher"] for row in rows if "launcher" in row)))


def _by_case(record: Record, rows: Sequence[Record], labels: Sequence[str]) -> Iterator[list[str]]:
    if not rows:
        return
    gbs = read_gbs(record)
    yield ["", "voices", "positions", "floor", *labels, "best x floor"]
    cases: dict[tuple[str, int, int], dict[str, Record]] = {}
    for row in rows:
        cases.setdefault((row["geometry"], row["batch"], row["kv"]), {})[row.get("launcher", "")] = row
    for (geometry, batch, kv), found in cases.items():
        timed = {label: _flat(row["ms"]) for label, row in found.items() if "ms" in row}
        floor = next(iter(found.values()))["bytes"] / gbs / 1e6 if gbs else None
        cells = [f"{_median(timed[n]):.3f} ({_p95(timed[n]):.3f})" if n in timed else "-" for n in labels]
        best = min((_median(ms) for ms in timed.values()), default=None)
        over = f"{best / floor:.2f}" if floor and best else "-"
        yield [geometry, str(batch), str(kv), f"{floor:.3f}" if floor else "-", *cells, over]


def _phases(record: Record) -> Iterator[list[str]]:
    rows = _rows(record, "phases")
    gbs = read_gbs(record)
    labels = list(dict.fromkeys(row["launcher"] for row in rows))
    batches: dict[int, dict[str, dict[str, Record]]] = {}
    for row in rows:
        batches.setdefault(row["batch"], {}).setdefault(row["kind"], {})[row["launcher"]] = row
    for batch, kinds in batches.items():
        yield [f"{batch} voices", "times", "floor", *(x for label in labels for x in (f"{label} us", "GB/s", "ms"))]
        sums = dict.fromkeys(labels, 0.0)
        for kind, found in kinds.items():
            first, cells = next(iter(found.values())), []
            for label, row in found.items():
                ms = _median(_flat(row["whole"])) - _median(_flat(row["without"]))
                sums[label] += ms
                rate = f"{row['bytes'] / ms / 1e6:.0f}" if ms > 0 and row["bytes"] else "-"
                cells += [f"{1e3 * ms / row['count']:.2f}", rate, f"{ms:.3f}"]
            floor = f"{first['bytes'] / first['count'] / gbs / 1e3:.2f}" if gbs else "-"
            yield [kind, str(first["count"]), floor, *cells]
        wholes = [[ms for found in kinds.values() if n in found for ms in found[n]["whole"]] for n in labels]
        yield ["all of them", "", "", *(x for label in labels for x in ("", "", f"{sums[label]:.3f}"))]
        yield ["the frame", "", "", *(x for ms in wholes for x in ("", "", f"{_median(_flat(ms)):.3f}" if ms else "-"))]


def _probe(record: Record) -> Iterator[list[str]]:
    for row in _rows(record, "probe"):
        if row["what"] == "barrier":
            yield ["barrier", row["kind"], f"{_median(row['us']):.3f} us", f"{row['blocks']} x {row['threads']}"]
        elif row["what"] == "stream":
            ms, size = _median(row["ms"]), row["between"] * row["rounds"]
            early = "loads before it" if row["early"] else "loads after it"
            between = f"every {row['between'] / 1e6:.1f} MB: {1e3 * ms / row['rounds']:.2f} us"
            said = f"{row['in_flight'] >> 10} KB in flight, {early}"
            yield ["stream", f"barrier {row['kind']}", f"{size / ms / 1e6:.0f} GB/s", between, said]
        elif "us" in row:
            overlap = "early" if row["early"] else "overlapping" if row["overlap"] else "plain"
            yield ["node", overlap, f"{_median(row['us']):.3f} us", f"reads {row['bytes'] / 1e6:.1f} MB"]


def _speech(record: Record) -> Iterator[list[str]]:
    groups: dict[tuple[str, ...], list[Record]] = {}
    for name in ("speech", "faster"):
        for row in _rows(record, name):
            who = "faster-qwen3-tts" if name == "faster" else f"ours, {row['model']}"
            chunk = f"chunks of {row['chunk']}" if "chunk" in row else ""
            groups.setdefault((who, row["layout"], chunk), []).append(row)
    if groups:
        yield ["", "", "", "first byte, ms", "first audible, ms", "RTF", "ms a frame"]
    for (who, layout, chunk), rows in groups.items():
        cells = []
        for key, scale, digits in (
            ("first_byte_s", 1e3, 1),
            ("first_audible_s", 1e3, 1),
            ("rtf", 1, 4),
            ("ms_a_frame", 1, 2),
        ):
            found = [scale * row[key] for row in rows if row.get(key) is not None]
            cells.append(f"{_median(found):.{digits}f} ({_p95(found):.{digits}f})" if found else "-")
        yield [who, layout, chunk, *cells]


def _verdicts(record: Record) -> Iterator[str]:
    gpu = record.get("machine", {}).get("gpu") or ""
    targets = next((found for name, found in TARGETS.items() if name in gpu), {})
    rows = [row for name in ("frames-0.6b", "frames-1.7b") for row in _rows(record, name) if "ms" in row]
    short = min((row["kv"] for row in rows), default=0)
    times = {(row["geometry"], row["batch"], row["launcher"]): row["ms"] for row in rows if row["kv"] == short}
    for (geometry, batch), most in targets.items():
        ms = times.get((geometry, batch, "persistent"))
        if ms:
            took = _median(_flat(ms))
            met = "met" if took <= most else "MISSED"
            yield f"{geometry}, {batch} voices: {took:.3f} ms a frame, target {most}: {met}"
    for geometry, batch, launcher in times:
        graph = times.get((geometry, batch, "graph"))
        if launcher == "persistent" and graph:
            own, other = _median(_flat(times[geometry, batch, launcher])), _median(_flat(graph))
            noise = max(_spread(times[geometry, batch, launcher]), _spread(graph))
            which = "no difference" if abs(own - other) <= noise else "persistent" if own < other else "GRAPH"
            told = f"persistent {own:.3f}, graph {other:.3f}, rounds differ by {noise:.3f} ms"
            yield f"{geometry}, {batch} voices: the faster is {which} ({told})"


def _section(title: str, rows: Any) -> str:
    """Lines under a title, in columns; "" if there are none."""
    rows = list(rows)
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _steps(record: Record) -> list[tuple[str, Record]]:
    return list(record["steps"].items())


def _rows(record: Record, name: str) -> list[Record]:
    return record["steps"].get(name, {}).get("rows", [])


def _flat(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [x for one in rounds for x in one]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _p95(values: Sequence[float]) -> float:
    return float(np.percentile(values, 95))


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    """Between the medians of the rounds: what is less is noise."""
    medians = [_median(one) for one in rounds]
    return max(medians) - min(medians)
