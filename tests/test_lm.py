"""The language model against the original's numbers, and against itself.

    python -m pytest tests/test_lm.py
"""
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import lm as L
from checkpoints import formats
from conditioners import Conditions
from config import Config, UserError, _read_assignments, load
from deviations import near, same

GOLDEN = Path(__file__).parent / "golden"
TINY = Config(dim=32, num_heads=4, num_layers=2, n_q=4, card=16, t5="bytes", t5_dim=16, t5_heads=2, sample_rate=8000,
              ratios=(8, 5, 4), radix2_exp=9, segment_duration=0.5)


def arrays(name):
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def golden_model(z, prefix, text):
    config = dataclasses.replace(TINY, text=text, melody="none")
    lm = L.LMModel(config)
    table = {ours: parts for ours, parts in formats.name_table(lm, original=True).items() if "conditioner" not in ours}
    tensors = ((key[len(prefix + "state."):], value) for key, value in z.items() if key.startswith(prefix + "state."))
    packed = formats.pack(tensors, table, {n: t.shape for n, t in lm.state_dict().items()}, None, "golden")
    lm.load_state_dict(packed, strict=False)
    return lm.eval()


# --- golden numbers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["a", "b", "c"])
@torch.no_grad()
def test_logits_and_losses_are_the_originals(variant):
    """a: one prefix; b: cross-attention; c: melody and text in front, in that order."""
    z = arrays("transformer_lm.npz")
    lm = golden_model(z, "b." if variant == "b" else "a.", "cross" if variant == "b" else "prepend")
    if variant == "b":
        conditions = Conditions(cross=z["b.cond.description"])
    elif variant == "a":
        conditions = Conditions(prefix=z["a.cond.description"])
    else:
        fused = golden_fuse(z["c.cond.self_wav"], z["c.cond.description"])
        conditions = fused
    near("language model, logits", "original", lm(z["sequence"], conditions), z[f"{variant}.logits"], 2e-5)
    for keep in (0, 1):
        logits, mask = lm.compute_predictions(z["codes"], conditions, bool(keep))
        same("language model, mask", "original", mask.expand(2, -1, -1).long(), z[f"{variant}.keep{keep}.mask"])
        valid, expected = (torch.where(mask[None, ..., None], x, 0.0) for x in (logits, z[f"{variant}.keep{keep}.logits"]))
        near("language model, logits", "original", valid, expected, 2e-5)
        ce = L.codebook_cross_entropy(logits, z["codes"], mask)
        near("language model, cross-entropy", "original", ce, z[f"{variant}.keep{keep}.ce_per_codebook"], 1e-5)
        near("language model, cross-entropy", "original", ce.mean(), z[f"{variant}.keep{keep}.ce"].squeeze(), 1e-5)
        if keep:
            padded = L.codebook_cross_entropy(logits, z["codes"], mask & z["padding_mask"].bool())
            near("language model, cross-entropy", "original", padded, z[f"{variant}.keep1.ce_padded_per_codebook"], 1e-5)


def golden_fuse(melody, text):
    """Conditions by our own fusion, so that the order of the prefix is tested too."""
    from conditioners import Conditioners
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    return Conditioners(dataclasses.replace(TINY, text="prepend", melody="prepend")).fuse(text, mask, melody, 1)


@pytest.mark.parametrize("two_step", [False, True])
def test_greedy_tokens_are_the_originals(two_step):
    z = arrays("greedy.npz")
    lm = golden_model(z, "", "prepend")
    settings = dict(guidance=float(z["cfg_coef"]), temperature=0.0)

    def passes(conditional, null):
        null = null.expand(2, -1, -1)
        return [Conditions(prefix=conditional), Conditions(prefix=null)] if two_step else [
            Conditions(prefix=torch.cat([conditional, null]))]
    one = passes(z["cond"], z["null"])
    tokens = "language model, greedy tokens"
    same(tokens, "original", L.generate(lm, one, 20, [0, 1], **settings), z["codes"])
    same(tokens, "original", L.generate(lm, one, 20, [0, 1], prompt=z["prompt"], **settings), z["codes_prompt"])
    two = passes(torch.cat([z["cond"], z["two.cond2"]], 1), torch.cat([z["null"], z["two.null2"]]))
    same(tokens, "original", L.generate(lm, two, 20, [0, 1], **settings), z["two.codes"])


