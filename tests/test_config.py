import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megakernel.shape import StackShape
from pipecat_qwen3 import backend
from pipecat_qwen3.config import FRAME_SAMPLES, SAMPLE_RATE, read_codec_config, read_model_config
from pipecat_qwen3.errors import CheckpointError
from tests.random_checkpoint import GENERATION, codec_model_config, model_config

EMBEDDED = Path(__file__).parent.parent / "pipecat_qwen3" / "embedded"
IDS = {
    "<|im_start|>": 151_644,
    "<|im_end|>": 151_645,
    "assistant": 77_091,
    "<tts_pad>": 151_671,
    "<tts_text_bos>": 151_672,
    "<tts_text_eod>": 151_673,
}
"""As published."""

MAIN, GENERATE, CODEC = "config.json", "generation_config.json", "speech_tokenizer/config.json"


class Files:
    """The JSON files of a checkpoint, to be changed and written anew."""

    def __init__(self, folder: Path, variant: str = "custom_voice", geometry: str = "0.6b") -> None:
        self.folder = folder
        (folder / "speech_tokenizer").mkdir()
        self.contents: dict[str, dict[str, Any]] = {
            MAIN: model_config(variant, geometry, IDS),  # type: ignore[arg-type]
            GENERATE: dict(GENERATION),
            CODEC: codec_model_config(False),
        }
        for name in self.contents:
            self.write(name)

    def write(self, name: str) -> None:
        (self.folder / name).write_text(json.dumps(self.contents[name]), encoding="utf-8")

    def read(self) -> None:
        read_model_config(self.folder)
        read_codec_config(self.folder)

    def refused(self) -> str:
        """The one line with which reading ends."""
        with pytest.raises(CheckpointError) as caught:
            self.read()
        line = str(caught.value)
        assert "\n" not in line
        assert len(line) < 500
        return line

    def with_value(self, name: str, path: tuple[str, ...], value: object) -> None:
        """Write a file in which one value is another."""
        original = self.contents[name]
        changed = copy.deepcopy(original)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (self.folder / name).write_text(json.dumps(changed), encoding="utf-8")

    def without(self, name: str, path: tuple[str, ...]) -> None:
        """Write a file in which one key is missing."""
        changed = copy.deepcopy(self.contents[name])
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        (self.folder / name).write_text(json.dumps(changed), encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Files]:
    return lambda variant, geometry="0.6b": Files(tmp_path, variant, geometry)


def stack(hidden: int, intermediate: int, layers: int) -> StackShape:
    return StackShape(layers, hidden, intermediate, heads=16, kv_heads=8, head_dim=128, rope_theta=1e6, norm_eps=1e-6)


@pytest.mark.parametrize(
    ("variant", "geometry", "size", "talker", "speakers", "languages", "instruct"),
    [
        ("custom_voice", "0.6b", "0b6", stack(1024, 3072, 28), 9, 10, False),
        ("base", "0.6b", "0b6", stack(1024, 3072, 28), 0, 10, False),
        ("custom_voice", "1.7b", "1b7", stack(2048, 6144, 28), 9, 10, True),
        ("base", "1.7b", "1b7", stack(2048, 6144, 28), 0, 10, False),
        ("voice_design", "1.7b", "1b7", stack(2048, 6144, 28), 0, 10, True),
    ],
)
def test_every_published_checkpoint_has_its_published_sizes(
    make, variant, geometry, size, talker, speakers, languages, instruct
):
    config = read_model_config(make(variant, geometry).folder)
    assert (config.variant, config.size, config.shape.talker) == (variant, size, talker)
    assert config.shape.predictor == stack(1024, 3072, 5)
    assert (config.shape.codebooks, config.shape.codes, config.shape.vocab, config.shape.eos) == (16, 2048, 3072, 2150)
    assert config.shape.projected == (geometry == "1.7b")
    assert (config.text_vocab, config.text_hidden) == (151_936, 2048)
    assert (config.ids.im_start, config.ids.im_end, config.ids.assistant) == (151_644, 151_645, 77_091)
    assert (config.ids.tts_pad, config.ids.tts_bos, config.ids.tts_eos) == (151_671, 151_672, 151_673)
    assert (config.ids.codec_pad, config.ids.codec_bos, config.ids.codec_eos) == (2148, 2149, 2150)
    assert (config.ids.think, config.ids.nothink) == (2154, 2155)
    assert (config.ids.think_bos, config.ids.think_eos) == (2156, 2157)
    assert (len(config.speakers), len(config.languages)) == (speakers, languages)
    assert config.takes_instruct == instruct
    assert (config.generation.temperature, config.generation.top_k) == (0.9, 50)
    assert (config.generation.repetition_penalty, config.generation.predictor_do_sample) == (1.05, True)


