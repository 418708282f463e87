"""Shards in, batches of training rows out: one row is a prompt and its speech in one of the two text layouts.

A row is the sequence of the talker's inputs as pipecat_qwen3.prompt builds them, teacher-forced: position p holds a
text id, perhaps a codec id, perhaps the codes of the frame before, and perhaps the label of the frame to come.
Knows no weights.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pipecat_qwen3.backend import Layout
from pipecat_qwen3.config import ModelConfig
from training.flite import VOICES
from training.steps import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO_SHARE = 0.15
"""Share of rows whose prompt leaves the language open."""

DROPOUT_SHARE, DROPOUT = 0.35, 0.12
"""Share of texts whose words are cut into smaller pieces, and of the merges that these lose (BPE dropout): an unseen
word is cut where no word of the texts was, so its pieces must be known from other company."""


class Utterance(NamedTuple):
    """A text and its speech.

    text; ids, token_words [tokens]: tokens and the word that each belongs to; codes [n,8], phones [n,4], words [n]
    """

    text: str
    ids: list[int]
    token_words: list[int]
    codes: Tensor
    phones: Tensor
    words: Tensor
    voice: int


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to T positions and N frames; -1 means: none (-100 in labels, -2 in token_words).

    text, codec [B,T]   ids of the two embeddings that are summed
    frame, target [B,T] index of the frame whose codes are this position's input, and of the one it must predict
    label [B,T]         code 0 of the target frame, or end of speech
    token_words [B,T]   word of the text token at this position
    codes [B,N,8], phones [B,N,4], words [B,N]
    """

    text: Tensor
    codec: Tensor
    frame: Tensor
    target: Tensor
    label: Tensor
    token_words: Tensor
    codes: Tensor
    phones: Tensor
    words: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        return Batch(**{name: x.to(device, non_blocking=True) for name, x in vars(self).items()})


def tokens_and_words(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], dropout: float | None = None
) -> list[tuple[list[int], list[int]]]:
    """Ids of each text and, for each id, the index of its whitespace-separated word; merges are lost by chance."""
    if not texts:
        return []
    tokenizer.backend_tokenizer.model.dropout = dropout  # type: ignore[attr-defined]
    encoded = tokenizer(list(texts), return_offsets_mapping=True)
    tokenizer.backend_tokenizer.model.dropout = None  # type: ignore[attr-defined]
    found = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):  # type: ignore[arg-type]
        beginnings = [match.start() for match in re.finditer(r"\S+", text)]
        found.append((ids, [bisect_left(beginnings, end) - 1 for _, end in offsets]))
    return found


def read_utterances(paths: Sequence[Path], tokenizer: "PreTrainedTokenizerBase") -> list[Utterance]:
    """All utterances of some shards, without their waves, cut as when they are spoken."""
    utterances = []
    for path in paths:
        shard = load(path, ("texts", "codes"), "data with --codebooks", mmap=True)
        lengths = shard["frames"].tolist()
        columns = [torch.split(shard[name].clone(), lengths) for name in ("codes", "phones", "words")]
        texts, voices = shard["texts"], shard["voices"].tolist()
        cuts = tokens_and_words(tokenizer, texts)
        for text, (ids, token_words), voice, codes, phones, words in zip(texts, cuts, voices, *columns, strict=True):
            utterances.append(Utterance(text, ids, token_words, codes, phones, words, voice))
    return utterances


def recut(utterances: Sequence[Utterance], tokenizer: "PreTrainedTokenizerBase", rng: random.Random) -> list[Utterance]:
    """The same utterances, of which `DROPOUT_SHARE`, drawn anew in each pass, have lost merges."""
    some = sorted(rng.sample(range(len(utterances)), round(DROPOUT_SHARE * len(utterances))))
    cuts = tokens_and_words(tokenizer, [utterances[index].text for index in some], DROPOUT)
    found = list(utterances)
    for index, (ids, words) in zip(some, cuts, strict=True):
        found[index] = utterances[index]._replace(ids=ids, token_words=words)
    return found


