"""Audio in, words out: speech recognisers, and how many words two sentences differ by.

A recogniser is a function of one utterance alone: what it heard before changes nothing, so utterances can be heard in
any order, in pieces, and once for all comparisons.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np

RATE = 16_000
"""Samples a second of what recognisers hear."""

Hear = Callable[[np.ndarray], str]
"""Audio [samples] in [-1, 1] at 16 kHz in, what was understood out."""

HearAll = Callable[[Iterable[np.ndarray]], list[str]]

SAME = {"dr": "doctor", "mr": "mister", "mrs": "missus", "ok": "okay", "colour": "color", "grey": "gray"}


def words_of(text: str) -> list[str]:
    """Words as they are compared: lower case, one spelling."""
    found: list[str] = re.findall(r"[a-z']+", text.lower().replace("’", "'").replace(".m.", "m"))
    bare = [word.strip("'") for word in found]
    return [SAME.get(word, word) for word in bare if word]


def word_errors(wanted: Sequence[str], heard: Sequence[str]) -> int:
    """Fewest substitutions, insertions and deletions that turn one into the other (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def sphinx() -> Hear:
    """pocketsphinx, whose English model comes inside its wheel."""
    from pocketsphinx import Decoder

    # By default it subtracts a mean spectrum that it carries over from the utterances before, and searches so widely
    # that babble takes it many times its length; the narrower search takes a third less time and errs as often.
    decoder = Decoder(samprate=RATE, cmn="batch", maxhmmpf=3000, maxwpf=20, loglevel="FATAL")

    def hear(audio: np.ndarray) -> str:
        padded = np.pad(audio, (3200, 4800)) * 32767
        padded += np.random.RandomState(0).randint(-4, 5, len(padded))  # digital silence confuses its noise level
        decoder.start_utt()
        decoder.process_raw(np.clip(padded, -32768, 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return found.hypstr if found else ""

    return hear


def whisper(model: str = "small.en") -> Hear:
    """faster-whisper with a model's name or folder: it errs less than pocketsphinx.

    Numbers are heard as words, since that is how sentences are compared. Exits with one line if something is missing.
    """
    try:
        from faster_whisper import WhisperModel  # type: ignore[import-not-found]
    except ImportError:
        raise SystemExit("--asr whisper needs faster-whisper; run: pip install 'pipecat-qwen3[asr]'") from None
    try:
        recogniser = WhisperModel(model)
    except Exception as error:  # of the hub, of the network, of CTranslate2
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SystemExit(
            f"the whisper model {model} cannot be had ({why}); go online once, or name its folder with --whisper"
        ) from None
    symbols = sorted(i for token, i in recogniser.hf_tokenizer.get_vocab().items() if re.search(r"[0-9%$£€]", token))

    def hear(audio: np.ndarray) -> str:
        segments, _ = recogniser.transcribe(
            audio.astype(np.float32), language="en", suppress_tokens=[-1, *symbols], without_timestamps=True
        )
        return " ".join(segment.text.strip() for segment in segments)

    return hear


@contextmanager
def sphinxes(count: int) -> Iterator[HearAll]:
    """pocketsphinx in so many processes, or in this one if it is one."""
    if count == 1:
        hear = sphinx()
        yield lambda audio: [hear(one) for one in audio]
        return
    with get_context("spawn").Pool(count, _begin) as pool:  # a fork would copy the engine's locks without its thread
        yield lambda audio: pool.map(_hear, audio, chunksize=4)


_HEAR: list[Hear] = []
"""The recogniser of a process of `sphinxes`."""


def _begin() -> None:
    _HEAR.append(sphinx())


def _hear(audio: np.ndarray) -> str:
    return _HEAR[0](audio)
