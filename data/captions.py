"""A folder of recordings: the tracks it holds, and what the files beside them say about them.

    tracks, complaints = scan(folder)

Beside song.mp3 may lie song.json or song.mp3.json (title, genre, bpm, description, ...), song.txt or
song.mp3.txt (the description), or a metadata.jsonl or metadata.csv has a line for it; see data/prepare.py.
Names are matched without regard to case. Files of captions come from anywhere, so nothing in them is an
error: what cannot be used is a complaint, and the recording is used without it.

What the folder itself holds is read wherever its links lead: the files of a snapshot in the Hugging Face
cache are links out of it. A name inside a file of captions, as "../song.mp3", never leads out of the folder.
"""
import codecs
import csv
import io
import json
import math
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from system.errors import UserError

# the endings of recordings; those of the last two lines cannot be read: better named than overlooked
AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf",
         ".w64", ".rf64",
         ".m4a", ".m4b", ".mp4", ".aac", ".wma", ".webm", ".weba", ".mka", ".ape", ".wv", ".amr", ".ac3",
         ".dsf")
MANIFESTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")     # the last one is only named
ELSEWHERE = "not read; captions of many recordings stand in metadata.jsonl or metadata.csv"
MAX_TEXT = 10_000                   # characters of a caption, the rest is cut off
MAX_SIDECAR = 10_000_000            # bytes
MAX_MANIFEST = 2 ** 30              # bytes

CAPTIONS = ("description", "caption", "text")   # one thing; where several are given, the first counts
TEXTS = ("title", "artist", "description", "genre", "instrument", "key")
WORDS = ("moods", "keywords")
# what else is understood; "truth" in the sidecars of data/tunes.py is for evaluation/adherence.py
OTHERS = ("bpm", "melody", "weight", "file_name", "truth")


@dataclass
class Track:
    file: str                                   # relative to the folder
    melody: str | None = None                   # the file whose chroma is used, None for the track itself
    weight: float = 1.0                         # how often it is drawn, compared with others
    meta: dict = field(default_factory=dict)    # those fields of its captions that `clean` keeps
    problem: str | None = None                  # why it cannot be used
    unused: list[str] = field(default_factory=list)     # keys of its captions that were not understood


