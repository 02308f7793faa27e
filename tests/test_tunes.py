"""The embedded data set: real tunes, honest captions, clean splits, audio that plays the notes.

    python -m pytest tests/test_tunes.py
"""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import tunes  # noqa: E402
from config import UserError  # noqa: E402

RATE = 16000


def tune_called(name):
    return next(tune for tune in tunes.load() if tune.id == name)


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
    heard = hertz > 100
    return np.stack([power[:, heard & (pitch_class == q)].sum(1) for q in range(12)], 1).argmax(1), starts


# --- the notes ---------------------------------------------------------------------------------------------------

def test_there_are_hundreds_of_different_tunes_with_title_and_origin():
    loaded = tunes.load()
    assert len(loaded) >= 320 and len({t.id for t in loaded}) == len({t.title for t in loaded}) == len(loaded)
    assert all(t.title and re.search(r"\d{4}|century", t.origin) for t in loaded)
    assert {t.metre for t in loaded} == {"2/4", "3/4", "4/4", "6/8"}
    assert min(sum(t.mode == mode for t in loaded) for mode in ("major", "minor")) > 100
    assert (ROOT / "data/tunes.txt").stat().st_size < 150_000


def test_bars_add_up_and_pitches_are_playable():
    lines = [line for line in (ROOT / "data/tunes.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    for tune, text in zip(tunes.load(), lines[1::2], strict=True):
        _, bars = tunes.parse_notes(text, 3 if tune.metre == "6/8" else 2)
        assert all(abs(bar - tune.bar) < 1e-6 for bar in bars[1:-1]), tune.title
        assert abs(tune.beats / tune.bar - round(tune.beats / tune.bar)) < 1e-6, tune.title
        assert len(tune.pitches) >= 10 and tune.beats >= 12, tune.title
        assert max(tune.pitches) - min(tune.pitches) <= 19 and min(tune.pitches) >= 50 and max(tune.pitches) <= 90
        for play in tunes.INSTRUMENTS:
            shift = tunes.fit(tune, play, 0)
            assert (tune.tonic + shift) % 12 == 0 and 48 < np.mean(tune.pitches) + shift < 80


def test_a_wrong_note_is_named():
    with pytest.raises(UserError, match="'h2'"):
        tunes.parse_notes("c2 | h2", 2)


def test_notation_reads_as_the_header_of_the_file_says():
    notes, bars = tunes.parse_notes("c#'3/2 /2".replace(" /2", " bb,/2") + " r2 | g2~ | g", 2)
    assert notes == [(73, 0.75), (58, 0.25), (None, 1.0), (67, 1.5)] and bars == [2.0, 1.0, 0.5]


def test_splits_share_no_tune_and_no_melody():
    parts = {name: tunes.split(name) for name in tunes.SPLITS}
    assert sum(map(len, parts.values())) == len(tunes.load()) == len({t.id for part in parts.values() for t in part})
    assert len(parts["test"]) == 100 and len(parts["valid"]) == 20
    assert "ode-to-joy" in {t.id for t in parts["test"]}  # assets/ode_to_joy.wav, the README's example
    trained = [intervals(t) for t in parts["train"]]
    for tune in parts["test"] + parts["valid"]:
        own = intervals(tune)
        assert not own or max(len(own & other) / len(own) for other in trained) < 0.5, tune.title


# --- the captions ------------------------------------------------------------------------------------------------

def random_truths(n):
    rng = np.random.default_rng(1)
    for _ in range(n):
        yield tunes.draw(tunes.load()[rng.integers(len(tunes.load()))], rng), rng


def test_captions_never_lie():
    for truth, rng in random_truths(3000):
        text = tunes.describe(truth, rng).lower()
        for name, play in tunes.INSTRUMENTS.items():
            said = any(re.search(rf"\b{word}\b", text) for word in play.words)
            assert said == (name == truth["instrument"]), text
        for tempo, words in tunes.TEMPO_WORDS.items():
            assert tempo == truth["tempo"] or not any(re.search(rf"\b{word}\b", text) for word in words), text
        for number in re.findall(r"\d+", text):
            assert int(number) == truth["bpm"], text
        for mode in re.findall("major|minor", text):
            assert mode == truth["mode"], text
        for key in re.findall(r"in (\S+) (?:major|minor)(?! key)", text):
            assert key == truth["key"].lower(), text
        denied = re.findall(r"(?:no|without) (drums or bass|drums|bass)", text)
        no_drums = "unaccompanied" in text or any("drums" in words for words in denied)
        no_bass = "unaccompanied" in text or any("bass" in words for words in denied)
        affirmed = re.sub(r"(no|without) (drums or bass|drums|bass)", "", text)
        assert not (no_drums and truth["drums"]) and not (no_bass and truth["bass"]), text
        assert truth["drums"] or "drum" not in affirmed, text
        assert truth["bass"] or "bass" not in affirmed, text
        assert "solo" not in text or not (truth["drums"] or truth["bass"]), text
        assert text == text.strip() and "  " not in text and ",," not in text and " ," not in text, text
        assert not re.search(r"\ba [aeiou]", text) and not re.search(r"\ban [^aeiou]", text), text


def test_captions_vary():
    texts = [tunes.describe(truth, rng) for truth, rng in random_truths(500)]
    assert len(set(texts)) > 450
    truth = dict(next(random_truths(1))[0])
    rng = np.random.default_rng(2)
    same = {tunes.describe(truth, rng) for _ in range(200)}
    assert len(same) > 150, "one clip can be described in many ways"
    for said in ("drum", "bpm"):  # fields are sometimes missing
        assert 0.1 < np.mean([said in text for text in texts]) < 0.95


def test_busy_tunes_are_not_played_fast():
    for truth, _ in random_truths(500):
        tune = tune_called(truth["tune"])
        low, high = tunes.TEMPI[truth["tempo"]]
        assert low <= truth["bpm"] <= high
        assert truth["tempo"] == "slow" or tune.beats / len(tune.pitches) * 60 / low >= tunes.MIN_NOTE


# --- the audio -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("instrument", tunes.INSTRUMENTS)
def test_melody_sounds_the_notes(instrument):
    tune, window, hop = tune_called("greensleeves"), 4096, 1024
    shift = tunes.fit(tune, instrument, 2)
    mix, melody = tunes.render(tune, instrument, 70, shift, True, True, 12, RATE, np.random.default_rng(0), 0)
    notes, _ = tunes.schedule(tune, 70, 12, 0)
    strongest, starts = chroma_argmax(melody, window, hop)
    right = []
    for found, start in zip(strongest, starts):
        for at, length, pitch in notes:  # frames of which at least three quarters are one note
            if min(at + length, (start + window) / RATE) - max(at, start / RATE) > 0.75 * window / RATE:
                right.append(found == (pitch + shift) % 12)
    assert len(right) > 80 and np.mean(right) >= 0.95
    assert mix.dtype == melody.dtype == np.float32 and mix.shape == melody.shape == (12 * RATE,)
    assert 0.15 < np.abs(mix).max() <= 0.9 and np.abs(melody).max() <= 0.9
    assert np.sqrt(np.mean(melody ** 2)) > np.sqrt(np.mean((mix - melody) ** 2)), "the melody is louder than all the rest"
    assert np.abs(np.diff(melody)).max() < 0.4 and abs(mix[-1]) < 0.01, "no clicks"
    seconds = mix.reshape(12, RATE)
    assert np.sqrt(np.mean(seconds ** 2, 1)).min() > 0.01, "no silence"


def test_instruments_differ():
    tune, spectra = tune_called("ode-to-joy"), []
    for name in tunes.INSTRUMENTS:
        _, melody = tunes.render(tune, name, 100, 0, False, False, 4, RATE, np.random.default_rng(0), first_bar=0)
        frames = np.abs(np.fft.rfft(melody[:64000 // 2048 * 2048].reshape(-1, 2048) * np.hanning(2048)))
        bands = np.log(np.stack([part.sum(1) for part in np.array_split(frames, 24, axis=1)], 1) + 1e-2)
        spectra.append(np.concatenate([bands.mean(0), bands.std(0)]))
    apart = [np.abs(a - b).mean() for i, a in enumerate(spectra) for b in spectra[:i]]
    assert min(apart) > 0.15


@pytest.mark.parametrize("name, bpm", [("ode-to-joy", 150), ("greensleeves", 70), ("amazing-grace-new-britain", 100)])
def test_drums_keep_the_tempo(name, bpm):
    tune = tune_called(name)
    rng = np.random.default_rng(3)
    mix, melody = tunes.render(tune, "organ", bpm, 0, True, False, 12, RATE, rng, first_bar=0)
    energy = np.sqrt(np.mean((mix - melody)[:12 * RATE // 80 * 80].reshape(-1, 80) ** 2, 1))
    onsets = np.maximum(np.diff(energy, prepend=0), 0)  # 200 a second

    def pulse(beats):
        at = tune.upbeat * 60 / bpm + 60 / beats * np.arange(int(10 * beats / 60))
        return np.mean([onsets[max(0, round(t * 200) - 1):round(t * 200) + 2].max() for t in at])
    assert pulse(bpm) > 0.8 * np.sort(onsets)[-10:].mean()
    assert all(pulse(bpm) > 1.5 * pulse(bpm * wrong) for wrong in (0.92, 0.96, 1.04, 1.08))
    plain, alone = tunes.render(tune, "organ", bpm, 0, False, False, 12, RATE, np.random.default_rng(3), first_bar=0)
    assert np.array_equal(plain, alone), "nothing but the melody when nothing was asked for"


def test_chords_of_a_plain_tune():
    tune = tune_called("sur-le-pont-davignon")  # F: F C F C F C F F, the second and sixth bar on C
    roots = tunes.chords(tune)
    assert len(roots) == 8 and roots[0] == roots[4] == roots[7] == 5 and roots[1] == roots[5] == 0


def make(folder, *options):
    command = [sys.executable, ROOT / "data/tunes.py", "--out", folder, "--seconds", "3", "--sample_rate", "8000"]
    return subprocess.run([*command, *options], capture_output=True, text=True)


def test_same_seed_same_bytes_with_one_or_two_workers(tmp_path):
    done = make(tmp_path / "two", "--clips", "0", "1", "0", "--workers", "2")
    assert done.returncode == 0, done.stderr
    args = argparse.Namespace(out=str(tmp_path / "one"), seed=0, seconds=3, sample_rate=8000, stems=True)
    for i in reversed(range(20)):  # in another order, too
        tunes.write_clip((args, "valid", i))
    one = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.*"))
    two = sorted(file.relative_to(tmp_path / "two") for file in (tmp_path / "two").rglob("*.*"))
    assert one == two and len(one) == 60
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in one)
    for file in (tmp_path / "one/valid").glob("*.json"):
        fields = json.loads(file.read_text(encoding="utf-8"))
        assert fields["description"] and fields["truth"]["tune"] in {t.id for t in tunes.split("valid")}
        for wav in (file.with_suffix(".wav"), file.parent / fields["melody"]):
            info = soundfile.info(wav)
            assert (info.samplerate, info.channels, info.subtype, info.frames) == (8000, 1, "PCM_16", 24000)


def test_mistakes_are_told_in_one_sentence(tmp_path, monkeypatch):
    for options in ("--one nosuchtune --to x.wav", "--one Ode --instrument kazoo --to x.wav", "--one Ode",
                    "--seconds 0", "--workers 0", "--seed -1", "--bpm nan", "--clips 1 1 -1"):
        monkeypatch.setattr(sys, "argv", ["tunes.py", "--out", str(tmp_path), *options.split()])
        with pytest.raises(UserError):
            tunes.main()
    done = make(tmp_path, "--bpm", "0")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_asset_is_what_its_command_makes(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "data/tunes.py", "--one", "Ode to Joy", "--instrument", "piano",
                           "--seconds", "10", "--to", str(tmp_path / "ode.wav")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh, _ = soundfile.read(tmp_path / "ode.wav")
    shipped, rate = soundfile.read(ROOT / "assets/ode_to_joy.wav")
    assert rate == RATE and np.abs(fresh - shipped).max() < 1e-3  # other processors round otherwise
