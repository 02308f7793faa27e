"""The melody's stem of a recording: what separation by medians is good for, and demucs where it is installed.

    python -m pytest tests/test_stems.py
"""
import dataclasses
import sys

import numpy as np
import pytest
import torch

from chroma import ChromaExtractor
from config import Config
from data import stems
from data.notes import pitch_classes
from data.stems import heard_notes, hpss, pick_stem, separate
from evaluation.metrics import chroma_agreement
from system.errors import UserError

SR = 16000
CONFIG = Config(sample_rate=SR, radix2_exp=13)


# --- hpss -------------------------------------------------------------------------------------------------

def note(pitch, seconds, harmonics, decay):
    """A MIDI pitch as samples, struck and fading."""
    t = np.arange(int(seconds * SR)) / SR
    f = 440 * 2 ** ((pitch - 69) / 12)
    wave = sum(np.sin(2 * np.pi * f * h * t) / h ** 1.2 for h in range(1, harmonics + 1))
    return wave * np.exp(-decay * t) * np.minimum(1, t / 0.01) * np.minimum(1, (t[-1] - t) / 0.02)


def drum(beat, rng):
    """Kick, hi-hat, snare, hi-hat in turn."""
    t = np.arange(int(0.25 * SR)) / SR
    noise, kick = rng.standard_normal(len(t)), np.sin(2 * np.pi * (60 * t - np.exp(-20 * t)))
    hat = 0.7 * noise * np.exp(-60 * t)
    return (2 * kick * np.exp(-15 * t), hat, noise * np.exp(-20 * t), hat)[beat % 4]


def melody_and_mix(seed, seconds=12):
    """A tune in C4 ... G5, and the same under a louder bass in E1 ... G#2 and as loud drums; (1, L) each."""
    rng = np.random.default_rng(seed)
    high, low = [60, 62, 64, 65, 67, 69, 71, 72, 74, 76, 77, 79], [28, 29, 31, 33, 35, 36, 38, 40, 41, 43, 44]
    melody = np.concatenate([note(rng.choice(high), 0.5, 6, 2) for _ in range(2 * seconds)])
    bass = np.concatenate([note(rng.choice(low), 0.5, 5, 3) for _ in range(2 * seconds)])
    drums = np.concatenate([drum(beat, rng) for beat in range(4 * seconds)])
    parts = [(x / x.std()).astype(np.float32) for x in (melody, bass, drums)]
    melody, bass, drums = (torch.from_numpy(part)[None] for part in parts)
    return 0.25 * melody, 0.25 * melody + 0.5 * bass + 0.4 * drums


def test_hpss_recovers_the_melody_from_a_mix():
    extract, agreement = ChromaExtractor(SR, radix2_exp=13), {"none": [], "hpss": []}
    for seed in range(3):
        melody, mix = melody_and_mix(seed)
        for stem in agreement:
            agreement[stem].append(chroma_agreement(extract(separate(mix, SR, stem)), extract(melody)))
    none, recovered = np.mean(agreement["none"]), np.mean(agreement["hpss"])
    print(f"frames with the melody's pitch class: none {none:.3f}, hpss {recovered:.3f}")
    assert none < 0.75 and recovered > 0.9 and recovered > none + 0.2
    melody, _ = melody_and_mix(0)
    assert chroma_agreement(extract(separate(melody, SR, "hpss")), extract(melody)) > 0.9


