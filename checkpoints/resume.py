"""All that the next update depends on, in one file: what `train.py --resume` goes on from, exactly.

    out_dir/state.safetensors    model.*, extra.*, ema.*, optim.*; update and gradient scale in its metadata

One file, so that weights, optimizer and counters always belong together, written whole or not at all. (The data need
nothing kept: what update u reads follows from seed and u.) model.safetensors beside it has the averaged weights alone,
which is what everything else reads. Tensors that `fully_shard` has split are gathered when written and split again
when read, one at a time.
"""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from checkpoints.files import write_tensors
from config import UserError
from rvq import rank


def everything(task, optimizers, ema) -> dict:
    """Name -> tensor of all that the next update depends on, but for what optimizers keep per weight."""
    tensors = {f"model.{name}": t for name, t in task.module.state_dict().items()}
    tensors |= {f"extra.{name}": t for name, t in task.extra.state_dict().items()}
    tensors |= {f"ema.{name}": t for name, t in ema.average.items()}
    group = optimizers[0].param_groups[0]
    return tensors | {f"optim.{key}": group[key] for key in ("d", "r") if key in group}


def named_weights(task) -> dict:
    return {name: p for module in (task.module, task.extra) for name, p in module.named_parameters()}


def save_state(path: Path, task, optimizers, ema, scaler, update: int):
    """Writes it all, gathered from all processes, into one file."""
    tensors, names = everything(task, optimizers, ema), {p: name for name, p in named_weights(task).items()}
    for optimizer in optimizers:
        tensors |= {f"optim.{names[p]}.{key}": t for p, state in optimizer.state.items() for key, t in state.items()}
    tensors = gather(tensors)
    if rank() == 0:
        info = {"update": update, "ema_count": ema.count, "scaler": scaler.state_dict()}
        write_tensors(path, tensors, {"info": json.dumps(info)})


def load_state(path: Path, task, optimizers, ema, scaler) -> int:
    """Reads what save_state wrote -> the update to go on with. Raises UserError when the file does not fit."""
    own, weights = everything(task, optimizers, ema), named_weights(task)
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(like(file.get_tensor(name), tensor))
            for name in sorted(file.keys() - own.keys()):  # every process in the same order: shards are sent
                p = weights[name.removeprefix("optim.").rpartition(".")[0]]
                # a clone: how a product is added up hangs on where in memory a tensor begins, and files put it anywhere
                owner[p].state[p][name.rpartition(".")[2]] = like(file.get_tensor(name).clone(), p)
            info = json.loads(file.metadata()["info"])
        scaler.load_state_dict(info["scaler"])
        ema.count, update = float(info["ema_count"]), int(info["update"])
        assert 0 <= update < 1e15, f"update {update}"
        return update
    except (SafetensorError, OSError, LookupError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{path}: damaged, or of another configuration ({str(error)[:200]})") from None


# --- tensors in shards ------------------------------------------------------------------------------------------

def full(tensor):
    """A tensor gathered from its shards (by all processes together)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(tensors: dict) -> dict:
    """Whole copies on the CPU, on the main process; the others only take part."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = full(tensor)  # one at a time
        if rank() == 0:
            whole[name] = tensor.detach().to("cpu", copy=True)
    return whole


def like(tensor, reference):
    """A whole tensor as `reference` is: on its device, in its shards."""
    if hasattr(reference, "device_mesh") and tensor.shape == reference.shape:
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return tensor if tensor.ndim == 0 else tensor.to(reference.device)
