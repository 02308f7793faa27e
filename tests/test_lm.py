"""The language model against audiocraft's numbers, and against itself.

    python -m pytest tests/test_lm.py
"""
import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config

import lm as L
from checkpoints.files import current_name
from checkpoints.t5 import new_t5
from conditioners import Conditioners, Conditions, Frames
from config import load
from constants import ROOT
from deviations import golden, near, same
from encodec import EncodecModel
from models import OPTIONS, TINY, conditions_of, make, model_of_audiocraft, prefix_of
from speed import optimize_for_cpu
from speed.decoding import PackedLMModel
from speed.kernels import kernels
from system.errors import UserError


# --- audiocraft's numbers ---------------------------------------------------------------------------------

def conditions_of_audiocraft(g, variant):
    text = g[f"{variant}.cond.description"]
    if variant == "a":
        return prefix_of(text)
    if variant == "b":
        return Conditions(cross=text)
    return in_front(g["c.cond.self_wav"], text)


def in_front(melody, text):
    """Projected frames (B, n, D) of both, as our own conditioners put them in front: their order is ours."""
    def frames(values):
        n = values.shape[1]
        return Frames(values, torch.ones(len(values), n, dtype=torch.bool), torch.arange(n))
    conditioners = Conditioners(dataclasses.replace(TINY, text="prepend", melody="prepend"))
    conditioners.melody.forward = lambda melodies: frames(melody)
    conditioners.text.forward = lambda texts: frames(text)
    return conditioners({"text": [None] * len(text), "melody": [None] * len(text)})


@pytest.mark.parametrize("variant", ["a", "b", "c"])
@torch.no_grad()
def test_logits_and_losses_are_those_of_audiocraft(variant):
    """a: one prefix; b: cross-attention; c: melody and text in front, in that order."""
    g = golden("transformer_lm")
    weights, way = ("b.", "cross") if variant == "b" else ("a.", "prepend")
    lm = model_of_audiocraft(g, weights, way)
    conditions = conditions_of_audiocraft(g, variant)
    logits = lm(g["sequence"], conditions)
    near("language model, logits", "audiocraft", logits, g[f"{variant}.logits"], 2e-5)
    for keep in (0, 1):
        kept = {key.removeprefix(f"{variant}.keep{keep}."): value for key, value in g.items()}
        logits, mask = lm.compute_predictions(g["codes"], conditions, bool(keep))
        same("language model, mask", "audiocraft", mask.expand(2, -1, -1).long(), kept["mask"])
        valid, expected = (torch.where(mask[None, ..., None], x, 0.0) for x in (logits, kept["logits"]))
        near("language model, logits", "audiocraft", valid, expected, 2e-5)
        ce = L.codebook_cross_entropy(logits, g["codes"], mask)
        near("language model, cross-entropy", "audiocraft", ce, kept["ce_per_codebook"], 1e-5)
        near("language model, cross-entropy", "audiocraft", ce.mean(), kept["ce"].squeeze(), 1e-5)
        if keep:
            ce = L.codebook_cross_entropy(logits, g["codes"], mask & g["padding_mask"].bool())
            near("language model, cross-entropy", "audiocraft", ce, kept["ce_padded_per_codebook"], 1e-5)


# --- the forward pass against itself ----------------------------------------------------------------------

def some_input(lm, texts=("a slow tune", "x"), classes=(0, 5), T=12):
    """Columns (B, K, S) of random codes, and the conditions of as many texts and notes."""
    codes = torch.randint(lm.config.card, (len(texts), 4, T), generator=torch.Generator().manual_seed(1))
    sequence, _ = lm.pattern.build(codes, lm.special)
    return sequence, lm.conditioner(conditions_of(lm, texts, classes), sequence.shape[-1])


