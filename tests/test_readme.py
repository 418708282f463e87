"""Every Python snippet of the README runs as it stands; only the official checkpoint is a tiny random one here."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

# In a process of its own, as a reader would run it; the names of the tiny checkpoint's speakers are the official ones.
RUN = """
import sys, torch
torch.set_num_threads(1)
from pipecat_qwen3 import checkpoint
real = checkpoint.find
checkpoint.find = lambda name: checkpoint.Path(sys.argv[1]) if name.startswith("Qwen/") else real(name)
exec(compile(sys.argv[2], "README.md", "exec"))
"""


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_readme_runs(snippet: str, tiny: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tiny("custom_voice")), snippet],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
