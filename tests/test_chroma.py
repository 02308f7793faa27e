"""Chroma against the original's numbers, and what stem separation is worth.

    python -m pytest tests/test_chroma.py
"""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import chroma as chroma_module
from chroma import (ChromaExtractor, chroma_agreement, chroma_filterbank, chroma_similarity, hpss, match_length,
                    pick_stem, separate)
from config import UserError
from deviations import near, same

ROOT = Path(__file__).parent.parent
GOLDEN = np.load(ROOT / "tests/golden/chroma.npz")
SR = 16000


def golden(name):
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def extractor(case, argmax):
    return ChromaExtractor(int(GOLDEN[f"{case}.sample_rate"]), 12, int(GOLDEN[f"{case}.radix2_exp"]), argmax)


@pytest.mark.parametrize("case", ["c32", "c16"])
def test_equals_the_original(case):
    wav, short = golden(f"{case}.wav"), int(GOLDEN[f"{case}.short_len"])
    soft, hard = extractor(case, False), extractor(case, True)
    near("chroma", "original", soft(wav), golden(f"{case}.chroma"), 1e-5)
    same("chroma, argmax", "original", hard(wav), golden(f"{case}.chroma_argmax"))
    near("chroma", "original", soft(wav[..., :short]), golden(f"{case}.short_chroma"), 1e-5)
    silence = torch.zeros(1, 1, 1)
    assert torch.equal(soft(silence), golden(f"{case}.null_chroma"))
    assert torch.equal(hard(silence), golden(f"{case}.null_chroma_argmax"))


def test_filterbank_equals_the_original():
    near("chroma, filter bank", "original", chroma_filterbank(16000, 4096), GOLDEN["c16.fbank"], 1e-6)
    some = chroma_filterbank(32000, 16384)[:, GOLDEN["c32.fbank_cols"]]
    near("chroma, filter bank", "original", some, GOLDEN["c32.fbank_sub"], 1e-6)


@pytest.mark.parametrize("L", [1, 2, 1023, 1024, 1025, 2047, 4096, 5000])
def test_frames(L):
    extract = ChromaExtractor(SR, radix2_exp=10)
    wav = torch.randn(2, L, generator=torch.Generator().manual_seed(L))
    out = extract(wav)
    assert out.shape == (2, extract.frames(L), 12) and torch.equal(out.sum(-1), torch.ones(out.shape[:2]))
    assert torch.equal(out, extract(torch.stack([wav, wav], 1)))           # stereo of two equal sides
    assert torch.equal(out[1:], extract(wav[1:]))                          # an item does not depend on its batch


def test_argmax_names_the_pitch():
    time = torch.arange(SR) / SR
    for note in range(12):
        wav = torch.sin(2 * torch.pi * 440 * 2 ** ((note + 60 - 69) / 12) * time)[None]
        assert (ChromaExtractor(SR, radix2_exp=12)(wav).argmax(-1) == note).all()


def test_match_length():
    chroma = torch.eye(12)[None, :5]
    assert torch.equal(match_length(chroma, 3), chroma[:, :3])
    assert torch.equal(match_length(chroma, 12), chroma.repeat(1, 3, 1)[:, :12])


