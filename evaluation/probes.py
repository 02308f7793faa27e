"""What a codec does to sounds of which the right result is known, and to music: the figures of its --eval.

    probes(codec)                               # silence, sines, partials that a tone does not have
    distances([(x, y), ...], 16000)             # of waves (L,) and their reconstructions
    opus_roundtrip(x, 16000, 12)                # the same wave through Opus at 12 kbit/s, to compare with

The function that is probed takes a wave (L,) and gives one of the same length. Levels are of whole waves in
dBFS (a constant 1 is 0 dBFS), losses and distances in dB.
"""
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch

from evaluation.metrics import frechet_distance, si_snr, stft_distance
from training.losses import mel_filters, power_spectrogram

LEVEL = 0.2                     # amplitude of the strongest partial of a probe
SECONDS = 1.5                   # of a probe; its middle is measured
SINES = {"C3": 48, "C4": 60, "C5": 72, "G5": 79, "C6": 84, "E6": 88, "A6": 93, "C7": 96}    # midi pitches
TONES = {       # partials that sound, and those between them that do not
    "odd partials": ((1, 3, 5, 7, 9), (2, 4, 6, 8)),                # a stopped pipe, such as a clarinet
    "organ": ((1, 2, 3, 4, 6, 8), (5, 7)),                          # stops of 8', 4', 2 2/3', 2', 1 1/3', 1'
    "bell": ((1, 2.756, 5.404, 8.933), (2, 3, 4, 5, 6)),            # a bar that vibrates freely
}
TONE_PITCHES = (57, 62, 67, 72)                                     # A3 to C5
N_MELS = 80
QUIETEST = -80.0                # dBFS, of a mel band: what is below counts as this
FLOOR = -60.0                   # dBFS, below which hardly anything is heard
OPUS = (6, 8, 12, 16)           # kbit/s


# --- sounds that are made for it --------------------------------------------------------------------------

def decibels(power) -> float:
    return 10 * math.log10(max(float(power), 1e-12))


def tone(frequencies, levels, sample_rate: int) -> np.ndarray:
    """A sum of sines (L,), of SECONDS, that begins and ends gently."""
    time = np.arange(round(SECONDS * sample_rate)) / sample_rate
    wave = sum(level * np.sin(2 * np.pi * hertz * time) for hertz, level in zip(frequencies, levels))
    fade = np.minimum(time, time[::-1]) / 0.02
    return (wave * np.clip(fade, 0, 1)).astype(np.float32)


def middle(wav) -> np.ndarray:
    """The middle third of a wave (L,)."""
    third = len(wav) // 3
    return np.asarray(wav[third:-third], dtype=np.float64)


def level_at(wav, hertz: float, sample_rate: int) -> float:
    """Amplitude of a sine in the middle of a wave (L,), in dB; a Hann window keeps its neighbors out."""
    part = middle(wav)
    window = np.hanning(len(part))
    turn = np.exp(-2j * np.pi * hertz * np.arange(len(part)) / sample_rate)
    amplitude = 2 * np.abs(np.sum(part * window * turn)) / window.sum()
    return decibels(amplitude ** 2)


def silence_level(process, sample_rate: int) -> float:
    """What comes out when silence goes in: its level in dBFS, -120 for nothing."""
    silence = np.zeros(round(SECONDS * sample_rate), np.float32)
    return decibels(np.mean(middle(process(silence)) ** 2))


def sine_loss(process, pitch: int, sample_rate: int) -> float:
    """By how many dB a sine of a midi pitch comes out quieter than it went in."""
    hertz = 440 * 2 ** ((pitch - 69) / 12)
    wave = tone([hertz], [LEVEL], sample_rate)
    return level_at(wave, hertz, sample_rate) - level_at(process(wave), hertz, sample_rate)


def absent_partials(process, name: str, sample_rate: int) -> float:
    """The strongest partial that a tone of TONES does not have, against its strongest, in dB.

    Partial n goes in with the level 1 / n; a mean over TONE_PITCHES.
    """
    present, absent = TONES[name]
    ratios = []
    for pitch in TONE_PITCHES:
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        inside = [n for n in present if n * hertz < 0.45 * sample_rate]
        wave = tone([n * hertz for n in inside], [LEVEL / n for n in inside], sample_rate)
        output = process(wave)
        strongest = max(level_at(output, n * hertz, sample_rate) for n in inside)
        wrong = max(level_at(output, n * hertz, sample_rate) for n in absent)
        ratios.append(wrong - strongest)
    return float(np.mean(ratios))


