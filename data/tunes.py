"""The embedded data set: 360 public-domain melodies, rendered as audio with captions that say what was rendered.

The notes are in tunes.txt (real folk and classical tunes with title and origin). Every clip is one tune in one key,
tempo and instrument, with or without bass and drums; beside each recording lie a sidecar .json (caption and ground
truth) and the melody alone, the clean source of chroma. Training, validation and test clips share no tune.

    python data/tunes.py                        # data/tunes/{train,valid,test}: about 16 h of music in a few minutes
    python data/tunes.py --one "Ode to Joy" --instrument piano --to ode.wav

Offline and deterministic: clip i of a split is drawn from a generator seeded (seed, split, i), whoever renders it.
"""
import functools
import hashlib
import json
import math
import multiprocessing
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import oaconvolve
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, wherever this is called from
from config import Parser, UserError, run, write_atomic

SPLITS = ("train", "valid", "test")
TEST_TUNES, VALID_TUNES = 100, 20       # all others are for training
TEMPI = dict(slow=(73, 77), medium=(97, 103), fast=(146, 154))  # beats per minute; a 6/8 beat is a dotted quarter
MIN_NOTE = 0.17                         # s, mean; busier tunes get slower tempi, so that chroma frames can follow
BAR = {"2/4": 2, "3/4": 3, "4/4": 4, "6/8": 2}  # beats
PITCHES = dict(c=0, d=2, e=4, f=5, g=7, a=9, b=11)
KEYS = dict(major="C Db D Eb E F F# G Ab A Bb B".split(), minor="C C# D Eb E F F# G G# A Bb B".split())
NOTE = re.compile(r"([a-gr])([#b]?)('*|,*)(\d*)(?:/(\d+))?(~?)")
SOURCES = {"Aird": "James Aird, A Selection of Scotch, English, Irish and Foreign Airs (Glasgow, 1782-1803)",
           "O'Neill": "Francis O'Neill, Music of Ireland (Chicago, 1903)",
           "Ryan": "William Bradbury Ryan, Mammoth Collection (Boston, 1883)"}


# --- the tunes -----------------------------------------------------------------------------------------------

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
        return (PITCHES[self.key[0].lower()] + self.key.count("#") - self.key.count("b")) % 12

    @property
    def beats(self) -> float:
        return sum(length for _, length in self.notes)

    @property
    def pitches(self) -> list:
        return [pitch for pitch, _ in self.notes if pitch is not None]


def parse_notes(text: str, eighths_per_beat: int):
    """Note text -> (notes [(midi or None, beats)], bars [beats]). Raises UserError naming a wrong note."""
    notes, bars, tied = [], [], False
    for bar in text.split("|"):
        total = Fraction(0)
        for word in bar.split():
            match = NOTE.fullmatch(word)
            if not match:
                raise UserError(f"tunes.txt: {word!r} is not a note; write it like c#'3/2")
            letter, accidental, octave, count, part, tie = match.groups()
            length = Fraction(int(count or 1), int(part or 1)) / eighths_per_beat
            shift = {"#": 1, "b": -1, "": 0}[accidental] + 12 * (octave.count("'") - octave.count(","))
            pitch = None if letter == "r" else 60 + PITCHES[letter] + shift
            if tied and notes[-1][0] == pitch:
                notes[-1][1] += length
            else:
                notes.append([pitch, length])
            tied, total = tie == "~", total + length
        bars.append(total)
    return [(pitch, float(length)) for pitch, length in notes], [float(total) for total in bars]


