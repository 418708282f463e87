"""The kernels are free of what the sanitizers look for, and bugs that are planted in them are found by name."""

from pathlib import Path

import pytest

from megakernel import cucpu
from megakernel.cucpu.launcher import SOURCES
from megakernel.shape import Shape
from tests.kernel_bugs import BUGS, SMALL, Bug, hunt, plant, trial
from tests.kernel_cases import PROJECTED

pytestmark = pytest.mark.skipif(cucpu.unavailable() is not None, reason=cucpu.unavailable() or "")


@pytest.mark.parametrize("flavour", ["plain", "asan", "tsan"])
@pytest.mark.parametrize(
    "seed", [None, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "shape", [pytest.param(SMALL, id="small"), pytest.param(PROJECTED, id="projected", marks=pytest.mark.slow)]
)
def test_nothing_is_found_in_the_kernels_as_they_are(shape: Shape, seed: int | None, flavour: cucpu.Flavour) -> None:
    trial(shape, flavour, seed=seed)


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, id=bug.name, marks=[] if bug.quick else pytest.mark.slow) for bug in BUGS]
)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    found, report = hunt(bug)
    print(report)
    assert found, report


def test_every_bug_can_still_be_planted(tmp_path: Path) -> None:
    for number, bug in enumerate(BUGS):
        plant(bug, tmp_path / str(number))
        changed = {
            path.name
            for path in SOURCES.iterdir()
            if path.read_text() != (tmp_path / str(number) / path.name).read_text()
        }
        assert changed == {bug.file}