def scan(folder: Path) -> tuple[list[Track], list[str]]:
    """All tracks of a folder in a fixed order, and complaints about files of captions. UserError if none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of recordings")
    files, sidecars, manifests, complaints = [], [], [], []
    for directory, _, names in walk(folder, complaints):
        for name in names:
            path = directory / name
            if is_recording(name):
                files.append(relative(path, folder))
            elif not os.path.exists(path):   # a broken link: `walk` has complained
                continue
            elif name.lower() in MANIFESTS:
                manifests.append(path)
            elif path.suffix.lower() in (".jsonl", ".csv", ".parquet"):
                complaints.append(f"{relative(path, folder)}: {ELSEWHERE}")
            elif path.suffix.lower() in (".json", ".txt"):
                sidecars.append(relative(path, folder))
    if not files:
        reason = f"; {complaints[0]}" if complaints else ""
        raise UserError(f"{folder}: holds no recordings (wav, flac, ogg, mp3, ... files){reason}")
    lines = {}
    for path in manifests:
        read_manifest(folder, path, lines, complaints)
    recordings = Spellings(files)
    listed = lines_of_recordings(lines, recordings, complaints)
    beside = find_sidecars(files, sidecars)
    tracks = [describe(folder, file, listed.get(file, {}), beside[file], complaints) for file in files]
    complaints += apart(files, sidecars, beside)
    for track in tracks:
        if track.melody is not None:    # a file that is not there is found out when it is read
            track.melody = recordings.find(track.melody) or track.melody
    melodies = {track.melody for track in tracks if track.melody != track.file}
    # two that name each other are tracks, or both would be gone
    return [track for track in tracks if track.file not in melodies or track.melody], complaints


# --- the folder -------------------------------------------------------------------------------------------

def walk(folder: Path, complaints: list):
    """Yields (directory, names of folders, names of files) as os.walk does, sorted, linked folders as well.

    Every folder comes once, under its own name where it has one here: links come last. What is passed over
    is a complaint: unreadable folders, broken links (but for recordings, which are found out later), links to
    a folder that has come, and those to one that holds `folder`, which would be a loop.
    """
    def unreadable(error):
        complaints.append(f"{relative(error.filename, folder)}: cannot be read ({error.strerror})")

    seen, pending = set(), [folder]
    while pending:
        top = pending.pop(0)
        if top != folder and leads_back(top, folder):
            complaints.append(f"{relative(top, folder)}: a link back to a folder above it, not followed")
            continue
        if os.path.realpath(top) in seen:
            complaints.append(f"{relative(top, folder)}: a link to a folder read before, not followed")
            continue
        for directory, folders, names in os.walk(top, onerror=unreadable):
            if os.path.realpath(directory) in seen:     # the real place of one that was read by a link
                folders.clear()
                continue
            seen.add(os.path.realpath(directory))
            folders.sort()
            pending += [path for path in map(Path(directory).joinpath, folders) if path.is_symlink()]
            for name in sorted(names):
                path = Path(directory, name)
                if not is_recording(name) and path.is_symlink() and not os.path.exists(path):
                    complaints.append(f"{relative(path, folder)}: a broken link")
            yield Path(directory), list(folders), sorted(names)


def relative(path, folder: Path) -> str:
    return Path(path).relative_to(folder).as_posix()


def leads_back(path: Path, folder: Path) -> bool:
    """Whether a path in the folder is a link to the folder itself, or to one that holds it."""
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path))


def is_recording(name: str) -> bool:
    """Whether a file should be a recording, by its name."""
    return Path(name).suffix.lower() in AUDIO and not name.startswith(".")


def plain(name: str) -> str:
    """What is common to the spellings of a name: case, and one or two code points for an accented letter."""
    return unicodedata.normalize("NFC", name).casefold()


class Spellings:
    """Names of files, found in any spelling."""

    def __init__(self, names: list[str]):
        self.names = {plain(name): name for name in names} | {name: name for name in names}

    def find(self, name: str) -> str | None:
        """The name itself if there is such a file, else one that is spelled differently, else None."""
        return self.names.get(name) or self.names.get(plain(name))


def find_sidecars(files: list[str], sidecars: list[str]) -> dict[str, list[str]]:
    """{recording: its sidecars, the more particular ones last}: .txt, then .json."""
    spellings = Spellings(sidecars)
    names = {}
    for file in files:
        stem = os.path.splitext(file)[0]
        names[file] = [f"{stem}.txt", f"{file}.txt", f"{stem}.json", f"{file}.json"]
    owned = {name for several in names.values() for name in several}    # by a recording of just this name
    found = {}
    for file, several in names.items():
        found[file] = []
        for name in several:
            other = spellings.find(name)
            if other == name or other is not None and other not in owned:
                found[file].append(other)
    return found


def apart(files: list[str], sidecars: list[str], beside: dict[str, list[str]]) -> list[str]:
    """Complaints about sidecars whose recording lies in another folder, or that are for several."""
    used = {name for names in beside.values() for name in names}
    stems = {plain(Path(file).stem): file for file in files}
    stems |= {plain(Path(file).name): file for file in files}
    found = []
    for name in sidecars:
        file = stems.get(plain(Path(name).stem))
        if name not in used and file:
            found.append(f"{name}: not read, as it does not lie beside {file}")
        elif name not in used and Path(name).name.lower() == "metadata.json":
            found.append(f"{name}: {ELSEWHERE}")
    return found


# --- the files of captions --------------------------------------------------------------------------------

def read_manifest(folder: Path, path: Path, lines: dict, complaints: list):
    """Adds what a metadata.jsonl or .csv says to {file relative to folder: (its fields, the manifest)}."""
    manifest = relative(path, folder)
    try:
        rows = read_rows(path)
    except ValueError as error:
        complaints.append(f"{manifest}: {error}")
        return
    for number, row in rows:
        where = f"{manifest}, line {number}"
        try:
            fields = understood(parse_object(row) if isinstance(row, str) else as_fields(*row))
            if fields.get("file_name") is None:
                raise ValueError("has no file_name")
            file = inside(folder, path.parent, fields["file_name"])
        except ValueError as error:
            complaints.append(f"{where}: {error}")
            continue
        if file not in lines:
            lines[file] = fields, manifest
        elif fields != lines[file][0]:
            complaints.append(f"{where}: {file} was named before, the first line counts")


def read_rows(path: Path) -> list:
    """(line number, row) of a manifest; a row is JSON, or the cells of the header and its own of a CSV file.

    Lines end with a newline alone: JSON may have all else that splitlines() splits at.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        raise ValueError("is not read; save it as metadata.jsonl or metadata.csv")
    text = read_text(path, limit=MAX_MANIFEST)
    if kind == ".jsonl":
        return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)     # a quote left open is an error
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if "file_name" not in header:
            raise ValueError("has no column file_name, or no commas between its columns")
        return [(reader.line_num, (header, cells)) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not valid CSV ({error})") from None


def as_fields(header: list[str], cells: list[str]) -> dict:
    """The cells of a row that are not empty, by the names of their columns."""
    if len(cells) > len(header):
        raise ValueError(f"has {len(cells)} cells for {len(header)} columns; a text with commas needs quotes")
    fields = {name: cell for name, cell in zip(header, cells) if cell.strip()}
    weight = as_number(fields.get("weight"))    # in JSON it is a number to begin with
    return fields if weight is None else fields | {"weight": weight}


def lines_of_recordings(lines: dict, recordings: Spellings, complaints: list) -> dict[str, dict]:
    """{recording: its fields} of the lines of all manifests, whatever the case of the names in them."""
    found = {}
    for name, (fields, manifest) in sorted(lines.items()):
        file = recordings.find(name)
        if file is None:
            complaints.append(f"{name}: named in {manifest}, but no recording is there")
        elif file != name and file in lines:
            complaints.append(f"{name}: named in {manifest}, where {file} is named as well, which counts")
        else:
            found[file] = fields
    return found


def describe(folder: Path, file: str, listed: dict, sidecars: list[str], complaints: list) -> Track:
    """Track from its .json, else its line of a manifest (`listed`), else the .txt for a description."""
    texts, objects = [], []
    for name in sidecars:
        try:
            if name.lower().endswith(".txt"):
                texts.append({"description": read_text(folder / name, cut=True)})
            else:
                objects.append(understood(parse_object(read_text(folder / name))))
        except ValueError as error:
            complaints.append(f"{name}: {error}")
    fields = {}
    for source in [*texts, listed, *objects]:
        for key, value in source.items():
            if key not in fields or not is_empty(value):
                fields[key] = value
    meta = clean(fields)
    track = Track(file, meta=meta, unused=not_understood(fields, meta))
    weight = fields.get("weight", 1.0)
    if type(weight) in (int, float) and 0 < weight < 1e9:
        track.weight = float(weight)
    else:
        complaints.append(f"{file}: its weight {str(weight)[:50]!r} must be a positive number, taken as 1")
    if not is_empty(fields.get("melody")):
        try:
            track.melody = inside(folder, (folder / file).parent, fields["melody"])
        except ValueError as error:
            track.problem = f"its melody: {error}"
    return track


def inside(folder: Path, base: Path, name) -> str:
    """Path of `name`, mentioned by a file in `base`, relative to folder. ValueError if it is outside.

    What counts is the name: a link in the folder may lead to any place, but for those above the folder.
    """
    if not isinstance(name, str) or not 0 < len(name) < 1000 or "\0" in name:
        raise ValueError(f"{str(name)[:50]!r} is not the name of a file")
    if not os.path.exists(os.path.join(base, name)):
        name = name.strip().replace("\\", "/")    # as Windows has it
    top = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(os.path.abspath(base), name))
    if Path(path).is_relative_to(top):
        file = Path(path).relative_to(top)
        if not any(leads_back(Path(top, parent), folder) for parent in file.parents if parent.name):
            return file.as_posix()
    raise ValueError(f"{name[:200]!r} does not lie in {folder}")


