"""Makes the goldens: runs every case in the official package and writes goldens.npz and goldens.json beside this file.

python -m tests.golden.make        in an environment with qwen_tts 0.1.1 and transformers 4.57.3 (see README.md)
"""

import argparse
import json
import logging
import platform
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden.cases import EMBEDDED, REFERENCE_TEXT, Case, cases, reference_audio
from tests.golden.official import Official, Spoken, import_qwen_tts
from tests.random_checkpoint import codec_model_config, digest, make, model_config
from tests.random_shapes import codec_shapes, model_shapes
from tests.random_tokenizer import SPECIALS

HERE = Path(__file__).parent
GOLDEN_SEED = 1
EMBEDDED_FOLDER = HERE.parents[1] / "pipecat_qwen3" / "embedded"
PACKAGES = ("qwen-tts", "transformers", "torch", "numpy", "tokenizers", "safetensors")
WITH_WAV = ("unprojected whole sampled", "embedded whole greedy")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the goldens from the official package.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of goldens.npz and goldens.json")
    parser.add_argument("--seed", type=int, default=GOLDEN_SEED, help="of checkpoints and voices")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder that keeps the checkpoints; a temporary one by default"
    )
    parser.add_argument("--waveforms", action="store_true", help="keep every waveform, not a few")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    check_shapes()
    if args.checkpoints is not None:
        run(args.out, args.seed, args.checkpoints, args.waveforms)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            run(args.out, args.seed, Path(scratch), args.waveforms)


def run(out: Path, seed: int, checkpoints: Path, waveforms: bool) -> None:
    """Speak every case and write the two files."""
    arrays: dict[str, np.ndarray] = {}
    told: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    wanted = list(cases(seed))
    for checkpoint in dict.fromkeys(case.checkpoint for case in wanted):
        folder = checkpoint_folder(checkpoint, checkpoints)
        digests[checkpoint] = digest(folder)
        official = Official(folder)
        references = clone_references(official) if checkpoint.startswith("base/") else {}
        if references:
            arrays[f"{checkpoint}/x_vector"] = references["icl"][0].ref_spk_embedding.float().numpy()
            arrays[f"{checkpoint}/reference_codes"] = references["icl"][0].ref_code.numpy().astype(np.int16)
        for case in (case for case in wanted if case.checkpoint == checkpoint):
            spoken = official.speak(case.requests, references.get(case.clone))
            keep(arrays, case, spoken, waveforms or case.name in WITH_WAV)
            ends = {"ended": [one.ended for one in spoken], "certain": [one.certain for one in spoken]}
            told.append(asdict(case) | ends)
            print(f"official: {case.name}: {[len(one.codes) for one in spoken]} frames", flush=True)
    provenance = {
        "made_with": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "seed": seed,
        "dtype": "float32",
        "torch_threads": 1,
        "reference_text": REFERENCE_TEXT,
        "checkpoints": digests,
        "cases": told,
    }
    np.savez_compressed(out / "goldens.npz", **arrays)  # type: ignore[arg-type]
    (out / "goldens.json").write_text(json.dumps(provenance, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    rows = [
        (ended, len(arrays[f"{case['name']}/{row}/codes"]), certain)
        for case in told
        for row, (ended, certain) in enumerate(zip(case["ended"], case["certain"], strict=True))
    ]
    size = (out / "goldens.npz").stat().st_size
    print(
        f"official: {len(told)} cases, {len(rows)} utterances, {sum(row[0] for row in rows)} ended by themselves, "
        f"{sum(certain > frames for _, frames, certain in rows)} without a close decision, {size / 1e6:.2f} MB"
    )


def keep(arrays: dict[str, np.ndarray], case: Case, spoken: list[Spoken], waveforms: bool) -> None:
    """Codes of every utterance; embeddings of the greedy single ones; waveforms on request."""
    for row, one in enumerate(spoken):
        arrays[f"{case.name}/{row}/codes"] = one.codes.numpy().astype(np.int16)
        if waveforms:
            arrays[f"{case.name}/{row}/wav"] = one.wav.numpy()
    if len(spoken) == 1 and case.name.endswith("greedy"):
        arrays[f"{case.name}/0/prompt"] = spoken[0].prompt.numpy()
        arrays[f"{case.name}/0/trailing"] = spoken[0].trailing.numpy()


def clone_references(official: Official) -> dict[str, Any]:
    """The official prompt items of the reference audio, by what they take from it."""
    audio = (reference_audio(), 24_000)
    create = official.wrapper.create_voice_clone_prompt
    return {"x_vector": create(audio, REFERENCE_TEXT, True), "icl": create(audio, REFERENCE_TEXT, False)}


def checkpoint_folder(checkpoint: str, scratch: Path) -> Path:
    """The folder of "embedded", or of "variant/geometry/seed", which is made."""
    if checkpoint == EMBEDDED:
        return EMBEDDED_FOLDER
    variant, geometry, seed = checkpoint.split("/")
    return make(scratch / checkpoint, variant, geometry, "fp32", int(seed))  # type: ignore[arg-type]


def check_shapes() -> None:
    """Compare the random checkpoints' tensor names and shapes with the official classes, real sizes included."""
    import_qwen_tts()
    from qwen_tts.core import Qwen3TTSTokenizerV2Config, Qwen3TTSTokenizerV2Model
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSForConditionalGeneration

    ids = dict.fromkeys([*SPECIALS, "assistant"], 0)
    for geometry in ("tiny", "tiny-projected", "0.6b", "1.7b"):
        for variant in ("custom_voice", "voice_design", "base"):
            config = model_config(variant, geometry, ids)
            with torch.device("meta"):
                model = Qwen3TTSForConditionalGeneration(Qwen3TTSConfig(**config))
            compare(f"{variant} {geometry}", model, model_shapes(config))
    for tiny in (True, False):
        config = codec_model_config(tiny)
        with torch.device("meta"):
            codec = Qwen3TTSTokenizerV2Model._from_config(Qwen3TTSTokenizerV2Config(**config))
        compare(f"codec, {'tiny' if tiny else 'real'}", codec, codec_shapes(config))


def compare(what: str, module: torch.nn.Module, ours: dict[str, tuple[int, ...]]) -> None:
    official = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    wrong = {name for name in official.keys() | ours.keys() if official.get(name) != ours.get(name)}
    assert not wrong, f"{what}: {len(wrong)} tensors differ from the official ones, such as {sorted(wrong)[:5]}"
    print(f"{what}: {len(ours)} tensors as in the official class", flush=True)


if __name__ == "__main__":
    main()
