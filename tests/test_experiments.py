"""The experiments of docs/experiments.md: the patch fits the code, and the scripts measure what they say.

    python -m pytest tests/test_experiments.py
"""
import dataclasses
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from config import load
from constants import ROOT
from evaluation import classifiers
from experiments import argmax, guidance
from sample import Settings

EXPERIMENTS = ROOT / "tests" / "experiments"
CONFIG = dataclasses.replace(load([str(ROOT / "config" / "tiny.py")]), segment_duration=1.28)


@pytest.mark.skipif(shutil.which("git") is None, reason="patches are applied with git")
def test_the_patch_hides_as_many_codes_with_a_melody_as_without(tmp_path):
    shutil.copy(ROOT / "lm.py", tmp_path)
    # a patch that no longer fits is made anew by hand: the code it changes has moved
    environment = {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PATH": "/usr/bin:/bin"}
    subprocess.run(["git", "apply", EXPERIMENTS / "history.patch"], cwd=tmp_path, check=True, env=environment)
    before, after = (path.read_text().splitlines() for path in (ROOT / "lm.py", tmp_path / "lm.py"))
    (old, new), = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    conditions = {"melody": [None, torch.zeros(1)]}
    assert eval(old.partition(" = ")[2], {}, {"conditions": conditions}) == [1.0, 0.5]
    assert eval(new.partition(" = ")[2], {}, {"conditions": conditions}) == [1.0, 1.0]


def test_whole_chroma_tells_what_one_hot_chroma_hides():
    """Of two instruments with the same tunes: overtones are in the one, and not in the other."""
    generator = torch.Generator().manual_seed(0)
    tune = torch.randint(12, (200, 16), generator=generator)
    instrument = torch.randint(2, (200,), generator=generator)
    note = torch.nn.functional.one_hot(tune, 12).float()
    chroma = note + note.roll(7, -1) * torch.tensor([0.2, 0.6])[instrument, None, None]
    assert torch.equal(argmax.one_hot(chroma), note)
    shares = []
    for form in (chroma, argmax.one_hot(chroma)):
        train, test = (form[:100], instrument[:100]), (form[100:], instrument[100:])
        shares.append(argmax.share_right(train, test, updates=100))
    assert shares[0] > 0.85 and shares[1] < 0.7, shares


def test_argmax_says_how_often_the_instrument_is_told(capsys):
    argmax.main(["--clips", "8", "--updates", "2"])
    assert capsys.readouterr().out.count("instrument right: ") == 3


def test_each_strength_of_guidance_is_used_and_measured(monkeypatch):
    asked = []

    def generate(model, texts, melodies, seconds):
        asked.append((model.settings.guidance, len(texts), len(melodies)))
        return torch.randn(len(texts), 1, round(seconds * CONFIG.sample_rate)) / 10
    monkeypatch.setattr(guidance, "generate", generate)
    monkeypatch.setattr(classifiers, "SECONDS", 1.28)
    monkeypatch.setattr(classifiers, "train_classifiers", lambda config, _: classifiers.Classifiers(config))
    model = SimpleNamespace(config=CONFIG, codec=None, settings=Settings())
    figures = dict(guidance.measure(model, 2, [1.0, 5.0]))
    assert asked == [(1.0, 2, 2), (5.0, 2, 2)] and list(figures) == ["real", 1.0, 5.0]
    assert all(set(guidance.FIGURES) <= set(row) for row in figures.values())
    assert figures["real"]["notes_right"] > 0.8 > figures[5.0]["notes_right"]
