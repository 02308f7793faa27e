"""A folder of recordings: the tracks it holds, and what the files beside them say about them.

    tracks, complaints = scan(folder)

Beside song.mp3 may lie song.json (title, genre, bpm, description, ...) or song.txt (the description), or a
metadata.jsonl has a line for it; see data/prepare.py. Files of captions come from anywhere, so nothing in
them is an error: what cannot be used is a complaint, and the recording is used without it.
"""
import codecs
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from system.errors import UserError

AUDIO = {".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff",
         ".m4a", ".aac", ".wma"}    # the last three cannot be read: better named as skipped than overlooked
MAX_TEXT = 10_000                   # characters of a caption, the rest is cut off
MAX_SIDECAR = 10_000_000            # bytes
MAX_MANIFEST = 2 ** 30              # bytes


@dataclass
class Track:
    file: str                                   # relative to the folder
    melody: str | None = None                   # the file whose chroma is used, None for the track itself
    weight: float = 1.0                         # how often it is drawn, compared with others
    meta: dict = field(default_factory=dict)    # those fields of its captions that `clean` keeps
    problem: str | None = None                  # why it cannot be used


def scan(folder: Path) -> tuple[list[Track], list[str]]:
    """All tracks of a folder in a fixed order, and complaints about files of captions. UserError if none."""
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
    missing = sorted(listed.keys() - set(files))
    complaints += [f"{name}: named in metadata.jsonl, but not there" for name in missing]
    tracks = [describe(folder, file, listed.get(file, {}), complaints) for file in files]
    melodies = {track.melody for track in tracks if track.melody != track.file}
    return [track for track in tracks if track.file not in melodies], complaints


# --- the files of captions --------------------------------------------------------------------------------

def read_manifest(folder: Path, path: Path, complaints: list) -> dict[str, dict]:
    """{file relative to folder: fields} of a metadata.jsonl."""
    listed = {}
    try:
        lines = read_text(path, limit=MAX_MANIFEST).splitlines()
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
    """Track from its .json, else its line of a metadata.jsonl (`fields`), else the .txt for a description."""
    path = folder / file
    for sidecar in (path.with_suffix(".json"), path.with_suffix(".txt")):
        if not os.path.isfile(sidecar):
            continue
        try:
            if sidecar.suffix == ".json":
                fields = fields | parse_object(read_text(sidecar))
            else:
                given = {name: value for name, value in fields.items() if value}
                fields = {"description": read_text(sidecar, cut=True)} | given
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
    """Path of `name`, mentioned by a file in `base`, relative to folder. ValueError if it is outside."""
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
    """A text file in any encoding: with a byte order mark, UTF-8, else Latin-1. ValueError for anything else.

    cut: a file of more than `limit` bytes is cut there, else it is refused.
    """
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

def clean(fields: dict) -> dict:
    """The known fields of a track, cleaned as in audiocraft, without empty, "None" and impossible ones."""
    meta = {}
    for name in ("title", "artist", "description", "genre", "instrument", "key"):
        value = fields.get(name)
        text = as_text(value)[:MAX_TEXT] if type(value) in (str, int, float) else ""
        if text not in ("", "None"):
            meta[name] = text if name in ("title", "artist", "description") else text.lower()
    if "," in meta.get("key", ""):
        del meta["key"]  # a piece in several keys
    bpm = as_bpm(fields.get("bpm"))
    if bpm is not None:
        meta["bpm"] = bpm
    for name in ("moods", "keywords"):
        words = as_words(fields.get(name))
        if words:
            meta[name] = words
    return meta


def as_text(value) -> str:
    """Stripped, and without the halves of characters that JSON can spell but UTF-8 cannot."""
    return str(value).strip().encode("utf-8", "replace").decode()


def as_bpm(value) -> float | None:
    """A positive number, also one written as text; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        bpm = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return bpm if math.isfinite(bpm) and bpm > 0 else None


def as_words(value) -> list[str]:
    """A list of words, or a text of words with commas or blanks between them -> words in lower case."""
    if isinstance(value, str):
        value = re.split(r"[,\s]", value[:MAX_TEXT])
    if not isinstance(value, list):
        return []
    words = [as_text(word).lower()[:200] for word in value[:200] if isinstance(word, str)]
    return [word for word in words if word]
