"""Faults: kills, full disks, Ctrl-C, lost processes. Every file is whole or not there, and what was finished stays.

    python -m pytest tests/test_faults.py               # a few kills of each kind
    python -m pytest -m slow tests/test_faults.py       # more than fifty, 200 generations, 1,000 recordings: 5 minutes
"""
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import config as C
import encodec
import prepare
import sample as S
import train
from config import UserError, write_atomic
from data import audio
from helpers import (RATE, ROOT, TRAIN, TRAIN_CODEC, command, flags, forked, preparing, refused, sampling, snapshot, start, text_of, tone, two_of,
                     worked, world)  # noqa: F401


def check_whole(folder):
    """Reads all files of a folder to their ends; lines of a log may be torn, for they are mended when it goes on."""
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


# --- one file ---------------------------------------------------------------------------------------------------------

def test_a_file_is_written_flushed_and_renamed_in_this_order(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(C.os, name, lambda *args, name=name, real=getattr(os, name): done.append(name) or real(*args))
    write_atomic(tmp_path / "new" / "x.json", b"{}")
    assert done[:2] == ["fsync", "replace"] and (tmp_path / "new" / "x.json").read_bytes() == b"{}" and not leftovers(tmp_path)
    assert (tmp_path / "new" / "x.json").stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22)), "readable as other files are"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")], ids=repr)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def content(temporary):
        Path(temporary).write_bytes(b"half of the new")
        raise error
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        write_atomic(path, content)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.bin"]


# --- no room ------------------------------------------------------------------------------------------------------------

def no_more_than(size: int):
    """Files may not grow beyond so many bytes: as a full disk, without one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextlib.contextmanager
def small_disk(path: Path, size: str):
    """A disk of its own. Only root may mount one."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


SIZES = [0, 30, 1000, 3000, 8000, 20_000, 60_000]


@pytest.mark.parametrize("suffix", [".wav", ".ogg"])  # what is written at once, and what is encoded before
def test_sampling_without_room(world, tmp_path, suffix):  # noqa: F811
    argv = ["--out", tmp_path / f"x{suffix}", "--save_codes", "--overwrite", "--duration", "0.5"]
    worked(sampling(world, *argv))
    for size in SIZES:
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        argv = [str(arg) for arg in (*argv, "--seed", size)]
        result = forked(S.main, "--device", "cpu", "--checkpoint", world / "lm", *argv, before=no_more_than(size))
        if result.code:
            refused(result, str(tmp_path))
        check_whole(tmp_path)
        assert not leftovers(tmp_path) and (tmp_path / f"x{suffix}").exists()
        assert result.code == 0 or sum(path.read_bytes() != before[path] for path in before) < 3
    assert result.code == 0, "the last size was enough"


@pytest.mark.parametrize("task", ["lm", "codec"])
def test_training_without_room_goes_on_when_there_is_some(world, tmp_path, task):  # noqa: F811
    argv = flags(TRAIN, data_dir=world / "tokens", codec=world / "codec") if task == "lm" else flags(TRAIN_CODEC, data_dir=world / "audio")
    worked(forked(train.main, *argv, f"--out_dir={tmp_path / 'reference'}"))
    out = tmp_path / "run"
    for size in SIZES:
        result = forked(train.main, *argv, f"--out_dir={out}", "--resume", before=no_more_than(size))
        if result.code == 0:
            break
        assert result.code == 2 and "Traceback" not in result.err and str(out) in result.err, result
        check_whole(out)
        assert not leftovers(out)
    assert size > 1000
    worked(forked(train.main, *argv, f"--out_dir={out}", "--resume"))
    same_run(tmp_path / "reference", out)


def test_preparing_without_room_goes_on_when_there_is_some(world, tmp_path):  # noqa: F811
    for size in (0, 100, 500, 1000, 2500):  # of these, settings, codes, the log and the index fail
        result = preparing(world, world / "audio", tmp_path / "out", run=forked, before=no_more_than(size))
        refused(result, str(tmp_path / "out"))
    worked(preparing(world, world / "audio", tmp_path / "out"))
    same_data(world / "tokens", tmp_path / "out")


def test_a_full_disk(world, tmp_path):  # noqa: F811
    """The real thing: ENOSPC, which comes later than a limit, when data are flushed."""
    with small_disk(tmp_path / "disk", "40k") as disk:
        refused(sampling(world, "--out", disk / "x.wav", "--duration", "4"), "x.wav")
        (disk / "filler").write_bytes(bytes(24_000))
        refused(preparing(world, world / "audio", disk / "out" / "deep"), str(disk))
        for task, values, data in (("lm", TRAIN, "tokens"), ("codec", TRAIN_CODEC, "audio")):
            result = forked(train.main, *flags(values, data_dir=world / data, codec=world / "codec", out_dir=disk / task))
            assert result.code == 2 and "Traceback" not in result.err and "disk" in result.err, result
        check_whole(disk)
        assert not leftovers(disk)


