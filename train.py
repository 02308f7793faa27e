"""Training: the codec or the language model, whichever the configuration's `task` says.

    python train.py config/tiny_codec.py                    # one process
    torchrun --nproc_per_node=8 train.py config/melody.py   # eight; any key of config.py as --key=value
"""
import math
from contextlib import contextmanager

import torch
import torch.distributed as dist

# === optimizers =================================================================================================


def cosine_lr(step: int, total: int, warmup: int, lr_min_ratio: float = 0.0, cycle_length: float = 1.0) -> float:
    """The factor on the learning rate at update `step`: linear warm-up (0 at step 0), then a cosine.

    After `total` it stays at lr_min_ratio. With cycle_length < 1 the cosine passes its minimum and climbs again,
    as the original's does.
    """
    if step < warmup:
        return step / warmup
    if step > total:
        return lr_min_ratio
    u = (step - warmup) / max(1, total - warmup)
    return lr_min_ratio + (1 - lr_min_ratio) / 2 * (1 + math.cos(math.pi * u / cycle_length))


def local(tensors):
    """The part of each tensor that this process holds: the tensor itself, unless `fully_shard` has split it."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def add_over_shards(sums, like):
    """Adds `sums` up over the processes that hold the other shards of `like`; as it is when nothing is sharded."""
    if hasattr(like, "device_mesh"):
        dist.all_reduce(sums, group=like.device_mesh.get_group())
    return sums


class DAdaptAdam(torch.optim.Optimizer):
    """Adam that finds its own learning rate (D-Adaptation, arXiv 2301.07733), as MusicGen was trained with.

    The best step size is about D = the distance from start to solution. `d` is a lower bound on D that the gradients
    seen so far prove, and never falls; `lr` is only a factor on it, so lr = 1 is right. With lam = d * lr:

        m <- b1 m + (1 - b1) lam g        v <- b2 v + (1 - b2) g^2       s <- b2 s + (1 - b2) lam g
        a = sqrt(v) + eps                 no bias correction             weights <- (1 - decay lam) weights - m / a
        r <- b2 r + (1 - b2) lam^2 sum(g^2 / a)
        d <- max(d, min(d_hat, growth_rate d)),    d_hat = (sum(s^2 / a) / (1 - b2) - r) / sum|s|

    The sums run over all weights of the model at once. This is the estimator of the original's code, which is not
    that of the `dadaptation` 3.x package. d and r stay tensors on the device: nothing here waits for it.
    """

    def __init__(self, params, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, d0=1e-6,
                 growth_rate=float("inf")):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, growth_rate=growth_rate))
        assert len(self.param_groups) == 1, "one d is shared by all weights: give them as a single group"
        group = self.param_groups[0]
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"]):
            raise ValueError("D-Adaptation needs float32 weights (d starts at 1e-6); use autocast for half precision")
        group["d"] = torch.tensor(float(d0), device=group["params"][0].device)
        group["r"] = torch.zeros_like(group["d"])

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        if group["lr"] == 0:
            return  # the first update of a warm-up: not even the moments change
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update({key: torch.zeros_like(p) for key in "mvs"})
        weights, g = local(params), local([p.grad for p in params])
        m, v, s = (local([self.state[p][key] for p in params]) for key in "mvs")
        (b1, b2), d, r = group["betas"], group["d"], group["r"]
        lam = d * group["lr"]

        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, g, g, 1 - b2)
        a = torch._foreach_sqrt(v)
        torch._foreach_add_(a, group["eps"])
        ratio = torch._foreach_div(g, a)
        torch._foreach_mul_(ratio, g)
        g_sum = torch.stack(torch._foreach_norm(ratio, 1)).sum()  # nothing is negative: the 1-norm is the sum
        step = torch._foreach_mul(g, lam)
        for moment, beta in ((m, b1), (s, b2)):
            torch._foreach_mul_(moment, beta)
            torch._foreach_add_(moment, step, alpha=1 - beta)
        ratio = torch._foreach_div(s, a)
        torch._foreach_mul_(ratio, s)
        s_sum = torch.stack(torch._foreach_norm(ratio, 1)).sum()
        s_size = torch.stack(torch._foreach_norm(s, 1)).sum()
        g_sum, s_sum, s_size = add_over_shards(torch.stack([g_sum, s_sum, s_size]), params[0])

        seen = s_size > 0  # as long as every gradient was zero, nothing happens
        r_next = b2 * r + (1 - b2) * lam ** 2 * g_sum
        d_hat = (s_sum / (1 - b2) - r_next) / s_size
        r.copy_(torch.where(seen, r_next, r))
        d.copy_(torch.where(seen, torch.maximum(d, torch.minimum(d_hat, d * group["growth_rate"])), d))
        if group["weight_decay"]:  # as a difference: early on 1 - decay lam would round to 1
            torch._foreach_sub_(weights, torch._foreach_mul(weights, group["weight_decay"] * lam * seen))
        torch._foreach_addcdiv_(weights, m, a, value=-1)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (arXiv 2502.16982, 2409.20325): for matrices inside the network, far ahead of Adam
    in short runs. Every update has all its singular values near 1, so no direction is left behind.

    A weight of more than two dimensions counts as a matrix (first, the rest). Groups with `keep_norm` hold the
    directions of weight-normalised convolutions: each row is set back to the length it had, or the growing length
    would silently shrink the step. Embeddings, heads, norms and biases belong to Adam, not here.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, keep_norm=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, keep_norm=keep_norm))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["lr"] == 0 or not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, moments = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, moments, group["momentum"])
            by_shape = {}  # equal shapes are orthogonalised in one batch
            for p, update in zip(params, nesterov):
                by_shape.setdefault(p.flatten(1).shape, []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update.flatten(1) for _, update in pairs]))
                scale = -group["lr"] * max(1, rows / columns) ** 0.5  # every row moves by about lr
                for (p, _), update in zip(pairs, updates):
                    length = p.flatten(1).norm(dim=1, keepdim=True)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=scale)
                    if group["keep_norm"]:
                        p.mul_((length / p.flatten(1).norm(dim=1, keepdim=True)).view(-1, *[1] * (p.ndim - 1)))


def orthogonalize(matrices, steps=5):
    """(..., rows, columns) -> nearly the nearest matrices with orthonormal rows or columns (Newton-Schulz).

    A quintic a x + b x^3 + c x^5 applied to the singular values drives each towards 1, and needs only products.
    The coefficients (Jordan's) rise steeply at 0 and are content to end between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class EMA:
    """Exponential moving average, in float32, of all float weights and buffers of a module.

    unbiased: the normalised weighted mean of the values seen, so the first update forgets the random start.

        count <- decay count + 1,  w = 1 / count  (plain: w = 1 - decay),  average <- (1 - w) average + w value
    """

    def __init__(self, module, decay=0.99, unbiased=True):
        self.module, self.decay, self.unbiased, self.count = module, decay, unbiased, 0.0
        self.average = {name: value.float().clone() for name, value in self.values().items()}

    def values(self):
        """Name -> tensor, the module's own storage (shards under fully_shard)."""
        return {name: value.detach() for name, value in self.module.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self):
        if self.unbiased:
            self.count = self.decay * self.count + 1
        weight = 1 / self.count if self.unbiased else 1 - self.decay
        torch._foreach_lerp_(local(self.average.values()), local(v.float() for v in self.values().values()), weight)

    @torch.no_grad()
    def copy_to_module(self):
        torch._foreach_copy_(local(self.values().values()), local(self.average.values()))

    @contextmanager
    def swap(self):
        """Inside `with ema.swap():` the module has the averaged weights."""
        kept = [value.clone() for value in self.values().values()]
        self.copy_to_module()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(local(self.values().values()), local(kept))
