"""The language model of MusicGen: a transformer over interleaved codebooks (MusicGen 2.2 - 2.4).

    codes (B, K, T) --pattern--> sequence (B, K, S)
       --K embeddings, summed--> (B, S, D)
       --[melody | text] in front (the prefix), plus positions--> (B, P + S, D)
       --all layers: x += attention(norm(x)); [x += cross-attention(norm(x), text)]; x += feed(norm(x))-->
       --K linear heads--> logits (B, K, S, V)               column s predicts the codes of column s + 1

    python lm.py            # parameters of the paper's models; decoding with the cache against one plain pass

Training reads the whole sequence at once under a causal mask. Generation (sample.py) reads it column by
column and keeps the keys and values of what it has read in a `Cache`. On a CPU faster layers that compute the
same take over: speed/decoding.py in generation, speed/training.py in training.
"""
import math
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import patterns
from checkpoints.files import load_strict, open_checkpoint, shapes_only
from checkpoints.lm_formats import read_config, read_tensors_for, write_lm
from conditioners import Conditioners, Conditions, padding_last
from config import Config, load

# --- the transformer --------------------------------------------------------------------------------------


def sinusoid(positions, dim, max_period):
    """Positions (...) -> embeddings (..., dim): cosines in the first half, sines in the second.

    cos(p / max_period ** (i / (dim/2 - 1))): audiocraft's formula. "Attention is all you need" interleaves
    sines and cosines and divides by dim/2.
    """
    half = dim // 2
    index = torch.arange(half, device=positions.device, dtype=torch.float32)
    periods = max_period ** (index / (half - 1))
    phase = positions[..., None].float() / periods
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def rotate(x, angles):
    """Rotary positions, pairs of channels of x (B, H, S, E) turned by angles (B, S, E/2); RoFormer, 3.2.2."""
    a, b = x.float().chunk(2, dim=-1)
    cos = angles.cos()[:, None]                                             # (B, 1, S, E/2)
    sin = angles.sin()[:, None]
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.cat(turned, dim=-1).to(x.dtype)


