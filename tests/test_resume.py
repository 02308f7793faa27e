"""Interrupted runs: stopped, killed, damaged. --resume loses nothing, bit for bit.

    python -m pytest tests/test_resume.py
    python -m pytest -m slow tests/test_resume.py       # on real music, by torchrun: 15 minutes
"""
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from commands import call, exit_code, killed_at, start, train_main, wait_until_written
from config import Config
from constants import ROOT, flags
from system.errors import UserError
from train import train
from training_runs import (ADVERSARIAL, ENV, RESUMED, SHARDS, TORCHRUN, assert_identical, lines, losses,
                           settings, stop_at, weights)


# --- stopped, killed --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_stopped_and_resumed_are_bit_identical(two_processes, name):
    if "fsdp" in name and not SHARDS:
        pytest.skip("FSDP2 on the CPU needs a newer torch")
    assert_identical(two_processes / name, two_processes / f"{name}, resumed")


def until_the_end(argv):
    """train.py as a command that keeps its handlers of signals as long as the process lives."""
    os._exit(call(train_main, argv))


def begin(config: Config, **options) -> int:
    """Trains in a copy of this process -> its pid."""
    return start(until_the_end, *flags(dataclasses.asdict(config)), "--resume", **options)


def kill_often(config: Config, reference):
    """SIGKILL ever later in the run, --resume each time: nothing may be lost."""
    for killed in range(100):
        code = exit_code(begin(config, before=killed_at(23 + 10 * killed, config.out_dir)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert killed > 2
    assert_identical(config.out_dir, reference)
    assert not list(Path(config.out_dir).glob(".writing-*"))


def test_lm_run_killed_and_resumed_is_bit_identical(lm_run, training_data, tmp_path):
    kill_often(Config(**settings(training_data, tmp_path / "out", "lm", save_every=1)), lm_run)


def test_codec_run_killed_and_resumed_is_bit_identical(codec_run, training_data, tmp_path):
    changes = dict(ADVERSARIAL, sample_every=20, save_every=1)
    kill_often(Config(**settings(training_data, tmp_path / "out", "codec", **changes)), codec_run)


def test_a_run_killed_before_its_last_weights_were_written_is_completed(codec_run, training_data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(codec_run, out)
    for leftover in (out / "samples").iterdir():
        leftover.unlink()
    metrics = out / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:-1]))  # the samples come last
    (out / "model.safetensors").unlink()
    train(Config(**settings(training_data, out, "codec", sample_every=20, **ADVERSARIAL)), resume=True)
    assert all(torch.equal(t, weights(codec_run)[name]) for name, t in weights(out).items())
    assert lines(out, "samples") == lines(codec_run, "samples") != []
    assert (out / "samples" / "0_update0000020.wav").exists()


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]],
                         ids=["alone", "torchrun"])
def test_ctrl_c_writes_a_checkpoint_and_ends(training_data, tmp_path, signals):
    """Under torchrun the terminal's SIGINT is followed by torchrun's own SIGTERM."""
    config = Config(**settings(training_data, tmp_path / "out", "lm", epochs=1000, save_every=0))
    child = begin(config)
    wait_until_written(tmp_path / "out" / "metrics.jsonl", child)
    for number in signals:
        os.kill(child, number)
        time.sleep(0.003)
    assert exit_code(child) == 130
    done = len(losses(config.out_dir))
    with safe_open(tmp_path / "out" / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["info"])["update"] == done > 0


def test_a_finished_run_is_not_overwritten(lm_run, training_data):
    before = weights(lm_run)
    config = Config(**settings(training_data, lm_run, "lm"))
    with pytest.raises(UserError, match="--resume"):
        train(config)
    train(config, resume=True)  # nothing left to do
    assert all(torch.equal(before[name], t) for name, t in weights(lm_run).items())


def test_a_damaged_checkpoint_is_named(lm_run, training_data, tmp_path):
    shutil.copytree(lm_run, tmp_path / "out")
    path = tmp_path / "out" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="state.safetensors"):
        train(Config(**settings(training_data, tmp_path / "out", "lm")), resume=True)


# --- under torchrun ---------------------------------------------------------------------------------------

def children_of(parent: subprocess.Popen) -> list[int]:
    tasks = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    return [int(child) for child in tasks.read_text().split()]


def alive(pids: list[int]) -> bool:
    return any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_the_other_ends_and_the_run_resumes(training_data, tmp_path):
    values = settings(training_data, tmp_path / "out", "lm", epochs=1000, save_every=5)
    parent = subprocess.Popen([*TORCHRUN, str(ROOT / "train.py"), *flags(values)], env=ENV,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    state_file = tmp_path / "out" / "state.safetensors"
    while not state_file.exists() and parent.poll() is None:
        time.sleep(0.1)
    children = children_of(parent)
    os.kill(children[1], signal.SIGKILL)
    output, _ = parent.communicate(timeout=60)
    assert "another process of this run has ended" in output, output[-2000:]
    assert parent.returncode != 0 and not alive(children)
    config = Config(**values)
    stop_at(config, 3, resume=True)
    assert len(losses(config.out_dir)) > 5


TINY_CODEC = ROOT / "checkpoints" / "tiny" / "codec"
TINY = {"tiny_codec": dict(unquantised=0.1), "tiny": dict(codec=TINY_CODEC)}


def python(*argv):
    subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=ENV, check=True)


def write_tunes(name: str, folder: Path) -> Path:
    """A few tunes as the configuration `name` trains on them: recordings, or prepared. -> the folder"""
    python("data/tunes.py", "--clips", 1, 1, 0, "--out", folder / "tunes")
    if name == "tiny_codec":
        return folder / "tunes"
    for split in ("train", "valid"):
        python("data/prepare.py", folder / "tunes" / split, "--out", folder / "prepared" / split,
               "--config", "config/tiny.py", "--codec", TINY_CODEC)
    return folder / "prepared"


@pytest.mark.slow  # five minutes each
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_on_two_processes_killed_ten_times_loses_nothing(name, tmp_path):
    """The shipped configurations on real music. All processes are killed at once, or one of the two and
    torchrun does the rest."""
    values = dict(TINY[name], data_dir=write_tunes(name, tmp_path), epochs=1, updates_per_epoch=40, warmup=2,
                  save_every=3, valid_every=5, valid_batches=1, log_every=1)

    def begin(out):
        command = [*TORCHRUN, "train.py", f"config/{name}.py", *flags(values, out_dir=out), "--resume"]
        return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)

    assert begin(tmp_path / "whole").wait(timeout=600) == 0
    metrics, rng, killed = tmp_path / "killed" / "metrics.jsonl", np.random.default_rng(1), 0

    def written():
        return metrics.stat().st_mtime_ns if metrics.exists() else 0
    for n in range(10):
        before, parent = written(), begin(tmp_path / "killed")
        while written() == before and parent.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3))
        children = children_of(parent)
        if n % 2:
            victims = [parent.pid, *children]
        else:
            victims = children and [children[rng.integers(len(children))]]
        for process in victims:     # none where the run has just come to its end
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        killed += parent.wait(timeout=120) != 0
        while alive(children):
            time.sleep(0.01)
    assert begin(tmp_path / "killed").wait(timeout=600) == 0 and killed > 4
    assert_identical(tmp_path / "killed", tmp_path / "whole")
