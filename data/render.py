"""Tunes as notes -> recordings of them: what data/tunes.py makes its clips of.

    tune = tunes_of("test")[0]                          # of tunes.txt: 360 folk and classical melodies
    truth = draw_truth(tune, rng)                       # who plays what, how fast, in which key: ground truth
    mix, melody = render_clip(tune, truth, seconds, sample_rate, rng)       # waves (L,)
    notes = melody_notes(tune, truth, seconds)          # (start s, length s, midi pitch) of each

The sound of each note comes from data/sampler.py, captions from data/describe.py. Everything random comes
from the generators that are given: the same generator makes the same clip.
"""
import functools
import hashlib
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from scipy.signal import oaconvolve

from data.notes import PITCHES, above_c, octaves_up, parse_bars
from data.sampler import BASS, INSTRUMENTS, note, stroke

TEST_TUNES, VALID_TUNES = 100, 20       # all others are for training
TEMPI = {"slow": (73, 77), "medium": (97, 103), "fast": (146, 154)}     # bpm; a 6/8 beat is a dotted quarter
MIN_NOTE = 0.17                         # s, mean; busier tunes are slower: chroma frames have to follow
BAR = {"2/4": 2, "3/4": 3, "4/4": 4, "6/8": 2}  # beats
KEYS = {
    "major": "C Db D Eb E F F# G Ab A Bb B".split(),
    "minor": "C C# D Eb E F F# G G# A Bb B".split(),
}
SOURCES = {
    "Aird": "James Aird, A Selection of Scotch, English, Irish and Foreign Airs (Glasgow, 1782-1803)",
    "O'Neill": "Francis O'Neill, Music of Ireland (Chicago, 1903)",
    "Ryan": "William Bradbury Ryan, Mammoth Collection (Boston, 1883)",
}


# --- the tunes --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Tune:
    """One melody as written. A beat is a quarter note, in 6/8 a dotted quarter."""
    id: str
    title: str
    origin: str
    key: str        # name of the tonic, such as "G" or "Bb"
    mode: str       # "major" or "minor"
    metre: str      # "2/4", "3/4", "4/4" or "6/8"
    genre: str
    upbeat: float   # beats before the first bar line
    notes: tuple    # of (midi pitch or None for a rest, length in beats); together a whole number of bars

    @property
    def bar(self) -> int:
        """Beats in a bar."""
        return BAR[self.metre]

    @property
    def tonic(self) -> int:
        """Pitch class of the key, C = 0."""
        natural = PITCHES[self.key[0].lower()]
        return (natural + self.key.count("#") - self.key.count("b")) % 12

    @property
    def beats(self) -> float:
        return sum(length for _, length in self.notes)

    @property
    def pitches(self) -> list:
        return [pitch for pitch, _ in self.notes if pitch is not None]


