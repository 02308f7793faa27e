"""What --eval asks for and how it measures what it gets: captions, out-of-domain recordings, classifiers.

    python -m pytest tests/test_adherence.py            # -m slow: trains the classifiers, a minute
"""
import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import load
from constants import ROOT
from data import render
from data.describe import WORDS
from encodec import EncodecModel
from evaluation import adherence, classifiers, clips
from evaluation.metrics import latent_vectors
from evaluation.notes import note_figures
from evaluation.waves import flatness, to_batch
from models import noise, tiny_codec
from sample import MusicGen

TINY = ROOT / "checkpoints" / "tiny"
CONFIG = dataclasses.replace(load([str(ROOT / "config" / "tiny.py")]), segment_duration=2.56)


def some_clips(config, split, count):
    """Truths and mixes (B, 1, L) of the first clips of a split."""
    asked = [clips.clip(config, split, n) for n in range(count)]
    return [clip.truth for clip in asked], to_batch([clip.mix for clip in asked])


def test_captions_say_tempo_and_drums_in_varied_words():
    rng, captions = np.random.default_rng(0), set()
    for n in range(40):
        truth = clips.clip(CONFIG, "test", n, 1.0).truth
        caption = clips.caption(truth, rng)
        captions.add(caption)
        assert any(word in caption.lower() for word in WORDS["instruments"][truth["instrument"]]), caption
        told = any(words in caption.lower() for words in WORDS["drums"])
        assert told or not truth["drums"], caption
    assert len(captions) == 40


def test_clips_of_the_test_split_are_of_test_tunes_alone_and_the_same_every_time():
    held_out = {tune.id for tune in render.tunes_of("test")}
    truths = [clips.clip(CONFIG, "test", n).truth for n in range(8)]
    assert {truth["tune"] for truth in truths} <= held_out
    assert len({truth["instrument"] for truth in truths}) > 2
    first, again = (clips.clip(CONFIG, "test", 3) for _ in range(2))
    assert first.truth == again.truth and np.array_equal(first.mix, again.mix)
    assert len(first.mix) == 2.56 * CONFIG.sample_rate


def test_the_notes_of_a_clip_are_those_that_are_played():
    """Heard in the melody alone; a clip with other drums or another instrument plays the same tune."""
    asked = clips.clip(CONFIG, "test", 1, seconds=5.0)
    changed = clips.clip(CONFIG, "test", 1, seconds=5.0, instrument="flute", drums=not asked.truth["drums"])
    for one in (asked, changed):
        assert note_figures([(one.melody, one.notes)], CONFIG.sample_rate)["notes_right"] > 0.9
    assert [(start, length) for start, length, _ in asked.notes] == [note[:2] for note in changed.notes]
    assert {(a[2] - b[2]) % 12 for a, b in zip(asked.notes, changed.notes)} == {0}
    assert changed.truth["instrument"] == "flute" and len(changed.mix) == 5.0 * CONFIG.sample_rate
    other = adherence.melody_for(CONFIG, "test", 1, asked.truth)
    assert len(other) == 2.56 * CONFIG.sample_rate and not np.array_equal(other, asked.melody[:len(other)])


def test_out_of_domain_recordings_have_the_notes_they_are_said_to_have():
    pieces = [clips.out_of_domain_recording(CONFIG, "test", n) for n in range(12)]
    for wave, _ in pieces:
        assert wave.dtype == np.float32 and 0.2 < np.abs(wave).max() <= 0.3 + 1e-6
    assert note_figures(pieces, CONFIG.sample_rate)["notes_right"] > 0.9


def test_the_share_of_notes_that_a_model_is_told_right():
    """Of melodies without accompaniment most; of the same against notes a semitone away, hardly any."""
    asked = [clips.clip(CONFIG, "test", n, instrument="trumpet") for n in range(3)]
    model = SimpleNamespace(config=CONFIG, sample_rate=CONFIG.sample_rate)
    model.melody_chroma = functools.partial(MusicGen.melody_chroma, model)
    assert adherence.notes_told(model, [(one.melody, one.notes) for one in asked]) > 0.95
    wrong = [(one.melody, [(*note[:2], note[2] + 1) for note in one.notes]) for one in asked]
    assert adherence.notes_told(model, wrong) < 0.2


def test_what_users_write_is_expected_to_be_what_it_says():
    """Each text is there once, and none asks for drums; what is expected exists, or is left out."""
    words = adherence.users_words()
    texts = [text for kind in words.values() for text, _ in kind]
    assert len(set(texts)) == len(texts) and not any("drum" in text for text in texts)
    for kind in adherence.OF_INSTRUMENTS:
        assert len(words[kind]) >= 10
        assert all(set(names) & set(render.INSTRUMENTS) for _, names in words[kind])
    unseen = {word for text, _ in words["unseen"] for word in text.split()} - {"a", "solo"}
    assert not unseen & set(CONFIG.t5_words.split())
    for _, (slowest, fastest) in words["tempo"] + words["product"]:
        assert 40 <= slowest < fastest <= 200
    assert len(words["tempo"]) >= 10 and len(words["product"]) >= 10


def test_noise_is_not_tonal_and_a_tone_is():
    t = torch.arange(16000) / 16000
    hiss = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    wavs = torch.stack([hiss, torch.sin(2 * torch.pi * 440 * t)])
    of_noise, of_tone = flatness(wavs[:, None]).tolist()
    assert of_noise > 0.4 and of_tone < 0.01


def test_a_wrong_caption_costs_the_shipped_model_something():
    model = MusicGen.from_pretrained(TINY)
    truths, mixes = some_clips(CONFIG, "valid", 8)
    codes = model.codec.encode(mixes)
    hidden, visible = (adherence.nll(model.lm, codes, ["flute"] * 8, hide) for hide in (True, False))
    assert hidden > visible > 0
    gain = adherence.caption_gain(model.lm, codes, truths)
    assert len(gain) == 6 and gain["caption_gain_instrument_codes_hidden"] > 50
    assert gain["caption_gain_instrument_codes_hidden"] > gain["caption_gain_tempo_codes_hidden"]


def test_latent_vectors_of_stereo_are_those_of_one_side():
    codec, stereo = tiny_codec(), noise(2, 2, 480)
    vectors = latent_vectors(codec, codec.encode(stereo))
    assert np.array_equal(vectors, latent_vectors(codec, codec.encode(stereo[:, :1])))
    assert vectors.shape == (2 * 480 // codec.stride, codec.config.dimension)


@pytest.mark.slow
def test_classifiers_are_right_about_real_clips(monkeypatch):
    monkeypatch.setattr(classifiers, "CLIPS", 500)
    monkeypatch.setattr(classifiers, "RECONSTRUCTED", 50)
    codec = EncodecModel.from_pretrained(TINY / "codec")
    config = dataclasses.replace(CONFIG, segment_duration=5.12)
    torch.manual_seed(0)
    trained = classifiers.train_classifiers(config, codec)
    truths, mixes = some_clips(config, "test", 60)
    right = classifiers.correct(trained, mixes, truths)
    shares = {name: values.float().mean().item() for name, values in right.items()}
    assert shares["instrument"] > 0.9 and shares["drums"] > 0.9 and shares["tempo"] > 0.6, shares
