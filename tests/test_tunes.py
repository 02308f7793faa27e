"""The embedded data set: real tunes, honest captions, clean splits, audio that plays the notes.

    python -m pytest tests/test_tunes.py
"""
import argparse
import json
import re

import numpy as np
import pytest
import soundfile

from commands import afresh, command, forked, refused, worked
from constants import ROOT
from data import render, tunes
from data.notes import parse_bars
from system.errors import UserError

RATE = 16000
TUNES_TXT = ROOT / "data" / "tunes.txt"


def tune_called(name):
    return next(tune for tune in render.load_tunes() if tune.id == name)


def intervals(tune, n=8):
    """All runs of n melodic intervals: what two transposed copies of a melody share."""
    steps = np.diff(tune.pitches)
    return {tuple(steps[i:i + n]) for i in range(len(steps) - n + 1)}


def chroma_argmax(wav, window, hop):
    """Strongest pitch class of each frame of wav (L,), and the frames' starts in samples."""
    starts = np.arange(0, len(wav) - window + 1, hop)
    power = np.abs(np.fft.rfft(np.stack([wav[s:s + window] for s in starts]) * np.hanning(window))) ** 2
    hertz = np.fft.rfftfreq(window, 1 / RATE)
    pitch_class = np.round(69 + 12 * np.log2(np.maximum(hertz, 1) / 440)).astype(int) % 12
    of_class = [(hertz > 100) & (pitch_class == q) for q in range(12)]
    return np.stack([power[:, bins].sum(1) for bins in of_class], 1).argmax(1), starts


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
        for instrument in render.INSTRUMENTS:
            shift = render.fit(tune, instrument, 0)
            assert (tune.tonic + shift) % 12 == 0 and 48 < np.mean(tune.pitches) + shift < 80


def test_a_wrong_note_is_named():
    with pytest.raises(UserError, match="'h2'"):
        parse_bars("c2 | h2", 2)


def test_splits_share_no_tune_and_no_melody():
    parts = {split: render.tunes_of(split) for split in render.SPLITS}
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


def names_any(words, text) -> bool:
    return any(re.search(rf"\b{word}\b", text) for word in words)


def check_instrument_and_tempo(truth, text):
    for name, instrument in render.INSTRUMENTS.items():
        assert names_any(instrument.words, text) == (name == truth["instrument"]), text
    for tempo, words in render.TEMPO_WORDS.items():
        assert tempo == truth["tempo"] or not names_any(words, text), text
    for number in re.findall(r"\d+", text):
        assert int(number) == truth["bpm"], text


def check_key(truth, text):
    for mode in re.findall("major|minor", text):
        assert mode == truth["mode"], text
    for key in re.findall(r"in (\S+) (?:major|minor)(?! key)", text):
        assert key == truth["key"].lower(), text


def check_backing(truth, text):
    denial = r"(?:no|without) (drums or bass|drums|bass)"
    denied, affirmed = re.findall(denial, text), re.sub(denial, "", text)
    no_drums = "unaccompanied" in text or any("drums" in words for words in denied)
    no_bass = "unaccompanied" in text or any("bass" in words for words in denied)
    assert not (no_drums and truth["drums"]) and not (no_bass and truth["bass"]), text
    assert truth["drums"] or "drum" not in affirmed, text
    assert truth["bass"] or "bass" not in affirmed, text
    assert "solo" not in text or not (truth["drums"] or truth["bass"]), text


def check_spelling(text):
    assert text == text.strip() and "  " not in text and ",," not in text and " ," not in text, text
    assert not re.search(r"\ba [aeiou]", text) and not re.search(r"\ban [^aeiou]", text), text


def test_captions_never_lie():
    for truth, rng in random_truths(3000):
        text = render.describe(truth, rng).lower()
        check_instrument_and_tempo(truth, text)
        check_key(truth, text)
        check_backing(truth, text)
        check_spelling(text)


def test_captions_vary():
    texts = [render.describe(truth, rng) for truth, rng in random_truths(500)]
    assert len(set(texts)) > 450
    truth = dict(next(random_truths(1))[0])
    rng = np.random.default_rng(2)
    same = {render.describe(truth, rng) for _ in range(200)}
    assert len(same) > 150, "one clip can be described in many ways"
    for field in ("drum", "bpm"):   # fields are sometimes missing
        assert 0.1 < np.mean([field in text for text in texts]) < 0.95


def test_busy_tunes_are_not_played_fast():
    for truth, _ in random_truths(500):
        tune = tune_called(truth["tune"])
        low, high = render.TEMPI[truth["tempo"]]
        assert low <= truth["bpm"] <= high
        mean_note = tune.beats / len(tune.pitches) * 60 / low
        assert truth["tempo"] == "slow" or mean_note >= render.MIN_NOTE


