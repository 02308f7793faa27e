"""The training loop: equal on one process and several, exact when resumed, safe when it fails.

    python -m pytest tests/test_train.py
"""
import contextlib
import dataclasses
import functools
import json
import os
import re
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
from safetensors import safe_open
from safetensors.torch import load_file
from torch.amp import GradScaler

import train as training
from config import Config, UserError
from data.measures import frechet_distance, held_out
from data.segments import SPLITS, AudioCrops, TokenSegments, get_batch, spread
from encodec import EncodecModel
from lm import LMModel

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SHAPE = dict(sample_rate=1600, ratios=[4, 2], n_q=2, card=16, segment_duration=0.16, radix2_exp=6, device="cpu",
             seed=3)
CODEC = dict(SHAPE, task="codec", n_filters=4, dimension=4, lstm=1, kmeans_iters=3, batch_size=4, optim="adamw",
             lr=1e-3, max_norm=1.0, warmup=0, ema_every=1, adv=0.0, feat=0.0, mel_range=[4, 6], n_mels=4, epochs=1,
             updates_per_epoch=20, valid_every=7, valid_batches=1, save_every=4, log_every=1, sample_every=0)
LM = dict(SHAPE, task="lm", dim=16, num_heads=2, num_layers=2, delays=[0, 1], t5="bytes", t5_dim=8, t5_layers=1,
          t5_heads=2, stem="none", batch_size=4, epochs=1, updates_per_epoch=20, warmup=2, lr_min_ratio=0.5,
          ema_every=2, valid_every=7, valid_batches=1, save_every=5, log_every=1, sample_every=0,
          n_eval_wavs=4, top_k=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Recordings in `audio`, tokens as data/prepare.py writes them in `tokens`, and a codec for them in `codec`."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for n in range(6):
        path = root / "audio" / "deep" / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        seconds = np.arange(1600) / 1600
        tone = 0.3 * np.sin(2 * np.pi * 60 * (n + 2) * seconds)
        soundfile.write(path, tone + 0.01 * rng.standard_normal(1600), 1600)
    torch.manual_seed(0)
    EncodecModel(Config(**{**CODEC, "kmeans_init": False})).save(root / "codec")
    tracks, codes, chroma = [], [], []
    for n in range(9):
        frames = 40 if n else 5  # the first is too short for a segment
        tracks.append(dict(file=f"{n}.wav", shard=0, codes_start=sum(map(len, codes)), frames=frames,
                           weight=3.0 if n == 5 else 1.0, chroma_start=sum(map(len, chroma)),
                           chroma_frames=frames // 2,
                           meta=dict(description=f"tune {n}", key="c major", moods=["calm"])))
        codes.append(rng.integers(4, size=(frames, 2)).astype(np.uint16))
        chroma.append(rng.integers(12, size=frames // 2).astype(np.uint8))
    (root / "tokens").mkdir()
    np.concatenate(codes).tofile(root / "tokens" / "codes.00000.u16")
    np.concatenate(chroma).tofile(root / "tokens" / "chroma.00000.u8")
    index = dict(version=1, sample_rate=1600, channels=1, n_q=2, card=16, stride=8, n_chroma=12, radix2_exp=6, hop=16,
                 shards=1, tracks=tracks)
    (root / "tokens" / "index.json").write_text(json.dumps(index))
    return root


def settings(data, out, task, **changes):
    own = {"lm": dict(LM, data_dir=str(data / "tokens"), codec=str(data / "codec")),
           "codec": dict(CODEC, data_dir=str(data / "audio"))}
    return {**own[task], "out_dir": str(out), **changes}


def run_on_two_processes(runs: list[dict]):
    """All runs one after the other in one launch of two processes: starting Python is what takes time."""
    command = [*TORCHRUN, __file__, json.dumps(runs)]
    result = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def lines(out, split: str) -> list[dict]:
    every = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["split"] == split]


def losses(out) -> list[float]:
    return [line["loss"] for line in lines(out, "train")]


def weights(out) -> dict:
    return load_file(Path(out) / "model.safetensors")


def state(out) -> dict:
    return {name: t for name, t in load_file(Path(out) / "state.safetensors").items()}


def assert_same_run(a, b, tolerance: float):
    assert len(losses(a)) == len(losses(b))
    np.testing.assert_allclose(losses(a), losses(b), rtol=0, atol=tolerance + 1e-6)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


def assert_identical(a, b):
    ours, theirs = state(a), state(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))
    assert losses(a) == losses(b)


# --- one run, told in several ways --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lm_run(data, tmp_path_factory):
    """The reference: 20 updates on one process."""
    out = tmp_path_factory.mktemp("lm") / "out"
    training.train(Config(**settings(data, out, "lm")))
    return out


def test_lm_trains_and_writes_all_that_a_model_needs(lm_run, data):
    train, valid = lines(lm_run, "train"), lines(lm_run, "valid")
    assert [line["update"] for line in valid] == [7, 14, 20]
    assert {"own_loss", "ppl"} <= valid[0].keys() and abs(np.exp(valid[0]["loss"]) / valid[0]["ppl"] - 1) < 1e-4
    assert {"loss", "ce_1", "ce_2", "ppl", "ppl_1", "lr", "d_lr", "grad_norm", "tokens_per_s", "data_wait",
            "memory_gb"} <= train[0].keys()
    assert abs(train[3]["loss"] - (train[3]["ce_1"] + train[3]["ce_2"]) / 2) < 1e-5
    from sample import MusicGen
    model = MusicGen.from_pretrained(lm_run, "cpu")
    assert model.generate(["a tune"], duration=0.1).shape == (1, 1, 160)
    for name, tensor in state(lm_run).items():
        if name.startswith("ema."):
            torch.testing.assert_close(tensor, model.lm.state_dict()[name[4:]], msg=name)


ONE_PROCESS = {"accumulated": dict(grad_accum=2), "checkpointed": dict(checkpointing=True)}
TWO_PROCESSES = {"ddp": {}, "ddp, accumulated": dict(grad_accum=2), "fsdp": dict(sharding="fsdp", sample_every=20),
                 "fsdp, checkpointed": dict(sharding="fsdp", checkpointing=True, grad_accum=2)}
# a scale with which the first updates overflow: they are to be skipped by all processes, or none
OVERFLOWING = dict(dtype="float16", init_scale=2.0 ** 28)
IN_HALF = {"ddp, float16": OVERFLOWING, "fsdp, float16": dict(OVERFLOWING, sharding="fsdp"),
           "ddp, bfloat16": dict(dtype="bfloat16"), "fsdp, bfloat16": dict(dtype="bfloat16", sharding="fsdp")}
RESUMED = {name: dict(({**TWO_PROCESSES, **IN_HALF})[name], stop=8) for name in ("ddp", "fsdp", "ddp, float16", "fsdp, float16")}


SHARDS = hasattr(torch.cpu.Stream, "record_event")    # without it, as in torch 2.6, FSDP2 needs a GPU
needs_shards = pytest.mark.skipif(not SHARDS, reason="FSDP2 on the CPU needs a newer torch")


def by_name(names):
    return [pytest.param(name, marks=[needs_shards] * ("fsdp" in name)) for name in names]


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    runs = [settings(data, root / name, "lm", **changes) for name, changes in (TWO_PROCESSES | IN_HALF).items()]
    runs += [settings(data, root / f"{name}, resumed", "lm", **changes) for name, changes in RESUMED.items()]
    runs.append(settings(data, root / "codec", "codec", **CODEC_RUN))
    run_on_two_processes([run for run in runs if SHARDS or run.get("sharding") != "fsdp"])
    return root


@pytest.mark.parametrize("name", by_name(TWO_PROCESSES))
def test_lm_run_on_two_processes_equals_one(lm_run, two_processes, name):
    assert_same_run(lm_run, two_processes / name, 1e-5)


@needs_shards
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sharded_run_equals_ddp_in_half_precision(two_processes, dtype):
    assert_same_run(two_processes / f"ddp, {dtype}", two_processes / f"fsdp, {dtype}", 1e-5)


@pytest.mark.parametrize("name", by_name(RESUMED))
def test_two_processes_stopped_and_resumed_are_bit_identical(two_processes, name):
    assert_identical(two_processes / name, two_processes / f"{name}, resumed")


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_lm_run_is_the_same_when(lm_run, data, tmp_path, name):
    training.train(Config(**settings(data, tmp_path / "out", "lm", **ONE_PROCESS[name])))
    assert_same_run(lm_run, tmp_path / "out", 1e-5)


@pytest.mark.slow  # the compiler takes half a minute
def test_lm_run_is_the_same_compiled(lm_run, data, tmp_path):
    if not any(shutil.which(name) for name in ("g++", "clang++")):
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    two = {"ddp": {}, "fsdp": dict(sharding="fsdp"), "fsdp, checkpointed": dict(sharding="fsdp", checkpointing=True)}
    training.train(Config(**settings(data, tmp_path / "one", "lm", compile=True, checkpointing=True)))
    run_on_two_processes([settings(data, tmp_path / name, "lm", compile=True, **changes) for name, changes in two.items()])
    for name in ("one", *two):
        assert_same_run(lm_run, tmp_path / name, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_d_adaptation_in_half_precision_follows_float32(lm_run, data, tmp_path, dtype):
    changes = dict(dtype=dtype, grad_accum=2, sharding="ddp")
    training.train(Config(**settings(data, tmp_path / "out", "lm", **changes)))
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(lm_run), rtol=0.02)
    for key in ("grad_norm", "d_lr"):  # a gradient clipped before it was unscaled would show here
        ours, theirs = ([line[key] for line in lines(out, "train")] for out in (tmp_path / "out", lm_run))
        np.testing.assert_allclose(ours, theirs, rtol=0.1, atol=1e-7)


def test_optimizers_by_name_all_learn(data, tmp_path):
    for optim, lr in (("adamw", 3e-3), ("muon", 0.02)):
        training.train(Config(**settings(data, tmp_path / optim, "lm", optim=optim, lr=lr)))
        assert losses(tmp_path / optim)[-1] < losses(tmp_path / optim)[0] - 0.3


# --- the codec ----------------------------------------------------------------------------------------------------

# everything at once: k-means start after 3 updates, discriminator, balancer, decoder alone from update 14 on
CODEC_RUN = dict(adv=1.0, feat=1.0, disc_filters=2, disc_windows=[64, 32], unquantised_steps=3, decoder_only_steps=6)


@pytest.fixture(scope="module")
def codec_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("codec") / "out"
    training.train(Config(**settings(data, out, "codec", sample_every=20, **CODEC_RUN)))
    return out


def test_codec_trains_and_writes_a_codec(codec_run, data):
    codec = EncodecModel.from_pretrained(codec_run)
    assert codec.decode(codec.encode(torch.randn(1, 1, 100))).shape == (1, 1, 104)
    first, last = lines(codec_run, "train")[0], lines(codec_run, "train")[-1]
    assert {"loss", "l1", "msspec", "adv", "feat", "disc"} <= first.keys() and first["commit"] == 0 < last["commit"]
    valid = lines(codec_run, "valid")[-1]
    assert len(valid["entropy"]) == len(valid["live"]) == 2 and abs(valid["kbps"] - 2 * 4 * 0.2) < 1e-6
    assert {p.name for p in (codec_run / "samples").iterdir()} == {"0_original.wav", "0_update0000020.wav"}


def test_codec_run_on_two_processes_equals_one(codec_run, two_processes):
    assert_same_run(codec_run, two_processes / "codec", 1e-5)


def test_the_last_part_trains_the_decoder_alone(data, tmp_path):
    config = Config(**settings(data, tmp_path / "out", "codec", **CODEC_RUN))
    stop_at(config, 14)
    averages = state(config.out_dir)
    training.train(config, resume=True)
    moved = {name.split(".")[1] for name, tensor in state(config.out_dir).items()
             if name.startswith("model.") and not torch.equal(tensor, averages["ema." + name[6:]])}
    assert moved == {"decoder"}, "from update 14 on, encoder and codebooks stay what their averages were"


# --- interrupted runs ---------------------------------------------------------------------------------------------


def stop_at(config, update: int, resume=False):
    """Trains for so many updates, as if Ctrl-C had been pressed then."""
    class AskedAt:
        calls = 0

        def __bool__(self):
            self.calls += 1
            return self.calls >= update
    training.train(config, resume, interrupted=AskedAt())


def in_a_fork(config, seconds=None, *numbers):
    """Trains in a copy of this process and signals it some seconds after its next line of metrics: a moment counted
    from the start of the process would come before the first update on one machine and after the last on another."""
    metrics = Path(config.out_dir) / "metrics.jsonl"
    told = lambda: metrics.read_text().count('"train"') if metrics.exists() else 0
    told_before = told()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            training.main([f"--{key}={value}" for key, value in dataclasses.asdict(config).items()] + ["--resume"])
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    if seconds is not None:
        until = time.monotonic() + 60
        while told() <= told_before and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(seconds)
        for number in numbers or [signal.SIGKILL]:
            os.kill(child, number)
            time.sleep(0.003)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_often(config, reference, kills: int):
    """SIGKILL at random moments, --resume each time: nothing may be lost."""
    rng, killed = np.random.default_rng(7), 0
    for _ in range(kills):
        killed += in_a_fork(config, rng.uniform(0.0, 0.04)) == -signal.SIGKILL
    assert in_a_fork(config) == 0 and killed > kills / 3
    assert_identical(config.out_dir, reference)
    assert not list(Path(config.out_dir).glob(".writing-*"))


def test_lm_run_killed_and_resumed_is_bit_identical(lm_run, data, tmp_path):
    kill_often(Config(**settings(data, tmp_path / "out", "lm", save_every=1)), lm_run, 5)


def test_codec_run_killed_and_resumed_is_bit_identical(codec_run, data, tmp_path):
    config = Config(**settings(data, tmp_path / "out", "codec", sample_every=20, save_every=1, **CODEC_RUN))
    kill_often(config, codec_run, 5)


def test_a_run_killed_before_its_last_weights_were_written_is_completed(codec_run, data, tmp_path):
    shutil.copytree(codec_run, tmp_path / "out")
    for leftover in (tmp_path / "out" / "samples").iterdir():
        leftover.unlink()
    metrics = tmp_path / "out" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:-1]))  # the samples come last
    (tmp_path / "out" / "model.safetensors").unlink()
    config = Config(**settings(data, tmp_path / "out", "codec", sample_every=20, **CODEC_RUN))
    training.train(config, resume=True)
    assert all(torch.equal(t, weights(codec_run)[name]) for name, t in weights(config.out_dir).items())
    assert lines(config.out_dir, "samples") == lines(codec_run, "samples") != []
    assert (tmp_path / "out" / "samples" / "0_update0000020.wav").exists()


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]], ids=["alone", "torchrun"])
def test_ctrl_c_writes_a_checkpoint_and_ends(data, tmp_path, signals):
    """Under torchrun the terminal's SIGINT is followed by torchrun's own SIGTERM."""
    config = Config(**settings(data, tmp_path / "out", "lm", epochs=1000, save_every=0))
    assert in_a_fork(config, 0.1, *signals) == 130
    done = len(losses(config.out_dir))
    with safe_open(tmp_path / "out" / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["info"])["update"] == done > 0


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_the_other_ends_and_the_run_resumes(data, tmp_path):
    values = settings(data, tmp_path / "out", "lm", epochs=1000, save_every=5)
    command = [*TORCHRUN, str(ROOT / "train.py"), *(f"--{key}={value}" for key, value in values.items())]
    parent = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    state_file = tmp_path / "out" / "state.safetensors"
    while not state_file.exists() and parent.poll() is None:
        time.sleep(0.1)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    told, _ = parent.communicate(timeout=60)
    assert "another process of this run has ended" in told, told[-2000:]
    assert parent.returncode != 0 and not any(Path(f"/proc/{child}").exists() for child in children)
    config = Config(**{**values, "epochs": 1000})
    stop_at(config, 3, resume=True)
    assert len(losses(config.out_dir)) > 5