# --- our own invariants ---------------------------------------------------------------------------------------------

OPTIONS = [dict(), dict(positional_embedding="rope", qk_layer_norm=True), dict(positional_embedding="sin_rope"), dict(text="cross"), dict(melody="cross"),
           dict(text="sum", melody="interpolate"), dict(text="interpolate"), dict(melody="none", pattern="unroll"),
           dict(pattern="coarse_first"), dict(null_melody="c", pattern="parallel")]


def make(seed=0, **options):
    torch.manual_seed(seed)
    lm = L.LMModel(dataclasses.replace(TINY, **options)).eval()
    for parameter in lm.parameters():       # the initial weights are too small for conditions to matter
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return lm


def melody_of(lm, *classes):
    M = lm.config.chroma_frames
    return torch.stack([torch.nn.functional.one_hot(torch.full((M,), c), 12) for c in classes]).float()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_cached_steps_equal_the_plain_pass(options):
    """With texts of different lengths, so that the plain pass packs its rows and the cache masks them."""
    lm = make(**options)
    chroma = None if lm.config.melody == "none" else melody_of(lm, 0, 5)
    codes = torch.randint(16, (2, 4, 12))
    sequence, _ = lm.pattern.build(codes, lm.special)
    conditions = lm.conditioner(["a slow tune", "x"], chroma, None, sequence.shape[-1])
    full = lm(sequence, conditions)
    for first in (1, 5):
        cache = L.Cache(lm.config, 2, sequence.shape[-1] + 60, "cpu", torch.float32)
        parts = [lm(sequence[..., :first], conditions, cache)]
        parts += [lm(sequence[..., s:s + 1], conditions, cache) for s in range(first, sequence.shape[-1])]
        torch.testing.assert_close(torch.cat(parts, 2), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_never_changes_an_item(options):
    """Alone, or beside a longer text, with and without melodies: the same sampled tokens for the same seed."""
    lm = make(**options)
    melody = lm.config.melody != "none"
    texts = ["slow", None, "a much longer description of the music"]
    chroma = melody_of(lm, 7, 0, 2) if melody else None
    has = torch.tensor([True, False, True])
    steps, settings = 10, dict(top_k=5, guidance=3.0)

    def run(items):
        passes = L.condition_passes(lm, [texts[i] for i in items], steps, chroma[items] if melody else None,
                                    has[items] if melody else None, 3.0)
        return L.generate(lm, passes, steps, [40 + i for i in items], **settings)
    together = run([0, 1, 2])
    for i in range(3):
        assert torch.equal(run([i])[0], together[i]), texts[i]


def test_conditions_steer_the_tokens():
    """Two melodies a tritone apart, none, another text: four different results from one seed."""
    lm = make()
    results = []
    for text, chroma, has in (("flute", 9, True), ("flute", 3, True), ("flute", 3, False), ("organ", 9, True)):
        passes = L.condition_passes(lm, [text], 20, melody_of(lm, chroma), torch.tensor([has]), 3.0)
        results.append(tuple(L.generate(lm, passes, 20, [0], temperature=0).flatten().tolist()))
    assert len(set(results)) == 4


def test_guidance_one_is_conditional_zero_is_unconditional_and_two_steps_equal_one():
    lm = make()
    chroma, T = melody_of(lm, 4), 15

    def run(guidance, text="", given=True, two_step=False):
        # the null text is one frame; with a text of one token (its end) the lengths of the two passes agree
        passes = L.condition_passes(lm, [text], T, chroma, torch.tensor([given]), guidance, two_step)
        return L.generate(lm, passes, T, [0], guidance=guidance, temperature=0)
    conditional, unconditional = run(1), run(1, given=False)
    assert not torch.equal(conditional, unconditional)
    passes = L.condition_passes(lm, [""], T, chroma, torch.tensor([True]), 3.0)  # the doubled batch with coefficient 1
    assert torch.equal(L.generate(lm, passes, T, [0], guidance=1.0, temperature=0), conditional)
    assert torch.equal(run(0), unconditional)
    for guidance in (1.5, 3.0, 8.0):
        assert torch.equal(run(guidance), run(guidance, two_step=True))
    assert not torch.equal(run(3.0), run(30.0)) and not torch.equal(run(3.0, two_step=True), run(30.0, two_step=True))


def test_gradients_reach_both_projections_and_no_prefix_is_trained_on():
    lm = make().train()
    loss, ce = lm.loss(torch.randint(16, (2, 4, 12)), ["flute", None], melody_of(lm, 1, 2), torch.tensor([True, False]))
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
        loss, _ = lm.loss(torch.randint(16, (2, 4, 12)), ["flute", "long text"], melody_of(lm, 1, 2))
        loss.backward()
        losses.append((loss.item(), lm.layers[0].attn.qkv.weight.grad.clone()))
    assert losses[0][0] == losses[1][0]
    torch.testing.assert_close(losses[0][1], losses[1][1])


def test_sampling_draws_from_the_distribution_it_should():
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 8) * 2
    uniform = (torch.arange(4000) + 0.5).view(4000, 1) / 4000

    def frequencies(**settings):
        draws = L.sample(logits.expand(4000, 1, 8), uniform, **settings)
        return torch.bincount(draws.flatten(), minlength=8) / 4000
    expected = logits.flatten().softmax(0)
    torch.testing.assert_close(frequencies(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(frequencies(top_k=100), expected, rtol=0, atol=1e-3)  # more than there are: all
    torch.testing.assert_close(frequencies(temperature=2.0), (logits.flatten() / 2).softmax(0), rtol=0, atol=1e-3)
    top = expected.topk(3).indices
    kept = torch.zeros(8).index_put((top,), expected[top])
    torch.testing.assert_close(frequencies(top_k=3), kept / kept.sum(), rtol=0, atol=1e-3)
    p = float(expected.sort(descending=True).values[:2].sum()) + 1e-4     # needs the third entry to be reached
    torch.testing.assert_close(frequencies(top_p=p), kept / kept.sum(), rtol=0, atol=1e-3)
    for greedy in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-6)):
        assert (L.sample(logits.expand(4000, 1, 8), uniform, **greedy) == logits.argmax()).all()


