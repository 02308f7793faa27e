"""Melodies in notes, and their chroma without any recording.

    melody = parse_notes("e2 e2 f2 g2 | g2 f2 e2 d2", bpm=100)     # the notation of tunes.txt
    chroma = melody.chroma(config, seconds=30)                      # (M, Q)

Files of notes (.abc, .mid, .musicxml) are read by data/scores.py.

The notation: a letter, # or b, the octave (c is middle C, c' above, c, below; r is a rest), the length in
eighths (none: 1, 2: a quarter, /2: a sixteenth, 3/2: dotted), ~ for a tie to the next note, | for a bar line.
Every note says its octave and length: none is carried on.
"""
import math
import re
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F

from system.errors import UserError

PITCHES = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}     # semitones above C
NOTE = re.compile(r"([a-gr])([#b]?)('*|,*)(\d*)(?:/(\d+))?(~?)")
SLOWEST, FASTEST = 5, 1000      # bpm
MOST_NOTES = 20_000
LONGEST = 10_000                # beats of one note, digits of none
REST = -1
REGISTER = 62           # midi: melodies are told with their middle in the octave from here up


@dataclass(frozen=True)
class Notes:
    """A melody, one note at a time. A beat is a quarter note, in 6/8 a dotted quarter: see `beat_and_bar`."""
    notes: tuple            # of (midi pitch or None for a rest, length in beats), one after the other
    bpm: float = 120.0      # beats a minute
    bar: float = 4          # beats in a bar

    def __post_init__(self):
        if not SLOWEST <= self.bpm <= FASTEST:
            raise UserError(f"bpm {self.bpm}: must be from {SLOWEST} to {FASTEST}")
        if not 0 < self.bar <= 100:
            raise UserError(f"a bar of {self.bar} beats: must be more than 0 and at most 100")
        if len(self.notes) > MOST_NOTES:
            raise UserError(f"{len(self.notes):,} notes are too many for a melody; at most {MOST_NOTES:,}")
        for n, (pitch, length) in enumerate(self.notes, start=1):
            if pitch is not None and not 0 <= pitch <= 127:
                raise UserError(f"note {n}: its midi pitch {pitch} must be from 0 to 127")
            if not 0 < length <= LONGEST:
                raise UserError(f"note {n}: its length of {length} beats must be more than 0 and at most "
                                f"{LONGEST:,}")
        if all(pitch is None for pitch, _ in self.notes):
            raise UserError("there is no note in this melody; it needs one at least")

    @property
    def beats(self) -> float:
        """Its length up to the end of the last note or rest."""
        return sum(length for _, length in self.notes)

    @property
    def period(self) -> float:
        """Beats after which it begins anew: a whole number of bars."""
        return self.bar * math.ceil(self.beats / self.bar - 1e-6)

    def chroma(self, config, seconds: float) -> torch.Tensor:
        """One-hot chroma (M, Q) for so many seconds of music, the melody again and again on its bar.

        Frame m has the note that sounds at its center, m * hop samples from the start, as in chroma.py.
        Zeros are a rest. Where config.melody_form is "notes", Q is that of `one_hot_notes`.
        """
        frames = math.ceil(seconds * config.sample_rate / config.hop) + 1
        return self.chroma_at(np.arange(frames) * config.hop / config.sample_rate, config)

    def chroma_at(self, time, config) -> torch.Tensor:
        """The same of the notes at these times (M,), in seconds; where they go back, a note begins anew."""
        beat = time * self.bpm / 60 + 1e-6
        rounds, beat = np.divmod(beat, self.period)
        pitches, lengths = zip(*self.notes, (None, self.period))            # a rest up to the bar line
        index = np.searchsorted(np.cumsum(lengths), beat, side="right")
        steps = [REST if pitch is None else above_c(pitch, config.n_chroma) for pitch in pitches]
        steps = torch.tensor(steps)[index]
        if config.melody_form == "chroma":
            one_hot = F.one_hot(steps % config.n_chroma, config.n_chroma)
            return (one_hot * (steps != REST)[:, None]).float()
        begins = np.diff(rounds * len(pitches) + index, prepend=-1) != 0
        begins |= np.diff(time, prepend=time[0]) < 0
        return one_hot_notes(steps, torch.from_numpy(begins), config.n_chroma)


