"""Checkpoints as files: directories, hub ids, tensors in and out. Nothing that is read here can run code.

    from checkpoints.files import open_checkpoint, read_tensors, write_tensors

A checkpoint is a directory with config.json and model.safetensors; those of others may come in shards or as
.bin. How transformers' and audiocraft's formats differ from ours: codec_formats.py and lm_formats.py.
"""
import hashlib
import itertools
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from system.errors import UserError, as_user_error, naming
from system.files import read_json, write_atomic

SCALE = ".scale"    # beside a matrix in int8 or int4: the factor of each of its rows

INT4 = torch.uint8  # as torch has no such numbers: two of them in a byte, see `quantize_groups`
GROUP = 32          # int4 weights that share a scale
# What the 16 numbers of 4 bits stand for, times the scale. The largest weight of a group is always the first.
# Of all such numbers these have the least error for groups of normally distributed weights.
INT4_LEVELS = (-1.0, -0.762, -0.5873, -0.445, -0.3234, -0.2161, -0.1167, -0.0228,
               0.0683, 0.1602, 0.2543, 0.3528, 0.4585, 0.577, 0.7138, 0.8825)

FORMER_NAMES = (    # parameters that had another name in files of before November 2026
    (r"(^|\.)heads\.", r"\1lm_heads."),
    (r"(^|\.)layers\.(\d+)\.cross\.", r"\1layers.\2.cross_attn."),
)


def current_name(name: str) -> str:
    """Today's name of a parameter in a file of ours."""
    for former, current in FORMER_NAMES:
        name = re.sub(former, current, name)
    return name


@contextmanager
def shapes_only():
    """Modules that are made inside have shapes and no numbers: tensors are assigned as they are read."""
    with torch.device("meta"), NoInitialNumbers():
        yield


class NoInitialNumbers(TorchFunctionMode):
    """Leaves out what draws and measures initial weights.

    Where there are no numbers, torch does these in Python, and imports its compiler first: 0.7 s.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.init.normal_:
            return kwargs["tensor"] if kwargs else args[0]
        if function is torch.randn:
            return torch.empty(*args, **kwargs)
        if function is torch.norm_except_dim:       # of weight norm: lengths of the rows of one dimension
            weight, _, dim = args
            return weight.new_empty([n if i == dim else 1 for i, n in enumerate(weight.shape)])
        return function(*args, **kwargs)


def open_checkpoint(name, with_codec: bool = False) -> Path:
    """A directory as it is, or a hub id downloaded to (or found in) huggingface_hub's cache -> directory.

    Raises UserError for what is neither, and for an adapter of PEFT, which is no whole model. with_codec:
    also for a model that has no codec and names none that is found, which is cheap to tell before it is read.
    """
    path = Path(os.path.expanduser(name))   # Path's own raises an error where there is no home
    if path.is_file():
        raise UserError(f"{name}: a file; give the directory that it lies in (an archive is to be unpacked)")
    if path.is_dir():
        directory = refuse_adapter(path, name)
        if with_codec:
            find_codec(directory, name)
        return directory
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(name)):
        raise UserError(f"{name}: neither a directory nor a Hugging Face id such as facebook/musicgen-melody")
    from huggingface_hub import snapshot_download
    small = ["*.json", "*.model", "*.txt"]
    with as_user_error(f"{name}: not a directory here, and the Hugging Face hub did not give it; check the "
                       "name and the network, or name a directory"):
        directory = Path(snapshot_download(str(name), allow_patterns=small + ["*.safetensors"]))
        if not any(directory.glob("*.safetensors")):  # an older upload
            directory = Path(snapshot_download(str(name), allow_patterns=small + ["*.bin"]))
        return refuse_adapter(directory, name)


def refuse_adapter(directory: Path, name) -> Path:
    """The directory, unless PEFT wrote it, without the weights that its adapter belongs to."""
    about = directory / "adapter_config.json"
    if about.is_file() and not has_whole_weights(directory):
        base = read_json(about).get("base_model_name_or_path")
        raise UserError(f"{name}: holds an adapter of PEFT for {base!r:.80}, not a whole model; merge it "
                        f"into that model (PEFT's merge_and_unload) and save the result")
    return directory


def find_codec(directory: Path, name):
    """Raises UserError for a model in audiocraft's format or ours without a codec."""
    refuse_half(directory, name)
    if (directory / "config.json").is_file() and not (directory / "codec").is_dir():
        values = read_json(directory / "config.json")
        if values.get("task") == "codec":
            raise UserError(f"{name}: holds a codec without a language model; give the directory of a model")
        if "model_type" not in values and isinstance(values.get("codec"), str):
            with naming(f"{name}: has no folder codec, and its config.json names another one"):
                open_checkpoint(values["codec"])


