"""Tunes as notes -> recordings and captions of them: what data/tunes.py makes its clips of.

    tune = tunes_of("test")[0]                          # of tunes.txt: 360 folk and classical melodies
    truth = draw_truth(tune, rng)                       # instrument, tempo, key, bass and drums: ground truth
    mix, melody = render_truth(tune, truth, seconds, sample_rate, rng)      # waves (L,)
    caption = describe(truth, rng)                      # in one of many wordings, and always true

Everything random comes from the generators that are given: the same generator makes the same clip.
"""
import functools
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.signal import oaconvolve

from data.notes import PITCHES, parse_bars

SPLITS = ("train", "valid", "test")
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


# --- the instruments: each note is a sum of partials ------------------------------------------------------

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


def stretched(n: int) -> tuple:
    """Partials of a stiff string."""
    return tuple(i * math.sqrt(1 + 4e-4 * i * i) for i in harmonics(n))


INSTRUMENTS = {
    "flute": Instrument(
        words=("flute",),
        low=60, high=79, partials=harmonics(6),
        slope=2.3, attack=0.06, release=0.06,
        vibrato=14, noise=0.12),
    "violin": Instrument(
        words=("violin", "fiddle"),
        low=57, high=81, partials=harmonics(20),
        slope=1.25, attack=0.09, release=0.08,
        formant=2600, vibrato=22),
    "guitar": Instrument(
        words=("guitar", "acoustic guitar", "plucked guitar"),
        low=55, high=76, partials=harmonics(16),
        slope=0.9, attack=0.003, release=0.08,
        decay=0.55, decay_slope=0.6, noise=0.03),
    "organ": Instrument(
        words=("organ", "pipe organ", "church organ"),
        low=55, high=77, partials=(1, 2, 3, 4, 6, 8),
        slope=0.55, attack=0.02, release=0.07),
    "clarinet": Instrument(
        words=("clarinet",),
        low=57, high=77, partials=harmonics(13),
        slope=1.1, attack=0.035, release=0.05,
        even=0.04),
    "trumpet": Instrument(
        words=("trumpet",),
        low=57, high=79, partials=harmonics(16),
        slope=1.1, attack=0.03, release=0.05,
        formant=1300, vibrato=4),
    "bell": Instrument(
        words=("bell", "glockenspiel", "chime"),
        low=57, high=77, partials=(1, 2.756, 5.404, 8.933),
        slope=0.75, attack=0.002, release=0.25,
        decay=1.3, decay_slope=1.4),
    "piano": Instrument(
        words=("piano",),
        low=55, high=79, partials=stretched(12),
        slope=1.4, attack=0.006, release=0.12,
        decay=0.8, noise=0.06),
    "synth": Instrument(
        words=("synth lead", "synthesizer", "synth"),
        low=55, high=79, partials=harmonics(20),
        slope=0.9, attack=0.005, release=0.04,
        decay=0.2, decay_slope=0.0, floor=0.35, detune=14),
}
BASS = Instrument(      # plucked
    words=("bass",),
    low=33, high=47, partials=harmonics(5),
    slope=1.8, attack=0.004, release=0.06,
    decay=0.4, noise=0.5)
LONGEST = 4.0                   # s, of a single note
DRUM = 0.4                      # s, of a stroke
TAKES = 2                       # slightly different notes of each pitch; a clip keeps to one take


