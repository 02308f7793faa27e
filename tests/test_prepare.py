"""From a folder of recordings to prepared data: the right numbers, whenever the command is stopped.

    python -m pytest tests/test_prepare.py
"""
import json
import os
import shutil
import signal

import numpy as np
import pytest
import soundfile
import torch

from chroma import ChromaExtractor
from commands import exit_code, text_of, two_of, wait_until_written
from config import Config, load
from constants import ROOT
from data import prepare
from data.audio import read_audio
from data.scores import read_notes
from data.segments import TokenSegments
from data.shards import Shard, shard_files
from data.stems import separate
from encodec import EncodecModel
from system.errors import UserError

SR, STRIDE, HOP = 8000, 64, 256     # the grid of segments is lcm(64, 256) = 256 samples
CPU = torch.device("cpu")
KEYS = set("""version sample_rate channels n_q card stride frame_rate n_chroma radix2_exp hop
    melody_form stem codec codec_sha256 shards tracks""".split())


@pytest.fixture(scope="module")
def codec_dir(tmp_path_factory):
    """A codec with random weights."""
    torch.manual_seed(0)
    config = Config(task="codec", sample_rate=SR, n_filters=4, ratios=(8, 8), dimension=8, lstm=1, n_q=2,
                    card=16, kmeans_iters=0)
    path = tmp_path_factory.mktemp("codec")
    EncodecModel(config).save(path)
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
    argv = [folder, "--out", out, "--codec", codec_dir, "--radix2_exp", "10", *more]
    return prepare.main([str(arg) for arg in argv])


def tracks(out):
    """{file: (codes (T, K), pitch classes (M,))} and the index, read as training does."""
    index = json.loads((out / "index.json").read_text())
    data = {}
    for track in index["tracks"]:
        paths = shard_files(out, track["shard"], prepare.CURVES)
        codes = np.memmap(paths["codes"], np.uint16, "r").reshape(-1, index["n_q"])
        chroma = np.memmap(paths["chroma"], np.uint8, "r")
        codes = codes[track["codes_start"]:][:track["frames"]]
        chroma = chroma[track["chroma_start"]:][:track["chroma_frames"]]
        data[track["file"]] = np.array(codes), np.array(chroma)
    return data, index


def same(a, b):
    """Whether two {file: arrays} hold the same."""
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
def prepared(folder, codec_dir, tmp_path_factory):
    """The recordings, prepared: a folder that tests copy, but leave as it is."""
    out = tmp_path_factory.mktemp("prepared")
    assert run(folder, out, codec_dir) == 0
    return out


@pytest.fixture(scope="module")
def reference(prepared):
    return tracks(prepared)


# --- numbers ----------------------------------------------------------------------------------------------

def pitch_classes(wav):
    """Of the melody stem of a wave (1, L), (M,)."""
    stem = separate(wav, SR, "hpss")
    return ChromaExtractor(SR, radix2_exp=10)(stem[None])[0].argmax(-1)


def test_prepared_equals_on_the_fly(folder, codec_dir, reference):
    data, index = reference
    assert len(data) == 11
    assert set(index) == KEYS
    codec = EncodecModel.from_pretrained(codec_dir)
    for file, (codes, classes) in data.items():
        wav = read_audio(folder / file, SR, 1)
        assert np.array_equal(codes.T, codec.encode(wav[None])[0])
        assert np.array_equal(classes, pitch_classes(wav))


def test_notes_and_silence_are_classes_of_their_own(folder, codec_dir, tmp_path):
    """... and no class at all in a segment; where a melody of its own ends early, too."""
    codec = EncodecModel.from_pretrained(codec_dir)
    config = Config(sample_rate=SR, radix2_exp=10, melody_form="notes")
    note = np.sin(2 * np.pi * 440 * np.arange(2 * SR) / SR)
    write(tmp_path / "a.wav", 0.3 * np.concatenate([note, np.zeros(SR), note]))
    write(tmp_path / "short.wav", 0.3 * note[:SR])
    preparer = prepare.Preparer(codec, config, "none", CPU)
    _, curves = preparer(tmp_path / "a.wav", tmp_path / "a.wav")
    second, edge = SR // HOP, 4
    assert curves["chroma"][0] == 24 + 12 + 9               # A4 begins: an odd octave
    assert set(curves["chroma"][1:2 * second - edge]) == {12 + 9}
    assert set(curves["chroma"][2 * second + edge:3 * second - edge]) == {48}
    assert sorted(set(curves["chroma"][3 * second - edge:])) == [21, 45, 48]
    _, curves = preparer(tmp_path / "a.wav", tmp_path / "short.wav")
    assert set(curves["chroma"][second + edge:]) == {48}

    items = tmp_path / "tiny.py"
    items.write_text('sample_rate = 8000\nratios = (8, 8)\nn_q = 2\ncard = 16\ndelays = (0, 1)\n'
                     'radix2_exp = 10\nmelody_form = "notes"\nstem = "none"\nsegment_duration = 5.0\n')
    argv = [tmp_path, "--out", tmp_path / "out", "--codec", codec_dir, "--config", items]
    assert prepare.main([str(arg) for arg in argv]) == 0
    config = load([str(items), f"--data_dir={tmp_path / 'out'}"])
    data = TokenSegments(config, "train")
    sums = data.segment(data.tracks[0], 0)["conditions"]["melody"].sum(-1)
    assert sums[:2 * second - edge].all() and not sums[2 * second + edge:3 * second - edge].any()


