"""Waves of --eval: batches of them, through the codec, as they are written, by the model."""
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.audio import read_audio, write_audio
from system.devices import device_of
from training.losses import power_spectrogram

BATCH = 16              # clips generated or coded at a time


def to_batch(waves) -> torch.Tensor:
    """numpy waves (L,) -> (B, 1, L)"""
    return torch.from_numpy(np.stack(waves))[:, None]


@torch.no_grad()
def encode(codec, wavs):
    """Waves (B, C, L) -> codes (B, K, T) on the codec's device."""
    device = device_of(codec)
    return torch.cat([codec.encode(part.to(device)) for part in wavs.split(BATCH)])


@torch.no_grad()
def codec_roundtrip(codec, wavs):
    """Waves (B, C, L) as the codec reconstructs them, on the CPU."""
    codes = encode(codec, wavs)
    output = torch.cat([codec.decode(part) for part in codes.split(BATCH)])
    return output[..., :wavs.shape[2]].cpu()


def as_written(wav, sample_rate: int):
    """Wave (C, L) as it is read back from the file that sample.py would write."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "clip.wav"
        write_audio(path, wav, sample_rate)
        return read_audio(path, sample_rate, len(wav))


def flatness(wavs):
    """Spectral flatness from 100 Hz to 4 kHz, median over frames (B,): 0.56 for noise, near 0 for tones."""
    power = power_spectrogram(wavs, 2048)[:, 0, 13:512] + 1e-12
    geometric_mean = power.log().mean(1).exp()
    return (geometric_mean / power.mean(1)).median(-1).values


def generate(model, texts: list[str], melodies=None, seconds: float | None = None):
    """A sample for each text -> waves (B, 1, L) of segment_duration or so many seconds.

    melodies: a wave (L,) or None for each.
    """
    config = model.config
    seconds = seconds or config.segment_duration
    chromas = [None] * len(texts)
    if melodies is not None:
        chromas = [wave if wave is None else model.melody_chroma(torch.from_numpy(wave)) for wave in melodies]
    wavs = []
    for first in tqdm(range(0, len(texts), BATCH), disable=None, unit="batch", desc="generating"):
        part = slice(first, first + BATCH)
        seeds = [config.seed + n for n in range(len(texts))[part]]
        codes = model.generate_codes(texts[part], chromas[part], duration=seconds, seeds=seeds)
        wavs.append(model.decode(codes, seconds))
    return torch.cat(wavs)
