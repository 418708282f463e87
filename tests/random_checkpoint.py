"""Random Qwen3-TTS-12Hz checkpoints in the official folder layout: a geometry, a variant and a seed in, a folder out.

The official package loads them, and so do we. Every bit comes from NumPy's Philox streams, one a tensor, and exact
arithmetic, so that a seed gives the same checkpoint on every machine; `digest` names it.

    python -m tests.random_checkpoint OUT --variant base --geometry tiny-projected --dtype fp32 --seed 0
"""

import argparse
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.random_shapes import codec_shapes, model_shapes
from tests.random_tokenizer import write_tokenizer

Variant = Literal["custom_voice", "voice_design", "base"]
Geometry = Literal["tiny", "tiny-projected", "0.6b", "1.7b"]
Dtype = Literal["fp32", "bf16"]

LANGUAGES = {
    "chinese": 2055,
    "english": 2050,
    "german": 2053,
    "italian": 2070,
    "portuguese": 2071,
    "spanish": 2054,
    "japanese": 2058,
    "korean": 2064,
    "french": 2061,
    "russian": 2069,
}
DIALECTS = {"beijing_dialect": 2074, "sichuan_dialect": 2062}
SPEAKERS = {
    "serena": 3066,
    "vivian": 3065,
    "uncle_fu": 3010,
    "ryan": 3061,
    "aiden": 2861,
    "ono_anna": 2873,
    "sohee": 2864,
    "eric": 2875,
    "dylan": 2878,
}
SPEAKER_DIALECTS = {"eric": "sichuan_dialect", "dylan": "beijing_dialect"}

GENERATION = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.9,
    "top_p": 1.0,
    "top_k": 50,
    "subtalker_dosample": True,
    "subtalker_temperature": 0.9,
    "subtalker_top_p": 1.0,
    "subtalker_top_k": 50,
    "max_new_tokens": 8192,
}
"""generation_config.json of all published checkpoints, byte for byte when written with indent=2."""


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


TALKER = {
    "tiny": _sizes(64, 96, 3, 4, 2, 32),
    "tiny-projected": _sizes(64, 96, 3, 4, 2, 32),
    "0.6b": _sizes(1024, 3072, 28, 16, 8, 128),
    "1.7b": _sizes(2048, 6144, 28, 16, 8, 128),
}
PREDICTOR = {
    "tiny": _sizes(64, 80, 2, 4, 2, 32),
    "tiny-projected": _sizes(48, 64, 2, 4, 1, 16),
    "0.6b": _sizes(1024, 3072, 5, 16, 8, 128),
    "1.7b": _sizes(1024, 3072, 5, 16, 8, 128),
}
SIZE_NAMES = {"tiny": "0b6", "tiny-projected": "1b7", "0.6b": "0b6", "1.7b": "1b7"}

LAST_CONV_GAIN = 0.015
"""Measured: waveforms have a standard deviation of 0.07 to 0.13 and stay below 0.75 (20 tiny seeds, 2 real ones)."""

EOS_GAIN = 2.0
"""The end-of-speech row of the head is longer than the others, so that random speech ends after some dozen frames."""


