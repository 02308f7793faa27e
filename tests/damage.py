"""Damaged files, as users and strangers have them: what the tests of bad input write.

Some are made here (recordings, archives, pickles); some come of good ones by a function bytes -> bytes.
"""
import functools
import io
import json
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import soundfile
import torch

from constants import RATE, tone

HUGE = 10 ** 12


def patched(data: bytes, at: int, layout: str, *values) -> bytes:
    """A file with other numbers at one place."""
    new = struct.pack(layout, *values)
    return data[:at] + new + data[at + len(new):]


def flipped(data: bytes, at: int, bits=255) -> bytes:
    """A file with other bits in one byte."""
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1:]


# --- recordings -------------------------------------------------------------------------------------------

def encoded(kind="WAV", subtype=None, rate=RATE, wave=None, **of_tone) -> bytes:
    """A recording as the bytes of a file; wave (L, C), or a tone."""
    wave = tone(rate=rate, **of_tone) if wave is None else wave
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


WAV = encoded()


def write_silence(path: Path, hours: float):
    """A wav file of hours of silence that takes no room on the disk."""
    size = int(hours * 3600 * RATE) * 2
    path.write_bytes(WAV[:4] + struct.pack("<I", size + 36) + WAV[8:40] + struct.pack("<I", size))
    os.truncate(path, 44 + size)


# --- what is no file --------------------------------------------------------------------------------------

ODD = {
    "folder.wav": "folder",
    "broken link.wav": "link",
    "link to itself.wav": "loop",
    "pipe.wav": "pipe",
    "device.wav": "device",
}


def write_odd(path: Path, kind: str):
    """Makes what ODD names in the place of a file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes on Windows")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"link": "gone.wav", "loop": path.name, "device": "/dev/zero"}[kind])


# --- JSON -------------------------------------------------------------------------------------------------

def values(**changes):
    """What makes a JSON object one with other values; None leaves a key out."""
    def harm(data):
        changed = json.loads(data) | changes
        return json.dumps({key: value for key, value in changed.items() if value is not None}).encode()
    return harm


TEXTS = {  # what is done to any JSON
    "empty": lambda data: b"",
    "cut": lambda data: data[:len(data) // 2],
    "a list": lambda data: b"[]",
    "a number": lambda data: b"3",
    "null": lambda data: b"null",
    "nested": lambda data: b"[" * 100_000,
    "binary": lambda data: bytes(range(256)),
    "latin-1": lambda data: data[:-3] + b'\xff": 1}',
    "page": lambda data: b"<html>404</html>",
    "comment": lambda data: b"// x\n" + data,
    "flipped": lambda data: flipped(data, 30),
}


# --- safetensors ------------------------------------------------------------------------------------------

def header_of(data: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    size, = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + size]), data[8 + size:]


def header_text(text: bytes):
    """What gives a safetensors file another text in the place of its header."""
    return lambda data: struct.pack("<Q", len(text)) + text + header_of(data)[1]


def header(change):
    """What changes the header of a safetensors file; change(its JSON), in place."""
    def harm(data):
        changed = header_of(data)[0]
        change(changed)
        return header_text(json.dumps(changed).encode())(data)
    return harm


def entry(**changes):
    """What changes the header's entry of the first tensor."""
    def change(fields):
        first = next(name for name in fields if name != "__metadata__")
        fields[first].update(changes)
    return header(change)


def all_entries(**changes):
    """What changes the header's entries of all tensors."""
    def change(fields):
        for name in fields.keys() - {"__metadata__"}:
            fields[name].update(changes)
    return header(change)


def tensors(change):
    """What changes the tensors; change(dict of them, name of the largest of codec or language model)."""
    def harm(data):
        changed = safetensors.torch.load(data)
        names = [name for name in changed if not name.startswith("text_encoder.")]
        largest_name = max(names, key=lambda name: (changed[name].numel(), name))
        change(changed, largest_name)
        return safetensors.torch.save(changed)
    return harm


