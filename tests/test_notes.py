"""Melodies in notes: the notation, .abc, MIDI and MusicXML, and their chroma.

    python -m pytest tests/test_notes.py
"""
import dataclasses
import json
import shlex
import struct
import zipfile

import numpy as np
import pytest
import soundfile
import torch

from chroma import PITCH_CLASSES, ChromaExtractor
from commands import command, refused, sample_main, sampling, worked
from config import Config
from constants import RATE, ROOT, tone
from data.notes import Notes, parse_bars, parse_notes, pitch_classes
from data.render import load_tunes, render_clip
from data.scores import MAX_BYTES, read_notes
from sample import MusicGen
from sampling.loops import lead_of, loop_times, make_loop, seam
from sampling.melodies import again, at_times
from system.errors import UserError

CONFIG = Config(sample_rate=16000, radix2_exp=13)


def pitches(melody):
    return [pitch for pitch, _ in melody.notes]


def lengths(melody):
    return [length for _, length in melody.notes]


def named(chroma) -> list[str]:
    """Chroma (M, Q) as names of pitch classes, "-" for none."""
    return [PITCH_CLASSES[int(row.argmax())] if row.any() else "-" for row in chroma]


def abc(tmp_path, music, fields="L:1/4\nK:C"):
    (tmp_path / "tune.abc").write_text(f"X:1\nT:a tune\n{fields}\n{music}\n")
    return read_notes(tmp_path / "tune.abc")


# --- the notation of tunes.txt ----------------------------------------------------------------------------

def test_notation_reads_as_its_description_says():
    notes, bars = parse_bars("c#'3/2 bb,/2 r2 | g2~ | g", 2)
    assert notes == [(73, 0.75), (58, 0.25), (None, 1.0), (67, 1.5)]
    assert bars == [2.0, 1.0, 0.5]
    assert parse_notes("e4 e f g | g f e d").beats == 5.5
    assert parse_notes("c3 d3 | e6", meter="6/8") == Notes(((60, 1.0), (62, 1.0), (64, 2.0)), 120.0, 2)


@pytest.mark.parametrize("text, words", [
    ("c2 | d2 h2", "bar 2, note 2: 'h2'"), ("c0", "'c0'"), ("c/0", "'c/0'"),
    ("c2 d2~ | c2", "bar 2, note 1: .*tied"), ("c2 d2~", "bar 1, note 2: it is tied"),
    ("", "no note"), ("r8 | r8", "no note"), ("c2 c99999", "'c99999'"), ("c8 | d4 | e8", "bar 2 has 2 beats"),
    ("c8 | d8 e | f8", "bar 2 has 4.5 beats"), ("c'''''''", "midi pitch"), ("C2", "'C2'")])
def test_a_wrong_note_is_told_with_its_place(text, words):
    with pytest.raises(UserError, match=words):
        parse_notes(text)


@pytest.mark.parametrize("values", [dict(bpm=0), dict(bpm=float("nan")), dict(bar=0), dict(notes=((60, -1),)),
                                    dict(notes=((200, 1),)), dict(notes=((60, 1),) * 200_000)],
                         ids=lambda values: str(values)[:30])
def test_notes_that_make_no_sense_are_refused(values):
    with pytest.raises(UserError):
        Notes(**dict(notes=((60, 1.0),)) | values)


# --- chroma -----------------------------------------------------------------------------------------------

def test_chroma_has_the_note_at_the_center_of_each_frame():
    chroma = parse_notes("c4 bb'4 | r4 g4", bpm=60).chroma(CONFIG, 8)
    assert chroma.shape == (64, 12) and set(chroma.sum(1).tolist()) == {0.0, 1.0}
    assert named(chroma) == 16 * ["C"] + 16 * ["A#"] + 15 * ["-"] + 16 * ["G"] + ["C"]


