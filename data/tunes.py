"""The embedded data set: 360 public-domain melodies, rendered as audio, with captions of what was rendered.

The notes are in tunes.txt (real folk and classical tunes with title and origin). Every clip is one tune in
one key, tempo and instrument, with or without bass and drums (data/render.py); beside each recording lie a
sidecar .json (caption and ground truth) and the melody alone, the clean source of chroma. Training,
validation and test clips share no tune.

    python data/tunes.py            # data/tunes/{train,valid,test}: about 16 h of music in a few minutes
    python data/tunes.py --one "Ode to Joy" --instrument piano --to ode.wav

Offline and deterministic: clip i of a split is drawn from a generator seeded (seed, split, i), whoever
renders it.
"""
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, wherever this is called from
from data.audio import to_int16
from data.render import (INSTRUMENTS, SPLITS, draw_truth, fit, load_tunes, render_truth, render_tune, sidecar,
                         tunes_of)
from system.command import Parser, run
from system.errors import UserError
from system.files import check_writable, write_atomic


def write_wav(path: Path, wav: np.ndarray, sample_rate: int):
    def write(temporary):
        soundfile.write(temporary, to_int16(wav), sample_rate, subtype="PCM_16", format="WAV")
    write_atomic(path, write)


def write_clip(job) -> str:
    """Renders clip `index` of a split into its folder; the sidecar comes last: with one, a clip is whole."""
    args, split, index = job
    tunes = tunes_of(split)
    tune = tunes[index % len(tunes)]
    seed = [args.seed, SPLITS.index(split), index]
    # captions have their own generator: a change of wording leaves the music as it is
    words = np.random.default_rng([*seed, 0])
    rng = np.random.default_rng([*seed, 1])
    truth = draw_truth(tune, rng)
    fields = sidecar(tune, truth, words)
    mix, melody = render_truth(tune, truth, args.seconds, args.sample_rate, rng)
    folder = Path(args.out) / split
    file = f"{index:05d}-{tune.id}"
    write_wav(folder / f"{file}.wav", mix, args.sample_rate)
    if args.stems:
        fields["melody"] = f"melodies/{file}.wav"
        write_wav(folder / fields["melody"], melody, args.sample_rate)
    text = json.dumps(fields, indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / f"{file}.json", text.encode())
    return fields["description"]


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
    shift = fit(tune, args.instrument, tune.tonic)
    rng = np.random.default_rng(args.seed)
    _, melody = render_tune(tune, args.instrument, args.bpm, shift, drums=False, bass=False,
                            seconds=args.seconds, sample_rate=args.sample_rate, rng=rng, first_bar=0)
    write_wav(Path(args.to), melody, args.sample_rate)
    print(f"{args.to}: {tune.title}, {tune.origin}, {args.instrument}, {args.bpm:g} bpm")


def parse(argv):
    """The flags. Raises UserError for what they cannot be."""
    parser = Parser(description="renders the embedded tunes as a training set")
    add = parser.add_argument
    add("--out", default="data/tunes", help="folder; gets train/, valid/ and test/")
    add("--clips", type=int, nargs=3, default=(40, 10, 2), metavar=("TRAIN", "VALID", "TEST"),
        help="of each tune")
    add("--seconds", type=float, default=5.8, help="length of a clip")
    add("--seed", type=int, default=0)
    add("--sample_rate", type=int, default=16000, help="Hz")
    add("--workers", type=int, default=2, help="processes")
    add("--no-stems", dest="stems", action="store_false", help="leave out the melodies alone")
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
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for _ in tqdm(pool.imap_unordered(write_clip, jobs, chunksize=8), total=len(jobs), unit="clip"):
            pass
    print(f"{args.out}: {len(jobs)} clips of {args.seconds:g} s, {len(jobs) * args.seconds / 3600:.1f} h")


if __name__ == "__main__":
    run(main, sys.argv[1:])
