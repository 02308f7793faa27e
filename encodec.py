"""EnCodec: audio as a few streams of small integers, and back (arXiv 2210.13438, section 3).

    python encodec.py [FILE]     # the way of one sound: samples -> latent frames -> codes -> samples

    wav (B, C, L) --encoder--> (B, Z, T) --quantizer--> codes (B, K, T) --entries--> (B, Z, T) --decoder--> wav
      32,000 a second            50 a second              50 x K a second

The encoder ("SEANet", Tagliasacchi et al., arXiv 2009.02095) is a stack of convolutions. Each stage is a residual
unit and a strided convolution that halves nothing but time: it divides the rate by one of `ratios` (innermost
first) and doubles the channels. An LSTM looks over the whole piece, and the decoder is the mirror image.
T = ceil(L / stride),
stride = product of the ratios. This file has the model, reading its weights from the formats in use, audio files,
and what only training needs: losses, discriminator, balancer.
"""
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from config import Config, UserError, run, write_atomic
from rvq import ResidualVectorQuantizer

# --- the model ---------------------------------------------------------------------------------------------


def pad1d(x, left: int, right: int, mode: str):
    """Pads time. Reflection needs a signal longer than the padding: a shorter one gets zeros on its right first,
    which are cut off again afterwards (as the original)."""
    missing = max(0, max(left, right) - x.shape[-1] + 1) if mode == "reflect" else 0
    padded = F.pad(F.pad(x, (0, missing)), (left, right), mode)
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
        return self.conv_norm(self.conv(pad1d(x, self.left, self.right + extra, self.mode)))


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
        y = self.convtr_norm(self.convtr(x))
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
            nn.ELU(), Conv(config, hidden, channels, 1))
        self.shortcut = nn.Identity() if config.true_skip else Conv(config, channels, channels, 1)

    def forward(self, x):
        return self.shortcut(x) + self.block(x)


class LSTM(nn.Module):
    """LSTM over the frames, with a skip: x + LSTM(x)."""

    def __init__(self, config: Config, channels: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, config.lstm)

    def forward(self, x):  # (B, channels, T)
        x = x.permute(2, 0, 1)
        return (x + self.lstm(x)[0]).permute(1, 2, 0)


def build_encoder(config: Config) -> nn.Sequential:
    """wav (B, C, L) -> latent (B, Z, ceil(L / stride))"""
    width = config.n_filters
    layers = [Conv(config, config.channels, width, config.kernel_size)]
    for ratio in reversed(config.ratios):
        layers += [ResidualUnit(config, width, config.dilation_base ** i) for i in range(config.n_residual_layers)]
        layers += [nn.ELU(), Conv(config, width, 2 * width, 2 * ratio, stride=ratio)]
        width *= 2
    layers += [LSTM(config, width)] if config.lstm else []
    return nn.Sequential(*layers, nn.ELU(), Conv(config, width, config.dimension, config.last_kernel_size))


