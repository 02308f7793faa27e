"""The caller's process and system: settings of torch, missing homes, closed streams, odd file systems.

    python -m pytest tests/test_process.py
"""
import json
import shlex

import pytest
import soundfile
import torch

from commands import command, preparing, refused, sampling, train_main
from constants import TRAIN, flags
from data import tunes
from data.audio import check_format, write_audio
from sample import MusicGen
from system.errors import UserError
from system.files import check_writable


# --- cheap checks come before dear work -------------------------------------------------------------------

BEFORE_THE_MODEL = {    # flags of sample.py, what the sentence names
    "melody": ("--melody missing.wav", "missing.wav"),
    "second melody": ("--melody 0.wav --melody missing.wav --text a --text b", "missing.wav"),
    "no recording": ("--melody take.npz", "ffmpeg -i take.npz take.flac"),
    "prompt": ("--prompt missing.wav", "missing.wav"),
    "codes": ("--continue_from missing.npz", "missing.npz"),
    "no codes": ("--continue_from 0.wav", "0.wav"),
    "name": (f"--out {'x' * 251}.wav", "x.json: cannot be written (File name too long"),
    "folder's name": (f"--out {'x' * 256}/y.wav", "too long"),
    "file for a folder": ("--out 0.wav/y.wav", "0.wav/y.wav"),
    "folder for a file": ("--out folder.wav --overwrite", "folder.wav"),
    "ending": ("--out y.m4a", "ffmpeg -i X.flac X.m4a"),
    "rate": ("--out y.mp3 --checkpoint odd", "2000 Hz"),
    "page": ("--page 0.wav/page", "0.wav/page"),
    "export": ("--export 0.wav/x", "0.wav/x"),
    "export for transformers": ("--export_hf 0.wav/x", "0.wav/x"),
}


@pytest.fixture()
def never_loaded(monkeypatch):
    """Whoever loads a model fails, with no sentence."""
    def load(*_):
        raise AssertionError("the model was loaded")
    monkeypatch.setattr(MusicGen, "from_pretrained", load)


@pytest.mark.parametrize("what", BEFORE_THE_MODEL)
def test_what_is_told_before_a_model_is_loaded(world, tmp_path, never_loaded, what):
    argv, says = BEFORE_THE_MODEL[what]
    (tmp_path / "0.wav").write_bytes((world / "audio" / "0.wav").read_bytes())
    (tmp_path / "take.npz").write_bytes((world / "take.npz").read_bytes())
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "odd").mkdir()
    config = json.loads((world / "lm" / "config.json").read_text()) | {"sample_rate": 2000}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    refused(sampling(world, *shlex.split(argv), cwd=tmp_path), says)
    assert len(list(tmp_path.iterdir())) == 4


def test_other_commands_look_where_they_will_write_first(world, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    refused(preparing(world, tmp_path / "no folder of recordings", file / "out"), "file/out")
    argv = flags(TRAIN, data_dir="missing", codec="missing", out_dir=file / "run")
    refused(command(train_main, *argv, cwd=tmp_path), "file/run")
    refused(command(tunes.main, "--out", file / "tunes"), "file/tunes")
    refused(command(tunes.main, "--one", "Ode to Joy", "--to", file / "x.wav"), "file/x.wav")


def test_a_place_to_write_is_looked_at_and_left_as_it_is(tmp_path):
    check_writable(tmp_path / "a" / "b" / "c.wav")
    assert not list(tmp_path.iterdir())
    (tmp_path / "c.wav").write_text("")
    check_writable(tmp_path / "c.wav")


@pytest.mark.parametrize("name, rate", [("x.mp3", 2000), ("x.mp3", 96_000), ("x.ogg", 200_001),
                                        ("x.flac", 700_000), ("x.m4a", 32_000), ("x", 32_000)])
def test_rates_that_a_format_does_not_have(tmp_path, name, rate):
    """libsndfile's writer of ogg ends the process beyond 200 kHz."""
    with pytest.raises(UserError, match=name):
        check_format(name, rate)
    with pytest.raises(UserError, match=name):
        write_audio(tmp_path / name, torch.zeros(1, 100), rate)


@pytest.mark.parametrize("name, rate", [("x.mp3", 8000), ("x.mp3", 48_000), ("x.ogg", 1000),
                                        ("x.ogg", 200_000), ("x.flac", 96_000), ("x.wav", 400_000)])
def test_rates_that_a_format_has(tmp_path, name, rate):
    write_audio(tmp_path / name, torch.zeros(1, 5000), rate)
    assert soundfile.info(tmp_path / name).samplerate == rate
