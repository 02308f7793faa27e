"""EnCodec: audio as a few streams of small integers, and back (arXiv 2210.13438, section 3).

    python encodec.py [FILE]     # the shapes on the way, and what 1 ... K codebooks give back

    wav (B, C, L) --encoder--> (B, Z, T) --quantizer--> codes (B, K, T) --sums--> (B, Z, T) --decoder--> wav
    32,000 a second            50 a second              50 x K a second

A second of music is 32,000 numbers, too many for a language model, which chooses one symbol after another.
So the encoder turns every 640 samples (20 ms) into a frame of Z = 128 numbers, and the quantizer each frame
into K = 4 codes. A code is the index of an entry in a codebook, a table of V = 2,048 vectors; the K entries
add up to nearly the frame (rvq.py), and the decoder makes 640 samples of it (trained in training/codec.py).

The encoder ("SEANet", arXiv 2009.02095) has a stage for each of `ratios`, the last one first: residual units,
then a strided convolution that divides the rate by the ratio and doubles the channels. An LSTM then reads the
frames in order. The decoder is the mirror image. T = ceil(L / stride). With `causal` no convolution sees
later samples. MusicGen has whole segments at hand, so its 32 kHz codec is not causal: in a stream, a frame
can be played once the next 4 (80 ms) are known.
"""
import dataclasses
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from checkpoints.codec_formats import codebook_bandwidth, export_codec, load_codec, save_codec
from data.audio import read_audio
from rvq import ResidualVectorQuantizer
from system.command import run
from system.errors import UserError

PIECE = 150         # frames of a piece when long audio is coded in pieces: more is hardly faster on a CPU
GPU_PIECE = 1500    # on a GPU it is; counts the frames of all items of a batch; takes about 1 GB


def pad1d(x, left, right, mode):
    """Pads time of x (B, C, L) with zeros (mode "constant") or with its reflection ("reflect")."""
    missing = max(left, right) + 1 - x.shape[-1]
    if mode == "reflect" and missing > 0:   # too short: zeros behind it are cut off again (as in audiocraft)
        longer = F.pad(x, (0, missing))
        return pad1d(longer, left, right, mode)[..., :-missing]
    return F.pad(x, (left, right), mode)


class Conv(nn.Module):
    """Convolution that turns L samples into ceil(L / stride), whatever L is.

    Kernel 4, stride 2, so 4 - 2 = 2 samples of padding, drawn for L = 5 (`.` is padding, one row per output):

        non-causal   . 1 2 3 4 5 . .        causal   . . 1 2 3 4 5 .
                     -------                         -------
                         -------                         -------
                             -------                         -------

    Non-causal splits the padding (the odd one goes left), causal puts all of it left, so that no output sees
    what comes after its stride. Where L is no multiple of the stride, more goes right for the last window."""

    def __init__(self, config, inputs, outputs, kernel, stride=1, dilation=1):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, dilation=dilation)
        self.conv_norm = norm_over_time(config, outputs)
        padding = (kernel - 1) * dilation + 1 - stride
        self.right = 0 if config.causal else padding // 2
        self.left = padding - self.right
        self.stride = stride
        self.pad_mode = config.pad_mode

    def forward(self, x):                                           # (B, C, L)
        extra = -x.shape[-1] % self.stride
        x = pad1d(x, self.left, self.right + extra, self.pad_mode)
        return self.conv_norm(self.conv(x))                         # (B, C', ceil(L / stride))


def norm_over_time(config, channels):
    """The norm behind a convolution of the 48 kHz codec; nothing in the others."""
    if config.norm == "time_group_norm":
        return nn.GroupNorm(1, channels)
    return nn.Identity()


class ConvTranspose(nn.Module):
    """The way back: T frames become exactly T * stride samples. Every frame adds its kernel of 2 * stride
    samples, each one stride further on. What hangs over is cut off: all of it right when causal, so that no
    sample needs a later frame, else half on each side (the odd one left)."""

    def __init__(self, config, inputs, outputs, stride):
        super().__init__()
        self.convtr = nn.ConvTranspose1d(inputs, outputs, 2 * stride, stride)
        self.convtr_norm = norm_over_time(config, outputs)
        self.right = stride if config.causal else stride // 2
        self.left = stride - self.right
        self.stride = stride

    def forward(self, x):                                           # (B, C, T)
        y = self.convtr_norm(self.convtr(x))
        return y[..., self.left:y.shape[-1] - self.right]           # (B, C', T * stride)


