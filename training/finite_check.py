"""What happens when a loss or gradient is not finite: the batch is kept, and the run ends with a sentence.

    out_dir/diagnosis/update0000123_process0.safetensors    the batch; where it comes from is in the metadata

train.py looks at the losses and the gradient norm of every update, and calls this when one is not finite.
"""
import json
from pathlib import Path

import torch

from checkpoints.files import write_tensors
from system.errors import UserError
from system.processes import rank
from training.resume import full, named_weights


def not_finite_error(update: int, kind: str, micro_batches: list[dict], task) -> UserError:
    """Writes the batch of an update whose loss or gradient (`kind`) is not finite. -> what to raise"""
    name = f"update{update:07d}_process{rank()}.safetensors"
    path = Path(task.config.out_dir) / "diagnosis" / name
    tensors, places, texts = {}, [], []
    for n, batch in enumerate(micro_batches):
        tensors |= {f"{n}.{key}": tensor for key, tensor in tensors_of(batch).items()}
        places += batch["where"]
        texts.append(batch.get("conditions", {}).get("text"))
    bad_weights = []
    for weight_name, p in named_weights(task).items():
        if p.grad is not None and not full(p.grad).isfinite().all():
            bad_weights.append(weight_name)
    info = {"update": update, "where": places, "text": texts, "not_finite": bad_weights}
    write_tensors(path, tensors, {"info": json.dumps(info)})
    return UserError(f"update {update}: the {kind} is not finite, training stops. Its batch ({places[0]}, "
                     f"...) is in {path}; the last checkpoint is untouched, and --resume leads here again: "
                     f"lower lr or max_norm, or train in bfloat16 or float32")


def tensors_of(batch: dict) -> dict:
    """The tensors of a batch by name: codes or wav, and each melody that an item has."""
    tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
    for i, melody in enumerate(batch.get("conditions", {}).get("melody", [])):
        if melody is not None:
            tensors[f"melody.{i}"] = melody
    return tensors
