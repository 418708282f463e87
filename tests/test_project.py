"""What a visitor meets first: the README's commands, the Makefile, the pins, the version; and no machine of ours."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pipecat_qwen3

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def make(*arguments: str) -> str:
    """What make says; MAKEFLAGS of a make above us would change it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked() -> list[Path]:
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def commands() -> list[str]:
    first_block = re.search(r"```(?:sh|bash|console)?\n(.*?)```", README, re.DOTALL)
    assert first_block
    return [line.removeprefix("$ ") for line in first_block[1].splitlines() if line.strip()]


def test_the_first_two_commands_of_the_readme_speak_and_test() -> None:
    speaks, tests = commands()[:2]
    assert shlex.split(speaks)[:2] == ["make", "say"]
    assert shlex.split(tests) == ["make", "test"]
    for command in (speaks, tests):
        make("-n", *shlex.split(command)[1:])


@pytest.mark.parametrize("browser", [True, False])
def test_ci_runs_the_test_command_of_the_readme_and_then_the_page_where_there_is_a_browser(
    tmp_path: Path, browser: bool
) -> None:
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    for name in ("make", *(("chromium", "chromedriver") if browser else ())):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("bash", "dirname", "sh"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    done = subprocess.run([script], env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "make test"
    assert second == "make test-web" if browser else second.startswith("the page is not tested")


def test_the_workflows_run_what_a_laptop_can_run() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    runs = [line for path in workflows for line in re.findall(r"- run: (.+)", path.read_text())]
    assert len(runs) == 4
    for line in runs:
        setting, command, *targets = shlex.split(re.sub(r"\$\{\{.*?\}\}", "", line))
        assert setting == "PYTHON=python"
        if command == "make":
            make("-n", *targets)
        else:
            assert os.access(ROOT / command, os.X_OK)


def test_a_test_that_fails_fails_ci(tmp_path: Path) -> None:
    (tmp_path / "make").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "make").chmod(0o755)
    done = subprocess.run([ROOT / ".ci" / "run"], env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 3


def test_make_test_lints_checks_types_and_runs_the_tests() -> None:
    plan = make("-n", "test")
    steps = [plan.index(tool) for tool in ("ruff check", "ruff format --check", "-m pyright", "-m pytest")]
    assert steps == sorted(steps)


@pytest.mark.parametrize("target", ["say", "voice", "test", "test-slow", "parity", "cubins", "lint", "format", "clean"])
def test_make_help_lists_every_target(target: str) -> None:
    assert re.search(rf"^make {target} +\S", make("help"), re.MULTILINE)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A finished .venv whose python writes its arguments to the file `said`, one a line."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {shlex.quote(str(tmp_path / "said"))}\n')
    python.chmod(0o755)
    (tmp_path / "venv" / "installed").touch()
    return tmp_path


@pytest.mark.parametrize(
    "text", ["Hello there.", 'It costs $5, "really"; `id` & it\'s $(date) \\n.', "-", "--help", "a # b", "日本語。", ""]
)
def test_make_say_passes_the_text_on_as_it_was_typed(stand_in: Path, text: str) -> None:
    make("say", f"VENV={stand_in / 'venv'}", f"TEXT={text}", "OUT=a b.wav", "ARGS=--seed 7")
    assert (stand_in / "said").read_text().split("\n")[:-1] == [
        *("-m", "pipecat_qwen3", "say", "-o", "a b.wav", "--seed", "7", "--"),
        text,
    ]


def test_a_second_make_say_runs_no_pip(stand_in: Path) -> None:
    for _ in range(2):
        make("say", f"VENV={stand_in / 'venv'}", "TEXT=Hello.")
    assert "pip" not in (stand_in / "said").read_text().split()


def test_constraints_pin_every_dependency_within_the_range_that_pyproject_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = PYPROJECT["project"]
    for wanted in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(wanted)
        assert requirement.specifier.contains(pins[requirement.name]), wanted


def test_the_changelog_and_the_installed_package_know_the_version() -> None:
    version = pipecat_qwen3.__version__
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    try:
        assert importlib.metadata.version("pipecat-qwen3") == version
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("running from the checkout, nothing is installed")


def test_both_packages_are_typed_and_the_embedded_voice_is_in_the_repository() -> None:
    ours = tracked()
    for name in ("megakernel/py.typed", "pipecat_qwen3/py.typed", "pipecat_qwen3/embedded/model.safetensors"):
        assert ROOT / name in ours
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        "megakernel",
        "pipecat_qwen3",
        "bots",
    ]


def test_the_licence_is_the_one_that_pyproject_names() -> None:
    assert PYPROJECT["project"]["license"] == "BSD-2-Clause"
    assert (ROOT / "LICENSE").read_text().startswith("BSD 2-Clause License")


def test_no_tracked_file_names_a_path_of_somebodys_machine() -> None:
    somebodys = re.compile(r"(?<![\w.:/-])/(?:work|opt|root|home|Users|mnt)/\w[^\s\"')]*")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in somebodys.finditer(text)]
    assert not found
