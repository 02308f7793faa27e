"""Codec against the original's numbers and transformers' classes; formats, audio files, losses.

    python -m pytest tests/test_encodec.py
"""
import dataclasses
import functools
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import encodec  # noqa: E402
from config import Config, UserError  # noqa: E402
from deviations import near, same  # noqa: E402
from data.audio import read_audio, write_audio  # noqa: E402
from encodec import EncodecModel  # noqa: E402

TINY = Config(task="codec", n_filters=2, dimension=8, ratios=(4, 3, 2), n_q=3, card=16, lstm=1, sample_rate=2400,
              kmeans_init=False)


def golden(name):
    return {key: torch.from_numpy(value) for key, value in np.load(ROOT / "tests/golden" / name).items()}


def worst(a, b):
    """Largest deviation, relative to the largest value of the array."""
    return float((a - b).abs().max() / b.abs().max())


def noise(*shape, seed=0):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**changes):
    torch.manual_seed(0)
    return EncodecModel(dataclasses.replace(TINY, **changes)).eval()


# --- the original's numbers --------------------------------------------------------------------------------

def golden_codec(name):
    g = golden(name)
    config = Config(
        task="codec", sample_rate=int(g["sample_rate"]), ratios=tuple(g["ratios"].tolist()), n_q=int(g["n_q"]),
        n_filters=int(g["n_filters"]), dimension=int(g["dimension"]), card=int(g["bins"]), lstm=int(g["lstm_layers"]),
        causal=bool(g["causal"]), pad_mode="reflect" if g["pad_reflect"] else "constant")
    return g, config, {key[6:]: value for key, value in g.items() if key.startswith("state.")}


XP = """
sample_rate: {c.sample_rate}
channels: 1
compression_model: encodec
encodec: {{autoencoder: seanet, quantizer: rvq, sample_rate: '${{sample_rate}}', channels: '${{channels}}',
  causal: {c.causal}, renormalize: false}}
seanet: {{dimension: {c.dimension}, channels: '${{channels}}', causal: '${{encodec.causal}}',
  n_filters: {c.n_filters}, n_residual_layers: 1, ratios: {r}, activation: ELU, norm: weight_norm, kernel_size: 7,
  residual_kernel_size: 3, last_kernel_size: 7, dilation_base: 2, pad_mode: {c.pad_mode}, true_skip: true,
  compress: 2, lstm: 2, disable_norm_outer_blocks: 0, decoder: {{trim_right_ratio: 1.0,
  final_activation: null}}, encoder: {{}}}}
rvq: {{n_q: {c.n_q}, bins: {c.card}}}
"""


@pytest.mark.parametrize("name", ["encodec.npz", "encodec_causal.npz"])
def test_the_original_format_and_numbers(name, tmp_path):
    g, config, state = golden_codec(name)
    package = {"best_state": state, "xp.cfg": XP.format(c=config, r=list(config.ratios)), "version": "1"}
    torch.save(package, tmp_path / "compression_state_dict.bin")
    codec = EncodecModel.from_pretrained(tmp_path)
    for key in ("sample_rate", "ratios", "n_q", "causal", "pad_mode", "true_skip"):
        assert getattr(codec.config, key) == getattr(config, key), key
    for fold in (False, True):
        codec = codec.fold() if fold else codec
        for prefix in ("", "short_"):
            wav = g[prefix + "wav"]
            near("codec, latents", "original", codec.encoder(wav), g[prefix + "latent"], 2e-5)
            same("codec, codes", "original", codec.encode(wav), g[prefix + "codes"])
            near("codec, decoded wave", "original", codec.decode(g[prefix + "codes"]), g[prefix + "decoded"], 3e-5)
        near("codec, quantized latents", "original", codec.quantizer.decode(g["codes"]), g["quantized"], 1e-6)
        near("codec, decoded wave", "original", codec(g["wav"])[0], g["forward_trimmed"], 3e-5)


