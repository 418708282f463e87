import json
import math
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.codec import CodecDecoder
from pipecat_qwen3.config import read_codec_config, read_model_config
from pipecat_qwen3.errors import CheckpointError, TTSError
from pipecat_qwen3.files import MOST
from pipecat_qwen3.talker import Talker
from tests.random_checkpoint import GENERATION, codec_model_config, make, model_config
from tests.random_shapes import codec_shapes, model_shapes

TALKER, CODEC = "model.safetensors", "speech_tokenizer/model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
PREFIX = {TALKER: "talker.", CODEC: "decoder."}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@pytest.fixture
def copy(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A folder whose files may be replaced: links to those of a tiny random checkpoint."""

    def linked(variant: str = "custom_voice", geometry: str = "tiny") -> Path:
        original, folder = tiny(variant, geometry), tmp_path / "model"
        (folder / "speech_tokenizer").mkdir(parents=True)
        for path in original.rglob("*"):
            if path.is_file():
                (folder / path.relative_to(original)).symlink_to(path)
        return folder

    return linked


def replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Talker, CodecDecoder]:
    """All that opening a model reads."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.load_tokenizer()
    return checkpoint.load_talker(dtype), checkpoint.load_codec()


def refused(folder: Path) -> str:
    """The one line with which opening ends."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


def raw(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor of a safetensors file, read by the letter of the format."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    body = memoryview(data)[8 + size :]
    return {
        name: (entry["dtype"], entry["shape"], bytes(body[slice(*entry["data_offsets"])]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def check_identical(folder: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    """What was loaded, written again, is what the files hold, but for what this package leaves alone."""
    for name, module, left in zip((TALKER, CODEC), load(folder, dtype), ("speaker_encoder.", "encoder."), strict=True):
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        theirs = {key: value for key, value in raw(folder / name).items() if not key.startswith(left)}
        (stored,) = {kind for kind, _, _ in theirs.values()}
        tensors = {PREFIX[name] + key: tensor.to(DTYPES[stored]) for key, tensor in module.state_dict().items()}
        save_file(tensors, tmp_path / "export.safetensors")
        assert raw(tmp_path / "export.safetensors") == theirs


@pytest.mark.parametrize("geometry", ["tiny", "tiny-projected"])
@pytest.mark.parametrize("variant", ["custom_voice", "voice_design", "base"])
def test_what_is_loaded_and_exported_is_identical(tiny, tmp_path, variant, geometry):
    check_identical(tiny(variant, geometry), torch.float32, tmp_path)


def test_what_is_loaded_and_exported_is_identical_in_bf16(tmp_path):
    check_identical(make(tmp_path / "bf16", dtype="bf16"), torch.bfloat16, tmp_path)


def test_the_embedded_voice_loaded_and_exported_is_identical(tmp_path):
    check_identical(Checkpoint.open("embedded").folder, torch.bfloat16, tmp_path)


def test_no_initial_values_are_made_up():
    """They would be thrown away, and on the meta device torch imports a second's worth of symbolic algebra for them."""
    imports = "import sys, torch; from pipecat_qwen3.checkpoint import Checkpoint"
    load = "c = Checkpoint.open('embedded'); c.load_talker(torch.float32); c.load_codec()"
    code = f"{imports}; {load}; sys.exit('sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_another_dtype_rounds_every_weight_and_nothing_else(copy):
    folder = copy()
    rounded, whole = load(folder, torch.bfloat16)[0].state_dict(), load_file(folder / TALKER)
    assert all(torch.equal(tensor, whole[f"talker.{name}"].bfloat16()) for name, tensor in rounded.items())
    assert {tensor.dtype for tensor in load(folder, torch.bfloat16)[1].state_dict().values()} == {torch.float32}


def test_half_precision_files_are_read(copy):
    folder = copy()
    half = {name: tensor.half() for name, tensor in load_file(folder / TALKER).items()}
    (folder / TALKER).unlink()
    save_file(half, folder / TALKER)
    talker = load(folder)[0]
    assert torch.equal(talker.codec_head.weight, half["talker.codec_head.weight"].float())


def test_a_file_that_is_overwritten_later_changes_nothing(copy):
    folder = copy()
    replace(folder / TALKER, (folder / TALKER).read_bytes())
    talker = load(folder)[0]
    before = {name: tensor.clone() for name, tensor in talker.state_dict().items()}
    (folder / TALKER).write_bytes(bytes((folder / TALKER).stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in talker.state_dict().items())


# -- the published checkpoints -------------------------------------------------------------------------------


def published_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str, metadata: bool) -> int:
    """Size of the safetensors file that holds such tensors: the header spells out every name, shape and offset."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    at = 0
    for name in sorted(shapes):
        end = at + {"BF16": 2, "F32": 4}[dtype] * math.prod(shapes[name])
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + at


def meta_shapes(module: type[torch.nn.Module], config: object, prefix: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = module(config).state_dict()
    return {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}


IDS = {"assistant": 77_091, "<|im_start|>": 151_644, "<|im_end|>": 151_645}
IDS |= {"<tts_pad>": 151_671, "<tts_text_bos>": 151_672, "<tts_text_eod>": 151_673}


@pytest.mark.parametrize(
    ("variant", "geometry", "tensors", "parameters", "size"),
    [
        ("custom_voice", "0.6b", 402, 905_788_672, 1_811_626_576),
        ("base", "0.6b", 402, 905_788_672, 1_829_344_272),
        ("custom_voice", "1.7b", 404, 1_916_676_352, 3_833_402_552),
        ("base", "1.7b", 404, 1_916_676_352, 3_857_413_744),
        ("voice_design", "1.7b", 404, 1_916_676_352, 3_833_402_552),
    ],
)
def test_every_published_file_has_our_tensors_to_the_byte(tmp_path, variant, geometry, tensors, parameters, size):
    """The sizes are those of the published model.safetensors; Base has the speaker encoder in it and no metadata."""
    config = model_config(variant, geometry, IDS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    ours = meta_shapes(Talker, read_model_config(tmp_path), "talker.")
    assert (len(ours), sum(map(math.prod, ours.values()))) == (tensors, parameters)
    speaker = {name: shape for name, shape in model_shapes(config).items() if name.startswith("speaker_encoder.")}
    assert bool(speaker) == (variant == "base")
    assert published_bytes({**ours, **speaker}, "BF16", metadata=variant != "base") == size


def test_the_published_codec_has_our_tensors_to_the_byte(tmp_path):
    (tmp_path / "speech_tokenizer").mkdir()
    (tmp_path / "speech_tokenizer" / "config.json").write_text(json.dumps(codec_model_config(False)))
    ours = meta_shapes(CodecDecoder, read_codec_config(tmp_path), "decoder.")
    encoder = {name: s for name, s in codec_shapes(codec_model_config(False)).items() if name.startswith("encoder.")}
    assert sum(map(math.prod, ours.values())) + sum(map(math.prod, encoder.values())) == 170_557_441
    assert published_bytes({**ours, **encoder}, "F32", metadata=False) == 682_293_092


def test_a_file_without_metadata_is_read(copy):
    folder = copy("base")
    for name in (TALKER, CODEC):
        tensors = load_file(folder / name)
        (folder / name).unlink()
        save_file(tensors, folder / name)
        assert b"__metadata__" not in (folder / name).read_bytes()[:2000]
    load(folder)


def test_what_the_official_finetuning_script_writes_is_opened(copy):
    """From Base: another kind and one speaker in config.json, its embedding as row 3000, the speaker encoder gone."""
    folder = copy("base", "tiny-projected")
    config = json.loads((folder / "config.json").read_text())
    config["tts_model_type"] = "custom_voice"
    config["talker_config"] |= {"spk_id": {"jane": 3000}, "spk_is_dialect": {"jane": False}}
    replace(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False).encode())
    tensors = {name: t for name, t in load_file(folder / TALKER).items() if not name.startswith("speaker_encoder")}
    tensors["talker.model.codec_embedding.weight"][3000] = torch.linspace(-1, 1, 64)
    (folder / TALKER).unlink()
    save_file(tensors, folder / TALKER)
    (folder / "model.safetensors.index.json").write_text("{}")  # may be left over: the one file comes first
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.speakers == {"jane": 3000}
    assert torch.equal(load(folder)[0].model.codec_embedding.weight[3000], torch.linspace(-1, 1, 64))


# -- shards --------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(copy: Callable[..., Path]) -> Path:
    """A checkpoint whose talker lies in three files."""
    folder = copy()
    tensors = load_file(folder / TALKER)
    (folder / TALKER).unlink()
    names = sorted(tensors)
    home = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in set(home.values()):
        save_file({name: tensors[name] for name in names if home[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def test_shards_are_one_checkpoint(sharded, tiny):
    whole = load(tiny())[0].state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load(sharded)[0].state_dict().items())


SHARD = "model-00002-of-00003.safetensors"


def test_a_missing_or_broken_shard_is_named(sharded):
    replace(sharded / SHARD, (sharded / SHARD).read_bytes()[:-1])
    assert refused(sharded).startswith(f"{sharded / SHARD} is broken or cut short (")
    (sharded / SHARD).unlink()
    assert refused(sharded) == f"{sharded} has no {SHARD}; copy or download the checkpoint again"


@pytest.mark.parametrize(
    ("index", "line"),
    [
        ("", "is empty; copy or download the checkpoint again"),
        ('{"weight_map": ', "is not JSON (Expecting value: line 1 column 16 (char 15)); copy or download"),
        ("{}", "has no key 'weight_map', which every Qwen3-TTS-12Hz checkpoint has"),
        ('{"weight_map": []}', ": weight_map should be an object, but is []"),
        ('{"weight_map": {}}', ": weight_map should be an object that names a file for each tensor, but is {}"),
        ('{"weight_map": {"a": 1}}', ": weight_map should be an object that names a file for each tensor, but is {"),
    ],
)
def test_a_broken_index_is_named(sharded, index, line):
    path = sharded / "model.safetensors.index.json"
    path.write_text(index)
    assert refused(sharded).startswith((f"{path} {line}", f"{path}{line}"))


# -- broken files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [TALKER, CODEC])
@pytest.mark.parametrize("kept", [1, 7, 8, 9, 100, 10_000, 0.5, -1])
def test_a_weight_file_that_is_cut_short_is_named(copy, name, kept):
    folder = copy()
    whole = (folder / name).read_bytes()
    replace(folder / name, whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    line = refused(folder)
    assert line.startswith(f"{folder / name} is broken or cut short (")
    assert line.endswith("); copy or download the checkpoint again")


@pytest.mark.parametrize("name", [TALKER, CODEC])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "{path} is empty; copy or download the checkpoint again"),
        (LFS, "{path} is a Git LFS pointer, not "),
        (b"<!DOCTYPE html><html><body>Sign in to the hotel's network</body></html>", "{path} is broken or cut short ("),
        (b"\x80\x02}q\x00" * 100, "{path} is broken or cut short ("),
        (struct.pack("<Q", 2) + b"{}", "{path} has no tensor {tensor}"),
        (None, "{folder} has no model.safetensors; copy or download the checkpoint again"),
    ],
    ids=["empty", "Git LFS", "a web page", "a pickle", "no tensors", "missing"],
)
def test_a_weight_file_that_is_none_is_named(copy, name, content, line):
    folder = copy()
    path = folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    first = {TALKER: "talker.model.text_embedding.weight", CODEC: "decoder.quantizer.rvq_first.input_proj.weight"}
    came = refused(folder)
    where = path.parent if content == struct.pack("<Q", 2) + b"{}" else path
    assert came.startswith(line.format(path=where, folder=path.parent, tensor=first[name]))


def test_a_damaged_header_is_never_a_traceback(copy):
    """Whatever one changed byte says: another name, shape, dtype, length or offset."""
    folder = copy()
    chance = random.Random(0)
    path = folder / CODEC
    whole = path.read_bytes()
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    replace(path, whole)
    checkpoint = Checkpoint.open(folder)
    refusals: list[str] = []
    for _ in range(80):
        at = chance.randrange(size)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 1 << chance.randrange(8)]))
        try:
            checkpoint.load_codec()
        except TTSError as error:
            refusals.append(str(error))
        with path.open("r+b") as file:
            file.seek(at)
            file.write(whole[at : at + 1])
    assert len(refusals) > 40  # the encoder's tensors are left alone, damaged or not
    assert all("\n" not in line and line.startswith(str(path.parent)) for line in refusals)
    checkpoint.load_codec()


def changed(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write a weight file anew with some tensors changed."""
    tensors = load_file(folder / name)
    change(tensors)
    (folder / name).unlink()
    save_file(tensors, folder / name)


HEAD, NORM = "talker.codec_head.weight", "decoder.pre_transformer.norm.weight"


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (
            TALKER,
            lambda t: t.pop(HEAD),
            "{folder} has no tensor talker.codec_head.weight, which its config.json asks for (",
        ),
        (
            CODEC,
            lambda t: t.pop(NORM),
            "{folder} has no tensor decoder.pre_transformer.norm.weight, which its config.json ",
        ),
        (
            TALKER,
            lambda t: t.update({HEAD: torch.ones(3072, 65)}),
            "{path}: talker.codec_head.weight should have shape (3072, 64) by its config.json, but has (3072, 65)",
        ),
        (
            TALKER,
            lambda t: t.update({HEAD: t[HEAD].T.contiguous()}),
            "{path}: talker.codec_head.weight should have shape (3072, 64) by its config.json, but has (64, 3072)",
        ),
        (
            CODEC,
            lambda t: t.update({NORM: torch.tensor(1.0)}),
            "{path}: decoder.pre_transformer.norm.weight should have shape (32,) by its config.json, but has (); take",
        ),
        (
            TALKER,
            lambda t: t.update({"talker.model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)}),
            "{folder} has tensors that its config.json knows nothing of, such as talker.model.layers.3.mlp.up_pr",
        ),
        (
            CODEC,
            lambda t: t.update({"decoder.pre_transformer.norm.bias": torch.ones(32)}),
            "{folder} has tensors that its config.json knows nothing of, such as decoder.pre_transformer.norm.bi",
        ),
        (
            TALKER,
            lambda t: t.update({HEAD: t[HEAD].to(torch.int8)}),
            "{path}: talker.codec_head.weight should be stored as bf16, fp16 or fp32, but is I8; take a checkpoint",
        ),
        (
            TALKER,
            lambda t: t.update({HEAD: t[HEAD].to(torch.float8_e4m3fn)}),
            "{path}: talker.codec_head.weight should be stored as bf16, fp16 or fp32, but is F8_E4M3; take a",
        ),
        (
            TALKER,
            lambda t: t[HEAD][5].fill_(math.nan),
            "{path}: talker.codec_head.weight holds NaN or infinity; take an",
        ),
        (
            CODEC,
            lambda t: t[NORM][5].fill_(-math.inf),
            "{path}: decoder.pre_transformer.norm.weight holds NaN or infinity",
        ),
    ],
    ids=["gone", "gone ", "wide", "transposed", "scalar", "one more layer", "a bias", "int8", "fp8", "NaN", "infinity"],
)
def test_a_tensor_that_does_not_fit_is_named(copy, name, change, line):
    folder = copy()
    changed(folder, name, change)
    path = folder / name
    assert refused(folder).startswith(line.format(path=path, folder=path.parent))


def test_a_config_of_another_size_is_found_out_before_anything_is_read(copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    config["talker_config"] |= {"hidden_size": MOST, "num_hidden_layers": 1024, "text_vocab_size": MOST}
    replace(folder / "config.json", json.dumps(config).encode())
    assert "has no tensor talker.model.layers.3." in refused(folder)


def test_a_codec_of_another_checkpoint_is_refused(copy):
    folder = copy()
    embedded = Checkpoint.open("embedded").folder / "speech_tokenizer"
    for name in ("config.json", "model.safetensors"):
        replace(folder / "speech_tokenizer" / name, (embedded / name).read_bytes())
    assert refused(folder) == (
        f"{folder}: the talker makes 16 codes of 2048 values a frame, but speech_tokenizer takes 8 of 512; "
        "take both parts from one checkpoint"
    )


# -- the tokenizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.json", "merges.txt"])
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        LFS,
        bytes(range(256)),
        b"[1, 2]",
        b'{"a": "b"}',
        b"#\na b c\n",
    ],
    ids=["missing", "empty", "Git LFS", "binary", "a list", "other values", "no pairs"],
)
def test_a_broken_tokenizer_file_is_named(copy, name, content):
    folder = copy()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    line = refused(folder)
    assert line.startswith((f"{folder / name} ", f"{folder} has no {name}; ", f"the tokenizer's files in {folder} "))
    assert line.endswith(
        ("copy or download the checkpoint again", f"`git lfs pull` in {folder}", "from one checkpoint")
    )