def test_a_read_only_disk(world, tmp_path):  # noqa: F811
    with small_disk(tmp_path / "disk", "1m") as disk:
        shutil.copytree(world / "audio", disk / "audio")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(sampling(world, "--out", disk / "x.wav"), "x.wav")
        refused(sampling(world, "--export_hf", disk / "hf"), "hf")
        refused(preparing(world, disk / "audio", disk / "out"), "out")
        refused(forked(train.main, *flags(TRAIN, data_dir=world / "tokens", codec=world / "codec", out_dir=disk / "run")), "run")
        refused(command(C.load, f"--out_dir={disk}", "--nonsense=1"), "nonsense")
        worked(preparing(world, disk / "audio", tmp_path / "out"))  # only reading needs no more than that


# --- SIGKILL at random moments ----------------------------------------------------------------------------------------------

def same_run(a, b):
    """Two runs of training ended with the same bits."""
    for name in ("state.safetensors", "model.safetensors"):
        one, other = load_file(Path(a) / name), load_file(Path(b) / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    def losses(out):
        return [(line["update"], line["loss"]) for line in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines()) if line["split"] == "train"]
    assert losses(a) == losses(b)


def same_data(a, b):
    """Two folders of prepared data hold the same tracks."""
    def data(out):
        index = json.loads((Path(out) / "index.json").read_text())
        codes = {n: np.fromfile(Path(out) / f"codes.{n:05d}.u16", np.uint16).reshape(-1, index["n_q"]) for n in range(index["shards"])}
        return {track["file"]: codes[track["shard"]][track["codes_start"]:][:track["frames"]].tobytes() for track in index["tracks"]}
    assert data(a) == data(b)


def kill_until(done, begin, longest: float, kills: int, rng, check):
    """Starts a command again and again, killing it at random moments, until it was killed so often -> how often."""
    killed = 0
    while killed < kills:
        pid = begin()
        time.sleep(rng.uniform(0.01, longest))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        check()
        killed += code == -signal.SIGKILL
        if code == 0:
            done()
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)  # nobody is left of its group
    return killed


def kill_training(world, tmp_path, task, kills):  # noqa: F811
    argv = flags(TRAIN, data_dir=world / "tokens", codec=world / "codec") if task == "lm" else flags(TRAIN_CODEC, data_dir=world / "audio")
    argv += ["--updates_per_epoch=6", "--sample_every=3"]
    reference = forked(train.main, *argv, f"--out_dir={tmp_path / 'reference'}")
    worked(reference)
    out, compared = tmp_path / "run", 0

    def done():
        nonlocal compared
        same_run(tmp_path / "reference", out)
        compared += 1
        shutil.rmtree(out)
    kill_until(done, lambda: start(train.main, *argv, f"--out_dir={out}", "--resume"), reference.seconds, kills, np.random.default_rng(kills),
               lambda: out.exists() and check_whole(out))
    worked(forked(train.main, *argv, f"--out_dir={out}", "--resume"))
    same_run(tmp_path / "reference", out)
    assert not leftovers(out)


