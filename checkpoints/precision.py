"""Weights in fewer bits, and decoding that is as fast as the memory allows. Optional: the mathematics is in lm.py.

    python sample.py --dtype int8 ...       # or bfloat16, float32, auto

One step of decoding reads every weight and the whole cache, and multiplies them with two rows, those of guidance:
its limit is the memory, which the usual products do not reach. `quicken` puts `QuickLinear` in the place of every
Projection of a model: weights in float32, bfloat16 or int8 (each row with a scale), multiplied by kernels.c, which is
compiled when it is first needed. `QuickCache` holds keys and values likewise. Without a C compiler the fastest of
torch's own products takes its place. The optimizer of train.py uses kernels.c, too. Last in this file is what makes
training on the CPU quick (`quicken_training`): there the products are the limit.
"""
import ctypes
import functools
import hashlib
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from conditioners import Conditions
from config import Config, UserError, write_atomic
from lm import Cache, LMModel, Projection


def quantize_rows(weight) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., rows, columns) -> int8 of the same shape, and the scale (..., rows) that brings it back."""
    scale = weight.abs().amax(-1).float().clamp(min=1e-12) / 127
    return (weight / scale[..., None]).round_().to(torch.int8), scale


FEW = 32    # rows up to which a product waits for the weights rather than for the arithmetic
KINDS = {torch.int8: 0, torch.bfloat16: 1, torch.float32: 2}    # of kernels.c


class QuickLinear(nn.Module):
    """Projection for generation: weight (out, in), and scale (out,) where that is int8."""

    def __init__(self, weight, dtype):
        super().__init__()
        weight, scale = quantize_rows(weight) if dtype == torch.int8 else (weight.to(dtype), None)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        # of products of many rows
        self.many = torch.bfloat16 if dtype != torch.float32 and has_bfloat16() else torch.float32

    def forward(self, x, rows=None):
        weight, scale = self.weight, self.scale
        if rows is not None:
            weight, scale = weight[rows], None if scale is None else scale[rows]
        R, C = weight.shape
        few = x.numel() <= FEW * C and R % 4 == C % 8 == 0
        if few and torch.compiler.is_compiling():   # one loop over the weights, as they are stored
            y = (x[..., None, :] * weight).sum(-1, dtype=x.dtype)
            return y if scale is None else y * scale
        if few and kernels():
            x = x.contiguous()
            y = x.new_empty(*x.shape[:-1], R)
            kernels().product(
                KINDS[weight.dtype], *places(weight, scale, x, None, None), 0, None, *places(y), R, C, x.numel() // C)
            return y
        if few and weight.dtype == torch.int8:
            y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), weight, scale.bfloat16())
            return y.view(*x.shape[:-1], R).float()
        if few and weight.dtype == torch.float32:
            return (weight @ x.flatten(0, -2).T).T.view(*x.shape[:-1], R)
        y = product(x.to(self.many), weight.to(self.many)).float()
        return y if scale is None else y * scale


class QuickCache(Cache):
    """Keys and values (layers, B, H, room, E) in float32, bfloat16, or int8 with a scale for each."""

    def __init__(self, config: Config, batch: int, steps: int, device, dtype):
        super().__init__(config, batch, 0, device, torch.float32)
        H, E, N = config.num_heads, config.dim // config.num_heads, config.num_layers
        self.room = steps
        self.k, self.v = (torch.empty(N, batch, H, steps, E, dtype=dtype) for _ in "kv")
        self.k_scale, self.v_scale = (torch.empty(N, batch, H, steps if dtype == torch.int8 else 0) for _ in "kv")
        self.scores, self.table = torch.empty(batch, H, steps), None

    def through(self, layers, x, angles, mask, conditions: Conditions):
        B, S, D = x.shape
        H, room, E = self.k.shape[2:]
        plain = angles is None and isinstance(layers[0].attn.q_norm, nn.Identity)
        if self.length == 0 or not plain or B > FEW or D % 8:
            return super().through(layers, x, angles, mask, conditions)
        if self.table is None:  # the tensors of all layers, as struct layer of kernels.c has them
            self.table, self.cross_hidden, P = [], None, 0
            for n, layer in enumerate(layers):
                parts = [layer.norm1, layer.attn.qkv, layer.attn.out, layer.norm2, layer.ff1, layer.ff2]
                row = [places(m.weight, m.bias if isinstance(m, nn.LayerNorm) else m.scale) for m in parts]
                row.insert(3, places(self.k[n], self.k_scale[n], self.v[n], self.v_scale[n]))
                if n in self.cross:
                    self.cross[n] = tuple(t.contiguous() for t in self.cross[n])
                    P = self.cross[n][0].shape[2]
                    norm, qkv, out = layer.norm_cross, layer.cross.qkv, layer.cross.out
                    row.append(places(norm.weight, norm.bias, qkv.weight, qkv.scale, out.weight, out.scale,
                                      *self.cross[n]))
                self.table.append(sum(row, []))
            self.table = torch.tensor([[place or 0 for place in row + [0] * (24 - len(row))] for row in self.table])
            if conditions.cross_mask is not None and P:
                self.cross_hidden = torch.zeros(B, P).masked_fill_(~conditions.cross_mask, -1e30)
            self.scores = self.scores.new_empty(B, H, max(room, P))
            self.P = P
        x = x.clone(memory_format=torch.contiguous_format)
        kernels().decode(
            KINDS[self.k.dtype], *places(self.table), len(layers),
            *places(x, self.hidden, self.cross_hidden, self.scores),
            B, H, self.length + 1, room, E, len(layers[0].ff1.weight), self.P)
        return x

    def attend(self, q, k, v, mask):
        B, H, S, E = q.shape
        n, start = self.n, self.length
        if start == 0:
            for new, data, scale in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
                if data.dtype == torch.int8:
                    new, scale[n, :, :, :S] = quantize_rows(new)
                data[n, :, :, :S] = new
            if self.k.dtype != torch.float32 and has_bfloat16():
                hidden = None if self.hidden is None else self.hidden[..., :S].bfloat16()
                return block_attention((q * E ** -0.5).bfloat16(), k.bfloat16(), v.bfloat16(), hidden).float()
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        q, k, v, out = q.contiguous(), k.contiguous(), v.contiguous(), torch.empty_like(q)
        kernels().attend(
            KINDS[self.k.dtype], *places(q, k, v), H * E,
            *places(self.k[n], self.k_scale[n], self.v[n], self.v_scale[n]),
            *places(self.hidden, self.scores, out), B, H, start + 1, self.room, E)
        return out


def places(*tensors) -> list:
    """Where the numbers of contiguous tensors are, for kernels.c; None for None."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def quicken(lm: LMModel, dtype=None) -> LMModel:
    """Puts QuickLinear in the place of every Projection, the rest in float32. For generation on the CPU only.

    dtype: of the weights; None keeps theirs. A model on the meta device gets empty ones, to be loaded."""
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if isinstance(child, Projection):
                setattr(module, name, QuickLinear(child.weight.detach(), dtype or child.weight.dtype))
    for tensor in lm.parameters():
        tensor.data = tensor.data.float()
    if lm.config.dim // lm.config.num_heads % 8 == 0 and kernels():
        lm.cache = QuickCache
    return lm


