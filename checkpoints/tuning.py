"""Fine-tuning: the architecture of a checkpoint taken over, and low-rank adapters (LoRA) in place of all weights.

    python train.py config/finetune.py --init_from=DIR ...      # lora_rank = 0 trains everything

    W x  ->  W x + alpha / rank * up (down x)       up (out, rank), down (rank, in): the two that are trained

On export the adapters are merged: what comes out is a checkpoint like any other.
"""
import dataclasses

import torch
from torch import nn
from torch.nn.utils import parametrize

from checkpoints.files import open_checkpoint
from checkpoints.formats import read_config
from config import Config, UserError
from encodec import EncodecModel

# what a tuned model keeps of the one it is made from
ARCHITECTURE = """channels sample_rate codec n_filters ratios dimension lstm n_residual_layers kernel_size
    last_kernel_size residual_kernel_size dilation_base compress causal pad_mode true_skip norm n_q card melody
    n_chroma radix2_exp argmax chroma_length null_melody text t5 t5_finetune t5_words t5_dim t5_layers t5_heads dim
    num_heads num_layers hidden_scale positional_embedding positional_scale max_period qk_layer_norm pattern delays
    melody_delay""".split()


def adopt(config: Config) -> Config:
    """The configuration with the architecture of `init_from`; how to train remains the configuration's own."""
    if config.task == "codec":
        theirs = EncodecModel.from_pretrained(config.init_from).config
    else:
        directory = open_checkpoint(config.init_from)
        theirs = read_config(directory)[0]
        if theirs.task != "lm":
            raise UserError(f"init_from = {config.init_from!r}: holds a codec, no language model; name another one")
        if (directory / "codec").is_dir():
            theirs = dataclasses.replace(theirs, codec=str(directory / "codec"))
    theirs.chroma_length = theirs.chroma_frames  # melodies stay as long as it knows them, whatever segment_duration is
    return dataclasses.replace(config, **{key: getattr(theirs, key) for key in ARCHITECTURE})


class LoRA(nn.Module):
    """W -> W + alpha / rank * up @ down (arXiv 2106.09685, section 4.1). up starts at zero: no change at first."""

    def __init__(self, weight, rank: int, alpha: float):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight):
        return weight + self.scale * (self.up @ self.down)


def add_lora(lm, config: Config):
    """Freezes the model and gives every linear layer of the transformer an adapter."""
    lm.requires_grad_(False)
    for layer in lm.layers:
        for module in [m for m in layer.modules() if isinstance(m, nn.Linear)]:
            adapter = LoRA(module.weight, config.lora_rank, config.lora_alpha)
            parametrize.register_parametrization(module, "weight", adapter)


def merge_lora(tensors: dict, config: Config) -> dict:
    """Weights with adapters -> weights as if they had been trained whole."""
    inside = ".parametrizations.weight."
    for name in [name.removesuffix(inside + "original") for name in tensors if name.endswith(inside + "original")]:
        weight, up, down = (tensors.pop(name + inside + part) for part in ("original", "0.up", "0.down"))
        tensors[f"{name}.weight"] = weight + config.lora_alpha / config.lora_rank * up @ down
    return tensors
