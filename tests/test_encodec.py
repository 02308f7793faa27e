"""The codec against audiocraft's numbers and transformers' classes; shapes, streams, gradients.

    python -m pytest tests/test_encodec.py
"""
import math
import runpy
import sys

import pytest
import torch

import encodec
from commands import command, refused, worked
from config import Config
from constants import ROOT
from deviations import golden, near, same
from encodec import EncodecModel
from models import CODEC_STYLES, codec_of_transformers, noise, tiny_codec
from system.errors import UserError


def worst(a, b):
    """Largest deviation, relative to the largest value of the array."""
    return float((a - b).abs().max() / b.abs().max())


# --- audiocraft's numbers ---------------------------------------------------------------------------------

XP = """
sample_rate: {c.sample_rate}
channels: 1
compression_model: encodec
encodec: {{autoencoder: seanet, quantizer: rvq, sample_rate: '${{sample_rate}}', channels: '${{channels}}',
  causal: {c.causal}, renormalize: false}}
seanet: {{dimension: {c.dimension}, channels: '${{channels}}', causal: '${{encodec.causal}}',
  n_filters: {c.n_filters}, n_residual_layers: 1, ratios: {r}, activation: ELU, norm: weight_norm,
  kernel_size: 7, residual_kernel_size: 3, last_kernel_size: 7, dilation_base: 2, pad_mode: {c.pad_mode},
  true_skip: true, compress: 2, lstm: 2, disable_norm_outer_blocks: 0, decoder: {{trim_right_ratio: 1.0,
  final_activation: null}}, encoder: {{}}}}
rvq: {{n_q: {c.n_q}, bins: {c.card}}}
"""


def write_checkpoint_of_audiocraft(g: dict, path) -> Config:
    """Writes the codec in tests/golden as audiocraft would -> its configuration."""
    numbers = {key: int(g[name]) for key, name in dict(
        sample_rate="sample_rate", n_q="n_q", n_filters="n_filters", dimension="dimension", card="bins",
        lstm="lstm_layers").items()}
    config = Config(task="codec", ratios=tuple(g["ratios"].tolist()), causal=bool(g["causal"]),
                    pad_mode="reflect" if g["pad_reflect"] else "constant", **numbers)
    state = {key.removeprefix("state."): value for key, value in g.items() if key.startswith("state.")}
    xp = XP.format(c=config, r=list(config.ratios))
    torch.save({"best_state": state, "xp.cfg": xp, "version": "1"}, path)
    return config


@pytest.mark.parametrize("name", ["encodec", "encodec_causal"])
def test_format_and_numbers_of_audiocraft(name, tmp_path):
    g = golden(name)
    config = write_checkpoint_of_audiocraft(g, tmp_path / "compression_state_dict.bin")
    codec = EncodecModel.from_pretrained(tmp_path)
    for key in ("sample_rate", "ratios", "n_q", "causal", "pad_mode", "true_skip"):
        assert getattr(codec.config, key) == getattr(config, key), key
    for folded in (False, True):
        codec = codec.fold() if folded else codec
        for prefix in ("", "short_"):
            wav, codes, decoded = g[prefix + "wav"], g[prefix + "codes"], g[prefix + "decoded"]
            near("codec, latents", "audiocraft", codec.encoder(wav), g[prefix + "latent"], 2e-5)
            same("codec, codes", "audiocraft", codec.encode(wav), codes)
            near("codec, decoded wave", "audiocraft", codec.decode(codes), decoded, 3e-5)
        near("codec, quantized latents", "audiocraft", codec.latents(g["codes"]), g["quantized"], 1e-6)
        near("codec, decoded wave", "audiocraft", codec(g["wav"])[0], g["forward_trimmed"], 3e-5)


# --- transformers' classes --------------------------------------------------------------------------------

@pytest.mark.parametrize("style", CODEC_STYLES)
def test_equals_transformers(style, tmp_path):
    reference = codec_of_transformers(**CODEC_STYLES[style])
    reference.save_pretrained(tmp_path)
    codec = EncodecModel.from_pretrained(tmp_path)
    folded = EncodecModel.from_pretrained(tmp_path).fold()
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
def test_bandwidth_chooses_the_codebooks_that_transformers_takes(bandwidth, n_q, tmp_path):
    reference = codec_of_transformers(target_bandwidths=[1.0, 2.0, 4.0])
    reference.save_pretrained(tmp_path)
    codec = EncodecModel.from_pretrained(tmp_path, bandwidth=bandwidth)
    assert codec.num_codebooks == codec.config.n_q == n_q
    wav = noise(1, 1, 250)
    codes = reference.encode(wav, bandwidth=bandwidth or 4.0).audio_codes[0]
    assert torch.equal(codec.encode(wav), codes)
    codec.save(tmp_path / "ours")
    assert torch.equal(EncodecModel.from_pretrained(tmp_path / "ours").encode(wav), codes)
    assert torch.equal(EncodecModel.from_pretrained(tmp_path, n_q=n_q).encode(wav), codes)


