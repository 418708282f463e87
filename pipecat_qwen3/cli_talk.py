"""`say` without a text: a prompt whose every line is spoken, with commands to change the voice in between."""

import asyncio
import contextlib
import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipecat_qwen3.cli_audio import Player, WavFile, find_player
from pipecat_qwen3.cli_parser import nearest
from pipecat_qwen3.cli_progress import Progress
from pipecat_qwen3.cli_say import facts_of, open_backend, request_of, speakable
from pipecat_qwen3.cli_speech import speak
from pipecat_qwen3.cli_voices import check_name
from pipecat_qwen3.errors import BadRequestError, TTSError, UnknownNameError
from pipecat_qwen3.local import LocalBackend

_HELP = """\
Every line is spoken. Ctrl-C stops a sentence, Ctrl-D or /quit leaves.
  /voice NAME      another voice; without a name: which there are
  /language NAME   another language, or auto; without a name: which there are
  /instruct HOW    how to speak, in words; without words: as the voice does by itself
  /seed N          the same random stream for every line; without a number: a new one for each
  /help            this list
  /quit            leave"""


def run(args: Namespace) -> int:
    """Speak line after line until the end of the input."""
    player = None if args.out else find_player()
    with Progress() as progress:
        backend = open_backend(args, progress)
    where = f"played by {player}" if player else f"written to {_numbered(args.out)}, then on"
    print(f"{backend.model} on {backend.device.type}; speech is {where}; /help lists the commands")
    try:
        with _history():
            _talk(Conversation(args, backend, player))
    finally:
        backend.close()
    return 0


@dataclass
class Conversation:
    """The arguments of `say`, which the commands change, and what speaks them."""

    args: Namespace
    backend: LocalBackend
    player: str | None

    def obey(self, line: str) -> None:
        """Carry out a command. Raises BadRequestError, or EOFError for /quit."""
        name, _, value = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "voice": self._voice,
            "language": self._language,
            "instruct": self._instruct,
            "seed": self._seed,
            "help": lambda _: print(_HELP),
            "quit": _quit,
        }
        if name not in commands:
            listed = ", ".join(f"/{command}" for command in commands)
            raise UnknownNameError(f"no command /{name}{nearest(name, commands)}; the commands are {listed}")
        commands[name](value.strip())

    def say(self, line: str) -> None:
        """Speak one line and report on it. Ctrl-C stops it."""
        request = request_of(self.args, speakable(line.encode(errors="surrogateescape")))
        output = Player(self.player) if self.player else WavFile(_numbered(self.args.out))
        try:
            with Progress() as progress:
                progress.speaking(line, self.args.max_frames)
                try:
                    spoken = asyncio.run(speak(self.backend, request, output, progress.heard))
                finally:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                output.close()
                if isinstance(output, Player):
                    output.wait()
        finally:
            output.stop()
        facts = facts_of(self.args, self.backend, spoken)
        times = (
            "" if spoken.first_audible_s is None else f", first audible sample {spoken.first_audible_s * 1000:.0f} ms"
        )
        name = f"{output.path}: " if isinstance(output, WavFile) else ""
        print(f"{name}{facts['audio_s']:.2f} s, end {facts['end']}, seed {facts['seed']}{times}")

    def _voice(self, name: str) -> None:
        self.args.voice = self._chosen("voice", name, self.backend.voices) or self.args.voice

    def _language(self, name: str) -> None:
        self.args.language = self._chosen("language", name, ("auto", *self.backend.languages)) or self.args.language

    def _instruct(self, how: str) -> None:
        self.args.instruct = how or None

    def _seed(self, number: str) -> None:
        if number and not number.isdecimal():
            raise BadRequestError(f"a seed should be a whole number, but is {number!r}")
        self.args.seed = int(number) if number else None

    def _chosen(self, kind: str, name: str, names: tuple[str, ...]) -> str | None:
        if not name:
            print(", ".join(names) or f"{self.backend.model} has no named {kind}s")
            return None
        check_name(kind, name, names)
        return name


def _talk(conversation: Conversation) -> None:
    while True:
        try:
            line = input("> ").strip()
            if line.startswith("/"):
                conversation.obey(line)
            elif line:
                conversation.say(line)
        except TTSError as error:
            print(f"  {error}")
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def _quit(_: str) -> None:
    raise EOFError


def _numbered(out: str | None) -> Path:
    """out-1.wav, out-2.wav, …: the first that does not exist yet."""
    path = Path(out or "out.wav")
    number = 1
    while (numbered := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    return numbered


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing that remembers earlier sessions, where Python has readline and the disk lets us."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "pipecat-qwen3" / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(file)
