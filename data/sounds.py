"""Clips that are no music, for the codec alone: silence, single notes, sines, strokes of drums.

    wave = draw_sounds(11.0, 16000, rng)        # (L,)

Songs alone teach a codec that there is always something, and nothing above the highest melody.
"""
import numpy as np

from data.sampler import PLAYED, STROKES, note, stroke


def draw_sounds(seconds: float, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """A clip of one of the four kinds, at any level down to silence."""
    draw = (silence, notes, sines, strokes)[rng.choice(4, p=(0.1, 0.35, 0.4, 0.15))]
    wave = draw(round(seconds * sample_rate), sample_rate, rng)
    level = 10 ** rng.uniform(-2.0, -0.1)
    return (wave * level / max(1e-3, np.abs(wave).max())).astype(np.float32)


def silence(L: int, sample_rate: int, rng) -> np.ndarray:
    """Nothing, or next to nothing: the faint noise of a room without music."""
    return rng.choice([0.0, 0.0, 1e-5]) * rng.standard_normal(L)


def notes(L: int, sample_rate: int, rng) -> np.ndarray:
    """Notes of one instrument over all that it can play, alone, two or three at once, with rests."""
    out = np.zeros(L)
    name = rng.choice(list(PLAYED))
    at = rng.uniform(0, 0.5)
    while at * sample_rate < L:
        length = 10 ** rng.uniform(-0.9, 0.4)           # 0.13 to 2.5 s
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            pitch = int(rng.integers(PLAYED[name].low, PLAYED[name].high + 8))
            sound = note(name, pitch, length, sample_rate, rng.uniform(0.3, 1))
            start = round(at * sample_rate)
            sound = sound[:L - start]
            out[start:start + len(sound)] += sound
        at += length + rng.choice([0.0, 0.1, 1.0])
    return out


def sines(L: int, sample_rate: int, rng) -> np.ndarray:
    """Steady sines of C2 to C8, one after the other, each faded in and out."""
    out = np.zeros(L)
    at = 0
    while at < L:
        n = round(10 ** rng.uniform(-0.6, 0.3) * sample_rate)           # 0.25 to 2 s
        hertz = 440 * 2 ** ((rng.uniform(36, 108) - 69) / 12)
        fade = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.01 * sample_rate))
        wave = 10 ** rng.uniform(-1, 0) * fade * np.sin(2 * np.pi * hertz * np.arange(n) / sample_rate)
        out[at:at + n] += wave[:L - at]
        at += n + round(rng.choice([0, 0.3]) * sample_rate)
    return out


def strokes(L: int, sample_rate: int, rng) -> np.ndarray:
    """Drums alone, a stroke on each beat or not."""
    out = np.zeros(L)
    beat = rng.uniform(0.15, 0.6)
    for n in range(int(L / sample_rate / beat)):
        if rng.random() < 0.8:
            sound = stroke(rng.choice(STROKES), sample_rate) * rng.uniform(0.4, 1)
            start = round(n * beat * sample_rate)
            out[start:start + len(sound)] += sound[:L - start]
    return out
