"""Talkers and recordings in, how well they foretell the codes out: the cross-entropy of code 0, by layout.

    python -m training.evaluate_talker CHECKPOINT… --data build/voice/data/held_out.pt build/voice/data/0003.pt

Held-out recordings count by group, other shards by file: a shard that was trained on against one that was made since
tells what a talker has by heart.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from pipecat_qwen3.backend import Layout
from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.errors import program
from training.data import HELD_OUT
from training.rows import Choice, Utterance, collate, read_utterances
from training.steps import leave, load, on_signals, there
from training.talker_loss import TalkerLogits
from training.text import held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUTS: tuple[Layout, ...] = ("whole", "streaming")


def held_out_groups(path: Path, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[Utterance]]:
    """The held-out recordings, cut as when they are spoken: of known words, with unseen words, digits or in pairs."""
    names = {"unseen": "unseen", "digits": "long", "pair": "long"}
    groups = {text: names.get(group, "known") for group, text, _ in held_out()}
    found: dict[str, list[Utterance]] = {name: [] for name in dict.fromkeys(groups.values())}
    texts = load(path, ("texts", "codes"), "data with --codebooks", mmap=True)["texts"]
    for text, utterance in zip(texts, read_utterances([path], tokenizer), strict=True):
        found[groups[text]].append(utterance)
    return {name: utterances for name, utterances in found.items() if utterances}


@torch.no_grad()
def by_layout(logits: TalkerLogits, name: str, utterances: Sequence[Utterance]) -> dict[str, float]:
    """Cross-entropy of code 0, in nats a frame, as {"NAME whole": …, "NAME streaming": …}; the history is recorded."""
    talker, found = logits.talker, {}
    device = talker.codec_head.weight.device
    for layout in LAYOUTS:
        total = torch.zeros((), device=device)
        count = 0
        for begin in range(0, len(utterances), 30):
            choices = [Choice(utterance, layout, False) for utterance in utterances[begin : begin + 30]]
            batch = collate(talker.config, choices).to(device)
            labels = batch.label[batch.label >= 0]
            total += F.cross_entropy(logits.code0_logits(batch), labels, reduction="sum")
            count += len(labels)
        found[f"{name} {layout}"] = total.item() / count
    return found


def main() -> None:
    """Print a line for each checkpoint and write them all to --json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--data", type=there, nargs="+", required=True, help="files of training.data")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    on_signals(leave)
    torch.set_num_threads(1)
    rows = []
    for name in options.checkpoints:
        checkpoint = Checkpoint.open(name)
        tokenizer, logits = checkpoint.load_tokenizer(), TalkerLogits(checkpoint.load_talker(torch.float32), False)
        logits.autocast = False
        groups: dict[str, list[Utterance]] = {}
        for path in options.data:
            if path.name == HELD_OUT:
                groups |= held_out_groups(path, tokenizer)
            else:
                groups[f"{path.parent.name}/{path.stem}"] = read_utterances([path], tokenizer)
        figures = {key: round(x, 4) for group, us in groups.items() for key, x in by_layout(logits, group, us).items()}
        rows.append({"checkpoint": Path(name).name, "code 0": figures})
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    program(main)
