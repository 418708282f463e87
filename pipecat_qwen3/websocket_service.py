"""Text frames of a Pipecat pipeline in, speech frames out, spoken by a server over one socket. Needs no torch."""

import asyncio
from typing import Any

from pipecat.processors.frame_processor import FrameProcessorSetup

from pipecat_qwen3.backend import SAMPLE_RATE
from pipecat_qwen3.errors import TTSError, UnknownNameError, choices
from pipecat_qwen3.remote import PING_S, RemoteBackend
from pipecat_qwen3.service_settings import Qwen3TTSSettings
from pipecat_qwen3.service_speech import SpeechService

GIVE_UP_S = 10.0
"""So long without a server is an outage, and another service of a ServiceSwitcher takes over."""

URL = "ws://127.0.0.1:8880/v1/audio/speech/ws"


class Qwen3WebsocketTTSService(SpeechService):
    """Speaks through a `pipecat-qwen3 serve` somewhere else.

    Everything else is as in `Qwen3TTSService`: sentences or tokens, word times, interruptions, settings. A lost
    connection is an error of the sentence that was being spoken; it is made again in the background, or at once when
    there is something to say. Without one for `give_up_s` the service is not usable, which lets a ServiceSwitcher fail
    over; it is again as soon as the server is back.

    Event handlers: on_connected, on_disconnected, on_connection_error.

    Example::

        tts = Qwen3WebsocketTTSService(url="ws://gpu.local:8880/v1/audio/speech/ws", api_key=key)
    """

    def __init__(
        self,
        *,
        url: str = URL,
        api_key: str | None = None,
        ping_s: float = PING_S,
        give_up_s: float = GIVE_UP_S,
        sample_rate: int | None = SAMPLE_RATE,
        skip_silence: bool = True,
        settings: Qwen3TTSSettings | None = None,
        **kwargs: Any,
    ) -> None:
        """Connect to nothing yet; `setup` does.

        Args:
            url: The server's socket: ws://HOST:PORT/v1/audio/speech/ws, or wss:// behind TLS.
            api_key: What the server has in PIPECAT_QWEN3_API_KEY.
            ping_s: How often the server is asked whether it lives. One that says nothing for two of these is given up,
                and whatever it was speaking is an error then.
            give_up_s: After so long without a connection the service reports that it cannot work for now.
            sample_rate: Rate of the frames in Hz; None takes the pipeline's.
            skip_silence: Drop the silence before the first word of a turn.
            settings: What may change at runtime, see `Qwen3TTSSettings`. The server decides the model.
            **kwargs: Options of Pipecat's `TTSService`, text_aggregation_mode among them.

        Raises:
            BadRequestError: For a URL that is none.
            UnknownNameError: For an option that does not exist.
        """
        if local := kwargs.keys() & {"model", "backend", "device", "dtype"}:
            raise UnknownNameError(f"the server decides {choices(sorted(local))}; leave it out here")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._give_up_s, self._gave_up = give_up_s, False
        self._outage: asyncio.Task[None] | None = None
        self._remote = RemoteBackend(url, api_key=api_key, ping_s=ping_s, on_change=self._connection_changed)
        super().__init__(
            model=url,
            backend=self._remote,
            sample_rate=sample_rate,
            skip_silence=skip_silence,
            settings=settings,
            **kwargs,
        )

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """Wait for the connection; one that cannot be had is reported, and tried again in the background."""
        await super().setup(setup)
        self._loop = asyncio.get_running_loop()
        try:
            await self._remote.connected()
        except TTSError as error:
            await self._changed(error)

    async def cleanup(self) -> None:
        """Release what is left, and the connection."""
        await super().cleanup()
        await self._end_outage()
        await asyncio.to_thread(self._remote.close)

    def _connection_changed(self, error: TTSError | None) -> None:
        """Told on the network thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(lambda: self.create_task(self._changed(error)))

    async def _changed(self, error: TTSError | None) -> None:
        await self._end_outage()
        if error is None:
            self._settings.model = self._remote.model
            self._sync_model_name_to_metrics()
            if self._gave_up:
                self._gave_up = False
                await self.set_usable(True)
            await self._call_event_handler("on_connected")
        else:
            self._outage = self.create_task(self._give_up(error))
            await self._call_event_handler("on_disconnected")
            await self._call_event_handler("on_connection_error", str(error))
            await self.push_error(f"Qwen3-TTS has no server: {error}", exception=error)

    async def _give_up(self, error: TTSError) -> None:
        """Say so when the server stays away."""
        await asyncio.sleep(self._give_up_s)
        self._gave_up = True
        await self.push_error(
            f"Qwen3-TTS has had no server for {self._give_up_s:g} s: {error}",
            exception=error,
            force_treat_as_permanent=True,
        )

    async def _end_outage(self) -> None:
        outage, self._outage = self._outage, None
        if outage is not None:
            await self.cancel_task(outage)
