"""Runs of training that several tests share: their settings and data, what they leave, how to stop them.

    torchrun --nproc_per_node=2 tests/training_runs.py '[{"out_dir": ...}, ...]'    # as the tests start it

The runs of the reference take 20 updates on one process. All others must come to the same weights: on two
processes, sharded, in micro-batches, stopped and resumed.
"""
import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

import train
from config import Config
from constants import ROOT
from encodec import EncodecModel

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# --- settings ---------------------------------------------------------------------------------------------

SHAPE = dict(sample_rate=1600, ratios=[4, 2], n_q=2, card=16, segment_duration=0.16, radix2_exp=6, seed=3,
             device="cpu")
LOOP = dict(batch_size=4, epochs=1, updates_per_epoch=20, valid_every=7, valid_batches=1, log_every=1,
            sample_every=0)
LM_RUN = SHAPE | LOOP | dict(
    task="lm", dim=16, num_heads=2, num_layers=2, delays=[0, 1], t5="bytes", t5_dim=8, t5_layers=1,
    t5_heads=2, stem="none", warmup=2, lr_min_ratio=0.5, ema_every=2, save_every=5, n_eval_wavs=4, top_k=0)
CODEC_RUN = SHAPE | LOOP | dict(
    task="codec", n_filters=4, dimension=4, lstm=1, kmeans_iters=3, optim="adamw", lr=1e-3, max_norm=1.0,
    warmup=0, ema_every=1, adv=0.0, feat=0.0, mel_range=[4, 6], n_mels=4, save_every=4)
# everything at once: k-means after 3 updates, discriminator, balancer
ADVERSARIAL = dict(adv=1.0, feat=1.0, disc_filters=2, disc_windows=[64, 32], unquantised=0.15)

TWO_PROCESSES = {
    "ddp": {},
    "ddp, accumulated": dict(grad_accum=2),
    "fsdp": dict(sharding="fsdp", sample_every=20),
    "fsdp, checkpointed": dict(sharding="fsdp", checkpointing=True, grad_accum=2),
}
# a scale with which the first updates overflow: all processes are to skip them, or none
OVERFLOWING = dict(dtype="float16", init_scale=2.0 ** 28)
# nothing is added up over all weights, so that shards need not be added up in another order
NO_SUMS = dict(optim="adamw", lr=3e-3, max_norm=0.0)
IN_HALF = {
    "ddp, float16": OVERFLOWING,
    "fsdp, float16": dict(OVERFLOWING, sharding="fsdp"),
    "ddp, float16, no sums": OVERFLOWING | NO_SUMS,
    "fsdp, float16, no sums": OVERFLOWING | NO_SUMS | dict(sharding="fsdp"),
    "ddp, bfloat16, no sums": dict(dtype="bfloat16", **NO_SUMS),
    "fsdp, bfloat16, no sums": dict(dtype="bfloat16", sharding="fsdp", **NO_SUMS),
}
RESUMED = ("ddp", "fsdp, float16")
SHARDS = hasattr(torch.cpu.Stream, "record_event")  # without it, as in torch 2.6, FSDP2 needs a GPU


def settings(data, out, task: str, **changes) -> dict:
    """Values of a configuration for a run of `task` on `data`, into the folder `out`."""
    values = {
        "lm": dict(LM_RUN, data_dir=str(data / "tokens"), codec=str(data / "codec")),
        "codec": dict(CODEC_RUN, data_dir=str(data / "audio")),
    }
    return {**values[task], "out_dir": str(out), **changes}


# --- data -------------------------------------------------------------------------------------------------

def write_data(root: Path) -> Path:
    """Recordings in root/audio, prepared tokens in root/tokens, a codec for them in root/codec."""
    rng = np.random.default_rng(0)
    folder = root / "audio" / "deep"
    folder.mkdir(parents=True)
    for n in range(6):
        seconds = np.arange(1600) / 1600
        tone = 0.3 * np.sin(2 * np.pi * 60 * (n + 2) * seconds)
        soundfile.write(folder / f"{n}.wav", tone + 0.01 * rng.standard_normal(1600), 1600)
    torch.manual_seed(0)
    EncodecModel(Config(**CODEC_RUN | dict(kmeans_iters=0))).save(root / "codec")
    write_tokens(root / "tokens", rng)
    return root


