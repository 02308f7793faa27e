"""The measures of --eval on sounds of which the right value is known.

    python -m pytest tests/test_measures.py
"""
import numpy as np
import pytest
import torch

from evaluation import probes
from evaluation.drums import drum_figures, has_drums, strokes, strokes_per_beat
from evaluation.metrics import melody_accuracy
from evaluation.notes import heard_pitches, note_figures, right_notes, true_pitch

RATE = 16000


def tone(pitch: float, seconds: float, partials=(1.0, 0.5, 0.3, 0.2)):
    """A note with a short attack and release, (L,)."""
    time = np.arange(round(seconds * RATE)) / RATE
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    wave = sum(level * np.sin(2 * np.pi * n * frequency * time) for n, level in enumerate(partials, start=1))
    return 0.1 * wave * np.clip(np.minimum(time, seconds - time) / 0.01, 0, 1)


def play(pitches, length: float, partials=(1.0, 0.5, 0.3, 0.2)):
    """Pitches one after the other -> wave (L,), notes."""
    wave = np.concatenate([tone(pitch, length, partials) for pitch in pitches]).astype(np.float32)
    return wave, [(n * length, length, pitch) for n, pitch in enumerate(pitches)]


def kit(beat: float, seconds: float, until: float):
    """A burst of noise on every beat up to a time, (L,)."""
    rng = np.random.default_rng(0)
    wave = np.zeros(round(seconds * RATE), np.float32)
    decay = np.exp(-np.arange(round(0.2 * RATE)) / RATE / 0.08)
    for at in np.arange(0.1, until, beat):
        first = round(at * RATE)
        part = wave[first:first + len(decay)]
        part += 0.3 * rng.standard_normal(len(part)) * decay[:len(part)]
    return wave


# --- notes ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("partials", [(1.0,), (1.0, 0.8, 0.6, 0.4), (0.2, 1.0, 0.9), (1.0, 0.0, 0.6, 0.0)])
def test_the_tracker_hears_pitch_and_octave(partials):
    pitches = [50, 57, 64, 69, 76, 81, 88, 93]
    wave, notes = play(pitches, 0.3, partials)
    assert np.abs(heard_pitches(wave, RATE, notes) - pitches).max() < 0.3


@pytest.mark.parametrize("partials", [(1.0,), (1.0, 0.8, 0.6), (0.2, 1.0, 0.9), (0.0, 1.0, 0.9, 0.0, 0.4)])
def test_a_multiple_of_the_period_is_no_note(partials):
    wave = tone(69, 0.2, partials)
    assert [true_pitch(wave, RATE, pitch) for pitch in (45.0, 57.0, 69.0)] == [69.0] * 3


def test_silence_and_noise_have_no_pitch():
    notes = [(0.1, 0.5, 69)]
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    for wave in (np.zeros(RATE, np.float32), noise):
        heard = heard_pitches(wave, RATE, notes)
        assert not right_notes(heard, notes).any()


def test_wrong_notes_are_counted():
    wave, notes = play([60, 62, 64, 65, 67], 0.3)
    asked = [(start, length, pitch + (n == 2)) for n, (start, length, pitch) in enumerate(notes)]
    assert note_figures([(wave, notes)], RATE)["notes_right"] == 1
    assert note_figures([(wave, asked)], RATE)["notes_right"] == 0.8


def test_short_notes_are_counted_apart():
    wave, notes = play([60, 64, 67, 72], 0.15)
    long, long_notes = play([60, 64], 0.5)
    figures = note_figures([(wave, [(*note[:2], note[2] + 1) for note in notes]), (long, long_notes)], RATE)
    assert figures["short_notes_right"] == 0 and figures["notes_right"] == pytest.approx(2 / 6)


def test_a_note_in_the_wrong_octave_leaps_there_and_back():
    asked = [60, 62, 64, 65, 67, 69, 71, 72]
    _, notes = play(asked, 0.25)
    wave, _ = play([60, 62, 64, 77, 67, 69, 71, 72], 0.25)
    figures = note_figures([(wave, notes)], RATE)
    assert figures["notes_right"] == 1 and figures["octave_leaps"] == pytest.approx(2 * 10 / 2.0)


def test_a_melody_that_leaps_itself_has_no_leap():
    wave, notes = play([60, 72, 60, 52, 64], 0.3)
    assert note_figures([(wave, notes)], RATE)["octave_leaps"] == 0


def test_five_strokes_of_a_pitch_are_not_one_held_note():
    wave, notes = play([69] * 5, 0.3)
    held, _ = play([69], 1.5)
    assert note_figures([(wave, notes)], RATE)["repeated_notes_right"] == 1
    assert note_figures([(held, notes)], RATE)["repeated_notes_right"] == 0


def test_notes_are_heard_while_the_ones_before_ring_on():
    pitches = [60, 62, 64, 67, 65, 69, 67, 71, 67, 64]
    wave = np.zeros(3 * RATE, np.float32)
    decay = np.exp(-np.arange(RATE) / RATE / 0.6)
    for n, pitch in enumerate(pitches):
        first = round(0.2 * n * RATE)
        wave[first:first + RATE] += tone(pitch, 1.0) * decay
    notes = [(0.2 * n, 0.2, pitch) for n, pitch in enumerate(pitches)]
    assert note_figures([(wave, notes)], RATE)["notes_right"] >= 0.8     # 0.3 if nothing is cancelled


