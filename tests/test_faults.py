"""Faults: kills, full disks, Ctrl-C, lost processes. Files are whole or not there; what was finished stays.

    python -m pytest tests/test_faults.py               # a few kills of each kind
    python -m pytest -m slow tests/test_faults.py       # at every moment, 200 generations, 1,000 recordings:
                                                        # 5 minutes
"""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import config
import sample
import system.files
from commands import (command, exit_code, forked, killed_at, preparing, refused, sample_main, sampling,
                      snapshot, start, text_of, train_main, two_of, wait_until_written, worked)
from constants import RATE, ROOT, TRAIN, TRAIN_CODEC, flags, tone
from data import audio, prepare
from encodec import EncodecModel
from sampling import command as sampling_command
from system.errors import UserError
from system.files import write_atomic

resource = pytest.importorskip("resource", reason="Windows has no kills, forks and limits like these")


def check_whole(folder):
    """Reads all files of a folder to their ends, but for logs: a torn line is mended when a run goes on."""
    for path in Path(folder).rglob("*"):
        if path.is_dir() or path.name.startswith(".writing-"):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".npz":
            np.load(path)["codes"]
        elif path.suffix in audio.FORMATS:
            assert len(soundfile.read(path)[0]) > 0


def leftovers(folder) -> list:
    return list(Path(folder).rglob(".writing-*"))


