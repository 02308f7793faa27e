"""Melody as MusicGen hears it: one pitch class of twelve for every chroma frame (arXiv 2306.05284, section 2.3).

    wav (B, C, L) --separate--> no drums, no bass --|STFT|^2--> --filterbank--> (B, M, Q) --argmax--> one-hot

A chromagram adds up the energy of each pitch class over all octaves. Kept whole it would let the model copy the
recording, so only the strongest class of each frame survives ("argmax"): an information bottleneck that leaves the
tune and hides the instrument. Frame m is centred at sample m * hop; a window of 2^14 samples at 32 kHz is half a
second long, a hop of a quarter of it gives 7.8 frames per second.

    python chroma.py [FILE]     # draws a scale (or the first 30 s of FILE) as a pitch grid, before and after argmax
"""
import importlib.util
import math
import sys
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config import CHOICES, UserError, blaming, run

PITCH_CLASSES = "C C# D D# E F F# G G# A A# B".split()


def chroma_filterbank(sample_rate: int, n_fft: int, n_chroma: int = 12) -> np.ndarray:
    """Weights (Q, n_fft/2 + 1) that add a power spectrum up into pitch classes, C first (librosa's, tuning 0).

    Bin frequency f is `octave` = log2(f / 27.5 Hz) octaves above A0. A bin counts for the classes near it by a
    Gaussian whose width is that of the bin (a semitone at least); each bin's weights have norm 1, times a Gaussian
    over octaves, centred at 880 Hz, that plays down bass and treble.
    """
    Q = n_chroma
    pitch = Q * np.log2(np.arange(1, n_fft) * sample_rate / n_fft / 27.5)  # semitones above A0, for Q = 12
    pitch = np.concatenate([pitch[:1] - 1.5 * Q, pitch])                   # bin 0 has no pitch: somewhere below bin 1
    width = np.append(np.maximum(np.diff(pitch), 1), 1)
    distance = (pitch - np.arange(Q)[:, None] + Q // 2) % Q - Q // 2       # to the nearest octave of class q
    weights = np.exp(-0.5 * (2 * distance / width) ** 2)
    weights /= np.linalg.norm(weights, axis=0)
    weights *= np.exp(-0.5 * ((pitch / Q - 5) / 2) ** 2)
    return np.roll(weights, -3 * (Q // 12), axis=0)[:, :n_fft // 2 + 1].astype(np.float32)  # A first -> C first


class ChromaExtractor(nn.Module):
    """Chromagram: wav (B, L) or (B, C, L) -> (B, M, Q), M = L // hop + 1 (channels are averaged).

    A frame is divided by its largest class; argmax=True makes it one-hot. A wave shorter than a window gets zeros
    on both sides (5 frames). A silent frame is all zeros, but one-hot C with argmax (as the original).
    """

    def __init__(self, sample_rate: int, n_chroma: int = 12, radix2_exp: int = 14, argmax: bool = True):
        super().__init__()
        self.window, self.hop = 2 ** radix2_exp, 2 ** radix2_exp // 4  # samples
        self.argmax = argmax
        filterbank = torch.from_numpy(chroma_filterbank(sample_rate, self.window, n_chroma))
        self.register_buffer("filterbank", filterbank, persistent=False)
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)

    def frames(self, samples: int) -> int:
        """M for a wave of so many samples."""
        return max(samples, self.window) // self.hop + 1

    @torch.no_grad()
    def forward(self, wav):
        wav = (wav.mean(1) if wav.dim() == 3 else wav).float()
        missing = max(0, self.window - wav.shape[-1])
        wav = F.pad(wav, (missing // 2, missing - missing // 2))
        with torch.autocast(wav.device.type, enabled=False):  # half precision would confuse neighbouring notes
            spectrum = torch.stft(wav, self.window, self.hop, window=self.hann, return_complex=True)  # centred
            power = spectrum.abs() ** 2 / (self.hann ** 2).sum()                        # (B, window / 2 + 1, M)
            chroma = (self.filterbank @ power).transpose(1, 2)                          # (B, M, Q)
        chroma = chroma / chroma.amax(-1, keepdim=True).clamp(min=1e-6)
        return F.one_hot(chroma.argmax(-1), chroma.shape[-1]).to(chroma) if self.argmax else chroma


def match_length(chroma, M: int, first: int = 0):
    """Chroma (B, m, Q) -> (B, M, Q), from frame `first` on: a shorter melody starts anew, a longer one is cut.

    The melody prefix always has the length it had in training (as the original's generation wrapper).
    """
    return chroma[:, (first + torch.arange(M, device=chroma.device)) % chroma.shape[1]]


# --- measures of how well a melody was followed -----------------------------------------------------------------

def chroma_similarity(wav_a, wav_b, sample_rate: int, n_chroma=12, radix2_exp=14, argmax=True) -> float:
    """Chroma cosine similarity of two waves (B, C, L) or (C, L): the paper's melody metric, in 0 ... 1.

    Mean over frames of the cosine between their chroma, neither wave separated, over the first ceil(L / hop)
    frames of the shorter wave (as the original). With argmax, as the original has it, that is the share of frames
    with the same class.
    """
    extractor = ChromaExtractor(sample_rate, n_chroma, radix2_exp, argmax).to(wav_a.device)
    L = min(wav_a.shape[-1], wav_b.shape[-1])
    a, b = (extractor(w[..., :L] if w.dim() == 3 else w[None, ..., :L]) for w in (wav_a, wav_b))
    return F.cosine_similarity(a, b, dim=-1, eps=1e-8)[:, :math.ceil(L / extractor.hop)].mean().item()


def chroma_agreement(chroma_a, chroma_b) -> float:
    """Share of frames whose strongest class is the same, of two chromagrams (..., M, Q); the longer one is cut."""
    M = min(chroma_a.shape[-2], chroma_b.shape[-2])
    return (chroma_a[..., :M, :].argmax(-1) == chroma_b[..., :M, :].argmax(-1)).float().mean().item()


# --- the stem: drums and bass out, because they would win the argmax ------------------------------------------------

def pick_stem(stem: str) -> str:
    """"auto" -> "demucs" where that package is installed, else "hpss". Raises UserError when demucs is not there."""
    if stem not in CHOICES["stem"]:
        raise UserError(f"stem = {stem!r}: must be one of {', '.join(CHOICES['stem'])}")
    installed = importlib.util.find_spec("demucs") is not None
    if stem == "demucs" and not installed:
        raise UserError("stem = 'demucs': that package is not installed; pip install demucs, or use stem = 'hpss'")
    return ("demucs" if installed else "hpss") if stem == "auto" else stem


def separate(wav, sample_rate: int, stem: str = "auto"):
    """Recording (C, L) -> its melody stem (1, L), on the same device.

    "none" only averages the channels; "hpss" takes out percussion and bass (below); "demucs" is the original's way:
    vocals + other of the network htdemucs. Raises UserError when that is not installed or its weights do not load.
    """
    stem = pick_stem(stem)
    if stem == "demucs":
        return _demucs(wav, sample_rate)
    mono = wav.float().mean(0, keepdim=True)
    return hpss(mono[0].cpu(), sample_rate)[None].to(wav.device) if stem == "hpss" else mono


def hpss(wav, sample_rate: int):
    """Wave (L,) -> its harmonic part (L,) between the bass and 6 kHz.

    Harmonic/percussive separation by medians (Fitzgerald 2010): in a spectrogram a note is a horizontal line, a drum
    a vertical one. The median of 7 frames (0.2 s) along time keeps lines H, that of 17 bins (270 Hz) along frequency
    keeps strokes P, and the mask H^2 / (H^2 + P^2) keeps what is more line than stroke. The bass fades out from 240
    to 120 Hz, and no melody is above 6 kHz. Blocks bound the memory and do not show in the result.
    """
    n_fft = 2 ** round(math.log2(sample_rate * 0.064))
    hop, L, window = n_fft // 2, len(wav), torch.hann_window(n_fft)
    frequency = torch.arange(n_fft // 2 + 1) * sample_rate / n_fft
    frequency = frequency[frequency < 6000]
    fade = 0.5 - 0.5 * torch.cos(math.pi * torch.log2(frequency / 120).clamp(0, 1))
    block, margin = 1000 * hop, 7 * hop  # the margin covers the median and the windows on both its sides
    out = torch.empty(L)
    for start in range(0, L, block):
        begin, end = max(0, start - margin), min(L, start + block)
        piece = wav[begin:end + margin]
        piece = F.pad(piece, (0, max(0, n_fft - len(piece))))
        spectrum = torch.stft(piece, n_fft, hop, window=window, return_complex=True)  # (n_fft/2 + 1, frames)
        band = spectrum[:len(fade)]
        size = band.abs().numpy()
        H, P = torch.from_numpy(_median(size, 7)) ** 2, torch.from_numpy(_median(size.T, 17).T) ** 2
        band *= H / (H + P).clamp(min=1e-20) * fade[:, None]
        spectrum[len(fade):] = 0
        harmonic = torch.istft(spectrum, n_fft, hop, window=window, length=len(piece))
        out[start:end] = harmonic[start - begin:end - begin]
    return out


def _median(x, size: int):
    """Running median along the rows of x (rows, n). One long row, because scipy is several times faster in 1-D."""
    from scipy.ndimage import median_filter
    half = size // 2
    padded = np.pad(x, ((0, 0), (half, half)), mode="edge")
    return median_filter(padded.ravel(), size=size).reshape(padded.shape)[:, half:-half]


@lru_cache(maxsize=1)
def _load_demucs(device):
    from demucs import pretrained
    with blaming("stem = 'demucs': its weights do not load; use stem = 'hpss'"):
        return pretrained.get_model("htdemucs").to(device).eval()


@torch.no_grad()
def _demucs(wav, sample_rate: int):
    from demucs.apply import apply_model
    from demucs.audio import convert_audio
    model = _load_demucs(wav.device)
    mix = convert_audio(wav[None].float(), sample_rate, model.samplerate, model.audio_channels)
    stems = apply_model(model, mix, device=wav.device)  # (1, sources, channels, samples)
    melody = stems[:, [model.sources.index("vocals"), model.sources.index("other")]].sum(1)
    melody = convert_audio(melody, model.samplerate, sample_rate, 1)[0]
    return F.pad(melody, (0, max(0, wav.shape[1] - melody.shape[1])))[:, :wav.shape[1]]


# --- demo -----------------------------------------------------------------------------------------------------

def draw(chroma) -> str:
    """Chroma (M, Q) in 0 ... 1 as text, the highest class on top, at most 100 columns."""
    chroma = chroma[::math.ceil(len(chroma) / 100)]
    return "\n".join(f"  {PITCH_CLASSES[q]:<2} " + "".join(" .:-=+*%@#"[round(9 * v)] for v in chroma[:, q].tolist())
                     for q in reversed(range(12)))


def main(argv):
    if len(argv) > 1:
        raise UserError(f"{' '.join(argv)}: give one audio file, or none for a scale")
    sample_rate = 32000
    if argv:
        from data.audio import read_audio
        wav, name = read_audio(argv[0], sample_rate, channels=1, duration=30.0), argv[0]
        wav = separate(wav, sample_rate, "auto")
    else:
        time = torch.arange(sample_rate) / sample_rate  # C major from C4, a note a second, with three overtones
        notes = [60, 62, 64, 65, 67, 69, 71, 72]
        wav = torch.cat([sum(torch.sin(math.tau * 440 * 2 ** ((note - 69) / 12) * h * time) / h for h in range(1, 5))
                         for note in notes])[None]
        name = "a scale of C major"
    chroma = ChromaExtractor(sample_rate, argmax=False)(wav)
    print(f"{name}: {wav.shape[1]:,} samples -> {chroma.shape[1]} frames x 12 pitch classes\n{draw(chroma[0])}")
    print(f"argmax: all that the model hears\n{draw(ChromaExtractor(sample_rate)(wav)[0])}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
