"""The command line of train.py: flags, Ctrl-C, exit codes.

    python train.py [config/X.py] [--key=value ...]     train
        --resume                        go on where the run in out_dir stopped
        --plan, --plan=PROCESSES        print what the run will need, and stop
        --eval, --split=test            measure the model in out_dir on held-out data

train.py hands over its function `train`: a library must not import a command. Exit codes: system/command.py.
"""
import os
import re
import signal
import sys

import torch.distributed as dist

from config import Config, load
from data.segments import SPLITS
from system.errors import UserError
from system.processes import process_count
from training.lora import inherit_architecture
from training.plan import device_memory, plan

FLAGS = ("--resume", "--plan", "--eval", "--split")


def main(train, argv: list[str]):
    """What `python train.py` does with its arguments. -> the figures of --plan or --eval"""
    flags, settings = take_flags(argv)
    config = load(settings)
    split = flags.get("--split", "valid")
    if split not in SPLITS:
        raise UserError(f"--split={split}: must be one of {', '.join(SPLITS)}")
    if config.init_from:
        asked = any(setting.startswith("--codec=") for setting in settings)
        config = inherit_architecture(config, config.codec if asked else "")
    if "--plan" in flags:
        return plan(config, processes_to_plan(flags["--plan"]), device_memory(config))
    if "--eval" in flags:
        from evaluation.evaluate import evaluate
        return evaluate(config, split)
    return train_until_interrupted(train, config, "--resume" in flags)


def take_flags(argv: list[str]) -> tuple[dict, list[str]]:
    """The flags above with their values, and all other arguments, which are config.py's."""
    flags, others = {}, []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in FLAGS or (equals and name in ("--resume", "--eval")):
            others.append(argument)
            continue
        if name == "--split" and not equals:
            value = next(arguments, "")     # with a blank
        flags[name] = value
    return flags, others


def processes_to_plan(value: str) -> int:
    """The number in --plan=8; for --plan alone, that of torchrun."""
    value = value or os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("[0-9]{1,6}", value) or int(value) < 1:
        raise UserError(f"--plan={value}: must be a number of processes, such as --plan=8")
    return int(value)


def train_until_interrupted(train, config: Config, resume: bool):
    """Trains; Ctrl-C or SIGTERM end the run after the update that it is in."""
    interrupted = []

    def stop(number, frame):
        interrupted.append(number)
        # a second Ctrl-C ends it at once; not a second SIGTERM: torchrun sends it to all at the first Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        train(config, resume, interrupted)
    except RuntimeError as error:
        if process_count() > 1 and re.search("onnection|peer|timed out|NCCL", str(error)):
            reason = str(error).splitlines()[0][:100]
            raise UserError(f"another process of this run has ended ({reason}); see its message. "
                            f"--resume goes on from the last checkpoint") from None
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    if interrupted:
        print(f"stopped as asked; --resume goes on from {config.out_dir}", file=sys.stderr)
        sys.exit(130)
