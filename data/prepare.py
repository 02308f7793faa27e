"""Turns a folder of recordings into what train.py reads: codes, chroma and captions of every track.

    python data/prepare.py FOLDER --out DIR --config config/tiny.py         # numbers of a configuration
    python data/prepare.py FOLDER --out DIR --codec facebook/encodec_32khz  # or given one by one
    torchrun --nproc_per_node=8 data/prepare.py ...                         # every process takes its share

FOLDER holds wav, flac, ogg, opus, mp3, aiff, au, caf or w64 files of any rate, length and number of channels,
in any subfolders; links are followed. What is known about song.mp3 may stand in song.json or song.mp3.json
(title, artist, genre, key, bpm, moods, keywords, instrument, description, also called caption or text; all
optional), as plain text in song.txt or song.mp3.txt, or in a line {"file_name": "song.mp3", "text": "..."} of
a metadata.jsonl, or in one of a metadata.csv with a header and a column file_name. The JSON may also have
"melody": another file of FOLDER, a recording or notes (data/scores.py), whose tune is the condition (it is no
track of its own then), and "weight": how often the track is drawn (1 is normal). What is ignored is named at
the end, and in skipped.txt.

    DIR/index.json        settings, and a list of tracks: file, place of its data, weight, meta (the captions)
    DIR/codes.NNNNN.u16   uint16 (frames, K); frame t is samples t * stride ... (t + 1) * stride of its track
    DIR/chroma.NNNNN.u8   uint8 (chroma frames,): class of the melody around sample m * hop; Q: none, a rest
    DIR/log.NNNNN.jsonl   the tracks that are finished
    DIR/settings.json     what all of them were made with
    DIR/skipped.txt       what could not be read, and why
    DIR/notes.txt         what was prepared, but is damaged, silent, far too loud, or shorter than a segment

Rerunning goes on where it stopped, however it stopped: a line of the log is written after its data are on
the disk, and data without a line are cut off. Each process writes a shard of its own; captions are read
anew each time. Exit code: 0, 1 when files were skipped (all others are prepared), 2 when nothing could be
done.
"""
import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, wherever this is called from
from checkpoints.files import weights_sha256
from chroma import ChromaExtractor
from config import Config, load
from data.audio import LOUD, read_audio, warn_once
from data.captions import Track, parse_object, read_text, scan
from data.scores import is_notes, read_notes
from data.shards import Shard, melody_form, read_logs
from data.stems import heard_notes, pick_stem, separate
from data.vocabulary import unknown_words
from encodec import EncodecModel
from system.command import Parser, run
from system.devices import pick_device
from system.errors import UserError
from system.files import check_writable, write_atomic
from system.processes import barrier, join, launched, process_count, rank

try:
    from speed import optimize_codec
except ImportError:
    optimize_codec = None   # without the folder speed/ the same takes longer

# what is stored beside the codes of a track: of each, one number from 0 to 255 for every chroma frame
CURVES = ("chroma",)
BLOCK = 2 ** 21         # samples read at a time (a minute at 32 kHz): memory does not grow with the length
PIECE = 500             # code frames given to the codec at a time
SILENT = 1e-3           # root mean square of what is next to silence: -60 dB


# --- one recording: codes and curves ----------------------------------------------------------------------

class Block(NamedTuple):
    """A part of a recording, with samples of its neighbors on both sides."""
    wav: torch.Tensor   # (C, L)
    lead: int           # samples of wav in front of the block's own
    new: int            # samples of its own
    last: bool          # whether the recording ends with it


def blocks(path: Path, sample_rate: int, channels: int, context: int, block: int = BLOCK,
           tell=warn_once):
    """Yields the blocks of a recording, `block` samples each, with up to `context` more on each side.

    tell: is given a sentence if the recording ends before it should.
    """
    start, last = 0, False
    while not last:
        begin, end = max(0, start - context), start + block + context
        duration = (end - begin) / sample_rate
        wav = read_audio(path, sample_rate, channels, begin / sample_rate, duration, tell)
        lead = start - begin
        last = begin + wav.shape[1] < end
        yield Block(wav, lead, wav.shape[1] - lead if last else block, last)
        start += block


