"""Generated sentences spoken, nothing heard: how many utterances find their end, and how well.

Only codes are needed, so the engine's codec is replaced by silence: the quickest way through a thousand utterances.
"""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench.speak import MARGIN_S, ROOT, Condition, flite, speak, speech_seconds
from bench.word_errors import ends
from pipecat_qwen3.backend import FRAME_SAMPLES, SAMPLE_RATE
from pipecat_qwen3.codec_runner import Mute
from pipecat_qwen3.local import LocalBackend

SEED = 77
"""Of the sentences; the seeds of the training texts begin at 1,000,003."""


def generated(count: int) -> list[str]:
    """Sentences as the voice was trained on, though not those; exits where the generator says that something lacks."""
    command = [sys.executable, "-m", "training.text", "--count", str(count), "--seed", str(SEED)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout.splitlines()


def runaways(backend: LocalBackend, conditions: Sequence[Condition], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Speak the texts, the conditions in turn: of each how it ended, its frames, how much longer it is than flite."""
    codec, rows = backend.engine.codec, []
    backend.engine.codec = Mute()
    for index, how in enumerate(conditions):
        mine = texts[index :: len(conditions)]
        # One chunk an utterance: silence that the engine hears on its way would be a runaway.
        for text, stream in zip(mine, speak(backend, mine, how, chunk=1 << 20), strict=True):
            result = stream.wait()
            if result.error is not None:
                raise result.error
            said, seconds = flite(text, how.voice), result.frames * FRAME_SAMPLES / SAMPLE_RATE
            longer_s = None if said is None else round(seconds - MARGIN_S - speech_seconds(said), 3)
            row = {"text": text, "how": str(how), "end": result.end, "frames": result.frames, "longer_s": longer_s}
            rows.append(row)
    backend.engine.codec = codec
    return rows


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How the utterances of each condition, and of all, ended."""
    found = {}
    for how in [*dict.fromkeys(row["how"] for row in rows), "all"]:
        them = [(row["end"], row["longer_s"]) for row in rows if how in (row["how"], "all")]
        found[how] = {"utterances": len(them), **ends(them)}
    return found
