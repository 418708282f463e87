"""PCM16 pieces in; a WAV file that is valid at every moment, or sound from the machine's own player, out."""

import contextlib
import io
import os
import queue
import shutil
import stat
import struct
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Protocol

from pipecat_qwen3.backend import SAMPLE_RATE
from pipecat_qwen3.errors import BadRequestError, TTSError

_RAW = str(SAMPLE_RATE)
_PLAYERS = {
    "aplay": ["-q", "-t", "raw", "-f", "S16_LE", "-r", _RAW, "-c", "1", "-"],
    "ffplay": [
        "-loglevel",
        "quiet",
        "-nodisp",
        "-autoexit",
        "-f",
        "s16le",
        "-ar",
        _RAW,
        "-ch_layout",
        "mono",
        "-i",
        "-",
    ],
    "afplay": [],
}
"""Players that read raw PCM from their standard input, with the options for it; afplay (macOS) plays files only."""


class Output(Protocol):
    """Where speech goes."""

    def write(self, pcm: bytes) -> None:
        """Take the next PCM16 mono samples at 24 kHz; returns at once."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...

    def stop(self) -> None:
        """Stop now: what has not been heard is dropped, what has been written stays."""
        ...


class WavFile:
    """A 24 kHz mono 16-bit WAV. Its header is corrected after every write, so a killed process leaves a valid file.

    The file is made at the first write or at `close`, so that a refused request overwrites nothing.
    Raises BadRequestError if it cannot be made and TTSError if it cannot be written on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._bytes = 0
        check_writable(path)

    def write(self, pcm: bytes) -> None:
        """Append samples."""
        file = self._opened()
        try:
            rest = memoryview(pcm)
            while rest:  # unbuffered: a write may take a part only
                rest = rest[file.write(rest) :]
            self._bytes += len(pcm)
            file.seek(0)
            file.write(wav_header(self._bytes))
            file.seek(0, os.SEEK_END)
        except OSError as error:
            raise TTSError(f"cannot go on writing {self.path}: {error.strerror or error}") from None

    def close(self) -> None:
        """Finish the file; a WAV without samples if nothing was written."""
        self._opened().close()

    def stop(self) -> None:
        """Finish the file with what it has; nothing may be written afterwards."""
        if self._file is not None:
            self._file.close()

    def _opened(self) -> io.FileIO:
        if self._file is None:
            try:
                self._file = self.path.open("wb", buffering=0)
                self._file.write(wav_header(0))
            except OSError as error:
                raise BadRequestError(f"cannot write {self.path}: {error.strerror or error}") from None
        return self._file


def wav_header(size: int) -> bytes:
    """The 44 bytes before `size` bytes of PCM16 mono at 24 kHz."""
    layout = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    riff = struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE")
    return riff + struct.pack("<4sI", b"fmt ", len(layout)) + layout + struct.pack("<4sI", b"data", size)


class Player:
    """Plays speech while it is being made, through a program of this machine; writing never waits for it."""

    def __init__(self, program: str) -> None:
        self.program = program
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._play, name="pipecat-qwen3-player", daemon=True)
        self._thread.start()

    def write(self, pcm: bytes) -> None:
        """Queue samples."""
        self._pieces.put(pcm)

    def close(self) -> None:
        """Say that the utterance is over."""
        self._pieces.put(None)

    def wait(self) -> None:
        """Block until everything has been heard; `stop` ends it."""
        self._thread.join()

    def stop(self) -> None:
        """Be silent now."""
        self._stopped = True
        self.close()
        if self._process is not None:
            self._process.kill()

    def _play(self) -> None:
        if _PLAYERS[self.program]:
            process = self._start(_PLAYERS[self.program])
            with contextlib.suppress(OSError):  # the player is gone
                while process.stdin and not self._stopped and (pcm := self._pieces.get()) is not None:
                    process.stdin.write(pcm)
                    process.stdin.flush()
            process.communicate()
            return
        with tempfile.TemporaryDirectory() as folder:
            file = WavFile(Path(folder) / "speech.wav")
            while (pcm := self._pieces.get()) is not None:
                file.write(pcm)
            file.close()
            if not self._stopped:
                self._start([str(file.path)]).communicate()

    def _start(self, options: list[str]) -> "subprocess.Popen[bytes]":
        # A session of its own, so that Ctrl-C reaches this program alone, which then stops the player.
        self._process = subprocess.Popen(
            [self.program, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._stopped:
            self._process.kill()
        return self._process


def find_player() -> str | None:
    """The first player that this machine has."""
    return next((name for name in _PLAYERS if shutil.which(name)), None)


def check_writable(path: Path) -> None:
    """Refuse, before anything is loaded, a path that cannot become a file. Raises BadRequestError."""
    try:
        kind = path.stat().st_mode if path.exists() else stat.S_IFREG
    except OSError as error:
        raise BadRequestError(f"cannot write {str(path)[:100]}: {error.strerror or error}") from None
    if stat.S_ISDIR(kind):
        raise BadRequestError(f"cannot write {path}: it is a folder; name a file in it")
    if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
        raise BadRequestError(f"cannot write {path}: it is a pipe, and a WAV's header is corrected later; name a file")
    if not path.parent.is_dir():
        raise BadRequestError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadRequestError(f"cannot write {path}: permission denied")
