"""Conditioning: null conditions, fusion, and the random draws of training.

    python -m pytest tests/test_conditioners.py
"""
import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conditioners import Conditioners, T5Conditioner, augment_description, drop_conditions, null_melody, word_dropout
from config import Config
from lm import LMModel

TINY = Config(dim=16, num_heads=2, num_layers=1, t5="bytes", t5_dim=16, t5_heads=2, sample_rate=8000, ratios=(8, 5, 4),
              radix2_exp=9, segment_duration=0.25)


def conditioners(**options):
    torch.manual_seed(0)
    return Conditioners(dataclasses.replace(TINY, **options)).eval()


def chroma(*classes):
    return F.one_hot(torch.tensor(classes)[:, None].expand(-1, TINY.chroma_frames), 12).float()


@torch.no_grad()
def test_null_text_is_zeros_of_the_length_it_replaces():
    c = conditioners()
    frames, mask = c.text(["abc", "", None])
    assert mask.sum(1).tolist() == [4, 1, 1] and (frames[1:] == 0).all() and (frames[0] != 0).any(1).all()
    both = c(["abc", ""], chroma(1, 2), guidance=True)
    M = TINY.chroma_frames
    assert both.prefix.shape[0] == 4 and torch.equal(both.prefix_mask[:2], both.prefix_mask[2:])
    assert (both.prefix[2:] == 0).all() and (both.prefix[:2, :M] != 0).any()


@torch.no_grad()
def test_both_null_melodies():
    """Training: zeros. The generation wrapper of the original: one-hot C in every frame, projected."""
    proj = torch.nn.Linear(12, 16)
    given, has = chroma(5, 5), torch.tensor([True, False])
    zeros, c = (null_melody(proj, given, has, kind) for kind in ("zeros", "c"))
    assert (zeros[1] == 0).all() and torch.equal(c[1], proj(chroma(0)[0]))
    assert torch.equal(zeros[0], proj(given[0])) and torch.equal(c[0], zeros[0])
    for kind in ("zeros", "c"):     # no melody at all is the null melody, at the length of training
        conditions = conditioners(null_melody=kind, text="none")([None])
        assert conditions.prefix.shape[1] == TINY.chroma_frames
        assert bool((conditions.prefix == 0).all()) == (kind == "zeros")


@torch.no_grad()
def test_fusion():
    texts, melody = ["abc", "de"], chroma(3, 4)
    c = conditioners()
    text, mask = c.text(texts)
    wave = c.melody(melody, torch.tensor([True, True]))
    prepended = c(texts, melody)
    torch.testing.assert_close(prepended.prefix, torch.cat([wave, text], 1))    # melody first, then text
    assert prepended.cross is None and prepended.added is None
    crossed = conditioners(text="cross")(texts, melody)
    assert crossed.prefix.shape[1] == wave.shape[1]
    torch.testing.assert_close(crossed.cross, text)
    assert torch.equal(crossed.cross_mask, mask)
    summed = conditioners(text="sum", melody="none")(texts)
    torch.testing.assert_close(summed.added, torch.stack([text[0, :4].mean(0), text[1, :3].mean(0)])[:, None])
    c = conditioners(text="none", melody="interpolate")
    stretched, wave = c(texts, melody, steps=23), c.melody(melody, torch.tensor([True, True]))
    expected = F.interpolate(wave.transpose(1, 2), 23).transpose(1, 2)          # the original's op
    torch.testing.assert_close(stretched.added, expected)


META = dict(description="A tune...", key="d minor", bpm=104.0, moods=["calm", "sad"], instrument="flute", title="Secret", genre=None)


def test_augmentation_follows_the_originals_rules():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(TINY, merge_text_p=0.25, drop_desc_p=0.5, drop_other_p=0.5)
    texts = [augment_description(META, config, rng) for _ in range(8000)]
    plain = sum(t == "A tune." for t in texts) / 8000
    lost = sum(t is None or not t.startswith("A tune.") for t in texts) / 8000
    assert abs(plain - (0.75 + 0.25 * 0.5 * 0.5 ** 4)) < 0.02 and abs(lost - 0.125) < 0.015
    merged = [t for t in texts if t and "bpm" in t]
    assert abs(len(merged) / 8000 - 0.125) < 0.015 and any("bpm: 104.0" in t for t in merged)
    assert any("moods: calm, sad" in t for t in texts if t) and not any("Secret" in t for t in texts if t)
    first = Counter(t.removeprefix("A tune. ").split(":")[0] for t in merged)
    assert len(first) == 4, "fields are shuffled"

    never = dataclasses.replace(config, merge_text_p=0.0)
    assert augment_description(META, never, rng) == "A tune..."         # switched off: untouched
    keep = dataclasses.replace(config, merge_text_p=1.0, drop_desc_p=0.0, drop_other_p=1.0)   # a probability of KEEPING
    assert set(augment_description(META, keep, rng).split(". ")[1:]) == {
        "key: d minor", "bpm: 104.0", "moods: calm, sad", "instrument: flute"}
    assert augment_description({}, keep, rng) is None
    assert augment_description(dict(description="Hey!"), config, np.random.default_rng(1)) == "Hey!."
    assert META["description"] == "A tune..."