@functools.lru_cache(maxsize=1)
def load_tunes() -> list[Tune]:
    """All tunes of tunes.txt, in its order. Raises UserError naming a wrong note."""
    lines = Path(__file__).with_name("tunes.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    tunes = []
    for header, text in zip(lines[::2], lines[1::2]):
        title, origin, key, metre, genre = header.split(" | ")
        tonic, mode = key.split()
        notes, bars = parse_bars(text, eighths_per_beat=3 if metre == "6/8" else 2)
        source, _, number = origin.partition(" ")
        if source in SOURCES:
            origin = SOURCES[source]
            if number:
                origin += f", {number}"
        name = title.lower().replace("'", "")
        name = re.sub("[^a-z0-9]+", "-", name).strip("-")
        upbeat = bars[0] % BAR[metre]
        tunes.append(Tune(name, title, origin, tonic, mode, metre, genre, upbeat, tuple(notes)))
    return tunes


def tunes_of(split: str) -> list[Tune]:
    """The tunes of "train", "valid" or "test". A tune's split depends on its name alone."""
    def order(tune):    # README's example comes first, so that it is a test tune
        return tune.id != "ode-to-joy", hashlib.sha256(tune.id.encode()).hexdigest()
    ranked = sorted(load_tunes(), key=order)
    held_out = TEST_TUNES + VALID_TUNES
    if split == "test":
        return ranked[:TEST_TUNES]
    if split == "valid":
        return ranked[TEST_TUNES:held_out]
    return ranked[held_out:]


# --- who plays what when ----------------------------------------------------------------------------------

def triads(tune: Tune) -> list[tuple]:
    """The triad of each bar that most of its notes belong to: (root, pitch class as written; third)."""
    # degrees that may be roots, in semitones above the tonic: a head start in beats
    degrees, minor = {0: 0.2, 5: 0.1, 7: 0.15, 9: 0.0, 2: 0.0}, {9, 2}
    if tune.mode == "minor":
        degrees, minor = {0: 0.2, 5: 0.1, 7: 0.1, 3: 0.05, 10: 0.05}, {0, 5}
    weights = np.zeros((math.ceil(tune.beats / tune.bar) + 1, 12))
    start = -tune.upbeat
    for pitch, length in tune.notes:
        if pitch is not None:
            on_bar_line = start % tune.bar == 0
            bar = int(start // tune.bar) + 1
            weights[bar, (pitch - tune.tonic) % 12] += length + on_bar_line
        start += length
    chords = []
    for bar in weights[1:]:     # the upbeat has none
        score = {}
        for root, bias in degrees.items():
            third = (root + (3 if root in minor else 4)) % 12
            fifth = (root + 7) % 12
            score[root] = bar[root] + bar[third] + bar[fifth] + bias
        best = max(score, key=score.get)
        chords.append(((best + tune.tonic) % 12, 3 if best in minor else 4))
    bars = round(tune.beats / tune.bar)
    if bars == 1:
        return chords[:1]
    return chords[:bars - 1] + [(tune.tonic, 3 if tune.mode == "minor" else 4)]


def schedule(tune: Tune, bpm: float, seconds: float, first_bar: int = 0):
    """What sounds when: ([(start s, length s, midi)], [(start of a bar in s, triad)]); the tune is repeated.

    From bar 0 it begins with its upbeat, from a later bar on the bar line.
    """
    beat = 60 / bpm
    origin = first_bar * tune.bar if first_bar else -tune.upbeat
    chords = triads(tune)
    notes, bars = [], []
    for turn in range(math.ceil(seconds / beat / tune.beats) + 2):
        start = -tune.upbeat
        for pitch, length in tune.notes:
            at = (start - origin + turn * tune.beats) * beat
            if pitch is not None and -1e-9 <= at < seconds - 0.05:
                notes.append((max(at, 0.0), length * beat, pitch))
            start += length
        for n, chord in enumerate(chords):
            at = (n * tune.bar - origin + turn * tune.beats) * beat
            if -1e-9 <= at < seconds - 0.05:
                bars.append((max(at, 0.0), chord))
    return notes, bars


# --- what is played: the ground truth of a clip -------------------------------------------------------------

CHORDS = {      # how chords are played, and on what
    "held": ("organ", "choir", "violin", "synth"),
    "strummed": ("guitar",),
    "broken": ("piano", "harp", "guitar"),
}


def draw_truth(tune: Tune, rng: np.random.Generator) -> dict:
    """Instrument, tempo, key, accompaniment, loudness and first bar of a clip: its ground truth."""
    def pick(options):
        return options[int(rng.integers(len(options)))]

    mean_note = tune.beats / len(tune.pitches)  # beats
    tempi = [name for name, (low, _) in TEMPI.items() if name == "slow" or mean_note * 60 / low >= MIN_NOTE]
    tempo = pick(tempi)
    low, high = TEMPI[tempo]
    chords = pick(list(CHORDS)) if rng.random() < 0.4 else None
    phrases = (round(tune.beats / tune.bar) - 1) // 4 + 1       # of four bars
    return {
        "tune": tune.id,
        "instrument": pick(list(INSTRUMENTS)),
        "bpm": int(rng.integers(low, high + 1)),
        "tempo": tempo,
        "drums": bool(rng.integers(2)),
        "bass": bool(rng.integers(2)),
        "chords": chords,
        "chords_on": pick(CHORDS[chords]) if chords else None,
        "soft": bool(rng.random() < 0.15),
        "key": KEYS[tune.mode][rng.integers(12)],
        "mode": tune.mode,
        "metre": tune.metre,
        "genre": tune.genre,
        "first_bar": 4 * int(rng.integers(phrases)),
    }


def transposition(tune: Tune, truth: dict, seconds: float) -> int:
    """Semitones from a tune as written to a clip of it: to its key, and to the octave of its instrument.

    A melody is told in one register (`octaves_up` in data/notes.py), and each instrument plays it in that, or
    always an octave lower or higher: so the notes that are told say which are played.
    """
    to_key = KEYS[tune.mode].index(truth["key"]) - tune.tonic
    notes, _ = schedule(tune, truth["bpm"], seconds, truth["first_bar"])
    sounding = []           # the note of every 0.02 s
    for _, length, pitch in notes:
        sounding += round(length / 0.02) * [above_c(pitch + to_key, 12)]
    octave = INSTRUMENTS[truth["instrument"]].octave
    return to_key + 12 * (octave + octaves_up(torch.tensor(sounding), 12))


def melody_notes(tune: Tune, truth: dict, seconds: float) -> list[tuple]:
    """(start s, length s, midi pitch) of each note of the melody that a clip has."""
    shift = transposition(tune, truth, seconds)
    notes, _ = schedule(tune, truth["bpm"], seconds, truth["first_bar"])
    return [(start, length, pitch + shift) for start, length, pitch in notes]


def melody_abc(tune: Tune, truth: dict, seconds: float) -> str:
    """The melody of a clip as an .abc file, which data/scores.py reads; it begins where the clip does."""
    shift = transposition(tune, truth, seconds)
    first = tune.upbeat + truth["first_bar"] * tune.bar if truth["first_bar"] else 0        # beats
    starts = np.cumsum([0, *(length for _, length in tune.notes)])
    split = int(np.searchsorted(starts, first - 1e-6))
    notes = list(tune.notes[split:] + tune.notes[:split])
    tied = starts[split] - first
    if tied > 1e-6:           # a note that began before the clip is not heard in it
        pitch, length = notes.pop()
        notes = [(None, tied), *notes, (pitch, length - tied)]
    eighths = 3 if tune.metre == "6/8" else 2
    words = []
    for pitch, beats in notes:
        length = Fraction(beats * eighths).limit_denominator(48)
        name = "z" if pitch is None else abc_note(pitch + shift)
        words.append(f"{name}{length}")
    tempo = "3/8" if tune.metre == "6/8" else "1/4"
    return f"X:1\nT:{tune.title}\nM:{tune.metre}\nL:1/8\nQ:{tempo}={truth['bpm']}\nK:C\n{' '.join(words)}\n"


def abc_note(pitch: int) -> str:
    """A midi pitch as ABC writes it: ^c' is C sharp an octave above middle C's."""
    name = "C ^C D ^D E F ^F G ^G A ^A B".split()[pitch % 12]
    octave = pitch // 12 - 5        # of middle C: 0
    name = name if name[0] == "^" else "=" + name       # accidentals hold up to the bar line
    return name.lower() + "'" * (octave - 1) if octave > 0 else name + "," * -octave


# --- how it sounds ------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=8)
def room(sample_rate: int) -> np.ndarray:
    """Impulse response of a small room: the direct sound and 0.3 s of soft noise."""
    time = np.arange(int(0.3 * sample_rate)) / sample_rate
    noise = np.random.default_rng(5).standard_normal(len(time))
    tail = np.convolve(noise, np.ones(4) / 4, "same")
    tail *= np.exp(-time / 0.07) * np.clip(time / 0.01, 0, 1)
    response = 0.3 * tail / np.sqrt(np.sum(tail ** 2))
    response[0] = 1
    return response.astype(np.float32)


def add(track: np.ndarray, sound: np.ndarray, start: float, sample_rate: int, gain: float):
    """Adds a sound to track (L,) at `start` seconds."""
    at = round(start * sample_rate)
    sound = sound[:max(0, len(track) - at)]
    track[at:at + len(sound)] += np.float32(gain) * sound


def in_room(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    return oaconvolve(wave, room(sample_rate))[:len(wave)].astype(np.float32)


def accent(beats: float, bar: int) -> float:
    """How loud a note is played that begins so many beats from a bar line."""
    def whole(number):
        return abs(number - round(number)) < 0.01
    if whole(beats / bar):
        return 1.0
    return 0.9 if whole(beats) else 0.8


def add_bass(track, root: int, bar: int, start: float, beat: float, sample_rate: int):
    """One bar of root and fifth in turn, below the melody, a note a beat."""
    low = BASS.low + (root - BASS.low) % 12
    fifth = low + 7 if low < 40 else low - 5
    for i in range(bar):
        sound = note("bass", low if i % 2 == 0 else fifth, 0.9 * beat, sample_rate)
        add(track, sound, start + i * beat, sample_rate, 0.6)


def add_chord(track, root: int, third: int, style: str, name: str, tune: Tune, start: float, beat: float,
              sample_rate: int):
    """One bar of a triad around middle C: its root's pitch class, the semitones of its third."""
    low = 48 + (root - 48) % 12 if name != "violin" else 55 + (root - 55) % 12      # no violin is lower
    pitches = (low, low + third, low + 7)
    if style == "held":
        for pitch in pitches:
            add(track, note(name, pitch, tune.bar * beat, sample_rate, 0.6), start, sample_rate, 0.5)
    elif style == "strummed":
        for i in range(tune.bar):
            loudness = 0.8 if i == 0 else 0.6
            for n, pitch in enumerate((*pitches, low + 12)):    # one string after the other
                sound = note(name, pitch, beat, sample_rate, loudness)
                add(track, sound, start + i * beat + 0.015 * n, sample_rate, 0.4)
    else:
        each = beat / (3 if tune.metre == "6/8" else 2)
        for i in range(round(tune.bar * beat / each)):
            pitch = pitches[(0, 2, 1, 2)[i % 4]]
            add(track, note(name, pitch, 2 * each, sample_rate, 0.7), start + i * each, sample_rate, 0.6)


def add_drums(track, tune: Tune, hats: int, start: float, beat: float, sample_rate: int, rng):
    """One bar: kick on the strong beats, snare on the others, `hats` hi-hats a beat."""
    for i in range(tune.bar):
        loud = rng.uniform(0.85, 1.0)
        strong = i == 0 or (i == 2 and tune.bar == 4)
        sound = stroke("kick" if strong else "snare", sample_rate)
        add(track, sound, start + i * beat, sample_rate, (3.5 if strong else 2.5) * loud)
        for n in range(hats):
            level = 1.2 if n == 0 else 0.7
            add(track, stroke("hat", sample_rate), start + (i + n / hats) * beat, sample_rate, level * loud)


def render_clip(tune: Tune, truth: dict, seconds: float, sample_rate: int, rng: np.random.Generator):
    """The clip of a tune that `truth` describes (see `draw_truth`) -> (mix (L,), melody alone (L,)), float32.

    Within [-0.9, 0.9]; the melody is as loud in both.
    """
    beat = 60 / truth["bpm"]
    upbeat = 0 if truth["first_bar"] else tune.upbeat
    L = int(seconds * sample_rate)
    touch = 0.5 if truth["soft"] else 1.0
    phrases = rng.uniform(0.8, 1.0, math.ceil(seconds / beat / tune.bar / 4) + 1)   # loudness of four bars

    melody = np.zeros(L, np.float32)
    for start, length, pitch in melody_notes(tune, truth, seconds):
        beats = start / beat - upbeat
        loudness = accent(beats, tune.bar) * phrases[max(0, int(beats / tune.bar / 4))]
        sound = note(truth["instrument"], pitch, length, sample_rate, touch * loudness)
        add(melody, sound, start, sample_rate, 1.0)
    melody = in_room(melody, sample_rate)

    _, bars = schedule(tune, truth["bpm"], seconds, truth["first_bar"])
    shift = transposition(tune, truth, seconds)
    hats = int(rng.choice([1, 3] if tune.metre == "6/8" else [1, 2]))
    chords, rest = np.zeros(L, np.float32), np.zeros(L, np.float32)
    for start, (root, third) in bars:
        root = (root + shift) % 12
        if truth["chords"]:
            add_chord(chords, root, third, truth["chords"], truth["chords_on"], tune, start, beat,
                      sample_rate)
        if truth["bass"]:
            add_bass(rest, root, tune.bar, start, beat, sample_rate)
        if truth["drums"]:
            add_drums(rest, tune, hats, start, beat, sample_rate, rng)
    if truth["chords"]:
        rest += in_room(chords, sample_rate)

    mix = melody + touch ** 2 * rest        # 0.25 of it; a soft melody keeps 0.32 to 0.48 of its level
    peak = max(np.abs(mix).max(), np.abs(melody).max(), 1e-9)
    loudness = np.sqrt(np.mean(mix ** 2)) + 1e-9
    target = rng.uniform(0.03, 0.05) if truth["soft"] else rng.uniform(0.08, 0.13)
    gain = np.full(L, min(target / loudness, 0.9 / peak), np.float32)
    gain *= np.minimum(1, np.arange(L, 0, -1) / (0.05 * sample_rate))       # no click at the end
    return tuple(np.clip(wave * gain, -0.9, 0.9) for wave in (mix, melody))     # the peak may be rounded up