def above_c(pitch, n_chroma: int) -> int:
    """Midi pitch -> steps of a scale of n_chroma an octave above the C of midi 0, in tune at A4."""
    return round((pitch - 69) * n_chroma / 12) - 3 * (n_chroma // 12) + 6 * n_chroma


def octaves_up(steps, n_chroma: int) -> int:
    """How many octaves up notes, see `above_c`, have to go for their median to lie in REGISTER's octave."""
    return -((int(steps.median()) - above_c(REGISTER, n_chroma)) // n_chroma)


def one_hot_notes(steps, begins, n_chroma: int) -> torch.Tensor:
    """The notes of M frames as (M, 4 n_chroma): one-hot, zeros for a rest.

    steps (M,): of each frame's note, see `above_c`, or REST; begins (M,) bool: whether the note begins there.
    More than chroma: in which of two octaves a note is, so that a model need not guess where a melody leaps,
    and which notes are new, so that a repeated one is no held one. Classes:

        held, even octave: C ... B | held, odd octave | begins, even octave | begins, odd octave

    The melody as a whole is moved into one register: who hums it an octave lower means the same.
    """
    sounds = steps != REST
    if sounds.any():
        steps = steps + n_chroma * octaves_up(steps[sounds], n_chroma)
    classes = steps % (2 * n_chroma) + 2 * n_chroma * begins
    return (F.one_hot(classes, 4 * n_chroma) * sounds[:, None]).float()


def pitch_classes(melody, n_chroma: int) -> torch.Tensor:
    """Chroma or notes (..., M, Q) -> chroma (..., M, n_chroma)."""
    return melody.unflatten(-1, (-1, n_chroma)).sum(-2)


def beat_and_bar(count: int, unit: int):
    """A meter such as 3/4 -> (a beat in whole notes, beats in a bar); 6/8 has two dotted quarters."""
    if unit == 8 and count % 3 == 0:
        return Fraction(3, 8), count // 3
    return Fraction(1, unit), count


def parse_meter(text: str):
    """"3/4" -> (3, 4). Raises UserError for what is no meter."""
    match = re.fullmatch(r"(\d{1,2})/(1|2|4|8|16|32)", text)
    if not match or int(match[1]) == 0:
        raise UserError(f"{text!r} is no meter; write it like 3/4 or 6/8")
    return int(match[1]), int(match[2])


# --- the notation of tunes.txt ----------------------------------------------------------------------------

def parse_notes(text: str, bpm: float = 120.0, meter: str = "4/4") -> Notes:
    """Note text -> Notes. Raises UserError naming the place of a wrong note, or a bar that does not add up.

    The first bar, an upbeat, and the last one may be short.
    """
    beat, bar = beat_and_bar(*parse_meter(meter))
    notes, bars = parse_bars(text, eighths_per_beat=8 * beat)
    for n, beats in enumerate(bars, start=1):
        ends = n in (1, len(bars))
        if beats > bar and len(bars) > 1 or beats < bar and not ends:
            raise UserError(f"bar {n} has {beats:g} beats, not the {bar} of {meter} (lengths are in eighths: "
                            f"c2 is a quarter note); check its lengths, or the meter")
    return Notes(tuple(notes), bpm, bar)


def parse_bars(text: str, eighths_per_beat):
    """Note text -> (notes [(midi or None, beats)], bars [beats]). Raises UserError naming a wrong note."""
    notes, bars = [], []
    tied = False
    for number, bar in enumerate(re.split(r"\|+", text.strip().strip("|")), start=1):
        total = Fraction(0)
        for place, word in enumerate(bar.split(), start=1):
            match = NOTE.fullmatch(word)
            length = match and length_of(match[4], match[5])
            if not length:
                raise UserError(f"bar {number}, note {place}: {word[:30]!r} is not a note; write it like "
                                f"c#'3/2 (letter, # or b, octave, length in eighths), r for a rest")
            length /= eighths_per_beat
            letter, accidental, octave = match[1], match[2], match[3]
            pitch = None
            if letter != "r":
                octaves = octave.count("'") - octave.count(",")
                sharps = {"#": 1, "b": -1, "": 0}[accidental]
                pitch = 60 + PITCHES[letter] + sharps + 12 * octaves
            if tied and notes[-1][0] != pitch:
                raise UserError(f"bar {number}, note {place}: the note before it is tied (~) to {word!r}, "
                                f"which has another pitch")
            if tied:
                notes[-1][1] += length
            else:
                notes.append([pitch, length])
            tied = match[6] == "~"
            total += length
        bars.append(total)
    if tied:
        raise UserError(f"bar {number}, note {place}: it is tied (~), and no note follows")
    return [(pitch, float(length)) for pitch, length in notes], [float(total) for total in bars]


def length_of(count: str, part: str | None):
    """The length that digits such as "3" and "2" write; None if it is 0 or has more than four digits."""
    if len(count) > 4 or len(part or "") > 4 or int(part or 1) == 0:
        return None
    return Fraction(int(count or 1), int(part or 1)) or None


# --- repeats ----------------------------------------------------------------------------------------------

@dataclass
class Segment:
    """Notes between two bar lines as written."""
    notes: list = field(default_factory=list)
    opens: bool = False         # |: before it
    ending: str | None = None   # "1" or "2" above it
    closes: bool = False        # :| behind it


def unfold(segments) -> list:
    """The notes of the segments as played: repeated parts twice, the second time without a first ending."""
    played = []
    start, first_ending = 0, None
    for n, segment in enumerate(segments):
        if segment.opens:
            start, first_ending = n, None
        if segment.ending == "1":
            first_ending = n
        played.append(segment)
        if segment.closes:
            stop = n + 1 if first_ending is None else first_ending
            played += segments[start:stop]
            start, first_ending = n + 1, None
    notes = []
    for segment in played:
        notes += segment.notes
    return notes
