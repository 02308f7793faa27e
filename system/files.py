"""Files: JSON that is read as data alone; what is written appears whole or not at all.

    config = read_json("config.json")
    write_atomic("config.json", b"{}")
    write_atomic("wave.flac", lambda temporary: soundfile.write(temporary, samples, rate))
"""
import errno
import json
import os
import tempfile
from pathlib import Path

from system.errors import UserError, as_user_error

# errors of a call that a file system does not have: network drives, FAT, some FUSE
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTTY)


def read_json(path) -> dict:
    """The object in a JSON file. Raises UserError naming the file: missing, damaged, no object."""
    with as_user_error(f"{path}: cannot be read as JSON"):
        value = json.loads(Path(path).read_bytes())     # in UTF-8 or 16, with a byte order mark or without
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__}, not an object")
        return value


def check_writable(path):
    """Raises UserError if a file could not be written there: told before the work that it is to hold begins.

    Nothing is made, no folder either. Another user of the disk can still come in between.
    """
    path = Path(path)
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent      # write_atomic makes those that are missing
    for name in path.relative_to(folder).parts:
        try:
            os.stat(folder / name)
        except FileNotFoundError:
            pass
        except OSError as error:    # a name that is too long, a file where a folder should be
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    if path.is_dir():
        raise UserError(f"{path}: cannot be written (it is a folder)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (no permission in {folder}, or it is read-only)")


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
            sync(file)
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
    try:
        os.chmod(path, 0o666 & ~umask)
    except OSError:     # network drives and FAT give all files the same permissions
        pass


def sync(file):
    """Waits until the disk has what was written to an open file, where the file system can tell."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:      # a full or a broken disk
            raise
