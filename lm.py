"""The language model of MusicGen: a transformer over interleaved codebooks (MusicGen 2.2 - 2.4).

    codes (B, K, T) --pattern--> sequence (B, K, S)          delay pattern, S = T + K steps
       --K embeddings, summed--> (B, S, D)
       --[melody | text] put in front (prefix), + positions--> (B, P + S, D)
       --N layers: x += attention(norm(x)); [x += cross-attention(norm(x), text)]; x += feedforward(norm(x))-->
       --K linear heads--> logits (B, K, S, V)               step s predicts the codes of step s + 1

    python lm.py            # parameters of the paper's models, and a check that cached decoding equals the plain pass

Training reads the whole sequence at once under a causal mask; `generate` runs it step by step with a cache of
keys and values. Everything the mathematics needs is in `LMModel.forward`; the key/value cache touches it in two
lines. Fast decoding on the CPU stands apart in checkpoints/precision.py, the checkpoints of others in
checkpoints/formats.py.
"""
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import patterns
from conditioners import Conditioners, Conditions
from config import Config, load

# --- the transformer -------------------------------------------------------------------------------------------


def sinusoid(positions: torch.Tensor, dim: int, max_period: float) -> torch.Tensor:
    """Positions (...) -> embeddings (..., dim): cosines in the first half, sines in the second.

    cos(p / max_period ** (i / (dim/2 - 1))): the original's formula, which differs from "Attention is all you
    need" in the order of the halves and the "- 1".
    """
    half = dim // 2
    index = torch.arange(half, device=positions.device, dtype=torch.float32)
    phase = positions[..., None].float() / max_period ** (index / (half - 1))
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions: pairs of channels of x (B, H, S, E) turned by angles (B, S, E/2) (RoFormer, 3.2.2)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]                             # (B, 1, S, E/2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Projection(nn.Linear):
    """x (..., in) -> (..., out); `rows` takes a part of one that packs several."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.product = F.linear     # precision.py has a quicker one for training on the CPU

    def forward(self, x, rows=None):
        return self.product(x, self.weight if rows is None else self.weight[rows])


def causal(q, k, v):
    """Attention of every position to itself and those before it; q, k, v and the result (B, H, S, E)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    """Multi-head attention, one packed projection for query, key and value, no biases."""

    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.num_heads
        width = config.dim // config.num_heads                                          # E
        self.qkv = Projection(config.dim, 3 * config.dim)
        self.out = Projection(config.dim, config.dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(width) if config.qk_layer_norm else nn.Identity() for _ in range(2))
        self.attend = causal        # precision.py has a quicker one for training on the CPU

    def forward(self, x, angles=None, mask=None, cache=None):
        """Causal self-attention. x (B, S, D); angles (B, S, E/2): rotary positions; mask: what `cache` wants."""
        B, S, D = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)       # (B, H, S, E) each
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            x = cache.attend(q, k, v, mask)
        else:
            x = self.attend(q, k, v)                                                    # (B, H, S, E)
        return self.out(x.transpose(1, 2).reshape(B, S, D))

    def keys_values(self, condition):
        """Keys and values (B, H, P', E) of a condition (B, P', D), for `cross`."""
        B, P, D = condition.shape
        k, v = self.qkv(condition, slice(D, None)).view(B, P, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.k_norm(k), v

    def cross(self, x, keys_values, mask=None):
        """Cross-attention of x (B, S, D) to a condition; mask (B, P') bool. No positions, as in the original."""
        B, S, D = x.shape
        q = self.qkv(x, slice(D)).view(B, S, self.heads, -1).transpose(1, 2)  # (B, H, S, E)
        mask = None if mask is None else mask[:, None, None]
        x = F.scaled_dot_product_attention(self.q_norm(q), *keys_values, attn_mask=mask)  # (B, H, S, E)
        return self.out(x.transpose(1, 2).reshape(B, S, D))


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention, cross-attention where the model has it, feed-forward."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = Attention(config)
        self.norm_cross = self.cross = None
        if "cross" in (config.text, config.melody):
            self.norm_cross = nn.LayerNorm(config.dim)
            self.cross = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim)
        self.ff1 = Projection(config.dim, config.hidden_scale * config.dim)
        self.ff2 = Projection(config.hidden_scale * config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles=None, mask=None, cache=None, cross=None, cross_mask=None):
        x = x + self.attn(self.norm1(x), angles, mask, cache)
        if self.cross is not None and cross is not None:
            if not isinstance(cross, tuple):    # a condition; with a cache its keys and values, computed once
                cross = self.cross.keys_values(cross)
            x = x + self.cross.cross(self.norm_cross(x), cross, cross_mask)
        return x + self.dropout(self.feed(self.norm2(x)))

    def feed(self, x):
        """The feed-forward part; precision.py has one for training on the CPU that keeps less."""
        return self.ff2(F.gelu(self.ff1(x)))


