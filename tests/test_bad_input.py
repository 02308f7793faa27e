"""Bad input, of which users and strangers have every kind: each case ends in the right result, or in one sentence
that names the file or flag and the way out, with exit code 2 and nothing damaged, in bounded time and memory.

    python -m pytest tests/test_bad_input.py

Every case is a command run in a child process that may take two minutes and 1 GB (see helpers.py). `prepare` goes on
without the files that it cannot use: exit code 1 and a list of them.
"""
import functools
import io
import json
import math
import os
import pickle
import runpy
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import chroma
import encodec
import lm as L
import page
import patterns
import prepare
import sample as S
import train
from config import Config, UserError
from data.segments import AudioCrops
from helpers import (CODEC, LM, RATE, ROOT, TRAIN, Result, TRAIN_CODEC, command, either, flags, forked, preparing, refused, sampling, snapshot, tone,
                     worked, world)  # noqa: F401


@pytest.fixture(autouse=True)
def untouched(world):  # noqa: F811
    """Whatever a case does, models and music of the world stay as they are."""
    before = snapshot(world)
    yield
    assert snapshot(world) == before


# --- audio ----------------------------------------------------------------------------------------------------------

def encoded(kind="WAV", subtype=None, rate=RATE, wave=None, **of_tone) -> bytes:
    """A recording as the bytes of a file."""
    file = io.BytesIO()
    soundfile.write(file, tone(rate=rate, **of_tone) if wave is None else wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def patched(data: bytes, at: int, layout: str, *values) -> bytes:
    """The file with other numbers at a place of its header."""
    new = struct.pack(layout, *values)
    return data[:at] + new + data[at + len(new):]


def spoilt(value, subtype="FLOAT") -> bytes:
    wave = tone()
    wave[1000] = value
    return encoded(subtype=subtype, wave=wave)


WAV, FLAC, OGG, MP3 = encoded(), encoded("FLAC"), encoded("OGG"), encoded("MP3")
W64, RF64, CAF = encoded("W64"), encoded("RF64"), encoded("CAF")
GOOD = {
    **{f"{c} channels.wav": encoded(channels=c) for c in range(1, 9)},
    **{f"{rate} Hz.wav": encoded(rate=rate) for rate in (8000, 11025, 22050, 32000, 44100, 48000, 96000, 192000, 384000, 16001)},
    **{f"{subtype}.wav": encoded(subtype=subtype) for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")},
    "one sample.wav": encoded(wave=np.full((1, 1), 0.5)), "two samples.flac": encoded("FLAC", wave=np.full((2, 1), 0.5)),
    "silent.wav": encoded(wave=np.zeros((4000, 1))), "loud.wav": encoded(subtype="FLOAT", wave=1e30 * tone()),
    "denormal.wav": encoded(subtype="FLOAT", wave=1e-42 * tone()),
    "wave as.mp3": WAV, "wave as.ogg": WAV, "flac as.wav": FLAC, "ogg as.flac": OGG, "mp3 as.wav": MP3,
    "cut.wav": WAV[:3001], "cut.mp3": MP3[:len(MP3) // 2], "claims 4 GB.wav": patched(WAV, 40, "<I", 2 ** 32 - 16),
    "claims 2^60 samples.w64.wav": patched(W64, W64.index(b"data") + 16, "<Q", 2 ** 60),
    "claims 2^60 samples.rf64.wav": patched(RF64, 20, "<QQQ", 2 ** 61, 2 ** 61, 2 ** 60),
    "tail of rubbish.wav": WAV + os.urandom(1000),
}
BAD = {
    "empty.wav": b"", "empty.mp3": b"", "text.wav": b"not music " * 99, "page.mp3": b"<html>404 not found</html>", "zeros.flac": bytes(9999),
    "header alone.wav": WAV[:44], "half a header.wav": WAV[:20], "header alone.flac": FLAC[:42], "a byte.ogg": b"O",
    "half a header.ogg": OGG[:60], "no samples.wav": encoded(wave=np.zeros((0, 1))), "phone.m4a": b"\0\0\0 ftypM4A ",
    "nan.wav": spoilt(math.nan), "inf.wav": spoilt(math.inf), "minus inf.wav": spoilt(-math.inf), "nan.double.wav": spoilt(math.nan, "DOUBLE"),
    "0 Hz.wav": patched(WAV, 24, "<I", 0), "1 Hz.wav": patched(WAV, 24, "<I", 1), "2 GHz.wav": patched(WAV, 24, "<I", 2 ** 31 - 1),
    "negative rate.wav": patched(WAV, 24, "<i", -8000), "0 channels.wav": patched(WAV, 22, "<H", 0),
    "65535 channels.wav": patched(WAV, 22, "<H", 65535), "0 bits.wav": patched(WAV, 34, "<H", 0),
    "unknown coding.wav": patched(WAV, 20, "<H", 999), "picture.wav": b"\x89PNG\r\n\x1a\n" + bytes(500), "pickle.wav": pickle.dumps([1, 2]),
}
UNSURE = {  # read or refused, as the version of libsndfile has it
    "claims 2^60 samples.caf.wav": patched(CAF, CAF.index(b"data") + 4, ">Q", 2 ** 61), "cut.flac": FLAC[:len(FLAC) // 2],
    "claims 2^36 samples.flac": patched(FLAC, 21, ">BI", (FLAC[21] & 0xf0) | 0xf, 2 ** 32 - 1), "cut.ogg": OGG[:len(OGG) // 2],
    "cut.w64.wav": W64[:1000], "999 channels.wav": patched(WAV, 22, "<H", 999), "7 bits.wav": patched(WAV, 34, "<H", 7),
    "flipped.flac": FLAC[:900] + bytes([FLAC[900] ^ 255]) + FLAC[901:], "flipped.ogg": OGG[:900] + bytes([OGG[900] ^ 255]) + OGG[901:],
    "noise as.mp3": np.random.default_rng(0).bytes(20000), "zeros.mp3": bytes(20000),
}
ODD = {"folder.wav": "folder", "broken link.wav": "link", "link to itself.wav": "loop", "pipe.wav": "pipe", "device.wav": "device"}


def write_odd(path: Path, kind: str):
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"link": "gone.wav", "loop": path.name, "device": "/dev/zero"}[kind])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """All of the above in one folder."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, data in (GOOD | BAD | UNSURE).items():
        (folder / name).write_bytes(data)
    for name, kind in ODD.items():
        write_odd(folder / name, kind)
    return folder


@pytest.fixture(scope="module")
def loaded(world):  # noqa: F811
    return S.MusicGen.from_pretrained(world / "lm", "cpu")


@pytest.fixture()
def model(loaded, monkeypatch):
    """The tiny model as if loaded each time, which would take longer than all the rest."""
    monkeypatch.setattr(S.MusicGen, "from_pretrained", lambda *_: loaded)


@pytest.mark.parametrize("name", [*GOOD, *BAD, *UNSURE, *ODD])
def test_audio_as_a_melody(world, corpus, model, tmp_path, name):  # noqa: F811
    result = sampling(world, "--melody", corpus / name, "--out", "x.wav", cwd=tmp_path)
    worked(result) if name in GOOD else either(result, name) if name in UNSURE else refused(result, name)
    assert (tmp_path / "x.wav").exists() == (result.code == 0)


@pytest.mark.parametrize("name", [*BAD, *ODD])
def test_audio_as_a_prompt(world, corpus, model, tmp_path, name):  # noqa: F811
    refused(sampling(world, "--prompt", corpus / name, "--out", "x.wav", cwd=tmp_path), name)
    assert not list(tmp_path.iterdir())


def test_the_corpus_in_one_folder_prepared(world, corpus, tmp_path):  # noqa: F811
    """Every good one in, every bad one named, and the exit code says so."""
    before = snapshot(corpus)
    result = preparing(world, corpus, tmp_path / "out")
    assert result.code == 1 and "Traceback" not in result.err, result
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    taken = [track["file"] for track in index["tracks"]]
    report = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    skipped = [line.split(": ")[0] for line in report]
    assert set(taken) - set(UNSURE) == set(GOOD) and set(skipped) - set(UNSURE) == set(BAD) | set(ODD) - {"folder.wav"}
    assert sorted(taken + skipped) == sorted(p.name for p in corpus.iterdir() if not p.is_dir())
    assert snapshot(corpus) == before
    assert preparing(world, corpus, tmp_path / "out").code == 1  # and again, with nothing left to do
    worked(forked(train.main, *flags(TRAIN, data_dir=tmp_path / "out", codec=world / "codec", out_dir=tmp_path / "run", segment_duration=0.1)))


@pytest.mark.parametrize("demo", [encodec.demo, chroma.main], ids=["encodec", "chroma"])
@pytest.mark.parametrize("name", ["8 channels.wav", "one sample.wav", "192000 Hz.wav", "silent.wav", *list(BAD)[::3], *ODD])
def test_audio_in_the_demos(corpus, demo, name):
    result = command(demo, corpus / name)
    worked(result) if name in GOOD else refused(result, name)


def test_a_codec_trains_on_what_can_be_read_of_the_corpus(world, corpus, tmp_path):  # noqa: F811
    (tmp_path / "train").symlink_to(corpus)
    result = forked(train.main, *flags(TRAIN_CODEC, data_dir=tmp_path, out_dir=tmp_path / "run"))
    assert result.code == 0 and "Traceback" not in result.err, result
    assert all(f"/{name}: " in result.err for name in ("empty.wav", "text.wav", "page.mp3", "header alone.wav", "0 channels.wav", *ODD))


@pytest.mark.parametrize("name", ["empty.wav", "text.wav", "no samples.wav", *ODD])
def test_a_codec_does_not_train_on_nothing(tmp_path, name):
    (tmp_path / "music").mkdir()
    if name in ODD:
        write_odd(tmp_path / "music" / name, ODD[name])
    else:
        (tmp_path / "music" / name).write_bytes(BAD[name])
    result = forked(train.main, *flags(TRAIN_CODEC, data_dir="music", out_dir="run"), cwd=tmp_path, seconds=20)
    assert result.code == 2 and "Traceback" not in result.err and "no readable" in result.sentences[-1], result
    assert f"skipped music/{name}: " in result.err and not (tmp_path / "run").exists()


def test_a_header_that_claims_ages_does_not_crowd_out_the_music(tmp_path):
    (tmp_path / "train").mkdir()
    for n in range(4):
        (tmp_path / "train" / f"{n}.wav").write_bytes(encoded(seconds=2.0, seed=n))
    (tmp_path / "train" / "ages.wav").write_bytes(GOOD["claims 2^60 samples.w64.wav"])
    (tmp_path / "train" / "more.wav").write_bytes(UNSURE["claims 2^60 samples.caf.wav"])
    data = AudioCrops(Config(**TRAIN_CODEC | dict(data_dir=str(tmp_path))), "train")
    drawn = [data.item(np.random.default_rng(n), True)["where"] for n in range(40)]
    assert all(any(f"/{n}.wav" in where for where in drawn) for n in range(4))


# --- names, and words -------------------------------------------------------------------------------------------------

NAMES = ["a b", "it's", 'say "x"', "new\nline", "tab\t", "ünï", "音楽", "🎵", "-dash", "--text", "$(touch gone)", "`ls`", "a;b", "%s%n", "{x}",
         "back\\slash", " leading", "trailing ", "dots..", "e\u0301", "\u202eltr", os.fsdecode(b"latin\xff"), "#", "*", "~", "x" * 230]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(world, model, tmp_path, name):  # noqa: F811
    (tmp_path / f"{name}.wav").write_bytes(WAV)
    worked(sampling(world, f"--melody={name}.wav", f"--out=to {name}.wav", cwd=tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.wav", f"to {name}.wav", f"to {name}.json"}


def test_names_of_files_in_a_folder(world, tmp_path):  # noqa: F811
    folder = tmp_path / "music"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.wav").write_bytes(WAV)
        (folder / f"{name}.txt").write_text("a tune")
    worked(preparing(world, "music", "out", cwd=tmp_path))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert {track["file"] for track in index["tracks"]} == {f"{name}.wav" for name in NAMES}
    assert all(track["meta"] == {"description": "a tune"} for track in index["tracks"])
    worked(forked(train.main, *flags(TRAIN, data_dir="out", codec=world / "codec", out_dir="run"), cwd=tmp_path))
    worked(forked(train.main, *flags(TRAIN_CODEC, data_dir="music", out_dir="run_codec"), cwd=tmp_path))


@pytest.mark.parametrize("text", ["", " ", "\n\n", "word " * 4000, "x" * 100_000, os.fsdecode(b"\xff\xfe"), "🎵" * 999, "\0", "../../x", "/etc/passwd",
                                  "<pad></s>", "%s", "--x", "CON"], ids=repr)
def test_any_text_is_a_text(world, model, tmp_path, text):  # noqa: F811
    text = text[:20_000]
    result = sampling(world, f"--text={text}", cwd=tmp_path)
    worked(result)
    out = tmp_path / result.out.strip()
    assert out.parent == tmp_path / "samples" and json.loads(out.with_suffix(".json").read_text()).get("text", "") == text


# --- what is said about recordings: sidecars and manifests ----------------------------------------------------------------

TUNE = {"description": "a tune"}


def said(**fields) -> bytes:
    return json.dumps(TUNE | fields).encode()


SIDECARS = {  # name: (content, whether it is complained of, whether the recording is left out for it)
    "broken": (b"{", True), "empty": (b"", True), "blank": (b" \n", True), "list": (b"[1, 2]", True), "number": (b"3", True), "string": (b'"x"', True),
    "null": (b"null", True), "nested": (b"[" * 100_000, True), "nested objects": (b'{"a":' * 50_000, True), "binary": (os.urandom(500) + b"\0", True),
    "half": (said()[:-5], True), "python": (b"{'description': 'a tune'}", True), "nul": (b"\0\1", True), "long number": (b'{"bpm": %s}' % (b"9" * 5000), True),
    "too large": (said(title="x" * 11_000_000), True), "two objects": (said() + said(), True),
    "utf-16": (said().decode().encode("utf-16"), False), "bom": (b"\xef\xbb\xbf" + said(), False), "latin-1": ('{"description": "flûte"}'.encode("latin-1"), False),
    "windows": (said().replace(b": ", b":\r\n"), False), "not ascii": ('{"description": "フルート"}'.encode(), False), "escapes": (b'{"description": "\\ud800 \\u0000 \\u001b[31m"}', False),
    "weight nan": (b'{"weight": NaN}', True), "weight inf": (b'{"weight": Infinity}', True), "weight 1e308": (said(weight=1e308), True), "weight 0": (said(weight=0), True),
    "weight negative": (said(weight=-1), True), "weight text": (said(weight="2"), True), "weight true": (said(weight=True), True), "weight null": (said(weight=None), True),
    "bpm object": (said(bpm={}), False), "bpm inf": (b'{"bpm": Infinity}', False), "bpm negative": (said(bpm=-5), False), "bpm text": (said(bpm="fast"), False),
    "title list": (said(title=["x"]), False), "all null": (b'{"title": null, "key": null, "moods": null, "bpm": null, "description": null}', False), "moods number": (said(moods=3), False),
    "moods nested": (said(moods=[["x"], {"a": 1}, None, 3, "calm"]), False), "moods many": (said(moods=["calm"] * 100_000), False), "key number": (said(key=7), False),
    "description object": (b'{"description": {"a": 1}}', False), "description huge": (said(description="word " * 200_000), False), "unknown keys": (said(**{"a b": 1, "": 2}), False),
    "same key twice": (b'{"description": "x", "description": "a tune"}', False), "code": (said(title="__import__('os').system('touch gone')", description="${x} {x} %s"), False),
    "melody number": (said(melody=3), True, True), "melody list": (said(melody=["a.wav"]), True, True), "melody escapes": (said(melody="../outside.wav"), True, True),
    "melody absolute": (said(melody="/etc/passwd"), True, True), "melody absent": (said(melody="absent.wav"), True, True), "melody nul": (said(melody="a\0b"), True, True),
    "melody folder": (said(melody="."), True, True), "melody too long": (said(melody="x/" * 5000), True, True), "melody text": (said(melody="melody text.json"), True, True),
    "melody by link": (said(melody="way out/outside.wav"), True, True), "melody itself": (said(melody="melody itself.wav"), False),
}
CAPTIONS = {
    "text empty": (b"", False), "text blank": (b" \r\n\t ", False), "text huge": (b"word " * 2_300_000, False), "text binary": (os.urandom(999) + b"\0", True), "text nul": (b"a\0b", True),
    "text utf-16": ("flûte".encode("utf-16"), False), "text latin-1": ("flûte".encode("latin-1"), False), "text utf-8": ("フルート 🎵".encode(), False), "text one line": (b"x" * 500_000, False),
}
MANIFEST = [{"file_name": "../outside.wav"}, {"file_name": "/etc/passwd"}, {"file_name": "absent.wav"}, {"file_name": 3}, {"file_name": ["x"]}, {"text": "no file"}, [1], "x", 3, None,
            {"file_name": "twice.wav", "text": "first"}, {"file_name": "twice.wav", "text": "second"}, {"file_name": "./sub/../twice.wav"}, {"file_name": "a\0b"}, {"file_name": "x" * 5000},
            {"file_name": "way out/outside.wav"}, {"file_name": ""}, {"file_name": "."}]


@pytest.fixture(scope="module")
def described(world, tmp_path_factory):  # noqa: F811
    """A folder with all of these, prepared -> (index of tracks by file, report)."""
    root = tmp_path_factory.mktemp("described")
    folder = root / "music"
    (folder / "sub").mkdir(parents=True)
    (root / "outside.wav").write_bytes(WAV)
    os.symlink(root, folder / "way out")
    for ending, cases in ((".json", SIDECARS), (".txt", CAPTIONS)):
        for name, (content, *_) in cases.items():
            (folder / f"{name}.wav").write_bytes(WAV)
            (folder / f"{name}{ending}").write_bytes(content)
    for name in ("twice", *ODD):
        (folder / f"{name}.wav").write_bytes(WAV)
    for name, kind in ODD.items():
        write_odd(folder / f"{name}.json", kind)
    lines = [json.dumps(line) for line in MANIFEST] + ["{", "[" * 10_000, "\xff", ""]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="latin-1")
    (folder / "sub" / "metadata.jsonl").write_bytes(b"\0")
    before = snapshot(root)
    result = preparing(world, folder, root / "out")
    assert result.code == 1 and "Traceback" not in result.err, result
    assert {path: look for path, look in snapshot(root).items() if path in before} == before
    index = json.loads((root / "out" / "index.json").read_text())
    return {track["file"]: track for track in index["tracks"]}, (root / "out" / "skipped.txt").read_text().splitlines(), root / "out"


@pytest.mark.parametrize("name", [*SIDECARS, *CAPTIONS])
def test_sidecars(described, name):
    tracks, report, _ = described
    content, complained, left_out = ((SIDECARS | CAPTIONS)[name] + (False,))[:3]
    assert (f"{name}.wav" in tracks) == (not left_out)
    lines = [line for line in report if line.startswith((f"{name}.json: ", f"{name}.txt: ", f"{name}.wav: "))]
    assert len(lines) == complained and all(len(line) < 400 for line in lines)
    if b"a tune" in content and not complained:
        assert tracks[f"{name}.wav"]["meta"]["description"] == "a tune"
    if name in ("latin-1", "text latin-1", "text utf-16"):
        assert tracks[f"{name}.wav"]["meta"]["description"] == "flûte"
    if not left_out:
        meta = tracks[f"{name}.wav"]["meta"]
        assert all(len(value) <= 10_000 for value in meta.values() if isinstance(value, str)) and len(meta.get("moods", [])) <= 200
        assert tracks[f"{name}.wav"]["weight"] == 1.0


def test_a_manifest_of_all_mistakes(described):
    tracks, report, _ = described
    assert tracks["twice.wav"]["meta"] == {"description": "first"}
    for number in range(len(MANIFEST) + 3):
        told = sum(line.startswith(f"metadata.jsonl, line {number + 1}: ") for line in report)
        assert told == (number not in (2, 10, 17)), number  # absent.wav and "." are told by name, one is right
    assert {"absent.wav: named in metadata.jsonl, but not there", ".: named in metadata.jsonl, but not there"} < set(report)
    assert any(line.startswith("sub/metadata.jsonl: ") for line in report)


def test_odd_sidecars_are_passed_over(described):
    tracks, report, _ = described
    assert all(f"{name}.wav" in tracks for name in ODD if name != "device.wav")


def test_training_on_whatever_was_said(world, described, tmp_path):  # noqa: F811
    worked(forked(train.main, *flags(TRAIN, data_dir=described[2], codec=world / "codec", out_dir=tmp_path / "run", batch_size=16, merge_text_p=1.0,
                                      drop_other_p=1.0, cfg_dropout=0.0)))


# --- configuration files and flags ------------------------------------------------------------------------------------------

FILES = {  # of configuration: (content, what the sentence says)
    "binary": (os.urandom(300) + b"\0", "c.py"), "latin-1": ("# flûte\ndim = 16".encode("latin-1"), "c.py"), "unfinished": (b"dim = (", "c.py"), "indented": (b" dim = 16", "c.py"),
    "nested": (b"dim = " + b"(" * 5000, "c.py"), "nested minus": (b"dim = " + b"-" * 100_000 + b"1", "c.py"), "import": (b"import os", "line 1"), "call": (b"dim = print('ran')", "dim"),
    "code": (b"dim = __import__('os').system('touch ran')", "dim"), "expression": (b"open('ran', 'w')", "line 1"), "name": (b"dim = num_heads", "dim"), "f-string": (b"out_dir = f'{1}'", "out_dir"),
    "two names": (b"dim = num_heads = 2", "line 1"), "tuple of names": (b"dim, num_heads = 16, 2", "line 1"), "augmented": (b"dim += 1", "line 1"), "annotated": (b"dim: int = 16", "line 1"),
    "loop": (b"while True: pass", "line 1"), "function": (b"def dim(): pass", "line 1"), "attribute": (b"config.dim = 16", "line 1"), "delete": (b"del dim", "line 1"),
    "power": (b"dim = 10 ** 10 ** 10", "dim"), "string times": (b"out_dir = 'x' * 10 ** 12", "out_dir"), "set": (b"ratios = {5, 4}", "ratios"), "dict": (b"ratios = {5: 4}", "ratios"),
    "unknown": (b"dimm = 16", "dim"), "dunder": (b"__class__ = 1", "__class__"), "method": (b"stride = 3", "stride"), "text": (b"dim = '16'", "dim"), "float": (b"dim = 16.0", "dim"),
    "bool": (b"dim = True", "dim"), "none": (b"dim = None", "dim"), "complex": (b"lr = 1j", "lr"), "bytes": (b"out_dir = b'x'", "out_dir"), "long number": (b"dim = " + b"9" * 5000, "c.py"),
    "html": (b"<html>404</html>", "c.py"), "json": (b'{"dim": 16}', "line 1"), "yaml": (b"dim: 16\nnum_heads: 2", "line 1"), "float overflow": (b"lr = 1e999", "lr"),
}
OPTIONS = {  # flags of train.py: what the sentence says
    "--dimm=16": "'dim'", "--=3": "''", "--": "''", "---dim=16": "'-dim'", "--dim": "--dim", "--dim=": "dim", "--dim=x": "dim", "--dim=16.0": "dim", "--dim=1e3": "dim", "--dim==16": "dim", "--dim=-16": "dim",
    "--dim=0": "dim", "--dim=17": "num_heads", "--dim=True": "dim", "--dim=None": "dim", "--dim=[16]": "dim", "--dim=16,": "dim", "--dim=0x": "dim", "--dim=__import__('os')": "dim", "--dim=10**9": "dim",
    "--num_heads=3": "num_heads", "--num_layers=0": "num_layers", "--lr=nan": "lr", "--lr=inf": "lr", "--lr=-1": "lr", "--lr=1e309": "lr", "--lr='1'": "lr", "--dropout=2": "dropout", "--dropout=-0.1": "dropout",
    "--ratios=8": "ratios", "--ratios=()": "ratios", "--ratios=(0,)": "ratios", "--ratios=(2.5,)": "ratios", "--ratios=('a',)": "ratios", "--ratios=(5,4": "ratios", "--delays=(0,)": "delays", "--delays=(0,1,2,-3)": "delays",
    "--delays=()": "delays", "--pattern=diagonal": "delay, parallel", "--text=maybe": "prepend", "--melody=1": "melody", "--task=both": "task", "--optim=sgd": "optim", "--dtype=int8": "dtype", "--sharding=zero": "sharding",
    "--device=tpu": "tpu", "--device=cuda:99": "cuda:99", "--device=": "device", "--channels=3": "channels", "--channels=0": "channels", "--card=0": "card", "--card=65536": "65535", "--card=100000": "65535", "--betas=(0.9,)": "betas", "--betas=(1.0,1.0)": "betas",
    "--betas=0.9": "betas", "--mel_range=(6,6)": "mel_range", "--mel_range=(6,99)": "mel_range", "--radix2_exp=60": "radix2_exp", "--radix2_exp=0": "radix2_exp", "--batch_size=3 --grad_accum=2": "grad_accum", "--batch_size=0": "batch_size",
    "--causal=maybe": "causal", "--causal=2": "causal", "--compress=0": "compress", "--segment_duration=0": "segment_duration", "--segment_duration=-1": "segment_duration", "--temperature=-1": "temperature", "--top_k=-1": "top_k",
    "--top_p=1.5": "top_p", "--cfg_coef=nan": "cfg_coef", "--stem=vocals": "stem", "--n_q=0": "n_q", "--n_q=5": "delays", "--seed=-1": "seed", "--seed=1.5": "seed", "--epochs=0": "epochs", "--split=all": "train, valid, test",
    "--resume=yes": "resume", "--help": "help", "-h": "-h", "config.json": "config.json", "absent.py": "absent.py", ".": ".", "/dev/null /dev/null": "one configuration file", "absent\0.py": "absent",
    # sizes that would take all memory, or for ever
    "--dim=1000000000": "dim", "--num_layers=1000000000": "num_layers", "--n_q=1000000000": "n_q", "--hidden_scale=1000000000": "hidden_scale", "--t5_layers=1000000000": "t5_layers", "--t5_dim=1000000000": "t5_dim", "--lstm=1000000000": "lstm",
    "--t5_heads=1000000000": "t5_heads", "--n_filters=1000000000": "n_filters", "--dimension=1000000000": "dimension", "--n_residual_layers=1000000000": "n_residual_layers", "--kernel_size=1000000000": "kernel_size", "--num_heads=1000000000": "num_heads",
    "--n_chroma=1000000000": "n_chroma", "--chroma_length=1000000000": "chroma_length", "--sample_rate=1000000000": "sample_rate", "--n_mels=1000000000": "n_mels", "--disc_filters=1000000000": "disc_filters", "--batch_size=1000000000": "batch_size",
    "--segment_duration=1e12": "segment_duration", "--seed=" + "9" * 30: "seed", "--ratios=(" + "2," * 1000 + ")": "ratios", "--ratios=(1000000000,)": "ratios", "--delays=(0,1,2,1000000000)": "delays", "--dilation_base=1000000000": "dilation_base",
    "--disc_windows=(1000000000,)": "disc_windows", "--disc_windows=(0,)": "disc_windows", "--lora_rank=1000000000": "lora_rank", "--epochs=" + "9" * 30: "epochs", "--dim=" + "9" * 5000: "dim",
    "--residual_kernel_size=1000000000": "residual_kernel_size", "--last_kernel_size=1000000000": "last_kernel_size", "--out_dir=" + "x" * 300: "File name too long", "--out_dir=": "out_dir", "--data_dir=": "data_dir",
}


@pytest.mark.parametrize("name", FILES)
def test_configuration_files(world, tmp_path, name):  # noqa: F811
    content, says = FILES[name]
    (tmp_path / "c.py").write_bytes(content)
    refused(command(train.main, "c.py", cwd=tmp_path), "c.py", says)
    assert [path.name for path in tmp_path.iterdir()] == ["c.py"]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option[:40].replace("\0", "\\0"))
def test_flags_of_training(world, tmp_path, option):  # noqa: F811
    base = flags(TRAIN, data_dir=world / "tokens", codec=world / "codec", out_dir="out")
    refused(command(train.main, *base, *option.split(" "), cwd=tmp_path, seconds=20), OPTIONS[option])
    assert not list(tmp_path.iterdir())


# --- checkpoints --------------------------------------------------------------------------------------------------------------

def load_model(argv):
    L.LMModel.from_pretrained(argv[0])
    S.MusicGen.from_pretrained(argv[0], "cpu")


def load_codec(argv):
    encodec.EncodecModel.from_pretrained(argv[0])


def header_of(data: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    n, = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + n]), data[8 + n:]


def with_header(change, length=None):
    """What makes a safetensors file one with a changed header: change(header, its first tensor's entry)."""
    def harm(data):
        header, rest = header_of(data)
        first = next(name for name in header if name != "__metadata__")
        text = change(header, header[first])
        text = json.dumps(header).encode() if text is None else text
        return struct.pack("<Q", len(text) if length is None else length) + text + rest
    return harm


def with_tensors(change):
    """What makes a safetensors file one with changed tensors: change(dict of tensors, name of the largest of the codec or model)."""
    def harm(data):
        import safetensors.torch
        tensors = safetensors.torch.load(data)
        name = max((tensor.numel(), name) for name, tensor in tensors.items() if not name.startswith("text_encoder."))[1]
        change(tensors, name)
        return safetensors.torch.save(tensors)
    return harm


def flip(at):
    """Flips all bits of one byte, counted from the beginning of the header's text."""
    return lambda data: data[:8 + at] + bytes([data[8 + at] ^ 255]) + data[9 + at:]


WEIGHTS = {  # what is done to model.safetensors
    "empty": lambda data: b"", "four bytes": lambda data: data[:4], "cut in the header": lambda data: data[:100], "cut in the data": lambda data: data[:-999], "last byte missing": lambda data: data[:-1],
    "longer": lambda data: data + bytes(100), "header of 1 TB": lambda data: struct.pack("<Q", 2 ** 40) + data[8:], "header of 2^64": lambda data: b"\xff" * 8 + data[8:], "header of 0": lambda data: bytes(8) + data[8:],
    "not JSON": with_header(lambda header, entry: b"{not json"), "a list": with_header(lambda header, entry: b"[]"), "nested": with_header(lambda header, entry: b"[" * 100_000), "no tensors": lambda data: struct.pack("<Q", 2) + b"{}",
    "offset outside": with_header(lambda header, entry: entry.update(data_offsets=[0, 2 ** 40])), "offset 2^64": with_header(lambda header, entry: entry.update(data_offsets=[0, 2 ** 64])),
    "offset negative": with_header(lambda header, entry: entry.update(data_offsets=[-8, 0])), "offsets swapped": with_header(lambda header, entry: entry.update(data_offsets=[8, 0])),
    "offsets overlap": with_header(lambda header, entry: [e.update(data_offsets=[0, 4]) for n, e in header.items() if n != "__metadata__"] and None),
    "shape of 2^60": with_header(lambda header, entry: entry.update(shape=[2 ** 30, 2 ** 30])), "shape overflows": with_header(lambda header, entry: entry.update(shape=[2 ** 63, 2])),
    "shape of 0": with_header(lambda header, entry: entry.update(shape=[0, 2 ** 60])), "shape text": with_header(lambda header, entry: entry.update(shape="big")), "unknown dtype": with_header(lambda header, entry: entry.update(dtype="F31")),
    "other dtype": with_header(lambda header, entry: entry.update(dtype="I32")), "entry null": with_header(lambda header, entry: header.update({"x": None})), "metadata list": with_header(lambda header, entry: header.update(__metadata__=[1])),
    "page": lambda data: b"<html>404 not found</html>", "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pickle": lambda data: pickle.dumps({"x": 1}), "zip": lambda data: b"PK\3\4" + bytes(200),
    "flipped in length": lambda data: data[:1] + bytes([data[1] ^ 255]) + data[2:], "flipped 0": flip(0), "flipped 1": flip(1), "flipped 5": flip(5), "flipped 60": flip(60), "flipped 99": flip(99), "flipped 200": flip(200), "flipped 333": flip(333),
    "missing": with_tensors(lambda tensors, name: tensors.pop(name)), "surplus": with_tensors(lambda tensors, name: tensors.update(extra=torch.zeros(2))), "renamed": with_tensors(lambda tensors, name: tensors.update({"../" + name: tensors.pop(name)})),
    "transposed": with_tensors(lambda tensors, name: tensors.update({name: tensors[name].transpose(0, 1)[1:].contiguous()})), "scalar": with_tensors(lambda tensors, name: tensors.update({name: torch.zeros(())})),
    "no numbers": with_tensors(lambda tensors, name: tensors.update({name: torch.zeros(0)})), "nan": with_tensors(lambda tensors, name: tensors[name].view(-1)[3:4].fill_(math.nan)), "inf": with_tensors(lambda tensors, name: tensors[name].view(-1)[3:4].fill_(math.inf)),
    "int8": with_tensors(lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)})), "bool": with_tensors(lambda tensors, name: tensors.update({name: tensors[name] > 0})),
    "complex": with_tensors(lambda tensors, name: tensors.update({name: tensors[name].to(torch.complex64)})),
}
HARMLESS = {  # the right result, or told
    "float8": with_tensors(lambda tensors, name: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})),
    "float64": with_tensors(lambda tensors, name: tensors.update({name: tensors[name].double()})), "half": with_tensors(lambda tensors, name: tensors.update({n: t.half() for n, t in tensors.items()})),
    "one bfloat16": with_tensors(lambda tensors, name: tensors.update({name: tensors[name].bfloat16()})), "flipped in the data": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
}


