"""The kernels are free of what the sanitizers look for, and bugs that are planted in them are found by name."""

import sys
from pathlib import Path

import pytest

from megakernel import cucpu
from megakernel.cucpu.launcher import SOURCES
from megakernel.shape import Shape
from tests.kernel_bugs import BUGS, SMALL, Bug, hunt, plant, trial, verdict
from tests.kernel_cases import PROJECTED

pytestmark = pytest.mark.skipif(cucpu.unavailable() is not None, reason=cucpu.unavailable() or "")


@pytest.mark.parametrize("flavour", ["plain", "asan", "tsan"])
def test_nothing_is_found_in_the_kernels_as_they_are(flavour: cucpu.Flavour) -> None:
    trial(SMALL, flavour)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("order", [{}, {"seed": 1}, {"seed": 2}, {"phases": True}], ids=str)
@pytest.mark.parametrize("shape", [SMALL, PROJECTED], ids=["small", "projected"])
def test_nothing_is_found_in_any_order_of_blocks_nor_phase_by_phase(
    shape: Shape, order: dict, flavour: cucpu.Flavour
) -> None:
    trial(shape, flavour, **order)


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, id=bug.name, marks=[] if bug.quick else pytest.mark.slow) for bug in BUGS]
)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    found, report = hunt(bug)
    print(report)
    assert found, report


@pytest.mark.parametrize(
    ("program", "found", "report"),
    [
        ("print('WrongResult: row 4')", True, "WrongResult: row 4\n"),
        ("print('nothing'); raise SystemExit(1)", False, "nothing\n"),
        ("raise SystemExit('no such bug')", False, "no such bug\n"),
        ("print('WrongResult: row 4', flush=True); import os; os.abort()", False, "the process died of SIGABRT\nWrong"),
        ("import time; time.sleep(60)", False, "nothing in 1 seconds"),
    ],
)
def test_a_hunt_whose_process_dies_or_does_not_end_has_found_nothing(program: str, found: bool, report: str) -> None:
    verdicts = verdict([sys.executable, "-c", program], limit_s=1 if "sleep" in program else 60)
    assert verdicts[0] is found
    assert verdicts[1].startswith(report)


def test_every_bug_can_still_be_planted(tmp_path: Path) -> None:
    for number, bug in enumerate(BUGS):
        plant(bug, tmp_path / str(number))
        changed = {
            path.name
            for path in SOURCES.iterdir()
            if path.read_text() != (tmp_path / str(number) / path.name).read_text()
        }
        assert changed == {bug.file}
