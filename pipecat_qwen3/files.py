"""A checkpoint's files: JSON objects with checked types and ranges, the names of the weight files, and what to do.

Whatever is missing, mistyped or out of range is one line that names file and key. Knows neither tensors nor what a key
means.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipecat_qwen3.errors import CheckpointError

MOST = 1 << 20
"""No size of a checkpoint comes near this; beyond it a config is garbage."""

_KINDS = {bool: "true or false", str: "a string", dict: "an object", list: "a list"}


def remedy(path: Path) -> str:
    """What to do about a broken file of a checkpoint; depends on how it came here."""
    if Path(__file__).parent in path.parents:
        return "install pipecat-qwen3 again"
    for folder in path.parents:
        if folder.name.startswith("models--"):  # Hugging Face's cache keeps what it has, broken or not
            return f"delete {folder} and run again, which downloads it anew"
    return "copy or download the checkpoint again"


def check_file(path: Path) -> None:
    """Raise CheckpointError if a file is missing, unreadable, empty, or a text that stands for one never fetched."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; {remedy(path)}") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check what it is and who may read it"
        ) from None
    if not start:
        raise CheckpointError(f"{path} is empty; {remedy(path)}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names; they need not exist. Raises CheckpointError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.isfile(single):
        return [single]
    if not os.path.isfile(index):
        raise CheckpointError(f"{folder} has no model.safetensors; {remedy(single)}")
    keys = read_json(index)
    shards = list(keys("weight_map", dict).values())
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise keys.wrong("weight_map", "an object that names a file for each tensor")
    return [folder / shard for shard in sorted(set(shards))]


class Keys:
    """A JSON object of a file. Every method raises CheckpointError for a key that is missing or not as asked for."""

    def __init__(self, values: Mapping[str, Any], file: Path, path: str = "") -> None:
        self.values, self.file, self.path = values, file, path

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        """The error that says what `key` should be."""
        came = json.dumps(self.values.get(key))
        came = came if len(came) <= 60 else came[:60] + "…"
        line = f"{self.file}: {self.path}{key} should be {wanted}, but is {came}"
        return CheckpointError(f"{line}; correct it, or {remedy(self.file)}")

    def __call__(self, key: str, kind: type) -> Any:
        """A bool, str, dict or list."""
        value = self._get(key)
        if not isinstance(value, kind):
            raise self.wrong(key, _KINDS[kind])
        return value

    def at(self, key: str) -> "Keys":
        """The object under `key`."""
        return Keys(self(key, dict), self.file, f"{self.path}{key}.")

    def integer(self, key: str, low: int = 1, high: int = MOST) -> int:
        """An integer in low..high."""
        value = self._get(key)
        if not _is_integer(value, low, high):
            raise self.wrong(key, f"an integer in {low}..{high}")
        return value

    def integers(self, key: str, low: int = 1, high: int = MOST) -> tuple[int, ...]:
        """A list of integers in low..high, not empty."""
        values = self(key, list)
        if not values or not all(_is_integer(value, low, high) for value in values):
            raise self.wrong(key, f"a list of integers in {low}..{high}")
        return tuple(values)

    def ids(self, key: str, below: int) -> dict[str, int]:
        """An object of names and ids in 0..below-1; may be empty."""
        values = self(key, dict)
        if not all(_is_integer(value, 0, below - 1) for value in values.values()):
            raise self.wrong(key, f"an object of names and integers in 0..{below - 1}")
        return values

    def number(self, key: str, most: float = 1e9) -> float:
        """A number above 0 and up to `most`."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
            raise self.wrong(key, f"a number above 0 and up to {most:g}")
        return float(value)

    def only(self, key: str, wanted: Any) -> None:
        """Refuse any other value of an option that Qwen3-TTS leaves alone; it may be missing."""
        if self.values.get(key, wanted) != wanted:
            raise self.wrong(key, f"{json.dumps(wanted)}, as in every Qwen3-TTS-12Hz checkpoint")

    def _get(self, key: str) -> Any:
        if key not in self.values:
            line = f"{self.file} has no key '{self.path}{key}', which every Qwen3-TTS-12Hz checkpoint has"
            raise CheckpointError(f"{line}; add it, or {remedy(self.file)}")
        return self.values[key]


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def read_json(path: Path) -> Keys:
    """Read a JSON object. Raises CheckpointError if the file is missing, a stub, no JSON, or no object."""
    check_file(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too long a number, or nested without end
        raise CheckpointError(f"{path} is not JSON ({error}); {remedy(path)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} should hold a JSON object, but holds a {type(values).__name__}; {remedy(path)}")
    return Keys(values, path)