def test_the_configurations_say_what_the_paper_says():
    """Number for number, in the file itself: config/melody.py leaves nothing of this to the defaults."""
    melody = _read_assignments("config/melody.py")
    expected = dict(
        task="lm", channels=1, sample_rate=32000, segment_duration=30.0,
        melody="prepend", n_chroma=12, radix2_exp=14, argmax=True, n_eval_wavs=100, melody_dropout=0.5,
        text="prepend", t5="t5-base", t5_finetune=False, word_dropout=0.2, merge_text_p=0.25, drop_desc_p=0.5, drop_other_p=0.5,
        cfg_dropout=0.2, cfg_coef=3.0, dim=1536, num_heads=24, num_layers=48, hidden_scale=4, positional_embedding="sin",
        n_q=4, card=2048, pattern="delay", delays=(0, 1, 2, 3), codec="facebook/encodec_32khz", n_filters=64, ratios=(8, 5, 4, 4),
        dimension=128, lstm=2, batch_size=192, epochs=500, updates_per_epoch=2000, optim="dadam", lr=1.0, betas=(0.9, 0.95), eps=1e-8,
        weight_decay=0.1, max_norm=1.0, ema_decay=0.99, ema_every=10, warmup=4000, lr_min_ratio=0.0, cycle_length=1.0,
        top_k=250, temperature=1.0)
    assert melody == expected | dict(out_dir="out/melody", dtype="bfloat16", checkpointing=True)
    resolved = load(["config/melody.py"])
    assert (resolved.hop, 2 ** resolved.radix2_exp, resolved.chroma_frames, resolved.stride, resolved.segment_frames) == (
        4096, 16384, 235, 640, 1500)
    text = load(["config/text.py"])
    differs = {key for key, value in dataclasses.asdict(text).items() if value != getattr(resolved, key)}
    assert differs == {"out_dir", "checkpointing", "melody", "text", "dim", "num_heads", "num_layers", "word_dropout", "cfg_dropout"}
    assert (text.melody, text.text, text.dim, text.num_heads, text.num_layers, text.word_dropout, text.cfg_dropout) == (
        "none", "cross", 1024, 16, 24, 0.3, 0.3)


