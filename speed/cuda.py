"""Decoding on CUDA by graphs. Optional: the mathematics is in lm.py. Measured by tests/cuda.sh.

    python sample.py --device cuda --dtype auto ...     # or --compile, instead of cuda_kernels.py

A column takes about a thousand kernels, and for two rows the host needs longer to start one than the device
to run it. A CUDA graph starts all of them at once, but only repeats what was recorded: the same kernels, on
the same addresses. So `GraphLMModel` has a `step` for one column in which nothing depends on the host:

    its number, its place in the cache and its position are tensors, which the step itself counts up
    it attends to all of a bucket (256 positions, 512, ...), in which what is not filled yet is masked
    all that it reads and writes are `Buffers`, which one cache leaves to the next, together with the graphs

The first column in a bucket runs as it is written, and is then recorded. Without CUDA all of them do. For a
few rows the layers are those of speed/cuda_kernels.py, where Triton (which comes with torch) is there.
"""
import importlib
import sys
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from conditioners import Conditions
from config import Config
from lm import Cache, LayerCache, LMModel

BUCKET = 256        # positions


class Buffers:
    """The tensors that `GraphLMModel.step` reads and writes, and the graphs recorded with them."""

    @torch.inference_mode(False)    # tensors made in inference mode cannot be written to outside of it
    def __init__(self, config: Config, batch: int, max_length: int, like):
        self.shape = batch, max_length
        H, E = config.num_heads, config.dim // config.num_heads
        self.keys, self.values = like.new_zeros(2, config.num_layers, batch, H, max_length, E)
        self.bias = like.new_zeros(batch, 1, 1, max_length)     # hugely negative where nothing is to be seen
        self.logits = like.new_zeros(batch, config.n_q, 1, config.card)
        self.column = torch.zeros_like(self.logits[..., 0], dtype=torch.long)               # (B, K, 1)
        self.number = self.column.new_zeros(1)                  # of the next column
        self.place = self.column.new_zeros(1)                   # in the cache
        self.position = self.column.new_zeros(batch, 1, dtype=torch.float32)
        self.given = []                 # what a column reads of the conditions, see `begin`
        self.graphs = {}                # of each bucket, by its end

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(self, lm: LMModel, conditions: Conditions, cache: Cache):
        """After the prefix and the first columns: makes all ready for the next one."""
        length = cache.length
        self.number.fill_(cache.columns)
        self.place.fill_(length)
        self.position.copy_(lm.positions(conditions, cache.columns, 1, len(self.column)))
        self.bias.fill_(torch.finfo(self.bias.dtype).min / 2)
        self.bias[..., :length] = 0.0 if cache.padding_bias is None else cache.padding_bias[..., :length]
        given = [conditions.cross, conditions.cross_mask, conditions.added]
        for layer in cache.layers:
            given += layer.condition or (None, None)            # keys and values for cross-attention
        if [shape_of(t) for t in given] != [shape_of(t) for t in self.given]:
            self.graphs.clear()         # recorded with other shapes
            self.given = [None if t is None else t.clone() for t in given]
        for kept, t in zip(self.given, given):
            if t is not None:
                kept.copy_(t)


def shape_of(tensor):
    return None if tensor is None else tensor.shape


class GraphCache(Cache):
    """A Cache in `Buffers`, which go back to `spare` when it is used no more."""

    def __init__(self, buffers: Buffers, spare: list):
        self.buffers, self.spare = buffers, spare
        self.max_length, self.dtype = buffers.shape[1], buffers.keys.dtype
        self.length = self.columns = 0
        self.padding_bias = None
        self.layers = []
        for keys, values in zip(buffers.keys, buffers.values):
            layer = LayerCache(self, keys.flatten(-2), values.flatten(-2), keys.shape[-1])
            layer.keys = keys.transpose(2, 3)       # as lm.py has them, in memory (B, H, max_length, E)
            self.layers.append(layer)

    def __del__(self):
        self.spare.append(self.buffers)


class ColumnLayerCache:
    """Of one layer the cache up to `end`, for a column whose place is a tensor."""

    def __init__(self, buffers: Buffers, n: int, end: int):
        self.keys, self.values = buffers.keys[n, :, :, :end], buffers.values[n, :, :, :end]
        self.bias, self.place = buffers.bias[..., :end], buffers.place
        keys, values = buffers.given[3 + 2 * n:5 + 2 * n]
        self.condition = None if keys is None else (keys, values)

    def attend(self, q, k, v):
        """Stores k, v (B, H, 1, E) in their place, and attends from q (B, H, 1, E) up to the end."""
        self.keys.index_copy_(2, self.place, k)
        self.values.index_copy_(2, self.place, v)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.bias)


