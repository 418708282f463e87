import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.errors import CheckpointError, DownloadError, UnknownNameError
from pipecat_qwen3.hub import OFFICIAL, find
from tests.fake_hub import FakeHub, Refusal
from tests.random_checkpoint import digest

ROOT = Path(__file__).parent.parent
WORKER = """
import json, os, sys
from pipecat_qwen3.errors import TTSError
from pipecat_qwen3.hub import find

def stay_here(event, args):
    host = args[0] if event == "socket.getaddrinfo" else args[1][0] if event == "socket.connect" else None
    if host not in (None, "127.0.0.1"):
        print("left this machine for", host, file=sys.stderr, flush=True)
        os._exit(9)

sys.addaudithook(stay_here)
for name in sys.stdin:
    try:
        answer = ["", str(find(name.rstrip("\\n")))]
    except TTSError as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), flush=True)
"""
"""Finds the models that are named on its input. Names are read when huggingface_hub is imported: hence a process."""

WEIGHTS = ["model.safetensors", "speech_tokenizer/model.safetensors"]


class Finder:
    """A process with an empty cache and a Hugging Face of its own."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        self.cache = home / "hub"
        self._log = home / "stderr.txt"
        clean = {key: value for key, value in os.environ.items() if key in ("PATH", "LD_LIBRARY_PATH")}
        own = {"HOME": str(home), "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", WORKER],
                env={**clean, **own, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __call__(self, name: str) -> Path:
        """The folder of a model."""
        error, answer = self._ask(name)
        assert not error, answer
        return Path(answer)

    def refuses(self, name: str) -> str:
        """The one line of the DownloadError."""
        error, answer = self._ask(name)
        assert error == "DownloadError", answer
        assert "\n" not in answer
        return answer

    def said(self) -> str:
        """What went to the terminal."""
        return self._log.read_text()

    def _ask(self, name: str) -> list[str]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.said()
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate(timeout=10)
        assert self._process.returncode == 0, self.said()


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def finder(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finder]:
    finder = Finder(hub.url, tmp_path_factory.mktemp("home"), TQDM_POSITION="-1")  # bars also without a terminal
    yield finder
    finder.close()


@contextmanager
def offline(finder: Finder, hub: FakeHub) -> Iterator[Finder]:
    """A second process, for which HF_HUB_OFFLINE is set, with the same cache."""
    second = Finder(hub.url, finder.cache.parent, HF_HUB_OFFLINE="1")
    yield second
    second.close()


def cached(finder: Finder, repository: str) -> Path:
    return finder.cache / f"models--{repository.replace('/', '--')}"


def test_a_model_is_downloaded_once_with_a_progress_bar_and_opens_without_the_network_later(hub, finder, tiny):
    name = OFFICIAL[0]
    hub.repositories[name] = tiny()
    folder = finder(name)
    assert digest(folder) == digest(tiny())
    assert re.search(r"100%.*[0-9.]+\s?MB?", finder.said())
    assert Checkpoint.open(folder).load_talker(torch.float32).config.variant == "custom_voice"
    hub.asked.clear()
    assert finder(name) == folder
    assert not hub.asked
    with hub.down():
        assert finder(name) == folder
    with offline(finder, hub) as cut_off:
        assert cut_off(name) == folder


def test_configs_are_read_before_weights_are_fetched(hub, finder, tiny, tmp_path):
    shutil.copytree(tiny(), other := tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "qwen2"}')
    hub.repositories["Qwen/Qwen2-72B"] = other
    error, line = finder._ask("Qwen/Qwen2-72B")
    assert error == "CheckpointError"
    assert "model_type should be 'qwen3_tts', but is 'qwen2'; choose a Qwen3-TTS-12Hz checkpoint" in line
    assert not set(hub.downloads("Qwen/Qwen2-72B")) & {*WEIGHTS, "vocab.json"}


def test_shards_are_downloaded_and_each_is_missed(hub, finder, tiny, tmp_path):
    shutil.copytree(tiny(), sharded := tmp_path / "sharded")
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (sharded / "model.safetensors").rename(sharded / first)
    shutil.copy(sharded / "speech_tokenizer" / "model.safetensors", sharded / second)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    hub.repositories["me/sharded"] = sharded
    folder = finder("me/sharded")
    (folder / second).unlink()
    with offline(finder, hub) as cut_off:
        assert "only in part" in cut_off.refuses("me/sharded")
    assert (finder("me/sharded") / second).read_bytes() == (sharded / second).read_bytes()


def test_the_training_steps_of_a_finetune_stay_where_they_are(hub, finder, tiny, tmp_path):
    shutil.copytree(tiny(), tuned := tmp_path / "tuned")
    shutil.copytree(tiny(), tuned / "checkpoint-epoch-0")
    hub.repositories["me/tuned"] = tuned
    assert digest(finder("me/tuned")) == digest(tiny())
    assert not [path for path in hub.downloads("me/tuned") if "epoch" in path]


GATED = {"X-Error-Code": "GatedRepo"}
UNKNOWN = {"X-Error-Code": "RepoNotFound"}
BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize("lost", ["config.json", "speech_tokenizer/config.json", "vocab.json", *WEIGHTS])
def test_a_repository_that_lacks_a_file_is_told_apart_from_a_broken_cache(hub, finder, tiny, tmp_path, lost):
    shutil.copytree(tiny(), partial := tmp_path / "partial")
    (partial / lost).unlink()
    hub.repositories[f"me/{lost.replace('/', '-')}"] = partial
    line = finder.refuses(f"me/{lost.replace('/', '-')}")
    assert f" came without {lost}; check the network and run again, or choose a complete Qwen3-TTS-12Hz ch" in line


@pytest.mark.parametrize(
    ("refusal", "line"),
    [
        (Refusal(403, GATED), "is gated; accept its terms on its Hugging Face page and set HF_TOKEN"),
        (Refusal(403, GATED, files_only=True), "is gated; accept its terms on its Hugging Face page and set HF_TOKEN"),
        (
            Refusal(401, UNKNOWN),
            "is no folder here and no public model on Hugging Face; check the spelling",
        ),
        (Refusal(404, UNKNOWN), "is no folder here and no public model on Hugging Face"),
        (Refusal(401, BAD_TOKEN), r"is refused by Hugging Face \(401\); renew HF_TOKEN, or unset it"),
        (Refusal(403), r"is refused by Hugging Face \(403\); renew HF_TOKEN"),
        (Refusal(500), r".* cannot be downloaded \(.*500.*\); check the network and run again .* the embedded voice"),
    ],
    ids=["gated", "gated files", "private", "not found", "bad token", "forbidden", "server error"],
)
def test_a_refusal_is_explained(hub, finder, tiny, refusal, line):
    hub.repositories["someone/model"] = tiny()
    hub.refusals["someone/model"] = refusal
    assert re.match(f"model 'someone/model' {line}", finder.refuses("someone/model"))


def test_an_unknown_model_comes_with_the_official_names(finder):
    line = finder.refuses("Qwen/Qwen3-TTS-12Hz-8B")
    assert all(name in line for name in OFFICIAL)


def test_a_server_that_cannot_be_reached_is_explained(hub, finder):
    with hub.down():
        line = finder.refuses("someone/else")
    assert "is not in the local cache and cannot be downloaded" in line
    assert "refused" in line
    with offline(finder, hub) as cut_off:
        line = cut_off.refuses("someone/else")
    assert line.startswith("model 'someone/else' is not (or only in part) in the local cache, and HF_HUB_OFFLINE")


def test_a_revision_can_be_pinned_and_an_unknown_one_is_explained(hub, finder, tiny):
    hub.repositories["me/pinned"] = tiny()
    assert finder(f"me/pinned@{hub.commit}") == finder("me/pinned") == finder("me/pinned@main")
    assert finder.refuses("me/pinned@v2") == (
        "model 'me/pinned@v2' has no such revision on Hugging Face; check what follows the @"
    )


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(hub, finder, tiny):
    hub.repositories["me/broken-off"] = tiny()
    hub.cut["model.safetensors"] = 12_000_000
    hub.asked.clear()
    assert digest(finder("me/broken-off")) == digest(tiny())
    ranges = [asked for _, path, asked in hub.asked if path.endswith("0/model.safetensors")]
    assert ranges[-1]  # after the first 10 MiB, which is what huggingface_hub writes at once


def test_after_a_failed_download_only_what_is_missing_is_fetched(hub, finder, tiny):
    hub.repositories["me/failed"] = tiny()
    hub.broken.add("model.safetensors")
    assert "run again (complete files are kept)" in finder.refuses("me/failed")
    with hub.down():
        finder.refuses("me/failed")
    hub.broken.clear()
    hub.asked.clear()
    assert digest(finder("me/failed")) == digest(tiny())
    assert hub.downloads("me/failed") == ["model.safetensors"]


def test_a_cache_that_lost_a_file_is_completed(hub, finder, tiny):
    hub.repositories["me/partial"] = tiny()
    lost = finder("me/partial") / "speech_tokenizer" / "model.safetensors"
    lost.resolve().unlink()
    with hub.down():
        finder.refuses("me/partial")
    with offline(finder, hub) as cut_off:
        assert "only in part" in cut_off.refuses("me/partial")
    assert digest(finder("me/partial")) == digest(tiny())


def test_a_file_that_broke_in_the_cache_says_what_to_delete(hub, finder, tiny):
    hub.repositories["me/rotten"] = tiny()
    folder = finder("me/rotten")
    rotten = (folder / "model.safetensors").resolve()
    rotten.write_bytes(rotten.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).load_talker(torch.float32)
    line = str(caught.value)
    assert line.startswith(f"{folder / 'model.safetensors'} is broken or cut short (")
    where = re.fullmatch(r".*; delete (.*) and run again, which downloads it anew", line)
    assert where
    assert Path(where[1]) == cached(finder, "me/rotten")
    shutil.rmtree(where[1])
    assert digest(finder("me/rotten")) == digest(tiny())


def test_a_full_disk_is_not_called_a_network_failure(monkeypatch):
    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    stored = r"cannot be stored in .* \(No space left on device\); make room or give access there"
    with pytest.raises(DownloadError, match=stored):
        find("me/big")


NO_MODELS = ["", " ", "nonsense", "/no/such/folder", "./no/such", "~nobody-here/x", "a/b/c", "a b/c", "a/b@", "a/b--c"]
NO_MODELS += ["x" * 9999, "a/\0", "a\n/b", "größe/a", "https://example.org/a/b"]


@pytest.mark.parametrize("name", NO_MODELS, ids=ascii)
def test_a_name_that_can_be_no_model_is_told_what_is_one(name):
    with pytest.raises(UnknownNameError) as caught:
        find(name)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    assert re.match(r"no model '.*': .*Hugging Face name.* Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice", line)


def test_a_folder_comes_before_a_repository_and_a_file_is_no_model(tmp_path, monkeypatch):
    (tmp_path / "Qwen" / "mine").mkdir(parents=True)
    (tmp_path / "Qwen" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("Qwen/mine") == Path("Qwen/mine")
    assert find("~/Qwen/mine") == tmp_path / "Qwen" / "mine"
    with pytest.raises(CheckpointError, match="model 'Qwen/file' is a file; pass the folder of a checkpoint"):
        find("Qwen/file")


def test_names_are_found_without_loading_torch(tmp_path):
    code = f"import sys; from pipecat_qwen3.hub import find; find({str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
