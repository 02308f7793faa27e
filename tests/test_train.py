"""The training loop: the same on one process and on several, in micro-batches, in half precision; safe.

    python -m pytest tests/test_train.py
    python -m pytest -m slow tests/test_train.py        # compiled, too

Beside it: test_resume.py (interrupted runs), test_codec_training.py, test_training_data.py, test_finetune.py,
test_evaluation.py.
"""
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import training.codec
from config import Config, load
from constants import ROOT
from lm import LMModel
from sample import MusicGen
from system.errors import UserError
from train import train
from training.plan import plan
from training_runs import (ADVERSARIAL, SHARDS, TWO_PROCESSES, assert_same_run, begun_on_two_processes, lines,
                           losses, settings, state, weights)

needs_shards = pytest.mark.skipif(not SHARDS, reason="FSDP2 on the CPU needs a newer torch")


# --- one run, in several ways -----------------------------------------------------------------------------

def test_lm_trains_and_writes_all_that_a_model_needs(lm_run):
    first, valid = lines(lm_run, "train"), lines(lm_run, "valid")
    assert [line["update"] for line in valid] == [7, 14, 20]
    assert {"own_loss", "ppl"} <= valid[0].keys()
    assert abs(np.exp(valid[0]["loss"]) / valid[0]["ppl"] - 1) < 1e-4
    assert {"loss", "ce_1", "ce_2", "ppl", "ppl_1", "lr", "d_lr", "grad_norm", "tokens_per_s", "data_wait",
            "memory_gb"} <= first[0].keys()
    assert abs(first[3]["loss"] - (first[3]["ce_1"] + first[3]["ce_2"]) / 2) < 1e-5
    model = MusicGen.from_pretrained(lm_run, "cpu")
    assert model.generate(["a tune"], duration=0.1).shape == (1, 1, 160)
    for name, tensor in state(lm_run).items():
        if name.startswith("ema."):
            torch.testing.assert_close(tensor, model.lm.state_dict()[name[4:]], msg=name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[needs_shards] * ("fsdp" in name))
                                  for name in TWO_PROCESSES])
def test_lm_run_on_two_processes_equals_one(lm_run, two_processes, name):
    assert_same_run(lm_run, two_processes / name, 1e-5)


@needs_shards
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sharded_run_equals_ddp_in_half_precision(two_processes, dtype):
    """To the last bit without sums over all weights."""
    ddp, fsdp = two_processes / f"ddp, {dtype}, no sums", two_processes / f"fsdp, {dtype}, no sums"
    assert losses(ddp) == losses(fsdp)
    ours, theirs = weights(ddp), weights(fsdp)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_shards
def test_sharded_run_with_overflows_follows_ddp(two_processes):
    """D-Adaptation and clipping add up by shard, 1e-7 apart, and now and then half precision then rounds the
    other way."""
    assert_same_run(two_processes / "ddp, float16", two_processes / "fsdp, float16", 5e-3)


@pytest.mark.parametrize("changes", [dict(grad_accum=2), dict(checkpointing=True)],
                         ids=["accumulated", "checkpointed"])
def test_lm_run_is_the_same_when(lm_run, training_data, tmp_path, changes):
    train(Config(**settings(training_data, tmp_path / "out", "lm", **changes)))
    assert_same_run(lm_run, tmp_path / "out", 1e-5)


@pytest.mark.slow  # the compiler takes half a minute
def test_lm_run_is_the_same_compiled(lm_run, training_data, tmp_path):
    if not any(shutil.which(name) for name in ("g++", "clang++")):
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    two = {"ddp": {}, "fsdp": dict(sharding="fsdp"),
           "fsdp, checkpointed": dict(sharding="fsdp", checkpointing=True)}

    def compiled(name, **changes):
        return settings(training_data, tmp_path / name, "lm", compile=True, **changes)
    train(Config(**compiled("one", checkpointing=True)))
    runs = [compiled(name, **changes) for name, changes in two.items()]
    with begun_on_two_processes(runs, tmp_path / "log") as process:
        assert process.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    for name in ("one", *two):
        assert_same_run(lm_run, tmp_path / name, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_d_adaptation_in_half_precision_follows_float32(lm_run, training_data, tmp_path, dtype):
    changes = dict(dtype=dtype, grad_accum=2, sharding="ddp")
    train(Config(**settings(training_data, tmp_path / "out", "lm", **changes)))
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(lm_run), rtol=0.02)
    for key in ("grad_norm", "d_lr"):  # a gradient clipped before it was unscaled would show here
        half, full = ([line[key] for line in lines(out, "train")] for out in (tmp_path / "out", lm_run))
        np.testing.assert_allclose(half, full, rtol=0.1, atol=1e-7)


