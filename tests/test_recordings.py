"""Recordings of all kinds, whole and in crops: the samples of one read from beginning to end, damaged or not.

    python -m pytest tests/test_recordings.py
"""
import functools
import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from config import Config
from constants import TRAIN_CODEC
from damage import flipped, patched
from data.audio import read_audio, seconds_of
from data.recordings import Recording
from data.segments import AudioCrops
from system.errors import UserError

SECONDS = 12


def music(seconds=SECONDS, rate=44100, channels=1, seed=0):
    """Samples (L, C) of notes, rests and noise: of a variable bit rate, down to next to nothing."""
    time = np.arange(int(seconds * rate)) / rate
    sounds = np.sin(2 * np.pi * 0.7 * time) > 0
    wave = 0.3 * np.sin(2 * np.pi * 220 * time * (1 + 0.1 * np.floor(time))) * sounds
    noise = np.random.default_rng(seed).standard_normal(len(time))
    wave += 0.2 * noise * (np.sin(2 * np.pi * 0.31 * time) > 0.5)
    return np.stack([wave * (1 - 0.3 * c) for c in range(channels)], 1).astype(np.float32)


@functools.lru_cache(None)
def encoded(kind="MP3", subtype=None, mode=None, level=0.5, rate=44100, channels=1, seconds=SECONDS, seed=0):
    """A recording as the bytes of a file."""
    options = dict(compression_level=level, bitrate_mode=mode) if mode else {}
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels, subtype, format=kind, **options) as file:
        wave = music(seconds, rate, channels, seed)
        for start in range(0, len(wave), 2 ** 16):
            file.write(wave[start:start + 2 ** 16])
    return buffer.getvalue()


def mp3(mode="VARIABLE", **options) -> bytes:
    return encoded(mode=mode, **options)


def without_xing(data: bytes) -> bytes:
    """An mp3 without its first frame, which has no sound, but says how many frames there are."""
    return data[data.index(data[:2], 4):]


def sequential(data: bytes) -> np.ndarray:
    """One read of all samples (L, C): soundfile seeks, wrongly in mp3, after each."""
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]


def whole(path) -> np.ndarray:
    return np.concatenate(list(Recording(path).blocks()))


def crop(path, start: int, length: int) -> np.ndarray:
    found, left = [], length
    for block in Recording(path).blocks(start):
        found.append(block[:left])
        left -= len(found[-1])
        if left <= 0:
            break
    return np.concatenate(found)


def same_in_crops(path, wave: np.ndarray, length=3000):
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(wave) - length, 20).tolist()
    for start in [0, 1, 2 ** 18 - 1, len(wave) - length, *starts]:
        assert np.array_equal(crop(path, start, length), wave[start:start + length]), start


# --- good files -------------------------------------------------------------------------------------------

KINDS = {
    "variable.mp3": mp3(),
    "variable, low.mp3": mp3(level=0.95),
    "stereo.mp3": mp3(level=0.9, channels=2),
    "constant.mp3": mp3("CONSTANT"),
    "average.mp3": mp3("AVERAGE", level=0.8),
    "22050 Hz.mp3": mp3(level=0.9, rate=22050),
    "8000 Hz.mp3": mp3(level=0.9, rate=8000, seconds=40),
    "vorbis.ogg": encoded("OGG", "VORBIS"),
    "stereo.ogg": encoded("OGG", "VORBIS", rate=32000, channels=2),
    "opus.ogg": encoded("OGG", "OPUS", rate=48000),
    "24000 Hz.opus": encoded("OGG", "OPUS", rate=24000, channels=2),
    "x.flac": encoded("FLAC", "PCM_16"),
    "x.wav": encoded("WAV", "PCM_16"),
    "float.wav": encoded("WAV", "FLOAT"),
    "ulaw.wav": encoded("WAV", "ULAW"),
    "adpcm.wav": encoded("WAV", "IMA_ADPCM"),
    "gsm.wav": encoded("WAV", "GSM610"),
    "x.aiff": encoded("AIFF", "PCM_24"),
    "alac.caf": encoded("CAF", "ALAC_16"),
}


