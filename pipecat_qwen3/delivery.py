"""Decoded samples of one utterance in, Chunks on its Stream out: chunk sizes, playback credit, silence, fades, words.

Knows when a chunk is due, but neither the codec nor the talker.
"""

import time

import numpy as np

from pipecat_qwen3.backend import FRAME_SAMPLES, SAMPLE_RATE, Chunk, Request, Stream
from pipecat_qwen3.words import WordTimes

FADE_SAMPLES = SAMPLE_RATE * 5 // 1000
"""A cut in the middle of speech fades out over 5 ms, so that it does not click."""

WINDOW = SAMPLE_RATE // 100
"""Loudness is judged in windows of 10 ms."""

SILENCE = 0.01
"""RMS below -40 dBFS is silence, as in Pipecat's time to first audio."""

FRAME_SECONDS = FRAME_SAMPLES / SAMPLE_RATE

HEAD_START = 1.5
"""What is left of a frame whose silence is skipped should last so many times as long as a frame takes to make: frames
take longer now and then, on a CPU that was measured a fifth longer at the 95th percentile."""


class Delivery:
    """One utterance on its way to its listener."""

    def __init__(self, stream: Stream, request: Request, words: WordTimes) -> None:
        self._stream, self._words = stream, words
        self._ramp, self._skip = request.ramp, request.skip_silence
        self._live = request.ahead_s is not None
        self._led_until = time.monotonic() + request.lead_s
        self.chunks = 0
        """Chunks that have been given to the codec."""
        self._frames = 0
        self._samples = 0
        self._dry_s = 0.0
        self._held = np.zeros(0, np.float32)
        self.skipped = 0
        self.silent_s = 0.0
        """Seconds of silence at the end of what was decoded so far."""

    def ahead(self, frames: int) -> float:
        """Seconds by which `frames` spoken frames lead the playback.

        That runs from when the first chunk was taken, or from the end of the speech that is heard before this one.
        """
        now, taken = time.monotonic(), self._stream.first_taken_at
        heard_from = max(now if taken is None else taken, self._led_until)
        return frames * FRAME_SECONDS - self.skipped / SAMPLE_RATE + self._dry_s + heard_from - now

    def due(self, buffered: int, frames: int, frame_cost_s: float) -> bool:
        """Whether `buffered` frames make the next chunk, so that all of them are to be decoded now.

        The next chunk is the ramp's, or less when the audio already delivered would run out before it is made.
        """
        size = self._ramp[min(self.chunks, len(self._ramp) - 1)]
        if self._live and self.chunks:
            covered = self.ahead(frames - buffered) / max(frame_cost_s, 1e-4)
            size = min(size, max(1, int(covered)))
        return buffered >= size

    def deliver(self, samples: np.ndarray, fade: bool, frame_cost_s: float) -> None:
        """Hand out decoded samples, float [n] in [-1, 1]; `fade` if the speech is cut at their end.

        Where skipping silence left a few milliseconds of the first frame, they wait for the next one: played alone,
        they would be over before it is made, and the first word would begin with a gap.
        """
        if self._frames:
            # Where the playback ran dry, its clock stood still.
            self._dry_s += max(0.0, -self.ahead(self._frames))
        self._frames += len(samples) // FRAME_SAMPLES
        self._listen(samples)
        if self._skip:
            samples = self._without_silence(samples)
        if fade:
            n = min(FADE_SAMPLES, len(samples))
            samples[len(samples) - n :] *= np.linspace(1, 0, n, dtype=samples.dtype)
        if len(self._held):
            samples, self._held = np.concatenate([self._held, samples]), self._held[:0]
        short = len(samples) < min(FRAME_SAMPLES, HEAD_START * frame_cost_s * SAMPLE_RATE)
        if self._live and self.skipped and not self._samples and short:
            self._held = samples
        else:
            self._put(samples)

    def last_words(self, natural: bool) -> None:
        """The speech is over: hand out what was held and the words that are still owed, if need be without samples."""
        if len(self._held):
            self._put(self._held)
        words = self._words.rest(self.seconds, natural)
        if words:
            self._stream.put(Chunk(np.zeros(0, np.int16), self._samples, words))

    def _put(self, samples: np.ndarray) -> None:
        first = self._samples
        self._samples += len(samples)
        words = self._words.until(self.seconds)
        if len(samples) or words:
            self._stream.put(Chunk(_pcm16(samples), first, words))

    @property
    def seconds(self) -> float:
        """Seconds handed out so far."""
        return self._samples / SAMPLE_RATE

    def _listen(self, samples: np.ndarray) -> None:
        loud = _loud(samples)
        if loud.any():
            self.silent_s = (len(loud) - 1 - int(loud.nonzero()[0][-1])) * WINDOW / SAMPLE_RATE
        else:
            self.silent_s += len(samples) / SAMPLE_RATE

    def _without_silence(self, samples: np.ndarray) -> np.ndarray:
        """Drop leading silence up to one window before the first loud one."""
        loud = _loud(samples)
        if loud.any():
            self._skip = False
            start = max(0, int(loud.argmax()) - 1) * WINDOW
        else:
            start = len(samples)
        self.skipped += start
        return samples[start:]


def _loud(samples: np.ndarray) -> np.ndarray:
    """Which 10 ms windows are louder than silence."""
    windows = samples[: len(samples) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return np.sqrt(np.square(windows).mean(-1)) > SILENCE


def _pcm16(samples: np.ndarray) -> np.ndarray:
    return np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
