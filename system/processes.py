"""The processes of one run, as torchrun starts them: how many, which one this is, and what they exchange."""
import torch
import torch.distributed as dist

from system.errors import UserError


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
