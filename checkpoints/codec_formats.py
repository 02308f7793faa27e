"""The codec on disk: our format and transformers', read and written; audiocraft's, read.

    codec = load_codec(EncodecModel, "facebook/encodec_32khz")      # EncodecModel.from_pretrained does this

    ours             config.json, model.safetensors
    transformers     the same files with other names in them; also inside those of a MusicGen model
    audiocraft       compression_state_dict.bin: tensors (best_state) and a configuration in YAML (xp.cfg)

CODEC_NAMES and CODEC_FIELDS say what transformers and audiocraft call our tensors and settings; they are also
the best map from the names here to those in audiocraft's code. Every number of the architecture comes from
the checkpoint's own configuration.
"""
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import torch

from checkpoints.files import (
    is_audiocraft, load_strict, look_up, open_checkpoint, read_audiocraft, read_tensors, refuse_half,
    shapes_only, write_tensors)
from config import Config
from system.errors import UserError, as_user_error
from system.files import read_json, write_atomic

CODEC_NAMES = (
    # ours                     transformers             audiocraft
    (r"^(en|de)coder\.",       r"\1coder.layers.",      r"\1coder.model."),
    (r"\.conv\.",              ".conv.",                ".conv.conv."),
    (r"\.convtr\.",            ".conv.",                ".convtr.convtr."),
    (r"\.conv_norm\.",         ".norm.",                ".conv.norm."),
    (r"\.convtr_norm\.",       ".norm.",                ".convtr.norm."),
    (r"\.codebooks\.(\d+)\.",  r".layers.\1.codebook.", r".vq.layers.\1._codebook."),
)
COLUMNS = {"transformers": 1, "audiocraft": 2}  # of CODEC_NAMES
CODEC_FIELDS = {  # ours: transformers'; audiocraft has seanet.OURS but for sample_rate and card
    "sample_rate": "sampling_rate",
    "channels": "audio_channels",
    "n_filters": "num_filters",
    "ratios": "upsampling_ratios",
    "dimension": "hidden_size",
    "lstm": "num_lstm_layers",
    "n_residual_layers": "num_residual_layers",
    "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "dilation_base": "dilation_growth_rate",
    "compress": "compress",
    "causal": "use_causal_conv",
    "pad_mode": "pad_mode",
    "norm": "norm_type",
    "card": "codebook_size",
}
SUPPORTED = (  # transformers', audiocraft's, the one value that is supported, which is the default of both
    (None, "compression_model", "encodec"),
    ("normalize", "encodec.renormalize", False),
    ("chunk_length_s", None, None),
    ("trim_right_ratio", "seanet.decoder.trim_right_ratio", 1.0),
    (None, "seanet.activation", "ELU"),
    (None, "seanet.activation_params", {"alpha": 1.0}),
    (None, "seanet.norm_params", {}),
    (None, "seanet.disable_norm_outer_blocks", 0),
    (None, "seanet.decoder.final_activation", None),
    (None, "encodec.autoencoder", "seanet"),
    (None, "encodec.quantizer", "rvq"),
)
OF_48_KHZ = ("normalize", "chunk_length_s", "encodec.renormalize")


def codebook_bandwidth(config: Config) -> float:
    """kb/s of one codebook, as transformers and audiocraft count: at whole frames a second."""
    return math.log2(config.card) * math.ceil(config.frame_rate) / 1000


# --- reading ----------------------------------------------------------------------------------------------

@torch.inference_mode(False)    # a caller may be in it, and want to train what is loaded afterwards
def load_codec(model_class, name, bandwidth=None, n_q=None, dtype=torch.float32):
    """A codec of model_class (EncodecModel) in evaluation mode, from whatever `read_codec` reads.

    bandwidth (kb/s) or n_q: how many codebooks to use, the first ones (default: all). dtype None: the file's.
    Raises UserError, listing all tensors that are missing, unexpected or of a wrong shape.
    """
    config, tensors, origin = read_codec(name, dtype)
    K = config.n_q
    if bandwidth is not None:
        n_q = int(bandwidth / codebook_bandwidth(config) + 1e-6)
    if n_q is not None:
        if not 1 <= n_q <= K:
            raise UserError(f"{name}: {n_q} codebooks asked for (n_q or bandwidth), this codec has 1 to {K} "
                            f"codebooks of {codebook_bandwidth(config):g} kb/s")
        config = dataclasses.replace(config, n_q=n_q)
    with shapes_only():
        model = model_class(config)
    our_names = {foreign_name(ours, origin): ours for ours in model.state_dict()}
    unused = tuple(foreign_name(f"quantizer.codebooks.{k}.", origin) for k in range(config.n_q, K))
    tensors = {our_names.get(key, key): value for key, value in tensors.items() if not key.startswith(unused)}
    load_strict(model, tensors, name)
    return model.eval()


def foreign_name(name: str, origin: str) -> str:
    """Our name of a tensor -> its name in a file of origin "ours", "transformers" or "audiocraft"."""
    if origin in COLUMNS:
        for row in CODEC_NAMES:
            name = re.sub(row[0], row[COLUMNS[origin]], name)
    return name