@pytest.mark.parametrize("name", KINDS)
def test_whole_and_in_crops_as_in_one_read(name, tmp_path, capfd):
    path = tmp_path / name
    path.write_bytes(KINDS[name])
    wave = sequential(KINDS[name])
    assert np.array_equal(whole(path), wave)
    same_in_crops(path, wave)
    rate = Recording(path).rate
    assert seconds_of(path) == len(wave) / rate
    read = read_audio(path, rate, wave.shape[1])
    assert np.array_equal(read.T.numpy(), wave) and not capfd.readouterr().err
    start = round(0.7 * rate) / rate
    read = read_audio(path, rate, wave.shape[1], start, 1.0)
    assert np.array_equal(read.T.numpy(), wave[round(0.7 * rate):][:rate])


ID3 = b"ID3\4\0\0" + bytes([0, 12, 0, 0]) + np.random.default_rng(0).bytes(12 << 14)
APE = b"APETAGEX" + struct.pack("<4I", 2000, 64, 1, 0xa0000000) + bytes(8 + 32)
APE += b"APETAGEX" + struct.pack("<4I", 2000, 64, 1, 0x80000000) + bytes(8)
ID3V1 = b"TAG" + bytes(125)
TAGGED = {
    "cover in front": lambda data: ID3 + data,
    "two tags in front": lambda data: ID3 + ID3 + data,
    "APE in front": lambda data: APE + data,
    "zeros in front": lambda data: bytes(3000) + data,
    "tags behind": lambda data: data + APE + ID3V1,
    "cover behind": lambda data: data + ID3,
}


@pytest.mark.parametrize("tags", TAGGED)
@pytest.mark.parametrize("xing", [True, False], ids=["Xing", "no Xing"])
def test_tags_are_no_sound(tags, xing, tmp_path, capfd):
    data = mp3() if xing else without_xing(mp3())
    (tmp_path / "plain.mp3").write_bytes(data)
    (tmp_path / "tagged.mp3").write_bytes(TAGGED[tags](data))
    wave = whole(tmp_path / "plain.mp3")
    assert len(wave) >= SECONDS * 44100 and np.array_equal(whole(tmp_path / "tagged.mp3"), wave)
    assert read_audio(tmp_path / "tagged.mp3", 44100, 1, 3.0, 1.0).shape == (1, 44100)
    assert "were read" not in capfd.readouterr().err


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_an_mp3_without_a_xing_frame_is_read_to_its_end(mode, tmp_path):
    data = without_xing(mp3(mode))
    (tmp_path / "x.mp3").write_bytes(data)
    wave, known = whole(tmp_path / "x.mp3"), sequential(mp3(mode))
    assert np.array_equal(wave[1105:][:len(known)], known)      # the encoder's delay and the decoder's
    same_in_crops(tmp_path / "x.mp3", wave)


def test_joined_mp3_files_are_read_one_after_the_other(tmp_path, capfd):
    other = mp3(level=0.8, seconds=5, seed=1)
    (tmp_path / "x.mp3").write_bytes(mp3() + ID3V1 + ID3 + other)
    wave = whole(tmp_path / "x.mp3")
    known = sequential(mp3())
    assert np.array_equal(wave[:len(known)], known) and abs(len(wave) / 44100 - SECONDS - 5) < 0.1
    same_in_crops(tmp_path / "x.mp3", wave)
    read_audio(tmp_path / "x.mp3", 44100, 1)
    assert "were read" not in capfd.readouterr().err


@pytest.mark.parametrize("coding, rate", [("VORBIS", 44100), ("OPUS", 48000)])
def test_chained_ogg_files_are_read_one_after_the_other(coding, rate, tmp_path):
    links = [encoded("OGG", coding, rate=rate, seconds=seconds, seed=seconds) for seconds in (7, 5, 6)]
    (tmp_path / "x.ogg").write_bytes(b"".join(links))
    wave = np.concatenate([sequential(link) for link in links])
    assert np.array_equal(whole(tmp_path / "x.ogg"), wave)
    same_in_crops(tmp_path / "x.ogg", wave)
    assert np.array_equal(crop(tmp_path / "x.ogg", 6 * rate, 8 * rate), wave[6 * rate:14 * rate])


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "IMA_ADPCM"])
def test_joined_wav_files_are_read_one_after_the_other(subtype, tmp_path, capfd):
    parts = [encoded("WAV", subtype, seconds=seconds, seed=seconds) for seconds in (3, 5, 4)]
    (tmp_path / "x.wav").write_bytes(b"".join(parts))
    wave = np.concatenate([sequential(part) for part in parts])
    assert np.array_equal(whole(tmp_path / "x.wav"), wave)
    same_in_crops(tmp_path / "x.wav", wave)
    assert read_audio(tmp_path / "x.wav", 44100, 1).shape[1] == len(wave)
    assert seconds_of(tmp_path / "x.wav") == len(wave) / 44100 and not capfd.readouterr().err


