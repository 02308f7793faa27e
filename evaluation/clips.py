"""What --eval asks for: clips of tunes with their notes, captions, and recordings unlike all training clips.

    asked = clip(config, "test", 0)             # its truth, mix, melody and notes
    text = caption(asked.truth, rng)

Everything comes from the notes of tunes that training has not seen, rendered anew: what was played is known.
"""
from typing import NamedTuple

import numpy as np

from config import Config
from data import render
from data.describe import describe
from data.segments import SPLITS


class Clip(NamedTuple):
    """A tune as rendered. Of a truth see `draw_truth` in data/render.py."""
    truth: dict
    mix: np.ndarray         # (L,)
    melody: np.ndarray      # the melody alone (L,)
    notes: list             # of the melody: (start s, length s, midi pitch)

    @property
    def beat(self) -> float:
        """Seconds."""
        return 60 / self.truth["bpm"]


def clip(config: Config, split: str, number: int, seconds: float | None = None, **changes) -> Clip:
    """Clip `number` of a split, of segment_duration or so many seconds. changes: of its truth."""
    rng = np.random.default_rng([7, SPLITS.index(split), number])
    tunes = render.tunes_of(split)
    tune = tunes[number % len(tunes)]
    truth = render.draw_truth(tune, rng) | changes
    seconds = seconds or config.segment_duration
    mix, melody = render.render_clip(tune, truth, seconds, config.sample_rate, rng)
    notes = []
    for start, length, pitch in render.melody_notes(tune, truth, seconds):
        notes.append((start, min(length, seconds - start), pitch))
    return Clip(truth, mix, melody, notes)


def other_instrument(truth: dict, places: int) -> str:
    """The instrument so many places after that of a truth, in a circle."""
    names = list(render.INSTRUMENTS)
    return names[(names.index(truth["instrument"]) + places) % len(names)]


def caption(truth: dict, rng) -> str:
    """A caption in the words of the data set that leaves out neither tempo nor drums (no word: no drums)."""
    while True:
        text = describe(truth, rng)
        if str(truth["bpm"]) in text:
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
    """The tune of a clip, recorded unlike any clip -> wave (L,), its notes.

    One of VOICES, up to 30 cents out of tune, in every other recording doubled an octave below, with noise
    20 dB below the music.
    """
    rng = np.random.default_rng([8, SPLITS.index(split), number])
    tunes = render.tunes_of(split)
    tune = tunes[number % len(tunes)]
    bpm = float(rng.uniform(70, 120))
    key = render.KEYS[tune.mode][int(rng.integers(12))]
    voice = VOICES[int(rng.integers(len(VOICES)))]
    seconds, rate = config.segment_duration, config.sample_rate
    truth = {"instrument": "flute", "key": key, "bpm": bpm, "first_bar": 0}
    transpose = render.transposition(tune, truth, seconds)
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
    up = transpose + 12 * voice.octaves
    return wave, [(start, min(length, seconds - start), pitch + up) for start, length, pitch in notes]


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