def probes(process, sample_rate: int) -> dict:
    """Silence, sines and absent partials, see the functions above -> {name: figure}."""
    figures = {"silence_dbfs": silence_level(process, sample_rate)}
    for name, pitch in SINES.items():
        figures[f"sine_loss_{name}"] = sine_loss(process, pitch, sample_rate)
    for name in TONES:
        figures[f"absent_partials {name}"] = absent_partials(process, name, sample_rate)
    return figures


# --- distances of music -----------------------------------------------------------------------------------

def log_mel_frames(wav, sample_rate: int) -> np.ndarray:
    """Wave (L,) -> log-mel spectrogram (frames, N_MELS) in dBFS, windows of 64 ms, QUIETEST at least."""
    n_fft = 2 ** round(math.log2(0.064 * sample_rate))
    wav = torch.as_tensor(wav, dtype=torch.float32)[None, None]
    power = power_spectrogram(wav, n_fft)[0, 0].mT / (n_fft / 4)       # of a sine of amplitude 1: about 1
    mel = power @ mel_filters(n_fft, sample_rate, N_MELS, wav.device)
    return (10 * mel.clamp(min=10 ** (QUIETEST / 10)).log10()).double().numpy()


def distances(pairs, sample_rate: int) -> dict:
    """Waves (L,) and their reconstructions [(x, y), ...] -> {name: figure}.

    log_mel_l1            mean |X - Y| of log-mel spectrograms, dB
    log_mel_l1_floored    the same where both are raised to FLOOR: differences that nobody hears don't count
    log_mel_frechet       Frechet distance of all frames of X from all frames of Y, dB^2
    si_snr                dB, see metrics.py
    stft_distance         multi-resolution STFT distance, see metrics.py
    """
    x = [log_mel_frames(wav, sample_rate) for wav, _ in pairs]
    y = [log_mel_frames(output, sample_rate) for _, output in pairs]
    snr, stft = [], []
    for wav, output in pairs:
        both = torch.as_tensor(wav)[None, None], torch.as_tensor(output)[None, None]
        snr.append(si_snr(*both).item())
        stft.append(stft_distance(*both))
    x, y = np.concatenate(x), np.concatenate(y)
    return {
        "log_mel_l1": float(np.abs(x - y).mean()),
        "log_mel_l1_floored": float(np.abs(x.clip(FLOOR) - y.clip(FLOOR)).mean()),
        "log_mel_frechet": frechet_distance(x, y),
        "si_snr": float(np.mean(snr)),
        "stft_distance": float(np.mean(stft)),
    }


def log_mel_frechet(waves, others, sample_rate: int) -> float:
    """Frechet distance of the log-mel frames of two sets of waves (L,), dB^2."""
    x, y = ([log_mel_frames(wav, sample_rate) for wav in part] for part in (waves, others))
    return frechet_distance(np.concatenate(x), np.concatenate(y))


# --- Opus -------------------------------------------------------------------------------------------------

def has_opus() -> bool:
    """Whether ffmpeg, or opusenc and opusdec of the Debian package opus-tools, can be called."""
    return bool(shutil.which("ffmpeg") or shutil.which("opusenc") and shutil.which("opusdec"))


def opus_roundtrip(wav, sample_rate: int, kbps: int) -> np.ndarray:
    """Wave (L,) through Opus at so many kbit/s -> (L,).

    At a constrained variable rate: a free one takes 21 kbit/s for test clips where 16 are asked for, and a
    constant one sounds a little worse.
    """
    with tempfile.TemporaryDirectory() as folder:
        before, coded, after = (str(Path(folder) / name) for name in ("a.wav", "b.opus", "c.wav"))
        soundfile.write(before, np.asarray(wav), sample_rate, subtype="FLOAT")
        if shutil.which("ffmpeg"):
            quiet = ["ffmpeg", "-v", "error", "-y", "-i"]
            commands = [[*quiet, before, "-c:a", "libopus", "-b:a", f"{kbps}k", "-vbr", "constrained",
                         coded],
                        [*quiet, coded, "-ar", str(sample_rate), after]]
        else:
            commands = [["opusenc", "--quiet", "--cvbr", "--bitrate", str(kbps), before, coded],
                        ["opusdec", "--quiet", "--rate", str(sample_rate), coded, after]]
        for command in commands:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        output, _ = soundfile.read(after, dtype="float32")
    output = output[:len(wav)]
    return np.pad(output, (0, len(wav) - len(output)))