class LMModel(nn.Module):
    """Transformer over K streams of codes with its conditioners (MusicGen 2.4)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.pattern = patterns.from_config(config)
        self.special = config.card              # the token of the cells that hold no code
        # one table for K codebooks: row k * (V + 1) + code
        self.emb = nn.Embedding(config.n_q * (config.card + 1), config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.out_norm = nn.LayerNorm(config.dim)
        self.heads = Projection(config.dim, config.n_q * config.card)                   # K heads in one
        self.conditioner = Conditioners(config)
        # Where no position is added, frames of zeros ("no text", "no melody") would reach the norms as zeros, whose
        # gradient there is 1 / sqrt(eps) for every layer: a learned vector on all prefix frames keeps them away.
        self.prefix_mark = nn.Parameter(torch.randn(config.dim)) if config.positional_embedding != "sin" else None
        self.checkpointing = config.checkpointing
        self.cache = Cache                      # what `generate` keeps keys and values in
        self.init_weights()

    def compile_layers(self):
        """torch.compile, layer by layer: all alike, they compile once. Generation then leaves kernels.c alone."""
        self.cache = Cache
        for layer in self.layers:
            layer.compile()

    @torch.no_grad()
    def init_weights(self):
        """Truncated normal of std 1 / sqrt(inputs), in layer n divided by sqrt(2 n) ("current" depth scaling)."""
        def init(weight, depth=None):
            std = weight.shape[-1] ** -0.5 / (1 if depth is None else math.sqrt(2 * depth))
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        init(self.emb.weight)
        init(self.heads.weight)
        if self.prefix_mark is not None:
            init(self.prefix_mark)
        for depth, layer in enumerate(self.layers, start=1):
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    init(module.weight, depth)

    def embed(self, sequence: torch.Tensor) -> torch.Tensor:
        """Sequence (B, K, S) of codes and special tokens -> sum of the K embeddings (B, S, D)."""
        K = sequence.shape[1]
        rows = torch.arange(K, device=sequence.device)[:, None] * (self.config.card + 1)
        return self.emb(sequence + rows).sum(1)                                         # (B, K, S, D) -> (B, S, D)

    def forward(self, sequence: torch.Tensor, conditions: Conditions = Conditions(), cache=None) -> torch.Tensor:
        """Sequence (B, K, S) -> logits (B, K, S, V): row s is the prediction of step s + 1.

        With a `cache`, the sequence continues what the cache has seen; the prefix enters at its first call.
        """
        B, K, S = sequence.shape
        assert K == self.config.n_q, (K, self.config.n_q)
        x = self.embed(sequence)                                                        # (B, S, D)
        start = cache.steps if cache is not None else 0
        if conditions.added is not None:
            added = conditions.added                                                    # (B, S, D) or (B, 1, D)
            x = x + (added if added.shape[1] == 1 else added[:, start:start + S])
        prefix = conditions.prefix if start == 0 else None
        P = 0 if prefix is None else prefix.shape[1]
        if P:
            prefix = prefix if self.prefix_mark is None else prefix + self.prefix_mark
            x = torch.cat([prefix.to(x.dtype), x], dim=1)                               # (B, P + S, D)
        positions = self.positions(conditions, start, S, B, x.device)                   # (B, P + S)

        angles = mask = None
        if "sin" in self.config.positional_embedding:
            waves = sinusoid(positions, self.config.dim, self.config.max_period)        # (B, P + S, D)
            x = x + self.config.positional_scale * waves.to(x.dtype)
        if "rope" in self.config.positional_embedding:
            half = self.config.dim // self.config.num_heads // 2
            angles = positions[..., None] / self.config.max_period ** (torch.arange(half, device=x.device) / half)
        restore = None
        if cache is not None:
            mask = cache.begin(conditions, P, S)
        elif P and conditions.prefix_mask is not None:
            # padding moves to the end of its row, where causal attention cannot see it: no mask is needed
            real = F.pad(conditions.prefix_mask, (0, S), value=True)                    # (B, P + S)
            order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
            restore = order.argsort(dim=1)[:, P:, None].expand(-1, -1, x.shape[-1])
            x = x.gather(1, order[..., None].expand_as(x))
            angles = angles if angles is None else angles.gather(1, order[..., None].expand_as(angles))

        if cache is not None:
            x = cache.through(self.layers, x, angles, mask, conditions)
            cache.end(P, S)
        else:
            for layer in self.layers:
                args = (x, angles, None, None, conditions.cross, conditions.cross_mask)
                x = torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False) if (
                    self.checkpointing and self.training) else layer(*args)
        # prefix positions are neither trained on nor returned
        x = x.gather(1, restore) if restore is not None else x[:, P:]                   # (B, S, D)
        logits = self.heads(self.out_norm(x))                                           # (B, S, K * V)
        return logits.view(B, S, K, -1).transpose(1, 2)                                 # (B, K, S, V)

    def positions(self, conditions: Conditions, start: int, S: int, B: int, device) -> torch.Tensor:
        """Position of every frame of [prefix | sequence], (B, P + S), or of the sequence alone once start > 0.

        "sin": counted from 0 at the first prefix frame, over the frames that an item has (the original counts
        padding too, so there the length of the longest text shifts everybody). "rope": time in steps, so that a
        melody frame has the position of the music it belongs to; text comes before time 0. "sin_rope": this time,
        both ways.
        """
        steps = torch.arange(start, start + S, device=device, dtype=torch.float32).expand(B, S)
        if conditions.prefix is None:
            return steps
        mask = conditions.prefix_mask
        if "rope" in self.config.positional_embedding:
            return steps if start else torch.cat([conditions.prefix_time.float().expand(B, -1), steps], dim=1)
        P = conditions.prefix.shape[1]
        if mask is None:
            mask = torch.ones(B, P, dtype=torch.bool, device=device)
        steps = steps + mask.sum(1, keepdim=True)
        return steps if start else torch.cat([mask.cumsum(1).float() - 1, steps], dim=1)

    # --- training: the loss -------------------------------------------------------------------------------------

    def compute_predictions(self, codes: torch.Tensor, conditions: Conditions = Conditions(),
                            keep_only_valid_steps: bool = True, forgets: torch.Tensor | None = None):
        """Codes (B, K, T) -> logits (B, K, T, V) aligned with them, and the mask (K, T) of those that exist.

        keep_only_valid_steps drops the last steps, which the delays cause: the original trains so, and the last
        d_k frames of codebook k are then never predicted. forgets (B,): how likely an item is to see few of its
        codes.
        """
        T = codes.shape[-1]
        sequence, _ = self.pattern.build(codes, self.special, keep_only_valid_steps)
        if forgets is not None:
            few, kept, each = (torch.rand(len(codes), 1, n, device=codes.device) for n in (1, 1, sequence.shape[-1]))
            hidden = (few < forgets[:, None, None]) & (each > kept ** 8)                # (B, 1, S): most steps, or all
            sequence = torch.where(hidden, self.special, sequence)
        return self.pattern.revert_logits(self(sequence, conditions), T, keep_only_valid_steps)

    def loss(self, codes, texts=None, chroma=None, has_melody=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of codes (B, K, T) under their conditions: the mean over codebooks, and each (K,).

        texts: B descriptions or None; chroma (B, M, Q), has_melody (B,): see `Conditioners`. The plain mean over
        codebooks counts each alike, though later ones have fewer valid positions (as the original).
        """
        B, K, T = codes.shape
        steps = self.pattern.steps(T, keep_only_valid_steps=True)
        conditions = self.conditioner(texts or [None] * B, chroma, has_melody, steps)
        forgets = None
        if self.training and self.config.history_dropout:
            # a melody tells the tempo by itself: words about it are learnt from the items that have none
            told = codes.new_full((B,), chroma is not None, dtype=torch.bool) if has_melody is None else has_melody
            forgets = self.config.history_dropout * torch.where(told.to(codes.device), 0.5, 1.0)
        logits, mask = self.compute_predictions(codes, conditions, forgets=forgets)     # (B, K, T, V), (K, T)
        weight = 1.0
        if self.training and self.config.early_weight != 1:
            weight = torch.where(torch.arange(T, device=codes.device) < EARLY, self.config.early_weight, 1.0)   # (T,)
        ce = codebook_cross_entropy(logits, codes, mask, weight)                        # (K,)
        return ce.mean(), ce.detach()

    # --- saving and loading: formats of others are in checkpoints/formats.py -----------------------------------------

    def save(self, directory, compact: bool = False):
        """Writes config.json and model.safetensors (a frozen T5 is left out: the configuration names it).

        compact: matrices as int8 with a scale for each row, the rest as float16; a quarter of the size.
        """
        from checkpoints.files import write_tensors
        from checkpoints.precision import quantize_rows
        tensors = {re.sub(r"\.scale$", ".weight" + SCALE, name): t for name, t in self.state_dict().items()}
        tensors.pop(TIED[1], None)
        for name, tensor in list(tensors.items()) if compact else ():
            if tensor.dim() == 2 and tensor.is_floating_point():
                tensors[name], tensors[name + SCALE] = quantize_rows(tensor)
            elif tensor.is_floating_point() and not name.endswith(SCALE):
                tensors[name] = tensor.half()
        write_tensors(Path(directory) / "model.safetensors", tensors)
        self.config.save(Path(directory) / "config.json")

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=None) -> "LMModel":
        """Reads our directory, a transformers directory or hub id, or one in the original's format."""
        from checkpoints.formats import load_lm
        return load_lm(name_or_dir, dtype)