def read_metrics(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def training(world, task: str) -> list[str]:
    """Flags of train.py for a few updates of the language model or the codec."""
    if task == "lm":
        return flags(TRAIN, data_dir=world / "tokens", codec=world / "codec")
    return flags(TRAIN_CODEC, data_dir=world / "audio")


def same_run(a, b):
    """Two runs of training ended with the same bits."""
    for name in ("state.safetensors", "model.safetensors"):
        one, other = load_file(Path(a) / name), load_file(Path(b) / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name

    def losses(out):
        return [(line["update"], line["loss"]) for line in read_metrics(out) if line["split"] == "train"]
    assert losses(a) == losses(b)


def same_data(a, b):
    """Two folders of prepared data hold the same tracks."""
    def data(out):
        index, codes = json.loads((Path(out) / "index.json").read_text()), []
        for n in range(index["shards"]):
            shard = np.fromfile(Path(out) / f"codes.{n:05d}.u16", np.uint16)
            codes.append(shard.reshape(-1, index["n_q"]))
        return {track["file"]: codes[track["shard"]][track["codes_start"]:][:track["frames"]].tobytes()
                for track in index["tracks"]}
    assert data(a) == data(b)


# --- one file ---------------------------------------------------------------------------------------------

def test_a_file_is_written_flushed_and_renamed_in_this_order(tmp_path, monkeypatch):
    done = []

    def noted(name):
        real = getattr(os, name)

        def call(*args):
            done.append(name)
            return real(*args)
        return call
    for name in ("fsync", "replace"):
        monkeypatch.setattr(system.files.os, name, noted(name))
    path = tmp_path / "new" / "x.json"
    write_atomic(path, b"{}")
    assert done[:2] == ["fsync", "replace"]
    assert path.read_bytes() == b"{}" and not leftovers(tmp_path)
    umask = os.umask(0o22)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "readable as other files are"


ERRORS = [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def content(temporary):
        Path(temporary).write_bytes(b"half of the new")
        raise error
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        write_atomic(path, content)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.bin"]


# --- no room ----------------------------------------------------------------------------------------------

def no_more_than(size: int):
    """Files may not grow beyond so many bytes: as a full disk, without one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextlib.contextmanager
def small_disk(path: Path, size: str):
    """A disk of its own. Only root may mount one."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


SIZES = [0, 30, 1000, 3000, 8000, 20_000, 60_000]      # bytes


@pytest.mark.parametrize("suffix", [".wav", ".ogg"])  # what is written at once, and what is encoded before
def test_sampling_without_room(world, tmp_path, suffix):
    out = tmp_path / f"x{suffix}"
    argv = ["--checkpoint", world / "lm", "--device", "cpu", "--out", out, "--save_codes", "--overwrite",
            "--duration", "0.5"]
    worked(command(sample_main, *argv))
    for size in SIZES:
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        result = forked(sample_main, *argv, "--seed", size, before=no_more_than(size))
        if result.code:
            refused(result, str(tmp_path))
            assert sum(path.read_bytes() != before[path] for path in before) < 3
        check_whole(tmp_path)
        assert not leftovers(tmp_path) and out.exists()
    assert result.code == 0, "the last size was enough"


@pytest.mark.parametrize("task", ["lm", "codec"])
def test_training_without_room_goes_on_when_there_is_some(world, tmp_path, task):
    argv, reference, out = training(world, task), tmp_path / "reference", tmp_path / "run"
    worked(forked(train_main, *argv, f"--out_dir={reference}"))
    for size in SIZES:
        result = forked(train_main, *argv, f"--out_dir={out}", "--resume", before=no_more_than(size))
        if result.code == 0:
            break
        assert result.code == 2 and "Traceback" not in result.err and str(out) in result.err, result
        check_whole(out)
        assert not leftovers(out)
    assert size > 1000
    worked(forked(train_main, *argv, f"--out_dir={out}", "--resume"))
    same_run(reference, out)


def test_preparing_without_room_goes_on_when_there_is_some(world, tmp_path):
    for size in (0, 100, 500, 1000, 2500):  # of these, settings, codes, the log and the index fail
        result = preparing(world, world / "audio", tmp_path / "out", run=forked, before=no_more_than(size))
        refused(result, str(tmp_path / "out"))
    worked(preparing(world, world / "audio", tmp_path / "out"))
    same_data(world / "tokens", tmp_path / "out")


def test_a_full_disk(world, tmp_path):
    """The real thing: ENOSPC, which comes later than a limit, when data are flushed."""
    with small_disk(tmp_path / "disk", "40k") as disk:
        refused(sampling(world, "--out", disk / "x.wav", "--duration", "4"), "x.wav")
        (disk / "filler").write_bytes(bytes(24_000))
        refused(preparing(world, world / "audio", disk / "out" / "deep"), str(disk))
        for task in ("lm", "codec"):
            result = forked(train_main, *training(world, task), f"--out_dir={disk / task}")
            assert result.code == 2 and "Traceback" not in result.err and "disk" in result.err, result
        check_whole(disk)
        assert not leftovers(disk)


def test_a_read_only_disk(world, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        shutil.copytree(world / "audio", disk / "audio")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(sampling(world, "--out", disk / "x.wav"), "x.wav")
        refused(sampling(world, "--export_hf", disk / "hf"), "hf")
        refused(preparing(world, disk / "audio", disk / "out"), "out")
        refused(forked(train_main, *training(world, "lm"), f"--out_dir={disk / 'run'}"), "run")
        refused(command(config.load, f"--out_dir={disk}", "--nonsense=1"), "nonsense")
        worked(preparing(world, disk / "audio", tmp_path / "out"))  # only reading needs no more than that


# --- SIGKILL at any moment --------------------------------------------------------------------------------

def kill_until_done(step: int, begin, check):
    """Starts a command again and again, killing it ever later, until one comes to its end.

    begin(before) starts it, check() is called after each. With a step of 1 every moment has its turn.
    """
    for killed in range(10 ** 6):
        code = exit_code(begin(1 + killed * step))
        check()
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert killed > 1


def kill_training(world, tmp_path, step, task):
    argv = [*training(world, task), "--updates_per_epoch=6", "--sample_every=3"]
    reference, out = tmp_path / "reference", tmp_path / "run"
    worked(forked(train_main, *argv, f"--out_dir={reference}"))

    def begin(moment):
        return start(train_main, *argv, f"--out_dir={out}", "--resume", before=killed_at(moment, out))
    kill_until_done(step, begin, lambda: check_whole(tmp_path))
    same_run(reference, out)
    assert not leftovers(out)


def kill_preparing(world, tmp_path, step):
    out = tmp_path / "out"

    def begin(moment):
        return preparing(world, world / "audio", out, run=start, before=killed_at(moment, out))
    kill_until_done(step, begin, lambda: check_whole(tmp_path))
    same_data(world / "tokens", out)


def kill_sampling(world, tmp_path, step):
    argv = ["--device", "cpu", "--checkpoint", world / "lm", "--text", "a", "--text", "b", "--text", "c",
            "--duration", "0.3", "--out", tmp_path / "x.flac", "--save_codes", "--overwrite"]

    def begin(moment):
        return start(sample_main, *argv, "--seed", moment, before=killed_at(moment, tmp_path))
    kill_until_done(step, begin, lambda: check_whole(tmp_path))
    assert len([path for path in tmp_path.iterdir() if not path.name.startswith(".writing-")]) == 9


KILLS = {  # what is killed: how, at every n-th moment in the quick tests
    "lm": (partial(kill_training, task="lm"), 25),
    "codec": (partial(kill_training, task="codec"), 25),
    "prepare": (kill_preparing, 10),
    "sample": (kill_sampling, 10),
}


@pytest.mark.parametrize("what", KILLS)
def test_a_few_kills(world, tmp_path, what):
    kill, step = KILLS[what]
    kill(world, tmp_path, step)


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("what", KILLS)
def test_kills_at_every_moment(world, tmp_path, what):
    kill, _ = KILLS[what]
    kill(world, tmp_path, 1)


def test_what_was_being_written_when_a_run_was_killed_is_gone_when_it_goes_on(world, tmp_path):
    out = tmp_path / "run"
    argv = [*training(world, "lm"), f"--out_dir={out}"]
    worked(forked(train_main, *argv, "--updates_per_epoch=1"))
    for folder in (out, out / "codec", out / "samples"):     # wherever a run writes
        folder.mkdir(exist_ok=True)
        (folder / ".writing-abc.json").write_bytes(b"half")
    worked(forked(train_main, *argv, "--updates_per_epoch=2", "--resume"))
    assert not leftovers(out)


# --- a process of several is lost -------------------------------------------------------------------------

@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_of_two_is_killed_the_other_ends_and_says_why(world, tmp_path, lost):
    out = tmp_path / "run"
    argv = [*training(world, "lm"), f"--out_dir={out}", "--updates_per_epoch=1000000"]
    with open(tmp_path / "0", "w+b") as zero, open(tmp_path / "1", "w+b") as one:
        pids = two_of(train_main, *argv, err=(zero, one))
        wait_until_written(out / "state.safetensors", pids[0])
        os.kill(pids[lost], signal.SIGKILL)
        codes = [exit_code(pid) for pid in pids]
        sentence = text_of((one, zero)[lost])
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 2, sentence
    assert "another process" in sentence and "--resume" in sentence and "Traceback" not in sentence
    check_whole(out)
    done = read_metrics(out)[-1]["update"]
    worked(forked(train_main, *argv, "--resume", f"--updates_per_epoch={done + 3}"))
    EncodecModel.from_pretrained(out)
    sample.MusicGen.from_pretrained(out, "cpu")


# --- Ctrl-C -----------------------------------------------------------------------------------------------

def press_ctrl_c_at(frame: int, times=1):
    """Ctrl-C is pressed when so many frames are sampled."""
    class Bar(sampling_command.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n >= frame and not hasattr(self, "pressed"):
                self.pressed = True
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
    return lambda: setattr(sampling_command, "tqdm", Bar)


@pytest.mark.parametrize("duration, frame", [(0.25, 30), (0.7, 30), (0.7, 170)])
def test_ctrl_c_keeps_what_is_finished_when_asked_to(world, tmp_path, duration, frame):
    argv = ["--checkpoint", world / "lm", "--device", "cpu", "--text", "a", "--text", "b",
            "--duration", duration, "--save_codes"]
    worked(command(sample_main, *argv, "--out", tmp_path / "whole.wav"))
    result = forked(sample_main, *argv, "--out", tmp_path / "part.wav", "--keep_partial",
                    before=press_ctrl_c_at(frame))
    assert result.code == 130 and "interrupted" in result.sentences[-1], result
    assert "Traceback" not in result.err
    for i in (0, 1):
        part, whole = (np.load(tmp_path / f"{name}_{i}.npz")["codes"] for name in ("part", "whole"))
        T = part.shape[1]
        assert T == frame and (part == whole[:, :T]).all()
        assert len(soundfile.read(tmp_path / f"part_{i}.wav")[0]) == T * 20
        assert "keep_partial" not in json.loads((tmp_path / f"part_{i}.json").read_text())["command"]
    assert not leftovers(tmp_path)


CTRL_C = {  # flags, at which frame, how often
    "not asked to": ([], 30, 1),
    "nothing finished": (["--keep_partial"], 0, 1),
    "twice": (["--keep_partial"], 30, 2),
}


@pytest.mark.parametrize("case", CTRL_C)
def test_ctrl_c_leaves_nothing_half_done(world, tmp_path, case):
    more, frame, times = CTRL_C[case]
    argv = ["--checkpoint", world / "lm", "--device", "cpu", "--duration", "0.25",
            "--out", tmp_path / "x.wav", *more]
    result = forked(sample_main, *argv, before=press_ctrl_c_at(frame, times))
    assert result.code in (2, 130) and "interrupted" in result.sentences[-1], result
    assert "Traceback" not in result.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["lm", "codec"])
def test_ctrl_c_ends_training_with_a_checkpoint(world, tmp_path, task):
    out = tmp_path / "run"
    argv = [*training(world, task), f"--out_dir={out}", "--updates_per_epoch=1000000", "--save_every=0"]
    with open(tmp_path / "err", "w+b") as err:
        pid = start(train_main, *argv, err=err)
        wait_until_written(out / "metrics.jsonl", pid)
        os.kill(pid, signal.SIGINT)
        assert exit_code(pid) == 130
        assert f"--resume goes on from {out}" in text_of(err).splitlines()[-1]
    check_whole(out)
    done = read_metrics(out)[-1]["update"]
    worked(forked(train_main, *argv, "--resume", f"--updates_per_epoch={done + 1}"))


def test_ctrl_c_in_preparing_goes_on_later(world, tmp_path):
    def interrupt_second():
        add, calls = prepare.Shard.add, []

        def press(*args, **more):
            add(*args, **more)
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
        prepare.Shard.add = press
    out = tmp_path / "out"
    result = preparing(world, world / "audio", out, run=forked, before=interrupt_second)
    assert result.code == 130 and result.sentences[-1] == "interrupted", result
    worked(preparing(world, world / "audio", out, run=forked))
    same_data(world / "tokens", out)


# --- reproducibility, and much of it ----------------------------------------------------------------------

def test_the_same_seed_gives_the_same_weights_and_another_one_others(world, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        worked(forked(train_main, *training(world, "lm"), f"--out_dir={tmp_path / name}", f"--seed={seed}"))
    same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        same_run(tmp_path / "a", tmp_path / "c")


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def soak(directory):
    """200 generations of lengths and conditions of all kinds; prints by how much memory grew.

    That is the mean of the last twenty over the mean of the twenty after the tenth.
    """
    model, rng, sizes = sample.MusicGen.from_pretrained(directory, "cpu"), np.random.default_rng(0), []
    for n in range(200):
        texts, melodies = [], []
        for _ in range(rng.integers(1, 4)):
            texts.append(None if rng.random() < 0.3 else "word " * int(rng.integers(0, 60)))
            wave = torch.from_numpy(tone(rng.uniform(0.01, 1.0), seed=n).T)
            melodies.append(None if rng.random() < 0.5 else wave)
        seeds = rng.integers(99, size=len(texts)).tolist()
        wav = model.generate(texts, melodies, duration=rng.uniform(0.02, 0.5), seeds=seeds,
                             guidance=float(rng.choice([0, 1, 3])), two_step=bool(rng.random() < 0.3),
                             top_k=int(rng.integers(0, 99)))
        assert wav.isfinite().all()
        sizes.append(memory())
    growth = sum(sizes[-20:]) / sum(sizes[10:30]) - 1
    print(f"{growth:.4f}", *(size >> 20 for size in sizes[::10]))


@pytest.mark.slow  # a minute
def test_two_hundred_generations_in_one_process(world):
    argv, env = [sys.executable, __file__, world / "lm"], {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout.split()[0]) < 0.02, result.stdout


def spoil(path: Path, kind: int):
    """Damages a wav file in one of five ways."""
    data = path.read_bytes()
    path.write_bytes([
        b"",
        data[:44],                              # the header alone
        b"not music",
        data[:22] + b"\0\0" + data[24:],        # of no channels
        os.urandom(500),
    ][kind])


@pytest.mark.slow  # a minute
def test_a_thousand_recordings_of_which_fifty_are_bad(world, tmp_path):
    folder, bad = tmp_path / "music", set()
    for n in range(1000):
        path = folder / f"{n // 100}" / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(0.1 + n % 7 / 50, seed=n), RATE)
        if n % 20 == 7:
            spoil(path, n // 20 % 5)
            bad.add(path.relative_to(folder).as_posix())
    out = tmp_path / "out"
    result = preparing(world, folder, out, seconds=900)
    assert result.code == 1 and "50 problems" in result.err
    tracks = {track["file"] for track in json.loads((out / "index.json").read_text())["tracks"]}
    named = {line.split(": ")[0] for line in (out / "skipped.txt").read_text().splitlines()}
    assert len(tracks) == 950 and named == bad and not tracks & bad
    before = snapshot(folder)
    assert preparing(world, folder, out, seconds=900).code == 1 and snapshot(folder) == before


if __name__ == "__main__":  # of its own, for what a process settles once and for all
    soak(sys.argv[1])
