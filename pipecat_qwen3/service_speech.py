"""Text frames of a Pipecat pipeline in, speech frames out: what the Pipecat services have in common.

Sentence by sentence, or token by token as the language model writes. Knows a Backend and nothing of what is behind it:
no torch, no talker, no sockets.
"""

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from loguru import logger
from pipecat.frames.frames import CancelFrame, ControlFrame, EndFrame, Frame, TTSAudioRawFrame, TTSTextFrame
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.settings import TTSSettings
from pipecat.services.tts_service import TTSService
from pipecat.transcriptions.language import Language
from pipecat.utils.errors import ErrorCategory
from pipecat.utils.tracing.service_decorators import traced_tts
from pipecat.utils.types import assert_given

from pipecat_qwen3.backend import FRAME_SAMPLES, MAX_LEAD_S, SAMPLE_RATE, Backend, Chunk, Request, Result, Stream
from pipecat_qwen3.errors import EngineError, TTSError, UnknownNameError, choices
from pipecat_qwen3.playback import Playback, Resampler, is_spaceless
from pipecat_qwen3.service_reply import Reply
from pipecat_qwen3.service_settings import CATEGORIES, LANGUAGES, SPOKEN_SETTINGS, Qwen3TTSSettings, as_pipecat_language

_PATIENCE_S = 30.0
"""An engine that gives nothing for so long is reported; uninterruptible speech would wait for it for ever."""


@dataclass
class Unspoken(ControlFrame):
    """A mark in an audio context: the words from here on, until the mark with `over`, were never spoken.

    The framework gives every text that was handed over to the conversation in the end, also one whose speech failed.
    """

    context_id: str = ""
    over: bool = False


