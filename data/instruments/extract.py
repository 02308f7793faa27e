"""Cuts the recorded notes in this folder out of a SoundFont: a few an instrument, a bass and a drum kit.

    apt install fluidsynth musescore-general-soundfont
    python data/instruments/extract.py /usr/share/sounds/sf3/MuseScore_General.sf3

Each instrument becomes one Ogg file of notes in slots of equal length, which data/sampler.py resamples to
the pitches in between; notes.json says which pitches they are. The sounds are those of MuseScore General
(MIT, parts in the public domain: LICENSE.txt).
"""
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the project
from system.command import run
from system.errors import UserError

FOLDER = Path(__file__).parent
FONT = "/usr/share/sounds/sf3/MuseScore_General.sf3"
RATE = 32000
# General MIDI program (from 0), lowest and highest pitch, how many notes, seconds a note
INSTRUMENTS = {
    "flute": (73, 60, 91, 8, 3.0),
    "violin": (40, 55, 91, 9, 3.0),
    "cello": (42, 38, 72, 9, 3.0),
    "guitar": (24, 43, 79, 9, 2.5),
    "harp": (46, 36, 91, 10, 2.5),
    "piano": (0, 33, 96, 12, 3.0),
    "organ": (19, 36, 84, 9, 2.5),
    "clarinet": (71, 50, 86, 9, 3.0),
    "trumpet": (56, 54, 82, 8, 3.0),
    "glockenspiel": (9, 72, 103, 8, 2.0),
    "choir": (52, 48, 84, 9, 3.0),
    "synth": (81, 48, 88, 8, 2.0),
    "bass": (33, 28, 50, 6, 2.0),
}
# General MIDI's numbers of percussion
DRUMS = {"kick": 36, "snare": 38, "hat": 42, "open_hat": 46, "tom": 45, "crash": 49, "ride": 51, "shaker": 82}
DRUM_SECONDS = 1.0
VELOCITY = 90


def midi(events, program: int, channel: int) -> bytes:
    """A MIDI file: events (second, pitch, seconds held), a tick being a millisecond."""
    timed = []
    for start, pitch, length in events:
        timed.append((start, bytes([0x90 | channel, pitch, VELOCITY])))
        timed.append((start + length, bytes([0x80 | channel, pitch, 0])))
    timed.sort(key=lambda event: event[0])
    track, now = bytes([0, 0xC0 | channel, program]), 0
    for second, message in timed:
        at = round(1000 * second)
        track += variable_length(at - now) + message
        now = at
    track += variable_length(500) + b"\xff\x2f\x00"
    tempo = b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big")    # a quarter note is a second
    body = tempo + track
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 1000) + b"MTrk" + struct.pack(">I", len(body)) + body


def variable_length(number: int) -> bytes:
    """A number as MIDI files write times: seven bits a byte, the last one without the highest bit."""
    parts = [number & 127]
    while number := number >> 7:
        parts.append(number & 127 | 128)
    return bytes(reversed(parts))


def play(font: str, events, program: int, channel: int = 0) -> np.ndarray:
    """What fluidsynth plays, without reverb and chorus, as mono (L,)."""
    with tempfile.TemporaryDirectory() as folder:
        score, wav = Path(folder) / "score.mid", Path(folder) / "out.wav"
        score.write_bytes(midi(events, program, channel))
        flags = ["-ni", "-R", "0", "-C", "0", "-g", "0.6", "-r", str(RATE), "-T", "wav", "-O", "float"]
        command = ["fluidsynth", *flags, "-F", str(wav), font, str(score)]
        subprocess.run(command, check=True, capture_output=True)
        samples, _ = soundfile.read(wav, dtype="float32", always_2d=True)
    return samples.mean(1)


def slots(font: str, pitches, seconds: float, program: int, channel: int = 0) -> np.ndarray:
    """One note of `seconds` after the other, each faded out at its end (n * seconds * RATE,)."""
    gap = seconds + 2.0     # so that none rings into the next
    played = play(font, [(n * gap, pitch, seconds) for n, pitch in enumerate(pitches)], program, channel)
    L, fade = round(seconds * RATE), round(0.02 * RATE)
    out = []
    for n in range(len(pitches)):
        start = round(n * gap * RATE)
        note = np.zeros(L, np.float32)
        part = played[start:start + L]
        note[:len(part)] = part
        note[-fade:] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(fade) / fade, dtype=np.float32)
        out.append(note)
    return np.concatenate(out)


def write(name: str, samples: np.ndarray):
    """An Ogg file, with its peak at 0.7."""
    samples = samples * (0.7 / np.abs(samples).max())
    with soundfile.SoundFile(FOLDER / f"{name}.ogg", "w", RATE, 1, format="OGG", subtype="VORBIS",
                             compression_level=0.45) as file:
        for start in range(0, len(samples), RATE):      # libsndfile's encoder needs small blocks
            file.write(samples[start:start + RATE])


def main(font=None):
    if font is None or not Path(font).is_file() or not shutil.which("fluidsynth"):
        raise UserError(f"which SoundFont, for example {FONT}? It must exist, and fluidsynth, too: apt "
                        f"install fluidsynth musescore-general-soundfont")
    notes = {"rate": RATE}
    for name, (program, low, high, count, seconds) in INSTRUMENTS.items():
        pitches = [round(pitch) for pitch in np.linspace(low, high, count)]
        write(name, slots(font, pitches, seconds, program))
        notes[name] = {"pitches": pitches, "seconds": seconds}
    write("drums", slots(font, list(DRUMS.values()), DRUM_SECONDS, 0, channel=9))
    notes["drums"] = {"strokes": list(DRUMS), "seconds": DRUM_SECONDS}
    (FOLDER / "notes.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, *sys.argv[1:2])
