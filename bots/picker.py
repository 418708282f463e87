"""What the page may choose: tells it the voices and languages there are and which speak, and applies what it picks."""

from typing import Any

from pipecat.frames.frames import TTSUpdateSettingsFrame
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frameworks.rtvi import RTVIProcessor
from pipecat.processors.frameworks.rtvi.models import ClientMessage
from pipecat.services.settings import TTSSettings
from pipecat.utils.types import NOT_GIVEN, is_given

from pipecat_qwen3 import Backend


def offer(worker: PipelineWorker, backend: Backend, *, voice: str | None = None, **about: str | None) -> None:
    """Answer `set-voice` and `set-language` of the worker's client, and tell it what there is to choose from.

    voice  who speaks at first; None is the backend's first voice
    about  what else the page shows: stt, llm, hint
    """
    voices, languages = list(backend.voices), list(backend.languages)
    speaks = next((there for there in voices if there.lower() == (voice or "").lower()), next(iter(voices), None))
    chosen = {"voice": speaks, "language": None}
    choices = {"voice": voices, "language": [*languages, None]}  # None: as the text is

    async def tell() -> None:
        there = {"type": "voices", "voices": voices, "languages": languages, "model": backend.model}
        await worker.rtvi.send_server_message({**there, **chosen, **about})

    async def ready(_rtvi: RTVIProcessor) -> None:
        await tell()

    async def pick(rtvi: RTVIProcessor, message: ClientMessage) -> None:
        name = message.type.removeprefix("set-")
        if message.type not in ("set-voice", "set-language"):
            return
        wanted: Any = message.data.get(name) if isinstance(message.data, dict) else None
        if wanted not in choices[name]:
            there = ", ".join(str(choice) for choice in choices[name] if choice)
            await rtvi.send_error_response(message, f"There is no {name} {wanted}; choose one of: {there}.")
            return
        delta = TTSSettings(voice=wanted) if name == "voice" else TTSSettings(language=wanted)
        await worker.queue_frame(TTSUpdateSettingsFrame(delta=delta))

    class Chosen(BaseObserver):
        """Tells the page what is chosen, whether it was picked there or asked for aloud."""

        async def on_push_frame(self, data: FramePushed) -> None:
            delta = data.frame.delta if isinstance(data.frame, TTSUpdateSettingsFrame) else None
            new = {name: value for name in chosen if is_given(value := getattr(delta, name, NOT_GIVEN))}
            if chosen != chosen | new:
                chosen.update(new)
                await tell()

    worker.add_observer(Chosen())
    worker.rtvi.add_event_handler("on_client_ready", ready)
    worker.rtvi.add_event_handler("on_client_message", pick)