def refuse_half(directory: Path, name):
    """Raises UserError for a language model of audiocraft without its codec, which lies beside it."""
    if is_audiocraft(directory, "state_dict.bin"):
        if not (directory / "compression_state_dict.bin").is_file():
            raise UserError(f"{name}: has a language model (state_dict.bin) without its codec; put the file "
                            f"compression_state_dict.bin of the same model beside it")


def refuse_pointer(path: Path):
    """Raises UserError for what Git leaves in the place of a large file when Git LFS is not installed."""
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise UserError(f"{path}: a pointer of Git LFS, not the file itself; run `git lfs install` and "
                            f"`git lfs pull` in its folder, or give the Hugging Face id")


def read_tensors(directory, prefix: str = "", dtype: torch.dtype | None = None):
    """Yields (name without prefix, tensor) for all tensors under prefix; floating ones become dtype if given.

    From model.safetensors or pytorch_model.bin, in one file or in shards with an index, or audiocraft's
    state_dict.bin. Nothing in the files is executed. Raises UserError naming the missing or damaged file.
    """
    for path in _weight_files(Path(directory)):
        for name, tensor in _tensors_of(path, prefix):
            if not isinstance(tensor, torch.Tensor):
                raise UserError(f"{path}: {name} is not a tensor")
            if name.startswith(prefix):
                cast = dtype is not None and tensor.is_floating_point()
                yield name[len(prefix):], tensor.to(dtype) if cast else tensor


def _weight_files(directory: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin", "state_dict.bin"):
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return [directory / name]
        if index.is_file():
            names = read_json(index).get("weight_map")
            valid = isinstance(names, dict) and all(Path(str(n)).name == n for n in names.values())
            if not valid or any(len(n) > 255 for n in names.values()):
                raise UserError(f"{index}: its weight_map must name files beside it")
            return [directory / n for n in sorted(set(names.values()))]
    raise UserError(f"{directory}: has no model.safetensors, pytorch_model.bin or state_dict.bin")


def version_of(directory) -> str:
    """Eight hexadecimal digits by which a version of a checkpoint's weights is known from any other.

    Of the last megabyte of a file: training changes every tensor, and archives end with checksums of all.
    """
    with open(_weight_files(Path(directory))[-1], "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2 ** 20))
        return hashlib.sha256(file.read()).hexdigest()[:8]


def weights_sha256(module) -> str:
    """The checksum of all tensors of a module on the CPU and of their names."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        checksum.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return checksum.hexdigest()


def _tensors_of(path, prefix: str):
    """Of a safetensors file only what is under prefix: a codec need not read the language model beside it.

    The file is opened anew for every few tensors: what has been read of an open one counts as memory taken.
    """
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        with as_user_error(f"{path}: damaged, or not a safetensors file"):
            refuse_pointer(path)
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]
            for i in range(0, len(names), 8):
                with safe_open(path, framework="pt") as file:
                    yield from ((name, file.get_tensor(name)) for name in names[i:i + 8])
    else:
        tensors = read_audiocraft(path)[0] if path.name == "state_dict.bin" else read_pickle(path)
        for name in list(tensors):      # each is free once it has been taken over
            yield name, tensors.pop(name)


def read_pickle(path) -> dict:
    """A .bin file of torch.save: tensors and plain values, no code is run. Raises UserError naming it."""
    with as_user_error(f"{path}: damaged, or more than plain tensors"):
        refuse_pointer(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
        for tensor in _tensors_in(value):  # strides of 0 make much of little, until something copies it
            stored = tensor.untyped_storage().nbytes()
            if tensor.nbytes > stored:
                raise ValueError("a tensor claims more numbers than it has")
        return value


def _tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    for inner in value.values() if isinstance(value, dict) else ():
        yield from _tensors_in(inner)


def read_audiocraft(path) -> tuple[dict, dict]:
    """(tensors by name, configuration) of audiocraft's state_dict.bin or compression_state_dict.bin."""
    value = read_pickle(path)
    if "pretrained" in value:
        return {}, {"pretrained": str(value["pretrained"])}
    with as_user_error(f"{path}: needs best_state and a YAML xp.cfg"):
        import yaml
        config, state = yaml.safe_load(value["xp.cfg"]), value["best_state"]
        state = state.get("model", state)
        if not (isinstance(config, dict) and all(isinstance(t, torch.Tensor) for t in state.values())):
            raise TypeError("not so")
        return state, config


def is_audiocraft(directory, name: str) -> bool:
    """Whether to read `name` of audiocraft's format: a clone from the hub holds transformers' format too."""
    return (directory / name).is_file() and not has_whole_weights(directory)


def has_whole_weights(directory: Path) -> bool:
    """Whether there are weights in transformers' format or ours."""
    return any([*directory.glob("model*.safetensors"), *directory.glob("pytorch_model*.bin")])


def look_up(tree: dict, path: str, where, *default, depth=0):
    """The value at "a.b.c" of audiocraft's configuration, where "${channels}" stands for that of channels."""
    value = tree
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value or depth > 9:
            if default and not depth:       # a reference must lead somewhere
                return default[0]
            raise UserError(f"{where}: its configuration lacks {path}")
        value = value[key]
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if reference:
        return look_up(tree, reference[1], where, *default, depth=depth + 1)
    return value


@torch.inference_mode(False)    # parameters made in it could not be trained afterwards
def load_strict(module: nn.Module, tensors: dict, where):
    """Makes the tensors the module's own, without a copy. Raises UserError listing all that does not fit."""
    own = module.state_dict()
    problems = {
        "missing": own.keys() - tensors.keys(), "unexpected": tensors.keys() - own.keys(),
        "wrong shape": [f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
                        for name in own.keys() & tensors.keys() if tensors[name].shape != own[name].shape],
        "wrong type": [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in
                       (torch.float32, torch.float16, torch.bfloat16, torch.float64)
                       and (name not in own or t.dtype != own[name].dtype)]}
    if any(problems.values()):
        raise UserError(f"{where}: the weights do not fit the configuration; " + "; ".join(
            f"{what}: {listed(sorted(names))}" for what, names in problems.items() if names))
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{where}: damaged, {bad[0]} has numbers that are not finite; fetch it again")
    module.load_state_dict(tensors, assign=True)


def listed(names) -> str:
    """Names for a message: the first twenty, and how many more."""
    return ", ".join(list(names)[:20]) + f" and {len(names) - 20:,} more" * (len(names) > 20)


def write_tensors(path, tensors: dict, metadata: dict | None = None):
    """Writes a safetensors file; the whole file or nothing."""
    from safetensors.torch import save_file
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with as_user_error(f"{path}: cannot be written"):  # a full disk is an error of safetensors' own
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata or {"format": "pt"}))


