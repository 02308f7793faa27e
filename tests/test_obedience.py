"""What --eval asks for and how it judges what it hears: captions, recordings by other means, the judges themselves.

    python -m pytest tests/test_obedience.py            # -m slow: trains the judges, a minute
"""
import dataclasses

import numpy as np
import pytest
import torch

from chroma import chroma_agreement
from config import load
from data import obedience, tunes
from data.measures import chroma_of

CONFIG = dataclasses.replace(load(["config/tiny.py"]), segment_duration=2.56)


def test_captions_say_tempo_and_backing_in_varied_words():
    rng, said = np.random.default_rng(0), []
    for n in range(40):
        truth = obedience.clip(CONFIG, "test", n)[0]
        said.append(obedience.caption(truth, rng))
        assert str(truth["bpm"]) in said[-1] and any(w in said[-1].lower() for w in tunes.INSTRUMENTS[truth["instrument"]].words)
        assert any(w in said[-1] for w in tunes.BACKING[truth["drums"], truth["bass"]])
    assert len(set(said)) == 40


def test_clips_of_the_test_split_are_of_test_tunes_alone_and_the_same_every_time():
    held_out = {tune.id for tune in tunes.split("test")}
    truths = [obedience.clip(CONFIG, "test", n)[0] for n in range(8)]
    assert {truth["tune"] for truth in truths} <= held_out and len({truth["instrument"] for truth in truths}) > 2
    first, again = (obedience.clip(CONFIG, "test", 3) for _ in range(2))
    assert first[0] == again[0] and np.array_equal(first[1], again[1]) and len(first[1]) == 2.56 * CONFIG.sample_rate


def test_recordings_by_other_means_have_the_notes_they_are_said_to_have():
    agreement = []
    for n in range(16):
        wave, flute = obedience.by_other_means(CONFIG, "test", n)
        assert wave.shape == flute.shape and wave.dtype == np.float32 and 0.2 < np.abs(wave).max() <= 0.3 + 1e-6
        a, b = (chroma_of(CONFIG, torch.from_numpy(w)[None, None]) for w in (wave, flute))
        agreement.append(chroma_agreement(a, b))
    assert np.mean(agreement) > 0.8


def test_noise_is_not_tonal_and_a_tone_is():
    t = torch.arange(16000) / 16000
    wavs = torch.stack([torch.randn(16000, generator=torch.Generator().manual_seed(0)), torch.sin(2 * torch.pi * 440 * t)])
    noise, tone = obedience.flatness(wavs[:, None]).tolist()
    assert noise > 0.4 and tone < 0.01


def test_a_wrong_caption_costs_the_shipped_model_something():
    from sample import MusicGen
    model = MusicGen.from_pretrained("checkpoints/tiny")
    truths, mixes, _ = zip(*(obedience.clip(CONFIG, "valid", n) for n in range(8)))
    codes = model.codec.encode(torch.from_numpy(np.stack(mixes))[:, None])
    assert obedience.surprise(model.lm, codes, ["flute"] * 8, hide=True) > obedience.surprise(model.lm, codes, ["flute"] * 8, hide=False) > 0
    worth = obedience.worth(model, codes, list(truths))
    assert len(worth) == 6 and worth["nats a clip that its instrument is worth, codes hidden"] > 50
    assert worth["nats a clip that its instrument is worth, codes hidden"] > worth["nats a clip that its tempo is worth, codes hidden"]


@pytest.mark.slow
def test_judges_are_right_about_real_clips(monkeypatch):
    from encodec import EncodecModel
    monkeypatch.setattr(obedience, "CLIPS", 500)
    monkeypatch.setattr(obedience, "RECONSTRUCTED", 50)
    codec = EncodecModel.from_pretrained("checkpoints/tiny/codec")
    config = dataclasses.replace(CONFIG, segment_duration=5.12)
    torch.manual_seed(0)
    judges = obedience.train_judges(config, codec)
    truths, mixes, _ = zip(*(obedience.clip(config, "test", n) for n in range(60)))
    heard = obedience.right(judges, torch.from_numpy(np.stack(mixes))[:, None], truths)
    assert heard["instrument"] > 0.9 and heard["drums"] > 0.9 and heard["tempo"] > 0.6, heard
