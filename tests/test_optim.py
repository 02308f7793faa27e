"""Optimizers of train.py against golden numbers and their own properties.    python -m pytest tests/test_optim.py"""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deviations import near
from train import EMA, DAdaptAdam, Muon, cosine_lr, orthogonalize

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("variant", ["wd0", "wd01", "growth"])
def test_dadapt_adam_equals_golden(variant):
    z = np.load(GOLDEN / "dadam.npz")
    get = lambda key: z[f"{variant}.{key}"]  # noqa: E731
    params = [nn.Parameter(torch.tensor(get(f"param{i}.init"))) for i in range(3)]
    optimizer = DAdaptAdam(params, lr=1.0, betas=(float(get("beta1")), float(get("beta2"))), eps=float(get("eps")),
                           weight_decay=float(get("weight_decay")), d0=float(get("d0")),
                           growth_rate=float(get("growth_rate")))
    for step in range(int(z["num_steps"])):
        optimizer.param_groups[0]["lr"] = float(get("lr")[step])
        for i, p in enumerate(params):
            p.grad = torch.tensor(get(f"param{i}.grad")[step])
        optimizer.step()
        d = float(optimizer.param_groups[0]["d"])
        near("D-Adaptation Adam, d of every step", "original", d, get("d")[step], 1e-5)
        if (step + 1) % int(z["save_every"]) == 0:
            for i, p in enumerate(params):
                value, start = get(f"param{i}.value")[step // int(z["save_every"])], get(f"param{i}.init")
                near("D-Adaptation Adam, weights", "original", p, value, 5e-6)
                near("D-Adaptation Adam, way of the weights", "original", p.detach().numpy() - start, value - start, 5e-4)


def test_dadapt_adam_does_nothing_at_rate_zero_or_before_the_first_gradient():
    p = nn.Parameter(torch.ones(3))
    optimizer = DAdaptAdam([p], lr=0.0, weight_decay=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.state[p] and torch.equal(p, torch.ones(3))
    optimizer.param_groups[0]["lr"] = 1.0
    p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(p, torch.ones(3)) and float(optimizer.param_groups[0]["d"]) == float(torch.tensor(1e-6))


def test_dadapt_adam_finds_the_distance_and_resumes_from_its_state():
    torch.manual_seed(0)
    goal = torch.randn(50)
    p, q = nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))
    first, second = DAdaptAdam([p], betas=(0.9, 0.99)), DAdaptAdam([q], betas=(0.9, 0.99))
    for step in range(400):
        if step == 100:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            q.data.copy_(p.data)
        for weights, optimizer in ((p, first), (q, second))[: 1 + (step >= 100)]:
            optimizer.param_groups[0]["lr"] = cosine_lr(step, 400, 0)
            weights.grad = weights.detach() - goal
            optimizer.step()
    assert torch.equal(p, q)
    assert (p - goal).abs().mean() < 0.05 and 0.01 < float(first.param_groups[0]["d"]) < 10


def test_dadapt_adam_refuses_half_precision_weights():
    with pytest.raises(ValueError, match="float32"):
        DAdaptAdam([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])


@pytest.mark.parametrize("variant", ["unbiased", "plain"])
def test_ema_equals_golden(variant):
    z = np.load(GOLDEN / "ema.npz")
    module = nn.Linear(2, 3)
    module.weight = nn.Parameter(torch.tensor(z[f"{variant}.weight.init"]))
    module.bias = nn.Parameter(torch.tensor(z[f"{variant}.bias.init"]))
    module.register_buffer("running", torch.tensor(z[f"{variant}.running.init"]))
    module.register_buffer("steps", torch.zeros((), dtype=torch.long))
    module.register_buffer("cache", torch.zeros(2), persistent=False)
    ema = EMA(module, float(z[f"{variant}.decay"]), bool(z[f"{variant}.unbias"]))
    assert set(ema.average) == {"weight", "bias", "running"}
    for step in range(int(z["num_updates"])):
        for name in ema.average:
            getattr(module, name).data.copy_(torch.tensor(z[f"{variant}.{name}.value"][step]))
        ema.update()
        assert abs(ema.count - z[f"{variant}.count"][step]) < 1e-4
        for name, average in ema.average.items():
            near("EMA", "original", average, z[f"{variant}.{name}.ema"][step], 5e-6)


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
    assert (module.weight == 3).all() and ema.average["weight"].data_ptr() == module.weight.data_ptr(), "no memory of its own"


@pytest.mark.parametrize("variant", ["a", "b"])
def test_cosine_equals_golden(variant):
    z = np.load(GOLDEN / "cosine.npz")
    get = lambda key: z[f"{variant}.{key}"]  # noqa: E731
    ours = [cosine_lr(step, int(get("total_steps")), int(get("warmup_steps")), float(get("lr_min_ratio")),
                      float(get("cycle_length"))) * float(get("base_lr")) for step in range(len(get("lr")))]
    near("cosine schedule", "original", ours, get("lr"), 1e-6)


def test_muon_update_is_nearly_orthogonal_and_every_row_moves_alike():
    torch.manual_seed(0)
    for shape in ((24, 8, 3), (8, 24), (16, 16), (32, 8)):
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
