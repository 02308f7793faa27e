"""The caller's process and system: settings of torch, missing homes, closed streams, odd file systems.

    python -m pytest tests/test_process.py
"""
import contextlib
import errno
import fcntl
import io
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from commands import command, forked, preparing, refused, sampling, train_main, worked
from config import Config
from constants import RATE, ROOT, TRAIN, flags
from data import tunes
from data.audio import check_format, write_audio
from encodec import EncodecModel
from lm import LMModel
from sample import MusicGen
from speed.kernels import data_pointers, kernels
from system.command import run
from system.errors import UserError
from system.files import check_writable, write_atomic
from train import train
from training_runs import settings


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
    "loop": ("--loop --duration 0.3", "--loop: 0.3 s"),
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


# --- settings of torch that the caller has ----------------------------------------------------------------

@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "warnings are errors": warnings.catch_warnings,
}


def play(model):
    """Music with a melody at another rate and a prompt."""
    melody = 0.3 * np.random.default_rng(0).standard_normal((1, 3000))
    prompt = melody[:, :400].astype(np.float32)
    return model.generate(["a flute", None], [melody, None], RATE // 2, prompt, RATE, 0.2)


@pytest.fixture(scope="module", params=["float32", "int8"])
def model_and_music(world, request):
    model = MusicGen.from_pretrained(world / "lm", "cpu", request.param)
    return model, play(model)


def test_a_fork_after_a_generation_plays_with_one_thread(model_and_music):
    """As docs/troubleshooting.md has it: OpenMP's threads do not survive a fork."""
    model, music = model_and_music

    def child(argv):
        signal.alarm(120)       # instead of a wait without end
        torch.set_num_threads(1)
        print((play(model) - music).abs().max() < 1e-3)
    done = forked(child)
    worked(done)
    assert "True" in done.out


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_settings_change_no_music(world, model_and_music, setting):
    model, music = model_and_music
    with SETTINGS[setting]():
        if setting == "warnings are errors":
            warnings.simplefilter("error")
        before = torch.get_default_dtype(), torch.empty(0).device, torch.is_autocast_enabled("cpu")
        if setting == "float16" or setting == "another device":
            dtype = str(model.lm.lm_heads.weight.dtype).removeprefix("torch.")
            model = MusicGen.from_pretrained(world / "lm", "cpu", dtype)
        assert torch.equal(play(model), music)
        after = torch.get_default_dtype(), torch.empty(0).device, torch.is_autocast_enabled("cpu")
        assert after == before


def test_the_callers_random_numbers_stay(model_and_music):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    model, _ = model_and_music
    before = states()
    model.generate(["a flute"], duration=0.1)
    assert states() == before and torch.get_num_threads() == 1


def test_a_result_may_be_changed_and_trained_on(model_and_music):
    """Tensors of torch.inference_mode may not."""
    model, _ = model_and_music
    codes = model.generate_codes([None], duration=0.1)
    wav = model.decode(codes)
    wav *= 0.5
    codes += 0
    assert not wav.is_inference() and not codes.is_inference() and not wav.requires_grad


def test_training_is_the_same_whatever_the_caller_has_set(training_data, lm_run, tmp_path):
    with default_dtype(torch.float64), torch.autocast("cpu", torch.bfloat16):
        train(Config(**settings(training_data, tmp_path / "out", "lm")))
    expected, found = (load_file(out / "model.safetensors") for out in (lm_run, tmp_path / "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_was_loaded_in_inference_mode_can_be_trained(world):
    with torch.inference_mode():
        lm = LMModel.from_pretrained(world / "lm", torch.float32)
        codec = EncodecModel.from_pretrained(world / "codec")
    codes = torch.randint(lm.config.card, (1, lm.config.n_q, 20))
    lm.train().loss(codes, {"text": ["a flute"], "melody": [None]})[0].backward()
    reconstruction, _, commit = codec.train()(torch.randn(1, codec.channels, 400))
    (reconstruction.square().mean() + commit).backward()
    for module in (lm, codec):
        torch.optim.SGD(module.parameters(), 0.1).step()
        assert any(p.grad.abs().sum() > 0 for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("tensor", [torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.bfloat16),
                                    torch.zeros(8, device="meta"), torch.zeros(8, 2)[:, 0]])
def test_c_is_given_no_address_of_anything_else(tensor):
    with pytest.raises(TypeError, match="kernels.c"):
        data_pointers(torch.zeros(8), tensor)


# --- homes, streams, file systems, launchers --------------------------------------------------------------

def test_without_a_home(world, tmp_path, monkeypatch):
    """No HOME, no entry in the system's list of users: nowhere to keep the compiled kernels, but music."""
    def nobody(number):
        raise KeyError(number)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    kernels.cache_clear()
    try:
        worked(sampling(world, "--dtype", "int8", cwd=tmp_path))
        refused(sampling(world, "--checkpoint", "~/x", cwd=tmp_path), "~/x")
    finally:
        kernels.cache_clear()


@pytest.mark.parametrize("streams, code", [(">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 2),
                                           (">/dev/full 2>/dev/full", 2)])
def test_streams_that_are_closed_or_full(tmp_path, streams, code):
    line = f"{shlex.quote(sys.executable)} {ROOT / 'config.py'} {ROOT / 'config' / 'melody.py'} {streams}"
    result = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)
    assert result.returncode == code and "Traceback" not in result.stderr, result


def test_streams_of_a_notebook(monkeypatch):
    """They are no files, and none (pythonw) is none at all."""
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "stderr", None)
    assert run(lambda: print("done")) is None and printed.getvalue() == "done\n"


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EINVAL, errno.EPERM, errno.ENOSYS])
def test_a_file_system_without_locks_permissions_and_sync(world, tmp_path, monkeypatch, number):
    """Network drives, FAT, some FUSE: all is written all the same, and what is lost is said once."""
    def unsupported(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(os, "fsync", unsupported)
    monkeypatch.setattr(os, "chmod", unsupported)
    result = preparing(world, world / "audio", tmp_path / "out")
    worked(result)
    assert result.err.count("has no locks") == 1
    worked(sampling(world, "--out", tmp_path / "x.wav"))


def test_a_broken_disk_is_still_told(tmp_path, monkeypatch):
    def broken(_):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UserError, match="Input/output error"):
        write_atomic(tmp_path / "x", b"1")
    assert not list(tmp_path.iterdir())


def test_variables_of_a_launcher_that_is_not_there(world, training_data, tmp_path, monkeypatch):
    argv = flags(settings(training_data, tmp_path / "out", "lm", epochs=1, updates_per_epoch=1))
    monkeypatch.setenv("WORLD_SIZE", "8")
    says = "WORLD_SIZE = 8", "LOCAL_RANK", "torchrun", "unset"
    refused(command(train_main, *argv), *says)
    refused(preparing(world, world / "audio", tmp_path / "tokens"), *says)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    worked(preparing(world, world / "audio", tmp_path / "tokens"))
    worked(command(train_main, *argv))
