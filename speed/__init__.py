"""Optional speed. Nothing here changes a result beyond rounding; all works without this folder.

    kernels.c, kernels.py   products, attention, optimizer loops that read memory once; compiled at first use
    decoding.py             the language model in generation: weights in float32, bfloat16, int8 or int4
    cuda.py                 the language model in generation on a GPU: CUDA graphs
    cuda_kernels.py         its layers there, for a few rows, in five kernels each (Triton)
    codec.py                the codec's convolutions as matrix products
    training.py             layers and D-Adaptation in training
    products.py             products and attention of many positions
"""
from speed.codec import optimize_codec
from speed.cuda import optimize_for_cuda
from speed.decoding import fastest_dtype, optimize_for_cpu
from speed.training import optimize_training

__all__ = ["fastest_dtype", "optimize_codec", "optimize_for_cpu", "optimize_for_cuda", "optimize_training"]