class ResidualUnit(nn.Module):
    """x + conv1(ELU(conv3(ELU(x)))), narrower inside. true_skip = False: a 1x1 convolution on the skip."""

    def __init__(self, config, channels, dilation):
        super().__init__()
        hidden = channels // config.compress
        conv3 = Conv(config, channels, hidden, config.residual_kernel_size, dilation=dilation)
        conv1 = Conv(config, hidden, channels, 1)
        layers = [nn.ELU(), conv3, nn.ELU(inplace=True), conv1]
        self.block = nn.Sequential(*layers)
        self.shortcut = nn.Identity()
        if not config.true_skip:
            self.shortcut = Conv(config, channels, channels, 1)

    def forward(self, x):
        return self.shortcut(x) + self.block(x)


class LSTM(nn.Module):
    """LSTM in one direction, so that a frame knows those before it, with a skip: x + LSTM(x)."""

    def __init__(self, config, channels):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, config.lstm)

    def forward(self, x):
        return next(self.stream([x]))

    def stream(self, pieces):                                       # consecutive pieces (B, channels, t)
        state = None
        for x in pieces:
            x = x.permute(2, 0, 1)
            y, state = self.lstm(x, state)
            yield (x + y).permute(1, 2, 0)


def build_encoder(config):
    """wav (B, C, L) -> latent (B, Z, ceil(L / stride))"""
    width = config.n_filters
    layers = [Conv(config, config.channels, width, config.kernel_size)]
    for ratio in reversed(config.ratios):
        for i in range(config.n_residual_layers):
            layers.append(ResidualUnit(config, width, config.dilation_base ** i))
        strided = Conv(config, width, 2 * width, 2 * ratio, stride=ratio)
        layers += [nn.ELU(inplace=True), strided]
        width *= 2
    layers += [LSTM(config, width)] if config.lstm else []
    last = Conv(config, width, config.dimension, config.last_kernel_size)
    layers += [nn.ELU(), last]
    return nn.Sequential(*layers)


