"""The discriminator of codec training (EnCodec, arXiv 2210.13438, section 3.4 and figure 2).

    wav (B, C, L) --STFT--> spectrum (B, 2 C, frames, frequencies) --5 convolutions--> 5 feature maps
                            real and imaginary parts               --1 convolution---> logits

once for each window of config.disc_windows. Logits are high for recordings and low for reconstructions.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from config import Config


class MultiScaleSTFTDiscriminator(nn.Module):
    """One STFTDiscriminator for each window of config.disc_windows (samples)."""

    def __init__(self, config: Config):
        super().__init__()
        self.discriminators = nn.ModuleList()
        for window in config.disc_windows:
            self.discriminators.append(STFTDiscriminator(config.channels, config.disc_filters, window))

    def forward(self, wav):
        """wav (B, C, L) -> logits of each window, list of 5 feature maps of each window"""
        logits, maps = [], []
        for discriminator in self.discriminators:
            logits_of_window, maps_of_window = discriminator(wav)
            logits.append(logits_of_window)
            maps.append(maps_of_window)
        return logits, maps


class STFTDiscriminator(nn.Module):
    """2-d convolutions over (time, frequency): dilated over time, strided over frequency."""

    def __init__(self, channels: int, filters: int, window: int):
        super().__init__()
        normed = [conv2d(filters, filters, (3, 9), dilation=dilation, stride=2) for dilation in (1, 2, 4)]
        normed.append(conv2d(filters, filters, (3, 3)))
        normed = [parametrizations.weight_norm(conv) for conv in normed]
        first = conv2d(2 * channels, filters, (3, 9))
        self.convs = nn.ModuleList([first, *normed])
        self.last = parametrizations.weight_norm(conv2d(filters, 1, (3, 3)))
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, wav):
        """wav (B, C, L) -> logits (B, 1, frames, frequencies), list of 5 feature maps"""
        B, C, L = wav.shape
        n_fft = len(self.window)
        wav = F.pad(wav.float(), (0, max(0, n_fft - L)))  # at least one window
        wav = wav.reshape(B * C, -1)
        spectrum = torch.stft(wav, n_fft, n_fft // 4, window=self.window, center=False, return_complex=True)
        spectrum = spectrum / self.window.square().sum().sqrt()
        spectrum = spectrum.view(B, C, *spectrum.shape[1:])
        x = torch.cat([spectrum.real, spectrum.imag], 1).mT  # (B, 2 C, frames, frequencies)
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.3)
            maps.append(x)
        return self.last(x), maps


def conv2d(inputs: int, outputs: int, kernel, dilation: int = 1, stride: int = 1) -> nn.Conv2d:
    """Keeps the number of frames; divides that of frequencies by `stride`. kernel: (time, frequency)."""
    padding = ((kernel[0] - 1) * dilation // 2, kernel[1] // 2)
    return nn.Conv2d(inputs, outputs, kernel, (1, stride), padding, (dilation, 1))
