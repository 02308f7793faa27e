"""Which notes does one hear? The notes that were to be played, against those that a pitch tracker finds.

    notes = [(0.0, 0.5, 69), (0.5, 0.25, 71)]           # (start s, length s, midi pitch)
    heard = heard_pitches(wav, 16000, notes)            # midi pitches (N,), NaN for none
    figures = note_figures([(wav, notes)], 16000)       # what --eval reports of many pieces

The tracker is YIN (de Cheveigne and Kawahara 2002): it looks for the period of the wave, and tells octaves
apart. It has nothing in common with the chroma or the harmonic sum by which a model is told its melodies.
It follows one voice: drums are taken out before (hpss of data/stems.py), bass and chords must not be there.
What it gets wrong itself are notes that ring on into the next ones (glockenspiel), short notes after a slow
release, and the octave of low notes.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import lfilter, resample_poly

from data.stems import hpss

LOWEST, HIGHEST = 75.0, 2700.0      # Hz, of the notes that are looked for: D2 to E7
WINDOW = 0.032                      # s, that differences are summed over
HOP = 0.008                         # s from frame to frame
PERIODIC = 0.15                     # YIN's threshold: step 4 of the paper
MARGIN = 0.2                        # a dip so much less deep than the deepest counts as deep, too
ABSENT = 20.0                       # dB
CLEAN = 0.05                        # d of a note that nothing else sounds with
VOICED = 0.4                        # a frame that is less periodic than this has no pitch
FUNDAMENTAL = 500.0                 # Hz; partials above are weakened, lest those of bells be taken for notes
SHORT = 0.22                        # s
SHORTEST = 0.06                     # s; less of a note is not judged
LEAP = 7                            # semitones
STRUCK = 2.0                        # dB by which a note gets louder where it is struck again


# --- the pitch tracker ----------------------------------------------------------------------------------

def one_voice(wav, sample_rate: int):
    """Mix (L,) -> its melody (L,): without drums, and with weaker high partials."""
    harmonic = hpss(torch.as_tensor(wav, dtype=torch.float32), sample_rate)
    decay = math.exp(-2 * math.pi * FUNDAMENTAL / sample_rate)
    return lfilter([1], [1, -decay], harmonic.numpy()).astype(np.float32)


def yin(wav, sample_rate: int):
    """Wave (L,) -> midi pitch of each frame (M,), NaN without one, and d (M,); frame m is around m * HOP s.

    d(t) = sum_j (x_j - x_{j+t})^2 is small where t is a period. Divided by the mean of d(1) ... d(t), so
    that it begins at 1, the first dip below PERIODIC is the period (steps 2 to 5 of the paper).
    """
    if sample_rate < 32_000:        # at 16 kHz the period of a high note is seven samples
        wav = resample_poly(wav, 2, 1)
        sample_rate *= 2
    window = round(WINDOW * sample_rate)
    hop = round(HOP * sample_rate)
    longest = round(sample_rate / LOWEST)
    side = (window + longest) // 2
    wav = F.pad(torch.as_tensor(wav, dtype=torch.float32), (side, side + hop))
    frames = wav.unfold(0, window + longest, hop)                       # (M, window + longest)
    n_fft = 2 ** math.ceil(math.log2(window + longest) + 1)
    spectrum = torch.fft.rfft(frames, n_fft)
    head = torch.fft.rfft(frames[:, :window], n_fft)
    product = torch.fft.irfft(spectrum * head.conj(), n_fft)[:, :longest]       # sum_j x_j x_{j+t}
    total = F.pad(frames.double().square().cumsum(1), (1, 0))
    energy = (total[:, window:window + longest] - total[:, :longest]).float()   # sum_j x_{j+t}^2
    difference = (energy[:, :1] + energy - 2 * product).clamp(min=0)[:, 1:]
    mean = difference.cumsum(1) / torch.arange(1, longest)
    return _pitch_of(difference / mean.clamp(min=1e-9), sample_rate)


def _pitch_of(normalized, sample_rate: int):
    """Normalized d(t) (M, lags from 1) -> pitch (M,) and d there: of the first dip that is deep enough."""
    before, at, after = normalized[:, :-2], normalized[:, 1:-1], normalized[:, 2:]      # lags from 2
    dip = (at < before) & (at <= after)
    dip[:, :int(sample_rate / HIGHEST) - 2] = False
    depth = torch.where(dip, at, torch.inf)
    low = depth <= (depth.amin(1, keepdim=True) + MARGIN).clamp(min=PERIODIC)
    place = low.int().argmax(1)
    row = torch.arange(len(place))
    before, at, after = (values[row, place] for values in (before, at, after))
    shift = (before - after) / (2 * (before - 2 * at + after)).clamp(min=1e-9)  # to the parabola's vertex
    period = (place + 2 + shift) / sample_rate
    pitch = 69 - 12 * torch.log2(440 * period)
    return torch.where(at < VOICED, pitch, torch.nan).numpy(), at.numpy()


def heard_pitches(wav, sample_rate: int, notes) -> np.ndarray:
    """Mix (L,) and N notes -> the pitch heard in each (N,), NaN for none.

    The median of its frames, in the octave that its partials say.
    """
    voice = one_voice(wav, sample_rate)
    heard = []
    for start, length, _ in notes:
        first, end = start + 0.25 * length, start + 0.9 * length        # before, the last one may still sound
        begin = max(0.0, first - WINDOW)
        part = voice[round(begin * sample_rate):round((end + WINDOW) * sample_rate)]
        pitch, depth = median_pitch(part, sample_rate, first - begin, end - begin)
        if heard and not math.isnan(heard[-1]) and depth > CLEAN:
            rest = without_note(part, sample_rate, heard[-1])
            other, other_depth = median_pitch(rest, sample_rate, first - begin, end - begin)
            if other_depth < depth:
                pitch = other
        part = wav[round(first * sample_rate):round(end * sample_rate)]
        heard.append(pitch if math.isnan(pitch) else true_pitch(part, sample_rate, pitch))
    return np.array(heard)


def median_pitch(voice, sample_rate: int, first: float, end: float):
    """Medians of pitch and d of a wave (L,) between two times (s); NaN and 1 if hardly any has a pitch."""
    pitch, depth = yin(voice, sample_rate)
    frames = slice(round(first / HOP), max(round(first / HOP) + 1, round(end / HOP)))
    pitch, depth = pitch[frames], depth[frames]
    voiced = pitch[~np.isnan(pitch)]
    if len(voiced) == 0 or len(voiced) < len(pitch) / 3:
        return math.nan, 1.0
    return float(np.median(voiced)), float(np.median(depth))


def without_note(voice, sample_rate: int, pitch: float):
    """A wave (L,) without a note that rings on: less itself one period ago (de Cheveigne 1993)."""
    period = 1 / (440 * 2 ** ((pitch - 69) / 12))       # s
    spectrum = np.fft.rfft(voice)
    frequency = np.fft.rfftfreq(len(voice), 1 / sample_rate)
    spectrum *= 1 - np.exp(-2j * np.pi * frequency * period)
    return np.fft.irfft(spectrum, len(voice)).astype(np.float32)


def true_pitch(wav, sample_rate: int, pitch: float) -> float:
    """The pitch of a note (L,): that given, or of a half, a third or a quarter of its period.

    A multiple of a period is a period, too, and the rest of the note before may tip the scales. But there
    partial 1 is missing, and most of 1, 3 and 5: they are ABSENT dB below the strongest. Of the others it is
    the one whose partials 1 to 3 are strongest together.
    """
    parts = np.arange(1, 5)[:, None]        # of the period
    frequencies = 440 * 2 ** ((pitch - 69) / 12) * parts * np.arange(1, 6)
    turns = np.exp(-2j * np.pi * frequencies[..., None] * np.arange(len(wav)) / sample_rate)
    amplitudes = np.abs(turns @ (wav * np.hanning(len(wav)))) * (frequencies < 0.45 * sample_rate)
    first, odd = amplitudes[0, 0], np.median(amplitudes[0, [0, 2, 4]])
    if max(first, odd) > amplitudes.max() * 10 ** (-ABSENT / 20):
        return pitch
    part = 2 + amplitudes[1:, :3].sum(1).argmax()
    return float(pitch + 12 * math.log2(part))


# --- what is right about the notes ------------------------------------------------------------------------

def right_notes(heard, notes) -> np.ndarray:
    """Pitches heard (N,) and notes -> (N,) bool: within half a semitone, in any octave."""
    pitches = np.array([pitch for _, _, pitch in notes])
    away = (heard - pitches + 6) % 12 - 6
    return np.abs(away) < 0.5       # False for NaN


def octave_leaps(heard, notes) -> int:
    """How often a note is heard more than LEAP semitones from the one before, where the melody moves by less.

    Counted are pairs of notes that are both right but for their octave: what else is wrong is no leap.
    """
    right = right_notes(heard, notes)
    leaps = 0
    for n in range(1, len(notes)):
        if right[n - 1] and right[n]:
            moved = abs(round(heard[n]) - round(heard[n - 1]))
            leaps += moved > LEAP >= abs(notes[n][2] - notes[n - 1][2])
    return leaps


def is_repeated(notes, n: int) -> bool:
    """Whether note n is the one before it once more, without a rest."""
    if n == 0:
        return False
    start, length, pitch = notes[n - 1]
    return pitch == notes[n][2] and abs(start + length - notes[n][0]) < 0.02


def struck_again(wav, sample_rate: int, start: float, pitch: float) -> bool:
    """Whether the note of a pitch is struck around `start` in a mix (L,), and not only held.

    Its first six partials together, heard through 40 ms, get STRUCK dB louder than in the 80 ms before.
    """
    size = round(0.04 * sample_rate)
    hop = round(HOP * sample_rate)
    first = max(0, round((start - 0.13) * sample_rate))
    part = wav[first:round((start + 0.1) * sample_rate) + size]
    frequencies = 440 * 2 ** ((pitch - 69) / 12) * np.arange(1, 7)
    frequencies = frequencies[frequencies < 0.45 * sample_rate]
    time = np.arange(size) / sample_rate
    waves = np.exp(-2j * np.pi * np.outer(time, frequencies)) * np.hanning(size)[:, None]
    if len(part) < size:
        return False
    frames = np.lib.stride_tricks.sliding_window_view(part, size)[::hop]
    level = 10 * np.log10(np.sum(np.abs(frames @ waves) ** 2, axis=1) + 1e-9)
    rises = [level[m] - level[max(0, m - 10):m].min() for m in range(1, len(level))]
    return bool(rises) and max(rises) >= STRUCK


def note_figures(pieces, sample_rate: int, groups=None) -> dict:
    """Figures of pieces, (mix (L,), notes) each, over all their notes; none of notes that there are none of.

    notes_right             share of notes heard at their pitch, in any octave
    notes_right flute ...   of the pieces of each group, where groups names one for each piece
    short_notes_right       of those below SHORT seconds
    repeated_notes_right    of those of the pitch of the one before: right, and struck again
    octave_leaps            in ten seconds, see `octave_leaps`
    """
    right, short, repeated, of_group = [], [], [], {}
    leaps, seconds = 0, 0.0
    for (wav, notes), group in zip(pieces, groups or [None] * len(pieces), strict=True):
        notes = [note for note in notes if note[1] >= SHORTEST]
        heard = heard_pitches(wav, sample_rate, notes)
        correct = right_notes(heard, notes)
        right += list(correct)
        of_group.setdefault(group, []).extend(correct)
        for n, (start, length, _) in enumerate(notes):
            if length < SHORT:
                short.append(correct[n])
            if is_repeated(notes, n):
                again = correct[n] and struck_again(wav, sample_rate, start, heard[n])
                repeated.append(again)
        leaps += octave_leaps(heard, notes)
        seconds += len(wav) / sample_rate
    shares = {"notes_right": right, "short_notes_right": short, "repeated_notes_right": repeated}
    if groups:
        shares |= {f"notes_right {group}": of_group[group] for group in sorted(of_group)}
    figures = {name: float(np.mean(values)) for name, values in shares.items() if values}
    return figures | {"octave_leaps": 10 * leaps / seconds}
