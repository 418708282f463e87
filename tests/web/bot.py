"""A bot in a process of its own: started, restarted, killed, and what it prints."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self
from urllib.request import urlopen

ROOT = Path(__file__).parent.parent.parent

_PATIENCE_S = 180.0


class Bot:
    """`python -m module -t webrtc` on a free port, until the `with` block ends."""

    def __init__(self, module: str, log: Path) -> None:
        self.module, self._log = module, log
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it serves the page."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, "-t", "webrtc", "--host", "127.0.0.1", "--port", str(self.port)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + _PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, f"the bot ended:\n{self.printed()[-3000:]}"
            assert time.monotonic() < end, f"the bot does not answer:\n{self.printed()[-3000:]}"
            time.sleep(0.3)

    def kill(self) -> None:
        """End it without a goodbye."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def printed(self) -> str:
        """Everything it has printed, restarts included."""
        return self._log.read_text(errors="replace")

    def _answers(self) -> bool:
        try:
            with urlopen(self.url, timeout=5) as page:
                return page.status == 200
        except OSError:
            return False
