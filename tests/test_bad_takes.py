"""Takes of strangers: files of codes to continue, and the JSON beside results, of which pages are made.

    python -m pytest tests/test_bad_takes.py
"""
import io
import struct

import numpy as np
import pytest

from commands import command, refused, sampling, worked
from damage import TEXTS, archive, values, zip_bomb
from tools import page

pytestmark = pytest.mark.usefixtures("untouched_world")


# --- --continue_from --------------------------------------------------------------------------------------

def take(**arrays) -> bytes:
    """A file of arrays, as --save_codes writes it."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(header: str) -> bytes:
    """A file of codes whose array has this header and no data."""
    text = header.encode().ljust(117) + b"\n"
    return archive({"codes.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text})


TAKES = {
    "empty": b" ",
    "text": b"hello",
    "other": take(x=np.zeros((4, 9), np.uint16)),
    "object": take(codes=np.array([{"a": 1}], dtype=object)),
    "flat": take(codes=np.zeros(9, np.uint16)),
    "of three": take(codes=np.zeros((3, 9), np.uint16)),
    "no frames": take(codes=np.zeros((4, 0), np.uint16)),
    "too large": take(codes=np.full((4, 9), 32, np.uint16)),
    "negative": take(codes=np.full((4, 9), -1)),
    "nan": take(codes=np.full((4, 9), np.nan)),
    "text array": take(codes=np.full((4, 9), "x")),
    "npy": npy("{}"),
    "claims 2^60": npy("{'descr': '<u2', 'fortran_order': False, 'shape': (4, %d), }" % 2 ** 60),
    "claims 2^40": npy("{'descr': '<u2', 'fortran_order': False, 'shape': (4, %d), }" % 2 ** 40),
    "code": npy("{'descr': __import__('os').system('touch ran'), 'fortran_order': False, 'shape': (4, 9), }"),
    "zip bomb": None,   # made when it is used
    "escaping": archive({"../codes.npy": b"x"}),
    "cut": take(codes=np.zeros((4, 999), np.uint16))[:-50],
    "longer than asked for": take(codes=np.zeros((4, 99), np.uint16)),
}


@pytest.mark.parametrize("name", TAKES)
def test_takes_to_continue(world, model, tmp_path, name):
    (tmp_path / "take.npz").write_bytes(zip_bomb("codes.npy") if name == "zip bomb" else TAKES[name])
    named = "duration 0.05 s" if name == "longer than asked for" else "take.npz"
    refused(sampling(world, "--continue_from", "take.npz", "--out", "x.wav", cwd=tmp_path), named)
    assert [path.name for path in tmp_path.iterdir()] == ["take.npz"]


# --- --page -----------------------------------------------------------------------------------------------

SCRIPT = dict.fromkeys(("text", "duration", "torch", "seed", "checkpoint"), "<script>")
REFUSED = {  # what is done to the JSON beside a result: what the sentence names
    **{name: (harm, "x.json") for name, harm in TEXTS.items() if name != "flipped"},
    "no config": (values(config=None), "x.json"),
    "config list": (values(config=[1]), "x.json"),
    "config unknown key": (values(config={"colour": 1}), "x.json"),
    "config type": (values(config={"dim": "x"}), "dim = 'x'"),
    "config huge": (values(config={"radix2_exp": 60}), "radix2_exp = 60"),
    "text number": (values(text=3), "x.json"),
    "command number": (values(command=3), "x.json"),
    "settings text": (values(settings="x"), "x.json"),
    "stem unknown": (values(melody="x.wav", stem="vocals"), "vocals"),
    "melody number": (values(melody=3), "x.json"),
    "melody list": (values(melody=["x"]), "x.json"),
    "melody gone": (values(melody="gone.wav"), "gone.wav"),
    "melody no audio": (values(melody="/etc/passwd"), "/etc/passwd"),
    "melody nul": (values(melody="a\0b"), "a\0b"),
}
USED = {
    "rate other": values(config={"sample_rate": 1000}),
    "surrogates": values(text="\ud800", settings={"\ud800": "\udfff"}),
    "markup": values(settings={"<script>": "<script>"}, **SCRIPT),
}


@pytest.fixture()
def result(world, model, tmp_path):
    """What sample.py has written: x.wav and x.json."""
    worked(sampling(world, "--out", "x.wav", "--text", "a tune", cwd=tmp_path))
    return tmp_path / "x.json"


@pytest.mark.parametrize("name", REFUSED)
def test_no_page_of_strange_results(result, tmp_path, name):
    harm, named = REFUSED[name]
    result.write_bytes(harm(result.read_bytes()))
    refused(command(page.main, "page", "x.wav", cwd=tmp_path), named)
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("name", USED)
def test_pages_of_strange_results(result, tmp_path, name):
    result.write_bytes(USED[name](result.read_bytes()))
    worked(command(page.main, "page", "x.wav", cwd=tmp_path))
    text = (tmp_path / "page" / "index.html").read_bytes()
    assert text.count(b"<script>") == 1, "that of the page alone"
