"""Audio files: read at any rate and number of channels, written in four formats; what is refused.

    python -m pytest tests/test_audio.py
"""
import math
import struct

import numpy as np
import pytest
import soundfile
import torch

from data.audio import read_audio, write_audio
from system.errors import UserError


def wave(seconds, rate, channels=1):
    """Wave (C, L): a sine of 220 Hz, in further channels its overtones."""
    time = torch.arange(round(seconds * rate)) / rate
    sines = [torch.sin(2 * torch.pi * 220 * (c + 1) * time) for c in range(channels)]
    return 0.4 * torch.stack(sines)


# --- reading and writing ----------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".WAV"])
@pytest.mark.parametrize("channels", [1, 2])
def test_written_audio_reads_back(suffix, channels, tmp_path):
    wav = wave(1.0, 16000, channels)
    write_audio(tmp_path / f"x{suffix}", wav, 16000)
    again = read_audio(tmp_path / f"x{suffix}", 16000, channels)
    n = min(again.shape[1], wav.shape[1])
    assert again.shape[0] == channels and again.dtype == torch.float32 and n >= 15900
    assert (again[:, :n] - wav[:, :n]).abs().mean() < (0.02 if suffix in (".ogg", ".mp3") else 1e-4)
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 192000, 16001])
def test_any_rate_is_resampled(rate, tmp_path):
    soundfile.write(tmp_path / "x.wav", wave(0.5, rate)[0].numpy(), rate, "FLOAT")
    wav, expected = read_audio(tmp_path / "x.wav", 16000, 1), wave(0.5, 16000)
    assert abs(wav.shape[1] - 8000) <= 1
    assert (wav[:, 500:7500] - expected[:, 500:7500]).abs().max() < 5e-3


@pytest.mark.parametrize("rate", [16000, 44100, 11025])
def test_pieces_of_a_file_join_to_the_whole(rate, tmp_path):
    noise = 0.3 * torch.randn(2 * rate, generator=torch.Generator().manual_seed(0))
    soundfile.write(tmp_path / "x.wav", noise.numpy(), rate, "FLOAT")
    whole = read_audio(tmp_path / "x.wav", 16000, 1)
    parts = [read_audio(tmp_path / "x.wav", 16000, 1, start, 0.37) for start in np.arange(0, 2, 0.37)]
    assert [p.shape[1] for p in parts[:-1]] == [5920] * 5
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inside", [1, 2, 3, 8])
def test_channel_counts(inside, tmp_path):
    wav = wave(0.1, 8000, inside)
    soundfile.write(tmp_path / "x.wav", wav.T.numpy(), 8000, "FLOAT")
    torch.testing.assert_close(read_audio(tmp_path / "x.wav", 8000, 1), wav.mean(0, keepdim=True))
    two = read_audio(tmp_path / "x.wav", 8000, 2)
    torch.testing.assert_close(two, wav[:2] if inside > 1 else wav.expand(2, -1))


def test_loud_waves_are_scaled_not_clipped(tmp_path):
    loud = 5 * wave(0.1, 8000)
    write_audio(tmp_path / "x.wav", loud, 8000)
    again = read_audio(tmp_path / "x.wav", 8000, 1)
    assert abs(float(again.abs().max()) - 0.99) < 1e-3
    scaled = again * 2 / 0.99
    assert float((scaled - loud).abs().max() / loud.abs().max()) < 1e-3
    write_audio(tmp_path / "x.wav", 0.5 * loud / 2, 8000)
    assert abs(float(read_audio(tmp_path / "x.wav", 8000, 1).abs().max()) - 0.5) < 1e-3


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_16_bits_are_rounded(suffix, tmp_path):
    wav = 1.6 * torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0)) - 0.8
    write_audio(tmp_path / f"x{suffix}", wav, 16000)
    error = (read_audio(tmp_path / f"x{suffix}", 16000, 1) - wav).double() * 2 ** 15     # in steps
    assert error.abs().max() < 0.5 + 1e-3 and error.mean().abs() < 0.01
    assert abs(error.square().mean() - 1 / 12) < 1e-3


