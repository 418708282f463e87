"""Text frames of a Pipecat pipeline in, speech frames out: Qwen3-TTS as a Pipecat service.

Knows a Backend and nothing of what is behind it: no torch, no talker, no sockets.
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from threading import Thread
from time import monotonic
from typing import Any

from loguru import logger
from pipecat.frames.frames import CancelFrame, EndFrame, Frame, TTSAudioRawFrame
from pipecat.processors.frame_processor import FrameProcessorSetup
from pipecat.services.settings import TTSSettings
from pipecat.services.tts_service import TextAggregationMode, TTSService
from pipecat.transcriptions.language import Language
from pipecat.utils.errors import ErrorCategory
from pipecat.utils.tracing.service_decorators import traced_tts
from pipecat.utils.types import assert_given

from pipecat_qwen3.backend import FRAME_SAMPLES, SAMPLE_RATE, Backend, Chunk, Request, Result, Stream
from pipecat_qwen3.errors import (
    BadRequestError,
    EngineError,
    TTSError,
    UnknownNameError,
    choices,
)
from pipecat_qwen3.exits import at_exit
from pipecat_qwen3.playback import Playback, Resampler, is_spaceless
from pipecat_qwen3.service_settings import CATEGORIES, LANGUAGES, SPOKEN_SETTINGS, Qwen3TTSSettings, as_pipecat_language

_SLOW_LOAD_S = 10.0
"""Half of what a pipeline grants its processors to set up."""

_EXIT_WAIT_S = 30.0
"""A process that exits while a model loads waits for the loading to end, so long at most."""

_PATIENCE_S = 30.0
"""An engine that gives nothing for so long is reported; uninterruptible speech would wait for it for ever."""


class Qwen3TTSService(TTSService):
    """Speaks in this process, through a Backend that all sessions share.

    Every sentence is one utterance, yielded frame by frame as it is made. The context of the conversation gets
    the words that were heard, because each word travels with its time. An interruption sets a flag and waits for
    nothing.

    Example::

        tts = Qwen3TTSService(settings=Qwen3TTSService.Settings(voice="slt", language=Language.EN))
    """

    Settings = Qwen3TTSSettings

    def __init__(
        self,
        *,
        model: str = "embedded",
        backend: Backend | None = None,
        device: str = "auto",
        dtype: str = "auto",
        sample_rate: int | None = SAMPLE_RATE,
        skip_silence: bool = True,
        settings: Settings | None = None,
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
            **kwargs: Options of Pipecat's `TTSService`.

        Raises:
            BadRequestError: For text_aggregation_mode TOKEN.
            UnknownNameError: For an option that does not exist.
        """
        _check_options(type(self), kwargs)
        store = self.Settings(
            model=model,
            voice=None,
            language=None,
            instruct=None,
            seed=None,
            temperature=None,
            top_k=None,
            top_p=None,
            repetition_penalty=None,
            layout=None,
        )
        if settings is not None:
            store.apply_update(settings)
        if backend is not None:
            store.model = backend.model
        store.language = as_pipecat_language(store.language)
        super().__init__(
            push_start_frame=True,
            push_stop_frames=True,
            push_text_frames=False,
            sample_rate=sample_rate,
            settings=store,
            **kwargs,
        )
        if self._text_aggregation_mode == TextAggregationMode.TOKEN:
            raise BadRequestError(
                "text_aggregation_mode should be SENTENCE, but is TOKEN, which this service cannot do: leave it out"
            )
        self._skip_silence = skip_silence
        self._playbacks: dict[str, Playback] = {}
        self._backend = backend
        self._loading = _load_shared(str(store.model), device, dtype) if backend is None else None

    def can_generate_metrics(self) -> bool:
        """Report TTFB, TTFA, processing time and characters."""
        return True

    def language_to_service_language(self, language: Language) -> str | None:
        """Give the checkpoints' name of a language; None if Qwen3-TTS does not speak it.

        Chinese dialects belong to speakers, not to languages: zh-CN-sichuan is "chinese".
        """
        return LANGUAGES.get(language.split("-")[0])

    # -- life ------------------------------------------------------------------------------------------------

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

    async def stop(self, frame: EndFrame) -> None:
        """End after everything has been spoken."""
        await super().stop(frame)
        self._forget()

    async def cancel(self, frame: CancelFrame) -> None:
        """End now."""
        self._forget()
        await super().cancel(frame)

    async def cleanup(self) -> None:
        """Release what is left. The backend belongs to the process and stays open."""
        self._forget()
        await super().cleanup()

    async def on_audio_context_interrupted(self, context_id: str) -> None:
        """Stop speaking an interrupted context; uninterruptible ones never get here."""
        self._forget(context_id)
        await super().on_audio_context_interrupted(context_id)

    async def on_audio_context_completed(self, context_id: str) -> None:
        """Forget a context that has been handed over."""
        self._forget(context_id)
        await super().on_audio_context_completed(context_id)

    async def flush_audio(self, context_id: str | None = None) -> None:
        """End a turn at once that an unusable service left silent; the base would hold it for three seconds."""
        if context_id and not self.is_usable:
            await self.remove_audio_context(context_id)

    def _forget(self, context_id: str | None = None) -> None:
        """Cancel and forget the utterances of one context, or of all. Sets flags, waits for nothing, idempotent."""
        for cid in [context_id] if context_id else list(self._playbacks):
            playback = self._playbacks.pop(cid, None)
            for stream in playback.streams if playback else ():
                stream.cancel()

    # -- settings --------------------------------------------------------------------------------------------

    async def _update_settings(self, delta: TTSSettings) -> dict[str, Any]:
        """Apply a change; the next sentence is spoken with it."""
        delta.language = as_pipecat_language(delta.language)
        changed = await super()._update_settings(delta)
        if "model" in changed:
            self._settings.model = changed["model"]
            self._sync_model_name_to_metrics()
        self._warn_unhandled_updated_settings(changed.keys() - set(SPOKEN_SETTINGS))
        return changed

    # -- speech ----------------------------------------------------------------------------------------------

    @traced_tts
    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame | None, None]:
        """Speak one sentence.

        Args:
            text: What to say. Text without a letter or digit is 20 ms of silence: a context without any audio
                counts as a failure, and three in a row make a service unusable.
            context_id: The audio context it belongs to.

        Yields:
            TTSAudioRawFrame: PCM16 mono at the service's sample rate. Errors are pushed, not yielded.
        """
        playback = self._playbacks.setdefault(context_id, Playback())
        if not any(character.isalnum() for character in text):
            yield await self._silence(playback, context_id)
            await self.add_word_timestamps([(text.strip(), playback.end)], context_id)
            return
        late_start = playback.began is not None and not playback.spoken
        if late_start:  # the turn began with silence, which is no first byte: measure this sentence instead
            await self.start_ttfb_metrics()
        spaceless = is_spaceless(text)
        resample = Resampler(self.sample_rate)
        stream = None
        try:
            stream = self._speak(text, first=not playback.spoken)
            playback.streams.add(stream)
            await self.start_tts_usage_metrics(text)
            while chunk := await self._next_chunk(stream, context_id):
                words = playback.words_of(chunk)
                if pcm := await resample(chunk.pcm):
                    if late_start and not playback.spoken:
                        await self.stop_ttfb_metrics()
                    playback.spoken = True
                    yield TTSAudioRawFrame(pcm, self.sample_rate, 1, context_id=context_id)
                await self.add_word_timestamps(words, context_id, includes_inter_frame_spaces=spaceless)
            if not stream.cancelled and (pcm := await resample.flush()):
                yield TTSAudioRawFrame(pcm, self.sample_rate, 1, context_id=context_id)
            self._warn_of_bad_end(stream.result, text)
        except asyncio.CancelledError:
            await self._abandon_ttfb(playback)
            raise
        except TTSError as error:
            engine_is_dead = isinstance(error, EngineError) and not (self._backend and self._backend.ready)
            await self.push_error(
                f"Qwen3-TTS cannot speak: {error}", exception=error, force_treat_as_permanent=engine_is_dead
            )
            yield await self._silence(playback, context_id)
        finally:
            if stream:
                stream.cancel()
                playback.streams.discard(stream)

    def _speak(self, text: str, first: bool) -> Stream:
        if self._backend is None:
            raise EngineError("no engine was loaded; the error at the start says why")
        chosen = {name: assert_given(getattr(self._settings, name)) for name in SPOKEN_SETTINGS}
        return self._backend.speak(Request(text, skip_silence=self._skip_silence and first, **chosen))

    async def _next_chunk(self, stream: Stream, context_id: str) -> Chunk | None:
        """Wait for the next chunk, None at the end.

        Tells the base now and then that the context is in use; it would close one that is silent for
        `stop_frame_timeout_s`, and a slow machine may be.
        """
        begun = monotonic()
        while monotonic() - begun < _PATIENCE_S:
            try:
                async with asyncio.timeout(self._stop_frame_timeout_s / 3):
                    return await anext(stream, None)
            except TimeoutError:
                self._refresh_audio_context(context_id)
        raise EngineError(f"the engine has given nothing for {_PATIENCE_S:.0f} s")

    async def _silence(self, playback: "Playback", context_id: str) -> TTSAudioRawFrame:
        """Twenty milliseconds of zeros, so that a turn without speech is still a turn with audio."""
        await self._abandon_ttfb(playback)
        playback.place(SAMPLE_RATE // 50)
        return TTSAudioRawFrame(bytes(self.sample_rate // 50 * 2), self.sample_rate, 1, context_id=context_id)

    async def _abandon_ttfb(self, playback: "Playback") -> None:
        """Report no TTFB for a context that has no first byte; the framework would report the wait for the end."""
        if not playback.spoken:
            await self.cancel_ttfb_metrics()

    def _warn_of_bad_end(self, result: Result | None, text: str) -> None:
        reasons = {
            "runaway": "the model did not stop after its text, so the engine did",
            "cap": "the utterance reached its length limit, its end may be missing",
        }
        if result and result.end in reasons:
            seconds = result.frames * FRAME_SAMPLES / SAMPLE_RATE
            logger.warning(f"{self}: {reasons[result.end]} (after {seconds:.1f} s, seed {result.seed}): [{text}]")

    def _classify_error(self, exception: Exception) -> ErrorCategory | None:
        return next((category for kind, category in CATEGORIES if isinstance(exception, kind)), None)


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

    thread = Thread(target=load, name="pipecat-qwen3-load", daemon=True)
    thread.start()

    def end() -> None:
        thread.join(_EXIT_WAIT_S)
        if loading.done() and loading.exception() is None:
            loading.result().close()

    at_exit(end)
    return loading


def _check_options(service: type, options: Mapping[str, Any]) -> None:
    """Refuse what no class above would read; Pipecat's own constructors swallow unknown keywords."""
    known = {name for cls in service.__mro__ for name in inspect.signature(cls.__init__).parameters}
    unknown = sorted(options.keys() - known)
    if not unknown:
        return
    hint = ""
    if set(unknown) <= set(SPOKEN_SETTINGS):
        hint = f"; pass settings={service.__name__}.Settings({unknown[0]}=...)"
    raise UnknownNameError(f"{service.__name__} has no option {choices(unknown)}{hint}")
