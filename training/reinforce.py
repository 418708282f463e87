"""A voice in, a talker that says words more clearly out: it speaks, a judge listens, what was said well grows likelier.

    python -m training.reinforce BASE DATA… --run RUN --codebooks BOOKS.pt --judge judge.pt

BASE is an exported voice. Every round says generated texts several times each (`rollouts`); a word that was said better
than in the other turns lends its frames a positive advantage, one that was said worse a negative one, and the clipped
policy gradient (Schulman et al. 2017, with the groups' means as baselines: Shao et al. 2024) is taken beside the losses
on recordings, which keep the voice. RUN/last.pt is taken up again by the same command.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from pipecat_qwen3.errors import program
from training.data import HELD_OUT
from training.evaluate_talker import held_out_groups
from training.export import export
from training.judge import Judge
from training.rollouts import TEMPERATURE, Rollout, rollouts, tasks
from training.rows import Batch, collate, plan, read_utterances, recut
from training.steps import INTERRUPTED, Stop, rate, shards, there
from training.talker_loss import TalkerLogits, total
from training.train_talker import Trainer, shared_options

CLIP = 0.2
"""A frame's probability may become so much larger or smaller before its advantage counts no more."""

SEED = 3_000_003
"""Of the first round's texts."""


def policy_gain(new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """What is to grow []: the clipped objective, of log probabilities and advantages, all [labels]."""
    ratio = (new - old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


class Reinforcer(Trainer):
    """A talker's trainer that also learns from what the talker said."""

    def begin_round(self) -> None:
        """Keep the talker that speaks in this round."""
        self.before = TalkerLogits(copy.deepcopy(self.talker), False)
        self.before.layer = self.loss.layer

    def reinforce(self, recorded: Batch, said: Batch, advantages: Tensor) -> dict[str, float]:
        """One step on recordings and on what was said, whose labels have advantages [labels]."""
        options = self.options
        recorded, said = recorded.to(self.device), said.to(self.device)
        advantages = advantages.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * rate(self.step, options.steps, options.warm, options.hold)
        losses = self.loss(recorded, noise=True, guided=False, share=options.predictor_share)
        labels = said.label[said.label >= 0][:, None]
        with torch.no_grad():
            old = self.before.code0_logits(said).div(TEMPERATURE).log_softmax(-1).gather(1, labels)[:, 0]
        new = self.loss.code0_logits(said).div(TEMPERATURE).log_softmax(-1).gather(1, labels)[:, 0]
        gain = policy_gain(new, old, advantages)
        self.optimizer.zero_grad(set_to_none=True)
        (total(losses, 0.0) - options.weight * gain).backward()
        torch.nn.utils.clip_grad_norm_(self.talker.parameters(), 1.0)
        self.optimizer.step()
        self.follow()
        clipped = ((new - old).exp().sub(1).abs() > CLIP).float().mean()
        return {"code0": losses["code0"].item(), "gain": gain.item(), "clipped": clipped.item()}


def groups(said: list[Rollout], positions: int, rng: random.Random) -> list[list[Rollout]]:
    """All rollouts as batches of like length, at most `positions` positions each."""
    found: list[list[Rollout]] = [[]]
    for one in sorted(said, key=lambda r: len(r.advantages) + len(r.choice.utterance.ids)):
        length = len(one.advantages) + len(one.choice.utterance.ids) + 12
        if found[-1] and length * (len(found[-1]) + 1) > positions:
            found.append([])
        found[-1].append(one)
    rng.shuffle(found)
    return found


def forever(paths: list[Path], trainer: Trainer, rng: random.Random) -> Iterator[Batch]:
    """Endless batches of recordings."""
    utterances = read_utterances(paths, trainer.tokenizer)
    while True:
        for choices in plan(recut(utterances, trainer.tokenizer, rng), trainer.options.positions, rng):
            yield collate(trainer.config, choices)


def main() -> None:
    """Speak and learn in turns, until --steps."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--judge", type=there, required=True, help="what `python -m training.judge` wrote")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--texts", type=int, default=1000, help="of a round")
    parser.add_argument("--weight", type=float, default=1.0, help="of what was said, beside the recordings")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--warm", type=int, default=30)
    parser.add_argument("--hold", type=float, default=0.6)
    parser.add_argument("--positions", type=int, default=600, help="of a batch of recordings")
    parser.add_argument("--said", type=int, default=1600, help="positions of a batch of what was said")
    options = shared_options(parser).parse_args()
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    trainer, stop, judge = Reinforcer(options), Stop(), Judge.load(options.judge)
    recorded = forever(shards(options.data), trainer, random.Random(options.seed + trainer.step))
    held_out = held_out_groups(options.data[0] / HELD_OUT, trainer.tokenizer)
    voice, speaker = options.run / "voice", options.run / "speaker.pt"
    while trainer.step < options.steps and not stop.asked:
        trainer.save()
        torch.save({"average": trainer.talker.state_dict()}, speaker)
        export(options.base, voice, [str(speaker)], [])
        began, said = time.monotonic(), list[Rollout]()
        asked = tasks(SEED + trainer.step, options.texts)
        with closing(rollouts(voice, judge, asked, trainer.step, options.device)) as turns:
            for one in turns:
                said += one
                if stop.asked:
                    break
        if stop.asked:
            break
        means = torch.tensor([(r.mark, r.longer) for r in said]).mean(0).tolist()
        line = {"step": trainer.step, "utterances": len(said), "minutes": round((time.monotonic() - began) / 60, 1)}
        print(json.dumps(line | {"mark": round(means[0], 4), "longer, %": round(100 * means[1], 1)}), flush=True)
        began, sums, count = time.monotonic(), dict[str, float](), 0
        trainer.begin_round()
        for group in groups(said, options.said, random.Random(trainer.step)):
            batch = collate(trainer.config, [r.choice for r in group])
            found = trainer.reinforce(next(recorded), batch, torch.cat([r.advantages for r in group]))
            sums = {name: sums.get(name, 0.0) + x for name, x in found.items()}
            count += 1
            if stop.asked or trainer.step >= options.steps:
                break
        line = {"step": trainer.step, "minutes": round((time.monotonic() - began) / 60, 1)}
        print(json.dumps(line | {name: round(x / count, 4) for name, x in sums.items()}), flush=True)
        if not stop.asked:
            figures = {name: round(x, 4) for name, x in trainer.examine(held_out).items()}
            print(json.dumps({"step": trainer.step, "held out": figures}), flush=True)
    trainer.save()
    if trainer.step < options.steps:
        raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    program(main)
