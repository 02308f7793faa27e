"""Training of the codec: losses, discriminator and balancer in one run, and its last part.

    python -m pytest tests/test_codec_training.py
"""
import pytest
import torch

from config import Config
from encodec import EncodecModel
from system.errors import UserError
from train import train
from training.figures import signs_of_collapse
from training_runs import ADVERSARIAL, assert_same_run, lines, settings, state, stop_at


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


def test_no_bfloat16_on_a_cpu(training_data, tmp_path):
    """On processors with AMX its strided convolutions are wrong there, and the codec would collapse."""
    config = Config(**settings(training_data, tmp_path / "out", "codec", dtype="bfloat16"))
    with pytest.raises(UserError, match="on a CPU the codec trains in float32 alone"):
        train(config)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_the_last_part_trains_the_decoder_alone(training_data, tmp_path):
    """From update 14 on, encoder and codebooks stay what their averages were."""
    config = Config(**settings(training_data, tmp_path / "out", "codec", **ADVERSARIAL))
    stop_at(config, 14)
    averages = state(config.out_dir)
    train(config, resume=True)
    moved = set()
    for name, tensor in state(config.out_dir).items():
        if name.startswith("model.") and not torch.equal(tensor, averages["ema." + name[6:]]):
            moved.add(name.split(".")[1])
    assert moved == {"decoder"}
