"""Learning rate, optimizers and average of the weights: audiocraft's numbers and their own properties.

    python -m pytest tests/test_optim.py
"""
import copy

import pytest
import torch
from torch import nn

from deviations import golden, near
from train import EMA, DAdaptAdam, cosine_lr
from training.muon import Muon, orthogonalize


def golden_variant(name: str, variant: str) -> dict:
    """The arrays of tests/golden/NAME.npz, those of a variant without its name in front."""
    return {key.removeprefix(f"{variant}."): value for key, value in golden(name).items()}


# --- learning rate ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["a", "b"])
def test_cosine_equals_that_of_audiocraft(variant):
    g = golden_variant("cosine", variant)
    total, warmup = int(g["total_steps"]), int(g["warmup_steps"])
    lr_min_ratio, cycle_length, base = (float(g[key]) for key in ("lr_min_ratio", "cycle_length", "base_lr"))
    factors = [cosine_lr(n, total, warmup, lr_min_ratio, cycle_length) for n in range(len(g["lr"]))]
    near("cosine schedule", "audiocraft", [base * factor for factor in factors], g["lr"], 1e-6)


# --- D-Adaptation -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["wd0", "wd01", "growth"])
def test_dadapt_adam_equals_that_of_audiocraft(variant):
    g = golden_variant("dadam", variant)
    params = [nn.Parameter(g[f"param{i}.init"].clone()) for i in range(3)]
    settings = {key: float(g[key]) for key in ("eps", "weight_decay", "d0", "growth_rate")}
    optimizer = DAdaptAdam(params, lr=1.0, betas=(float(g["beta1"]), float(g["beta2"])), **settings)
    for update in range(int(g["num_steps"])):
        optimizer.param_groups[0]["lr"] = float(g["lr"][update])
        for i, p in enumerate(params):
            p.grad = g[f"param{i}.grad"][update].clone()
        optimizer.step()
        d = float(optimizer.param_groups[0]["d"])
        near("D-Adaptation Adam, d of every update", "audiocraft", d, g["d"][update], 1e-5)
        if (update + 1) % int(g["save_every"]) == 0:
            for i, p in enumerate(params):
                value, start = g[f"param{i}.value"][update // int(g["save_every"])], g[f"param{i}.init"]
                near("D-Adaptation Adam, weights", "audiocraft", p, value, 5e-6)
                moved = p.detach() - start
                near("D-Adaptation Adam, way of the weights", "audiocraft", moved, value - start, 5e-4)


def test_dadapt_adam_does_nothing_at_rate_zero_or_before_the_first_gradient():
    p = nn.Parameter(torch.ones(3))
    optimizer = DAdaptAdam([p], lr=0.0, weight_decay=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.state[p] and torch.equal(p, torch.ones(3))
    optimizer.param_groups[0]["lr"] = 1.0
    p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert optimizer.param_groups[0]["d"] == torch.tensor(1e-6)


def test_dadapt_adam_finds_the_distance_and_resumes_from_its_state():
    torch.manual_seed(0)
    goal = torch.randn(50)
    p, q = nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))
    first, second = DAdaptAdam([p], betas=(0.9, 0.99)), DAdaptAdam([q], betas=(0.9, 0.99))
    for update in range(400):
        if update == 100:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            q.data.copy_(p.data)
        for weights, optimizer in ((p, first), (q, second))[:1 + (update >= 100)]:
            optimizer.param_groups[0]["lr"] = cosine_lr(update, 400, 0)
            weights.grad = weights.detach() - goal
            optimizer.step()
    assert torch.equal(p, q)
    assert (p - goal).abs().mean() < 0.05 and 0.01 < float(first.param_groups[0]["d"]) < 10


def test_dadapt_adam_of_many_tensors_is_that_of_one():
    """It takes them in parts (train.parts_of), of which all have to count in d."""
    torch.manual_seed(0)
    goal = torch.randn(50, 4)
    whole, rows = nn.Parameter(torch.zeros(50, 4)), [nn.Parameter(torch.zeros(4)) for _ in goal]
    optimizers = [DAdaptAdam(params, betas=(0.9, 0.99), weight_decay=0.1) for params in ([whole], rows)]
    for _ in range(20):
        whole.grad = whole.detach() - goal
        for row, target in zip(rows, goal):
            row.grad = row.detach() - target
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.stack(list(rows)), whole, rtol=1e-3, atol=1e-3)
    assert float(optimizers[0].param_groups[0]["d"]) > 1      # from 1e-6


def test_dadapt_adam_refuses_half_precision_weights():
    with pytest.raises(ValueError, match="float32"):
        DAdaptAdam([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])


# --- average of the weights -------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["unbiased", "plain"])
def test_ema_equals_that_of_audiocraft(variant):
    g = golden_variant("ema", variant)
    module = nn.Linear(2, 3)
    module.weight = nn.Parameter(g["weight.init"].clone())
    module.bias = nn.Parameter(g["bias.init"].clone())
    module.register_buffer("running", g["running.init"].clone())
    module.register_buffer("steps", torch.zeros((), dtype=torch.long))
    module.register_buffer("cache", torch.zeros(2), persistent=False)
    ema = EMA(module, float(g["decay"]), bool(g["unbias"]))
    assert set(ema.average) == {"weight", "bias", "running"}
    for update in range(int(g["num_updates"])):
        for name in ema.average:
            getattr(module, name).data.copy_(g[f"{name}.value"][update])
        ema.update()
        assert abs(ema.count - g["count"][update]) < 1e-4
        for name, average in ema.average.items():
            near("EMA", "audiocraft", average, g[f"{name}.ema"][update], 5e-6)


def test_ema_swaps_in_and_out_even_when_the_block_fails():
    module = nn.Linear(2, 2)
    ema = EMA(module)
    before = module.weight.detach().clone()
    ema.average["weight"].zero_()
    with pytest.raises(RuntimeError), ema.swap():
        assert module.weight.abs().sum() == 0
        raise RuntimeError
    assert torch.equal(module.weight, before)


def test_ema_without_decay_is_the_module_itself():
    module = nn.Linear(2, 2)
    ema = EMA(module, decay=0.0)
    module.weight.data.fill_(3.0)
    ema.update()
    with ema.swap():
        assert (module.weight == 3).all()
    assert (module.weight == 3).all()
    assert ema.average["weight"].data_ptr() == module.weight.data_ptr(), "no memory of its own"


# --- Muon -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(24, 8, 3), (8, 24), (16, 16), (32, 8)])
def test_muon_update_is_nearly_orthogonal_and_every_row_moves_alike(shape):
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape).flatten(1)))
    assert singular.max() < 1.3 and singular.median() > 0.6
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape) * 1e-3
    Muon([p], lr=0.02).step()
    assert (p.detach().flatten(1).norm(dim=1).mean() / 0.02 - 1).abs() < 0.3


def test_muon_keeps_the_length_of_weight_norm_directions():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 4, 3))
    before = p.detach().flatten(1).norm(dim=1)
    optimizer = Muon([{"params": [p], "keep_norm": True}], lr=0.1)
    start = p.detach().clone()
    for _ in range(5):
        p.grad = torch.randn_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach().flatten(1).norm(dim=1), before)
    assert (p - start).abs().max() > 0.1
