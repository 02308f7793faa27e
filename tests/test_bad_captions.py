"""Bad words: texts of all kinds are texts; bad sidecars and manifests are named, and the recordings used.

    python -m pytest tests/test_bad_captions.py
"""
import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest

from commands import forked, preparing, sampling, snapshot, train_main, worked
from constants import TRAIN, flags
from damage import ODD, WAV, write_odd

pytestmark = pytest.mark.usefixtures("untouched_world")


# --- --text -----------------------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "\n\n",
    "word " * 4000,
    "x" * 100_000,
    os.fsdecode(b"\xff\xfe"),
    "🎵" * 999,
    "\0",
    "../../x",
    "/etc/passwd",
    "<pad></s>",
    "%s",
    "--x",
    "CON",
]


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_any_text_is_a_text(world, model, tmp_path, text):
    text = text[:20_000]
    result = sampling(world, f"--text={text}", cwd=tmp_path)
    worked(result)
    out = tmp_path / result.out.strip()
    assert out.parent == tmp_path / "samples"
    assert json.loads(out.with_suffix(".json").read_text()).get("text", "") == text


# --- sidecars, song.json and song.txt, and manifests ------------------------------------------------------

def tune(**fields) -> bytes:
    return json.dumps({"description": "a tune"} | fields).encode()


FINE = {  # song.json as it may be; what makes no sense in it is passed over
    "utf-16": tune().decode().encode("utf-16"),
    "bom": b"\xef\xbb\xbf" + tune(),
    "latin-1": '{"description": "flûte"}'.encode("latin-1"),
    "windows": tune().replace(b": ", b":\r\n"),
    "not ascii": '{"description": "フルート"}'.encode(),
    "escapes": b'{"description": "\\ud800 \\u0000 \\u001b[31m"}',
    "bpm object": tune(bpm={}),
    "bpm inf": b'{"bpm": Infinity}',
    "bpm negative": tune(bpm=-5),
    "bpm text": tune(bpm="fast"),
    "title list": tune(title=["x"]),
    "all null": b'{"title": null, "key": null, "moods": null, "bpm": null, "description": null}',
    "moods number": tune(moods=3),
    "moods nested": tune(moods=[["x"], {"a": 1}, None, 3, "calm"]),
    "moods many": tune(moods=["calm"] * 100_000),
    "key number": tune(key=7),
    "description object": b'{"description": {"a": 1}}',
    "description huge": tune(description="word " * 200_000),
    "unknown keys": tune(**{"a b": 1, "": 2}),
    "same key twice": b'{"description": "x", "description": "a tune"}',
    "code": tune(title="__import__('os').system('touch gone')", description="${x} {x} %s"),
    "melody itself": tune(melody="melody itself.wav"),
}
COMPLAINTS = {  # song.json that the report names; the recording is used without it
    "broken": b"{",
    "empty": b"",
    "blank": b" \n",
    "list": b"[1, 2]",
    "number": b"3",
    "string": b'"x"',
    "null": b"null",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 50_000,
    "binary": os.urandom(500) + b"\0",
    "half": tune()[:-5],
    "python": b"{'description': 'a tune'}",
    "nul": b"\0\1",
    "long number": b'{"bpm": %s}' % (b"9" * 5000),
    "too large": tune(title="x" * 11_000_000),
    "two objects": tune() + tune(),
    "weight nan": b'{"weight": NaN}',
    "weight inf": b'{"weight": Infinity}',
    "weight 1e308": tune(weight=1e308),
    "weight 0": tune(weight=0),
    "weight negative": tune(weight=-1),
    "weight text": tune(weight="2"),
    "weight true": tune(weight=True),
    "weight null": tune(weight=None),
}
LEFT_OUT = {  # song.json whose "melody" cannot be used; the report names it, and the recording is not used
    "melody number": tune(melody=3),
    "melody list": tune(melody=["a.wav"]),
    "melody escapes": tune(melody="../outside.wav"),
    "melody absolute": tune(melody="/etc/passwd"),
    "melody absent": tune(melody="absent.wav"),
    "melody nul": tune(melody="a\0b"),
    "melody folder": tune(melody="."),
    "melody too long": tune(melody="x/" * 5000),
    "melody text": tune(melody="melody text.json"),
    "melody by link": tune(melody="way out/outside.wav"),
}
FINE_TEXTS = {  # song.txt
    "text empty": b"",
    "text blank": b" \r\n\t ",
    "text huge": b"word " * 2_300_000,
    "text utf-16": "flûte".encode("utf-16"),
    "text latin-1": "flûte".encode("latin-1"),
    "text utf-8": "フルート 🎵".encode(),
    "text one line": b"x" * 500_000,
}
TEXT_COMPLAINTS = {
    "text binary": os.urandom(999) + b"\0",
    "text nul": b"a\0b",
}
MANIFEST = [  # lines of metadata.jsonl, and whether the report names their number
    ('{"file_name": "../outside.wav"}', True),
    ('{"file_name": "/etc/passwd"}', True),
    ('{"file_name": "absent.wav"}', False),     # named by the file
    ('{"file_name": 3}', True),
    ('{"file_name": ["x"]}', True),
    ('{"text": "no file"}', True),
    ('[1]', True),
    ('"x"', True),
    ('3', True),
    ('null', True),
    ('{"file_name": "twice.wav", "text": "first"}', False),
    ('{"file_name": "twice.wav", "text": "second"}', True),
    ('{"file_name": "./sub/../twice.wav"}', True),
    ('{"file_name": "a\\u0000b"}', True),
    ('{"file_name": "%s"}' % ("x" * 5000), True),
    ('{"file_name": "way out/outside.wav"}', True),
    ('{"file_name": ""}', True),
    ('{"file_name": "."}', False),              # named by the file
    ('{', True),
    ('[' * 10_000, True),
    ('\xff', True),
    ('', False),
]
JSONS, TXTS = FINE | COMPLAINTS | LEFT_OUT, FINE_TEXTS | TEXT_COMPLAINTS