def test_hpss_blocks_do_not_show():
    hop = 512  # at 16 kHz; a block is 1,000 hops
    wav = torch.randn(1100 * hop, generator=torch.Generator().manual_seed(0))
    late = hpss(wav[800 * hop:], SR)  # one block that has the other's edge in its middle
    torch.testing.assert_close(hpss(wav, SR)[900 * hop:], late[100 * hop:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("L", [1, 100, 1000, 5000])
@pytest.mark.parametrize("stem", ["none", "hpss"])
def test_any_length_and_silence(L, stem):
    for wav in (torch.randn(2, L), torch.zeros(1, L)):
        out = separate(wav, SR, stem)
        assert out.shape == (1, L) and out.isfinite().all()


def test_an_unknown_stem_is_refused():
    with pytest.raises(UserError, match="stem = 'drums'.*auto, none, hpss, demucs"):
        separate(torch.zeros(1, 1000), SR, "drums")


# --- the notes of a stem ----------------------------------------------------------------------------------

def bright_scale(cents=0.0):
    """A scale from A3, a quarter of a second each, whose third harmonic is the loudest -> (1, L), pitches."""
    pitches = [57, 59, 61, 62, 64, 66, 68, 69, 71, 73, 74, 76, 78, 80, 81]
    t = np.arange(SR // 2) / SR
    notes = []
    for pitch in pitches:
        f = 440 * 2 ** ((pitch + cents / 100 - 69) / 12)
        levels = {1: 0.3, 2: 0.4, 3: 1.0, 4: 0.5}
        notes.append(sum(level * np.sin(2 * np.pi * f * h * t) for h, level in levels.items()))
    wave = 0.2 * np.concatenate(notes)
    wave += 0.01 * np.random.default_rng(0).standard_normal(len(wave))
    return torch.from_numpy(wave.astype(np.float32))[None], torch.tensor(pitches)


@pytest.mark.parametrize("cents", [0, 35, -40])
def test_notes_are_heard_of_bright_sounds_in_any_tuning(cents):
    """Chroma hears them a fifth too high."""
    wav, pitches = bright_scale(cents)
    hop = CONFIG.hop
    note = torch.arange(wav.shape[1] // hop + 1) * hop / (SR // 2)      # which one is at a frame's center
    inside = (note - note.round()).abs() > 0.15                         # not near its ends
    classes = pitches[note.long().clamp(max=len(pitches) - 1)] % 12

    def right(one_hot):
        return (one_hot.argmax(-1) == classes)[inside].float().mean()
    assert right(pitch_classes(heard_notes(wav, CONFIG)[0], 12)) == 1
    assert right(ChromaExtractor(SR, radix2_exp=13)(wav)[0]) < 0.5


def test_what_is_silent_has_no_note():
    wav, _ = bright_scale()
    wav[:, SR:2 * SR] *= 1e-3
    notes = heard_notes(wav, CONFIG)[0].sum(-1)
    assert not notes[9:15].any() and notes[:7].all() and notes[17:].all()
    for L in (1, 5000):
        silence = heard_notes(torch.zeros(2, L), CONFIG)
        assert silence.shape == (2, L // 2048 + 1, 48) and not silence.any()


def test_a_note_begins_where_it_changes_and_where_it_is_struck_again():
    """A4 for a second, A4 struck again, A5: held frames between; a swell over half a second is no stroke."""
    t = np.arange(SR) / SR
    decay = np.exp(-2 * t)
    tone = np.sin(2 * np.pi * 440 * t) + 0.3 * np.sin(2 * np.pi * 880 * t)
    high = np.sin(2 * np.pi * 880 * t) + 0.3 * np.sin(2 * np.pi * 1760 * t)
    wave = np.concatenate([tone * decay, tone * decay, high * decay, tone * np.minimum(1, 0.3 + 1.4 * t)])
    notes = heard_notes(torch.from_numpy(wave.astype(np.float32))[None], CONFIG)[0].argmax(-1)
    begins = (notes >= 24).nonzero().flatten() * CONFIG.hop / SR
    assert torch.allclose(begins, torch.tensor([0.0, 1.0, 2.0, 3.0]), atol=0.13)
    assert (notes[2] % 24, notes[10] % 24, notes[18] % 24) == (21, 21, 9)   # A4 in an odd octave, A5 even


@pytest.mark.parametrize("tremolo, vibrato", [(0.2, 0), (0, 40), (0.15, 25)])
def test_a_voice_that_swells_or_sways_does_not_begin_again(tremolo, vibrato):
    """A held note with a tremolo (share of its loudness) and vibrato (cents), 5 a second, begins once."""
    config = dataclasses.replace(CONFIG, melody_form="notes")
    sway = torch.sin(2 * torch.pi * 5 * torch.arange(6 * SR) / SR)
    phase = 2 * torch.pi * torch.cumsum(440 * 2 ** (vibrato / 1200 * sway), 0) / SR
    wave = 0.2 * (1 + tremolo * sway) * sum(torch.sin(h * phase) / h for h in range(1, 6))
    assert heard_notes(wave[None], config)[0, :, 24:].sum() == 1



# --- demucs -----------------------------------------------------------------------------------------------

def test_demucs_missing_says_what_to_do(monkeypatch):
    monkeypatch.setattr(stems.importlib.util, "find_spec", lambda name: None)
    assert pick_stem("auto") == "hpss"
    with pytest.raises(UserError, match="pip install demucs.*hpss"):
        separate(torch.zeros(1, 1000), SR, "demucs")


DEMUCS = {      # a stand-in for the package: its four stems are the mix times 1, 10, 100, 1000
    "__init__.py": "",
    "pretrained.py": """
import torch
class Model(torch.nn.Module):
    samplerate, audio_channels = 16000, 2
    sources = ['drums', 'bass', 'other', 'vocals']
def get_model(name):
    assert name == 'htdemucs'
    return Model()
""",
    "apply.py": """
import torch
def apply_model(model, mix, device):
    return mix[:, None] * torch.tensor([1., 10., 100., 1000.], device=device)[None, :, None, None]
""",
    "audio.py": """
def convert_audio(wav, a, b, channels):
    assert a == b
    return wav.mean(-2, keepdim=True).expand(*wav.shape[:-2], channels, wav.shape[-1])
""",
}


def test_demucs_keeps_vocals_and_other(monkeypatch, tmp_path):
    (tmp_path / "demucs").mkdir()
    for name, content in DEMUCS.items():
        (tmp_path / "demucs" / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    stems._load_demucs.cache_clear()
    wav = torch.randn(2, 3000)
    assert pick_stem("auto") == "demucs"
    torch.testing.assert_close(separate(wav, SR, "auto"), 1100 * wav.mean(0, keepdim=True))
    stems._load_demucs.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "demucs"]:
        del sys.modules[name]
