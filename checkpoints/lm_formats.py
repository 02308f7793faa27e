"""Language models in other formats: the released weights as transformers and as audiocraft store them.

    ours    <- names and numbers ->    transformers    |    audiocraft (best_state and xp.cfg)

The table LM_NAMES says which of our tensors is which of theirs. It is also the best map from the names here
to those in audiocraft's code. Every number of the architecture comes from the checkpoint's own configuration.
`LMModel.from_pretrained` and `LMModel.save` come here.
"""
import itertools
import json
import tempfile
from pathlib import Path

import torch

from checkpoints.codec_formats import export_codec
from checkpoints.files import (INT4, QUANTIZERS, SCALE, columns_of, current_name, is_audiocraft, listed,
                               look_up, quantize_rows, read_audiocraft, read_tensors, write_tensors)
from config import Config, known
from system.errors import UserError
from system.files import read_json, write_atomic

# Two names of one table of T5.
TIED = ("conditioner.text.t5.shared.weight", "conditioner.text.t5.encoder.embed_tokens.weight")

# Where we pack tensors that others keep apart, theirs are one for each codebook {k}, or q, k and v, in packed
# order. * stands for a layer: see LAYER_NAMES.
LM_NAMES = [
    # ours                        transformers                              audiocraft
    ("emb.weight",                "decoder.model.decoder.embed_tokens.{k}.weight", "emb.{k}.weight"),
    ("*norm1.{p}",                "*self_attn_layer_norm.{p}",              "*norm1.{p}"),
    ("*attn.qkv.weight",          "*self_attn.{qkv}_proj.weight",           "*self_attn.in_proj_weight"),
    ("*attn.out.weight",          "*self_attn.out_proj.weight",             "*self_attn.out_proj.weight"),
    ("*norm_cross.{p}",           "*encoder_attn_layer_norm.{p}",           "*norm_cross.{p}"),
    ("*cross_attn.qkv.weight",    "*encoder_attn.{qkv}_proj.weight",      "*cross_attention.in_proj_weight"),
    ("*cross_attn.out.weight",    "*encoder_attn.out_proj.weight",        "*cross_attention.out_proj.weight"),
    ("*norm2.{p}",                "*final_layer_norm.{p}",                  "*norm2.{p}"),
    ("*ff1.weight",               "*fc1.weight",                            "*linear1.weight"),
    ("*ff2.weight",               "*fc2.weight",                            "*linear2.weight"),
    ("out_norm.{p}",              "decoder.model.decoder.layer_norm.{p}",   "out_norm.{p}"),
    ("lm_heads.weight",           "decoder.lm_heads.{k}.weight",            "linears.{k}.weight"),
    ("conditioner.text.proj.{p}", "enc_to_dec_proj.{p}",
     "condition_provider.conditioners.description.output_proj.{p}"),
    ("conditioner.melody.proj.{p}", "audio_enc_to_dec_proj.{p}",
     "condition_provider.conditioners.self_wav.output_proj.{p}"),
]
LAYER_NAMES = ("layers.{n}.", "decoder.model.decoder.layers.{n}.", "transformer.layers.{n}.")
# What a checkpoint holds beside the language model; the last is a window of the STFT.
NOT_THE_LM = ("text_encoder.", "audio_encoder.", "decoder.model.decoder.embed_positions.",
              "condition_provider.conditioners.self_wav.chroma.")


# --- tensors ----------------------------------------------------------------------------------------------

@torch.inference_mode(False)    # a caller may be in it, and want to train what is loaded afterwards
def read_tensors_for(lm, directory, origin: str, dtype) -> dict:
    """Our names -> tensors of a model directory, for the LMModel `lm` on the meta device.

    origin: as `read_config` says. dtype: None keeps that of the file; with one of QUANTIZERS, matrices that
    are quantized in `lm` become so as they are read: little more memory is taken than they need. Raises
    UserError.
    """
    own = lm.state_dict()
    rest = torch.float32 if dtype in QUANTIZERS else dtype
    kinds = {name: tensor.dtype for name, tensor in own.items() if tensor.dtype in QUANTIZERS}
    if origin == "ours":
        tensors = read_ours(directory, rest, kinds)
    else:
        found = ((n, t) for n, t in read_tensors(directory) if not n.startswith(NOT_THE_LM))
        if origin == "transformers":
            found = itertools.chain(found, identity_projections(lm).items())
        shapes = {name: (*tensor.shape[:-1], columns_of(tensor)) for name, tensor in own.items()}
        tensors = pack(found, name_table(lm, origin == "audiocraft"), shapes, rest, directory, kinds)
    for name in kinds:
        scale = scale_in_model(name)
        if scale in tensors:
            raise UserError(f"{directory}: has a parameter {scale}, which in int8 and int4 is the name of "
                            f"the scale of {name}; rename it, or load the model in another dtype")
        if name + SCALE in tensors:
            tensors[scale] = tensors.pop(name + SCALE)
    if rest is not None:        # norms and embeddings of a model that computes in float32
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and name in own:
                tensors[name] = tensor.to(own[name].dtype)
    return tensors


