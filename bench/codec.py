"""Milliseconds a frame of the streaming codec beside its floor, against decoding anew with context, and its exactness.

    python -m bench.codec [--geometry 12hz] [--voices 1 8] [--frames 1 2 4 8]

Prints the floor first. On a GPU the plain torch pass in the same graphs and TF32 are measured as well, and the codec
beside a kernel that fills the GPU. Raw samples go to bench/results.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.geometry import CODEC
from bench.machine import copy_gbs, facts, matmul_gflops, read_gbs, settle, write
from bench.watch import Watch
from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.codec import CodecDecoder, FoldedCodec
from pipecat_qwen3.codec_runner import CodecRunner, open_codec
from pipecat_qwen3.codec_state import CodecState
from pipecat_qwen3.codec_stream import Product
from pipecat_qwen3.codec_torch import TorchPass
from pipecat_qwen3.device import pick_device
from pipecat_qwen3.errors import program

CONTEXT = 25
"""Frames before a chunk that decoders without state decode again, as the official chunked decode."""

WHOLE = 100
"""Frames of a whole utterance: eight seconds."""

WARM = 3
"""Laps that do not count."""


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    device = pick_device(args.device)
    say = print if not args.json else (lambda *_: None)
    machine = facts(device)
    say(f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, load {machine['load_average'][0]}")
    decoder = _decoder(args.geometry).eval().requires_grad_(False)
    floor = Floor(decoder, device)
    say(floor)
    with torch.inference_mode():
        exact = exactness(decoder, device)
        say(_exactness_text(exact))
        rows = []
        for name, codec in _kinds(decoder.to(device)).items():
            runner = open_codec(codec, max(args.voices), max(args.voices), own_stream=False)
            rows += [row | {"kind": name} for row in measure(runner, floor, args.voices, args.frames, args.laps)]
            say(_table(rows, name))
        together = []
        if device.type == "cuda":
            from bench.beside import beside  # needs Triton

            together = beside(decoder, args.laps)
        for row in together:
            say(f"{row['what']:<60}{statistics.median(row['ms']):8.3f} ms")
    record = {
        "bench": "codec",
        "machine": machine | {"load_average_after": facts(device)["load_average"]},
        "settings": vars(args) | {"device": str(device)},
        "floor": floor.record(),
        "exactness": exact,
        "stages": rows,
        "beside": together,
    }
    path = write(f"codec-{args.geometry.split('/')[-1]}-{device.type}-t{args.threads}", record)
    say(f"raw samples: {path.relative_to(path.parents[2])}")
    if args.json:
        json.dump(record, sys.stdout)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.codec", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--geometry", default="embedded", help="embedded, 12hz (random weights), or a checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--voices", type=int, nargs="+", default=[1], help="voices of a call")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 2, 4, 8], help="new frames of a call")
    parser.add_argument("--laps", type=int, default=50, help="calls that count")
    parser.add_argument("--json", action="store_true", help="print the run's JSON instead of tables")
    return parser.parse_args()


def _decoder(geometry: str) -> CodecDecoder:
    return CodecDecoder(CODEC) if geometry == "12hz" else Checkpoint.open(geometry).load_codec()


def _kinds(decoder: CodecDecoder) -> dict[str, FoldedCodec]:
    """What to measure: what is used, and on a GPU what it is compared with."""
    kinds = {"used": decoder.fold()}
    if decoder.pre_conv.conv.weight.is_cuda:
        kinds |= {"tf32": decoder.fold(tf32=True), "torch": FoldedCodec(decoder)}
    return kinds


class Floor:
    """The least milliseconds a frame: fp32 weights once a call, and two flops a weight and position."""

    def __init__(self, decoder: CodecDecoder, device: torch.device) -> None:
        used = [p for name, p in decoder.named_parameters() if not name.startswith("quantizer")]
        self.bytes = 4 * sum(p.numel() for p in used)
        with torch.device("meta"):
            codec, state = CodecDecoder(decoder.config).fold(), CodecState.zeros(decoder.config, 1, "meta")
            with FlopCounterMode(display=False) as counter:
                codec.decode(torch.zeros(1, decoder.config.codebooks, 1, dtype=torch.long), state, torch.tensor([0]))
        self.flops = counter.get_total_flops()
        self.copy_gbs, self.read_gbs = copy_gbs(device), read_gbs(self.bytes, device)
        self.gflops = matmul_gflops(torch.float32, device)

    def ms(self, voices: int, frames: int) -> float:
        """Of one frame of all voices, `frames` a call."""
        return max(self.bytes / frames / self.read_gbs, voices * self.flops / self.gflops) / 1e6

    def record(self) -> dict[str, float]:
        """For JSON."""
        return {name: round(value, 2) for name, value in vars(self).items()}

    def __str__(self) -> str:
        return (
            f"floor of a frame: {self.bytes / 1e6:.1f} MB at {self.read_gbs:.0f} GB/s (copy {self.copy_gbs:.0f}) = "
            f"{self.bytes / self.read_gbs / 1e6:.3f} ms; {self.flops / 1e9:.2f} GFLOP at {self.gflops:.0f} GFLOP/s = "
            f"{self.flops / self.gflops / 1e6:.3f} ms"
        )


def measure(runner: CodecRunner, floor: Floor, voices: list[int], frames: list[int], laps: int) -> list[dict[str, Any]]:
    """Every way to decode: ms a frame between events (on a CPU wall time), until the host has samples, of CPU."""
    config, device, result = runner.codec.config, runner.codec.device, []
    calls = 10 if device.type == "cuda" else 1  # so that enqueuing hides behind the work before
    ways = [(f"stream, {t} a call", n, t, 0) for n in voices for t in frames]
    ways += [(f"{CONTEXT} frames again, {t} a call", 1, t, CONTEXT) for t in frames] + [("whole", 1, WHOLE, 0)]
    for name, n, new, context in ways:
        watch, arrivals = Watch(device), []
        codes = torch.randint(config.codebook_size, (n, config.codebooks, context + new), device=device)

        def decode(codes: Tensor = codes, n: int = n, context: int = context) -> np.ndarray | None:
            if context:
                runner.reset(0)
            samples = runner.decode(codes, range(n))
            return samples.wait() if device.type == "cpu" else None

        for _ in range(WARM + (laps if new < WHOLE else -(-laps // 10))):
            with watch.lap("decode"):
                for _ in range(calls):
                    decode()
            began = time.perf_counter()
            if device.type == "cuda":
                runner.decode(codes, range(n)).wait()
            arrivals.append(1e3 * (time.perf_counter() - began) / new)
        result.append(
            {"way": name, "voices": n, "frames": new, "floor_ms": round(floor.ms(n, new), 4)}
            | {"ms": [round(x / new / calls, 4) for x in watch.wall["decode"][WARM:]]}
            | {"arrival_ms": [round(x, 4) for x in arrivals[WARM:]] if device.type == "cuda" else None}
            | {"cpu_ms": [round(x / new / calls, 4) for x in watch.cpu["decode"][WARM:]]}
        )
    settle(device)
    return result


def _rounding(rounded: Callable[[Tensor], Tensor]) -> type[TorchPass]:
    """A pass whose products see their inputs and weights rounded."""

    class Rounding(TorchPass):
        def _map(self, x: Tensor, p: Product) -> Tensor:
            return super()._map(rounded(x), replace(p, weight=rounded(p.weight)))

    return Rounding


class ThreeTf32(TorchPass):
    """A pass whose products are made of three, as the kernels make them."""

    def _map(self, x: Tensor, p: Product) -> Tensor:
        a, b = _high(x), _high(p.weight)
        small = super()._map(_high(x - a), replace(p, weight=b, bias=None))
        small = small + super()._map(a, replace(p, weight=_high(p.weight - b), bias=None))
        return super()._map(a, replace(p, weight=b)) + small


def _high(x: Tensor) -> Tensor:
    """The first 11 bits, which is what tensor cores see of fp32 as TF32."""
    return (x.contiguous().view(torch.int32) & -8192).view(torch.float32)


def exactness(decoder: CodecDecoder, device: torch.device, frames: int = 12) -> dict[str, dict[str, float]]:
    """Error of number formats against the whole decode in fp64 on the CPU; the streams have one frame a call."""
    codes = torch.randint(decoder.config.codebook_size, (1, decoder.config.codebooks, frames))
    oracle = copy.deepcopy(decoder).double()(codes)

    def stream(codec: FoldedCodec) -> Tensor:
        runner = open_codec(codec, 1, 1)
        pieces = [runner.decode(codes[..., t : t + 1].to(codec.device), [0]).wait() for t in range(frames)]
        return torch.from_numpy(np.concatenate(pieces, 1))

    made = {
        "fp32": stream(FoldedCodec(decoder)),
        "3 x TF32 (emulated)": stream(FoldedCodec(decoder, ThreeTf32)),
        "TF32 (emulated)": stream(FoldedCodec(decoder, _rounding(_high))),
        "bf16 (emulated)": stream(FoldedCodec(decoder, _rounding(lambda x: x.bfloat16().float()))),
        "bf16 weights": stream(copy.deepcopy(decoder).bfloat16().fold()),
    }
    if device.type == "cuda":
        there = copy.deepcopy(decoder).to(device)
        made |= {"GPU": stream(there.fold()), "GPU, TF32": stream(there.fold(tf32=True))}
    return {name: _error(wave, oracle) for name, wave in made.items()}


def _error(wave: Tensor, oracle: Tensor) -> dict[str, float]:
    error = wave.double() - oracle
    snr = 10 * torch.log10(oracle.square().mean() / error.square().mean())
    return {"snr_db": round(float(snr), 1), "max_error": float(f"{error.abs().max():.2g}")}


def _exactness_text(exact: dict[str, dict[str, float]]) -> str:
    lines = [f"{name:<24}{e['snr_db']:8.1f} dB{e['max_error']:12.1e}" for name, e in exact.items()]
    return "\n".join(["\nagainst fp64: signal to noise, largest error", *lines])


def _table(rows: list[dict[str, Any]], kind: str) -> str:
    lines = [f"\n{kind}: ms a frame{'floor':>22}{'median':>9}{'p95':>9}{'CPU':>9}{'x floor':>9}{'arrival':>9}"]
    for row in rows:
        if row["kind"] == kind:
            median, arrival = statistics.median(row["ms"]), row["arrival_ms"]
            lines.append(
                f"{row['way']:<30}x{row['voices']:<3}{row['floor_ms']:9.3f}{median:9.3f}"
                f"{np.percentile(row['ms'], 95):9.3f}{statistics.median(row['cpu_ms']):9.3f}"
                f"{median / row['floor_ms']:9.1f}{f'{statistics.median(arrival):9.3f}' if arrival else ''}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    program(main)
