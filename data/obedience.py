"""Does it play what it is told: the melody, the instrument, the tempo, drums or none? Part of `train.py --eval`.

    python train.py config/tiny.py --eval --split=test      # eval_tunes = True measures this too

For models of the embedded tunes (data/tunes.py). Captions say an instrument, a tempo and whether there are drums and
bass; the melody comes from a recording whose instrument is drawn independently. What is then heard is told by three
small judges:

    instrument, drums    convolutions over a log-mel spectrogram
    tempo                a layer or two on the autocorrelation of the onsets

They learn from training tunes, as rendered and as the codec reconstructs them, and the figures say how often they are
right about real clips of test tunes, which is the most that a model can reach. One sample for each caption, no picking.
Beside that, without any judge: how much worse a model predicts a clip when its caption is wrong (`worth`).
"""
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from chroma import chroma_agreement, match_length
from config import Config
from data import tunes
from data.audio import read_audio, write_audio
from data.measures import chroma_of, compare_chroma, melody_of
from encodec import mel_filters, power_spectrogram
from lm import codebook_cross_entropy
from sample import device_of

INSTRUMENTS = list(tunes.INSTRUMENTS)
TEMPI = torch.logspace(math.log2(60), math.log2(172), 54, base=2)  # beats per minute, 2 % apart
CLIPS, RECONSTRUCTED = 2400, 480        # clips that the judges learn from
BATCH = 16                              # pieces generated at a time


# --- what is asked for ------------------------------------------------------------------------------------------

def clip(config: Config, split: str, number: int, instrument: str | None = None):
    """Clip `number` of a split -> its truth, the mix (L,), the melody alone (L,), segment_duration long.

    instrument: to play it instead of the clip's own.
    """
    rng = np.random.default_rng([7, tunes.SPLITS.index(split), number])
    names = tunes.split(split)
    tune = names[number % len(names)]
    truth = tunes.draw(tune, rng)
    if instrument:
        truth["instrument"] = instrument
    return truth, *tunes.render_truth(tune, truth, config.segment_duration, config.sample_rate, rng)


def caption(truth: dict, rng) -> str:
    """A caption in the words of the data set that leaves out neither tempo nor drums and bass."""
    while True:
        text = tunes.describe(truth, rng)
        if str(truth["bpm"]) in text and any(words in text for words in tunes.BACKING[truth["drums"], truth["bass"]]):
            return text


# ratio and index of the modulation, s until it has faded, s to glide from note to note, vibrato in cents, octaves up
VOICES = dict(hum=(1, 1.2, 9.0, 0.06, 40, 0), whistle=(1, 0.0, 9.0, 0.08, 25, 1), keys=(1, 2.0, 0.3, 0.003, 0, 0),
              reed=(2, 1.5, 9.0, 0.02, 10, 0))


def by_other_means(config: Config, split: str, number: int):
    """The tune of a clip as somebody else would record it -> wave (L,), and the same notes on a flute (L,).

    Frequency modulation instead of sums of partials, with vibrato, slides, up to 30 cents out of tune, in every other
    recording doubled an octave below, in a room with noise 20 dB below the music.
    """
    rng = np.random.default_rng([8, tunes.SPLITS.index(split), number])
    names = tunes.split(split)
    tune, bpm = names[number % len(names)], float(rng.uniform(70, 120))
    shift = tunes.fit(tune, "flute", int(rng.integers(12)))
    seconds, rate = config.segment_duration, config.sample_rate
    ratio, index, fades, glide, vibrato, up = VOICES[list(VOICES)[int(rng.integers(len(VOICES)))]]
    notes, _ = tunes.schedule(tune, bpm, seconds)
    time = np.arange(round(seconds * rate)) / rate
    pitch, loud, age = np.full(len(time), float(notes[0][2])), np.zeros(len(time)), np.zeros(len(time))
    for start, length, midi in notes:
        a, b = round(start * rate), round((start + length) * rate)
        pitch[a:], loud[a:b] = midi, 1.0
        age[a:] = time[:len(time) - a]
    box = np.ones(max(1, round(glide * rate))) / max(1, round(glide * rate))
    pitch, loud = (np.convolve(np.pad(x, (len(box), 0), mode="edge"), box, "full")[len(box):][:len(time)]
                   for x in (pitch, loud))
    pitch += shift + 12 * up + rng.uniform(-0.3, 0.3) + vibrato / 100 * np.sin(2 * np.pi * 5.2 * time)
    phase = 2 * np.pi * np.cumsum(440 * 2 ** ((pitch - 69) / 12)) / rate
    wave = np.sin(phase + index * np.exp(-age / fades) * np.sin(ratio * phase))
    if rng.integers(2):
        wave += 0.7 * np.sin(phase / 2 + index * np.sin(ratio * phase / 2))
    wave *= loud * np.exp(-age / (0.9 if fades < 1 else 9.0))
    wave += 0.1 * np.sqrt(np.mean(wave ** 2)) * rng.standard_normal(len(wave))
    flute = tunes.render(tune, "flute", bpm, shift, False, False, seconds, rate, np.random.default_rng(0), 0)[1]
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32), flute