TINY = {"tiny_codec": dict(unquantised_steps=4, decoder_only_steps=5),
        "tiny": dict(codec=str(ROOT / "checkpoints" / "tiny" / "codec"))}


@pytest.mark.slow  # five minutes each
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_on_two_processes_killed_ten_times_loses_nothing(name, tmp_path):
    """The shipped configurations on real music: all processes killed at once, or one of them and torchrun does the rest."""
    python = lambda *argv: subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=ENV, check=True)
    python("data/tunes.py", "--clips", 1, 1, 0, "--out", tmp_path / "tunes")
    data_dir = tmp_path / "tunes"
    if name == "tiny":
        data_dir = tmp_path / "prepared"
        for split in ("train", "valid"):
            python("data/prepare.py", tmp_path / "tunes" / split, "--out", data_dir / split, "--config", "config/tiny.py",
                   "--codec", TINY[name]["codec"])

    def begin(out):
        values = dict(TINY[name], data_dir=data_dir, out_dir=out, epochs=1, updates_per_epoch=40, warmup=2, save_every=3,
                      valid_every=5, valid_batches=1, log_every=1)
        command = [*TORCHRUN, "train.py", f"config/{name}.py", *(f"--{key}={value}" for key, value in values.items()), "--resume"]
        return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert begin(tmp_path / "whole").wait(timeout=600) == 0
    metrics, rng, killed = tmp_path / "killed" / "metrics.jsonl", np.random.default_rng(1), 0
    written = lambda: metrics.stat().st_mtime_ns if metrics.exists() else 0
    for n in range(10):
        before, parent = written(), begin(tmp_path / "killed")
        while written() == before and parent.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 3))
        children = [int(child) for child in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        victims = [parent.pid, *children] if n % 2 else children and [children[rng.integers(len(children))]]
        for process in victims:     # none where the run has just come to its end
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        killed += parent.wait(timeout=120) != 0
        while any(Path(f"/proc/{child}").exists() for child in children):
            time.sleep(0.01)
    assert begin(tmp_path / "killed").wait(timeout=600) == 0 and killed > 4
    assert_identical(tmp_path / "killed", tmp_path / "whole")


def test_a_finished_run_is_not_overwritten(lm_run, data):
    before = weights(lm_run)
    with pytest.raises(UserError, match="--resume"):
        training.train(Config(**settings(data, lm_run, "lm")))
    training.train(Config(**settings(data, lm_run, "lm")), resume=True)  # nothing left to do
    assert all(torch.equal(before[name], t) for name, t in weights(lm_run).items())


def test_a_damaged_checkpoint_is_named(lm_run, data, tmp_path):
    shutil.copytree(lm_run, tmp_path / "out")
    path = tmp_path / "out" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="state.safetensors"):
        training.train(Config(**settings(data, tmp_path / "out", "lm")), resume=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(data, tmp_path, dtype):
    changes = dict(optim="adamw", warmup=0, save_every=1, dtype=dtype)
    config = Config(**settings(data, tmp_path / "out", "lm", **changes))
    config.lr = 1e30  # more than a configuration may say
    with pytest.raises(UserError, match=r"update 1: the loss is not finite.*\.wav at"):
        training.train(config)
    assert all(t.isfinite().all() for t in state(config.out_dir).values())
    report, = (tmp_path / "out" / "diagnosis").iterdir()
    assert load_file(report)["0.codes"].shape == (4, 2, 32)


@pytest.mark.parametrize("task, function, weight", [("lm", "loss", "heads"), ("codec", "discriminator_loss", "discriminator")])
def test_a_gradient_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(data, tmp_path, monkeypatch, task, function, weight):
    """The loss itself is finite: a square root at 0 is added to it, from the seventh call on."""
    owner = LMModel if task == "lm" else training
    loss, calls = getattr(owner, function), []

    def poisoned(*args):
        result = loss(*args)
        calls.append(args)
        if len(calls) < 7:
            return result
        if task == "lm":
            return result[0] + (0 * args[0].heads.weight).sum().sqrt(), result[1]
        return result + (0 * args[0][0][0]).sum().sqrt()  # logits of the first judge
    monkeypatch.setattr(owner, function, poisoned)
    config = Config(**settings(data, tmp_path / "out", task, save_every=1, valid_every=0, **(CODEC_RUN if task == "codec" else {})))
    with pytest.raises(UserError, match=r"update 6: the gradient is not finite.*\.wav at"):
        training.train(config)
    assert all(t.isfinite().all() for t in state(config.out_dir).values())
    report, = (tmp_path / "out" / "diagnosis").iterdir()
    with safe_open(report, "pt") as file:
        told = json.loads(file.metadata()["info"])
    assert told["update"] == 6 and told["not_finite"] and all(weight in name for name in told["not_finite"])


# --- data ---------------------------------------------------------------------------------------------------------


def test_segments_lie_where_codes_and_chroma_meet_and_follow_the_weights(data, tmp_path):
    config = Config(**settings(data, "out", "lm"))
    tokens = TokenSegments(config, "train")
    item = tokens.segment(tokens.tracks[0], 3 * tokens.grid)
    codes = np.fromfile(data / "tokens" / "codes.00000.u16", np.uint16).reshape(-1, 2)
    chroma = np.fromfile(data / "tokens" / "chroma.00000.u8", np.uint8)
    track = tokens.tracks[0]
    assert tokens.grid == 16
    assert sum(len(TokenSegments(config, split)) for split in SPLITS) == 8
    assert (item["codes"].T.numpy() == codes[track["codes_start"] + 6:][:32]).all()
    assert (item["chroma"].argmax(-1).numpy()[:10] == chroma[track["chroma_start"] + 3:][:10]).all()
    drawn = [tokens.item(np.random.default_rng([0, n]), True)["where"].split()[0] for n in range(600)]
    heavy = next(t["file"] for t in tokens.tracks if t["weight"] == 3.0)
    share = drawn.count(heavy) / 600
    assert abs(share - 3 / (len(tokens.tracks) + 2)) < 0.08


def test_items_depend_on_seed_update_and_number_alone(data):
    config = Config(**settings(data, "out", "lm"))
    tokens = TokenSegments(config, "train")
    whole = get_batch(tokens, config, 5)
    halves = [get_batch(tokens, dataclasses.replace(config, grad_accum=2), 5, micro) for micro in (0, 1)]
    assert torch.equal(whole["codes"], torch.cat([half["codes"] for half in halves]))
    assert whole["where"] == halves[0]["where"] + halves[1]["where"]
    assert whole["where"] != get_batch(tokens, config, 6)["where"]


def test_evaluation_never_conditions_a_track_on_itself(data, tmp_path):
    (tmp_path / "valid").symlink_to(data / "tokens")
    config = Config(**settings(data, "out", "lm", data_dir=str(tmp_path), n_eval_wavs=3))
    tokens = TokenSegments(config, "valid")
    chroma = {track["file"]: tokens.segment(track, 0)["chroma"] for track in tokens.tracks}
    pool = [chroma[track["file"]] for track in spread(tokens.tracks, 3)]
    seen = set()
    for update in range(20):
        batch = get_batch(tokens, config, update, split="valid")
        for n, where in enumerate(batch["where"]):
            own = chroma[where.split(" at ")[0]]
            same = [i for i, other in enumerate(pool) if torch.equal(batch["chroma"][n], other)]
            assert len(same) == 1 and pool[same[0]] is not own and batch["has_melody"][n]
            assert not where.endswith("at 0.000 s") or torch.equal(batch["own_chroma"][n], own)
            seen.add(same[0])
    assert seen == {0, 1, 2}
    items = held_out(tokens, 8)
    assert all(torch.equal(item["chroma"], items[(n + 1) % 8]["own_chroma"]) for n, item in enumerate(items))
    alone = TokenSegments(Config(**settings(data, "out", "lm")), "valid")  # the ninth part of nine tracks is one
    assert not get_batch(alone, config, 0, split="valid")["has_melody"].any()


def test_data_of_other_settings_are_refused(data):
    with pytest.raises(UserError, match="card = 16"):
        TokenSegments(Config(**settings(data, "out", "lm", card=32)), "train")
    with pytest.raises(UserError, match="segment_duration"):
        TokenSegments(Config(**settings(data, "out", "lm", segment_duration=10.0)), "train")
    with pytest.raises(UserError, match="no readable"):
        AudioCrops(Config(**settings(data, "out", "codec", data_dir="nowhere")), "train")


def test_melody_stems_are_no_recordings_of_their_own(data, tmp_path):
    shutil.copytree(data / "audio" / "deep", tmp_path / "train")
    shutil.copytree(data / "audio" / "deep", tmp_path / "train" / "melodies")
    crops = AudioCrops(Config(**settings(data, "out", "codec", data_dir=str(tmp_path))), "train")
    assert [path.parent.name for path in crops.paths] == 6 * ["train"]


# --- fine-tuning, plan, evaluation --------------------------------------------------------------------------------


def test_lora_trains_adapters_alone_and_merges_on_export(lm_run, data, tmp_path):
    changes = dict(init_from=str(lm_run), lora_rank=2, optim="adamw", lr=1e-2, dim=32)
    values = settings(data, tmp_path / "out", "lm", **changes)
    training.main([f"--{key}={value}" for key, value in values.items()])  # dim is the checkpoint's, whatever is asked
    start, tuned, exported = weights(lm_run), state(tmp_path / "out"), weights(tmp_path / "out")
    assert exported.keys() == start.keys()
    frozen = [name for name in tuned if name.startswith("model.") and not re.search(r"\.0\.|embed_tokens", name)]
    for name in frozen:
        assert torch.equal(tuned[name], start[name[6:].replace("parametrizations.weight.original", "weight")]), name
    assert all(".0." in name for name in tuned if name.startswith("optim.")), "states of adapters only"
    name = "layers.0.attn.qkv"
    up, down = (tuned[f"ema.{name}.parametrizations.weight.0.{key}"] for key in ("up", "down"))
    torch.testing.assert_close(exported[f"{name}.weight"], start[f"{name}.weight"] + 8.0 * up @ down)
    assert up.abs().max() > 0 and losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    LMModel.from_pretrained(tmp_path / "out")


def test_a_tuned_model_keeps_the_length_of_melodies_that_it_knows(lm_run, data, tmp_path):
    config = Config(**settings(data, tmp_path / "out", "lm", init_from=str(lm_run), segment_duration=0.08))
    assert Config.from_json(lm_run / "config.json").chroma_frames == 17
    assert config.chroma_frames == 9 and training.adopt(config).chroma_frames == 17


def test_a_tuned_model_takes_over_all_that_its_layers_depend_on(lm_run, data, tmp_path):
    """What no weight's shape tells: such a field changes what a model says, and must come from the checkpoint."""
    shutil.copytree(lm_run, tmp_path / "from")
    path = tmp_path / "from" / "config.json"
    other = dict(positional_embedding="sin_rope", positional_scale=0.1, max_period=500.0, num_heads=1, null_melody="c", pattern="parallel")
    assert all(value != getattr(Config(), key) for key, value in other.items())
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    adopted = training.adopt(Config(**settings(data, tmp_path / "out", "lm", init_from=str(tmp_path / "from"))))
    assert {key: getattr(adopted, key) for key in other} == other


def test_the_plan_of_the_melody_model_agrees_with_a_hand_calculation(capsys):
    """1,385.6 M weights: 48 layers of 12 D^2 + 4 D = 1,359.2 M; K (V + 1) D + K V D = 25.2 M; T5's 768 D + D and
    chroma's 12 D + D: 1.2 M. At 4 bytes 5.5 GB, three times that for m, v and s. 30 s are 1,500 frames.
    An item has S = 1,500 + 4 frames, 235 of melody, 64 of text, and keeps the input of every layer, 48 x 4 S D = 0.53 GB;
    one layer in full, (4 x 4 + 2 (5 + 8)) S D = 0.12 GB; logits four times, 0.20 GB. 24 items 20.3 GB, all 53.5 GB."""
    D, K, V = 1536, 4, 2048
    weights = 48 * (12 * D * D + 4 * D) + K * (V + 1) * D + K * V * D + 2 * D + (768 + 1) * D + (12 + 1) * D
    figures = training.plan(training.load([str(ROOT / "config" / "melody.py")]), processes=8, device_bytes=80e9)
    assert figures["parameters"] == figures["trained"] == weights
    assert figures["weights"] == figures["gradients"] == figures["ema"] == 4 * weights
    assert figures["optimizer"] == 12 * weights and figures["tokens_per_update"] == 192 * 4 * 1500
    S = 1500 + 4 + 235 + 64
    assert figures["activations"] == 24 * (48 * 4 * S * D + (16 + 26) * S * D + 4 * 4 * 1500 * K * V)
    assert 53.4e9 < figures["together"] < 53.6e9
    told = capsys.readouterr().out
    assert "1,385.6 M" in told and "it fits" in told


def test_evaluation_of_language_model_and_codec(lm_run, codec_run, data):
    figures = training.evaluate(Config(**settings(data, lm_run, "lm", n_eval_wavs=3)), "train")
    assert {"ppl_1", "ppl_2", "chroma_cosine", "chroma_agreement", "frechet"} <= figures.keys()
    assert figures == json.loads((lm_run / "eval_train.json").read_text()) and figures["frechet"] >= 0
    figures = training.evaluate(Config(**settings(data, codec_run, "codec")), "test")
    assert 0 <= figures["chroma_agreement"] <= 1 and figures["files"] == 1 and len(figures["perplexity"]) == 2


def test_frechet_distance_of_known_gaussians():
    x = np.random.default_rng(0).standard_normal((4000, 3))
    assert frechet_distance(x, x) < 1e-3
    assert abs(frechet_distance(x, 2 * x + [3, 0, 0]) - (9 + 3)) < 0.5


if __name__ == "__main__":
    for values in json.loads(sys.argv[1]):
        stop = values.pop("stop", None)
        torch.amp.GradScaler = functools.partial(GradScaler, init_scale=values.pop("init_scale", 2.0 ** 16))
        if stop:
            stop_at(Config(**values), stop)
        training.train(Config(**values), resume=bool(stop))
