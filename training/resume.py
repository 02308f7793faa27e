"""All that the next update depends on, in one file: what `train.py --resume` goes on from, exactly.

    out_dir/state.safetensors    model.*, extra.*, ema.*, optim.*; update and gradient scale in its metadata

One file, so that weights, optimizer and counters always belong together, written whole or not at all. (Data
need nothing kept: what update u reads follows from seed and u.) model.safetensors beside it has the averaged
weights alone, which is what everything else reads. Tensors that FSDP has split are gathered when written and
split again when read, one at a time.
"""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from checkpoints.files import current_name, write_tensors
from system.errors import UserError
from system.processes import rank


def state_path(out) -> Path:
    return Path(out) / "state.safetensors"


def training_state(task, ema, optimizers) -> dict:
    """Name -> tensor of all that the next update depends on, but for what optimizers keep for each weight."""
    tensors = {f"model.{name}": t for name, t in task.module.state_dict().items()}
    tensors |= {f"extra.{name}": t for name, t in task.extra.state_dict().items()}
    tensors |= {f"ema.{name}": t for name, t in ema.average.items()}
    group = optimizers[0].param_groups[0]
    tensors |= {f"optim.{key}": group[key] for key in ("d", "r") if key in group}     # of DAdaptAdam
    return tensors


def named_weights(task) -> dict:
    """Name -> parameter of all that is trained."""
    return dict([*task.module.named_parameters(), *task.extra.named_parameters()])


def save_state(task, ema, optimizers, scaler, update: int):
    """Writes the whole state after so many updates, gathered from all processes, into one file."""
    tensors = training_state(task, ema, optimizers)
    names = {p: name for name, p in named_weights(task).items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optim.{names[p]}.{key}": t for key, t in state.items()}
    tensors = gather(tensors)
    if rank() == 0:
        info = {"update": update, "ema_count": ema.count, "scaler": scaler.state_dict()}
        write_tensors(state_path(task.config.out_dir), tensors, {"info": json.dumps(info)})


def load_state(task, ema, optimizers, scaler) -> int:
    """Reads what save_state wrote. -> the update to go on with. Raises UserError when it does not fit."""
    path = state_path(task.config.out_dir)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            read_tensors(file, task, ema, optimizers)
            info = json.loads(file.metadata()["info"])
        scaler.load_state_dict(info["scaler"])
        ema.count, update = float(info["ema_count"]), int(info["update"])
        if not 0 <= update < 1e15:
            raise ValueError(f"update {update}")
        return update
    except (SafetensorError, OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or of another configuration ({str(error)[:200]})") from None


def read_tensors(file, task, ema, optimizers):
    """The tensors of an open state, read into the model, the average and the optimizers."""
    names_in_file = {current_name(name): name for name in file.keys()}
    own = training_state(task, ema, optimizers)
    for name, tensor in own.items():
        tensor.copy_(like(file.get_tensor(names_in_file[name]), tensor))

    weights = named_weights(task)
    optimizer_of = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            optimizer_of |= dict.fromkeys(group["params"], optimizer)
    for name in sorted(names_in_file.keys() - own.keys()):  # every process in the same order: shards are sent
        weight_name, _, key = name.removeprefix("optim.").rpartition(".")
        p = weights[weight_name]
        # a clone: the order of a sum depends on where in memory a tensor begins, and files put it anywhere
        tensor = file.get_tensor(names_in_file[name]).clone()
        optimizer_of[p].state[p][key] = like(tensor, p)


# --- tensors in shards ------------------------------------------------------------------------------------

def full(tensor):
    """A tensor gathered from its shards (by all processes together)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(tensors: dict) -> dict:
    """Whole copies on the CPU, on the main process; the others only take part."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = full(tensor)       # one at a time
        if rank() == 0:
            whole[name] = tensor.detach().to("cpu", copy=True)
    return whole


def like(tensor, reference):
    """A whole tensor as `reference` is: on its device, in its shards."""
    if hasattr(reference, "device_mesh") and tensor.shape == reference.shape:
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return tensor if tensor.ndim == 0 else tensor.to(reference.device)
