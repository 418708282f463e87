"""Shards with codes in, a trained codec decoder out: resumable, schedules in steps, averaged weights.

    python -m training.train_codec BASE DATA… --run RUN --steps 15000

BASE is a checkpoint folder: its codec's config and weights are the beginning. The decoder learns to speak from the
codes of recordings, so it can be trained beside the talker; its codebooks stay as they are. RUN/last.pt is taken up
again by the same command.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.errors import program
from training import codec_loss, critic
from training.crops import Crops, Piece
from training.data import HELD_OUT
from training.features import MELS
from training.listener import Listener, spectra
from training.steps import INTERRUPTED, Stop, load, rate, shards, there

AVERAGE = 0.999
"""Decay a step of the averaged weights, which are what is exported."""

LISTENED = 1.0
"""Weight of what the listeners hear, beside the spectral loss, where they hear speech; see `counted`."""

EXAMINED, HELD_CROPS = 500, 64
"""So many steps lie between two looks at so many pieces of the held-out recordings."""


def counted(apart: Tensor) -> Tensor:
    """What listeners who hear two waves so differently [] add to the loss [].

    They know speech. Of the noise that an untrained decoder makes their opinion is strong and worth nothing: at full
    weight from the first step on the decoder never found to speech. So beyond 1 it counts by the inverse square.
    """
    return LISTENED * apart / apart.detach().clamp(min=1).square()


class Trainer:
    """Everything that a step changes."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        checkpoint = Checkpoint.open(options.base)
        self.options, self.device = options, torch.device(options.device)
        self.decoder = checkpoint.load_codec().to(self.device).train().requires_grad_(True)
        # 50 Hz latents -> two 10 ms mel spectra: gives the trunk a gradient of its own; not exported
        self.mel_head = nn.Linear(checkpoint.codec_config.latent, 2 * MELS).to(self.device)
        if options.init:
            begun = load(options.init, ("average", "mel_head"), "train_codec", map_location=self.device)
            self.decoder.load_state_dict(begun["average"])
            self.mel_head.load_state_dict(begun["mel_head"])
        self.decoder.quantizer.requires_grad_(False)
        self.listeners = [Listener.load(path).to(self.device) for path in options.listener]
        self.parameters = [p for p in self.decoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [*self.parameters, *self.mel_head.parameters()],
            lr=options.lr,
            betas=(0.8, 0.98),
            weight_decay=0.0,
            fused=True,
        )
        self.critic = critic.Critic().to(self.device)
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=critic.LEARNING_RATE, betas=(0.5, 0.98), weight_decay=0.0, fused=True
        )
        self.average = {name: x.clone() for name, x in self.decoder.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.path = options.run / "last.pt"
        if self.path.exists():
            self._resume(load(self.path, self._parts(), "train_codec", map_location=self.device))
        if options.compile:
            codec_loss.wave = torch.compile(codec_loss.wave)

    def _parts(self) -> dict[str, Any]:
        names = ("decoder", "mel_head", "optimizer", *(("critic", "critic_optimizer") if self.options.critic else ()))
        return {name: getattr(self, name) for name in names}

    def _resume(self, saved: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        self.average, self.step, self.seconds = saved["average"], saved["step"], saved["seconds"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self) -> None:
        """Write everything that `_resume` needs."""
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save(
            state | {"average": self.average, "step": self.step, "seconds": self.seconds},
            self.path.with_suffix(".part"),
        )
        self.path.with_suffix(".part").rename(self.path)

    def learn(self, codes: Tensor, wanted: Tensor) -> dict[str, float]:
        """One step on codes [N,8,T] and waves [N,1920 T]."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * rate(self.step, options.steps, options.warm, options.hold)
        made, latents = codec_loss.decode(self.decoder, codes.to(self.device))
        wanted = wanted.to(self.device)
        loss, mel = codec_loss.codec_loss(made, wanted)
        with torch.no_grad():
            magnitudes = codec_loss.magnitudes(wanted, 1024, 240)[:, : codes.shape[2] * 8]
            target = codec_loss.log_mel(magnitudes, 1024, MELS)
        apart = self.heard(made, wanted)
        expected = self.mel_head(latents.transpose(1, 2)).unflatten(-1, (2, MELS)).flatten(1, 2)
        trunk = (expected - target).abs().mean()
        said = {"loss": loss, "mel": mel, "heard": apart, "trunk": trunk}
        total = loss + counted(apart) + 0.3 * (1 - self.step / options.steps) * trunk
        if options.critic:
            felt = options.critic * min(1.0, max(0.0, self.step / critic.WARM - 1))
            complaint, said["opinion"], said["mistakes"] = self._criticise(made, wanted, expected.detach(), felt > 0)
            total = total + felt * complaint
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, 2.0)
        self.optimizer.step()
        self.step += 1
        if self.step % 5 == 0:
            decay = min(AVERAGE**5, (1 + self.step) / (60 + self.step))
            with torch.no_grad():
                for name, x in self.decoder.state_dict().items():
                    self.average[name].lerp_(x, 1 - decay)
        return {name: x.item() for name, x in said.items()}

    def heard(self, made: Tensor, wanted: Tensor) -> Tensor:
        """How differently [] the listeners hear two waves [N, samples], on average."""
        pair = spectra(made), spectra(wanted)
        return torch.stack([listener.difference(*pair) for listener in self.listeners]).mean()

    def _criticise(
        self, made: Tensor, wanted: Tensor, expected: Tensor, felt: bool
    ) -> tuple[Tensor | float, Tensor, Tensor]:
        """One step of the critic; what it then has to say of the waves [N, samples], its opinion, its own loss."""
        ours, theirs = critic.picture(made, expected), critic.picture(wanted, expected)
        mistakes = self.critic.mistakes([x.detach() for x in ours], theirs)
        self.critic_optimizer.zero_grad(set_to_none=True)
        mistakes.backward()
        self.critic_optimizer.step()
        if not felt:
            return 0.0, torch.zeros(()), mistakes
        self.critic.requires_grad_(False)
        complaint, opinion = self.critic.complaint(ours, theirs)
        self.critic.requires_grad_(True)
        return complaint, opinion, mistakes

    def examine(self, batches: list[Piece]) -> dict[str, float]:
        """Losses of the averaged weights on pieces of held-out recordings."""
        kept = {name: x.clone() for name, x in self.decoder.state_dict().items()}
        self.decoder.load_state_dict(self.average)
        sums = torch.zeros(3)
        for codes, wanted, _ in batches:  # with gradients that nobody takes: without them all would be compiled again
            made, _ = codec_loss.decode(self.decoder, codes.to(self.device))
            wanted = wanted.to(self.device)
            loss, mel = codec_loss.codec_loss(made, wanted)
            apart = self.heard(made, wanted)
            sums += torch.tensor([loss.item(), mel.item(), apart.item()])
        self.decoder.load_state_dict(kept)
        return dict(zip(("loss", "mel", "heard"), (sums / len(batches)).tolist(), strict=True))


def main() -> None:
    """Train until --steps; the same command goes on where the last one stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("base")
    parser.add_argument("data", type=there, nargs="+")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument(
        "--listener", type=there, nargs="+", required=True, help="what `python -m training.listener` wrote"
    )
    parser.add_argument("--init", type=there, help="a trainer's last.pt whose weights are the beginning")
    parser.add_argument("--critic", type=float, default=0.0, metavar="WEIGHT", help="of an adversary; 0 for none")
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warm", type=int, default=150)
    parser.add_argument("--hold", type=float, default=0.4)
    parser.add_argument("--crops", type=int, default=4, help="pieces in a batch; 64 suits a GPU")
    parser.add_argument("--frames", type=int, default=12, help="of a piece")
    parser.add_argument("--rms-share", type=float, default=0.35, help="slt, the higher voice, needs more practice")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that cut pieces; 4 suits a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    options.run.mkdir(parents=True, exist_ok=True)
    trainer, stop = Trainer(options), Stop()
    sizes = options.crops, options.frames
    crops = Crops(shards(options.data), *sizes, options.rms_share, options.seed + trainer.step)
    unseen = Crops([options.data[0] / HELD_OUT], *sizes, 0.5, 0)
    held_out = [unseen.draw() for _ in range(max(1, HELD_CROPS // options.crops))]
    print(f"{[len(items) for items in crops.items]} recordings", flush=True)
    said = saved = time.monotonic()
    sums: dict[str, float] = {}
    count = 0
    if trainer.step < options.steps:
        for codes, waves, _ in DataLoader(crops, batch_size=None, num_workers=options.workers):
            losses = trainer.learn(codes, waves)
            sums = {name: sums.get(name, 0.0) + x for name, x in losses.items()}
            count += 1
            now, done = time.monotonic(), trainer.step >= options.steps
            last = done or stop.asked
            if now - said > 60 or last:
                trainer.seconds += now - said
                line = {
                    "step": trainer.step,
                    "minutes": round(trainer.seconds / 60, 1),
                    "s/step": round((now - said) / count, 3),
                }
                print(json.dumps(line | {name: round(x / count, 4) for name, x in sums.items()}), flush=True)
                said, sums, count = now, {}, 0
            if trainer.step % EXAMINED == 0 or done:
                figures = {name: round(x, 4) for name, x in trainer.examine(held_out).items()}
                print(json.dumps({"step": trainer.step, "held out": figures}), flush=True)
            if now - saved > 180 or last:
                trainer.save()
                saved = now
            if last:
                break
    if trainer.step < options.steps:
        raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    program(main)
