"""The embedded data set: real tunes, honest captions, clean splits, audio that plays the notes.

    python -m pytest tests/test_tunes.py
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from commands import afresh, command, forked, refused, worked
from config import Config, load
from constants import ROOT
from data import describe, render, sampler, sounds, tunes
from data.instruments import extract
from data.notes import REGISTER, parse_bars, pitch_classes
from data.scores import read_notes
from data.segments import SPLITS
from data.stems import heard_notes
from data.sounds import draw_sounds
from system.errors import UserError

RATE = 16000
TUNES_TXT = ROOT / "data" / "tunes.txt"


def tune_called(name):
    return next(tune for tune in render.load_tunes() if tune.id == name)


def intervals(tune, n=8):
    """All runs of n melodic intervals: what two transposed copies of a melody share."""
    steps = np.diff(tune.pitches)
    return {tuple(steps[i:i + n]) for i in range(len(steps) - n + 1)}


# --- the notes --------------------------------------------------------------------------------------------

def test_there_are_hundreds_of_different_tunes_with_title_and_origin():
    loaded = render.load_tunes()
    assert len(loaded) >= 320
    assert len({t.id for t in loaded}) == len({t.title for t in loaded}) == len(loaded)
    assert all(t.title and re.search(r"\d{4}|century", t.origin) for t in loaded)
    assert {t.metre for t in loaded} == {"2/4", "3/4", "4/4", "6/8"}
    assert min(sum(t.mode == mode for t in loaded) for mode in ("major", "minor")) > 100
    assert TUNES_TXT.stat().st_size < 150_000


def test_bars_add_up_and_pitches_are_playable():
    lines = [line for line in TUNES_TXT.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    for tune, text in zip(render.load_tunes(), lines[1::2], strict=True):
        _, bars = parse_bars(text, 3 if tune.metre == "6/8" else 2)
        assert all(abs(bar - tune.bar) < 1e-6 for bar in bars[1:-1]), tune.title
        assert abs(tune.beats / tune.bar - round(tune.beats / tune.bar)) < 1e-6, tune.title
        assert len(tune.pitches) >= 10 and tune.beats >= 12, tune.title
        low, high = min(tune.pitches), max(tune.pitches)
        assert high - low <= 19 and low >= 50 and high <= 90
        for name, instrument in sampler.INSTRUMENTS.items():
            truth = dict(instrument=name, bpm=100, key="C", first_bar=0)
            shift = render.transposition(tune, truth, 10.0)
            pitches = [pitch for *_, pitch in render.melody_notes(tune, truth, 10.0)]
            assert (tune.tonic + shift) % 12 == 0
            assert REGISTER - 3 < np.mean(pitches) - 12 * instrument.octave < REGISTER + 15
            assert instrument.low - 12 < min(pitches) and max(pitches) < instrument.high + 12


def test_a_wrong_note_is_named():
    with pytest.raises(UserError, match="'h2'"):
        parse_bars("c2 | h2", 2)


def test_splits_share_no_tune_and_no_melody():
    parts = {split: render.tunes_of(split) for split in SPLITS}
    names = {tune.id for part in parts.values() for tune in part}
    assert sum(map(len, parts.values())) == len(render.load_tunes()) == len(names)
    assert len(parts["test"]) == 100 and len(parts["valid"]) == 20
    assert "ode-to-joy" in {t.id for t in parts["test"]}  # assets/ode_to_joy.wav, the README's example
    trained = [intervals(t) for t in parts["train"]]
    for tune in parts["test"] + parts["valid"]:
        own = intervals(tune)
        assert not own or max(len(own & other) / len(own) for other in trained) < 0.5, tune.title


# --- the captions -----------------------------------------------------------------------------------------

def random_truths(n):
    rng, loaded = np.random.default_rng(1), render.load_tunes()
    for _ in range(n):
        tune = loaded[rng.integers(len(loaded))]
        yield render.draw_truth(tune, rng), rng


def named(words, text) -> bool:
    return any(re.search(rf"\b{word}\b", text) for word in words)


def check_instrument_and_tempo(truth, text):
    for name, words in describe.WORDS["instruments"].items():
        played = name in (truth["instrument"], truth["chords_on"])
        assert played or not named(words, text), text
    assert named(describe.WORDS["instruments"][truth["instrument"]], text), text
    for tempo, words in describe.WORDS["tempi"].items():
        assert tempo == truth["tempo"] or not named(words, text), text
    for number in re.findall(r"(\d+) (?:bpm|beats)", text):      # titles have others
        assert int(number) == truth["bpm"], text
    assert truth["soft"] or not named(describe.WORDS["soft"], text), text
    for style, needs in describe.WORDS["styles"].items():
        true = all(truth[key] == value for key, value in needs.items())
        assert true or not re.search(rf"\b{style}\b", text), text


def check_key(truth, text):
    for mode in re.findall("major|minor", text):
        assert mode == truth["mode"], text
    for key in re.findall(r"in (\S+) (?:major|minor)(?! key)", text):
        assert key == truth["key"].lower(), text


def check_backing(truth, text):
    """Drums are always told: a text without them is of a clip without."""
    denied = named(describe.WORDS["no drums"], text)
    told = not denied and re.search(r"\b(drums?|percussion|with a beat)\b", text)
    assert bool(told) == truth["drums"], text
    bass = re.search(r"(?<!no )\bbass\b", text)
    assert truth["bass"] or not bass, text
    assert truth["chords"] or not re.search(r"\b(chords|arpeggios|strumm\w+|pads|arpeggiated)\b", text), text
    alone = named(describe.WORDS["alone"], text)
    assert not (alone and (truth["drums"] or truth["bass"] or truth["chords"])), text


def check_spelling(text):
    assert text == text.strip() and "  " not in text and ",," not in text and " ," not in text, text
    assert not re.search(r"\ba (?!uk)[aeiou]", text) and not re.search(r"\ban ([^aeiou]|uk)", text), text


def test_captions_never_lie():
    for truth, rng in random_truths(3000):
        text = describe.describe(truth, rng).lower()
        check_instrument_and_tempo(truth, text)
        check_key(truth, text)
        check_backing(truth, text)
        check_spelling(text)


def test_captions_vary():
    texts = [describe.describe(truth, rng) for truth, rng in random_truths(500)]
    assert len(set(texts)) > 450
    truth = dict(next(random_truths(1))[0])
    rng = np.random.default_rng(2)
    same = {describe.describe(truth, rng) for _ in range(200)}
    assert len(same) > 150, "one clip can be described in many ways"
    for field in ("drum", "bpm"):   # fields are sometimes missing
        assert 0.1 < np.mean([field in text for text in texts]) < 0.95


def test_the_words_of_the_table_are_those_that_the_shipped_recipe_knows():
    known = set(load([str(ROOT / "config" / "tiny.py")]).t5_words.split())
    spoken = set()
    for truth, rng in random_truths(2000):
        spoken |= set(re.findall(r"\w+", describe.describe(truth | {"tune": "x"}, rng).lower()))
    assert spoken - known <= set("x ab b bb c d db e eb f g gb".split())    # a title, names of keys


def test_busy_tunes_are_not_played_fast():
    for truth, _ in random_truths(500):
        tune = tune_called(truth["tune"])
        low, high = render.TEMPI[truth["tempo"]]
        assert low <= truth["bpm"] <= high
        mean_note = tune.beats / len(tune.pitches) * 60 / low
        assert truth["tempo"] == "slow" or mean_note >= render.MIN_NOTE


# --- the audio --------------------------------------------------------------------------------------------

def truth_of(tune, **changes) -> dict:
    """A clip of the melody alone from the first bar on, in the key of the tune."""
    plain = dict(instrument="organ", bpm=100, key=render.KEYS[tune.mode][tune.tonic], first_bar=0,
                 drums=False, bass=False, chords=None, chords_on=None, soft=False)
    return plain | changes


@pytest.mark.parametrize("instrument", sampler.INSTRUMENTS)
def test_melody_sounds_the_notes(instrument):
    """By `heard_notes`, in frames within a note; bells have other partials, a choir begins late."""
    tune = tune_called("greensleeves")
    backing = dict(drums=True, bass=True, chords="broken", chords_on="harp")
    truth = truth_of(tune, instrument=instrument, bpm=70, **backing)
    mix, melody = render.render_clip(tune, truth, 12, RATE, np.random.default_rng(0))
    config = Config(sample_rate=RATE, radix2_exp=13, melody_form="notes")
    heard = pitch_classes(heard_notes(torch.from_numpy(melody)[None], config)[0], 12)
    right = []
    for at, length, pitch in render.melody_notes(tune, truth, 12):
        for m, classes in enumerate(heard):
            if at + 0.08 < m * config.hop / RATE < at + length - 0.04:
                right.append(classes[pitch % 12].item())
    assert len(right) > 50 and np.mean(right) > {"glockenspiel": 0.65, "choir": 0.8}.get(instrument, 0.9)

    assert mix.dtype == melody.dtype == np.float32 and mix.shape == melody.shape == (12 * RATE,)
    assert 0.15 < np.abs(mix).max() <= 0.9 and np.abs(melody).max() <= 0.9
    assert np.abs(np.diff(melody)).max() < 0.8 and abs(mix[-1]) < 0.01, "no clicks"
    seconds = mix.reshape(12, RATE)
    assert np.sqrt(np.mean(seconds ** 2, 1)).min() > 0.01, "no silence"


def test_soft_clips_are_soft():
    tune = tune_called("ode-to-joy")
    levels = []
    for soft in (False, True):
        mix, _ = render.render_clip(tune, truth_of(tune, soft=soft), 4, RATE, np.random.default_rng(0))
        levels.append(20 * np.log10(np.sqrt(np.mean(mix ** 2))))
    assert -24 < levels[0] < -17 and -32 < levels[1] < -25


@pytest.mark.parametrize("name, first_bar", [
    ("ode-to-joy", 0), ("greensleeves", 4), ("the-new-german-waltz", 8)])
def test_written_melodies_are_those_that_sound(name, first_bar, tmp_path):
    """The .abc of a clip against what is played; in the last tune a note is tied over the bar line."""
    tune = tune_called(name)
    truth = truth_of(tune, first_bar=first_bar)
    (tmp_path / "x.abc").write_text(render.melody_abc(tune, truth, 11))
    time = np.arange(86) * 0.128 + 0.003
    written = read_notes(tmp_path / "x.abc").chroma_at(time, Config())
    for t, frame in zip(time, written):
        notes = render.melody_notes(tune, truth, 11)
        sounding = [pitch % 12 for at, length, pitch in notes if at <= t < at + length]
        assert frame.nonzero().flatten().tolist() == sounding


def test_sounds_for_the_codec():
    """Clips of each kind, at levels down to silence; the same generator makes the same."""
    levels = []
    for n in range(24):
        one, two = (draw_sounds(2.0, RATE, np.random.default_rng(n)) for _ in range(2))
        assert one.shape == (2 * RATE,) and one.dtype == np.float32 and np.array_equal(one, two)
        levels.append(np.abs(one).max())
    assert max(levels) <= 0.8 and min(levels) < 1e-3 and np.median(levels) > 0.02


@pytest.mark.parametrize("draw", [sounds.notes, sounds.sines, sounds.strokes])
def test_sounds_have_sound_and_rests(draw):
    wave = draw(20 * RATE, RATE, np.random.default_rng(0))
    seconds = np.sqrt(np.mean(wave.reshape(-1, RATE // 10) ** 2, 1))
    assert np.isfinite(wave).all() and (seconds > 0.02).mean() > 0.3 and (seconds < 0.2 * seconds.max()).any()


@pytest.mark.parametrize("name, pitch", [("synth", 95), ("organ", 127)])
def test_notes_far_above_their_recordings_are_refused(name, pitch):
    """Nothing steady is left of them to go on with."""
    with pytest.raises(ValueError, match=f"{name}: midi pitch {pitch} is too far above"):
        sampler.note(name, pitch, 1.0, 16000)


@pytest.mark.parametrize("font", [[], ["no.sf3"]])
def test_without_a_soundfont_nothing_is_extracted(font):
    with pytest.raises(UserError, match="which SoundFont"):
        extract.main(*font)


def test_instruments_differ():
    tune, spectra = tune_called("ode-to-joy"), []
    for name in sampler.INSTRUMENTS:
        truth = truth_of(tune, instrument=name)
        _, melody = render.render_clip(tune, truth, 4, RATE, np.random.default_rng(0))
        frames = melody[:64000 // 2048 * 2048].reshape(-1, 2048) * np.hanning(2048)
        bands = np.array_split(np.abs(np.fft.rfft(frames)), 24, axis=1)
        bands = np.log(np.stack([band.sum(1) for band in bands], 1) + 1e-2)
        spectra.append(np.concatenate([bands.mean(0), bands.std(0)]))
    apart = [np.abs(a - b).mean() for i, a in enumerate(spectra) for b in spectra[:i]]
    assert min(apart) > 0.15


@pytest.mark.parametrize("name, bpm", [
    ("ode-to-joy", 150),
    ("greensleeves", 70),
    ("amazing-grace-new-britain", 100),
])
def test_drums_keep_the_tempo(name, bpm):
    tune = tune_called(name)
    truth = truth_of(tune, bpm=bpm, drums=True)
    mix, melody = render.render_clip(tune, truth, 12, RATE, np.random.default_rng(3))
    drums = (mix - melody)[:12 * RATE // 80 * 80].reshape(-1, 80)
    energy = np.sqrt(np.mean(drums ** 2, 1))
    onsets = np.maximum(np.diff(energy, prepend=0), 0)  # 200 a second

    def pulse(beats):
        at = tune.upbeat * 60 / bpm + 60 / beats * np.arange(int(10 * beats / 60))
        return np.mean([onsets[max(0, round(t * 200) - 1):round(t * 200) + 2].max() for t in at])
    assert pulse(bpm) > 0.5 * np.sort(onsets)[-10:].mean()
    assert all(pulse(bpm) > 1.5 * pulse(bpm * wrong) for wrong in (0.92, 0.96, 1.04, 1.08))
    plain, alone = render.render_clip(tune, truth | {"drums": False}, 12, RATE, np.random.default_rng(3))
    assert np.array_equal(plain, alone), "nothing but the melody when nothing was asked for"


def test_chords_of_a_plain_tune():
    tune = tune_called("sur-le-pont-davignon")  # F: F C F C F C F F, the second and sixth bar on C
    triads = render.triads(tune)
    assert len(triads) == 8 and triads[0] == triads[4] == triads[7] == (5, 4)
    assert triads[1] == triads[5] == (0, 4)


# --- the command ------------------------------------------------------------------------------------------

def test_same_seed_same_bytes_with_one_or_two_workers(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    worked(command(tunes.main, "--out", two, "--seconds", "1", "--sample_rate", "8000",
                   "--clips", "0", "1", "0", "--workers", "2"))
    args = argparse.Namespace(out=str(one), seed=0, seconds=1, sample_rate=8000)
    for i in reversed(range(20)):   # in another order, too
        tunes.write_clip((args, "valid", i))
    files = sorted(file.relative_to(one) for file in one.rglob("*.*"))
    assert files == sorted(file.relative_to(two) for file in two.rglob("*.*")) and len(files) == 65
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    valid = {tune.id for tune in render.tunes_of("valid")}
    for file in (one / "valid" / "songs").glob("*.json"):
        fields = json.loads(file.read_text(encoding="utf-8"))
        assert fields["description"] and fields["truth"]["tune"] in valid
        assert (file.parent / fields["melody"]).exists()
    for wav in one.rglob("*.wav"):
        info = soundfile.info(wav)
        assert (info.samplerate, info.channels, info.subtype, info.frames) == (8000, 1, "PCM_16", 8000)


@pytest.mark.parametrize("flags", [
    "--one nosuchtune --to x.wav",
    "--one Ode --instrument kazoo --to x.wav",
    "--one Ode",
    "--seconds 0",
    "--workers 0",
    "--seed -1",
    "--bpm nan",
    "--clips 1 1 -1",
])
def test_a_mistake_is_refused(tmp_path, flags):
    with pytest.raises(UserError):
        tunes.main(["--out", str(tmp_path), *flags.split()])
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_in_one_word(tmp_path):
    """It reaches the workers, too: a terminal sends it to all processes of a command."""
    arguments = [sys.executable, ROOT / "data/tunes.py", "--out", tmp_path, "--seconds=1", "--workers=2"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.rglob("*.json")) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.endswith("interrupted\n") and "Traceback" not in said


def test_a_mistake_ends_in_one_sentence(tmp_path):
    refused(forked(afresh, ROOT / "data" / "tunes.py", "--out", tmp_path, "--bpm", "0"), "tunes.py: --bpm")
    assert not list(tmp_path.iterdir())


def test_16_bits_are_rounded(tmp_path):
    tunes.main(["--one", "Ode to Joy", "--seconds", "3", "--to", str(tmp_path / "x.wav")])
    tune, rng = tune_called("ode-to-joy"), np.random.default_rng(0)
    _, wave = render.render_clip(tune, truth_of(tune, instrument="piano", bpm=104), 3, RATE, rng)
    error = (soundfile.read(tmp_path / "x.wav")[0] - wave) * 2 ** 15     # in steps
    assert np.abs(error).max() < 0.5 + 1e-3 and abs(error.mean()) < 0.01


def test_the_asset_is_what_its_command_makes(tmp_path):
    worked(command(tunes.main, "--one", "Ode to Joy", "--instrument", "piano", "--seconds", "10",
                   "--to", tmp_path / "ode.wav"))
    fresh, _ = soundfile.read(tmp_path / "ode.wav")
    shipped, rate = soundfile.read(ROOT / "assets" / "ode_to_joy.wav")
    assert rate == RATE and np.abs(fresh - shipped).max() < 1e-3    # other processors round otherwise
