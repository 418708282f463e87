"""A checkpoint's JSON files as frozen dataclasses: every size, special id, speaker and language, nothing assumed.

The class defaults of the official code are not those of the published checkpoints, so a missing key is an error
that names it, never a default. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megakernel.shape import SUPPRESSED, Shape, StackShape
from pipecat_qwen3.errors import CheckpointError
from pipecat_qwen3.files import Keys, read_json

VARIANTS = ("custom_voice", "voice_design", "base")

SAMPLE_RATE, FRAME_SAMPLES = 24_000, 1_920
"""Of every 12 Hz codec; what backend.py promises to its callers."""


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


def read_model_config(folder: Path) -> ModelConfig:
    """Read config.json and generation_config.json of a checkpoint folder. Raises CheckpointError."""
    top = read_json(folder / "config.json")
    if top.values.get("model_type") != "qwen3_tts":
        raise CheckpointError(
            f"{top.file}: model_type should be 'qwen3_tts', but is {top.values.get('model_type')!r:.60}; "
            "choose a Qwen3-TTS-12Hz checkpoint"
        )
    if top("tts_model_type", str) not in VARIANTS:
        raise top.wrong("tts_model_type", f"one of {', '.join(VARIANTS)}")
    talker = top.at("talker_config")
    shape, text_vocab = _shape(talker, talker.at("code_predictor_config")), talker.integer("text_vocab_size")

    def text(key: str) -> int:
        return top.integer(key, 0, text_vocab - 1)

    def codec(key: str) -> int:
        return talker.integer(key, 0, shape.vocab - 1)

    languages, speakers = talker.ids("codec_language_id", shape.vocab), talker.ids("spk_id", shape.vocab)
    return ModelConfig(
        variant=top("tts_model_type", str),
        size=top("tts_model_size", str),
        shape=shape,
        text_hidden=talker.integer("text_hidden_size"),
        text_vocab=text_vocab,
        ids=SpecialIds(
            im_start=text("im_start_token_id"),
            im_end=text("im_end_token_id"),
            assistant=text("assistant_token_id"),
            tts_pad=text("tts_pad_token_id"),
            tts_bos=text("tts_bos_token_id"),
            tts_eos=text("tts_eos_token_id"),
            codec_pad=codec("codec_pad_id"),
            codec_bos=codec("codec_bos_id"),
            codec_eos=codec("codec_eos_token_id"),
            think=codec("codec_think_id"),
            nothink=codec("codec_nothink_id"),
            think_bos=codec("codec_think_bos_id"),
            think_eos=codec("codec_think_eos_id"),
        ),
        speakers=speakers,
        default_speaker=_default_speaker(top, speakers),
        dialects=_dialects(talker, languages),
        languages={k: v for k, v in languages.items() if "dialect" not in k},
        dialect_ids={k: v for k, v in languages.items() if "dialect" in k},
        generation=_generation(read_json(folder / "generation_config.json")),
    )


def _default_speaker(top: Keys, speakers: Mapping[str, int]) -> str | None:
    if "default_speaker" not in top.values:
        return next(iter(speakers), None)
    if (name := top("default_speaker", str)) not in speakers:
        raise top.wrong("default_speaker", "one of the names in talker_config.spk_id")
    return name


def _dialects(talker: Keys, languages: Mapping[str, int]) -> dict[str, str]:
    """Speaker -> dialect, of those who speak one; the file says false for the others."""
    values = talker("spk_is_dialect", dict)
    if not all(dialect is False or (isinstance(dialect, str) and dialect in languages) for dialect in values.values()):
        raise talker.wrong("spk_is_dialect", "an object of speakers and false, or a name in codec_language_id")
    return {speaker: dialect for speaker, dialect in values.items() if dialect}


def _shape(talker: Keys, predictor: Keys) -> Shape:
    talker_stack, predictor_stack = _stack(talker), _stack(predictor)
    codebooks, codes = talker.integer("num_code_groups", 2, 256), predictor.integer("vocab_size")
    if predictor.integer("num_code_groups") != codebooks:
        raise predictor.wrong("num_code_groups", f"{codebooks}, as in talker_config")
    vocab = talker.integer("vocab_size", SUPPRESSED + 1)
    if vocab - SUPPRESSED > codes:
        raise talker.wrong("vocab_size", f"at most {codes + SUPPRESSED}, the predictor's codes and {SUPPRESSED} others")
    return Shape(
        talker=talker_stack,
        predictor=predictor_stack,
        codebooks=codebooks,
        codes=codes,
        vocab=vocab,
        eos=talker.integer("codec_eos_token_id", 0, vocab - 1),
        projected=talker_stack.hidden != predictor_stack.hidden,
    )


def _stack(keys: Keys) -> StackShape:
    _as_computed(keys)
    keys.only("use_sliding_window", False)
    heads, kv_heads, head_dim = _heads(keys)
    return StackShape(
        layers=keys.integer("num_hidden_layers", high=1024),
        hidden=keys.integer("hidden_size"),
        intermediate=keys.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=keys.number("rope_theta"),
        norm_eps=keys.number("rms_norm_eps", 1.0),
    )


def _as_computed(keys: Keys) -> None:
    """Refuse options that would be heard if they were ignored."""
    keys.only("attention_bias", False)
    keys.only("hidden_act", "silu")
    if keys.values.get("rope_scaling") is not None:
        keys.at("rope_scaling").only("rope_type", "default")


def _heads(keys: Keys) -> tuple[int, int, int]:
    """Heads, key-value heads and head_dim, of which each depends on the other two."""
    kv_heads = keys.integer("num_key_value_heads")
    heads, head_dim = keys.integer("num_attention_heads"), keys.integer("head_dim")
    if heads % kv_heads:
        raise keys.wrong("num_attention_heads", f"a multiple of num_key_value_heads, {kv_heads}")
    if head_dim % 2:
        raise keys.wrong("head_dim", "even: rotary embeddings turn pairs")
    return heads, kv_heads, head_dim


def _generation(keys: Keys) -> Generation:
    return Generation(
        do_sample=keys("do_sample", bool),
        temperature=keys.number("temperature", 100),
        top_k=keys.integer("top_k", 0),
        top_p=keys.number("top_p", 1.0),
        repetition_penalty=keys.number("repetition_penalty", 100),
        predictor_do_sample=keys("subtalker_dosample", bool),
        predictor_temperature=keys.number("subtalker_temperature", 100),
        predictor_top_k=keys.integer("subtalker_top_k", 0),
        predictor_top_p=keys.number("subtalker_top_p", 1.0),
    )


def read_codec_config(folder: Path) -> CodecConfig:
    """Read speech_tokenizer/config.json of a checkpoint folder. Raises CheckpointError."""
    top = read_json(folder / "speech_tokenizer" / "config.json")
    if top("model_type", str) != "qwen3_tts_tokenizer_12hz":
        raise top.wrong("model_type", '"qwen3_tts_tokenizer_12hz"')
    keys = top.at("decoder_config")
    _as_computed(keys)
    keys.only("num_semantic_quantizers", 1)
    heads, kv_heads, head_dim = _heads(keys)
    config = CodecConfig(
        codebooks=keys.integer("num_quantizers", 2, 256),
        codebook_size=keys.integer("codebook_size"),
        codebook_dim=keys.integer("codebook_dim", 2),
        latent=keys.integer("latent_dim"),
        hidden=keys.integer("hidden_size"),
        intermediate=keys.integer("intermediate_size"),
        layers=keys.integer("num_hidden_layers", high=1024),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=keys.integer("sliding_window"),
        rope_theta=keys.number("rope_theta"),
        norm_eps=keys.number("rms_norm_eps", 1.0),
        decoder_dim=keys.integer("decoder_dim"),
        upsample_rates=keys.integers("upsample_rates", high=FRAME_SAMPLES),
        upsampling_ratios=keys.integers("upsampling_ratios", high=FRAME_SAMPLES),
        sample_rate=top.integer("output_sample_rate"),
    )
    if config.sample_rate != SAMPLE_RATE:
        raise top.wrong("output_sample_rate", f"{SAMPLE_RATE}, as in every 12 Hz codec")
    if top.integer("decode_upsample_rate") != FRAME_SAMPLES:
        raise top.wrong("decode_upsample_rate", f"{FRAME_SAMPLES}, as in every 12 Hz codec")
    if config.frame_samples != FRAME_SAMPLES:
        raise keys.wrong("upsample_rates", f"such that all rates and ratios multiply to {FRAME_SAMPLES}")
    if config.codebook_dim % 2:
        raise keys.wrong("codebook_dim", "even: an entry is half as wide")
    if config.decoder_dim % 2 ** len(config.upsample_rates):
        raise keys.wrong("decoder_dim", "such that each of upsample_rates can halve it")
    return config
