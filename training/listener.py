"""Shards in, a small network out that hears phones: by its ears the codec decoder's waves are told from the recordings.

    python -m training.listener DATA… --out listener.pt

Spectral distances reward the likeliest spectrum, not the one that tells phones apart; what this network makes of two
waves differs where the difference is one of phones. It is frozen while the decoder learns, and not exported.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training import codec_loss
from training.crops import Crops, Piece
from training.data import HELD_OUT
from training.features import mel_bank
from training.flite import PHONES
from training.steps import fit, fit_options, load, shards

WIDTH, DILATIONS = 128, (1, 2, 3)
"""Three convolutions over five spectra of 10 ms each: 120 ms to either side."""

CROPS, FRAMES = 16, 12
WINDOW, HOP, BANDS, BAND_HZ = 1024, 240, 64, (130, 7800)
"""Its spectra: below 130 Hz there is no phone, but an offset in silence is loud there."""

NOISE, GAIN = 0.1, 0.3
"""Neper of noise on every band and of loudness on a whole piece, so that no single band is trusted."""


class Listener(nn.Module):
    """Log-mel spectra [N, 10 ms, 64] -> the phone heard, every 20 ms."""

    def __init__(self) -> None:
        super().__init__()
        widths = (BANDS, *[WIDTH] * len(DILATIONS))
        self.layers = nn.ModuleList(
            nn.Conv1d(wide, WIDTH, 5, padding=2 * dilation, dilation=dilation)
            for wide, dilation in zip(widths, DILATIONS, strict=False)
        )
        self.phones = nn.Linear(WIDTH, len(PHONES))

    @classmethod
    def load(cls, path: Path) -> "Listener":
        """Read one that `python -m training.listener` wrote, frozen."""
        listener = cls()
        listener.load_state_dict(load(path, listener.state_dict(), "listener"))
        return listener.requires_grad_(False)

    def forward(self, spectra: Tensor) -> tuple[list[Tensor], Tensor]:
        """What each layer makes of spectra [N, L, 64]: [N, 128, L] each, and the phones' logits [N, L // 2, 41]."""
        x, heard = spectra.transpose(1, 2), []
        for layer in self.layers:
            x = F.gelu(layer(x))
            heard.append(x)
        return heard, self.phones(x[:, :, 1::2].transpose(1, 2))  # a phone's 20 ms are centred on every second spectrum

    def difference(self, made: Tensor, wanted: Tensor) -> Tensor:
        """How differently [] two pieces of log-mel spectra [N, L, 64] are heard, by all layers and as phones."""
        ours, logits = self(made)
        with torch.no_grad():
            theirs, truth = self(wanted)
        apart = (
            F.kl_div(logits.log_softmax(-1), truth.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        )
        for a, b in zip(ours, theirs, strict=True):
            apart = apart + (a - b).abs().mean() / b.abs().mean()
        return apart


def spectra(waves: Tensor) -> Tensor:
    """log(mel + 0.01) [N, samples / 240, 64] of waves [N, samples] at 24 kHz."""
    magnitudes = codec_loss.magnitudes(waves, WINDOW, HOP)[:, : waves.shape[1] // HOP]
    bank = mel_bank(WINDOW, BANDS, codec_loss.RATE, *BAND_HZ).to(waves.device)
    return torch.log(magnitudes @ bank.T + 0.01)


def share_right(listener: Listener, batches: list[Piece]) -> float:
    """Share of 20 ms whose phone is heard, in per cent."""
    right = [(listener(spectra(waves))[1].argmax(-1) == phones).float().mean() for _, waves, phones in batches]
    return 100 * float(torch.stack(right).mean())


def main() -> None:
    """Train a listener; nothing is done where it is there already."""
    parser = fit_options(main.__doc__, 3000)
    parser.add_argument("--seed", type=int, default=0, help="another one hears a little differently")
    options = parser.parse_args()
    if options.out.exists():
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    listener = Listener()
    crops = iter(DataLoader(Crops(shards(options.data)[:40], CROPS, FRAMES, 0.5, options.seed), batch_size=None))
    unseen = Crops([options.data[0] / HELD_OUT], CROPS, FRAMES, 0.5, 0)
    held_out = [unseen.draw() for _ in range(8)]

    def loss() -> Tensor:
        _, waves, phones = next(crops)
        heard = spectra(waves)
        heard = heard + NOISE * torch.randn_like(heard) + GAIN * torch.randn(len(heard), 1, 1)
        return F.cross_entropy(listener(heard)[1].flatten(0, 1), phones.flatten())

    fit(listener, options, loss, lambda: share_right(listener, held_out))


if __name__ == "__main__":
    main()