@pytest.mark.parametrize("optim, lr", [("adamw", 3e-3), ("muon", 0.02)])
def test_optimizers_by_name_all_learn(training_data, tmp_path, optim, lr):
    train(Config(**settings(training_data, tmp_path / "out", "lm", optim=optim, lr=lr)))
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0] - 0.3


# --- what is not finite -----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(training_data, tmp_path, dtype):
    changes = dict(optim="adamw", warmup=0, save_every=1, dtype=dtype)
    config = Config(**settings(training_data, tmp_path / "out", "lm", **changes))
    config.lr = 1e30  # more than a configuration may say
    with pytest.raises(UserError, match=r"update 1: the loss is not finite.*\.wav at"):
        train(config)
    assert all(t.isfinite().all() for t in state(config.out_dir).values())
    report, = (tmp_path / "out" / "diagnosis").iterdir()
    assert load_file(report)["0.codes"].shape == (4, 2, 32)


# task: owner and name of a function, changes to the settings, the part whose gradient is not finite
POISONED = {
    "lm": (LMModel, "loss", {}, "lm_heads"),
    "codec": (training.codec, "discriminator_loss", ADVERSARIAL, "discriminator"),
}


@pytest.mark.parametrize("task", POISONED)
def test_a_gradient_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(training_data, tmp_path,
                                                                               monkeypatch, task):
    """The loss itself is finite: a square root at 0 is added to it, from the seventh call on."""
    owner, function, changes, part = POISONED[task]
    loss, calls = getattr(owner, function), []

    def poisoned(*args):
        result = loss(*args)
        calls.append(args)
        if len(calls) < 7:
            return result
        if task == "lm":
            lm = args[0]
            return result[0] + (0 * lm.lm_heads.weight).sum().sqrt(), result[1]
        logits_of_fake, _ = args[0]
        return result + (0 * logits_of_fake[0]).sum().sqrt()
    monkeypatch.setattr(owner, function, poisoned)
    changes = dict(changes, save_every=1, valid_every=0)
    config = Config(**settings(training_data, tmp_path / "out", task, **changes))
    with pytest.raises(UserError, match=r"update 6: the gradient is not finite.*\.wav at"):
        train(config)
    assert all(t.isfinite().all() for t in state(config.out_dir).values())
    report, = (tmp_path / "out" / "diagnosis").iterdir()
    with safe_open(report, "pt") as file:
        info = json.loads(file.metadata()["info"])
    assert info["update"] == 6 and info["not_finite"]
    assert all(part in name for name in info["not_finite"])


# --- the plan ---------------------------------------------------------------------------------------------

def test_the_plan_of_the_melody_model_agrees_with_a_hand_calculation(capsys):
    """1,385.6 M weights: 48 layers of 12 D^2 + 4 D = 1,359.2 M; K (V + 1) D + K V D = 25.2 M; T5's 768 D + D
    and chroma's 12 D + D: 1.2 M. At 4 bytes 5.5 GB, three times that for m, v and s. 30 s are 1,500 frames.

    An item has S = 1,500 + 4 columns, 235 frames of melody, 64 of text, and keeps the input of every layer,
    48 x 4 S D = 0.53 GB; one layer in full, (4 x 4 + 2 (5 + 8)) S D = 0.12 GB; logits four times, 0.20 GB.
    24 items 20.3 GB, all 53.5 GB.
    """
    D, K, V = 1536, 4, 2048
    weights = 48 * (12 * D * D + 4 * D) + K * (V + 1) * D + K * V * D + 2 * D + (768 + 1) * D + (12 + 1) * D
    figures = plan(load([str(ROOT / "config" / "melody.py")]), processes=8, device_bytes=80e9)
    assert figures["parameters"] == figures["trained"] == weights
    assert figures["weights"] == figures["gradients"] == figures["ema"] == 4 * weights
    assert figures["optimizer"] == 12 * weights and figures["tokens_per_update"] == 192 * 4 * 1500
    S = 1500 + 4 + 235 + 64
    activations = 24 * (48 * 4 * S * D + (16 + 26) * S * D + 4 * 4 * 1500 * K * V)
    assert figures["activations"] == activations
    assert 53.4e9 < figures["together"] < 53.6e9
    printed = capsys.readouterr().out
    assert "1,385.6 M" in printed and "it fits" in printed