class Health:
    """What the samples of a recording show of mistakes that were made before they came here."""

    def __init__(self):
        self.peak = self.samples = self.power = self.mono_power = 0

    def add(self, wav: torch.Tensor):
        """The next samples (C, L)."""
        wav = wav.double()
        self.peak = max(self.peak, float(wav.abs().max()))
        self.samples += wav.shape[1]
        self.power += float(wav.square().mean(0).sum())
        self.mono_power += float(wav.mean(0).square().sum())

    def problem(self, path: Path, sample_rate: int) -> str | None:
        if self.peak > LOUD:
            return (f"has peaks of {self.peak:.6g}, where 1 is full scale; divide 16-bit samples by 32768 "
                    f"before they are saved as floats")
        rms, mono_rms = (math.sqrt(power / self.samples) for power in (self.power, self.mono_power))
        if mono_rms > SILENT:
            return None
        sides = read_audio(path, sample_rate, 2, duration=60.0, tell=lambda sentence: None)
        rms = max(rms, float(sides.double().square().mean().sqrt()))
        if rms > SILENT:
            return "its two sides cancel each other: mixed to mono it is silent; turn one of them over"
        return f"is silent, or nearly so: {20 * math.log10(rms):.0f} dB" if rms else "is silent"


class Preparer:
    """A codec and a chroma extractor, run over recordings block by block."""

    def __init__(self, codec: EncodecModel, config: Config, stem: str, device, block: int = BLOCK):
        self.codec, self.device, self.stem, self.block = codec.to(device), device, stem, block
        self.channels = config.channels
        self.notes = []     # on the last recording: sentences
        self.extractor = ChromaExtractor(codec.sample_rate, config.n_chroma, config.radix2_exp).to(device)
        self.config = config
        # of recordings; chroma has the argmax of nothing, in sampling, too
        self.silence = config.melody_classes if config.melody_form == "notes" else 0
        # what separation and the chroma window see beyond a block; block and context are whole hops of both
        self.context = max(2 ** 16, 2 * self.extractor.window)

    @torch.no_grad()
    def __call__(self, path: Path, melody: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Codes (T, K) uint16 of the recording `path`, and the curves in CURVES by name, each (M,) uint8.

        "chroma" is that of `melody`: a recording, cut where it is longer and silent at the end where it is
        shorter, or a file of notes, which begins anew on its bar. What is wrong with the two is then in
        `notes`. Raises UserError naming the file that cannot be read.
        """
        curves = {name: [] for name in CURVES}      # block by block
        self.notes, health = [], Health()
        samples = 0

        def waves():
            nonlocal samples
            for block in self.blocks(path):
                samples += block.new
                if melody == path:
                    curves["chroma"].append(self.pitch_classes(block))
                own = block.wav[:, block.lead:block.lead + block.new]
                health.add(own)
                own = own.to(self.device)
                # a mono codec takes the sides of a stereo pair as a batch
                yield own[:, None] if self.codec.channels == 1 else own[None]

        codes = self.encode(waves())
        M, silence = self.extractor.frames(samples), self.silence
        if is_notes(melody):
            silence = self.config.melody_classes        # no class at all, as in sampling
            one_hot = read_notes(melody).chroma(self.config, samples / self.codec.sample_rate)
            curves["chroma"] = [self.classes(one_hot, silence).to(torch.uint8).numpy()]
        elif melody != path:
            curves["chroma"] = [self.pitch_classes(block) for block in self.blocks(melody)]
        if problem := health.problem(path, self.codec.sample_rate):
            self.note(f"{path}: {problem}")
        return codes, {name: fit(np.concatenate(parts), M, silence) for name, parts in curves.items()}

    def blocks(self, path: Path):
        return blocks(path, self.codec.sample_rate, self.channels, self.context, self.block, self.note)

    def note(self, sentence: str):
        if sentence not in self.notes:
            self.notes.append(sentence)

    def encode(self, waves) -> np.ndarray:
        """Consecutive waves (B, C, L) of a recording, B sides of a stereo pair -> codes (T, B K) uint16."""
        first = list(itertools.islice(waves, 2))
        waves = itertools.chain(first, waves)
        if len(first) == 1:
            return rows(self.codec.encode(first[0]))
        pieces = (piece for wav in waves for piece in wav.split(PIECE * self.codec.stride, -1))
        return np.concatenate([rows(codes) for codes in self.codec.encode_stream(pieces)])

    def pitch_classes(self, block: Block) -> np.ndarray:
        """The strongest pitch class of each chroma frame of a block, uint8."""
        stem = separate(block.wav.to(self.device), self.codec.sample_rate, self.stem)
        if self.config.melody_form == "notes":
            one_hot = heard_notes(stem, self.config)[0]
        else:
            one_hot = self.extractor(stem[None])[0]
        return self.own_frames(self.classes(one_hot, self.silence), block)

    def classes(self, one_hot: torch.Tensor, silence: int) -> torch.Tensor:
        """One-hot chroma (M, Q), zeros where silent -> classes (M,)."""
        silent = one_hot.amax(-1) == 0
        return one_hot.argmax(-1).masked_fill(silent, silence)

    def own_frames(self, values: torch.Tensor, block: Block) -> np.ndarray:
        """Values at the chroma frames of block.wav -> those at frames centered in the block itself, uint8."""
        first = block.lead // self.extractor.hop
        end = None if block.last else first + block.new // self.extractor.hop
        return values[first:end].to(torch.uint8).cpu().numpy()


def rows(codes) -> np.ndarray:
    """Codes (B, K, T), B the sides of a stereo pair -> (T, B K) uint16, columns 1L 1R 2L 2R ..."""
    return codes.permute(2, 1, 0).flatten(1).cpu().numpy().astype(np.uint16)


def fit(curve: np.ndarray, M: int, silence: int) -> np.ndarray:
    """A curve cut to M frames, or continued with silence."""
    return np.pad(curve[:M], (0, max(0, M - len(curve))), constant_values=silence)


# --- the folder of prepared data --------------------------------------------------------------------------

def check_settings(out: Path, settings: dict):
    """Raises UserError if what is in `out` was made with other settings; writes them if nothing is there."""
    path = out / "settings.json"
    if not path.exists():
        if (out / "index.json").exists():
            raise UserError(f"{out}: has an index.json, but not the settings.json it was made with; choose "
                            f"another --out")
        write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
    try:
        before = parse_object(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}; choose another --out, or delete {out}") from None
    before["melody_form"] = melody_form(before)
    for key in settings.keys() - {"codec"}:  # the name may change, the weights may not
        if before.get(key) != settings[key]:
            raise UserError(f"{out}: was prepared with {key} = {before.get(key)}, now it is {settings[key]}; "
                            f"choose another --out, or delete {out}")


def stamp_of(folder: Path, track: Track) -> list:
    """Shows when a recording has changed since it was prepared: its melody, and sizes and times of both."""
    stamp = [track.melody]
    for name in (track.file, track.melody or track.file):
        try:
            stat = os.stat(folder / name)
            stamp += [stat.st_size, stat.st_mtime_ns]
        except OSError:  # a broken link, say: reading it will be the error
            stamp += [0, 0]
    return stamp


def prepare_all(todo: list[tuple[Track, list]], folder: Path, shard: Shard, preparer: Preparer, show: bool):
    """Prepares tracks into a shard, with a progress bar; those that cannot be read are noted."""
    seconds, begun = 0.0, time.monotonic()
    with tqdm(todo, disable=not show, unit="file", dynamic_ncols=True) as bar:
        for track, stamp in bar:
            path = folder / track.file
            try:
                codes, curves = preparer(path, folder / track.melody if track.melody else path)
            except (UserError, OSError) as error:
                shard.note(file=track.file, error=str(error).removeprefix(f"{path}: "))
                continue
            notes = [note.removeprefix(f"{path}: ") for note in preparer.notes]
            shard.add(track.file, stamp, codes, curves, notes)
            seconds += len(codes) / preparer.codec.frame_rate
            bar.set_postfix_str(f"{seconds / (time.monotonic() - begun):.0f} x real time", refresh=False)


def finish(out: Path, folder: Path, tracks: list[Track], complaints: list[str], settings: dict,
           config: Config) -> int:
    """Writes index.json, skipped.txt and notes.txt from all shards and captions; returns the exit code."""
    done, errors = read_logs(out, settings["n_q"], CURVES)
    index, skipped, notes, short = [], list(complaints), [], []
    for track in tracks:
        entry = None if track.problem else done.get((track.file, tuple(stamp_of(folder, track))))
        if entry:
            notes += [f"{track.file}: {note}" for note in entry.pop("notes", [])]
            index.append(dict(file=track.file) | entry | dict(weight=track.weight, meta=track.meta))
            seconds = entry["frames"] / settings["frame_rate"]
            if seconds < config.segment_duration - 0.5 / settings["frame_rate"]:
                short.append(f"{track.file}: its {seconds:.2f} s are less than segment_duration = "
                             f"{config.segment_duration} s; training leaves it out")
        else:
            problem = track.problem or errors.get(track.file, "has changed meanwhile")
            skipped.append(f"{track.file}: {problem}")
    shards = 1 + max((entry["shard"] for entry in index), default=-1)
    write_atomic(out / "index.json", json.dumps(settings | dict(shards=shards, tracks=index)).encode())
    seconds = sum(entry["frames"] for entry in index) / settings["frame_rate"]
    print(f"{out / 'index.json'}: {len(index)} tracks, {seconds / 3600:.2f} h, {settings['n_q']} codebooks, "
          f"stem by {settings['stem']}")
    prepared = {entry["file"] for entry in index}
    report_captions([track for track in tracks if track.file in prepared], config)
    report(out / "notes.txt", notes + short, "notes on what was prepared, in")
    report(out / "skipped.txt", skipped, "problems, named in")
    return 1 if skipped else 0


def report(path: Path, sentences: list[str], what: str):
    """Writes a file of sentences, and the first of them to stderr; without any, no file is left."""
    if not sentences:
        path.unlink(missing_ok=True)
        return
    lines = [line.replace("\n", "\\n").encode("utf-8", "backslashreplace") for line in sentences]
    write_atomic(path, b"\n".join(lines) + b"\n")
    print(f"{len(lines)} {what} {path}:", file=sys.stderr)
    for line in lines[:10]:
        print(line.decode(), file=sys.stderr)
    if len(lines) > 10:
        print("...", file=sys.stderr)


def report_captions(tracks: list[Track], config: Config):
    """Prints how much is known of tracks, the keys of their captions that were not understood, and the words
    that a model of this configuration does not know."""
    described = sum("description" in track.meta for track in tracks)
    melodies = sum(track.melody not in (None, track.file) for track in tracks)
    print(f"{described} of {len(tracks)} tracks have a caption, {melodies} a melody of their own")
    unused = Counter(name for track in tracks for name in track.unused)
    if unused:
        print(f"not understood in captions, and in how many tracks: {most_common(unused)}")
    words = Counter(unknown_words(config, [track.meta.get("description") for track in tracks]))
    if words:
        print(f"words of captions that are not in t5_words, and how often: {most_common(words)}. They share "
              f"eight entries, by their spelling; a model trained from scratch learns words added there")


def most_common(counts: Counter) -> str:
    """The first 20 names with their counts."""
    names = [f"{name} ({count})" for name, count in counts.most_common(20)]
    more = f" and {len(counts) - 20} more" if len(counts) > 20 else ""
    return ", ".join(names) + more


# --- the command ------------------------------------------------------------------------------------------

def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of recordings")
    parser.add_argument("--out", type=Path, required=True, help="where the prepared data go")
    parser.add_argument("--config", help="a configuration file: codec, stem and chroma as it has them")
    parser.add_argument("--codec", help="a hub id or a directory (default facebook/encodec_32khz)")
    parser.add_argument("--stem", help="what chroma is taken from: auto, none, hpss or demucs")
    parser.add_argument("--device", help="auto, cpu, cuda, mps")
    parser.add_argument("--n_chroma", type=int, help="pitch classes")
    parser.add_argument("--radix2_exp", type=int, help="log2 of the chroma window in samples")
    parser.add_argument("--sample_rate", type=int, help="Hz; must be the codec's")
    return parser.parse_args(argv)


def resolve_settings(args) -> tuple[Config, EncodecModel, dict]:
    """Configuration, codec, and the settings that all data of a DIR share. UserError if they contradict."""
    keys = ("codec", "stem", "device", "n_chroma", "radix2_exp", "sample_rate")
    given = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    config = load([args.config] * bool(args.config) + [f"--{key}={value}" for key, value in given.items()])
    if config.melody_classes > 255:
        raise UserError(f"n_chroma = {config.n_chroma}: makes {config.melody_classes} melody classes; 255 at "
                        f"most can be stored, a byte each, beside silence")
    codec = EncodecModel.from_pretrained(config.codec)
    if not args.config:  # nothing but the codec has these
        config = dataclasses.replace(
            config, channels=codec.channels, n_q=codec.num_codebooks, card=codec.cardinality,
            delays=tuple(range(codec.num_codebooks)), ratios=codec.config.ratios,
            sample_rate=args.sample_rate or codec.sample_rate)
    sides = max(1, config.channels // codec.channels)  # a mono codec does stereo in twice as many codebooks
    for key, value, of_codec in (
            ("sample_rate", config.sample_rate, codec.sample_rate),
            ("the product of ratios", config.stride, codec.stride),
            ("channels", config.channels, codec.channels * sides),
            ("card", config.card, codec.cardinality),
            ("n_q", config.n_q, codec.num_codebooks * sides)):
        if value != of_codec:
            raise UserError(f"{key} = {value}, but the codec {config.codec} has {of_codec}: change one of "
                            f"the two")
    settings = dict(
        version=1, sample_rate=codec.sample_rate, channels=config.channels, n_q=config.n_q, card=config.card,
        stride=codec.stride, frame_rate=codec.frame_rate, n_chroma=config.n_chroma,
        radix2_exp=config.radix2_exp, hop=config.hop, melody_form=config.melody_form,
        stem=pick_stem(config.stem),
        codec_sha256=weights_sha256(codec), codec=config.codec)
    return config, codec, settings


def join_processes(device: torch.device) -> torch.device:
    """Connects the processes that torchrun has started, if it has; returns the device of this one."""
    if not launched() or os.environ["WORLD_SIZE"] == "1":
        return device
    join("gloo", datetime.timedelta(days=30))
    if device.type == "cuda":
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def main(argv):
    args = parse(argv)
    check_writable(args.out / "index.json")
    tracks, complaints = scan(args.folder)
    config, codec, settings = resolve_settings(args)
    device = join_processes(pick_device(config.device))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out}: cannot be made ({error.strerror})") from None
    if rank() == 0:
        check_settings(args.out, settings)
    barrier()
    check_settings(args.out, settings)

    with contextlib.closing(Shard(args.out, rank(), settings["n_q"], CURVES)) as shard:
        barrier()  # now the logs of all are whole
        done = read_logs(args.out, settings["n_q"], CURVES)[0]
        todo = []
        for track in tracks[rank()::process_count()]:
            stamp = stamp_of(args.folder, track)
            if not track.problem and (track.file, tuple(stamp)) not in done:
                todo.append((track, stamp))
        codec = codec.fold()
        if optimize_codec and device.type == "cpu":
            codec = optimize_codec(codec)
        preparer = Preparer(codec, config, settings["stem"], device)
        prepare_all(todo, args.folder, shard, preparer, show=rank() == 0)
    barrier()
    code = 0
    if rank() == 0:
        code = finish(args.out, args.folder, tracks, complaints, settings, config)
    if process_count() > 1:
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