def build_decoder(config: Config) -> nn.Sequential:
    """latent (B, Z, T) -> wav (B, C, T * stride)"""
    width = config.n_filters * 2 ** len(config.ratios)
    layers = [Conv(config, config.dimension, width, config.kernel_size)]
    layers += [LSTM(config, width)] if config.lstm else []
    for ratio in config.ratios:
        layers += [nn.ELU(), ConvTranspose(config, width, width // 2, 2 * ratio, stride=ratio)]
        width //= 2
        layers += [ResidualUnit(config, width, config.dilation_base ** i) for i in range(config.n_residual_layers)]
    return nn.Sequential(*layers, nn.ELU(), Conv(config, width, config.channels, config.last_kernel_size))


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
        latent = self.encoder(wav)
        codes, commit = None, latent.new_zeros(())
        if quantise:
            latent, codes, commit = self.quantizer(latent, n_q)
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
        return self.quantizer.encode(self.encoder(wav), n_q)

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, K, T) -> wav (B, C, T * stride). 2 K codebooks of a mono codec: stereo (B, 2, T * stride)."""
        B, K, T = codes.shape
        if self.channels == 1 and K == 2 * self.num_codebooks:
            return torch.cat([self.decode(codes[:, 0::2]), self.decode(codes[:, 1::2])], 1)
        if T == 0 or not 0 <= int(codes.min()) <= int(codes.max()) < self.cardinality:
            raise UserError(f"codes of shape {tuple(codes.shape)}: need frames of numbers from 0 to "
                            f"{self.cardinality - 1}")
        return self.decoder(self.quantizer.decode(codes))

    def _check_wav(self, wav):
        if wav.ndim != 3 or wav.shape[1] != self.channels or wav.shape[2] == 0:
            raise UserError(f"a wave of shape {tuple(wav.shape)}: this codec takes (batch, {self.channels}, samples)")

    def fold(self) -> "EncodecModel":
        """Turns weight norm into plain weights, once and for good: faster, same output. For inference."""
        for module in self.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        self.config = dataclasses.replace(self.config, norm=self.config.norm.replace("weight_norm", "none"))
        return self

    def save(self, directory):
        """Writes config.json and model.safetensors, which from_pretrained reads."""
        write_tensors(Path(directory) / "model.safetensors", self.state_dict())
        self.config.save(Path(directory) / "config.json")

    @classmethod
    def from_pretrained(cls, name: str, bandwidth: float | None = None, n_q: int | None = None,
                        dtype: torch.dtype | None = torch.float32) -> "EncodecModel":
        """Codec from our directory, a hub id, or a directory in transformers' or the original's format.

        bandwidth in kb/s or n_q choose how many codebooks (default: all). dtype None keeps that of the file.
        Raises UserError naming what is missing, surplus or not supported.
        """
        directory = open_checkpoint(name)
        config, tensors = _read_codec(directory, dtype)
        if bandwidth is not None:
            n_q = int(1000 * bandwidth / (math.log2(config.card) * math.ceil(config.sample_rate / config.stride)))
        if n_q is not None and not 1 <= n_q <= config.n_q:
            asked = f"n_q = {n_q}" if bandwidth is None else f"bandwidth = {bandwidth} kb/s is {n_q} codebooks"
            raise UserError(f"{name}: {asked}, this codec has 1 to {config.n_q}")
        with torch.device("meta"):
            model = cls(config)
        load_strict(model, tensors, name)
        if n_q is not None:
            model.quantizer.codebooks = model.quantizer.codebooks[:n_q]
            model.config = dataclasses.replace(config, n_q=n_q)
        return model.eval()


# --- reading weights: shared with lm.py ------------------------------------------------------------------------

def open_checkpoint(name) -> Path:
    """A directory as it is, or a hub id downloaded to (or found in) huggingface_hub's cache -> its directory."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name}: a checkpoint is a directory, this is a file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name)[0] in "./~":
        raise UserError(f"{name}: no such directory, and not a Hugging Face id such as facebook/musicgen-melody")
    from huggingface_hub import snapshot_download
    try:
        small = ["*.json", "*.model", "*.txt"]
        directory = Path(snapshot_download(str(name), allow_patterns=small + ["*.safetensors"]))
        if not list(directory.glob("*.safetensors")):  # an older upload
            directory = Path(snapshot_download(str(name), allow_patterns=small + ["*.bin"]))
    except Exception as error:  # a dozen kinds, of several libraries, for: not there, no access, no network
        raise UserError(f"{name}: no such directory here, and the Hugging Face hub did not give it "
                        f"({type(error).__name__}); check the name and the network, or give a directory") from None
    return directory


def read_json(path) -> dict:
    """The object in a JSON file. Raises UserError naming it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        assert isinstance(value, dict), "not an object"
        return value
    except (OSError, ValueError, RecursionError, AssertionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def read_tensors(directory, prefix: str = "", dtype: torch.dtype | None = None) -> dict:
    """{name without prefix: tensor} of all tensors under prefix, from model.safetensors or pytorch_model.bin.

    Both may be sharded (an index file tells which). Floating tensors become dtype unless that is None.
    Nothing in the files is executed. Raises UserError naming the file.
    """
    directory, tensors = Path(directory), {}
    for path in _weight_files(directory):
        try:
            if path.suffix == ".safetensors":
                from safetensors import safe_open
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        if name.startswith(prefix):
                            tensors[name[len(prefix):]] = _cast(file.get_tensor(name), dtype)
            else:
                for name, tensor in read_pickle(path).items():
                    if name.startswith(prefix):
                        tensors[name[len(prefix):]] = _cast(tensor, dtype)
        except UserError:
            raise
        except Exception as error:  # safetensors has its own kind of error
            raise UserError(f"{path}: damaged or not a weight file ({str(error)[:200]})") from None
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (directory / stem).is_file():
            return [directory / stem]
        if (directory / f"{stem}.index.json").is_file():
            names = read_json(directory / f"{stem}.index.json").get("weight_map")
            if not isinstance(names, dict) or any(Path(str(n)).name != n for n in names.values()):
                raise UserError(f"{directory / stem}.index.json: its weight_map must name files beside it")
            return [directory / n for n in sorted(set(names.values()))]
    raise UserError(f"{directory}: holds neither model.safetensors nor pytorch_model.bin (nor their index)")


def read_pickle(path) -> dict:
    """A .bin file of torch.save: tensors and plain values only, no code is run. Raises UserError naming it."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(value, dict), f"holds a {type(value).__name__}"
        return value
    except Exception as error:  # torch, zipfile and pickle each have their own
        raise UserError(f"{path}: damaged, or more than plain tensors ({str(error).splitlines()[0][:200]})") from None


def _cast(tensor, dtype):
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def load_strict(module: nn.Module, tensors: dict, where):
    """Makes the tensors the module's own, without a copy. Raises UserError listing all that does not fit."""
    own = module.state_dict()
    shapes = [f"{n} is {tuple(tensors[n].shape)}, should be {tuple(own[n].shape)}"
              for n in own if n in tensors and tensors[n].shape != own[n].shape]
    problems = [f"{what}: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
                for what, names in (("missing", sorted(own.keys() - tensors.keys())),
                                    ("surplus", sorted(tensors.keys() - own.keys())), ("wrong shape", shapes)) if names]
    if problems:
        raise UserError(f"{where}: weights do not fit the configuration; {'; '.join(problems)}")
    module.load_state_dict(tensors, strict=True, assign=True)


def write_tensors(path, tensors: dict, metadata: dict | None = None):
    """Writes a safetensors file; the whole file or nothing."""
    from safetensors.torch import save_file
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata or {"format": "pt"}))


