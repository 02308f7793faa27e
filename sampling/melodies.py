"""Melodies of the command line, recordings or notes, as chroma; bars as seconds.

    --melody tune.mp3                       a recording; if it is short, it begins anew after its last note
    --melody tune.mid                       a file of notes (data/scores.py)
    --notes "e2 e2 f2 g2" --bpm 100         typed notes (data/notes.py); they begin anew on their bar
"""
import dataclasses
from argparse import Namespace

import numpy as np
import torch

from data.audio import read_audio
from data.notes import FASTEST, SLOWEST, Notes, beat_and_bar, parse_meter, parse_notes
from data.scores import is_notes, read_notes
from sampling.loops import FADE, loop_times
from system.errors import UserError, naming

BPM, METER, DURATION = 120.0, "4/4", 10.0       # defaults
QUIET = 0.01        # of the loudest moment's amplitude: what comes behind the last louder one is no melody


# --- notes ------------------------------------------------------------------------------------------------

def notes_of(notes, melody, bpm, meter) -> Notes | None:
    """The notes of an item: typed ones, or those of a file; None if `melody` is a recording or none."""
    if notes:
        with naming("--notes"):
            return parse_notes(notes, bpm or BPM, meter or METER)
    if melody and is_notes(melody):
        notes = read_notes(melody)
        return dataclasses.replace(notes, bpm=bpm) if bpm else notes
    return None


def bar_seconds(args, notes) -> float | None:
    """Seconds of a bar, by the notes (one a item, None for none) or the flags; None if it is not known."""
    lengths = {60 / melody.bpm * melody.bar for melody in notes if melody is not None}
    if len(lengths) > 1:
        raise UserError("--bars and --loop: the melodies have bars of several lengths; give files of one "
                        "tempo, or --bpm")
    if lengths:
        return lengths.pop()
    _, bar = beat_and_bar(*parse_meter(args.meter or METER))
    return 60 / args.bpm * bar if args.bpm else None


def resolve_duration(args, notes, longest: float):
    """Sets args.duration, whole bars with --bars and --loop. Raises UserError for flags that clash."""
    known = any(melody is not None for melody in notes)
    if args.bpm is not None and not SLOWEST <= args.bpm <= FASTEST:
        raise UserError(f"--bpm {args.bpm:g}: must be from {SLOWEST} to {FASTEST}")
    if args.bars and args.duration:
        raise UserError("--bars and --duration: give one of the two")
    if args.meter and not args.notes and known:
        raise UserError(f"--meter {args.meter}: a file of notes has its own; leave it out")
    if (args.bpm or args.meter) and not (known or args.bars or args.loop):
        raise UserError("--bpm and --meter say how notes, --bars or --loop are counted; give one of these, "
                        "or put the tempo into --text")
    if args.meter and not (known or args.bpm):
        raise UserError(f"--meter {args.meter}: says how many beats a bar has; give their tempo, too: --bpm")
    if not (args.bars or args.loop):
        args.duration = args.duration or DURATION
        return
    bar = bar_seconds(args, notes)
    if args.bars and bar is None:
        raise UserError("--bars needs a tempo: --bpm, --notes or a file of notes")
    duration = args.bars * bar if args.bars else args.duration or DURATION
    if bar is not None:
        duration = max(1, round(duration / bar)) * bar
    if duration > longest:
        raise UserError(f"{duration:.0f} s are too long; at most {longest:.0f} s")
    if args.loop and duration < 2 * FADE:
        raise UserError(f"--loop: {duration:g} s are too short; a loop has {2 * FADE:g} s at least")
    args.duration = duration


def flags_alone(args, item, notes) -> Namespace:
    """The flags that make one item of a batch alone; `item` is its own entry of `notes`.

    An item without notes gets its bars from --bpm and --meter, which then repeat those of the others' notes.
    """
    others = [melody for melody in notes if melody is not None]
    if item is not None or not others:
        return args
    flags = vars(args) | {"bpm": None, "meter": None}
    if args.bars:
        flags |= {"bpm": others[0].bpm, "meter": f"{others[0].bar}/4"}      # a beat of any length does
    return Namespace(**flags)


# --- chroma -----------------------------------------------------------------------------------------------

def read_melodies(model, args, melodies, notes, lead: float) -> list:
    """The chroma (M, Q) of each item's melody, None for none; each recording is read once.

    lead: seconds in front of a loop, 0 without --loop.
    """
    chroma = {None: None}
    for melody, typed in zip(melodies, notes):
        if melody not in chroma:
            chroma[melody] = melody_chroma(model, args, melody, typed, lead)
    return [chroma[melody] for melody in melodies]


def melody_chroma(model, args, melody, notes, lead: float):
    """The chroma (M, Q) of one melody, longer than the music."""
    seconds = lead + args.duration + model.config.segment_duration
    rate = model.sample_rate / model.config.hop             # chroma frames a second
    time = np.arange(int(seconds * rate) + 2) / rate
    if args.loop:
        time = loop_times(time, lead, args.duration)
    if notes is not None:
        return notes.chroma_at(time, model.config)
    wav = read_audio(melody, model.sample_rate, 1, duration=seconds + 10)
    with naming(f"--melody {melody}"):
        chroma = model.melody_chroma(again(wav, model.sample_rate, seconds), stem=args.stem)
    return at_times(chroma, time, rate, model.config)


def at_times(chroma, time, rate: float, config):
    """Chroma (M, Q) of a recording, `rate` frames a second -> its frames at these times (s).

    Half a frame is always rounded down: rounded to even, every other frame would come twice, the rest never.
    Where time goes back to the start, a note begins anew.
    """
    frames = np.floor(time * rate + 0.5 - 1e-3).astype(int)
    chroma = chroma[torch.from_numpy(frames).clamp(max=len(chroma) - 1)]
    if config.melody_form == "notes":
        held, begins = chroma.chunk(2, -1)                              # classes: see `one_hot_notes`
        back = torch.from_numpy(np.diff(time, prepend=time[0]) < 0)
        begun = torch.cat([torch.zeros_like(held), held + begins], -1)
        chroma = torch.where(back[:, None], begun, chroma)
    return chroma


def again(wav, rate: int, seconds: float):
    """Wave (1, L) -> the same, or if it is shorter, over and over without the silence at its end."""
    wanted = round(seconds * rate)
    if wav.shape[-1] >= wanted:
        return wav
    loud = (wav.abs() > QUIET * wav.abs().max()).any(0).nonzero()
    if len(loud):
        wav = wav[:, :int(loud[-1]) + 1]
    return wav.repeat(1, -(-wanted // wav.shape[-1]))[:, :wanted]
