"""The command line of the bots in; speech recognition and a language model out, or one line that says what is missing.

The defaults need no key and no download.
"""

import argparse
import errno
import importlib
import importlib.util
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.services.llm_service import LLMService
from pipecat.services.stt_service import STTService

from bots import ollama
from bots.script import HINT
from pipecat_qwen3 import Backend, TTSError
from pipecat_qwen3.errors import UnknownNameError, choices

PROMPT = (
    "You are a friendly voice assistant. Your words are spoken aloud: answer in one or two short sentences, "
    "without lists, markdown or emoji."
)

_NEEDS = {
    "sphinx": ("pocketsphinx", "pocketsphinx", None),
    "whisper": ("faster_whisper", "faster-whisper", None),
    "deepgram": ("deepgram", "pipecat-ai[deepgram]", "DEEPGRAM_API_KEY"),
    "scripted": (None, None, None),
    "openai": ("openai", "pipecat-ai[openai]", "OPENAI_API_KEY"),
    "ollama": ("openai", "pipecat-ai[openai]", None),
}
"""Of each service: the package it imports, how that is installed, and the variable that holds its key."""


class BotParser(argparse.ArgumentParser):
    """The options of a bot, to which `pipecat.runner.run.main` adds its own, checked before anything is loaded."""

    def __init__(
        self,
        description: str | None,
        prepare: Callable[[argparse.Namespace], object],
        transports: Mapping[str, Sequence[str]],
    ) -> None:
        """Take what the bot is.

        prepare     what it does once with the checked options, such as loading its model
        transports  what it can be reached by, and the variables that each of these needs
        """
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._prepare, self._transports = prepare, transports
        self.add_argument("--stt", choices=["sphinx", "whisper", "deepgram"], default="sphinx", help="who listens")
        self.add_argument("--stt-model", help="which model of --stt whisper or deepgram, if not the usual one")
        self.add_argument("--llm", choices=["scripted", "openai", "ollama"], default="scripted", help="who answers")
        self.add_argument("--llm-model", help="which model of --llm, if not the usual one")
        self.add_argument("--voice", help="who speaks; the default is the model's first voice")

    def parse_args(self, *given: Any, **named: Any) -> argparse.Namespace:  # type: ignore[override]
        """Parse, check, say what the offline parts can do, and prepare the bot."""
        args = super().parse_args(*given, **named)
        if lack := self._unreachable(args) or missing(args.stt) or missing(args.llm) or taken(args.host, args.port):
            self.exit(2, f"{lack}\n")
        if args.llm == "scripted":
            print(f"This bot answers from a script. {HINT} For a real conversation: --stt whisper --llm ollama")
        try:
            if args.llm == "ollama":
                args.llm_model = ollama.model(args.llm_model)
            self._prepare(args)
        except (TTSError, ollama.OllamaError) as error:
            self.exit(1, f"{error}\n")
        warm(args)
        return args

    def _unreachable(self, args: argparse.Namespace) -> str | None:
        """Why nobody could talk to the bot over the transport that was asked for."""
        if args.transport is None:
            return None
        if args.transport not in self._transports:
            return f"this bot does not speak {args.transport}; choose -t {', '.join(self._transports)}"
        if lack := [name for name in self._transports[args.transport] if not os.getenv(name)]:
            return f"-t {args.transport} needs {' and '.join(lack)}: set them to those of your account"
        if args.transport == "twilio" and not args.proxy:
            return "-t twilio needs -x HOST, the name under which Twilio reaches this machine"
        return None


def warm(args: argparse.Namespace) -> None:
    """Import and load what the first client would wait for, and what would hold up the event loop meanwhile."""
    SileroVADAnalyzer()
    with suppress(ImportError):  # other transports need no WebRTC
        importlib.import_module("pipecat.transports.smallwebrtc.transport")
    if args.stt == "sphinx":
        from bots import offline

        offline.warm()
    elif args.stt == "whisper":
        from bots import whisper

        whisper.model(args.stt_model or whisper.MODEL)


def check_voice(voice: str | None, backend: Backend) -> None:
    """Refuse a voice that the model does not have. Raises UnknownNameError."""
    if voice and voice.lower() not in [there.lower() for there in backend.voices]:
        raise UnknownNameError(f"unknown voice {voice!r}; there are: {choices(backend.voices)}")


def missing(name: str) -> str | None:
    """What a service lacks here and what to do about it, None if nothing."""
    package, install, key = _NEEDS[name]
    if package and importlib.util.find_spec(package) is None:
        return f'{name} needs a package: run pip install "{install}", or leave the option out'
    if key and not os.getenv(key):
        return f"{name} needs your key: set {key}, or leave the option out"
    return None


def taken(host: str, port: int) -> str | None:
    """Why this address cannot be listened on, None if it can."""
    if not 0 <= port <= 65_535:
        return f"there is no port {port}: choose one of 0 to 65535"
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        why = str(error.strerror).split(" (")[0]  # the rest repeats the address
        end = "end what runs there, or " if error.errno == errno.EADDRINUSE else ""
        return f"cannot listen on {host}:{port} ({why}); {end}choose another --host or --port"
    return None


def make_stt(args: argparse.Namespace) -> STTService:
    """The speech recognition that was asked for."""
    if args.stt == "whisper":
        from bots.whisper import SharedWhisperSTTService

        return SharedWhisperSTTService(args.stt_model)
    if args.stt == "deepgram":
        from pipecat.services.deepgram.stt import DeepgramSTTService

        chosen = DeepgramSTTService.Settings(model=args.stt_model) if args.stt_model else None
        return DeepgramSTTService(api_key=os.environ["DEEPGRAM_API_KEY"], settings=chosen)
    from bots.offline import SphinxSTTService

    return SphinxSTTService()


def make_llm(args: argparse.Namespace, languages: Sequence[str]) -> LLMService[Any]:
    """The language model that was asked for; the script is told which languages the voice speaks."""
    model = {"model": args.llm_model} if args.llm_model else {}
    if args.llm == "openai":
        from pipecat.services.openai.llm import OpenAILLMService

        settings = OpenAILLMService.Settings(system_instruction=PROMPT, **model)
        return OpenAILLMService(api_key=os.environ["OPENAI_API_KEY"], settings=settings)
    if args.llm == "ollama":
        from pipecat.services.ollama.llm import OLLamaLLMService

        settings = OLLamaLLMService.Settings(system_instruction=PROMPT, **model)
        return OLLamaLLMService(base_url=ollama.address(), settings=settings)
    from bots.offline import ScriptedLLMService

    return ScriptedLLMService(languages=languages)
