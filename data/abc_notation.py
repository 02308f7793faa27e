"""ABC: a tune as text, as folk musicians write it (abcnotation.com, standard 2.1) -> Notes.

    X:1
    T:Ode to Joy
    M:4/4
    L:1/4
    Q:1/4=100
    K:D
    FFGA | AGFE | DDEF | F>E E2 :|

    melody = parse_abc(text)

Read: one voice; M:, L:, Q: and K: (with modes), accidentals up to the bar line, lengths, broken rhythm, ties,
tuplets, repeats with first and second endings. Of a chord the highest note is taken. What does not change the
melody is skipped: chord names, grace notes, ornaments, slurs, words. Anything else is refused with its place.
"""
import re
from fractions import Fraction

from data.notes import MOST_NOTES, PITCHES, Notes, Segment, beat_and_bar, length_of, parse_meter, unfold
from system.errors import UserError

# sharps (flats below 0) of C in each mode
MODES = {"": 0, "maj": 0, "ion": 0, "m": -3, "min": -3, "aeo": -3, "mix": -1, "dor": -2, "phr": -4, "lyd": 1,
         "loc": -5}
SHARPS = "FCGDAEB"      # the order in which a key gets them; its flats come in the opposite one
ACCIDENTALS = {"^^": 2, "^": 1, "=": 0, "_": -1, "__": -2}
PITCH = r"(\^\^|\^|__|_|=)?([A-Ga-g])([,']*)"
LENGTH = r"(\d*)(/*)(\d*)"
ENDING = r"([1-9][\d,-]*)"
TOKENS = {              # the first one that matches counts
    "note": PITCH + LENGTH + "(-?)",
    "skipped": r'[\s`\\$y]+|"[^"]*"|\{[^}]*\}|![^!\s]*!|!|\+[^+]*\+|[-.~HLMOPSTuv]|\((?!\d)|\)',
    "inline_field": r"\[([A-Za-z]):([^\]]*)\]",
    "tuplet": r"\(([2-9])(?::(\d?))?(?::(\d?))?",
    "bar_line": r"(\[\||:*\|[|\]:]*|::+)(?:\s*\[?" + ENDING + ")?",
    "ending": r"\[" + ENDING,
    "chord": r"\[([^\]|:]+)\]" + LENGTH + "(-?)",
    "rest": "[zx]" + LENGTH,
    "bars_of_rest": r"[ZX](\d*)",
    "broken": "(>{1,3}|<{1,3})",
}
TOKENS = {name: re.compile(pattern) for name, pattern in TOKENS.items()}


def parse_abc(text: str) -> Notes:
    """The text of a file -> Notes, at 120 bpm where there is no Q:. Raises UserError naming the place."""
    tune = Tune()
    for number, line in enumerate(text.splitlines(), start=1):
        tune.line, tune.column = number, 1
        line = line.split("%")[0].rstrip()
        field = re.match(r"([A-Za-z+]):(?![|:])(.*)", line)
        if field:
            tune.field(field[1], field[2].strip())
        elif line and tune.key is not None:
            tune.music(line)
    if tune.key is None:
        raise UserError("there is no line K: with the key, after which the notes of an .abc file begin")
    return tune.finish()


