"""What a frame and a voice cost: the benches at toy size, their sums against counts made by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bench import memory, step
from bench.floor import works
from bench.geometry import build
from pipecat_qwen3.codec_stream import Product
from pipecat_qwen3.codec_torch import TorchPass
from pipecat_qwen3.local import LocalBackend


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings are tried less often."""
    from bench import machine

    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "MATRICES", {"cpu": (64,)})


@pytest.mark.usefixtures("quick")
def test_every_batch_is_timed_at_every_length(tiny: Callable[..., Path], tmp_path: Path) -> None:
    command = ["--geometry", str(tiny("custom_voice")), "--dtype", "fp32", "--device", "cpu", "--max-batch", "2"]
    command += ["--batch", "1", "2", "--context", "8", "24", "--frames", "3", "--results", str(tmp_path)]
    record = step.main(command)
    cases = [(row["context"], row["batch"]) for row in record["rows"]]
    assert cases == [(8, 1), (8, 2), (24, 1), (24, 2)]
    assert record["backend"]["name"] == "numba"
    for row in record["rows"]:
        assert len(row["wall_ms"]) == len(row["cpu_ms"]) == 3
        assert min(row["wall_ms"]) > 0
        assert row["floor_ms"] > 0
    kv_of_a_position = 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, width, fp32
    assert record["rows"][2]["bytes"] - record["rows"][0]["bytes"] == 16 * kv_of_a_position
    assert record["rows"][1]["bytes"] - record["rows"][0]["bytes"] == (8 + 1) * kv_of_a_position


def test_more_voices_than_the_step_is_built_for_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--batch", "4", "--max-batch", "2"])
    assert "--batch 4 needs --max-batch of at least that" in capsys.readouterr().err


def test_the_floor_counts_the_codec_s_flops_whoever_computes_them(tiny: Callable[..., Path]) -> None:
    class Unseen(TorchPass):
        """Stands for kernels whose flops torch does not count."""

        def product(self, x: torch.Tensor, p: Product, plus: torch.Tensor | None = None) -> torch.Tensor:
            raise NotImplementedError

    model = build(str(tiny("custom_voice")), torch.float32, torch.device("cpu"))
    counted = works(model, 2, 8)["codec"].flops
    assert counted > 0
    model.codec.passes = Unseen
    assert works(model, 2, 8)["codec"].flops == counted


def test_memory_is_told_by_part_and_each_tensor_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("custom_voice")
    command = ["--model", str(folder), "--dtype", "fp32", "--device", "cpu", "--max-batch", "2", "--positions", "128"]
    command += ["--voices", "1", "2", "--max-frames", "2", "--results", str(tmp_path)]
    record = memory.main(command)
    kv = 3 * 2 * 2 * 128 * 32 * 4  # layers, keys and values, heads, positions, width, fp32
    assert record["row_mb"] == {"rows": 2, "KV": round(kv / 1e6, 3), memory.STATE: record["row_mb"][memory.STATE]}
    assert record["parts_mb"]["KV of all rows"] == pytest.approx(2 * kv / 1e6, abs=1e-3)
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        every = tuple(tensors.keys())
        names = [name for name in every if ".layers." in name or "head" in name]
        body = sum(tensors.get_tensor(name).nbytes for name in names)
    assert record["parts_mb"]["talker and code predictor"] >= 0.99 * body / 1e6
    assert record["parts_mb"]["cached prefixes"] > 0
    assert list(record["held_mb"]) == ["imports", "open", "after 1 at once", "after 2 at once"]
    assert record["files_mb"]["model.safetensors"] == pytest.approx(
        (folder / "model.safetensors").stat().st_size / 1e6, abs=1e-3
    )


def test_a_memory_that_two_objects_share_counts_once(tiny: Callable[..., Path]) -> None:
    backend = LocalBackend.open(str(tiny("custom_voice")), dtype="fp32", device="cpu", max_batch=1, positions=64)
    kv = vars(backend.engine.step)["kv"]
    seen: set[int] = set()
    assert memory.tensor_mb([kv, kv[0], {"again": [kv.view(-1)]}], seen) == round(kv.nbytes / 1e6, 3)
    assert memory.tensor_mb([kv], seen) == 0
    assert memory.tensor_mb([torch.zeros(250_000)], seen) == 1.0
    backend.close()
