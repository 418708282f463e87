"""Shards with codes in, a trained talker and code predictor out: resumable, schedules in steps, averaged weights.

    python -m training.train_talker BASE DATA… --run RUN --codebooks BOOKS.pt --steps 20000

BASE is a checkpoint folder: its configs, tokenizer and weights are the beginning. RUN/last.pt is written every few
minutes and at Ctrl-C, and taken up again by the same command. New shards in DATA are taken up at the next pass.
"""

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.errors import program
from training.codebooks import Codebooks
from training.composed import compose, composed
from training.data import HELD_OUT
from training.evaluate_talker import by_layout, held_out_groups
from training.lexicon import Vocabulary
from training.merges import forms
from training.optimizers import optimizer
from training.respelling import Respelling
from training.rows import Batch, Utterance, collate, plan, read_utterances, recut
from training.spelling import read_spellings
from training.steps import INTERRUPTED, Stop, load, rate, shards, there
from training.talker_loss import AuxiliaryHeads, TalkerLoss, total

AVERAGE = 0.9985
"""Decay a step of the averaged weights, which are what is exported."""

RESPELT = 400
"""Words are respelt anew after so many steps, which takes the processor 20 seconds for 80,000 utterances."""

EXAMINED = 500
"""So many steps lie between two looks at the held-out recordings, and at whether there are new shards."""