@functools.lru_cache(maxsize=1024)
def note(instrument: Instrument, pitch: int, take: int, sample_rate: int) -> np.ndarray:
    """One held note, float32 (LONGEST seconds), as loud as any other. Cached: tunes repeat their notes."""
    rng = np.random.default_rng([pitch, take])
    time = np.arange(int(LONGEST * sample_rate), dtype=np.float32) / sample_rate
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    onset = np.clip(time / 0.5 - 0.5, 0, 1)     # of the vibrato
    depth = instrument.vibrato * rng.uniform(0.8, 1.2) / 1200 * math.log(2)
    sway = depth * onset * (1 - np.cos(2 * np.pi * 5.5 * time)) / (2 * np.pi * 5.5)
    phase = 2 * np.pi * frequency * (time + sway)
    voices = [1.0]
    if instrument.detune:
        voices = [2 ** (side * instrument.detune / 2400) for side in (-1, 1)]
    slope = instrument.slope + (0.15 if take % 2 else 0)

    out = np.zeros_like(time)
    for n, ratio in enumerate(instrument.partials, start=1):
        hertz = frequency * ratio
        if hertz > 0.45 * sample_rate:
            break
        level = ratio ** -slope
        if n % 2 == 0:
            level *= instrument.even
        if instrument.formant:
            distance = math.log(hertz / instrument.formant) / 0.6
            level *= 1 + 2.5 * math.exp(-distance ** 2)
        loudness = envelope(instrument, n, ratio, level, time)
        for voice in voices:
            out += loudness * np.sin(ratio * voice * phase + 2.4 * n, dtype=np.float32)
    if instrument.noise:
        hiss = np.convolve(rng.standard_normal(len(time) + 7), np.ones(8) / 8, "valid")
        fall = np.exp(-time / 0.012) if instrument.decay else 0.4
        out += 3 * instrument.noise * hiss.astype(np.float32) * fall
    rise = int(instrument.attack * sample_rate) + 1
    out[:rise] *= 0.5 - 0.5 * np.cos(np.pi * np.arange(rise) / rise)
    head = out[:sample_rate // 2]
    return (out / np.sqrt(np.mean(head ** 2) + 1e-9)).astype(np.float32)


def envelope(instrument: Instrument, n: int, ratio: float, level: float, time: np.ndarray) -> np.ndarray:
    """How loud partial n, of so many times the fundamental's frequency, is at each time (L,)."""
    loudness = np.float32(level)
    if instrument.decay:
        fall = np.exp(-time * (ratio ** instrument.decay_slope / instrument.decay))
        loudness = level * (instrument.floor + (1 - instrument.floor) * fall)
    if not instrument.decay or instrument.floor:    # blown and bowed: higher partials speak later
        seconds = instrument.attack * (1 + 0.12 * n)
        loudness = loudness * (1 - np.exp(-time * (3 / seconds)))
    return loudness


@functools.lru_cache(maxsize=8)
def drum(name: str, sample_rate: int) -> np.ndarray:
    """One stroke of "kick", "snare" or "hat", float32."""
    time = np.arange(int(DRUM * sample_rate)) / sample_rate
    hiss = np.random.default_rng(len(name)).standard_normal(len(time))
    if name == "kick":
        turns = 50 * time + 2.8 * (1 - np.exp(-time / 0.04))
        out = 2 * np.sin(2 * np.pi * turns) * np.exp(-time / 0.12)
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
    noise = np.random.default_rng(5).standard_normal(len(time))
    tail = np.convolve(noise, np.ones(4) / 4, "same")
    tail *= np.exp(-time / 0.07) * np.clip(time / 0.01, 0, 1)
    response = 0.3 * tail / np.sqrt(np.sum(tail ** 2))
    response[0] = 1
    return response.astype(np.float32)


# --- who plays what when ----------------------------------------------------------------------------------

def chords(tune: Tune) -> list[int]:
    """The root (0 ... 11, as written) of a triad for each bar: the one most of the bar's notes belong to."""
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
    roots = []
    for bar in weights[1:]:     # the upbeat has none
        score = {}
        for root, bias in degrees.items():
            third = (root + (3 if root in minor else 4)) % 12
            fifth = (root + 7) % 12
            score[root] = bar[root] + bar[third] + bar[fifth] + bias
        best = max(score, key=score.get)
        roots.append((best + tune.tonic) % 12)
    bars = round(tune.beats / tune.bar)
    if bars == 1:
        return roots[:1]
    return roots[:bars - 1] + [tune.tonic]


def fit(tune: Tune, instrument: str, tonic: int) -> int:
    """Semitones that bring a tune to the key of pitch class `tonic`, in the instrument's best octave."""
    play = INSTRUMENTS[instrument]

    def outside(shift):
        low, high = min(tune.pitches) + shift, max(tune.pitches) + shift
        beyond = max(0, play.low - low) + max(0, high - play.high)
        return beyond, abs(low + high - play.low - play.high)
    shifts = [tonic - tune.tonic + octave for octave in (-36, -24, -12, 0, 12, 24)]
    return min(shifts, key=outside)


def schedule(tune: Tune, bpm: float, seconds: float, first_bar: int = 0):
    """What sounds when: ([(start s, length s, midi)], [(start of a bar in s, root)]); the tune is repeated.

    From bar 0 it begins with its upbeat, from a later bar on the bar line.
    """
    beat = 60 / bpm
    origin = first_bar * tune.bar if first_bar else -tune.upbeat
    roots = chords(tune)
    notes, bars = [], []
    for turn in range(math.ceil(seconds / beat / tune.beats) + 2):
        start = -tune.upbeat
        for pitch, length in tune.notes:
            at = (start - origin + turn * tune.beats) * beat
            if pitch is not None and -1e-9 <= at < seconds - 0.05:
                notes.append((max(at, 0.0), length * beat, pitch))
            start += length
        for n, root in enumerate(roots):
            at = (n * tune.bar - origin + turn * tune.beats) * beat
            if -1e-9 <= at < seconds - 0.05:
                bars.append((max(at, 0.0), root))
    return notes, bars


# --- a clip -----------------------------------------------------------------------------------------------

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
    ramp = np.pi * np.arange(fade, dtype=np.float32) / fade
    sound[len(sound) - fade:] *= 0.5 + 0.5 * np.cos(ramp)
    return sound


def add_bass(track, tune: Tune, root: int, start: float, beat: float, take: int, sample_rate: int):
    """One bar of root and fifth in turn, below the melody, a note a beat."""
    low = BASS.low + (root - BASS.low) % 12
    fifth = low + 7 if low < 40 else low - 5
    for i in range(tune.bar):
        pitch = low if i % 2 == 0 else fifth
        sound = note(BASS, pitch, take, sample_rate)
        sound = held(sound, 0.9 * beat, BASS.release, sample_rate)
        add(track, sound, start + i * beat, sample_rate, 0.5)


def add_drums(track, tune: Tune, start: float, beat: float, sample_rate: int, rng):
    """One bar: kick on the strong beats, snare on the others, a hat on all."""
    for i in range(tune.bar):
        loud = rng.uniform(0.85, 1.0)
        strong = i == 0 or (i == 2 and tune.bar == 4)
        stroke = drum("kick" if strong else "snare", sample_rate)
        add(track, stroke, start + i * beat, sample_rate, 1.9 * loud)
        add(track, drum("hat", sample_rate), start + i * beat, sample_rate, 1.4 * loud)


def accent(beats: float, bar: int) -> float:
    """How loud a note is played that begins so many beats from a bar line."""
    def whole(number):
        return abs(number - round(number)) < 0.01
    if whole(beats / bar):
        return 1.0
    return 0.85 if whole(beats) else 0.7


def render_tune(tune: Tune, instrument: str, bpm: float, transpose: int, drums: bool, bass: bool,
                seconds: float, sample_rate: int, rng: np.random.Generator, first_bar: int | None = None):
    """One clip -> (mix (L,), melody alone (L,)), float32 within [-0.9, 0.9]; the melody is as loud in both.

    Starts at first_bar, by default one drawn from the tune's phrases of four bars.
    """
    play = INSTRUMENTS[instrument]
    take = int(rng.integers(TAKES))
    if first_bar is None:
        bars_in_tune = round(tune.beats / tune.bar)
        first_bar = 4 * int(rng.integers((bars_in_tune - 1) // 4 + 1))
    notes, bars = schedule(tune, bpm, seconds, first_bar)
    beat = 60 / bpm
    upbeat = 0 if first_bar else tune.upbeat
    L = int(seconds * sample_rate)

    melody = np.zeros(L, np.float32)
    for start, duration, pitch in notes:
        sound = note(play, pitch + transpose, take, sample_rate)
        sound = held(sound, duration, play.release, sample_rate)
        gain = accent(start / beat - upbeat, tune.bar) * rng.uniform(0.9, 1.0)
        add(melody, sound, start, sample_rate, gain)
    melody = oaconvolve(melody, room(sample_rate))[:L].astype(np.float32)
    rest = np.zeros(L, np.float32)
    for start, root in bars:
        if bass:
            add_bass(rest, tune, root + transpose, start, beat, take, sample_rate)
        if drums:
            add_drums(rest, tune, start, beat, sample_rate, rng)

    mix = melody + rest
    peak = max(np.abs(mix).max(), np.abs(melody).max())
    loudness = np.sqrt(np.mean(mix ** 2))
    gain = min(rng.uniform(0.09, 0.13) / loudness, 0.9 / peak)
    gain = np.full(L, gain, np.float32)
    gain *= np.minimum(1, np.arange(L, 0, -1) / (0.05 * sample_rate))       # no click at the end
    return tuple(np.clip(wave * gain, -0.9, 0.9) for wave in (mix, melody))     # the peak may be rounded up


def render_truth(tune: Tune, truth: dict, seconds: float, sample_rate: int, rng: np.random.Generator):
    """The clip of a tune that `truth` describes (see `draw_truth`) -> (mix (L,), melody (L,))."""
    tonic = KEYS[tune.mode].index(truth["key"])
    shift = fit(tune, truth["instrument"], tonic)
    return render_tune(tune, truth["instrument"], truth["bpm"], shift, truth["drums"], truth["bass"],
                       seconds, sample_rate, rng)


# --- its truth and its caption ----------------------------------------------------------------------------

TEMPO_WORDS = {
    "slow": ("slow", "gentle", "unhurried", "leisurely"),
    "medium": ("medium-tempo", "moderate", "mid-tempo", "walking-pace"),
    "fast": ("fast", "lively", "quick", "brisk"),
}
MOODS = {
    "slow": {"major": ("calm", "peaceful"), "minor": ("sad", "melancholic")},
    "medium": {"major": ("warm", "friendly"), "minor": ("thoughtful", "serious")},
    "fast": {"major": ("happy", "cheerful"), "minor": ("restless", "energetic")},
}
BACKING = {     # (drums, bass)
    (True, True): ("with drums and bass", "with bass and drums", "over a drum beat and a bass line"),
    (True, False): ("with drums", "with drums, no bass", "with a drum beat", "over a drum beat"),
    (False, True): ("with bass", "with bass, no drums", "with a bass line", "over a bass line"),
    (False, False): ("unaccompanied", "alone", "no drums, no bass", "without drums"),
}
PIECES = ("tune", "melody", "piece", "song")


def draw_truth(tune: Tune, rng: np.random.Generator) -> dict:
    """Instrument, tempo, key, bass and drums of a clip: its ground truth."""
    names = list(INSTRUMENTS)
    instrument = names[rng.integers(len(names))]
    mean_note = tune.beats / len(tune.pitches)  # beats
    tempi = []
    for name, (low, high) in TEMPI.items():
        if name == "slow" or mean_note * 60 / low >= MIN_NOTE:
            tempi.append(name)
    tempo = tempi[rng.integers(len(tempi))]
    low, high = TEMPI[tempo]
    return {
        "tune": tune.id,
        "instrument": instrument,
        "bpm": int(rng.integers(low, high + 1)),
        "tempo": tempo,
        "drums": bool(rng.integers(2)),
        "bass": bool(rng.integers(2)),
        "key": KEYS[tune.mode][rng.integers(12)],
        "mode": tune.mode,
        "metre": tune.metre,
        "genre": tune.genre,
    }


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
    tempo = pick(TEMPO_WORDS[truth["tempo"]]) if maybe(0.85) else ""
    genre = truth["genre"]
    if genre in ("folk", "classical"):
        genre += " tune"
    piece = pick(PIECES) if maybe(0.7) else genre
    mood = pick(MOODS[truth["tempo"]][truth["mode"]]) if maybe(0.2) else ""

    adjectives = " ".join(word for word in (mood, tempo) if word)
    appended = f", {adjectives}" if adjectives else ""
    what = article(f"{adjectives} {piece}".strip())
    solo = "" if truth["drums"] or truth["bass"] else "solo "
    preposition = pick(("played on", "for", "on"))
    lead = pick((
        article(f"{adjectives} {name} {piece}".strip()),
        f"{what} {preposition} {article(name)}",
        f"{article(name)} playing {what}",
        f"{name} {piece}{appended}",
        f"{adjectives} {name}".strip(),
        f"{solo}{name}{appended}"))

    extras = []
    if maybe(0.9):
        extras.append(pick(BACKING[truth["drums"], truth["bass"]]))
    if maybe(0.5):
        tempo = pick(("at {} bpm", "{} bpm", "{} beats per minute"))
        extras.append(tempo.format(truth["bpm"]))
    if maybe(0.2):
        extras.append(f"in {truth['key']} {truth['mode']}" if maybe(0.6) else f"{truth['mode']} key")
    rng.shuffle(extras)
    joins = extras and "," not in lead and extras[0].startswith(("with", "over", "at ", "in "))
    parts = [lead, *extras]
    if joins and maybe(0.6):
        parts = [f"{lead} {extras[0]}", *extras[1:]]
    text = ", ".join(parts)
    if maybe(0.4):
        text = text[0].upper() + text[1:]
        text += "." if maybe(0.6) else ""
    return text


def sidecar(tune: Tune, truth: dict, rng: np.random.Generator) -> dict:
    """The .json beside a clip, as data/prepare.py reads it, with the ground truth for evaluation."""
    drums = "drums" if truth["drums"] else "no drums"
    bass = "bass" if truth["bass"] else "no bass"
    fields = {
        "genre": tune.genre,
        "key": f"{truth['key']} {truth['mode']}",
        "bpm": truth["bpm"],
        "keywords": [truth["tempo"], drums, bass, f"{tune.metre} time"],
        "moods": list(MOODS[truth["tempo"]][truth["mode"]]),
    }
    # some are missing, as in real data
    fields = {key: value for key, value in fields.items() if rng.random() < 0.8}
    return fields | {
        "title": tune.title,
        "artist": tune.origin,
        "instrument": INSTRUMENTS[truth["instrument"]].words[0],
        "description": describe(truth, rng),
        "truth": truth,
    }
