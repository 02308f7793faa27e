"""Adherence: does the music have the melody, instrument, tempo and drums that were asked for?

    python train.py config/tiny.py --eval --split=test      # eval_tunes = True measures this too

For models of the embedded tunes (data/tunes.py). Captions name an instrument, a tempo, and whether there are
drums and bass; the melody comes from another clip, with an instrument of its own. One sample for each
caption, no picking. Small classifiers then say what was played:

    instrument, drums    convolutions over a log-mel spectrogram
    tempo                two layers on the autocorrelation of the onsets

They learn from clips of training tunes and from reconstructions of these. Their accuracy on real clips of
test tunes, the most that a model can reach, is measured, too. Without classifiers: the caption gain, by how
many nats a wrong caption makes a clip less likely. The names of the figures begin with what is measured:

    caption_gain_...       real clips under right and wrong captions
    real_clips_...         clips of test tunes as rendered
    reconstructions_...    the same clips through the codec
    tunes_...              samples for texts and melodies
    out_of_domain_...      samples for texts and melodies that are recorded unlike all training clips
    text_only_...          samples for texts
"""
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from chroma import match_length
from config import Config
from data import render
from data.audio import read_audio, write_audio
from evaluation.metrics import chroma_agreement, chroma_of, compare_chroma, melody_of
from lm import codebook_cross_entropy
from system.devices import device_of
from training.losses import mel_filters, power_spectrogram

INSTRUMENTS = list(render.INSTRUMENTS)
ATTRIBUTES = ("instrument", "drums", "tempo")
BPM_GRID = torch.logspace(math.log2(60), math.log2(172), 54, base=2)  # beats per minute, 2 % apart
CLIPS = 2400            # that the classifiers learn from
RECONSTRUCTED = 480     # the first of them, which they see through the codec, too
BATCH = 16              # clips generated or coded at a time


# --- what is asked for ----------------------------------------------------------------------------

def clip(config: Config, split: str, number: int, instrument: str | None = None):
    """Clip `number` of a split -> its truth, the mix (L,), the melody alone (L,), segment_duration long.

    instrument: to play it instead of the clip's own.
    """
    rng = np.random.default_rng([7, render.SPLITS.index(split), number])
    tunes = render.tunes_of(split)
    tune = tunes[number % len(tunes)]
    truth = render.draw_truth(tune, rng)
    if instrument:
        truth["instrument"] = instrument
    mix, melody = render.render_truth(tune, truth, config.segment_duration, config.sample_rate, rng)
    return truth, mix, melody


def caption(truth: dict, rng) -> str:
    """A caption in the words of the data set that leaves out neither tempo nor drums and bass."""
    backing = render.BACKING[truth["drums"], truth["bass"]]
    while True:
        text = render.describe(truth, rng)
        if str(truth["bpm"]) in text and any(words in text for words in backing):
            return text


class Voice(NamedTuple):
    """A timbre by frequency modulation, unlike those of data/render.py."""
    ratio: float        # of the modulator's frequency to the note's
    index: float        # of the modulation
    fade: float         # s to 1/e of the modulation; below 1 the note fades, too
    glide: float        # s from note to note
    vibrato: float      # cents
    octaves: int        # up


VOICES = [
    Voice(ratio=1, index=1.2, fade=9.0, glide=0.06, vibrato=40, octaves=0),    # humming
    Voice(ratio=1, index=0.0, fade=9.0, glide=0.08, vibrato=25, octaves=1),    # whistling
    Voice(ratio=1, index=2.0, fade=0.3, glide=0.003, vibrato=0, octaves=0),    # an electric piano
    Voice(ratio=2, index=1.5, fade=9.0, glide=0.02, vibrato=10, octaves=0),    # a reed
]


