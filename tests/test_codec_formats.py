"""The codec on disk: ours, those of transformers and audiocraft in all their forms, and broken ones.

    python -m pytest tests/test_codec_formats.py
"""
import functools
import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file

from checkpoints.codec_formats import foreign_name
from commands import command, refused
from encodec import EncodecModel
from models import CODEC_STYLES, codec_of_transformers, noise, tiny_codec
from system.errors import UserError


# --- transformers' format ---------------------------------------------------------------------------------

@functools.lru_cache
def files_of(style):
    """Files of a codec that transformers wrote: {name: bytes}."""
    with tempfile.TemporaryDirectory() as directory:
        codec_of_transformers(**CODEC_STYLES[style]).save_pretrained(directory)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def put(style, directory):
    for name, content in files_of(style).items():
        (directory / name).write_bytes(content)


def old_names(tensors):
    """Names of weight norm's tensors as torch had them before parametrizations."""
    return {name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"): tensor for name, tensor in tensors.items()}


def new_names(tensors):
    return {name.replace("weight_g", "parametrizations.weight.original0").replace(
        "weight_v", "parametrizations.weight.original1"): tensor for name, tensor in tensors.items()}


def as_bin(path, tensors):
    path.unlink()
    torch.save(old_names(tensors), path.with_name("pytorch_model.bin"))


def sharded(path, tensors):
    path.unlink()
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        part = {name: tensor for name, tensor in tensors.items() if shards[name] == shard}
        save_file(part, path.with_name(shard))
    path.with_name(path.name + ".index.json").write_text(json.dumps({"weight_map": shards}))


def inside_musicgen(path, tensors):
    inside = {"audio_encoder." + name: tensor for name, tensor in tensors.items()}
    save_file(inside | {"decoder.x": torch.zeros(2)}, path)
    config = path.with_name("config.json")
    values = json.loads(config.read_text())
    config.write_text(json.dumps({"model_type": "musicgen", "audio_encoder": values}))


FORMS = {"old names": lambda path, tensors: save_file(old_names(tensors), path),
         "new names": lambda path, tensors: save_file(new_names(tensors), path),
         "bin": as_bin, "sharded": sharded, "inside MusicGen": inside_musicgen}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_transformers_checkpoint(form, tmp_path):
    put("24 kHz", tmp_path)
    wav, path = noise(1, 1, 99), tmp_path / "model.safetensors"
    codes = EncodecModel.from_pretrained(tmp_path).encode(wav)
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    assert len(old_names(tensors)) == len(tensors)
    assert any(name.endswith("weight_g") for name in old_names(tensors))
    FORMS[form](path, tensors)
    assert torch.equal(EncodecModel.from_pretrained(tmp_path).encode(wav), codes)


def test_half_precision_is_read_in_float32_or_kept(tmp_path):
    put("24 kHz", tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert EncodecModel.from_pretrained(tmp_path).encoder[0].conv.bias.dtype == torch.float32
    assert EncodecModel.from_pretrained(tmp_path, dtype=None).encoder[0].conv.bias.dtype == torch.float16


@pytest.mark.parametrize("changes", [{}, dict(causal=True, pad_mode="reflect", true_skip=False),
                                     dict(channels=2), dict(norm="time_group_norm")], ids=str)
def test_export_loads_in_transformers_and_comes_back_bit_for_bit(changes, tmp_path):
    codec = tiny_codec(card=1024, **changes)
    codec.to_hf(tmp_path)
    reference, report = transformers.EncodecModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    wav = noise(1, codec.channels, 77)
    bandwidth = reference.config.target_bandwidths[-1]
    assert torch.equal(reference.eval().encode(wav, bandwidth=bandwidth).audio_codes[0], codec.encode(wav))
    reference.save_pretrained(tmp_path / "again")
    for directory in (tmp_path, tmp_path / "again"):
        again = EncodecModel.from_pretrained(directory)
        assert again.config.norm == codec.config.norm and again.config.true_skip == codec.config.true_skip
        assert all(torch.equal(value, codec.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("codec", [lambda: tiny_codec().fold(), lambda: tiny_codec(lstm=0),
                                   lambda: tiny_codec(card=17)], ids=["folded", "no LSTM", "17 entries"])
def test_what_transformers_lacks_is_not_exported(codec, tmp_path):
    with pytest.raises(UserError, match="transformers has only"):
        codec().to_hf(tmp_path)


@pytest.mark.parametrize("key, value, named", [
    ("normalize", True, "normalize"),
    ("chunk_length_s", 1.0, "chunk_length_s"),
    ("trim_right_ratio", 0.5, "trim_right_ratio"),
    ("codebook_dim", 4, "codebook_dim"),
    ("model_type", "dac", "model"),
    ("norm_type", "batch_norm", "norm"),
    ("pad_mode", "edge", "pad_mode"),
    ("num_filters", "many", "filters"),
    ("upsampling_ratios", [], None),
])
def test_unsupported_configurations_are_named(key, value, named, tmp_path):
    put("32 kHz", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(UserError, match=named or str(tmp_path)):
        EncodecModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("values", [dict(normalize=True, chunk_length_s=1.0, overlap=0.01),
                                    dict(normalize=True), dict(chunk_length_s=1.0)], ids=str)
def test_the_48_khz_codec_is_refused_by_its_name(values, tmp_path):
    put("32 kHz", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    refused(command(lambda argv: EncodecModel.from_pretrained(*argv), tmp_path), str(tmp_path),
            "facebook/encodec_48khz", "take a codec such as facebook/encodec_32khz")


# --- audiocraft's format (its numbers are in test_encodec.py) ---------------------------------------------

XP = """
compression_model: encodec
sample_rate: 2400
channels: 1
encodec: {autoencoder: seanet, quantizer: rvq, sample_rate: '${sample_rate}', channels: '${channels}',
  causal: false, renormalize: false}
seanet: {dimension: 8, channels: '${channels}', causal: '${encodec.causal}', n_filters: 2,
  n_residual_layers: 1, ratios: [4, 3, 2], activation: ELU, activation_params: {alpha: 1.}, norm: weight_norm,
  norm_params: {}, kernel_size: 7, residual_kernel_size: 3, last_kernel_size: 7, dilation_base: 2,
  pad_mode: constant, true_skip: true, compress: 2, lstm: 1, disable_norm_outer_blocks: 0,
  decoder: {trim_right_ratio: 1.0, final_activation: null, final_activation_params: null}, encoder: {}}
rvq: {n_q: 3, bins: 16}
"""
JUNE_2023 = "renorm: {loudness_db: -14}"     # a section that audiocraft ignores


def write_as_audiocraft(directory, codec, xp):
    state = {foreign_name(name, "audiocraft"): tensor for name, tensor in codec.state_dict().items()}
    torch.save({"best_state": state, "xp.cfg": xp}, directory / "compression_state_dict.bin")


@pytest.mark.parametrize("there, instead", [
    ("", ""),
    ("renormalize: false", JUNE_2023),
    ("renormalize: false", "renorm: null"),
    (", renormalize: false", ""),
    ("compression_model: encodec", ""),
    ("activation: ELU, activation_params: {alpha: 1.}, ", ""),
    (", disable_norm_outer_blocks: 0", ""),
    ("trim_right_ratio: 1.0, ", ""),
    ("final_activation: null, ", ""),
    (",\n  decoder: {trim_right_ratio: 1.0, final_activation: null, final_activation_params: null}", ""),
])
def test_what_a_configuration_of_audiocraft_may_lack(there, instead, tmp_path):
    """All of June 2023, and what has but one supported value, which is audiocraft's default."""
    assert there in XP
    codec, wav = tiny_codec(), noise(1, 1, 50)
    write_as_audiocraft(tmp_path, codec, XP.replace(there, instead, 1))
    again = EncodecModel.from_pretrained(tmp_path)
    assert torch.equal(again.encode(wav), codec.encode(wav))
    assert torch.equal(again.decode(codec.encode(wav)), codec.decode(codec.encode(wav)))


@pytest.mark.parametrize("there, instead, named", [
    ("renormalize: false", "renormalize: true", "encodec.renormalize = True"),
    ("compression_model: encodec", "compression_model: dac", "compression_model = 'dac'"),
    ("alpha: 1.", "alpha: 0.5", "seanet.activation_params"),
    ("activation: ELU", "activation: Snake", "seanet.activation = 'Snake'"),
    ("encoder: {}", "encoder: {causal: true}", "seanet.encoder.causal = True"),
    ("final_activation: null", "final_activation: Tanh", "seanet.decoder.final_activation = 'Tanh'"),
    ("decoder: {", "decoder: {dilation_base: 3, ", "seanet.decoder.dilation_base = 3"),
    ("renormalize: false", "renormalize: '${nowhere}'", "nowhere"),
    ("sample_rate: 2400", "", "sample_rate"),
])
def test_what_audiocraft_can_do_and_we_cannot_is_named(there, instead, named, tmp_path):
    assert there in XP
    write_as_audiocraft(tmp_path, tiny_codec(), XP.replace(there, instead, 1))
    refused(command(lambda argv: EncodecModel.from_pretrained(*argv), tmp_path), str(tmp_path), named)


def test_a_checkpoint_of_audiocraft_may_merely_name_its_codec(tmp_path):
    codec, wav = tiny_codec(), noise(1, 1, 50)
    codec.save(tmp_path / "named")
    package = {"pretrained": str(tmp_path / "named"), "exported": True}
    torch.save(package, tmp_path / "compression_state_dict.bin")
    assert torch.equal(EncodecModel.from_pretrained(tmp_path).encode(wav), codec.encode(wav))
    torch.save({"pretrained": str(tmp_path)}, tmp_path / "compression_state_dict.bin")  # itself
    with pytest.raises(UserError, match="only names another"):
        EncodecModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("package", [
    {},
    [1],
    {"pretrained": "/nowhere"},
    {"best_state": {}, "xp.cfg": "a: [1"},
    {"best_state": {}, "xp.cfg": "{}"},
    {"best_state": [], "xp.cfg": "{}"},
    {"best_state": {"x": "y"}, "xp.cfg": "{}"},
    {"best_state": {}, "xp.cfg": "encodec: {renormalize: '${a}'}\na: ${b}\nb: ${a}"},
], ids=str)
def test_broken_checkpoints_of_audiocraft(package, tmp_path):
    torch.save(package, tmp_path / "compression_state_dict.bin")
    with pytest.raises(UserError, match=f"{tmp_path}|/nowhere"):
        EncodecModel.from_pretrained(tmp_path)


# --- our own directories, and broken ones -----------------------------------------------------------------

def test_save_and_load(tmp_path):
    codec, wav = tiny_codec(lstm=0, n_residual_layers=2, norm="none"), noise(1, 1, 100)
    codec.save(tmp_path)
    again = EncodecModel.from_pretrained(tmp_path)
    assert again.config == codec.config and not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in codec.state_dict().items())
    assert torch.equal(again.encode(wav), codec.encode(wav))
    tiny_codec().fold().save(tmp_path / "lm" / "codec")     # inside a language model's directory
    inside = EncodecModel.from_pretrained(tmp_path / "lm")
    assert torch.equal(inside.encode(wav), tiny_codec().fold().encode(wav))


def test_compact_files_are_half_as_large(tmp_path):
    codec = tiny_codec(n_filters=8, card=256)
    for compact in (False, True):
        codec.save(tmp_path / str(compact), compact)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("False", "True"))
    assert half < 0.6 * full
    again = EncodecModel.from_pretrained(tmp_path / "True")
    for name, value in codec.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float()), name


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path):
    tiny_codec().save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    del tensors["encoder.0.conv.bias"], tensors["quantizer.codebooks.1.embed"]
    tensors["extra.weight"] = torch.zeros(3)
    tensors["decoder.0.conv.bias"] = torch.zeros(7)
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        EncodecModel.from_pretrained(tmp_path)
    for part in ("missing: encoder.0.conv.bias, quantizer.codebooks.1.embed", "unexpected: extra.weight",
                 "decoder.0.conv.bias is (7,), not (16,)", str(tmp_path)):
        assert part in str(caught.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 2 ** 40) + b"{}")


def code_in_pickle(path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {path}.ran",)
    torch.save({"x": Evil()}, path.with_name("pytorch_model.bin"))
    path.unlink()


def escaping_index(path):
    path.unlink()
    path.with_name(path.name + ".index.json").write_text(json.dumps({"weight_map": {"x": "../../secret"}}))


HARM = {
    "truncated": truncate, "huge header": huge_header, "code in a pickle": code_in_pickle,
    "escaping index": escaping_index, "no weights": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.with_name("config.json").write_text("[1]"),
    "a wrong value": lambda path: path.with_name("config.json").write_text('{"n_q": "four"}'),
    "no configuration": lambda path: path.with_name("config.json").unlink(),
}


@pytest.mark.parametrize("harm", HARM)
def test_damaged_checkpoints_end_in_one_sentence(harm, tmp_path):
    tiny_codec().save(tmp_path)
    HARM[harm](tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        EncodecModel.from_pretrained(tmp_path)
    message = str(caught.value)
    assert (str(tmp_path) in message or "n_q" in message) and "\n" not in message
    assert not list(tmp_path.glob("*.ran"))


@pytest.mark.parametrize("name", ["no/such/directory", "./nowhere", "/nowhere", "a b", ""])
def test_names_that_cannot_be_checkpoints(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        EncodecModel.from_pretrained(name)


def test_hub_id_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    done = command(lambda argv: EncodecModel.from_pretrained(*argv), "nobody/has-this-codec")
    refused(done, "nobody/has-this-codec", "network")