def test_sizes_of_the_papers_models():
    """Language model with its projections 1.38 B; with T5-base (110 M) and the codec, 1.55 B."""
    from encodec import EncodecModel
    from conditioners import new_t5
    from transformers import T5Config
    config = load(["config/melody.py"])
    with torch.device("meta"):
        lm, codec = L.LMModel(config), EncodecModel(config)
        t5 = new_t5(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))
    count = sum(p.numel() for p in lm.parameters())
    assert count == 48 * (12 * 1536 ** 2 + 4 * 1536) + 2 * 1536 + 4 * 1536 * (2049 + 2048) + 1536 * (768 + 1 + 12 + 1)
    assert 1.38e9 < count < 1.39e9
    total = count + sum(p.numel() for m in (codec, t5) for p in m.parameters())
    assert 1.54e9 < total < 1.56e9


def test_saved_and_loaded_again(tmp_path):
    lm = make(melody="cross", qk_layer_norm=True)
    lm.save(tmp_path)
    again = L.LMModel.from_pretrained(tmp_path)
    assert again.config == lm.config
    for (name, a), (other, b) in zip(lm.state_dict().items(), again.state_dict().items()):
        assert name == other and torch.equal(a, b)
    (tmp_path / "config.json").write_text(dataclasses.replace(lm.config, num_layers=3).to_json())
    with pytest.raises(UserError, match="layers.2.norm1.weight"):
        L.LMModel.from_pretrained(tmp_path)


def test_compact_checkpoints_are_small_and_close(tmp_path):
    lm = make(positional_embedding="rope", qk_layer_norm=True)
    lm.save(tmp_path, compact=True)
    again = L.LMModel.from_pretrained(tmp_path, torch.float32)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.6 * sum(p.numel() for p in lm.parameters())
    for (name, a), b in zip(lm.state_dict().items(), again.state_dict().values()):
        assert b.dtype == torch.float32
        rows = a.abs().amax(-1, keepdim=True) if a.dim() == 2 else a.abs()
        assert ((a - b).abs() <= rows / 200 + 1e-6).all(), name


def test_history_dropout_hides_codes_in_training_alone():
    lm, codes = make(history_dropout=1.0), torch.randint(16, (64, 4, 12))
    chroma, has_melody = torch.rand(64, lm.config.chroma_frames, 12), torch.arange(64) % 2 == 1
    seen = []
    lm.embed = lambda sequence: seen.append(sequence) or L.LMModel.embed(lm, sequence)
    with torch.no_grad():
        for training in (True, False):
            lm.train(training).loss(codes), lm.loss(codes, None, chroma, has_melody), lm.loss(codes, None, chroma)
    alone, mixed, led = [(seen[n] != seen[n + 3]).any(1).float().mean(1) for n in range(3)]     # share hidden of each item
    assert (mixed[has_melody] == 0).float().mean() > 0.3 > (mixed[~has_melody] == 0).float().mean() and (led == 0).float().mean() > 0.3
    assert 0.5 < alone.mean() < 0.9 and alone.min() < 0.3 and (seen[0][seen[0] != seen[3]] == lm.special).all()
