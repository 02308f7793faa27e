"""Conditioners: null conditions, the four ways into the language model, padding, and T5.

    python -m pytest tests/test_conditioners.py
"""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from checkpoints.files import shapes_only
from checkpoints.small_t5 import SmallT5
from checkpoints.t5 import LISTED, SMALL_T5, small_t5
from conditioners import Conditioners, Conditions, T5Conditioner, null_melody, padding_last
from config import Config
from lm import LMModel

TINY = Config(dim=16, num_heads=2, num_layers=1, t5="bytes", t5_dim=16, t5_heads=2, sample_rate=8000,
              ratios=(8, 5, 4), radix2_exp=9, segment_duration=0.25)
M = TINY.chroma_frames


def conditioners(**options):
    torch.manual_seed(0)
    return Conditioners(dataclasses.replace(TINY, **options)).eval()


def melody(pitch_class):
    """Chroma (M, Q) of one held note."""
    return F.one_hot(torch.full((M,), pitch_class), 12).float()


# --- null conditions --------------------------------------------------------------------------------------

@torch.no_grad()
def test_null_text_is_zeros_of_the_length_it_replaces():
    c = conditioners()
    frames, mask, _ = c.text(["abc", "", None])
    assert mask.sum(1).tolist() == [4, 1, 1] and (frames[1:] == 0).all() and (frames[0] != 0).any(1).all()
    both = c({"text": ["abc", ""], "melody": [melody(1), melody(2)]}, guidance=True)
    assert both.prefix.shape[0] == both.batch == 4
    assert torch.equal(both.prefix_mask[:2], both.prefix_mask[2:])
    assert (both.prefix[2:] == 0).all() and (both.prefix[:2, :M] != 0).any()


@torch.no_grad()
def test_both_null_melodies():
    """Training: zeros. Audiocraft's wrapper for generation: one-hot C in every frame, projected."""
    proj = torch.nn.Linear(12, 16)
    chroma, given = torch.stack([melody(5), melody(5)]), torch.tensor([True, False])
    zeros, c = (null_melody(proj, chroma, given, kind) for kind in ("zeros", "c"))
    assert (zeros[1] == 0).all() and torch.equal(c[0], zeros[0])
    torch.testing.assert_close(c[1], proj(melody(0)))
    torch.testing.assert_close(zeros[0], proj(chroma[0]))
    for kind in ("zeros", "c"):     # where no item has one, too, at the length of training
        conditions = conditioners(null_melody=kind, text="none")({"text": [None], "melody": [None]})
        assert conditions.prefix.shape[1] == conditions.prefix_length == M and conditions.prefix_mask.all()
        assert bool((conditions.prefix == 0).all()) == (kind == "zeros")


@torch.no_grad()
def test_melodies_may_lie_anywhere():
    """FSDP moves a batch to the device before it is used, everybody else leaves that to the conditioner."""
    c = conditioners(text="none").to("meta")
    for where in "cpu", "meta":
        assert c({"text": [None] * 2, "melody": [melody(1).to(where), None]}).prefix.device.type == "meta"


@torch.no_grad()
def test_guidance_is_the_items_and_then_the_items_without_conditions():
    texts, melodies = ["abc", None], [None, melody(4)]
    for options in ({}, dict(text="cross"), dict(text="sum", melody="interpolate"), dict(null_melody="c")):
        c = conditioners(**options)
        both = c({"text": texts, "melody": melodies}, 9, guidance=True)
        alone = c({"text": texts, "melody": melodies}, 9)
        without = c({"text": [None] * 2, "melody": [None] * 2}, 9)
        for name in ("prefix", "cross", "added"):
            found, items, null = (getattr(conditions, name) for conditions in (both, alone, without))
            if found is not None:
                torch.testing.assert_close(found[:2], items)
                n = null.shape[1]       # the null text of the doubled batch is longer, by zeros
                torch.testing.assert_close(found[2:, :n], null)
                assert (found[2:, n:] == 0).all()


def test_no_condition_at_all():
    conditions = conditioners(text="none", melody="none")({"text": ["abc"], "melody": [None]})
    assert conditions == Conditions() and conditions.batch == 1 and conditions.prefix_length == 0


# --- the ways into the model ------------------------------------------------------------------------------

@torch.no_grad()
def test_fusion():
    conditions = {"text": ["abc", "de"], "melody": [melody(3), melody(4)]}
    c = conditioners()
    text, wave = c.text(conditions["text"]), c.melody(conditions["melody"])
    prepended = c(conditions)
    torch.testing.assert_close(prepended.prefix, torch.cat([wave.values, text.values], 1))   # melody first
    assert torch.equal(prepended.prefix_mask, torch.cat([wave.mask, text.mask], 1))
    assert prepended.cross is None and prepended.added is None
    crossed = conditioners(text="cross")(conditions)
    assert crossed.prefix.shape[1] == M
    torch.testing.assert_close(crossed.cross, text.values)
    assert torch.equal(crossed.cross_mask, text.mask)
    summed = conditioners(text="sum", melody="none")(conditions)
    means = torch.stack([text.values[0, :4].mean(0), text.values[1, :3].mean(0)])
    torch.testing.assert_close(summed.added, means[:, None])
    c = conditioners(text="none", melody="interpolate")
    stretched, wave = c(conditions, 23), c.melody(conditions["melody"]).values
    expected = F.interpolate(wave.transpose(1, 2), 23).transpose(1, 2)          # as audiocraft does it
    torch.testing.assert_close(stretched.added, expected)