TIED = ("conditioner.text.t5.shared.weight", "conditioner.text.t5.encoder.embed_tokens.weight")  # one table of T5
SCALE = ".scale"    # beside an int8 matrix: what its rows are to be multiplied by


EARLY = 50  # frames, 1 s


def codebook_cross_entropy(logits, codes, mask, weight=1.0) -> torch.Tensor:
    """logits (B, K, T, V), codes (B, K, T), mask (K, T) or (B, K, T) -> mean over valid positions, (K,).

    Minus the logarithm of p_tk of MusicGen's equation 3, of each codebook in the light of all columns before its own.
    """
    B, K, T, V = logits.shape
    assert codes.shape == (B, K, T)
    mask = mask.expand(B, K, T)
    ce = []
    for k in range(K):      # one codebook at a time: less memory
        # invalid logits are NaN, so that a wrong mask fails loudly: they must not reach the sum, nor its gradient
        valid = torch.where(mask[:, k, :, None], logits[:, k].float(), 0.0)             # (B, T, V)
        ce.append(F.cross_entropy(valid.flatten(0, 1), codes[:, k].flatten(), reduction="none").view(B, T))
    weight = mask * weight                                                              # (B, K, T); weight (T,) or 1
    return (torch.stack(ce, 1) * weight).sum((0, 2)) / weight.sum((0, 2)).clamp(min=1)