@pytest.mark.parametrize("form", ["chroma", "notes"])
def test_a_file_of_notes_is_told_in_training_as_in_sampling(codec_dir, tmp_path, form):
    """Rests are no class at all, and the melody begins anew on its bar."""
    write(tmp_path / "music/a.wav", music(12))
    (tmp_path / "music/a.json").write_text('{"melody": "a.abc"}')
    (tmp_path / "music/a.abc").write_text("X:1\nM:4/4\nL:1/4\nQ:1/4=60\nK:C\nE G z c | c2 z2 |\n")
    items = tmp_path / "tiny.py"
    items.write_text(f'sample_rate = {SR}\nratios = (8, 8)\nn_q = 2\ncard = 16\ndelays = (0, 1)\n'
                     f'radix2_exp = 10\nmelody_form = "{form}"\nstem = "none"\nsegment_duration = 11.0\n')
    assert run(tmp_path / "music", tmp_path / "out", codec_dir, "--config", items) == 0
    config = load([str(items), f"--data_dir={tmp_path / 'out'}"])
    data = TokenSegments(config, "train")
    told = data.segment(data.tracks[0], 0)["conditions"]["melody"]
    expected = read_notes(tmp_path / "music/a.abc").chroma(config, 11.0)[:len(told)]
    assert torch.equal(told, expected) and not told[SR * 5 // HOP // 2].any()


@pytest.mark.parametrize("form, n_chroma", [("chroma", 256), ("notes", 64)])
def test_more_classes_than_a_byte_holds_are_refused(folder, codec_dir, tmp_path, form, n_chroma):
    (tmp_path / "c.py").write_text(f'sample_rate = {SR}\nratios = (8, 8)\nn_q = 2\ncard = 16\n'
                                   f'delays = (0, 1)\nmelody_form = "{form}"\n')
    flags = ["--config", tmp_path / "c.py", "--n_chroma", n_chroma]
    with pytest.raises(UserError, match=f"n_chroma = {n_chroma}: makes 256 melody classes"):
        run(folder, tmp_path / "out", codec_dir, *flags)


def test_a_segment_has_the_chroma_of_its_piece_of_the_track(folder, reference):
    _, classes = reference[0]["zz.wav"]
    wav = read_audio(folder / "zz.wav", SR, 1)
    for start in (256 * 7, 256 * 600):
        on_the_fly = pitch_classes(wav[:, start:start + 256 * 200])
        prepared = classes[start // HOP:][:201]
        edge = 10   # the frames that see the segment's ends, by the window and by what separation looks at
        assert np.array_equal(on_the_fly[edge:-edge], prepared[edge:-edge])


def test_blocks_do_not_show(folder, codec_dir):
    """A recording read in four blocks gives what it gives at once: memory is bounded at no cost."""
    codec, config = EncodecModel.from_pretrained(codec_dir), Config(radix2_exp=10)
    path = folder / "zz.wav"
    at_once = prepare.Preparer(codec, config, "hpss", CPU)
    in_blocks = prepare.Preparer(codec, config, "hpss", CPU, block=2 ** 17)
    codes, curves = at_once(path, path)
    codes_of_blocks, curves_of_blocks = in_blocks(path, path)
    assert codes.shape == codes_of_blocks.shape == (60 * SR // STRIDE, 2)
    assert (codes != codes_of_blocks).mean() < 1e-3     # sums in another order: a tie may fall differently
    assert curves.keys() == {"chroma"}
    assert np.array_equal(curves["chroma"], curves_of_blocks["chroma"])


@pytest.mark.parametrize("L", [1, 255, 256, 2 ** 16 - 1, 2 ** 16, 2 ** 16 + 1, 2 ** 17, 2 ** 17 + 1,
                               3 * 2 ** 16])
def test_blocks_join_to_the_recording(tmp_path, L):
    wave = (np.arange(L) % 30011 - 15000) / 32768
    write(tmp_path / "a.wav", wave)
    blocks = list(prepare.blocks(tmp_path / "a.wav", SR, 1, context=2 ** 14, block=2 ** 16))
    own = [block.wav[:, block.lead:block.lead + block.new] for block in blocks]
    np.testing.assert_allclose(torch.cat(own, 1)[0], wave, atol=1e-7)
    assert [block.last for block in blocks] == [False] * (len(blocks) - 1) + [True]


def test_stereo_by_a_mono_codec_interleaves_the_sides(tmp_path, codec_dir):
    write(tmp_path / "music/a.wav", music(3, channels=2))
    config = tmp_path / "c.py"
    config.write_text(f"channels = 2\nn_q = 4\ndelays = (0, 0, 1, 1)\ncard = 16\nratios = (8, 8)\n"
                      f"sample_rate = {SR}\ncodec = {str(codec_dir)!r}\n")
    argv = [tmp_path / "music", "--out", tmp_path / "out", "--config", config]
    assert prepare.main([str(arg) for arg in argv]) == 0
    data, index = tracks(tmp_path / "out")
    wav = read_audio(tmp_path / "music/a.wav", SR, 2)
    codec = EncodecModel.from_pretrained(codec_dir)
    assert np.array_equal(data["a.wav"][0].T, codec.encode(wav[None])[0])
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
    expected = pitch_classes(read_audio(tmp_path / "music/tunes/t.wav", SR, 1))
    n = len(expected)
    assert len(classes) == len(mix) // HOP + 1 > n and np.array_equal(classes[:n], expected)
    assert (classes[n:] == 0).all()


# --- stopping and going on --------------------------------------------------------------------------------

def test_torn_files_are_mended(folder, codec_dir, prepared, reference, tmp_path):
    """Whatever was half written when a run was killed is cut off, what was finished stays."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    files = shard_files(out, 0, prepare.CURVES)
    lines = files["log"].read_bytes().splitlines(keepends=True)
    for tail in (b"", b"\x07" * 5, b"\x07" * 3001):
        (out / "index.json").unlink()
        files["log"].write_bytes(b"".join(lines[:5]) + lines[5][:len(tail) % 40])
        with open(files["codes"], "r+b") as file:   # the data of an unfinished track
            file.truncate(json.loads(lines[5])["codes_start"] * 4)
            file.seek(0, 2)
            file.write(tail)
        with open(files["chroma"], "ab") as file:
            file.write(tail)
        before = files["log"].read_bytes().splitlines()[:5]
        assert run(folder, out, codec_dir) == 0
        assert files["log"].read_bytes().splitlines()[:5] == before     # not done twice
        data, index = tracks(out)
        assert same(data, reference[0])
        assert files["codes"].stat().st_size == sum(4 * track["frames"] for track in index["tracks"])


def test_finished_work_is_not_done_again_and_captions_are_read_anew(folder, codec_dir, tmp_path, monkeypatch):
    write(tmp_path / "music/a.wav", music(2, 0))
    write(tmp_path / "music/b.wav", music(2, 1))
    assert run(tmp_path / "music", tmp_path / "out", codec_dir) == 0
    write(tmp_path / "music/b.wav", music(3, 2))
    (tmp_path / "music/a.txt").write_text("a tune")
    done, call = [], prepare.Preparer.__call__

    def noted(self, path, melody):
        done.append(path.name)
        return call(self, path, melody)
    monkeypatch.setattr(prepare.Preparer, "__call__", noted)
    assert run(tmp_path / "music", tmp_path / "out", codec_dir) == 0
    assert done == ["b.wav"]  # only the one that has changed
    data, index = tracks(tmp_path / "out")
    assert [len(codes) for codes, _ in data.values()] == [2 * SR // STRIDE, 3 * SR // STRIDE]
    assert index["tracks"][0]["meta"] == {"description": "a tune"}
    (tmp_path / "music/b.wav").unlink()
    assert run(tmp_path / "music", tmp_path / "out", codec_dir) == 0
    assert list(tracks(tmp_path / "out")[0]) == ["a.wav"]


def exit_codes(pids):
    return [exit_code(pid) for pid in pids]


def test_two_processes_one_of_them_killed(folder, codec_dir, reference, tmp_path):
    out = tmp_path / "out"
    argv = [folder, "--out", out, "--codec", codec_dir, "--radix2_exp", "10"]
    log = shard_files(out, 1, prepare.CURVES)["log"]
    with open(tmp_path / "zero", "w+b") as zero, open(tmp_path / "one", "w+b") as one:
        pids = two_of(prepare.main, *argv, err=(zero, one))
        wait_until_written(log, pids[1])
        os.kill(pids[1], signal.SIGKILL)
        codes, message = exit_codes(pids), text_of(zero)
        assert codes == [2, -signal.SIGKILL], message
        assert "run the same command again" in message and "Traceback" not in message
        kept = log.read_bytes().splitlines()[0]
        codes = exit_codes(two_of(prepare.main, *argv, err=(zero, one)))
        assert codes == [0, 0], text_of(zero) + text_of(one)
    assert log.read_bytes().splitlines()[0] == kept
    data, index = tracks(out)
    assert index["shards"] == 2 and same(data, reference[0])


def test_two_runs_at_once_are_refused(folder, codec_dir, tmp_path):
    first = Shard(tmp_path, 0, 2, prepare.CURVES)
    with pytest.raises(UserError, match="another process"):
        run(folder, tmp_path, codec_dir)
    first.close()
    assert run(folder, tmp_path, codec_dir) == 0


def test_other_settings_do_not_mix(folder, codec_dir, prepared, tmp_path, reference):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    with pytest.raises(UserError, match="stem = hpss, now it is none"):
        run(folder, out, codec_dir, "--stem", "none")
    assert same(tracks(out)[0], reference[0])


@pytest.mark.parametrize("former", [True, False])
def test_settings_of_former_versions(folder, codec_dir, prepared, tmp_path, former):
    """Without melody_form they were chroma, unless harmonic_sum says otherwise."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    for path in (out / "settings.json", out / "index.json"):
        values = json.loads(path.read_text())
        del values["melody_form"]
        path.write_text(json.dumps(values | dict(harmonic_sum=former)))
    flags = [f"--sample_rate={SR}", "--ratios=(8, 8)", "--n_q=2", "--card=16", "--delays=(0, 1)",
             "--radix2_exp=10", "--segment_duration=1.0", f"--data_dir={out}"]
    if not former:
        TokenSegments(load(flags), "train")
        assert run(folder, out, codec_dir) == 0
        return
    with pytest.raises(UserError, match="prepared with melody_form = harmonic_sum, .* says chroma"):
        TokenSegments(load(flags), "train")
    with pytest.raises(UserError, match="prepared with melody_form = harmonic_sum, now it is chroma"):
        run(folder, out, codec_dir)


# --- bad input --------------------------------------------------------------------------------------------

BAD = "empty.wav escape.wav headers.wav link.wav lost.wav nan.wav phone.m4a text.mp3".split()


def write_good_and_bad(folder):
    """Two good recordings, the eight BAD ones, and what is no recording."""
    write(folder / "good.wav", music(2))
    write(folder / "one.wav", music(2)[:1])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.mp3").write_text("hello " * 100)
    (folder / "headers.wav").write_bytes((folder / "good.wav").read_bytes()[:44])
    (folder / "phone.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    os.symlink(folder / "gone.wav", folder / "link.wav")
    wave = music(1)
    wave[500] = np.nan
    soundfile.write(folder / "nan.wav", wave, SR, subtype="FLOAT")
    for name, melody in (("escape", "../../secret.wav"), ("lost", "nowhere.wav")):
        write(folder / f"{name}.wav", music(2))
        (folder / f"{name}.json").write_text(json.dumps(dict(melody=melody)))
    (folder / "folder.wav").mkdir()
    (folder / "._good.wav").write_bytes(b"left by a Mac")


def test_bad_files_are_named_and_the_rest_goes_on(tmp_path, codec_dir):
    folder = tmp_path / "music"
    write_good_and_bad(folder)
    assert run(folder, tmp_path / "out", codec_dir) == 1
    data, _ = tracks(tmp_path / "out")
    assert list(data) == ["good.wav", "one.wav"] and len(data["one.wav"][0]) == 1
    report = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert sorted(line.split(":")[0] for line in report) == BAD
    assert "does not lie in" in report[BAD.index("escape.wav")]
    assert "nowhere.wav" in report[BAD.index("lost.wav")]
    for name in BAD:
        (folder / name).unlink()
    assert run(folder, tmp_path / "out", codec_dir) == 0 and not (tmp_path / "out/skipped.txt").exists()


# what is wrong: (folder, out, codec, flags), where those of a fine command are FINE; part of the message
FINE = dict(folder="music", out="out", codec="codec", flags="")
USAGE = {
    "no folder": (dict(folder="no"), "no such folder"),
    "empty folder": (dict(folder="empty"), "no recordings"),
    "other rate": (dict(flags="--sample_rate 32000"), "sample_rate = 32000"),
    "no such stem": (dict(flags="--stem both"), "stem"),
    "no codec": (dict(codec="nothing"), "nothing"),
    "configuration of another codec": (dict(flags=f"--config {ROOT}/config/melody.py --sample_rate {SR}"),
                                       "product of ratios = 640"),
    "a file in the way": (dict(out="file/out"), "file/out.*cannot be written"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors(tmp_path, codec_dir, folder, name):
    changes, message = USAGE[name]
    (tmp_path / "music").symlink_to(folder)
    (tmp_path / "codec").symlink_to(codec_dir)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    call = FINE | changes
    with pytest.raises(UserError, match=message):
        run(tmp_path / call["folder"], tmp_path / call["out"], tmp_path / call["codec"],
            *call["flags"].split())
