"""Text, voice, language and instruction in; embeddings for the talker out, in the official layouts.

Every position of a prompt is a projected text embedding, a codec item, or their sum:

    [instruction]                       <|im_start|>user\\n{instruct}<|im_end|>\\n
    role                                <|im_start|>assistant\\n
    PAD + c  for the codec items c      (nothink, think_bos, think_eos) for language auto, else
                                        (think, think_bos, language, think_eos); then the speaker, if there is one
    BOS + codec_pad
    whole layout:      text_i + codec_pad …, EOS + codec_pad;   pending codec_bos, every later frame adds PAD
    streaming layout:  nothing more;                            pending codec_bos, frames add text_0, …, EOS, PAD

The last prompt position of the official code is `pending` plus its text embedding: it is the first frame's input here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipecat_qwen3.backend import Layout
from pipecat_qwen3.config import ModelConfig
from pipecat_qwen3.errors import BadRequestError, UnknownNameError, choices

AUTO = "auto"


@dataclass(frozen=True)
class Voice:
    """Who speaks, in what language, and how: what the shared prefix of a prompt depends on.

    speaker      a name of the checkpoint, or None where it has none
    language     a name of the checkpoint, a dialect, or "auto"
    instruct     or None
    """

    speaker: str | None
    language: str
    instruct: str | None


@dataclass(frozen=True)
class Prompt:
    """What an utterance starts from.

    shared    [n, H]   leading positions that depend on the Voice alone: their KV is cached
    rest      [m, H]   the further prefilled positions (the whole text, or none)
    pending   [H]      the first frame's input without its text embedding
    text      ids that the frames add, one each; afterwards `pad` for ever
    primer    int64 [C, T] codes that the codec decodes, unheard, before the first frame (voice cloning), or None
    """

    shared: Tensor
    rest: Tensor
    pending: Tensor
    text: tuple[int, ...]
    primer: Tensor | None = None

    @property
    def positions(self) -> int:
        """Prefilled positions, P - 1."""
        return self.shared.shape[0] + self.rest.shape[0]


def resolve_voice(config: ModelConfig, voice: str | None, language: str | None, instruct: str | None) -> Voice:
    """Check a request's names against the checkpoint, ignoring case. Raises UnknownNameError or BadRequestError."""
    if config.variant == "base":
        raise BadRequestError(
            "a Base checkpoint speaks in the voice of reference audio, which this version cannot take yet; "
            "use a CustomVoice or VoiceDesign checkpoint"
        )
    speaker = _speaker(config, voice)
    if instruct is not None and not instruct.strip():
        instruct = None
    if instruct and not config.takes_instruct:
        raise BadRequestError(
            f"this checkpoint ({config.variant}, {config.size}) takes no instructions, but one was given; "
            "leave instruct out, or use a 1.7B CustomVoice or VoiceDesign checkpoint"
        )
    if config.variant == "voice_design" and not instruct:
        raise BadRequestError("a VoiceDesign checkpoint needs an instruction that describes the voice; pass instruct")
    if language is None:
        language = next(iter(config.languages)) if len(config.languages) == 1 else AUTO
    language = language.lower()
    if language != AUTO and language not in config.languages:
        raise UnknownNameError(f"no language {language!r}; this checkpoint has {choices([AUTO, *config.languages])}")
    if speaker is not None and speaker in config.dialects and language in (AUTO, "chinese"):
        language = config.dialects[speaker]
    return Voice(speaker, language, instruct)


def _speaker(config: ModelConfig, voice: str | None) -> str | None:
    if not config.speakers:
        if voice is not None:
            raise UnknownNameError(
                f"no voice {voice!r}: a {config.variant} checkpoint has no named voices; leave voice out"
            )
        return None
    if voice is None:
        return config.default_speaker
    for speaker in config.speakers:
        if speaker.lower() == voice.lower():
            return speaker
    raise UnknownNameError(f"no voice {voice!r}; this checkpoint has {choices(config.speakers)}")


class Prompter:
    """Builds prompts from one checkpoint's tables.

    text_table   [text_vocab, H] projected text embeddings; codec_table [V, H]
    """

    def __init__(self, config: ModelConfig, text_table: Tensor, codec_table: Tensor, role: Sequence[int]) -> None:
        self.config, self.text_table, self.codec_table = config, text_table, codec_table
        self.role = list(role)

    def build(self, voice: Voice, instruct_ids: Sequence[int], text: Sequence[int], layout: Layout) -> Prompt:
        """A prompt; `instruct_ids` are those of the whole user turn, or empty; `text` is what is known so far."""
        ids = self.config.ids
        codec = self._codec_items(voice)
        shared = torch.cat(
            [
                self.texts([*instruct_ids, *self.role]),
                self.texts([ids.tts_pad] * (len(codec) - 1) + [ids.tts_bos]) + self.codes(codec),
            ]
        )
        pending = self.codes([ids.codec_bos])[0]
        if layout == "streaming":
            return Prompt(shared, shared[:0], pending, tuple(text))
        rest = self.texts([*text, ids.tts_eos]) + self.codes([ids.codec_pad])
        return Prompt(shared, rest, pending, ())

    def texts(self, ids: Sequence[int]) -> Tensor:
        """Projected text embeddings [n, H]."""
        return self.text_table[torch.tensor(ids, device=self.text_table.device)]

    def codes(self, ids: Sequence[int]) -> Tensor:
        """Codec embeddings [n, H]."""
        return self.codec_table[torch.tensor(ids, device=self.codec_table.device)]

    def _codec_items(self, voice: Voice) -> list[int]:
        """Codec ids of the prefix, codec_pad at the end."""
        config, ids = self.config, self.config.ids
        if voice.language == AUTO:
            items = [ids.nothink, ids.think_bos, ids.think_eos]
        else:
            known = {**config.languages, **config.dialect_ids}
            items = [ids.think, ids.think_bos, known[voice.language], ids.think_eos]
        if voice.speaker is not None:
            items.append(config.speakers[voice.speaker])
        return [*items, ids.codec_pad]