# --- generation ----------------------------------------------------------------------------------------------------


class Cache:
    """Keys and values of every layer, allocated once for room of `steps` positions.

    Keys are stored transposed, (B, H, E, steps): one query then reads memory in order. Padding of shorter texts
    stays where it is, in the middle of its row, and is masked.
    """

    def __init__(self, config: Config, batch: int, steps: int, device, dtype):
        H, E = config.num_heads, config.dim // config.num_heads
        self.k = torch.zeros(config.num_layers, batch, H, E, steps, device=device, dtype=dtype)
        self.v = torch.zeros(config.num_layers, batch, H, steps, E, device=device, dtype=dtype)
        self.room, self.dtype = steps, dtype
        self.length = self.steps = 0            # positions filled; steps of the music among them
        self.hidden = None                      # (B, 1, 1, room): hugely negative at padding of the prefix, else 0
        self.cross = {}                         # layer -> keys and values of its cross-attention
        self.n = 0                              # the layer that x is in

    def through(self, layers, x, angles, mask, conditions: Conditions):
        """x (B, S, D) through all layers."""
        for self.n, layer in enumerate(layers):
            self.keys, self.values = self.k[self.n], self.v[self.n]     # of this layer
            if conditions.cross is not None and self.n not in self.cross:
                self.cross[self.n] = layer.cross.keys_values(conditions.cross)
            x = layer(x, angles, mask, self, self.cross.get(self.n), conditions.cross_mask)
        return x

    def begin(self, conditions: Conditions, P: int, S: int):
        """The mask of this call's attention: (B, 1, 1 or P + S, length) to add to the scores, or None for none."""
        assert self.length == 0 or S == 1, "a filled cache takes one step at a time"
        if self.length == 0 and P and conditions.prefix_mask is not None and not conditions.prefix_mask.all():
            hidden = torch.zeros(conditions.prefix_mask.shape, device=self.k.device, dtype=self.dtype)
            # not -inf: a padding row sees nothing but itself, and must not become NaN
            hidden.masked_fill_(~conditions.prefix_mask, torch.finfo(self.dtype).min / 2)
            self.hidden = F.pad(hidden, (0, self.room - P))[:, None, None].contiguous()  # (B, 1, 1, room)
        if self.hidden is None:
            return None
        mask = self.hidden[..., :self.length + P + S]
        if self.length == 0:
            later = torch.full((P + S, P + S), float("-inf"), device=mask.device, dtype=mask.dtype).triu(1)
            mask = mask + later
        return mask

    def attend(self, q, k, v, mask):
        """Store k, v (B, H, S, E) behind what is there, and attend from q (B, H, S, E) to all of it."""
        S, start = q.shape[2], self.length
        self.keys[..., start:start + S] = k.transpose(2, 3)
        self.values[..., start:start + S, :] = v
        if start == 0:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        scores = q @ self.keys[..., :start + S] * q.shape[-1] ** -0.5              # (B, H, 1, length)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ self.values[..., :start + S, :]

    def end(self, P: int, S: int):
        self.length += P + S
        self.steps += S


