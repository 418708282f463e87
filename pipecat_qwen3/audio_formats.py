"""Samples of one utterance in, bytes of an audio file out, piece by piece: pcm, wav, mp3, opus, flac, aac.

Everything but pcm and wav is encoded by FFmpeg through PyAV. Knows no request and no server.
"""

import io
import struct
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Literal, Protocol, get_args

import numpy as np

from pipecat_qwen3.backend import SAMPLE_RATE

Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

MIME: Mapping[str, str] = MappingProxyType(
    {
        "mp3": "audio/mpeg",
        "opus": "audio/ogg",
        "aac": "audio/aac",
        "flac": "audio/flac",
        "wav": "audio/wav",
        "pcm": "audio/pcm",
    }
)

_UNKNOWN = 0xFFFFFFFF
"""A length that is not known yet, as players of piped WAV expect it."""


class Encoder(Protocol):
    """One utterance being encoded."""

    def encode(self, pcm: np.ndarray) -> bytes:
        """Take int16 [n] samples, give the bytes that are ready; may be none."""
        ...

    def finish(self) -> bytes:
        """The rest."""
        ...


def encoder(name: Format) -> Encoder:
    """An encoder for one utterance."""
    if name in ("pcm", "wav"):
        return _Pcm(wav_header(None) if name == "wav" else b"")
    return _FFmpeg(name)


def wav_header(samples: int | None) -> bytes:
    """Header of a mono 16-bit WAV of so many samples, None for a stream of unknown length."""
    size = _UNKNOWN if samples is None else 2 * samples
    riff = _UNKNOWN if samples is None else size + 36
    layout = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + struct.pack("<I", 16) + layout + _data(size)


def _data(size: int) -> bytes:
    return b"data" + struct.pack("<I", size)


class _Pcm:
    """Samples as they are, behind a header that goes out with the first of them."""

    def __init__(self, header: bytes) -> None:
        self._header = header

    def encode(self, pcm: np.ndarray) -> bytes:
        header, self._header = self._header, b""
        return header + pcm.astype("<i2", copy=False).tobytes()

    def finish(self) -> bytes:
        header, self._header = self._header, b""
        return header


_CONTAINERS: Mapping[str, tuple[str, str, dict[str, str]]] = MappingProxyType(
    {
        # A Xing header would be written by seeking back to the start, which a stream cannot.
        "mp3": ("mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "0"}),
        # An Ogg page a second would hold the first audio back for a second; the unit is microseconds.
        "opus": ("ogg", "libopus", {"page_duration": "20000"}),
        "aac": ("adts", "aac", {}),
        "flac": ("flac", "flac", {}),
    }
)
"""Container, codec and options of each format that FFmpeg writes."""


class _FFmpeg:
    """A container that is written into memory and emptied after every piece."""

    def __init__(self, name: str) -> None:
        import av  # 60 ms, and only those who ask for such a format pay for them
        from av.audio.codeccontext import AudioCodecContext

        container, codec, options = _CONTAINERS[name]
        self._frame = av.AudioFrame
        self._file = _Pipe()
        self._output = av.open(self._file, "w", format=container, options=options)
        self._stream = self._output.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        assert isinstance(self._stream.codec_context, AudioCodecContext)
        self._samples = 0

    def encode(self, pcm: np.ndarray) -> bytes:
        frame = self._frame.from_ndarray(np.ascontiguousarray(pcm, np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts, frame.time_base = self._samples, Fraction(1, SAMPLE_RATE)
        self._samples += len(pcm)
        self._output.mux(self._stream.encode(frame))  # type: ignore[attr-defined]
        return self._file.take()

    def finish(self) -> bytes:
        self._output.mux(self._stream.encode(None))  # type: ignore[attr-defined]
        self._output.close()
        return self._file.take()


class _Pipe(io.RawIOBase):
    """A file that can only be written, in order; `take` empties it."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(data)  # type: ignore[call-overload]
        self._bytes += piece
        return len(piece)

    def take(self) -> bytes:
        taken = bytes(self._bytes)
        self._bytes.clear()
        return taken


FORMATS: tuple[str, ...] = get_args(Format)
