"""A model name in, its configs, tokenizer and weights out.

Every way in which files can be missing, broken or of another shape ends in one line that names the file and what to do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipecat_qwen3.codec import CodecDecoder
from pipecat_qwen3.config import CodecConfig, ModelConfig, read_codec_config, read_model_config
from pipecat_qwen3.errors import CheckpointError
from pipecat_qwen3.files import check_file, read_json, remedy, weight_files
from pipecat_qwen3.hub import EMBEDDED, OFFICIAL, find
from pipecat_qwen3.talker import Talker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EMBEDDED", "OFFICIAL", "Checkpoint", "Tensors", "find"]

_PLAIN = {"F64", "F32", "F16", "BF16"}


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

        name   "embedded", a folder, or a Hugging Face repository "owner/name", optionally with "@revision"
        Raises CheckpointError, DownloadError or UnknownNameError.
        """
        folder = find(str(name))
        config, codec_config = read_model_config(folder), read_codec_config(folder)
        made = (config.shape.codebooks, config.shape.codes)
        taken = (codec_config.codebooks, codec_config.codebook_size)
        if made != taken:
            raise CheckpointError(
                f"{folder}: the talker makes {made[0]} codes of {made[1]} values a frame, but speech_tokenizer takes "
                f"{taken[0]} of {taken[1]}; take both parts from one checkpoint"
            )
        return cls(str(name), folder, config, codec_config)

    def load_talker(self, dtype: torch.dtype) -> Talker:
        """The talker and code predictor on the CPU in the given dtype. Raises CheckpointError."""
        with torch.device("meta"), _Unfilled():
            talker = Talker(self.config)
        _fill(talker, Tensors(self.folder), "talker.", dtype)
        return talker.eval().requires_grad_(False)

    def load_codec(self) -> CodecDecoder:
        """The codec's decoder on the CPU in fp32: in bf16 its output loses 8 bits and more. Raises CheckpointError."""
        with torch.device("meta"), _Unfilled():
            decoder = CodecDecoder(self.codec_config)
        _fill(decoder, Tensors(self.folder / "speech_tokenizer"), "decoder.", torch.float32)
        return decoder.eval().requires_grad_(False)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The text tokenizer. Raises CheckpointError."""
        from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined] # transformers 5 keeps it as an alias

        read_json(self.folder / "tokenizer_config.json")
        if (self.folder / "tokenizer.json").is_file():
            check_file(self.folder / "tokenizer.json")
        else:
            read_json(self.folder / "vocab.json")
            check_file(self.folder / "merges.txt")
        again = remedy(self.folder / "vocab.json")
        try:
            tokenizer = Qwen2TokenizerFast.from_pretrained(str(self.folder))
        except Exception as error:  # the tokenizers library raises bare Exceptions for broken files
            raise CheckpointError(
                f"the tokenizer's files in {self.folder} are broken ({_line(error)}); {again}"
            ) from None
        self._check_tokenizer(tokenizer)
        return tokenizer

    def _check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Refuse the tokenizer of another checkpoint, or one without its merges: what it says would be gibberish."""
        ids, role = self.config.ids, "<|im_start|>assistant<|im_end|>"
        made, wanted = tokenizer(role).input_ids, [ids.im_start, ids.assistant, ids.im_end]
        if made != wanted:
            raise CheckpointError(
                f"the tokenizer's files in {self.folder} make {made} of {role}, but its config.json says {wanted}; "
                "take both from one checkpoint"
            )
        if (highest := max(tokenizer.get_vocab().values())) >= self.config.text_vocab:
            raise CheckpointError(
                f"the tokenizer's files in {self.folder} have ids up to {highest}, but its config.json gives room for "
                f"{self.config.text_vocab}; take both from one checkpoint"
            )


class Tensors:
    """The tensors of one folder's safetensors file, or of its shards. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._home: dict[str, tuple[Path, Any]] = {}
        for path in weight_files(folder):
            file = _open(path)
            self._home.update(dict.fromkeys(file.keys(), (path, file)))

    def names(self, prefix: str) -> set[str]:
        """Names that begin with `prefix`."""
        return {name for name in self._home if name.startswith(prefix)}

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape, or one that does not hold floating-point numbers as they are."""
        path, file = self._home[name]
        found = file.get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise CheckpointError(
                f"{path}: {name} should have shape {shape} by its config.json, but has {tuple(found.get_shape())}; "
                "take weights and config from one checkpoint"
            )
        if found.get_dtype() not in _PLAIN:
            raise CheckpointError(
                f"{path}: {name} should be stored as bf16, fp16 or fp32, but is {found.get_dtype()}; "
                "take a checkpoint that is not quantised"
            )

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy of the tensor in the given dtype: what is written over the file later must not change it."""
        path, file = self._home[name]
        try:
            tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({_line(error)}); {remedy(path)}") from None
        if not all(torch.isfinite(end) for end in torch.aminmax(tensor)):  # 30 times as fast as isfinite().all()
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity; take an earlier checkpoint, or {remedy(path)}"
            )
        return tensor.to(dtype, copy=True)


class _Unfilled(TorchFunctionMode):
    """Modules get no initial values: torch's first normal_ on the meta device imports its decompositions, for 1 s."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            return kwargs.get("tensor", *args[:1])
        return torch.empty(*args, **kwargs) if func is torch.randn else func(*args, **kwargs)


def _open(path: Path) -> Any:
    check_file(path)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is broken or cut short ({_line(error)}); {remedy(path)}") from None


def _fill(module: nn.Module, tensors: Tensors, prefix: str, dtype: torch.dtype) -> None:
    """Give a module on the meta device its tensors: exactly those of the file under `prefix`, all of them checked."""
    wanted = {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = tensors.names(prefix)
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(
            f"{tensors.folder} has no tensor {missing[0]}, which its config.json asks for ({len(missing)} of "
            f"{len(wanted)} are missing); take weights and config from one checkpoint"
        )
    if unknown := sorted(found - wanted.keys()):
        raise CheckpointError(
            f"{tensors.folder} has tensors that its config.json knows nothing of, such as {unknown[0]} ({len(unknown)} "
            "in all); take weights and config from one checkpoint"
        )
    for name, shape in wanted.items():
        tensors.check(name, shape)
    state = {name: tensors.read(prefix + name, dtype) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
