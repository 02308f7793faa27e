"""Losses, discriminator and balancer of codec training against audiocraft's numbers.

    python -m pytest tests/test_losses.py
"""
import pytest
import torch
from torch.overrides import TorchFunctionMode

from config import Config
from deviations import golden, near
from models import noise
from system import processes
from training import losses
from training.discriminator import MultiScaleSTFTDiscriminator
from training.losses import Balancer, codec_losses, discriminator_loss, generator_losses, mel_floor, mel_loss


# --- losses -----------------------------------------------------------------------------------------------

def test_mel_loss_equals_that_of_audiocraft():
    g = golden("codec_losses")
    config = Config(sample_rate=32000, mel_range=(6, 11), n_mels=64, mel_floor=1e-5)
    x = g["mel.x"].requires_grad_()
    loss = mel_loss(config, x, g["mel.y"])
    loss.backward()
    near("mel loss", "audiocraft", loss, g["mel.loss"], 3e-5)
    near("mel loss, gradient", "audiocraft", x.grad.flatten(1).norm(dim=1), g["mel.grad_norm_x"], 3e-5)
    near("mel loss, gradient", "audiocraft", x.grad[..., :64], g["mel.grad_x_head"], 3e-5)
    n_fft = 2 ** (6 + int(g["mel.example_scale"]))
    power = losses.power_spectrogram(g["mel.x"], n_fft)
    mel = power.mT @ losses.mel_filters(n_fft, 32000, 64, torch.device("cpu"))
    near("mel spectrogram", "audiocraft", mel.mT[0], g["mel.example_lin"], 3e-5)


def test_codec_losses_are_those_with_a_weight():
    config = Config(sample_rate=16000, sc=1.0, msspec=0.0, l1=0.1)
    wav = noise(2, 1, 3000)
    equal = codec_losses(config, wav, wav.clone(), 1e-5)
    assert equal.keys() == {"l1", "sc"} and equal["l1"] == 0 and equal["sc"] < 1e-6
    silence = codec_losses(config, wav, torch.zeros_like(wav), 1e-5)
    assert abs(float(silence["sc"]) - 5) < 1e-2  # |S_x - 0| / |S_x| at five scales


class Operations(TorchFunctionMode):
    """Counts what torch computes inside `with`."""
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["l1", "msspec", "log_mel", "sc"])
def test_a_loss_of_weight_0_is_not_computed(name):
    weights, wav = dict(l1=1.0, msspec=1.0, log_mel=1.0, sc=1.0), noise(2, 1, 3000)
    operations, found = [], []
    for changes in ({}, {name: 0.0}):
        with Operations() as counted:
            found.append(codec_losses(Config(**weights | changes), wav, 0.5 * wav, 1e-5))
        operations.append(counted.count)
    assert operations[1] < operations[0] and found[0].keys() - found[1].keys() == {name}
    assert all(torch.equal(loss, found[0][key]) for key, loss in found[1].items())


def test_log_mel_counts_decades_of_power_above_the_floor():
    """An error of 20 dB is two decades; below the floor nothing counts. The floor falls evenly."""
    config = Config(sample_rate=16000, l1=0.0, msspec=0.0, log_mel=1.0, n_mels=20,
                    mel_range=(8, 11), mel_floor=1e-6, mel_floor_start=0.01)
    wav = noise(2, 1, 8000)
    assert abs(float(codec_losses(config, wav, 0.1 * wav, 1e-12)["log_mel"]) - 2) < 0.01
    assert float(codec_losses(config, wav, 0.1 * wav, 1e3)["log_mel"]) < 0.01
    floors = [mel_floor(config, progress) for progress in (0.0, 0.3, 0.6, 1.0)]
    assert floors == pytest.approx([1e-2, 1e-4, 1e-6, 1e-6])


def test_the_losses_of_silence_have_a_gradient():
    config = Config(sample_rate=16000, sc=1.0, msspec=1.0, l1=0.1)
    wav = torch.zeros(1, 1, 3000, requires_grad=True)
    sum(codec_losses(config, torch.zeros(1, 1, 3000), wav, 1e-5).values()).backward()
    assert wav.grad.isfinite().all()