def write_tokens(folder: Path, rng):
    """Nine tracks of random codes and chroma. The first is too short for a segment, the third weighs more."""
    tracks, codes, chroma = [], [], []
    for n in range(9):
        frames = 40 if n else 5
        track = dict(file=f"{n}.wav", shard=0, weight=3.0 if n == 2 else 1.0)
        track |= dict(codes_start=sum(map(len, codes)), frames=frames)
        track |= dict(chroma_start=sum(map(len, chroma)), chroma_frames=frames // 2)
        track |= dict(meta=dict(description=f"tune {n}", key="c major", moods=["calm"]))
        tracks.append(track)
        codes.append(rng.integers(4, size=(frames, 2)).astype(np.uint16))
        chroma.append(rng.integers(12, size=frames // 2).astype(np.uint8))
    folder.mkdir()
    np.concatenate(codes).tofile(folder / "codes.00000.u16")
    np.concatenate(chroma).tofile(folder / "chroma.00000.u8")
    index = dict(version=1, sample_rate=1600, channels=1, n_q=2, card=16, stride=8, n_chroma=12, radix2_exp=6,
                 hop=16, shards=1, tracks=tracks)
    (folder / "index.json").write_text(json.dumps(index))


# --- what a run leaves ------------------------------------------------------------------------------------

def lines(out, split: str) -> list[dict]:
    """The lines of a split in metrics.jsonl."""
    every = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["split"] == split]


def losses(out) -> list[float]:
    return [line["loss"] for line in lines(out, "train")]


def weights(out) -> dict:
    return load_file(Path(out) / "model.safetensors")


def state(out) -> dict:
    return load_file(Path(out) / "state.safetensors")


def assert_same_run(a, b, tolerance: float):
    """Losses and weights of two runs differ by no more than the tolerance."""
    assert len(losses(a)) == len(losses(b))
    np.testing.assert_allclose(losses(a), losses(b), rtol=0, atol=tolerance + 1e-6)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance,
                                   msg=lambda m: f"{name}: {m}")


def assert_identical(a, b):
    """Two runs are equal bit for bit: states, weights and losses."""
    ours, theirs = state(a), state(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))
    assert losses(a) == losses(b)


# --- ways to run ------------------------------------------------------------------------------------------

class TrueAt:
    """Turns true when it is asked for the n-th time; train.py asks once an update."""

    def __init__(self, n: int):
        self.n, self.calls = n, 0

    def __bool__(self):
        self.calls += 1
        return self.calls >= self.n


def stop_at(config: Config, update: int, resume=False):
    """Trains for so many updates, as if Ctrl-C had been pressed then."""
    train.train(config, resume, interrupted=TrueAt(update))


@contextlib.contextmanager
def begun_on_two_processes(runs: list[dict], log: Path):
    """All runs one after the other in one launch of two processes: starting Python is what takes time.

    -> the process to wait for, which is ended at the end of the block. log: the file that it writes to.
    """
    command = [*TORCHRUN, __file__, json.dumps(runs)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()     # torchrun ends the two
        process.wait()


def all_runs(data, root: Path) -> list[dict]:
    """Settings of the runs of TWO_PROCESSES, IN_HALF and RESUMED, each for root/NAME, and for root/codec."""
    by_name = TWO_PROCESSES | IN_HALF
    runs = [settings(data, root / name, "lm", **changes) for name, changes in by_name.items()]
    for name in RESUMED:
        runs.append(settings(data, root / f"{name}, resumed", "lm", **by_name[name], stop=8))
    runs.append(settings(data, root / "codec", "codec", **ADVERSARIAL))
    return [run for run in runs if SHARDS or run.get("sharding") != "fsdp"]


def main():
    """One of two processes. Beside keys of the configuration a run may have:

    stop: the update after which it is stopped, and then resumed; init_scale: the first scale of float16.
    """
    scaler = torch.amp.GradScaler
    for values in json.loads(sys.argv[1]):
        stop = values.pop("stop", None)
        init_scale = values.pop("init_scale", 2.0 ** 16)
        torch.amp.GradScaler = functools.partial(scaler, init_scale=init_scale)
        config = Config(**values)
        if stop:
            stop_at(config, stop)
        train.train(config, resume=bool(stop))


if __name__ == "__main__":
    main()
