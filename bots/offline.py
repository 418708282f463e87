"""Ears and a mind for bots that need no key and no download: a recogniser with a grammar, a model that is a script.

Both are ordinary Pipecat services; what they understand and answer is in `bots.script`.
"""

import asyncio
import threading
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise

import numpy as np
import soxr
from pipecat.frames.frames import (
    Frame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    TTSUpdateSettingsFrame,
)
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.llm_service import LLMService
from pipecat.services.settings import LLMSettings, TTSSettings

from bots.local_stt import LocalSTTService
from bots.script import QUESTIONS, reply

RATE = 16_000
"""Samples a second of the acoustic model in pocketsphinx's wheel."""

WITHIN = 1e-4
"""How likely speech is to begin or end within a sentence, or to go on with another one; 1 is what it usually does."""

FIRST_WORD_S, WORD_S = 0.3, 0.02
"""The script takes its time before a reply and then writes a word each 20 ms, as a language model at 50 tokens/s."""


class SphinxSTTService(LocalSTTService):
    """Hears a few sentences and parts of them, within a tenth of a second on a CPU; it is deaf to all others."""

    def __init__(self, *, sentences: Sequence[str] = QUESTIONS) -> None:
        """Listen for these sentences, in English and in small letters."""
        within = partial(hear, sentences=tuple(sentences))
        super().__init__(within, model="pocketsphinx", language="en", ttfs_p99_latency=0.3)


_one_at_a_time = threading.Lock()


def hear(audio: bytes, rate: int, sentences: tuple[str, ...]) -> str:
    """What is said in PCM16 mono, "" if it is none of the sentences. All sessions share one recogniser."""
    samples = soxr.resample(np.frombuffer(audio, np.int16).astype(np.float32), rate, RATE)
    samples += np.random.RandomState(0).randint(-4, 5, len(samples))  # digital silence confuses its noise level
    with _one_at_a_time:
        decoder = _decoder(sentences)
        decoder.start_utt()
        decoder.process_raw(np.clip(samples, -32768, 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
    return found.hypstr if found else ""


@cache
def _decoder(sentences: tuple[str, ...]):
    """A recogniser with a state per word, in which neighbours are neighbours in a sentence.

    Sentences may follow each other. Speech may also begin and end within one, since it is cut at its pauses.
    """
    from pocketsphinx import Decoder

    # It would subtract a mean spectrum that it carries from one utterance, here one caller, to the next.
    decoder = Decoder(samprate=RATE, lm=None, cmn="batch", loglevel="FATAL")
    lines = [line.split() for line in sentences]
    states = {word: number for number, word in enumerate({word: None for line in lines for word in line}, 1)}
    firsts, lasts = {line[0] for line in lines}, {line[-1] for line in lines}
    start, end = 0, len(states) + 1
    steps: list[tuple] = [(start, at, 1.0 if word in firsts else WITHIN, word) for word, at in states.items()]
    steps += [(at, end, 1.0 if word in lasts else WITHIN) for word, at in states.items()]
    pairs = dict.fromkeys([(last, first) for last in lasts for first in firsts], WITHIN)
    pairs.update(dict.fromkeys([pair for line in lines for pair in pairwise(line)], 1.0))
    steps += [(states[one], states[other], odds, other) for (one, other), odds in sorted(pairs.items())]
    decoder.add_fsg("sentences", decoder.create_fsg("sentences", start, end, steps))
    decoder.activate_search("sentences")
    return decoder


class ScriptedLLMService(LLMService):
    """Answers from a script, word by word, in a language model's frames; it says that it is a script."""

    def __init__(self, *, languages: Sequence[str] = ()) -> None:
        """Know the languages that the voice speaks; asked for another one, the script says that it cannot."""
        nothing = dict.fromkeys(
            (
                *("system_instruction", "temperature", "max_tokens", "top_p", "top_k", "seed"),
                *("frequency_penalty", "presence_penalty"),
                *("filter_incomplete_user_turns", "user_turn_completion_config"),
            )
        )
        super().__init__(settings=LLMSettings(model="script", **nothing))
        self._languages = languages

    def can_generate_metrics(self) -> bool:
        """Report the time to the first word."""
        return True

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Answer a context; everything else passes."""
        await super().process_frame(frame, direction)
        if isinstance(frame, LLMContextFrame):
            await self._answer(frame.context)
        else:
            await self.push_frame(frame, direction)

    async def _answer(self, context: LLMContext) -> None:
        said = said_by_user(context)
        if said_last(context) == "assistant":
            said.append("")  # the user spoke, and was not understood
        text, language = reply(said, self._languages)
        await self.push_frame(LLMFullResponseStartFrame())
        await self.start_ttfb_metrics()
        if language:
            await self.push_frame(TTSUpdateSettingsFrame(delta=TTSSettings(language=language)))
        await asyncio.sleep(FIRST_WORD_S)
        for word in text.split():
            await self.stop_ttfb_metrics()
            await self._push_llm_text(f"{word} ")
            await asyncio.sleep(WORD_S)
        await self.push_frame(LLMFullResponseEndFrame())


def said_by_user(context: LLMContext) -> list[str]:
    """The user's messages in a context, oldest first."""
    messages = [message for message in context.get_messages() if isinstance(message, dict)]
    return [str(message.get("content")) for message in messages if message.get("role") == "user"]


def said_last(context: LLMContext) -> str | None:
    """Whose message is the newest; None if there is none."""
    messages = [message for message in context.get_messages() if isinstance(message, dict)]
    return messages[-1].get("role") if messages else None


def warm() -> None:
    """Load the recogniser now rather than when somebody speaks."""
    hear(bytes(RATE // 5), RATE, tuple(QUESTIONS))
