"""Sizes before a run: `train.py --plan` prints what it will need, without making the model.

    python train.py config/melody.py --plan         # on one process, or on as many as torchrun starts
    python train.py config/melody.py --plan=8       # as if on eight

Weights, gradients and states are counted, activations estimated.
"""
import os

import torch

from config import Config
from encodec import EncodecModel
from lm import LMModel
from system.devices import pick_device
from training.lora import add_lora
from training.parallel import micro_batch_size

STATES = {"dadam": 3, "adamw": 2, "muon": 2}    # an optimizer's tensors of a weight's size; of muon at most


def plan(config: Config, processes: int = 1, device_bytes: float | None = None) -> dict:
    """Prints and returns what a run will need; bytes are those of one process.

    device_bytes: memory that a process has. Raises UserError when batch_size cannot be split evenly.
    """
    items = micro_batch_size(config, processes)
    with torch.device("meta"):
        module = EncodecModel(config) if config.task == "codec" else LMModel(config)
        if config.lora_rank and config.task == "lm":
            add_lora(module, config)
    params = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    shards = processes if config.sharding == "fsdp" else 1
    memory = {
        "weights": 4 * params / shards,
        "gradients": 4 * trained / shards,
        "optimizer": 4 * STATES[config.optim] * trained / shards,
        "ema": 4 * trained / shards * (config.ema_decay > 0),
        "activations": items * activation_bytes(config),
    }
    memory["together"] = sum(memory.values())
    tokens = config.batch_size * config.n_q * config.segment_frames

    frozen_t5 = config.task == "lm" and module.conditioner.text and not module.conditioner.text.trained
    not_counted = f"; {config.t5}, frozen, not counted" if frozen_t5 else ""
    print(f"{config.task}: {params / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M of them trained"
          f"{not_counted}")
    print_assumptions(config, processes, items)
    for key, size in memory.items():
        note = " (estimate)" if key == "activations" else ""
        print(f"  {key:12} {size / 1e9:9.2f} GB{note}")
    print(f"{tokens:,} tokens an update ({config.batch_size} x {config.n_q} codebooks x "
          f"{config.segment_frames} frames), {config.updates_per_epoch:,} updates an epoch, "
          f"{config.total_updates:,} in all")
    if device_bytes:
        print_verdict(memory["together"], device_bytes, processes)
    return {"parameters": params, "trained": trained, **memory, "tokens_per_update": tokens}


def print_assumptions(config: Config, processes: int, items: int):
    number = "1 process (--plan=8: as if on eight)" if processes == 1 else f"{processes} processes"
    checkpointing = ", checkpointing" if config.checkpointing else ""
    print(f"on {number}, {config.sharding}, {config.dtype}{checkpointing}, batch_size = {config.batch_size}: "
          f"{items} items a micro-batch")
    print("memory of each process:")


def print_verdict(memory: float, device_bytes: float, processes: int):
    verdict = "it fits"
    if memory > 0.9 * device_bytes:
        verdict = ("it does NOT fit; more processes, more grad_accum, checkpointing, sharding = 'fsdp' or "
                   "lora_rank help")
    print(f"the device has {device_bytes / 1e9:.1f} GB: {verdict}")
    if processes > 1:
        shared = processes * memory / 1e9
        print(f"(if each process has such a device; processes that share it take {shared:.1f} GB)")


def activation_bytes(config: Config) -> float:
    """What one item keeps for the backward pass, roughly."""
    return codec_activations(config) if config.task == "codec" else lm_activations(config)


def codec_activations(config: Config) -> float:
    """Each stage keeps about ten arrays of its output's size; all stages are of like size.

    The discriminator sees wave and reconstruction twice: 2 L cells of a spectrogram, and 2 L disc_filters in
    the maps that get narrower, each before and after its activation.
    """
    L = config.segment_frames * config.stride
    stages = 4 * 10 * (len(config.ratios) + 1) * 2 * config.n_filters * L
    if not config.adv and not config.feat:
        return stages
    maps = 2 * 2 * L * config.disc_filters
    return stages + 4 * (2 * 2) * 2 * maps * len(config.disc_windows)


def lm_activations(config: Config) -> float:
    """Bytes of the layers, and of the heads: logits, their copy in frames, softmax and gradient in float32.

    A layer keeps, per position and in widths D: the input and both norms' inputs and outputs (4 in float32),
    and in the precision of the matrix products q, k, v, attention's output twice, and the hidden layer of the
    feed-forward before and after GELU (5 + 2 hidden_scale). With checkpointing its input; one layer in full.
    """
    T = config.segment_frames
    positions = T + config.n_q
    if config.melody == "prepend":
        positions += config.chroma_frames
    if config.text == "prepend":
        positions += 64         # tokens of a long text
    width = positions * config.dim
    product_bytes = 4 if config.dtype == "float32" else 2
    layer = width * (4 * 4 + product_bytes * (5 + 2 * config.hidden_scale))
    layers = config.num_layers * layer
    if config.checkpointing:
        layers = config.num_layers * width * 4 + layer
    return layers + 4 * 4 * T * config.n_q * config.card


def device_memory(config: Config) -> float | None:
    """Bytes of the device that the configuration names, None where the system cannot tell."""
    device = pick_device(config.device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
