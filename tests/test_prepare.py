"""From a folder of recordings to prepared data: the right numbers, whatever the files are and whenever it is stopped.

    python -m pytest tests/test_prepare.py
"""
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402
from chroma import ChromaExtractor, separate  # noqa: E402
from config import Config, UserError  # noqa: E402
from data.audio import read_audio  # noqa: E402
from encodec import EncodecModel  # noqa: E402
from helpers import text_of, two_of  # noqa: E402

SR, STRIDE, HOP = 8000, 64, 256  # the grid of segments is lcm(64, 256) = 256 samples


@pytest.fixture(scope="module")
def codec_dir(tmp_path_factory):
    """A codec with random weights."""
    torch.manual_seed(0)
    config = Config(task="codec", sample_rate=SR, n_filters=4, ratios=(8, 8), dimension=8, lstm=1, n_q=2, card=16,
                    kmeans_init=False)
    codec = EncodecModel(config)
    for book in codec.quantizer.parameters():
        book.data.normal_()
    codec.save(path := tmp_path_factory.mktemp("codec"))
    return path


def music(seconds, seed=0, rate=SR, channels=1):
    """Random notes with noise, (samples, channels)."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    pitch = np.repeat(rng.integers(57, 80, int(seconds) + 1), rate)[:len(t)]
    wave = np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * t)
    return 0.2 * wave[:, None] + 0.05 * rng.standard_normal((len(t), channels))


def write(path, wave, rate=SR):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate)


def run(folder, out, codec_dir, *more):
    return prepare.main([str(folder), "--out", str(out), "--codec", str(codec_dir), "--radix2_exp", "10", *more])


def tracks(out):
    """{file: (codes (T, K), pitch classes (M,))} and the index, read as training does."""
    index = json.loads((out / "index.json").read_text())
    data = {}
    for track in index["tracks"]:
        codes = np.memmap(out / f"codes.{track['shard']:05d}.u16", np.uint16, "r").reshape(-1, index["n_q"])
        chroma = np.memmap(out / f"chroma.{track['shard']:05d}.u8", np.uint8, "r")
        data[track["file"]] = (np.array(codes[track["codes_start"]:track["codes_start"] + track["frames"]]),
                               np.array(chroma[track["chroma_start"]:track["chroma_start"] + track["chroma_frames"]]))
    return data, index


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(x, y) for key in a for x, y in zip(a[key], b[key]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven short recordings, of different rates and formats."""
    path = tmp_path_factory.mktemp("music")
    for i in range(8):
        write(path / f"{i}.wav", music(2 + 0.3 * i, i))
    write(path / "sub folder/a 'b'.ogg", music(3, 8, 44100, 2), 44100)
    write(path / "sub folder/ü\n.flac", music(2, 9, 22050), 22050)
    write(path / "zz.wav", music(60, 10))
    return path


