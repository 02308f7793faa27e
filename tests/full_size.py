"""Real updates of the full 1.5 B shape on a machine with less memory than its training takes.

    python tests/full_size.py PREPARED [--key=value ...]  # data of data/prepare.py --config config/tiny.py

config/melody.py in float32 takes 33 GB before the first activation: weights, gradients, D-Adaptation's three
states and the average, 5.5 GB each. Here AdamW (two states) moves every weight as soon as its gradient is
there, so that the gradients are never held together, nor is an average: 17 GB. There is no clipping then,
which needs all of them. The music is that of the tiny model, at its rate: codes, chroma and text take as many
positions as at 32 kHz, and the tiny codec's 512 entries are the first of 2,048. Prints a line an update:
loss, seconds, memory.
"""
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import load
from data.segments import get_batch
from speed import optimize_training
from system.command import run
from train import LMTraining, cosine_lr
from training.log import memory_gb

CHANGES = dict(
    sample_rate=16000, ratios="(5,4,4,4)", radix2_exp=13, t5="bytes", segment_duration=2.0,
    batch_size=1, epochs=1, updates_per_epoch=6, warmup=1, lr=2e-4,
    checkpointing=True, device="cpu")


def copy_data(prepared: Path, to: Path) -> dict:
    """Copies prepared data, as if its codes had 2,048 entries. -> how it was prepared"""
    for path in prepared.iterdir():
        if path.suffix in (".u16", ".u8"):
            shutil.copy(path, to)
    index = json.loads((prepared / "index.json").read_text())
    (to / "index.json").write_text(json.dumps(index | {"card": 2048}))
    return {key: index[key] for key in ("melody_form", "codec")}


def adamw_in_the_backward_pass(module, config) -> list:
    """One optimizer a weight, which moves it, and frees its gradient, as soon as that is there."""
    optimizers = {}

    def move(p):
        optimizers[p].step()
        optimizers[p].zero_grad()
    for p in module.parameters():
        optimizers[p] = torch.optim.AdamW([p], config.lr, config.betas, config.eps, config.weight_decay)
        p.register_post_accumulate_grad_hook(move)
    return list(optimizers.values())


@torch.no_grad()
def held_out(task) -> float:
    """Cross-entropy of three segments that no update sees."""
    batches = [get_batch(task.train_data, task.config, 1000 + n) for n in range(3)]
    return sum(task.loss(batch, 0)[0].item() for batch in batches) / len(batches)


def train(config):
    torch.manual_seed(config.seed)
    torch.set_autocast_cache_enabled(False)  # it would hold half-precision copies of all weights
    task = LMTraining(config, torch.device("cpu"))
    optimize_training(task.module, [], config)
    count = sum(p.numel() for p in task.module.parameters())
    print(f"{count / 1e6:,.1f} M weights, {memory_gb():.1f} GB", flush=True)
    optimizers = adamw_in_the_backward_pass(task.module, config)
    print(f"held out {held_out(task):.3f}", flush=True)
    for update in range(config.total_updates):
        start = time.perf_counter()
        for optimizer in optimizers:
            factor = cosine_lr(update + 1, config.total_updates, config.warmup)
            optimizer.param_groups[0]["lr"] = config.lr * factor
        task.module.train()
        loss, figures = task.loss(get_batch(task.train_data, config, update), update)
        loss.backward()
        line = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        seconds = time.perf_counter() - start
        print(f"update {update + 1}  {line}  {seconds:.1f} s  {memory_gb():.1f} GB", flush=True)
    print(f"held out {held_out(task):.3f}")


def main(argv):
    prepared, *more = argv
    with tempfile.TemporaryDirectory() as data_dir:
        made = copy_data(Path(prepared), Path(data_dir))
        changes = [f"--{key}={value}" for key, value in {**CHANGES, **made, "data_dir": data_dir}.items()]
        train(load(["config/melody.py", *changes, *more]))


if __name__ == "__main__":
    run(main, sys.argv[1:])