def test_similarity_is_the_share_of_equal_frames():
    a, b = (torch.randn(1, 1, 8192, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    extract = ChromaExtractor(SR, radix2_exp=10)
    equal = (extract(a).argmax(-1) == extract(b).argmax(-1))[:, :32].float().mean()  # ceil(8192 / 256) frames
    assert chroma_similarity(a, b, SR, radix2_exp=10) == pytest.approx(equal.item())
    assert chroma_similarity(a[0], a[0, :, :5000], SR, radix2_exp=10, argmax=False) == pytest.approx(1, abs=1e-3)
    assert chroma_agreement(extract(a), extract(a)[:, :7]) == 1
    assert 0 < chroma_similarity(a, b, SR, radix2_exp=10, argmax=False) < 1


def melody_and_mix(seed, seconds=12):
    """A tune in C4 ... G5, and the same under a louder bass in E1 ... G#2 and as loud drums."""
    rng = np.random.default_rng(seed)

    def tone(note, seconds, harmonics, decay):
        t = np.arange(int(seconds * SR)) / SR
        f = 440 * 2 ** ((note - 69) / 12)
        wave = sum(np.sin(2 * np.pi * f * h * t) / h ** 1.2 for h in range(1, harmonics + 1))
        return wave * np.exp(-decay * t) * np.minimum(1, t / 0.01) * np.minimum(1, (t[-1] - t) / 0.02)

    def hit(i):
        t = np.arange(int(0.25 * SR)) / SR
        noise, kick = rng.standard_normal(len(t)), np.sin(2 * np.pi * (60 * t - np.exp(-20 * t)))
        return (2 * kick * np.exp(-15 * t), 0.7 * noise * np.exp(-60 * t), noise * np.exp(-20 * t),
                0.7 * noise * np.exp(-60 * t))[i % 4]

    melody = np.concatenate([tone(rng.choice([60, 62, 64, 65, 67, 69, 71, 72, 74, 76, 77, 79]), 0.5, 6, 2)
                             for _ in range(2 * seconds)])
    bass = np.concatenate([tone(rng.choice([28, 29, 31, 33, 35, 36, 38, 40, 41, 43, 44]), 0.5, 5, 3)
                           for _ in range(2 * seconds)])
    drums = np.concatenate([hit(i) for i in range(4 * seconds)])
    melody, bass, drums = (torch.from_numpy((x / x.std()).astype(np.float32))[None] for x in (melody, bass, drums))
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


def test_demucs_missing_says_what_to_do(monkeypatch):
    monkeypatch.setattr(chroma_module.importlib.util, "find_spec", lambda name: None)
    assert pick_stem("auto") == "hpss"
    with pytest.raises(UserError, match="pip install demucs.*hpss"):
        separate(torch.zeros(1, 1000), SR, "demucs")


def test_demucs_keeps_vocals_and_other(monkeypatch, tmp_path):
    """With a stand-in for the package: its four stems are the mix times 1, 10, 100, 1000."""
    package = tmp_path / "demucs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pretrained.py").write_text(
        "import torch\nclass Model(torch.nn.Module):\n    samplerate, audio_channels = 16000, 2\n"
        "    sources = ['drums', 'bass', 'other', 'vocals']\n"
        "def get_model(name):\n    assert name == 'htdemucs'\n    return Model()\n")
    (package / "apply.py").write_text(
        "import torch\ndef apply_model(model, mix, device):\n"
        "    return mix[:, None] * torch.tensor([1., 10., 100., 1000.], device=device)[None, :, None, None]\n")
    (package / "audio.py").write_text(
        "def convert_audio(wav, a, b, channels):\n    assert a == b\n"
        "    return wav.mean(-2, keepdim=True).expand(*wav.shape[:-2], channels, wav.shape[-1])\n")
    monkeypatch.syspath_prepend(tmp_path)
    chroma_module._load_demucs.cache_clear()
    wav = torch.randn(2, 3000)
    assert pick_stem("auto") == "demucs"
    torch.testing.assert_close(separate(wav, SR, "auto"), 1100 * wav.mean(0, keepdim=True))
    chroma_module._load_demucs.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "demucs"]:
        del sys.modules[name]


def test_demo(tmp_path, capsys):
    import soundfile
    tune = 0.3 * np.sin(2 * np.pi * 440 * np.arange(32000) / 32000)
    soundfile.write(tmp_path / "a.wav", np.stack([tune, tune], 1), 32000)
    for args in ([], [str(tmp_path / "a.wav")]):
        chroma_module.main(args)
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  A  ")]
    assert [line.count("#") for line in row[-2:]] == [8, 8]
    with pytest.raises(UserError, match="no.wav"):
        chroma_module.main([str(tmp_path / "no.wav")])
