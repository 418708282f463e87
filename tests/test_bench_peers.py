"""Ours beside others: the checkpoint that never ends, sides in processes of their own, reasons for those that miss."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bench import peers


@pytest.fixture
def checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny checkpoint of this test alone."""
    return Path(shutil.copytree(tiny("custom_voice"), tmp_path / "checkpoint"))


def test_an_endless_checkpoint_differs_in_one_row_only(tiny: Callable[..., Path], checkpoint: Path) -> None:
    peers.endless(checkpoint)
    eos, head = 2150, "talker.codec_head.weight"
    with (
        safe_open(tiny("custom_voice") / "model.safetensors", "pt") as before,
        safe_open(checkpoint / "model.safetensors", "pt") as after,
    ):
        names = tuple(before.keys())
        assert names == tuple(after.keys())
        for name in names:
            old, new = before.get_tensor(name), after.get_tensor(name)
            if name == head:
                assert old[eos].abs().max() > 0
                old[eos] = 0
            assert torch.equal(old, new), name


def test_sides_take_turns_and_who_cannot_run_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "floor_ms", lambda *_: {"model": 1.0, "codec": 1.0})
    peers.endless(checkpoint)
    command = ["--checkpoint", str(checkpoint), "--dtype", "fp32", "--device", "cpu", "--threads", "1"]
    command += ["--frames", "3", "--rounds", "1", "--results", str(tmp_path / "results")]
    record = peers.main([*command, "--python", "qwen-tts=/bin/false"])
    sides = {side["name"]: side for side in record["sides"]}
    assert list(sides) == list(peers.SIDES)
    assert sides["qwen-tts"]["missing"] == "its process ended with status 1"
    assert sides["faster-qwen3-tts"]["missing"] == "it does not run on cpu: its graphs need CUDA"
    assert "--gguf TALKER CODEC" in sides["qwentts.cpp"]["missing"]
    runs = sides["ours"]["runs"]
    assert [(run["text"], run["mode"], run["codec"]) for run in runs] == [
        (text, mode, codec) for text in (0, 1) for mode in ("whole", "streamed") for codec in (True, False)
    ]
    for run in runs:
        assert run["frames"] == 3
        assert 0 < run["first_byte_s"] <= run["total_s"]
    assert sides["ours"]["versions"]["torch"] == torch.__version__
    assert record["settings"]["checkpoint"] == "checkpoint"
    assert record["settings"]["python"] == ["false"]
    (path,) = (tmp_path / "results").iterdir()
    assert str(tmp_path) not in path.read_text()  # a result tells nothing of where things lay


def test_a_side_that_dies_in_the_middle_keeps_the_others_going(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Dying:
        told = {"version": "1", "versions": {}, "how": "", "loaded_mb": 1, "modes": ["whole"], "codec": [True]}  # noqa: RUF012

        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, task: dict[str, object]) -> dict[str, object]:
            asked.append(self.name)
            if self.name == "qwen-tts" and len(asked) > 6:
                raise peers.Missing("its process ended with status 9")
            return {"frames": task["frames"], "total_s": 1.0, "first_byte_s": 1.0}

    @peers.contextmanager
    def started(name: str, *_: object):
        yield Dying(name)

    monkeypatch.setattr(peers, "started", started)
    monkeypatch.setattr(peers, "floor_ms", lambda *_: {"model": 1.0, "codec": 1.0})
    command = ["--checkpoint", str(tmp_path), "--sides", "ours", "qwen-tts", "--python", "qwen-tts=python"]
    record = peers.main([*command, "--rounds", "2", "--results", str(tmp_path / "results"), "--dtype", "fp32"])
    ours, theirs = record["sides"]
    assert theirs["missing"] == "its process ended with status 9"
    assert len(ours["runs"]) == 4
    assert asked[:4] == ["ours", "qwen-tts"] * 2