SUFFIXES = [".wav", ".flac", ".ogg", ".mp3"]
TITLES = {
    "plain": "a slow flute tune",
    "Unicode": "Übung № 7: ein Lied 🎵 für 二胡",
    "lines": "first line\nsecond\r\nthird\ttab",
    "long": "ä🎵" * 5000,
    "NUL": "before\0after",
    "half a character": "x\ud83dy",
    "empty": "",
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("title", TITLES.values(), ids=TITLES)
def test_tags_are_read_back(suffix, title, tmp_path):
    tags = dict(title=title, software="nanoMusicGen, model tiny 12345678, seed 3", comment="AI-generated")
    wav = wave(0.5, 16000, 2)
    write_audio(tmp_path / f"x{suffix}", wav, 16000, tags)
    write_audio(tmp_path / f"plain{suffix}", wav, 16000)
    expected = title[:500].replace("\0", " ").replace("\ud83d", "?")
    with soundfile.SoundFile(tmp_path / f"x{suffix}") as file:
        assert file.title == expected
        assert file.software.startswith(tags["software"]) and file.comment == tags["comment"]
    again = read_audio(tmp_path / f"x{suffix}", 16000, 2)
    assert torch.equal(again, read_audio(tmp_path / f"plain{suffix}", 16000, 2))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_tags_nothing_is_said(suffix, tmp_path):
    write_audio(tmp_path / f"x{suffix}", wave(0.5, 16000), 16000)
    with soundfile.SoundFile(tmp_path / f"x{suffix}") as file:
        assert not file.title and not file.comment and "nano" not in file.software


# --- what is refused --------------------------------------------------------------------------------------

def samples(value):
    """A function that writes a hundred samples, one of them this value."""
    wav = np.zeros(100, np.float32)
    wav[50] = value
    return lambda path: soundfile.write(path, wav, 8000, "FLOAT")


def half_a_header(path):
    soundfile.write(path, np.zeros(1000, np.float32), 8000)
    path.write_bytes(path.read_bytes()[:20])


BAD = {
    "nan.wav": samples(math.nan),
    "inf.wav": samples(math.inf),
    "none.wav": lambda path: soundfile.write(path, np.zeros(0, np.float32), 8000),
    "empty.wav": lambda path: path.write_bytes(b""),
    "text.mp3": lambda path: path.write_text("not music"),
    "header.wav": half_a_header,
    "folder.wav": lambda path: path.mkdir(),
    "link.wav": lambda path: path.symlink_to(path.with_name("gone.wav")),
    "x.raw": lambda path: path.write_bytes(b"12345678"),
    "absent.wav": lambda path: None,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_audio_is_named(name, tmp_path):
    BAD[name](tmp_path / name)
    with pytest.raises(UserError, match=name):
        read_audio(tmp_path / name, 16000, 1)


@pytest.mark.parametrize("start, duration", [(1.0, None), (0.0, 0.0), (1e9, 1.0), (-1.0, None), (0.0, -1.0)])
def test_parts_that_are_not_there(start, duration, tmp_path):
    soundfile.write(tmp_path / "good.wav", np.zeros(1000, np.float32), 8000)
    with pytest.raises(UserError, match="good.wav"):
        read_audio(tmp_path / "good.wav", 16000, 1, start, duration)


def test_a_name_that_no_file_has():
    with pytest.raises(UserError, match="NUL|no such"):
        read_audio("a\0b.wav", 16000, 1)


def test_a_header_that_lies_about_its_length_costs_nothing(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, wave(0.1, 8000)[0].numpy(), 8000)
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", 0x7ffffff0)  # the size of its samples
    path.write_bytes(data)
    assert read_audio(path, 8000, 1).shape[1] <= 800


@pytest.mark.parametrize("name, wav, rate", [
    ("x.txt", wave(0.1, 8000), 8000), ("x", wave(0.1, 8000), 8000),
    ("nan.wav", torch.full((1, 10), math.nan), 8000), ("file/x.wav", wave(0.1, 8000), 8000),
    ("x.mp3", wave(0.1, 8000), 12345)], ids=["suffix", "no suffix", "NaN", "no folder", "no rate of mp3"])
def test_waves_that_cannot_be_written(name, wav, rate, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=name):
        write_audio(tmp_path / name, wav, rate)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
