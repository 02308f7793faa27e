"""One run on several processes: who takes part, DDP, FSDP; and half precision.

    torchrun --nproc_per_node=8 train.py config/melody.py --sharding=fsdp

DDP (torch's DistributedDataParallel): every process has the whole model, and averages the gradients of all.
FSDP (torch's fully_shard) also splits weights, gradients and the optimizer's states between the processes.
"""
import inspect
import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from config import Config
from system.devices import pick_device
from system.errors import UserError
from system.processes import join, launched, process_count, rank


def start_processes(config: Config) -> tuple[torch.device, int, int]:
    """Joins the other processes if torchrun started this one. -> its device, its rank, their number

    Raises UserError when the configuration does not fit so many.
    """
    device = pick_device(config.device)
    if not dist.is_initialized() and launched():
        backend = "gloo"
        if device.type == "cuda":
            backend = "nccl"
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        join(backend, timedelta(minutes=30))
    if config.sharding == "fsdp" and not dist.is_initialized():
        raise UserError("sharding = 'fsdp' splits weights between processes: start it with torchrun")
    if config.sharding == "fsdp" and config.optim == "muon":
        raise UserError("optim = 'muon' needs whole matrices, sharding = 'fsdp' splits them; "
                        "change one of the two")
    micro_batch_size(config, process_count())
    return device, rank(), process_count()


def micro_batch_size(config: Config, processes: int) -> int:
    """Items that one process computes at once. Raises UserError when batch_size cannot be split evenly."""
    parts = config.grad_accum * processes
    if config.batch_size % parts:
        raise UserError(f"batch_size = {config.batch_size} must be a multiple of grad_accum = "
                        f"{config.grad_accum} times the number of processes, {processes}")
    return config.batch_size // parts


def autocast(device, dtype: str):
    """Half precision for the operations that tolerate it; the weights stay float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


def wrap(module, config: Config, layers=()):
    """A module for several processes. layers: those of its parts that FSDP gathers one at a time."""
    if config.sharding == "fsdp":
        from torch.distributed.fsdp import fully_shard
        for layer in layers:
            fully_shard(layer)
        return fully_shard(module)
    if process_count() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel
    # no broadcast of buffers: the codebooks keep theirs equal by themselves
    sync = "forward_sync_buffers"
    if sync not in inspect.signature(DistributedDataParallel).parameters:   # before torch 2.13
        sync = "broadcast_buffers"
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{sync: False})


@contextmanager
def last_only(forward, last: bool):
    """While gradients are accumulated, processes exchange them with the last micro-batch only."""
    if hasattr(forward, "set_requires_gradient_sync"):      # FSDP
        forward.set_requires_gradient_sync(last)
    waits = hasattr(forward, "no_sync") and not last        # DDP
    with forward.no_sync() if waits else nullcontext():
        yield
