"""The errors a caller may meet, as one tree; every message says what was wanted, what came, and what to do.

TTSError                    anything this package reports; `code` is stable and travels over the wire
├── BadRequestError         this text or parameter is at fault, not the service
│   └── UnknownNameError    a voice, language, model or option that does not exist
├── CheckpointError         a model folder or file that cannot be used
│   └── DownloadError       a model that could not be fetched (offline, gated, not found)
├── BackendError            a device, dtype or kernel launcher asked for by name that cannot be had
├── OverloadedError         no room: try again later
├── TextTimeoutError        a text stream that stopped sending and never ended
└── EngineError             the engine failed or was closed while a voice was speaking
"""

import signal
import sys
from collections.abc import Callable


class TTSError(Exception):
    """Anything this package reports. `code` is stable; the message is one line for a person."""

    code = "internal"


class BadRequestError(TTSError):
    """This text or parameter is at fault, not the service."""

    code = "bad_request"


class UnknownNameError(BadRequestError):
    """A voice, language, model or option that does not exist here."""

    code = "unknown_name"


class CheckpointError(TTSError):
    """A model folder or file that cannot be used."""

    code = "checkpoint"


class DownloadError(CheckpointError):
    """A model that could not be fetched."""

    code = "download"


class BackendError(TTSError):
    """A device, dtype or kernel launcher, asked for by name, that cannot be had on this machine."""

    code = "backend"


class OverloadedError(TTSError):
    """No room for another voice now."""

    code = "overloaded"


class TextTimeoutError(TTSError):
    """A text stream stopped sending and never said that it had ended."""

    code = "text_timeout"


class ConnectionFailedError(TTSError):
    """The server cannot be reached, or the connection broke while a voice was speaking."""

    code = "connection"


class UnauthorizedError(TTSError):
    """The server wants another API key."""

    code = "unauthorized"


class EngineError(TTSError):
    """The engine failed, or was closed, while a voice was speaking."""

    code = "engine"


def choices(names: object, limit: int = 12) -> str:
    """The first names of a collection as 'a, b, c' for an error message."""
    listed = [str(n) for n in names]  # type: ignore[attr-defined]
    more = f", … ({len(listed)} in all)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more if listed else "none"


def program(main: Callable[[], object]) -> None:
    """Run a program's `main`: a TTSError is one line for a person and exit status 1, Ctrl-C is quiet and status 130."""
    try:
        main()
    except TTSError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