class Projection(nn.Linear):
    """Linear layer without a bias, x (..., in) -> (..., out): all matrices of the transformer."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def rows(self, x, start, end):
        """The outputs start ... end alone, where one matrix packs several."""
        return F.linear(x, self.weight[start:end])


class Attention(nn.Module):
    """Causal multi-head self-attention, one packed projection for query, key and value, no biases."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        width = config.dim // config.num_heads                              # E
        self.qkv = Projection(config.dim, 3 * config.dim)
        self.out = Projection(config.dim, config.dim)
        self.q_norm = nn.LayerNorm(width) if config.qk_layer_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width) if config.qk_layer_norm else nn.Identity()

    def forward(self, x, angles=None, cache=None):
        """x (B, S, D) -> (B, S, D). angles (B, S, E/2): rotary positions; cache: the layer's `LayerCache`."""
        B, S, D = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, S, E) each
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        y = self.attend(q, k, v) if cache is None else cache.attend(q, k, v)
        y = y.transpose(1, 2).reshape(B, S, D)
        return self.out(y)

    def attend(self, q, k, v):
        """Every position attends to itself and those before it; q, k, v and the result (B, H, S, E)."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CrossAttention(Attention):
    """Attention of the music to a condition. No positions, as in audiocraft."""

    def forward(self, x, condition, mask=None, cache=None):
        """x (B, S, D), condition (B, n, D), mask (B, n) bool -> (B, S, D)."""
        B, S, D = x.shape
        q = self.qkv.rows(x, 0, D).view(B, S, self.num_heads, -1)
        q = self.q_norm(q.transpose(1, 2))                                  # (B, H, S, E)
        k_v = self.keys_values(condition) if cache is None or cache.condition is None else cache.condition
        if cache is not None:
            cache.condition = k_v               # the same at every call
        if mask is not None:
            mask = mask[:, None, None]                                      # (B, 1, 1, n)
        y = F.scaled_dot_product_attention(q, *k_v, attn_mask=mask)         # (B, H, S, E)
        y = y.transpose(1, 2).reshape(B, S, D)
        return self.out(y)

    def keys_values(self, condition):
        """Keys and values (B, H, n, E) of a condition (B, n, D)."""
        B, n, D = condition.shape
        kv = self.qkv.rows(condition, D, 3 * D)
        k, v = kv.view(B, n, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.k_norm(k), v


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention, cross-attention where the model has it, feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = Attention(config)
        self.norm_cross = self.cross_attn = None
        if "cross" in (config.text, config.melody):
            self.norm_cross = nn.LayerNorm(config.dim)
            self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim)
        self.ff1 = Projection(config.dim, config.hidden_scale * config.dim)
        self.ff2 = Projection(config.hidden_scale * config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles=None, cross=None, cross_mask=None, cache=None):
        x = x + self.attn(self.norm1(x), angles, cache)
        if self.cross_attn is not None and cross is not None:
            x = x + self.cross_attn(self.norm_cross(x), cross, cross_mask, cache)
        return x + self.dropout(self.feed(self.norm2(x)))

    def feed(self, x):
        """The feed-forward network."""
        return self.ff2(F.gelu(self.ff1(x)))


class LMModel(nn.Module):
    """Transformer over K streams of codes with its conditioners (MusicGen 2.4)."""

    packed = False      # True where speed/decoding.py has replaced the layers by kernels.c

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.pattern = patterns.from_config(config)
        self.special = config.card              # the token of the cells that hold no code
        # one table for K codebooks: row k * (V + 1) + code
        self.emb = nn.Embedding(config.n_q * (config.card + 1), config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.out_norm = nn.LayerNorm(config.dim)
        self.lm_heads = Projection(config.dim, config.n_q * config.card)    # K heads in one
        self.conditioner = Conditioners(config)
        # Without full sinusoids, frames of zeros ("no text", "no melody") would reach the norms as zeros,
        # where each multiplies the gradient by 1 / sqrt(eps). A learned vector on prefix frames avoids that.
        self.prefix_mark = None
        if config.positional_embedding != "sin":
            self.prefix_mark = nn.Parameter(torch.randn(config.dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Truncated normal of std 1 / sqrt(inputs), in layer n divided by sqrt(2 n) ("current" scaling)."""
        def init(weight, divisor=1.0):
            std = weight.shape[-1] ** -0.5 / divisor
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

        init(self.emb.weight)
        init(self.lm_heads.weight)
        if self.prefix_mark is not None:
            init(self.prefix_mark)
        for depth, layer in enumerate(self.layers, start=1):
            for module in layer.modules():
                if isinstance(module, Projection):
                    init(module.weight, math.sqrt(2 * depth))

    def embed(self, sequence):
        """Sequence (B, K, S) of codes and special tokens -> sum of the K embeddings (B, S, D)."""
        k = torch.arange(sequence.shape[1], device=sequence.device)
        rows = sequence + k[:, None] * (self.config.card + 1)
        return self.emb(rows).sum(1)                                        # (B, K, S, D) -> (B, S, D)

    def forward(self, sequence, conditions=Conditions(), cache=None):
        """Sequence (B, K, S) -> logits (B, K, S, V): column s is the prediction of column s + 1.

        With a `cache` it continues what that has seen, the prefix in front; the last column alone comes out.
        """
        B, K, S = sequence.shape
        if K != self.config.n_q:
            raise ValueError(f"{K} codebooks, not {self.config.n_q}")
        x = self.embed(sequence)                                            # (B, S, D)
        start = 0 if cache is None else cache.columns
        if conditions.added is not None:
            x = x + conditions.added_to(start, S)
        P, mask = 0, None
        if conditions.prefix is not None and start == 0:
            P, mask = conditions.prefix_length, conditions.prefix_mask
            prefix = conditions.prefix
            if self.prefix_mark is not None:
                prefix = prefix + self.prefix_mark
            x = torch.cat([prefix.to(x.dtype), x], dim=1)                   # (B, P + S, D)
        positions = self.positions(conditions, start, S, B)
        x, angles = self.add_positions(x, positions)

        if cache is not None:
            cache.begin(mask, P + S)
            x = self.run_layers(x, angles, conditions, cache)
            cache.end(P, S)
        elif mask is not None:
            x, angles, way_back = padding_last(x, angles, mask)
            x = self.run_layers(x, angles, conditions)
            x = x.gather(1, way_back[..., None].expand_as(x))
        else:
            x = self.run_layers(x, angles, conditions)
        x = x[:, P if cache is None else -1:]       # the prefix is neither trained on nor returned
        logits = self.lm_heads(self.out_norm(x))                            # (B, S, K * V)
        return logits.unflatten(-1, (K, -1)).transpose(1, 2)                # (B, K, S, V)

    def run_layers(self, x, angles, conditions, cache=None):
        """x (B, P + S, D) through all layers."""
        for n, layer in enumerate(self.layers):
            arguments = (x, angles, conditions.cross, conditions.cross_mask)
            if cache is not None:
                x = layer(*arguments, cache.layers[n])
            elif self.config.checkpointing and self.training:
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x

    def positions(self, conditions, start, S, B):
        """Position of each frame of [prefix | sequence], (B, P + S), or of the sequence alone once start > 0.

        "sin": counted from 0 at the first prefix frame, over the frames that an item has. (Audiocraft counts
        padding too, so there the longest text of a batch shifts all.) "rope", "sin_rope": time in columns, so
        that a melody frame has the position of the music it belongs to; text comes before time 0.
        """
        device = self.emb.weight.device
        columns = torch.arange(start, start + S, device=device).float().expand(B, S)
        if conditions.prefix is None:
            return columns
        if "rope" in self.config.positional_embedding:
            before = conditions.prefix_time.float().expand(B, -1)           # (B, P)
        else:
            count = conditions.prefix_mask.cumsum(1)
            before = count.float() - 1                                      # (B, P)
            columns = columns + count[:, -1:]
        return columns if start else torch.cat([before, columns], dim=1)

    def add_positions(self, x, positions):
        """x (B, n, D) with sinusoids added, and the angles (B, n, E/2) of rotary positions or None."""
        config, angles = self.config, None
        if "sin" in config.positional_embedding:
            waves = sinusoid(positions, config.dim, config.max_period)      # (B, n, D)
            x = x + config.positional_scale * waves.to(x.dtype)
        if "rope" in config.positional_embedding:
            half = config.dim // config.num_heads // 2
            index = torch.arange(half, device=x.device, dtype=torch.float32)
            angles = positions[..., None] / config.max_period ** (index / half)
        return x, angles

    def new_cache(self, batch, max_length):
        """An empty cache for `batch` rows of max_length positions."""
        return Cache(self.config, batch, max_length, self.emb.weight)

    # --- training: the loss -------------------------------------------------------------------------------

    def loss(self, codes, conditions):
        """Cross-entropy of codes (B, K, T) under their conditions: the mean over codebooks, and each (K,).

        conditions: {"text": B strings or None, "melody": B chroma (M, Q) or None}, see `Conditioners`. The
        mean counts all codebooks alike, though later ones have fewer valid columns (as audiocraft).
        """
        B, K, T = codes.shape
        S = self.pattern.steps(T, keep_only_valid_steps=True)
        drop_probability = None
        if self.training and self.config.history_dropout:
            # A melody gives the tempo away: words about it are learned from the items without one.
            factor = [1.0 if melody is None else 0.5 for melody in conditions["melody"]]
            drop_probability = self.config.history_dropout * torch.tensor(factor, device=codes.device)
        encoded = self.conditioner(conditions, S)
        logits, mask = self.compute_predictions(codes, encoded, drop_probability=drop_probability)
        weight = 1.0
        if self.training and self.config.early_weight != 1:
            frames = torch.arange(T, device=codes.device)
            early = frames < round(self.config.early_seconds * self.config.frame_rate)
            weight = torch.where(early, self.config.early_weight, 1.0)      # (T,)
        ce = codebook_cross_entropy(logits, codes, mask, weight)            # (K,)
        return ce.mean(), ce.detach()

    def compute_predictions(self, codes, conditions=Conditions(), keep_only_valid_steps=True,
                            drop_probability=None):
        """Codes (B, K, T) -> logits (B, K, T, V) aligned with them, and the mask (K, T) of those that exist.

        keep_only_valid_steps: without the last columns, which the delays cause. Audiocraft trains so, and the
        last d_k frames of codebook k are then never predicted. drop_probability (B,): see `hide_codes`.
        """
        T = codes.shape[-1]
        sequence, _ = self.pattern.build(codes, self.special, keep_only_valid_steps)
        if drop_probability is not None:
            sequence = self.hide_codes(sequence, drop_probability)
        return self.pattern.revert_logits(self(sequence, conditions), T, keep_only_valid_steps)

    def hide_codes(self, sequence, drop_probability):
        """Sequence (B, K, S) in which an item keeps few of its columns, with its drop_probability (B,); ours.

        The share that it keeps is drawn as u ** 8: most items that are hit keep next to none. Where what has
        sounded says little, the model has to read the text.
        """
        B, _, S = sequence.shape
        item, kept, column = (torch.rand(B, 1, n, device=sequence.device) for n in (1, 1, S))
        hit = item < drop_probability[:, None, None]
        hidden = hit & (column > kept ** 8)                                 # (B, 1, S)
        return torch.where(hidden, self.special, sequence)

    # --- saving and loading: the formats are in checkpoints/lm_formats.py ---------------------------------

    def save(self, directory, compact=False):
        """Writes config.json and model.safetensors. compact: int8 and float16, a quarter of the size."""
        write_lm(self, directory, compact)

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=None, prepare=None):
        """Reads our directory, a transformers directory or hub id, or one in audiocraft's format.

        dtype: of the weights, None keeps the file's. prepare(lm, dtype): called before the weights are read
        (speed.optimize_for_cpu). Raises UserError, listing the tensors that do not fit.
        """
        directory = open_checkpoint(name_or_dir)
        config, origin = read_config(directory)
        with shapes_only():
            lm = cls(config)
        if prepare is not None:
            prepare(lm, dtype)
        load_strict(lm, read_tensors_for(lm, directory, origin, dtype), directory)
        return lm.eval()