def test_the_original_may_merely_name_its_codec(tmp_path):
    codec = tiny()
    codec.save(tmp_path / "named")
    torch.save({"pretrained": str(tmp_path / "named"), "exported": True}, tmp_path / "compression_state_dict.bin")
    assert torch.equal(EncodecModel.from_pretrained(tmp_path).encode(noise(1, 1, 50)), codec.encode(noise(1, 1, 50)))


# --- transformers' classes ---------------------------------------------------------------------------------

STYLES = {
    "32 kHz": dict(use_causal_conv=False, use_conv_shortcut=False, pad_mode="reflect", num_lstm_layers=2),
    "32 kHz, zeros around it": dict(use_causal_conv=False, use_conv_shortcut=False, pad_mode="constant", num_lstm_layers=2),
    "24 kHz": dict(use_causal_conv=True, use_conv_shortcut=True, pad_mode="reflect", num_residual_layers=2),
    "group norm, stereo": dict(use_causal_conv=False, norm_type="time_group_norm", audio_channels=2, compress=1),
}


@functools.lru_cache
def saved(style):
    """Files of a codec that transformers wrote: {name: bytes}"""
    with tempfile.TemporaryDirectory() as directory:
        theirs(**STYLES[style]).save_pretrained(directory)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def put(style, directory):
    for name, content in saved(style).items():
        (directory / name).write_bytes(content)


def theirs(**changes):
    from transformers import EncodecConfig
    from transformers import EncodecModel as Theirs
    torch.manual_seed(1)
    values = dict(sampling_rate=2400, upsampling_ratios=[4, 3, 2], num_filters=2, hidden_size=8, codebook_size=1024,
                  target_bandwidths=[1.0, 4.0])
    model = Theirs(EncodecConfig(**values | changes)).eval()
    with torch.no_grad():
        for layer in model.quantizer.layers:
            layer.codebook.embed.normal_(std=0.05)
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("style", STYLES)
def test_equal_to_transformers(style, tmp_path):
    reference = theirs(**STYLES[style])
    reference.save_pretrained(tmp_path)
    codec, folded = EncodecModel.from_pretrained(tmp_path), EncodecModel.from_pretrained(tmp_path).fold()
    assert codec.num_codebooks == 4 and codec.frame_rate == 100 and codec.cardinality == 1024
    for L in (240, 241, 263, 100, 30, 5):
        wav = noise(2, codec.channels, L)
        with torch.no_grad():
            codes = reference.encode(wav, bandwidth=4.0).audio_codes[0]
            near("codec, latents", "transformers", codec.encoder(wav), reference.encoder(wav), 1e-5)
            same("codec, codes", "transformers", codec.encode(wav), codes)
            expected = reference.decode(codes[None], [None]).audio_values
        decoded = codec.decode(codes)
        assert decoded.shape == (2, codec.channels, math.ceil(L / 24) * 24)
        near("codec, decoded wave", "transformers", decoded, expected, 1e-5)
        near("codec, decoded wave", "transformers", folded.decode(codes), expected, 1e-5)


@pytest.mark.parametrize("bandwidth, n_q", [(1.0, 1), (2.0, 2), (4.0, 4), (None, 4)])
def test_bandwidth_chooses_the_codebooks(bandwidth, n_q, tmp_path):
    reference = theirs(target_bandwidths=[1.0, 2.0, 4.0])
    reference.save_pretrained(tmp_path)
    codec = EncodecModel.from_pretrained(tmp_path, bandwidth=bandwidth)
    assert codec.num_codebooks == codec.config.n_q == n_q
    wav = noise(1, 1, 250)
    codes = reference.encode(wav, bandwidth=bandwidth or 4.0).audio_codes[0]
    assert torch.equal(codec.encode(wav), codes)
    codec.save(tmp_path / "ours")
    assert torch.equal(EncodecModel.from_pretrained(tmp_path / "ours").encode(wav), codes)
    assert torch.equal(EncodecModel.from_pretrained(tmp_path, n_q=n_q).encode(wav), codes)


