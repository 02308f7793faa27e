"""Checkpoints of others: the released weights in transformers' format and in the original's, read and written.

    ours    <- names and numbers ->    transformers    |    the original (audiocraft: best_state and xp.cfg)

Two tables say which of our tensors is which of theirs, CODEC_NAMES and LM_NAMES: they are also the best map from the
names here to those in the original's code. Every number of the architecture comes from the checkpoint's own
configuration. `EncodecModel.from_pretrained` and `LMModel.from_pretrained` come here.
"""
import itertools
import json
import math
import re
import tempfile
from pathlib import Path

import torch

from checkpoints.files import (listed, load_strict, open_checkpoint, read_original, read_tensors, write_tensors)
from checkpoints.precision import quantize_rows, quicken
from config import Config, UserError, blaming, read_json, write_atomic
from encodec import EncodecModel
from lm import SCALE, TIED, LMModel, Projection

# --- the codec ---------------------------------------------------------------------------------------------------

CODEC_NAMES = (
    # ours                                transformers                      the original
    (r"^(en|de)coder\.",                  r"\1coder.layers.",               r"\1coder.model."),
    (r"\.conv\.",                         ".conv.",                         ".conv.conv."),
    (r"\.convtr\.",                       ".conv.",                         ".convtr.convtr."),
    (r"\.conv_norm\.",                    ".norm.",                         ".conv.norm."),
    (r"\.convtr_norm\.",                  ".norm.",                         ".convtr.norm."),
    (r"^quantizer\.codebooks\.(\d+)\.",   r"quantizer.layers.\1.codebook.", r"quantizer.vq.layers.\1._codebook."),
)
CODEC_FIELDS = {  # ours -> transformers'; the original's is seanet.OURS, but for two
    "sample_rate": "sampling_rate", "channels": "audio_channels", "n_filters": "num_filters", "norm": "norm_type",
    "ratios": "upsampling_ratios", "dimension": "hidden_size", "lstm": "num_lstm_layers", "card": "codebook_size",
    "n_residual_layers": "num_residual_layers", "dilation_base": "dilation_growth_rate", "compress": "compress",
    "kernel_size": "kernel_size", "last_kernel_size": "last_kernel_size", "causal": "use_causal_conv",
    "residual_kernel_size": "residual_kernel_size", "pad_mode": "pad_mode",
}
ONLY = (  # (transformers, the original, the one value that is supported)
    ("normalize", "encodec.renormalize", False), ("chunk_length_s", None, None),
    ("trim_right_ratio", "seanet.decoder.trim_right_ratio", 1.0), (None, "seanet.activation", "ELU"),
    (None, "seanet.disable_norm_outer_blocks", 0), (None, "seanet.decoder.final_activation", None),
    (None, "encodec.autoencoder", "seanet"), (None, "encodec.quantizer", "rvq"))


def their_name(name: str, column: int) -> str:
    """Our name of a tensor as transformers (column 1) or the original (column 2) has it."""
    for row in CODEC_NAMES:
        name = re.sub(row[0], row[column], name)
    return name


