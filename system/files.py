"""Files: JSON that is read as data alone; what is written appears whole or not at all.

    config = read_json("config.json")
    write_atomic("config.json", b"{}")
    write_atomic("wave.flac", lambda temporary: soundfile.write(temporary, samples, rate))
"""
import json
import os
import tempfile
from pathlib import Path

from system.errors import UserError, as_user_error


def read_json(path) -> dict:
    """The object in a JSON file. Raises UserError naming the file: missing, damaged, no object."""
    with as_user_error(f"{path}: cannot be read as JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__}, not an object")
        return value


def write_atomic(path, content):
    """Writes a file, its folders too: bytes, or what content(temporary_path) writes.

    A temporary file beside it, fsync, rename: a reader finds the old file or the new one, even after a crash.
    Raises UserError naming a place that cannot be written; nothing is left behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the suffix is kept: writers such as soundfile choose their format by it
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
        os.close(handle)
        if callable(content):
            content(temporary)
        else:
            Path(temporary).write_bytes(content)
        _make_public(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _make_public(path):
    """Gives a file of mkstemp, which is private, the permissions that any other new file has."""
    umask = os.umask(0)     # it can only be read by setting it
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
