"""Shards: the files of prepared data. A process of data/prepare.py appends to its own, training reads all.

    DIR/codes.NNNNN.u16   uint16 (frames, K): the codes of shard NNNNN, track after track
    DIR/chroma.NNNNN.u8   uint8 (chroma frames,): a curve: one number for each chroma frame of a track
    DIR/log.NNNNN.jsonl   a line for each track: its file, where its codes and curves begin, how long they are

A line of the log is written after its data are on the disk, and data without a line are cut off when the
shard is opened again: however preparing is stopped, it can go on from there.
"""
import json
import sys
from pathlib import Path

import numpy as np

from data.captions import parse_object
from system.errors import UserError
from system.files import sync

try:
    import fcntl
except ImportError:     # on Windows, where two runs at once are not noticed
    fcntl = None


def shard_files(folder: Path, number: int, curves) -> dict[str, Path]:
    """The files of a shard: {"codes": path, one for each curve, "log": path}."""
    files = {"codes": folder / f"codes.{number:05d}.u16"}
    for name in curves:
        files[name] = folder / f"{name}.{number:05d}.u8"
    files["log"] = folder / f"log.{number:05d}.jsonl"
    return files


def place_keys(name: str) -> tuple[str, str]:
    """Keys of a log's line: where codes or a curve of a track begin in the shard, and how many there are."""
    return f"{name}_start", "frames" if name == "codes" else f"{name}_frames"


def is_whole(entry: dict, frames: dict[str, int]) -> bool:
    """Whether all data of a track lie in a shard with so many frames of each kind ({"codes": n, ...})."""
    for name, n in frames.items():
        start, length = (entry.get(key) for key in place_keys(name))
        if type(start) is not int or type(length) is not int:
            return False
        if start < 0 or length < 0 or start + length > n:
            return False
    return True


def melody_form(settings: dict) -> str:
    """What the melodies of prepared data are stored as. Former versions had another key, or none."""
    return "harmonic_sum" if settings.get("harmonic_sum") else settings.get("melody_form", "chroma")


# --- reading ----------------------------------------------------------------------------------------------

def open_shard(folder: Path, number: int, K: int, curves) -> dict[str, np.ndarray]:
    """{"codes": (frames, K) uint16, each curve: (frames,) uint8}, read from the disk only where used."""
    files = shard_files(folder, number, curves)
    arrays = {name: memmap(files[name], np.uint8) for name in curves}
    return {"codes": memmap(files["codes"], np.uint16).reshape(-1, K)} | arrays


def memmap(path: Path, dtype) -> np.ndarray:
    """A file as an array; numpy refuses to map an empty one."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def read_log(folder: Path, number: int, K: int, curves) -> tuple[list[dict], dict[str, str]]:
    """Tracks of a shard whose data are whole, and {file: why it could not be read}."""
    files = shard_files(folder, number, curves)
    lines = files["log"].read_bytes().splitlines(keepends=True)
    try:
        entries = [parse_object(line) for line in lines if line.endswith(b"\n")]
    except ValueError:
        raise UserError(f"{files['log']}: is damaged; delete {folder} and start again, or choose another "
                        f"--out") from None
    frames = {"codes": files["codes"].stat().st_size // (2 * K)}
    for name in curves:  # a curve that was not thought of when the shard was begun has no file yet
        frames[name] = files[name].stat().st_size if files[name].exists() else 0
    errors = {entry["file"]: entry["error"] for entry in entries if "error" in entry}
    return [entry | {"shard": number} for entry in entries if is_whole(entry, frames)], errors


def read_logs(folder: Path, K: int, curves) -> tuple[dict[tuple, dict], dict[str, str]]:
    """{(file, stamp): its line without them} over all shards, and {file: why it could not be read}."""
    done, errors = {}, {}
    for log in sorted(folder.glob("log.?????.jsonl")):
        entries, failed = read_log(folder, int(log.name[4:9]), K, curves)
        for entry in entries:
            done[entry.pop("file"), tuple(entry.pop("stamp"))] = entry
        errors |= failed
    return done, errors


# --- writing ----------------------------------------------------------------------------------------------

class Shard:
    """The files that one process appends to. Raises UserError where they cannot be written."""

    def __init__(self, folder: Path, number: int, K: int, curves):
        self.names = ("codes", *curves)
        paths = shard_files(folder, number, curves)
        try:
            self.files = {name: open(path, "ab", buffering=0) for name, path in paths.items()}
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        self._lock(folder, number)
        # cut off what was being written when the last run was stopped
        entries = read_log(folder, number, K, curves)[0]
        self.frames = {}
        for name in self.names:
            start, length = place_keys(name)
            self.frames[name] = max((entry[start] + entry[length] for entry in entries), default=0)
            self.files[name].truncate(self.frames[name] * (2 * K if name == "codes" else 1))
        self.files["log"].truncate(paths["log"].read_bytes().rfind(b"\n") + 1)

    def _lock(self, folder, number):
        if fcntl is None:
            return
        try:
            fcntl.flock(self.files["log"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"{folder}: another process writes into it; let that end, or choose another "
                            f"--out") from None
        except OSError:     # a drive of another computer, say
            if number == 0:
                print(f"{folder}: its file system has no locks; do not run this command twice at once",
                      file=sys.stderr)

    def add(self, file: str, stamp: list, codes: np.ndarray, curves: dict[str, np.ndarray], notes=()):
        """Appends a track: codes (T, K) uint16, curves (M,) uint8. It counts once its line is in the log.

        notes: sentences on what is wrong with it.
        """
        entry, arrays = {"file": file, "stamp": stamp}, {"codes": codes} | curves
        for name in self.names:
            start, length = place_keys(name)
            entry |= {start: self.frames[name], length: len(arrays[name])}
            self._write(name, arrays[name].tobytes())
        self.note(**entry | ({"notes": list(notes)} if notes else {}))
        for name in self.names:
            self.frames[name] += len(arrays[name])

    def note(self, **entry):
        """Appends a line to the log."""
        self._write("log", json.dumps(entry).encode() + b"\n")

    def close(self):
        for file in self.files.values():
            file.close()

    def _write(self, name: str, data: bytes):
        file = self.files[name]
        try:
            while data:  # a disk that is nearly full takes a part
                data = data[file.write(data):]
            sync(file)
        except OSError as error:
            raise UserError(f"{file.name}: cannot be written ({error.strerror}); with that put right, run "
                            f"the same command again to go on") from None
