"""What the Pipecat services share: their settings, languages and error categories in Pipecat's terms.

Knows neither a Backend nor a pipeline.
"""

from dataclasses import dataclass, field
from typing import Any

from pipecat.services.settings import TTSSettings
from pipecat.transcriptions.language import Language
from pipecat.utils.errors import ErrorCategory
from pipecat.utils.types import NOT_GIVEN, NotGiven

from pipecat_qwen3.backend import Layout
from pipecat_qwen3.errors import (
    BackendError,
    BadRequestError,
    CheckpointError,
    ConnectionFailedError,
    DownloadError,
    OverloadedError,
    TextTimeoutError,
    TTSError,
    UnauthorizedError,
    UnknownNameError,
)

LANGUAGES: dict[str, str] = {
    Language.ZH: "chinese",
    Language.EN: "english",
    Language.FR: "french",
    Language.DE: "german",
    Language.IT: "italian",
    Language.JA: "japanese",
    Language.KO: "korean",
    Language.PT: "portuguese",
    Language.RU: "russian",
    Language.ES: "spanish",
}
"""Pipecat's codes for the names the checkpoints use; a regional code speaks its base language."""

_BY_NAME = {name: language for language, name in LANGUAGES.items()}

CATEGORIES: tuple[tuple[type[TTSError], ErrorCategory], ...] = (
    (UnknownNameError, ErrorCategory.INVALID_REQUEST),
    (BadRequestError, ErrorCategory.APPLICATION),
    (TextTimeoutError, ErrorCategory.APPLICATION),
    (OverloadedError, ErrorCategory.RATE_LIMIT),
    (DownloadError, ErrorCategory.CONNECTIVITY),
    (ConnectionFailedError, ErrorCategory.CONNECTIVITY),
    (UnauthorizedError, ErrorCategory.AUTHENTICATION),
    (CheckpointError, ErrorCategory.INVALID_REQUEST),
    (BackendError, ErrorCategory.INVALID_REQUEST),
    (TTSError, ErrorCategory.SERVER),
)
"""What each error means to Pipecat, the special before the general. INVALID_REQUEST holds until a setting changes."""


@dataclass
class Qwen3TTSSettings(TTSSettings):
    """What may change while the bot talks; a change acts from the next sentence, or in TOKEN mode the next token, on.

    None means: what the checkpoint's own files say.

    Parameters:
        model: What to load when the service is made; a change at runtime is refused with a warning.
        voice: A speaker of the checkpoint.
        language: A Pipecat `Language`, the model's own name for one ("german"), or "auto".
        instruct: How to speak, in words; refused by checkpoints that take no instructions.
        seed: Seed of every utterance's own random stream; None draws one for each.
        temperature: Sampling temperature of the first codebook.
        top_k: Keep so many most likely codes.
        top_p: Keep the most likely codes up to this probability mass.
        repetition_penalty: Divides the logits of codes already spoken.
        layout: "whole" reads a sentence before it speaks, "streaming" takes one text token a frame.
    """

    instruct: str | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    seed: int | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    temperature: float | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    top_k: int | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    top_p: float | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    repetition_penalty: float | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    layout: Layout | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)


SPOKEN_SETTINGS = (
    "voice",
    "language",
    "instruct",
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "layout",
)
"""The settings that go into a Request under the same name."""


def as_pipecat_language(language: Any) -> Any:
    """Turn the model's own name into Pipecat's code, which also tells the base how to cut sentences."""
    return _BY_NAME.get(language.lower(), language) if isinstance(language, str) else language
