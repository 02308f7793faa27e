"""Every fast way against the plain one: kernels.c, weights in fewer bits, the passes of the optimizer.

    python -m pytest tests/test_speed.py
"""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import encodec as E
import lm as L
from checkpoints import precision as Q
from config import Config
from data import obedience
from data.audio import read_audio
from data.measures import si_snr
from sample import MusicGen

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "tiny"
SMALL = dict(dim=48, num_heads=3, num_layers=2, n_q=4, card=20, t5="bytes", t5_dim=16, t5_layers=1, t5_heads=2, sample_rate=8000,
             ratios=(8, 5, 4), radix2_exp=9, segment_duration=0.5)
KINDS = {
    "melody": {}, "text": dict(text="cross", melody="none"), "no prefix": dict(text="none", melody="none"),
    "rope": dict(positional_embedding="sin_rope"), "normed": dict(qk_layer_norm=True), "heads of 72": dict(dim=144, num_heads=2),
    "heads of 64": dict(dim=128, num_heads=2), "too odd": dict(dim=36, num_heads=3)}
needs_kernels = pytest.mark.skipif(not Q.kernels(), reason="no C compiler")


def make(**options) -> L.LMModel:
    torch.manual_seed(0)
    return L.LMModel(Config(**SMALL | options)).eval()


def next_logits(lm, passes, codes, new_cache):
    """Logits (B, K, S, V) of codes read step by step."""
    sequence, _ = lm.pattern.build(codes, lm.special)
    cache = new_cache(passes[0])
    with torch.inference_mode():
        return torch.cat([lm(sequence[..., s:s + 1], passes[0], cache) for s in range(sequence.shape[-1])], 2)


def cache_of(lm, kind, batch, steps):
    return lambda c: kind(lm.config, batch, steps + (0 if c.prefix is None else c.prefix.shape[1]), "cpu", lm.heads.weight.dtype)


# --- decoding -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compiler", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_in_float32_are_those_of_the_plain_way(kind, compiler, monkeypatch):
    """Texts of several lengths, so that a prefix or a condition has padding; alone and in a batch."""
    lm, texts, T = make(**KINDS[kind]), ["slow flute and a drum", None, "organ"], 8
    if not compiler:
        monkeypatch.setattr(Q, "kernels", lambda: None)
    passes = L.condition_passes(lm, texts, T)
    expected = L.generate(lm, passes, T, [0, 1, 2], temperature=0)
    Q.quicken(lm)
    assert torch.equal(L.generate(lm, passes, T, [0, 1, 2], temperature=0), expected)
    alone = L.generate(lm, L.condition_passes(lm, texts[:1], T), T, [0], temperature=0)
    assert torch.equal(alone, expected[:1])


@needs_kernels
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.int8, 4e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_cached_steps_are_near_those_of_the_plain_way(kind, dtype, tolerance):
    lm, T = make(**KINDS[kind]), 10
    passes = L.condition_passes(lm, ["slow flute and a drum", None], T, guidance=1)
    codes = torch.randint(lm.config.card, (2, 4, T), generator=torch.Generator().manual_seed(1))
    expected = lm(lm.pattern.build(codes, lm.special)[0], passes[0]).detach()
    Q.quicken(lm, dtype)
    quick = lm.config.dim // lm.config.num_heads % 8 == 0
    steps = next_logits(lm, passes, codes, cache_of(lm, Q.QuickCache if quick else L.Cache, 2, T + 4) if quick else
                        lambda c: L.Cache(lm.config, 2, 99, "cpu", torch.float32))
    assert (steps - expected).norm() < tolerance * expected.norm()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_product_is_that_of_the_rounded_weights_and_does_not_depend_on_other_rows(dtype, rows):
    generator = torch.Generator().manual_seed(0)
    layer = Q.QuickLinear(torch.randn(20, 40, generator=generator), torch.float32)
    weight, layer.scale = layer.weight, None
    if dtype == torch.int8:
        layer.weight, layer.scale = Q.quantize_rows(weight)
        weight = layer.weight * layer.scale[:, None]
    else:
        layer.weight = weight = weight.to(dtype)
    x = torch.randn(rows, 1, 40, generator=generator)
    torch.testing.assert_close(layer(x), x @ weight.float().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x, slice(8, 16)), x @ weight[8:16].float().T, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x)[:1], layer(x[:1]))