def kill_preparing(world, tmp_path, kills):  # noqa: F811
    argv = [world / "audio", "--out", tmp_path / "out", "--codec", world / "codec", "--radix2_exp", "8", "--stem", "none", "--device", "cpu"]
    reference = forked(prepare.main, *argv)
    worked(reference)
    shutil.rmtree(tmp_path / "out")

    def done():
        same_data(world / "tokens", tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    kill_until(done, lambda: start(prepare.main, *argv), reference.seconds, kills, np.random.default_rng(kills), lambda: check_whole(tmp_path))
    worked(forked(prepare.main, *argv))
    same_data(world / "tokens", tmp_path / "out")


def kill_sampling(world, tmp_path, kills):  # noqa: F811
    out, seed = tmp_path / "out", iter(range(10 ** 6))
    texts = [word for text in "abc" for word in ("--text", text)]
    argv = ["--device", "cpu", "--checkpoint", world / "lm", *texts, "--duration", "0.3", "--out", out / "x.flac", "--save_codes", "--overwrite"]
    reference = forked(S.main, *argv)
    worked(reference)
    kill_until(lambda: None, lambda: start(S.main, *argv, "--seed", next(seed)), reference.seconds, kills, np.random.default_rng(kills), lambda: check_whole(out))
    assert len([path for path in out.iterdir() if not path.name.startswith(".writing-")]) == 9


def test_a_few_kills(world, tmp_path):  # noqa: F811
    for name, kill in (("lm", 2), ("codec", 2)):
        (tmp_path / name).mkdir()
        kill_training(world, tmp_path / name, name, kill)
    for name, kill in (("prepare", kill_preparing), ("sample", kill_sampling)):
        (tmp_path / name).mkdir()
        kill(world, tmp_path / name, 1)


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("what", ["lm", "codec", "prepare", "sample"])
def test_many_kills(world, tmp_path, what):  # noqa: F811
    if what in ("lm", "codec"):
        kill_training(world, tmp_path, what, 16)
    else:
        (kill_preparing if what == "prepare" else kill_sampling)(world, tmp_path, 14)


def test_what_was_being_written_when_a_run_was_killed_is_gone_when_it_goes_on(world, tmp_path):  # noqa: F811
    argv = flags(TRAIN, data_dir=world / "tokens", codec=world / "codec", out_dir=tmp_path / "run")
    worked(forked(train.main, *argv, "--updates_per_epoch=1"))
    for folder in ("", "codec", "samples"):     # wherever a run writes
        (tmp_path / "run" / folder).mkdir(exist_ok=True)
        (tmp_path / "run" / folder / ".writing-abc.json").write_bytes(b"half")
    worked(forked(train.main, *argv, "--updates_per_epoch=2", "--resume"))
    assert not leftovers(tmp_path / "run")


# --- a process of several is lost ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_of_two_is_killed_the_other_ends_and_says_why(world, tmp_path, lost):  # noqa: F811
    out = tmp_path / "run"
    argv = flags(TRAIN, data_dir=world / "tokens", codec=world / "codec", out_dir=out, updates_per_epoch=10 ** 6)
    with open(tmp_path / "0", "w+b") as zero, open(tmp_path / "1", "w+b") as one:
        pids = two_of(train.main, *argv, err=(zero, one))
        deadline = time.monotonic() + 60
        while not (out / "state.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pids[lost], signal.SIGKILL)
        begun = time.monotonic()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        told = text_of((one, zero)[lost])
    assert time.monotonic() - begun < 60 and codes[lost] == -signal.SIGKILL and codes[1 - lost] == 2, told
    assert "another process of this run has ended" in told and "--resume" in told and "Traceback" not in told
    check_whole(out)
    before = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["update"]
    worked(forked(train.main, *argv, "--resume", f"--updates_per_epoch={before + 3}"))
    encodec.EncodecModel.from_pretrained(out), S.MusicGen.from_pretrained(out, "cpu")


# --- Ctrl-C ------------------------------------------------------------------------------------------------------------------------

def press_ctrl_c_at(frame: int, times=1):
    """Ctrl-C is pressed when so many frames are sampled."""
    class Bar(S.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n >= frame and not hasattr(self, "pressed"):
                self.pressed = True
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
    return lambda: setattr(S, "tqdm", Bar)


@pytest.mark.parametrize("duration, frame", [(0.25, 30), (0.7, 30), (0.7, 170)])
def test_ctrl_c_keeps_what_is_finished_when_asked_to(world, tmp_path, duration, frame):  # noqa: F811
    argv = ["--checkpoint", world / "lm", "--device", "cpu", "--text", "a", "--text", "b", "--duration", duration, "--save_codes"]
    worked(sampling(world, *argv, "--out", tmp_path / "whole.wav"))
    result = forked(S.main, *argv, "--out", tmp_path / "part.wav", "--keep_partial", before=press_ctrl_c_at(frame))
    assert result.code == 130 and "interrupted" in result.sentences[-1] and "Traceback" not in result.err, result
    for i in (0, 1):
        part, whole = (np.load(tmp_path / f"{name}_{i}.npz")["codes"] for name in ("part", "whole"))
        T = part.shape[1]
        assert frame - 4 <= T <= frame + 1 and (part == whole[:, :T]).all()
        assert len(soundfile.read(tmp_path / f"part_{i}.wav")[0]) == T * 20
        assert "keep_partial" not in json.loads((tmp_path / f"part_{i}.json").read_text())["command"]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("more, frame, times", [([], 30, 1), (["--keep_partial"], 0, 1), (["--keep_partial"], 30, 2)], ids=["not asked to", "nothing finished", "twice"])
def test_ctrl_c_leaves_nothing_half_done(world, tmp_path, more, frame, times):  # noqa: F811
    argv = ["--checkpoint", world / "lm", "--device", "cpu", "--duration", "0.25", "--out", tmp_path / "x.wav", *more]
    result = forked(S.main, *argv, before=press_ctrl_c_at(frame, times))
    assert result.code in (2, 130) and "interrupted" in result.sentences[-1] and "Traceback" not in result.err, result
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["lm", "codec"])
def test_ctrl_c_ends_training_with_a_checkpoint(world, tmp_path, task):  # noqa: F811
    out = tmp_path / "run"
    argv = flags(TRAIN if task == "lm" else TRAIN_CODEC, data_dir=world / ("tokens" if task == "lm" else "audio"), codec=world / "codec",
                 out_dir=out, updates_per_epoch=10 ** 6, save_every=0)
    with open(tmp_path / "err", "w+b") as err:
        pid = start(train.main, *argv, err=err)
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            time.sleep(0.02)
        os.kill(pid, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
        assert "stopped as asked" in text_of(err).splitlines()[-1]
    check_whole(out)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["update"]
    worked(forked(train.main, *argv, "--resume", f"--updates_per_epoch={last + 1}"))


def test_ctrl_c_in_preparing_goes_on_later(world, tmp_path):  # noqa: F811
    argv = [world / "audio", "--out", tmp_path / "out", "--codec", world / "codec", "--radix2_exp", "8", "--stem", "none", "--device", "cpu"]

    def interrupt_second():
        add, calls = prepare.Shard.add, []
        prepare.Shard.add = lambda *args, **more: (calls.append(1), add(*args, **more), len(calls) == 2 and os.kill(os.getpid(), signal.SIGINT))
    result = forked(prepare.main, *argv, before=interrupt_second)
    assert result.code == 130 and result.sentences[-1] == "interrupted", result
    worked(forked(prepare.main, *argv))
    same_data(world / "tokens", tmp_path / "out")


# --- the same again, and much of it ------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_weights_and_another_one_others(world, tmp_path):  # noqa: F811
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        worked(forked(train.main, *flags(TRAIN, data_dir=world / "tokens", codec=world / "codec", out_dir=tmp_path / name, seed=seed)))
    same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        same_run(tmp_path / "a", tmp_path / "c")


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def soak(directory):
    """200 generations of lengths and conditions of all kinds; prints by how much memory grew: the last twenty's mean
    over the mean of the twenty after the tenth."""
    model, rng, sizes = S.MusicGen.from_pretrained(directory, "cpu"), np.random.default_rng(0), []
    for n in range(200):
        B = int(rng.integers(1, 4))
        texts = [None if rng.random() < 0.3 else "word " * int(rng.integers(0, 60)) for _ in range(B)]
        melodies = [None if rng.random() < 0.5 else torch.from_numpy(tone(rng.uniform(0.01, 1.0), seed=n).T) for _ in range(B)]
        wav = model.generate(texts, melodies, duration=rng.uniform(0.02, 0.5), seeds=rng.integers(99, size=B).tolist(),
                             guidance=float(rng.choice([0, 1, 3])), two_step=bool(rng.random() < 0.3), top_k=int(rng.integers(0, 99)))
        assert wav.isfinite().all()
        sizes.append(rss())
    print(f"{sum(sizes[-20:]) / sum(sizes[10:30]) - 1:.4f}", *(size >> 20 for size in sizes[::10]))


@pytest.mark.slow  # a minute
def test_two_hundred_generations_in_one_process(world):  # noqa: F811
    result = subprocess.run([sys.executable, __file__, world / "lm"], cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'data'}"},
                            capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout.split()[0]) < 0.02, result.stdout


@pytest.mark.slow  # a minute
def test_a_thousand_recordings_of_which_fifty_are_bad(world, tmp_path):  # noqa: F811
    folder, bad = tmp_path / "music", set()
    for n in range(1000):
        path = folder / f"{n // 100}" / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(0.1 + n % 7 / 50, seed=n), RATE)
        if n % 20 == 7:
            data, kind = path.read_bytes(), n // 20 % 5
            path.write_bytes([b"", data[:44], b"not music", data[:22] + b"\0\0" + data[24:], os.urandom(500)][kind])
            bad.add(path.relative_to(folder).as_posix())
    result = preparing(world, folder, tmp_path / "out", seconds=900)
    assert result.code == 1 and "50 problems" in result.err
    tracks = {track["file"] for track in json.loads((tmp_path / "out" / "index.json").read_text())["tracks"]}
    named = {line.split(": ")[0] for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines()}
    assert len(tracks) == 950 and named == bad and not tracks & bad
    before = snapshot(folder)
    assert preparing(world, folder, tmp_path / "out", seconds=900).code == 1 and snapshot(folder) == before


if __name__ == "__main__":  # of its own, for what a process settles once and for all
    soak(sys.argv[1])
