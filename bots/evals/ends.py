"""Ears for Pipecat's eval harness: they hear what the bot says, as long as it is from its script.

The scenarios name `ears` as the `factory` of their `transcription`.
"""

from typing import Any

from bots.offline import SphinxSTTService
from bots.script import everything


def ears(_config: dict[str, Any]) -> SphinxSTTService:
    """Hear what the bot said."""
    return SphinxSTTService(sentences=everything())
