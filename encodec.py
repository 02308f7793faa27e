"""EnCodec: audio as a few streams of small integers, and back (arXiv 2210.13438, section 3).

    python encodec.py [FILE]     # the way of one sound: samples -> latent frames -> codes -> samples

    wav (B, C, L) --encoder--> (B, Z, T) --quantizer--> codes (B, K, T) --entries--> (B, Z, T) --decoder--> wav
      32,000 a second            50 a second              50 x K a second

The encoder ("SEANet", arXiv 2009.02095) is a stack of convolutions. Each stage is a residual unit and a strided
convolution that divides the rate by one of `ratios` (innermost last) and doubles the channels; an LSTM then looks
over all frames. The decoder is its mirror image. T = ceil(L / stride), stride = product of the ratios.

The file has the model, long audio in pieces, and what only training needs: losses, discriminator, balancer. To
understand MusicGen, read as far as `EncodecModel.decode`.
"""
import dataclasses
import functools
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from checkpoints.files import load_strict, write_tensors
from config import Config, UserError, run
from rvq import ResidualVectorQuantizer, process_count


# --- the model ---------------------------------------------------------------------------------------------

def pad1d(x, left: int, right: int, mode: str):
    """Pads time. Reflection needs a signal longer than the padding: a shorter one gets zeros on its right first,
    which are cut off again afterwards (as the original)."""
    missing = max(0, max(left, right) - x.shape[-1] + 1) if mode == "reflect" else 0
    x = F.pad(x, (0, missing)) if missing else x
    if x.stride(1) == 1 and mode == "reflect":  # channels lie next to each other in memory (`fold`) and are to stay so
        B, C, L = x.shape
        padded = x.new_empty(B, left + L + right, C).mT
        padded[..., left:left + L] = x
        padded[..., :left], padded[..., left + L:] = x[..., 1:left + 1].flip(-1), x[..., L - 1 - right:-1].flip(-1)
    else:
        padded = F.pad(x.mT, (0, 0, left, right), mode).mT if x.stride(1) == 1 else F.pad(x, (left, right), mode)
    return padded[..., :padded.shape[-1] - missing]


