"""The GPU suite: a dry run walks it, its checks find what they are to find, and a step that dies costs itself alone."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_frames, gpu_parity, gpu_soak
from bench.gpu import STEPS, Child, Suite
from bench.gpu_parity import Side
from bench.gpu_place import VARIANTS, Place
from bench.gpu_table import sound, table
from megakernel import cucpu, schedule
from megakernel.kernel_step import KernelFrameStep
from megakernel.shape import Shape

ROOT = Path(__file__).parent.parent
runs_kernels = pytest.mark.skipif(cucpu.unavailable() is not None, reason=cucpu.unavailable() or "")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(dry=True, work=tmp_path_factory.mktemp("work"), until=time.monotonic() + 600)


@pytest.fixture
def side(place: Place) -> Side:
    return Side.make(place, "tiny")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple["subprocess.CompletedProcess[str]", Path]:
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--results", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False), folder


@runs_kernels
def test_a_dry_run_walks_every_step_or_skips_it_by_name(
    dry_run: tuple["subprocess.CompletedProcess[str]", Path],
) -> None:
    done, folder = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    record = json.loads(path.read_text())
    assert record["dry_run"]
    assert record["machine"]["torch"] == torch.__version__
    assert list(record["steps"]) == list(STEPS)
    for name, step in record["steps"].items():
        assert step["state"] == ("done" if STEPS[name].dry else "skipped"), f"{name}: {step['reason']}"
        assert bool(step["rows"]) == STEPS[name].dry
    rows = {name: step["rows"] for name, step in record["steps"].items()}
    checks = [row["check"] for row in rows["parity-tiny"]]
    assert len(checks) == 1 + 2 * 3
    assert all(row["ok"] for row in rows["parity-tiny"])
    soak = rows["soak"][-1]
    assert (soak["frames"], soak["wrong_voices"], soak["ok"]) == (soak["wanted"], 0, True)
    assert {row["launcher"] for row in rows["frames-0.6b"]} == {"persistent", "graph", "torch"}
    assert {row["launcher"].split(", ")[1] for row in rows["variants"]} == set(VARIANTS)
    for row in rows["frames-0.6b"]:
        assert row["bytes"] > 0
        assert all(x > 0 for ms in row["ms"] for x in ms)
    probe = rows["probe"]
    assert {row["kind"] for row in probe if row["what"] == "barrier"} == {"none", "counter", "flags", "tree"}
    assert all(row.get("ok", True) for row in probe)


@runs_kernels
def test_the_table_comes_last_and_names_what_did_not_run(
    dry_run: tuple["subprocess.CompletedProcess[str]", Path],
) -> None:
    done, folder = dry_run
    record = json.loads(next(folder.iterdir()).read_text())
    assert table(record) in done.stdout
    for name, step in STEPS.items():
        assert (f"{name}: skipped, needs a GPU" in table(record)) == (not step.dry)


def child(folder: Path, program: str, seconds: float = 20, names: Sequence[str] = ("a", "b")) -> Child:
    rows, log = folder / "a.jsonl", folder / "a.log"
    with log.open("wb") as out:
        command = [sys.executable, "-c", program, str(rows)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, process_group=0)
    return Child(names, process, rows, log, time.monotonic() + seconds, None)


SAYS = """import os, subprocess, sys, time
out = open(sys.argv[1], "w")
print('{"step":"a","row":{"x":1}}', file=out, flush=True)
"""
DIES = """out.write("{")
out.flush()
print("context lost", flush=True)
os._exit(9)
"""
HANGS = """print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
time.sleep(60)
"""


def test_a_step_that_dies_leaves_its_rows_and_its_last_words(tmp_path: Path) -> None:
    found = child(tmp_path, SAYS + DIES).finish()
    assert found["a"]["rows"] == [{"x": 1}]
    for step in found.values():
        assert step["state"] == "stopped"
        assert step["reason"] == "the process ended with status 9: context lost"


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    found = child(tmp_path, SAYS + HANGS, seconds=3).finish()
    assert found["a"]["rows"] == [{"x": 1}]
    assert found["a"]["reason"] == "its time was over"
    inner = Path("/proc", (tmp_path / "a.log").read_text().strip(), "stat")
    until = time.monotonic() + 20
    while inner.exists() and inner.read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.1)


def suite(folder: Path, budget: float = 60) -> Suite:
    only = ["parity-tiny", "soak"]
    return Suite(argparse.Namespace(dry_run=False, only=only, budget=budget, results=folder))


def test_steps_beside_run_on_and_those_who_need_them_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = suite(tmp_path / "results")
    kept: list[list[str]] = []

    def start(names: Sequence[str], seconds: float, dry: bool, folder: Path) -> Child:
        kept.append([name for path in made.paths if path.exists() for name in json.loads(path.read_text())["steps"]])
        (folder / names[0]).mkdir()
        program = "import time; time.sleep(1)" if names[0] == "build" else "pass"
        return child(folder / names[0], program, names=names)

    monkeypatch.setattr(Child, "start", start)
    made._run_steps(tmp_path)
    assert list(made.steps) == ["build", "ceilings", "parity-tiny", "soak"]
    assert kept == [[], [], ["ceilings", "build"], ["ceilings", "build", "parity-tiny"]]
    assert list(made.record["steps"]) == ["ceilings", "build", "parity-tiny", "soak"]


def test_when_the_time_is_over_the_rest_is_skipped_by_name(tmp_path: Path) -> None:
    made = suite(tmp_path / "results", budget=3)
    made._run_steps(tmp_path)
    for step in made.record["steps"].values():
        assert (step["state"], step["reason"]) == ("skipped", "no time was left of 3 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("bench.gpu needs a GPU: ")
    assert done.stderr.count("\n") == 1


# -- the checks --------------------------------------------------------------------------------------------------------


def off_by_a_tile(side: Side) -> Side:
    """One 16 x 16 tile of the talker's first matrix is missing."""
    talker = side.packed.talker.clone()
    talker[:256] = 0
    return replace(side, packed=replace(side.packed, talker=talker))


