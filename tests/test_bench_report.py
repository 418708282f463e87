"""Documents say what the result files say: tables, figures and plots from records made here, and the real documents."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.report import ReportError, fill, latest

MACHINE = {"cpu": "a CPU", "gpu": None, "cores": 2, "torch": "2.13.0", "commit": "abc1234", "load_average": [0.1, 0, 0]}


def run(way: str, rate: float | None, seconds: float) -> dict[str, Any]:
    times = dict.fromkeys(("first_byte_s", "first_playable_s", "first_audible_s"), seconds)
    return {"way": way, "rate": rate, "underruns": 0} | times


RUNS = [run("in process", None, 0.01), run("in process", None, 0.03), run("in process", None, 0.02)]
RUNS += [run("pipeline, tokens", 50.0, 0.5)]
FLOOR = {"prefill": 1.0, "frame": 2.0, "codec": 3.5}
CURVE = {"first_byte_p50": 20.0, "first_byte_p95": 30.0, "first_audible_p50": 40.0, "first_audible_p95": 50.0}
POINTS = [
    {"rate": rate, "requests": 30, "completed": 1.0, "with_underruns": 0.25, "audio_seconds_a_second": 2.0} | CURVE
    for rate in (1.0, 2.0)
]
STEP_ROWS = [
    {"batch": batch, "context": context, "floor_ms": 1.0, "wall_ms": [3.0, 4.0, 5.0]}
    for context in (50, 200)
    for batch in (1, 8)
]
PEERS = [
    {"name": "gone", "missing": "it needs a GPU"},
    {
        "name": "ours",
        "version": "1.0",
        "how": "bf16",
        "runs": [
            {"mode": "whole", "codec": True, "frames": 10, "total_s": 0.4, "first_byte_s": 0.04},
            {"mode": "whole", "codec": False, "frames": 10, "total_s": 0.2, "first_byte_s": None},
        ],
    },
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of result files; the newest first_audio has RUNS."""
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)

    def keep(name: str, **record: Any) -> None:
        (folder / f"{name}.json").write_text(json.dumps({"machine": MACHINE} | record))

    keep("first_audio-embedded-bf16-cpu-20260102-000000", runs=RUNS, floor_ms=FLOOR, note="A toy.")
    keep("first_audio-embedded-bf16-cpu-20260101-000000", runs=[run("in process", None, 9)], floor_ms=FLOOR)
    keep("first_audio-0.6b-bf16-cuda-20260103-000000", runs=[run("in process", None, 0.001)], floor_ms=FLOOR)
    keep("load-embedded-20260101-000000", points=POINTS, floor=POINTS[0] | {"rate": 0.0, "first_audible_p50": 11.0})
    keep("step-embedded-bf16-cpu-torch-20260101-000000", rows=STEP_ROWS)
    keep("stages-embedded-20260101-000000", stages=[row | {"stage": "talker"} for row in STEP_ROWS[:2]])
    heard = {"words": 100, "wer": 0.2, "flite_wer": 0.1}
    groups = ["", " agent", " plain", " known", " pair", " unseen", " digits"]
    figures = {f"rms {layout} greedy{group}": heard for layout in ("whole", "streaming") for group in groups}
    figures["rms streaming greedy pair"] = heard | {"words": 300, "wer": 0.3}
    keep("asr_loop_embedded_greedy", figures=figures)
    keep("asr_loop_embedded_own", figures={name.replace("greedy", "own"): row for name, row in figures.items()})
    keep("peers-0.6b-bf16-cpu-20260101-000000", sides=PEERS)
    return folder


@pytest.fixture
def document(results: Path) -> Path:
    path = results.parents[1] / "docs" / "a.md"
    path.parent.mkdir()
    return path


def filled(text: str, document: Path, results: Path) -> str:
    return fill(text, document, results, document.parent / "images", draw=True)


def test_a_table_is_made_of_the_newest_result_that_has_all_the_words(document: Path, results: Path) -> None:
    text = filled("a\n<!-- bench:first_audio embedded cpu -->old\n<!-- /bench -->\nb", document, results)
    assert "| in process | whole | 20.0 (29.0) | 20.0 (29.0) | 20.0 (29.0) | 0 of 3 |" in text
    assert "| pipeline, tokens | 50 | 500 (500)" in text
    assert text.startswith("a\n<!-- bench:first_audio embedded cpu -->\n| way |")
    assert text.endswith("<!-- /bench -->\nb")
    assert "old" not in text


def test_every_number_says_which_file_it_is_from(document: Path, results: Path) -> None:
    name = "first_audio-embedded-bf16-cpu-20260102-000000.json"
    text = filled("<!-- bench:first_audio embedded --><!-- /bench -->", document, results)
    assert (
        f"[`{name}`](../bench/results/{name}): a CPU, 2 cores, torch 2.13.0, commit abc1234, load 0.1. A toy." in text
    )
    figure = "<!-- bench:wait embedded : in process, whole, first_audible_s -->"
    text = filled(f"after {figure}x<!-- /bench -->.", document, results)
    assert text == f"after {figure}[20.0 ms](../bench/results/{name})<!-- /bench -->."


