"""A recording in, one acoustic vector per 80 ms frame out: eight log-mel spectra and four pitches.

The vector is what the codes stand for. It is fixed by hand, so codes exist before any network is trained, and the
talker and the codec decoder can be trained apart. Knows nothing of codes. A vector [648] is
    8 x 80  log mel amplitude every 10 ms (40 Hz to 7.8 kHz)
    4       log(F0 / 140 Hz) every 20 ms, interpolated where unvoiced, times PITCH_WEIGHT
    4       1 where voiced, else 0, times VOICED_WEIGHT
The weights put pitch errors on the scale of audible mel errors.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.flite import RATE

FRAME = 1280
"""Samples of one 80 ms frame at 16 kHz."""

WIDTH = 648
HOP, WINDOW, MELS, FLOOR = 160, 512, 80, 0.02
PITCH_WEIGHT, VOICED_WEIGHT = 20.0, 2.5


@cache
def mel_bank(window: int, mels: int, rate: int, low: float, high: float) -> Tensor:
    """Triangular mel filters [mels, window / 2 + 1]; a filter narrower than a bin takes its nearest bin."""

    def to_mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    edges = 700 * (10 ** (np.linspace(to_mel(low), to_mel(high), mels + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(window, 1 / rate)
    bank = np.zeros((mels, len(bins)), np.float32)
    for row, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        rising = (bins - left) / max(centre - left, 1e-9)
        falling = (right - bins) / max(right - centre, 1e-9)
        bank[row] = np.maximum(0, np.minimum(rising, falling))
        if bank[row].sum() < 1e-3:
            bank[row, np.argmin(abs(bins - centre))] = 1
    return torch.from_numpy(bank)


def log_mel(wave: Tensor) -> Tensor:
    """Log mel amplitude [samples / 160, 80] of a wave [samples] in [-1, 1]; row j is centred at sample 160 j + 80."""
    margin = (WINDOW - HOP) // 2
    windows = F.pad(wave, (margin, margin + HOP)).unfold(0, WINDOW, HOP)[: len(wave) // HOP]
    return torch.log(
        torch.fft.rfft(windows * torch.hann_window(WINDOW)).abs() @ mel_bank(WINDOW, MELS, RATE, 40, 7800).T + FLOOR
    )


def pitch(wave: Tensor) -> tuple[Tensor, Tensor]:
    """log(F0 / 140 Hz) and voicing (0 or 1), each [samples / 320], by the autocorrelation of 48 ms windows.

    The window's own autocorrelation is divided out; of all peaks near the highest one the shortest lag wins.
    """
    window, hop, size = 768, 320, 2048
    count = len(wave) // hop
    margin = (window - hop) // 2
    x = F.pad(wave, (margin, margin + hop)).unfold(0, window, hop)[:count]
    x = x - x.mean(1, keepdim=True)
    hann = torch.hann_window(window)
    taper = torch.fft.irfft(torch.fft.rfft(hann, size).abs() ** 2)[:400]
    correlation = torch.fft.irfft(torch.fft.rfft(x * hann, size).abs() ** 2)[:, :400]
    correlation = correlation / (correlation[:, :1] + 1e-6) / (taper / taper[0])
    shortest, longest = RATE // 320, RATE // 60
    lags = correlation[:, shortest:longest]
    highest = lags.max(1).values
    is_peak = lags >= F.max_pool1d(lags[:, None], 9, 1, 4)[:, 0] - 1e-6
    best = ((lags > 0.88 * highest[:, None]) & is_peak).float().argmax(1)
    inner = best.clamp(1, lags.shape[1] - 2)
    left, mid, right = (lags.gather(1, (inner + d)[:, None])[:, 0] for d in (-1, 0, 1))
    fraction = (0.5 * (left - right) / (left - 2 * mid + right - 1e-9)).clamp(-0.5, 0.5)
    log_f0 = torch.log(RATE / (shortest + inner + fraction) / 140).numpy()
    voiced = ((highest > 0.55) & ((x**2).mean(1) > 1e-5)).numpy()
    if voiced.any():
        log_f0 = np.interp(np.arange(count), np.flatnonzero(voiced), log_f0[voiced])
    else:
        log_f0 = np.zeros(count)
    return torch.tensor(log_f0, dtype=torch.float32), torch.from_numpy(voiced).float()


def acoustic_vectors(wave: Tensor) -> Tensor:
    """Vectors [frames, 648] of a wave [frames * 1280] in [-1, 1] at 16 kHz."""
    log_f0, voiced = pitch(wave)
    mel = log_mel(wave).view(-1, 8 * MELS)
    return torch.cat([mel, PITCH_WEIGHT * log_f0.view(-1, 4), VOICED_WEIGHT * voiced.view(-1, 4)], 1)
