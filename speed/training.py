"""Training on the CPU: products, attention and optimizer of lm.py and train.py, faster.

    optimize_training(module, optimizers, config)       # train.py calls it once, before the first update

Classes are exchanged (`layer.__class__ = ...`): weights, their names and all that hangs on the modules (DDP,
FSDP, LoRA, torch.compile) stay as they are.
"""
import functools

import torch
import torch.nn.functional as F

from config import Config
from lm import Layer, Projection
from speed.kernels import data_pointers, kernels, readable
from speed.products import BLOCK, block_attention, block_weights, product
from system.devices import device_of


def optimize_training(module, optimizers: list, config: Config):
    """Lets the layers of a model that is trained on the CPU, and DAdaptAdam, work as the classes below.

    On other devices, and for the layers in float16, nothing changes.
    """
    if device_of(module).type != "cpu":
        return
    for optimizer in optimizers:
        if hasattr(optimizer, "update_moments") and is_plain(optimizer) and kernels():  # is a DAdaptAdam
            optimizer.__class__ = subclass(FusedLoops, type(optimizer))
    for part in module.modules():
        if isinstance(part, Layer) and config.dtype != "float16":
            part.__class__ = subclass(FasterLayer, type(part))
        if isinstance(part, Layer) and config.dtype == "bfloat16":
            part.attn.__class__ = subclass(FasterAttention, type(part.attn))
        if isinstance(part, Projection) and config.dtype == "float32":
            part.__class__ = subclass(FasterProjection, type(part))


@functools.cache
def subclass(methods, cls):
    """cls with some methods replaced. It may be a class that FSDP or LoRA has made of one of lm.py."""
    return type(methods.__name__, (methods, cls), {})


# --- the layers -------------------------------------------------------------------------------------------

class FasterLayer:
    """For lm.Layer: the feed-forward network keeps less for the backward pass."""

    def feed(self, x):
        return Product.apply(self.ff1(x), self.ff2.weight, True)


class FasterAttention:
    """For lm.Attention, in bfloat16."""

    def attend(self, q, k, v):
        return BlockAttention.apply(q.bfloat16(), k.bfloat16(), v.bfloat16())


class FasterProjection:
    """For lm.Projection, in float32."""

    def forward(self, x):
        return Product.apply(x, self.weight)

    def rows(self, x, start: int, end: int):
        return Product.apply(x, self.weight[start:end])


class Product(torch.autograd.Function):
    """x (..., in), weight (out, in) -> f(x) W^T by `product`. f is gelu, or nothing.

    The backward pass computes gelu(x) again, instead of the forward pass keeping it.
    """

    @staticmethod
    def forward(ctx, x, weight, gelu=False):
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        return product(F.gelu(x) if gelu else x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.T)
        if ctx.gelu:
            grad_x = torch.ops.aten.gelu_backward(grad_x, x)
            x = F.gelu(x)
        grad_weight = product(grad.flatten(0, -2).T, x.flatten(0, -2).T)
        return grad_x, grad_weight, None


class BlockAttention(torch.autograd.Function):
    """Causal attention from plain products in bfloat16: twice as fast on the CPU as torch's flash attention.

    Like that it keeps no attention weights: the backward pass computes them again. Its rounding error is the
    same, too.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        q = q.contiguous() * q.shape[-1] ** -0.5
        k, v = k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v)
        return block_attention(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        S = q.shape[2]
        for start in range(0, S, BLOCK):
            end = min(start + BLOCK, S)
            block = slice(start, end)
            p = block_weights(q[:, :, block], k[:, :, :end])                # (B, H, end - start, end)
            dv[:, :, :end] += p.mT @ grad[:, :, block]
            dp = grad[:, :, block] @ v[:, :, :end].mT
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)           # p * (dp - sum(p * dp))
            dq[:, :, block] = ds @ k[:, :, :end]
            dk[:, :, :end] += ds.mT @ q[:, :, block]
        return dq * q.shape[-1] ** -0.5, dk, dv


# --- the optimizer ----------------------------------------------------------------------------------------

def is_plain(optimizer) -> bool:
    """Whether kernels.c can read the weights: float32, on the CPU, without gaps."""
    params = optimizer.param_groups[0]["params"]
    return all(readable(p, torch.float32) for p in params)


class FusedLoops:
    """For train.DAdaptAdam: its formulas in kernels.c, which passes over memory once in each method."""

    def update_moments(self, g, m, v, s, lam):
        group, = self.param_groups
        b1, b2 = group["betas"]
        sums = torch.zeros(3, dtype=torch.float32)
        for gradient, *moments in zip(g, m, v, s):
            gradient = gradient.contiguous()
            kernels().dadapt_moments(
                torch.get_num_threads(), *data_pointers(gradient, *moments), gradient.numel(), lam, b1, b2,
                group["eps"], *data_pointers(sums))
        return sums

    def update_weights(self, weights, m, v, shrink):
        eps = self.param_groups[0]["eps"]
        for tensors in zip(weights, m, v):
            pointers = data_pointers(*tensors)
            kernels().dadapt_step(torch.get_num_threads(), *pointers, tensors[0].numel(), shrink, eps)
