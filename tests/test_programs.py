"""Benches and trainers as programs: what they cannot use is one line, and Ctrl-C ends them without a word."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipecat_qwen3.errors import CheckpointError, program

ROOT = Path(__file__).parent.parent


def fail(error: BaseException) -> None:
    raise error


def test_what_a_program_cannot_use_is_its_last_line() -> None:
    with pytest.raises(SystemExit, match=r"^no model here$"):
        program(lambda: fail(CheckpointError("no model here")))


def test_ctrl_c_ends_a_program_without_a_word() -> None:
    with pytest.raises(SystemExit) as end:
        program(lambda: fail(KeyboardInterrupt()))
    assert end.value.code == 128 + signal.SIGINT


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        program(lambda: fail(ZeroDivisionError()))


@pytest.mark.parametrize(
    "command",
    [
        ["bench.asr_loop", "--model"],
        ["bench.first_audio", "--model"],
        ["training.evaluate_talker", "--data", "README.md", "--"],
    ],
)
def test_a_folder_that_holds_no_model_is_one_line(command: list[str], tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(f"{tmp_path} has no config.json")
    assert "Traceback" not in ran.stderr