def test_bandwidth_out_of_reach(tmp_path):
    put("32 kHz", tmp_path)
    for choice in (dict(bandwidth=24.0), dict(bandwidth=0.1), dict(n_q=5), dict(n_q=0)):
        with pytest.raises(UserError, match="1 to 4 codebooks"):
            EncodecModel.from_pretrained(tmp_path, **choice)


def old_names(tensors):
    return {n.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"): t for n, t in tensors.items()}


@pytest.mark.parametrize("form", ["old names", "new names", "bin", "sharded", "inside MusicGen", "half"])
def test_forms_of_a_transformers_checkpoint(form, tmp_path):
    from safetensors.torch import load_file, save_file
    put("24 kHz", tmp_path)
    codes = EncodecModel.from_pretrained(tmp_path).encode(noise(1, 1, 99))
    file = tmp_path / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    assert len(old_names(tensors)) == len(tensors)
    if form == "old names":
        save_file(old_names(tensors), file)
        assert any(name.endswith("weight_g") for name in load_file(file))
    elif form == "new names":
        save_file({n.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"): t for n, t in tensors.items()}, file)
    elif form == "bin":
        file.unlink()
        torch.save(old_names(tensors), tmp_path / "pytorch_model.bin")
    elif form == "sharded":
        file.unlink()
        names = sorted(tensors)
        shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
        for shard in set(shards.values()):
            save_file({n: tensors[n] for n in names if shards[n] == shard}, tmp_path / shard)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    elif form == "inside MusicGen":
        save_file({"audio_encoder." + n: t for n, t in tensors.items()} | {"decoder.x": torch.zeros(2)}, file)
        values = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "musicgen", "audio_encoder": values}))
    elif form == "half":
        save_file({n: t.half() for n, t in tensors.items()}, file)
        assert EncodecModel.from_pretrained(tmp_path).encoder[0].conv.bias.dtype == torch.float32
        assert EncodecModel.from_pretrained(tmp_path, dtype=None).encoder[0].conv.bias.dtype == torch.float16
        return
    assert torch.equal(EncodecModel.from_pretrained(tmp_path).encode(noise(1, 1, 99)), codes)


@pytest.mark.parametrize("changes", [{}, dict(causal=True, pad_mode="reflect", true_skip=False), dict(channels=2),
                                     dict(norm="time_group_norm")])
def test_export_loads_in_transformers_and_comes_back_bit_for_bit(changes, tmp_path):
    from transformers import EncodecModel as Theirs
    codec = tiny(card=1024, **changes)
    codec.to_hf(tmp_path)
    reference, report = Theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    wav = noise(1, codec.channels, 77)
    codes = reference.eval().encode(wav, bandwidth=reference.config.target_bandwidths[-1]).audio_codes[0]
    assert torch.equal(codes, codec.encode(wav))
    reference.save_pretrained(tmp_path / "again")
    for directory in (tmp_path, tmp_path / "again"):
        again = EncodecModel.from_pretrained(directory)
        assert again.config.norm == codec.config.norm and again.config.true_skip == codec.config.true_skip
        assert all(torch.equal(value, codec.state_dict()[name]) for name, value in again.state_dict().items())


def test_what_transformers_lacks_is_not_exported(tmp_path):
    for codec in (tiny().fold(), tiny(lstm=0), tiny(card=17)):
        with pytest.raises(UserError, match="transformers has only"):
            codec.to_hf(tmp_path)


@pytest.mark.parametrize("key, value", [("normalize", True), ("chunk_length_s", 1.0), ("trim_right_ratio", 0.5),
                                        ("codebook_dim", 4), ("model_type", "dac"), ("norm_type", "batch_norm"),
                                        ("pad_mode", "edge"), ("num_filters", "many"), ("upsampling_ratios", [])])