def test_word_dropout():
    rng = np.random.default_rng(0)
    text = " ".join(map(str, range(1000)))
    kept = word_dropout(text, 0.3, rng).split(" ")
    assert abs(len(kept) - 700) < 50 and sorted(kept, key=int) == kept
    assert word_dropout(text, 0.0, rng) == text and word_dropout(None, 0.5, rng) is None
    assert word_dropout("all gone", 1.0, rng) is None


def test_condition_dropout_has_both_rates_and_follows_its_seed():
    config = dataclasses.replace(TINY, cfg_dropout=0.2, melody_dropout=0.5)

    def draws(seed, config=config):
        rng = np.random.default_rng(seed)
        return [drop_conditions("text", True, config, rng) for _ in range(8000)]
    texts, melodies = zip(*draws(0))
    assert abs(texts.count(None) / 8000 - 0.2) < 0.015
    assert abs(sum(melodies) / 8000 - 0.8 * 0.5) < 0.02
    assert all(text for text, melody in zip(texts, melodies) if melody), "all conditions are dropped together"
    assert draws(0) == draws(0) and draws(0) != draws(1)
    other = [t for t, _ in draws(0, dataclasses.replace(config, melody_dropout=0.0))]
    assert other == list(texts), "one rate does not change the other's outcome"
    assert drop_conditions("text", False, config, np.random.default_rng(0))[1] is False


def test_nothing_is_dropped_in_evaluation():
    """Batches of training (train.py) and of validation from the same tracks: only the former lose conditions."""
    from data.segments import TokenSegments
    data = TokenSegments.__new__(TokenSegments)
    data.config = dataclasses.replace(TINY, segment_duration=0.25, word_dropout=0.5, cfg_dropout=0.2, melody_dropout=0.5, merge_text_p=0.5)
    T, M = data.config.segment_frames, data.config.chroma_frames
    meta = dict(description="a slow and sad flute", key="d minor")
    track = dict(file="a", shard=0, codes_start=0, frames=T, chroma_start=0, chroma_frames=M, weight=1, meta=meta)
    data.tracks, data.sums, data.T, data.grid = [track, dict(track, file="b")], np.array([1.0, 2.0]), T, 10 ** 6
    data.shards = [(np.zeros((T, 4), np.uint16), np.full(M, 3, np.uint8))]
    for train in (False, True):
        items = [data.item(np.random.default_rng(n), train) for n in range(200)]
        texts, melodies = {item["text"] for item in items}, {bool(item["has_melody"]) for item in items}
        if train:
            assert len(texts) > 20 and None in texts and melodies == {False, True}
            again = [data.item(np.random.default_rng(n), train)["text"] for n in range(200)]
            assert again == [item["text"] for item in items], "the draws follow the seed"
        else:
            assert texts == {"a slow and sad flute"} and melodies == {True}


@pytest.mark.parametrize("options", [dict(t5="bytes"), dict(t5="words", t5_words="slow flute drums 104")])
def test_small_t5s_read_as_the_tokenizer_that_is_exported_with_them(options):
    text = T5Conditioner(dataclasses.replace(TINY, **options)).eval()
    texts = ["A slow FLUTE, over drums (104 bpm)", "", "jazz at 104", "x" * 900, "slow " * 900]
    ids, mask = text.tokenize(texts)
    theirs = text.tokenizer()(texts, return_tensors="pt", padding=True, truncation=True, max_length=512)
    assert torch.equal(ids, theirs["input_ids"]) and torch.equal(mask, theirs["attention_mask"].bool())
    with torch.no_grad():
        a, b, c = (text([words])[0] for words in ("jazz 104", "rock 104", "jazz flute"))
    assert torch.equal(a, b) == (options["t5"] == "words") and a.shape != c.shape or not torch.equal(a, c)


def test_a_t5_is_frozen_or_trained_along(tmp_path):
    """t5_finetune: its weights are parameters, get gradients, and are saved; frozen, none of it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "flute": 2, "slow": 3}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(tmp_path / "t5")
    for finetune in (False, True):
        torch.manual_seed(1)
        lm = LMModel(dataclasses.replace(TINY, t5=str(tmp_path / "t5"), t5_finetune=finetune, melody="none"))
        text = lm.conditioner.text.train()
        output, mask = text(["flute", None])
        output.square().sum().backward()
        assert text.proj.weight.grad.any() and mask.shape == (2, 1) and (output[1] == 0).all()
        if finetune:
            assert text.t5.shared.weight.grad.any()
            text.eval()     # T5 has dropout
            with torch.no_grad():
                text.t5.shared.weight += 1
                changed = text(["flute"])[0]
            lm.save(tmp_path / "saved")
            again = LMModel.from_pretrained(tmp_path / "saved").conditioner.text
            with torch.no_grad():
                torch.testing.assert_close(again(["flute"])[0], changed)
                assert (changed - output[:1]).abs().max() > 0.01
        else:
            assert not [name for name in lm.state_dict() if "t5" in name]
            assert not any(p.requires_grad for p in text.encoder().parameters())


@pytest.mark.parametrize("text", ["word " * 4000, "naïve ♪ 音楽", "\n\t\"'", "x"])
@torch.no_grad()
def test_any_text_is_taken(text):
    frames, mask = conditioners().text([text])
    assert frames.isfinite().all() and mask.all() and frames.shape[1] <= 512
