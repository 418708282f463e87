"""A checkpoint and the held-out recordings in, what the codec loses out: recording -> codes -> decoder -> wave.

    python -m training.evaluate_codec CHECKPOINT DATA --out FOLDER
    python -m bench.asr_loop --recordings FOLDER        # the recogniser's error on the waves written there

Waves are numbered as in held_out.tsv. Only here do samples of two waves belong to each other, so only here are they
compared: log-mel distance, STOI, PESQ (wide band) and SI-SDR (printed only: a codec without phase cannot keep it).
"""

import argparse
import json
import wave
from contextlib import suppress
from pathlib import Path

import numpy as np
import soxr
import torch

from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.errors import program
from training.codec_loss import RATE as CODEC_RATE
from training.data import HELD_OUT, read_shard
from training.features import FRAME, log_mel
from training.flite import RATE, VOICES
from training.steps import leave, on_signals, there
from training.text import held_out


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write float samples [n] at 24 kHz as 16-bit mono."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(CODEC_RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())


def si_sdr(made: np.ndarray, wanted: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv:1811.02508)."""
    scaled = wanted * (made @ wanted) / (wanted @ wanted)
    return float(10 * np.log10((scaled @ scaled) / ((made - scaled) @ (made - scaled))))


def compare(made: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Figures of one utterance, both waves at 16 kHz; the mel distance is over the louder 60 % of the 10 ms spectra."""
    from pesq import NoUtterancesError, pesq  # type: ignore[import-not-found]
    from pystoi import stoi  # type: ignore[import-not-found]

    ours, theirs = (log_mel(torch.from_numpy(x.astype(np.float32))) for x in (made, wanted))
    level = theirs.mean(1)
    loud = level > level.quantile(0.4)
    figures = {
        "mel distance, neper": float((ours - theirs)[loud].abs().mean()),
        "STOI": float(stoi(wanted, made, RATE)),
        "SI-SDR, dB": si_sdr(made, wanted),
    }
    with suppress(NoUtterancesError):  # PESQ finds no speech in the shortest ones
        figures["PESQ"] = float(pesq(RATE, wanted, made, "wb"))
    return figures


def main() -> None:
    """Resynthesise every held-out recording, write the waves, print the means of each voice."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("data", type=there)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentences", type=int, help="only the first of each voice")
    options = parser.parse_args()
    on_signals(leave)
    torch.set_num_threads(1)
    decoder, shard = Checkpoint.open(options.checkpoint).load_codec(), read_shard(options.data / HELD_OUT)
    lengths = shard["frames"].tolist()
    waves, codes = shard["wave"].split([n * FRAME for n in lengths]), shard["codes"].split(lengths)
    found: dict[str, list[dict[str, float]]] = {voice: [] for voice in VOICES}
    numbers = {text: number for number, (_, text, _) in enumerate(held_out())}
    speakers = [VOICES[voice] for voice in shard["voices"].tolist()]
    for text, voice, samples, code in zip(shard["texts"], speakers, waves, codes, strict=True):
        if options.sentences is not None and len(found[voice]) >= options.sentences:
            continue
        with torch.inference_mode():
            made = decoder(code.T[None].long())[0].numpy()
        write_wav(options.out / voice / f"{numbers[text]:03d}.wav", made)
        wanted = samples.numpy() / 32768
        found[voice].append(compare(soxr.resample(made, CODEC_RATE, RATE)[: len(wanted)].astype(float), wanted))
    names = ("mel distance, neper", "STOI", "PESQ", "SI-SDR, dB")
    means = {
        voice: {n: round(float(np.mean([row[n] for row in rows if n in row])), 3) for n in names}
        for voice, rows in found.items()
    }
    print(json.dumps(means, indent=1))
    (options.out / "figures.json").write_text(json.dumps(means, indent=1) + "\n")


if __name__ == "__main__":
    program(main)
