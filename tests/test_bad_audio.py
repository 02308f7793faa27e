"""Bad recordings: each is read rightly, or refused in one sentence that names the file.

    python -m pytest tests/test_bad_audio.py

What the tests of bad input (tests/test_bad_*.py) share: a command ends in the right result, or with exit code
2 and one sentence on stderr that names the culprit, with nothing damaged, in two minutes and 1 GB.
data/prepare.py goes on without the files that it cannot use: exit code 1, and a list of them.
"""
import json
import math
import os
import pickle

import numpy as np
import pytest
from safetensors.torch import load_file

import chroma
from commands import (command, either, encodec_demo, forked, preparing, refused, sampling, snapshot,
                      train_main, worked)
from config import Config
from constants import TRAIN, TRAIN_CODEC, flags, tone
from damage import ODD, WAV, encoded, flipped, patched, write_odd, write_silence
from data.segments import AudioCrops

pytestmark = pytest.mark.usefixtures("untouched_world")
FLAC, OGG, MP3, W64, RF64, CAF = map(encoded, ("FLAC", "OGG", "MP3", "W64", "RF64", "CAF"))
RATES = (8000, 11025, 22050, 32000, 44100, 48000, 96000, 192000, 384000, 16001)
SUBTYPES = ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")


def with_one(value: float, subtype="FLOAT") -> bytes:
    """A recording one sample of which has this value."""
    wave = tone()
    wave[1000] = value
    return encoded(subtype=subtype, wave=wave)