def test_a_melody_begins_anew_on_its_bar_without_drift():
    melody = parse_notes("c2 | g4 e4 | d2", bpm=97)        # upbeat and last bar: two beats of four
    assert melody.beats == 6 and melody.period == 8
    names = named(melody.chroma(CONFIG, 600))
    for turn in (1, 10, 110):
        start = turn * 8 * 60 / 97                          # seconds
        m = round((start + 0.25) * 16000 / CONFIG.hop)
        assert names[m] == "C" and names[m - 6] == "-"


def test_melodies_as_notes_have_octaves_and_beginnings():
    """What chroma does not say: in which of two octaves, and that a repeated note is not held."""
    config = dataclasses.replace(CONFIG, melody_form="notes")
    melody = parse_notes("c4 c4 | c'4 r4", bpm=60)
    frames = melody.chroma(config, 16)
    assert frames.shape == (126, 48) and set(frames.sum(1).tolist()) == {0.0, 1.0}
    classes = frames.argmax(1)
    begins = (frames[:, 24:].sum(1) > 0).nonzero().flatten()
    seconds = [round(float(m) * config.hop / config.sample_rate, 1) for m in begins]
    assert seconds == [0, 2.0, 4.1, 8.1, 10.1, 12.0, 16.0]
    low, high = int(classes[begins[0]]), int(classes[begins[2]])
    assert [int(classes[m]) for m in begins] == [low, low, high, low, low, high, low]
    assert {low, high} == {24, 24 + 12}
    assert torch.equal(pitch_classes(frames, 12), melody.chroma(CONFIG, 16))
    for written in ("c,4 c,4 | c4 r4", "c'4 c'4 | c''4 r4"):        # an octave lower, and higher
        assert torch.equal(parse_notes(written, bpm=60).chroma(config, 16), frames)


def test_chroma_agrees_with_that_of_a_recording_of_the_notes():
    tune = next(tune for tune in load_tunes() if tune.id == "ode-to-joy")
    truth = dict(instrument="organ", bpm=100, key="D", first_bar=0, drums=False, bass=False, chords=None,
                 soft=False)
    _, wav = render_clip(tune, truth, 16.0, 16000, np.random.default_rng(0))
    heard = ChromaExtractor(16000, radix2_exp=13)(torch.from_numpy(wav)[None])[0]
    asked = Notes(tune.notes, 100).chroma(CONFIG, 16)
    agreement = (heard.argmax(1) == asked.argmax(1)[:len(heard)]).float().mean()
    assert agreement > 0.9


# --- .abc -------------------------------------------------------------------------------------------------

def test_a_tune_of_abc(tmp_path):
    melody = abc(tmp_path, "FFGA | A>G F2 |1 D4 :|2 [DF]4 |]", "M:4/4\nL:1/4\nQ:1/4=90\nK:D")
    first = [66, 66, 67, 69, 69, 67, 66]
    assert pitches(melody) == first + [62] + first + [66]
    assert lengths(melody)[4:8] == [1.5, 0.5, 2, 4] and melody.bpm == 90 and melody.bar == 4


@pytest.mark.parametrize("key, sharps", [
    ("G", "F"), ("D", "FC"), ("Em", "F"), ("A dorian", "F"), ("Dmix", "F"), ("HP", "FC"), ("none", ""),
    ("F#m", "FCG"), ("C", ""), ("G minor clef=treble", ""), ("E Phr", "")])
def test_keys_of_abc(tmp_path, key, sharps):
    melody = abc(tmp_path, "FCGDA", f"L:1/4\nK:{key}")
    assert pitches(melody) == [p + (letter in sharps) for letter, p in zip("FCGDA", (65, 60, 67, 62, 69))]


def test_flat_keys_of_abc(tmp_path):
    assert pitches(abc(tmp_path, "BEADG", "L:1/4\nK:Ebmaj")) == [70, 63, 68, 62, 67]