class Conv(nn.Module):
    """Convolution that turns L samples into ceil(L / stride), whatever L is.

    Kernel 4, stride 2, so 4 - 2 = 2 samples of padding, drawn for L = 5 (`.` is padding, one row per output):

        non-causal   . 1 2 3 4 5 . .        causal   . . 1 2 3 4 5 .
                     -------                         -------
                         -------                         -------
                             -------                         -------

    Non-causal splits the padding (the odd one goes left), causal puts all of it left, so that no output sees
    what comes after its stride. Where L is not a multiple of the stride, more goes right to fill the last window.

    config.pad_mode fills it: with zeros in the configuration that the original trains its 32 kHz codec with
    ("constant"), with reflection in those that transformers has for released ones. A checkpoint's own decides.
    """

    def __init__(self, config: Config, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv = _normed(nn.Conv1d(inputs, outputs, kernel, stride, dilation=dilation), config)
        self.conv_norm = nn.GroupNorm(1, outputs) if config.norm == "time_group_norm" else nn.Identity()
        padding = (kernel - 1) * dilation + 1 - stride
        self.stride, self.mode = stride, config.pad_mode
        self.right = 0 if config.causal else padding // 2
        self.left = padding - self.right

    def forward(self, x):
        extra = -x.shape[-1] % self.stride
        conv = functools.partial(conv_by_products, self.conv) if by_products(self, x) else self.conv
        return self.conv_norm(conv(pad1d(x, self.left, self.right + extra, self.mode)))


class ConvTranspose(nn.Module):
    """The way back: T frames become exactly T * stride samples.

    Every frame adds its kernel of 2 * stride samples, one stride further each; what hangs over is trimmed where
    `Conv` padded: all of it right when causal, else half on each side (the odd one left).
    """

    def __init__(self, config: Config, inputs: int, outputs: int, kernel: int, stride: int):
        super().__init__()
        self.convtr = _normed(nn.ConvTranspose1d(inputs, outputs, kernel, stride), config)
        self.convtr_norm = nn.GroupNorm(1, outputs) if config.norm == "time_group_norm" else nn.Identity()
        padding = kernel - stride
        self.right = padding if config.causal else padding // 2
        self.left = padding - self.right

    def forward(self, x):
        y = self.convtr_norm(convtr_by_products(self, x) if by_products(self, x) else self.convtr(x))
        return y[..., self.left:y.shape[-1] - self.right]


def _normed(conv, config: Config):
    """Weight norm (arXiv 1602.07868): w = g v / |v|, learnt as g (original0) and v (original1)."""
    return parametrizations.weight_norm(conv) if config.norm == "weight_norm" else conv


class ResidualUnit(nn.Module):
    """x + conv1(ELU(conv3(ELU(x)))), narrower inside; true_skip = False puts a 1x1 convolution on the skip."""

    def __init__(self, config: Config, channels: int, dilation: int):
        super().__init__()
        hidden = channels // config.compress
        self.block = nn.Sequential(
            nn.ELU(), Conv(config, channels, hidden, config.residual_kernel_size, dilation=dilation),
            nn.ELU(inplace=True), Conv(config, hidden, channels, 1))
        self.shortcut = nn.Identity() if config.true_skip else Conv(config, channels, channels, 1)

    def forward(self, x):
        return self.shortcut(x) + self.block(x)


class LSTM(nn.Module):
    """LSTM over the frames, with a skip: x + LSTM(x)."""

    def __init__(self, config: Config, channels: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, config.lstm)

    def forward(self, x):  # (B, channels, T)
        return self.step(x, None)[0]

    def step(self, x, state):
        """-> output, and the state that the next frames begin with"""
        x = x.permute(2, 0, 1)
        y, state = self.lstm(x, state)
        return (x + y).permute(1, 2, 0), state


def build_encoder(config: Config) -> nn.Sequential:
    """wav (B, C, L) -> latent (B, Z, ceil(L / stride))"""
    width = config.n_filters
    layers = [Conv(config, config.channels, width, config.kernel_size)]
    for ratio in reversed(config.ratios):
        layers += [ResidualUnit(config, width, config.dilation_base ** i) for i in range(config.n_residual_layers)]
        layers += [nn.ELU(inplace=True), Conv(config, width, 2 * width, 2 * ratio, stride=ratio)]
        width *= 2
    layers += [LSTM(config, width)] if config.lstm else []
    return nn.Sequential(*layers, nn.ELU(), Conv(config, width, config.dimension, config.last_kernel_size))


def build_decoder(config: Config) -> nn.Sequential:
    """latent (B, Z, T) -> wav (B, C, T * stride)"""
    width = config.n_filters * 2 ** len(config.ratios)
    layers = [Conv(config, config.dimension, width, config.kernel_size)]
    layers += [LSTM(config, width)] if config.lstm else []
    for n, ratio in enumerate(config.ratios):     # behind an LSTM not in place: `stream` needs its output again
        layers += [nn.ELU(inplace=n > 0), ConvTranspose(config, width, width // 2, 2 * ratio, stride=ratio)]
        width //= 2
        layers += [ResidualUnit(config, width, config.dilation_base ** i) for i in range(config.n_residual_layers)]
    return nn.Sequential(*layers, nn.ELU(inplace=True), Conv(config, width, config.channels, config.last_kernel_size))


class EncodecModel(nn.Module):
    """Encoder, residual vector quantizer and decoder."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = build_encoder(config), build_decoder(config)
        self.quantizer = ResidualVectorQuantizer(
            config.dimension, config.n_q, config.card, config.codebook_decay, config.kmeans_init,
            config.kmeans_iters, config.threshold_dead, config.q_dropout)

    sample_rate = property(lambda self: self.config.sample_rate)                      # Hz
    channels = property(lambda self: self.config.channels)                            # C
    stride = property(lambda self: self.config.stride)                                # samples per frame
    frame_rate = property(lambda self: self.config.sample_rate / self.config.stride)  # frames/s
    num_codebooks = property(lambda self: self.config.n_q)                            # K
    cardinality = property(lambda self: self.config.card)                             # V

    def forward(self, wav, n_q: int | None = None, quantise: bool = True):
        """For training: wav (B, C, L) -> reconstruction (B, C, L), codes (B, K, T), commitment loss.

        quantise=False sends the latent straight to the decoder: codes are None, the commitment loss is 0.
        """
        self._check_wav(wav)
        latent = self.encoder(wav)                                      # (B, Z, T)
        codes, commit = None, latent.new_zeros(())
        if quantise:
            latent, codes, commit = self.quantizer(latent, n_q)         # (B, Z, T), (B, K, T)
        return self.decoder(latent)[..., :wav.shape[-1]], codes, commit

    @torch.no_grad()
    def encode(self, wav, n_q: int | None = None):
        """wav (B, C, L) -> codes (B, K, T), T = ceil(L / stride). n_q: fewer codebooks than there are.

        A mono codec takes stereo too: each side by itself, codebooks interleaved 1L 1R 2L 2R ... (B, 2 K, T), as
        the stereo MusicGen models have them.
        """
        if self.channels == 1 and wav.ndim == 3 and wav.shape[1] == 2:
            left, right = self.encode(wav[:, :1], n_q), self.encode(wav[:, 1:], n_q)
            return torch.stack([left, right], 2).flatten(1, 2)  # (B, K, 2, T) -> (B, 2 K, T)
        self._check_wav(wav)
        return self.quantizer.encode(self._run(self.encoder, wav, PIECE * self.stride), n_q)

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, K, T) -> wav (B, C, T * stride). 2 K codebooks of a mono codec: stereo (B, 2, T * stride)."""
        B, K, T = codes.shape
        if self.channels == 1 and K == 2 * self.num_codebooks:
            return torch.cat([self.decode(codes[:, 0::2]), self.decode(codes[:, 1::2])], 1)
        if T == 0 or not 0 <= int(codes.min()) <= int(codes.max()) < self.cardinality:
            raise UserError(f"codes of shape {tuple(codes.shape)}: need frames of numbers from 0 to "
                            f"{self.cardinality - 1}")
        return self._run(self.decoder, self.quantizer.decode(codes), PIECE)

    def _run(self, layers, x, piece: int):
        """layers(x), in the precision of `fold`; a long x in pieces: the same within rounding, in bounded memory."""
        x = x.to(next(layers.parameters()).dtype)
        if x.shape[-1] <= 2 * piece or self.config.norm == "time_group_norm":  # that norm needs the whole
            return layers(x).float()
        return torch.cat(list(stream(layers, iter(x.split(piece, -1)))), -1).float()

    def _check_wav(self, wav):
        if wav.ndim != 3 or wav.shape[1] != self.channels or wav.shape[2] == 0:
            raise UserError(f"a wave of shape {tuple(wav.shape)}: this codec takes (batch, {self.channels}, samples)")

    @property
    def bandwidth(self) -> float:
        """kb/s of one codebook (as transformers and the original count, at whole frames a second)"""
        return math.log2(self.cardinality) * math.ceil(self.frame_rate) / 1000

    def fold(self, dtype=torch.float32) -> "EncodecModel":
        """Turns weight norm into plain weights, once and for good: faster, same output. For inference.

        dtype: of encoder and decoder; the codebooks stay in float32."""
        for module in self.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        self.encoder.to(dtype), self.decoder.to(dtype)
        pack_weights(self)
        self.config = dataclasses.replace(self.config, norm=self.config.norm.replace("weight_norm", "none"))
        return self

    def save(self, directory, compact: bool = False):
        """Writes config.json and model.safetensors, which from_pretrained reads. compact: in float16."""
        tensors = {name: tensor.half() if compact else tensor for name, tensor in self.state_dict().items()}
        write_tensors(Path(directory) / "model.safetensors", tensors)
        self.config.save(Path(directory) / "config.json")

    def to_hf(self, directory):
        """Writes config.json and model.safetensors that transformers' EncodecModel.from_pretrained loads."""
        from checkpoints.formats import export_codec
        export_codec(self, directory)

    @classmethod
    def from_pretrained(cls, name, bandwidth: float | None = None, n_q: int | None = None,
                        dtype: torch.dtype | None = torch.float32) -> "EncodecModel":
        """Codec of a directory of ours, of transformers or of the original, or of a hub id; in evaluation mode.

        A MusicGen directory gives the codec inside it. bandwidth (kb/s) or n_q choose how many codebooks to use
        (default: all); dtype None keeps that of the file. UserError names all that is missing or not supported.
        """
        from checkpoints.formats import read_codec
        config, tensors = read_codec(name, dtype)
        with torch.device("meta"):  # shapes only: memory is taken by the tensors that were read
            model = cls(config)
        load_strict(model, tensors, name)
        if bandwidth is not None:
            n_q = int(bandwidth / model.bandwidth + 1e-6)
        if n_q is not None:
            if not 1 <= n_q <= config.n_q:
                raise UserError(f"{name}: {n_q} codebooks asked for (n_q or bandwidth), this codec has 1 to "
                                f"{config.n_q} codebooks of {model.bandwidth:g} kb/s")
            model.quantizer.codebooks = model.quantizer.codebooks[:n_q]
            model.config = dataclasses.replace(config, n_q=n_q)
        return model.eval()


# --- long audio: the same layers, piece by piece -----------------------------------------------------------

PIECE = 150  # frames of a piece when audio is coded piece by piece: more takes more memory and is hardly faster


def stream(layers, pieces):
    """Runs encoder or decoder over an iterator of consecutive pieces (B, channels, any length): yields its output.

    Joined it is what the layers give for all pieces at once, as long as that is longer than their paddings.
    """
    for is_lstm, group in itertools.groupby(layers, lambda layer: isinstance(layer, LSTM)):
        pieces = _stream_lstm(*group, pieces) if is_lstm else _stream_convs(nn.Sequential(*group), pieces)
    yield from pieces


def _stream_lstm(layer: LSTM, pieces):
    state = None  # all that it knows of the pieces before
    for x in pieces:
        y, state = layer.step(x, state)
        yield y


def _stream_convs(layers, pieces):
    """Convolutions see only so far: every piece goes in with that much of its neighbours, which is cut off again."""
    reach, down, up = 0.0, 1, 1  # inputs seen on one side; inputs for `up` outputs
    for layer in layers.modules():
        if isinstance(layer, Conv):
            reach, down = reach + max(layer.left, layer.right) * down / up, down * layer.stride
        elif isinstance(layer, ConvTranspose):  # kernel 2 * stride: every output comes of two neighbours
            reach, up = reach + 1 / up, up * layer.convtr.stride[0]
    context = max(2, math.ceil(reach / down)) * down  # 2: or reflection at the end could lack samples
    held, done = None, 0  # the last inputs, and how many of them have given their outputs
    for x in itertools.chain(pieces, [None]):
        held = x if held is None else held if x is None else torch.cat([held, x], -1)
        end = held.shape[-1] if x is None else (held.shape[-1] - context) // down * down
        if end > done:
            yield layers(held)[..., done * up // down:None if x is None else end * up // down]
            drop = max(0, end - context)
            held, done = held[..., drop:], end - drop


# --- optional: the same convolutions as matrix products, on the CPU -------------------------------------------
#
# torch's own bring frames and weights of every convolution into another order in memory and back. `fold` leaves the
# channels of a frame next to each other throughout, and a convolution is a few products of such frames with weights.


def pack_weights(codec):
    """Weights in the order in memory that the products want; names and shapes stay."""
    for module in codec.modules():
        if isinstance(module, Conv):
            weight = module.conv.weight                                                 # (C', C, kernel)
            weight.data = weight.data.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        elif isinstance(module, ConvTranspose):
            weight = module.convtr.weight.detach().unflatten(-1, (2, -1))               # (C, C', 2, stride)
            module.register_buffer("packed", weight.permute(2, 0, 3, 1).flatten(2).contiguous(), persistent=False)
        module.folded = True


def by_products(module, x) -> bool:
    return hasattr(module, "folded") and x.device.type == "cpu" and not torch.is_grad_enabled()


def conv_by_products(conv, x):
    """conv(x) of a padded x (B, C, L): every stride of its kernel times every stride of frames, added up."""
    (k,), (s,), (d,), weight = conv.kernel_size, conv.stride, conv.dilation, conv.weight.permute(2, 1, 0)
    B, C, L = x.shape
    T = (L - d * (k - 1) - 1) // s + 1
    if s == 1 and len(conv.weight) < 8:     # few outputs: one product for the whole kernel, whose parts are then added
        parts = (x.mT @ weight.permute(1, 0, 2).flatten(1)).float().view(B, L, k, -1)
        return (sum(parts[:, n * d:n * d + T, n] for n in range(k)) + conv.bias.float()).to(x.dtype).mT
    if C < 8:                               # few inputs: all of a window at once
        frames = x.unfold(-1, d * (k - 1) + 1, s)[..., ::d].permute(0, 2, 3, 1).flatten(2)
        weight = weight.flatten(0, 1)[None]
    else:
        frames, weight = x.mT.reshape(B, L // s, s * C), weight.reshape(k // s, s * C, -1)
    y = x.new_empty(B, T, len(conv.weight))
    for item, rows in zip(y, frames):
        torch.addmm(conv.bias, rows[:T], weight[0], out=item)
        for n in range(1, len(weight)):
            item.addmm_(rows[n * d:n * d + T], weight[n])
    return y.mT


def convtr_by_products(module, x):
    """convtr(x) of x (B, C, T): a stride of output comes of a frame and of the one before."""
    B, C, T = x.shape
    bias = module.convtr.bias.repeat(module.convtr.stride[0])
    y = x.new_empty(B, T + 1, len(bias))
    for item, frames in zip(y, x.mT):
        torch.addmm(bias, frames, module.packed[0], out=item[:T])
        item[T] = bias
        item[1:].addmm_(frames, module.packed[1])
    return y.view(B, -1, module.convtr.out_channels).mT


# --- training: losses, discriminator, balancer (EnCodec, sections 3.4 and 3.5) -----------------------------

@functools.lru_cache(maxsize=32)
def mel_filters(n_fft: int, sample_rate: int, n_mels: int, device, f_min: float = 64.0):
    """Triangles of height 1, even on the scale 2595 log10(1 + f / 700), to half the rate. -> (n_fft/2+1, n_mels)"""
    def mel(f):
        return 2595 * math.log10(1 + f / 700)
    corners = torch.linspace(mel(f_min), mel(sample_rate // 2), n_mels + 2, dtype=torch.float64)
    corners = 700 * (10 ** (corners / 2595) - 1)
    f = torch.linspace(0, sample_rate // 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    rise, fall = (f - corners[:-2]) / corners.diff()[:-1], (corners[2:] - f) / corners.diff()[1:]
    return torch.minimum(rise, fall).clamp(min=0).float().to(device)


def power_spectrogram(wav, n_fft: int):
    """|STFT|^2 over the window's energy: (B, C, L) -> (B, C, n_fft/2+1, ceil(L / hop)), hop = n_fft / 4."""
    B, C, L = wav.shape
    hop = n_fft // 4
    side = (n_fft - hop) // 2
    wav = F.pad(pad1d(wav, side, side, "reflect"), (0, -L % hop))
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.stft(wav.reshape(B * C, -1), n_fft, hop, window=window, center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # (B C, F, frames); abs() has no gradient at 0
    return (power / window.square().sum()).view(B, C, *power.shape[1:])


def codec_losses(config: Config, wav, reconstruction) -> dict:
    """{name: loss} of the terms that compare two waves (B, C, L) and have a weight of that name in config.

    l1: mean absolute difference of the samples. The others add up over windows 2 ** mel_range:
    msspec: mean|M_x - M_y| + mean (log10 M_x - log10 M_y)^2, M mel spectrograms, mean over windows, halved: the
    original's code, where the paper's equation 1 has a norm in place of the square of logarithms.
    sc: spectral convergence |S_x - S_y| / |S_x|, S magnitudes, Frobenius norms.
    """
    losses, scales = {"l1": F.l1_loss(reconstruction, wav), "msspec": 0.0, "sc": 0.0}, range(*config.mel_range)
    for i in scales if config.msspec or config.sc else ():
        filters = mel_filters(2 ** i, config.sample_rate, config.n_mels, wav.device)
        x, y = (power_spectrogram(w.float(), 2 ** i) for w in (wav, reconstruction))
        m_x, m_y = x.mT @ filters, y.mT @ filters  # (B, C, frames, n_mels)
        log_x, log_y = (m_x + config.mel_floor).log10(), (m_y + config.mel_floor).log10()
        losses["msspec"] += ((m_x - m_y).abs().mean() + (log_x - log_y).square().mean()) / (2 * len(scales))
        x, y = (x + 1e-10).sqrt(), (y + 1e-10).sqrt()
        losses["sc"] += (x - y).norm() / x.norm()
    return {name: loss for name, loss in losses.items() if getattr(config, name) > 0}


def mel_loss(config: Config, wav, reconstruction):
    """Multi-scale mel distance (msspec) of two waves (B, C, L)."""
    return codec_losses(dataclasses.replace(config, msspec=1.0), wav, reconstruction)["msspec"]


class MultiScaleSTFTDiscriminator(nn.Module):
    """One judge of complex spectrograms for each of disc_windows: wav (B, C, L) -> logits and feature maps."""

    def __init__(self, config: Config):
        super().__init__()
        self.discriminators = nn.ModuleList(STFTDiscriminator(config.channels, config.disc_filters, window)
                                            for window in config.disc_windows)

    def forward(self, wav):
        """-> logits ((B, 1, frames, freq) of each window), maps ([5 feature maps] of each window)"""
        return tuple(zip(*(judge(wav) for judge in self.discriminators)))


class STFTDiscriminator(nn.Module):
    """2-d convolutions over (time, frequency), strided over frequency, dilated over time."""

    def __init__(self, channels: int, filters: int, window: int):
        super().__init__()
        def conv(inputs, outputs, kernel, dilation=1, stride=1):
            padding = ((kernel[0] - 1) * dilation // 2, kernel[1] // 2)
            return nn.Conv2d(inputs, outputs, kernel, (1, stride), padding, (dilation, 1))
        normed = [conv(filters, filters, (3, 9), dilation, 2) for dilation in (1, 2, 4)]
        normed = [parametrizations.weight_norm(c) for c in normed + [conv(filters, filters, (3, 3))]]
        self.convs = nn.ModuleList([conv(2 * channels, filters, (3, 9)), *normed])  # plain first
        self.last = parametrizations.weight_norm(conv(filters, 1, (3, 3)))
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, wav):
        B, C, L = wav.shape
        n = len(self.window)
        wav = F.pad(wav.float(), (0, max(0, n - L))).reshape(B * C, -1)
        spectrum = torch.stft(wav, n, n // 4, window=self.window, center=False, return_complex=True)
        spectrum = (spectrum / self.window.square().sum().sqrt()).view(B, C, *spectrum.shape[1:])
        x, maps = torch.cat([spectrum.real, spectrum.imag], 1).mT, []  # (B, 2 C, frames, freq)
        for layer in self.convs:
            x = F.leaky_relu(layer(x), 0.3)
            maps.append(x)
        return self.last(x), maps


def generator_losses(fake, real) -> dict:
    """Outputs of the discriminator on reconstruction and original -> {"adv", "feat"}: fool it, look alike in it.

    As in the original's code: adv = mean(-D(y)), which the paper cuts off at 1; feat is equation 2 without its
    division by the size of the maps.
    """
    feat = [F.l1_loss(f, r.detach()) for maps in zip(fake[1], real[1]) for f, r in zip(*maps)]  # as many in each
    return {"adv": torch.stack([-logits.mean() for logits in fake[0]]).mean(), "feat": torch.stack(feat).mean()}


def discriminator_loss(fake, real):
    """Hinge loss of the discriminator (section 3.4): real above 1, fake (a detached reconstruction) below -1."""
    return torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for f, r in zip(fake[0], real[0])]).mean()


class Balancer(nn.Module):
    """Makes loss weights shares of the gradient (EnCodec, equation 5): g = sum_k w_k / sum_j w_j * g_k / avg|g_k|.

    avg is a moving average over calls of the norm (mean over batch items), and over processes: several with a part of
    the batch each send back what one would with all of it.
    """

    def __init__(self, weights: dict, decay: float = 0.999, per_item: bool = True):
        super().__init__()
        self.weights, self.decay, self.per_item = weights, decay, per_item
        self.register_buffer("norms", torch.zeros(len(weights)))   # decayed sums; divided by the next: averages
        self.register_buffer("counts", torch.zeros(len(weights)))

    def backward(self, losses: dict, output):
        """Sends the balanced gradient of {name: loss} into output (B, C, L) and behind it -> the balanced loss."""
        total, gradient = 0.0, torch.zeros_like(output)
        for i, (name, weight) in enumerate(self.weights.items()):
            g, = torch.autograd.grad(losses[name], output, retain_graph=True)
            norm = g.flatten(1).norm(dim=1).mean() if self.per_item else g.norm()
            if process_count() > 1:  # each has the mean over its own, fewer, items: larger gradients
                dist.all_reduce(norm)
                norm = norm / process_count() ** 2
            self.norms[i] = self.decay * self.norms[i] + norm
            self.counts[i] = self.decay * self.counts[i] + 1
            factor = weight / sum(self.weights.values()) / (1e-12 + self.norms[i] / self.counts[i])
            gradient += factor * g
            total = total + factor * losses[name].detach()
        output.backward(gradient)
        return total


def demo(argv):
    """samples -> frames -> codes -> samples, of FILE or of two seconds of a glide."""
    directory = Path(__file__).parent / "checkpoints" / "tiny" / "codec"
    if directory.is_dir():
        codec = EncodecModel.from_pretrained(directory)
    else:
        codec = EncodecModel(Config(task="codec", n_filters=8, dimension=32, card=256, kmeans_init=False)).eval()
        print("random weights, as there is no checkpoints/tiny/codec: shapes are right, sound is not")
    time = torch.arange(2 * codec.sample_rate) / codec.sample_rate
    wav = 0.3 * torch.sin(2 * torch.pi * (220 + 110 * time) * time).expand(codec.channels, -1)
    if argv:
        from data.audio import read_audio
        wav = read_audio(argv[0], codec.sample_rate, codec.channels, duration=10.0)
    codes, K = codec.encode(wav[None]), codec.num_codebooks
    print(f"samples  {(1, *wav.shape)}  {wav.shape[1] / codec.sample_rate:.2f} s at {codec.sample_rate} Hz")
    print(f"frames   {(1, codec.config.dimension, codes.shape[2])}  one for {codec.stride} samples, "
          f"{codec.frame_rate:g} a second")
    print(f"codes    {tuple(codes.shape)}  below {codec.cardinality}, {K * codec.bandwidth:.2f} kb/s; the first:")
    for k, row in enumerate(codes[0, :, :12].tolist()):
        print(f"     k{k + 1}  " + " ".join(f"{code:4d}" for code in row))
    for k in range(1, K + 1):
        back = codec.decode(codes[:, :k])
        distance = float(mel_loss(codec.config, wav[None], back[..., :wav.shape[1]]))
        print(f"samples  {tuple(back.shape)}  from {k} of {K} codebooks, mel distance {distance:.4f}  "
              f"{'#' * min(60, round(4000 * distance))}")


if __name__ == "__main__":
    run(demo, sys.argv[1:])
