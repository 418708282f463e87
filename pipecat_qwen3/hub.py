"""A model name in, its folder out: the embedded voice, a local folder, or a Hugging Face repository, downloaded once.

Configs are fetched and read before weights, so that a wrong name costs no gigabytes. What is in the cache is opened
without any network. Knows no tensors.
"""

import contextlib
import errno
import os
import re
from pathlib import Path

from pipecat_qwen3.config import read_codec_config, read_model_config
from pipecat_qwen3.errors import CheckpointError, DownloadError, UnknownNameError
from pipecat_qwen3.files import weight_files

EMBEDDED = "embedded"
"""Name of the small voice that ships with the package."""

OFFICIAL = (
    "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice",
    "Qwen/Qwen3-TTS-12Hz-0.6B-Base",
    "Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice",
    "Qwen/Qwen3-TTS-12Hz-1.7B-Base",
    "Qwen/Qwen3-TTS-12Hz-1.7B-VoiceDesign",
)

# Only the top folder's: repositories of finetunes hold training steps in folders of their own.
_CONFIGS = ("config.json", "generation_config.json", "speech_tokenizer/config.json")
_TOKENIZER = ("tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.json")
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "speech_tokenizer/*")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)


def find(name: str) -> Path:
    """The folder of a checkpoint, downloaded if need be.

    name  "embedded", a folder, or "owner/name" on Hugging Face; "owner/name@revision" pins a branch, tag or commit
    Raises UnknownNameError, DownloadError or CheckpointError.
    """
    if name == EMBEDDED:
        return Path(__file__).parent / "embedded"
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise CheckpointError(f"model {_short(name)} is a file; pass the folder of a checkpoint, or {EMBEDDED!r}")
    if not _REPOSITORY.fullmatch(name):
        expected = f"{EMBEDDED!r}, an existing folder, or a Hugging Face name such as {OFFICIAL[0]}"
        raise UnknownNameError(f"no model {_short(name)}: expected {expected}")
    repository, _, revision = name.partition("@")
    return _fetch(name, repository, revision or None)


def _fetch(name: str, repository: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})

    def fetch(*patterns: str, bar: type[tqdm] = tqdm) -> Path:
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns), tqdm_class=bar))
        except Exception as error:  # whichever HTTP library is underneath raises its own
            raise _explain(name, error) from None

    folder = _cached(name, repository, revision)
    if folder is not None and _missing(folder) is None:
        return folder
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"model {name!r} is not (or only in part) in the local cache, and HF_HUB_OFFLINE forbids a download; "
            "unset it, pass a local folder, or use the embedded voice"
        )
    folder = fetch(*_CONFIGS, bar=NoBar)
    if all(os.path.isfile(folder / config) for config in _CONFIGS):
        read_model_config(folder)
        read_codec_config(folder)
        folder = fetch(*_CONFIGS, *_TOKENIZER, *_WEIGHTS)
    if missing := _missing(folder):
        raise DownloadError(
            f"model {name!r} came without {missing}; check the network and run again, or choose a complete "
            f"Qwen3-TTS-12Hz checkpoint such as {OFFICIAL[0]}"
        )
    return folder


def _cached(name: str, repository: str, revision: str | None) -> Path | None:
    """The snapshot in the cache, whole or in part."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError:
        raise UnknownNameError(f"no model {_short(name)}: a Hugging Face name looks like {OFFICIAL[0]}") from None
    except OSError:  # a cache that cannot be read; the download will say why
        return None
    return Path(config).parent if isinstance(config, str) else None


def _missing(folder: Path) -> str | None:
    """The first file that opening needs and a snapshot lacks."""
    needed = [*_CONFIGS, "tokenizer_config.json"]
    if not os.path.isfile(folder / "tokenizer.json"):
        needed += ["vocab.json", "merges.txt"]
    for part in ("", "speech_tokenizer/"):
        weights = f"{part}model.safetensors"
        if not os.path.isfile(folder / f"{weights}.index.json"):
            needed.append(weights)
        else:
            with contextlib.suppress(CheckpointError):  # of a broken index; who opens it will say so
                needed += [f"{part}{path.name}" for path in weight_files(folder / part)]
    return next((name for name in needed if not os.path.isfile(folder / name)), None)


def _explain(name: str, error: Exception) -> DownloadError:
    """What went wrong with a download and what to do, in one line."""
    from huggingface_hub import constants, errors

    # A lost connection and a refusing server arrive wrapped in "not found in the cache".
    wrapped = isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception)
    cause = error.__cause__ if wrapped else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        why, do = "is gated", "accept its terms on its Hugging Face page and set HF_TOKEN"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        why = "is no folder here and no public model on Hugging Face"
        do = f"check the spelling, or set HF_TOKEN if it is private; the official ones are {', '.join(OFFICIAL)}"
    elif isinstance(cause, errors.RevisionNotFoundError):
        why, do = "has no such revision on Hugging Face", "check what follows the @"
    elif status in (401, 403):
        why, do = f"is refused by Hugging Face ({status})", "renew HF_TOKEN, or unset it"
    elif isinstance(cause, OSError) and (cause.errno in _DISK or cause.filename):
        why = f"cannot be stored in {constants.HF_HUB_CACHE} ({cause.strerror})"
        do = "make room or give access there, or set HF_HOME to a folder on another disk"
    else:
        detail = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
        why = f"is not in the local cache and cannot be downloaded ({detail})"
        do = "check the network and run again (complete files are kept), pass a local folder, or use the embedded voice"
    return DownloadError(f"model {name!r} {why}; {do}")


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "…")