class Tune:
    """What is known so far while a tune is read. Lengths are shares of a whole note."""

    def __init__(self):
        self.line, self.column, self.bar, self.token = 1, 1, 1, ""      # where it is read
        self.number, self.voice = None, None                            # X: and V:
        self.meter, self.unit, self.tempo = (4, 4), None, None
        self.key = None             # letter -> sharps, of those that have any
        self.altered = {}           # letter -> sharps, in this bar
        self.tied = {}              # the same of the note before, if it is tied to the next
        self.tuplet_notes, self.tuplet_factor = 0, 1    # notes still in it, and the factor of their lengths
        self.factor = 1             # of the next note's length, after a broken rhythm
        self.segments, self.count = [Segment()], 0      # what has been read, and the number of its notes

    def wrong(self, what: str) -> UserError:
        """The error of a token that `what` says something about."""
        place = f"line {self.line}, column {self.column}"
        if self.key is not None:
            place += f" (bar {self.bar})"
        return UserError(f"{place}: {self.token[:30]!r} {what}")

    # --- fields -------------------------------------------------------------------------------------------

    def field(self, letter: str, value: str):
        """A line such as M:3/4, or the same in brackets between notes. Those about the tune are skipped."""
        self.token = f"{letter}:{value}"
        if letter == "X" and self.number is not None:
            raise self.wrong("begins a second tune; keep one in the file")
        if letter == "V" and self.voice not in (None, value.split()[:1]):
            raise self.wrong("is a second voice; keep one in the file")
        if letter in "MQ" and self.count:
            raise self.wrong("changes the meter or tempo within the tune, which is not read")
        if letter == "m" or letter == "P" and self.key is None:     # after K: it is the name of a part
            raise self.wrong("(a macro, the order of parts) is not read; write the notes out")
        if letter == "X":
            self.number = value
        elif letter == "V":
            self.voice = value.split()[:1]
        elif letter == "M":
            self.set_meter(value)
        elif letter == "L":
            self.unit = self.fraction(value)
        elif letter == "Q":
            self.set_tempo(value)
        elif letter == "K":
            self.set_key(value)

    def set_meter(self, value: str):
        value = {"C": "4/4", "C|": "2/2", "none": "4/4", "": "4/4"}.get(value, value)
        try:
            self.meter = parse_meter(value)
        except UserError:
            raise self.wrong("is no meter; write it like M:3/4") from None

    def fraction(self, value: str) -> Fraction:
        """"1/8" as a number."""
        match = re.fullmatch(r"(\d+)\s*(?:/\s*(\d+))?", value)
        length = match and length_of(match[1], match[2])
        if not length:
            raise self.wrong("has no length in it such as 1/8")
        return length

    def set_tempo(self, value: str):
        """Q:1/4=120, Q:"Andante" 3/8=60, or the old Q:120; a word alone says nothing."""
        value = re.sub(r'"[^"]*"', "", value).strip()
        length, equals, number = value.rpartition("=")
        if not value:
            return
        if not re.fullmatch(r"\d{1,4}(\.\d+)?", number.strip()) or float(number) == 0:
            raise self.wrong("has no tempo in it such as 1/4=120")
        length = sum(self.fraction(part) for part in length.split()) if equals else None
        self.tempo = (length, float(number))

    def set_key(self, value: str):
        """K:G, K:Em, K:D dorian, K:Bb clef=treble; also K:none, and the bagpipe's K:HP."""
        words = [word for word in value.split() if "clef" not in word and word != "treble"]
        key = " ".join(words)
        key = {"": "C", "none": "C", "HP": "D", "Hp": "D"}.get(key, key)
        match = re.fullmatch(r"([A-G])([#b]?) ?([A-Za-z]*)", key)
        mode = match and MODES.get(match[3][:3].lower())
        if mode is None:
            raise self.wrong("is no key that is read here; write it like K:G, K:Bb, K:F#m or K:D dor")
        sharps = SHARPS.index(match[1]) - 1 + mode + 7 * {"#": 1, "b": -1, "": 0}[match[2]]
        order = SHARPS if sharps > 0 else SHARPS[::-1]
        self.key = {}
        for n in range(abs(sharps)):        # beyond seven they are double
            letter = order[n % 7]
            self.key[letter] = self.key.get(letter, 0) + (1 if sharps > 0 else -1)

    # --- music --------------------------------------------------------------------------------------------

    def music(self, line: str):
        """A line of notes: each token goes to the method of its name."""
        place = 0
        while place < len(line):
            self.column = place + 1
            for kind, pattern in TOKENS.items():
                match = pattern.match(line, place)
                if match:
                    break
            else:
                self.token = line[place:].split()[0]
                raise self.wrong("is not read here; notes are such as ^c'3/2, rests z, bar lines |")
            self.token = match[0]
            getattr(self, kind)(match)
            place = match.end()

    def skipped(self, match):
        if re.search("D.C|D.S|segno|coda|fine", match[0]):
            raise self.wrong("is a jump, which is not read; write the notes out")

    def inline_field(self, match):
        self.field(match[1], match[2].strip())

    def bar_line(self, match):
        marks, ending = match[1], match[2]
        if self.segments[-1].notes:
            self.bar += 1
        self.altered = {}
        self.segments[-1].closes = marks.startswith(":")
        self.begin(marks.endswith(":"), ending)

    def ending(self, match):
        self.begin(False, match[1])

    def begin(self, opens: bool, ending: str | None):
        if ending not in (None, "1", "2"):
            raise self.wrong("is an ending that is not read; there may be a first and a second one")
        self.segments.append(Segment(opens=opens, ending=ending))

    def note(self, match):
        accidental, letter, octave, *length, tie = match.groups()
        self.add(self.pitch(accidental, letter, octave), self.duration(*length))
        self.tied = {letter: self.sharps(letter)} if tie else {}

    def chord(self, match):
        inside, *length, tie = match.groups()
        notes = list(TOKENS["note"].finditer(inside))
        if not notes or TOKENS["note"].sub("", inside).strip():
            raise self.wrong("is no chord that is read here; it has notes such as [ceg]")
        pitches = [self.pitch(*note.groups()[:3]) for note in notes]
        first = self.written(*notes[0].groups()[3:6])
        self.add(max(pitches), first * self.duration(*length))
        self.tied = {note[2]: self.sharps(note[2]) for note in notes} if tie else {}

    def rest(self, match):
        self.add(None, self.duration(*match.groups()))

    def bars_of_rest(self, match):
        bars = int(match[1] or 1)
        self.add(None, bars * Fraction(*self.meter))

    def tuplet(self, match):
        count = int(match[1])
        usual = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}
        others = 3 if beat_and_bar(*self.meter)[0] == Fraction(3, 8) else 2
        in_time_of = int(match[2] or usual.get(count, others))
        self.tuplet_notes = int(match[3] or count)
        self.tuplet_factor = Fraction(in_time_of, count)

    def broken(self, match):
        notes = self.segments[-1].notes
        if not notes:
            raise self.wrong("follows no note")
        short = Fraction(1, 2 ** len(match[0]))
        here, self.factor = (2 - short, short) if match[0][0] == ">" else (short, 2 - short)
        pitch, length = notes[-1]
        notes[-1] = pitch, length * here

    # --- notes --------------------------------------------------------------------------------------------

    def sharps(self, letter: str) -> int:
        return self.altered.get(letter.upper(), self.key.get(letter.upper(), 0))

    def pitch(self, accidental, letter: str, octave: str) -> int:
        """The midi pitch of a note. An accidental counts for its letter up to the bar line."""
        if accidental:
            self.altered[letter.upper()] = ACCIDENTALS[accidental]
        sharps = self.sharps(letter)
        if not accidental:
            sharps = self.tied.get(letter, sharps)      # a tie carries it over the bar line
        octaves = octave.count("'") - octave.count(",") + letter.islower()
        return 60 + PITCHES[letter.lower()] + sharps + 12 * octaves

    def written(self, count: str, slashes: str, part: str) -> Fraction:
        """The number that "3/2", "/" or "//" writes."""
        if slashes and not part:
            part = str(2 ** len(slashes[:10]))
        number = length_of(count, part)
        if not number:
            raise self.wrong("has a length that is none")
        return number

    def duration(self, *length) -> Fraction:
        """The length of the next note or rest."""
        small = Fraction(*self.meter) < Fraction(3, 4)
        unit = self.unit or Fraction(1, 16 if small else 8)
        duration = self.written(*length) * unit * self.factor
        self.factor = 1
        if self.tuplet_notes:
            self.tuplet_notes -= 1
            duration *= self.tuplet_factor
        return duration

    def add(self, pitch, length):
        self.count += 1
        if self.count > MOST_NOTES:
            raise self.wrong(f"is one note too many; a melody has at most {MOST_NOTES:,}")
        self.segments[-1].notes.append((pitch, length))

    def finish(self) -> Notes:
        beat, bar = beat_and_bar(*self.meter)
        bpm = 120.0
        if self.tempo:
            length, number = self.tempo
            bpm = float(number * (length or self.unit or Fraction(1, 4)) / beat)
        notes = [(pitch, float(length / beat)) for pitch, length in unfold(self.segments)]
        return Notes(tuple(notes), bpm, bar)
