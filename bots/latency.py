"""Where the time of each turn goes: Pipecat's own measurements in, a printed table and a message for the page out."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from pipecat.frames.frames import BotStartedSpeakingFrame, BotStoppedSpeakingFrame, InterruptionFrame, MetricsFrame
from pipecat.metrics.metrics import TTFAMetricsData
from pipecat.observers.base_observer import FramePushed
from pipecat.observers.user_bot_latency_observer import LatencyBreakdown, MeasuredFrom, UserBotLatencyObserver

Send = Callable[[dict[str, Any]], Awaitable[None]]


class LatencyReport(UserBotLatencyObserver):
    """Prints, per turn, what lay between the user's last sound and the bot's first audible sample.

    The stages are those of Pipecat's `UserBotLatencyObserver`, and the silence that the voice begins with. After a
    barge-in it prints how long the bot went on speaking.
    """

    def __init__(self, *, time_source: Callable[[], float] = time.time) -> None:
        """Read the time from there."""
        super().__init__(time_source=time_source)
        self._clock = time_source
        self.send: Send | None = None
        """Gets each report as a message too, once somebody is there to read it."""
        self._turn = 0
        self._heard: LatencyBreakdown | None = None
        self._silence_s: float | None = None
        self._speaking = False
        self._interrupted: float | None = None
        self.add_event_handler("on_latency_breakdown", self._bot_started)

    async def on_push_frame(self, data: FramePushed) -> None:
        """Watch for the first audible sample and for interruptions, beside what the base watches for."""
        frame = data.frame
        if isinstance(frame, InterruptionFrame):
            self._heard = self._silence_s = None
            if self._speaking:
                self._interrupted = self._clock()
        elif isinstance(frame, BotStartedSpeakingFrame):
            self._speaking = True
        elif isinstance(frame, BotStoppedSpeakingFrame):
            self._speaking = False
            if self._interrupted is not None:
                await self._report_barge_in(self._clock() - self._interrupted)
                self._interrupted = None
        elif isinstance(frame, MetricsFrame):
            for metric in frame.data:
                if isinstance(metric, TTFAMetricsData):
                    self._silence_s = metric.leading_silence
        await super().on_push_frame(data)
        await self._report_turn()

    async def _bot_started(self, _observer: UserBotLatencyObserver, heard: LatencyBreakdown) -> None:
        if heard.measured_from == MeasuredFrom.USER_SILENCE:
            self._heard = heard
            await self._report_turn()

    async def _report_turn(self) -> None:
        """Report once the bot has begun and its first audible sample is known, in whichever order they come."""
        if self._heard is None or self._silence_s is None:
            return
        stages = [(part.label, part.owner, part.duration_secs) for part in self._heard.contributions]
        if self._silence_s > 0:
            stages.append(("leading silence", "voice", self._silence_s))
        self._heard = self._silence_s = None
        self._turn += 1
        total = sum(seconds for _, _, seconds in stages)
        print(f"\nturn {self._turn}: {total * 1000:.0f} ms from your last sound to the first audible sample")
        for label, owner, seconds in stages:
            print(f"{seconds * 1000:7.0f} ms  {label:20} {owner}", flush=True)
        await self._tell(
            {
                "type": "latency",
                "turn": self._turn,
                "total_ms": round(total * 1000, 1),
                "stages": [{"name": label, "ms": round(seconds * 1000, 1)} for label, _, seconds in stages],
            }
        )

    async def _report_barge_in(self, seconds: float) -> None:
        print(f"interrupted: silent after {seconds * 1000:.1f} ms", flush=True)
        await self._tell({"type": "barge-in", "turn": self._turn, "silence_ms": round(seconds * 1000, 1)})

    async def _tell(self, message: dict[str, Any]) -> None:
        if self.send:
            await self.send(message)
