"""The processes of one run, as torchrun starts them: how many, which one this is, and what they exchange."""
import os

import torch
import torch.distributed as dist

from system.errors import UserError, as_user_error

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")   # what torchrun sets


def launched() -> bool:
    """Whether torchrun, or another launcher, has started this process as one of several.

    Raises UserError where only some of its variables are there: of a job on a cluster, or left over.
    """
    missing = [name for name in LAUNCHER if not os.environ.get(name)]
    count = os.environ.get("WORLD_SIZE", "1")
    if missing and count not in ("", "1"):
        raise UserError(f"WORLD_SIZE = {count} is set, but not {', '.join(missing)}: start several processes "
                        f"with torchrun, or unset WORLD_SIZE for one")
    return not missing


def join(backend: str, timeout):
    """Connects this process with the others of its run. Raises UserError when they cannot be reached."""
    with as_user_error("the other processes of this run cannot be reached; start all of them with torchrun, "
                       "or unset WORLD_SIZE, RANK and LOCAL_RANK for one process"):
        dist.init_process_group(backend, timeout=timeout)


def process_count() -> int:
    """How many processes take part in this run; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 is the one that writes files."""
    return dist.get_rank() if process_count() > 1 else 0


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if process_count() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(x):
    """x (n, Z) of this process -> rows of all processes (n * processes, Z), and the slice of them that is x.

    All processes must bring equally many rows.
    """
    if process_count() == 1:
        return x, slice(None)
    parts = [torch.empty_like(x) for _ in range(process_count())]
    dist.all_gather(parts, x.contiguous())
    first = rank() * len(x)
    return torch.cat(parts), slice(first, first + len(x))


def barrier():
    """Waits for all other processes. Raises UserError when one of them is gone."""
    if process_count() == 1:
        return
    try:
        dist.barrier()
    except RuntimeError:
        raise UserError("another process of this run has ended before its share was done; see its message, "
                        "then run the same command again") from None
