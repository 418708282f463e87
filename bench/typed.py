"""A text in, its pieces as a language model would write them out, at so many tokens a second."""

import asyncio
import re
import time
from collections.abc import AsyncIterator

_TOKEN = re.compile(r"\s*[^\W_]+|\s*[^\w\s]|\s*_|\s+")


def tokens(text: str) -> list[str]:
    """Words with the space before them, and punctuation marks: about what a language model's tokens are in English."""
    return _TOKEN.findall(text)


async def typed(text: str, rate: float | None) -> AsyncIterator[str]:
    """Yield tokens, the first at once and the others on a fixed beat of `rate` a second; None: the whole text at once.

    Late consumers do not shift the beat.
    """
    if rate is None:
        yield text
        return
    began = time.perf_counter()
    for number, token in enumerate(tokens(text)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        yield token