def test_unsupported_configurations_are_named(key, value, tmp_path):
    put("32 kHz", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(UserError, match=key.replace("_type", "").removeprefix("num_") if value else str(tmp_path)):
        EncodecModel.from_pretrained(tmp_path)


# --- our own directories, and broken ones ------------------------------------------------------------------

def test_save_and_load(tmp_path):
    codec = tiny(lstm=0, n_residual_layers=2, norm="none")
    codec.save(tmp_path)
    again = EncodecModel.from_pretrained(tmp_path)
    assert again.config == codec.config and not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in codec.state_dict().items())
    wav = noise(1, 1, 100)
    assert torch.equal(again.encode(wav), codec.encode(wav))
    tiny().fold().save(tmp_path / "lm" / "codec")  # inside a language model's directory
    assert torch.equal(EncodecModel.from_pretrained(tmp_path / "lm").encode(wav), tiny().fold().encode(wav))


def damage(tmp_path, change):
    from safetensors.torch import load_file, save_file
    tiny().save(tmp_path)
    tensors = {name: value.clone() for name, value in load_file(tmp_path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        EncodecModel.from_pretrained(tmp_path)
    return str(caught.value)


def test_missing_surplus_and_misshapen_tensors_are_listed(tmp_path):
    def change(tensors):
        del tensors["encoder.0.conv.bias"], tensors["quantizer.codebooks.1.embed"]
        tensors["extra.weight"] = torch.zeros(3)
        tensors["decoder.0.conv.bias"] = torch.zeros(7)
    message = damage(tmp_path, change)
    for part in ("missing: encoder.0.conv.bias, quantizer.codebooks.1.embed", "surplus: extra.weight",
                 "decoder.0.conv.bias is (7,), not (16,)", str(tmp_path)):
        assert part in message


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


@pytest.mark.parametrize("harm", [truncate, huge_header, code_in_pickle, escaping_index, Path.unlink,
                                  lambda path: path.write_bytes(b""),
                                  lambda path: path.with_name("config.json").write_text("[1]"),
                                  lambda path: path.with_name("config.json").write_text('{"n_q": "four"}'),
                                  lambda path: path.with_name("config.json").unlink()])
def test_damaged_checkpoints_end_in_one_sentence(harm, tmp_path):
    tiny().save(tmp_path)
    harm(tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        EncodecModel.from_pretrained(tmp_path)
    assert (str(tmp_path) in str(caught.value) or "n_q" in str(caught.value)) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.ran"))


@pytest.mark.parametrize("package", [{}, {"best_state": {}, "xp.cfg": "a: [1"}, {"best_state": {}, "xp.cfg": "{}"},
                                     {"best_state": [], "xp.cfg": "{}"},
                                     {"best_state": {"x": "y"}, "xp.cfg": "{}"}, [1], {"pretrained": "/nowhere"},
                                     {"best_state": {},
                                      "xp.cfg": "encodec: {renormalize: '${a}'}\na: ${b}\nb: ${a}"}])
def test_broken_original_checkpoints(package, tmp_path):
    torch.save(package, tmp_path / "compression_state_dict.bin")
    with pytest.raises(UserError, match=f"{tmp_path}|/nowhere"):
        EncodecModel.from_pretrained(tmp_path)
    torch.save({"pretrained": str(tmp_path)}, tmp_path / "compression_state_dict.bin")  # itself
    with pytest.raises(UserError, match="only names another"):
        EncodecModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no/such/directory", "./nowhere", "/nowhere", "a b", ""])
def test_names_that_cannot_be_checkpoints(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        EncodecModel.from_pretrained(name)


def test_hub_id_offline(tmp_path):
    code = "import encodec, config; config.run(encodec.EncodecModel.from_pretrained, 'nobody/has-this-codec')"
    environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "nobody/has-this-codec" in done.stderr and "network" in done.stderr and done.stderr.count("\n") == 1


# --- shapes ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(causal=True, pad_mode="reflect"), dict(lstm=0, true_skip=False),
                                     dict(channels=2, n_residual_layers=2), dict(ratios=(5,)), dict(ratios=(1, 3))])
@pytest.mark.parametrize("L", [1, 2, 23, 24, 25, 100])
def test_any_length(changes, L):
    codec = tiny(**changes)
    wav = noise(2, codec.channels, L)
    codes = codec.encode(wav)
    assert codes.shape == (2, 3, math.ceil(L / codec.stride)) and codes.dtype == torch.long
    assert codec.decode(codes).shape == (2, codec.channels, codes.shape[-1] * codec.stride)
    reconstruction, same, _ = codec(wav)
    assert reconstruction.shape == wav.shape and torch.equal(same, codes)


def test_causal_frames_do_not_see_the_future():
    codec = tiny(causal=True)
    wav = noise(1, 1, 240)
    late = wav.clone()
    late[..., 121:] += 1
    assert torch.equal(codec.encoder(wav)[..., :5], codec.encoder(late)[..., :5])
    assert not torch.equal(codec.encoder(wav)[..., 5:], codec.encoder(late)[..., 5:])


def test_mono_codec_interleaves_stereo():
    codec = tiny()
    wav = noise(2, 2, 100)
    codes = codec.encode(wav)
    assert codes.shape == (2, 6, 5)
    for side in (0, 1):
        assert torch.equal(codes[:, side::2], codec.encode(wav[:, side:side + 1]))
        torch.testing.assert_close(codec.decode(codes)[:, side], codec.decode(codes[:, side::2])[:, 0])


def test_wrong_waves_and_codes():
    codec = tiny()
    for shape in ((1, 3, 50), (1, 1, 0), (50,)):
        with pytest.raises(UserError):
            codec.encode(torch.zeros(shape))
    for codes in (torch.full((1, 3, 4), 16), torch.full((1, 3, 4), -1), torch.zeros(1, 3, 0, dtype=torch.long),
                  torch.zeros(1, 5, 4, dtype=torch.long)):
        with pytest.raises(UserError):
            codec.decode(codes)


def test_training_pass_has_gradients_everywhere():
    codec = tiny(kmeans_init=True).train()
    wav = noise(2, 1, 240)
    reconstruction, codes, commit = codec(wav)
    ((reconstruction - wav).square().mean() + commit).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in codec.parameters())
    reconstruction, codes, commit = codec(wav, quantise=False)
    assert codes is None and commit == 0 and reconstruction.shape == wav.shape


# --- long audio --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(causal=True, pad_mode="reflect", true_skip=False, lstm=2),
                                     dict(pad_mode="reflect", n_residual_layers=3, lstm=0, ratios=(5, 3)),
                                     dict(channels=2, ratios=(1, 4), last_kernel_size=5)])
