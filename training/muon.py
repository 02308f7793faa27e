"""Muon: for matrices inside the network, in short runs of small models far ahead of Adam (optim = "muon").

    python train.py config/tiny.py --optim=muon --lr=0.02

    momentum <- running average of the gradients (Nesterov's: one step ahead)
    weights  <- weights - lr * orthogonalize(momentum)

Every update has all its singular values near 1, so the weights move in all directions alike (arXiv 2409.20325
and 2502.16982). Embeddings, output heads, norms and biases are no such matrices: AdamW trains them.
"""
import re

import torch

from config import Config

# matrices that AdamW trains: those that are not hidden; and T5, whose attention has no scale and saturates
FOR_ADAM = r"(^|\.)(emb|lm_heads|proj|t5)\."


def muon_and_adam(named: list, config: Config) -> list:
    """(name, parameter) of all weights -> Muon for matrices, AdamW with a tenth of its lr for all others."""
    directions, matrices, rest = [], [], []
    for name, p in named:
        if name.endswith("weight.original1"):       # of weight norm
            directions.append(p)
        elif p.ndim >= 2 and name.endswith("weight") and not re.search(FOR_ADAM, name):
            matrices.append(p)
        else:
            rest.append(p)
    groups = [dict(params=directions, keep_norm=True), dict(params=matrices)]
    groups = [group for group in groups if group["params"]]
    precision = torch.float32 if config.dtype == "float32" else torch.bfloat16
    muon = Muon(groups, config.lr, weight_decay=config.weight_decay, precision=precision)
    adam = torch.optim.AdamW(rest, config.lr / 10, config.betas, config.eps, config.weight_decay)
    return [muon, adam]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal.

    A weight of more than two dimensions counts as a matrix (first, all others). keep_norm, for the directions
    of weight-normalized convolutions: each row is set back to the length it had; else it grows, and the step
    shrinks in proportion. precision: of the products in `orthogonalize`, for which bfloat16 is enough.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, keep_norm=False,
                 precision=torch.float32):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, keep_norm=keep_norm)
        super().__init__(params, defaults)
        self.precision = precision

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["lr"] > 0 and params:
                self.step_group(group, params)

    def step_group(self, group: dict, params: list):
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        moments = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, moments, group["momentum"])

        by_shape = {}       # matrices of one shape are made orthogonal in one batch
        for p, moment in zip(params, nesterov):
            by_shape.setdefault(p.flatten(1).shape, []).append((p, moment.flatten(1)))
        for pairs in by_shape.values():
            matrices = torch.stack([moment for _, moment in pairs])
            updates = orthogonalize(matrices.to(self.precision))
            for (p, _), update in zip(pairs, updates):
                self.move(p, update, group)

    def move(self, p, update, group: dict):
        """p <- (1 - lr decay) p - lr sqrt(max(1, rows / columns)) update: every row moves by about lr."""
        rows, columns = update.shape
        scale = group["lr"] * max(1, rows / columns) ** 0.5
        length = row_lengths(p)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.view_as(p), alpha=-scale)
        if group["keep_norm"]:
            ratio = length / row_lengths(p)
            p.mul_(ratio.view(-1, *[1] * (p.ndim - 1)))


def row_lengths(p):
    """Lengths of the rows of a weight taken as a matrix, (rows, 1)."""
    return p.flatten(1).norm(dim=1, keepdim=True)


def orthogonalize(matrices, iterations=5):
    """(..., rows, columns) -> nearly the nearest matrices with orthonormal rows or columns (Newton-Schulz).

    A quintic a x + b x^3 + c x^5 applied to the singular values drives each towards 1, by products alone.
    With these coefficients (Keller Jordan's) it rises steeply at 0, and ends anywhere between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)     # no singular value above 1
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