class SpeechService(TTSService):
    """A Pipecat service over a Backend, which the subclass puts into `_backend`.

    With text_aggregation_mode SENTENCE every sentence is one utterance, yielded frame by frame as it is made. With
    TOKEN a reply is one utterance: it starts with the first words, its melody runs through, and a setting that changes
    on the way begins another one. The context of the conversation gets the words that were heard, because each word
    travels with its time. An interruption sets a flag and waits for nothing.
    """

    Settings = Qwen3TTSSettings

    def __init__(
        self,
        *,
        model: str,
        backend: Backend | None,
        sample_rate: int | None,
        skip_silence: bool,
        settings: Qwen3TTSSettings | None,
        **kwargs: Any,
    ) -> None:
        """See the subclasses. Raises UnknownNameError for an option that does not exist."""
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
        self._backend = backend
        self._skip_silence = skip_silence
        self._playbacks: dict[str, Playback] = {}
        self._replies: dict[str, Reply] = {}
        self._turns: deque[str] = deque(maxlen=64)
        self._unspoken: set[str] = set()

    def can_generate_metrics(self) -> bool:
        """Report TTFB, TTFA, processing time and characters."""
        return True

    def language_to_service_language(self, language: Language) -> str | None:
        """Give the checkpoints' name of a language; None if Qwen3-TTS does not speak it.

        Chinese dialects belong to speakers, not to languages: zh-CN-sichuan is "chinese".
        """
        return LANGUAGES.get(language.split("-")[0])

    # -- life ------------------------------------------------------------------------------------------------

    async def stop(self, frame: EndFrame) -> None:
        """End after everything has been spoken."""
        await super().stop(frame)
        self._forget()

    async def cancel(self, frame: CancelFrame) -> None:
        """End now."""
        self._forget()
        await super().cancel(frame)

    async def cleanup(self) -> None:
        """Release what is left."""
        self._forget()
        await super().cleanup()

    async def on_turn_context_created(self, context_id: str) -> None:
        """Remember which contexts will be told that their text is complete; text outside a turn never is."""
        self._turns.append(context_id)
        if not self.is_usable:
            self._unspoken.add(context_id)
        await super().on_turn_context_created(context_id)

    async def on_audio_context_interrupted(self, context_id: str) -> None:
        """Stop speaking an interrupted context; uninterruptible ones never get here."""
        self._forget(context_id)
        await super().on_audio_context_interrupted(context_id)

    async def on_audio_context_completed(self, context_id: str) -> None:
        """Forget a context that has been handed over."""
        self._forget(context_id)
        await super().on_audio_context_completed(context_id)

    async def flush_audio(self, context_id: str | None = None) -> None:
        """The text of a context is complete.

        A turn that an unusable service left silent ends at once; the base would hold it for three seconds.
        """
        if context_id and (reply := self._replies.get(context_id)):
            reply.end()
        elif context_id and not self.is_usable:
            await self.remove_audio_context(context_id)

    def _forget(self, context_id: str | None = None) -> None:
        """Cancel and forget the utterances of one context, or of all. Sets flags, waits for nothing, idempotent."""
        for cid in [context_id] if context_id else list(self._playbacks):
            if reply := self._replies.pop(cid, None):
                reply.end()
            self._unspoken.discard(cid)
            playback = self._playbacks.pop(cid, None)
            for stream in playback.streams if playback else ():
                stream.cancel()

    # -- settings --------------------------------------------------------------------------------------------

    async def _update_settings(self, delta: TTSSettings) -> dict[str, Any]:
        """Apply a change; the next sentence, or in TOKEN mode the next token, is spoken with it."""
        delta.language = as_pipecat_language(delta.language)
        changed = await super()._update_settings(delta)
        if "model" in changed:
            self._settings.model = changed["model"]
            self._sync_model_name_to_metrics()
        self._warn_unhandled_updated_settings(changed.keys() - set(SPOKEN_SETTINGS))
        return changed

    async def push_frame(self, frame: Frame, direction: FrameDirection = FrameDirection.DOWNSTREAM) -> None:
        """Push a frame on, unless it tells the conversation of words that were never spoken."""
        if isinstance(frame, Unspoken):
            (self._unspoken.discard if frame.over else self._unspoken.add)(frame.context_id)
        elif not (isinstance(frame, TTSTextFrame) and frame.context_id in self._unspoken):
            await super().push_frame(frame, direction)

    # -- speech ----------------------------------------------------------------------------------------------

    @traced_tts
    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame | None, None]:
        """Speak one sentence, or in TOKEN mode hand a token to the reply it belongs to.

        Args:
            text: What to say. Text without a letter or digit is 20 ms of silence: a context without any audio
                counts as a failure, and three in a row make a service unusable.
            context_id: The audio context it belongs to.

        Yields:
            TTSAudioRawFrame: PCM16 mono at the service's sample rate; in TOKEN mode None, and the audio is appended
            to the context as it comes. Errors are pushed, not yielded.
        """
        playback = self._playbacks.setdefault(context_id, Playback())
        if context_id in self._unspoken:  # the service was not usable, and is again
            await self.append_to_audio_context(context_id, Unspoken(context_id, over=True))
        if self._is_streaming_tokens:
            await self._take_token(text, context_id, playback)
            yield None
            return
        if not any(character.isalnum() for character in text):
            yield await self._silence(playback, context_id)
            await self.add_word_timestamps([(text.strip(), playback.end)], context_id)
            return
        late_start = playback.began is not None and not playback.spoken
        if late_start:  # the turn began with silence, which is no first byte: measure this sentence instead
            await self.start_ttfb_metrics()
        stream, silent = None, True
        playback.said.clear()
        try:
            stream = self._speak(text, self._spoken_settings(), playback)
            await self.start_tts_usage_metrics(text)
            async for frame in self._frames(stream, context_id, playback, lambda: text):
                if late_start:
                    await self.stop_ttfb_metrics()
                    late_start = False
                yield frame
                silent = False
            if silent and stream.result and stream.result.end != "cancelled":  # all of it was leading silence
                yield await self._silence(playback, context_id)
            if stream.result and stream.result.end != "eos":
                await self._leave_unspoken(playback.unsaid(text), playback, context_id)
        except asyncio.CancelledError:
            await self._abandon_ttfb(playback)
            raise
        except TTSError as error:
            await self._report(error)
            yield await self._silence(playback, context_id)
            await self._leave_unspoken(playback.unsaid(text), playback, context_id)
        finally:
            if stream:
                stream.cancel()
                playback.streams.discard(stream)

    async def _take_token(self, text: str, context_id: str, playback: Playback) -> None:
        """Hand a token to its reply, which begins with the first one."""
        reply = self._replies.get(context_id)
        if reply is None:
            reply = Reply(lambda pieces, settings: self._speak(pieces, settings, playback))
            self._replies[context_id] = reply
            self.create_task(self._hand_over(context_id, reply, playback))
        try:
            reply.feed(text, self._spoken_settings())
        except TTSError as error:
            await self._report(error)
            reply.end()
        if context_id not in self._turns:
            reply.end()

    async def _hand_over(self, context_id: str, reply: Reply, playback: Playback) -> None:
        """Append a reply's audio and words to its context as they come, and close the context behind them."""
        try:
            async for stream in reply.streams():
                async for frame in self._frames(stream, context_id, playback, lambda: reply.text):
                    await self.append_to_audio_context(context_id, frame)
        except TTSError as error:
            await self._report(error)
            await self.append_to_audio_context(context_id, Unspoken(context_id))
            reply.end()
        finally:
            for stream in playback.streams:
                stream.cancel()
        if self._replies.get(context_id) is reply:  # it was not interrupted
            if not playback.spoken:
                await self.append_to_audio_context(context_id, await self._silence(playback, context_id))
            await self.remove_audio_context(context_id)

    async def _frames(
        self, stream: Stream, context_id: str, playback: Playback, text: Callable[[], str]
    ) -> AsyncGenerator[TTSAudioRawFrame]:
        """An utterance as frames; its words go to the context behind the audio that they begin in."""
        resample = Resampler(self.sample_rate)
        while chunk := await self._next_chunk(stream, context_id):
            words = playback.words_of(chunk)
            if (pcm := await resample(chunk.pcm)) and not stream.cancelled:
                yield TTSAudioRawFrame(pcm, self.sample_rate, 1, context_id=context_id)
                playback.spoken = True
            await self.add_word_timestamps(words, context_id, includes_inter_frame_spaces=is_spaceless(text()))
        if (pcm := await resample.flush()) and not stream.cancelled:
            yield TTSAudioRawFrame(pcm, self.sample_rate, 1, context_id=context_id)
        self._warn_of_bad_end(stream.result, text())

    async def _leave_unspoken(self, text: str, playback: Playback, context_id: str) -> None:
        """Let the framework pass over the rest of a sentence, without a word of it for the conversation.

        When the service has just become unusable, over the rest of the context.
        """
        if text:
            await self.append_to_audio_context(context_id, Unspoken(context_id))
            await self.add_word_timestamps([(text, playback.end)], context_id)
        if self.is_usable:
            await self.append_to_audio_context(context_id, Unspoken(context_id, over=True))

    def _spoken_settings(self) -> dict[str, Any]:
        return {name: assert_given(getattr(self._settings, name)) for name in SPOKEN_SETTINGS}

    def _speak(self, text: str | AsyncIterator[str], settings: dict[str, Any], playback: Playback) -> Stream:
        """Start an utterance of a context."""
        if self._backend is None:
            raise EngineError("no engine was loaded; the error at the start says why")
        first = not playback.spoken and not playback.streams
        skip = self._skip_silence and first
        lead_s = min(playback.lead_s, MAX_LEAD_S)
        stream = self._backend.speak(Request(text, skip_silence=skip, lead_s=lead_s, **settings))
        playback.streams.add(stream)
        return stream

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

    async def _silence(self, playback: Playback, context_id: str) -> TTSAudioRawFrame:
        """Twenty milliseconds of zeros, so that a turn without speech is still a turn with audio."""
        await self._abandon_ttfb(playback)
        playback.place(SAMPLE_RATE // 50)
        return TTSAudioRawFrame(bytes(self.sample_rate // 50 * 2), self.sample_rate, 1, context_id=context_id)

    async def _abandon_ttfb(self, playback: Playback) -> None:
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

    async def _report(self, error: TTSError) -> None:
        """Push an error; a dead engine is permanent."""
        engine_is_dead = isinstance(error, EngineError) and not (self._backend and self._backend.ready)
        await self.push_error(
            f"Qwen3-TTS cannot speak: {error}", exception=error, force_treat_as_permanent=engine_is_dead
        )

    def _classify_error(self, exception: Exception) -> ErrorCategory | None:
        return next((category for kind, category in CATEGORIES if isinstance(exception, kind)), None)


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