@functools.lru_cache(maxsize=1)
def load() -> list[Tune]:
    """All tunes of tunes.txt, in its order. Raises UserError naming a wrong note."""
    lines = Path(__file__).with_name("tunes.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    tunes = []
    for header, text in zip(lines[::2], lines[1::2]):
        title, origin, key, metre, genre = header.split(" | ")
        notes, bars = parse_notes(text, 3 if metre == "6/8" else 2)
        source, _, number = origin.partition(" ")
        if source in SOURCES:
            origin = SOURCES[source] + (f", {number}" if number else "")
        name = re.sub("[^a-z0-9]+", "-", title.lower().replace("'", "")).strip("-")
        tunes.append(Tune(name, title, origin, *key.split(), metre, genre, bars[0] % BAR[metre], tuple(notes)))
    return tunes


def split(name: str) -> list[Tune]:
    """The tunes of "train", "valid" or "test". A tune's place hangs on its name alone, not on its neighbours."""
    def order(tune):  # the README's example comes first, so that it is a test tune
        return tune.id != "ode-to-joy", hashlib.sha256(tune.id.encode()).hexdigest()
    ranked = sorted(load(), key=order)
    cut = TEST_TUNES + VALID_TUNES
    return dict(test=ranked[:TEST_TUNES], valid=ranked[TEST_TUNES:cut], train=ranked[cut:])[name]


# --- the instruments: each note is a sum of partials ------------------------------------------------------------

@dataclass(frozen=True)
class Instrument:
    """A timbre. Partial n has the level n ** -slope, times `even` for even n, raised near the formant."""
    words: tuple                # what captions call it, the plainest name first
    low: int                    # natural register, midi pitches
    high: int
    partials: tuple             # frequencies over the fundamental's
    slope: float
    attack: float               # s
    release: float              # s
    even: float = 1.0
    formant: float = 0.0        # Hz; 0 is none
    decay: float = 0.0          # s to 1/e of the fundamental, a struck or plucked string; 0 sustains
    decay_slope: float = 0.5    # higher partials die n ** decay_slope times faster
    floor: float = 0.0          # level that partials above the first decay to
    vibrato: float = 0.0        # cents, at 5.5 Hz, setting in after a quarter of a second
    detune: float = 0.0         # cents between two voices that beat against each other
    noise: float = 0.0          # breath (sustained) or hammer (struck), level


def harmonics(n: int) -> tuple:
    return tuple(range(1, n + 1))


INSTRUMENTS = dict(
    flute=Instrument(("flute",), 60, 79, harmonics(6), 2.3, 0.06, 0.06, vibrato=14, noise=0.12),
    violin=Instrument(("violin", "fiddle"), 57, 81, harmonics(20), 1.25, 0.09, 0.08, formant=2600, vibrato=22),
    guitar=Instrument(("guitar", "acoustic guitar", "plucked guitar"), 55, 76, harmonics(16), 0.9, 0.003, 0.08,
                      decay=0.55, decay_slope=0.6, noise=0.03),
    organ=Instrument(("organ", "pipe organ", "church organ"), 55, 77, (1, 2, 3, 4, 6, 8), 0.55, 0.02, 0.07),
    clarinet=Instrument(("clarinet",), 57, 77, harmonics(13), 1.1, 0.035, 0.05, even=0.04),
    trumpet=Instrument(("trumpet",), 57, 79, harmonics(16), 1.1, 0.03, 0.05, formant=1300, vibrato=4),
    bell=Instrument(("bell", "glockenspiel", "chime"), 57, 77, (1, 2.756, 5.404, 8.933), 0.75, 0.002, 0.25,
                    decay=1.3, decay_slope=1.4),
    piano=Instrument(("piano",), 55, 79, tuple(n * math.sqrt(1 + 4e-4 * n * n) for n in harmonics(12)), 1.4, 0.006,
                     0.12, decay=0.8, noise=0.06),  # a stiff string: its partials are stretched
    synth=Instrument(("synth lead", "synthesizer", "synth"), 55, 79, harmonics(20), 0.9, 0.005, 0.04,
                     decay=0.2, decay_slope=0.0, floor=0.35, detune=14))
BASS = Instrument(("bass",), 33, 47, harmonics(5), 1.8, 0.004, 0.06, decay=0.4, noise=0.5)  # plucked: it marks the beat
LONGEST = 4.0                   # s, of a single note
DRUM = 0.4                      # s, of a stroke
TAKES = 2                       # slightly different notes of each pitch; a clip keeps to one take


@functools.lru_cache(maxsize=1024)
def note(instrument: Instrument, pitch: int, take: int, sample_rate: int) -> np.ndarray:
    """One held note, float32 (LONGEST seconds), as loud as any other. Cached: tunes repeat their notes."""
    rng = np.random.default_rng([pitch, take])
    time = np.arange(int(LONGEST * sample_rate), dtype=np.float32) / sample_rate
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    onset = np.clip(time / 0.5 - 0.5, 0, 1)  # of the vibrato
    depth = instrument.vibrato * rng.uniform(0.8, 1.2) / 1200 * math.log(2)
    sway = depth * onset * (1 - np.cos(2 * np.pi * 5.5 * time)) / (2 * np.pi * 5.5)
    phase = 2 * np.pi * frequency * (time + sway)
    voices = (1.0,) if not instrument.detune else tuple(2 ** (c * instrument.detune / 2400) for c in (-1, 1))
    slope = instrument.slope + (0.15 if take % 2 else 0)
    out = np.zeros_like(time)
    for n, ratio in enumerate(instrument.partials, 1):
        hertz = frequency * ratio
        if hertz > 0.45 * sample_rate:
            break
        level = ratio ** -slope * (instrument.even if n % 2 == 0 else 1)
        if instrument.formant:
            level *= 1 + 2.5 * math.exp(-(math.log(hertz / instrument.formant) / 0.6) ** 2)
        envelope = np.float32(level)
        if instrument.decay:
            fall = np.exp(-time * (ratio ** instrument.decay_slope / instrument.decay))
            envelope = level * (instrument.floor + (1 - instrument.floor) * fall)
        if not instrument.decay or instrument.floor:  # blown and bowed: higher partials speak later
            envelope = envelope * (1 - np.exp(-time * (3 / (instrument.attack * (1 + 0.12 * n)))))
        for voice in voices:
            out += envelope * np.sin(ratio * voice * phase + 2.4 * n, dtype=np.float32)
    if instrument.noise:
        hiss = np.convolve(rng.standard_normal(len(time) + 7), np.ones(8) / 8, "valid").astype(np.float32)
        out += 3 * instrument.noise * hiss * (np.exp(-time / 0.012) if instrument.decay else 0.4)
    rise = int(instrument.attack * sample_rate) + 1
    out[:rise] *= 0.5 - 0.5 * np.cos(np.pi * np.arange(rise) / rise)
    head = out[:sample_rate // 2]
    return (out / np.sqrt(np.mean(head ** 2) + 1e-9)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def drum(name: str, sample_rate: int) -> np.ndarray:
    """One stroke of "kick", "snare" or "hat", float32."""
    time = np.arange(int(DRUM * sample_rate)) / sample_rate
    hiss = np.random.default_rng(len(name)).standard_normal(len(time))
    if name == "kick":
        out = 2 * np.sin(2 * np.pi * (50 * time + 2.8 * (1 - np.exp(-time / 0.04)))) * np.exp(-time / 0.12)
    elif name == "snare":
        tone = 0.8 * np.sin(2 * np.pi * 185 * time) * np.exp(-time / 0.04)
        out = np.diff(hiss, prepend=0) * np.exp(-time / 0.14) + tone
    else:
        out = 0.5 * np.diff(hiss, 3, prepend=[0, 0, 0]) / 2.5 * np.exp(-time / 0.08)
    rise = int(0.001 * sample_rate)
    out[:rise] *= np.arange(rise) / rise
    return (out * np.cos(np.pi / 2 * time / DRUM)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def room(sample_rate: int) -> np.ndarray:
    """Impulse response of a small room: the direct sound and 0.3 s of soft noise."""
    time = np.arange(int(0.3 * sample_rate)) / sample_rate
    tail = np.convolve(np.random.default_rng(5).standard_normal(len(time)), np.ones(4) / 4, "same")
    tail *= np.exp(-time / 0.07) * np.clip(time / 0.01, 0, 1)
    response = 0.3 * tail / np.sqrt(np.sum(tail ** 2))
    response[0] = 1
    return response.astype(np.float32)


# --- a clip ------------------------------------------------------------------------------------------------------

def chords(tune: Tune) -> list[int]:
    """The root (0 ... 11, as written) of one triad for each bar: the one that most of the bar's notes belong to."""
    if tune.mode == "major":  # degrees that may be roots, in semitones above the tonic: a head start in beats
        degrees, minor = {0: 0.2, 5: 0.1, 7: 0.15, 9: 0.0, 2: 0.0}, {9, 2}
    else:
        degrees, minor = {0: 0.2, 5: 0.1, 7: 0.1, 3: 0.05, 10: 0.05}, {0, 5}
    weights = np.zeros((math.ceil(tune.beats / tune.bar) + 1, 12))
    start = -tune.upbeat
    for pitch, length in tune.notes:
        if pitch is not None:
            weights[int(start // tune.bar) + 1, (pitch - tune.tonic) % 12] += length + (start % tune.bar == 0)
        start += length
    roots = []
    for bar in weights[1:]:  # the upbeat has none
        score = {root: bar[root] + bar[(root + (3 if root in minor else 4)) % 12] + bar[(root + 7) % 12] + bias
                 for root, bias in degrees.items()}
        roots.append((max(score, key=score.get) + tune.tonic) % 12)
    bars = round(tune.beats / tune.bar)
    return roots[:bars - 1] + [tune.tonic] if bars > 1 else roots[:1]


def fit(tune: Tune, instrument: str, tonic: int) -> int:
    """Semitones that bring a tune to the key of pitch class `tonic`, in the octave that suits the instrument best."""
    play = INSTRUMENTS[instrument]

    def outside(shift):
        low, high = min(tune.pitches) + shift, max(tune.pitches) + shift
        return max(0, play.low - low) + max(0, high - play.high), abs(low + high - play.low - play.high)
    return min((tonic - tune.tonic + octave for octave in (-36, -24, -12, 0, 12, 24)), key=outside)


def schedule(tune: Tune, bpm: float, seconds: float, first_bar: int = 0):
    """What sounds when: ([(start s, length s, midi)], [(start of a bar in s, root)]); the tune goes round and round.

    From bar 0 it begins with its upbeat, from a later bar on the bar line.
    """
    beat, starts, events = 60 / bpm, -tune.upbeat, []
    for pitch, length in tune.notes:
        events.append((starts, length, pitch))
        starts += length
    roots, origin = chords(tune), first_bar * tune.bar if first_bar else -tune.upbeat
    notes, bars = [], []
    for turn in range(math.ceil(seconds / beat / tune.beats) + 2):
        for start, length, pitch in events:
            at = (start - origin + turn * tune.beats) * beat
            if pitch is not None and -1e-9 <= at < seconds - 0.05:
                notes.append((max(at, 0.0), length * beat, pitch))
        for i, root in enumerate(roots):
            at = (i * tune.bar - origin + turn * tune.beats) * beat
            if -1e-9 <= at < seconds - 0.05:
                bars.append((max(at, 0.0), root))
    return notes, bars


def add(track: np.ndarray, sound: np.ndarray, start: float, sample_rate: int, gain: float):
    """Adds a sound to track (L,) at `start` seconds."""
    at = round(start * sample_rate)
    sound = sound[:max(0, len(track) - at)]
    track[at:at + len(sound)] += np.float32(gain) * sound


def held(sound: np.ndarray, seconds: float, release: float, sample_rate: int) -> np.ndarray:
    """The first `seconds` of a note and its release."""
    fade = int(release * sample_rate)
    sound = sound[:int(seconds * sample_rate) + fade // 2].copy()
    fade = min(fade, len(sound))
    sound[len(sound) - fade:] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(fade, dtype=np.float32) / fade)
    return sound


def add_bass(track, tune, root, start, beat, take, sample_rate):
    """One bar of root and fifth in turn, below the melody, a note a beat."""
    low = BASS.low + (root - BASS.low) % 12
    for i in range(tune.bar):
        pitch = low if i % 2 == 0 else low + 7 if low < 40 else low - 5
        sound = held(note(BASS, pitch, take, sample_rate), 0.9 * beat, BASS.release, sample_rate)
        add(track, sound, start + i * beat, sample_rate, 0.5)


def add_drums(track, tune, start, beat, sample_rate, rng):
    """One bar: kick on the strong beats, snare on the others, a hat on all."""
    for i in range(tune.bar):
        loud, strong = rng.uniform(0.85, 1.0), i == 0 or (i == 2 and tune.bar == 4)
        add(track, drum("kick" if strong else "snare", sample_rate), start + i * beat, sample_rate, 1.9 * loud)
        add(track, drum("hat", sample_rate), start + i * beat, sample_rate, 1.4 * loud)


def accent(beats: float, bar: int) -> float:
    """How loud a note is played that begins so many beats from a bar line."""
    def whole(number):
        return abs(number - round(number)) < 0.01
    return 1.0 if whole(beats / bar) else 0.85 if whole(beats) else 0.7


def render(tune: Tune, instrument: str, bpm: float, transpose: int, drums: bool, bass: bool, seconds: float,
           sample_rate: int, rng: np.random.Generator, first_bar: int | None = None):
    """One clip -> (mix (L,), melody alone (L,)), float32 within [-0.9, 0.9]; the melody is as loud in both.

    Starts at first_bar, by default one drawn from the tune's phrases of four bars.
    """
    play, take = INSTRUMENTS[instrument], int(rng.integers(TAKES))
    bars_in_tune = round(tune.beats / tune.bar)
    if first_bar is None:
        first_bar = 4 * int(rng.integers((bars_in_tune - 1) // 4 + 1))
    notes, bars = schedule(tune, bpm, seconds, first_bar)
    beat, length = 60 / bpm, int(seconds * sample_rate)
    upbeat = 0 if first_bar else tune.upbeat
    melody, rest = np.zeros(length, np.float32), np.zeros(length, np.float32)
    for start, duration, pitch in notes:
        sound = held(note(play, pitch + transpose, take, sample_rate), duration, play.release, sample_rate)
        add(melody, sound, start, sample_rate, accent(start / beat - upbeat, tune.bar) * rng.uniform(0.9, 1.0))
    melody = oaconvolve(melody, room(sample_rate))[:length].astype(np.float32)
    for start, root in bars:
        if bass:
            add_bass(rest, tune, root + transpose, start, beat, take, sample_rate)
        if drums:
            add_drums(rest, tune, start, beat, sample_rate, rng)
    mix = melody + rest
    peak, loudness = max(np.abs(mix).max(), np.abs(melody).max()), np.sqrt(np.mean(mix ** 2))
    gain = np.full(length, min(rng.uniform(0.09, 0.13) / loudness, 0.9 / peak), np.float32)
    gain *= np.minimum(1, np.arange(length, 0, -1) / (0.05 * sample_rate))  # no click at the end
    return tuple(np.clip(wave * gain, -0.9, 0.9) for wave in (mix, melody))  # the peak may be rounded up


def render_truth(tune: Tune, truth: dict, seconds: float, sample_rate: int, rng: np.random.Generator):
    """The clip of a tune that `truth` (of `draw`) tells -> (mix (L,), melody alone (L,)), as `render`."""
    shift = fit(tune, truth["instrument"], KEYS[tune.mode].index(truth["key"]))
    return render(tune, truth["instrument"], truth["bpm"], shift, truth["drums"], truth["bass"], seconds, sample_rate,
                  rng)


# --- what it is called ---------------------------------------------------------------------------------------------

TEMPO_WORDS = dict(slow=("slow", "gentle", "unhurried", "leisurely"),
                   medium=("medium-tempo", "moderate", "mid-tempo", "walking-pace"),
                   fast=("fast", "lively", "quick", "brisk"))
MOODS = dict(slow=dict(major=("calm", "peaceful"), minor=("sad", "melancholic")),
             medium=dict(major=("warm", "friendly"), minor=("thoughtful", "serious")),
             fast=dict(major=("happy", "cheerful"), minor=("restless", "energetic")))
BACKING = {  # (drums, bass)
    (True, True): ("with drums and bass", "with bass and drums", "over a drum beat and a bass line"),
    (True, False): ("with drums", "with drums, no bass", "with a drum beat", "over a drum beat"),
    (False, True): ("with bass", "with bass, no drums", "with a bass line", "over a bass line"),
    (False, False): ("unaccompanied", "alone", "no drums, no bass", "without drums")}
PIECES = ("tune", "melody", "piece", "song")


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def describe(truth: dict, rng: np.random.Generator) -> str:
    """A caption of a clip in one of many wordings. Fields may be left out, but what it says is so.

    truth: instrument, tempo ("slow", "medium" or "fast"), bpm, drums, bass, key, mode, genre.
    """
    def pick(words):
        return words[int(rng.integers(len(words)))]

    def maybe(probability):
        return rng.random() < probability
    words = INSTRUMENTS[truth["instrument"]].words
    name = words[0] if maybe(0.5) else pick(words)
    alone = not truth["drums"] and not truth["bass"]
    tempo = pick(TEMPO_WORDS[truth["tempo"]]) if maybe(0.85) else ""
    genre = truth["genre"] + (" tune" if truth["genre"] in ("folk", "classical") else "")
    piece = pick(PIECES) if maybe(0.7) else genre
    mood = pick(MOODS[truth["tempo"]][truth["mode"]]) if maybe(0.2) else ""
    adjectives = " ".join(word for word in (mood, tempo) if word)
    lead = pick((
        article(f"{adjectives} {name} {piece}".strip()),
        article(f"{adjectives} {piece}".strip()) + " " + pick(("played on", "for", "on")) + " " + article(name),
        article(name) + " playing " + article(f"{adjectives} {piece}".strip()),
        f"{name} {piece}" + (f", {adjectives}" if adjectives else ""),
        f"{adjectives} {name}".strip(),
        f"{'solo ' if alone else ''}{name}" + (f", {adjectives}" if adjectives else "")))
    extras = []
    if maybe(0.9):
        extras.append(pick(BACKING[truth["drums"], truth["bass"]]))
    if maybe(0.5):
        extras.append(pick(("at {} bpm", "{} bpm", "{} beats per minute")).format(truth["bpm"]))
    if maybe(0.2):
        extras.append(f"in {truth['key']} {truth['mode']}" if maybe(0.6) else f"{truth['mode']} key")
    rng.shuffle(extras)
    flowing = extras and "," not in lead and extras[0].startswith(("with", "over", "at ", "in ")) and maybe(0.6)
    text = ", ".join([f"{lead} {extras[0]}", *extras[1:]] if flowing else [lead, *extras])
    if maybe(0.4):
        text = text[0].upper() + text[1:] + ("." if maybe(0.6) else "")
    return text


def draw(tune: Tune, rng: np.random.Generator) -> dict:
    """Instrument, tempo, key, bass and drums of a clip: its ground truth."""
    instrument = list(INSTRUMENTS)[rng.integers(len(INSTRUMENTS))]
    mean_note = tune.beats / len(tune.pitches)  # beats
    tempi = [name for name, (low, high) in TEMPI.items() if mean_note * 60 / low >= MIN_NOTE or name == "slow"]
    tempo = tempi[rng.integers(len(tempi))]
    low, high = TEMPI[tempo]
    return dict(tune=tune.id, instrument=instrument, bpm=int(rng.integers(low, high + 1)), tempo=tempo,
                drums=bool(rng.integers(2)), bass=bool(rng.integers(2)), key=KEYS[tune.mode][rng.integers(12)],
                mode=tune.mode, metre=tune.metre, genre=tune.genre)


def sidecar(tune: Tune, truth: dict, rng: np.random.Generator) -> dict:
    """The .json beside a clip, as data/prepare.py reads it, with the ground truth for evaluation."""
    keywords = [truth["tempo"], "drums" if truth["drums"] else "no drums", "bass" if truth["bass"] else "no bass",
                f"{tune.metre} time"]
    fields = dict(genre=tune.genre, key=f"{truth['key']} {truth['mode']}", bpm=truth["bpm"], keywords=keywords,
                  moods=list(MOODS[truth["tempo"]][truth["mode"]]))
    fields = {key: value for key, value in fields.items() if rng.random() < 0.8}  # some are missing, as in real data
    fields |= dict(title=tune.title, artist=tune.origin, instrument=INSTRUMENTS[truth["instrument"]].words[0])
    return fields | dict(description=describe(truth, rng), truth=truth)


# --- files ---------------------------------------------------------------------------------------------------------

def write_wav(path: Path, wav: np.ndarray, sample_rate: int):
    write_atomic(path, lambda temporary: soundfile.write(temporary, wav, sample_rate, subtype="PCM_16", format="WAV"))


def write_clip(job) -> str:
    """Renders clip `index` of a split into its folder; the sidecar comes last, so that a clip with one is whole."""
    args, name, index = job
    tunes = split(name)
    tune = tunes[index % len(tunes)]
    words, rng = (np.random.default_rng([args.seed, SPLITS.index(name), index, i]) for i in range(2))
    truth = draw(tune, rng)
    fields = sidecar(tune, truth, words)  # its own generator: a change of wording leaves the music as it is
    mix, melody = render_truth(tune, truth, args.seconds, args.sample_rate, rng)
    folder, file = Path(args.out) / name, f"{index:05d}-{tune.id}"
    write_wav(folder / f"{file}.wav", mix, args.sample_rate)
    if args.stems:
        fields["melody"] = f"melodies/{file}.wav"
        write_wav(folder / fields["melody"], melody, args.sample_rate)
    write_atomic(folder / f"{file}.json", (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode())
    return fields["description"]


def write_one(args):
    """The melody of one tune, in its own key and the instrument's octave, to a file."""
    found = [tune for tune in load() if args.one.lower() in tune.title.lower()]
    if not found:
        raise UserError(f"--one {args.one!r}: no tune has this in its title; the titles are in data/tunes.txt")
    if not args.to:
        raise UserError("--one needs --to FILE.wav")
    if args.instrument not in INSTRUMENTS:
        raise UserError(f"--instrument {args.instrument!r}: must be one of {', '.join(INSTRUMENTS)}")
    tune = found[0]
    shift, rng = fit(tune, args.instrument, tune.tonic), np.random.default_rng(args.seed)
    _, melody = render(tune, args.instrument, args.bpm, shift, False, False, args.seconds, args.sample_rate, rng, 0)
    write_wav(Path(args.to), melody, args.sample_rate)
    print(f"{args.to}: {tune.title}, {tune.origin}, {args.instrument}, {args.bpm:g} bpm")


def main():
    parser = Parser(description="renders the embedded tunes as a training set")
    parser.add_argument("--out", default="data/tunes", help="folder; gets train/, valid/ and test/")
    parser.add_argument("--clips", type=int, nargs=3, default=(40, 10, 2), metavar=("TRAIN", "VALID", "TEST"),
                        help="of each tune")
    parser.add_argument("--seconds", type=float, default=5.8, help="length of a clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample_rate", type=int, default=16000, help="Hz")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--no-stems", dest="stems", action="store_false", help="leave out the melodies alone")
    parser.add_argument("--one", metavar="TITLE", help="only the melody of this tune, to the file --to")
    parser.add_argument("--instrument", default="piano", help=", ".join(INSTRUMENTS))
    parser.add_argument("--bpm", type=float, default=104)
    parser.add_argument("--to", metavar="FILE.wav")
    args = parser.parse_args()
    for key in ("seconds", "sample_rate", "workers", "bpm"):
        if not 0 < getattr(args, key) < 1e6:
            raise UserError(f"--{key} {getattr(args, key)}: must be positive")
    if args.seconds < 1 or args.sample_rate < 4000 or args.bpm < 20 or args.seed < 0 or min(args.clips) < 0:
        raise UserError("at least 1 second, 4000 Hz, 20 bpm, and no negative seed or number of clips")
    if args.one:
        return write_one(args)
    jobs = [(args, name, i) for name, clips in zip(SPLITS, args.clips) for i in range(clips * len(split(name)))]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for _ in tqdm(pool.imap_unordered(write_clip, jobs, chunksize=8), total=len(jobs), unit="clip"):
            pass
    print(f"{args.out}: {len(jobs)} clips of {args.seconds:g} s, {len(jobs) * args.seconds / 3600:.1f} h")


if __name__ == "__main__":
    run(main)