def read_codec(name, dtype=None, named_by=None) -> tuple[Config, dict, str]:
    """Directory or hub id of a codec, or of a MusicGen model around it -> Config, {name: tensor}, origin.

    origin: "ours", "transformers" or "audiocraft", whose names the tensors have. dtype None: the file's.
    Raises UserError naming what is missing, damaged or not supported. named_by: who says `name`.
    """
    directory = open_checkpoint(name)
    if (directory / "codec" / "config.json").is_file():  # a language model of ours
        directory = directory / "codec"
    if is_audiocraft(directory, "compression_state_dict.bin"):
        tensors, tree = read_audiocraft(directory / "compression_state_dict.bin")
        if "pretrained" in tree:
            if named_by:  # or they might name each other for ever
                raise UserError(f"{named_by}: names the codec {name}, which only names another one")
            return read_codec(tree["pretrained"], dtype, named_by=name)
        tensors = {key: value.to(dtype or value.dtype) for key, value in tensors.items()}  # all are floating
        return config_of(values_from_audiocraft(tree, name), name), current_spelling(tensors), "audiocraft"
    refuse_half(directory, name)
    if not (directory / "config.json").is_file():
        raise UserError(f"{name}: has no config.json and no compression_state_dict.bin, so no codec we know")
    values = read_json(directory / "config.json")
    if "model_type" not in values:
        config = Config.from_json(directory / "config.json")
        return config, dict(read_tensors(directory, dtype=dtype)), "ours"
    prefix = ""
    if "audio_encoder" in values:
        values, prefix = values["audio_encoder"], "audio_encoder."
    tensors = dict(read_tensors(directory, prefix, dtype))
    K = len({key.split(".")[2] for key in tensors if key.startswith("quantizer.layers.")})
    values = values_from_transformers(values, K, name)
    return config_of(values, name), current_spelling(tensors), "transformers"


def config_of(values: dict, where) -> Config:
    try:
        return Config(task="codec", **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def current_spelling(tensors: dict) -> dict:
    """Names of weight norm's tensors as torch has them today; once they were weight_g and weight_v."""
    parts = {"g": "parametrizations.weight.original0", "v": "parametrizations.weight.original1"}
    return {re.sub(r"weight_([gv])$", lambda m: parts[m[1]], key): value for key, value in tensors.items()}


def values_from_transformers(values: dict, K: int, where) -> dict:
    """Our settings from transformers' EncodecConfig, whose file holds K codebooks."""
    from transformers import EncodecConfig  # for the defaults that a file may leave out; imports for seconds
    with as_user_error(f"{where}: not a configuration of EnCodec"):
        if values["model_type"] != "encodec":
            raise ValueError(f"model_type is {values['model_type']!r:.40}")
        foreign = EncodecConfig(**values)
        bits = 1000 * foreign.target_bandwidths[-1] / math.ceil(foreign.sampling_rate / foreign.hop_length)
        # Older versions count 10 bits a codebook whatever its size: the file is believed if it agrees.
        n_q = K if K == int(bits // 10) else int(bits // math.ceil(math.log2(foreign.codebook_size)))
    for key, _, value in SUPPORTED + (("codebook_dim", None, foreign.hidden_size),):
        if key and getattr(foreign, key) != value:
            raise UserError(f"{where}: {not_supported(key, getattr(foreign, key), value)}")
    ours = {key: getattr(foreign, foreign_key) for key, foreign_key in CODEC_FIELDS.items()}
    return ours | {"n_q": n_q, "true_skip": not foreign.use_conv_shortcut}


def values_from_audiocraft(tree: dict, where) -> dict:
    """Our settings from audiocraft's configuration.

    That of June 2023 has no encodec.renormalize, but a section encodec.renorm, which audiocraft ignores.
    """
    for _, path, value in SUPPORTED:
        found = look_up(tree, path, where, value) if path else value
        if found != value:
            raise UserError(f"{where}: {not_supported(path, found, value)}")
    paths = {key: f"seanet.{key}" for key in (*CODEC_FIELDS, "true_skip")}
    paths |= {"sample_rate": "sample_rate", "card": "rvq.bins", "n_q": "rvq.n_q"}
    values = {key: look_up(tree, path, where) for key, path in paths.items()}
    for part, key in itertools.product(("encoder", "decoder"), values):     # each may have its own value
        found = look_up(tree, f"seanet.{part}.{key}", where, values[key])
        if found != values[key]:
            raise UserError(f"{where}: {not_supported(f'seanet.{part}.{key}', found, values[key])}")
    return values


def not_supported(key: str, found, value) -> str:
    """What is wrong with a codec that has another value than the supported one, and the way out."""
    example = " (as in facebook/encodec_48khz)" if key in OF_48_KHZ else ""
    return (f"{key} = {found!r:.80}{example} is not supported, only {value!r}; take a codec such as "
            f"facebook/encodec_32khz or facebook/encodec_24khz")


# --- writing ----------------------------------------------------------------------------------------------

def save_codec(codec, directory, compact: bool = False):
    """Writes config.json and model.safetensors, which `load_codec` reads. compact: in float16."""
    tensors = {name: tensor.half() if compact else tensor for name, tensor in codec.state_dict().items()}
    write_tensors(Path(directory) / "model.safetensors", tensors)
    codec.config.save(Path(directory) / "config.json")


def export_codec(codec, directory):
    """Writes config.json and model.safetensors that transformers' EncodecModel.from_pretrained loads.

    Raises UserError for a codec that transformers has no settings for.
    """
    c = codec.config
    if c.norm == "none" or not c.lstm or c.card & (c.card - 1):
        raise UserError("transformers has only codecs with weight or group norm (not folded), an LSTM, and a "
                        "power of two of entries")
    values = {foreign_key: getattr(c, key) for key, foreign_key in CODEC_FIELDS.items()}
    # nextafter: transformers counts the codebooks back from it, rounding down
    values |= dict(model_type="encodec", architectures=["EncodecModel"], use_conv_shortcut=not c.true_skip,
                   target_bandwidths=[math.nextafter(c.n_q * codebook_bandwidth(c), math.inf)])
    tensors = {foreign_name(name, "transformers"): tensor for name, tensor in codec.state_dict().items()}
    write_tensors(Path(directory) / "model.safetensors", tensors)
    write_atomic(Path(directory) / "config.json", json.dumps(values, indent=1).encode())