def scale_in_model(name: str) -> str:
    """Where a quantized layer has the scale of its weight `name`. In files it is name + SCALE."""
    return name.removesuffix(".weight") + SCALE


def read_ours(directory, dtype, kinds: dict) -> dict:
    """Tensors of a directory of ours, whose matrices may be stored as int8 with a scale for each row.

    kinds: names -> dtypes of those that are to be quantized.
    """
    tensors = {}
    for name, tensor in read_tensors(directory):
        name = current_name(name)
        if name in kinds and tensor.is_floating_point() and tensor.dim() == 2:
            tensor, tensors[name + SCALE] = QUANTIZERS[kinds[name]](tensor)
        if dtype is not None and tensor.is_floating_point() and not name.endswith(SCALE):
            # beside quantized ones a copy: nothing may hold on to the file, whose pages count as memory
            tensor = tensor.to(dtype, copy=bool(kinds))
        tensors[name] = tensor
    for name in [name for name in tensors if name + SCALE in tensors]:
        weight, scale = tensors[name], tensors[name + SCALE]
        if scale.shape != weight.shape[:1] or not scale.is_floating_point():
            raise UserError(f"{directory}: {name} is {tuple(weight.shape)}, its scale {tuple(scale.shape)}; "
                            f"damaged")
        if weight.dtype == kinds.get(name):
            continue
        weight = (weight * scale[:, None]).to(dtype or torch.float32)
        if name in kinds:
            weight, tensors[name + SCALE] = QUANTIZERS[kinds[name]](weight)
        else:
            del tensors[name + SCALE]
        tensors[name] = weight
    for name, other in (TIED, TIED[::-1]):
        if name in tensors:
            tensors.setdefault(other, tensors[name])
    return tensors


def write_lm(lm, directory, compact: bool):
    """Writes config.json and model.safetensors of an LMModel, without a frozen T5, which config.json names.

    compact: matrices as int8 with a scale for each row, the rest as float16; a quarter of the size. Raises
    UserError for matrices in int4: they are made of a file, which is still there.
    """
    own = lm.state_dict()
    if any(tensor.dtype == INT4 for tensor in own.values()):
        raise UserError(f"{directory}: a model loaded in int4 is not written; load it in another dtype")
    # of quantized weights alone: a parameter may be called scale, too
    scales = {scale_in_model(name): name + SCALE for name, t in own.items() if t.dtype in QUANTIZERS}
    tensors = {scales.get(name, name): tensor for name, tensor in own.items()}
    tensors.pop(TIED[1], None)
    for name, tensor in list(tensors.items()) if compact else ():
        if tensor.dim() == 2 and tensor.is_floating_point():
            tensors[name], tensors[name + SCALE] = quantize_rows(tensor)
        elif tensor.is_floating_point() and name not in scales.values():
            tensors[name] = tensor.half()
    write_tensors(Path(directory) / "model.safetensors", tensors)
    lm.config.save(Path(directory) / "config.json")


def name_table(lm, audiocraft: bool) -> dict[str, list[str]]:
    """Our tensor names -> the other names of the tensors packed in each, in packed order, for this model."""
    table, own = {}, lm.state_dict()
    for row in LM_NAMES:
        ours, transformers, audiocrafts = (name.replace("*", layer) for name, layer in zip(row, LAYER_NAMES))
        theirs = audiocrafts if audiocraft else transformers
        for n in range(lm.config.num_layers) if "{n}" in ours else [0]:
            for p in ("weight", "bias"):
                parts = [theirs.format(n=n, p=p, k=k, qkv=qkv) for k in range(lm.config.n_q) for qkv in "qkv"]
                table[ours.format(n=n, p=p)] = list(dict.fromkeys(parts))
    return {ours: parts for ours, parts in table.items() if ours in own}