@pytest.mark.parametrize("music, expected", [
    ("^F F | F", [66, 66, 65]), ("^F f | =F", [66, 78, 65]), ("__B _B, c' C,", [69, 58, 84, 48]),
    ("^F- | F F", [66, 66, 66 - 1]), ('"Am" c {de} !trill! d ~e (fg) "text"', [72, 74, 76, 77, 79]),
    ("c [K:G] f [K:F] b", [72, 78, 82]), ("|: c :: d :|", [72, 72, 74, 74]),
    ("c |: d | e :| f", [72, 74, 76, 74, 76, 77]),
    ("c z x d % e", [72, None, None, 74]), ("c ! d\nP:B\ne", [72, 74, 76]), ("[ceg] [ac']", [79, 84])])
def test_pitches_of_abc(tmp_path, music, expected):
    assert pitches(abc(tmp_path, music)) == expected


@pytest.mark.parametrize("music, expected", [
    ("c2 c/ c// c/4 c3/2 z2", [2, 0.5, 0.25, 0.25, 1.5, 2]), ("(3ccc (2cc c", [2 / 3] * 3 + [1.5] * 2 + [1]),
    ("c>c c<<c", [1.5, 0.5, 0.25, 1.75]), ("(3:2:2 c2c c", [4 / 3, 2 / 3, 1]), ("[c2e2] Z2 c", [2, 8, 1])])
def test_lengths_of_abc(tmp_path, music, expected):
    assert lengths(abc(tmp_path, music)) == pytest.approx(expected)


def test_tempo_and_meter_of_abc(tmp_path):
    jig = abc(tmp_path, "c3 d3", "M:6/8\nQ:3/8=90\nK:C")
    assert (jig.bpm, jig.bar, lengths(jig)) == (90, 2, [1, 1])
    assert abc(tmp_path, "c3 d3", "M:6/8\nQ:1/4=90\nK:C").bpm == 60
    assert lengths(abc(tmp_path, "c", "M:2/4\nK:C")) == [0.25]
    assert abc(tmp_path, "c", 'M:C|\nQ:"Allegro" 1/2=80\nK:C').bpm == 80


@pytest.mark.parametrize("music, place", [
    ("c d ? e", r"line 5, column 5 \(bar 1\): '\?'"), ("c | d | h", r"line 5, column 9 \(bar 3\): 'h'"),
    ("c\nd c0", "line 6, column 3"), ("c\nV:1\nd\nV:2\ne", "line 8, .*voice"), ("c\nX:2\nd", "second tune"),
    ("c\nM:3/4\nd", "line 6"), ("K:H", "no key"), ("c [3 d", "ending"), ("c !D.C.! d", "jump"),
    ("> c", "follows no note"), ("[c|e]", "'"), ("c [M:3/4] d", "within the tune"), ("z4", "no note"),
    ("c & d", "'&'"), ("m:~d = c\nc", "macro")])
def test_what_abc_is_not_read_is_told_with_its_place(tmp_path, music, place):
    with pytest.raises(UserError, match=place) as error:
        abc(tmp_path, music)
    assert "tune.abc" in str(error.value)


# --- MIDI -------------------------------------------------------------------------------------------------

def number(value) -> bytes:
    groups = [value & 127]
    while value := value >> 7:
        groups.append(value & 127 | 128)
    return bytes(reversed(groups))


def track(*events) -> bytes:
    content = b"".join(number(delta) + event for delta, event in events) + b"\0\xff\x2f\0"
    return b"MTrk" + struct.pack(">I", len(content)) + content


def midi(*tracks, kind=1, division=480) -> bytes:
    return b"MThd" + struct.pack(">IHHH", 6, kind, len(tracks), division) + b"".join(tracks)


def tempo(bpm) -> bytes:
    return b"\xff\x51\x03" + round(60e6 / bpm).to_bytes(3, "big")


METER = b"\xff\x58\x04\x03\x02\x18\x08"     # 3/4
LEAD = track((480, b"\x90\x48\x40"), (240, b"\x48\0"), (0, b"\xc0\x05"), (0, b"\x90\x4a\x40"),
             (480, b"\x80\x4a\0"))