class Trainer:
    """Everything that a step changes."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        checkpoint = Checkpoint.open(str(options.base))
        self.options, self.config, self.device = options, checkpoint.config, torch.device(options.device)
        self.tokenizer = checkpoint.load_tokenizer()
        self.talker = checkpoint.load_talker(torch.float32).to(self.device).train().requires_grad_(True)
        if options.init:
            begun = load(options.init, ("average", "talker"), "train_talker", map_location=self.device)
            self.talker.load_state_dict(begun["average"])
        self.respelling: Respelling | None = None
        self.taught: list[Utterance] = []
        self.respelt, self.made_of = -RESPELT, ""
        if options.spellings:
            spellings = read_spellings(options.spellings)
            vocabulary = Vocabulary(self.tokenizer, self.config.text_vocab, forms(spellings))
            compose(self.talker, vocabulary.features)
            self.respelling = Respelling(self.tokenizer, vocabulary, spellings)
            self.made_of = vocabulary.features.digest()
        books = Codebooks.load(options.codebooks).books.to(self.device)
        self.heads = AuxiliaryHeads(self.config.shape.talker.hidden, books.shape[-1]).to(self.device)
        self.loss = TalkerLoss(self.talker, self.heads, books, options.compile)
        self.optimizer = optimizer(self.talker, self.heads.parameters(), options.lr, options.muon)
        self.average = {name: x.clone() for name, x in self.talker.state_dict().items()}
        self.step, self.seconds, self.positions = 0, 0.0, 0
        self.path = options.run / "last.pt"
        if self.path.exists():
            self._resume(load(self.path, ("talker", "heads", "average"), "train_talker", map_location=self.device))

    def _resume(self, saved: dict[str, Any]) -> None:
        if saved.get("made_of", "") != self.made_of:
            raise SystemExit("--spellings was not the same when this run began; give it as then, or another --run")
        self.talker.load_state_dict(saved["talker"])
        self.heads.load_state_dict(saved["heads"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average = saved.get("averaged", saved["average"])
        self.step, self.seconds, self.positions = saved["step"], saved["seconds"], saved["positions"]
        print(f"resumed at step {self.step}", flush=True)

    def recut(self, utterances: list[Utterance], rng: random.Random) -> list[Utterance]:
        """The utterances as they are taught in the next pass."""
        if not self.respelling:
            return recut(utterances, self.tokenizer, rng)
        if self.step - self.respelt >= RESPELT or len(self.taught) != len(utterances):
            self.taught, features = self.respelling.recut(recut(utterances, self.tokenizer, rng), rng)
            compose(self.talker, features)
            self.respelt = self.step
        return self.taught

    def save(self) -> None:
        """Write everything that `_resume` needs."""
        parts = {"talker": self.talker, "heads": self.heads, "optimizer": self.optimizer}
        state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        state |= {"average": composed(self.talker, self.average), "averaged": self.average, "made_of": self.made_of}
        state |= {"step": self.step, "seconds": self.seconds, "positions": self.positions}
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").rename(self.path)

    def learn(self, batch: Batch) -> dict[str, Tensor]:
        """One step on one batch: its losses."""
        options, batch = self.options, batch.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * rate(self.step, options.steps, options.warm, options.hold)
        guided = options.guided * max(0.0, 1 - self.step / options.steps / options.guided_until)
        losses = self.loss(batch, noise=True, guided=guided > 0, share=options.predictor_share)
        self.optimizer.zero_grad(set_to_none=True)
        total(losses, guided).backward()
        torch.nn.utils.clip_grad_norm_(self.talker.parameters(), 1.0)
        self.optimizer.step()
        self.positions += batch.text.numel()
        self.follow()
        return {name: x.detach() for name, x in losses.items()}

    def follow(self) -> None:
        """Count a step, and let the averaged weights follow."""
        self.step += 1
        if self.step % 5 == 0:
            decay = min(AVERAGE**5, (1 + self.step) / (60 + self.step))
            with torch.no_grad():
                for name, x in self.talker.state_dict().items():
                    self.average[name].lerp_(x, 1 - decay)

    def examine(self, groups: dict[str, list[Utterance]]) -> dict[str, float]:
        """Cross-entropy of code 0 by group and layout, with the averaged weights."""
        kept = {name: x.clone() for name, x in self.talker.state_dict().items()}
        self.talker.load_state_dict(self.average)
        figures = {name: x for group, us in groups.items() for name, x in by_layout(self.loss, group, us).items()}
        self.talker.load_state_dict(kept)
        return figures


def shared_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What every program takes that trains a talker."""
    parser.add_argument("base", type=there)
    parser.add_argument("data", type=there, nargs="+")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--codebooks", type=there, required=True)
    parser.add_argument("--init", type=there, help="a trainer's last.pt whose exported weights are the beginning")
    parser.add_argument("--predictor-share", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--muon", action="store_true", help="for the layers' matrices instead of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(spellings=None)  # `train_talker` alone composes text embeddings
    return parser


def main() -> None:
    """Train until --steps; the same command goes on where the last one stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warm", type=int, default=200)
    parser.add_argument("--hold", type=float, default=0.35)
    parser.add_argument("--positions", type=int, default=2000, help="of a batch; 60000 suits a GPU")
    parser.add_argument("--spellings", type=there, help="text embeddings stay composed of what their tokens sound like")
    parser.add_argument("--guided", type=float, default=0.8)
    parser.add_argument("--guided-until", type=float, default=0.45)
    parser.add_argument("--workers", type=int, default=0, help="processes that build batches; 4 suits a GPU")
    options = shared_options(parser).parse_args()
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    trainer, stop = Trainer(options), Stop()
    shards(options.data)  # exits where there are none
    groups = held_out_groups(options.data[0] / HELD_OUT, trainer.tokenizer)
    rng = random.Random(options.seed + trainer.step)
    known: list[Path] = []
    utterances: list[Utterance] = []
    said = saved = time.monotonic()
    sums: dict[str, Tensor] = {}
    count, positions = 0, trainer.positions
    while trainer.step < options.steps and not stop.asked:
        if (found := shards(options.data)) != known:
            utterances += read_utterances([path for path in found if path not in known], trainer.tokenizer)
            known = found
            print(f"{len(utterances)} utterances, {sum(len(u.codes) for u in utterances)} frames", flush=True)
        loader = DataLoader(
            plan(trainer.recut(utterances, rng), options.positions, rng),  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=partial(collate, trainer.config),
            num_workers=options.workers,
        )
        for batch in loader:
            losses = trainer.learn(batch)
            sums = {name: sums.get(name, 0) + x for name, x in losses.items()}
            count += 1
            now, done = time.monotonic(), trainer.step >= options.steps
            last = done or stop.asked
            if now - said > 60 or last:
                trainer.seconds += now - said
                means = {name: [round(v, 3) for v in (x / count).reshape(-1).tolist()] for name, x in sums.items()}
                speed = (trainer.positions - positions) / (now - said)
                line = {"step": trainer.step, "minutes": round(trainer.seconds / 60, 1), "positions/s": round(speed)}
                print(json.dumps(line | means), flush=True)
                said, sums, count, positions = now, {}, 0, trainer.positions
            if trainer.step % EXAMINED == 0 or done:
                figures = {name: round(x, 4) for name, x in trainer.examine(groups).items()}
                print(json.dumps({"step": trainer.step, "held out": figures}), flush=True)
            if now - saved > 180 or last:
                trainer.save()
                saved = now
            if last or (trainer.step % EXAMINED == 0 and shards(options.data) != known):
                break
    if trainer.step < options.steps:
        raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    program(main)
