"""Decoding on the CPU, as fast as the memory allows. Optional: the mathematics is in lm.py.

    python sample.py --dtype int8 ...       # or int4, bfloat16, float32, auto

Decoding a column reads every weight and the whole cache, and multiplies them with the two rows of guidance.
It is memory-bandwidth-bound, and the usual products do not reach that bound. `optimize_for_cpu` puts
`PackedLinear` in the place of every Projection of a model: weights in float32, bfloat16, int8 (each row
with a scale) or int4 (each group of 32 with one, too), multiplied by kernels.c. `PackedCache` holds keys and
values likewise, beside int4 in int8. Without a C compiler the fastest of torch's own products take their
place, and `HalfCache`; int4 needs kernels.c.
"""
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from checkpoints.files import INT4, QUANTIZERS, columns_of
from conditioners import Conditions
from config import Config
from lm import Cache, LayerCache, LMModel, Projection, rotate
from speed.kernels import ARM, KINDS, data_pointers, has_bfloat16, has_tiles, kernels
from speed.products import block_attention, product
from system.errors import UserError

FEW = 32            # rows up to which a product waits for the weights rather than for the arithmetic
MASKED = -1e30      # added to the scores of what is not to be seen
POINTERS = 36       # of a layer, in struct layer of kernels.c, with the kinds of its matrices