def test_a_melody_has_the_time_of_its_music_and_a_text_comes_before():
    prefix = conditioners()({"text": ["abc"], "melody": [melody(3)]})
    columns = TINY.hop / TINY.stride
    assert prefix.prefix_time.tolist() == pytest.approx([m * columns for m in range(M)] + [-1, -2, -3, -4])


# --- padding ----------------------------------------------------------------------------------------------

def test_padding_moves_behind_and_every_frame_finds_its_way_back():
    """Random masks, the first of them full; three frames of music follow the prefix."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 7, generator=generator) < 0.6
    mask[0] = True
    x, angles = torch.randn(5, 10, 4, generator=generator), torch.randn(5, 10, 2, generator=generator)
    real = F.pad(mask, (0, 3), value=True)
    moved, moved_angles, way_back = padding_last(x, angles, mask)
    for item in range(5):
        count = int(real[item].sum())
        assert torch.equal(moved[item, :count], x[item, real[item]]), "what an item has, in its order"
        assert torch.equal(moved[item, count:], x[item, ~real[item]]), "then the padding"
        assert torch.equal(moved_angles[item, :count], angles[item, real[item]])
    assert torch.equal(moved.gather(1, way_back[..., None].expand_as(moved)), x)
    assert torch.equal(moved[0], x[0]) and padding_last(x, None, mask)[1] is None


# --- T5 ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(t5="bytes"), dict(t5="words", t5_words="slow flute drums 104")])
def test_small_t5s_read_as_the_tokenizer_that_is_exported_with_them(options):
    text = T5Conditioner(dataclasses.replace(TINY, **options)).eval()
    texts = ["A slow FLUTE, over drums (104 bpm)", "", "jazz at 104", "x" * 900, "slow " * 900]
    ids, mask = text.tokenize(texts)
    exported = text.tokenizer()(texts, return_tensors="pt", padding=True, truncation=True, max_length=512)
    if options["t5"] == "words":        # the exported one has a single token for all unknown words
        ids = torch.where((ids > 2) & (ids < LISTED), 2, ids)
    assert torch.equal(ids, exported["input_ids"]) and torch.equal(mask, exported["attention_mask"].bool())


def test_unknown_words_share_eight_entries():
    text = T5Conditioner(dataclasses.replace(TINY, t5="words", t5_words="slow flute")).eval()
    ids, _ = text.tokenize([" ".join(f"word{n}" for n in range(100)) + " slow flute"])
    assert set(ids[0, :100].tolist()) == set(range(2, LISTED)) and ids[0, 100:].tolist() == [10, 11, 1]
    first, again = text.tokenize(["xyzzy", "Xyzzy"])[0]
    assert torch.equal(first, again)


@pytest.mark.parametrize("t5", SMALL_T5)
def test_a_small_t5_that_is_read_computes_what_that_of_transformers_does(t5):
    config = dataclasses.replace(TINY, t5=t5, t5_words="slow flute drums 104", t5_layers=3)
    torch.manual_seed(0)
    trained = small_t5(config).eval()
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with shapes_only():
        read = small_t5(config).eval()
    assert type(read) is SmallT5 and type(trained) is not SmallT5
    assert list(read.state_dict()) == list(trained.state_dict())
    read.load_state_dict(trained.state_dict(), assign=True)
    ids = torch.randint(3, 7, (3, 300))     # longer than the distances that have a bias of their own
    mask = torch.ones_like(ids)
    mask[1, 40:] = mask[2, 1:] = 0
    with torch.no_grad():
        expected = trained(input_ids=ids, attention_mask=mask).last_hidden_state
        given = read(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(given[mask > 0], expected[mask > 0], atol=1e-4, rtol=1e-4)
    assert read.config.to_dict() == trained.config.to_dict()


@pytest.fixture
def pretrained_t5(tmp_path):
    """A directory of transformers with a T5 encoder and its tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    words = {"<pad>": 0, "</s>": 1, "flute": 2, "slow": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "t5")
    return str(tmp_path / "t5")


@pytest.mark.parametrize("finetune", [False, True])
def test_a_t5_is_frozen_or_trained_along(pretrained_t5, tmp_path, finetune):
    """t5_finetune: its weights are parameters, get gradients, and are saved; frozen, none of it."""
    torch.manual_seed(1)
    lm = LMModel(dataclasses.replace(TINY, t5=pretrained_t5, t5_finetune=finetune, melody="none"))
    text = lm.conditioner.text.train()
    output, mask, _ = text(["flute", None])
    output.square().sum().backward()
    assert text.proj.weight.grad.any() and mask.shape == (2, 1) and (output[1] == 0).all()
    if not finetune:
        assert not [name for name in lm.state_dict() if "t5" in name]
        assert not any(p.requires_grad for p in text.encoder().parameters())
        return
    assert text.t5.shared.weight.grad.any()
    text.eval()     # T5 has dropout
    with torch.no_grad():
        text.t5.shared.weight += 1
        changed = text(["flute"]).values
        lm.save(tmp_path / "saved")
        again = LMModel.from_pretrained(tmp_path / "saved").conditioner.text
        torch.testing.assert_close(again(["flute"]).values, changed)
        assert (changed - output[:1]).abs().max() > 0.01


@pytest.mark.parametrize("text", ["word " * 4000, "naïve ♪ 音楽", "\n\t\"'", "x"])
@torch.no_grad()
def test_any_text_is_taken(text):
    frames, mask, _ = conditioners().text([text])
    assert frames.isfinite().all() and mask.all() and frames.shape[1] <= 512
