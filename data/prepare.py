"""Turns a folder of recordings into what train.py reads: codes, chroma and captions of every track.

    python data/prepare.py FOLDER --out DIR --config config/tiny.py          # numbers and codec of a configuration
    python data/prepare.py FOLDER --out DIR --codec facebook/encodec_32khz   # or said one by one
    torchrun --nproc_per_node=8 data/prepare.py ...                          # every process takes its share

FOLDER holds wav, flac, ogg or mp3 files of any rate, length and number of channels, in any subfolders. What is known
about song.mp3 may stand in song.json (title, artist, genre, key, bpm, moods, keywords, instrument, description; all
optional), as plain text in song.txt, or in a line {"file_name": "song.mp3", "text": "..."} of a metadata.jsonl. The
JSON may also say "melody": another file of FOLDER whose tune is the condition (it is no track of its own then), and
"weight": how often the track is drawn (1 is normal).

    DIR/index.json         settings, and a list of tracks: file, where its data are, weight, meta (the captions)
    DIR/codes.NNNNN.u16    uint16 (frames, K); code frame t is samples t * stride ... (t + 1) * stride of its track
    DIR/chroma.NNNNN.u8    uint8 (chroma frames,): the strongest pitch class; frame m is centred at sample m * hop
    DIR/log.NNNNN.jsonl    the tracks that are finished
    DIR/settings.json      what all of them were made with
    DIR/skipped.txt        what could not be read, and why

Rerunning goes on where it stopped, however it stopped: a line of the log is written after its data are on the disk,
and data that no line speaks of are cut off. Each process writes a shard of its own; captions are read anew each time.
Exit code: 0, 1 when files were skipped (all others are prepared), 2 when nothing could be done.
"""
import argparse
import codecs
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, wherever this is called from
from chroma import ChromaExtractor, pick_stem, separate
from config import Config, Parser, UserError, load, pick_device, run, write_atomic
from data.audio import read_audio
from encodec import EncodecModel, stream

AUDIO = {".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff",
         ".m4a", ".aac", ".wma"}  # the last three cannot be read: better named as skipped than overlooked
MAX_TEXT = 10_000           # characters of a caption, the rest is cut off
MAX_SIDECAR = 10_000_000    # bytes
BLOCK = 2 ** 21             # samples read at a time (a minute at 32 kHz): memory does not grow with the length


# --- the folder: which tracks there are, and what is said about them -----------------------------------------

@dataclass
class Track:
    file: str                                   # relative to the folder
    melody: str | None = None                   # the file whose chroma is used, None for the track itself
    weight: float = 1.0
    meta: dict = field(default_factory=dict)    # cleaned fields that are there
    problem: str | None = None                  # why it cannot be used