class PackedLinear(nn.Module):
    """Projection for generation: weight (out, in), and scale (out,) where that is int8 or int4.

    A row of int4 is in * 17/32 bytes (`quantize_groups`).
    """

    def __init__(self, weight, dtype):
        super().__init__()
        scale = None
        if dtype in QUANTIZERS:
            weight, scale = QUANTIZERS[dtype](weight)
        else:
            weight = weight.to(dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        # of products of many rows, and of their results
        self.many = torch.bfloat16 if dtype != torch.float32 and has_bfloat16() else torch.float32
        self.results = torch.float32

    def forward(self, x):
        return self.rows(x, 0, len(self.weight))

    def rows(self, x, start: int, end: int):
        """The outputs start ... end alone."""
        weight = self.weight[start:end]
        scale = None if self.scale is None else self.scale[start:end]
        R, C = len(weight), x.shape[-1]
        few = x.numel() <= FEW * C and R % 4 == C % 8 == 0
        if few and torch.compiler.is_compiling():   # one loop over the weights, as they are stored
            y = (x[..., None, :] * weight).sum(-1, dtype=x.dtype)
            return y if scale is None else y * scale
        if few and kernels():
            x = x.float().contiguous()
            y = x.new_empty(*x.shape[:-1], R)
            kernels().product(
                torch.get_num_threads(), KINDS[weight.dtype], *data_pointers(weight, dtype=weight.dtype),
                *data_pointers(scale, x, y), R, C, x.numel() // C)
            return y
        if few:
            return few_rows(x.flatten(0, -2), weight, scale).view(*x.shape[:-1], R).float()
        if weight.dtype == INT4:
            weight = unpacked(weight)
        if scale is not None and kernels() and C % 8 == 0:
            weight, scale = scaled(weight, scale, self.many), None
        y = product(x.to(self.many), weight.to(self.many)).to(self.results)
        return y if scale is None else y.mul_(scale.to(y.dtype))


def unpacked(weight):
    """A matrix in int4 as int8 (out, in), which has the same scales of the rows."""
    R, C = len(weight), columns_of(weight)
    as_int8 = torch.empty(R, C, dtype=torch.int8)
    source, = data_pointers(weight, dtype=INT4)
    kernels().unpack_int4(torch.get_num_threads(), source, *data_pointers(as_int8, dtype=torch.int8), R, C)
    return as_int8


def scaled(weight, scale, dtype):
    """A matrix in int8 and the scales of its rows, as one in float32 or bfloat16."""
    y = torch.empty(weight.shape, dtype=dtype)
    kernels().unpack_int8(
        torch.get_num_threads(), KINDS[dtype], *data_pointers(weight, dtype=torch.int8),
        *data_pointers(scale), *data_pointers(y, dtype=dtype), *weight.shape)
    return y


def few_rows(x, weight, scale):
    """x (rows, in), weight (out, in) -> (rows, out), by the product of torch that reads weights fastest."""
    if weight.dtype == torch.int8:
        return torch._weight_int8pack_mm(x.bfloat16(), weight, scale.bfloat16())
    x = x.to(weight.dtype)
    if weight.dtype == torch.bfloat16 and has_bfloat16():
        return (weight @ x.T).T
    return F.linear(x, weight) if len(x) <= 2 else product(x, weight)


class PackedCache(Cache):
    """Keys and values (layers, B, H, max_length, E) in float32, bfloat16, or int8 with a scale for each."""

    def __init__(self, config: Config, batch: int, max_length: int, dtype):
        self.max_length, self.dtype = max_length, torch.float32     # of padding_bias and of the scores
        self.length = self.columns = 0
        self.padding_bias = None
        H, E, N = config.num_heads, config.dim // config.num_heads, config.num_layers
        scales = max_length if dtype == torch.int8 else 0
        self.k, self.v = (torch.empty(N, batch, H, max_length, E, dtype=dtype) for _ in "kv")
        self.k_scale, self.v_scale = (torch.empty(N, batch, H, scales, dtype=self.dtype) for _ in "kv")
        self.scores = torch.empty(batch, H, max_length, dtype=self.dtype)
        self.table = None           # addresses of the tensors of all layers, once they are all there
        self.condition_length, self.condition_bias = 0, None
        self.first_bias = None      # of all positions that are there at the beginning
        self.layers = [PackedLayerCache(self, n) for n in range(N)]

    def bias(self, new: int, dtype=None):
        """As Cache's, and the same for all layers."""
        if self.first_bias is None and self.padding_bias is not None:
            self.first_bias = super().bias(new).to(dtype or self.dtype)
        return self.first_bias

    def padding(self, length: int, dtype):
        """What is added to the scores of a query that comes after `length` positions, or None for nothing."""
        return None if self.padding_bias is None else self.padding_bias[..., :length].to(dtype)

    def end(self, P: int, S: int):
        super().end(P, S)
        self.first_bias = None

    def decode(self, layers, x, angles, conditions: Conditions):
        """x (B, 1, D) through all layers, in one call of kernels.c; angles (B, 1, E/2) or None."""
        B, H, _, E = self.k[0].shape
        if self.table is None:
            self.table = torch.tensor([self.pointers(n, layer) for n, layer in enumerate(layers)])
            if conditions.cross_mask is not None and self.condition_length:
                bias = torch.zeros(B, self.condition_length, dtype=self.dtype)
                self.condition_bias = bias.masked_fill_(~conditions.cross_mask, MASKED)
            self.scores = self.scores.new_empty(B, H, max(self.max_length, self.condition_length))
        x = x.float().clone(memory_format=torch.contiguous_format)
        table, = data_pointers(self.table, dtype=torch.long)
        cosine, sine = (None, None) if angles is None else (angles.cos(), angles.sin())
        kernels().decode(
            torch.get_num_threads(), KINDS[self.k.dtype], table, len(layers),
            *data_pointers(x, cosine, sine, self.padding_bias, self.condition_bias, self.scores),
            B, H, self.length + 1, self.max_length, E, len(layers[0].ff1.weight), self.condition_length)
        return x

    def pointers(self, n: int, layer) -> list[int]:
        """Addresses of the tensors of layer n, as struct layer of kernels.c has them."""
        def norm(module):
            if isinstance(module, nn.Identity):         # a model that does not normalize queries and keys
                return [None, None]
            return data_pointers(module.weight, module.bias)

        def matrix(module):
            dtype = module.weight.dtype
            return [KINDS[dtype]] + data_pointers(module.weight, dtype=dtype) + data_pointers(module.scale)

        row = norm(layer.norm1) + matrix(layer.attn.qkv) + matrix(layer.attn.out)
        row += norm(layer.attn.q_norm) + norm(layer.attn.k_norm)
        for data, scale in (self.k[n], self.k_scale[n]), (self.v[n], self.v_scale[n]):
            row += data_pointers(data, dtype=self.k.dtype) + data_pointers(scale)
        row += norm(layer.norm2) + matrix(layer.ff1) + matrix(layer.ff2)
        if self.layers[n].condition is not None:
            keys, values = (t.float().contiguous() for t in self.layers[n].condition)
            self.layers[n].condition = keys, values     # kept: kernels.c has only their addresses
            self.condition_length = keys.shape[2]
            row += norm(layer.norm_cross) + matrix(layer.cross_attn.qkv) + matrix(layer.cross_attn.out)
            row += norm(layer.cross_attn.q_norm) + data_pointers(keys, values)
        row += [0] * (POINTERS - len(row))
        return [pointer or 0 for pointer in row]


class PackedLayerCache:
    """One layer's part of a `PackedCache`, where the layers run one by one."""

    def __init__(self, cache: PackedCache, n: int):
        self.cache = weakref.proxy(cache)       # as in lm.py
        self.k, self.v = cache.k[n], cache.v[n]
        self.k_scale, self.v_scale = cache.k_scale[n], cache.v_scale[n]
        self.condition = None

    def attend(self, q, k, v):
        """Stores k, v (B, H, S, E) behind what is there, and attends from q (B, H, S, E) to all of it."""
        if self.cache.length == 0:
            return self.attend_first(q, k, v)
        cache, (B, H, _, E) = self.cache, q.shape
        q, k, v = (t.float().contiguous() for t in (q, k, v))
        out = torch.empty_like(q)
        keys, values = data_pointers(self.k, self.v, dtype=self.k.dtype)
        key_scales, value_scales = data_pointers(self.k_scale, self.v_scale)
        kernels().attend(
            torch.get_num_threads(), KINDS[self.k.dtype], *data_pointers(q, k, v), H * E,
            keys, key_scales, values, value_scales, *data_pointers(cache.padding_bias, cache.scores, out),
            B, H, cache.length + 1, cache.max_length, E)
        return out

    def attend_first(self, q, k, v):
        """The prefix and what else is there at the beginning, all at once; q of all of it or of its end."""
        (B, H, n, E), S = q.shape, k.shape[2]
        for new, data, scale in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            rows = new.transpose(1, 2)
            if rows.stride()[1:] != (rows.stride(1), E, 1) or rows.stride(0) != S * rows.stride(1):
                rows = rows.contiguous()        # (B, S, H, E), heads next to each other
            kernels().store_first(
                torch.get_num_threads(), KINDS[rows.dtype], rows.data_ptr(), KINDS[data.dtype],
                *data_pointers(data, dtype=data.dtype), *data_pointers(scale),
                B, H, S, data.shape[2], E, rows.stride(1))
        kind = torch.bfloat16 if self.k.dtype != torch.float32 and has_bfloat16() else torch.float32
        if kind == torch.bfloat16 and n == S and not has_tiles():
            bias = self.cache.padding_bias
            if bias is not None:
                bias = bias[..., :S].to(kind)
            q, k, v = (t.to(kind).contiguous() for t in (q * E ** -0.5, k, v))
            return block_attention(q, k, v, bias)
        bias = self.cache.bias(S, kind) if n == S else self.cache.padding(S, kind)
        q, k, v = (t.to(kind) if kind == torch.bfloat16 else t.contiguous() for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None and n == S)


class HalfCache(Cache):
    """Keys and values in bfloat16, for torch's attention where there is no kernels.c."""

    def __init__(self, config: Config, batch: int, max_length: int):
        super().__init__(config, batch, max_length, torch.empty(0, dtype=torch.bfloat16))
        for layer in self.layers:
            layer.__class__ = HalfLayerCache
            layer.keys = layer.keys.flatten(-2).view_as(layer.values)       # (B, H, max_length, E)


class HalfLayerCache(LayerCache):
    """One layer's part of a `HalfCache`."""

    def attend(self, q, k, v):
        """Stores k, v (B, H, S, E) behind what is there, and attends from q (B, H, S, E) to all of it."""
        start, end = self.cache.length, self.cache.length + q.shape[2]
        self.keys[:, :, start:end], self.values[:, :, start:end] = k, v
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        bias = self.cache.bias(end - start)
        first = start == 0 and bias is None     # later columns may see all that is there
        return F.scaled_dot_product_attention(
            q.bfloat16(), keys, values, attn_mask=bias, is_causal=first).float()


class HalfCacheLMModel(LMModel):
    """An LMModel for generation with a HalfCache."""

    def new_cache(self, batch: int, max_length: int) -> HalfCache:
        return HalfCache(self.config, batch, max_length)


class PackedLMModel(LMModel):
    """An LMModel whose layers are PackedLinear, for generation with a PackedCache."""

    packed = True

    def new_cache(self, batch: int, max_length: int) -> PackedCache:
        return PackedCache(self.config, batch, max_length, self.lm_heads.weight.dtype)

    def run_layers(self, x, angles, conditions: Conditions, cache=None):
        """As LMModel's, but once the cache has begun all layers in one call of kernels.c."""
        B, S, D = x.shape
        if cache is not None and cache.length == 0 and S > 1:
            return self.run_first(x, angles, conditions, cache)
        if cache is None or cache.length == 0 or B > FEW or D % 8:
            return super().run_layers(x, angles, conditions, cache)
        return cache.decode(self.layers, x, angles, conditions)

    def run_first(self, x, angles, conditions: Conditions, cache):
        """x (B, S, D), all that is there at the beginning -> what the layers make of the last one, (B, 1, D).

        Of the others the last layer needs keys and values alone.
        """
        x = x.float().clone(memory_format=torch.contiguous_format)
        for layer, kept in zip(self.layers, cache.layers):
            n = 1 if layer is self.layers[-1] else x.shape[1]
            normed = add_norm(x, None, layer.norm1, layer.attn.qkv.many)
            y = first_attention(layer.attn, normed, angles, kept, n)
            x = x[:, x.shape[1] - n:].contiguous()
            if layer.cross_attn is not None and conditions.cross is not None:
                normed = add_norm(x, y, layer.norm_cross)
                y = layer.cross_attn(normed, conditions.cross, conditions.cross_mask, kept)
            y = layer.ff2(F.gelu(layer.ff1(add_norm(x, y, layer.norm2))))
            add_norm(x, y)
        return x


def add_norm(x, y, norm=None, dtype=None):
    """x (B, S, D) += y, if there is a y -> norm(x), if there is a norm, in the dtype of y or `dtype`."""
    D, kind = x.shape[-1], dtype or y.dtype
    out, weight, bias = None, None, None
    if norm is not None:
        out, weight, bias = torch.empty_like(x, dtype=kind), norm.weight, norm.bias
    kernels().add_norm(
        torch.get_num_threads(), *data_pointers(x), KINDS[kind], *data_pointers(y, dtype=kind),
        *data_pointers(weight, bias), *data_pointers(out, dtype=kind), D, x.numel() // D)
    return out


def first_attention(attn, x, angles, cache: PackedLayerCache, n: int):
    """attn(x, angles, cache) of the last n positions: x (B, S, D) -> (B, n, D)."""
    B, S, D = x.shape
    H = attn.num_heads
    q = attn.qkv.rows(x[:, S - n:], 0, D).view(B, n, H, -1).transpose(1, 2)
    k, v = attn.qkv.rows(x, D, 3 * D).view(B, S, 2, H, -1).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)                                   # (B, H, n or S, E)
    if angles is not None:
        q, k = rotate(q, angles[:, S - n:]), rotate(k, angles)
    y = cache.attend(q, k, v).transpose(1, 2).reshape(B, n, D)
    return attn.out(y)


def optimize_for_cpu(lm: LMModel, dtype=None) -> LMModel:
    """Puts PackedLinear in the place of every Projection, the rest in float32. For generation on the CPU.

    dtype: of the weights; None keeps theirs. INT4 is for most of them (`takes_int4`), the others are int8.
    A model on the meta device gets empty ones, to be loaded. Raises UserError for INT4 without kernels.c.
    """
    if dtype == INT4 and not kernels():
        raise UserError("dtype 'int4' needs speed/kernels.c, and a C compiler for it (cc, gcc or clang); "
                        "install one, or take int8")
    packed = bool(kernels()) and lm.config.dim // lm.config.num_heads % 8 == 0
    for name, module in list(lm.named_modules()):
        if isinstance(module, Projection):
            weight, kind = module.weight.detach(), dtype or module.weight.dtype
            if kind == INT4 and not (packed and takes_int4(name, weight)):
                kind = torch.int8
            parent, _, child = name.rpartition(".")
            setattr(lm.get_submodule(parent), child, PackedLinear(weight, kind))
    for tensor in lm.parameters():
        tensor.data = tensor.data.float()
    if packed:
        lm.__class__ = PackedLMModel
    elif not kernels() and lm.lm_heads.weight.dtype != torch.float32:
        lm.__class__ = HalfCacheLMModel
    if isinstance(lm, PackedLMModel | HalfCacheLMModel):
        for layer in lm.layers:
            # What comes next rounds them to that anyway, or adds them up in float32.
            for module in (layer.attn.qkv, layer.attn.out, layer.ff1, layer.ff2):
                module.results = module.many
    return lm


def takes_int4(name: str, weight) -> bool:
    """Whether a matrix is one of those that int4 is for: all but the first layer's and the heads'.

    These cost the quality most (docs/speed.md). kernels.c takes 64 columns and 4 rows at once.
    """
    sensitive = name.startswith(("layers.0.", "lm_heads"))
    return not sensitive and weight.shape[0] % 4 == weight.shape[1] % 64 == 0


def fastest_dtype(device) -> str:
    """The dtype of weights with which generation is fastest on a device that costs next to no quality."""
    if device.type == "cpu":
        library = kernels()
        if library is None:     # torch's own product with int8 weights is slow without AVX2 or NEON
            vectors = ARM or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
            return "int8" if vectors else "float32"
        return "bfloat16" if library.instructions() == b"none" else "int8"
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"
