"""What data/prepare.py says of recordings that it can read, but that are not what they should be.

    python -m pytest tests/test_health.py
"""
import json

import numpy as np
import pytest
import soundfile

from commands import preparing
from constants import LM, RATE, tone
from damage import encoded

TONE = tone(0.6)
POOR = {    # (samples, what the note says)
    "antiphase.wav": (np.concatenate([TONE, -TONE], 1), "cancel"),
    "nearly antiphase.wav": (np.concatenate([TONE, -0.999 * TONE], 1), "cancel"),
    "integers.wav": (20000 * TONE, "32768"),
    "silent.wav": (0 * TONE, "silent"),
    "nearly silent.wav": (1e-4 * TONE, "silent"),
}


@pytest.mark.parametrize("name", POOR)
def test_useless_recordings_are_named(world, tmp_path, name):
    (tmp_path / "music").mkdir()
    samples, word = POOR[name]
    soundfile.write(tmp_path / "music" / name, samples, RATE, "FLOAT")
    soundfile.write(tmp_path / "music" / "good.wav", TONE, RATE)
    for _ in range(2):      # the second time there is nothing left to do, but it is still said
        result = preparing(world, tmp_path / "music", tmp_path / "out")
        assert result.code == 0 and f"{name}: " in result.err
        notes = (tmp_path / "out" / "notes.txt").read_text().splitlines()
        assert [line for line in notes if line.startswith(f"{name}: ") and word in line]
        assert not [line for line in notes if "good.wav" in line and word in line]
        index = json.loads((tmp_path / "out" / "index.json").read_text())
        assert len(index["tracks"]) == 2 and all("notes" not in track for track in index["tracks"])


def test_an_early_end_is_told(world, tmp_path):
    (tmp_path / "music").mkdir()
    data = encoded("WAV", seconds=1.0)
    (tmp_path / "music" / "cut.wav").write_bytes(data[:len(data) // 2])
    result = preparing(world, tmp_path / "music", tmp_path / "out")
    assert result.code == 0 and "cut.wav: 0.50 s were read; " in result.err
    assert "cut.wav: 0.50 s were read; " in (tmp_path / "out" / "notes.txt").read_text()


def test_recordings_shorter_than_a_segment_are_named(world, tmp_path):
    (tmp_path / "music").mkdir()
    for name, seconds in (("long.wav", 0.6), ("exact.wav", 0.5), ("short.wav", 0.4)):
        soundfile.write(tmp_path / "music" / name, tone(seconds), RATE)
    result = preparing(world, tmp_path / "music", tmp_path / "out")
    assert "long.wav: its 0.60 s are less than segment_duration = 30" in result.err
    values = LM | dict(segment_duration=0.5)
    lines = [f"{key} = {value!r}" for key, value in values.items()]
    (tmp_path / "config.py").write_text("\n".join(lines) + "\n")
    result = preparing(world, tmp_path / "music", tmp_path / "again", "--config", tmp_path / "config.py")
    assert result.code == 0 and "short.wav: its 0.40 s" in result.err
    notes = (tmp_path / "again" / "notes.txt").read_text()
    assert "exact.wav" not in notes and "long.wav" not in notes