# --- the audio --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("instrument", render.INSTRUMENTS)
def test_melody_sounds_the_notes(instrument):
    tune, window, hop = tune_called("greensleeves"), 4096, 1024
    shift = render.fit(tune, instrument, 2)
    rng = np.random.default_rng(0)
    mix, melody = render.render_tune(tune, instrument, 70, shift, True, True, 12, RATE, rng, first_bar=0)
    notes, _ = render.schedule(tune, 70, 12, 0)
    strongest, starts = chroma_argmax(melody, window, hop)
    right = []
    for found, start in zip(strongest, starts / RATE):
        for at, length, pitch in notes:     # frames of which at least three quarters are one note
            common = min(at + length, start + window / RATE) - max(at, start)
            if common > 0.75 * window / RATE:
                right.append(found == (pitch + shift) % 12)
    assert len(right) > 80 and np.mean(right) >= 0.95

    assert mix.dtype == melody.dtype == np.float32 and mix.shape == melody.shape == (12 * RATE,)
    assert 0.15 < np.abs(mix).max() <= 0.9 and np.abs(melody).max() <= 0.9
    loudness, rest = np.sqrt(np.mean(melody ** 2)), np.sqrt(np.mean((mix - melody) ** 2))
    assert loudness > rest, "the melody is louder than all the rest"
    assert np.abs(np.diff(melody)).max() < 0.4 and abs(mix[-1]) < 0.01, "no clicks"
    seconds = mix.reshape(12, RATE)
    assert np.sqrt(np.mean(seconds ** 2, 1)).min() > 0.01, "no silence"


def test_instruments_differ():
    tune, spectra = tune_called("ode-to-joy"), []
    for name in render.INSTRUMENTS:
        rng = np.random.default_rng(0)
        _, melody = render.render_tune(tune, name, 100, 0, False, False, 4, RATE, rng, first_bar=0)
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
    rng = np.random.default_rng(3)
    mix, melody = render.render_tune(tune, "organ", bpm, 0, True, False, 12, RATE, rng, first_bar=0)
    drums = (mix - melody)[:12 * RATE // 80 * 80].reshape(-1, 80)
    energy = np.sqrt(np.mean(drums ** 2, 1))
    onsets = np.maximum(np.diff(energy, prepend=0), 0)  # 200 a second

    def pulse(beats):
        at = tune.upbeat * 60 / bpm + 60 / beats * np.arange(int(10 * beats / 60))
        return np.mean([onsets[max(0, round(t * 200) - 1):round(t * 200) + 2].max() for t in at])
    assert pulse(bpm) > 0.8 * np.sort(onsets)[-10:].mean()
    assert all(pulse(bpm) > 1.5 * pulse(bpm * wrong) for wrong in (0.92, 0.96, 1.04, 1.08))
    rng = np.random.default_rng(3)
    plain, alone = render.render_tune(tune, "organ", bpm, 0, False, False, 12, RATE, rng, first_bar=0)
    assert np.array_equal(plain, alone), "nothing but the melody when nothing was asked for"


def test_chords_of_a_plain_tune():
    tune = tune_called("sur-le-pont-davignon")  # F: F C F C F C F F, the second and sixth bar on C
    roots = render.chords(tune)
    assert len(roots) == 8
    assert roots[0] == roots[4] == roots[7] == 5 and roots[1] == roots[5] == 0


# --- the command ------------------------------------------------------------------------------------------

def test_same_seed_same_bytes_with_one_or_two_workers(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    worked(command(tunes.main, "--out", two, "--seconds", "1", "--sample_rate", "8000",
                   "--clips", "0", "1", "0", "--workers", "2"))
    args = argparse.Namespace(out=str(one), seed=0, seconds=1, sample_rate=8000, stems=True)
    for i in reversed(range(20)):   # in another order, too
        tunes.write_clip((args, "valid", i))
    files = sorted(file.relative_to(one) for file in one.rglob("*.*"))
    assert files == sorted(file.relative_to(two) for file in two.rglob("*.*")) and len(files) == 60
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    valid = {tune.id for tune in render.tunes_of("valid")}
    for file in (one / "valid").glob("*.json"):
        fields = json.loads(file.read_text(encoding="utf-8"))
        assert fields["description"] and fields["truth"]["tune"] in valid
        for wav in (file.with_suffix(".wav"), file.parent / fields["melody"]):
            info = soundfile.info(wav)
            assert (info.samplerate, info.channels, info.subtype) == (8000, 1, "PCM_16")
            assert info.frames == 8000


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


def test_a_mistake_ends_in_one_sentence(tmp_path):
    refused(forked(afresh, ROOT / "data" / "tunes.py", "--out", tmp_path, "--bpm", "0"), "tunes.py: --bpm")
    assert not list(tmp_path.iterdir())


def test_16_bits_are_rounded(tmp_path):
    tunes.main(["--one", "Ode to Joy", "--seconds", "3", "--to", str(tmp_path / "x.wav")])
    tune, rng = tune_called("ode-to-joy"), np.random.default_rng(0)
    shift = render.fit(tune, "piano", tune.tonic)
    _, wave = render.render_tune(tune, "piano", 104, shift, False, False, 3, RATE, rng, first_bar=0)
    error = (soundfile.read(tmp_path / "x.wav")[0] - wave) * 2 ** 15     # in steps
    assert np.abs(error).max() < 0.5 + 1e-3 and abs(error.mean()) < 0.01


def test_the_asset_is_what_its_command_makes(tmp_path):
    worked(command(tunes.main, "--one", "Ode to Joy", "--instrument", "piano", "--seconds", "10",
                   "--to", tmp_path / "ode.wav"))
    fresh, _ = soundfile.read(tmp_path / "ode.wav")
    shipped, rate = soundfile.read(ROOT / "assets" / "ode_to_joy.wav")
    assert rate == RATE and np.abs(fresh - shipped).max() < 1e-3    # other processors round otherwise
