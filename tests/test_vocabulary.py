"""The words that a model does not know are told: by sample.py, and by data/prepare.py at its end.

Of instruments and tempi that it does not know it is given the nearest that it does.

    python -m pytest tests/test_vocabulary.py
"""
import dataclasses
import re

import numpy as np
import pytest

from config import Config, load
from constants import ROOT
from data import prepare
from data.captions import Track
from data.describe import KNOWN, NEAREST, WORDS, describe
from data.render import draw_truth, tunes_of
from data.vocabulary import FILLERS, read_as_known, readings, unknown_words
from sample import MusicGen
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
    (["a Saxophone solo", None, "saxophone"], "--text: 'saxophone' is not known: read as 'clarinet'\n"),
    (["a slow flute tune, alone", None], "")])
def test_sampling_tells_each_unknown_word_once(texts, told, capsys):
    tell_unknown_words(TINY, "some/model", texts)
    captured = capsys.readouterr()
    assert not captured.out and (told in captured.err if told else not captured.err)
    assert captured.err.count("\n") == bool(told)


def test_preparing_tells_the_words_of_captions_with_counts(capsys):
    tracks = []
    for n in range(3):
        meta = {"description": "a vaporwave lead, vaporwave" if n else "a slow flute"}
        tracks.append(Track(file=f"{n}.wav", meta=meta))
    prepare.report_captions(tracks, TINY)
    assert "not in t5_words, and how often: vaporwave (4)." in capsys.readouterr().out
    prepare.report_captions(tracks, Config())
    assert "t5_words" not in capsys.readouterr().out


# --- the nearest instrument or tempo ----------------------------------------------------------------------

@pytest.mark.parametrize("text, read, replaced", [
    ("a saxophone solo", "a clarinet solo", {"saxophone": "clarinet"}),
    ("Two SAXOPHONES, Fife-like.", "Two clarinet, flute-like.", {"saxophones": "clarinet", "fife": "flute"}),
    ("An Up-Tempo song, vivo", "An fast song, fast", {"up-tempo": "fast", "vivo": "fast"}),
    ("saxophonic techno flutes, up", "saxophonic techno flutes, up", {}),
    ("", "", {}), (None, None, {})])
def test_an_instrument_that_is_not_known_is_read_as_the_nearest(text, read, replaced):
    assert read_as_known(TINY, text) == (read, replaced)


@pytest.mark.parametrize("changes", [dict(t5="t5-base"), dict(t5="bytes"), dict(text="none"),
                                     dict(eval_tunes=False), dict(t5_words="saxophone slow")])
def test_models_that_read_otherwise_or_were_tuned_are_given_the_text_as_it_is(changes):
    other = dataclasses.replace(TINY, **changes)
    assert read_as_known(other, "a saxophone solo, fife") == ("a saxophone solo, fife", {})


def test_fine_tuning_the_shipped_model_leaves_the_words_to_it():
    tuned = load([str(ROOT / "config" / "finetune.py")])
    assert not readings(dataclasses.replace(tuned, t5="words", t5_words=TINY.t5_words))


def test_the_table_holds_single_words_that_are_not_known_and_names_that_are():
    words = [word for words in NEAREST.values() for word in words]
    assert len(set(words)) == len(words) >= 80
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)?", word) for word in words)
    tempi = dict(slow="slow", moderate="medium", fast="fast")
    assert NEAREST.keys() == WORDS["instruments"].keys() | tempi.keys()
    for config in (TINY, load([str(ROOT / "config" / "tiny.py")])):
        known = set(config.t5_words.split())
        assert not set(words) & (known | FILLERS)
        assert set(readings(config).values()) == NEAREST.keys() <= known
        for name in NEAREST:
            same = WORDS["tempi"][tempi[name]] if name in tempi else WORDS["instruments"][name]
            assert name in same
    assert not set(words) & KNOWN, "in captions"


def test_music_is_made_from_what_is_read():
    model = MusicGen.from_pretrained(ROOT / "checkpoints" / "tiny", "cpu")
    texts = ["a saxophone solo", "a clarinet solo", "a xyzzy solo"]
    codes = model.generate_codes(texts, duration=1.0, seeds=[0, 0, 0])
    assert (codes[0] == codes[1]).all() and (codes[0] != codes[2]).any()