def test_a_whole_name_pins_a_file(document: Path, results: Path) -> None:
    marker = "<!-- bench:wait first_audio-embedded-bf16-cpu-20260101-000000 : in process, whole, first_byte_s -->"
    assert "[9000 ms]" in filled(f"{marker}<!-- /bench -->", document, results)


def test_filling_twice_changes_nothing(document: Path, results: Path) -> None:
    text = " ".join(f"<!-- bench:{view} --><!-- /bench -->" for view in ("load", "floor embedded", "step"))
    once = filled(text, document, results)
    assert "| one at a time | 30 | 100% | 20 (30) | 11 (50) |" in once
    assert "| 1 | 30 | 100% | 20 (30) | 40 (50) | 25% | 2.0 |" in once
    assert "[6.50 ms]" in once
    assert "| 200 | 8 | 1.00 | 4.00 | 4.90 | 4.0 |" in once
    assert filled(once, document, results) == once


def test_a_choice_narrows_a_table_or_picks_a_figure(document: Path, results: Path) -> None:
    assert filled("<!-- bench:stages --><!-- /bench -->", document, results).count("| talker |") == 2
    narrow = filled("<!-- bench:stages : 8 --><!-- /bench -->", document, results)
    assert "| 8 | talker | 1.00 | 4.00 |" in narrow
    assert narrow.count("| talker |") == 1
    assert "[4.00 ms]" in filled("<!-- bench:stage : 8, talker --><!-- /bench -->", document, results)


def test_who_did_not_run_is_named_with_the_reason(document: Path, results: Path) -> None:
    text = filled("<!-- bench:peers --><!-- /bench -->", document, results)
    assert "| gone | not run: it needs a GPU |" in text
    assert "| ours 1.0 | whole; bf16 | 40.0 (40.0-40.0) | 20.0 (20.0-20.0) | 0.50 | 40.0 |" in text


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("<!-- bench:nothing --><!-- /bench -->", "there is no view 'nothing'"),
        ("<!-- bench:first_audio 1.7b --><!-- /bench -->", "no result for 'first_audio 1.7b'"),
        ("<!-- bench:memory --><!-- /bench -->", "run python -m bench.memory"),
        ("<!-- bench:wait embedded : in process, 7, first_byte_s --><!-- /bench -->", "in process, 7, first_byte_s"),
        ("<!-- bench:wait embedded : in process, whole, colour --><!-- /bench -->", "colour"),
        ("<!-- bench:load -->", "each needs its end"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_named(marker: str, said: str, document: Path, results: Path) -> None:
    with pytest.raises(ReportError, match="(?s)" + said):
        filled(marker, document, results)


@pytest.mark.parametrize("view", report.PLOTS)
def test_a_plot_is_an_image_that_names_its_file(view: str, document: Path, results: Path) -> None:
    marker = f"<!-- bench:{view} embedded --><!-- /bench -->"
    with pytest.raises(ReportError, match="is not of"):
        fill(marker, document, results, document.parent / "images", draw=False)
    text = filled(marker, document, results)
    image = document.parent / "images" / f"bench-{view.removesuffix('-plot')}-embedded.svg"
    assert f"(images/{image.name})" in text
    drawn = image.read_text()
    assert latest(results, report.PLOTS[view], ["embedded"]).path.name in drawn
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert fill(text, document, results, document.parent / "images", draw=False) == text
    filled(text, document, results)
    assert image.read_text() == drawn  # the same record, the same bytes: git sees no change


def test_a_check_fails_on_a_number_that_somebody_typed(
    document: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document.write_text("<!-- bench:floor embedded -->7 ms<!-- /bench -->")
    where = ["--files", "docs/a.md", "--root", str(results.parents[1]), "--results", str(results)]
    assert report.main([*where, "--check"]) == 1
    assert "docs/a.md differs" in capsys.readouterr().err
    assert document.read_text() == "<!-- bench:floor embedded -->7 ms<!-- /bench -->"
    assert report.main(where) == 0
    assert report.main([*where, "--check"]) == 0


def test_the_documents_say_what_bench_results_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("sampling", ["greedy", "own"])
def test_what_is_heard_is_told_by_voice_and_group_of_sentences(sampling: str, document: Path, results: Path) -> None:
    text = filled(f"<!-- bench:heard asr_loop_embedded_{sampling} --><!-- /bench -->", document, results)
    assert "| rms, all | 10.0 | 20.0 | 20.0 |" in text
    assert "| rms, known words | 10.0 | 20.0 | 25.0 |" in text, "weighted by words"
    one = filled("<!-- bench:word_error asr_loop_embedded_greedy : rms, flite --><!-- /bench -->", document, results)
    assert ">[10.0 %](../bench/results/asr_loop_embedded_greedy.json)<" in one
