"""Classifiers that say what was played: instrument, drums or none, tempo.

    instrument, drums    convolutions over a log-mel spectrogram
    tempo                two layers on the autocorrelation of the onsets

They learn from clips of training tunes and from reconstructions of these, and hear the first SECONDS of a
wave. How often they are right about real clips of test tunes is the most that a model can reach.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from config import Config
from data import render
from evaluation.clips import clip
from evaluation.waves import BATCH, codec_roundtrip, to_batch
from training.losses import mel_filters, power_spectrogram

INSTRUMENTS = list(render.INSTRUMENTS)
BPM_GRID = torch.logspace(math.log2(60), math.log2(172), 54, base=2)  # beats per minute, 2 % apart
CLIPS = 2400            # that the classifiers learn from
RECONSTRUCTED = 480     # the first of them, which they see through the codec, too
SECONDS = 5.12


def log_mel(config: Config, wavs, n_fft: int, n_mels: int):
    """Waves (B, 1, L) -> (B, frames, n_mels), a frame every n_fft / 4 samples."""
    power = power_spectrogram(wavs, n_fft)[:, 0].mT
    mel = power @ mel_filters(n_fft, config.sample_rate, n_mels, wavs.device)
    return (mel + 1e-4).log()


def onset_autocorrelation(config: Config, wavs):
    """Waves (B, 1, L) -> autocorrelation of onsets in low, middle and high bands, lags from 0.1 to 2.4 s."""
    onsets = log_mel(config, wavs, 512, 32).diff(dim=1).clamp(min=0)  # rises only
    hop = 128 / config.sample_rate  # s
    bands = []
    for band in onsets.split((10, 12, 10), dim=2):
        rises = band.sum(-1)
        rises = rises - rises.mean(-1, keepdim=True)
        spectrum = torch.fft.rfft(rises, 4 * rises.shape[1])
        correlation = torch.fft.irfft(spectrum.abs().square())
        lags = correlation[:, round(0.1 / hop):round(2.4 / hop)]
        bands.append(lags / correlation[:, :1].clamp(min=1e-6))
    return torch.cat(bands, 1)


class Classifiers(nn.Module):
    """Instrument, drums and tempo of waves (B, 1, L)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.samples = round(min(SECONDS, config.segment_duration) * config.sample_rate)

        def conv(inputs, outputs):
            return nn.Sequential(nn.Conv1d(inputs, outputs, 5, 2, 2), nn.BatchNorm1d(outputs), nn.ReLU())
        self.timbre = nn.Sequential(nn.BatchNorm1d(64), conv(64, 96), conv(96, 96), conv(96, 96))
        self.head = nn.Linear(2 * 96, len(INSTRUMENTS) + 1)
        lags = onset_autocorrelation(config, torch.zeros(1, 1, self.samples)).shape[1]
        self.tempo = nn.Sequential(nn.LayerNorm(lags), nn.Linear(lags, 128), nn.ReLU(), nn.Dropout(0.3),
                                   nn.Linear(128, len(BPM_GRID)))

    def features(self, wavs):
        """Waves (B, 1, L) -> what `forward` takes."""
        wavs = wavs[..., :self.samples]
        return log_mel(self.config, wavs, 1024, 64), onset_autocorrelation(self.config, wavs)

    def forward(self, mel, onsets):
        """Features -> logits of the instruments (B, I), drums (B,) and the tempi of BPM_GRID (B, 54)."""
        x = self.timbre(mel.mT)
        x = torch.cat([x.mean(-1), x.amax(-1)], 1)
        logits = self.head(x)
        return logits[:, :-1], logits[:, -1], self.tempo(onsets)

    @torch.no_grad()
    def predict(self, wavs):
        """Waves (B, 1, L) -> index of the instrument (B,), drums (B,) bool, beats per minute (B,)."""
        self.eval()
        logits = [self(*self.features(part)) for part in wavs.split(BATCH)]
        instrument, drums, tempo = (torch.cat(parts) for parts in zip(*logits))
        return instrument.argmax(1), drums > 0, BPM_GRID[tempo.argmax(1)]


def labels(truths: list[dict]):
    """-> index of the instrument (B,), drums (B,) bool, beats per minute (B,)"""
    instrument = torch.tensor([INSTRUMENTS.index(truth["instrument"]) for truth in truths])
    drums = torch.tensor([truth["drums"] for truth in truths])
    bpm = torch.tensor([float(truth["bpm"]) for truth in truths])
    return instrument, drums, bpm


def training_features(classifiers: Classifiers, codec):
    """Features of CLIPS clips of training tunes and RECONSTRUCTED of these -> mel, onsets, truths."""
    config = classifiers.config
    features, truths, first = [], [], []
    for n in tqdm(range(0, CLIPS, BATCH), disable=None, unit="batch", desc="clips for the classifiers"):
        clips = [clip(config, "train", number) for number in range(n, min(CLIPS, n + BATCH))]
        wavs = to_batch([asked.mix for asked in clips])
        truths += [asked.truth for asked in clips]
        features.append(classifiers.features(wavs))
        if n < RECONSTRUCTED:
            first.append(classifiers.features(codec_roundtrip(codec, wavs)))
    seen = min(CLIPS, BATCH * len(first))
    mel, onsets = (torch.cat(parts) for parts in zip(*features, *first))
    return mel, onsets, truths + truths[:seen]


def train_classifiers(config: Config, codec, epochs: int = 14) -> Classifiers:
    """Classifiers trained on CLIPS clips of training tunes and reconstructions of the first RECONSTRUCTED."""
    config = dataclasses.replace(config, segment_duration=min(SECONDS, config.segment_duration))
    classifiers = Classifiers(config)
    mel, onsets, truths = training_features(classifiers, codec)
    instrument, drums, bpm = labels(truths)
    distance = (bpm[:, None] / BPM_GRID).log() / 0.03
    near_tempo = (-distance.square() / 2).softmax(1)  # a tempo and its neighbors

    batches = len(mel) // 32
    optimizer = torch.optim.AdamW(classifiers.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * batches)
    generator = torch.Generator().manual_seed(0)
    classifiers.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(mel), generator=generator).split(32)[:batches]:
            instrument_logits, drums_logits, tempo_logits = classifiers(mel[rows], onsets[rows])
            loss = F.cross_entropy(instrument_logits, instrument[rows])
            loss = loss + F.cross_entropy(tempo_logits, near_tempo[rows])
            loss = loss + F.binary_cross_entropy_with_logits(drums_logits, drums[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifiers


def correct(classifiers: Classifiers, wavs, truths: list[dict]) -> dict:
    """Waves (B, 1, L) -> which are classified as their truths say, (B,) bool each; tempo: within 8 %."""
    instrument, drums, bpm = classifiers.predict(wavs)
    true_instrument, true_drums, true_bpm = labels(truths)
    return {
        "instrument": instrument == true_instrument,
        "drums": drums == true_drums,
        "tempo": (bpm / true_bpm - 1).abs() < 0.08,
    }