@pytest.mark.parametrize("piece, frames", [(7, 40), (13, 27), (40, 200)])
def test_pieces_give_what_the_whole_gives(changes, piece, frames, monkeypatch):
    codec = tiny(**changes)
    for extra in (0, 1, codec.stride - 1):
        wav = noise(1, codec.channels, frames * codec.stride - extra)
        with torch.no_grad():
            latent, decoded = codec.encoder(wav), codec.decoder(noise(1, 8, frames))
            monkeypatch.setattr(encodec, "PIECE", 10 ** 9)
            codes = codec.encode(wav)
            whole = codec.decode(codes)
            monkeypatch.setattr(encodec, "PIECE", piece)
            parts = list(encodec.stream(codec.encoder, iter(wav.split(piece * codec.stride, -1))))
            assert len(parts) > 1 and worst(torch.cat(parts, -1), latent) < 1e-5
            parts = list(encodec.stream(codec.decoder, iter(noise(1, 8, frames).split(piece, -1))))
            assert len(parts) > 1 and worst(torch.cat(parts, -1), decoded) < 1e-5
        assert torch.equal(codec.encode(wav), codes)
        assert worst(codec.decode(codes), whole) < 1e-5


# --- audio files -------------------------------------------------------------------------------------------

def tone(seconds, rate, channels=1, hertz=220.0):
    time = torch.arange(round(seconds * rate)) / rate
    return 0.4 * torch.stack([torch.sin(2 * torch.pi * hertz * (c + 1) * time) for c in range(channels)])


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".WAV"])
@pytest.mark.parametrize("channels", [1, 2])
def test_written_audio_reads_back(suffix, channels, tmp_path):
    wav = tone(1.0, 16000, channels)
    write_audio(tmp_path / f"x{suffix}", wav, 16000)
    again = read_audio(tmp_path / f"x{suffix}", 16000, channels)
    n = min(again.shape[1], wav.shape[1])
    assert again.shape[0] == channels and again.dtype == torch.float32 and n >= 15900
    assert (again[:, :n] - wav[:, :n]).abs().mean() < (0.02 if suffix in (".ogg", ".mp3") else 1e-4)
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 192000, 16001])
def test_any_rate_is_resampled(rate, tmp_path):
    soundfile.write(tmp_path / "x.wav", tone(0.5, rate)[0].numpy(), rate, "FLOAT")
    wav, expected = read_audio(tmp_path / "x.wav", 16000, 1), tone(0.5, 16000)
    assert abs(wav.shape[1] - 8000) <= 1
    assert (wav[:, 500:7500] - expected[:, 500:7500]).abs().max() < 5e-3


