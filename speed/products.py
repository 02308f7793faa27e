"""Products and causal attention of many positions on the CPU: in training, and in front of generation.

Both compute what F.linear and F.scaled_dot_product_attention compute, up to rounding, in about half the time.
"""
import functools

import torch
import torch.nn.functional as F

from speed.kernels import capability

BLOCK = 128     # queries that attend together: most keys that they may not see are then not multiplied at all


def product(x, weight):
    """x (..., in), weight (out, in) -> x W^T, (..., out), by oneDNN.

    torch takes it for bfloat16 on its own. In float32 it calls MKL, which is a tenth faster on Intel's
    processors, and half as fast on AMD's.
    """
    by_torch = x.dtype != torch.float32 or not x.is_cpu or torch.compiler.is_compiling()
    if by_torch or not has_onednn() or made_by_intel():
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def made_by_intel() -> bool:
    return "Intel" in str(capability("cpu_name"))


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def block_weights(q, k, padding_bias=None):
    """Scaled queries (B, H, n, E), the last n of the keys (B, H, s, E) -> attention weights (B, H, n, s).

    padding_bias (B, 1, 1, s) is added to the scores.
    """
    n = q.shape[2]
    scores = q @ k.mT
    if padding_bias is not None:
        scores += padding_bias
    scores[..., -n:] += scores.new_full((n, n), float("-inf")).triu_(1)     # what comes later is not seen
    return scores.softmax(-1)


def block_attention(q, k, v, padding_bias=None):
    """Causal attention, block after block of scaled queries; q, k, v and the result (B, H, S, E)."""
    out, S = torch.empty_like(q), q.shape[2]
    for start in range(0, S, BLOCK):
        end = min(start + BLOCK, S)
        bias = None if padding_bias is None else padding_bias[..., :end]
        weights = block_weights(q[:, :, start:end], k[:, :, :end], bias)
        out[:, :, start:end] = weights @ v[:, :, :end]
    return out
