"""Stretches of speech in, transcriptions out, by a function that hears on this machine, in a thread of its own."""

import asyncio
from collections.abc import AsyncGenerator, Callable

from pipecat.frames.frames import Frame, TranscriptionFrame
from pipecat.services.settings import STTSettings
from pipecat.services.stt_service import SegmentedSTTService
from pipecat.utils.time import time_now_iso8601


class LocalSTTService(SegmentedSTTService):
    """A Pipecat service over `hear(audio, rate)`: PCM16 mono and its samples a second to text, "" for nothing."""

    def __init__(
        self, hear: Callable[[bytes, int], str], *, model: str, language: str | None, ttfs_p99_latency: float
    ) -> None:
        """Name the model and its language, and say how many seconds it may take to hear."""
        super().__init__(settings=STTSettings(model=model, language=language), ttfs_p99_latency=ttfs_p99_latency)
        self._hear = hear

    @property
    def wants_wav_segments(self) -> bool:
        """Take PCM16 as it is."""
        return False

    def can_generate_metrics(self) -> bool:
        """Report how long hearing takes."""
        return True

    async def run_stt(self, audio: bytes) -> AsyncGenerator[Frame | None, None]:
        """Hear one stretch of speech."""
        await self.start_processing_metrics()
        text = await asyncio.to_thread(self._hear, audio, self.sample_rate)
        await self.stop_processing_metrics()
        if text:
            yield TranscriptionFrame(text, self._user_id, time_now_iso8601())