def sample(logits, uniform, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0) -> torch.Tensor:
    """Logits (B, K, V) and uniform numbers (B, K) in [0, 1) -> codes (B, K).

    Every codebook is drawn independently (MusicGen, equation 4). Inverse transform sampling over the sorted entries:
    the draw depends on the item's own numbers alone, so a batch, a device or a neighbour cannot change it.
    Temperature 0 or top_k 1 is greedy.
    """
    if temperature < 1e-5 or top_k == 1:
        return logits.argmax(-1)
    V = logits.shape[-1]
    values, index = (logits.float() / temperature).topk(min(top_k, V) if top_k else V, dim=-1)  # sorted
    cumulative = values.softmax(-1).cumsum(-1)                                          # (B, K, top_k)
    total = cumulative[..., -1]
    if top_p:       # the entries before which less than top_p has been collected: the first is always one
        inside = F.pad(cumulative, (1, -1)) < top_p
        total = cumulative.masked_fill(~inside, 0.0).amax(-1)
    rank = torch.searchsorted(cumulative, (uniform * total)[..., None], right=True).clamp(max=index.shape[-1] - 1)
    return index.gather(-1, rank)[..., 0]


def guide(conditional, null, guidance: float):
    """Classifier-free guidance: null + guidance * (conditional - null)."""
    return null + guidance * (conditional - null)


def condition_passes(lm: LMModel, texts, T: int, chroma=None, has_melody=None, guidance=3.0, two_step=False):
    """The conditions of the forward passes that one step of `generate` makes, for B texts and T frames.

    One batch of 2B, conditional items first, then the same without text and melody (their null frames keep the
    number of frames they replace); with two_step two batches of B, where the null text is a single frame;
    with guidance 1 the conditional batch alone. Chroma (B, M, Q), has_melody (B,): see `Conditioners`.
    """
    steps, encode = lm.pattern.steps(T), lm.conditioner
    if guidance == 1 or lm.config.text == lm.config.melody == "none":
        return [encode(texts, chroma, has_melody, steps)]
    if two_step:
        return [encode(texts, chroma, has_melody, steps), encode([None] * len(texts), None, None, steps)]
    return [encode(texts, chroma, has_melody, steps, guidance=True)]


