"""Text as the language model writes it in, utterances out: one reply of TOKEN mode.

A reply is one utterance, and another one wherever a setting changes. Knows no pipeline.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from pipecat_qwen3.backend import Stream

Item = TypeVar("Item")

Speak = Callable[[AsyncIterator[str], dict[str, Any]], Stream]
"""Starts an utterance of text that is still being written, with settings under a Request's names."""


class Reply:
    """One context while its text comes."""

    def __init__(self, speak: Speak) -> None:
        self.text = ""
        """All of it so far."""
        self._speak = speak
        self._settings: dict[str, Any] | None = None
        self._unspeakable = ""
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._streams: asyncio.Queue[Stream | None] = asyncio.Queue()
        self._over = False

    def feed(self, piece: str, settings: dict[str, Any]) -> None:
        """Take in more text, to be spoken with these settings. Raises TTSError if no utterance can be started.

        What comes before the first letter or digit waits for it; without one there is nothing to speak.
        """
        if self._over:
            return
        self.text += piece
        if self._settings is None and not any(character.isalnum() for character in piece):
            self._unspeakable += piece
            return
        if self._settings != settings:
            self._pieces.put_nowait(None)
            self._pieces = asyncio.Queue()
            self._streams.put_nowait(self._speak(_until_none(self._pieces), settings))
            self._settings = settings
        self._pieces.put_nowait(self._unspeakable + piece)
        self._unspeakable = ""

    def end(self) -> None:
        """No more text will come, or nobody wants more; idempotent."""
        if not self._over:
            self._over = True
            self._pieces.put_nowait(None)
            self._streams.put_nowait(None)

    def streams(self) -> AsyncIterator[Stream]:
        """The utterances in order, until the reply is over."""
        return _until_none(self._streams)


async def _until_none(queue: "asyncio.Queue[Item | None]") -> AsyncIterator[Item]:
    while (item := await queue.get()) is not None:
        yield item