def codebook_cross_entropy(logits, codes, mask, weight=1.0):
    """logits (B, K, T, V), codes (B, K, T), mask (K, T) or (B, K, T) -> mean over valid positions, (K,).

    Minus the log-probability of each code, given all columns before its own (MusicGen, equation 3).
    weight: of each frame, (T,) or 1.
    """
    B, K, T, V = logits.shape
    if codes.shape != (B, K, T):
        raise ValueError(f"codes {tuple(codes.shape)} for the logits of {(B, K, T)}")
    mask = mask.expand(B, K, T)
    ce = []
    for k in range(K):      # one codebook at a time: less memory
        # Invalid logits are NaN, so that a wrong mask fails loudly: kept out of the sum and of its gradient.
        valid = logits[:, k].float().where(mask[:, k, :, None], 0.0)        # (B, T, V)
        each = F.cross_entropy(valid.flatten(0, 1), codes[:, k].flatten(), reduction="none")
        ce.append(each.view(B, T))
    weight = mask * weight                                                  # (B, K, T)
    total = (torch.stack(ce, 1) * weight).sum((0, 2))
    return total / weight.sum((0, 2)).clamp(min=1)


# --- keys and values of what has been read ----------------------------------------------------------------


class Cache:
    """Keys and values of every layer for `max_length` positions. Padding stays in its place and is masked."""

    def __init__(self, config, batch, max_length, like):
        """like: a tensor with the device and dtype that keys and values are to have."""
        self.max_length = max_length
        self.dtype = like.dtype
        self.length = 0                         # positions filled
        self.columns = 0                        # those of them that are columns of the music
        self.padding_bias = None                # (B, 1, 1, max_length): hugely negative at padding, else 0
        H, E = config.num_heads, config.dim // config.num_heads
        zeros = like.new_zeros(2, config.num_layers, batch, H, max_length * E)
        self.layers = [LayerCache(self, keys, values, E) for keys, values in zip(*zeros)]

    def begin(self, prefix_mask, new):
        """Before `new` positions go through the layers; the first time with the prefix's mask (B, P)."""
        if self.length > 0 and new > 1:
            raise ValueError("a filled cache takes one column at a time")
        if self.length == 0 and prefix_mask is not None and not prefix_mask.all():
            # not -inf: a row of padding sees nothing but itself, and must not become NaN
            bias = (~prefix_mask).to(self.dtype) * (torch.finfo(self.dtype).min / 2)
            bias = F.pad(bias, (0, self.max_length - bias.shape[1]))
            self.padding_bias = bias[:, None, None].contiguous()

    def bias(self, new):
        """What is added to the scores of `new` positions, (B, 1, 1 or new, length), or None for nothing."""
        if self.padding_bias is None:
            return None
        bias = self.padding_bias[..., :self.length + new]
        if self.length == 0:                    # nobody sees what comes later
            bias = bias + bias.new_full((new, new), float("-inf")).triu(1)
        return bias

    def end(self, P, S):
        """After a prefix of P frames and S columns have gone through the layers."""
        self.length += P + S
        self.columns += S