def column_by_column(lm, sequence, conditions, first=1):
    """Logits of the column `first` and later ones: read through a cache, those up to it at once."""
    B, _, S = sequence.shape
    cache = lm.new_cache(B, S + conditions.prefix_length)
    parts = [lm(sequence[..., :first], conditions, cache)]
    parts += [lm(sequence[..., s:s + 1], conditions, cache) for s in range(first, S)]
    assert (cache.length, cache.columns) == (S + conditions.prefix_length, S)
    return torch.cat(parts, 2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_cached_columns_equal_the_plain_pass(options):
    """With texts of different lengths, so that the plain pass packs its rows and the cache masks them."""
    lm = make(**options)
    sequence, conditions = some_input(lm)
    full = lm(sequence, conditions)
    for first in (1, 5):
        found = column_by_column(lm, sequence, conditions, first)
        torch.testing.assert_close(found, full[:, :, first - 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not kernels(), reason="no C compiler")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.inference_mode()
def test_the_packed_model_equals_the_plain_one(options):
    """speed/decoding.py, weights in float32: all at once, and column by column through its own cache."""
    lm = make(**options)
    packed = optimize_for_cpu(copy.deepcopy(lm), torch.float32)
    assert type(packed) is PackedLMModel and packed.packed and not lm.packed
    sequence, conditions = some_input(lm)
    full = lm(sequence, conditions)
    torch.testing.assert_close(packed(sequence, conditions), full, rtol=1e-4, atol=1e-4)
    for first in (1, 5):
        found = column_by_column(packed, sequence, conditions, first)
        torch.testing.assert_close(found, full[:, :, first - 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_the_logits_of_a_batch_are_those_of_its_items_alone(options):
    """In float32, whatever the padding: of a short, a missing and a long text, with and without a melody."""
    lm = make(**options)
    texts, classes = ("slow", None, "a much longer description of the music"), (7, None, 2)
    sequence, conditions = some_input(lm, texts, classes)
    together = lm(sequence, conditions)
    for i in range(3):
        _, alone = some_input(lm, texts[i:i + 1], classes[i:i + 1])
        found = lm(sequence[i:i + 1], alone)
        torch.testing.assert_close(found, together[i:i + 1], rtol=1e-5, atol=2e-5)


# --- the loss ---------------------------------------------------------------------------------------------

def test_gradients_reach_both_projections_and_no_prefix_is_trained_on():
    lm = make().train()
    conditions = conditions_of(lm, ["flute", None], [1, None])
    loss, ce = lm.loss(torch.randint(16, (2, 4, 12)), conditions)
    loss.backward()
    assert lm.conditioner.text.proj.weight.grad.abs().sum() > 0
    assert lm.conditioner.melody.proj.weight.grad.abs().sum() > 0
    assert ce.shape == (4,) and torch.isfinite(ce).all()
    torch.testing.assert_close(ce.mean(), loss.detach())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in lm.parameters())


def test_activation_checkpointing_changes_nothing():
    losses = []
    for checkpointing in (False, True):
        lm = make(checkpointing=checkpointing).train()
        torch.manual_seed(1)
        loss, _ = lm.loss(torch.randint(16, (2, 4, 12)), conditions_of(lm, ["flute", "long text"], [1, 2]))
        loss.backward()
        losses.append((loss.item(), lm.layers[0].attn.qkv.weight.grad.clone()))
    assert losses[0][0] == losses[1][0]
    torch.testing.assert_close(losses[0][1], losses[1][1])


def test_early_frames_weigh_more_in_training_alone():
    """early_seconds = 0.1: five frames of 50 a second."""
    lm, codes = make(early_weight=4.0, early_seconds=0.1), torch.randint(16, (2, 4, 12))
    conditions = conditions_of(lm, ["flute", None], [1, None])
    with torch.no_grad():
        encoded = lm.conditioner(conditions)
        logits, mask = lm.compute_predictions(codes, encoded)
        weight = torch.tensor([4.0] * 5 + [1.0] * 7)
        for training, expected in ((True, L.codebook_cross_entropy(logits, codes, mask, weight)),
                                   (False, L.codebook_cross_entropy(logits, codes, mask))):
            loss, ce = lm.train(training).loss(codes, conditions)
            torch.testing.assert_close(ce, expected)
            torch.testing.assert_close(loss, expected.mean())


def test_history_dropout_hides_codes_in_training_alone():
    """From most columns of the items that are hit: all of them here, half of those with a melody."""
    lm, codes, seen = make(history_dropout=1.0), torch.randint(16, (64, 4, 12)), []
    has_melody = torch.arange(64) % 2 == 1
    lm.embed = lambda sequence: seen.append(sequence) or L.LMModel.embed(lm, sequence)
    with torch.no_grad():
        for training in (True, False):
            lm.train(training)
            for given in (torch.zeros(64), has_melody, torch.ones(64)):
                lm.loss(codes, conditions_of(lm, [None] * 64, [3 if some else None for some in given]))
    # the share of each item's columns that is hidden
    alone, mixed, led = [(seen[n] != seen[n + 3]).any(1).float().mean(1) for n in range(3)]
    untouched = (mixed == 0).float()
    assert untouched[has_melody].mean() > 0.3 > untouched[~has_melody].mean()
    assert (led == 0).float().mean() > 0.3
    assert 0.5 < alone.mean() < 0.9 and alone.min() < 0.3
    assert (seen[0][seen[0] != seen[3]] == lm.special).all()


# --- sizes and files --------------------------------------------------------------------------------------

def test_sizes_of_the_papers_models():
    """Language model with its projections 1.38 B; with T5-base (110 M) and the codec, 1.55 B."""
    config = load([str(ROOT / "config" / "melody.py")])
    with torch.device("meta"):
        lm, codec = L.LMModel(config), EncodecModel(config)
        t5 = new_t5(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))
    count = sum(p.numel() for p in lm.parameters())
    layers, embeddings = 48 * (12 * 1536 ** 2 + 4 * 1536), 4 * 1536 * (2049 + 2048)
    assert count == layers + 2 * 1536 + embeddings + 1536 * (768 + 1 + 12 + 1)
    assert 1.38e9 < count < 1.39e9
    total = count + sum(p.numel() for m in (codec, t5) for p in m.parameters())
    assert 1.54e9 < total < 1.56e9


def equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_saved_and_loaded_again(tmp_path):
    lm = make(melody="cross", qk_layer_norm=True)
    lm.save(tmp_path)
    again = L.LMModel.from_pretrained(tmp_path)
    assert again.config == lm.config and equal_weights(lm, again)
    (tmp_path / "config.json").write_text(dataclasses.replace(lm.config, num_layers=3).to_json())
    with pytest.raises(UserError, match="layers.2.norm1.weight"):
        L.LMModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("compact", [False, True])
def test_files_with_former_names_load(tmp_path, compact):
    """heads. is lm_heads. today, and layers.N.cross. is layers.N.cross_attn., also beside a scale."""
    make(text="cross").save(tmp_path, compact)
    expected, path = L.LMModel.from_pretrained(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(path)
    former = {name.replace("lm_heads.", "heads.").replace(".cross_attn.", ".cross."): tensor
              for name, tensor in tensors.items()}
    assert {"heads.weight", "layers.1.cross.qkv.weight"} <= former.keys() - tensors.keys()
    save_file(former, path)
    assert equal_weights(L.LMModel.from_pretrained(tmp_path), expected)


class Scaled(L.LMModel):
    """A language model with a parameter of its own beside a matrix, named as the scale of quantized rows."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_heads.scale = nn.Parameter(torch.rand(len(self.lm_heads.weight)))
        self.emb.scale = nn.Parameter(torch.rand(4, 8))


@pytest.mark.parametrize("compact", [False, True])
def test_a_parameter_named_scale_is_no_scale_of_rows(tmp_path, compact):
    lm = Scaled(make().config)
    lm.save(tmp_path, compact)
    again = Scaled.from_pretrained(tmp_path, torch.float32)
    for name in ("lm_heads.scale", "lm_heads.weight", "emb.scale"):
        a, b = lm.state_dict()[name], again.state_dict()[name]
        torch.testing.assert_close(a, b, rtol=1e-3 if compact else 0, atol=0.01 if compact else 0)


def test_a_parameter_named_scale_is_refused_in_int8(tmp_path):
    Scaled(make(dim=64, num_heads=2).config).save(tmp_path)
    with pytest.raises(UserError, match="lm_heads.scale.*rename"):
        Scaled.from_pretrained(tmp_path, torch.int8, optimize_for_cpu)


def test_current_names():
    for former, current in (("heads.weight", "lm_heads.weight"),
                            ("average.heads.weight", "average.lm_heads.weight"),
                            ("layers.3.cross.out.weight", "layers.3.cross_attn.out.weight"),
                            ("m.layers.12.cross.q_norm.bias", "m.layers.12.cross_attn.q_norm.bias")):
        assert current_name(former) == current_name(current) == current
    for name in make(text="cross", qk_layer_norm=True).state_dict():
        assert current_name(name) == name


def test_compact_checkpoints_are_small_and_close(tmp_path):
    lm = make(positional_embedding="rope", qk_layer_norm=True)
    lm.save(tmp_path, compact=True)
    again = L.LMModel.from_pretrained(tmp_path, torch.float32)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.6 * sum(p.numel() for p in lm.parameters())
    for (name, a), b in zip(lm.state_dict().items(), again.state_dict().values(), strict=True):
        assert b.dtype == torch.float32
        rows = a.abs().amax(-1, keepdim=True) if a.dim() == 2 else a.abs()
        assert ((a - b).abs() <= rows / 200 + 1e-6).all(), name