def read_text(path: Path, limit=MAX_SIDECAR, cut=False) -> str:
    """A text file in any encoding: with a byte order mark, UTF-8, else Latin-1. ValueError for anything else.

    cut: a file of more than `limit` bytes is cut there, else it is refused.
    """
    if os.path.exists(path) and not os.path.isfile(path):   # a pipe, say, which would be waited for
        raise ValueError("is not a file")
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if len(data) > limit and not cut:
        raise ValueError(f"is larger than {limit:,} bytes")
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        decoder = codecs.getincrementaldecoder(encoding)()  # to which a character cut in two is no error
        text = decoder.decode(data[:limit])
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


# --- their fields -----------------------------------------------------------------------------------------

def understood(fields: dict) -> dict:
    """Fields with keys in lower case, and the caption as "description", whichever of CAPTIONS it was."""
    lower = {key.strip().lower(): value for key, value in fields.items()}
    fields = lower | {key: value for key, value in fields.items() if key in lower}
    given = [key for key in CAPTIONS if as_caption(fields.get(key))]
    if not given:
        return fields
    description = fields[given[0]]
    others = {key: value for key, value in fields.items() if key not in given or value != description}
    return others | {"description": description}


def clean(fields: dict) -> dict:
    """The known fields of a track, cleaned as in audiocraft, without empty, "None" and impossible ones."""
    meta = {}
    for name in TEXTS:
        value = fields.get(name)
        if name in ("genre", "instrument") and isinstance(value, list):
            value = ", ".join(as_words(value))
        text = as_caption(value)
        if text:
            meta[name] = text if name in ("title", "artist", "description") else text.lower()
    if "," in meta.get("key", ""):
        del meta["key"]  # a piece in several keys
    bpm = as_bpm(fields.get("bpm"))
    if bpm is not None:
        meta["bpm"] = bpm
    for name in WORDS:
        words = as_words(fields.get(name))
        if words:
            meta[name] = words
    return meta