def test_a_tokenizer_in_one_file_comes_first(copy):
    folder = copy()
    Checkpoint.open(folder).load_tokenizer().save_pretrained(folder.parent / "saved")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    replace(folder / "tokenizer.json", (folder.parent / "saved" / "tokenizer.json").read_bytes())
    load(folder)
    replace(folder / "tokenizer.json", LFS)
    assert refused(folder).startswith(f"{folder / 'tokenizer.json'} is a Git LFS pointer")


def test_a_tokenizer_cut_short_in_a_valid_place_is_found_out(copy):
    folder = copy()
    lines = (folder / "merges.txt").read_text().splitlines(keepends=True)
    replace(folder / "merges.txt", "".join(lines[:20]).encode())
    assert "but its config.json says" in refused(folder)


def test_a_tokenizer_of_another_checkpoint_is_refused(copy):
    folder = copy()
    embedded = Checkpoint.open("embedded").folder
    for name in ("tokenizer_config.json", "vocab.json", "merges.txt"):
        replace(folder / name, (embedded / name).read_bytes())
    line = refused(folder)
    assert line.startswith(
        f"the tokenizer's files in {folder} make [19057, 350, 19058] of <|im_start|>assistant<|im_end|>,"
    )
    assert line.endswith("; take both from one checkpoint")


def test_a_tokenizer_with_more_ids_than_the_talker_has_embeddings_is_refused(copy):
    folder = copy()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    added |= {str(number): added["2000"] | {"content": f"<laugh {number}>"} for number in range(2017, 2050)}
    replace(folder / "tokenizer_config.json", json.dumps(config).encode())
    assert "have ids up to 2049, but its config.json gives room for 2048; take both" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", TALKER, "vocab.json"])
def test_a_file_that_may_not_be_read_is_named(copy, name):
    folder = copy()
    replace(folder / name, (folder / name).read_bytes())
    (folder / name).chmod(0)
    if os.access(folder / name, os.R_OK):
        pytest.skip("root may read everything")
    assert refused(folder) == (
        f"{folder / name} cannot be read (Permission denied); check what it is and who may read it"
    )


def test_an_empty_folder_and_a_model_of_another_kind_are_refused(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").startswith(f"{tmp_path / 'empty'} has no config.json; ")
    codec = copy() / "speech_tokenizer"
    assert "model_type should be 'qwen3_tts', but is 'qwen3_tts_tokenizer_12hz'; choose" in refused(codec)
