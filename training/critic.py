"""Waves in, opinions out: did a recording sound so, or does the codec's decoder make it so?

Distances to a recording reward the mean of all spectra that the codes allow, which is smooth. What tells these from
recordings is what the decoder is to do better (least squares, arXiv:1611.04076; the features are matched too,
arXiv:1910.06711). Beside every spectrum lies the one that the codes let expect. Trained with the decoder, not exported.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import codec_loss
from training.features import MELS

WINDOWS = {1024: (240, 80), 512: (120, 40)}
"""Window -> hop of its spectra in samples at 24 kHz, and mel bands: finer ones hold noise, which no code can know."""

LAYERS = ((16, (1, 2)), (32, (2, 2)), (32, (2, 2)), (32, (1, 1)))
"""Channels and stride in time and frequency."""

LEARNING_RATE, WARM = 1e-3, 300
"""Of the critic; so many steps it learns alone, and as many again until its whole weight is felt."""

MATCHED = 2.0
"""Weight of the features' distance beside the opinion."""

Picture = list[Tensor]
"""Log spectra and expected ones [N, 2, frames, bands] of each window."""


def tower() -> nn.ModuleList:
    """Convolutions that judge patches of one window's spectra."""
    layers, wide = nn.ModuleList(), 2
    for channels, stride in LAYERS:
        layers.append(nn.Conv2d(wide, channels, 5, stride, padding=2))
        wide = channels
    layers.append(nn.Conv2d(wide, 1, 3, padding=1))
    return layers


def picture(waves: Tensor, expected: Tensor) -> Picture:
    """Log-mel spectra of waves [N, samples] beside expected ones [N, samples / 240, 80] of windows of 1024 samples."""
    pictures = []
    for window, (hop, bands) in WINDOWS.items():
        magnitudes = codec_loss.magnitudes(waves, window, hop)[:, : waves.shape[1] // hop]
        beside = F.avg_pool1d(expected, MELS // bands).repeat_interleave(240 // hop, 1)
        spectra = codec_loss.log_mel(magnitudes, window, bands)
        pictures.append(torch.stack([spectra, beside], 1).to(memory_format=torch.channels_last))
    return pictures


class Critic(nn.Module):
    """Pictures -> what every layer makes of them, the last one an opinion a patch: 1 is a recording, 0 the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(tower() for _ in WINDOWS)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pictures: Picture) -> list[list[Tensor]]:
        """Features [N, channels, frames', bands'] and last the opinions [N, 1, frames', bands'], of each window."""
        seen = []
        for layers, x in zip(self.towers, pictures, strict=True):
            features = []
            with torch.autocast(x.device.type, torch.bfloat16):
                for layer in layers[:-1]:  # type: ignore[index]
                    x = F.leaky_relu(layer(x), 0.1)
                    features.append(x)
                seen.append([*features, layers[-1](x).float()])  # type: ignore[index]
        return seen

    def mistakes(self, made: Picture, wanted: Picture) -> Tensor:
        """The critic's own loss [] on the decoder's pictures and the recordings'."""
        both = self([torch.cat(pair) for pair in zip(made, wanted, strict=True)])
        halves = [opinions[-1].chunk(2) for opinions in both]
        return torch.stack([ours.square().mean() + (1 - theirs).square().mean() for ours, theirs in halves]).mean()

    def complaint(self, made: Picture, wanted: Picture) -> tuple[Tensor, Tensor]:
        """The decoder's loss [], and how far [] it is from being taken for a recording."""
        with torch.no_grad():
            theirs = self(wanted)
        opinions, apart = [], []
        for ours, wanted_ones in zip(self(made), theirs, strict=True):
            opinions.append((1 - ours[-1]).square().mean())
            for a, b in zip(ours[:-1], wanted_ones[:-1], strict=True):
                apart.append((a - b).abs().float().mean() / b.abs().float().mean())
        opinion = torch.stack(opinions).mean()
        return opinion + MATCHED * torch.stack(apart).mean(), opinion
