"""Devices: which one to compute on, and where a module is; and settings of torch that a caller may have."""
from contextlib import ExitStack, contextmanager
from functools import wraps

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


@contextmanager
def torch_defaults():
    """Inside, or in a function that it decorates, torch is as in a new process, whatever the caller has set.

    New tensors are float32 and on the CPU unless told otherwise, and there is no autocast: it would be
    another music for the same seed. (The type is one for all threads: others see it change, too.)
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.empty(0).device.type != "cpu":     # torch 2.6: get_default_device does not see a `with`
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def inference():
    """torch_defaults without gradients. (In torch.inference_mode a caller could not change the result.)"""
    with torch_defaults(), torch.no_grad():
        yield


def inference_steps(generator):
    """`inference` for a generator function: in its steps, not between them, while its caller computes."""
    @wraps(generator)
    def steps(*args, **kwargs):
        iterator = generator(*args, **kwargs)
        while True:
            with inference():
                try:
                    result = next(iterator)
                except StopIteration:
                    return
            yield result
    return steps


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters."""
    return next(module.parameters()).device
