"""The command line: arguments in, an exit code out; a failure is one line on stderr.

Exit codes: 0 done, 1 failed, 2 a request that cannot be spoken, 130 stopped by Ctrl-C. PIPECAT_QWEN3_DEBUG=1 shows
tracebacks and logs. Heavy libraries are imported by the commands that need them.
"""

import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Sequence

from pipecat_qwen3 import cli_parser
from pipecat_qwen3.errors import BadRequestError, TTSError, UnknownNameError

INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    debug = os.environ.get("PIPECAT_QWEN3_DEBUG", "") not in ("", "0")
    if not debug:
        warnings.simplefilter("ignore")
    try:
        return _run(_parse(sys.argv[1:] if args is None else args), debug)
    except BadRequestError as error:
        return _complain(error, 2, debug)
    except KeyboardInterrupt:
        print(f"{cli_parser.PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output is gone; keep the interpreter from writing to it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TTSError as error:
        return _complain(error, 1, debug)
    except ModuleNotFoundError as error:
        missing = TTSError(f"the library {error.name} is not installed; run: pip install pipecat-qwen3")
        return _complain(missing, 1, debug)
    except OSError as error:
        return _complain(TTSError(f"cannot go on: {error.strerror or error}"), 1, debug)
    except Exception as error:
        return _complain(error, 1, debug, hint=" (a bug? PIPECAT_QWEN3_DEBUG=1 shows where)")


def _parse(args: Sequence[str]) -> Namespace:
    known = cli_parser.commands()
    if args and not args[0].startswith("-") and args[0] not in known:
        raise UnknownNameError(
            f"no command {args[0]!r}{cli_parser.nearest(args[0], known)}; the commands are {', '.join(known)}"
        )
    parser = cli_parser.build()
    parsed = parser.strict(args)
    if parsed.command is None:
        raise BadRequestError(f"no command was given; the commands are {', '.join(known)}; see {parser.prog} --help")
    return parsed


def _run(args: Namespace, debug: bool) -> int:
    if args.command == "doctor":
        from pipecat_qwen3 import doctor

        return doctor.run(args)
    from pipecat_qwen3 import cli_voices

    if args.command == "voices":
        return cli_voices.run(args)
    if args.command == "serve":
        cli_voices.check_names(args.model, None, None)
        try:
            from pipecat_qwen3 import cli_serve

            return cli_serve.run(args)
        except ModuleNotFoundError as error:
            extra = "ray" if error.name == "ray" else "server"
            raise TTSError(f"serve needs {error.name}; run: pip install 'pipecat-qwen3[{extra}]'") from None
    cli_voices.check_names(args.model, args.voice, args.language)
    _set_up_logs(debug)
    from pipecat_qwen3 import cli_say

    return cli_say.run(args)


def _set_up_logs(debug: bool) -> None:
    """Keep stderr for progress and errors: Pipecat greets and logs there as soon as it is imported."""
    from loguru import logger

    if not debug:
        logger.remove()
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr and sys.stderr.isatty() else "1")


def _complain(error: Exception, code: int, debug: bool, hint: str = "") -> int:
    if debug:
        traceback.print_exception(error)
    message = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, TTSError):
        message = f"{type(error).__name__}: {message}"
    print(f"{cli_parser.PROGRAM}: {message}{hint}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
