"""Requests in, watched streams out: what all endpoints of one server process share.

Holds the process's one Backend, its limits, metrics, voice names and whether it is draining. Knows no web framework.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipecat_qwen3.backend import PROFILES, Backend, Chunk, Load, Measured, Profile, Request, Result, Stream
from pipecat_qwen3.errors import BadRequestError, EngineError, OverloadedError, TTSError
from pipecat_qwen3.metrics import Metrics, Watch

logger = logging.getLogger(__name__)

OPENAI_VOICES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable"),
    *("marin", "nova", "onyx", "sage", "shimmer", "verse"),
)
"""Names that clients written for OpenAI insist on."""

OPENAI_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
"""Model names that such clients send; they mean whatever is loaded."""


@dataclass(frozen=True)
class Limits:
    """What one process takes on.

    connections  requests and sockets at once
    per_client   of them, from one address; None: as many as there are
    contexts     on one socket
    text         characters of one utterance
    body         bytes of a request body or a socket message
    read_s       a request that is not complete after so long is answered with 408
    write_s      a reader that takes nothing for so long is dropped
    drain_s      after SIGTERM, voices may speak on for so long
    socket_s     an older socket is closed in its next silence, so that its client moves on; None: never
    """

    connections: int = 512
    per_client: int | None = None
    contexts: int = 64
    text: int = 4096
    body: int = 65_536
    read_s: float = 20.0
    write_s: float = 10.0
    drain_s: float = 30.0
    socket_s: float | None = None


class Voice:
    """A stream whose chunks are counted: `async for chunk in voice`; `cancel` is idempotent and returns at once."""

    def __init__(self, stream: Stream, watch: Watch, over: Callable[[], None]) -> None:
        self.stream = stream
        self.cancelled = self._ended = False
        self._watch, self._over = watch, over

    def __aiter__(self) -> "Voice":
        return self

    async def __anext__(self) -> Chunk:
        try:
            chunk = await anext(self.stream)
        except TTSError as error:
            self._watch.failed(error)
            self._end()
            raise
        except StopAsyncIteration:
            self._end()
            raise
        self._watch.sent(chunk)
        return chunk

    @property
    def result(self) -> Result | None:
        """How it ended."""
        return self.stream.result

    def cancel(self) -> None:
        """Break it off, unless it has ended."""
        if not self._ended:
            self.cancelled = True
            self.stream.cancel()
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._watch.over(self.stream.result, self.cancelled)
        self._over()


class Speaker:
    """The one backend of this process, loading or warm.

    load  opens the backend; called in a thread of its own by `start`
    profile  what it aims at: chunk sizes and credit, where a client names none
    """

    def __init__(
        self, load: Callable[[], Backend], limits: Limits | None = None, profile: Profile = PROFILES["latency"]
    ) -> None:
        self.limits = limits or Limits()
        self.on_failure: Callable[[], None] = lambda: None
        self.metrics = Metrics()
        self.draining = False
        self.failure: Exception | None = None
        self.on_drain: set[Callable[[], Awaitable[None]]] = set()
        self._load, self._profile = load, profile
        self._backend: Backend | None = None
        self._voices: set[Voice] = set()
        self._thread: threading.Thread | None = None
        self.metrics.ready.set_function(lambda: float(self.ready))
        self.metrics.follow(self._engine_load)

    def start(self) -> None:
        """Begin to load; a failure is kept in `failure`, and `on_failure` is called from the loading thread."""

        def load() -> None:
            try:
                self._backend = self._load()
            except Exception as error:
                self.failure = error
                logger.error("the model could not be loaded", extra={"error": str(error)})
                self.on_failure()

        self._thread = threading.Thread(target=load, name="pipecat-qwen3-load", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Warm, and taking requests."""
        return self._backend is not None and self._backend.ready and not self.draining

    @property
    def broken(self) -> bool:
        """The backend was there and is no more, as after a failure of the GPU: only another process can speak."""
        return self._backend is not None and not self._backend.ready

    @property
    def backend(self) -> Backend:
        """The backend. Raises EngineError while it loads."""
        if self._backend is None:
            raise EngineError("the model is still loading; /ready says when it is warm")
        return self._backend

    def admit(self) -> None:
        """Raises OverloadedError while the server drains, EngineError while it loads."""
        if self.draining:
            raise OverloadedError("the server is shutting down; connect again")
        _ = self.backend

    @property
    def open_voices(self) -> int:
        """Utterances that have not ended."""
        return len(self._voices)

    def speak(self, request: Request, arrived: float | None = None) -> Voice:
        """Start an utterance and return at once. Raises TTSError."""
        watch = self.metrics.watch(arrived)
        try:
            stream = self.backend.speak(request)
        except TTSError as error:
            watch.failed(error)
            watch.over(None, cancelled=False)
            raise
        voice = Voice(stream, watch, lambda: self._voices.discard(voice))
        self._voices.add(voice)
        return voice

    def voice_name(self, name: str | None) -> str | None:
        """Our voice for a name, which may be one of OpenAI's."""
        ours = self.backend.voices
        if name is None or name.lower() in (voice.lower() for voice in ours):
            return name
        return self.aliases.get(name.lower(), name) if name.lower() in OPENAI_VOICES else name

    @property
    def aliases(self) -> Mapping[str, str | None]:
        """What each of OpenAI's voices is here: ours in turn; None where the checkpoint has no named voices."""
        ours = self.backend.voices
        return {name: ours[i % len(ours)] if ours else None for i, name in enumerate(OPENAI_VOICES)}

    def request(self, text: Any, settings: Mapping[str, Any]) -> Request:
        """A Request of a text and settings under a Request's names, with the voice's alias resolved.

        What is missing is the profile's choice. Raises BadRequestError for an instruction longer than a text may be.
        """
        if len(settings.get("instruct") or "") > self.limits.text:
            raise BadRequestError(f"instruct should have at most {self.limits.text} characters")
        voice, ramp = self.voice_name(settings.get("voice")), settings.get("ramp") or self._profile.ramp
        return Request(text, **{"ahead_s": self._profile.ahead_s, **settings, "voice": voice, "ramp": ramp})

    def _engine_load(self) -> Load:
        """What the engine says of itself; nothing of one that is not loaded, or that is somewhere else."""
        return self._backend.load if isinstance(self._backend, Measured) else Load(0, 0, 0)

    async def drain(self) -> None:
        """Take nothing new, and return when every voice has ended or `drain_s` has passed."""
        if not self.draining:
            self.draining = True
            logger.info("draining", extra={"voices": self.open_voices})
            await asyncio.gather(*(leave() for leave in self.on_drain), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.drain_s):
                while self._voices or self.on_drain:  # noqa: ASYNC110 - voices end in many places
                    await asyncio.sleep(0.05)

    def close(self) -> None:
        """Cancel what is left and close the backend; waits for a loading that is under way."""
        for voice in list(self._voices):
            voice.cancel()
        if self._thread is not None:
            self._thread.join()
        if self._backend is not None:
            self._backend.close()
