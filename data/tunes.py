"""The embedded data set: 360 public-domain melodies, rendered as audio, with captions of what was rendered.

The notes are in tunes.txt (real folk and classical tunes with title and origin). Every clip is one tune in
one key, tempo and instrument, with or without chords, bass and drums (data/render.py), played on recorded
notes (data/instruments); beside each recording lie a sidecar .json (caption and ground truth) and the melody
alone, as a recording or as notes. Training, validation and test clips share no tune. A quarter as many clips
of sounds that are no music are for the codec alone (data/sounds.py).

    python data/tunes.py            # data/tunes/{train,valid,test}/{songs,sounds}: 30 h in a few minutes
    python data/tunes.py --one "Ode to Joy" --instrument piano --to ode.wav

Offline and deterministic: clip i of a split is drawn from a generator seeded (seed, split, i), whoever
renders it.
"""
import json
import multiprocessing
import signal
import sys
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, wherever this is called from
from data.audio import to_int16
from data.describe import sidecar
from data.render import KEYS, draw_truth, load_tunes, melody_abc, render_clip, tunes_of
from data.sampler import INSTRUMENTS
from data.segments import SPLITS
from data.sounds import draw_sounds
from system.command import Parser, run
from system.errors import UserError
from system.files import check_writable, write_atomic


SOUNDS = 4          # clips of music for each of other sounds


def write_wav(path: Path, wav: np.ndarray, sample_rate: int):
    def write(temporary):
        soundfile.write(temporary, to_int16(wav), sample_rate, subtype="PCM_16", format="WAV")
    write_atomic(path, write)


def write_sounds(args, split: str, index: int):
    """Clip `index` of those that are no music."""
    rng = np.random.default_rng([args.seed, SPLITS.index(split), index, 2])
    wave = draw_sounds(args.seconds, args.sample_rate, rng)
    write_wav(Path(args.out) / split / "sounds" / f"{index:05d}.wav", wave, args.sample_rate)


def write_clip(job):
    """Renders clip `index` of a split into its folder; the sidecar comes last: with one, a clip is whole."""
    args, split, index = job
    if index % SOUNDS == 0:
        write_sounds(args, split, index // SOUNDS)
    tunes = tunes_of(split)
    tune = tunes[index % len(tunes)]
    seed = [args.seed, SPLITS.index(split), index]
    # captions have their own generator: a change of wording leaves the music as it is, and changes no more
    # than the octave of melodies as notes, which is drawn after it
    words = np.random.default_rng([*seed, 0])
    rng = np.random.default_rng([*seed, 1])
    truth = draw_truth(tune, rng)
    fields = sidecar(tune, truth, words)
    mix, melody = render_clip(tune, truth, args.seconds, args.sample_rate, rng)
    folder = Path(args.out) / split / "songs"
    file = f"{index:05d}-{tune.id}"
    write_wav(folder / f"{file}.wav", mix, args.sample_rate)
    # half of the melodies are told as they were written, half as they are heard: a user may give either
    fields["melody"] = f"melodies/{file}." + ("wav" if index % 2 else "abc")
    if index % 2:
        write_wav(folder / fields["melody"], melody, args.sample_rate)
    else:
        write_atomic(folder / fields["melody"], melody_abc(tune, truth, args.seconds).encode())
    text = json.dumps(fields, indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / f"{file}.json", text.encode())


def write_one(args):
    """The melody of one tune, in its own key and the instrument's octave, to a file."""
    found = [tune for tune in load_tunes() if args.one.lower() in tune.title.lower()]
    if not found:
        raise UserError(f"--one {args.one!r}: no tune has this in its title; data/tunes.txt has the titles")
    if not args.to:
        raise UserError("--one needs --to FILE.wav")
    check_writable(args.to)
    if args.instrument not in INSTRUMENTS:
        raise UserError(f"--instrument {args.instrument!r}: must be one of {', '.join(INSTRUMENTS)}")
    tune = found[0]
    alone = {"drums": False, "bass": False, "chords": None, "soft": False, "first_bar": 0}
    truth = alone | {"instrument": args.instrument, "bpm": args.bpm, "key": KEYS[tune.mode][tune.tonic]}
    _, melody = render_clip(tune, truth, args.seconds, args.sample_rate, np.random.default_rng(args.seed))
    write_wav(Path(args.to), melody, args.sample_rate)
    print(f"{args.to}: {tune.title}, {tune.origin}, {args.instrument}, {args.bpm:g} bpm")


def parse(argv):
    """The flags. Raises UserError for what they cannot be."""
    parser = Parser(description="renders the embedded tunes as a training set")
    add = parser.add_argument
    add("--out", default="data/tunes", help="folder; gets train/, valid/ and test/")
    add("--clips", type=int, nargs=3, default=(40, 10, 2), metavar=("TRAIN", "VALID", "TEST"),
        help="of each tune")
    add("--seconds", type=float, default=11.0, help="length of a clip")
    add("--seed", type=int, default=0)
    add("--sample_rate", type=int, default=16000, help="Hz")
    add("--workers", type=int, default=2, help="processes")
    add("--one", metavar="TITLE", help="only the melody of this tune, to the file --to")
    add("--instrument", default="piano", help=", ".join(INSTRUMENTS))
    add("--bpm", type=float, default=104)
    add("--to", metavar="FILE.wav")
    args = parser.parse_args(argv)
    for key in ("seconds", "sample_rate", "workers", "bpm"):
        value = getattr(args, key)
        if not 0 < value < 1e6:
            raise UserError(f"--{key} {value}: must be positive")
    if args.seconds < 1 or args.sample_rate < 4000 or args.bpm < 20 or args.seed < 0 or min(args.clips) < 0:
        raise UserError("at least 1 second, 4000 Hz, 20 bpm, and no negative seed or number of clips")
    return args


def main(argv):
    args = parse(argv)
    if args.one:
        return write_one(args)
    check_writable(Path(args.out) / SPLITS[0] / "any.json")
    jobs = []
    for split, clips in zip(SPLITS, args.clips):
        for index in range(clips * len(tunes_of(split))):
            jobs.append((args, split, index))
    ignored = signal.SIGINT, signal.SIG_IGN     # by the workers: Ctrl-C is for this process alone
    with multiprocessing.get_context("spawn").Pool(args.workers, signal.signal, ignored) as pool:
        for _ in tqdm(pool.imap_unordered(write_clip, jobs, chunksize=8), total=len(jobs), unit="clip"):
            pass
    print(f"{args.out}: {len(jobs)} clips of {args.seconds:g} s, {len(jobs) * args.seconds / 3600:.1f} h")


if __name__ == "__main__":
    run(main, sys.argv[1:])
