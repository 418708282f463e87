"""Text frames of a Pipecat pipeline in, speech frames out, spoken by the engine in this process.

The engine is loaded in a thread on first use, or given; all services of a process share it.
"""

import asyncio
from concurrent.futures import Future
from threading import Thread
from typing import Any

from loguru import logger
from pipecat.processors.frame_processor import FrameProcessorSetup

from pipecat_qwen3.backend import SAMPLE_RATE, Backend
from pipecat_qwen3.exits import at_exit, forget
from pipecat_qwen3.service_settings import Qwen3TTSSettings
from pipecat_qwen3.service_speech import SpeechService

_SLOW_LOAD_S = 10.0
"""Half of what a pipeline grants its processors to set up."""

_EXIT_WAIT_S = 30.0
"""A process that exits while a model loads waits for the loading to end, so long at most."""


class Qwen3TTSService(SpeechService):
    """Speaks in this process, through a Backend that all sessions share.

    Sentence by sentence, or with text_aggregation_mode=TextAggregationMode.TOKEN while the language model still writes:
    a reply is then one utterance. The context of the conversation gets the words that were heard. An interruption sets
    a flag and waits for nothing.

    Example::

        tts = Qwen3TTSService(settings=Qwen3TTSService.Settings(voice="slt", language=Language.EN))
    """

    def __init__(
        self,
        *,
        model: str = "embedded",
        backend: Backend | None = None,
        device: str = "auto",
        dtype: str = "auto",
        sample_rate: int | None = SAMPLE_RATE,
        skip_silence: bool = True,
        settings: Qwen3TTSSettings | None = None,
        **kwargs: Any,
    ) -> None:
        """Start loading the model in a thread of its own, unless a backend is given.

        Args:
            model: "embedded", a folder or a Hugging Face name; all services of the process that name the same
                model, device and dtype share one engine.
            backend: An open backend to use instead; the service never closes it.
            device: "auto", "cpu" or "cuda".
            dtype: "auto", "bf16" or "fp32".
            sample_rate: Rate of the frames in Hz. The default is the model's own, which output transports
                resample as needed; None takes the pipeline's.
            skip_silence: Drop the silence before the first word of a turn: there it is only waiting, and TTFA
                counts it. Later sentences keep theirs, it is the pause between sentences.
            settings: What may change at runtime, see `Qwen3TTSSettings`.
            **kwargs: Options of Pipecat's `TTSService`, text_aggregation_mode among them.

        Raises:
            UnknownNameError: For an option that does not exist.
        """
        super().__init__(
            model=model,
            backend=backend,
            sample_rate=sample_rate,
            skip_silence=skip_silence,
            settings=settings,
            **kwargs,
        )
        self._loading = _load_shared(str(self._settings.model), device, dtype) if backend is None else None

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """Wait for the engine; one that cannot be had is reported once and leaves the service unusable."""
        await super().setup(setup)
        if self._loading is None or self._backend is not None:
            return
        loading = asyncio.wrap_future(self._loading)
        await asyncio.wait({loading}, timeout=_SLOW_LOAD_S)
        if not loading.done():
            logger.warning(
                f"{self}: still loading {self._settings.model!r}, and a pipeline waits 20 s at most: "
                "call LocalBackend.open() before the event loop runs and pass it as backend="
            )
        try:
            self._backend = await loading
        except Exception as error:
            await self.push_error(
                f"Qwen3-TTS cannot load {self._settings.model!r}: {error}",
                exception=error,
                force_treat_as_permanent=True,
            )


def _load_shared(model: str, device: str, dtype: str) -> Future[Backend]:
    """Load or find the process's engine in a thread, so that neither the event loop nor the exit waits for it."""
    loading: Future[Backend] = Future()
    loading.set_running_or_notify_cancel()  # so that a pipeline that gives up cannot cancel it under the thread

    def load() -> None:
        try:
            from pipecat_qwen3.local import LocalBackend

            loading.set_result(LocalBackend.shared(model, device=device, dtype=dtype))
        except Exception as error:
            loading.set_exception(error)
        forget(end)  # from here on the engine itself knows when the program ends

    thread = Thread(target=load, name="pipecat-qwen3-load", daemon=True)

    def end() -> None:
        thread.join(_EXIT_WAIT_S)
        if loading.done() and loading.exception() is None:
            loading.result().close()

    at_exit(end)
    thread.start()
    return loading