def test_adversarial_losses_equal_those_of_audiocraft():
    g = golden("codec_losses")
    sides = {}
    for side in ("fake", "real"):
        logits = [g[f"adv.{side}.logits{i}"] for i in range(3)]
        sides[side] = logits, [[g[f"adv.{side}.fmap{i}_{j}"] for j in range(3)] for i in range(3)]
    found = generator_losses(sides["fake"], sides["real"])
    near("adversarial losses", "audiocraft", found["adv"], g["adv.gen_loss"], 1e-5)
    near("adversarial losses", "audiocraft", found["feat"], g["adv.feat_loss"], 1e-5)
    loss = discriminator_loss(sides["fake"], sides["real"])
    near("adversarial losses", "audiocraft", loss, g["adv.disc_loss"], 1e-5)


# --- the discriminator ------------------------------------------------------------------------------------

def name_in_audiocraft(name: str) -> str:
    """discriminators.0.convs.0.weight -> state.discriminators.0.convs.0.conv.weight"""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    module, parameter = name.replace("last.", "conv_post.").rsplit(".", 1)
    return f"state.{module}.conv.{parameter}"


def test_discriminator_equals_that_of_audiocraft():
    g = golden("msstftd")
    windows = tuple(g["win_lengths"].tolist())
    assert windows == tuple(g["n_ffts"].tolist()) == tuple(4 * h for h in g["hop_lengths"].tolist())
    config = Config(disc_filters=int(g["filters"]), disc_windows=windows)
    discriminator = MultiScaleSTFTDiscriminator(config)
    discriminator.load_state_dict({name: g[name_in_audiocraft(name)] for name in discriminator.state_dict()})
    logits, maps = discriminator(g["wav"])
    for i in range(2):
        near("discriminator, logits", "audiocraft", logits[i], g[f"logits{i}"], 2e-5)
        assert [list(m.shape) for m in maps[i]] == g[f"fmap{i}.shapes"].tolist()
        means = torch.stack([m.mean() for m in maps[i]])
        near("discriminator, feature maps", "audiocraft", means, g[f"fmap{i}.means"], 2e-5)
        near("discriminator, feature maps", "audiocraft", maps[i][0][:1], g[f"fmap{i}.first"], 2e-5)
        near("discriminator, feature maps", "audiocraft", maps[i][-1], g[f"fmap{i}.last"], 2e-5)


# --- the balancer -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["bal", "bal_whole"])
def test_balancer_equals_that_of_audiocraft(prefix):
    g = {key.removeprefix(f"{prefix}."): value for key, value in golden("codec_losses").items()}
    names = ("adv", "feat", "l1", "msspec")
    weights = {name: float("%.6g" % g[f"{name}.weight"]) for name in names}
    balancer = Balancer(weights, 0.999, per_item=bool(g["per_batch_item"]))
    for i in range(3):
        y = g["y"][i].requires_grad_()
        found = {name: g[f"{name}.scale"] * (y - g[f"{name}.target"][i]).square().mean() for name in names}
        total = balancer.backward(found, y)
        near("balancer, gradients", "audiocraft", y.grad, g["grad"][i], 1e-5)
        near("balancer, loss", "audiocraft", total, g["effective_loss"][i], 1e-5)
        restored = Balancer(weights, 0.999)
        restored.load_state_dict(balancer.state_dict())


def test_balancer_of_two_processes_sends_what_one_with_the_joint_batch_would(monkeypatch):
    y, target = noise(1, 1, 40), noise(1, 1, 40, seed=1)

    def gradient(items):
        both = y.expand(items, -1, -1).clone().requires_grad_()
        Balancer({"l1": 1.0}).backward({"l1": (both - target).abs().mean()}, both)
        return both.grad.sum(0)
    joint = gradient(items=2)
    for module in (processes, losses):
        monkeypatch.setattr(module, "process_count", lambda: 2)
    # the other process has the same item
    monkeypatch.setattr(processes.dist, "all_reduce", lambda norm: norm.mul_(2))
    torch.testing.assert_close(gradient(items=1), joint)  # the mean over two processes of this