def read_codec(name, dtype, named_by=None):
    """(Config, tensors under our names) of a codec in any of the formats that from_pretrained takes."""
    directory = open_checkpoint(name)
    if (directory / "codec" / "config.json").is_file():  # a language model of ours, with its codec inside
        directory = directory / "codec"
    if is_original(directory, "compression_state_dict.bin"):
        tensors, values = read_original(directory / "compression_state_dict.bin")
        if "pretrained" in values:
            if named_by:  # or they might name each other for ever
                raise UserError(f"{named_by}: names the codec {name}, which only names another one")
            return read_codec(values["pretrained"], dtype, named_by=name)
        tensors = {n: t.to(dtype or t.dtype) for n, t in tensors.items()}  # codecs have only floating ones
        values, column = codec_config_from_original(values, name), 2
    elif (directory / "config.json").is_file():
        values = read_json(directory / "config.json")
        if "model_type" not in values:
            return Config.from_json(directory / "config.json"), dict(read_tensors(directory, dtype=dtype))
        inside = "audio_encoder" in values
        tensors = dict(read_tensors(directory, "audio_encoder." if inside else "", dtype))
        books = len({n.split(".")[2] for n in tensors if n.startswith("quantizer.layers.")})
        values, column = codec_config_from_transformers(values["audio_encoder"] if inside else values, books, name), 1
    else:
        raise UserError(f"{name}: has neither config.json nor compression_state_dict.bin, so not a codec we know")
    tensors = {re.sub(r"weight_([gv])$", lambda m: f"parametrizations.weight.original{'gv'.index(m[1])}", n): t
               for n, t in tensors.items()}  # weight norm is spelt in an old and a new way
    try:
        config = Config(task="codec", **values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    with torch.device("meta"):
        ours = {their_name(n, column): n for n in EncodecModel(config).state_dict()}
    return config, {ours.get(n, n): t for n, t in tensors.items()}


def codec_config_from_transformers(values: dict, books: int, where) -> dict:
    from transformers import EncodecConfig  # for the defaults that a file may leave out
    with blaming(f"{where}: not a configuration of EnCodec"):
        assert values["model_type"] == "encodec", f"model_type is {values['model_type']!r:.40}"
        theirs = EncodecConfig(**values)
        bits = 1000 * theirs.target_bandwidths[-1] / math.ceil(theirs.sampling_rate / theirs.hop_length)
        # Older versions of transformers count 10 bits a codebook whatever its size: believe the file if it agrees.
        n_q = books if books == int(bits // 10) else int(bits // math.ceil(math.log2(theirs.codebook_size)))
    for key, _, value in ONLY + (("codebook_dim", None, theirs.hidden_size),):
        if key and getattr(theirs, key) != value:
            raise UserError(f"{where}: {key} = {getattr(theirs, key)!r} is not supported, only {value!r}")
    return dict(n_q=n_q, true_skip=not theirs.use_conv_shortcut,
                **{ours: getattr(theirs, key) for ours, key in CODEC_FIELDS.items()})


def codec_config_from_original(tree: dict, where) -> dict:
    for _, key, value in ONLY:
        if key and look(tree, key, where) != value:
            raise UserError(f"{where}: {key} = {look(tree, key, where)!r} is not supported, only {value!r}")
    paths = {ours: f"seanet.{ours}" for ours in (*CODEC_FIELDS, "true_skip")}
    paths |= {"sample_rate": "sample_rate", "card": "rvq.bins", "n_q": "rvq.n_q"}
    return {ours: look(tree, path, where) for ours, path in paths.items()}


def look(tree: dict, path: str, where, *default, depth=0):
    """The value at "a.b.c" of the original's configuration, where "${channels}" stands for that of channels."""
    value = tree
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value or depth > 9:
            if default:
                return default[0]
            raise UserError(f"{where}: its configuration lacks {path}")
        value = value[key]
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return look(tree, reference[1], where, *default, depth=depth + 1) if reference else value


def is_original(directory, name: str) -> bool:
    """Whether `name` of the original's format is what to read; a clone from the hub holds transformers' format too."""
    return (directory / name).is_file() and not any(directory.glob("model*.safetensors")) and not any(
        directory.glob("pytorch_model*.bin"))


def export_codec(codec: EncodecModel, directory):
    """Writes config.json and model.safetensors of a codec that transformers' EncodecModel.from_pretrained loads."""
    c = codec.config
    if c.norm == "none" or not c.lstm or c.card & (c.card - 1):
        raise UserError("transformers has only codecs with weight or group norm (not folded), an LSTM, and a "
                        "power of two of entries")
    values = {theirs: getattr(c, ours) for ours, theirs in CODEC_FIELDS.items()}
    # nextafter: theirs counts the codebooks back from it, rounding down
    values |= dict(model_type="encodec", architectures=["EncodecModel"], use_conv_shortcut=not c.true_skip,
                   target_bandwidths=[math.nextafter(c.n_q * codec.bandwidth, math.inf)])
    write_tensors(Path(directory) / "model.safetensors",
                  {their_name(name, 1): tensor for name, tensor in codec.state_dict().items()})
    write_atomic(Path(directory) / "config.json", json.dumps(values, indent=1).encode())


# --- the language model ------------------------------------------------------------------------------------------

# Where we pack tensors that others keep apart, theirs are one for each codebook {k}, or q, k and v, in packed order.
LM_NAMES = [  # * stands for a layer: layers.{n}., decoder.model.decoder.layers.{n}., transformer.layers.{n}.
    # ours                          transformers                                    the original
    ("emb.weight",                  "decoder.model.decoder.embed_tokens.{k}.weight", "emb.{k}.weight"),
    ("*norm1.{p}",                  "*self_attn_layer_norm.{p}",                    "*norm1.{p}"),
    ("*attn.qkv.weight",            "*self_attn.{qkv}_proj.weight",                 "*self_attn.in_proj_weight"),
    ("*attn.out.weight",            "*self_attn.out_proj.weight",                   "*self_attn.out_proj.weight"),
    ("*norm_cross.{p}",             "*encoder_attn_layer_norm.{p}",                 "*norm_cross.{p}"),
    ("*cross.qkv.weight",           "*encoder_attn.{qkv}_proj.weight",              "*cross_attention.in_proj_weight"),
    ("*cross.out.weight",           "*encoder_attn.out_proj.weight",                "*cross_attention.out_proj.weight"),
    ("*norm2.{p}",                  "*final_layer_norm.{p}",                        "*norm2.{p}"),
    ("*ff1.weight",                 "*fc1.weight",                                  "*linear1.weight"),
    ("*ff2.weight",                 "*fc2.weight",                                  "*linear2.weight"),
    ("out_norm.{p}",                "decoder.model.decoder.layer_norm.{p}",         "out_norm.{p}"),
    ("heads.weight",                "decoder.lm_heads.{k}.weight",                  "linears.{k}.weight"),
    ("conditioner.text.proj.{p}",   "enc_to_dec_proj.{p}",
     "condition_provider.conditioners.description.output_proj.{p}"),
    ("conditioner.melody.proj.{p}", "audio_enc_to_dec_proj.{p}",
     "condition_provider.conditioners.self_wav.output_proj.{p}"),
]


def name_table(lm: LMModel, original: bool) -> dict[str, list[str]]:
    """Our tensor names -> the foreign names of the tensors packed in each, in packed order, for this model."""
    table, own = {}, lm.state_dict()
    for row in LM_NAMES:
        ours, transformers, the_original = (name.replace("*", layer) for name, layer in zip(row, (
            "layers.{n}.", "decoder.model.decoder.layers.{n}.", "transformer.layers.{n}.")))
        theirs = the_original if original else transformers
        for n in range(lm.config.num_layers) if "{n}" in ours else [0]:
            for p in ("weight", "bias"):
                parts = [theirs.format(n=n, p=p, k=k, qkv=qkv)
                         for k in range(lm.config.n_q) for qkv in "qkv"]
                table[ours.format(n=n, p=p)] = list(dict.fromkeys(parts))
    return {ours: parts for ours, parts in table.items() if ours in own}


def pack(tensors, table: dict[str, list[str]], shapes: dict, dtype, where, int8=()) -> dict[str, torch.Tensor]:
    """An iterable of (foreign name, tensor) -> our tensors, copied into place one by one as they are read.

    int8: names of ours that are quantised on the way, with their scales beside them."""
    place = {name: (ours, i) for ours, parts in table.items() for i, name in enumerate(parts)}
    packed, missing, surplus, wrong = {}, dict(place), [], []
    for name, tensor in tensors:
        if name not in place:
            surplus.append(name)
            continue
        ours, i = place[name]
        missing.pop(name, None)
        rows = shapes[ours][0] // len(table[ours])
        if tensor.shape != (rows, *shapes[ours][1:]) or not tensor.is_floating_point():
            wrong.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {(rows, *shapes[ours][1:])}")
            continue
        parts = {ours: tensor.to(dtype or tensor.dtype)}
        if ours in int8:
            parts = dict(zip((ours, ours + SCALE), quantize_rows(tensor)))
        for name, part in parts.items():
            packed.setdefault(name, torch.empty(shapes[ours][:part.dim()], dtype=part.dtype))
            packed[name][i * rows:(i + 1) * rows] = part
    if missing or surplus or wrong:
        raise UserError(f"{where}: does not fit its configuration; missing: {listed(missing) or 'none'}; "
                        f"not known: {listed(surplus) or 'none'}; of wrong shape or type: {listed(wrong) or 'none'}")
    return packed


def left_out(lm: LMModel) -> dict[str, torch.Tensor]:
    """Projections that transformers does without, as they would not change the width: identities."""
    tensors = {}
    for name, part in (("enc_to_dec_proj", lm.conditioner.text), ("audio_enc_to_dec_proj", lm.conditioner.melody)):
        if part is not None and part.proj.in_features == lm.config.dim:
            tensors |= {f"{name}.weight": torch.eye(lm.config.dim), f"{name}.bias": torch.zeros(lm.config.dim)}
    return tensors


def load_lm(name_or_dir, dtype=None) -> LMModel:
    """LMModel from our directory, transformers' directory or hub id, or the original's format.

    The model is made on the meta device and tensors are assigned as they are read, so that loading needs little
    more memory than the weights. dtype: of the weights; None keeps the file's; torch.int8: see `quicken`. Raises
    UserError, listing them, for missing, surplus and misshapen tensors.
    """
    directory = open_checkpoint(name_or_dir)
    config, origin = read_config(directory)
    with torch.device("meta"):
        lm = LMModel(config)
    shapes = {name: value.shape for name, value in lm.state_dict().items()}
    int8 = set()
    if dtype == torch.int8:     # is for the projections alone
        int8 = {f"{name}.weight" for name, module in lm.named_modules() if isinstance(module, Projection)}
        dtype = torch.float32
    if origin == "ours":
        tensors = {}
        for name, tensor in read_tensors(directory):
            if name in int8 and tensor.is_floating_point() and tensor.dim() == 2:
                tensor, tensors[name + SCALE] = quantize_rows(tensor)
            cast = dtype is not None and tensor.is_floating_point() and not name.endswith(SCALE)
            # int8: nothing may hold on to the file, whose pages count as memory
            tensors[name] = tensor.to(dtype, copy=bool(int8)) if cast else tensor
        for name in [name for name in tensors if name + SCALE in tensors]:
            scale = tensors[name + SCALE]
            if scale.shape != tensors[name].shape[:1] or not scale.is_floating_point():
                raise UserError(f"{directory}: {name} is {tuple(tensors[name].shape)}, its scale {tuple(scale.shape)}; "
                                f"damaged")
            if name not in int8:
                tensors[name] = (tensors[name] * tensors.pop(name + SCALE)[:, None]).to(dtype or torch.float32)
        if TIED[0] in tensors:
            tensors.setdefault(TIED[1], tensors[TIED[0]])
    else:
        skip = ("text_encoder.", "audio_encoder.", "decoder.model.decoder.embed_positions.",
                "condition_provider.conditioners.self_wav.chroma.")     # a window of the STFT
        found = ((name, t) for name, t in read_tensors(directory) if not name.startswith(skip))
        if origin == "transformers":
            found = itertools.chain(found, left_out(lm).items())
        tensors = pack(found, name_table(lm, origin == "original"), shapes, dtype, directory, int8)
    if int8:
        quicken(lm, torch.int8)
        tensors = {name.replace(".weight" + SCALE, ".scale"): tensor for name, tensor in tensors.items()}
    load_strict(lm, tensors, directory)
    return lm.eval()


def read_config(directory) -> tuple[Config, str]:
    """Configuration and origin ("ours", "transformers", "original") of a model directory."""
    original, ours = is_original(directory, "state_dict.bin"), directory / "config.json"
    if not original and not ours.is_file():
        raise UserError(f"{directory}: no config.json and no state_dict.bin, so not a model of a known format")
    try:
        if original:
            return lm_config_from_original(read_original(directory / "state_dict.bin")[1], directory), "original"
        if "model_type" in read_json(ours):
            return lm_config_from_transformers(directory), "transformers"
        return Config.from_json(ours), "ours"
    except Exception as error:  # transformers and YAML have errors of all kinds
        said = " ".join(str(error).split())
        where = "" if str(directory) in said else f"{directory}: its configuration is none of MusicGen's: "
        raise UserError(f"{where}{said if isinstance(error, UserError) else said[:150]}") from None


def lm_config_from_transformers(directory) -> Config:
    """Config of a directory that holds transformers' musicgen or musicgen_melody."""
    from transformers import AutoConfig
    theirs = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if theirs.model_type not in ("musicgen", "musicgen_melody"):
        raise UserError(f"{directory}: holds a {theirs.model_type}, not a musicgen or musicgen_melody")
    decoder, codec = theirs.decoder, theirs.audio_encoder
    if decoder.activation_function != "gelu" or decoder.scale_embedding:
        raise UserError(f"{directory}: a decoder with activation {decoder.activation_function}, scale_embedding "
                        f"{decoder.scale_embedding} is none of MusicGen's (gelu, False)")
    melody = theirs.model_type == "musicgen_melody"
    K, channels = decoder.num_codebooks, decoder.audio_channels
    values = dict(
        channels=channels, sample_rate=codec.sampling_rate, ratios=tuple(codec.upsampling_ratios), codec=str(directory),
        text="prepend" if melody else "cross", t5=str(directory), null_melody="c", melody="none",
        segment_duration=getattr(theirs, "segment_duration", 30.0),
        extend_stride=getattr(theirs, "extend_stride", 18.0),
        dim=decoder.hidden_size, num_heads=decoder.num_attention_heads, num_layers=decoder.num_hidden_layers,
        hidden_scale=decoder.ffn_dim // decoder.hidden_size, n_q=K, card=decoder.vocab_size,
        delays=tuple(k // channels for k in range(min(K, 65))))
    if melody:
        values |= dict(melody="prepend", n_chroma=theirs.num_chroma, chroma_length=theirs.chroma_length)
        features = directory / "preprocessor_config.json"
        if features.is_file():
            values |= dict(radix2_exp=int(read_json(features).get("n_fft", 16384)).bit_length() - 1)
    return Config(**values)


LM_ONLY = {  # where the original's configuration has one of these, it must have this value
    **{f"transformer_lm.{key}": value for key, value in dict(
        activation="gelu", norm_first=True, norm="layer_norm", bias_ff=False, bias_attn=False, bias_proj=False,
        causal=True, past_context=None, layer_scale=None, xpos=False, qk_layer_norm=False, qk_layer_norm_cross=False,
        kv_repeat=1).items()},
    "codebooks_pattern.delay.flatten_first": 0, "codebooks_pattern.delay.empty_initial": 0,
    "fuser.cross_attention_pos_emb": False, "interleave_stereo_codebooks.per_timestep": False}


def lm_config_from_original(theirs: dict, directory) -> Config:
    """Config from the YAML configuration in the original's state_dict.bin."""
    def get(path, *default):
        return look(theirs, path, directory, *default)
    for path, value in LM_ONLY.items():
        if get(path, value) != value:
            raise UserError(f"{directory}: {path} = {get(path)!r} is not supported, only {value!r}")

    def fusion(name):
        ways = {"prepend": "prepend", "cross": "cross", "sum": "sum", "interpolate": "input_interpolate"}
        return next((way for way, key in ways.items() if name in (get(f"fuser.{key}", None) or [])), "none")
    text, melody = (get(f"conditioners.{name}.model", None) for name in ("description", "self_wav"))
    values = dict(
        channels=get("channels", 1), sample_rate=get("sample_rate"), codec=str(directory),
        segment_duration=float(get("dataset.segment_duration")), null_melody="c",
        text=fusion("description") if text == "t5" else "none",
        melody=fusion("self_wav") if melody == "chroma_stem" else "none",
        positional_embedding=get("transformer_lm.positional_embedding", "sin"),
        positional_scale=float(get("transformer_lm.positional_scale", 1.0)),
        max_period=float(get("transformer_lm.max_period", 10000)),
        cfg_coef=float(get("classifier_free_guidance.inference_coef", 3.0)),
        pattern=get("codebooks_pattern.modeling"), delays=tuple(get("codebooks_pattern.delay.delays", (0, 1, 2, 3))))
    for key in ("dim", "num_heads", "num_layers", "hidden_scale", "n_q", "card"):
        values[key] = get(f"transformer_lm.{key}")
    if values["pattern"] not in ("delay", "parallel"):
        raise UserError(f"{directory}: codebooks_pattern.modeling = {values['pattern']!r} is not supported, only delay "
                        f"or parallel")
    if text == "t5":
        values["t5"] = get("conditioners.description.t5.name")
    if melody == "chroma_stem":
        values |= {key: get(f"conditioners.self_wav.chroma_stem.{key}") for key in ("n_chroma", "radix2_exp", "argmax")}
    return Config(**values)


def export_transformers(lm: LMModel, codec, directory):
    """Writes a directory that transformers' Musicgen(Melody)ForConditionalGeneration and processor load.

    lm with its T5, and its codec (not folded) as one. Raises UserError for what transformers has no word for.
    Note that transformers feeds one-hot C where there is no melody: see `conditioners.null_melody`.
    """
    c, directory = lm.config, Path(directory)
    melody = c.melody == "prepend"
    checks = [("text", c.text, "prepend" if melody else "cross"), ("melody", c.melody, "prepend" if melody else "none"),
              ("positional_embedding", c.positional_embedding, "sin"), ("qk_layer_norm", c.qk_layer_norm, False),
              ("positional_scale", c.positional_scale, 1.0), ("max_period", c.max_period, 10000.0),
              ("pattern", c.pattern, "delay"), ("delays", c.delays, tuple(k // c.channels for k in range(c.n_q)))]
    for name, value, needed in checks:
        if value != needed:
            raise UserError(f"transformers has no {name} = {value!r} (only {needed!r}), so this model cannot be "
                            f"exported")

    tensors = {}
    ours = lm.state_dict()
    for name, parts in name_table(lm, original=False).items():
        tensors |= zip(parts, ours[name].chunk(len(parts)))
    for name, identity in left_out(lm).items():
        if not torch.equal(tensors.pop(name).float().cpu(), identity):
            raise UserError(f"transformers has no {name.partition('.')[0]} from width {c.dim} to {c.dim}, so this "
                            f"model cannot be exported")
    t5 = lm.conditioner.text.encoder()
    tensors |= {f"text_encoder.{name}": tensor for name, tensor in t5.state_dict().items()
                if name != "encoder.embed_tokens.weight"}
    with tempfile.TemporaryDirectory() as temporary:
        export_codec(codec, temporary)
        audio_encoder = read_json(Path(temporary) / "config.json")
        tensors |= {f"audio_encoder.{name}": t for name, t in read_tensors(temporary)}
    write_tensors(directory / "model.safetensors", tensors)

    decoder = dict(
        model_type="musicgen_melody_decoder" if melody else "musicgen_decoder", vocab_size=c.card, hidden_size=c.dim,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, ffn_dim=c.hidden_scale * c.dim,
        num_codebooks=c.n_q, audio_channels=c.channels, activation_function="gelu", scale_embedding=False, dropout=0.0,
        max_position_embeddings=2048, pad_token_id=c.card, bos_token_id=c.card, tie_word_embeddings=False)
    kind = "MusicgenMelody" if melody else "Musicgen"
    config = dict(
        model_type="musicgen_melody" if melody else "musicgen", architectures=[f"{kind}ForConditionalGeneration"],
        text_encoder=t5.config.to_dict(), audio_encoder=audio_encoder, decoder=decoder,
        segment_duration=c.segment_duration, extend_stride=c.extend_stride)     # theirs has none: for our own reader
    special = dict(pad_token_id=c.card, bos_token_id=c.card, decoder_start_token_id=c.card)
    generation = dict(do_sample=True, guidance_scale=c.cfg_coef, top_k=c.top_k, temperature=c.temperature,
                      max_length=round(c.segment_duration * c.sample_rate / c.stride), **special)
    features = dict(
        feature_extractor_type="EncodecFeatureExtractor", sampling_rate=c.sample_rate, feature_size=c.channels)
    if melody:
        config |= dict(num_chroma=c.n_chroma, chroma_length=c.chroma_frames)
        features = dict(
            feature_extractor_type="MusicgenMelodyFeatureExtractor", sampling_rate=c.sample_rate, num_chroma=c.n_chroma,
            feature_size=c.n_chroma, n_fft=2 ** c.radix2_exp, hop_length=c.hop,
            chunk_length=round(c.segment_duration))
    features["processor_class"] = f"{kind}Processor"
    with tempfile.TemporaryDirectory() as temporary:
        lm.conditioner.text.tokenizer().save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            write_atomic(directory / path.name, path.read_bytes())
    for name, values in (("config", config), ("generation_config", generation), ("preprocessor_config", features)):
        write_atomic(directory / f"{name}.json", json.dumps(values, indent=1).encode())