# --- the judges -------------------------------------------------------------------------------------------------

def log_mel(config: Config, wavs, n_fft: int, n_mels: int):
    """Waves (B, 1, L) -> (B, frames, n_mels), a frame every n_fft / 4 samples."""
    mel = power_spectrogram(wavs, n_fft)[:, 0].mT @ mel_filters(n_fft, config.sample_rate, n_mels, wavs.device)
    return (mel + 1e-4).log()


def onset_periods(config: Config, wavs):
    """Waves (B, 1, L) -> how alike the onsets of low, middle and high bands are to themselves, 0.1 to 2.4 s later."""
    onsets = log_mel(config, wavs, 512, 32).diff(dim=1).clamp(min=0)                    # rises only
    step, periods = 128 / config.sample_rate, []                                        # s
    for band in onsets.split((10, 12, 10), dim=2):
        rises = band.sum(-1)
        rises = rises - rises.mean(-1, keepdim=True)
        alike = torch.fft.irfft(torch.fft.rfft(rises, 4 * len(rises[0])).abs().square())
        periods.append(alike[:, round(0.1 / step):round(2.4 / step)] / alike[:, :1].clamp(min=1e-6))
    return torch.cat(periods, 1)


class Judges(nn.Module):
    """Instrument, drums and tempo of waves (B, 1, L)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

        def conv(inputs, outputs):
            return nn.Sequential(nn.Conv1d(inputs, outputs, 5, 2, 2), nn.BatchNorm1d(outputs), nn.ReLU())
        self.timbre = nn.Sequential(nn.BatchNorm1d(64), conv(64, 96), conv(96, 96), conv(96, 96))
        self.head = nn.Linear(2 * 96, len(INSTRUMENTS) + 1)
        lags = onset_periods(config, torch.zeros(1, 1, round(config.segment_duration * config.sample_rate))).shape[1]
        self.tempo = nn.Sequential(nn.LayerNorm(lags), nn.Linear(lags, 128), nn.ReLU(), nn.Dropout(0.3),
                                   nn.Linear(128, len(TEMPI)))

    def forward(self, mel, periods):
        """log_mel and onset_periods -> logits of instrument and, last, drums (B, 10), and of tempo (B, 54)"""
        x = self.timbre(mel.mT)
        return self.head(torch.cat([x.mean(-1), x.amax(-1)], 1)), self.tempo(periods)

    def features(self, wavs):
        return log_mel(self.config, wavs, 1024, 64), onset_periods(self.config, wavs)

    @torch.no_grad()
    def hear(self, wavs):
        """Waves (B, 1, L) -> index of the instrument (B,), drums (B,) bool, beats per minute (B,)."""
        timbre, tempo = self.eval()(*self.features(wavs))
        return timbre[:, :-1].argmax(1), timbre[:, -1] > 0, TEMPI[tempo.argmax(1)]


def labels(truths: list[dict]):
    """-> index of the instrument (B,), drums (B,) bool, beats per minute (B,)"""
    return (torch.tensor([INSTRUMENTS.index(truth["instrument"]) for truth in truths]),
            torch.tensor([truth["drums"] for truth in truths]), torch.tensor([float(truth["bpm"]) for truth in truths]))


def train_judges(config: Config, codec, epochs: int = 14) -> Judges:
    """Judges that have heard CLIPS clips of training tunes, and the first RECONSTRUCTED of them through the codec."""
    clips = [clip(config, "train", n) for n in tqdm(range(CLIPS), disable=None, desc="clips for the judges")]
    wavs = torch.from_numpy(np.stack([mix for _, mix, _ in clips]))[:, None]
    wavs = torch.cat([wavs, through(codec, wavs[:RECONSTRUCTED])])
    instrument, drums, bpm = labels([clips[n][0] for n in [*range(CLIPS), *range(RECONSTRUCTED)]])
    near = (-((bpm[:, None] / TEMPI).log() / 0.03).square() / 2).softmax(1)             # a tempo and its neighbours
    judges, random = Judges(config), torch.Generator().manual_seed(0)
    features = [torch.cat(parts) for parts in zip(*map(judges.features, wavs.split(64)))]
    optimizer = torch.optim.AdamW(judges.parameters(), weight_decay=0.05)
    steps = epochs * (len(wavs) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    judges.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(wavs), generator=random).split(32)[:len(wavs) // 32]:
            timbre, tempo = judges(*(x[rows] for x in features))
            loss = F.cross_entropy(timbre[:, :-1], instrument[rows]) + F.cross_entropy(tempo, near[rows])
            loss = loss + F.binary_cross_entropy_with_logits(timbre[:, -1], drums[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judges


@torch.no_grad()
def through(codec, wavs):
    """Waves (B, 1, L) as the codec reconstructs them."""
    return torch.cat([codec.decode(codec.encode(part))[..., :wavs.shape[2]] for part in wavs.split(BATCH)])


def right(judges: Judges, wavs, truths: list[dict]) -> dict:
    """How often instrument, drums and tempo (within 8 %) are heard as they should be; and of each instrument."""
    instrument, drums, bpm = (torch.cat(x) for x in zip(*map(judges.hear, wavs.split(BATCH))))
    wanted, wanted_drums, wanted_bpm = labels(truths)
    hit = (instrument == wanted).float()
    each = {name: round(hit[wanted == n].mean().item(), 3) for n, name in enumerate(INSTRUMENTS) if (wanted == n).any()}
    return {"instrument": hit.mean().item(), "drums": (drums == wanted_drums).float().mean().item(),
            "tempo": ((bpm / wanted_bpm - 1).abs() < 0.08).float().mean().item(), "each": each}


# --- what a caption is worth --------------------------------------------------------------------------------------

def otherwise(truth: dict, what: str) -> dict:
    """A truth that differs in its instrument, its drums or its tempo."""
    if what == "drums":
        return truth | {"drums": not truth["drums"]}
    if what == "instrument":
        return truth | {what: INSTRUMENTS[(INSTRUMENTS.index(truth[what]) + 4) % len(INSTRUMENTS)]}
    tempo = {"slow": "fast", "medium": "slow", "fast": "medium"}[truth["tempo"]]
    return truth | {"tempo": tempo, "bpm": sum(tunes.TEMPI[tempo]) // 2}


@torch.no_grad()
def surprise(lm, codes, texts: list[str], hide: bool) -> float:
    """Nats that all codes (B, K, T) of a clip cost a model that knows its text alone; `hide`: not what has sounded."""
    T, total = codes.shape[2], 0.0
    for part, said in zip(codes.split(BATCH), (texts[n:n + BATCH] for n in range(0, len(texts), BATCH))):
        sequence, _ = lm.pattern.build(part, lm.special, keep_only_valid_steps=True)
        sequence = torch.full_like(sequence, lm.special) if hide else sequence
        conditions = lm.conditioner(said, None, None, lm.pattern.steps(T, keep_only_valid_steps=True))
        logits, mask = lm.pattern.revert_logits(lm(sequence, conditions), T, True)
        total += (codebook_cross_entropy(logits, part, mask) * mask.sum(1)).sum().item() * len(part)
    return total / len(codes)


def worth(model, codes, truths: list[dict]) -> dict:
    """By how much a clip surprises more when its caption names another instrument, drums or tempo: nats a clip."""
    def texts(changed):
        return [caption(truth, np.random.default_rng(n)) for n, truth in enumerate(changed)]
    found = {}
    for hide in (False, True):
        right = surprise(model.lm, codes, texts(truths), hide)
        for what in ("instrument", "drums", "tempo"):
            wrong = surprise(model.lm, codes, texts([otherwise(truth, what) for truth in truths]), hide)
            found[f"nats a clip that its {what} is worth, {'codes hidden' if hide else 'codes seen'}"] = wrong - right
    return found


def as_written(wav, sample_rate: int):
    """Wave (C, L) as it is read back from the file that sample.py would write."""
    with tempfile.TemporaryDirectory() as directory:
        write_audio(Path(directory) / "clip.wav", wav, sample_rate)
        return read_audio(Path(directory) / "clip.wav", sample_rate, len(wav))


# --- the measurement --------------------------------------------------------------------------------------------

def flatness(wavs):
    """Median over frames of the spectral flatness between 100 Hz and 4 kHz, (B,): 0.56 for noise, near 0 for tones."""
    power = power_spectrogram(wavs, 2048)[:, 0, 13:512] + 1e-12
    return (power.log().mean(1).exp() / power.mean(1)).median(-1).values


def obedience(model, split: str, count: int) -> dict:
    """Figures of a model on `count` tunes of a split, a caption and a melody each; see the top of this file."""
    config, codec, rng = model.config, model.codec, np.random.default_rng(9)
    truths, mixes, _ = zip(*(clip(config, split, n) for n in range(count)))
    texts = [caption(truth, rng) for truth in truths]
    # each tune once more, its instrument drawn anew: the melody tells nothing about what the caption asks for
    melodies = [clip(config, split, count + n)[2] for n in range(count)]
    played = [clip(config, split, count + n, truth["instrument"])[1] for n, truth in enumerate(truths)]
    recordings, flutes = zip(*(by_other_means(config, split, n) for n in range(count)))
    real, played = (torch.from_numpy(np.stack(waves))[:, None].to(device_of(codec)) for waves in (mixes, played))

    def play(texts, waves=None):
        chromas = None if waves is None else [model.melody_chroma(torch.from_numpy(w)) for w in waves]
        made = []
        for first in tqdm(range(0, count, BATCH), disable=None, unit="batch", desc="playing"):
            part = slice(first, min(first + BATCH, count))
            seeds = [config.seed + n for n in range(count)[part]]
            codes = model.generate_codes(texts[part], chromas and chromas[part], seeds=seeds)
            made.append(model.decode(codes, config.segment_duration))
        return torch.cat(made), chromas and torch.cat([match_length(c[None], config.chroma_frames) for c in chromas])

    figures = worth(model, torch.cat([codec.encode(part) for part in real.split(BATCH)]), truths)
    torch.manual_seed(config.seed)
    judges = train_judges(config, codec)
    for name, wavs in (("real clips", real), ("reconstructions", through(codec, real))):
        judged = right(judges, wavs.cpu(), truths)
        figures |= {f"{key} of {name}": value for key, value in judged.items() if key != "each"}

    with_melody, asked = play(texts, melodies)
    heard = melody_of(config, with_melody)
    cosine, agreement = compare_chroma(heard, asked)
    figures |= {"melody agreement": agreement.mean().item(), "melody cosine": cosine.mean().item(),
                "melody agreement, shuffled": compare_chroma(heard, asked.roll(1, 0))[1].mean().item()}
    # what a player of the same notes on the instrument asked for would reach, as rendered and as reconstructed
    figures |= {f"melody agreement of {name}": compare_chroma(melody_of(config, wavs), asked)[1].mean().item()
                for name, wavs in (("real clips", played), ("reconstructions", through(codec, played)))}
    judged = right(judges, with_melody, truths)
    figures |= {"instrument": judged["instrument"], "drums": judged["drums"],
                **{f"instrument {name}": value for name, value in judged["each"].items()}}

    others, asked = play(texts, recordings)
    heard = melody_of(config, others)
    notes = chroma_of(config, torch.from_numpy(np.stack(flutes))[:, None])
    figures |= {"other means: melody agreement": compare_chroma(heard, asked)[1].mean().item(),
                "other means: agreement with the notes": compare_chroma(heard, notes)[1].mean().item(),
                "other means: chroma heard, agreement with the notes": chroma_agreement(asked, notes),
                "other means: instrument": right(judges, others, truths)["instrument"]}

    alone, _ = play(texts)
    judged = right(judges, alone, truths)
    alone = torch.stack([as_written(wav, config.sample_rate) for wav in alone])
    fine = (flatness(alone) < 0.1) & (alone.square().mean((1, 2)).sqrt() > 0.01) & (alone.abs().amax((1, 2)) < 1)
    fine &= alone.shape[2] == round(config.segment_duration * config.sample_rate)
    return figures | {"text alone: tempo": judged["tempo"], "text alone: drums": judged["drums"],
                      "text alone: instrument": judged["instrument"],
                      "text alone: tonal, not silent, not clipped, as long as asked": fine.float().mean().item()}
