"""Result files in, the documents' tables, figures and plots out: no number in a document that this did not write.

    python -m bench.report [--check] [--files README.md docs/latency.md]

A document holds markers, <!-- bench:VIEW WORD … --> … <!-- /bench -->, and what stands between them is written anew
from the newest JSON in bench/results whose name begins with the view's bench and has all the words (parts of its name
between dashes, or its whole name without .json, to pin one file). `:` and a choice follow where one figure is meant:
<!-- bench:wait embedded cpu : in process, 50, first_audible_s -->. Views are listed by --help.
--check changes nothing and fails where a document differs from what would be written.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import report_tables as tables
from bench.machine import RESULTS

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
FILES = ("README.md", "docs/latency.md", "docs/deploy.md", "docs/benchmarks.md", "training/README.md")

MARKER = re.compile(
    r"<!-- bench:(?P<view>[\w.-]+)(?P<words>[^:>]*?)(?::(?P<choice>[^>]*?))? -->(?P<body>.*?)<!-- /bench -->",
    re.DOTALL,
)
STAMP = re.compile(r"\d{8}-\d{6}")


class ReportError(Exception):
    """A marker that cannot be filled, in one line."""


@dataclass(frozen=True)
class Result:
    """One run: its file and what it holds."""

    path: Path
    record: dict[str, Any]


class View(NamedTuple):
    """What a marker may show: a table, a figure or a plot of the results of one bench."""

    bench: str
    make: Callable[..., Any]
    help: str


VIEWS = {
    "stages": View(
        "stages", tables.stages, "table: ms a frame of every stage beside its floor; of one batch with `: 8`"
    ),
    "stage": View("stages", tables.stage, "figure: voices, stage"),
    "step": View("step", tables.step, "table: ms a frame against voices and positions"),
    "codec": View("codec", tables.codec, "table: ms a frame of the codec by chunk size"),
    "first_audio": View("first_audio", tables.first_audio, "table: first byte, playable, audible by every way"),
    "wait": View("first_audio", tables.wait, "figure: way, tokens a second or whole, first_byte_s or the like"),
    "floor": View("first_audio", tables.first_audio_floor, "figure: the least ms until the first samples"),
    "barge_in": View("barge_in", tables.barge_in, "table: from an interruption to silence and a free row"),
    "stop": View("barge_in", tables.stop, "figure: way, voices, last_sample_s, row_free_s or done_s"),
    "memory": View("memory", tables.memory, "table: MB by what they are for"),
    "heard": View("asr_loop", tables.heard, "table: what a recogniser misunderstands, by voice and group of sentences"),
    "word_error": View("asr_loop", tables.word_error, "figure: voice, flite or whole or streaming"),
    "load": View("load", tables.load, "table: waits and underruns by requests a second"),
    "peers": View("peers", tables.peers, "table: ms a frame of ours and of others"),
    "gpu": View("gpu", tables.gpu, "the GPU suite's own tables"),
}
PLOTS = {"first_audio-plot": "first_audio", "step-plot": "step", "load-plot": "load"}


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    wrong = []
    for name in args.files:
        path = args.root / name
        if not path.exists():
            wrong.append(f"{name}: there is no such file")
            continue
        old = path.read_text(encoding="utf-8")
        try:
            new = fill(old, path, args.results, args.images, draw=not args.check)
        except ReportError as error:
            wrong.append(f"{name}: {error}")
            continue
        if new != old and args.check:
            wrong.append(f"{name} differs from bench/results; run python -m bench.report")
        elif new != old:
            path.write_text(new, encoding="utf-8")
            print(f"{name}: written")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    views = "\n".join(f"  {name:<18}{view.help}" for name, view in VIEWS.items())
    views += "\n" + "\n".join(f"  {name:<18}plot" for name in PLOTS)
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=(__doc__ or "").split("\n")[0],
        epilog=f"views:\n{views}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail where something would change")
    parser.add_argument("--files", nargs="+", default=list(FILES), help=f"documents (default: {', '.join(FILES)})")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the documents are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSONs are (default: bench/results)")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where plots go (default: docs/images)")
    return parser.parse_args(argv)


def fill(text: str, path: Path, results: Path, images: Path, draw: bool) -> str:
    """The document `path` with everything between its markers written anew.

    draw  make the plots too; without, a plot that is missing or of another result is a ReportError

    Raises ReportError for a marker that has no view or no result.
    """
    begun, closed = text.count("<!-- bench:"), text.count("<!-- /bench -->")
    if begun != closed or begun != len(MARKER.findall(text)):
        raise ReportError(f"{begun} markers <!-- bench:… --> and {closed} <!-- /bench -->; each needs its end")

    def written(match: re.Match[str]) -> str:
        view, words, choice = match["view"], match["words"].split(), (match["choice"] or "").strip()
        opening = match[0][: match.start("body") - match.start()]
        if view in PLOTS:
            result = latest(results, PLOTS[view], words)
            image = images / f"bench-{'-'.join([view.removesuffix('-plot'), *words])}.svg"
            _plot(view, result, image, draw)
            body = f"\n![{PLOTS[view]}]({_link(image, path)})\n\n{source(result, path)}\n"
        elif view in VIEWS:
            result = latest(results, VIEWS[view].bench, words)
            try:
                made = VIEWS[view].make(result.record, choice) if choice else VIEWS[view].make(result.record)
            except (KeyError, ValueError, TypeError) as error:
                raise ReportError(
                    f"bench:{view}: {choice or 'a choice'!r} is not in {result.path.name}: {error!r}"
                ) from None
            if isinstance(made, list):
                body = f"\n{chr(10).join(made)}\n\n{source(result, path)}\n"
            else:
                body = f"[{made}]({_link(result.path, path)})"
        else:
            raise ReportError(f"there is no view {view!r}; there are {', '.join([*VIEWS, *PLOTS])}")
        return f"{opening}{body}<!-- /bench -->"

    return MARKER.sub(written, text)


def latest(results: Path, bench: str, words: Sequence[str]) -> Result:
    """The newest result of a bench whose name has all the words. Raises ReportError if there is none."""
    found = []
    for path in results.glob(f"{bench}[-_]*.json"):
        parts, stamp = path.stem.split("-"), STAMP.search(path.stem)
        if path.stem in words or (stamp and all(word in parts for word in words)):
            found.append((stamp[0] if stamp else "", path))
    if not found:
        asked = " ".join([bench, *words])
        raise ReportError(f"no result for {asked!r} in {results}; run python -m bench.{bench}")
    path = max(found)[1]
    return Result(path, json.loads(path.read_text(encoding="utf-8")))


def source(result: Result, document: Path) -> str:
    """A line that says where the numbers above it are from."""
    machine = result.record.get("machine", {})
    facts = [machine.get("gpu") or machine.get("cpu") or "unknown machine"]
    if not machine.get("gpu") and machine.get("cores"):
        facts.append(f"{machine['cores']} cores")
    facts.append(f"torch {machine.get('torch')}")
    if machine.get("driver"):
        facts.append(f"driver {machine['driver']}")
    facts.append(f"commit {machine.get('commit')}{' with changes' if machine.get('uncommitted') else ''}")
    if machine.get("load_average"):
        facts.append(f"load {machine['load_average'][0]:g}")
    note = result.record.get("note") or result.record.get("settings", {}).get("note")
    told = f". {note}" if note else ""
    return f"<sub>[`{result.path.name}`]({_link(result.path, document)}): {', '.join(facts)}{told}</sub>"


def _link(target: Path, document: Path) -> str:
    return Path(os.path.relpath(target.resolve(), document.parent.resolve())).as_posix()


def _plot(view: str, result: Result, image: Path, draw: bool) -> None:
    if draw:
        from bench import report_plots  # needs matplotlib, which reading documents does not

        image.parent.mkdir(parents=True, exist_ok=True)
        report_plots.PLOTS[view](result.record, image, result.path.name)
    elif not image.exists() or result.path.name not in image.read_text(encoding="utf-8"):
        raise ReportError(f"{image.name} is not of {result.path.name}; run python -m bench.report")


if __name__ == "__main__":
    sys.exit(main())
