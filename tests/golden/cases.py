"""What the goldens say: checkpoints by variant, geometry and seed, and batches of requests to speak with them.

Knows neither the official package nor ours: keywords are those of pipecat_qwen3.Request, `seed` included.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

TEXT = "Hello world, this is a test of the speech."
CHINESE = "今天天气很好，我们一起去公园吧。"
INSTRUCT = "Please speak slowly, with a happy voice."
REFERENCE_TEXT = "One two three, she sells sea shells."
EMBEDDED = "embedded"

FRAMES = 24
GREEDY_FRAMES = 12


@dataclass(frozen=True)
class Case:
    """One call of the official package.

    checkpoint  "variant/geometry/seed" for random_checkpoint.make, or "embedded"
    requests    one, or a batch
    clone       "" or, for a base checkpoint, "x_vector" or "icl": what is taken from the reference audio
    """

    name: str
    checkpoint: str
    requests: tuple[dict[str, Any], ...]
    clone: str = ""


REAL_REQUEST: dict[str, Any] = {
    "text": "Hello world, this is a test.",
    "voice": "ryan",
    "language": "english",
    "layout": "streaming",
    "repetition_penalty": 1.0,
}
"""What is spoken at a published size; without a penalty, so that logits are those of the head."""

SAMPLINGS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.8, "predictor_top_p": 0.7},
    "cool": {"temperature": 0.6, "predictor_temperature": 1.3},
    "narrow": {"top_k": 8, "predictor_top_k": 3},
    "unlimited": {"top_k": 0, "predictor_top_k": 0, "top_p": 0.95},
    "penalty": {"repetition_penalty": 1.3, "top_k": 4, "temperature": 0.7, "predictor_top_k": 1},
    "no_penalty": {"repetition_penalty": 1.0, "top_k": 4, "temperature": 0.7, "predictor_top_k": 1},
}
"""Sampling parameters beside those of the checkpoint; the last two differ in the penalty alone."""


def cases(seed: int) -> Iterator[Case]:
    """Every case; `seed` picks the random checkpoints and the voices' random streams."""
    for case in _cases(seed):
        requests = (request | {"seed": request.get("seed", 0) + 1000 * seed} for request in case.requests)
        yield replace(case, requests=tuple(requests))


def _cases(checkpoint_seed: int) -> Iterator[Case]:
    yield from _custom_voice(f"custom_voice/tiny-projected/{checkpoint_seed}")
    yield from _plain(f"custom_voice/tiny/{checkpoint_seed}")
    for geometry in ("tiny", "tiny-projected"):
        yield from _voice_design(f"voice_design/{geometry}/{checkpoint_seed}")
        yield from _base(f"base/{geometry}/{checkpoint_seed}")
    for layout in ("whole", "streaming"):
        request = {"text": "Hello, how can I help?", "voice": "rms", "language": "english", "layout": layout}
        yield Case(f"embedded {layout} greedy", EMBEDDED, (request | {"greedy": True, "max_frames": 40},))
        yield Case(f"embedded {layout} sampled", EMBEDDED, (request | {"seed": 5, "max_frames": 40},))


def reference_audio(seconds: float = 1.5) -> np.ndarray:
    """Reference audio for a base checkpoint: noise under a slow envelope, fp32 [24000 seconds], the same everywhere."""
    count = int(24_000 * seconds)
    raw = np.random.Philox(key=7).random_raw(count) >> np.uint64(40)
    noise = raw.astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    ramp = (np.arange(count) % 4800).astype(np.float32) / np.float32(4800)
    return noise * ramp * np.float32(0.3)


def _custom_voice(checkpoint: str) -> Iterator[Case]:
    seed = 100
    for language, text in (("auto", TEXT), ("english", TEXT), ("chinese", CHINESE)):
        for voice in ("ryan", "eric", "dylan"):
            for instruct in (None, INSTRUCT):
                for layout in ("whole", "streaming"):
                    seed += 1
                    request = {"text": text, "voice": voice, "language": language, "layout": layout}
                    request |= {"instruct": instruct} if instruct else {}
                    name = f"custom voice {language} {voice}{' instruct' if instruct else ''} {layout}"
                    yield from _both(name, checkpoint, request, seed)
    request = {"text": TEXT, "voice": "vivian", "language": "english", "seed": 2**40 + 11, "max_frames": FRAMES}
    for name, sampling in SAMPLINGS.items():
        yield Case(f"sampling {name}", checkpoint, (request | sampling,))
    others = (
        {"text": TEXT, "voice": "ryan", "language": "english", "seed": 1},
        {"text": "Yes.", "voice": "eric", "language": "auto", "seed": 2, "instruct": INSTRUCT},
        {"text": CHINESE, "voice": "serena", "language": "chinese", "seed": 2**62 + 3},
    )
    for layout in ("whole", "streaming"):
        for way, how in (("sampled", {}), ("greedy", {"greedy": True})):
            batch = tuple(request | how | {"layout": layout, "max_frames": FRAMES} for request in others)
            yield Case(f"batch {layout} {way}", checkpoint, batch)


def _plain(checkpoint: str) -> Iterator[Case]:
    for layout in ("whole", "streaming"):
        request = {"text": TEXT, "voice": "aiden", "language": "english", "layout": layout}
        yield from _both(f"unprojected {layout}", checkpoint, request, 300)


def _voice_design(checkpoint: str) -> Iterator[Case]:
    geometry = checkpoint.split("/")[1]
    for language in ("auto", "english"):
        for layout in ("whole", "streaming"):
            request = {"text": TEXT, "instruct": "A happy old man.", "language": language, "layout": layout}
            yield from _both(f"voice design {geometry} {language} {layout}", checkpoint, request, 400)


def _base(checkpoint: str) -> Iterator[Case]:
    geometry = checkpoint.split("/")[1]
    for clone in ("x_vector", "icl"):
        for layout in ("whole", "streaming"):
            request = {"text": TEXT, "language": "english", "layout": layout}
            yield from _both(f"{clone} {geometry} {layout}", checkpoint, request, 500, clone)


def _both(name: str, checkpoint: str, request: dict[str, Any], seed: int, clone: str = "") -> Iterator[Case]:
    greedy = request | {"greedy": True, "max_frames": GREEDY_FRAMES}
    yield Case(f"{name} greedy", checkpoint, (greedy,), clone)
    yield Case(f"{name} sampled", checkpoint, (request | {"seed": seed, "max_frames": FRAMES},), clone)