@pytest.mark.parametrize("choice", [
    dict(bandwidth=24.0), dict(bandwidth=0.1), dict(n_q=5), dict(n_q=0)], ids=str)
def test_bandwidth_out_of_reach(choice, tmp_path):
    codec_of_transformers(**CODEC_STYLES["32 kHz"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="1 to 4 codebooks"):
        EncodecModel.from_pretrained(tmp_path, **choice)


# --- shapes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {}, dict(causal=True, pad_mode="reflect"), dict(lstm=0, true_skip=False),
    dict(channels=2, n_residual_layers=2), dict(ratios=(5,)), dict(ratios=(1, 3))], ids=str)
@pytest.mark.parametrize("L", [1, 2, 23, 24, 25, 100])
def test_any_length(changes, L):
    codec = tiny_codec(**changes)
    wav = noise(2, codec.channels, L)
    codes = codec.encode(wav)
    assert codes.shape == (2, 3, math.ceil(L / codec.stride)) and codes.dtype == torch.long
    assert codec.latents(codes).shape == (2, 8, codes.shape[-1])
    assert codec.decode(codes).shape == (2, codec.channels, codes.shape[-1] * codec.stride)
    reconstruction, again, _ = codec(wav)
    assert reconstruction.shape == wav.shape and torch.equal(again, codes)


def test_fewer_codebooks_are_the_first_ones():
    codec = tiny_codec()
    wav = noise(1, 1, 100)
    assert torch.equal(codec.encode(wav, n_q=2), codec.encode(wav)[:, :2])
    assert torch.equal(codec(wav, n_q=2)[1], codec.encode(wav)[:, :2])
    assert codec.decode(codec.encode(wav, n_q=2)).shape == (1, 1, 120)


def test_causal_frames_do_not_see_the_future():
    codec = tiny_codec(causal=True)
    wav = noise(1, 1, 240)
    late = wav.clone()
    late[..., 121:] += 1
    assert torch.equal(codec.encoder(wav)[..., :5], codec.encoder(late)[..., :5])
    assert not torch.equal(codec.encoder(wav)[..., 5:], codec.encoder(late)[..., 5:])


def test_mono_codec_interleaves_stereo():
    codec = tiny_codec()
    wav = noise(2, 2, 100)
    codes = codec.encode(wav)
    assert codes.shape == (2, 6, 5)
    for side in (0, 1):
        assert torch.equal(codes[:, side::2], codec.encode(wav[:, side:side + 1]))
        torch.testing.assert_close(codec.decode(codes)[:, side], codec.decode(codes[:, side::2])[:, 0])


@pytest.mark.parametrize("shape", [(1, 3, 50), (1, 1, 0), (50,)])
def test_waves_that_no_codec_takes(shape):
    with pytest.raises(UserError):
        tiny_codec().encode(torch.zeros(shape))


@pytest.mark.parametrize("codes", [
    torch.full((1, 3, 4), 16), torch.full((1, 3, 4), -1), torch.zeros(1, 3, 0, dtype=torch.long),
    torch.zeros(1, 5, 4, dtype=torch.long)], ids=["too large", "negative", "none", "too many codebooks"])
def test_codes_that_no_codec_takes(codes):
    with pytest.raises(UserError):
        tiny_codec().decode(codes)


# --- training ---------------------------------------------------------------------------------------------

def test_training_pass_has_gradients_everywhere():
    codec = tiny_codec(kmeans_iters=50).train()
    wav = noise(2, 1, 240)
    reconstruction, codes, commit = codec(wav)
    ((reconstruction - wav).square().mean() + commit).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in codec.parameters())
    reconstruction, codes, commit = codec(wav, quantize=False)
    assert codes is None and commit == 0 and reconstruction.shape == wav.shape


# --- long audio -------------------------------------------------------------------------------------------

STREAMED = [{}, dict(causal=True, pad_mode="reflect", true_skip=False, lstm=2),
            dict(pad_mode="reflect", n_residual_layers=3, lstm=0, ratios=(5, 3)),
            dict(channels=2, ratios=(1, 4), last_kernel_size=5)]


