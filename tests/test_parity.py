"""Prompts, codes and samples against what the official package made of the same checkpoints (tests/golden)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipecat_qwen3.backend import Request
from pipecat_qwen3.delivery import FADE_SAMPLES
from pipecat_qwen3.local import LocalBackend
from tests.golden.cases import EMBEDDED
from tests.ours import Ours
from tests.random_checkpoint import digest, make

GOLDEN = Path(__file__).parent / "golden"
TOLD: dict[str, Any] = json.loads((GOLDEN / "goldens.json").read_text(encoding="utf-8"))
SPOKEN = [case for case in TOLD["cases"] if not case["clone"]]  # backends take no reference audio
WITH_PROMPT = [case for case in SPOKEN if len(case["requests"]) == 1 and case["name"].endswith("greedy")]


def named(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case["name"].replace(" ", "-") for case in cases])


@pytest.fixture(scope="module")
def golden() -> Iterator[np.lib.npyio.NpzFile]:
    with np.load(GOLDEN / "goldens.npz") as arrays:
        yield arrays


Side = Callable[[dict[str, Any]], Ours]


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory, embedded: LocalBackend) -> Iterator[Side]:
    """Our side of a case; each checkpoint is opened once and speaks all its cases."""
    opened: dict[str, Ours] = {}

    def get(case: dict[str, Any]) -> Ours:
        checkpoint = case["checkpoint"]
        if checkpoint not in opened:
            folder = embedded.checkpoint.folder
            if checkpoint != EMBEDDED:
                variant, geometry, seed = checkpoint.split("/")
                folder = make(tmp_path_factory.mktemp("parity"), variant, geometry, "fp32", int(seed))  # type: ignore[arg-type]
            found, wanted = digest(folder), TOLD["checkpoints"][checkpoint]
            assert found == wanted, (
                f"checkpoint {checkpoint} is not the one that the goldens were made from (sha256 {found[:12]}…, then "
                f"{wanted[:12]}…): tests/random_*.py or the embedded voice have changed; make the goldens again"
            )
            backend = embedded if checkpoint == EMBEDDED else LocalBackend.open(str(folder), device="cpu", dtype="fp32")
            opened[checkpoint] = Ours(backend, [one for one in SPOKEN if one["checkpoint"] == checkpoint])
        return opened[checkpoint]

    yield get
    for checkpoint, ours in opened.items():
        if checkpoint != EMBEDDED:
            ours.backend.close()


@named(WITH_PROMPT)
def test_the_prompt_is_the_official_one(case: dict[str, Any], side: Side, golden: Any) -> None:
    prompt, trailing = side(case).prompt(Request(**case["requests"][0]))
    for ours, name in ((prompt, "prompt"), (trailing, "trailing")):
        official = torch.from_numpy(golden[f"{case['name']}/0/{name}"])
        assert ours.shape == official.shape
        # The embedded voice's embeddings reach 58, where fp32 goes in steps of 4e-6.
        torch.testing.assert_close(ours, official, rtol=1e-6, atol=1e-5)


@named(SPOKEN)
def test_the_codes_are_the_official_ones(case: dict[str, Any], side: Side, golden: Any) -> None:
    for row, certain in enumerate(case["certain"]):
        _, result = side(case).spoken[case["name"], row]
        assert result.codes is not None
        official = golden[f"{case['name']}/{row}/codes"]
        np.testing.assert_array_equal(result.codes[:certain], official[:certain])
        if certain > len(official):
            assert len(result.codes) == len(official)
            assert result.end == ("eos" if case["ended"][row] else "cap")


@named([case for case in SPOKEN if case["name"] in ("unprojected whole sampled", "embedded whole greedy")])
def test_the_samples_are_the_official_ones(case: dict[str, Any], side: Side, golden: Any) -> None:
    pcm, result = side(case).spoken[case["name"], 0]
    official = golden[f"{case['name']}/0/wav"]
    assert len(pcm) == len(official)
    faded = 0 if result.end == "eos" else FADE_SAMPLES
    heard = len(pcm) - faded
    np.testing.assert_allclose(pcm[:heard] / 32768, official[:heard], rtol=0, atol=1e-4)


def test_few_utterances_hang_on_a_decision_that_fp32_cannot_make(golden: Any) -> None:
    frames, compared = 0, 0
    for case in SPOKEN:
        for row, certain in enumerate(case["certain"]):
            official = len(golden[f"{case['name']}/{row}/codes"])
            frames, compared = frames + official, compared + min(certain, official)
    assert compared > 0.9 * frames


def test_every_mode_and_layout_is_among_the_goldens() -> None:
    seen = {
        (
            case["checkpoint"].split("/")[0],
            request.get("layout", "whole"),
            "instruct" in request,
            len(case["requests"]) > 1,
        )
        for case in SPOKEN
        for request in case["requests"]
    }
    layouts = ("whole", "streaming")
    for layout in layouts:
        for instructed in (True, False):
            assert ("custom_voice", layout, instructed, False) in seen
            assert ("custom_voice", layout, instructed, True) in seen
        assert ("voice_design", layout, True, False) in seen
        assert (EMBEDDED, layout, False, False) in seen