def pick_dtype(name: str, device) -> str:
    """"auto": the fastest weights that the device computes with; any other name is returned as it is."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "int8" if kernels() or has_bfloat16() else "float32"
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)  # torch before 2.10 cannot tell


@functools.cache
def kernels():
    """kernels.c, compiled for this very processor; None where there is no C compiler or no place to keep the result."""
    source, info = Path(__file__).with_name("kernels.c"), Path("/proc/cpuinfo")

    def build(temporary):
        # in two steps: linked with -Ofast, a library makes the whole process flush small numbers to zero
        compiler, compiled = shutil.which("cc") or "gcc", f"{temporary}.o"
        for work in (["-Ofast", "-c", source, "-o", compiled], ["-shared", compiled, "-o", temporary, "-lm"]):
            command = [compiler, "-march=native", "-fopenmp", "-fPIC", *map(str, work)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        Path(compiled).unlink()
    try:
        known = platform.machine() == "x86_64" and info.is_file()
        processor = re.search("flags.*", info.read_text())[0] if known else platform.platform()
        name = hashlib.sha256(source.read_bytes() + processor.encode()).hexdigest()[:16] + ".so"
        path = Path.home() / ".cache" / "nanomusicgen" / name
        if not path.is_file():
            write_atomic(path, build)
        library = ctypes.CDLL(str(path))
    except (OSError, UserError, subprocess.SubprocessError):
        return None
    P, L = ctypes.c_void_p, ctypes.c_long
    library.product.argtypes = [ctypes.c_int, *[P] * 5, ctypes.c_int, *[P] * 2, *[L] * 3]
    library.attend.argtypes = [ctypes.c_int, *[P] * 3, L, *[P] * 7, *[L] * 5]
    library.decode.argtypes = [ctypes.c_int, P, L, *[P] * 4, *[L] * 7]
    D = ctypes.c_double
    library.dadapt_moments.argtypes, library.dadapt_step.argtypes = [*[P] * 4, L, *[D] * 4, P], [*[P] * 3, L, D, D]
    library.dadapt_moments.restype = library.dadapt_step.restype = None
    library.product.restype = library.attend.restype = library.decode.restype = None
    return library


# --- attention of many positions on the CPU, in training and in front of generation ---------------------------------

BLOCK = 128     # queries that attend together: most keys that they may not see are then not multiplied at all


def block_weights(q, k, hidden=None):
    """Scaled queries (B, H, n, E), the last n of the keys (B, H, s, E) -> attention weights (B, H, n, s).

    hidden (B, 1, 1, s) is added to the scores."""
    n, scores = q.shape[2], q @ k.mT
    if hidden is not None:
        scores += hidden
    scores[..., -n:] += scores.new_full((n, n), float("-inf")).triu_(1)     # of what comes later
    return scores.softmax(-1)


def block_attention(q, k, v, hidden=None):
    """Causal attention, block after block of scaled queries; q, k, v and the result (B, H, S, E)."""
    out, S = torch.empty_like(q), q.shape[2]
    for a in range(0, S, BLOCK):
        b = min(a + BLOCK, S)
        weights = block_weights(q[:, :, a:b], k[:, :, :b], None if hidden is None else hidden[..., :b])
        out[:, :, a:b] = weights @ v[:, :, :b]
    return out


class BlockAttention(torch.autograd.Function):
    """`lm.causal` from plain products in bfloat16, which are twice as fast on the CPU as its flash attention.

    Like that it keeps no attention weights: the backward pass makes them anew. Its rounding error is the same, too.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = q.contiguous() * q.shape[-1] ** -0.5, k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v)
        return block_attention(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        grad, dq, dk, dv = grad.contiguous(), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        S = q.shape[2]
        for a in range(0, S, BLOCK):
            b = min(a + BLOCK, S)
            here, p = slice(a, b), block_weights(q[:, :, a:b], k[:, :, :b])                 # (B, H, b - a, b)
            dv[:, :, :b] += p.mT @ grad[:, :, here]
            dp = grad[:, :, here] @ v[:, :, :b].mT
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)                           # p * (dp - sum(p * dp))
            dq[:, :, here] = ds @ k[:, :, :b]
            dk[:, :, :b] += ds.mT @ q[:, :, here]
        return dq * q.shape[-1] ** -0.5, dk, dv


