"""Fine-tuning: the architecture is the checkpoint's; low-rank adapters (LoRA) are trained instead of weights.

    python train.py config/finetune.py --init_from=DIR ...      # lora_rank = 0 trains everything

    W x  ->  W x + alpha / rank * up (down x)       up (out, rank), down (rank, in): the two that are trained

When the model is saved the adapters are merged: it is a checkpoint like any other.
"""
import dataclasses

import torch
from torch import nn
from torch.nn.utils import parametrize

from checkpoints.files import open_checkpoint
from checkpoints.lm_formats import read_config
from config import INHERITED, Config
from encodec import EncodecModel
from system.errors import UserError


def inherit_architecture(config: Config, codec: str = "") -> Config:
    """The configuration with the architecture of its init_from; how to train remains its own.

    codec: one that is asked for in place of the checkpoint's, as it was tuned too.
    """
    if config.task == "codec":
        source = EncodecModel.from_pretrained(config.init_from).config
    else:
        directory = open_checkpoint(config.init_from)
        source = read_config(directory)[0]
        if source.task != "lm":
            raise UserError(f"init_from = {config.init_from!r}: holds a codec, no language model; "
                            f"name another one")
        if (directory / "codec").is_dir():
            source = dataclasses.replace(source, codec=str(directory / "codec"))
    inherited = {key: getattr(source, key) for key in INHERITED} | ({"codec": codec} if codec else {})
    config = dataclasses.replace(config, **inherited | {"chroma_length": 0})
    # melodies keep their length where segments get shorter, and grow with longer ones
    return dataclasses.replace(config, chroma_length=max(source.chroma_frames, config.chroma_frames))


class LoRA(nn.Module):
    """W -> W + alpha / rank * up @ down (arXiv 2106.09685, section 4.1). No change at first: up is zero."""

    def __init__(self, weight, rank: int, alpha: float):
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns, device=weight.device) / columns ** 0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
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
    ending = inside + "original"
    for name in [name.removesuffix(ending) for name in tensors if name.endswith(ending)]:
        weight, up, down = (tensors.pop(name + inside + part) for part in ("original", "0.up", "0.down"))
        tensors[f"{name}.weight"] = weight + config.lora_alpha / config.lora_rank * up @ down
    return tensors
