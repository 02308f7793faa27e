"""Where captions are found: snapshots of the hub, links, manifests, names in other cases, keys of others.

    python -m pytest tests/test_caption_files.py
"""
import csv
import io
import json
import os
from pathlib import Path

import pytest
import soundfile

from commands import preparing
from config import Config
from constants import RATE, tone
from damage import WAV, encoded
from data.captions import AUDIO, Track, clean, scan
from data.segments import AudioCrops
from evaluation.evaluate import instrument_of
from system.errors import UserError


def put(folder: Path, **files):
    """Writes files: texts, bytes, or what JSON makes of anything else."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def found(folder: Path) -> tuple[dict[str, Track], list[str]]:
    tracks, complaints = scan(folder)
    return {track.file: track for track in tracks}, complaints


def captions(folder: Path) -> dict[str, str | None]:
    """{recording: its description}, where there is nothing to complain about."""
    tracks, complaints = found(folder)
    assert complaints == []
    return {file: track.meta.get("description") for file, track in tracks.items()}


def put_snapshot(root: Path, **files) -> Path:
    """A folder as the cache of huggingface_hub has it: links to blobs outside of it, named by hashes."""
    folder = root / "datasets--me--music" / "snapshots" / "c0ffee"
    for number, (name, content) in enumerate(files.items()):
        put(root / "datasets--me--music" / "blobs", **{f"{number:064x}": content})
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + name.count("/"))
        link.symlink_to(f"{up}blobs/{number:064x}")
    return folder


# --- links ------------------------------------------------------------------------------------------------

SNAPSHOT = {
    "metadata.jsonl": '{"file_name": "train/a.wav", "text": "first", "melody": "a_tune.wav"}\n',
    "train/a.wav": WAV,
    "train/a_tune.wav": encoded(frequency=220.0),
    "train/b.wav": WAV,
    "train/b.json": {"description": "second", "melody": "b_tune.wav"},
    "train/b_tune.wav": encoded(frequency=330.0),
    "train/c.wav": WAV,
    "train/c.txt": "third",
}


def test_a_snapshot_of_the_hub_has_its_captions_and_melodies(tmp_path):
    folder = put_snapshot(tmp_path, **SNAPSHOT)
    assert captions(folder) == {"train/a.wav": "first", "train/b.wav": "second", "train/c.wav": "third"}
    tracks, _ = found(folder)
    melodies = {file: track.melody for file, track in tracks.items()}
    assert melodies == {"train/a.wav": "train/a_tune.wav", "train/b.wav": "train/b_tune.wav",
                        "train/c.wav": None}


def test_a_snapshot_is_prepared_as_its_files_would_be(world, tmp_path, monkeypatch):
    put(tmp_path / "plain", **SNAPSHOT)
    folder = put_snapshot(tmp_path, **SNAPSHOT)
    monkeypatch.chdir(folder.parent)
    for name, place in (("a", tmp_path / "plain"), ("b", folder), ("c", folder.name)):
        result = preparing(world, place, tmp_path / name)
        assert result.code == 0, result
        assert "3 of 3 tracks have a caption, 2 a melody of their own\n" in result.out
    indexes = [(tmp_path / name / "index.json").read_bytes() for name in "abc"]
    assert indexes[0] != b"" and len(set(indexes)) == 1


@pytest.mark.parametrize("name", [
    "../outside.wav",
    "sub/../../outside.wav",
    "linked/../../outside.wav",
    "../music/../outside.wav",
    "up/outside.wav",
    "up/music/up/outside.wav",
    "/etc/passwd",
])
def test_a_name_leads_out_of_the_folder(tmp_path, name):
    """By its own dots, or through a link to a folder above."""
    folder = tmp_path / "music"
    put(tmp_path, **{"outside.wav": WAV, "elsewhere/x.wav": WAV})
    put(folder, **{"a.wav": WAV, "a.json": {"melody": name}, "sub/b.wav": WAV})
    (folder / "up").symlink_to(tmp_path)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    put(folder, **{"metadata.jsonl": {"file_name": name}, "metadata.csv": f"file_name,text\n{name},x\n"})
    tracks, complaints = found(folder)
    assert "does not lie in" in tracks["a.wav"].problem and tracks["a.wav"].melody is None
    refused = [complaint for complaint in complaints if "does not lie in" in complaint]
    named = [complaint.split(":")[0] for complaint in refused]
    assert named == ["metadata.csv, line 2", "metadata.jsonl, line 1"]


def test_linked_folders_are_read(tmp_path):
    folder = tmp_path / "train"
    put(tmp_path / "disk", **{"a.wav": WAV, "a.txt": "far away", "deep/b.wav": WAV, "c.wav": WAV})
    put(folder, **{"c.wav": WAV, "metadata.jsonl": {"file_name": "album/c.wav", "text": "c"}})
    put(folder, **{"d.wav": WAV, "d.json": {"melody": "album/deep/b.wav"}})
    (folder / "album").symlink_to(tmp_path / "disk")
    assert captions(folder) == {"c.wav": None, "d.wav": None, "album/a.wav": "far away", "album/c.wav": "c"}
    crops = AudioCrops(Config(task="codec", data_dir=str(tmp_path)), "train")
    names = {path.relative_to(folder).as_posix() for path in crops.paths}
    assert names == {"c.wav", "d.wav", "album/a.wav", "album/c.wav", "album/deep/b.wav"}


def test_links_make_no_loops(tmp_path, capsys):
    folder = tmp_path / "music"
    put(folder, **{"a.wav": WAV, "z/b.wav": WAV})
    put(tmp_path / "disk", **{"c.wav": WAV, "e/d.wav": WAV})
    links = {
        "up": "..",
        "self": ".",
        "z/above": "..",
        "y": "z",               # read as z, although y comes first
        "disk": "../disk",
        "disk too": "../disk",
        "../disk/back": "../music",
        "../disk/round": ".",
        "e": "../disk/e",       # a part of disk
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    tracks, complaints = found(folder)
    assert list(tracks) == ["a.wav", "z/b.wav", "disk/c.wav", "disk/e/d.wav"]
    passed_over = ["disk/back", "disk/round", "disk too", "e", "self", "up", "y", "z/above"]
    assert sorted(complaint.split(":")[0] for complaint in complaints) == sorted(passed_over)
    assert all("not followed" in complaint for complaint in complaints)
    for name in ("train", "valid"):
        AudioCrops(Config(task="codec", data_dir=str(folder)), name)
    assert f"{folder}/self: " in capsys.readouterr().err


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "music"
    put(folder, **{"a.wav": WAV, "secret/b.wav": WAV, "c/metadata.jsonl": "", "d.wav": WAV})
    for name, target in (("gone", "/mnt/unplugged"), ("a.json", "blob"), ("c/metadata.csv", "blob")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "metadata.jsonl")
    os.mkfifo(folder / "d.txt")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    tracks, complaints = found(folder)
    assert list(tracks) == ["a.wav", "d.wav"]
    assert sorted(complaints) == [
        "a.json: a broken link",
        "c/metadata.csv: a broken link",
        "d.txt: is not a file",
        "gone: a broken link",
        "metadata.jsonl: is not a file",
        "secret: cannot be read (Permission denied)",
    ]
    AudioCrops(Config(task="codec", data_dir=str(folder)), "train")
    assert f"skipped {folder}/secret: cannot be read (Permission denied)\n" in capsys.readouterr().err
    (folder / "a.wav").unlink(), (folder / "d.wav").unlink()
    with pytest.raises(UserError, match="holds no recordings .*; "):
        scan(folder)


# --- manifests --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("character", "\u2028 \u2029 \x85 \v".split(" "), ids=ascii)
def test_lines_end_at_a_newline_alone(tmp_path, character, end):
    rows = [{"file_name": f"{name}.wav", "text": f"one{character}two"} for name in "ab"]
    texts = [json.dumps(row, ensure_ascii=character < " ") for row in rows]
    put(tmp_path, **{"a.wav": WAV, "b.wav": WAV, "metadata.jsonl": end.join(texts) + end})
    assert captions(tmp_path) == dict.fromkeys(["a.wav", "b.wav"], f"one{character}two")


def as_csv(rows: list[list[str]], **options) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


CSV = [
    ["file_name", "Text", "genre", "bpm", "weight", "melody", "speaker"],
    ["a.wav", "slow, and\nsad: \"so\"\u2028", "Folk", "120 BPM", "2.5", "tune.wav", "7"],
    ["sub/b.wav", "fast", "", "", "", "", ""],
    ["C.WAV", "C", "", "x", "heavy", "", ""],
]


@pytest.mark.parametrize("options", [{}, dict(lineterminator="\n"), dict(quoting=csv.QUOTE_ALL)], ids=str)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_manifest_in_csv(tmp_path, options, encoding):
    names = ["a.wav", "sub/b.wav", "c.wav", "tune.wav"]
    put(tmp_path, **dict.fromkeys(names, WAV), **{"metadata.csv": as_csv(CSV, **options).encode(encoding)})
    tracks, complaints = found(tmp_path)
    assert complaints == ["c.wav: its weight 'heavy' must be a positive number, taken as 1"]
    assert tracks["a.wav"] == Track("a.wav", "tune.wav", 2.5, unused=["'speaker'"], meta=dict(
        description="slow, and\nsad: \"so\"", genre="folk", bpm=120.0))
    assert tracks["sub/b.wav"] == Track("sub/b.wav", meta=dict(description="fast"))
    assert tracks["c.wav"] == Track("c.wav", meta=dict(description="C"), unused=["a value of 'bpm'"])


@pytest.mark.parametrize("text, complaint", [
    ("", "metadata.csv: has no column file_name"),
    ("a.wav,slow\n", "metadata.csv: has no column file_name"),
    ("file_name;text\na.wav;slow\n", "metadata.csv: has no column file_name"),
    ("file_name,text\na.wav,slow, and sad\n", "metadata.csv, line 2: has 3 cells for 2 columns"),
    ("file_name,text\na.wav,\"slow\nb.wav,fast\n", "metadata.csv: line 3 is not valid CSV"),
    ("file_name,text\na.wav," + "x" * 200_000, "metadata.csv: line 2 is not valid CSV"),
    ("file_name,text\n,slow\n", "metadata.csv, line 2: has no file_name"),
    ("file_name,text\na.wav\0,slow\n", "metadata.csv: is not text"),
    ("file_name,text\ngone.wav,slow\n", "gone.wav: named in metadata.csv"),
])
def test_mistakes_in_csv_are_named(tmp_path, text, complaint):
    put(tmp_path, **{"a.wav": WAV, "b.wav": WAV, "metadata.csv": text})
    tracks, complaints = found(tmp_path)
    assert len(complaints) == 1 and complaints[0].startswith(complaint)
    assert [track.meta for track in tracks.values()] == [{}, {}]


def test_several_manifests(tmp_path):
    """The same said twice is no matter, contradictions are named; what is not read is named."""
    put(tmp_path, **{"a.wav": WAV, "sub/b.wav": WAV, "sub/metadata.parquet": b"PAR1"})
    put(tmp_path, **{"metadata.jsonl": '{"file_name": "a.wav", "text": "a"}',
                     "metadata.csv": "file_name,text\na.wav,a\nsub/b.wav,b\n",
                     "sub/metadata.jsonl": '{"file_name": "b.wav", "caption": "c"}'})
    tracks, complaints = found(tmp_path)
    assert [track.meta["description"] for track in tracks.values()] == ["a", "b"]
    assert len(complaints) == 2
    assert complaints[0].startswith("sub/metadata.jsonl, line 1: sub/b.wav was named before")
    assert complaints[1].startswith("sub/metadata.parquet: is not read")


# --- names ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("audio, beside", [
    ("K.WAV", "K.TXT"),
    ("K.WAV", "K.txt"),
    ("k.wav", "K.Txt"),
    ("a.wav", "a.wav.txt"),
    ("A.WAV", "a.wav.txt"),
    ("a.b.flac", "a.b.txt"),
    ("sub/K.Mp3", "sub/k.mp3.TXT"),
    ("fl\u00fbte.wav", "flu\u0302te.txt"),
])
def test_a_sidecar_is_found(tmp_path, audio, beside):
    put(tmp_path, **{audio: WAV, beside: "a tune"})
    assert captions(tmp_path) == {audio: "a tune"}
    (tmp_path / beside).unlink()
    put(tmp_path, **{beside[:-4] + ".JSON": {"text": "a tune"}})
    assert captions(tmp_path) == {audio: "a tune"}


def test_the_more_particular_sidecar_counts(tmp_path):
    put(tmp_path, **{"a.wav": WAV, "a.mp3": WAV, "a.txt": "both", "a.wav.txt": "the wav"})
    assert captions(tmp_path) == {"a.mp3": "both", "a.wav": "the wav"}
    put(tmp_path, **{"a.json": {"caption": "both", "genre": "folk"}, "a.wav.json": {"text": "the wav"}})
    assert captions(tmp_path) == {"a.mp3": "both", "a.wav": "the wav"}
    assert [track.meta["genre"] for track in scan(tmp_path)[0]] == ["folk", "folk"]


def test_a_sidecar_of_another_recording_is_not_taken(tmp_path):
    put(tmp_path, **{"a.wav": WAV, "A.wav": WAV, "a.txt": "lower"})
    put(tmp_path, **{"b.wav": WAV, "B.wav": WAV, "B.TXT": "either"})
    assert captions(tmp_path) == {"A.wav": None, "a.wav": "lower", "B.wav": "either", "b.wav": "either"}


def test_names_in_a_manifest_may_be_in_another_case(tmp_path):
    lines = [{"file_name": "SUB/k.wav", "text": "k"}, {"file_name": "flu\u0302te.wav", "text": "f"}]
    put(tmp_path, **{"sub/K.WAV": WAV, "fl\u00fbte.wav": WAV,
                     "Metadata.JSONL": "\n".join(map(json.dumps, lines))})
    assert captions(tmp_path) == {"fl\u00fbte.wav": "f", "sub/K.WAV": "k"}
    put(tmp_path, **{"fl\u00fbte.json": {"melody": "Sub/k.wav"}})
    tracks, complaints = found(tmp_path)
    assert tracks.keys() == {"fl\u00fbte.wav"} and complaints == []
    assert tracks["fl\u00fbte.wav"].melody == "sub/K.WAV"


# --- keys and values --------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields, description, unused", [
    (dict(text="t"), "t", []),
    (dict(caption="c"), "c", []),
    (dict(Caption="c", BPM=""), "c", []),
    (dict(description="d", caption="c", text="t"), "d", ["'caption'", "'text'"]),
    (dict(description="d", caption="d"), "d", []),
    (dict(description="", caption=None, text="t"), "t", []),
    (dict(description="None", text="t"), "t", []),
    (dict(description=["d"], text="t"), "t", []),
    (dict(caption={"a": 1}), None, ["'caption'"]),
    (dict(description="d", mood="x", **{"k" * 99: 1}), "d", ["'mood'", repr("k" * 50)]),
    (dict(description="d", bpm="fast", genre={}, key="C, D", moods=3, title=["x"]), "d",
     [f"a value of '{key}'" for key in ("bpm", "genre", "key", "moods", "title")]),
    (dict(description="d", bpm=None, genre="", moods=[], mood="", truth={"bpm": 3}, weight=2), "d", []),
])
@pytest.mark.parametrize("place", ["a.json", "metadata.jsonl"])
def test_captions_of_any_name(tmp_path, place, fields, description, unused):
    put(tmp_path, **{"a.wav": WAV, place: fields | dict(file_name="a.wav")})
    (track,), complaints = scan(tmp_path)
    assert track.meta.get("description") == description and complaints == []
    assert sorted(track.unused) == sorted(unused)


def test_a_json_counts_before_a_manifest_and_that_before_a_text(tmp_path):
    put(tmp_path, **{"a.wav": WAV, "a.txt": "t"})
    assert captions(tmp_path) == {"a.wav": "t"}
    put(tmp_path, **{"metadata.jsonl": {"file_name": "a.wav", "caption": "m", "genre": "folk"}})
    assert captions(tmp_path) == {"a.wav": "m"}
    put(tmp_path, **{"a.json": {"text": "j", "genre": None}})
    assert captions(tmp_path) == {"a.wav": "j"}
    assert scan(tmp_path)[0][0].meta["genre"] == "folk"
    put(tmp_path, **{"a.json": {"description": "", "genre": "jazz"}})
    assert captions(tmp_path) == {"a.wav": "m"}


@pytest.mark.parametrize("nothing", ["", " ", None, []])
def test_an_empty_melody_is_none(tmp_path, nothing):
    put(tmp_path, **{"a.wav": WAV, "a.json": {"melody": nothing}})
    assert scan(tmp_path) == ([Track("a.wav")], [])


@pytest.mark.parametrize("fields, meta", [
    (dict(genre=["Folk", "Irish Folk"]), dict(genre="folk, irish folk")),
    (dict(instrument=["Flute"]), dict(instrument="flute")),
    (dict(instrument=[], genre=[3, None]), {}),
    (dict(bpm="120 BPM"), dict(bpm=120.0)),
    (dict(bpm=" 97.5bpm "), dict(bpm=97.5)),
    (dict(bpm="bpm"), {}),
    (dict(bpm="-3 bpm"), {}),
    (dict(bpm=" " * 1_000_000 + "x"), {}),
])
def test_values_whose_meaning_is_plain(fields, meta):
    assert clean(fields) == meta == clean(meta)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le bom", "utf-16-be bom", "latin-1"])
@pytest.mark.parametrize("place", ["a.txt", "a.json", "metadata.jsonl", "metadata.csv"])
def test_every_file_in_every_encoding(tmp_path, place, encoding):
    texts = {
        "a.txt": "fl\u00fbte",
        "a.json": '{"text": "fl\u00fbte"}',
        "metadata.jsonl": '{"file_name": "a.wav", "text": "fl\u00fbte"}\n{"file_name": "b.wav"}\n',
        "metadata.csv": "file_name,text\r\na.wav,fl\u00fbte\r\nb.wav,b\r\n",
    }
    name, *bom = encoding.split()
    put(tmp_path, **{"a.wav": WAV, "b.wav": WAV, place: ("\ufeff" * len(bom) + texts[place]).encode(name)})
    assert captions(tmp_path)["a.wav"] == "fl\u00fbte"


@pytest.mark.parametrize("content, instrument", [
    (b'{"instrument": "flute"}', "flute"),
    ('{"instrument": ["Flute", "Harp"]}'.encode("utf-16"), "flute, harp"),
    (b"\xef\xbb\xbf{}", "None"),
    (b"[1]", "None"),
    (b"{", "None"),
])
def test_measuring_a_codec_reads_sidecars_alike(tmp_path, content, instrument):
    put(tmp_path, **{"a.json": content})
    assert instrument_of(tmp_path / "a.wav") == instrument


# --- endings ----------------------------------------------------------------------------------------------

KINDS = {
    ".oga": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".caf": ("CAF", None),
    ".au": ("AU", None),
    ".snd": ("AU", None),
    ".w64": ("W64", None),
    ".rf64": ("RF64", None),
    ".aif": ("AIFF", None),
    ".aiff": ("AIFF", None),
    ".AIFC": ("AIFF", None),
    ".WAV": ("WAV", None),
}
UNREADABLE = (".webm", ".m4a", ".mp4", ".wma")


def test_recordings_of_all_endings(world, tmp_path, capsys):
    folder = tmp_path / "music" / "train"
    for ending, (kind, subtype) in KINDS.items():
        put(folder, **{f"x{ending}": encoded(kind, subtype), f"x{ending}.txt": "a tune"})
    put(folder, **{f"y{ending}": b"not read" for ending in UNREADABLE})
    result = preparing(world, folder, tmp_path / "out")
    assert result.code == 1 and "11 of 11 tracks have a caption, 0 a melody" in result.out, result
    report = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert {line.split(":")[0] for line in report} == {f"y{ending}" for ending in UNREADABLE}
    crops = AudioCrops(Config(task="codec", data_dir=str(folder.parent)), "train")
    assert {path.suffix for path in crops.paths} == set(KINDS)
    said = capsys.readouterr().err
    assert all(f"skipped {folder}/y{ending}: " in said for ending in UNREADABLE)


def test_what_soundfile_reads_is_a_recording():
    kinds = {"wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64", "rf64"}
    assert kinds <= {name.lower() for name in soundfile.available_formats()}
    assert {f".{kind}" for kind in kinds} <= set(AUDIO)


# --- the report -------------------------------------------------------------------------------------------

def test_the_report(world, tmp_path):
    put(tmp_path / "music", **{f"{name}.wav": WAV for name in "abcd"}, **{"bad.wav": b""})
    soundfile.write(tmp_path / "music/tune.wav", tone(frequency=220.0), RATE)
    put(tmp_path / "music", **{
        "a.json": {"text": "a", "mood": "sad", "melody": "tune.wav"},
        "b.json": {"mood": "sad", "bpm": "fast", "\ud800\nx": 1},
        "c.json": {"melody": "c.wav", "mood": ""},
        "c.txt": "c",
        "bad.json": {"text": "not counted", "mood": "x"},
        "d.json": {f"key {n}": 1 for n in range(40)},
    })
    result = preparing(world, tmp_path / "music", tmp_path / "out")
    assert result.code == 1 and "Traceback" not in result.err, result
    said = result.out.splitlines()
    assert said[-2] == "2 of 4 tracks have a caption, 1 a melody of their own"
    assert said[-1].startswith("not understood in captions, and in how many tracks: 'mood' (2), ")
    assert "a value of 'bpm' (1), '\\ud800\\nx' (1), " in said[-1] and said[-1].endswith(" and 23 more")


def test_a_report_without_anything_to_say(world, tmp_path):
    put(tmp_path / "music", **{"a.wav": WAV})
    result = preparing(world, tmp_path / "music", tmp_path / "out")
    assert result.code == 0 and "not understood" not in result.out + result.err
    assert result.out.endswith("0 of 1 tracks have a caption, 0 a melody of their own\n")


@pytest.mark.parametrize("files, complaint", [
    ({"train.jsonl": '{"file_name": "a.wav", "text": "x"}'}, "train.jsonl: not read; captions of many"),
    ({"captions.CSV": "file_name,text\na.wav,x"}, "captions.CSV: not read; captions of many"),
    ({"metadata.json": '[{"file_name": "a.wav", "text": "x"}]'}, "metadata.json: not read; captions of many"),
    ({"text/a.txt": "x"}, "text/a.txt: not read, as it does not lie beside a.wav"),
    ({"text/A.WAV.json": "{}"}, "text/A.WAV.json: not read, as it does not lie beside a.wav"),
    ({"license.txt": "x", "settings.json": "{}", "cover.jpg": ""}, None),
])
def test_captions_in_another_place_are_named(files, complaint, tmp_path):
    for name, text in {"a.wav": "", **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tracks, complaints = scan(tmp_path)
    assert [track.file for track in tracks] == ["a.wav"]
    assert [text.startswith(complaint or "-") for text in complaints] == [True] * bool(complaint)


@pytest.mark.parametrize("name", ["sub\\\\a.wav", " sub/a.wav ", ".\\\\sub/a.wav"])
def test_names_as_windows_and_spreadsheets_write_them(name, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.wav").write_text("")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "{name}", "text": "x"}}')
    tracks, complaints = scan(tmp_path)
    assert tracks[0].meta == {"description": "x"} and not complaints
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "..\\\\a.wav", "text": "x"}')
    assert "does not lie in" in scan(tmp_path)[1][0]


def test_recordings_that_are_each_others_melody_stay_tracks(tmp_path):
    for name, other in ("ab", "ba"):
        (tmp_path / f"{name}.wav").write_text("")
        (tmp_path / f"{name}.json").write_text(f'{{"melody": "{other}.wav"}}')
    melodies = {track.file: track.melody for track in scan(tmp_path)[0]}
    assert melodies == {"a.wav": "b.wav", "b.wav": "a.wav"}