def test_a_midi_file(tmp_path):
    """A rest, then two notes, the first with running status, over a drone and drums."""
    drone = track((480, b"\x91\x30\x40"), (1440, b"\x81\x30\0"))
    drums = track((0, b"\x99\x64\x40"), (1920, b"\x99\x64\0"))
    path = tmp_path / "tune.mid"
    path.write_bytes(midi(track((0, tempo(100)), (0, METER)), LEAD, drone, drums))
    melody = read_notes(path)
    assert melody.notes == ((None, 1), (72, 0.5), (74, 1), (48, 1.5))
    assert melody.bpm == pytest.approx(100) and melody.bar == 3 and melody.period == 6


def test_a_tempo_of_midi_that_changes_moves_the_notes(tmp_path):
    path = tmp_path / "tune.mid"
    path.write_bytes(midi(track((0, tempo(120)), (720, tempo(60))), LEAD))
    assert read_notes(path).notes == ((None, 1), (72, 0.5), (74, pytest.approx(2)))
    assert read_notes(path).bpm == pytest.approx(120)


# --- MusicXML ---------------------------------------------------------------------------------------------

DOCTYPE = '<!DOCTYPE score-partwise PUBLIC "-//Recordare//DTD MusicXML 4.0//EN" "http://x.invalid/a.dtd">'


def note(step, duration, inside="", alter=0, octave=4) -> str:
    pitch = f"<pitch><step>{step}</step><alter>{alter}</alter><octave>{octave}</octave></pitch>"
    return f"<note>{inside}{pitch if step else '<rest/>'}<duration>{duration}</duration></note>"


def musicxml(*measures, before=DOCTYPE) -> str:
    first = ("<attributes><divisions>2</divisions><time><beats>3</beats><beat-type>4</beat-type></time>"
             "</attributes><direction><sound tempo='90'/></direction>")
    text = "".join(f"<measure number='{n}'>{first if n == 1 else ''}{measure}</measure>"
                   for n, measure in enumerate(measures, 1))
    return f"<?xml version='1.0'?>{before}<score-partwise><part id='P1'>{text}</part></score-partwise>"


REPEAT = "<barline><repeat direction='backward'/></barline>"


def ending(number):
    return f"<barline><ending number='{number}' type='start'/></barline>"


TUNE = musicxml(note("C", 4) + note("F", 2, alter=1) + note("A", 2, "<chord/>"),
                ending(1) + note("D", 6) + REPEAT,
                ending(2) + note("B", 4, alter=-1) + note("", 2) + "<backup><duration>2</duration></backup>"
                + note("E", 1, octave=5))
PLAYED = ((60, 2), (69, 1), (62, 3), (60, 2), (69, 1), (70, 2), (76, 0.5))


def test_a_musicxml_file_and_one_in_an_archive(tmp_path):
    (tmp_path / "tune.musicxml").write_text(TUNE)
    melody = read_notes(tmp_path / "tune.musicxml")
    assert melody == Notes(PLAYED, 90.0, 3)
    with zipfile.ZipFile(tmp_path / "tune.mxl", "w") as archive:
        archive.writestr("META-INF/container.xml", "<container xmlns='urn:x'><rootfiles><rootfile "
                         "full-path='a/b.xml'/></rootfiles></container>")
        archive.writestr("a/b.xml", TUNE)
    assert read_notes(tmp_path / "tune.mxl") == melody


# --- files of strangers -----------------------------------------------------------------------------------