@runs_kernels
def test_a_missing_tile_of_a_matrix_is_found_by_its_logits_and_by_its_codes(side: Side) -> None:
    right, wrong = (gpu_parity.logit_errors(s, "persistent")[0] for s in (side, off_by_a_tile(side)))
    assert right["ok"]
    assert not wrong["ok"]
    noise = right["kernel_worst"] + right["torch_worst"]
    heads = side.packed.heads.roll(256)
    assert gpu_parity.codes_agree(side, "persistent", noise)["ok"]
    found = gpu_parity.codes_agree(replace(side, packed=replace(side.packed, heads=heads)), "persistent", noise)
    assert found["wrong"] > 0
    assert not found["ok"]


@runs_kernels
def test_launchers_that_differ_in_one_tile_do_not_agree(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Side.kernel

    def kernel(self: Side, launcher: str, rows: int) -> KernelFrameStep:
        return usual(off_by_a_tile(self) if launcher == "graph" else self, launcher, rows)

    monkeypatch.setattr(Side, "kernel", kernel)
    found = gpu_parity.launchers_agree(side, 4)
    assert not found["ok"]
    assert not found["same"]["kv"]


@runs_kernels
def test_a_voice_that_says_something_else_in_company_fails_the_soak(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = KernelFrameStep.step

    def step(self: KernelFrameStep, rows: Any, text: torch.Tensor) -> torch.Tensor:
        codes = usual(self, rows, text)
        return codes + (len(rows) == 3)

    monkeypatch.setattr(KernelFrameStep, "step", step)
    *_, last = gpu_soak.soak(place)
    assert last["wrong_voices"] > 0
    assert not last["ok"]


def test_every_phase_of_a_frame_belongs_to_a_kind(place: Place) -> None:
    shape: Shape = place.shape("0.6b")
    kinds = gpu_frames.kinds(shape)
    assert len(kinds) == 2 * len(schedule.Op)
    assert sorted(phase for own in kinds.values() for phase in own) == sorted(schedule.frame(shape))


# -- the table ---------------------------------------------------------------------------------------------------------


def frame(launcher: str, ms: list[list[float]], geometry: str = "0.6b") -> dict[str, Any]:
    return {"geometry": geometry, "batch": 1, "kv": 100, "bytes": 3.3e9, "launcher": launcher, "ms": ms}


def record(**steps: list[dict[str, Any]]) -> dict[str, Any]:
    made = {name.replace("_", "-"): {"state": "done", "reason": "", "rows": rows} for name, rows in steps.items()}
    made["frames-0.6b"] = made.pop("frames", {"state": "done", "reason": "", "rows": []})
    return {"dry_run": False, "machine": {"gpu": "NVIDIA H100 80GB HBM3"}, "steps": made}


@pytest.fixture
def ceiling() -> list[dict[str, Any]]:
    return [{"what": "copy", "bytes": 3_000_000_000, "ms": [1.0, 1.0, 2.0]}]


def test_floors_are_bytes_over_the_best_bandwidth_and_targets_are_judged(ceiling: list[dict[str, Any]]) -> None:
    said = table(record(ceilings=ceiling, frames=[frame("persistent", [[1.2, 1.3]]), frame("graph", [[1.5, 1.5]])]))
    assert "1.100  1.250 (1.295)  1.500 (1.500)  1.14" in said
    assert "0.6b, 1 voices: 1.250 ms a frame, target 1.3: met" in said
    assert "the faster is persistent" in said
    said = table(record(ceilings=ceiling, frames=[frame("persistent", [[1.6]]), frame("graph", [[1.4]])]))
    assert "target 1.3: MISSED" in said
    assert "the faster is GRAPH" in said


def test_a_difference_smaller_than_that_of_the_rounds_is_none(ceiling: list[dict[str, Any]]) -> None:
    rows = [frame("persistent", [[1.2], [1.4]]), frame("graph", [[1.25], [1.25]])]
    assert "the faster is no difference" in table(record(ceilings=ceiling, frames=rows))


def test_a_run_is_sound_if_nothing_failed_and_every_check_held() -> None:
    made = record(soak=[{"check": "soak", "ok": True}])
    assert sound(made)
    assert not sound(record(soak=[{"check": "soak", "ok": True}, {"check": "x", "ok": False}]))
    made["steps"]["soak"]["state"] = "stopped"
    assert not sound(made)