def make(
    folder: Path,
    variant: Variant = "custom_voice",
    geometry: Geometry = "tiny",
    dtype: Dtype = "fp32",
    seed: int = 0,
) -> Path:
    """Write a random checkpoint and return its folder, which is created.

    variant   which family: named speakers, a voice described in words, or a voice cloned from audio
    geometry  "tiny" is a small 0.6B (equal widths, no projection, instructions ignored); "tiny-projected" a small 1.7B
              (a narrower code predictor behind small_to_mtp_projection, instructions heard); the others are the
              published sizes (1.8 GB and 3.8 GB in bf16)
    dtype     of the talker's and the speaker encoder's file; the codec's is fp32 as published
    """
    for name, kind in ((variant, Variant), (geometry, Geometry), (dtype, Dtype)):
        if name not in get_args(kind):
            raise ValueError(f"expected one of {', '.join(get_args(kind))}, got {name!r}")
    codec_folder = folder / "speech_tokenizer"
    codec_folder.mkdir(parents=True, exist_ok=True)
    tiny = geometry.startswith("tiny")
    ids = write_tokenizer(folder, 2048 if tiny else 151_936)
    config, codec_config = model_config(variant, geometry, ids), codec_model_config(tiny)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", GENERATION)
    _write_json(folder / "preprocessor_config.json", _PROCESSOR)
    _write_json(codec_folder / "config.json", codec_config)
    _write_json(codec_folder / "configuration.json", {"framework": "pytorch", "task": "feature-extraction"})
    _write_json(codec_folder / "preprocessor_config.json", _FEATURES)
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    head, eos = "talker.codec_head.weight", config["talker_config"]["codec_eos_token_id"]
    tensors = {name: _initial(name, shape, seed).to(kind) for name, shape in model_shapes(config).items()}
    tensors[head][eos] *= EOS_GAIN
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tensors = {name: _initial(name, shape, seed) for name, shape in codec_shapes(codec_config).items()}
    last = f"decoder.decoder.{len(codec_config['decoder_config']['upsample_rates']) + 2}.conv.weight"
    tensors[last] *= LAST_CONV_GAIN
    save_file(tensors, codec_folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digest(folder: Path) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, and over the config and tokenizer files."""
    total = hashlib.sha256()
    for name in ("config.json", "generation_config.json", "vocab.json", "merges.txt", "speech_tokenizer/config.json"):
        total.update((folder / name).read_bytes())
    for name in ("model.safetensors", "speech_tokenizer/model.safetensors"):
        with safe_open(folder / name, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                value = tensors.get_tensor(key).contiguous()
                total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                total.update(value.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def model_config(variant: Variant, geometry: Geometry, ids: dict[str, int]) -> dict[str, Any]:
    """config.json; `ids` are the tokenizer's."""
    named = variant == "custom_voice"
    talker, tiny = TALKER[geometry], geometry.startswith("tiny")
    half = talker["head_dim"] // 2
    side = half * 5 // 16
    layer = {
        "attention_bias": False,
        "attention_dropout": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "num_code_groups": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    }
    config = {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "assistant_token_id": ids["assistant"],
        "im_end_token_id": ids["<|im_end|>"],
        "im_start_token_id": ids["<|im_start|>"],
        "tts_bos_token_id": ids["<tts_text_bos>"],
        "tts_eos_token_id": ids["<tts_text_eod>"],
        "tts_pad_token_id": ids["<tts_pad>"],
        "model_type": "qwen3_tts",
        "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "tts_model_size": SIZE_NAMES[geometry],
        "tts_model_type": variant,
        "talker_config": {
            **layer,
            **talker,
            "model_type": "qwen3_tts_talker",
            "code_predictor_config": {
                **layer,
                **PREDICTOR[geometry],
                "model_type": "qwen3_tts_talker_code_predictor",
                "layer_types": ["full_attention"] * PREDICTOR[geometry]["num_hidden_layers"],
                "max_position_embeddings": 65_536,
                "max_window_layers": 28,
                "pad_token_id": None,
                "rope_scaling": None,
                "tie_word_embeddings": False,
                "vocab_size": 2048,
            },
            "codec_pad_id": 2148,
            "codec_bos_id": 2149,
            "codec_eos_token_id": 2150,
            "codec_think_id": 2154,
            "codec_nothink_id": 2155,
            "codec_think_bos_id": 2156,
            "codec_think_eos_id": 2157,
            "codec_language_id": LANGUAGES | DIALECTS if named else LANGUAGES,
            "spk_id": SPEAKERS if named else {},
            "spk_is_dialect": {name: SPEAKER_DIALECTS.get(name, False) for name in SPEAKERS} if named else {},
            "max_position_embeddings": 32_768,
            "position_id_per_seconds": 13,
            "rope_scaling": {
                "interleaved": True,
                "mrope_section": [half - 2 * side, side, side],
                "rope_type": "default",
                "type": "default",
            },
            "text_hidden_size": 80 if tiny else 2048,
            "text_vocab_size": 2048 if tiny else 151_936,
            "vocab_size": 3072,
        },
        "transformers_version": "4.57.3",
    }
    if variant == "base":
        config["speaker_encoder_config"] = {"enc_dim": talker["hidden_size"], "sample_rate": 24_000}
        if tiny:
            config["speaker_encoder_config"] |= {
                "enc_channels": [32, 32, 32, 32, 96],
                "enc_attention_channels": 16,
                "enc_se_channels": 16,
            }
    return config


def codec_model_config(tiny: bool) -> dict[str, Any]:
    """speech_tokenizer/config.json. The tiny codec keeps the rates (1920 samples a frame), with a window of 12."""
    layer = {"attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 8000}
    return {
        "architectures": ["Qwen3TTSTokenizerV2Model"],
        "model_type": "qwen3_tts_tokenizer_12hz",
        "encoder_valid_num_quantizers": 16,
        "input_sample_rate": 24_000,
        "output_sample_rate": 24_000,
        "decode_upsample_rate": 1920,
        "encode_downsample_rate": 1920,
        "decoder_config": {
            **layer,
            **(_sizes(32, 48, 2, 4, 4, 16) if tiny else _sizes(512, 1024, 8, 16, 16, 64)),
            "latent_dim": 48 if tiny else 1024,
            "codebook_dim": 32 if tiny else 512,
            "codebook_size": 2048,
            "decoder_dim": 64 if tiny else 1536,
            "hidden_act": "silu",
            "layer_scale_initial_scale": 0.01,
            "num_quantizers": 16,
            "num_semantic_quantizers": 1,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000,
            "semantic_codebook_size": 4096,
            "sliding_window": 12 if tiny else 72,
            "upsample_rates": [8, 5, 4, 3],
            "upsampling_ratios": [2, 2],
            "vector_quantization_hidden_dimension": 512,
        },
        "encoder_config": {
            **layer,
            **(_sizes(32, 64, 2, 2, 2, 16) if tiny else _sizes(512, 2048, 8, 8, 8, 64)),
            "_frame_rate": 12.5,
            "audio_channels": 1,
            "codebook_dim": 8 if tiny else 256,
            "codebook_size": 2048,
            "compress": 2,
            "dilation_growth_rate": 2,
            "dtype": "float32",
            "hidden_act": "gelu",
            "initializer_range": 0.02,
            "kernel_size": 7,
            "last_kernel_size": 3,
            "layer_scale_initial_scale": 0.01,
            "norm_eps": 1e-5,
            "normalize": False,
            "num_filters": 4 if tiny else 64,
            "num_quantizers": 32,
            "num_residual_layers": 1,
            "num_semantic_quantizers": 1,
            "pad_mode": "constant",
            "residual_kernel_size": 3,
            "rope_theta": 10_000.0,
            "sampling_rate": 24_000,
            "sliding_window": 250,
            "trim_right_ratio": 1.0,
            "upsample_groups": 32 if tiny else 512,
            "upsampling_ratios": [8, 6, 5, 4],
            "use_cache": False,
            "use_causal_conv": True,
            "use_conv_shortcut": False,
            "use_streaming": False,
            "vector_quantization_hidden_dimension": 8 if tiny else 256,
        },
        "transformers_version": "4.57.3",
    }


_PROCESSOR = {
    "padding_side": "left",
    "padding_value": 0.0,
    "processor_class": "Qwen3TTSProcessor",
    "return_attention_mask": True,
}
_FEATURES = {
    "chunk_length_s": None,
    "feature_extractor_type": "EncodecFeatureExtractor",
    "feature_size": 1,
    "overlap": None,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 24_000,
}

_TRANSPOSED = re.compile(r"decoder\.(upsample\.\d+\.0|decoder\.\d+\.block\.1)\.conv\.weight")


def _initial(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The first value of a tensor, fp32: scales that keep activations near 1 and logits peaky.

    Uniform in mean ± sqrt(3) std. Codebooks are the sums of a random number of vectors, as trained ones are.
    """
    mean, std = 0.0, 0.02
    if name.endswith("initialized"):
        mean, std = 1.0, 0.0
    elif name.endswith("cluster_usage"):
        mean, std = 1.25, 0.4
    elif name.endswith(("embedding_sum", "embed_sum")):
        std = 1.0
    elif name.endswith((".alpha", ".beta")):
        std = 0.3
    elif name.endswith((".gamma", "_scale.scale")):
        mean, std = 0.3, 0.05
    elif "norm" in name and name.endswith("weight"):
        mean, std = 1.0, 0.1
    elif "embedding" in name:
        std = 0.5 if "text_embedding" in name else 0.25
    elif len(shape) > 1:
        std = _gain(name) / math.sqrt(_fan_in(name, shape))
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:16]
    count = math.prod(shape)
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw((count + 1) // 2).view(np.uint32)[:count]
    unit = (raw >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    values = unit * np.float32(math.sqrt(3.0) * std) + np.float32(mean)
    return torch.from_numpy(values.reshape(shape))


def _gain(name: str) -> float:
    if "lm_head" in name or "codec_head" in name:
        return 3.0
    if name.endswith(("o_proj.weight", "down_proj.weight")) or ".conv2.conv." in name:
        return 0.5
    return 1.0


def _fan_in(name: str, shape: tuple[int, ...]) -> float:
    """Products summed for one output; a transposed convolution's [in, out, k] overlaps k / stride times."""
    if not _TRANSPOSED.fullmatch(name):
        return math.prod(shape[1:])
    return shape[0] * (1 if "upsample" in name else 2)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random Qwen3-TTS-12Hz checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", choices=get_args(Variant), default="custom_voice")
    parser.add_argument("--geometry", choices=get_args(Geometry), default="tiny")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(digest(make(args.folder, args.variant, args.geometry, args.dtype, args.seed)))


if __name__ == "__main__":
    main()