def largest(change):
    """What changes the largest tensor; change(tensor) -> another one."""
    return tensors(lambda state, name: state.update({name: change(state[name])}))


def with_one(value: float):
    """What makes a tensor one with this value at one place."""
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor
    return change


WEIGHTS = {  # what is done to a safetensors file, which is then refused
    "empty": lambda data: b"",
    "four bytes": lambda data: data[:4],
    "cut in the header": lambda data: data[:100],
    "cut in the data": lambda data: data[:-999],
    "last byte missing": lambda data: data[:-1],
    "longer": lambda data: data + bytes(100),
    "header of 1 TB": lambda data: patched(data, 0, "<Q", 2 ** 40),
    "header of 2^64": lambda data: patched(data, 0, "<Q", 2 ** 64 - 1),
    "header of 0": lambda data: patched(data, 0, "<Q", 0),
    "not JSON": header_text(b"{not json"),
    "a list": header_text(b"[]"),
    "nested": header_text(b"[" * 100_000),
    "no tensors": lambda data: struct.pack("<Q", 2) + b"{}",
    "offset outside": entry(data_offsets=[0, 2 ** 40]),
    "offset 2^64": entry(data_offsets=[0, 2 ** 64]),
    "offset negative": entry(data_offsets=[-8, 0]),
    "offsets swapped": entry(data_offsets=[8, 0]),
    "offsets overlap": all_entries(data_offsets=[0, 4]),
    "shape of 2^60": entry(shape=[2 ** 30, 2 ** 30]),
    "shape overflows": entry(shape=[2 ** 63, 2]),
    "shape of 0": entry(shape=[0, 2 ** 60]),
    "shape text": entry(shape="big"),
    "unknown dtype": entry(dtype="F31"),
    "other dtype": entry(dtype="I32"),
    "entry null": header(lambda fields: fields.update({"x": None})),
    "metadata list": header(lambda fields: fields.update(__metadata__=[1])),
    "page": lambda data: b"<html>404 not found</html>",
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "pickle": lambda data: pickle.dumps({"x": 1}),
    "zip": lambda data: b"PK\3\4" + bytes(200),
    "flipped in length": lambda data: flipped(data, 1),
    "flipped 0": lambda data: flipped(data, 8),     # of the header's text
    "flipped 1": lambda data: flipped(data, 8 + 1),
    "flipped 5": lambda data: flipped(data, 8 + 5),
    "flipped 60": lambda data: flipped(data, 8 + 60),
    "flipped 99": lambda data: flipped(data, 8 + 99),
    "flipped 200": lambda data: flipped(data, 8 + 200),
    "flipped 333": lambda data: flipped(data, 8 + 333),
    "missing": tensors(lambda state, name: state.pop(name)),
    "surplus": tensors(lambda state, name: state.update(extra=torch.zeros(2))),
    "renamed": tensors(lambda state, name: state.update({"../" + name: state.pop(name)})),
    "transposed": largest(lambda tensor: tensor.transpose(0, 1)[1:].contiguous()),
    "scalar": largest(lambda tensor: torch.zeros(())),
    "no numbers": largest(lambda tensor: torch.zeros(0)),
    "nan": largest(with_one(math.nan)),
    "inf": largest(with_one(math.inf)),
    "int8": largest(lambda tensor: tensor.to(torch.int8)),
    "bool": largest(lambda tensor: tensor > 0),
    "complex": largest(lambda tensor: tensor.to(torch.complex64)),
}


# --- archives and pickles ---------------------------------------------------------------------------------

class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, command, *args):
        self.command, self.args = command, args

    def __reduce__(self):
        return self.command, self.args


def saved(value) -> bytes:
    """A file of torch.save."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def archive(files: dict, compression=zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return data.getvalue()


@functools.cache
def zip_bomb(name: str) -> bytes:
    """300 MB of zeros in 300 kB."""
    return archive({name: bytes(300_000_000)}, zipfile.ZIP_DEFLATED)