def pack(tensors, table: dict[str, list[str]], shapes: dict, dtype, where, kinds={}) -> dict:
    """An iterable of (other name, tensor) -> our tensors, copied into place one by one as they are read.

    kinds: names of ours -> dtypes of those that are quantized on the way, with their scales beside them.
    """
    place = {name: (ours, i) for ours, parts in table.items() for i, name in enumerate(parts)}
    packed, missing, unexpected, wrong = {}, dict(place), [], []
    for name, tensor in tensors:
        if name not in place:
            unexpected.append(name)
            continue
        ours, i = place[name]
        missing.pop(name, None)
        rows = shapes[ours][0] // len(table[ours])
        if tensor.shape != (rows, *shapes[ours][1:]) or not tensor.is_floating_point():
            wrong.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {(rows, *shapes[ours][1:])}")
            continue
        parts = {ours: tensor.to(dtype or tensor.dtype)}
        if ours in kinds:
            parts = dict(zip((ours, ours + SCALE), QUANTIZERS[kinds[ours]](tensor)))
        for part_name, part in parts.items():
            packed.setdefault(part_name, part.new_empty(shapes[ours][0], *part.shape[1:]))
            packed[part_name][i * rows:(i + 1) * rows] = part
    if missing or unexpected or wrong:
        raise UserError(f"{where}: does not fit its configuration; missing: {listed(missing) or 'none'}; "
                        f"not known: {listed(unexpected) or 'none'}; "
                        f"of wrong shape or type: {listed(wrong) or 'none'}")
    return packed


def identity_projections(lm) -> dict[str, torch.Tensor]:
    """Projections that transformers does without, as they would not change the width: identities."""
    tensors, parts = {}, (lm.conditioner.text, lm.conditioner.melody)
    for name, part in zip(("enc_to_dec_proj", "audio_enc_to_dec_proj"), parts):
        if part is not None and part.proj.in_features == lm.config.dim:
            tensors[f"{name}.weight"] = torch.eye(lm.config.dim)
            tensors[f"{name}.bias"] = torch.zeros(lm.config.dim)
    return tensors


# --- configurations ---------------------------------------------------------------------------------------