@pytest.mark.slow   # the compiler needs a minute
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.int8])
def test_compiled_layers_give_the_same_tokens(dtype):
    """Plain, and with quick products; eight frames, so that the first steps and the later ones are compiled."""
    lm, texts, T = make(), ["slow flute and a drum", None], 8
    if dtype is not None:
        Q.quicken(lm, dtype)
    passes = L.condition_passes(lm, texts, T)
    expected = L.generate(lm, passes, T, [0, 1], temperature=0)
    lm.compile_layers()
    assert torch.equal(L.generate(lm, passes, T, [0, 1], temperature=0), expected)


# --- the codec ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, dict(causal=True), dict(pad_mode="reflect"), dict(channels=2, lstm=0), dict(n_residual_layers=2, true_skip=False),
    dict(norm="time_group_norm")], ids=str)
@pytest.mark.parametrize("L", [1, 7, 40, 2345])
def test_a_folded_codec_is_the_same(options, L, monkeypatch):
    """The products with frames against torch's convolutions; the last length in pieces. It is saved as it was."""
    monkeypatch.setattr(E, "PIECE", 8)
    config = Config(**dict(task="codec", n_filters=8, dimension=16, card=32, ratios=(5, 4), kmeans_init=False,
                           pad_mode="constant") | options)
    codec, folded = (E.EncodecModel(config).eval() for _ in "ab")
    folded.load_state_dict(codec.state_dict())
    folded.fold()
    wav = torch.randn(2, codec.channels, L)
    codes = codec.encode(wav)
    with torch.no_grad():
        torch.testing.assert_close(folded.encoder(wav), codec.encoder(wav), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.decode(codes), codec.decode(codes), rtol=1e-4, atol=1e-4)
    saved = folded.state_dict()
    weights = {name: m.weight for name, m in codec.named_modules() if isinstance(m, (torch.nn.Conv1d, torch.nn.ConvTranspose1d))}
    assert all(torch.allclose(saved[f"{name}.weight"], weight) for name, weight in weights.items())
    assert not any("packed" in name for name in saved)


def test_the_shipped_codec_in_bfloat16():
    """At least 35 dB above its error, and nearly the same codes."""
    plain, half = (E.EncodecModel.from_pretrained(SHIPPED).fold(dtype) for dtype in (torch.float32, torch.bfloat16))
    codes = plain.encode(read_audio(SHIPPED.parent.parent / "assets" / "ode_to_joy.wav", plain.sample_rate, 1, duration=2.0)[None])
    wav = plain.decode(codes)
    assert si_snr(wav, half.decode(codes)).min() > 35
    assert (half.encode(wav) == plain.encode(wav)).float().mean() > 0.95


# --- weights in fewer bits ------------------------------------------------------------------------------------------

def test_rows_of_an_int8_file_are_kept_and_written_again(tmp_path):
    from safetensors.torch import load_file
    lm = L.LMModel.from_pretrained(SHIPPED, torch.int8)
    stored = load_file(SHIPPED / "model.safetensors")
    assert torch.equal(lm.layers[0].attn.qkv.weight, stored["layers.0.attn.qkv.weight"])
    lm.save(tmp_path, compact=True)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype and torch.allclose(again[name].float(), tensor.float(), rtol=1e-3), name


@pytest.mark.parametrize("file", ["ours", "compact", "transformers"])
def test_int8_is_made_of_every_format(tmp_path, file):
    """The same rows as rounding the loaded model would give."""
    if file == "transformers":
        from test_transformers import reference
        reference(tmp_path, "melody")
    else:
        make().save(tmp_path, compact=file == "compact")
    plain, lm = L.LMModel.from_pretrained(tmp_path, torch.float32), L.LMModel.from_pretrained(tmp_path, torch.int8)
    for name, module in plain.named_modules():
        if isinstance(module, L.Projection):
            weight, scale = Q.quantize_rows(module.weight)
            assert torch.equal(lm.get_submodule(name).weight, weight)
            torch.testing.assert_close(lm.get_submodule(name).scale, scale, rtol=1e-5, atol=0)
    assert torch.equal(lm.emb.weight, plain.emb.weight)