def test_notes_are_heard_through_drums_and_bass():
    wave, notes = play([69, 71, 73, 74, 76, 78, 80, 81], 0.4)
    bass, _ = play([37, 37, 44, 44, 37, 37, 44, 44], 0.4)
    mix = wave + 0.5 * bass + 0.3 * kit(0.4, 3.2, 3.2)
    assert note_figures([(mix, notes)], RATE)["notes_right"] >= 0.85


def test_melody_accuracy_is_the_share_of_time_with_the_right_pitch_class():
    """In any octave, whatever sounds below middle C."""
    wave, _ = play([72, 74, 76, 77], 0.5)
    other, _ = play([84, 86, 88, 78], 0.5)
    bass = np.sin(2 * np.pi * 55 * np.arange(len(wave)) / RATE).astype(np.float32)
    waves = [torch.from_numpy(one)[None, None] for one in (wave, other + 0.2 * bass)]
    assert melody_accuracy(*waves, RATE) == pytest.approx(0.75, abs=0.03)
    assert melody_accuracy(waves[0], waves[0], RATE) == 1


# --- drums ------------------------------------------------------------------------------------------------

def test_strokes_are_found_where_they_are():
    wave, _ = play([60, 64, 67, 72] * 3, 0.5)
    times = strokes(wave + kit(0.5, 6.0, 6.0), RATE)
    np.testing.assert_allclose(times, np.arange(0.1, 6.0, 0.5), atol=0.06)
    assert strokes_per_beat(times, 0.5, 0.0, 6.0) == 1
    assert strokes_per_beat(times, 1.0, 0.0, 6.0) == 1      # eighths do not count


def test_a_melody_alone_has_no_strokes():
    wave, _ = play([60, 64, 67, 72] * 3, 0.5, partials=[1 / n for n in range(1, 20)])
    assert not len(strokes(wave, RATE)) and not has_drums(wave, RATE, 0.5)
    assert not len(strokes(np.zeros(RATE, np.float32), RATE))


def test_drums_that_vanish():
    melody, _ = play([60, 64, 67, 72] * 10, 0.5)
    stays, vanishes = (melody + kit(0.5, 20.0, until) for until in (20.0, 12.4))
    figures = drum_figures([(stays, 0.5), (vanishes, 0.5)], RATE)
    assert figures["drums_vanish"] == 0.5
    assert figures["strokes_per_beat_0_to_5s"] == pytest.approx(1)
    assert figures["strokes_per_beat_10_to_15s"] == pytest.approx(0.75, abs=0.05)
    assert figures["strokes_per_beat_15_to_20s"] == pytest.approx(0.5)


# --- probes of a codec ------------------------------------------------------------------------------------

def same(wave):
    return wave


def test_a_perfect_codec_passes_all_probes():
    figures = probes.probes(same, RATE)
    assert figures["silence_dbfs"] == -120
    for name, value in figures.items():
        if name.startswith("sine_loss"):
            assert value == pytest.approx(0, abs=1e-6)
        if name.startswith("absent_partials"):
            assert value < -60


def test_probes_say_how_much_is_lost_and_added():
    buzz = 0.01 * np.sin(2 * np.pi * 50 * np.arange(RATE * 3) / RATE)
    assert probes.silence_level(lambda wave: wave + buzz[:len(wave)], RATE) == pytest.approx(-43, abs=0.1)
    assert probes.sine_loss(lambda wave: 0.1 * wave, 88, RATE) == pytest.approx(20, abs=0.01)
    # sums and differences of the partials at 8 f: 0.5 LEVEL^2 (1/7 + 1/15 - 1/9), more than at 2, 4 and 6 f
    bent = probes.absent_partials(lambda wave: wave + 0.5 * wave ** 2, "odd partials", RATE)
    assert bent == pytest.approx(20 * np.log10(0.5 * 0.2 * (1 / 7 + 1 / 15 - 1 / 9)), abs=0.1)


def test_distances_of_known_differences():
    rng = np.random.default_rng(0)
    wave = 0.1 * rng.standard_normal(RATE).astype(np.float32)
    none = probes.distances([(wave, wave)], RATE)
    assert none["log_mel_l1"] == 0 and none["log_mel_frechet"] < 1e-3 and none["si_snr"] > 60
    assert none["stft_distance"] == 0
    half = probes.distances([(wave, 0.5 * wave)], RATE)
    assert half["log_mel_l1"] == pytest.approx(6.02, abs=0.01)
    assert half["log_mel_frechet"] == pytest.approx(probes.N_MELS * 6.02 ** 2, rel=0.01)
    assert half["stft_distance"] == pytest.approx(0.5 + np.log(2), abs=1e-3)
    quiet = 1e-6 * wave
    unheard = probes.distances([(quiet, 0 * quiet)], RATE)
    assert unheard["log_mel_l1_floored"] == 0


def test_mel_bands_are_in_dbfs():
    sine = probes.tone([1000.0], [1.0], RATE)
    frames = probes.log_mel_frames(probes.middle(sine), RATE)
    assert -6 < np.median(frames.max(1)) < 3


@pytest.mark.skipif(not probes.has_opus(), reason="needs ffmpeg, or opusenc and opusdec")
def test_opus_is_aligned_and_better_with_more_bits():
    wave, _ = play([60, 64, 67, 72], 0.5)
    outputs = [probes.opus_roundtrip(wave, RATE, kbps) for kbps in (12, 32)]
    few, many = (probes.distances([(wave, output)], RATE) for output in outputs)
    assert outputs[0].shape == wave.shape
    assert 3 < few["si_snr"] < many["si_snr"] and many["stft_distance"] < few["stft_distance"]