@pytest.mark.parametrize("rate", [16000, 44100, 11025])
def test_pieces_of_a_file_join_to_the_whole(rate, tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(2 * rate).numpy(), rate, "FLOAT")
    whole = read_audio(tmp_path / "x.wav", 16000, 1)
    parts = [read_audio(tmp_path / "x.wav", 16000, 1, start, 0.37) for start in np.arange(0, 2, 0.37)]
    assert [p.shape[1] for p in parts[:-1]] == [5920] * 5
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inside", [1, 2, 3, 8])
def test_channel_counts(inside, tmp_path):
    wav = tone(0.1, 8000, inside)
    soundfile.write(tmp_path / "x.wav", wav.T.numpy(), 8000, "FLOAT")
    torch.testing.assert_close(read_audio(tmp_path / "x.wav", 8000, 1), wav.mean(0, keepdim=True))
    two = read_audio(tmp_path / "x.wav", 8000, 2)
    torch.testing.assert_close(two, wav[:2] if inside > 1 else wav.expand(2, -1))


def bad_files(tmp_path):
    good = tmp_path / "good.wav"
    soundfile.write(good, np.zeros(1000, np.float32), 8000)
    nan, infinite = np.zeros(100, np.float32), np.zeros(100, np.float32)
    nan[50], infinite[50] = math.nan, math.inf
    soundfile.write(tmp_path / "nan.wav", nan, 8000, "FLOAT")
    soundfile.write(tmp_path / "inf.wav", infinite, 8000, "FLOAT")
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 8000)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("not music")
    (tmp_path / "header.wav").write_bytes(good.read_bytes()[:20])
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "link.wav").symlink_to(tmp_path / "gone.wav")
    (tmp_path / "x.raw").write_bytes(b"12345678")
    return "nan.wav inf.wav none.wav empty.wav text.mp3 header.wav folder.wav link.wav x.raw absent.wav".split()