@pytest.fixture(scope="module")
def reference(folder, codec_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    assert run(folder, out, codec_dir) == 0
    return tracks(out)


# --- numbers -------------------------------------------------------------------------------------------------

def test_prepared_equals_on_the_fly(folder, codec_dir, reference):
    data, index = reference
    assert len(data) == 11 and set(index) == set(
        "version sample_rate channels n_q card stride frame_rate n_chroma radix2_exp hop stem codec codec_sha256 "
        "shards tracks".split())
    codec, extract = EncodecModel.from_pretrained(codec_dir), ChromaExtractor(SR, radix2_exp=10)
    for file, (codes, classes) in data.items():
        wav = read_audio(folder / file, SR, 1)
        assert np.array_equal(codes.T, codec.encode(wav[None])[0])
        assert np.array_equal(classes, extract(separate(wav, SR, "hpss")[None])[0].argmax(-1))


def test_a_segment_has_the_chroma_of_its_piece_of_the_track(folder, reference):
    _, classes = reference[0]["zz.wav"]
    wav, extract = read_audio(folder / "zz.wav", SR, 1), ChromaExtractor(SR, radix2_exp=10)
    for start in (256 * 7, 256 * 600):
        on_the_fly = extract(separate(wav[:, start:start + 256 * 200], SR, "hpss")[None])[0].argmax(-1)
        edge = 10  # the frames that see the segment's ends, by the window and by what separation looks at
        assert np.array_equal(on_the_fly[edge:-edge], classes[start // HOP:][:201][edge:-edge])


def test_blocks_do_not_show(folder, codec_dir):
    """A recording read in four blocks gives what it gives at once: memory is bounded at no cost."""
    codec, config = EncodecModel.from_pretrained(codec_dir), Config(radix2_exp=10)
    path = folder / "zz.wav"
    whole = prepare.Preparer(codec, config, "hpss", torch.device("cpu"))(path, path)
    blocks = prepare.Preparer(codec, config, "hpss", torch.device("cpu"), block=2 ** 17)(path, path)
    assert whole[0].shape == blocks[0].shape == (60 * SR // STRIDE, 2)
    assert (whole[0] != blocks[0]).mean() < 1e-3  # sums in another order: a tie may fall differently
    assert np.array_equal(whole[1], blocks[1])


@pytest.mark.parametrize("L", [1, 255, 256, 2 ** 16 - 1, 2 ** 16, 2 ** 16 + 1, 2 ** 17, 2 ** 17 + 1, 3 * 2 ** 16])
def test_blocks_join_to_the_recording(tmp_path, L):
    wave = (np.arange(L) % 30011 - 15000) / 32768
    write(tmp_path / "a.wav", wave)
    blocks = list(prepare.blocks(tmp_path / "a.wav", SR, 1, context=2 ** 14, block=2 ** 16))
    joined = torch.cat([wav[:, lead:lead + new] for wav, lead, new, _ in blocks], 1)
    np.testing.assert_allclose(joined[0], wave, atol=1e-7)
    assert [last for *_, last in blocks] == [False] * (len(blocks) - 1) + [True]


def test_stereo_by_a_mono_codec_interleaves_the_sides(tmp_path, codec_dir):
    write(tmp_path / "music/a.wav", music(3, channels=2))
    config = tmp_path / "c.py"
    config.write_text(f"channels = 2\nn_q = 4\ndelays = (0, 0, 1, 1)\ncard = 16\nratios = (8, 8)\n"
                      f"sample_rate = {SR}\ncodec = {str(codec_dir)!r}\n")
    assert prepare.main([str(tmp_path / "music"), "--out", str(tmp_path / "out"), "--config", str(config)]) == 0
    data, index = tracks(tmp_path / "out")
    wav = read_audio(tmp_path / "music/a.wav", SR, 2)
    assert np.array_equal(data["a.wav"][0].T, EncodecModel.from_pretrained(codec_dir).encode(wav[None])[0])
    assert index["n_q"] == 4 and index["channels"] == 2


def test_melody_of_another_file(tmp_path, codec_dir):
    mix, tune = music(3, 0), music(2, 1)
    write(tmp_path / "music/a.wav", mix)
    write(tmp_path / "music/tunes/t.wav", tune)
    (tmp_path / "music/a.json").write_text(json.dumps(dict(melody="tunes/t.wav", weight=2.5)))
    assert run(tmp_path / "music", tmp_path / "out", codec_dir) == 0
    data, index = tracks(tmp_path / "out")
    assert list(data) == ["a.wav"] and index["tracks"][0]["weight"] == 2.5  # the tune is no track
    codes, classes = data["a.wav"]
    stem = separate(read_audio(tmp_path / "music/tunes/t.wav", SR, 1), SR, "hpss")
    expected = ChromaExtractor(SR, radix2_exp=10)(stem[None])
    n = expected.shape[1]
    assert len(classes) == len(mix) // HOP + 1 > n and np.array_equal(classes[:n], expected[0].argmax(-1))
    assert (classes[n:] == 0).all()


# --- stopping and going on -------------------------------------------------------------------------------------

def test_torn_files_are_mended(folder, codec_dir, reference, tmp_path):
    """Whatever was half written when a run was killed is cut off, what was finished stays."""
    assert run(folder, tmp_path, codec_dir) == 0
    names = prepare.shard_files(tmp_path, 0)
    lines = names[2].read_bytes().splitlines(keepends=True)
    last = json.loads(lines[5])
    for tail in (b"", b"\x07" * 5, b"\x07" * 3001):
        (tmp_path / "index.json").unlink()
        names[2].write_bytes(b"".join(lines[:5]) + lines[5][:len(tail) % 40])
        with open(names[0], "r+b") as file:  # the data of an unfinished track
            file.truncate(last["codes_start"] * 4)
            file.seek(0, 2)
            file.write(tail)
        with open(names[1], "ab") as file:
            file.write(tail)
        before = names[2].read_bytes().splitlines()[:5]
        assert run(folder, tmp_path, codec_dir) == 0
        assert names[2].read_bytes().splitlines()[:5] == before  # not done twice
        assert same(tracks(tmp_path)[0], reference[0])
        assert names[0].stat().st_size == sum(4 * track["frames"] for track in tracks(tmp_path)[1]["tracks"])


def test_finished_work_is_not_done_again_and_captions_are_read_anew(folder, codec_dir, tmp_path, monkeypatch):
    write(tmp_path / "music/a.wav", music(2, 0))
    write(tmp_path / "music/b.wav", music(2, 1))
    assert run(tmp_path / "music", tmp_path / "out", codec_dir) == 0
    write(tmp_path / "music/b.wav", music(3, 2))
    (tmp_path / "music/a.txt").write_text("a tune")
    done, original = [], prepare.Preparer.__call__
    monkeypatch.setattr(prepare.Preparer, "__call__",
                        lambda self, path, melody: done.append(path.name) or original(self, path, melody))
    assert run(tmp_path / "music", tmp_path / "out", codec_dir) == 0
    assert done == ["b.wav"]  # only the one that has changed
    data, index = tracks(tmp_path / "out")
    assert [len(codes) for codes, _ in data.values()] == [2 * SR // STRIDE, 3 * SR // STRIDE]
    assert index["tracks"][0]["meta"] == {"description": "a tune"}
    (tmp_path / "music/b.wav").unlink()
    assert run(tmp_path / "music", tmp_path / "out", codec_dir) == 0
    assert list(tracks(tmp_path / "out")[0]) == ["a.wav"]


def test_two_processes_one_of_them_killed(folder, codec_dir, reference, tmp_path):
    out = tmp_path / "out"
    argv, log = [folder, "--out", out, "--codec", codec_dir, "--radix2_exp", "10"], prepare.shard_files(out, 1)[2]
    with open(tmp_path / "zero", "w+b") as zero, open(tmp_path / "one", "w+b") as one:
        def ends(pids):
            return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        pids = two_of(prepare.main, *argv, err=(zero, one))
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.002)
        os.kill(pids[1], signal.SIGKILL)
        begun, codes, told = time.monotonic(), ends(pids), text_of(zero)
        assert codes == [2, -signal.SIGKILL] and time.monotonic() - begun < 60, told
        assert "run the same command again" in told and "Traceback" not in told
        kept = log.read_bytes().splitlines()[0]
        assert ends(two_of(prepare.main, *argv, err=(zero, one))) == [0, 0], text_of(zero) + text_of(one)
    assert log.read_bytes().splitlines()[0] == kept
    data, index = tracks(out)
    assert index["shards"] == 2 and same(data, reference[0])


def test_two_runs_at_once_are_refused(folder, codec_dir, tmp_path):
    first = prepare.Shard(tmp_path, 0, 2)
    with pytest.raises(UserError, match="another process"):
        run(folder, tmp_path, codec_dir)
    first.close()
    assert run(folder, tmp_path, codec_dir) == 0


def test_other_settings_do_not_mix(folder, codec_dir, tmp_path, reference):
    assert run(folder, tmp_path, codec_dir) == 0
    with pytest.raises(UserError, match="stem = hpss, now it is none"):
        run(folder, tmp_path, codec_dir, "--stem", "none")
    assert same(tracks(tmp_path)[0], reference[0])


# --- bad input ---------------------------------------------------------------------------------------------------

def test_bad_files_are_named_and_the_rest_goes_on(tmp_path, codec_dir, capsys):
    folder = tmp_path / "music"
    write(folder / "good.wav", music(2))
    whole = (folder / "good.wav").read_bytes()
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.mp3").write_text("hello " * 100)
    (folder / "headers.wav").write_bytes(whole[:44])
    (folder / "phone.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    (folder / "folder.wav").mkdir()
    (folder / "._good.wav").write_bytes(b"left by a Mac")
    os.symlink(folder / "gone.wav", folder / "link.wav")
    wave = music(1)
    wave[500] = np.nan
    soundfile.write(folder / "nan.wav", wave, SR, subtype="FLOAT")
    write(folder / "one.wav", music(2)[:1])
    write(folder / "escape.wav", music(2))
    (folder / "escape.json").write_text(json.dumps(dict(melody="../../secret.wav")))
    write(folder / "lost.wav", music(2))
    (folder / "lost.json").write_text(json.dumps(dict(melody="nowhere.wav")))
    assert run(folder, tmp_path / "out", codec_dir) == 1
    data, _ = tracks(tmp_path / "out")
    assert list(data) == ["good.wav", "one.wav"] and len(data["one.wav"][0]) == 1
    report = (tmp_path / "out/skipped.txt").read_text().splitlines()
    bad = "empty.wav escape.wav headers.wav link.wav lost.wav nan.wav phone.m4a text.mp3".split()
    assert sorted(line.split(":")[0] for line in report) == bad
    assert "does not lie in" in report[bad.index("escape.wav")] and "nowhere.wav" in report[bad.index("lost.wav")]
    for name in bad:
        (folder / name).unlink()
    assert run(folder, tmp_path / "out", codec_dir) == 0 and not (tmp_path / "out/skipped.txt").exists()


def test_usage_errors(tmp_path, codec_dir, folder):
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "no", tmp_path / "out", codec_dir)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no recordings"):
        run(tmp_path / "empty", tmp_path / "out", codec_dir)
    with pytest.raises(UserError, match="sample_rate = 32000"):
        run(folder, tmp_path / "out", codec_dir, "--sample_rate", "32000")
    with pytest.raises(UserError, match="stem"):
        run(folder, tmp_path / "out", codec_dir, "--stem", "both")
    with pytest.raises(UserError, match="nothing"):
        run(folder, tmp_path / "out", tmp_path / "nothing")
    with pytest.raises(UserError, match="product of ratios = 640"):
        run(folder, tmp_path / "out", codec_dir, "--config", str(ROOT / "config/melody.py"), "--sample_rate", str(SR))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        run(folder, tmp_path / "file/out", codec_dir)


@pytest.mark.parametrize("content, meta", [
    (dict(title=" A Song ", artist="None", description="", genre="Folk", instrument="FLUTE", key="A Minor"),
     dict(title="A Song", genre="folk", instrument="flute", key="a minor")),
    (dict(bpm="120"), dict(bpm=120.0)),
    (dict(key="C, D", bpm="fast", moods="Happy, calm\tsoft", keywords=["One", " two words ", ""]),
     dict(moods=["happy", "calm", "soft"], keywords=["one", "two words"])),
    (dict(title=5, artist=["x"], description={"a": 1}, bpm=float("inf"), moods=3, keywords=[None, 1, "k"]),
     dict(title="5", keywords=["k"])),
    (dict(description="x" * 20000, genre=None, bpm=True, moods=[]), dict(description="x" * 10000)),
    (dict(description="half \ud800 a pair"), dict(description="half ? a pair")),
])
def test_captions_are_cleaned(content, meta):
    assert prepare.clean(json.loads(json.dumps(content))) == meta


@pytest.mark.parametrize("data, text", [
    ("flûte".encode(), "flûte"), ("flûte".encode("utf-8-sig"), "flûte"), ("flûte".encode("utf-16"), "flûte"),
    ("flûte".encode("latin-1"), "flûte"), (b"", None), (b"  \n", None), (b"\x89PNG\0\0\x01", None),
    (b"a" * 11_000_000, "a" * 10_000)], ids="utf-8 bom utf-16 latin-1 empty blank binary huge".split())
@pytest.mark.parametrize("kind", ["txt", "json", "jsonl"])
def test_captions_in_any_encoding(tmp_path, data, text, kind):
    (tmp_path / "a.wav").touch()
    complaints = []
    if kind == "txt":
        (tmp_path / "a.txt").write_bytes(data)
    elif data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        value = json.dumps({"file_name": "a.wav", "text": text, "description": text}, ensure_ascii=False)
        (tmp_path / ("a.json" if kind == "json" else "metadata.jsonl")).write_bytes(value.encode("utf-16"))
    else:
        fields = b'{"file_name": "a.wav", "text": "%s"}' if kind == "jsonl" else b'{"description": "%s"}'
        bom = data[:3] if data[:3] == b"\xef\xbb\xbf" else b""
        value = bom + fields % data[len(bom):].replace(b"\n", b"")
        (tmp_path / ("a.json" if kind == "json" else "metadata.jsonl")).write_bytes(value)
    found, complaints = prepare.scan(tmp_path)
    if kind == "json" and len(data) > 10_000_000:
        assert found[0].meta == {} and "larger than" in complaints[0]
    else:
        assert found[0].meta.get("description") == text
        assert len(complaints) == (b"\0" in data and b"PNG" in data)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "[" * 100_000, '"text"', "{'a': 1}", "\0\1",
                                     '{"bpm": %s}' % ("9" * 5000)])
def test_broken_sidecars_are_named_and_the_recording_is_used(tmp_path, content):
    (tmp_path / "a.wav").touch()
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "a.txt").write_text("a tune")
    found, complaints = prepare.scan(tmp_path)
    assert found[0].meta == {"description": "a tune"} and not found[0].problem
    assert len(complaints) == 1 and complaints[0].startswith("a.json: ")


def test_manifest(tmp_path):
    for name in ("a.wav", "b.wav", "sub/c.wav", "d.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    lines = [dict(file_name="a.wav", text="first", genre="Folk"), dict(file_name="a.wav", text="second"),
             dict(text="who?"), dict(file_name="../b.wav", text="x"), dict(file_name="/etc/passwd", text="x"),
             dict(file_name="no.wav", text="x"), dict(file_name="sub/../b.wav", text="b"), [1]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n{\n")
    (tmp_path / "sub/metadata.jsonl").write_text(json.dumps(dict(file_name="c.wav", text="c")))
    (tmp_path / "a.json").write_text(json.dumps(dict(genre="jazz", weight=-1)))
    found, complaints = prepare.scan(tmp_path)
    assert [(track.file, track.meta) for track in found] == [
        ("a.wav", {"description": "first", "genre": "jazz"}), ("b.wav", {"description": "b"}), ("d.wav", {}),
        ("sub/c.wav", {"description": "c"})]
    assert found[0].weight == 1.0
    said = "\n".join(complaints)
    for part in ("line 2: a.wav was named before", "line 3: 'None'", "line 4: '../b.wav' does not lie",
                 "line 5: '/etc/passwd'", "line 8: should be", "line 10: is not valid JSON", "no.wav: named in",
                 "a.wav: its weight '-1'"):
        assert part in said
    assert len(complaints) == 8