def out_of_domain_recording(config: Config, split: str, number: int):
    """The tune of a clip, recorded unlike any clip -> wave (L,), and the same notes on a flute (L,).

    One of VOICES, up to 30 cents out of tune, in every other recording doubled an octave below, with noise
    20 dB below the music.
    """
    rng = np.random.default_rng([8, render.SPLITS.index(split), number])
    tunes = render.tunes_of(split)
    tune = tunes[number % len(tunes)]
    bpm = float(rng.uniform(70, 120))
    transpose = render.fit(tune, "flute", int(rng.integers(12)))
    voice = VOICES[int(rng.integers(len(VOICES)))]
    seconds, rate = config.segment_duration, config.sample_rate
    notes, _ = render.schedule(tune, bpm, seconds)
    time = np.arange(round(seconds * rate)) / rate
    pitch, loudness, age = note_curves(notes, time, rate, voice.glide)

    detuning = rng.uniform(-0.3, 0.3)
    vibrato = voice.vibrato / 100 * np.sin(2 * np.pi * 5.2 * time)
    pitch += transpose + 12 * voice.octaves + detuning + vibrato
    phase = 2 * np.pi * np.cumsum(440 * 2 ** ((pitch - 69) / 12)) / rate
    modulation = voice.index * np.exp(-age / voice.fade) * np.sin(voice.ratio * phase)
    wave = np.sin(phase + modulation)
    if rng.integers(2):
        wave += 0.7 * np.sin(phase / 2 + voice.index * np.sin(voice.ratio * phase / 2))
    wave *= loudness * np.exp(-age / (0.9 if voice.fade < 1 else 9.0))
    wave += 0.1 * np.sqrt(np.mean(wave ** 2)) * rng.standard_normal(len(wave))
    wave = (0.3 * wave / np.abs(wave).max()).astype(np.float32)
    take = np.random.default_rng(0)
    _, flute = render.render_tune(tune, "flute", bpm, transpose, False, False, seconds, rate, take,
                                  first_bar=0)
    return wave, flute


def note_curves(notes, time, rate: int, glide: float):
    """Notes [(start s, length s, midi)] -> pitch (midi), loudness (0 to 1) and age (s) at each time (L,)."""
    pitch = np.full(len(time), float(notes[0][2]))
    loudness = np.zeros(len(time))
    age = np.zeros(len(time))
    for start, length, midi in notes:
        first = round(start * rate)
        end = round((start + length) * rate)
        pitch[first:] = midi
        loudness[first:end] = 1.0
        age[first:] = time[:len(time) - first]
    width = max(1, round(glide * rate))
    box = np.ones(width) / width

    def smooth(curve):
        curve = np.pad(curve, (width, 0), mode="edge")
        return np.convolve(curve, box, "full")[width:][:len(time)]
    return smooth(pitch), smooth(loudness), age


# --- the classifiers ------------------------------------------------------------------------------

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

        def conv(inputs, outputs):
            return nn.Sequential(nn.Conv1d(inputs, outputs, 5, 2, 2), nn.BatchNorm1d(outputs), nn.ReLU())
        self.timbre = nn.Sequential(nn.BatchNorm1d(64), conv(64, 96), conv(96, 96), conv(96, 96))
        self.head = nn.Linear(2 * 96, len(INSTRUMENTS) + 1)
        silence = torch.zeros(1, 1, round(config.segment_duration * config.sample_rate))
        lags = onset_autocorrelation(config, silence).shape[1]
        self.tempo = nn.Sequential(nn.LayerNorm(lags), nn.Linear(lags, 128), nn.ReLU(), nn.Dropout(0.3),
                                   nn.Linear(128, len(BPM_GRID)))

    def features(self, wavs):
        """Waves (B, 1, L) -> what `forward` takes."""
        return log_mel(self.config, wavs, 1024, 64), onset_autocorrelation(self.config, wavs)

    def forward(self, mel, onsets):
        """Features -> logits of the instruments (B, 9), drums (B,) and the tempi of BPM_GRID (B, 54)."""
        x = self.timbre(mel.mT)
        x = torch.cat([x.mean(-1), x.amax(-1)], 1)
        logits = self.head(x)
        return logits[:, :-1], logits[:, -1], self.tempo(onsets)

    @torch.no_grad()
    def predict(self, wavs):
        """Waves (B, 1, L) -> index of the instrument (B,), drums (B,) bool, beats per minute (B,)."""
        self.eval()
        instrument, drums, tempo = self(*self.features(wavs))
        return instrument.argmax(1), drums > 0, BPM_GRID[tempo.argmax(1)]


