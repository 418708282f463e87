"""Sentences in, word error rates out: text -> our engine -> audio -> speech recognition -> text.

    python -m bench.asr_loop [--model NAME_OR_FOLDER] [--voices V …] [--layouts whole streaming] [--sampling greedy own]
    python -m bench.asr_loop --recordings FOLDER      # hears what training.evaluate_codec wrote instead of speaking
    python -m bench.asr_loop --runaways 1000          # speaks generated sentences and looks only at how they end
    python -m bench.asr_loop --compare A.json B.json  # two results of the first form, paired by sentence

The sentences are training/held_out.tsv: no training text holds any of them. Beside every figure stands the recogniser's
own error on flite's recording of the same sentence (flite taught the voices slt and rms; needs its program). The result
is a JSON with every utterance, in bench/results unless --json says where. It is written after every condition, and the
same command, or one with more --takes, goes on where it was stopped; flite's recordings are heard once for all runs.
"""

import argparse
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import runaways
from bench.machine import RESULTS, facts
from bench.recognise import RATE, HearAll, sphinxes, whisper, word_errors, words_of
from bench.speak import (
    MARGIN_S,
    STRETCH,
    Condition,
    Sentence,
    audio_of,
    flite,
    read_sentences,
    recorded,
    speak,
    speech_seconds,
)
from bench.word_errors import Spoken, compare, tables
from pipecat_qwen3.backend import Result
from pipecat_qwen3.errors import program
from pipecat_qwen3.files import weight_files
from pipecat_qwen3.local import LocalBackend

Teacher = dict[str, tuple[str, float]]
"""By text: what was heard in flite's recording, and its seconds of speech."""

FLITE = RESULTS / "flite_heard.json"


def heard_of_flite(sentences: Sequence[Sentence], voice: str, hear: HearAll, asr: str, path: Path = FLITE) -> Teacher:
    """What the recogniser of that name hears in flite's recordings; kept in the file `path`."""
    known = json.loads(path.read_text()) if path.exists() else {}
    here = known.setdefault(f"{asr}: {voice}, stretch {STRETCH.get(voice)}", {})
    recordings = {s.text: flite(s.text, voice) for s in sentences if s.text not in here}
    found = {text: audio for text, audio in recordings.items() if audio is not None}
    for (text, audio), heard in zip(found.items(), hear(found.values()), strict=True):
        here[text] = heard, round(speech_seconds(audio), 2)
    if found:
        path.write_text(json.dumps(known, indent=0) + "\n")
    return here


def listen(
    sentences: Sequence[Sentence],
    utterances: Sequence[tuple[np.ndarray, Result]],
    hear: HearAll,
    how: Condition,
    teacher: Teacher,
) -> list[Spoken]:
    """Hear the utterances of the sentences, all of one condition."""
    spoken = []
    everything = hear(audio for audio, _ in utterances)
    for sentence, (audio, result), heard in zip(sentences, utterances, everything, strict=True):
        seconds = len(audio) / RATE
        said, flite_s = teacher.get(sentence.text, (None, None))
        spoken.append(
            Spoken(
                sentence.text,
                sentence.group,
                *how,
                words=len(sentence.words),
                heard=heard,
                errors=word_errors(sentence.words, words_of(heard)),
                flite_errors=None if said is None else word_errors(sentence.words, words_of(said)),
                longer_s=None if flite_s is None else round(seconds - MARGIN_S - flite_s, 3),
                end=result.end,
                seconds=round(seconds, 3),
            )
        )
    return spoken


@contextmanager
def recogniser(options: argparse.Namespace) -> Iterator[tuple[str, HearAll]]:
    """Name and recogniser that the command line asks for."""
    if options.asr == "whisper":
        hear = whisper(options.whisper)
        yield f"whisper {options.whisper}", lambda audio: [hear(one) for one in audio]
    else:
        with sphinxes(options.jobs) as hear_all:
            yield f"pocketsphinx {version('pocketsphinx')}", hear_all


def open_model(options: argparse.Namespace) -> tuple[LocalBackend, dict[str, Any], list[Condition]]:
    """The engine, all that decides its words, and the conditions that were asked for."""
    size = options.max_batch
    backend = LocalBackend.open(options.model, dtype=options.dtype, device=options.device, max_batch=size)
    folder = backend.checkpoint.folder
    digest = hashlib.sha256()
    for file in (*weight_files(folder), *weight_files(folder / "speech_tokenizer"), folder / "generation_config.json"):
        digest.update(file.read_bytes())
    setting = {"device": str(backend.device), "dtype": str(backend.dtype), "max_batch": size}
    hows = product(options.voices or backend.voices, options.layouts, options.sampling)
    return (
        backend,
        {"model": options.model, "weights": digest.hexdigest()[:16]} | setting,
        [Condition(*h) for h in hows],
    )


def loop(options: argparse.Namespace, path: Path, asr: str, hear: HearAll) -> None:
    """Speak or read, hear, write the JSON after every condition, print a table."""
    sentences, backend, extra = read_sentences(options.sentences), None, {}
    key: dict[str, Any] = {"asr": asr, "sentences": len(sentences), "takes": options.takes}
    if folder := options.recordings:
        conditions = [Condition(voice, "recorded", "codec") for voice in options.voices or STRETCH]
        key |= {"recordings": str(folder)}
        if (figures := folder / "figures.json").exists():
            extra = {"resynthesis": json.loads(figures.read_text())}
    else:
        backend, setting, conditions = open_model(options)
        key |= setting
    spoken = unfinished(path, key)
    for how in conditions:
        there = sum(s.condition == str(how) for s in spoken)
        texts = (sentences * (options.takes if how.sampling == "own" else 1))[there:]
        if not texts:
            continue
        began = time.monotonic()
        if backend is None:
            utterances = list(recorded(folder, texts, how.voice))
        else:
            utterances = [audio_of(stream) for stream in speak(backend, [s.text for s in texts], how, seed=there)]
        said = time.monotonic()
        spoken += listen(texts, utterances, hear, how, heard_of_flite(sentences, how.voice, hear, asr))
        print(f"{how}: spoken in {said - began:.0f} s, heard in {time.monotonic() - said:.0f} s", flush=True)
        write(path, key, extra | {"figures": tables(spoken), "utterances": [s._asdict() for s in spoken]})
    if backend is not None:
        backend.close()
    print_tables(tables(spoken))


