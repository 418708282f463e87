"""The built wheel alone, outside the repository, speaks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_speaks_outside_the_repository(tmp_path: Path) -> None:
    def run(*command: str | Path, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run("-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 30_000_000
    run("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    site = str(tmp_path / "site")
    where = run("-c", "import pipecat_qwen3; print(pipecat_qwen3.__file__)", PYTHONPATH=site)
    assert where.startswith(site)
    said = run("-m", "pipecat_qwen3", "say", "Hello.", "-o", tmp_path / "a.wav", "--json", PYTHONPATH=site)
    assert json.loads(said)["end"] == "eos"
    assert (tmp_path / "a.wav").stat().st_size > 10_000