def row(config: ModelConfig, utterance: Utterance, layout: Layout, auto: bool) -> dict[str, list[int]]:
    """The lists of Batch for one utterance: text, codec, frame, target, label, token_words, all of one length."""
    ids, count = config.ids, len(utterance.codes)
    language = [ids.nothink, ids.think_bos, ids.think_eos]
    if not auto:
        language = [ids.think, ids.think_bos, config.languages["english"], ids.think_eos]
    prefix = [*language, config.speakers[VOICES[utterance.voice]], ids.codec_pad]
    role = [ids.im_start, ids.assistant, NEWLINE]
    text = [*role, *[ids.tts_pad] * (len(prefix) - 1), ids.tts_bos]
    codec = [-1] * len(role) + prefix
    begin = len(text)
    if layout == "whole":
        text += [*utterance.ids, ids.tts_eos, ids.tts_pad]
        codec += [ids.codec_pad] * (len(utterance.ids) + 1) + [ids.codec_bos]
        following = [ids.tts_pad] * count
    else:
        text += utterance.ids[:1]
        codec += [ids.codec_bos]
        following = [*utterance.ids[1:], ids.tts_eos, *[ids.tts_pad] * count][:count]
    start = len(text) - 1
    text, codec = text + following, codec + [-1] * count
    token_words = [-2] * begin + utterance.token_words
    return {
        "text": text,
        "codec": codec,
        "frame": [-1] * (start + 1) + list(range(count)),
        "target": [-1] * start + [*range(count), -1],
        "label": [-100] * start + [*utterance.codes[:, 0].tolist(), ids.codec_eos],
        "token_words": (token_words + [-2] * len(text))[: len(text)],
    }


NEWLINE = 198
"""Id of a newline in every byte-level vocabulary of GPT-2's alphabet: the end of the role's line."""

_PADDING = {"text": 0, "codec": -1, "frame": -1, "target": -1, "label": -100, "token_words": -2}


class Choice(NamedTuple):
    """An utterance as it is to be taught: in which text layout, and whether the prompt leaves the language open."""

    utterance: Utterance
    layout: Layout
    auto: bool


def collate(config: ModelConfig, choices: Sequence[Choice]) -> Batch:
    """Rows side by side."""
    rows = [row(config, *choice) for choice in choices]
    utterances = [choice.utterance for choice in choices]
    width = max(len(r["text"]) for r in rows)
    frames = max(len(u.codes) for u in utterances)
    columns = {
        name: torch.tensor([r[name] + [padding] * (width - len(r[name])) for r in rows])
        for name, padding in _PADDING.items()
    }
    codes = torch.zeros(len(rows), frames, utterances[0].codes.shape[1], dtype=torch.long)
    phones = torch.zeros(len(rows), frames, 4, dtype=torch.long)
    words = torch.full((len(rows), frames), -1)
    for index, utterance in enumerate(utterances):
        count = len(utterance.codes)
        codes[index, :count] = utterance.codes
        phones[index, :count] = utterance.phones
        words[index, :count] = utterance.words
    return Batch(**columns, codes=codes, phones=phones, words=words)


def plan(utterances: Sequence[Utterance], positions: int, rng: random.Random) -> list[list[Choice]]:
    """One pass in random order as groups for `collate`: rows of like length, at most `positions` positions together."""
    order = list(utterances)
    rng.shuffle(order)
    pool, groups = max(1024, positions // 2), []
    for begin in range(0, len(order), pool):
        current: list[list[Choice]] = [[]]
        for utterance in sorted(order[begin : begin + pool], key=lambda u: len(u.codes) + len(u.ids)):
            length = len(utterance.codes) + len(utterance.ids) + 12
            if current[-1] and length * (len(current[-1]) + 1) > positions:
                current.append([])
            current[-1].append(Choice(utterance, rng.choice(("whole", "streaming")), rng.random() < AUTO_SHARE))
        rng.shuffle(current)
        groups += current
    return groups