@pytest.mark.parametrize("changes", STREAMED, ids=str)
@pytest.mark.parametrize("piece, frames", [(7, 40), (13, 27), (40, 200)])
@torch.no_grad()
def test_pieces_give_what_the_whole_gives(changes, piece, frames, monkeypatch):
    codec = tiny_codec(**changes)
    latents = noise(1, 8, frames)
    for extra in (0, 1, codec.stride - 1):
        wav = noise(1, codec.channels, frames * codec.stride - extra)
        parts = list(encodec.stream(codec.encoder, iter(wav.split(piece * codec.stride, -1))))
        assert len(parts) > 1 and worst(torch.cat(parts, -1), codec.encoder(wav)) < 1e-5
        parts = list(encodec.stream(codec.decoder, iter(latents.split(piece, -1))))
        assert len(parts) > 1 and worst(torch.cat(parts, -1), codec.decoder(latents)) < 1e-5
        monkeypatch.setattr(encodec, "PIECE", 10 ** 9)
        codes = codec.encode(wav)
        whole = codec.decode(codes)
        monkeypatch.setattr(encodec, "PIECE", piece)
        assert torch.equal(codec.encode(wav), codes)
        assert worst(codec.decode(codes), whole) < 1e-5


def test_pieces_are_longer_on_a_gpu():
    """There all items of a batch together have GPU_PIECE frames, but each at least PIECE."""
    for batch, frames in (1, encodec.GPU_PIECE), (4, encodec.GPU_PIECE // 4), (100, encodec.PIECE):
        assert encodec.frames_of_a_piece(torch.zeros(batch, 1, 9, device="meta")) == frames
    assert encodec.frames_of_a_piece(torch.zeros(1, 1, 9)) == encodec.PIECE


@pytest.mark.parametrize("changes", STREAMED, ids=str)
def test_streams_of_codes_and_waves(changes):
    """In pieces of all sizes, also of less than a frame."""
    codec = tiny_codec(**changes)
    wav = noise(2, codec.channels, 60 * codec.stride - 1)
    codes = codec.encode(wav)
    lengths = [1, 5 * codec.stride, 3, 20 * codec.stride + 1, 7]
    pieces = wav.split([*lengths, wav.shape[-1] - sum(lengths)], -1)
    parts = list(codec.encode_stream(iter(pieces)))
    assert len(parts) > 1 and torch.equal(torch.cat(parts, -1), codes)
    parts = list(codec.decode_stream(iter(codes.split([1, 30, 2, 27], -1))))
    assert len(parts) > 1 and worst(torch.cat(parts, -1), codec.decode(codes)) < 1e-5


@torch.no_grad()
def test_a_norm_over_all_time_comes_at_the_end():
    codec = tiny_codec(norm="time_group_norm")
    wav = noise(1, 1, 900)
    codes = codec.encode(wav)
    assert torch.equal(torch.cat(list(codec.encode_stream(iter(wav.split(50, -1)))), -1), codes)
    parts = list(codec.decode_stream(iter(codes.split(7, -1))))
    assert len(parts) == 1 and worst(parts[0], codec.decoder(codec.latents(codes))) < 1e-5


@pytest.mark.parametrize("changes", STREAMED, ids=str)
@torch.no_grad()
def test_look_ahead_is_what_the_decoder_needs_and_no_more(changes):
    """A frame that changes is heard in the `look_ahead` frames before it and none earlier."""
    codec, n, codes = tiny_codec(**changes), 30, torch.zeros(1, 3, 40, dtype=torch.long)
    latents = noise(1, 8, 40)
    changed = latents.clone()
    changed[..., n] += 1
    differ = (codec.decoder(latents) != codec.decoder(changed)).any(1)[0]
    assert int(differ.nonzero()[0]) // codec.stride == n - codec.look_ahead
    assert codec.look_ahead == 0 or not codec.config.causal
    pieces = codec.decode_stream(iter(codes.split([20, 1, 1, 18], -1)))
    lengths = [next(pieces).shape[-1] // codec.stride for _ in range(3)]
    assert lengths == [20 - codec.look_ahead, 1, 1], "a frame is given as soon as it can be known"


def test_stereo_in_pieces():
    codec = tiny_codec()
    codes = codec.encode(noise(3, 2, 60 * codec.stride))
    left, right = codec.decode(codes[:, 0::2]), codec.decode(codes[:, 1::2])
    wav = torch.cat(list(codec.decode_stream(iter(codes.split(9, -1)))), -1)
    assert wav.shape[:2] == (3, 2) and worst(wav, torch.cat([left, right], 1)) < 1e-5


# --- the demo ---------------------------------------------------------------------------------------------

def script(argv):
    """`python encodec.py ARGUMENTS`"""
    sys.argv = ["encodec.py", *argv]
    runpy.run_path(str(ROOT / "encodec.py"), run_name="__main__")


def test_demo():
    done = command(script)
    worked(done)
    assert "codes    (1, " in done.out and not done.err
    refused(command(script, "absent.wav"), "absent.wav")
