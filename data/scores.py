"""Files of notes -> Notes: .abc (data/abc_notation.py), standard MIDI files, MusicXML (plain or .mxl).

    melody = read_notes("tune.mid")

Of notes that sound together the highest is taken, over all tracks, parts and voices, without MIDI's drums.
A tempo that changes moves the notes; their bars are those of the first tempo and meter. Files come from
anywhere: they are data, at most MAX_BYTES of them, and XML with entities is refused. These formats have not
changed for decades, so the two readers here are shorter than what installing packages for them would take.
"""
import heapq
import io
import xml.etree.ElementTree as ElementTree
import zipfile
from fractions import Fraction
from pathlib import Path
from xml.parsers import expat

from data import abc_notation
from data.notes import MOST_NOTES, PITCHES, Notes, Segment, beat_and_bar, unfold
from system.errors import UserError, as_user_error

MAX_BYTES = 4_000_000


# --- what both have: notes at times, in quarters ------------------------------------------------------------

def melody_of(sounding, tempi, meter) -> Notes:
    """[(start, end, midi pitch)] in quarters, [(start, bpm)] and a meter -> Notes of the highest pitches."""
    if not sounding:
        raise UserError("there is no note in it (drums aside)")
    if len(sounding) > MOST_NOTES:
        raise UserError(f"{len(sounding):,} notes are too many for a melody; at most {MOST_NOTES:,}")
    beat, bar = beat_and_bar(*meter)
    beat_in_quarters = 4 * beat
    tempi = sorted(tempi, key=lambda tempo: tempo[0])
    first = tempi[0][1] if tempi and tempi[0][0] <= 0 else 120.0
    sounding = at_one_tempo(sorted(sounding), tempi, first)
    notes = [(pitch, float(length / beat_in_quarters)) for pitch, length in highest(sounding)]
    return Notes(tuple(notes), float(first / beat_in_quarters), bar)


def at_one_tempo(sounding, tempi, bpm: float) -> list:
    """The same notes at the same times, their starts and ends in quarters of this tempo throughout."""
    if all(tempo == bpm for _, tempo in tempi):
        return sounding
    changes = [(0, 0.0, bpm)]           # (quarter, quarter of the one tempo, bpm from there on)
    for quarter, tempo in tempi:
        start, moved, before = changes[-1]
        changes.append((quarter, moved + (quarter - start) * bpm / before, tempo))
    times = sorted({time for start, end, _ in sounding for time in (start, end)})
    moved, place = {}, 0
    for time in times:
        while place + 1 < len(changes) and changes[place + 1][0] <= time:
            place += 1
        start, there, tempo = changes[place]
        moved[time] = there + (time - start) * bpm / tempo
    return [(moved[start], moved[end], pitch) for start, end, pitch in sounding]


def highest(sounding) -> list:
    """Sorted [(start, end, pitch)] -> [(pitch or None, length)]: at each moment the highest."""
    times = sorted({0} | {time for start, end, _ in sounding for time in (start, end)})
    notes, heap, place = [], [], 0      # heap: (-pitch, end) of those that have begun
    for time, following in zip(times, times[1:]):
        while place < len(sounding) and sounding[place][0] <= time:
            start, end, pitch = sounding[place]
            heapq.heappush(heap, (-pitch, end))
            place += 1
        while heap and heap[0][1] <= time:
            heapq.heappop(heap)
        pitch = -heap[0][0] if heap else None
        notes.append((pitch, following - time))
    return notes


# --- MIDI -------------------------------------------------------------------------------------------------

def parse_midi(data: bytes) -> Notes:
    """A standard MIDI file. Times in ticks, of which the header says how many a quarter has."""
    file = io.BytesIO(data)
    if file.read(4) != b"MThd":
        raise UserError("is no MIDI file (it does not begin with MThd)")
    header = file.read(int.from_bytes(file.read(4), "big"))
    kind, division = int.from_bytes(header[:2], "big"), int.from_bytes(header[4:6], "big")
    if kind > 1 or not 0 < division < 2 ** 15:
        raise UserError(f"a MIDI file of format {kind}, division {division}; save it as format 0 or 1 "
                        f"with ticks a quarter")
    sounding, tempi, meters = [], [], []
    while (chunk := file.read(4)) and len(chunk) == 4:
        content = file.read(int.from_bytes(file.read(4), "big"))
        if chunk == b"MTrk":
            read_track(content, sounding, tempi, meters)

    def quarters(tick):
        return Fraction(tick, division)
    sounding = [(quarters(start), quarters(end), pitch) for start, end, pitch in sounding if end > start]
    tempi = [(quarters(tick), tempo) for tick, tempo in tempi]
    meter = min(meters)[1] if meters else (4, 4)
    return melody_of(sounding, tempi, meter)


def read_track(content: bytes, sounding, tempi, meters):
    """Adds the notes (start, end, pitch), tempi and meters of a track, in ticks."""
    tick, status, place = 0, 0, 0
    begun = {}              # (channel, pitch) -> tick

    def number():           # seven bits a byte, the last one below 128
        nonlocal place
        value = 0
        for _ in range(4):
            byte = content[place]
            place += 1
            value = value << 7 | byte & 127
            if byte < 128:
                return value
        raise UserError("a track has a number of more than four bytes")

    while place < len(content):
        tick += number()
        if content[place] >= 128:       # else the status is that of the event before
            status = content[place]
            place += 1
        if status in (0xff, 0xf0, 0xf7):
            meta = None
            if status == 0xff:
                meta = content[place]
                place += 1
            size = number()
            value = content[place:place + size]
            place += size
            if meta == 0x51 and int.from_bytes(value, "big"):
                tempi.append((tick, 60e6 / int.from_bytes(value, "big")))
            if meta == 0x58 and value[0]:
                meters.append((tick, (value[0], 2 ** min(value[1], 5))))
            continue
        kind, channel = status >> 4, status & 15
        if not 8 <= kind < 15:
            raise UserError(f"a track has {status} in place of an event")
        first = content[place]
        second = 0 if kind in (12, 13) else content[place + 1]
        place += 1 if kind in (12, 13) else 2
        if kind in (8, 9) and channel != 9:     # channel 10, counted from 1, has the drums
            if (channel, first) in begun:
                sounding.append((begun.pop((channel, first)), tick, first))
            if kind == 9 and second:
                begun[channel, first] = tick
    for (_, pitch), start in begun.items():
        sounding.append((start, tick, pitch))