def read_config(directory) -> tuple[Config, str]:
    """Configuration and origin ("ours", "transformers", "audiocraft") of a model directory."""
    audiocraft, ours = is_audiocraft(directory, "state_dict.bin"), directory / "config.json"
    if not audiocraft and not ours.is_file():
        raise UserError(f"{directory}: no config.json and no state_dict.bin, so no model in a known format")
    try:
        if audiocraft:
            tree = read_audiocraft(directory / "state_dict.bin")[1]
            return lm_config_from_audiocraft(tree, directory), "audiocraft"
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
        raise UserError(f"{directory}: a decoder with activation {decoder.activation_function}, "
                        f"scale_embedding {decoder.scale_embedding} is none of MusicGen's (gelu, False)")
    melody = theirs.model_type == "musicgen_melody"
    K, channels = decoder.num_codebooks, decoder.audio_channels
    values = dict(
        channels=channels, sample_rate=codec.sampling_rate, ratios=tuple(codec.upsampling_ratios),
        codec=str(directory), text="prepend" if melody else "cross", t5=str(directory), null_melody="c",
        melody="none", segment_duration=getattr(theirs, "segment_duration", 30.0),
        extend_stride=getattr(theirs, "extend_stride", 18.0), dim=decoder.hidden_size,
        num_heads=decoder.num_attention_heads, num_layers=decoder.num_hidden_layers,
        hidden_scale=decoder.ffn_dim // decoder.hidden_size, n_q=K, card=decoder.vocab_size,
        delays=tuple(k // channels for k in range(min(K, 65))))
    if melody:
        values |= dict(melody="prepend", n_chroma=theirs.num_chroma, chroma_length=theirs.chroma_length)
        features = directory / "preprocessor_config.json"
        if features.is_file():
            values["radix2_exp"] = int(read_json(features).get("n_fft", 16384)).bit_length() - 1
    return Config(**values | generation_settings(directory / "generation_config.json"))


def generation_settings(path) -> dict:
    """Guidance and sampling that a generation_config.json asks for; what it leaves out is our default.

    transformers cuts to top_k and then to top_p, we to one of them: top_p counts where top_k is 0.
    """
    values = read_json(path) if path.is_file() else {}
    settings = dict(cfg_coef=values.get("guidance_scale"), top_k=values.get("top_k"),
                    temperature=values.get("temperature"))
    if values.get("do_sample") is False:    # greedy, whatever the others say
        settings["temperature"] = 0.0
    if values.get("top_k") == 0 and values.get("top_p") != 1.0:
        settings["top_p"] = values.get("top_p")
    return known({key: value for key, value in settings.items() if value is not None}, path)


CONDITIONERS = {"description": "t5", "self_wav": "chroma_stem"}     # audiocraft's: the model that reads each
LM_ONLY = {  # where audiocraft's configuration has one of these, it must have this value
    "lm_model": "transformer_lm",
    **{f"transformer_lm.{key}": value for key, value in dict(
        positional_embedding="sin", activation="gelu", norm_first=True, norm="layer_norm", bias_ff=False,
        bias_attn=False, bias_proj=False, causal=True, past_context=None, layer_scale=None, xpos=False,
        qk_layer_norm=False, qk_layer_norm_cross=False, kv_repeat=1).items()},
    "codebooks_pattern.delay.flatten_first": 0, "codebooks_pattern.delay.empty_initial": 0,
    "fuser.cross_attention_pos_emb": False, "interleave_stereo_codebooks.per_timestep": False,
    "conditioners.self_wav.chroma_stem.argmax": True}


def lm_config_from_audiocraft(theirs: dict, directory) -> Config:
    """Config from the YAML configuration in audiocraft's state_dict.bin."""
    def get(path, *default):
        return look_up(theirs, path, directory, *default)

    for path, value in LM_ONLY.items():
        if get(path, value) != value:
            raise UserError(f"{directory}: {path} = {get(path)!r:.80} is not supported, only {value!r}; take "
                            f"a model that has it, such as facebook/musicgen-melody")
    for name in get("conditioners", None) or ():
        model = get(f"conditioners.{name}.model", None)
        if model not in (None, CONDITIONERS.get(name)):
            example = " (as in facebook/musicgen-style)" if model == "style" else ""
            raise UserError(f"{directory}: conditioners.{name}.model = {model!r:.80}{example} is not "
                            f"supported, only t5 for description and chroma_stem for self_wav; take a model "
                            f"of text and melody, such as facebook/musicgen-melody")

    def fusion(name):
        for way in ("prepend", "cross", "sum", "interpolate"):
            key = "input_interpolate" if way == "interpolate" else way
            if name in (get(f"fuser.{key}", None) or []):
                return way
        return "none"

    text, melody = (get(f"conditioners.{name}.model", None) for name in ("description", "self_wav"))
    values = dict(
        channels=get("channels", 1), sample_rate=get("sample_rate"), codec=str(directory), null_melody="c",
        segment_duration=float(get("dataset.segment_duration")),
        text=fusion("description") if text == "t5" else "none",
        melody=fusion("self_wav") if melody == "chroma_stem" else "none",
        positional_scale=float(get("transformer_lm.positional_scale", 1.0)),
        max_period=float(get("transformer_lm.max_period", 10000)),
        cfg_coef=float(get("classifier_free_guidance.inference_coef", 3.0)),
        pattern=get("codebooks_pattern.modeling", None))
    for key in ("dim", "num_heads", "num_layers", "hidden_scale", "n_q", "card"):
        values[key] = get(f"transformer_lm.{key}")
    values["delays"] = tuple(range(min(values["n_q"], 65)))
    if values["pattern"] is None:       # in June 2023 the pattern was a key of the language model
        values["pattern"] = get("transformer_lm.q_modeling")
    else:
        values["delays"] = tuple(get("codebooks_pattern.delay.delays", values["delays"]))
    if values["pattern"] not in ("delay", "parallel"):
        raise UserError(f"{directory}: codebooks_pattern.modeling = {values['pattern']!r} is not supported, "
                        f"only delay or parallel")
    if text == "t5":
        values["t5"] = get("conditioners.description.t5.name")
    if melody == "chroma_stem":
        values |= {key: get(f"conditioners.self_wav.chroma_stem.{key}") for key in ("n_chroma", "radix2_exp")}
    return Config(**values)


# --- for transformers -------------------------------------------------------------------------------------

def export_transformers(lm, codec, directory):
    """Writes a directory that transformers' Musicgen(Melody)ForConditionalGeneration and processor load.

    lm: an LMModel with its T5; codec: an EncodecModel, not folded. UserError for what transformers lacks.
    Note that transformers feeds one-hot C where there is no melody: see `conditioners.null_melody`.
    """
    directory = Path(directory)
    check_exportable(lm.config)
    t5 = lm.conditioner.text.encoder()
    tensors = exported_tensors(lm)
    tensors |= {f"text_encoder.{name}": tensor for name, tensor in t5.state_dict().items()
                if name != "encoder.embed_tokens.weight"}
    with tempfile.TemporaryDirectory() as temporary:
        export_codec(codec, temporary)
        audio_encoder = read_json(Path(temporary) / "config.json")
        tensors |= {f"audio_encoder.{name}": t for name, t in read_tensors(temporary)}
    write_tensors(directory / "model.safetensors", tensors)
    with tempfile.TemporaryDirectory() as temporary:
        lm.conditioner.text.tokenizer().save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            write_atomic(directory / path.name, path.read_bytes())
    for name, values in exported_configs(lm.config, t5.config.to_dict(), audio_encoder).items():
        write_atomic(directory / f"{name}.json", json.dumps(values, indent=1).encode())


def check_exportable(c: Config):
    """Raises UserError where transformers has no class for such a model."""
    melody = c.melody == "prepend"
    needed = dict(text="prepend" if melody else "cross", melody="prepend" if melody else "none",
                  positional_embedding="sin", qk_layer_norm=False, positional_scale=1.0, max_period=10000.0,
                  pattern="delay", delays=tuple(k // c.channels for k in range(c.n_q)))
    if melody:
        needed["melody_form"] = "chroma"
    for name, value in needed.items():
        if getattr(c, name) != value:
            raise UserError(f"transformers has no {name} = {getattr(c, name)!r} (only {value!r}), so this "
                            f"model cannot be exported")


def exported_tensors(lm) -> dict:
    """The language model's tensors under transformers' names."""
    tensors, ours, D = {}, lm.state_dict(), lm.config.dim
    table = name_table(lm, audiocraft=False)
    t5 = "conditioner.text.t5."     # is written as text_encoder
    if unknown := [name for name in ours if name not in table and not name.startswith(t5)]:
        raise UserError(f"transformers has no place for {listed(unknown)}, so this model cannot be exported")
    for name, parts in table.items():
        tensors |= zip(parts, ours[name].chunk(len(parts)))
    for name, identity in identity_projections(lm).items():
        if not torch.equal(tensors.pop(name).float().cpu(), identity):
            raise UserError(f"transformers has no {name.partition('.')[0]} from width {D} to {D}, so this "
                            f"model cannot be exported")
    return tensors


def exported_configs(c: Config, text_encoder: dict, audio_encoder: dict) -> dict[str, dict]:
    """File name -> content of the JSON files that transformers reads."""
    melody = c.melody == "prepend"
    kind = "MusicgenMelody" if melody else "Musicgen"
    decoder = dict(
        model_type="musicgen_melody_decoder" if melody else "musicgen_decoder", vocab_size=c.card,
        hidden_size=c.dim, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        ffn_dim=c.hidden_scale * c.dim, num_codebooks=c.n_q, audio_channels=c.channels,
        activation_function="gelu", scale_embedding=False, dropout=0.0, max_position_embeddings=2048,
        pad_token_id=c.card, bos_token_id=c.card, tie_word_embeddings=False)
    config = dict(
        model_type="musicgen_melody" if melody else "musicgen",
        architectures=[f"{kind}ForConditionalGeneration"],
        text_encoder=text_encoder, audio_encoder=audio_encoder, decoder=decoder,
        # transformers has none of these two: for our own reader
        segment_duration=c.segment_duration, extend_stride=c.extend_stride)
    generation = dict(
        do_sample=c.temperature > 0, guidance_scale=c.cfg_coef, temperature=c.temperature,
        top_k=0 if c.top_p else c.top_k, top_p=c.top_p or 1.0,
        max_length=round(c.segment_duration * c.sample_rate / c.stride), pad_token_id=c.card,
        bos_token_id=c.card, decoder_start_token_id=c.card)
    features = dict(
        feature_extractor_type="EncodecFeatureExtractor", sampling_rate=c.sample_rate,
        feature_size=c.channels)
    if melody:
        config |= dict(num_chroma=c.n_chroma, chroma_length=c.chroma_frames)
        features = dict(
            feature_extractor_type="MusicgenMelodyFeatureExtractor", sampling_rate=c.sample_rate,
            num_chroma=c.n_chroma, feature_size=c.n_chroma, n_fft=2 ** c.radix2_exp, hop_length=c.hop,
            chunk_length=round(c.segment_duration))
    features["processor_class"] = f"{kind}Processor"
    return {"config": config, "generation_config": generation, "preprocessor_config": features}