# --- products in training on the CPU ---------------------------------------------------------------------------------

def product(x, weight):
    """x (..., in), weight (out, in) -> x W^T, (..., out), by oneDNN.

    torch takes it for bfloat16 on its own. In float32 it calls MKL, which on AMD processors is half as fast.
    """
    plain = x.dtype != torch.float32 or not x.is_cpu or torch.compiler.is_compiling()
    if plain or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class Product(torch.autograd.Function):
    """x (..., in), weight (out, in) -> f(x) W^T by `product`, in training. f is gelu, or nothing.

    The backward pass makes gelu(x) anew, instead of the forward pass keeping it."""

    @staticmethod
    def forward(ctx, x, weight, gelu=False):
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        return product(F.gelu(x) if gelu else x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        to_x = product(grad, weight.T)
        if ctx.gelu:
            to_x, x = torch.ops.aten.gelu_backward(to_x, x), F.gelu(x)
        return to_x, product(grad.flatten(0, -2).T, x.flatten(0, -2).T), None


def quicken_training(lm: LMModel, dtype: str):
    """Lets the layers of a model that is trained on the CPU in "float32" or "bfloat16" work as above."""
    for layer in lm.layers:
        layer.feed = lambda x, layer=layer: Product.apply(layer.ff1(x), layer.ff2.weight, True)
        if dtype == "bfloat16":
            layer.attn.attend = lambda q, k, v: BlockAttention.apply(q.bfloat16(), k.bfloat16(), v.bfloat16())
    for module in lm.modules() if dtype == "float32" else ():
        if isinstance(module, Projection):
            module.product = Product.apply