# --- MusicXML ---------------------------------------------------------------------------------------------

def parse_mxl(data: bytes) -> Notes:
    """The score in an .mxl, a zip archive. No more than MAX_BYTES of it are unpacked."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        def read(name):
            with archive.open(name) as file:
                content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise UserError(f"{name} unpacks to more than {MAX_BYTES // 10 ** 6} MB")
            return content
        container = parse_xml(read("META-INF/container.xml"))
        root = container.find(".//{*}rootfile")
        return parse_musicxml(read(root.get("full-path")))


def parse_xml(data: bytes):
    """XML -> its root element. Entities, with which a short file can grow without bound, are refused."""
    def refuse(*entity):
        raise UserError("declares XML entities; save it without")
    parser = expat.ParserCreate()
    parser.EntityDeclHandler = refuse
    parser.Parse(data, True)
    return ElementTree.fromstring(data)


def parse_musicxml(data: bytes) -> Notes:
    """A score-partwise file. Repeats and endings are played; jumps (da capo, coda) are refused."""
    root = parse_xml(data)
    if root.tag != "score-partwise":
        raise UserError(f"is <{root.tag[:30]}>, not the <score-partwise> of MusicXML; export it as that")
    sounding, tempi, meters = [], [], []
    for part in root.iter("part"):
        time = Fraction(0)
        state = {"divisions": 1, "transpose": 0}
        for measure in unfold(segments_of(part)):
            time = read_measure(measure, time, state, sounding, tempi, meters)
    return melody_of(sounding, tempi, meters[0] if meters else (4, 4))


def segments_of(part) -> list:
    """The measures of a part with their repeats and endings."""
    segments = []
    for measure in part.iter("measure"):
        segment = Segment([measure])
        for sound in measure.iter("sound"):
            jumps = {"dacapo", "dalsegno", "tocoda"} & sound.attrib.keys()
            if jumps:
                raise UserError(f"measure {measure.get('number')}: {min(jumps)} is a jump, which is not "
                                f"read; write the notes out")
        for repeat in measure.iter("repeat"):
            if repeat.get("direction") == "forward":
                segment.opens = True
            else:
                segment.closes = True
        for ending in measure.iter("ending"):
            if ending.get("type") == "start":
                segment.ending = ending.get("number")
                if segment.ending not in ("1", "2"):
                    raise UserError(f"measure {measure.get('number')}: the ending {segment.ending!r:.30} "
                                    f"is not read; there may be a first and a second one")
        segments.append(segment)
    return segments


def read_measure(measure, time, state, sounding, tempi, meters):
    """Adds the notes, tempi and meters of a measure that begins at `time` -> where the next one begins."""
    here = start = end = time
    for element in measure:
        if element.tag == "attributes":
            state["divisions"] = int(element.findtext("divisions") or state["divisions"])
            state["transpose"] = int(element.findtext("transpose/chromatic") or state["transpose"])
            if element.find("time/beats") is not None:
                beats, unit = element.findtext("time/beats"), element.findtext("time/beat-type")
                meters.append((int(beats), int(unit)))
        sound = element if element.tag == "sound" else element.find("sound")
        if sound is not None and sound.get("tempo"):
            tempi.append((here, float(sound.get("tempo"))))
        duration = Fraction(float(element.findtext("duration", "0"))) / state["divisions"]
        if element.tag == "backup":
            here -= duration
        elif element.tag == "forward":
            here += duration
        elif element.tag == "note" and duration:        # a grace note has none
            if element.find("chord") is None:
                start, here = here, here + duration
            step = element.findtext("pitch/step")       # rests and drums have none
            if step:
                octave, sharps = int(element.findtext("pitch/octave")), element.findtext("pitch/alter") or 0
                pitch = 12 + 12 * octave + PITCHES[step.lower()] + round(float(sharps)) + state["transpose"]
                sounding.append((start, start + duration, pitch))
        end = max(end, here)
    return end


# --- all of them ------------------------------------------------------------------------------------------

def parse_abc(data: bytes) -> Notes:
    return abc_notation.parse_abc(data.decode("utf-8-sig", errors="replace"))


PARSERS = {".abc": parse_abc, ".mid": parse_midi, ".midi": parse_midi, ".musicxml": parse_musicxml,
           ".xml": parse_musicxml, ".mxl": parse_mxl}


def is_notes(path) -> bool:
    """Whether the name is that of a file of notes, not of a recording."""
    return Path(path).suffix.lower() in PARSERS


def read_notes(path) -> Notes:
    """A file of notes -> Notes. Raises UserError naming the file and the place of what cannot be read."""
    path = Path(path)
    if not is_notes(path):
        raise UserError(f"{path}: notes are read from files that end in {' '.join(PARSERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file of notes")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: has more than {MAX_BYTES // 10 ** 6} MB, too much for a melody in notes")
    try:
        with as_user_error("cannot be read as a melody in notes"):
            return PARSERS[path.suffix.lower()](data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
