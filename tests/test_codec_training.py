"""Training of the codec: losses, discriminator and balancer in one run, and its first part.

    python -m pytest tests/test_codec_training.py
"""
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from config import Config, load
from encodec import EncodecModel
from system.errors import UserError
from train import train
from training.codec import CodecTraining
from training.figures import signs_of_collapse
from training_runs import ADVERSARIAL, assert_same_run, lines, settings


def test_codec_trains_and_writes_a_codec(codec_run):
    codec = EncodecModel.from_pretrained(codec_run)
    assert codec.decode(codec.encode(torch.randn(1, 1, 100))).shape == (1, 1, 104)
    first, last = lines(codec_run, "train")[0], lines(codec_run, "train")[-1]
    assert {"loss", "l1", "msspec", "adv", "feat", "disc"} <= first.keys()
    assert first["commit"] == 0 < last["commit"]
    valid = lines(codec_run, "valid")[-1]
    assert len(valid["entropy"]) == len(valid["live"]) == 2 and abs(valid["kbps"] - 2 * 4 * 0.2) < 1e-6
    files = {path.name for path in (codec_run / "samples").iterdir()}
    assert files == {f"{n}_{of}.wav" for n in (0, 1) for of in ("original", "update0000020")}


def test_codec_run_on_two_processes_equals_one(codec_run, two_processes):
    assert_same_run(codec_run, two_processes / "codec", 1e-5)


def test_a_collapse_is_told(training_data, codec_run, tmp_path, capsys):
    """Once a validation, with what to try; nothing of a healthy run, nor early."""
    changes = dict(optim="adamw", lr=1.0, warmup=0, threshold_dead=0.0, sample_every=0, valid_every=5)
    config = Config(**settings(training_data, tmp_path / "out", "codec", **changes))
    train(config)
    told = [line for line in capsys.readouterr().err.splitlines() if "try --lr=0.25" in line]
    assert 1 <= len(told) <= 4 and "next to nothing of the recordings: SI-SNR -" in told[-1]

    healthy = lines(codec_run, "valid")[-1] | {"si_snr": 1.0, "live": [1.0, 0.9]}
    assert signs_of_collapse(config, healthy) == []
    assert "codebook 2 collapses: 10%" in signs_of_collapse(config, healthy | {"live": [1.0, 0.1]})[0]
    assert signs_of_collapse(config, healthy | {"live": [1.0, 0.1], "update": 2}) == []


def test_a_start_without_the_quantizer_is_no_collapse():
    """Figures of config/tiny_codec.py, whose quantizer starts at 40 %: until then its decoder is not used."""
    config = load(["config/tiny_codec.py"])
    log = ((1100, -46.9, 0.0), (2750, -46.0, 0.0), (4400, -42.9, 0.0), (4401, -42.0, 0.1), (5000, -3.1, 1.0),
           (5500, -2.2, 1.0), (11000, 0.2, 1.0))
    for update, si_snr, live in log:
        assert not signs_of_collapse(config, {"update": update, "si_snr": si_snr, "live": [live] * 4}), update
    assert signs_of_collapse(config, {"update": 6000, "si_snr": -42.0, "live": [1.0] * 4})


@pytest.mark.parametrize("updates", [20, 11_000])
def test_the_quantizer_starts_after_the_same_share_of_any_run(updates):
    """unquantised = 0.4: 4,400 of the recipe's 11,000 updates, 8 of 20."""
    config = dataclasses.replace(load(["config/tiny_codec.py"]), epochs=1, updates_per_epoch=updates)
    first = updates * 2 // 5
    assert [quantizes(config, update) for update in (first - 1, first, updates - 1)] == [False, True, True]


def quantizes(config, update: int) -> bool:
    """Whether CodecTraining's loss of an update has the quantizer in it."""
    calls = []

    def forward(wav, quantize):
        calls.append(quantize)
        return wav.clone().requires_grad_(), None, torch.zeros(())
    task = SimpleNamespace(config=config, device="cpu", forward=forward, weights={"l1": 1.0}, extra={},
                           adversarial=False,
                           reconstruction_losses=lambda x, y, floor: {"l1": (x - y).abs().mean()})
    CodecTraining.loss(task, {"wav": torch.zeros(1, 1, 10)}, update)
    return calls[0]


def test_no_bfloat16_on_a_cpu(training_data, tmp_path):
    """On processors with AMX its strided convolutions are wrong there, and the codec would collapse."""
    config = Config(**settings(training_data, tmp_path / "out", "codec", dtype="bfloat16"))
    with pytest.raises(UserError, match="on a CPU the codec trains in float32 alone"):
        train(config)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
