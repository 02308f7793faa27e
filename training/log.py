"""The log of a run: out_dir/metrics.jsonl, TensorBoard where it is installed, the progress bar.

    {"update": 50, "split": "train", "loss": 5.79, "ce_1": 4.9, ..., "lr": 0.97, "d_lr": 0.00065, ...}

    loss, ce_1 ...    averages of the cross-entropy, of all codebooks and of each; ppl, ppl_1 ...: exp of them
    grad_norm         average length of the gradient before it is clipped
    lr, d_lr          learning rate; with D-Adaptation the factor on d, and d * lr, which is in effect
    tokens_per_s      codes of music a second; data_wait: share of the time in which they were waited for
"""
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config
from data.segments import Prefetcher
from system.errors import as_user_error
from system.processes import process_count, rank, sum_over_processes
from training.figures import rounded, signs_of_collapse, with_perplexity


class Log:
    """Lines of figures, written by the main process alone."""

    def __init__(self, out: Path, config: Config, first: int, batches: Prefetcher):
        self.path, self.config, self.batches = out / "metrics.jsonl", config, batches
        self.tokens_per_update = config.batch_size * config.n_q * config.segment_frames
        self.start = self.last_time = time.perf_counter()
        self.last_update = first
        self.bar = tqdm(total=config.total_updates, initial=first, disable=True if rank() else None)
        self.board = None
        if rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(out / "tensorboard", purge_step=first)
            except ImportError:
                pass

    def train_line(self, update: int, sums: dict, group: dict):
        """The averages since the last such line, over all processes.

        sums: name -> sum over micro-batches, of grad_norm over updates. group: of the optimizer.
        """
        updates = update - self.last_update
        means = []
        for name, total in sums.items():
            n = updates if name == "grad_norm" else updates * self.config.grad_accum
            means.append(total / n)
        means = sum_over_processes(torch.stack(means)) / process_count()
        line = with_perplexity(dict(zip(sums, means.tolist())))
        now = time.perf_counter()
        seconds = now - self.last_time
        line["lr"] = group["lr"]
        if "d" in group:
            line["d_lr"] = float(group["d"]) * group["lr"]
        line["tokens_per_s"] = self.tokens_per_update * updates / seconds
        line["memory_gb"] = memory_gb()
        line["data_wait"] = self.batches.waited / seconds
        line["seconds"] = now - self.start
        self.last_time, self.last_update = now, update
        self.batches.waited = 0.0
        self.bar.update(update - self.bar.n)
        self.line({"update": update, "split": "train", **line})

    def line(self, line: dict):
        """Writes {"update": ..., "split": ..., name: figure, ...} to file, TensorBoard and screen."""
        if rank() > 0:
            return
        line = {key: rounded(value) for key, value in line.items()}
        with as_user_error(f"{self.path}: cannot be written"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {key: x for key, x in line.items() if isinstance(x, (int, float)) and key != "update"}
        if self.board is not None:
            for key, value in numbers.items():
                self.board.add_scalar(f"{line['split']}/{key}", value, line["update"])
        text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items() if not key.startswith("ppl"))
        if line["split"] == "train" and not self.bar.disable:
            self.bar.set_postfix_str(text)
        else:
            tqdm.write(f"{line['update']:7d} {line['split']:5}  {text}", file=sys.stderr)
        signs = signs_of_collapse(self.config, line) if line["split"] == "valid" else []
        if signs:
            tqdm.write("; ".join(signs[:-1]) + ". " + signs[-1], file=sys.stderr)

    def close(self):
        self.bar.close()
        if self.board is not None:
            self.board.close()


def memory_gb() -> float:
    """The most memory held so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:     # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