FLAC = KINDS["x.flac"]
PCM = KINDS["x.wav"]
LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf58.29.100\0"
UNSIZED = {
    "length unknown.flac": patched(FLAC, 21, ">BI", FLAC[21] & 0xf0, 0),
    "size 0.wav": patched(patched(PCM, 4, "<I", 0), 40, "<I", 0),
    "size of samples 0.wav": patched(PCM, 40, "<I", 0),
    "size of all 0.wav": patched(PCM, 4, "<I", 0),
    "size -1.wav": patched(patched(PCM, 4, "<i", -1), 40, "<i", -1),
    "size 0, with a list.wav": patched(PCM[:36], 4, "<I", 0) + LIST + b"data" + bytes(4) + PCM[44:],
}


@pytest.mark.parametrize("name", UNSIZED)
def test_files_that_do_not_say_how_long_they_are(name, tmp_path, capfd):
    (tmp_path / name).write_bytes(UNSIZED[name])
    wave = sequential(FLAC if "flac" in name else PCM)
    assert np.array_equal(whole(tmp_path / name), wave)
    same_in_crops(tmp_path / name, wave)
    assert read_audio(tmp_path / name, 44100, 1).shape[1] == len(wave)
    assert seconds_of(tmp_path / name) == SECONDS and not capfd.readouterr().err


# --- damaged files: what is good, and a word --------------------------------------------------------------

def checksum(page: bytes) -> int:
    """The CRC-32 of a page of Ogg, bit by bit."""
    value = 0
    for byte in patched(page, 22, "<I", 0):
        value ^= byte << 24
        for _ in range(8):
            value = value << 1 ^ (0x104c11db7 if value >> 31 else 0)
    return value


