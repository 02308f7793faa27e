"""Real updates of the full 1.5 B shape on a machine with less memory than its training takes.

    python tests/full_size.py PREPARED [--key=value ...]     # data of data/prepare.py --config config/tiny.py

config/melody.py in float32 takes 33 GB before the first activation: weights, gradients, D-Adaptation's three states
and the average, 5.5 GB each. Here AdamW (two states) moves every weight as soon as its gradient is there, so that
the gradients are never held together, nor is an average: 17 GB. There is no clipping then, which needs all of them.
The music is that of the tiny model, at its rate: codes, chroma and text take as many positions as at 32 kHz, and the
tiny codec's 512 entries are the first of 2,048. Prints a line an update: loss, seconds, memory.
"""
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import load, run
from data.segments import get_batch
from train import LMTraining, cosine_lr, memory_gb

CHANGES = dict(sample_rate=16000, ratios="(5,4,4,4)", radix2_exp=13, codec="checkpoints/tiny/codec", t5="bytes", segment_duration=2.0,
               batch_size=1, epochs=1, updates_per_epoch=6, warmup=1, lr=2e-4, checkpointing=True, device="cpu")


def main(argv):
    prepared, *more = argv
    with tempfile.TemporaryDirectory() as data_dir:
        for path in Path(prepared).iterdir():
            if path.suffix in (".u16", ".u8"):
                shutil.copy(path, data_dir)
        index = json.loads((Path(prepared) / "index.json").read_text())
        (Path(data_dir) / "index.json").write_text(json.dumps(index | {"card": 2048}))
        changes = [f"--{key}={value}" for key, value in {**CHANGES, "data_dir": data_dir}.items()]
        config = load(["config/melody.py", *changes, *more])
        torch.manual_seed(config.seed)
        torch.set_autocast_cache_enabled(False)  # it would hold half-precision copies of all weights
        task = LMTraining(config, torch.device("cpu"))
        print(f"{sum(p.numel() for p in task.module.parameters()) / 1e6:,.1f} M weights, {memory_gb():.1f} GB", flush=True)
        optimizers = {}
        for p in task.module.parameters():
            optimizers[p] = torch.optim.AdamW([p], config.lr, config.betas, config.eps, config.weight_decay)
            p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step() or optimizers[p].zero_grad())

        def held_out():
            """Cross-entropy of three segments that no update sees."""
            with torch.no_grad():
                return sum(task.loss(get_batch(task.train_data, config, 1000 + n), 0)[0].item() for n in range(3)) / 3
        print(f"held out {held_out():.3f}", flush=True)
        for update in range(config.total_updates):
            start = time.perf_counter()
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = config.lr * cosine_lr(update + 1, config.total_updates, config.warmup)
            task.prepare(update, None)
            loss, logged = task.loss(get_batch(task.train_data, config, update), update)
            loss.backward()
            ces = "  ".join(f"{key} {value:.3f}" for key, value in logged.items())
            print(f"update {update + 1}  {ces}  {time.perf_counter() - start:.1f} s  {memory_gb():.1f} GB", flush=True)
        print(f"held out {held_out():.3f}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