def not_understood(fields: dict, meta: dict) -> list[str]:
    """Keys that nobody knows, and those whose values say nothing; `meta` is what `clean` made of fields."""
    names = []
    for key, value in fields.items():
        if is_empty(value) or key in meta or key in OTHERS and key != "bpm":
            continue
        known = key in (*TEXTS, *WORDS, "bpm")
        names.append(f"a value of {key!r}" if known else repr(key[:50]))
    return names


def is_empty(value) -> bool:
    """Whether a field says nothing: null, a blank text or an empty list."""
    return value is None or value == [] or isinstance(value, str) and value.strip() in ("", "None")


def as_text(value) -> str:
    """Stripped, and without the halves of characters that JSON can spell but UTF-8 cannot."""
    return str(value).strip().encode("utf-8", "replace").decode()


def as_caption(value) -> str:
    """A text or number as a text that is not too long; empty for "None" and anything else."""
    text = as_text(value)[:MAX_TEXT] if type(value) in (str, int, float) else ""
    return "" if text == "None" else text


def as_bpm(value) -> float | None:
    """A positive number, also one written as text, with or without "BPM"; None for anything else."""
    if isinstance(value, str):
        value = value.strip().lower().removesuffix("bpm")
    return as_number(value)


def as_number(value) -> float | None:
    """A positive number, also one written as text; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def as_words(value) -> list[str]:
    """A list of words, or a text of words with commas or blanks between them -> words in lower case."""
    if isinstance(value, str):
        value = re.split(r"[,\s]", value[:MAX_TEXT])
    if not isinstance(value, list):
        return []
    words = [as_text(word).lower()[:200] for word in value[:200] if isinstance(word, str)]
    return [word for word in words if word]