def half(data: bytes) -> bytes:
    return data[:len(data) // 2]


DAMAGED = {     # (bytes, seconds that can be read at least)
    "cut.mp3": (half(mp3()), 5.5),
    "cut, no Xing.mp3": (half(without_xing(mp3("CONSTANT"))), 5.9),
    "hole.mp3": (mp3()[:30000] + bytes(3000) + mp3()[33000:], 11),
    "noise behind.mp3": (mp3() + np.random.default_rng(0).bytes(10 ** 6), 11.9),
    "another rate behind.mp3": (mp3() + mp3(rate=22050), 11.9),
    "cut.ogg": (half(KINDS["vorbis.ogg"]), 4),
    "another rate behind.ogg": (KINDS["vorbis.ogg"] + KINDS["stereo.ogg"], 11.9),
    "cut.opus": (half(KINDS["opus.ogg"]), 4),
    "page.ogg": (flipped(KINDS["vorbis.ogg"], len(KINDS["vorbis.ogg"]) // 2), 9),
    "page.opus": (flipped(KINDS["opus.ogg"], len(KINDS["opus.ogg"]) // 2), 10),
    "last page.opus": (flipped(KINDS["opus.ogg"], KINDS["opus.ogg"].rindex(b"OggS") + 60), 11),
    "cut.flac": (half(FLAC), 4.5),
    "cut, length unknown.flac": (half(UNSIZED["length unknown.flac"]), 4.5),
    "damaged.flac": (flipped(FLAC, 3 * len(FLAC) // 4), 8),
    "joined.flac": (FLAC + FLAC, 11.9),
    "cut.wav": (half(PCM), 5.9),
    "joined, cut.wav": (PCM + half(PCM), 17.9),
    "joined with another.wav": (PCM + encoded("WAV", "PCM_16", rate=22050), 11.9),
    "cut.aiff": (half(KINDS["x.aiff"]), 5.9),
    "cut.caf": (half(encoded("CAF", "PCM_16")), 5.9),
    "cut.w64": (half(encoded("W64", "PCM_16")), 5.9),
}


@pytest.mark.parametrize("form", ["ID3 in front", "ID3 behind", "zeros behind"])
def test_flac_files_with_more_around_them_are_not_joined(form, tmp_path, capsys):
    data = {"ID3 in front": ID3 + FLAC, "ID3 behind": FLAC + ID3V1, "zeros behind": FLAC + bytes(9999)}[form]
    (tmp_path / "x.flac").write_bytes(data)
    assert np.array_equal(read_audio(tmp_path / "x.flac", 44100, 1).T.numpy(), sequential(FLAC))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_good_of_a_damaged_file_is_read_and_the_rest_is_named(name, tmp_path, capsys):
    data, seconds = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(data)
    wav = read_audio(path, 44100 if "opus" not in name else 48000, 1)
    read = wav.shape[1] / (44100 if "opus" not in name else 48000)
    lines = capsys.readouterr().err.strip().splitlines()
    assert read >= seconds and len(lines) == 1, lines
    assert lines[0].startswith(f"{path}: {read:.2f} s were read; ")
    read_audio(path, 16000, 1, 1.0, 1.0)
    assert not capsys.readouterr().err      # nothing is wrong there


def test_a_wav_file_beyond_4_gb_is_not_less_without_a_word(tmp_path, capsys):
    (tmp_path / "x.wav").write_bytes(PCM)
    os.truncate(tmp_path / "x.wav", len(PCM) + 2 ** 32)     # its sizes, of 32 bits, are those of PCM
    assert read_audio(tmp_path / "x.wav", 44100, 1).shape[1] == SECONDS * 44100
    assert "12.00 s were read; its header has no room for more than 4 GB" in capsys.readouterr().err


def test_a_refusal_tells_no_objects_of_ours(tmp_path):
    (tmp_path / "x.wav").write_bytes(PCM[:36] + b"data" + bytes(4) + PCM[36:])
    with pytest.raises(UserError) as caught:
        read_audio(tmp_path / "x.wav", 44100, 1)
    assert "Spliced object" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("name", ["page.ogg", "page.opus", "page missing.ogg"])
def test_a_damaged_page_is_told_wherever_reading_began(name, tmp_path, capsys):
    """As data/prepare.py reads a long recording: in pieces, of which only the last one comes to the end."""
    if "missing" in name:
        data = KINDS["vorbis.ogg"]
        pages = [match.start() for match in re.finditer(b"OggS", data)]
        data = data[:pages[7]] + data[pages[8]:]
    else:
        data = DAMAGED[name][0]
    (tmp_path / name).write_bytes(data)
    read_audio(tmp_path / name, 16000, 1, 11.0)
    assert f"{name}: 12.00 s were read; 1 of its 1" in capsys.readouterr().err


def test_pages_of_radio_begin_with_any_number(tmp_path, capsys):
    data, later = KINDS["vorbis.ogg"], b""
    pages = [match.start() for match in re.finditer(b"OggS", data)] + [len(data)]
    for n, (begin, end) in enumerate(zip(pages, pages[1:])):
        page = patched(data[begin:end], 18, "<I", n + (5000 if n > 2 else 0))
        later += patched(page, 22, "<I", checksum(page))
    (tmp_path / "x.ogg").write_bytes(later)
    assert np.array_equal(whole(tmp_path / "x.ogg")[-44100:], sequential(data)[-44100:])
    read_audio(tmp_path / "x.ogg", 44100, 1)
    assert "damaged" not in capsys.readouterr().err


def test_a_crop_far_inside_costs_no_more_than_one_in_front(tmp_path):
    for name in ("variable, low.mp3", "vorbis.ogg", "opus.ogg"):
        (tmp_path / name).write_bytes(KINDS[name])
        source = Recording(tmp_path / name).source
        file, skip = source.open(tmp_path / name, 0, 11 * 44100)
        with file:
            assert skip <= 2 * 48000 + 2 ** 14, name


def test_crops_for_training_come_from_all_of_an_mp3_without_xing(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.mp3").write_bytes(without_xing(mp3()))
    data = AudioCrops(Config(**TRAIN_CODEC | dict(data_dir=str(tmp_path))), "train")
    assert data.seconds[0] >= SECONDS
    starts = [float(data.item(np.random.default_rng(n), True)["where"].split()[-2]) for n in range(20)]
    assert max(starts) > 0.75 * SECONDS and torch.is_tensor(data.item(np.random.default_rng(0), True)["wav"])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux alone lists what is open")
def test_files_are_closed(tmp_path):
    for name in ("variable.mp3", "vorbis.ogg", "opus.ogg", "x.flac"):
        (tmp_path / name).write_bytes(KINDS[name])
        for start in range(1, 11):
            read_audio(tmp_path / name, 16000, 1, start, 0.1)
    (tmp_path / "text.mp3").write_text("not music")
    for _ in range(10):
        with pytest.raises(UserError):
            read_audio(tmp_path / "text.mp3", 16000, 1)
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if str(tmp_path) in path]