@torch.inference_mode()
def cross_entropy(lm, texts, codes):
    """Mean over the codes (B, K, T), read step by step as generation does, through its cache."""
    lm = lm.eval()
    T = codes.shape[-1]
    passes = L.condition_passes(lm, texts, T, guidance=1)
    quick = isinstance(lm.heads, Q.QuickLinear) and Q.kernels()
    steps = cache_of(lm, Q.QuickCache, len(codes), T + 4) if quick else (
        lambda c: L.Cache(lm.config, len(codes), 2048, "cpu", torch.float32))
    logits, mask = lm.pattern.revert_logits(next_logits(lm, passes, codes, steps), T)
    return L.codebook_cross_entropy(logits, codes, mask).mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_quality_of_the_shipped_model_in_fewer_bits(dtype):
    """Within 0.5 % of float32, weights and cache, on music of test tunes, which training never saw."""
    model = MusicGen.from_pretrained(SHIPPED, "cpu", dtype)
    plain = L.LMModel.from_pretrained(SHIPPED, torch.float32)
    truths, mixes, _ = zip(*(obedience.clip(model.config, "test", n) for n in range(4)))
    codes = model.codec.encode(torch.from_numpy(np.stack(mixes))[:, None])[..., :100]
    texts = [obedience.caption(truth, np.random.default_rng(0)) for truth in truths]
    assert abs(cross_entropy(model.lm, texts, codes) / cross_entropy(plain, texts, codes) - 1) < 0.005


def test_auto_takes_what_the_machine_is_fast_with(monkeypatch):
    cpu = torch.device("cpu")
    for compiler, hardware, best in ((True, False, "int8"), (None, True, "int8"), (None, False, "float32")):
        monkeypatch.setattr(Q, "kernels", lambda: compiler)
        monkeypatch.setattr(Q, "has_bfloat16", lambda: hardware)
        assert Q.pick_dtype("auto", cpu) == best and Q.pick_dtype("bfloat16", cpu) == "bfloat16"


@pytest.mark.parametrize("S", [1, 128, 300])
def test_attention_in_blocks_is_causal_attention(S):
    """Its output and gradients are as near to those in float64 as those of torch's attention in bfloat16."""
    q, k, v, grad = torch.randn(4, 2, 3, S, 16).bfloat16()

    def run(attend, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad.to(dtype))
    found, peers, right = run(Q.BlockAttention.apply, torch.bfloat16), run(L.causal, torch.bfloat16), run(L.causal, torch.float64)
    for ours, theirs, exact in zip(found, peers, right):
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-3 * exact.norm() + 1e-6


def test_layers_for_training_have_the_gradients_of_plain_ones():
    """In float32 nearly the same; in bfloat16 as near to them as the plain way in bfloat16 comes."""
    codes = torch.randint(20, (2, 4, 40))
    chroma, has_melody = torch.rand(2, 3, 12), torch.tensor([True, False])

    def gradients(quick, dtype):
        lm = make(dim=64, num_heads=2).train()
        if quick:
            Q.quicken_training(lm, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, _ = lm.loss(codes, ["a flute", None], chroma, has_melody)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in [lm.heads.weight, *lm.layers.parameters()]])
    right, exact, peer, ours = (gradients(*what) for what in (
        (False, "float32"), (True, "float32"), (False, "bfloat16"), (True, "bfloat16")))
    assert (exact - right).norm() < 1e-5 * right.norm()
    assert 0 < (ours - right).norm() < 1.3 * (peer - right).norm() < 0.1 * right.norm()


def test_without_a_compiler_there_are_no_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(Q.shutil, "which", lambda name: "/nowhere/cc")
    assert Q.kernels.__wrapped__() is None and not list(tmp_path.rglob("*.so*"))


# --- the optimizer --------------------------------------------------------------------------------------------------

@needs_kernels
def test_a_step_of_d_adaptation_in_one_pass_is_that_of_its_formulas(monkeypatch):
    """Weights of several sizes, one of them more than a block of kernels.c; gradients of zero at first."""
    import train
    def run():
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((3,), (40, 500), (7, 5))]
        optimizer = train.DAdaptAdam(weights, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(12):
            for p in weights:
                p.grad = torch.randn(p.shape, generator=generator) * (step > 0)
            optimizer.step()
        return optimizer.param_groups[0]["d"], *weights
    found = run()
    monkeypatch.setattr(train, "kernels", lambda: None)
    for x, y in zip(found, run()):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