def test_named_voices_come_with_their_dialects_and_the_first_is_the_default(files):
    config = read_model_config(files.folder)
    assert config.speakers["vivian"] == 3065
    assert config.default_speaker == "serena"
    assert config.dialects == {"eric": "sichuan_dialect", "dylan": "beijing_dialect"}
    assert config.dialect_ids == {"beijing_dialect": 2074, "sichuan_dialect": 2062}
    assert config.languages["english"] == 2050
    assert not config.dialect_ids.keys() & config.languages.keys()


def test_a_checkpoint_without_named_voices_has_no_default(make):
    config = read_model_config(make("voice_design", "1.7b").folder)
    assert (config.default_speaker, config.speakers, config.dialects, config.dialect_ids) == (None, {}, {}, {})


def test_the_published_codec_has_its_published_sizes(files):
    codec = read_codec_config(files.folder)
    assert (codec.codebooks, codec.codebook_size, codec.codebook_dim, codec.latent) == (16, 2048, 512, 1024)
    assert (codec.layers, codec.hidden, codec.intermediate, codec.window) == (8, 512, 1024, 72)
    assert (codec.heads, codec.kv_heads, codec.head_dim) == (16, 16, 64)
    assert (codec.rope_theta, codec.norm_eps, codec.decoder_dim) == (10_000, 1e-5, 1536)
    assert (codec.upsample_rates, codec.upsampling_ratios, codec.frame_samples) == ((8, 5, 4, 3), (2, 2), 1920)


def test_what_a_codec_must_make_is_what_callers_are_promised():
    assert (SAMPLE_RATE, FRAME_SAMPLES) == (backend.SAMPLE_RATE, backend.FRAME_SAMPLES)


def test_the_embedded_voice_is_read():
    config = read_model_config(EMBEDDED)
    assert (config.variant, config.default_speaker, set(config.speakers)) == ("custom_voice", "rms", {"slt", "rms"})
    assert (config.shape.codebooks, config.shape.suppress_from) == (8, config.shape.codes)
    assert read_codec_config(EMBEDDED).codebooks == 8


def test_what_the_official_finetuning_script_writes_is_read(make):
    """It starts from Base, keeps the speaker encoder's config and gives the new voice id 3000."""
    files = make("base")
    files.contents[MAIN]["tts_model_type"] = "custom_voice"
    files.contents[MAIN]["talker_config"] |= {"spk_id": {"Jane Doe": 3000}, "spk_is_dialect": {"Jane Doe": False}}
    files.write(MAIN)
    config = read_model_config(files.folder)
    assert (config.variant, config.default_speaker, config.dialects) == ("custom_voice", "Jane Doe", {})
    assert config.speakers == {"Jane Doe": 3000}


def test_keys_that_are_not_needed_may_be_missing_or_new(files):
    config = files.contents[MAIN]
    config |= {"dtype": "bfloat16", "_name_or_path": "x", "speaker_encoder_config": None}
    config["talker_config"]["pad_token_id"] = 2148
    for key in ("architectures", "tokenizer_type", "transformers_version"):
        del config[key]
    for key in ("rope_scaling", "max_position_embeddings", "position_id_per_seconds", "model_type", "sliding_window"):
        del config["talker_config"][key]
    files.write(MAIN)
    files.read()


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys of a JSON object, those of objects too."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict) and key not in ("spk_id", "spk_is_dialect", "codec_language_id"):
            yield from leaves(inner, (*path, key))


def words(text: str) -> list[str]:
    return text.split()


STACK_KEYS = words(
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
    "rope_theta rms_norm_eps"
)
TOP_KEYS = words(
    "im_start_token_id im_end_token_id assistant_token_id tts_pad_token_id tts_bos_token_id tts_eos_token_id "
    "model_type tts_model_size tts_model_type talker_config"
)
TALKER_KEYS = words(
    "codec_pad_id codec_bos_id codec_eos_token_id codec_think_id codec_nothink_id codec_think_bos_id "
    "codec_think_eos_id codec_language_id spk_id spk_is_dialect text_hidden_size text_vocab_size "
    "vocab_size num_code_groups code_predictor_config "
    "code_predictor_config.vocab_size code_predictor_config.num_code_groups"
)
DECODER_KEYS = words(
    "num_quantizers codebook_size codebook_dim latent_dim sliding_window decoder_dim upsample_rates upsampling_ratios"
)
NEEDED = {
    MAIN: [
        *TOP_KEYS,
        *(f"talker_config.{key}" for key in (*TALKER_KEYS, *STACK_KEYS)),
        *(f"talker_config.code_predictor_config.{key}" for key in STACK_KEYS),
    ],
    GENERATE: [key for key in GENERATION if key != "max_new_tokens"],  # the length cap comes from the text
    CODEC: [
        *words("model_type output_sample_rate decode_upsample_rate decoder_config"),
        *(f"decoder_config.{key}" for key in (*DECODER_KEYS, *STACK_KEYS)),
    ],
}
"""Without these a checkpoint is not opened: a default would be a guess."""