def labels(truths: list[dict]):
    """-> index of the instrument (B,), drums (B,) bool, beats per minute (B,)"""
    instrument = torch.tensor([INSTRUMENTS.index(truth["instrument"]) for truth in truths])
    drums = torch.tensor([truth["drums"] for truth in truths])
    bpm = torch.tensor([float(truth["bpm"]) for truth in truths])
    return instrument, drums, bpm


def train_classifiers(config: Config, codec, epochs: int = 14) -> Classifiers:
    """Classifiers trained on CLIPS clips of training tunes and reconstructions of the first RECONSTRUCTED."""
    numbers = tqdm(range(CLIPS), disable=None, desc="clips for the classifiers")
    clips = [clip(config, "train", n) for n in numbers]
    truths = [truth for truth, _, _ in clips]
    wavs = to_batch([mix for _, mix, _ in clips])
    wavs = torch.cat([wavs, codec_roundtrip(codec, wavs[:RECONSTRUCTED])])
    instrument, drums, bpm = labels(truths + truths[:RECONSTRUCTED])
    distance = (bpm[:, None] / BPM_GRID).log() / 0.03
    near_tempo = (-distance.square() / 2).softmax(1)  # a tempo and its neighbors
    classifiers = Classifiers(config)
    parts = [classifiers.features(part) for part in wavs.split(64)]
    mel = torch.cat([part[0] for part in parts])
    onsets = torch.cat([part[1] for part in parts])

    batches = len(wavs) // 32
    optimizer = torch.optim.AdamW(classifiers.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * batches)
    generator = torch.Generator().manual_seed(0)
    classifiers.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(wavs), generator=generator).split(32)[:batches]:
            instrument_logits, drums_logits, tempo_logits = classifiers(mel[rows], onsets[rows])
            loss = F.cross_entropy(instrument_logits, instrument[rows])
            loss = loss + F.cross_entropy(tempo_logits, near_tempo[rows])
            loss = loss + F.binary_cross_entropy_with_logits(drums_logits, drums[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifiers


def accuracy(classifiers: Classifiers, wavs, truths: list[dict]) -> dict:
    """Share of waves (B, 1, L) classified as their truths say: of each of ATTRIBUTES, tempo within 8 %.

    "each": of each instrument.
    """
    parts = [classifiers.predict(part) for part in wavs.split(BATCH)]
    instrument, drums, bpm = (torch.cat(values) for values in zip(*parts))
    true_instrument, true_drums, true_bpm = labels(truths)
    correct = (instrument == true_instrument).float()
    each = {}
    for n, name in enumerate(INSTRUMENTS):
        if (true_instrument == n).any():
            each[name] = round(correct[true_instrument == n].mean().item(), 3)
    tempo_correct = (bpm / true_bpm - 1).abs() < 0.08
    return {
        "instrument": correct.mean().item(),
        "drums": (drums == true_drums).float().mean().item(),
        "tempo": tempo_correct.float().mean().item(),
        "each": each,
    }


# --- waves ----------------------------------------------------------------------------------------

def to_batch(waves) -> torch.Tensor:
    """numpy waves (L,) -> (B, 1, L)"""
    return torch.from_numpy(np.stack(waves))[:, None]


@torch.no_grad()
def encode(codec, wavs):
    """Waves (B, 1, L) -> codes (B, K, T) on the codec's device."""
    device = device_of(codec)
    return torch.cat([codec.encode(part.to(device)) for part in wavs.split(BATCH)])


@torch.no_grad()
def codec_roundtrip(codec, wavs):
    """Waves (B, 1, L) as the codec reconstructs them, on the CPU."""
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


# --- the gain of a caption ------------------------------------------------------------------------

def perturbed(truth: dict, attribute: str) -> dict:
    """A truth with another instrument, drums or tempo."""
    if attribute == "drums":
        return truth | {"drums": not truth["drums"]}
    if attribute == "instrument":
        index = (INSTRUMENTS.index(truth["instrument"]) + 4) % len(INSTRUMENTS)
        return truth | {"instrument": INSTRUMENTS[index]}
    tempo = {"slow": "fast", "medium": "slow", "fast": "medium"}[truth["tempo"]]
    low, high = render.TEMPI[tempo]
    return truth | {"tempo": tempo, "bpm": (low + high) // 2}


@torch.no_grad()
def nll(lm, codes, texts: list[str], hide: bool) -> float:
    """Negative log-likelihood of clips, codes (B, K, T), given their texts alone: nats a clip.

    hide: the model does not see the codes before the one that it predicts, either.
    """
    T = codes.shape[2]
    total = 0.0
    for first in range(0, len(codes), BATCH):
        part = codes[first:first + BATCH]
        conditions = {"text": texts[first:first + BATCH], "melody": [None] * len(part)}
        sequence, _ = lm.pattern.build(part, lm.special, keep_only_valid_steps=True)  # (B, K, S)
        if hide:
            sequence = torch.full_like(sequence, lm.special)
        logits = lm(sequence, lm.conditioner(conditions, sequence.shape[-1]))
        logits, mask = lm.pattern.revert_logits(logits, T, keep_only_valid_steps=True)
        ce = codebook_cross_entropy(logits, part, mask)  # (K,)
        total += (ce * mask.sum(1)).sum().item() * len(part)
    return total / len(codes)


def caption_gain(lm, codes, truths: list[dict]) -> dict:
    """How much likelier a caption with the right instrument, drums or tempo makes a clip: nats a clip."""
    def captions(truths):
        return [caption(truth, np.random.default_rng(n)) for n, truth in enumerate(truths)]
    figures = {}
    for hide, suffix in ((False, ""), (True, "_codes_hidden")):
        right = nll(lm, codes, captions(truths), hide)
        for attribute in ATTRIBUTES:
            wrong_truths = [perturbed(truth, attribute) for truth in truths]
            wrong = nll(lm, codes, captions(wrong_truths), hide)
            figures[f"caption_gain_{attribute}{suffix}"] = wrong - right
    return figures


# --- the measurement ------------------------------------------------------------------------------

def adherence(model, split: str, count: int) -> dict:
    """Figures of a MusicGen on `count` tunes of a split; see the top of this file for their names."""
    config, codec = model.config, model.codec
    truths, mixes, _ = zip(*(clip(config, split, n) for n in range(count)))
    rng = np.random.default_rng(9)
    texts = [caption(truth, rng) for truth in truths]
    real = to_batch(mixes)
    figures = caption_gain(model.lm, encode(codec, real), truths)
    torch.manual_seed(config.seed)
    classifiers = train_classifiers(config, codec)
    for name, wavs in (("real_clips", real), ("reconstructions", codec_roundtrip(codec, real))):
        correct = accuracy(classifiers, wavs, truths)
        for attribute in ATTRIBUTES:
            figures[f"{name}_{attribute}_accuracy"] = correct[attribute]
    figures |= melody_figures(model, split, texts, truths, classifiers)
    figures |= out_of_domain_figures(model, split, texts, truths, classifiers)
    figures |= text_only_figures(model, texts, truths, classifiers)
    return figures


def generate(model, texts: list[str], chromas=None):
    """A sample of segment_duration for each text, and chroma (M', Q) if given -> waves (B, 1, L)."""
    config = model.config
    wavs = []
    for first in tqdm(range(0, len(texts), BATCH), disable=None, unit="batch", desc="generating"):
        part = slice(first, first + BATCH)
        texts_of_part = texts[part]
        chromas_of_part = None if chromas is None else chromas[part]
        seeds = [config.seed + first + n for n in range(len(texts_of_part))]
        codes = model.generate_codes(texts_of_part, chromas_of_part, seeds=seeds)
        wavs.append(model.decode(codes, config.segment_duration))
    return torch.cat(wavs)


def generate_with_melodies(model, texts: list[str], waves):
    """Samples for texts and melodies, numpy waves (L,).

    -> melodies asked for and melodies played, chroma (B, M, Q) each; the samples (B, 1, L)
    """
    chromas = [model.melody_chroma(torch.from_numpy(wave)) for wave in waves]
    wavs = generate(model, texts, chromas)
    asked = torch.cat([match_length(chroma[None], model.config.chroma_frames) for chroma in chromas])
    return asked, melody_of(model.config, wavs), wavs


def melody_figures(model, split: str, texts, truths, classifiers) -> dict:
    """Samples for captions and melodies, and what the same melodies on the right instrument would reach."""
    config, count = model.config, len(texts)
    # of clips with an instrument of their own: a melody says nothing about the one that the caption names
    melodies = [clip(config, split, count + n)[2] for n in range(count)]
    asked, played, wavs = generate_with_melodies(model, texts, melodies)
    cosine, agreement = compare_chroma(played, asked)
    _, shuffled = compare_chroma(played, asked.roll(1, 0))
    figures = {
        "tunes_melody_agreement": agreement.mean().item(),
        "tunes_melody_cosine": cosine.mean().item(),
        "tunes_melody_agreement_shuffled": shuffled.mean().item(),
    }
    mixes = [clip(config, split, count + n, truth["instrument"])[1] for n, truth in enumerate(truths)]
    real = to_batch(mixes)
    for name, clips in (("real_clips", real), ("reconstructions", codec_roundtrip(model.codec, real))):
        _, agreement = compare_chroma(melody_of(config, clips), asked)
        figures[f"{name}_melody_agreement"] = agreement.mean().item()
    correct = accuracy(classifiers, wavs, truths)
    figures["tunes_instrument_accuracy"] = correct["instrument"]
    figures["tunes_drums_accuracy"] = correct["drums"]
    for instrument, share in correct["each"].items():
        figures[f"tunes_instrument_accuracy_{instrument}"] = share
    return figures


def out_of_domain_figures(model, split: str, texts, truths, classifiers) -> dict:
    """Samples for captions and melodies recorded unlike any training clip.

    Agreement with the melody as the model is given it, with the true notes, and of these two with each other.
    """
    config = model.config
    recordings, flutes = zip(*(out_of_domain_recording(config, split, n) for n in range(len(texts))))
    asked, played, wavs = generate_with_melodies(model, texts, recordings)
    notes = chroma_of(config, to_batch(flutes))
    return {
        "out_of_domain_melody_agreement": compare_chroma(played, asked)[1].mean().item(),
        "out_of_domain_notes_agreement": compare_chroma(played, notes)[1].mean().item(),
        "out_of_domain_input_notes_agreement": chroma_agreement(asked, notes),
        "out_of_domain_instrument_accuracy": accuracy(classifiers, wavs, truths)["instrument"],
    }


def text_only_figures(model, texts, truths, classifiers) -> dict:
    """Samples for captions alone. valid: tonal, audible, not clipped and as long as asked for, in a file."""
    config = model.config
    wavs = generate(model, texts)
    correct = accuracy(classifiers, wavs, truths)
    wavs = torch.stack([as_written(wav, config.sample_rate) for wav in wavs])
    tonal = flatness(wavs) < 0.1
    audible = wavs.square().mean((1, 2)).sqrt() > 0.01
    unclipped = wavs.abs().amax((1, 2)) < 1
    complete = wavs.shape[2] == round(config.segment_duration * config.sample_rate)
    valid = tonal & audible & unclipped & complete
    return {
        "text_only_tempo_accuracy": correct["tempo"],
        "text_only_drums_accuracy": correct["drums"],
        "text_only_instrument_accuracy": correct["instrument"],
        "text_only_valid": valid.float().mean().item(),
    }
