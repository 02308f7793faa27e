"""What --eval asks for and how it measures what it gets: captions, out-of-domain recordings, classifiers.

    python -m pytest tests/test_adherence.py            # -m slow: trains the classifiers, a minute
"""
import dataclasses

import numpy as np
import pytest
import torch

from config import load
from constants import ROOT
from data import render
from encodec import EncodecModel
from evaluation import adherence
from evaluation.metrics import chroma_agreement, chroma_of, latent_vectors
from models import noise, tiny_codec
from sample import MusicGen

TINY = ROOT / "checkpoints" / "tiny"
CONFIG = dataclasses.replace(load([str(ROOT / "config" / "tiny.py")]), segment_duration=2.56)


def clips(config, split, count):
    """Truths and mixes (B, 1, L) of the first clips of a split."""
    truths, mixes, _ = zip(*(adherence.clip(config, split, n) for n in range(count)))
    return list(truths), torch.from_numpy(np.stack(mixes))[:, None]


def test_captions_say_tempo_and_backing_in_varied_words():
    rng, captions = np.random.default_rng(0), set()
    for n in range(40):
        truth = adherence.clip(CONFIG, "test", n)[0]
        caption = adherence.caption(truth, rng)
        captions.add(caption)
        words = render.INSTRUMENTS[truth["instrument"]].words
        backing = render.BACKING[truth["drums"], truth["bass"]]
        assert str(truth["bpm"]) in caption
        assert any(word in caption.lower() for word in words), caption
        assert any(words in caption for words in backing), caption
    assert len(captions) == 40


def test_clips_of_the_test_split_are_of_test_tunes_alone_and_the_same_every_time():
    held_out = {tune.id for tune in render.tunes_of("test")}
    truths = [adherence.clip(CONFIG, "test", n)[0] for n in range(8)]
    assert {truth["tune"] for truth in truths} <= held_out
    assert len({truth["instrument"] for truth in truths}) > 2
    first, again = (adherence.clip(CONFIG, "test", 3) for _ in range(2))
    assert first[0] == again[0] and np.array_equal(first[1], again[1])
    assert len(first[1]) == 2.56 * CONFIG.sample_rate


def test_out_of_domain_recordings_have_the_notes_they_are_said_to_have():
    agreement = []
    for n in range(16):
        wave, flute = adherence.out_of_domain_recording(CONFIG, "test", n)
        assert wave.shape == flute.shape and wave.dtype == np.float32
        assert 0.2 < np.abs(wave).max() <= 0.3 + 1e-6
        a, b = (chroma_of(CONFIG, torch.from_numpy(w)[None, None]) for w in (wave, flute))
        agreement.append(chroma_agreement(a, b))
    assert np.mean(agreement) > 0.8


def test_noise_is_not_tonal_and_a_tone_is():
    t = torch.arange(16000) / 16000
    hiss = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    wavs = torch.stack([hiss, torch.sin(2 * torch.pi * 440 * t)])
    of_noise, of_tone = adherence.flatness(wavs[:, None]).tolist()
    assert of_noise > 0.4 and of_tone < 0.01


def test_a_wrong_caption_costs_the_shipped_model_something():
    model = MusicGen.from_pretrained(TINY)
    truths, mixes = clips(CONFIG, "valid", 8)
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
    monkeypatch.setattr(adherence, "CLIPS", 500)
    monkeypatch.setattr(adherence, "RECONSTRUCTED", 50)
    codec = EncodecModel.from_pretrained(TINY / "codec")
    config = dataclasses.replace(CONFIG, segment_duration=5.12)
    torch.manual_seed(0)
    classifiers = adherence.train_classifiers(config, codec)
    truths, mixes = clips(config, "test", 60)
    correct = adherence.accuracy(classifiers, mixes, truths)
    assert correct["instrument"] > 0.9 and correct["drums"] > 0.9 and correct["tempo"] > 0.6, correct