# --- names of the codec's weights elsewhere ---------------------------------------------------------------------

NAMES = (  # ours                               transformers               the original
    (r"^(en|de)coder\.",                        r"\1coder.layers.",        r"\1coder.model."),
    (r"\.conv\.",                               ".conv.",                  ".conv.conv."),
    (r"\.convtr\.",                             ".conv.",                  ".convtr.convtr."),
    (r"\.conv_norm\.",                          ".norm.",                  ".conv.norm."),
    (r"\.convtr_norm\.",                        ".norm.",                  ".convtr.norm."),
    (r"^quantizer\.codebooks\.(\d+)\.",         r"quantizer.layers.\1.codebook.", r"quantizer.vq.layers.\1._codebook."),
)
WEIGHT_NORM = (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"))


def their_name(name: str, column: int) -> str:
    """Our name of a tensor as transformers (column 1) or the original (column 2) calls it."""
    for row in NAMES:
        name = re.sub(row[0], row[column], name)
    return name


def _read_codec(directory: Path, dtype):
    """(Config, tensors under our names) of a codec in any of the formats that from_pretrained takes."""
    return Config.from_json(directory / "config.json"), read_tensors(directory, dtype=dtype)


# --- audio files -------------------------------------------------------------------------------------------------

FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"),
           ".mp3": ("MP3", "MPEG_LAYER_III")}


def read_audio(path, sample_rate: int, channels: int, start: float = 0.0, duration: float | None = None):
    """Any file that soundfile reads -> wave (C, L), float32, at sample_rate. start and duration in seconds.

    The file is read block by block, so a header that lies about its length costs nothing. Pieces read one by one
    join to what the whole file gives: the resampler sees a little more on both sides.
    Raises UserError naming the file: missing, unreadable, empty there, or with NaN or infinite samples.
    """
    import numpy as np
    import soundfile
    from scipy.signal import resample_poly
    if not Path(path).is_file():
        raise UserError(f"{path}: no such audio file")
    first, blocks = round(start * sample_rate), []
    try:
        with soundfile.SoundFile(str(path)) as file:
            divisor = math.gcd(sample_rate, file.samplerate)
            up, down = sample_rate // divisor, file.samplerate // divisor  # `down` samples become `up`
            margin = 10 * max(up, down) // (up * down) + 2                 # half of the filter, in such groups
            begin = max(0, first // up - margin)                           # group where reading begins
            end = math.inf if duration is None else ((first + round(duration * sample_rate)) // up + margin) * down
            if begin * down > file.frames:
                raise UserError(f"{path}: has {file.frames / file.samplerate:.2f} s, nothing at {start:.2f} s")
            file.seek(begin * down)
            left = end - begin * down
            while left > 0 and len(block := file.read(min(2 ** 18, left), "float32", always_2d=True)):
                left -= len(block)
                wide = np.repeat(block, 2, 1) if block.shape[1] < channels else block[:, :channels]
                blocks.append(block.mean(1, keepdims=True) if channels == 1 else wide)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as audio ({error})") from None
    wav = np.concatenate(blocks) if blocks else np.zeros((0, channels), np.float32)
    if not np.isfinite(wav).all():
        raise UserError(f"{path}: has samples that are not finite numbers")
    if len(wav) and (up, down) != (1, 1):
        wav = resample_poly(wav, up, down, axis=0)
    wav = wav[first - begin * up:][:None if duration is None else round(duration * sample_rate)]
    if not len(wav):
        raise UserError(f"{path}: no sound" + (f" at {start:.2f} s" if start else ""))
    return torch.from_numpy(np.ascontiguousarray(wav.T, dtype=np.float32))


def write_audio(path, wav, sample_rate: int):
    """Writes wave (C, L) as wav, flac, ogg or mp3, by the ending. A peak above 0.99 is scaled down, never clipped."""
    import soundfile
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: the ending tells the format, one of {' '.join(FORMATS)}")
    wav = wav.detach().float().cpu()
    if not wav.isfinite().all():
        raise UserError(f"{path}: not written, the wave has samples that are not finite numbers")
    peak = float(wav.abs().max()) if wav.numel() else 0.0
    samples = (wav * (0.99 / peak) if peak > 0.99 else wav).T.numpy()  # (L, C)
    kind, subtype = FORMATS[suffix]

    def content(temporary):
        with soundfile.SoundFile(temporary, "w", sample_rate, samples.shape[1], subtype, format=kind) as file:
            for i in range(0, len(samples), 2 ** 16):  # libsndfile's ogg writer fails on long blocks
                file.write(samples[i:i + 2 ** 16])
    try:
        write_atomic(path, content)
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None


def main(argv):
    from config import load  # noqa: F401
    return argv


if __name__ == "__main__":
    run(main, sys.argv[1:])