def test_bad_audio_is_named(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(UserError, match=name):
            read_audio(tmp_path / name, 16000, 1)
    for start, duration in ((1.0, None), (0.0, 0.0), (1e9, 1.0), (-1.0, None), (0.0, -1.0)):
        with pytest.raises(UserError, match="good.wav"):
            read_audio(tmp_path / "good.wav", 16000, 1, start, duration)
    with pytest.raises(UserError, match="NUL|no such"):
        read_audio("a\0b.wav", 16000, 1)


def test_a_header_that_lies_about_its_length_costs_nothing(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(0.1, 8000)[0].numpy(), 8000)
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", 0x7ffffff0)  # the size of its samples
    path.write_bytes(data)
    assert read_audio(path, 8000, 1).shape[1] <= 800


def test_loud_waves_are_scaled_not_clipped(tmp_path):
    loud = 5 * tone(0.1, 8000)
    write_audio(tmp_path / "x.wav", loud, 8000)
    again = read_audio(tmp_path / "x.wav", 8000, 1)
    assert abs(float(again.abs().max()) - 0.99) < 1e-3
    assert worst(again * 2 / 0.99, loud) < 1e-3
    write_audio(tmp_path / "x.wav", 0.5 * loud / 2, 8000)
    assert abs(float(read_audio(tmp_path / "x.wav", 8000, 1).abs().max()) - 0.5) < 1e-3


def test_waves_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path, wav in ((tmp_path / "x.txt", tone(0.1, 8000)), (tmp_path / "x", tone(0.1, 8000)),
                      (tmp_path / "nan.wav", torch.full((1, 10), math.nan)),
                      (tmp_path / "file" / "x.wav", tone(0.1, 8000))):
        with pytest.raises(UserError, match=path.name):
            write_audio(path, wav, 8000)
        assert not path.exists()
    with pytest.raises(UserError, match="x.mp3"):
        write_audio(tmp_path / "x.mp3", tone(0.1, 8000), 12345)  # no such rate in mp3
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- training ----------------------------------------------------------------------------------------------

def test_mel_loss_agrees_with_the_original():
    g = golden("codec_losses.npz")
    config = Config(sample_rate=32000, mel_range=(6, 11), n_mels=64, mel_floor=1e-5)
    x = g["mel.x"].requires_grad_()
    loss = encodec.mel_loss(config, x, g["mel.y"])
    loss.backward()
    near("mel loss", "original", loss, g["mel.loss"], 3e-5)
    near("mel loss, gradient", "original", x.grad.flatten(1).norm(dim=1), g["mel.grad_norm_x"], 3e-5)
    near("mel loss, gradient", "original", x.grad[..., :64], g["mel.grad_x_head"], 3e-5)
    n = 2 ** (6 + int(g["mel.example_scale"]))
    mel = (encodec.power_spectrogram(g["mel.x"], n).mT @ encodec.mel_filters(n, 32000, 64, torch.device("cpu"))).mT
    near("mel spectrogram", "original", mel[0], g["mel.example_lin"], 3e-5)


def test_codec_losses_are_those_with_a_weight():
    config = Config(sample_rate=16000, sc=1.0, msspec=0.0, l1=0.1)
    wav = noise(2, 1, 3000)
    same = encodec.codec_losses(config, wav, wav.clone())
    assert same.keys() == {"l1", "sc"} and same["l1"] == 0 and same["sc"] < 1e-6
    silence = encodec.codec_losses(config, wav, torch.zeros_like(wav))
    assert abs(float(silence["sc"]) - 5) < 1e-2  # |S_x - 0| / |S_x| at five scales
    back = torch.zeros(1, 1, 3000, requires_grad=True)
    losses = encodec.codec_losses(dataclasses.replace(config, msspec=1.0), torch.zeros(1, 1, 3000), back)
    sum(losses.values()).backward()
    assert back.grad.isfinite().all()  # silence against silence


def test_adversarial_losses_agree_with_the_original():
    g = golden("codec_losses.npz")
    sides = {}
    for side in ("fake", "real"):
        logits = [g[f"adv.{side}.logits{i}"] for i in range(3)]
        sides[side] = logits, [[g[f"adv.{side}.fmap{i}_{j}"] for j in range(3)] for i in range(3)]
    losses = encodec.generator_losses(sides["fake"], sides["real"])
    near("adversarial losses", "original", losses["adv"], g["adv.gen_loss"], 1e-5)
    near("adversarial losses", "original", losses["feat"], g["adv.feat_loss"], 1e-5)
    near("adversarial losses", "original", encodec.discriminator_loss(sides["fake"], sides["real"]), g["adv.disc_loss"], 1e-5)


def test_discriminator_agrees_with_the_original():
    g = golden("msstftd.npz")
    windows = tuple(g["win_lengths"].tolist())
    assert windows == tuple(g["n_ffts"].tolist()) == tuple(4 * h for h in g["hop_lengths"].tolist())
    judge = encodec.MultiScaleSTFTDiscriminator(Config(disc_filters=int(g["filters"]), disc_windows=windows))
    state = old_names(judge.state_dict())
    theirs = {name: name.replace("last.", "conv_post.").rsplit(".", 1) for name in state}
    judge.load_state_dict({name: g["state." + ".conv.".join(theirs[old])]
                           for name, old in zip(judge.state_dict(), state)})
    logits, maps = judge(g["wav"])
    for i in range(2):
        near("discriminator, logits", "original", logits[i], g[f"logits{i}"], 2e-5)
        assert [list(m.shape) for m in maps[i]] == g[f"fmap{i}.shapes"].tolist()
        near("discriminator, feature maps", "original", torch.stack([m.mean() for m in maps[i]]), g[f"fmap{i}.means"], 2e-5)
        near("discriminator, feature maps", "original", maps[i][0][:1], g[f"fmap{i}.first"], 2e-5)
        near("discriminator, feature maps", "original", maps[i][-1], g[f"fmap{i}.last"], 2e-5)


@pytest.mark.parametrize("prefix", ["bal", "bal_whole"])
def test_balancer_agrees_with_the_original(prefix):
    g = golden("codec_losses.npz")
    names = ("adv", "feat", "l1", "msspec")
    weights = {name: float("%.6g" % g[f"{prefix}.{name}.weight"]) for name in names}
    balancer = encodec.Balancer(weights, 0.999, per_item=bool(g[f"{prefix}.per_batch_item"]))
    for i in range(3):
        y = g[f"{prefix}.y"][i].requires_grad_()
        losses = {name: g[f"{prefix}.{name}.scale"] * (y - g[f"{prefix}.{name}.target"][i]).square().mean()
                  for name in names}
        total = balancer.backward(losses, y)
        near("balancer, gradients", "original", y.grad, g[f"{prefix}.grad"][i], 1e-5)
        near("balancer, loss", "original", total, g[f"{prefix}.effective_loss"][i], 1e-5)
        restored = encodec.Balancer(weights, 0.999)
        restored.load_state_dict(balancer.state_dict())


def test_balancer_of_two_processes_sends_what_one_with_the_joint_batch_would(monkeypatch):
    y, target = noise(1, 1, 40), noise(1, 1, 40, seed=1)

    def gradient(items):
        both = y.expand(items, -1, -1).clone().requires_grad_()
        encodec.Balancer({"l1": 1.0}).backward({"l1": (both - target).abs().mean()}, both)
        return both.grad.sum(0)
    joint = gradient(items=2)
    monkeypatch.setattr(encodec, "process_count", lambda: 2)
    monkeypatch.setattr(encodec.dist, "all_reduce", lambda norm: norm.mul_(2))  # the other has the same item
    torch.testing.assert_close(gradient(items=1), joint)  # the mean over two processes of this


def test_demo_runs():
    def call(*files):
        return subprocess.run([sys.executable, "encodec.py", *files], cwd=ROOT, capture_output=True, text=True)
    done = call()
    assert done.returncode == 0 and "codes    (1, " in done.stdout and not done.stderr
    done = call("absent.wav")
    assert done.returncode == 2 and "absent.wav" in done.stderr and "Traceback" not in done.stderr
