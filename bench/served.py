"""A model in, a `pipecat-qwen3 serve` in a process of its own out: warm when the context begins, gone when it ends."""

import contextlib
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent

WARM_S = 300.0
"""A server may take so long to load and compile."""


@contextlib.contextmanager
def serving(model: str, *, device: str, dtype: str, max_batch: int) -> Iterator[str]:
    """The server's address, http://HOST:PORT. Raises RuntimeError where it does not get warm."""
    command = [sys.executable, "-m", "pipecat_qwen3", "serve", "--port", "0", "--model", model]
    command += ["--device", device, "--dtype", dtype, "--max-batch", str(max_batch)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            _wait_until_ready(process, url, log)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            process.kill()


def _wait_until_ready(process: "subprocess.Popen[str]", url: str, log: IO[str]) -> None:
    until = time.monotonic() + WARM_S
    while process.poll() is None and url and time.monotonic() < until:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/ready", timeout=5):
            return
        time.sleep(0.1)
    log.seek(0)
    lines = [line for line in log.read().splitlines() if line.strip()] or ["it said nothing"]
    raise RuntimeError(f"the server did not get warm: {lines[-1]}")


def socket_url(url: str) -> str:
    """The address of the socket of a server at http://HOST:PORT."""
    return f"ws{url.removeprefix('http')}/v1/audio/speech/ws"