STRANGE = [None, True, "x", -1, 0.5, 10**30, float("nan"), float("inf"), [], {}, [1], {"a": "b"}]
"""Put in the place of every value: whatever comes of it, it is never a traceback."""


@pytest.mark.parametrize("name", [MAIN, GENERATE, CODEC])
def test_a_missing_key_is_named(files, name):
    for path in leaves(files.contents[name]):
        key = ".".join(path)
        files.without(name, path)
        if key not in NEEDED[name]:
            files.read()
        elif key != "model_type":
            assert files.refused().startswith(f"{files.folder / name} has no key '{key}', which every Qwen3-TTS-12Hz c")
    files.without(name, (NEEDED[name][0],))
    assert files.refused().endswith("; add it, or copy or download the checkpoint again")


@pytest.mark.parametrize("name", [MAIN, GENERATE, CODEC])
def test_a_value_of_another_type_is_named_with_what_it_should_be(files, name):
    for path in leaves(files.contents[name]):
        key, inner = ".".join(path), files.contents[name]
        for step in path:
            inner = inner[step]
        kind = (int, float) if isinstance(inner, float) or path[-1] == "rope_theta" else type(inner)
        for value in STRANGE:
            files.with_value(name, path, value)
            same = isinstance(value, kind) and isinstance(value, bool) == isinstance(inner, bool)
            if key in NEEDED[name] and not same:
                line = files.refused()
                assert line.startswith(f"{files.folder / name}: {key} should be ")
                assert ", but is " in line
            else:
                with contextlib.suppress(CheckpointError):
                    files.read()


@pytest.mark.parametrize("name", [MAIN, GENERATE, CODEC])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "{folder} has no {name}; copy or download the checkpoint again"),
        (b"", "{path} is empty; copy or download the checkpoint again"),
        (
            b'{"model_type": "qwen3',
            "{path} is not JSON (Unterminated string starting at: line 1 column 16 (char 15)); ",
        ),
        (b"\xff\xfe{}", "{path} is not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
        (b"<!DOCTYPE html>", "{path} is not JSON (Expecting value: line 1 column 1 (char 0)); copy or download"),
        (b"[1, 2]", "{path} should hold a JSON object, but holds a list; copy or download the checkpoint again"),
        (b"null", "{path} should hold a JSON object, but holds a NoneType; copy or download the checkpoint again"),
        (b"9" * 5000, "{path} is not JSON (Exceeds the limit"),
        (b'{"a":' * 100_000, "{path} is not JSON (maximum recursion depth exceeded"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "{path} is a Git LFS pointer, not the file ",
        ),
    ],
    ids=["missing", "empty", "cut short", "binary", "a web page", "a list", "null", "huge", "deep", "Git LFS"],
)
def test_a_file_that_holds_no_json_object_is_named(files, name, content, line):
    path = files.folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert files.refused().startswith(line.format(folder=path.parent, name=path.name, path=path))


def test_a_folder_in_the_place_of_a_file_is_named(files):
    (files.folder / MAIN).unlink()
    (files.folder / MAIN).mkdir()
    assert files.refused().startswith(f"{files.folder / MAIN} cannot be read (Is a directory)")


TALKER, PREDICTOR, DECODER = ("talker_config",), ("talker_config", "code_predictor_config"), ("decoder_config",)


