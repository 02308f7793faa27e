"""The words that a model does not know are told: by sample.py, and by data/prepare.py at its end.

    python -m pytest tests/test_vocabulary.py
"""
import numpy as np
import pytest

from config import Config, load
from constants import ROOT
from data import prepare
from data.captions import Track
from data.describe import describe
from data.render import draw_truth, tunes_of
from data.vocabulary import unknown_words
from sampling.command import tell_unknown_words

TINY = Config.from_json(ROOT / "checkpoints" / "tiny" / "config.json")


def test_unknown_words():
    texts = ["A slow Techno tune, with xyzzy and drums.", None, "techno at 103 bpm"]
    assert unknown_words(TINY, texts) == ["techno", "xyzzy", "techno"]
    for other in (Config(), load(["--t5=bytes"]), load(["--text=none", "--t5=words", "--t5_words=a"])):
        assert unknown_words(other, texts) == []


@pytest.mark.parametrize("texts, told", [
    (["techno and techno", "xyzzy"], "--text: some/model does not know techno, xyzzy;"),
    ([" ".join(f"w{n}" for n in range(12))], "w9 and 2 more;"),
    (["a slow flute tune, alone", None], "")])
def test_sampling_tells_each_unknown_word_once(texts, told, capsys):
    tell_unknown_words(TINY, "some/model", texts)
    captured = capsys.readouterr()
    assert not captured.out and (told in captured.err if told else not captured.err)


def test_preparing_tells_the_words_of_captions_with_counts(capsys):
    tracks = []
    for n in range(3):
        meta = {"description": "a vaporwave lead, vaporwave" if n else "a slow flute"}
        tracks.append(Track(file=f"{n}.wav", meta=meta))
    prepare.report_captions(tracks, TINY)
    assert "not in t5_words, and how often: vaporwave (4)." in capsys.readouterr().out
    prepare.report_captions(tracks, Config())
    assert "t5_words" not in capsys.readouterr().out