def build_decoder(config):
    """latent (B, Z, T) -> wav (B, C, T * stride)"""
    width = config.n_filters * 2 ** len(config.ratios)
    layers = [Conv(config, config.dimension, width, config.kernel_size)]
    layers += [LSTM(config, width)] if config.lstm else []
    for n, ratio in enumerate(config.ratios):   # the first ELU not in place: `stream` needs its input again
        layers.append(nn.ELU(inplace=n > 0))
        layers.append(ConvTranspose(config, width, width // 2, ratio))
        width //= 2
        for i in range(config.n_residual_layers):
            layers.append(ResidualUnit(config, width, config.dilation_base ** i))
    last = Conv(config, width, config.channels, config.last_kernel_size)
    layers += [nn.ELU(inplace=True), last]
    return nn.Sequential(*layers)


class EncodecModel(nn.Module):
    """Encoder, residual vector quantizer and decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.sample_rate = config.sample_rate               # Hz
        self.channels = config.channels                     # C
        self.stride = config.stride                         # samples per frame
        self.frame_rate = config.frame_rate                 # frames/s
        self.num_codebooks = config.n_q                     # K
        self.cardinality = config.card                      # V
        self.bandwidth = codebook_bandwidth(config)         # kb/s of one codebook
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        _, self.look_ahead, _, _ = receptive_field(self.decoder)    # frames known before one can be played
        for layer in list(self.modules()):
            if config.norm == "weight_norm" and isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
                parametrizations.weight_norm(layer)         # w = g v / |v| (arXiv 1602.07868)
        self.quantizer = ResidualVectorQuantizer(
            config.dimension, config.n_q, config.card, config.codebook_decay,
            kmeans_iters=config.kmeans_iters, threshold_dead=config.threshold_dead,
            q_dropout=config.q_dropout)

    def forward(self, wav, n_q=None, quantize=True):
        """Training: wav (B, C, L) -> reconstruction (B, C, L), codes (B, K, T), commitment loss.
        quantize=False sends the latent straight to the decoder: codes are None, the commitment loss is 0."""
        latent = self.encoder(self._checked(wav))                   # (B, Z, T)
        codes, commit = None, latent.new_zeros(())
        if quantize:
            latent, codes, commit = self.quantizer(latent, n_q)
        reconstruction = self.decoder(latent)[..., :wav.shape[-1]]
        return reconstruction, codes, commit

    def encode(self, wav, n_q=None):
        """wav (B, C, L) -> codes (B, K, T), T = ceil(L / stride). n_q: fewer codebooks than there are.
        A mono codec takes stereo too -> (B, 2 K, T), rows 1L 1R 2L 2R ..., as in stereo MusicGen models."""
        if self.channels == 1 and wav.ndim == 3 and wav.shape[1] == 2:
            sides = torch.cat([wav[:, :1], wav[:, 1:]])
            left_right = self.encode(sides, n_q).chunk(2)
            codes = torch.stack(left_right, 2)                              # (B, K, 2, T)
            return codes.flatten(1, 2)                                      # (B, 2 K, T)
        pieces = self._checked(wav).split(frames_of_a_piece(wav) * self.stride, -1)
        codes = list(self.encode_stream(pieces, n_q))
        return torch.cat(codes, -1)

    def decode(self, codes):
        """codes (B, K, T) -> wav (B, C, T * stride). A mono codec: also (B, 2 K, T) -> (B, 2, T * stride)."""
        pieces = codes.split(frames_of_a_piece(codes), -1)
        waves = list(self.decode_stream(pieces))
        return torch.cat(waves, -1)

    def latents(self, codes):
        """codes (B, K, T) -> the sum of their entries (B, Z, T), which the decoder reads"""
        empty = codes.shape[-1] == 0
        if empty or codes.min() < 0 or codes.max() >= self.cardinality:
            raise UserError(f"codes {tuple(codes.shape)}: need frames of codes 0 ... {self.cardinality - 1}")
        return self.quantizer.decode(codes)

    @torch.no_grad()
    def encode_stream(self, pieces, n_q=None):
        """Pieces (B, C, l) of one wav -> iterator of codes (B, K, t) that join to what `encode` gives, up to
        rounding. Memory does not grow with the number of pieces. Mono codec, stereo: the sides as a batch."""
        for latent in stream(self.encoder, map(self._checked, pieces)):
            yield self.quantizer.encode(latent, n_q)

    @torch.no_grad()
    def decode_stream(self, pieces):
        """Pieces of codes (B, K, t) -> likewise an iterator of waves (B, C, l) that join to `decode`'s. A
        frame is given once the `look_ahead` frames behind it are known."""
        stereo = False

        def latents(codes):
            nonlocal stereo
            stereo = self.channels == 1 and codes.shape[1] == 2 * self.num_codebooks
            if stereo:
                left, right = codes[:, 0::2], codes[:, 1::2]
                codes = torch.cat([left, right])                            # the sides as a batch
            return self.latents(codes)
        for wav in stream(self.decoder, map(latents, pieces)):
            if stereo:
                wav = torch.cat(wav.chunk(2), 1)                            # (2 B, 1, l) -> (B, 2, l)
            yield wav

    def _checked(self, wav):
        if wav.ndim != 3 or wav.shape[1] != self.channels or wav.shape[2] == 0:
            raise UserError(f"a wave {tuple(wav.shape)}: this codec takes (batch, {self.channels}, samples)")
        return wav

    def fold(self):
        """Turns weight norm into plain weights, once and for good: faster, same output. For inference."""
        for module in self.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        if self.config.norm == "weight_norm":
            self.config = dataclasses.replace(self.config, norm="none")
        return self

    def save(self, directory, compact=False):           # compact: in float16
        save_codec(self, directory, compact)

    def to_hf(self, directory):                         # for transformers' EncodecModel.from_pretrained
        export_codec(self, directory)

    @classmethod
    def from_pretrained(cls, name, bandwidth=None, n_q=None, dtype=torch.float32):
        """Codec of a directory or hub id: our format, transformers' or audiocraft's, or MusicGen's around it.
        bandwidth (kb/s) or n_q: with so many codebooks. dtype None: as in the file. Raises UserError."""
        return load_codec(cls, name, bandwidth, n_q, dtype)


def frames_of_a_piece(x):
    """For audio or codes x (B, ...), which are coded in pieces: longer ones where that is faster."""
    return PIECE if x.is_cpu else max(PIECE, GPU_PIECE // len(x))


@torch.no_grad()
def stream(layers, pieces):
    """Runs encoder or decoder over consecutive pieces (B, channels, any length), yields the output in pieces.
    Joined it is what the layers give for all at once, if that is longer than their paddings."""
    dtype = next(layers.parameters()).dtype
    pieces = (x.to(dtype) for x in pieces)
    if any(isinstance(layer, nn.GroupNorm) for layer in layers.modules()):
        x = torch.cat(list(pieces), -1)     # the norm is over all time
        pieces, layers = [layers(x)], []
    for is_lstm, group in itertools.groupby(layers, lambda layer: isinstance(layer, LSTM)):
        if is_lstm:
            pieces = next(group).stream(pieces)
        else:
            pieces = _stream_convs(nn.Sequential(*group), pieces)
    yield from (y.float() for y in pieces)


def _stream_convs(layers, pieces):
    """Convolutions see only so far: a piece goes in with so much of its neighbors, which is cut off again."""
    before, after, down, up = receptive_field(layers)
    before = max(2, before)         # enough for the reflection at the end
    held, done = None, 0            # the last inputs, and how many strides of them have given their outputs
    for x in pieces:
        held = x if held is None else torch.cat([held, x], -1)
        strides = held.shape[-1] // down
        ready = strides - after
        if ready > done and strides > before:       # the reflection at the beginning looks ahead that far
            yield layers(held)[..., done * up:ready * up]
            start = max(0, ready - before)
            held, done = held[..., start * down:], ready - start
    if held is not None and held.shape[-1] > done * down:
        yield layers(held)[..., done * up:]


def receptive_field(layers):
    """-> before, after, down, up: `down` inputs, a stride, make `up` outputs, with so many strides around."""
    before = after = 0
    down = up = 1
    for layer in reversed(list(layers.modules())):      # from the outputs back to the inputs
        if isinstance(layer, Conv):
            before = before * layer.stride + layer.left
            after = after * layer.stride + layer.right
            down *= layer.stride
        if isinstance(layer, ConvTranspose):            # every output comes of two neighboring frames
            before = math.ceil(before / layer.stride) + 1
            after = math.ceil((after + layer.left) / layer.stride)
            up *= layer.stride
    before = math.ceil(before / down)
    after = math.ceil(after / down)
    return before, after, down, up


def demo(file=Path(__file__).parent / "assets/ode_to_joy.wav"):
    codec = EncodecModel.from_pretrained(Path(__file__).parent / "checkpoints/tiny/codec")
    wav = read_audio(file, codec.sample_rate, codec.channels, duration=10.0)[None]
    codes = codec.encode(wav)
    print("samples ", tuple(wav.shape))
    print("frames  ", tuple(codec.latents(codes).shape))
    print("codes   ", tuple(codes.shape), f"below {codec.cardinality}; the first of each codebook:")
    print(codes[0, :, :12].numpy())
    for k in range(1, codec.num_codebooks + 1):
        back = codec.decode(codes[:, :k])
        back = back[..., :wav.shape[-1]]
        size = wav.norm().clamp(min=1e-8)       # of silence, too
        error = float((wav - back).norm() / size)
        plural = "s" * (k > 1)
        print(f"{k} codebook{plural}: error |x - y| / |x| = {error:.3f}  {'#' * round(100 * min(error, 1))}")


if __name__ == "__main__":
    run(demo, *sys.argv[1:2])