def int4_table() -> torch.Tensor:
    """(256, 16) int8: the weight that 4 bits stand for, by the scale of its group, as an unsigned byte."""
    scales = torch.arange(256, dtype=torch.uint8).view(torch.int8).clamp(min=-127)
    return (scales[:, None] * torch.tensor(INT4_LEVELS)).round_().to(torch.int8)


def quantize_groups(weight) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) -> int4 as (rows, columns * 17/32) bytes, and the scale (rows) that brings it back.

    columns: a multiple of 64. Weights are first brought to -127 ... 127, as in int8. Then each group of 32
    has a whole number as its scale, and a weight is 4 bits. A row of bytes is first pairs of weights, then
    the scales: of every 64 columns, byte i has the columns i, in its lower half, and 32 + i.
    """
    parts = [_quantize_groups(rows) for rows in weight.split(256)]    # as many as a cache holds
    packed, scales = zip(*parts)
    return torch.cat(packed), torch.cat(scales)


def _quantize_groups(weight):
    R, C = weight.shape
    scale = weight.abs().amax(-1).float().clamp(min=1e-12) / 127
    groups = (weight / scale[:, None]).view(R, C // GROUP, GROUP)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = torch.where(-least > most, -least, -most).round_()     # so that the extreme is the first level
    places = (groups / scales.where(scales != 0, 1)).add_(1).mul_(128).round_().clamp_(0, 256)
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(INT4_LEVELS)])
    nearest = torch.bucketize(torch.linspace(-1, 1, 257), middles).to(weight.device, torch.uint8)
    places.nan_to_num_()    # of a damaged file, which is told by its scale
    bits = nearest.index_select(0, places.flatten().int()).view(R, C // 64, 2, GROUP)
    pairs = bits[:, :, 0] | bits[:, :, 1] << 4
    return torch.cat([pairs.flatten(1), scales.flatten(1).to(torch.int8).view(torch.uint8)], dim=1), scale


def columns_of(weight) -> int:
    """How many columns a matrix has, which in int4 is not its last dimension."""
    return weight.shape[-1] * 32 // 17 if weight.dtype == INT4 else weight.shape[-1]


def quantize_rows(weight) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., rows, columns) -> int8 of the same shape, and the scale (..., rows) that brings it back."""
    scale = weight.abs().amax(-1).float().clamp(min=1e-12) / 127
    return (weight / scale[..., None]).round_().to(torch.int8), scale


QUANTIZERS = {torch.int8: quantize_rows, INT4: quantize_groups}
