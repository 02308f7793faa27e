"""The losses of codec training, and the balancer (EnCodec, arXiv 2210.13438, section 3.4).

    x: a wave    y: its reconstruction    D: the discriminator (training/discriminator.py)

    l1, msspec, log_mel, sc    y against x, as waves and as spectrograms    codec_losses
    adv, feat         D(y), and the feature maps of D for x and y  generator_losses
    disc              what D itself learns from                    discriminator_loss
    commit            latents against their entries                in rvq.py

Without the balancer the weighted losses are added up (equation 4). The balancer makes each weight the
share that its loss has in the gradient (equation 5).
"""
import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from config import Config
from encodec import pad1d
from system.processes import process_count, sum_over_processes


# --- losses that compare two waves ----------------------------------------------------------------

def hertz_to_mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


@functools.lru_cache(maxsize=32)
def mel_filters(n_fft: int, sample_rate: int, n_mels: int, device):
    """Triangular filters of height 1 from 64 Hz to half the rate, evenly spaced on the mel scale.

    -> (n_fft/2+1, n_mels): a power spectrum times this is a mel spectrum.
    """
    nyquist = sample_rate // 2
    corners = torch.linspace(hertz_to_mel(64), hertz_to_mel(nyquist), n_mels + 2, dtype=torch.float64)
    corners = 700 * (10 ** (corners / 2595) - 1)  # Hz; filter n rises from corner n and falls to n + 2
    frequency = torch.linspace(0, nyquist, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    width = corners.diff()
    rise = (frequency - corners[:-2]) / width[:-1]
    fall = (corners[2:] - frequency) / width[1:]
    return torch.minimum(rise, fall).clamp(min=0).float().to(device)


def power_spectrogram(wav, n_fft: int):
    """|STFT|^2 over the window's energy: (B, C, L) -> (B, C, n_fft/2+1, ceil(L / hop)), hop = n_fft / 4."""
    B, C, L = wav.shape
    hop = n_fft // 4
    side = (n_fft - hop) // 2
    wav = pad1d(wav, side, side, "reflect")
    wav = F.pad(wav, (0, -L % hop))
    window = torch.hann_window(n_fft, device=wav.device)
    wav = wav.reshape(B * C, -1)
    spectrum = torch.stft(wav, n_fft, hop, window=window, center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # abs() has no gradient at 0
    power = power / window.square().sum()
    return power.view(B, C, *power.shape[1:])


def mel_floor(config: Config, progress: float) -> float:
    """What is added before the logarithm, after this share of the run.

    With a low floor, all errors count alike, near silence too, and nothing is learned at first. So it may
    start high: it then falls evenly, in dB, until 60 % of the run.
    """
    if not config.mel_floor_start:
        return config.mel_floor
    return config.mel_floor_start * (config.mel_floor / config.mel_floor_start) ** min(1.0, progress / 0.6)


def codec_losses(config: Config, wav, reconstruction, floor: float) -> dict:
    """Waves x and y (B, C, L) -> {name: loss} of l1, msspec, log_mel and sc, those with a weight in config.

    l1      mean |x - y|
    msspec  half of mean |M_x - M_y| + mean (log10 M_x - log10 M_y)^2, M: mel spectrograms; averaged over
            windows of 2 ** mel_range samples. As in audiocraft: equation 1 has a norm instead of that square
    log_mel mean |log10 M_x - log10 M_y|, averaged over the same windows
    sc      spectral convergence |S_x - S_y| / |S_x|, S: magnitudes, Frobenius norms; summed over windows
    """
    names = ("l1", "msspec", "log_mel", "sc")
    losses = {name: 0.0 for name in names if getattr(config, name) > 0}     # the others are not computed
    if "l1" in losses:
        losses["l1"] = F.l1_loss(reconstruction, wav)
    windows = [2 ** exponent for exponent in range(*config.mel_range)]
    for n_fft in windows if losses.keys() - {"l1"} else []:
        power_x = power_spectrogram(wav.float(), n_fft)
        power_y = power_spectrogram(reconstruction.float(), n_fft)
        if losses.keys() & {"msspec", "log_mel"}:
            filters = mel_filters(n_fft, config.sample_rate, config.n_mels, wav.device)
            mel_x = power_x.mT @ filters  # (B, C, frames, n_mels)
            mel_y = power_y.mT @ filters
            difference = (mel_x + floor).log10() - (mel_y + floor).log10()
        if "msspec" in losses:
            distance = (mel_x - mel_y).abs().mean() + difference.square().mean()
            losses["msspec"] += distance / (2 * len(windows))
        if "log_mel" in losses:
            losses["log_mel"] += difference.abs().mean() / len(windows)
        if "sc" in losses:
            magnitude_x = (power_x + 1e-10).sqrt()
            magnitude_y = (power_y + 1e-10).sqrt()
            losses["sc"] += (magnitude_x - magnitude_y).norm() / magnitude_x.norm()
    return losses


def mel_loss(config: Config, wav, reconstruction):
    """Multi-scale mel distance (msspec) of two waves (B, C, L)."""
    config = dataclasses.replace(config, msspec=1.0)
    return codec_losses(config, wav, reconstruction, config.mel_floor)["msspec"]


# --- adversarial losses ---------------------------------------------------------------------------

def generator_losses(fake, real) -> dict:
    """D(y) and D(x), each (logits, maps) of MultiScaleSTFTDiscriminator -> {"adv": loss, "feat": loss}.

    adv = mean(-logits of y), where the paper has max(0, 1 - logits). feat = mean |map of x - map of y|, which
    equation 2 divides by the mean size of the map of x. Both as in audiocraft.
    """
    fake_logits, fake_maps = fake
    real_maps = real[1]
    adversarial = [-logits.mean() for logits in fake_logits]
    features = []
    for fake_of_window, real_of_window in zip(fake_maps, real_maps):
        for fake_map, real_map in zip(fake_of_window, real_of_window):
            features.append(F.l1_loss(fake_map, real_map.detach()))
    return {"adv": torch.stack(adversarial).mean(), "feat": torch.stack(features).mean()}


def discriminator_loss(fake, real):
    """Hinge loss of the discriminator: mean of max(0, 1 - D(x)) + max(0, 1 + D(y)).

    Arguments as of generator_losses; y must be detached, because only the discriminator learns from this.
    """
    losses = []
    for fake_logits, real_logits in zip(fake[0], real[0]):
        losses.append(F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
    return torch.stack(losses).mean()


# --- the balancer ---------------------------------------------------------------------------------

class Balancer(nn.Module):
    """Makes loss weights shares of the gradient (equation 5): g = sum_k w_k / sum_j w_j * g_k / avg|g_k|.

    g_k is the gradient of loss k with respect to the reconstruction, avg a moving average over calls, |g_k|
    the mean norm of its items (per_item=False: the norm of the whole batch, audiocraft's other choice).
    """

    def __init__(self, weights: dict, decay: float = 0.999, per_item: bool = True):
        super().__init__()
        self.weights, self.decay, self.per_item = weights, decay, per_item
        self.register_buffer("norms", torch.zeros(len(weights)))   # decayed sums; divided by counts: averages
        self.register_buffer("counts", torch.zeros(len(weights)))

    def backward(self, losses: dict, output):
        """Adds the balanced gradient of {name: loss} to output.grad (B, C, L) -> the balanced loss."""
        total = 0.0
        gradient = torch.zeros_like(output)
        weight_sum = sum(self.weights.values())
        for i, (name, weight) in enumerate(self.weights.items()):
            g, = torch.autograd.grad(losses[name], output, retain_graph=True)
            norm = g.flatten(1).norm(dim=1).mean() if self.per_item else g.norm()
            # The mean over N processes, divided by N once more: in the mean over the items of all processes
            # each item counts N times less than in the mean over those of one.
            norm = sum_over_processes(norm) / process_count() ** 2
            self.norms[i] = self.decay * self.norms[i] + norm
            self.counts[i] = self.decay * self.counts[i] + 1
            average = self.norms[i] / self.counts[i]
            factor = weight / weight_sum / (1e-12 + average)
            gradient += factor * g
            total = total + factor * losses[name].detach()
        output.backward(gradient)
        return total
