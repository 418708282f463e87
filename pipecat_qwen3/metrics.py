"""What happens to utterances in, Prometheus text out.

Knows no socket and no engine. Time counts from the arrival of the request.
"""

import time
from collections.abc import Callable

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipecat_qwen3.backend import SAMPLE_RATE, Chunk, Load, Result
from pipecat_qwen3.errors import TTSError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
_RTF = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 0.9, 1.0, 1.5, 2.0, 5.0)

_WINDOW = SAMPLE_RATE // 100
_AUDIBLE = 0.01
"""RMS of a 10 ms window above -40 dBFS is audible, as in Pipecat's time to first audio."""


class Metrics:
    """The counters of one server; each has a registry of its own, so that two servers fit into one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def name(what: str) -> str:
            return f"pipecat_qwen3_{what}"

        self.first_byte = Histogram(
            name("first_byte_seconds"), "Request to first audio", buckets=_SECONDS, registry=registry
        )
        self.first_audible = Histogram(
            name("first_audible_seconds"),
            "Request to when a player without buffer plays the first audible sample",
            buckets=_SECONDS,
            registry=registry,
        )
        self.rtf = Histogram(
            name("rtf"), "Seconds of making over seconds of audio, of whole utterances", buckets=_RTF, registry=registry
        )
        self.audio_seconds = Counter(name("audio_seconds"), "Audio sent", registry=registry)
        self.ends = Counter(
            name("utterances"), "Utterances by how they ended: eos, cap, runaway, cancelled, error", ["end"],
            registry=registry,
        )  # fmt: skip
        self.restarts = Counter(
            name("early_ends"), "Times the talker ended before its text and was started again", registry=registry
        )
        self.errors = Counter(name("errors"), "Failures by code", ["code"], registry=registry)
        self.underruns = Counter(
            name("underruns"), "Chunks that came after a player without buffer had run dry", registry=registry
        )
        self.stalled_seconds = Counter(name("stalled_seconds"), "Silence that those put in", registry=registry)
        self.speaking = Gauge(name("voices_speaking"), "Utterances that have begun to sound", registry=registry)
        self.waiting = Gauge(name("voices_waiting"), "Utterances without a first sample yet", registry=registry)
        self.connections = Gauge(name("connections"), "Open requests and sockets", registry=registry)
        self.ready = Gauge(name("ready"), "1 when warm", registry=registry)
        self._slots = Gauge(name("slots"), "Voices that the engine can hold", registry=registry)
        self._slots_used = Gauge(name("slots_used"), "Voices that it holds", registry=registry)
        self._queue = Gauge(name("queue"), "Voices that wait for a slot", registry=registry)

    def follow(self, load: Callable[[], Load]) -> None:
        """Ask how busy the engine is whenever somebody looks."""
        self._slots.set_function(lambda: load().rows)
        self._slots_used.set_function(lambda: load().used)
        self._queue.set_function(lambda: load().waiting)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(self, arrived: float | None = None) -> "Watch":
        """Follow one utterance, which was asked for at `arrived` on the monotonic clock; None is now."""
        return Watch(self, time.monotonic() if arrived is None else arrived)


class Watch:
    """One utterance as a listener without buffer hears it."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics, self._arrived = metrics, arrived
        self._first: float | None = None
        self._last = arrived
        self._samples = 0
        self._dry_s = 0.0
        self._audible = False
        self._over = False
        metrics.waiting.inc()

    def sent(self, chunk: Chunk) -> None:
        """Account for a chunk that leaves now."""
        if not len(chunk.pcm):
            return
        now, metrics = time.monotonic(), self._metrics
        if self._first is None:
            self._first = now
            metrics.waiting.dec()
            metrics.speaking.inc()
            metrics.first_byte.observe(now - self._arrived)
        heard_until = self._first + self._dry_s + self._samples / SAMPLE_RATE
        if now > heard_until:
            self._dry_s += now - heard_until
            metrics.underruns.inc()
            metrics.stalled_seconds.inc(now - heard_until)
        if not self._audible and (at := first_audible(chunk.pcm)) is not None:
            self._audible = True
            metrics.first_audible.observe(max(now, heard_until) + at / SAMPLE_RATE - self._arrived)
        self._samples += len(chunk.pcm)
        self._last = now
        metrics.audio_seconds.inc(len(chunk.pcm) / SAMPLE_RATE)

    def over(self, result: Result | None, cancelled: bool) -> None:
        """It has ended; only the first word counts. No result and not cancelled: it was refused."""
        if self._over:
            return
        self._over = True
        metrics = self._metrics
        (metrics.waiting if self._first is None else metrics.speaking).dec()
        end = "cancelled" if cancelled else result.end if result else "error"
        metrics.ends.labels(end).inc()
        metrics.restarts.inc(result.restarts if result else 0)
        if self._samples and end in ("eos", "cap", "runaway"):
            metrics.rtf.observe((self._last - self._arrived) / (self._samples / SAMPLE_RATE))

    def failed(self, error: TTSError) -> None:
        """It was refused or broke off."""
        self._metrics.errors.labels(error.code).inc()


def first_audible(pcm: np.ndarray) -> int | None:
    """Index of the first 10 ms window of int16 [n] samples that can be heard, or None."""
    windows = pcm[: len(pcm) // _WINDOW * _WINDOW].reshape(-1, _WINDOW).astype(np.float32) / 32768
    loud = np.sqrt(np.square(windows).mean(-1)) > _AUDIBLE
    return int(loud.argmax()) * _WINDOW if loud.any() else None