@pytest.mark.parametrize("harm", WEIGHTS | HARMLESS)
@pytest.mark.parametrize("kind, file", [("lm", "model.safetensors"), ("lm", "codec/model.safetensors"), ("hf", "model.safetensors")], ids=["lm", "codec", "hf"])
def test_damaged_weights(world, tmp_path, kind, file, harm):  # noqa: F811
    path = shutil.copytree(world / kind, tmp_path / "model") / file
    path.write_bytes((WEIGHTS | HARMLESS)[harm](path.read_bytes()))
    before = snapshot(tmp_path)
    result = command(load_codec if "codec" in file else load_model, path.parent)
    (refused if harm in WEIGHTS else either)(result, str(path.parent))
    assert snapshot(tmp_path) == before


def values(**changes):
    """What makes a JSON object one with other values; None leaves a key out."""
    return lambda data: json.dumps({key: value for key, value in (json.loads(data) | changes).items() if value is not None}).encode()


HUGE = 10 ** 12
TEXTS = {  # what is done to any JSON
    "empty": lambda data: b"", "cut": lambda data: data[:len(data) // 2], "a list": lambda data: b"[]", "a number": lambda data: b"3", "null": lambda data: b"null", "nested": lambda data: b"[" * 100_000,
    "binary": lambda data: bytes(range(256)), "latin-1": lambda data: data[:-3] + b'\xff": 1}', "page": lambda data: b"<html>404</html>", "comment": lambda data: b"// x\n" + data, "flipped": lambda data: data[:30] + bytes([data[30] ^ 255]) + data[31:],
}
CONFIGS = {  # what is done to our config.json
    **TEXTS, "nothing": lambda data: b"{}", "unknown key": values(batchsize=3), "text": values(dim="16"), "float": values(n_q=4.0), "bool": values(num_layers=True), "null value": lambda data: data.replace(b'"dim": 16', b'"dim": null').replace(b'"dimension": 8', b'"dimension": null'),
    "negative": values(card=-1), "zero": values(n_q=0), "nan": lambda data: data.replace(b'"sample_rate": 8000', b'"sample_rate": NaN'), "infinite": values(sample_rate=math.inf), "ratios text": values(ratios="54"), "ratios nested": values(ratios=[[5], 4]), "ratios none": values(ratios=[]),
    "ratios many": values(ratios=[2] * 100_000), "ratios huge": values(ratios=[HUGE, 4]), "ratios zero": values(ratios=[0, 4]), "other card": values(card=64), "other ratios": values(ratios=[4, 4]), "other n_q": values(n_q=3, delays=[0, 1, 2]), "not a choice": values(pad_mode="wrap"),
    "norm": values(norm="none"), "card": values(card=HUGE), "n_q": values(n_q=HUGE), "sample_rate": values(sample_rate=HUGE), "dimension": values(dimension=HUGE), "n_filters": values(n_filters=HUGE), "lstm": values(lstm=HUGE), "n_residual_layers": values(n_residual_layers=HUGE),
    "kernel_size": values(kernel_size=HUGE), "text of 10 MB": values(pad_mode="x" * 10_000_000), "key of 1 MB": values(**{"x" * 1_000_000: 1}), "long number": lambda data: data.replace(b"8000", b"9" * 5000), "code": values(pad_mode="__import__('os').system('touch ran')"),
}
LM_CONFIGS = {  # of a language model
    "dim": values(dim=HUGE), "dim odd": values(dim=17), "dim other": values(dim=32), "dim largest": values(dim=2 ** 16), "num_layers": values(num_layers=HUGE), "num_layers more": values(num_layers=200), "hidden_scale": values(hidden_scale=HUGE), "heads": values(num_heads=3),
    "t5_layers": values(t5_layers=HUGE), "t5_dim": values(t5_dim=HUGE), "t5 folder": values(t5="/etc"), "t5 above": values(t5="../../.."), "t5 hub": values(t5="nobody/there-is-none"), "t5 odd": values(t5="-rf /; x"), "n_chroma": values(n_chroma=HUGE), "n_chroma 0": values(n_chroma=0),
    "delays": values(delays=[0, 1, 2, HUGE]), "delays few": values(delays=[0]), "delays negative": values(delays=[0, -1, 0, 0]), "radix2_exp": values(radix2_exp=60), "text": values(text="sideways"), "melody": values(melody="cross"), "no melody": values(melody="none"), "pattern": values(pattern="spiral"),
    "segment_duration": values(segment_duration=1e300), "positional": values(positional_embedding="none"), "channels": values(channels=9), "temperature": values(temperature=-1), "qk": values(qk_layer_norm=True),
}


@pytest.mark.parametrize("harm", CONFIGS)
@pytest.mark.parametrize("file", ["codec/config.json", "config.json"], ids=["codec", "lm"])
def test_damaged_configurations(world, tmp_path, file, harm):  # noqa: F811
    path = shutil.copytree(world / "lm", tmp_path / "model") / file
    path.write_bytes(CONFIGS[harm](path.read_bytes()))
    result = command(load_codec if "codec" in file else load_model, path.parent, cwd=tmp_path)
    harmless = file == "config.json" and harm in ("norm", "dimension", "other ratios", "card")  # the codec's own business, or too large alike
    (either if harmless else refused)(result, str(path.parent))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("harm", LM_CONFIGS)
def test_damaged_configurations_of_a_language_model(world, tmp_path, harm):  # noqa: F811
    path = shutil.copytree(world / "lm", tmp_path / "model") / "config.json"
    path.write_bytes(LM_CONFIGS[harm](path.read_bytes()))
    refused(sampling(world, "--checkpoint", path.parent, "--melody", world / "audio" / "0.wav", cwd=tmp_path), "model" if "t5 " not in harm else "")


HF = {  # what is done to the config.json of transformers
    **TEXTS, "nothing": lambda data: b"{}", "other model": values(model_type="bert"), "no such model": values(model_type="x"), "model_type list": values(model_type=["musicgen"]), "no decoder": values(decoder=None), "decoder text": values(decoder="x"), "decoder list": values(decoder=[]),
    "codec text": values(audio_encoder="x"), "codec other": values(audio_encoder={"model_type": "dac"}), "codec empty": values(audio_encoder={}), "text encoder": values(text_encoder={"model_type": "bert"}), "text encoder text": values(text_encoder="x"),
    "chroma": values(num_chroma=HUGE), "chroma text": values(num_chroma="x"), "chroma_length": values(chroma_length=-1), "remote code": values(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, model_type="evil"),
}
HF_DECODER = dict(hidden_size=[HUGE, "x", -1, 0, None, 32, 1.5], num_hidden_layers=[HUGE, "x", -1, 0], num_attention_heads=[0, 3, "x"], ffn_dim=[HUGE, -1], num_codebooks=[HUGE, 0, 5, "x"], vocab_size=[HUGE, -1, 64], activation_function=["relu", "os.system"],
                  audio_channels=[0, 9], scale_embedding=[True])
for key, bad in HF_DECODER.items():
    for value in bad:
        HF[f"{key} {value}"] = lambda data, key=key, value=value: json.dumps(
            json.loads(data) | {"decoder": json.loads(data)["decoder"] | {key: value}}).encode()
HF_CODEC = dict(sampling_rate=[HUGE, 0, "x"], upsampling_ratios=[[HUGE], [], "x", [0]], num_filters=[HUGE, -1], hidden_size=[HUGE, "x"], codebook_size=[0, 64, HUGE], target_bandwidths=[[], "x", [1e300]], num_lstm_layers=[HUGE], normalize=[True], norm_type=["none"])
for key, bad in HF_CODEC.items():
    for value in bad:
        HF[f"codec {key} {value}"] = lambda data, key=key, value=value: json.dumps(
            json.loads(data) | {"audio_encoder": json.loads(data)["audio_encoder"] | {key: value}}).encode()


@pytest.mark.parametrize("harm", HF)
def test_damaged_configurations_of_transformers(world, tmp_path, harm):  # noqa: F811
    path = shutil.copytree(world / "hf", tmp_path / "model") / "config.json"
    (path.parent / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    path.write_bytes(HF[harm](path.read_bytes()))
    refused(command(load_model, path.parent, cwd=tmp_path), "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("harm", [*TEXTS, "gone", "folder", "n_fft text", "n_fft huge", "n_fft 0", "remote tokenizer"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json"])
def test_damaged_files_beside_a_model_of_transformers(world, tmp_path, file, harm):  # noqa: F811
    path = shutil.copytree(world / "hf", tmp_path / "model") / file
    data = path.read_bytes()
    path.unlink()
    (path.parent / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    if harm == "folder":
        path.mkdir()
    elif harm != "gone":
        path.write_bytes({**TEXTS, "n_fft text": values(n_fft="x"), "n_fft huge": values(n_fft=HUGE), "n_fft 0": values(n_fft=0), "remote tokenizer": values(
            auto_map={"AutoTokenizer": ["evil.T", None], "AutoFeatureExtractor": "evil.F"}, tokenizer_class="EvilTokenizer")}[harm](data))
    either(sampling(world, "--text", "a", "--checkpoint", path.parent, cwd=tmp_path), "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [*ODD, "gone"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "codec/config.json", "codec/model.safetensors", "codec"])
def test_what_is_no_file_in_a_checkpoint(world, tmp_path, file, kind):  # noqa: F811
    path = shutil.copytree(world / "lm", tmp_path / "model") / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind != "gone":
        write_odd(path, ODD[kind])
    refused(command(load_model, tmp_path / "model", seconds=20), "model" if file != "codec" or kind == "folder.wav" else "codec")


# --- checkpoints of strangers: pickles, the original's format, shards -------------------------------------------------------------

class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, command, *args):
        self.command, self.args = command, args

    def __reduce__(self):
        return self.command, self.args


def archive(files: dict, compression=zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return data.getvalue()


def saved(value) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


@functools.cache
def zip_bomb(name: str) -> bytes:
    """300 MB of zeros in 300 kB."""
    return archive({name: bytes(300_000_000)}, zipfile.ZIP_DEFLATED)


class Claim:
    """Pickles as a tensor of the given size and stride on a storage of so many numbers, which the file need not have."""

    def __init__(self, size, stride, dtype=torch.float32):
        self.size, self.stride, self.dtype = size, stride, dtype

    def __reduce__(self):
        storage = torch.zeros(4, dtype=self.dtype).untyped_storage()
        return torch._utils._rebuild_tensor_v2, (torch.storage.TypedStorage(wrap_storage=storage, dtype=self.dtype, _internal=True), 0, self.size, self.stride, False, {})


def entries_claiming(n):
    """A file of torch.save whose storage claims n numbers."""
    data = saved({"x": torch.zeros(4)})
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        files = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    assert files[name].count(b"K\x04") >= 1  # the number of elements, before the tensor's own size
    files[name] = files[name].replace(b"K\x04", b"\x8a\x08" + struct.pack("<q", n), 1)
    return archive(files)


@functools.cache
def pickles(ran) -> dict:
    """Files in the place of a .bin."""
    touch = ("touch", str(ran))
    return {
        "empty": b"", "text": b"hello", "zip of nothing": archive({}), "zip of text": archive({"a.txt": b"x"}), "escaping zip": archive({"../../gone": b"x", "archive/data.pkl": b"x"}),
        "bomb: system": saved(Bomb(os.system, " ".join(touch))), "bomb in a dict": saved({"x": Bomb(os.system, " ".join(touch))}), "bomb: popen": saved({"best_state": Bomb(subprocess.Popen, touch)}),
        "bomb: eval": saved({"x": Bomb(eval, f"open({str(ran)!r}, 'w')")}), "bomb: exec": saved({"x": Bomb(exec, f"open({str(ran)!r}, 'w')")}), "bomb: import": saved({"x": Bomb(__import__, "this")}), "bomb: open": saved({"x": Bomb(open, str(ran), "w")}),
        "bare pickle bomb": pickle.dumps(Bomb(os.system, " ".join(touch))), "old pickle bomb": pickle.dumps({"x": Bomb(os.system, " ".join(touch))}, protocol=0), "bomb: torch.load": saved({"x": Bomb(torch.load, str(ran))}),
        "class": saved({"x": Path("x")}), "module": saved(torch.nn.Linear(2, 2)), "list": saved([1, 2]), "tensor": saved(torch.zeros(3)), "no tensors": saved({"x": 1}), "nested": saved({"x": {"y": torch.zeros(2)}}),
        "expanded to 2^50": saved({"x": Claim((2 ** 25, 2 ** 25), (0, 0))}), "expanded to 16 GB": saved({"audio_encoder.x": Claim((2 ** 16, 2 ** 16), (0, 0), torch.float16), "best_state": {"model": {"x": Claim((2 ** 16, 2 ** 16), (0, 0), torch.float16)}}, "xp.cfg": "a: 1"}), "stride outside": saved({"x": Claim((4, 4), (1000, 1))}), "size of 2^50": saved({"x": Claim((2 ** 50,), (1,))}),
        "storage of 2^60": entries_claiming(2 ** 60), "storage of 2^40": entries_claiming(2 ** 40), "storage negative": entries_claiming(-4), "zip bomb": zip_bomb("archive/data.pkl"),
        "deep pickle": b"\x80\x02" + b"(" * 100_000 + b".", "recursive": b"\x80\x02]q\x00h\x00a.",
    }


PICKLES = list(pickles("ran"))


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "state_dict.bin", "compression_state_dict.bin"])
def test_pickles(world, tmp_path, file, name):  # noqa: F811
    folder = tmp_path / "model"
    if file == "pytorch_model.bin":
        shutil.copytree(world / "hf", folder)
        (folder / "model.safetensors").unlink()
    else:
        folder.mkdir()
    (folder / file).write_bytes(pickles("ran")[name])
    refused(command(load_codec if "compression" in file else load_model, folder, cwd=tmp_path), "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def original(**changes):
    """The original's state_dict.bin of a tiny model, with values of its YAML changed ("a.b.c": value)."""
    import yaml
    tree = dict(sample_rate=RATE, channels=1, dataset=dict(segment_duration=0.25), transformer_lm=dict(dim=16, num_heads=2, num_layers=1, hidden_scale=4, n_q=4, card=32),
                codebooks_pattern=dict(modeling="delay", delay=dict(delays=[0, 1, 2, 3])), fuser=dict(prepend=["self_wav", "description"]), classifier_free_guidance=dict(inference_coef=3.0),
                conditioners=dict(self_wav=dict(model="chroma_stem", chroma_stem=dict(n_chroma=12, radix2_exp=8, argmax=True))))
    for path, value in changes.items():
        *way, last = path.split(".")
        place = tree
        for key in way:
            place = place[key]
        place[last] = value
    return yaml.safe_dump(tree)


ORIGINALS = {
    "not YAML": "a: [1", "a list": "[1, 2]", "empty": "", "python": "!!python/object/apply:os.system ['touch ran']", "laughs": "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrs", "bcdefghijklmnopqrst")),
    "recursive": "&a {transformer_lm: *a}", "half": "transformer_lm: {dim: 16}", "nested": "[" * 500,
    **{f"{path} = {str(value)[:20]}": {path: value} for path, value in [
        ("transformer_lm.dim", HUGE), ("transformer_lm.dim", "16"), ("transformer_lm.dim", None), ("transformer_lm.num_layers", HUGE), ("transformer_lm.n_q", [4]), ("transformer_lm", 3), ("transformer_lm", None), ("codebooks_pattern.delay", None),
        ("codebooks_pattern.delay.delays", HUGE), ("codebooks_pattern.modeling", "x"), ("codebooks_pattern", []), ("dataset", None), ("dataset.segment_duration", "long"), ("dataset.segment_duration", float("nan")), ("dataset.segment_duration", HUGE),
        ("fuser", "x"), ("fuser.prepend", 3), ("conditioners", [1]), ("conditioners", {"a": None}), ("conditioners", "x"), ("conditioners.self_wav.chroma_stem", None), ("conditioners.self_wav.chroma_stem.radix2_exp", HUGE),
        ("sample_rate", -1), ("channels", "two"), ("classifier_free_guidance", 3), ("classifier_free_guidance.inference_coef", "much")]},
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_configurations_of_the_original(tmp_path, name):
    pytest.importorskip("yaml", reason="the original's configuration is YAML")
    value = ORIGINALS[name]
    torch.save({"best_state": {"x": torch.zeros(2)}, "xp.cfg": value if isinstance(value, str) else original(**value)}, tmp_path / "state_dict.bin")
    shutil.copy(tmp_path / "state_dict.bin", tmp_path / "compression_state_dict.bin")
    refused(command(load_model, tmp_path, cwd=tmp_path), str(tmp_path))
    refused(command(load_codec, tmp_path, cwd=tmp_path), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


SHARDS = {"escaping": {"x": "../lm/model.safetensors"}, "absolute": {"x": "/etc/passwd"}, "number": {"x": 3}, "absent": {"x": "absent.safetensors"}, "dot": {"x": "."}, "parent": {"x": ".."}, "nul": {"x": "a\0b"}, "list": ["x"], "none": {}, "text": "x",
          "itself": {"x": "model.safetensors.index.json"}, "odd ending": {"x": "config.json"}, "long": {"x": "x" * 5000}}


@pytest.mark.parametrize("name", SHARDS)
def test_index_of_shards(world, tmp_path, name):  # noqa: F811
    folder = shutil.copytree(world / "hf", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": SHARDS[name]}))
    refused(command(load_model, folder), "model")


SCALES = {"scalar": lambda t: torch.tensor(1.0), "longer": lambda t: torch.ones(len(t) + 1), "matrix": lambda t: torch.ones(len(t), 2), "nan": lambda t: t * math.nan, "integers": lambda t: t.long(), "empty": lambda t: t[:0], "huge": lambda t: torch.ones(2 ** 20)}


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_a_compact_checkpoint(world, tmp_path, name):  # noqa: F811
    S.MusicGen.from_pretrained(world / "lm", "cpu").save(tmp_path / "model", compact=True)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    scale = next(key for key in tensors if key.endswith(".scale"))
    save_file(tensors | {scale: SCALES[name](tensors[scale]).contiguous()}, path)
    refused(command(load_model, tmp_path / "model"), "model")


def codes_file(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(header: str, data=b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return archive({"codes.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data})


def object_array():
    file = io.BytesIO()
    np.savez(file, codes=np.array([{"a": 1}], dtype=object))
    return file.getvalue()


TAKES = {  # files in the place of --continue_from
    "empty": b" ", "text": b"hello", "other": codes_file(x=np.zeros((4, 9), np.uint16)), "object": object_array(), "flat": codes_file(codes=np.zeros(9, np.uint16)), "of three": codes_file(codes=np.zeros((3, 9), np.uint16)),
    "no frames": codes_file(codes=np.zeros((4, 0), np.uint16)), "too large": codes_file(codes=np.full((4, 9), 32, np.uint16)), "negative": codes_file(codes=np.full((4, 9), -1)), "nan": codes_file(codes=np.full((4, 9), np.nan)), "text array": codes_file(codes=np.full((4, 9), "x")),
    "npy": npy("{}"), "claims 2^60": npy("{'descr': '<u2', 'fortran_order': False, 'shape': (4, 1152921504606846976), }"), "claims 2^40": npy("{'descr': '<u2', 'fortran_order': False, 'shape': (4, 1099511627776), }"),
    "code": npy("{'descr': __import__('os').system('touch ran'), 'fortran_order': False, 'shape': (4, 9), }"), "zip bomb": None, "escaping": archive({"../codes.npy": b"x"}), "cut": codes_file(codes=np.zeros((4, 999), np.uint16))[:-50],
    "longer than asked for": codes_file(codes=np.zeros((4, 99), np.uint16)),
}


@pytest.mark.parametrize("name", TAKES)
def test_takes_to_continue(world, model, tmp_path, name):  # noqa: F811
    (tmp_path / "take.npz").write_bytes(TAKES[name] or zip_bomb("codes.npy"))
    refused(sampling(world, "--continue_from", "take.npz", "--out", "x.wav", cwd=tmp_path), "take.npz" if name != "longer than asked for" else "includes the prompt")
    assert [path.name for path in tmp_path.iterdir()] == ["take.npz"]


# --- flags of the commands ----------------------------------------------------------------------------------------------------

SAMPLING = {  # flags of sample.py: what the sentence says
    "--tempo 3": "--tempo", "--text": "--text", "--dur 1": "--dur", "--duration": "--duration", "--duration 0": "--duration", "--duration -1": "--duration", "--duration nan": "--duration", "--duration inf": "--duration", "--duration 1e9": "--duration",
    "--duration many": "--duration", "--seed x": "--seed", "--seed -1": "--seed", "--seed 1.5": "--seed", "--seed " + "9" * 30: "--seed", "--guidance x": "--guidance", "--guidance nan": "guidance", "--guidance inf": "guidance", "--guidance 1e30": "guidance", "--temperature -1": "temperature",
    "--temperature nan": "temperature", "--temperature x": "--temperature", "--top_k -1": "top_k", "--top_k 1.5": "--top_k", "--top_p 2": "top_p", "--top_p nan": "top_p", "--top_p -0.1": "top_p", "--stem vocals": "--stem", "--dtype int4": "--dtype", "--device tpu": "tpu", "--device cuda:7": "cuda:7",
    "--melody absent.wav": "absent.wav", "--melody .": ".", "--prompt absent.wav": "absent.wav", "--continue_from absent.npz": "absent.npz", "--continue_from .": "--continue_from", "--out x.txt": ".flac", "--out x": ".flac", "--out .": ".flac", "--out there.wav": "there.wav", "--out here.wav": "here.json",
    "--out codes.wav --save_codes": "codes.npz", "--out dangling.wav": "dangling.wav", "--out there.wav/x.wav": "there.wav", "--out folder.wav": "folder.wav", "--out /dev/null/x.wav": "/dev/null", "--out " + "x" * 300 + ".wav": "too long", "--out /proc/x.wav": "/proc", "--checkpoint absent": "absent",
    "--checkpoint .": ".", "--checkpoint there.wav": "there.wav", "--checkpoint /dev/null": "/dev/null", "--checkpoint a/b/c": "a/b/c", "--checkpoint ../..": "..", "--checkpoint nobody/nothing": "nobody/nothing", "--checkpoint http://x/y": "http", "--checkpoint " + "x" * 300: "x" * 100,
    "--text a --text b --melody x --melody y --melody z": "--melody", "--export_hf there.wav": "there.wav", "--export there.wav": "there.wav", "--prompt there.wav --continue_from take.npz": "--prompt", "stray": "stray",
}


@pytest.mark.parametrize("flag", SAMPLING, ids=lambda flag: flag[:40])
def test_flags_of_sampling(world, tmp_path, flag):  # noqa: F811
    (tmp_path / "there.wav").write_bytes(WAV)
    (tmp_path / "here.json").write_bytes(b"a sidecar")
    (tmp_path / "codes.npz").write_bytes(b"codes")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "dangling.wav").symlink_to("gone.wav")
    before = snapshot(tmp_path)
    refused(sampling(world, *flag.split(" "), cwd=tmp_path), SAMPLING[flag])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("flag, says", [("--melody x.wav", "text only"), ("--stem demucs --melody x.wav", "text only")])
def test_flags_of_sampling_with_a_text_model(world, tmp_path, flag, says):  # noqa: F811
    refused(sampling(world, *flag.split(), checkpoint="text", cwd=tmp_path), says)


PREPARING = {  # flags of data/prepare.py
    "": "folder", "music": "--out", "music --out": "--out", "absent --out o": "absent", "file --out o": "file", "empty --out o": "empty", "music --out file": "file", "music --out file/o": "file", "music --out /proc/o": "/proc", "music --out o --codec absent": "absent",
    "music --out o --codec empty": "empty", "music --out o --codec nobody/nothing": "nobody/nothing", "music --out o --config absent.py": "absent.py", "music --out o --config file": "file", "music --out o --stem both": "stem", "music --out o --device tpu": "tpu", "music --out o --n_chroma x": "--n_chroma",
    "music --out o --n_chroma 0": "n_chroma", "music --out o --n_chroma 1000000000": "n_chroma", "music --out o --radix2_exp 99": "radix2_exp", "music --out o --radix2_exp -1": "radix2_exp", "music --out o --sample_rate 44100": "sample_rate", "music --out o --sample_rate 0": "sample_rate",
    "music --out o --tempo 3": "--tempo", "music more --out o": "more", "music --out others": "others", "music --out " + "x" * 300: "too long", "music --out damaged": "damaged", "music --out foreign": "foreign",
}


@pytest.mark.parametrize("flag", PREPARING, ids=lambda flag: flag[:40])
def test_flags_of_preparing(world, tmp_path, flag):  # noqa: F811
    for name in ("music", "empty", "others", "damaged", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "music" / "a.wav").write_bytes(WAV)
    (tmp_path / "file").write_bytes(b"x = 3")
    (tmp_path / "others" / "settings.json").write_bytes(b'{"colour": "blue"}')
    (tmp_path / "damaged" / "settings.json").write_bytes(b"{")
    for name in ("index.json", "codes.00000.u16", "chroma.00000.u8"):  # as they are passed on, without the logs
        shutil.copy(world / "tokens" / name, tmp_path / "foreign" / name)
    before = snapshot(tmp_path)
    argv = flag.split(" ") if flag else []
    refused(command(prepare.main, *argv, *([] if "--codec" in argv else ["--codec", world / "codec"]), cwd=tmp_path), PREPARING[flag])
    after = snapshot(tmp_path)
    assert {path: look for path, look in after.items() if path in before and path.is_file()} == {path: look for path, look in before.items() if path.is_file()}


@pytest.mark.parametrize("main, argv, says", [
    (patterns.main, ["0"], "0"), (patterns.main, ["-1"], "-1"), (patterns.main, ["x"], "x"), (patterns.main, ["1" * 30], "1 to 20"), (patterns.main, ["3", "4"], "3 4"), (patterns.main, ["²"], "²"), (chroma.main, ["a", "b"], "a b"),
    (chroma.main, ["absent.wav"], "absent.wav"), (encodec.demo, ["absent.wav"], "absent.wav"), (encodec.demo, [""], "audio"), (chroma.main, ["."], ".")])
def test_flags_of_the_demos(main, argv, says):
    refused(command(main, *argv), says)


@pytest.mark.parametrize("name", ["patterns", "rvq", "conditioners", "lm", "config", "encodec"])
def test_demos_run_from_anywhere(tmp_path, name):
    result = forked(lambda argv: runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__"), cwd=tmp_path)
    worked(result)
    assert result.out and not list(tmp_path.iterdir())


RESULTS = {  # what is done to the JSON beside a result: does a listening page come of it?
    **{name: (harm, False) for name, harm in TEXTS.items() if name != "flipped"},
    "no config": (values(config=None), False), "config list": (values(config=[1]), False), "config unknown key": (values(config={"colour": 1}), False), "config type": (values(config={"dim": "x"}), False),
    "config huge": (values(config={"radix2_exp": 60}), False), "text number": (values(text=3), False), "melody number": (values(melody=3), False), "melody list": (values(melody=["x"]), False), "command number": (values(command=3), False),
    "stem unknown": (values(melody="x.wav", stem="vocals"), False), "settings text": (values(settings="x"), False), "melody gone": (values(melody="gone.wav"), False), "melody no audio": (values(melody="/etc/passwd"), False),
    "melody nul": (values(melody="a\0b"), False), "rate other": (values(config={"sample_rate": 1000}), True), "surrogates": (values(text="\ud800", settings={"\ud800": "\udfff"}), True), "markup": (values(text="<script>", settings={"<script>": "<script>"}, duration="<script>", torch="<script>", seed="<script>", checkpoint="<script>"), True),
}


@pytest.mark.parametrize("name", RESULTS)
def test_pages_of_strange_results(world, model, tmp_path, name):  # noqa: F811
    harm, works = RESULTS[name]
    worked(sampling(world, "--out", "x.wav", "--text", "a tune", cwd=tmp_path))
    (tmp_path / "x.json").write_bytes(harm((tmp_path / "x.json").read_bytes()))
    result = command(page.main, "page", "x.wav", cwd=tmp_path)
    told_by_itself = name in ("config type", "config huge", "stem unknown", "melody gone", "melody no audio", "melody nul")  # the key or the melody
    worked(result) if works else refused(result, "" if told_by_itself else "x.json")
    assert (tmp_path / "page").exists() == works
    if works:
        assert (tmp_path / "page" / "index.html").read_bytes().count(b"<script>") == 1, "ours alone"


# --- prepared data of strangers, and runs to resume -----------------------------------------------------------------------------

def tracks(**changes):
    """What makes an index.json one whose tracks have other values; None leaves one out."""
    def harm(data):
        index = json.loads(data)
        index["tracks"] = [{key: value for key, value in (track | changes).items() if value is not None} for track in index["tracks"]]
        return json.dumps(index).encode()
    return harm


INDEXES = {  # what is done to index.json; all of these train, or are refused
    **TEXTS, "nothing": lambda data: b"{}", "no tracks": values(tracks=[]), "tracks none": values(tracks=None), "tracks text": values(tracks="x"), "tracks null": values(tracks=[None]), "tracks object": values(tracks={"a": 1}), "tracks empty": values(tracks=[{}]),
    "shards none": values(shards=None), "shards huge": values(shards=HUGE), "shards -1": values(shards=-1), "shards 0": values(shards=0), "shards text": values(shards="1"), "shards nan": values(shards=math.nan), "n_q": values(n_q=3), "card": values(card=64), "stride": values(stride=0), "rate": values(sample_rate="8000"),
    "hop": values(hop=-64), "outside": tracks(codes_start=2 ** 40), "negative": tracks(codes_start=-5), "frames": tracks(frames=HUGE), "frames negative": tracks(frames=-HUGE), "frames text": tracks(frames="9"), "frames none": tracks(frames=None), "frames nan": tracks(frames=math.nan), "frames float": tracks(frames=200.5),
    "frames 0": tracks(frames=0), "frames true": tracks(frames=True), "chroma outside": tracks(chroma_start=HUGE), "chroma negative": tracks(chroma_start=-1), "chroma frames": tracks(chroma_frames=HUGE), "chroma frames negative": tracks(chroma_frames=-3), "chroma 0": tracks(chroma_frames=0), "shard": tracks(shard=7),
    "shard negative": tracks(shard=-1), "shard text": tracks(shard="../x"), "start float": tracks(codes_start=0.5), "weight": tracks(weight="heavy"), "weight nan": tracks(weight=math.nan), "weight inf": tracks(weight=math.inf), "weight negative": tracks(weight=-1), "weight list": tracks(weight=[1]), "file none": tracks(file=None), "file list": tracks(file=["a"]),
    "file escapes": tracks(file="../../x"), "meta none": tracks(meta=None), "meta text": tracks(meta="x"), "meta list": tracks(meta=[1]), "description": tracks(meta={"description": 3}), "description list": tracks(meta={"description": ["x"]}), "moods": tracks(meta={"description": "x", "moods": [1, None]}),
    "moods object": tracks(meta={"moods": {"a": 1}}), "key object": tracks(meta={"key": {}, "bpm": []}), "surrogate": tracks(meta={"description": "\ud800"}), "description huge": tracks(meta={"description": "word " * 100_000}), "meta null": tracks(meta={"description": None, "moods": None}),
}
HARMLESS_INDEXES = ("hop", "file escapes", "surrogate", "description", "description list", "description huge", "meta null", "chroma 0", "moods", "moods object", "key object")


@pytest.mark.parametrize("name", INDEXES)
def test_prepared_data_of_strangers(world, tmp_path, name):  # noqa: F811
    folder = shutil.copytree(world / "tokens", tmp_path / "tokens")
    (folder / "index.json").write_bytes(INDEXES[name]((folder / "index.json").read_bytes()))
    before = snapshot(folder)
    result = forked(train.main, *flags(TRAIN, data_dir=folder, codec=world / "codec", out_dir=tmp_path / "run", batch_size=4, merge_text_p=0.5, drop_other_p=1.0, word_dropout=0.0, cfg_dropout=0.0))
    (either if name in HARMLESS_INDEXES else refused)(result, str(folder))
    assert snapshot(folder) == before


@pytest.mark.parametrize("file, harm", [("codes.00000.u16", "missing"), ("codes.00000.u16", "empty"), ("codes.00000.u16", "odd"), ("codes.00000.u16", "short"), ("codes.00000.u16", "too large"), ("codes.00000.u16", "folder"), ("codes.00000.u16", "pipe"),
                                        ("chroma.00000.u8", "missing"), ("chroma.00000.u8", "empty"), ("chroma.00000.u8", "short"), ("chroma.00000.u8", "too large"), ("chroma.00000.u8", "pipe"), ("index.json", "missing"), ("index.json", "folder"), ("index.json", "pipe"), ("index.json", "device")])
def test_damaged_shards(world, tmp_path, file, harm):  # noqa: F811
    path = shutil.copytree(world / "tokens", tmp_path / "tokens") / file
    data = path.read_bytes()
    path.unlink()
    if harm in ("folder", "pipe", "device"):
        write_odd(path, harm)
    elif harm != "missing":
        path.write_bytes(dict(empty=b"", odd=data[:-3], short=data[:100], **{"too large": b"\xff" * len(data)})[harm])
    refused(forked(train.main, *flags(TRAIN, data_dir=tmp_path / "tokens", codec=world / "codec", out_dir=tmp_path / "run", melody_dropout=0.0, cfg_dropout=0.0, batch_size=8), seconds=20), "tokens")


@pytest.fixture(scope="module")
def run_to_resume(world, tmp_path_factory):  # noqa: F811
    """Half of a run."""
    out = tmp_path_factory.mktemp("half") / "run"
    argv = flags(TRAIN, data_dir=world / "tokens", codec=world / "codec", out_dir=out)
    worked(forked(train.main, *argv))
    return out, [*argv, "--updates_per_epoch=4", "--resume"]


def metadata(**changes):
    def harm(data):
        header, rest = header_of(data)
        info = json.loads(header["__metadata__"]["info"])
        header["__metadata__"] = {"info": json.dumps(info | changes)} if changes else {}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + rest
    return harm


STATES = {**{key: WEIGHTS[key] for key in ("empty", "cut in the header", "cut in the data", "last byte missing", "header of 1 TB", "not JSON", "offset outside", "shape of 2^60", "page", "missing", "surplus", "transposed", "scalar", "flipped 5", "flipped 60", "no tensors")},
          "no metadata": metadata(), "update text": metadata(update="x"), "update negative": metadata(update=-3), "update huge": metadata(update=HUGE), "update none": metadata(update=None), "scaler": metadata(scaler=3), "ema_count": metadata(ema_count="x"),
          "pickle": lambda data: saved({"x": Bomb(os.system, "touch ran")})}


@pytest.mark.parametrize("name", STATES)
def test_damaged_states_to_resume(run_to_resume, tmp_path, name):
    out, argv = shutil.copytree(run_to_resume[0], tmp_path / "run"), run_to_resume[1]
    path = out / "state.safetensors"
    path.write_bytes(STATES[name](path.read_bytes()))
    before = snapshot(out)
    result = forked(train.main, *argv, f"--out_dir={out}", cwd=tmp_path)
    (either if name == "scaler" or name == "update huge" else refused)(result, "state.safetensors")
    assert result.code == 0 or snapshot(out) == before, "nothing that existed is damaged"


@pytest.mark.parametrize("name, content", [("garbage", b"garbage\n{\n{}\n"), ("half a line", b'{"update": 1, "sp'), ("binary", bytes(range(256))), ("other", b'{"x": 1}\n[]\n3}\n'), ("empty", b"")])
def test_damaged_metrics_do_not_stop_a_run(run_to_resume, tmp_path, name, content):
    out, argv = shutil.copytree(run_to_resume[0], tmp_path / "run"), run_to_resume[1]
    (out / "metrics.jsonl").write_bytes((out / "metrics.jsonl").read_bytes() + content)
    worked(forked(train.main, *argv, f"--out_dir={out}"))
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["update"] == 4


@pytest.mark.parametrize("name, changes, says", [
    ("other shape", ["--dim=32"], "state.safetensors"), ("other task", ["--task=codec"], ""), ("other optimizer", ["--optim=adamw"], "state.safetensors"), ("another model there", ["--out_dir={hf}"], "already holds"),
    ("somebody's file", ["--out_dir={file}"], "somebody"), ("somebody's folder", ["--out_dir={folder}"], "somebody"), ("below a file", ["--out_dir={file}/x"], "somebody"), ("init_from nothing", ["--init_from=nowhere/at/all"], "nowhere"), ("init_from a codec", ["--init_from={codec}"], "codec")])
def test_runs_that_do_not_fit(world, run_to_resume, tmp_path, name, changes, says):  # noqa: F811
    out, argv = shutil.copytree(run_to_resume[0], tmp_path / "run"), run_to_resume[1]
    (tmp_path / "somebody").write_text("a file")
    (tmp_path / "somebody's").mkdir()
    (tmp_path / "somebody's" / "config.json").write_text('{"colour": "blue"}')
    before = snapshot(tmp_path)
    places = dict(hf=world / "hf", codec=world / "codec", file=tmp_path / "somebody", folder=tmp_path / "somebody's")
    if "init_from" in name:
        argv = [arg for arg in argv if arg != "--resume"]
    refused(forked(train.main, *argv, f"--out_dir={out}" if "init_from" not in name else f"--out_dir={tmp_path / 'new'}", *[change.format(**places) for change in changes]), says)
    assert {path: look for path, look in snapshot(tmp_path).items() if path in before and path.is_file()} == {path: look for path, look in before.items() if path.is_file()}


# --- long, forbidden, and at the edge of numbers ------------------------------------------------------------------------------------

def sparse_wav(path: Path, hours: float, rate=RATE):
    """Hours of silence that take no room on the disk."""
    size = int(hours * 3600 * rate) * 2
    path.write_bytes(WAV[:4] + struct.pack("<I", size + 36) + WAV[8:40] + struct.pack("<I", size))
    os.truncate(path, 44 + size)


def test_hours_of_silence_cost_no_more_than_is_used(world, model, tmp_path):  # noqa: F811
    (tmp_path / "music").mkdir()
    sparse_wav(tmp_path / "music" / "long.wav", 24)
    limits = dict(cwd=tmp_path, seconds=20, memory=300_000_000)
    worked(sampling(world, "--melody", "music/long.wav", **limits))
    refused(sampling(world, "--prompt", "music/long.wav", **limits), "includes the prompt")
    worked(command(encodec.demo, "music/long.wav", **limits))
    worked(command(chroma.main, "music/long.wav", **limits))
    worked(forked(train.main, *flags(TRAIN_CODEC, data_dir="music", out_dir="run"), **limits))


@pytest.mark.slow  # two minutes
def test_hours_of_silence_are_prepared_in_bounded_memory(world, tmp_path):  # noqa: F811
    (tmp_path / "music").mkdir()
    sparse_wav(tmp_path / "music" / "long.wav", 8)
    worked(preparing(world, "music", "out", cwd=tmp_path, seconds=1200, memory=800_000_000))
    assert json.loads((tmp_path / "out" / "index.json").read_text())["tracks"][0]["frames"] == 8 * 3600 * 400


def somebody():
    """Makes this process somebody who may not read and write everything, as root may."""
    if os.geteuid() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)


@pytest.fixture()
def street(world):  # noqa: F811
    """A folder that everybody may enter, with a model and data."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        for name in ("lm", "tokens"):
            shutil.copytree(world / name, Path(folder, name))
        yield Path(folder)


@pytest.mark.parametrize("what", ["melody", "prompt", "continue_from", "checkpoint", "weights", "out", "prepare", "prepare out", "sidecar", "config", "train data", "train out", "codec data"])
def test_what_may_not_be_read_or_written(street, what):
    tmp_path, codec = street, street / "lm" / "codec"
    (tmp_path / "secret").mkdir()
    for name, content in (("secret.wav", WAV), ("secret.npz", TAKES["cut"]), ("secret.py", b"dim = 16")):
        (tmp_path / name).write_bytes(content)
        os.chmod(tmp_path / name, 0)
    (tmp_path / "music").mkdir()
    for name, content in (("good.wav", WAV), ("secret.wav", WAV), ("good.txt", b"a tune")):
        (tmp_path / "music" / name).write_bytes(content)
    os.chmod(tmp_path / "music" / "secret.wav", 0)
    os.chmod(tmp_path / "music" / "good.txt", 0)
    os.chmod(tmp_path / "secret", 0)
    options = dict(cwd=tmp_path, before=somebody)
    argv = flags(TRAIN, data_dir="tokens", codec=codec, out_dir="run")

    def sample(*argv):
        argv = ["--device", "cpu", "--duration", "0.05", *argv]
        return forked(S.main, *argv, *([] if "--checkpoint" in argv else ["--checkpoint", "lm"]), **options)

    def prepared(out):
        return forked(prepare.main, "music", "--out", out, "--codec", codec, "--radix2_exp", "8", "--stem", "none", **options)
    if what in ("melody", "prompt", "continue_from"):
        refused(sample(f"--{what}", "secret.npz" if what == "continue_from" else "secret.wav"), "secret")
    elif what == "checkpoint":
        refused(sample("--checkpoint", "secret"), "secret")
    elif what == "weights":
        os.chmod(tmp_path / "lm" / "model.safetensors", 0)
        refused(sample(), "lm/model.safetensors")
    elif what == "out":
        refused(sample("--out", "secret/x.wav"), "secret")
    elif what in ("prepare", "sidecar"):
        result = prepared("out")
        assert result.code == 1 and "secret.wav: " in result.err and "good.txt: cannot be read" in result.err
    elif what == "prepare out":
        refused(prepared("secret/out"), "secret")
    elif what == "config":
        refused(forked(train.main, "secret.py", **options), "secret.py")
    elif what == "train data":
        os.chmod(tmp_path / "tokens" / "index.json", 0)
        refused(forked(train.main, *argv, **options), "index.json")
    elif what == "train out":
        refused(forked(train.main, *argv, "--out_dir=secret/run", **options), "secret")
    else:
        result = forked(train.main, *flags(TRAIN_CODEC, data_dir="music", out_dir="run"), **options)
        assert result.code == 0 and "secret.wav" in result.err


EDGES = {  # settings at the edge of sense, which have a meaning all the same
    "guidance 0": ["--guidance", "0"], "guidance 1": ["--guidance", "1"], "guidance 50": ["--guidance", "50"], "guidance -3": ["--guidance", "-3"], "temperature 0": ["--temperature", "0"], "temperature 1e-30": ["--temperature", "1e-30"], "temperature 1e30": ["--temperature", "1e30"],
    "temperature inf": ["--temperature", "inf"], "top_k above": ["--top_k", "1000000"], "top_k 1": ["--top_k", "1"], "top_k 0": ["--top_k", "0"], "top_p 1": ["--top_p", "1"], "top_p tiny": ["--top_p", "1e-30"], "0.02 s": ["--duration", "0.02"], "1e-9 s": ["--duration", "1e-9"], "two_step": ["--two_step"],
    "seed huge": ["--seed", str(2 ** 62 - 1)], "long": ["--duration", "0.7"], "all": ["--guidance", "50", "--temperature", "1e-30", "--top_k", "1", "--top_p", "1"], "stem hpss": ["--stem", "hpss"],
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("melody", [None, "silent.wav", "one sample.wav"], ids=["none", "silent", "short"])
def test_edges_of_sampling(world, model, corpus, tmp_path, edge, melody):  # noqa: F811
    argv = [*EDGES[edge], *(["--melody", corpus / melody] if melody else [])]
    worked(sampling(world, "--out", "x.wav", "--text", "a tune", *argv, cwd=tmp_path))
    wav, rate = soundfile.read(tmp_path / "x.wav")
    duration = float(argv[argv.index("--duration") + 1]) if "--duration" in argv else 0.05
    assert rate == RATE and len(wav) == max(1, round(duration * RATE)) and np.isfinite(wav).all()


def test_extreme_temperatures_are_greedy_and_uniform():
    logits = torch.tensor([[[1.0, 5.0, 3.0, -2.0]]])
    for temperature in (0, 1e-45, 1e-30, 1e-6, 1e-3):
        assert L.sample(logits, torch.tensor([[0.999]]), temperature).item() == 1
    draws = [L.sample(logits, torch.tensor([[u]]), math.inf).item() for u in (0.1, 0.3, 0.6, 0.9)]
    assert sorted(draws) == [0, 1, 2, 3]


def test_all_zero_chroma_is_a_melody_like_any_other(world):  # noqa: F811
    model = S.MusicGen.from_pretrained(world / "lm", "cpu")
    codes = model.generate_codes(["x"], [torch.zeros(9, 12)], duration=0.1)
    assert codes.shape == (1, 4, 40) and 0 <= codes.min() and codes.max() < 32


@pytest.mark.slow  # half a minute
def test_ten_minutes_of_a_slow_model():
    """2,400 frames, four a second: a window moves on 30 times."""
    values = LM | dict(sample_rate=8000, ratios=(20, 10, 10), segment_duration=30.0, extend_stride=18.0)
    torch.manual_seed(0)
    config = Config(**values)
    codec = encodec.EncodecModel(Config(task="codec", **{key: values[key] for key in CODEC}, kmeans_init=False))
    model = S.MusicGen(L.LMModel(config), codec)
    chroma = torch.nn.functional.one_hot(torch.arange(5000) % 12, 12).float()
    wav = model.generate(["x"], duration=600.0) if chroma is None else model.decode(model.generate_codes(["x"], [chroma], duration=600.0), 600.0)
    assert wav.shape == (1, 1, 600 * 8000) and wav.isfinite().all()


def test_a_codec_trains_on_silence(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "silent.wav").write_bytes(encoded(wave=np.zeros((4000, 1))))
    result = forked(train.main, *flags(TRAIN_CODEC, data_dir="music", out_dir="run", adv=1.0, feat=1.0, disc_windows=(64,), disc_filters=2), cwd=tmp_path)
    worked(result)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "model.safetensors").values() if tensor.is_floating_point())


@pytest.mark.parametrize("batch", [dict(descriptions=[]), dict(descriptions=[], melodies=[]), dict(descriptions=["a"], melodies=[]), dict(descriptions=["a"], melodies=[torch.zeros(1, 0)]),
                                   dict(descriptions=["a"], seeds=[]), dict(descriptions=["a"], prompt=torch.zeros(1, 0)), dict(descriptions=["a"], melodies=[torch.full((1, 99), math.nan)])], ids=repr)
def test_empty_batches_are_told(loaded, batch):
    with pytest.raises(UserError):
        loaded.generate(**batch, duration=0.05)


@pytest.mark.parametrize("out, code", [("closed", 1), ("full", 2)])
def test_nobody_listens_to_what_is_said(out, code):
    """`| head` has gone, or stdout is on a full disk."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") if out == "closed" else open("/dev/full", "w") as stream:
        result = subprocess.run([sys.executable, ROOT / "config.py", ROOT / "config" / "melody.py"], stdout=stream, stderr=subprocess.PIPE, text=True, timeout=100)
    assert result.returncode == code and "Traceback" not in result.stderr and ("No space" in result.stderr) == (out == "full"), result


# --- the same, as a shell would do it ----------------------------------------------------------------------------------------------------

def test_the_commands_themselves(world, tmp_path):  # noqa: F811
    """In processes of their own: the file of the same seed, and the mistakes that are told above."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "bad.wav").write_bytes(b"not music")
    argv = ["--text", "a", "--checkpoint", world / "lm", "--duration", "0.1", "--device", "cpu"]
    processes = [subprocess.Popen([sys.executable, ROOT / "sample.py", *argv, *more], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for more in (["--out", "1.wav"], ["--melody", "bad.wav"])]
    worked(sampling(world, *argv, "--out", "2.wav", cwd=tmp_path))
    results = [Result(process.returncode, *said, 0.0) for process in processes if (said := process.communicate(timeout=100))]
    worked(results[0]), refused(results[1], "bad.wav")
    assert (tmp_path / "1.wav").read_bytes() == (tmp_path / "2.wav").read_bytes()
