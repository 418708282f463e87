"""Text as the language model writes it in, one continuous utterance a reply out: TOKEN mode of the Pipecat services.

The voice starts with the first words and its melody runs through the whole reply. Knows a Backend, no sockets.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from pipecat.frames.frames import Frame, TTSAudioRawFrame
from pipecat.services.tts_service import TextAggregationMode
from pipecat.utils.text.simple_text_aggregator import SimpleTextAggregator
from pipecat.utils.types import assert_given

from pipecat_qwen3.backend import Request, Stream
from pipecat_qwen3.errors import EngineError, TTSError
from pipecat_qwen3.playback import Playback, Resampler, is_spaceless
from pipecat_qwen3.service import Qwen3TTSService
from pipecat_qwen3.service_settings import SPOKEN_SETTINGS


@dataclass
class _Reply:
    """One context while its text comes: an utterance, and another one wherever a setting changes."""

    settings: dict[str, Any] | None = None
    pieces: "asyncio.Queue[str | None]" = field(default_factory=asyncio.Queue)
    streams: "asyncio.Queue[Stream | None]" = field(default_factory=asyncio.Queue)
    text: str = ""
    over: bool = False

    def end(self) -> None:
        """No more text will come, or nobody wants more."""
        if not self.over:
            self.over = True
            self.pieces.put_nowait(None)
            self.streams.put_nowait(None)


class TokenTTSService(Qwen3TTSService):
    """`Qwen3TTSService` that also takes text token by token, with text_aggregation_mode=TextAggregationMode.TOKEN."""

    def __init__(self, *, text_aggregation_mode: TextAggregationMode | None = None, **kwargs: Any) -> None:
        """Take the mode, and everything that `Qwen3TTSService` takes."""
        self._by_token = text_aggregation_mode == TextAggregationMode.TOKEN
        self._replies: dict[str, _Reply] = {}
        super().__init__(**kwargs)
        if self._by_token:
            self._text_aggregation_mode = TextAggregationMode.TOKEN
            self._text_aggregator = SimpleTextAggregator(aggregation_type=TextAggregationMode.TOKEN)

    @property
    def _is_streaming_tokens(self) -> bool:
        return self._by_token

    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame | None, None]:
        """Speak a sentence, or in TOKEN mode hand a token to the reply it belongs to.

        Yields:
            What `Qwen3TTSService` yields; None in TOKEN mode, where the audio is appended as it comes.
        """
        if not self._by_token:
            async for frame in super().run_tts(text, context_id):
                yield frame
            return
        reply = self._replies.get(context_id)
        if reply is None:
            reply = self._replies[context_id] = _Reply()
            self._playbacks.setdefault(context_id, Playback())
            self.create_task(self._hand_over(context_id, reply))
        if not reply.over:
            try:
                self._feed(reply, text, context_id)
            except TTSError as error:
                await self._report(error)
                reply.end()
        yield None

    async def flush_audio(self, context_id: str | None = None) -> None:
        """The reply's text is complete."""
        await super().flush_audio(context_id)
        if context_id and (reply := self._replies.get(context_id)):
            reply.end()

    def _forget(self, context_id: str | None = None) -> None:
        super()._forget(context_id)
        for cid in [context_id] if context_id else list(self._replies):
            if reply := self._replies.pop(cid, None):
                reply.end()

    def _feed(self, reply: _Reply, text: str, context_id: str) -> None:
        settings = {name: assert_given(getattr(self._settings, name)) for name in SPOKEN_SETTINGS}
        reply.text += text
        if reply.settings != settings:
            if self._backend is None:
                raise EngineError("no engine was loaded; the error at the start says why")
            first, reply.settings = reply.settings is None, settings
            reply.pieces.put_nowait(None)
            pieces = reply.pieces = asyncio.Queue()
            skip = self._skip_silence and first
            stream = self._backend.speak(Request(_drained(pieces), skip_silence=skip, **settings))
            self._playbacks[context_id].streams.add(stream)
            reply.streams.put_nowait(stream)
        reply.pieces.put_nowait(text)

    async def _hand_over(self, context_id: str, reply: _Reply) -> None:
        """Append a reply's audio and words to its context as they come, and close the context behind them."""
        playback = self._playbacks[context_id]
        try:
            while stream := await reply.streams.get():
                await self._hand_over_utterance(context_id, stream, playback, reply)
        except TTSError as error:
            await self._report(error)
            reply.end()
        finally:
            for stream in playback.streams:
                stream.cancel()
        if self.audio_context_available(context_id) and self._replies.get(context_id) is reply:
            if not playback.spoken:
                await self.append_to_audio_context(context_id, await self._silence(playback, context_id))
            await self.remove_audio_context(context_id)

    async def _hand_over_utterance(self, context_id: str, stream: Stream, playback: Playback, reply: _Reply) -> None:
        resample = Resampler(self.sample_rate)

        async def append(pcm: bytes) -> None:
            if pcm and not stream.cancelled:
                playback.spoken = True
                frame = TTSAudioRawFrame(pcm, self.sample_rate, 1, context_id=context_id)
                await self.append_to_audio_context(context_id, frame)

        while chunk := await self._next_chunk(stream, context_id):
            words = playback.words_of(chunk)
            await append(await resample(chunk.pcm))
            await self.add_word_timestamps(words, context_id, includes_inter_frame_spaces=is_spaceless(reply.text))
        await append(await resample.flush())
        self._warn_of_bad_end(stream.result, reply.text)

    async def _report(self, error: TTSError) -> None:
        engine_is_dead = isinstance(error, EngineError) and not (self._backend and self._backend.ready)
        await self.push_error(
            f"Qwen3-TTS cannot speak: {error}", exception=error, force_treat_as_permanent=engine_is_dead
        )


async def _drained(pieces: "asyncio.Queue[str | None]") -> AsyncIterator[str]:
    while (piece := await pieces.get()) is not None:
        yield piece
