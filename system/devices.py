"""Devices: which one to compute on, and where a module is."""
import torch
from torch import nn

from system.errors import UserError


def pick_device(name: str) -> torch.device:
    """A device by its name; "auto" takes cuda, then mps, then cpu. Raises UserError when it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        torch.zeros(1, device=name)     # a name may be well-formed and yet not usable here
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device = {name!r}: not available on this machine; try --device=auto") from None


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters."""
    return next(module.parameters()).device