GOOD = {
    **{f"{channels} channels.wav": encoded(channels=channels) for channels in range(1, 9)},
    **{f"{rate} Hz.wav": encoded(rate=rate) for rate in RATES},
    **{f"{subtype}.wav": encoded(subtype=subtype) for subtype in SUBTYPES},
    "one sample.wav": encoded(wave=np.full((1, 1), 0.5)),
    "two samples.flac": encoded("FLAC", wave=np.full((2, 1), 0.5)),
    "silent.wav": encoded(wave=np.zeros((4000, 1))),
    "loud.wav": encoded(subtype="FLOAT", wave=1e30 * tone()),
    "denormal.wav": encoded(subtype="FLOAT", wave=1e-42 * tone()),
    "wave as.mp3": WAV,
    "wave as.ogg": WAV,
    "flac as.wav": FLAC,
    "ogg as.flac": OGG,
    "mp3 as.wav": MP3,
    "cut.wav": WAV[:3001],
    "cut.mp3": MP3[:len(MP3) // 2],
    "claims 4 GB.wav": patched(WAV, 40, "<I", 2 ** 32 - 16),
    "claims 2^60 samples.w64.wav": patched(W64, W64.index(b"data") + 16, "<Q", 2 ** 60),
    "claims 2^60 samples.rf64.wav": patched(RF64, 20, "<QQQ", 2 ** 61, 2 ** 61, 2 ** 60),
    "tail of rubbish.wav": WAV + os.urandom(1000),
}
BAD = {
    "empty.wav": b"",
    "empty.mp3": b"",
    "text.wav": b"not music " * 99,
    "page.mp3": b"<html>404 not found</html>",
    "zeros.flac": bytes(9999),
    "header alone.wav": WAV[:44],
    "half a header.wav": WAV[:20],
    "header alone.flac": FLAC[:42],
    "a byte.ogg": b"O",
    "half a header.ogg": OGG[:60],
    "no samples.wav": encoded(wave=np.zeros((0, 1))),
    "phone.m4a": b"\0\0\0 ftypM4A ",
    "nan.wav": with_one(math.nan),
    "inf.wav": with_one(math.inf),
    "minus inf.wav": with_one(-math.inf),
    "nan.double.wav": with_one(math.nan, "DOUBLE"),
    "0 Hz.wav": patched(WAV, 24, "<I", 0),
    "1 Hz.wav": patched(WAV, 24, "<I", 1),
    "2 GHz.wav": patched(WAV, 24, "<I", 2 ** 31 - 1),
    "negative rate.wav": patched(WAV, 24, "<i", -8000),
    "0 channels.wav": patched(WAV, 22, "<H", 0),
    "65535 channels.wav": patched(WAV, 22, "<H", 65535),
    "0 bits.wav": patched(WAV, 34, "<H", 0),
    "unknown coding.wav": patched(WAV, 20, "<H", 999),
    "picture.wav": b"\x89PNG\r\n\x1a\n" + bytes(500),
    "pickle.wav": pickle.dumps([1, 2]),
}
UNSURE = {  # read or refused, as the version of libsndfile has it
    "claims 2^60 samples.caf.wav": patched(CAF, CAF.index(b"data") + 4, ">Q", 2 ** 61),
    "claims 2^36 samples.flac": patched(FLAC, 21, ">BI", (FLAC[21] & 0xf0) | 0xf, 2 ** 32 - 1),
    "cut.flac": FLAC[:len(FLAC) // 2],
    "cut.ogg": OGG[:len(OGG) // 2],
    "cut.w64.wav": W64[:1000],
    "999 channels.wav": patched(WAV, 22, "<H", 999),
    "7 bits.wav": patched(WAV, 34, "<H", 7),
    "flipped.flac": flipped(FLAC, 900),
    "flipped.ogg": flipped(OGG, 900),
    "noise as.mp3": np.random.default_rng(0).bytes(20000),
    "zeros.mp3": bytes(20000),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """All of the above in one folder."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, data in (GOOD | BAD | UNSURE).items():
        (folder / name).write_bytes(data)
    for name, kind in ODD.items():
        write_odd(folder / name, kind)
    return folder


# --- one recording ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*GOOD, *BAD, *UNSURE, *ODD])
def test_audio_as_a_melody(world, corpus, model, tmp_path, name):
    result = sampling(world, "--melody", corpus / name, "--out", "x.wav", cwd=tmp_path)
    if name in GOOD:
        worked(result)
    elif name in UNSURE:
        either(result, name)
    else:
        refused(result, name)
    assert (tmp_path / "x.wav").exists() == (result.code == 0)


@pytest.mark.parametrize("name", [*BAD, *ODD])
def test_audio_as_a_prompt(world, corpus, model, tmp_path, name):
    refused(sampling(world, "--prompt", corpus / name, "--out", "x.wav", cwd=tmp_path), name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wave, said", [
    (30_000 * tone(), "peak of"), (tone(0.001), "shorter than one frame")], ids=["integers", "short"])
def test_what_is_wrong_with_the_wave_of_a_prompt_is_said_with_its_name(world, model, tmp_path, wave, said):
    (tmp_path / "odd.wav").write_bytes(encoded(subtype="FLOAT", wave=wave))
    refused(sampling(world, "--prompt", "odd.wav", "--out", "x.wav", cwd=tmp_path), "odd.wav", said)


@pytest.mark.parametrize("demo", [encodec_demo, chroma.main], ids=["encodec", "chroma"])
@pytest.mark.parametrize("name", ["8 channels.wav", "one sample.wav", "192000 Hz.wav", "silent.wav",
                                  *list(BAD)[::3], *ODD])
def test_audio_in_the_demos(corpus, demo, name):
    result = command(demo, corpus / name)
    worked(result) if name in GOOD else refused(result, name)


def test_hours_of_silence_cost_no_more_than_is_used(world, model, tmp_path):
    (tmp_path / "music").mkdir()
    write_silence(tmp_path / "music" / "long.wav", hours=24)
    limits = dict(cwd=tmp_path, seconds=20, memory=300_000_000)
    worked(sampling(world, "--melody", "music/long.wav", **limits))
    refused(sampling(world, "--prompt", "music/long.wav", **limits), "duration 0.05 s includes the prompt")
    worked(command(encodec_demo, "music/long.wav", **limits))
    worked(command(chroma.main, "music/long.wav", **limits))
    worked(forked(train_main, *flags(TRAIN_CODEC, data_dir="music", out_dir="run"), **limits))


# --- folders of recordings --------------------------------------------------------------------------------

def test_a_folder_of_all_of_them_is_prepared(world, corpus, tmp_path):
    """Every good one in, every bad one named, and the exit code says so."""
    before = snapshot(corpus)
    result = preparing(world, corpus, tmp_path / "out")
    assert result.code == 1 and "Traceback" not in result.err, result
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    taken = [track["file"] for track in index["tracks"]]
    report = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    skipped = [line.split(": ")[0] for line in report]
    assert set(taken) - set(UNSURE) == set(GOOD)
    assert set(skipped) - set(UNSURE) == set(BAD) | set(ODD) - {"folder.wav"}
    assert sorted(taken + skipped) == sorted(path.name for path in corpus.iterdir() if not path.is_dir())
    assert snapshot(corpus) == before
    assert preparing(world, corpus, tmp_path / "out").code == 1  # and again, with nothing left to do
    argv = flags(TRAIN, data_dir=tmp_path / "out", codec=world / "codec", out_dir=tmp_path / "run")
    worked(forked(train_main, *argv, "--segment_duration=0.1"))


def test_a_codec_trains_on_what_can_be_read_of_a_folder(corpus, tmp_path):
    (tmp_path / "train").symlink_to(corpus)
    result = forked(train_main, *flags(TRAIN_CODEC, data_dir=tmp_path, out_dir=tmp_path / "run"))
    assert result.code == 0 and "Traceback" not in result.err, result
    for name in ("empty.wav", "text.wav", "page.mp3", "header alone.wav", "0 channels.wav", *ODD):
        assert f"/{name}: " in result.err


@pytest.mark.parametrize("name", ["empty.wav", "text.wav", "no samples.wav", *ODD])
def test_a_codec_does_not_train_on_nothing(tmp_path, name):
    (tmp_path / "music").mkdir()
    if name in ODD:
        write_odd(tmp_path / "music" / name, ODD[name])
    else:
        (tmp_path / "music" / name).write_bytes(BAD[name])
    argv = flags(TRAIN_CODEC, data_dir="music", out_dir="run")
    result = forked(train_main, *argv, cwd=tmp_path, seconds=20)
    assert result.code == 2 and "Traceback" not in result.err, result
    assert "data_dir = 'music'" in result.sentences[-1]
    assert f"skipped music/{name}: " in result.err and not (tmp_path / "run").exists()


def test_a_codec_trains_on_silence(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "silent.wav").write_bytes(GOOD["silent.wav"])
    argv = flags(TRAIN_CODEC, data_dir="music", out_dir="run", adv=1.0, feat=1.0, disc_windows=(64,),
                 disc_filters=2)
    worked(forked(train_main, *argv, cwd=tmp_path))
    tensors = load_file(tmp_path / "run" / "model.safetensors").values()
    assert all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())


def test_a_header_that_claims_ages_does_not_crowd_out_the_music(tmp_path):
    (tmp_path / "train").mkdir()
    for n in range(4):
        (tmp_path / "train" / f"{n}.wav").write_bytes(encoded(seconds=2.0, seed=n))
    (tmp_path / "train" / "ages.wav").write_bytes(GOOD["claims 2^60 samples.w64.wav"])
    (tmp_path / "train" / "more.wav").write_bytes(UNSURE["claims 2^60 samples.caf.wav"])
    data = AudioCrops(Config(**TRAIN_CODEC | dict(data_dir=str(tmp_path))), "train")
    drawn = [data.item(np.random.default_rng(n), True)["where"] for n in range(40)]
    assert all(any(f"/{n}.wav" in where for where in drawn) for n in range(4))


@pytest.mark.slow  # two minutes
def test_hours_of_silence_are_prepared_in_bounded_memory(world, tmp_path):
    (tmp_path / "music").mkdir()
    write_silence(tmp_path / "music" / "long.wav", hours=8)
    worked(preparing(world, "music", "out", cwd=tmp_path, seconds=1200, memory=800_000_000))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["tracks"][0]["frames"] == 8 * 3600 * 400
