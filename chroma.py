"""Chroma: a melody as one pitch class of twelve per frame (MusicGen, arXiv 2306.05284, section 2.3).

    wav (B, C, L) --separate--> no drums, no bass --|STFT|^2--> --filterbank--> (B, M, Q) --argmax--> one-hot

A chromagram adds up the energy of each pitch class over all octaves. Unreduced it lets the model copy the
recording, so only the strongest class of each frame is kept ("argmax"): an information bottleneck that leaves
the tune and hides the instrument. Frame m is centered at sample m * hop. At 32 kHz a window of 2^14 samples
lasts half a second, and a hop of a quarter of that gives 7.8 frames per second. In a bright sound the class
a fifth above is often the strongest: our tiny model is given `heard_notes` of data/stems.py instead.

    python chroma.py [FILE]     # draws a scale (or the first 30 s of FILE) before and after argmax
"""
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.audio import read_audio
from data.stems import separate
from system.command import run
from system.errors import UserError

PITCH_CLASSES = "C C# D D# E F F# G G# A A# B".split()


def chroma_filterbank(sample_rate, n_fft, n_chroma=12):
    """Weights (Q, n_fft/2 + 1) that sum a power spectrum into pitch classes, C first (librosa's, tuning 0).

    A bin counts for the classes near it by a Gaussian as wide as the bin (a semitone at least). Its weights
    have norm 1, times a Gaussian over octaves, centered at 880 Hz, that plays down bass and treble.
    """
    Q = n_chroma
    frequency = np.arange(1, n_fft) * sample_rate / n_fft
    pitch = Q * np.log2(frequency / 27.5)                   # semitones above A0, for Q = 12
    below = pitch[:1] - 1.5 * Q                             # bin 0 has no pitch: somewhere below bin 1
    pitch = np.concatenate([below, pitch])
    width = np.append(np.maximum(np.diff(pitch), 1), 1)
    distance = pitch - np.arange(Q)[:, None]
    distance = (distance + Q // 2) % Q - Q // 2             # to the nearest octave of class q
    weights = np.exp(-0.5 * (2 * distance / width) ** 2)
    weights /= np.linalg.norm(weights, axis=0)
    octave = pitch / Q
    weights *= np.exp(-0.5 * ((octave - 5) / 2) ** 2)
    weights = np.roll(weights, -3 * (Q // 12), axis=0)      # A first -> C first
    return weights[:, :n_fft // 2 + 1].astype(np.float32)


class ChromaExtractor(nn.Module):
    """Chromagram: wav (B, L) or (B, C, L) -> (B, M, Q), M = L // hop + 1 (channels are averaged).

    A frame is divided by its largest class, or one-hot with argmax=True. A silent frame is all zeros, but C
    with argmax (as in audiocraft). A wave shorter than a window gets zeros on both sides (5 frames).
    """

    def __init__(self, sample_rate, n_chroma=12, radix2_exp=14, argmax=True):
        super().__init__()
        self.window = 2 ** radix2_exp       # samples
        self.hop = self.window // 4
        self.argmax = argmax
        filterbank = chroma_filterbank(sample_rate, self.window, n_chroma)
        self.register_buffer("filterbank", torch.from_numpy(filterbank), persistent=False)
        hann = torch.hann_window(self.window, dtype=torch.float32, device="cpu")
        self.register_buffer("hann", hann, persistent=False)

    def frames(self, samples):
        """M for a wave of so many samples."""
        return max(samples, self.window) // self.hop + 1

    @torch.no_grad()
    def forward(self, wav):
        if wav.dim() == 3:
            wav = wav.mean(1)
        wav = wav.float()
        missing = max(0, self.window - wav.shape[-1])
        left = missing // 2
        wav = F.pad(wav, (left, missing - left))
        with torch.autocast(wav.device.type, enabled=False):  # half precision would confuse neighboring notes
            spectrum = torch.stft(wav, self.window, self.hop, window=self.hann, return_complex=True)
            power = spectrum.abs() ** 2 / (self.hann ** 2).sum()        # (B, window / 2 + 1, M)
            chroma = self.filterbank @ power                            # (B, Q, M)
        chroma = chroma.transpose(1, 2)
        largest = chroma.amax(-1, keepdim=True)
        chroma = chroma / largest.clamp(min=1e-6)
        if not self.argmax:
            return chroma
        strongest = chroma.argmax(-1)                                   # (B, M)
        return F.one_hot(strongest, chroma.shape[-1]).to(chroma)


def match_length(chroma, M, first=0):
    """Chroma (B, m, Q) -> (B, M, Q) from frame `first` on: a short melody starts anew, a long one is cut."""
    frames = first + torch.arange(M, device=chroma.device)
    return chroma[:, frames % chroma.shape[1]]


def draw(chroma):
    """Chroma (M, Q) in 0 ... 1 as text, the highest class on top, at most 100 columns."""
    every = math.ceil(len(chroma) / 100)
    rows = []
    for q in reversed(range(12)):
        levels = chroma[::every, q].tolist()
        cells = "".join(" .:-=+*%@#"[round(9 * level)] for level in levels)
        rows.append(f"  {PITCH_CLASSES[q]:<2} {cells}")
    return "\n".join(rows)


def scale(sample_rate):
    """C major from C4 as a wave (1, L), a note a second, each with three overtones."""
    time = torch.arange(sample_rate) / sample_rate
    notes = []
    for note in (60, 62, 64, 65, 67, 69, 71, 72):
        frequency = 440 * 2 ** ((note - 69) / 12)
        phase = math.tau * frequency * time
        partials = [torch.sin(h * phase) / h for h in range(1, 5)]
        notes.append(sum(partials))
    return torch.cat(notes)[None]


def main(argv):
    if len(argv) > 1:
        raise UserError(f"{' '.join(argv)}: give one audio file, or none for a scale")
    sample_rate = 32000
    if argv:
        name = argv[0]
        wav = read_audio(name, sample_rate, channels=1, duration=30.0)
        wav = separate(wav, sample_rate)
    else:
        name, wav = "a scale of C major", scale(sample_rate)
    chroma = ChromaExtractor(sample_rate, argmax=False)(wav)
    one_hot = ChromaExtractor(sample_rate)(wav)
    print(f"{name}: {wav.shape[1]:,} samples -> {chroma.shape[1]} frames x 12 pitch classes")
    print(draw(chroma[0]))
    print("argmax: all that a model is told")
    print(draw(one_hot[0]))


if __name__ == "__main__":
    run(main, sys.argv[1:])
