"""A checkpoint's JSON files as frozen dataclasses: every size, special id, speaker and language, nothing assumed.

The class defaults of the official code are not those of the published checkpoints, so a missing key is an error
that names it, never a default. Knows no tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakernel.shape import Shape, StackShape
from pipecat_qwen3.errors import CheckpointError


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the control tokens: first the text side's, then the codec side's."""

    im_start: int
    im_end: int
    assistant: int
    tts_pad: int
    tts_bos: int
    tts_eos: int
    codec_pad: int
    codec_bos: int
    codec_eos: int
    think: int
    nothink: int
    think_bos: int
    think_eos: int


@dataclass(frozen=True)
class Generation:
    """generation_config.json: how the checkpoint wants to be sampled. `predictor_*` are the files' `subtalker_*`."""

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    predictor_do_sample: bool
    predictor_temperature: float
    predictor_top_k: int
    predictor_top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class ModelConfig:
    """config.json and generation_config.json of one checkpoint.

    variant    "custom_voice" | "voice_design" | "base"
    size       "0b6" | "1b7": a 0.6B checkpoint ignores instructions
    speakers   name -> codec id; dialects: speaker -> language that replaces Chinese and auto
    default_speaker  our own optional key of config.json; else the first speaker; None where there are none
    languages  name -> codec id, dialects left out (they are no languages of a request)
    """

    variant: str
    size: str
    shape: Shape
    text_hidden: int
    text_vocab: int
    ids: SpecialIds
    speakers: Mapping[str, int]
    default_speaker: str | None
    dialects: Mapping[str, str]
    languages: Mapping[str, int]
    dialect_ids: Mapping[str, int]
    generation: Generation

    @property
    def takes_instruct(self) -> bool:
        """The official code drops instructions silently where this is False."""
        return self.variant == "voice_design" or (self.variant == "custom_voice" and self.size != "0b6")


@dataclass(frozen=True)
class CodecConfig:
    """decoder_config of speech_tokenizer/config.json: the causal decoder from codes to 24 kHz samples."""

    codebooks: int
    codebook_size: int
    codebook_dim: int
    latent: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    rope_theta: float
    norm_eps: float
    decoder_dim: int
    upsample_rates: tuple[int, ...]
    upsampling_ratios: tuple[int, ...]
    sample_rate: int

    @property
    def frame_samples(self) -> int:
        """Samples of one frame: the product of all upsampling factors (1920 in the 12 Hz codec)."""
        product = 1
        for rate in (*self.upsample_rates, *self.upsampling_ratios):
            product *= rate
        return product


class Keys:
    """A JSON object whose missing or mistyped keys are errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __call__(self, key: str, kind: type = int) -> Any:
        """The value of `key`, of type `kind`; float takes integers too."""
        if key not in self.values:
            raise CheckpointError(f"{self.where} has no key {key!r}; this is not a Qwen3-TTS-12Hz checkpoint's file")
        value = self.values[key]
        ok = isinstance(value, (int, float) if kind is float else kind) and not (kind is int and value is True)
        if not ok:
            raise CheckpointError(f"{self.where}: {key} should be of type {kind.__name__}, but is {value!r}")
        return kind(value)

    def at(self, key: str) -> "Keys":
        """The object under `key`."""
        return Keys(self(key, dict), f"{self.where}: {key}")


def read_json(path: Path) -> Keys:
    """Read a JSON object; raises CheckpointError if the file is missing, no JSON, or no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a Qwen3-TTS-12Hz checkpoint folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; download the checkpoint again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} should hold a JSON object, but holds a {type(values).__name__}")
    return Keys(values, str(path))


def read_model_config(folder: Path) -> ModelConfig:
    """Read config.json and generation_config.json of a checkpoint folder. Raises CheckpointError."""
    top = read_json(folder / "config.json")
    kind = top.values.get("model_type")
    if kind != "qwen3_tts":
        raise CheckpointError(f"{top.where}: model_type should be 'qwen3_tts', but is {kind!r}; is this a TTS checkpoint?")
    talker = top.at("talker_config")
    predictor = talker.at("code_predictor_config")
    shape = _shape(talker, predictor)
    languages: dict[str, int] = talker("codec_language_id", dict)
    speakers: dict[str, int] = talker("spk_id", dict)
    dialects = {k: v for k, v in talker("spk_is_dialect", dict).items() if isinstance(v, str)}
    default = top.values.get("default_speaker", next(iter(speakers), None))
    if default is not None and default not in speakers:
        raise CheckpointError(f"{top.where}: default_speaker is {default!r}, which spk_id does not have")
    return ModelConfig(
        variant=top("tts_model_type", str),
        size=top("tts_model_size", str),
        shape=shape,
        text_hidden=talker("text_hidden_size"),
        text_vocab=talker("text_vocab_size"),
        ids=SpecialIds(
            im_start=top("im_start_token_id"),
            im_end=top("im_end_token_id"),
            assistant=top("assistant_token_id"),
            tts_pad=top("tts_pad_token_id"),
            tts_bos=top("tts_bos_token_id"),
            tts_eos=top("tts_eos_token_id"),
            codec_pad=talker("codec_pad_id"),
            codec_bos=talker("codec_bos_id"),
            codec_eos=talker("codec_eos_token_id"),
            think=talker("codec_think_id"),
            nothink=talker("codec_nothink_id"),
            think_bos=talker("codec_think_bos_id"),
            think_eos=talker("codec_think_eos_id"),
        ),
        speakers=speakers,
        default_speaker=default,
        dialects=dialects,
        languages={k: v for k, v in languages.items() if "dialect" not in k},
        dialect_ids={k: v for k, v in languages.items() if "dialect" in k},
        generation=_generation(read_json(folder / "generation_config.json")),
    )


