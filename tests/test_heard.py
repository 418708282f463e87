"""What is spoken is heard: text -> engine -> audio -> speech recognition -> text."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import asr_loop
from pipecat_qwen3.backend import Layout, Request
from pipecat_qwen3.checkpoint import find
from pipecat_qwen3.local import LocalBackend
from tests.heard import errors_and_words, hear

SENTENCES = [
    "Hello there. How can I help you today?",
    "Your table is booked for two people tonight.",
    "The meeting starts at ten in the morning.",
    "I am very sorry to hear that.",
    "Please hold the line for a moment.",
    "The weather will be cold and dry tomorrow.",
    "Can you tell me your name and phone number?",
    "We are open from nine until five on weekdays.",
    "Would you like a window seat or an aisle seat?",
    "My brother lives in a small house near the river.",
    "Your package will be delivered before noon.",
    "Thank you for your patience, goodbye.",
]


def error_rate(backend: LocalBackend, layout: Layout) -> tuple[float, set[str]]:
    """Word error rate of the default voice over all sentences, greedy, and how the utterances ended."""
    wanted = [Request(text=s, layout=layout, greedy=True, ahead_s=None) for s in SENTENCES]
    streams = [backend.speak(request) for request in wanted]
    spoken = [np.concatenate([c.pcm for c in stream]) for stream in streams]
    wrong = words = 0
    for sentence, pcm in zip(SENTENCES, spoken, strict=True):
        errors, length = errors_and_words(sentence, hear(pcm))
        wrong, words = wrong + errors, words + length
    return wrong / words, {stream.wait().end for stream in streams}


@pytest.mark.parametrize("layout", ["whole", "streaming"])
def test_a_recogniser_understands_the_embedded_voice(embedded: LocalBackend, layout: Layout) -> None:
    rate, ends = error_rate(embedded, layout)
    assert rate <= 0.2
    assert ends == {"eos"}


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[LocalBackend]:
    """The embedded voice with noise on the attention weights of one layer."""
    folder = tmp_path / "damaged"
    shutil.copytree(find("embedded"), folder)
    weights = load_file(folder / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for part in "qkv":
        weight = weights[f"talker.model.layers.2.self_attn.{part}_proj.weight"]
        weight += torch.randn(weight.shape, generator=noise) * weight.float().std() * 2.5
    save_file(weights, folder / "model.safetensors")
    backend = LocalBackend.open(str(folder), device="cpu", dtype="fp32", max_batch=8)
    yield backend
    backend.close()


def test_a_damaged_layer_is_heard(damaged: LocalBackend) -> None:
    assert error_rate(damaged, "whole")[0] > 0.5


@pytest.mark.slow
def test_the_held_out_sentences_are_understood_in_both_voices_and_layouts(tmp_path: Path) -> None:
    path = tmp_path / "heard.json"
    asr_loop.main(["--device", "cpu", "--dtype", "fp32", "--json", str(path)])
    figures = json.loads(path.read_text())["figures"]
    for voice, most in {"rms": 0.2, "slt": 0.35}.items():
        for layout in ("whole", "streaming"):
            found = figures[f"{voice} {layout} greedy"]
            assert found["sentences"] >= 200
            assert found["wer"] <= most
            assert found["runaways_per_1000"] <= 5