LAUGHS = "<!DOCTYPE a [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;'>]>"
FILE = "<!DOCTYPE a [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>"
ZERO = "<attributes><divisions>0</divisions></attributes>"
STRANGE = {
    "sound.mp3": (b"", "end in .abc .mid"),
    "gone.abc": (None, "no such"),
    "empty.abc": (b"", "K:"), "empty.mid": (b"", "MThd"), "empty.xml": (b"", "cannot be read"),
    "noise.abc": (bytes(range(256)), "K:"),
    "noise.mid": (b"MThd" + bytes(range(256)), "cannot be read|format"),
    "noise.mxl": (bytes(range(256)), "cannot be read"),
    "large.abc": (b"K:C\n" + b"c" * MAX_BYTES, "4 MB"), "many.abc": (b"K:C\n" + b"c" * 20_001, "too many"),
    "laughs.xml": (musicxml(note("&b;", 1), before=LAUGHS).encode(), "entities"),
    "file.xml": (musicxml(note("&a;", 1), before=FILE).encode(), "entities"),
    "timewise.xml": (b"<score-timewise/>", "score-timewise"),
    "exponent.xml": (musicxml(note("C", "1e999999999")).encode(), "cannot be read|length"),
    "zero.xml": (musicxml(ZERO + note("C", 1)).encode(), "cannot"),
    "jump.xml": (musicxml("<sound dacapo='yes'/>" + note("C", 1)).encode(), "measure 1: dacapo"),
    "rests.xml": (musicxml(note("", 6)).encode(), "no note"),
    "deep.xml": (b"<a>" * 50_000 + b"</a>" * 50_000, "not the"),
    "numbers.mid": (midi(b"MTrk\0\0\1\0" + b"\xff" * 256), "four bytes"),
    "cut.mid": (midi(LEAD)[:30], "no note|cannot be read"),
    "smpte.mid": (midi(LEAD, division=0xe728), "ticks"),
    "drums.mid": (midi(track((0, b"\x99\x64\x40"), (9, b"\x99\x64\0"))), "no note"),
    "long.mid": (midi(track((2 ** 27, b"\x90\x48\x40"), (240, b"\x48\0"))), "beats"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_files_of_strangers_are_refused_by_name(tmp_path, name):
    content, words = STRANGE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_notes(tmp_path / name)
    assert name in str(error.value)


def test_an_archive_is_not_unpacked_without_bound(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.mxl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/container.xml", b" " * (MAX_BYTES + 2))
    with pytest.raises(UserError, match="unpacks to more"):
        read_notes(tmp_path / "bomb.mxl")


# --- sampling ---------------------------------------------------------------------------------------------

TYPED = "e2 e2 f2 g2 | g2 f2 e2 d2"


def asked(out):
    return json.loads(out.with_suffix(".json").read_text())


def test_notes_are_melodies_from_python_too(world):
    musicgen = MusicGen.from_pretrained(world / "lm", "cpu")
    notes = parse_notes("c/2 g/2", bpm=300)
    codes = [musicgen.generate(["a", None], melodies, duration=0.3).numpy()
             for melodies in (notes, [notes, None], None)]
    assert np.array_equal(codes[0][0], codes[1][0]) and np.array_equal(codes[1][1], codes[2][1])
    assert not np.array_equal(codes[0], codes[2])
    with pytest.raises(UserError, match="prompt: must be a wave"):
        musicgen.generate(["a"], prompt=notes)


def test_notes_on_the_command_line_give_whole_bars_and_a_command_that_gives_them_again(world, tmp_path):
    flags = ["--notes", TYPED, "--bpm", "900", "--bars", "2"]
    worked(sampling(world, "--out", "a.wav", *flags, cwd=tmp_path))
    assert soundfile.info(tmp_path / "a.wav").frames == round(2 * 4 * 60 / 900 * RATE)
    again = shlex.split(asked(tmp_path / "a.wav")["command"])[2:]
    assert again[again.index("--notes") + 1] == TYPED and "--duration" not in again
    first = (tmp_path / "a.wav").read_bytes()
    worked(command(sample_main, *again, "--overwrite", cwd=tmp_path))
    assert (tmp_path / "a.wav").read_bytes() == first


@pytest.mark.parametrize("flags", [
    ["--melody", "tune.abc", "--melody", "", "--bars", "2"],
    ["--notes", "c4 | d3 e3", "--notes", "", "--bpm", "700", "--meter", "3/4"]])
def test_an_item_of_a_batch_without_notes_is_made_again_by_its_command(world, tmp_path, flags):
    (tmp_path / "tune.abc").write_text("M:6/8\nL:1/8\nQ:3/8=999\nK:C\nC3E3|")
    out = tmp_path / "a_1.wav"
    worked(sampling(world, "--out", "a.wav", "--text", "a", "--text", "b", *flags, cwd=tmp_path))
    first, again = soundfile.read(out)[0], shlex.split(asked(out)["command"])[2:]
    worked(command(sample_main, *again, "--overwrite", cwd=tmp_path))
    second = soundfile.read(out)[0]
    assert first.shape == second.shape and np.abs(first - second).max() < 1e-3


def test_files_of_notes_and_a_page_of_them(world, tmp_path):
    (tmp_path / "tune.abc").write_text("M:2/4\nL:1/4\nQ:1/4=600\nK:C\nCE|")
    worked(sampling(world, "--out", "a.wav", "--melody", "tune.abc", "--page", "page", cwd=tmp_path))
    assert "melody asked for" in (tmp_path / "page" / "index.html").read_text()


@pytest.mark.parametrize("flags, words", [
    (["--notes", "h2"], "--notes: bar 1, note 1"),
    (["--notes", "c2", "--melody", "x.wav"], "give one of the two"),
    (["--melody", "gone.abc"], "gone.abc"), (["--bars", "2"], "needs a tempo"),
    (["--bpm", "2", "--bars", "1"], "--bpm"),
    (["--bpm", "100"], "--bpm"), (["--loop", "--meter", "3/4"], "--meter 3/4"),
    (["--notes", "c2", "--meter", "x"], "'x' is no meter"),
    (["--bars", "0", "--bpm", "100"], "--bars"), (["--bars", "9999", "--bpm", "20"], "too long"),
    (["--prompt_from", "1"], "--prompt_from"), (["--loop", "--save_codes"], "--loop and --save_codes"),
    (["--bars", "1", "--bpm", "99", "--duration", "1"], "--bars and --duration")])
def test_flags_that_make_no_sense(world, tmp_path, flags, words):
    refused(sampling(world, "--out", "a.wav", *flags, cwd=tmp_path), words)
    assert not any(tmp_path.iterdir())


def test_a_part_of_a_recording_as_prompt(world, tmp_path):
    wav = np.concatenate([tone(1.0, frequency=f) for f in (220, 440, 880)])
    soundfile.write(tmp_path / "long.wav", wav, RATE)
    soundfile.write(tmp_path / "part.wav", wav[RATE:RATE + RATE // 10], RATE)
    refused(sampling(world, "--out", "a.wav", "--prompt", "long.wav", cwd=tmp_path), "--prompt_seconds")
    part = ["--prompt", "long.wav", "--prompt_from", "1", "--prompt_seconds", "0.1"]
    worked(sampling(world, "--out", "a.wav", *part, "--duration", "0.2", cwd=tmp_path))
    more = sampling(world, "--out", "c.wav", "--prompt", "part.wav", "--prompt_seconds", "0.15",
                    "--duration", "0.2", cwd=tmp_path)
    worked(more)
    assert "ends after 0.10 s of the 0.15 s" in more.err
    worked(sampling(world, "--out", "b.wav", "--prompt", "part.wav", "--duration", "0.2", cwd=tmp_path))
    a, b = (soundfile.read(tmp_path / name)[0] for name in ("a.wav", "b.wav"))
    assert np.abs(a - b).max() < 1e-3


def test_a_short_recording_begins_anew_after_its_last_note():
    wav = torch.zeros(1, 1000)
    wav[:, :600] = torch.linspace(0.5, 1, 600)
    repeated = again(wav, 1000, 2.0)
    assert torch.equal(repeated, wav[:, :600].repeat(1, 4)[:, :2000])
    assert torch.equal(again(wav, 1000, 0.9), wav)


# --- loops ------------------------------------------------------------------------------------------------

def test_the_measure_of_a_seam_finds_a_cut():
    t = torch.arange(32000) / 8000
    whole = 0.5 * torch.sin(2 * torch.pi * 440 * t)[None]
    there, elsewhere = seam(whole, 8000)["click"]
    assert there < 1.1 * elsewhere
    there, elsewhere = seam(whole[:, :-7], 8000)["click"]
    assert there > 3 * elsewhere


@pytest.mark.parametrize("length", [8.0, 7.9, 4.032, 8.06])
def test_a_loop_has_each_frame_of_a_recording_once(length):
    """... in order, whatever fraction of a frame its length has."""
    rate = CONFIG.sample_rate / CONFIG.hop                              # 7.8125; 8 s are 62.5 frames
    lead = lead_of(length, rate)
    time = loop_times(np.arange(int((lead + length) * rate) + 1) / rate, lead, length)
    frames = torch.arange(100.0)[:, None]
    places = at_times(frames, time, rate, CONFIG)[:, 0]
    steps = places.diff()
    assert (steps < 0).sum() == 1 and (steps[steps > 0] == 1).all() and (steps != 0).all()
    assert int((places == 0).sum()) <= 1 and abs(places - torch.from_numpy(time * rate)).max() < 0.51


def test_a_loop_begins_with_a_beginning():
    """Where the melody goes back to its start, a note begins, in the form that has beginnings."""
    config = dataclasses.replace(CONFIG, melody_form="notes")
    rate, length = config.sample_rate / config.hop, 7.9
    lead = lead_of(length, rate)
    time = loop_times(np.arange(80) / rate, lead, length)
    back = (np.diff(time) < 0).nonzero()[0].tolist()
    held = parse_notes("c8", bpm=5)
    of_notes = held.chroma_at(time, config)
    recorded = held.chroma(config, 20)
    of_recording = at_times(recorded, time, rate, config)
    for melody in (of_notes, of_recording):
        begins = melody[:, 2 * config.n_chroma:].sum(1)
        assert melody.sum(1).eq(1).all() and begins[1:].nonzero().flatten().tolist() == back
        assert pitch_classes(melody, 12).argmax(1).eq(0).all()


def test_a_loop_of_the_shipped_model_has_no_seam():
    """The join is one that the model played; what is faded is no worse than the inside, on the whole."""
    model = MusicGen.from_pretrained(ROOT / "checkpoints" / "tiny", "cpu")
    notes, rate = parse_notes(TYPED, bpm=200), model.sample_rate
    length = 1.2        # s, a bar
    lead = lead_of(length, rate / model.config.hop)
    time = np.arange(80) * model.config.hop / rate
    chroma = notes.chroma_at(loop_times(time, lead, length), model.config)
    duration = lead + length + 0.02
    codes = model.generate_codes(4 * ["a fast organ, alone"], 4 * [chroma], duration=duration, seeds=range(4))
    ratios = []
    for wav in model.decode(codes, duration):
        loop, fade = make_loop(wav, rate, lead, length)
        assert loop.shape == (1, round(length * rate))
        begin = round(lead * rate)
        joined = torch.cat([loop[:, -400:], loop[:, :400]], 1)
        assert torch.allclose(joined, wav[:, begin - 400:begin + 400], atol=1e-6)  # a crossfade may end here
        ratios.append([there / elsewhere for there, elsewhere in seam(loop, rate, fade).values()])
    assert all(np.mean(ratios, 0) <= 1), ratios         # level, click, attack


def test_a_loop_on_the_command_line(world, tmp_path):
    worked(sampling(world, "--out", "a.wav", "--loop", "--duration", "0.9", cwd=tmp_path))
    assert soundfile.info(tmp_path / "a.wav").frames == round(0.9 * RATE)
    with pytest.raises(UserError, match="a loop of 0.3 s takes 0.6 s"):
        make_loop(torch.zeros(1, 900), 1000, 0.3, 0.3)