class LayerCache:
    """One layer's part of a `Cache`. Keys are stored transposed: one query then reads memory in order."""

    def __init__(self, cache, keys, values, E):
        self.cache = weakref.proxy(cache)       # no circle: what is read no more is freed at once
        self.keys = keys.unflatten(-1, (E, -1))                             # (B, H, E, max_length)
        self.values = values.unflatten(-1, (-1, E))                         # (B, H, max_length, E)
        self.condition = None                   # keys and values of the condition that cross-attention reads

    def attend(self, q, k, v):
        """Stores k, v (B, H, S, E) behind what is there, and attends from q (B, H, S, E) to all of it."""
        start, end = self.cache.length, self.cache.length + q.shape[2]
        self.keys[..., start:end] = k.transpose(2, 3)
        self.values[..., start:end, :] = v
        bias = self.cache.bias(end - start)
        if start == 0:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        scores = q @ self.keys[..., :end] * q.shape[-1] ** -0.5             # (B, H, 1, end)
        if bias is not None:
            scores = scores + bias
        return scores.softmax(-1) @ self.values[..., :end, :]


def demo():
    torch.manual_seed(0)
    print("parameters of the paper's models (language model with its projections; made without memory):")
    for name in ("config/melody.py", "config/text.py"):
        with shapes_only():
            lm = LMModel(load([str(Path(__file__).parent / name)]))
        print(f"  {name:18} {sum(p.numel() for p in lm.parameters()) / 1e9:.2f} B")
    config = Config(dim=64, num_heads=4, num_layers=3, card=32, t5="bytes", segment_duration=1.0)
    lm, T = LMModel(config).eval(), 20
    codes = torch.randint(config.card, (2, config.n_q, T))
    conditions = {"text": ["slow flute", None], "melody": [None, None]}
    with torch.no_grad():
        sequence, _ = lm.pattern.build(codes, lm.special)
        S = sequence.shape[-1]
        encoded = lm.conditioner(conditions, S)
        full = lm(sequence, encoded)
        cache = lm.new_cache(2, S + encoded.prefix_length)
        columns = [lm(sequence[..., s:s + 1], encoded, cache) for s in range(S)]
    error = (torch.cat(columns, 2) - full).abs().max()
    print(f"\ncodes {tuple(codes.shape)} -> sequence {tuple(sequence.shape)} -> logits {tuple(full.shape)}")
    print(f"column by column with the cache against all at once: largest difference {error:.1e}")
    loss = lm.loss(codes, conditions)[0]
    print(f"cross-entropy, untrained: {loss:.2f} (uniform: {math.log(config.card):.2f})")


if __name__ == "__main__":
    demo()
