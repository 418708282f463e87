"""A model name in, its files and weights out: the embedded voice, a local folder, or a repository on Hugging Face.

Every way in which files can be missing, broken or of another shape ends in one line that names what was wanted.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipecat_qwen3.codec import CodecDecoder
from pipecat_qwen3.config import CodecConfig, ModelConfig, read_codec_config, read_model_config
from pipecat_qwen3.errors import CheckpointError, DownloadError, UnknownNameError
from pipecat_qwen3.talker import Talker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "embedded"
"""Name of the small voice that ships with the package."""

OFFICIAL = (
    "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice",
    "Qwen/Qwen3-TTS-12Hz-0.6B-Base",
    "Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice",
    "Qwen/Qwen3-TTS-12Hz-1.7B-Base",
    "Qwen/Qwen3-TTS-12Hz-1.7B-VoiceDesign",
)

_FILES = ["*.json", "*.txt", "*.safetensors", "speech_tokenizer/*"]
_NEEDED = ("config.json", "generation_config.json", "tokenizer_config.json", "speech_tokenizer/config.json")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its folder and what its JSON files say."""

    name: str
    folder: Path
    config: ModelConfig
    codec_config: CodecConfig

    @classmethod
    def open(cls, name: str | Path) -> "Checkpoint":
        """Find (and if need be download) a checkpoint and read its configs.

        name   "embedded", a folder, or a Hugging Face repository "owner/name"
        Raises CheckpointError, DownloadError or UnknownNameError.
        """
        folder = find(str(name))
        config, codec_config = read_model_config(folder), read_codec_config(folder)
        if config.shape.codebooks != codec_config.codebooks:
            raise CheckpointError(
                f"{folder}: the talker makes {config.shape.codebooks} codes a frame, but the codec takes "
                f"{codec_config.codebooks}; the two parts are of different checkpoints"
            )
        return cls(str(name), folder, config, codec_config)

    def load_talker(self, dtype: torch.dtype) -> Talker:
        """The talker and code predictor on the CPU in the given dtype."""
        with torch.device("meta"):
            talker = Talker(self.config)
        tensors = Tensors(self.folder)
        _fill(talker, tensors, "talker.", dtype)
        return talker.eval().requires_grad_(False)

    def load_codec(self) -> CodecDecoder:
        """The codec's decoder on the CPU in fp32: in bf16 its output loses 8 bits and more."""
        with torch.device("meta"):
            decoder = CodecDecoder(self.codec_config)
        _fill(decoder, Tensors(self.folder / "speech_tokenizer"), "decoder.", torch.float32)
        return decoder.eval().requires_grad_(False)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The text tokenizer. Raises CheckpointError."""
        from transformers import Qwen2TokenizerFast

        for name in ("vocab.json", "merges.txt"):
            if not (self.folder / name).exists() and not (self.folder / "tokenizer.json").exists():
                raise CheckpointError(f"{self.folder} has no {name}; download the checkpoint again")
        try:
            return Qwen2TokenizerFast.from_pretrained(str(self.folder))
        except Exception as error:  # the tokenizers library raises bare Exceptions for broken files
            raise CheckpointError(f"the tokenizer in {self.folder} cannot be read: {_line(error)}") from None


class Tensors:
    """The tensors of one folder's safetensors file, or of its shards. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.where = folder / "model.safetensors"
        index = folder / "model.safetensors.index.json"
        if self.where.exists():
            names = [self.where]
        elif index.exists():
            names = [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            raise CheckpointError(f"{folder} has no model.safetensors; expected a Qwen3-TTS-12Hz checkpoint folder")
        self.home: dict[str, Any] = {}
        for path in names:
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} is broken or cut short ({_line(error)}); download or copy the checkpoint again"
                ) from None
            self.home.update(dict.fromkeys(file.keys(), file))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; a missing one is named."""
        if name not in self.home:
            raise CheckpointError(f"{self.where} has no tensor {name!r}; its config.json asks for one")
        return tuple(self.home[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self.home[name].get_tensor(name)


def find(name: str) -> Path:
    """The folder of a checkpoint, downloaded if need be. Raises DownloadError, CheckpointError, UnknownNameError."""
    if name == EMBEDDED:
        return Path(__file__).parent / "embedded"
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"model {name!r} is a file; expected a checkpoint folder, 'owner/name' or {EMBEDDED!r}")
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise UnknownNameError(
            f"no model {name!r}: expected {EMBEDDED!r}, an existing folder, or a Hugging Face name such as {OFFICIAL[0]}"
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    def fetch(local: bool) -> Path:
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=local))

    try:
        folder = fetch(local=True)
        if all((folder / needed).exists() for needed in _NEEDED):
            return folder
    except (OSError, ValueError):
        pass  # not in the cache yet
    try:
        return fetch(local=False)
    except errors.GatedRepoError:
        raise DownloadError(f"model {name!r} is gated: accept its terms on Hugging Face and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"no model {name!r} on Hugging Face, or it is private (set HF_TOKEN); official names: {', '.join(OFFICIAL)}"
        ) from None
    except errors.HFValidationError:
        raise UnknownNameError(f"no model {name!r}: a Hugging Face name looks like {OFFICIAL[0]}") from None
    except Exception as error:  # whichever HTTP library is underneath raises its own
        raise DownloadError(
            f"model {name!r} is not in the local cache and cannot be downloaded ({_line(error)}); "
            "connect to the network, pass a local folder, or use --model embedded"
        ) from None


def _fill(module: nn.Module, tensors: Tensors, prefix: str, dtype: torch.dtype) -> None:
    """Give a module on the meta device its tensors, each checked against the shape its config asks for."""
    state: Mapping[str, Tensor] = module.state_dict()
    for name, wanted in state.items():
        found = tensors.shape(prefix + name)
        if found != tuple(wanted.shape):
            raise CheckpointError(
                f"{tensors.where}: {prefix + name} should have shape {tuple(wanted.shape)} by its config.json, "
                f"but has {found}"
            )
    try:
        loaded = {name: tensors.read(prefix + name) for name in state}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{tensors.where} cannot be read ({_line(error)}); download it again") from None
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in loaded.items()}
    module.load_state_dict(cast, assign=True)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
