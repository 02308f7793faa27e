"""Strokes of drums in a mix, without any classifier.

    times = strokes(wav, 16000)                         # s, ascending
    per_beat = strokes_per_beat(times, 0.6, 15, 20)     # of 0.6 s, from 15 to 20 s

A stroke is noise: most bins of the high band get louder at once, and stay so for a while. A note raises but
those of its partials, and the click of a plucked or struck one is over sooner. It is the spectral flux of
onset detectors (Bello et al. 2005, A Tutorial on Onset Detection, section III), as a share of bins instead of
a sum. A kick alone, without a hat or a snare, is not found: a bass note would look the same.
"""
import numpy as np
import torch

HOP = 0.008             # s
HIGH = 3000.0           # Hz; from here up to 8 kHz
RISE = 6.0              # dB
LASTS = 12              # frames
MOST_BINS = 0.5         # share of the high band's bins that a stroke raises
FLOOR = 1e-3            # of the mean power, added to each bin: what is below is not heard
DRUMS = 0.25            # strokes per beat; a piece with fewer has no drums


def noise_rise(wav, sample_rate: int):
    """Mix (L,) -> share of the high band's bins that get RISE louder and stay so, of each frame (M,)."""
    wav = torch.as_tensor(wav, dtype=torch.float32)
    hop = round(HOP * sample_rate)
    n_fft = 4 * hop
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(wav, n_fft, hop, window=window, return_complex=True)
    power = spectrum.abs().square() / window.square().sum()
    frequency = torch.arange(len(power)) * sample_rate / n_fft
    band = power[(frequency >= HIGH) & (frequency < 8000)]
    level = 10 * torch.log10(band + FLOOR * wav.square().mean() + 1e-12)
    M = level.shape[1]
    padded = torch.nn.functional.pad(level, (4, LASTS), mode="replicate")
    before = padded.unfold(1, 3, 1)[:, :M].amin(-1)                     # of frames m - 4 ... m - 2
    after = padded[:, 4:].unfold(1, LASTS, 1)[:, :M].median(-1).values  # of frames m ... m + 11
    return (after - before > RISE).float().mean(0).numpy()


def strokes(wav, sample_rate: int) -> np.ndarray:
    """Mix (L,) -> times of its strokes, s, to within 0.06: peaks of `noise_rise`, 80 ms apart at least."""
    rise = noise_rise(wav, sample_rate)
    times = []
    for m in np.argsort(-rise, kind="stable"):
        if rise[m] < MOST_BINS:
            break
        if all(abs(m * HOP - time) >= 0.08 for time in times):
            times.append(m * HOP)
    return np.sort(np.array(times))


def strokes_per_beat(times, beat: float, start: float, end: float) -> float:
    """Strokes between two times over the beats there. Less than 0.6 of a beat after another, none counts.

    So a stroke on every beat is 1, and with eighths between them it stays 1.
    """
    count, last = 0, -np.inf
    for time in times[(times >= start) & (times < end)]:
        if time - last >= 0.6 * beat:
            count, last = count + 1, time
    return count / ((end - start) / beat)


def has_drums(wav, sample_rate: int, beat: float) -> bool:
    """Whether a mix (L,) has DRUMS strokes per beat or more."""
    seconds = len(wav) / sample_rate
    return strokes_per_beat(strokes(wav, sample_rate), beat, 0.0, seconds) >= DRUMS


def drum_figures(pieces, sample_rate: int, part: float = 5.0) -> dict:
    """Figures of pieces with drums, (mix (L,), s of a beat) each, all of one length, `part` by `part`.

    strokes_per_beat_0_to_5s ...    mean over the pieces
    drums_vanish                    share of pieces without any stroke in the last part
    """
    seconds = len(pieces[0][0]) / sample_rate
    parts = max(1, round(seconds / part))
    edges = np.linspace(0.0, seconds, parts + 1)
    figures, vanish = {}, []
    table = []
    for wav, beat in pieces:
        times = strokes(wav, sample_rate)
        table.append([strokes_per_beat(times, beat, a, b) for a, b in zip(edges, edges[1:])])
        vanish.append(not (times >= edges[-2]).any())
    for mean, a, b in zip(np.mean(table, axis=0), edges, edges[1:]):
        figures[f"strokes_per_beat_{a:.0f}_to_{b:.0f}s"] = float(mean)
    return figures | {"drums_vanish": float(np.mean(vanish))}