def unfinished(path: Path, key: dict[str, Any]) -> list[Spoken]:
    """The utterances of a result with the same key, or of one with fewer takes: only what it lacks must be spoken."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    before = record.get("key", {})
    if before | {"takes": 0} != key | {"takes": 0} or before.get("takes", 1) > key["takes"]:
        return []
    print(f"going on with {path}", flush=True)
    return [Spoken(**row) for row in record["utterances"]]


def count_runaways(options: argparse.Namespace, path: Path) -> None:
    """Speak generated sentences, print how they ended, write the JSON."""
    texts = runaways.generated(options.runaways)
    backend, key, conditions = open_model(options)
    began = time.monotonic()
    rows = runaways.runaways(backend, conditions, texts)
    seconds = time.monotonic() - began
    backend.close()
    found = runaways.figures(rows)
    write(path, key, {"seconds": round(seconds, 1), "figures": found, "utterances": rows})
    for name, row in found.items():
        print(f"{name:24}", ", ".join(f"{what} {value}" for what, value in row.items()))
    print(f"{sum(row['frames'] for row in rows)} frames in {seconds:.0f} s")


def write(path: Path, key: dict[str, Any], record: dict[str, Any]) -> None:
    """Write a result with what it was made on, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"key": key, "machine": facts(torch.device("cpu"))} | record, indent=1) + "\n")
    part.rename(path)


def percent(value: float | None) -> str:
    """A share as text."""
    return "-" if value is None else f"{100 * value:.1f}"


def print_tables(found: dict[str, dict[str, Any]]) -> None:
    """One line a condition and group."""
    print(f"{'':32} {'n':>4} {'WER %':>6} {'+-':>5} {'flite':>6} {'end error, bias s':>18} {'runaways, cut /1000':>20}")
    for name, row in found.items():
        end = "-" if row["end_error_s"] is None else f"{row['end_error_s']:.2f} {row['end_bias_s']:+.2f}"
        cut = row["cut_short_per_1000"]
        wrong = f"{row['runaways_per_1000']} {'-' if cut is None else cut}"
        print(
            f"{name:32} {row['sentences']:4} {percent(row['wer']):>6} {percent(row['wer_interval']):>5} "
            f"{percent(row['flite_wer']):>6} {end:>18} {wrong:>20}"
        )


def print_comparison(paths: Sequence[Path]) -> None:
    """One line a condition and group; a star where the interval does not hold zero."""
    runs = [[Spoken(**row) for row in json.loads(path.read_text())["utterances"]] for path in paths]
    print(f"{'WER %':32} {'n':>5} {'first':>6} {'second':>6} {'difference':>10}  95 % interval")
    for name, row in compare(*runs).items():
        low, high = (100 * x for x in row["interval"])
        star = "*" if low > 0 or high < 0 else ""
        print(
            f"{name:32} {row['utterances']:5} {percent(row['first']):>6} {percent(row['second']):>6} "
            f"{100 * row['difference']:>+10.1f}  {low:+.1f} to {high:+.1f} {star}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a checkpoint folder, or owner/name")
    parser.add_argument("--voices", nargs="+", help="default: all")
    parser.add_argument("--layouts", nargs="+", choices=("whole", "streaming"), default=["whole", "streaming"])
    parser.add_argument(
        "--sampling", nargs="+", choices=("greedy", "own"), default=["greedy"], help="own: as the checkpoint says"
    )
    parser.add_argument("--sentences", type=int, help="how many, spread over all groups (default: all)")
    parser.add_argument(
        "--takes",
        type=int,
        default=1,
        help="how often a sentence is said with --sampling own, each time another seed",
    )
    parser.add_argument("--asr", choices=("sphinx", "whisper"), default="sphinx")
    parser.add_argument("--whisper", default="small.en", help="faster-whisper's model: a name or a folder")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run pocketsphinx")
    parser.add_argument("--recordings", type=Path, help="hear FOLDER/VOICE/NUMBER.wav")
    parser.add_argument("--runaways", type=int, metavar="COUNT", help="speak so many generated sentences")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two results of this command")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="where to write (default: bench/results/asr_loop_MODEL.json)")
    options = parser.parse_args(arguments)
    if options.takes < 1:
        parser.error(f"argument --takes: a number from 1 on, not {options.takes}")
    if options.takes > 1 and (options.recordings or options.runaways or "own" not in options.sampling):
        parser.error("argument --takes: greedy speech and recordings are the same every time; add --sampling own")
    torch.set_num_threads(1)
    if options.compare:
        print_comparison(options.compare)
        return
    name = re.sub(r"\W+", "_", Path(options.recordings or options.model).name)
    path = options.json or RESULTS / f"asr_loop_{name}{'_runaways' if options.runaways else ''}.json"
    if options.runaways:
        count_runaways(options, path)
    else:
        with recogniser(options) as named:
            loop(options, path, *named)
    print(f"wrote {path}")


if __name__ == "__main__":
    program(main)