class GraphLMModel(LMModel):
    """An LMModel that generates by graphs."""

    def new_cache(self, batch: int, max_length: int) -> GraphCache:
        shape = batch, -(-max_length // BUCKET) * BUCKET
        for buffers in self.spare:
            if buffers.shape == shape:
                self.spare.remove(buffers)
                buffers.keys.zero_()        # a NaN must not stay, not even where it is masked
                buffers.values.zero_()
                return GraphCache(buffers, self.spare)
        self.spare.clear()
        return GraphCache(Buffers(self.config, *shape, self.emb.weight), self.spare)

    def forward(self, sequence, conditions=Conditions(), cache=None):
        """As LMModel's; once the cache has begun, a column is a `step`."""
        if cache is None or cache.length == 0 or sequence.shape[-1] > 1:
            logits = super().forward(sequence, conditions, cache)
            if cache is not None:
                cache.buffers.begin(self, conditions, cache)
            return logits
        buffers, end = cache.buffers, (cache.length // BUCKET + 1) * BUCKET
        buffers.column.copy_(sequence)
        if graph := buffers.graphs.get(end):
            graph.replay()
        else:
            self.step(buffers, end)
            if end not in buffers.graphs:
                buffers.graphs[end] = record(partial(self.step, buffers, end), sequence.device)
        cache.end(0, 1)
        return buffers.logits.clone()       # the next column writes there again

    @torch.no_grad()
    def step(self, buffers: Buffers, end: int):
        """LMModel.forward for one column, from buffers.column (B, K, 1) to buffers.logits (B, K, 1, V)."""
        B, K, _ = buffers.column.shape
        cross, cross_mask, added = buffers.given[:3]
        conditions = Conditions(cross=cross, cross_mask=cross_mask)
        x = self.embed(buffers.column)                                      # (B, 1, D)
        if added is not None:
            x = x + (added if added.shape[1] == 1 else added.index_select(1, buffers.number))
        x, angles = self.add_positions(x, buffers.position)
        buffers.bias.index_fill_(3, buffers.place, 0.0)
        if not self.run_kernels(x, buffers, end):
            layers = [ColumnLayerCache(buffers, n, end) for n in range(len(self.layers))]
            x = self.run_layers(x, angles, conditions, SimpleNamespace(layers=layers))
            logits = self.lm_heads(self.out_norm(x))                        # (B, 1, K * V)
            buffers.logits.copy_(logits.view(B, 1, K, -1).transpose(1, 2))
        for counter in (buffers.number, buffers.place, buffers.position):
            counter += 1

    def run_kernels(self, x, buffers: Buffers, end: int) -> bool:
        """From x to buffers.logits by speed/cuda_kernels.py. False where that cannot be, or fails."""
        if self.kernels is None:
            return False
        try:
            return self.kernels(self, x, buffers, end)
        except Exception as error:      # whatever a compiler raises
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"speed/cuda.py: no Triton ({reason}); decoding goes on without, slower", file=sys.stderr)
            self.kernels = None
            return False


def record(step, device: torch.device):
    """A CUDA graph of step(), which has run before. None on other devices and, with a message, on failure."""
    if device.type != "cuda":
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        print(f"speed/cuda.py: no CUDA graph ({reason}); decoding goes on without, slower", file=sys.stderr)
        return None
    return graph


def optimize_for_cuda(lm: LMModel, kernels=True) -> LMModel:
    """Makes a model on a CUDA device decode by graphs. Its numbers stay the same but for rounding.

    kernels: layers by speed/cuda_kernels.py, where Triton is there and they can run this model.
    """
    lm.__class__ = GraphLMModel
    lm.spare = []       # Buffers that no cache uses
    lm.kernels = kernels_for(lm) if kernels and lm.emb.weight.device.type == "cuda" else None
    return lm


def kernels_for(lm: LMModel):
    """`column` of speed/cuda_kernels.py, or None where that cannot run this model."""
    try:
        module = importlib.import_module("speed.cuda_kernels")
    except ImportError:     # no Triton
        return None
    return module.column if module.can_run(lm) else None
