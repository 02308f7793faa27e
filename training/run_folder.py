"""The folder of a run, out_dir: what a run finds there, and what it leaves.

    config.json  codec/               made when a run begins
    metrics.jsonl  tensorboard/       training/log.py
    state.safetensors                 what --resume goes on from: training/resume.py
    model.safetensors  samples/       the averaged weights, as from_pretrained reads them; and music by them
    diagnosis/                        training/finite_check.py
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

from checkpoints.files import write_tensors
from config import Config
from system.errors import UserError
from system.files import check_writable, write_atomic
from system.processes import barrier, rank
from training.lora import merge_lora
from training.resume import gather, state_path


def can_resume(out: Path, resume: bool) -> bool:
    """Whether to go on with a run: asked for, and it is there. Raises UserError rather than overwrite one,
    and for a folder that cannot be written."""
    check_writable(out / "config.json")
    has_state = state_path(out).exists()
    if resume and has_state:
        return True
    if (out / "model.safetensors").exists():
        hint = ", or add --resume to continue it" if has_state else ""
        raise UserError(f"out_dir = {str(out)!r} already holds a model; choose another out_dir{hint}")
    if (out / "config.json").exists() and not (out / "metrics.jsonl").exists():
        raise UserError(f"out_dir = {str(out)!r} has a config.json that is not of a run; "
                        f"choose another out_dir")
    return False


def open_run(out: Path, task, first: int):
    """Makes out_dir ready: configuration, codec, and the metrics up to the first update."""
    config = task.config
    if rank() == 0:
        if first:
            print_changes(Config.from_json(out / "config.json"), config)
        for leftover in out.rglob(".writing-*"):    # of a process that was killed while it wrote
            leftover.unlink()
        cut_metrics(out / "metrics.jsonl", first)
        config.save(out / "config.json")
        if config.task == "lm":
            task.codec.save(out / "codec")
    barrier()


def begin(task, ema, log, first: int):
    """What there is to do, and to tell, before the first update."""
    config = task.config
    if first:       # the run may have been killed between state and model, or between model and samples
        save_ema_model(task, ema, log, first)
        return
    if rank() == 0 and not (Path(config.data_dir) / "valid").is_dir():
        test_data = type(task.train_data)(config, "test")
        for purpose, data in (("validation", task.valid_data), ("testing", test_data)):
            some = ", ".join(data.names[:5]) + (", ..." if len(data) > 5 else "")
            print(f"held out for {purpose}: {len(data)} of the recordings{': ' if some else ''}{some}",
                  file=sys.stderr)
    if config.init_from and config.valid_every and len(task.valid_data) > 0:    # what tuning starts from
        task.module.eval()
        log.line({"update": 0, "split": "valid", **task.validate()})


def print_changes(old: Config, new: Config):
    """What differs from the configuration that the run began with."""
    before, now = dataclasses.asdict(old), dataclasses.asdict(new)
    for key, value in now.items():
        if before[key] != value:
            print(f"continuing with {key} = {value!r}, was {before[key]!r}", file=sys.stderr)


def cut_metrics(path: Path, first: int):
    """Leaves the lines up to an update: what came after it is done again. A run that begins has none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    kept = [line + "\n" for line in lines if first and update_of(line) <= first]
    write_atomic(path, "".join(kept).encode())


def update_of(line: str) -> float:
    """The update of a line of metrics.jsonl; infinite for a torn line."""
    try:
        return float(json.loads(line)["update"])
    except (ValueError, LookupError, TypeError):
        return math.inf


def save_ema_model(task, ema, log, update: int):
    """Writes model.safetensors: the averaged weights, with adapters merged; and, if due, music by them."""
    config, out = task.config, Path(task.config.out_dir)
    tensors = {name: ema.average.get(name, t) for name, t in task.module.state_dict().items()}
    tensors = gather(tensors)
    tensors.pop("conditioner.text.t5.encoder.embed_tokens.weight", None)  # is shared.weight
    if rank() > 0:
        return
    write_tensors(out / "model.safetensors", merge_lora(tensors, config))
    due = config.sample_every > 0 and update % config.sample_every == 0
    if due and len(task.valid_data) > 0:
        before = log.path.read_text(encoding="utf-8")   # a crash
        if f'"update": {update}, "split": "samples"' not in before:
            log.line({"update": update, "split": "samples", **task.samples(out, update)})
