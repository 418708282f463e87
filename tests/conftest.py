"""Shared small things: one torch thread, tiny random checkpoints, the embedded voice in fp32, opened once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from loguru import logger

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when whoever is first imports Triton

from pipecat_qwen3.local import LocalBackend
from tests.random_checkpoint import Variant, make

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logs_stay_on() -> Iterator[None]:
    """The benches and bots silence Pipecat's log for their process, which here is everybody's."""
    yield
    logger.enable("pipecat")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny random fp32 checkpoint: tiny("custom_voice", "tiny-projected")."""
    made: dict[tuple[str, str], Path] = {}

    def folder(variant: Variant = "custom_voice", geometry: str = "tiny") -> Path:
        key = (variant, geometry)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{variant}-{geometry}")
            make(made[key], variant, geometry, "fp32")  # type: ignore[arg-type]
        return made[key]

    return folder


@pytest.fixture(scope="session")
def embedded() -> Iterator[LocalBackend]:
    """The embedded voice on the CPU in fp32, eight voices at once."""
    backend = LocalBackend.open("embedded", device="cpu", dtype="fp32", max_batch=8)
    yield backend
    backend.close()