def scan(folder: Path) -> tuple[list[Track], list[str]]:
    """All tracks of a folder in a fixed order, and complaints about files of captions. Raises UserError if none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of recordings")
    files, listed, complaints = [], {}, []
    for directory, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(directory, name)
            if name == "metadata.jsonl":
                listed |= read_manifest(folder, path, complaints)
            elif path.suffix.lower() in AUDIO and not name.startswith("."):
                files.append(path.relative_to(folder).as_posix())
    if not files:
        raise UserError(f"{folder}: holds no recordings (wav, flac, ogg or mp3 files)")
    complaints += [f"{name}: named in metadata.jsonl, but not there" for name in sorted(listed.keys() - set(files))]
    tracks = [describe(folder, file, listed.get(file, {}), complaints) for file in files]
    melodies = {track.melody for track in tracks if track.melody != track.file}
    return [track for track in tracks if track.file not in melodies], complaints


def read_manifest(folder: Path, path: Path, complaints: list) -> dict[str, dict]:
    """{file relative to folder: fields} of a metadata.jsonl."""
    listed = {}
    try:
        lines = read_text(path, limit=2 ** 30).splitlines()
    except ValueError as error:
        complaints.append(f"{path.relative_to(folder)}: {error}")
        return {}
    for number, line in enumerate(lines, 1):
        where = f"{path.relative_to(folder)}, line {number}"
        if not line.strip():
            continue
        try:
            fields = parse_object(line)
            file = inside(folder, path.parent, fields.get("file_name"))
        except ValueError as error:
            complaints.append(f"{where}: {error}")
            continue
        if file in listed:
            complaints.append(f"{where}: {file} was named before, the first line counts")
        else:
            listed[file] = {"description": fields.get("text")} | fields
    return listed


def describe(folder: Path, file: str, fields: dict, complaints: list) -> Track:
    """Track from its sidecar .json, else its line of a metadata.jsonl (`fields`), else the .txt for a description."""
    path = folder / file
    for sidecar in (path.with_suffix(".json"), path.with_suffix(".txt")):
        try:
            if os.path.isfile(sidecar) and sidecar.suffix == ".json":
                fields = fields | parse_object(read_text(sidecar))
            elif os.path.isfile(sidecar):
                fields = {"description": read_text(sidecar, cut=True)} | {k: v for k, v in fields.items() if v}
        except ValueError as error:
            complaints.append(f"{sidecar.relative_to(folder).as_posix()}: {error}")
    track = Track(file, meta=clean(fields))
    weight = fields.get("weight", 1.0)
    if type(weight) in (int, float) and 0 < weight < 1e9:
        track.weight = float(weight)
    else:
        complaints.append(f"{file}: its weight {str(weight)[:50]!r} must be a positive number, taken as 1")
    if fields.get("melody") is not None:
        try:
            track.melody = inside(folder, path.parent, fields["melody"])
        except ValueError as error:
            track.problem = f"its melody: {error}"
    return track


def inside(folder: Path, base: Path, name) -> str:
    """Path of `name`, said by a file in `base`, relative to folder. ValueError if it leads out of the folder."""
    if not isinstance(name, str) or not 0 < len(name) < 1000 or "\0" in name:
        raise ValueError(f"{str(name)[:50]!r} is not the name of a file")
    path = base / name
    try:
        if path.resolve().is_relative_to(folder.resolve()):
            return Path(os.path.normpath(path)).relative_to(os.path.normpath(folder)).as_posix()
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, ...
        pass
    raise ValueError(f"{name[:200]!r} does not lie in {folder}")


def read_text(path: Path, limit=MAX_SIDECAR, cut=False) -> str:
    """A text file in whatever encoding: with a byte order mark, UTF-8, else Latin-1. ValueError for anything else."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if len(data) > limit and not cut:
        raise ValueError(f"is larger than {limit:,} bytes")
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data[:limit])  # a character cut in two is no error
    except UnicodeDecodeError:
        text = data[:limit].decode("latin-1")
    if re.search(r"[\0-\x08\x0e-\x1a\x1c-\x1f]", text):
        raise ValueError("is not text")
    return text


