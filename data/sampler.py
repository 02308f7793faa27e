"""Recorded notes -> a note of any pitch, length and loudness: what data/render.py makes its clips of.

    wave = note("piano", 60, 1.5, 16000)                # (L,) middle C, held for 1.5 s, and its release
    wave = stroke("snare", 16000)

The recordings are in data/instruments: a few notes of each instrument, from which those in between are
resampled. A blown, bowed or sung note that is held longer than its recording goes on with the middle of it.
"""
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import lfilter, resample

FOLDER = Path(__file__).parent / "instruments"
LONGEST = 4.0           # s, of a held note
JOIN = 0.3              # s, in which one round of a held note fades into the next
SETTLED = 1.0           # s; from here on a held note is steady
SOFT = 1200.0           # Hz, above which a soft note is weaker


@dataclass(frozen=True)
class Instrument:
    """How an instrument is played."""
    low: int            # what it plays, midi pitches
    high: int
    release: float      # s that a note takes to end
    held: bool = True   # goes on as long as it is held; else it dies away by itself
    octave: int = 0     # of its melodies: above the register that melodies are told in


INSTRUMENTS = {
    "flute": Instrument(60, 86, 0.08),
    "violin": Instrument(57, 86, 0.10),
    "cello": Instrument(41, 67, 0.12, octave=-1),
    "guitar": Instrument(50, 76, 0.12, held=False),
    "harp": Instrument(52, 84, 0.5, held=False),
    "piano": Instrument(52, 84, 0.15, held=False),
    "organ": Instrument(50, 80, 0.10),
    "clarinet": Instrument(53, 81, 0.06),
    "trumpet": Instrument(57, 81, 0.07),
    "glockenspiel": Instrument(72, 93, 0.5, held=False, octave=1),
    "choir": Instrument(52, 77, 0.15),
    "synth": Instrument(52, 84, 0.05),
}
BASS = Instrument(33, 47, 0.08, held=False)
PLAYED = INSTRUMENTS | {"bass": BASS}
STROKES = ("kick", "snare", "hat", "open_hat", "tom", "crash", "ride", "shaker")


@functools.cache
def about() -> dict:
    """Of each instrument the pitches that are recorded, of the drums the strokes, and the seconds of one."""
    return json.loads((FOLDER / "notes.json").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=64)
def recordings(name: str, sample_rate: int) -> tuple:
    """The recorded notes (or strokes) of a file in data/instruments, each (L,) at this rate."""
    wave, rate = soundfile.read(FOLDER / f"{name}.ogg", dtype="float32")
    slots = wave.reshape(-1, round(about()[name]["seconds"] * rate))
    L = round(slots.shape[1] * sample_rate / rate)
    return tuple(resample(slot, L).astype(np.float32) for slot in slots)


@functools.lru_cache(maxsize=2048)
def whole_note(name: str, pitch: int, sample_rate: int) -> np.ndarray:
    """A note as long as it can sound, at most LONGEST: as loud as any other in its first half second.

    Raises ValueError for one that is held, and so far above the recorded ones that nothing steady is left.
    """
    pitches = np.array(about()[name]["pitches"])
    nearest = int(np.abs(pitches - pitch).argmin())
    wave = recordings(name, sample_rate)[nearest]
    ratio = 2 ** ((pitch - pitches[nearest]) / 12)
    wave = resample(wave, round(len(wave) / ratio)).astype(np.float32)
    loud = np.abs(wave) > 0.1 * np.abs(wave).max()
    start = max(0, int(loud.argmax()) - round(0.01 * sample_rate))      # notes begin when they are due
    wave = wave[start:]
    if PLAYED[name].held:
        if len(wave) < (SETTLED + JOIN + 0.1) * sample_rate:
            raise ValueError(f"{name}: midi pitch {pitch} is too far above its recordings, "
                             f"{pitches[0]} to {pitches[-1]}")
        wave = sustained(wave, sample_rate)
    head = wave[:sample_rate // 2]
    return wave / np.sqrt(np.mean(head ** 2) + 1e-9)


def sustained(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """A note (L,) that goes on for LONGEST: its steady part again and again, each fading into the next."""
    first, join = round(SETTLED * sample_rate), round(JOIN * sample_rate)
    last = len(wave) - round(0.05 * sample_rate)        # its end is faded out
    rise = np.sin(np.pi / 2 * np.arange(join) / join).astype(np.float32)
    out, fall = wave[:last].copy(), rise[::-1]
    while len(out) < LONGEST * sample_rate:
        out[-join:] = out[-join:] * fall + wave[first:first + join] * rise
        out = np.concatenate([out, wave[first + join:last]])
    return out[:round(LONGEST * sample_rate)]


def note(name: str, pitch: int, seconds: float, sample_rate: int, loudness: float = 1.0) -> np.ndarray:
    """A note held for so many seconds, then its release: (L,). loudness: 1 as recorded, less also darker."""
    sound = whole_note(name, pitch, sample_rate)
    fade = round(PLAYED[name].release * sample_rate)
    sound = sound[:round(seconds * sample_rate) + fade].copy()
    fade = min(fade, len(sound))
    sound[len(sound) - fade:] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(fade, dtype=np.float32) / fade)
    if loudness < 1:
        decay = np.exp(-2 * np.pi * SOFT / sample_rate)
        dark = lfilter([1 - decay], [1, -decay], sound)
        sound = loudness * (loudness * sound + (1 - loudness) * dark)
    return sound.astype(np.float32)


def stroke(name: str, sample_rate: int) -> np.ndarray:
    """One stroke of the drum kit, (L,), its peak at 1."""
    wave = recordings("drums", sample_rate)[about()["drums"]["strokes"].index(name)]
    return wave / np.abs(wave).max()