class Described(NamedTuple):
    tracks: dict[str, dict]     # of index.json, by file
    report: list[str]           # lines of skipped.txt
    folder: Path                # of prepared data


@pytest.fixture(scope="module")
def described(world, tmp_path_factory):
    """A folder with all of these, prepared."""
    root = tmp_path_factory.mktemp("described")
    folder, out = root / "music", root / "out"
    (folder / "sub").mkdir(parents=True)
    (root / "outside.wav").write_bytes(WAV)
    os.symlink(root, folder / "way out")
    for ending, cases in ((".json", JSONS), (".txt", TXTS)):
        for name, content in cases.items():
            (folder / f"{name}.wav").write_bytes(WAV)
            (folder / f"{name}{ending}").write_bytes(content)
    for name in ("twice", *ODD):
        (folder / f"{name}.wav").write_bytes(WAV)
    for name, kind in ODD.items():
        write_odd(folder / f"{name}.json", kind)
    lines = "\n".join(line for line, _ in MANIFEST)
    (folder / "metadata.jsonl").write_text(lines, encoding="latin-1")
    (folder / "sub" / "metadata.jsonl").write_bytes(b"\0")
    before = snapshot(root)
    result = preparing(world, folder, out)
    assert result.code == 1 and "Traceback" not in result.err, result
    after = snapshot(root)
    assert all(after[path] == before[path] for path in before)
    index = json.loads((out / "index.json").read_text())
    report = (out / "skipped.txt").read_text().splitlines()
    return Described({track["file"]: track for track in index["tracks"]}, report, out)


@pytest.mark.parametrize("name", [*JSONS, *TXTS])
def test_sidecars(described, name):
    content, file = (JSONS | TXTS)[name], f"{name}.wav"
    named = (f"{name}.json: ", f"{name}.txt: ", f"{name}.wav: ")
    complaints = [line for line in described.report if line.startswith(named)]
    expected = name in COMPLAINTS | TEXT_COMPLAINTS | LEFT_OUT
    assert len(complaints) == expected and all(len(line) < 400 for line in complaints)
    assert (file in described.tracks) == (name not in LEFT_OUT)
    if name in LEFT_OUT:
        return
    track = described.tracks[file]
    meta = track["meta"]
    if b"a tune" in content and not complaints:
        assert meta["description"] == "a tune"
    if name in ("latin-1", "text latin-1", "text utf-16"):
        assert meta["description"] == "flûte"
    assert all(len(value) <= 10_000 for value in meta.values() if isinstance(value, str))
    assert len(meta.get("moods", [])) <= 200 and track["weight"] == 1.0


def test_a_manifest_of_all_mistakes(described):
    assert described.tracks["twice.wav"]["meta"] == {"description": "first"}
    for number, (line, complained) in enumerate(MANIFEST, 1):
        start = f"metadata.jsonl, line {number}: "
        assert sum(problem.startswith(start) for problem in described.report) == complained, line
    by_name = ("absent.wav: named in metadata.jsonl", ".: named in metadata.jsonl", "sub/metadata.jsonl: ")
    for start in by_name:
        assert any(problem.startswith(start) for problem in described.report)


def test_odd_sidecars_are_passed_over(described):
    assert all(f"{name}.wav" in described.tracks for name in ODD if name != "device.wav")


def test_training_on_whatever_was_said(world, described, tmp_path):
    argv = flags(TRAIN, data_dir=described.folder, codec=world / "codec", out_dir=tmp_path / "run",
                 batch_size=16, merge_text_p=1.0, drop_other_p=1.0, cfg_dropout=0.0)
    worked(forked(train_main, *argv))
