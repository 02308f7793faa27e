"""The encoder of a small T5 (arXiv 1910.10683, 2.1; 2002.05202), for generation.

transformers' class takes two seconds to import, longer than all else that the shipped model loads. This one
has its parameters, by its names, and gives its numbers up to rounding. Training takes transformers' class.
"""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

BUCKETS, MAX_DISTANCE = 32, 128     # of relative positions, T5's defaults


class SmallT5(nn.Module):
    """Token ids (B, P) and their mask (B, P) -> an object with `last_hidden_state` (B, P, t5_dim).

    values: the arguments of a T5Config, of which the widths are read; see `small_t5` in checkpoints/t5.py.
    """

    def __init__(self, values: dict):
        super().__init__()
        self.values = values
        self.shared = nn.Embedding(values["vocab_size"], values["d_model"])
        self.encoder = nn.Module()
        self.encoder.embed_tokens = self.shared
        self.encoder.block = nn.ModuleList([block(values, n == 0) for n in range(values["num_layers"])])
        self.encoder.final_layer_norm = Norm(values["d_model"])

    @property
    def config(self):
        """The T5Config, for an export to transformers."""
        from transformers import T5Config
        return T5Config(**self.values)

    def forward(self, input_ids, attention_mask):
        x = self.shared(input_ids)                                          # (B, P, D)
        blocks = self.encoder.block
        table = blocks[0].layer[0].SelfAttention.relative_attention_bias    # that of the first serves all
        bias = table(buckets(x.shape[1]).to(x.device)).permute(2, 0, 1)     # (H, P, P)
        bias = bias[None].masked_fill(attention_mask[:, None, None] == 0, torch.finfo(x.dtype).min)
        for layers in blocks:
            attention, feed_forward = layers.layer
            x = x + attention.SelfAttention(attention.layer_norm(x), bias)
            x = x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))
        return SimpleNamespace(last_hidden_state=self.encoder.final_layer_norm(x))


def block(values: dict, first: bool) -> nn.Module:
    """The modules of one block, named as in transformers."""
    attention, feed_forward, both = nn.Module(), nn.Module(), nn.Module()
    attention.SelfAttention = Attention(values["d_model"], values["num_heads"], values["d_kv"], first)
    attention.layer_norm = Norm(values["d_model"])
    feed_forward.DenseReluDense = FeedForward(values["d_model"], values["d_ff"])
    feed_forward.layer_norm = Norm(values["d_model"])
    both.layer = nn.ModuleList([attention, feed_forward])
    return both


class Norm(nn.Module):
    """RMS norm: x / sqrt(mean of x²), times a weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Attention(nn.Module):
    """Self-attention over all positions. Logits are not scaled; each distance and head has a bias."""

    def __init__(self, width: int, num_heads: int, head_width: int, with_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_width
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        if with_bias:
            self.relative_attention_bias = nn.Embedding(BUCKETS, num_heads)

    def forward(self, x, bias):
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))                   # (B, H, P, E) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GELU(x W0) * (x W1), then a linear layer back."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.wi_0 = nn.Linear(width, inner, bias=False)
        self.wi_1 = nn.Linear(width, inner, bias=False)
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


def buckets(P: int):
    """The bucket (P, P) of each distance between positions: half of the buckets are for each side.

    Near distances have one each; far ones share them on a logarithmic scale.
    """
    position = torch.arange(P, device="cpu")
    distance = position[None] - position[:, None]                           # key - query
    half, near = BUCKETS // 2, BUCKETS // 4
    size = distance.abs()
    far = torch.log(size.clamp(min=1).float() / near) / math.log(MAX_DISTANCE / near)
    far = near + (far * (half - near)).long()
    number = torch.where(size < near, size, far.clamp(max=half - 1))
    return number + half * (distance > 0)