def _shape(talker: Keys, predictor: Keys) -> Shape:
    talker_stack, predictor_stack = _stack(talker), _stack(predictor)
    codebooks, vocab = talker("num_code_groups"), talker("vocab_size")
    if codebooks < 2:
        raise CheckpointError(f"{talker.where}: num_code_groups should be at least 2, but is {codebooks}")
    return Shape(
        talker=talker_stack,
        predictor=predictor_stack,
        codebooks=codebooks,
        codes=predictor("vocab_size"),
        vocab=vocab,
        eos=talker("codec_eos_token_id"),
        projected=talker_stack.hidden != predictor_stack.hidden,
    )


def _stack(keys: Keys) -> StackShape:
    if keys.values.get("attention_bias"):
        raise CheckpointError(f"{keys.where}: attention_bias is true; Qwen3-TTS talkers have no attention biases")
    stack = StackShape(
        layers=keys("num_hidden_layers"),
        hidden=keys("hidden_size"),
        intermediate=keys("intermediate_size"),
        heads=keys("num_attention_heads"),
        kv_heads=keys("num_key_value_heads"),
        head_dim=keys("head_dim"),
        rope_theta=keys("rope_theta", float),
        norm_eps=keys("rms_norm_eps", float),
    )
    if stack.kv_heads < 1 or stack.heads % stack.kv_heads or stack.head_dim % 2:
        raise CheckpointError(
            f"{keys.where}: {stack.heads} heads, {stack.kv_heads} key-value heads, head_dim {stack.head_dim} do not fit: "
            "heads must be a multiple of key-value heads and head_dim even"
        )
    return stack


def _generation(keys: Keys) -> Generation:
    return Generation(
        do_sample=keys("do_sample", bool),
        temperature=keys("temperature", float),
        top_k=keys("top_k"),
        top_p=keys("top_p", float),
        repetition_penalty=keys("repetition_penalty", float),
        predictor_do_sample=keys("subtalker_dosample", bool),
        predictor_temperature=keys("subtalker_temperature", float),
        predictor_top_k=keys("subtalker_top_k"),
        predictor_top_p=keys("subtalker_top_p", float),
        max_new_tokens=keys("max_new_tokens"),
    )


def read_codec_config(folder: Path) -> CodecConfig:
    """Read speech_tokenizer/config.json of a checkpoint folder. Raises CheckpointError."""
    top = read_json(folder / "speech_tokenizer" / "config.json")
    if top.values.get("model_type") != "qwen3_tts_tokenizer_12hz":
        raise CheckpointError(
            f"{top.where}: model_type should be 'qwen3_tts_tokenizer_12hz', but is {top.values.get('model_type')!r}"
        )
    keys = top.at("decoder_config")
    config = CodecConfig(
        codebooks=keys("num_quantizers"),
        codebook_size=keys("codebook_size"),
        codebook_dim=keys("codebook_dim"),
        latent=keys("latent_dim"),
        hidden=keys("hidden_size"),
        intermediate=keys("intermediate_size"),
        layers=keys("num_hidden_layers"),
        heads=keys("num_attention_heads"),
        kv_heads=keys("num_key_value_heads"),
        head_dim=keys("head_dim"),
        window=keys("sliding_window"),
        rope_theta=keys("rope_theta", float),
        norm_eps=keys("rms_norm_eps", float),
        decoder_dim=keys("decoder_dim"),
        upsample_rates=tuple(keys("upsample_rates", list)),
        upsampling_ratios=tuple(keys("upsampling_ratios", list)),
        sample_rate=top("output_sample_rate"),
    )
    if config.frame_samples != top("decode_upsample_rate"):
        raise CheckpointError(
            f"{top.where}: decode_upsample_rate is {top('decode_upsample_rate')}, but the decoder's rates multiply to "
            f"{config.frame_samples}"
        )
    return config