@pytest.mark.parametrize(
    ("name", "path", "value", "wanted"),
    [
        (MAIN, ("model_type",), "qwen2", "'qwen3_tts', but is 'qwen2'; choose a Qwen3-TTS-12Hz checkpoint"),
        (MAIN, ("tts_model_type",), "karaoke", 'one of custom_voice, voice_design, base, but is "karaoke"'),
        (MAIN, ("default_speaker",), "nobody", 'one of the names in talker_config.spk_id, but is "nobody"'),
        (MAIN, ("tts_pad_token_id",), 151_936, "an integer in 0..151935, but is 151936"),
        (MAIN, (*TALKER, "hidden_size"), 0, "an integer in 1..1048576, but is 0"),
        (MAIN, (*TALKER, "codec_bos_id"), 3072, "an integer in 0..3071, but is 3072"),
        (MAIN, (*TALKER, "spk_id"), {"me": 3072}, 'an object of names and integers in 0..3071, but is {"me": 3072}'),
        (
            MAIN,
            (*TALKER, "spk_id"),
            {"me": [3000]},
            'an object of names and integers in 0..3071, but is {"me": [',
        ),
        (
            MAIN,
            (*TALKER, "spk_is_dialect"),
            {"eric": "elvish"},
            "an object of speakers and false, or a name in c",
        ),
        (
            MAIN,
            (*TALKER, "spk_is_dialect"),
            {"eric": True},
            "an object of speakers and false, or a name in c",
        ),
        (MAIN, (*TALKER, "num_attention_heads"), 15, "a multiple of num_key_value_heads, 8, but is 15"),
        (MAIN, (*TALKER, "head_dim"), 127, "even: rotary embeddings turn pairs, but is 127"),
        (MAIN, (*TALKER, "hidden_act"), "gelu", '"silu", as in every Qwen3-TTS-12Hz checkpoint, but is "gelu"'),
        (MAIN, (*TALKER, "attention_bias"), True, "false, as in every Qwen3-TTS-12Hz checkpoint, but is true"),
        (MAIN, (*TALKER, "use_sliding_window"), True, "false, as in every Qwen3-TTS-12Hz checkpoint, but is true"),
        (MAIN, (*TALKER, "vocab_size"), 4096, "at most 3072, the predictor's codes and 1024 others, but is 4096"),
        (MAIN, (*TALKER, "vocab_size"), 1024, "an integer in 1025..1048576, but is 1024"),
        (MAIN, (*TALKER, "num_hidden_layers"), 10**6, "an integer in 1..1024, but is 1000000"),
        (MAIN, (*PREDICTOR, "num_code_groups"), 32, "16, as in talker_config, but is 32"),
        (MAIN, (*PREDICTOR, "head_dim"), 127, "even: rotary embeddings turn pairs, but is 127"),
        (GENERATE, ("temperature",), 0, "a number above 0 and up to 100, but is 0"),
        (GENERATE, ("subtalker_top_p",), 1.5, "a number above 0 and up to 1, but is 1.5"),
        (GENERATE, ("top_k",), -1, "an integer in 0..1048576, but is -1"),
        (CODEC, ("model_type",), "qwen3_tts_tokenizer_25hz", '"qwen3_tts_tokenizer_12hz", but is "qwen3_tts_tokenizer'),
        (CODEC, ("output_sample_rate",), 16_000, "24000, as in every 12 Hz codec, but is 16000"),
        (CODEC, ("decode_upsample_rate",), 960, "1920, as in every 12 Hz codec, but is 960"),
        (
            CODEC,
            (*DECODER, "upsample_rates"),
            [8, 5, 4],
            "such that all rates and ratios multiply to 1920, but is",
        ),
        (CODEC, (*DECODER, "upsample_rates"), [8, 0], "a list of integers in 1..1920, but is [8, 0]"),
        (CODEC, (*DECODER, "codebook_dim"), 511, "even: an entry is half as wide, but is 511"),
        (CODEC, (*DECODER, "decoder_dim"), 1000, "such that each of upsample_rates can halve it, but is 1000"),
        (CODEC, (*DECODER, "num_semantic_quantizers"), 2, "1, as in every Qwen3-TTS-12Hz checkpoint, but is 2"),
        (CODEC, (*DECODER, "num_key_value_heads"), 3, "should be"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_values_that_contradict_each_other_or_the_arithmetic_are_named(files, name, path, value, wanted):
    files.with_value(name, path, value)
    line = files.refused()
    assert line.startswith(f"{files.folder / name}: {'.'.join(path[:-1])}")
    assert wanted in line


@pytest.mark.parametrize("stretched", [{"rope_type": "yarn", "factor": 2}, {"rope_type": "linear"}, "default", []])
def test_stretched_rotary_embeddings_are_refused(files, stretched):
    files.with_value(MAIN, (*TALKER, "rope_scaling"), stretched)
    assert f"{files.folder / MAIN}: talker_config.rope_scaling" in files.refused()


def test_a_long_value_is_cut(files):
    files.with_value(MAIN, (*TALKER, "hidden_size"), list(range(9999)))
    assert files.refused().endswith("1…; correct it, or copy or download the checkpoint again")


def test_the_embedded_voice_would_be_installed_again(files, monkeypatch):
    monkeypatch.setattr("pipecat_qwen3.files.__file__", str(files.folder / "files.py"))
    (files.folder / GENERATE).write_bytes(b"")
    assert files.refused() == f"{files.folder / GENERATE} is empty; install pipecat-qwen3 again"