def parse_object(text: str) -> dict:
    """The JSON object in text, else ValueError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"should be a JSON object, is a {type(value).__name__}")
    return value


def clean(fields: dict) -> dict:
    """The known fields of a track, cleaned as the original does; empty, "None" and impossible ones are left out."""
    meta = {}
    for name in ("title", "artist", "description", "genre", "instrument", "key"):
        value = fields.get(name)
        text = as_text(value)[:MAX_TEXT] if type(value) in (str, int, float) else ""
        if text not in ("", "None"):
            meta[name] = text if name in ("title", "artist", "description") else text.lower()
    if "," in meta.get("key", ""):
        del meta["key"]  # a piece in several keys
    try:
        if math.isfinite(bpm := float(fields.get("bpm"))) and bpm > 0 and type(fields["bpm"]) is not bool:
            meta["bpm"] = bpm
    except (TypeError, ValueError, OverflowError):
        pass
    for name in ("moods", "keywords"):
        value = fields.get(name)
        words = re.split(r"[,\s]", value[:MAX_TEXT]) if isinstance(value, str) else value
        if isinstance(words, list):
            words = [as_text(word).lower()[:200] for word in words[:200] if isinstance(word, str)]
            meta |= {name: words} if (words := [word for word in words if word]) else {}
    return meta


def as_text(value) -> str:
    """Stripped, and without the halves of characters that JSON can spell but UTF-8 cannot."""
    return str(value).strip().encode("utf-8", "replace").decode()


# --- one recording: codes and pitch classes ------------------------------------------------------------------

def blocks(path: Path, sample_rate: int, channels: int, context: int, block: int = BLOCK):
    """Consecutive blocks of a recording, each with `context` samples around it that belong to its neighbours.

    Yields (wav (C, l), lead, new, last): samples lead ... lead + new of wav are the block's own.
    """
    start, last = 0, False
    while not last:
        begin, end = max(0, start - context), start + block + context
        wav = read_audio(path, sample_rate, channels, begin / sample_rate, (end - begin) / sample_rate)
        last = begin + wav.shape[1] < end
        yield wav, start - begin, begin + wav.shape[1] - start if last else block, last
        start += block


class Preparer:
    """A codec and a chroma extractor, run over recordings block by block."""

    def __init__(self, codec: EncodecModel, config: Config, stem: str, device, block: int = BLOCK):
        self.codec, self.device, self.stem, self.block = codec.to(device), device, stem, block
        self.channels = config.channels
        self.extractor = ChromaExtractor(codec.sample_rate, config.n_chroma, config.radix2_exp).to(device)
        # what separation and the chroma window look at beyond a block; both block and context are whole hops of both
        self.context = max(2 ** 16, 2 * self.extractor.window)

    @torch.no_grad()
    def __call__(self, path: Path, melody: Path) -> tuple[np.ndarray, np.ndarray]:
        """Codes (T, K) uint16 of the recording `path`, pitch classes (M,) uint8 of the recording `melody`.

        A melody longer than its track is cut, a shorter one ends in silence. Raises UserError naming the file that
        cannot be read.
        """
        classes, samples = [], 0

        def pieces():
            nonlocal samples
            for wav, lead, new, last in self.blocks(path):
                samples += new
                if melody == path:
                    classes.append(self.classes(wav, lead, new, last))
                own = wav[:, lead:lead + new].to(self.device)
                yield own[:, None] if self.codec.channels == 1 else own[None]  # sides of a stereo pair as a batch

        reader = pieces()
        head = list(itertools.islice(reader, 2))
        if len(head) == 1 or self.codec.config.norm == "time_group_norm":  # that norm needs the whole recording
            codes = rows(self.codec.encode(torch.cat([*head, *reader], -1)))
        else:
            short = (x for piece in itertools.chain(head, reader) for x in piece.split(500 * self.codec.stride, -1))
            codes = np.concatenate([rows(self.codec.quantizer.encode(z)) for z in stream(self.codec.encoder, short)])
        if melody != path:
            classes = [self.classes(*block) for block in self.blocks(melody)]
        M = self.extractor.frames(samples)
        classes = np.concatenate(classes)[:M]
        classes = np.pad(classes, (0, M - len(classes)))  # silence is class 0, as argmax has it
        return codes, classes

    def blocks(self, path):
        return blocks(path, self.codec.sample_rate, self.channels, self.context, self.block)

    def classes(self, wav, lead: int, new: int, last: bool) -> np.ndarray:
        """Pitch classes (uint8) of the chroma frames centred in a block."""
        chroma = self.extractor(separate(wav.to(self.device), self.codec.sample_rate, self.stem)[None])[0]
        first = lead // self.extractor.hop
        count = None if last else first + new // self.extractor.hop
        return chroma[first:count].argmax(-1).to(torch.uint8).cpu().numpy()


def rows(codes) -> np.ndarray:
    """Codes (B, K, T), B the sides of a stereo pair -> (T, K B) uint16, columns 1L 1R 2L 2R ..."""
    return codes.permute(2, 1, 0).flatten(1).cpu().numpy().astype(np.uint16)


# --- shards: append only, with a log of what is whole --------------------------------------------------------

class Shard:
    """The three files that one process appends to."""

    def __init__(self, out: Path, number: int, K: int):
        codes, chroma, log = shard_files(out, number)
        try:
            self.codes, self.chroma, self.log = (open(path, "ab", buffering=0) for path in (codes, chroma, log))
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None
        try:
            import fcntl  # not on Windows
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            self.close()
            raise UserError(f"{out}: another process writes into it; let that end, or choose another --out") from None
        # cut off what was being written when the last run was stopped
        entries = read_log(out, number, K)[0]
        self.frames = max((e["codes_start"] + e["frames"] for e in entries), default=0)
        self.chroma_frames = max((e["chroma_start"] + e["chroma_frames"] for e in entries), default=0)
        self.codes.truncate(self.frames * K * 2)
        self.chroma.truncate(self.chroma_frames)
        self.log.truncate(log.read_bytes().rfind(b"\n") + 1)

    def add(self, file: str, stamp: list, codes: np.ndarray, classes: np.ndarray):
        """Appends a track. It counts from the moment its line is in the log."""
        self._write(self.codes, codes.tobytes())
        self._write(self.chroma, classes.tobytes())
        self.note(file=file, stamp=stamp, codes_start=self.frames, frames=len(codes),
                  chroma_start=self.chroma_frames, chroma_frames=len(classes))
        self.frames, self.chroma_frames = self.frames + len(codes), self.chroma_frames + len(classes)

    def close(self):
        for file in (self.codes, self.chroma, self.log):
            file.close()

    def note(self, **entry):
        self._write(self.log, json.dumps(entry).encode() + b"\n")

    def _write(self, file, data: bytes):
        try:
            while data:  # a disk that is nearly full takes a part
                data = data[file.write(data):]
            os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{file.name}: cannot be written ({error.strerror}); with that put right, run the same "
                            "command again to go on") from None


def shard_files(out: Path, number: int) -> tuple[Path, Path, Path]:
    return out / f"codes.{number:05d}.u16", out / f"chroma.{number:05d}.u8", out / f"log.{number:05d}.jsonl"


def read_log(out: Path, number: int, K: int) -> tuple[list[dict], dict[str, str]]:
    """Tracks of a shard whose data are whole, and {file: why it could not be read}."""
    codes, chroma, log = shard_files(out, number)
    try:
        entries = [json.loads(line) for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except ValueError:
        raise UserError(f"{log}: is damaged; delete {out} and start again, or choose another --out") from None
    frames, chroma_frames = codes.stat().st_size // (2 * K), chroma.stat().st_size
    return ([e | {"shard": number} for e in entries if "error" not in e and e["codes_start"] + e["frames"] <= frames
             and e["chroma_start"] + e["chroma_frames"] <= chroma_frames],
            {e["file"]: e["error"] for e in entries if "error" in e})


def read_logs(out: Path, K: int) -> tuple[dict[tuple, dict], dict[str, str]]:
    """{(file, stamp): its place} over all shards, {file: why it could not be read}."""
    done, errors = {}, {}
    for log in sorted(out.glob("log.?????.jsonl")):
        entries, failed = read_log(out, int(log.name[4:9]), K)
        done |= {(entry.pop("file"), tuple(entry.pop("stamp"))): entry for entry in entries}
        errors |= failed
    return done, errors


def stamp_of(folder: Path, track: Track) -> list:
    """What tells that a recording has changed since it was prepared: its melody, and sizes and times of both."""
    stamp = [track.melody]
    for name in (track.file, track.melody or track.file):
        try:
            stat = os.stat(folder / name)
            stamp += [stat.st_size, stat.st_mtime_ns]
        except OSError:  # a broken link, say: reading it will tell
            stamp += [0, 0]
    return stamp


# --- the command ---------------------------------------------------------------------------------------------

def settle(args) -> tuple[Config, EncodecModel, dict]:
    """Configuration, codec, and the settings that all data of a DIR share. Raises UserError when they contradict."""
    keys = ("codec", "stem", "device", "n_chroma", "radix2_exp", "sample_rate")
    given = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    config = load([args.config] * bool(args.config) + [f"--{key}={value}" for key, value in given.items()])
    codec = EncodecModel.from_pretrained(config.codec)
    if not args.config:  # nothing but the codec says these
        config = dataclasses.replace(config, channels=codec.channels, n_q=codec.num_codebooks, card=codec.cardinality,
                                     delays=tuple(range(codec.num_codebooks)), ratios=codec.config.ratios,
                                     sample_rate=args.sample_rate or codec.sample_rate)
    sides = max(1, config.channels // codec.channels)  # a mono codec does stereo in twice as many codebooks
    for key, ours, theirs in (
            ("sample_rate", config.sample_rate, codec.sample_rate),
            ("the product of ratios", config.stride, codec.stride),
            ("channels", config.channels, codec.channels * sides), ("card", config.card, codec.cardinality),
            ("n_q", config.n_q, codec.num_codebooks * sides)):
        if ours != theirs:
            raise UserError(f"{key} = {ours}, but the codec {config.codec} has {theirs}: change one of the two")
    weights = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        weights.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return config, codec.fold(), dict(
        version=1, sample_rate=codec.sample_rate, channels=config.channels, n_q=config.n_q, card=config.card,
        stride=codec.stride, frame_rate=codec.frame_rate, n_chroma=config.n_chroma, radix2_exp=config.radix2_exp,
        hop=config.hop, stem=pick_stem(config.stem), codec_sha256=weights.hexdigest(), codec=config.codec)


def check_settings(out: Path, settings: dict):
    """Raises UserError if what is in `out` was made with other settings; writes them if nothing is there."""
    path = out / "settings.json"
    if not path.exists():
        if (out / "index.json").exists():
            raise UserError(f"{out}: has an index.json, but not the settings.json it was made with; choose another "
                            f"--out")
        write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
    try:
        before = parse_object(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}; choose another --out, or delete {out}") from None
    for key in settings.keys() - {"codec"}:  # the name may change, the weights may not
        if before.get(key) != settings[key]:
            raise UserError(f"{out}: was prepared with {key} = {before.get(key)}, now it is {settings[key]}; choose "
                            f"another --out, or delete {out}")


def finish(out: Path, folder: Path, tracks: list[Track], complaints: list[str], settings: dict) -> int:
    """Writes index.json and skipped.txt from all shards and the captions; returns the exit code."""
    done, errors = read_logs(out, settings["n_q"])
    index, skipped = [], list(complaints)
    for track in tracks:
        place = None if track.problem else done.get((track.file, tuple(stamp_of(folder, track))))
        if place:
            index.append(dict(file=track.file) | place | dict(weight=track.weight, meta=track.meta))
        else:
            skipped.append(f"{track.file}: {track.problem or errors.get(track.file, 'has changed meanwhile')}")
    shards = 1 + max((entry["shard"] for entry in index), default=-1)
    write_atomic(out / "index.json", json.dumps(settings | dict(shards=shards, tracks=index)).encode())
    seconds = sum(entry["frames"] for entry in index) / settings["frame_rate"]
    print(f"{out / 'index.json'}: {len(index)} tracks, {seconds / 3600:.2f} h, {settings['n_q']} codebooks, stem by "
          f"{settings['stem']}")
    if not skipped:
        (out / "skipped.txt").unlink(missing_ok=True)
        return 0
    lines = [line.replace("\n", "\\n").encode("utf-8", "backslashreplace") for line in skipped]
    write_atomic(out / "skipped.txt", b"\n".join(lines) + b"\n")
    print(f"{len(skipped)} problems, named in {out / 'skipped.txt'}:", file=sys.stderr)
    print(*(line.decode() for line in lines[:10]), *["..."] * (len(lines) > 10), sep="\n", file=sys.stderr)
    return 1


def prepare_all(todo: list[tuple[Track, list]], folder: Path, shard: Shard, preparer: Preparer, show: bool):
    """Prepares tracks into a shard, with a progress bar; those that cannot be read are noted."""
    seconds, begun = 0.0, time.monotonic()
    with tqdm(todo, disable=not show, unit="file", dynamic_ncols=True) as bar:
        for track, stamp in bar:
            path = folder / track.file
            try:
                codes, classes = preparer(path, folder / track.melody if track.melody else path)
            except (UserError, OSError) as error:
                shard.note(file=track.file, error=str(error).removeprefix(f"{path}: "))
                continue
            shard.add(track.file, stamp, codes, classes)
            seconds += len(codes) / preparer.codec.frame_rate
            bar.set_postfix_str(f"{seconds / (time.monotonic() - begun):.0f} x real time", refresh=False)


def main(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of recordings")
    parser.add_argument("--out", type=Path, required=True, help="where the prepared data go")
    parser.add_argument("--config", help="a configuration file: codec, stem and chroma as it says")
    parser.add_argument("--codec", help="a hub id or a directory (default facebook/encodec_32khz)")
    parser.add_argument("--stem", help="what chroma hears: auto, none, hpss or demucs")
    parser.add_argument("--device", help="auto, cpu, cuda, mps")
    parser.add_argument("--n_chroma", type=int, help="pitch classes")
    parser.add_argument("--radix2_exp", type=int, help="log2 of the chroma window in samples")
    parser.add_argument("--sample_rate", type=int, help="Hz; must be the codec's")
    args = parser.parse_args(argv)
    tracks, complaints = scan(args.folder)
    config, codec, settings = settle(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out}: cannot be made ({error.strerror})") from None
    if rank == 0:
        check_settings(args.out, settings)
    meet(world)
    check_settings(args.out, settings)

    with contextlib.closing(Shard(args.out, rank, settings["n_q"])) as shard:
        meet(world)  # now the logs of all are whole
        done = read_logs(args.out, settings["n_q"])[0]
        todo = [(track, stamp) for track in tracks[rank::world]
                if not track.problem and (track.file, tuple(stamp := stamp_of(args.folder, track))) not in done]
        prepare_all(todo, args.folder, shard, Preparer(codec, config, settings["stem"], device), rank == 0)
    meet(world)
    code = finish(args.out, args.folder, tracks, complaints, settings) if rank == 0 else 0
    if world > 1:
        dist.destroy_process_group()
    return code


def meet(world: int):
    """Waits for the other processes. Raises UserError when one of them is gone."""
    try:
        if world > 1:
            dist.barrier()
    except RuntimeError:
        raise UserError("another process of this run has ended before its share was done; run the same command "
                        "again, it goes on from here") from None


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