@torch.inference_mode()
def generate(lm: LMModel, passes: list[Conditions], T: int, seeds: list[int], prompt=None, guidance: float = 3.0,
             temperature: float = 1.0, top_k: int = 250, top_p: float = 0.0, progress=None) -> torch.Tensor:
    """Codes (B, K, T), one item per seed, under the conditions of `condition_passes`.

    prompt: codes (B, K, T0 < T) that the result begins with. guidance 1 is the conditional model, 0 the
    unconditional one. progress(steps_done, steps) is called after every step; what is true of it ends the
    generation, with -1 for the codes that are not known yet.
    """
    device, B, K = lm.emb.weight.device, len(seeds), lm.config.n_q
    rows = passes[0].batch if passes[0] != Conditions() else B
    assert rows in (B, 2 * B), f"{rows} conditions for {B} items"
    codes = torch.full((B, K, T), -1, device=device)                                    # -1: not known yet
    T0 = 0
    if prompt is not None:
        T0 = prompt.shape[-1]
        codes[..., :T0] = prompt.to(device)
    sequence, real = lm.pattern.build(codes, lm.special)                                # (B, K, S), (K, S)
    S = sequence.shape[-1]
    uniform = [torch.rand(S, K, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    uniform = torch.stack(uniform).to(device)                                           # (B, S, K)
    dtype = (lm.emb if lm.cache is Cache else lm.heads).weight.dtype
    room = [S + (0 if c.prefix is None else c.prefix.shape[1]) for c in passes]
    caches = [lm.cache(lm.config, rows, steps, device, dtype) for steps in room]

    first, previous = max(1, lm.pattern.first_step(T, T0)), 0
    for step in range(first, S):
        column = sequence[..., previous:step].repeat(rows // B, 1, 1)
        logits = torch.cat([lm(column, c, cache)[:, :, -1] for c, cache in zip(passes, caches)])  # (rows, K, V)
        if len(logits) == 2 * B:
            logits = guide(*logits.float().chunk(2), guidance)
        new = sample(logits, uniform[:, step], temperature, top_k, top_p)               # (B, K)
        new = torch.where(real[:, step], new, lm.special)   # cells of the pattern without a code stay special
        known = sequence[..., step]
        sequence[..., step] = torch.where(known == -1, new, known)
        previous = step
        if progress is not None and progress(step - first + 1, S - first):
            break
    return lm.pattern.revert(sequence, T, lm.special)[0]


def demo():
    torch.manual_seed(0)
    print("parameters of the paper's models (language model with its projections; made without memory):")
    for name in ("config/melody.py", "config/text.py"):
        with torch.device("meta"):
            lm = LMModel(load([str(Path(__file__).parent / name)]))
        print(f"  {name:18} {sum(p.numel() for p in lm.parameters()) / 1e9:.2f} B")

    config = Config(dim=64, num_heads=4, num_layers=3, card=32, t5="bytes", segment_duration=1.0)
    lm = LMModel(config).eval()
    T = 20
    codes = torch.randint(config.card, (2, config.n_q, T))
    passes = condition_passes(lm, ["slow flute", None], T, guidance=1)
    with torch.no_grad():
        sequence, _ = lm.pattern.build(codes, lm.special)
        full = lm(sequence, passes[0])
        cache = Cache(config, 2, sequence.shape[-1] + passes[0].prefix.shape[1], "cpu", torch.float32)
        steps = [lm(sequence[..., s:s + 1], passes[0], cache) for s in range(sequence.shape[-1])]
    error = (torch.cat(steps, 2) - full).abs().max()
    print(f"\ncodes {tuple(codes.shape)} -> sequence {tuple(sequence.shape)} -> logits {tuple(full.shape)}")
    print(f"step by step with the cache against all at once: largest difference {error:.1e}")
    loss, ce = lm.loss(codes, ["slow flute", None])
    print(f"cross-entropy per codebook, untrained: {[f'{x:.2f}' for x in ce.tolist()]} "
          f"(uniform: {math.log(config.card):.2f})")
    print("greedy continuation of the first 10 frames, codebook 1:",
          generate(lm, passes, T, [0, 1], prompt=codes[..., :10], guidance=1, temperature=0)[0, 0].tolist())


if __name__ == "__main__":
    demo()
