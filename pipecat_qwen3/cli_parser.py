"""Command-line arguments in, a Namespace out; whatever is wrong with them becomes one line with the nearest name."""

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from pipecat_qwen3 import __version__
from pipecat_qwen3.errors import BadRequestError

PROGRAM = "pipecat-qwen3"

_DESCRIPTION = "Qwen3-TTS in live Pipecat voice agents."
_SAY_EPILOG = """\
With no TEXT and a terminal, say is a prompt: every line is spoken, and /help lists what else it understands.
Ctrl-C stops the speech; the WAV is valid at every moment.
"""

_SERVE_EPILOG = """\
PIPECAT_QWEN3_API_KEY, if set, is the key that clients must send. SIGTERM lets voices finish for half a minute.
"""


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' for the name that looks most like an unknown one, or nothing."""
    by_lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    close = close or [known for known in by_lower if name and known.startswith(name.lower())]
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


class Parser(argparse.ArgumentParser):
    """Raises BadRequestError instead of printing a usage; options may not be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        raise BadRequestError(f"{message}; see {self.prog} --help")

    def strict(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse everything, naming the nearest option for an unknown one."""
        parsed, unknown = self.parse_known_args(args)
        if unknown and unknown[0].startswith("-"):
            options = _options(self, parsed.command)
            self.error(f"there is no option {unknown[0]!r}{nearest(unknown[0].split('=')[0], options)}")
        if unknown:
            self.error(f"there is no place for {unknown[0]!r}; put a text of several words in quotes")
        return parsed


def one_of(*names: str) -> Callable[[str], str]:
    """An argument that is one of a few names."""

    def parse(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(
                f"should be one of {', '.join(names)}, but is {value!r}{nearest(value, names)}"
            )
        return value

    return parse


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], Any]:
    """An argument that is a finite number from `low` (or above it) up to `high`."""

    def parse(value: str) -> int | float:
        try:
            parsed = kind(value)
        except ValueError:
            parsed = math.nan
        if math.isfinite(parsed) and low <= parsed <= high and not (above and parsed == low):
            return parsed
        name = "a whole number" if kind is int else "a number"
        bounds = f"{'above' if above else 'of at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
        raise argparse.ArgumentTypeError(f"should be {name} {bounds}, but is {value!r}")

    return parse


def build() -> Parser:
    """The whole command line."""
    top = Parser(prog=PROGRAM, description=_DESCRIPTION)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_say(commands.add_parser("say", help="speak a text into a WAV file", epilog=_SAY_EPILOG))
    _add_serve(commands.add_parser("serve", help="speak over HTTP and WebSockets", epilog=_SERVE_EPILOG))
    voices = commands.add_parser("voices", help="list the voices and languages of a model")
    _add_model(voices)
    voices.add_argument("--json", action="store_true", help="one JSON object on one line")
    doctor = commands.add_parser("doctor", help="say what this machine can run, and why not more")
    _add_model(doctor)
    _add_device(doctor)
    doctor.add_argument("--json", action="store_true", help="one JSON object on one line")
    return top


def commands() -> tuple[str, ...]:
    """Names of the commands."""
    return ("say", "serve", "voices", "doctor")


def _options(top: argparse.ArgumentParser, command: str | None) -> list[str]:
    found = list(top._option_string_actions)
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction) and command in action.choices:
            found += action.choices[command]._option_string_actions
    return found


def _add_model(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        default="embedded",
        metavar="M",
        help="embedded (default), a checkpoint folder, or OWNER/NAME on Hugging Face",
    )


def _add_device(parser: Parser) -> None:
    parser.add_argument(
        "--backend",
        type=one_of("auto", "persistent", "graph", "numba", "torch"),
        default="auto",
        help="how frames are launched: auto (default), persistent, graph, numba, torch",
    )
    parser.add_argument(
        "--dtype", type=one_of("auto", "bf16", "fp32"), default="auto", help="auto (default), bf16, fp32"
    )
    parser.add_argument(
        "--device", type=one_of("auto", "cpu", "cuda"), default="auto", help="auto (default), cpu, cuda"
    )


def _add_say(say: Parser) -> None:
    say.add_argument("text", nargs="?", metavar="TEXT", help="the text, - for standard input, or @FILE")
    say.add_argument("-o", "--out", metavar="WAV", help="file to write (default out.wav)")
    say.add_argument("--voice", metavar="NAME", help="a voice that `voices` lists (default: the model's first)")
    say.add_argument("--language", metavar="NAME", help="a language that `voices` lists, or auto")
    say.add_argument("--instruct", metavar="HOW", help="how to speak, in words; 1.7B models only")
    say.add_argument("--stream-text", action="store_true", help="feed the text word by word, in the streaming layout")
    say.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="seed of the random stream (default: drawn)"
    )
    say.add_argument("--greedy", action="store_true", help="take the likeliest code instead of sampling")
    say.add_argument("--temperature", type=number(float, 0, 100, above=True), metavar="T", help="sampling temperature")
    say.add_argument("--top-k", type=number(int, 0), metavar="K", help="sample from the K likeliest codes, 0 for all")
    say.add_argument(
        "--top-p", type=number(float, 0, 1, above=True), metavar="P", help="sample from the likeliest codes up to P"
    )
    say.add_argument(
        "--repetition-penalty", type=number(float, 0, 100, above=True), metavar="R", help="penalty for spoken codes"
    )
    say.add_argument(
        "--max-frames", type=number(int, 1), metavar="N", help="at most N frames of 80 ms for each utterance"
    )
    say.add_argument("--codes", metavar="NPY", help="write the spoken frames as int [frames, codebooks]")
    say.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    _add_model(say)
    _add_device(say)


def _add_serve(serve: Parser) -> None:
    serve.add_argument("--host", default="127.0.0.1", metavar="IP", help="address to listen on (default 127.0.0.1)")
    serve.add_argument(
        "--port", type=number(int, 0, 65535), default=8880, metavar="N", help="port (default 8880), 0 for a free one"
    )
    serve.add_argument(
        "--max-batch",
        type=number(int, 1, 32),
        default=32,
        metavar="N",
        help="voices that advance together (default 32)",
    )
    serve.add_argument(
        "--profile", type=one_of("latency", "throughput"), default="latency", help="latency (default) or throughput"
    )
    serve.add_argument(
        "--replicas", type=number(int, 1, 64), default=1, metavar="N", help="processes; more than one needs [ray]"
    )
    serve.add_argument(
        "--max-connections", type=number(int, 1), default=512, metavar="N", help="requests and sockets at once"
    )
    serve.add_argument(
        "--max-connections-per-client",
        type=number(int, 1),
        metavar="N",
        help="of them, from one address (that of the proxy, if there is one)",
    )
    _add_model(serve)
    _add_device(serve)
