"""Takes: the files of a result, and the metadata from which it can be made again.

    samples/a_slow_flute_tune.wav       the music
    samples/a_slow_flute_tune.json      what was asked for, all settings, and the command that makes it again
    samples/a_slow_flute_tune.npz       its codes (--save_codes), which a take can continue (--continue_from)
"""
import dataclasses
import functools
import io
import json
import os
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import torch

from checkpoints.files import open_checkpoint, version_of
from config import Config
from data.audio import check_format
from system.errors import UserError
from system.files import write_atomic

DEFAULT_CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "tiny"
# flags of sampling, and the keys of the configuration that are their defaults
SETTINGS = {"guidance": "cfg_coef", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
NOT_SETTINGS = "text melody notes seed out page overwrite keep_partial play".split()
MAX_UNPACKED = 2 ** 28      # bytes of a file of codes: hours of music


# --- names ------------------------------------------------------------------------------------------------

def output_names(args, texts) -> list[Path]:
    """Where the item of each text goes: as --out says, numbered in a batch, else a free name in samples/.

    Raises UserError for a format that is not known, and for a file that exists unless --overwrite is given.
    """
    if args.out == "-":
        return []
    if not args.out:
        names = []
        for text in texts:
            names.append(free_name(args, text, names))
        return names
    out = Path(args.out)
    check_format(out)
    names = [out]
    if len(texts) > 1:
        names = [out.with_name(f"{out.stem}_{i}{out.suffix}") for i in range(len(texts))]
    for name in names:
        for path in files_of(name, args):
            if os.path.lexists(path) and not args.overwrite:
                raise UserError(f"--out {out}: {path} exists; choose another name or add --overwrite")
    return names


def free_name(args, text, taken) -> Path:
    """A name after the text, none of whose files exists and which is not among those `taken`."""
    stem = re.sub(r"[^\w-]+", "_", text or "music")[:60].strip("_") or "music"
    name, n = Path("samples") / f"{stem}.wav", 0
    while name in taken or any(os.path.lexists(path) for path in files_of(name, args)):
        n += 1
        name = Path("samples") / f"{stem}_{n}.wav"
    return name


def files_of(out: Path, args) -> list[Path]:
    """All files of an item."""
    files = [out, out.with_suffix(".json")]
    if args.save_codes:
        files.append(out.with_suffix(".npz"))
    return files


# --- the JSON beside a result -----------------------------------------------------------------------------

def metadata(args, text, melody, seed: int, out: Path, config: Config) -> str:
    """The JSON of an item: its flags and settings, the configuration, and the command that makes it alone.

    In int8 and bfloat16 an item is rounded differently in a batch than alone, and sounds different.
    """
    flags = {}
    if text:
        flags["text"] = text
    if melody:
        flags["notes" if args.notes else "melody"] = melody
    for name, value in vars(args).items():
        given = value is not None and value is not False
        if given and name not in NOT_SETTINGS:
            flags[name] = value
    flags |= {"seed": seed, "out": str(out)}
    settings = {flag: flags.get(flag, getattr(config, key)) for flag, key in SETTINGS.items()}
    known = {"settings": settings, "torch": torch.__version__, "command": command_of(flags),
             "config": dataclasses.asdict(config)}
    return json.dumps(flags | known, indent=1) + "\n"


def command_of(flags: dict) -> str:
    """The command line that gives these flags."""
    words = ["python", "sample.py"]
    for name, value in flags.items():
        if name == "duration" and "bars" in flags:
            continue    # it follows from them
        if value is True:
            words.append(f"--{name}")
        elif (name, value) != ("checkpoint", str(DEFAULT_CHECKPOINT)):
            words += [f"--{name}", str(value)]
            if words[-1].startswith("-"):       # else it would be taken for a flag
                words[-2:] = [f"--{name}={value}"]
    return shlex.join(words)


def tags_of(args, text, seed: int) -> dict:
    """What the file of an item says itself (see `write_audio`); nothing with --no_tags.

    Of a model's directory only the name: where it lies is nobody's business.
    """
    if args.no_tags:
        return {}
    software = f"nanoMusicGen, model {name_and_version(args.checkpoint)}, seed {seed}"
    return dict(title=text or "music", software=software, comment="AI-generated")


@functools.cache
def name_and_version(checkpoint: str) -> str:
    """Of a model, looked up once: a hub id is asked for over the network."""
    directory = open_checkpoint(checkpoint)
    is_folder = os.path.isdir(os.path.expanduser(checkpoint))
    name = directory.resolve().name if is_folder else checkpoint
    return f"{name} {version_of(directory)}"


# --- codes ------------------------------------------------------------------------------------------------

def write_codes(path, codes: torch.Tensor):
    """Writes codes (K, T) as .npz, from which a take can be continued."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, codes=codes.numpy().astype(np.uint16))
    write_atomic(path, buffer.getvalue())


def read_codes(path, config: Config) -> torch.Tensor:
    """Codes (1, K, T) from a file of --save_codes. Raises UserError when it is not one of this model's."""
    try:
        with zipfile.ZipFile(path) as file:     # a small archive can unpack to anything
            size = sum(info.file_size for info in file.infolist())
        if size >= MAX_UNPACKED:
            raise ValueError("it claims more than 256 MB")
        with np.load(path, allow_pickle=False) as file:
            codes = file["codes"]
        if codes.dtype.kind not in "iu":
            raise TypeError("its codes are no integers")
        codes = torch.from_numpy(codes.astype(np.int64))
    except Exception as error:      # zipfile, zlib and numpy each have their own
        reason = str(error)[:100]
        raise UserError(f"--continue_from {path}: not a file of --save_codes ({reason})") from None
    has_shape = codes.dim() == 2 and len(codes) == config.n_q and codes.numel() > 0
    if not (has_shape and 0 <= codes.min() <= codes.max() < config.card):
        raise UserError(f"--continue_from {path}: codes {tuple(codes.shape)} are not {config.n_q} codebooks "
                        f"of {config.card} entries")
    return codes[None]
