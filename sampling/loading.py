"""Loading a language model and its codec, in the form in which they are fastest on a device.

    lm, codec = load_models("checkpoints/tiny", device="auto", dtype="auto")     # MusicGen.from_pretrained
"""
import os

import torch

from checkpoints.files import INT4, open_checkpoint
from encodec import EncodecModel
from lm import LMModel
from system.devices import device_of, pick_device
from system.errors import UserError

try:    # on a CPU PackedLinear and PackedCache (speed/decoding.py) take over from lm.py's layers and cache
    from speed import fastest_dtype, optimize_codec, optimize_for_cpu, optimize_for_cuda
except ImportError:     # without that folder everything computes as it is written in the stages
    fastest_dtype = optimize_codec = optimize_for_cpu = optimize_for_cuda = None

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4", "auto")


def load_models(name_or_dir, device="auto", dtype="float32", compile=False):
    """Loads our directory, a transformers directory or hub id, or one in audiocraft's format -> lm, codec.

    dtype: of the language model's weights; "int8" and "int4" are for the CPU, "auto" is the fastest for the
    device, but never "int4". The codec stays in float32, but for its decoder on a CPU that computes in
    bfloat16. compile: the layers by torch.compile, where speed/kernels.c does not run them. Raises UserError
    for what does not fit.
    """
    # oneDNN, and torch beside it, keep code for up to 1,024 lengths: memory would grow for hours
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "16")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    device, directory = pick_device(device), open_checkpoint(name_or_dir, with_codec=True)
    if dtype == "auto":
        dtype = fastest_dtype(device) if fastest_dtype else "float32"
    quantized = dtype in ("int8", "int4")
    if quantized and device.type != "cpu":
        raise UserError(f"dtype {dtype!r} is for the CPU; on {device.type} take bfloat16 or float16")
    if quantized and not optimize_for_cpu:
        raise UserError(f"dtype {dtype!r} needs the folder speed/, which is not here; take float32")

    prepare = optimize_for_cpu if device.type == "cpu" and dtype != "float16" else None
    weights = INT4 if dtype == "int4" else getattr(torch, dtype)
    lm = LMModel.from_pretrained(directory, weights, prepare).to(device)
    if device.type == "cuda" and optimize_for_cuda:
        optimize_for_cuda(lm, kernels=not compile)
    if compile and not lm.packed:
        for layer in lm.layers:     # they are alike and compile once
            layer.compile()
    # the codec's convolutions and nearest-neighbor search can be wrong on mps; it is a small part
    codec_device = "cpu" if device.type == "mps" else device
    codec = codec_of(directory, lm).fold().to(codec_device)
    if optimize_codec and device_of(codec).type == "cpu":
        narrow = device.type == "cpu" and (quantized or dtype == "bfloat16")
        codec = optimize_codec(codec, torch.bfloat16 if narrow else torch.float32)
    return lm, codec


def codec_of(name_or_dir, lm):
    """The codec inside a model's directory, else the one that its configuration names."""
    inside = open_checkpoint(name_or_dir) / "codec"
    return EncodecModel.from_pretrained(inside if inside.is_dir() else lm.config.codec)


def check_codec(codec, config):
    """Raises UserError where a language model of this configuration speaks other codes than the codec's."""
    streams = max(1, config.channels // codec.channels)     # 2 of a mono codec, interleaved, for stereo
    K = config.n_q // streams
    if codec.num_codebooks < K or codec.cardinality != config.card:
        raise UserError(f"the language model speaks {K} codebooks of {config.card} entries, its codec "
                        f"{codec.num_codebooks} of {codec.cardinality}; set codec = to the one it was "
                        f"trained with")
