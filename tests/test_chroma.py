"""Chroma against audiocraft's numbers, and the similarity of melodies that is measured with it.

    python -m pytest tests/test_chroma.py
"""
import numpy as np
import pytest
import soundfile
import torch

import chroma as chroma_module
from chroma import ChromaExtractor, chroma_filterbank, match_length
from deviations import golden, near, same
from evaluation.metrics import chroma_agreement, chroma_similarity
from system.errors import UserError

GOLDEN = golden("chroma")
SR = 16000


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- audiocraft's numbers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["c32", "c16"])
def test_chroma_equals_that_of_audiocraft(case):
    g = {key.removeprefix(f"{case}."): value for key, value in GOLDEN.items()}
    wav, short = g["wav"], g["wav"][..., :int(g["short_len"])]
    soft, hard = (ChromaExtractor(int(g["sample_rate"]), 12, int(g["radix2_exp"]), argmax)
                  for argmax in (False, True))
    near("chroma", "audiocraft", soft(wav), g["chroma"], 1e-5)
    same("chroma, argmax", "audiocraft", hard(wav), g["chroma_argmax"])
    near("chroma", "audiocraft", soft(short), g["short_chroma"], 1e-5)
    silence = torch.zeros(1, 1, 1)
    assert torch.equal(soft(silence), g["null_chroma"])
    assert torch.equal(hard(silence), g["null_chroma_argmax"])


def test_filterbank_equals_that_of_audiocraft():
    near("chroma, filter bank", "audiocraft", chroma_filterbank(16000, 4096), GOLDEN["c16.fbank"], 1e-6)
    some = chroma_filterbank(32000, 16384)[:, GOLDEN["c32.fbank_cols"]]
    near("chroma, filter bank", "audiocraft", some, GOLDEN["c32.fbank_sub"], 1e-6)


# --- the extractor ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("L", [1, 2, 1023, 1024, 1025, 2047, 4096, 5000])
def test_frames(L):
    extract = ChromaExtractor(SR, radix2_exp=10)
    wav = noise(2, L, seed=L)
    out = extract(wav)
    assert out.shape == (2, extract.frames(L), 12) and torch.equal(out.sum(-1), torch.ones(out.shape[:2]))
    assert torch.equal(out, extract(torch.stack([wav, wav], 1)))    # stereo of two equal sides
    assert torch.equal(out[1:], extract(wav[1:]))                   # an item does not depend on its batch


def test_argmax_names_the_pitch():
    time = torch.arange(SR) / SR
    for note in range(12):
        wav = torch.sin(2 * torch.pi * 440 * 2 ** ((note + 60 - 69) / 12) * time)[None]
        assert (ChromaExtractor(SR, radix2_exp=12)(wav).argmax(-1) == note).all()


def test_match_length():
    chroma = torch.eye(12)[None, :5]
    assert torch.equal(match_length(chroma, 3), chroma[:, :3])
    assert torch.equal(match_length(chroma, 12), chroma.repeat(1, 3, 1)[:, :12])
    for first in (2, 7):    # from a later frame on, as in the windows of long music
        assert torch.equal(match_length(chroma, 6, first), chroma.repeat(1, 3, 1)[:, 2:8])


# --- similarity -------------------------------------------------------------------------------------------

def test_similarity_is_the_share_of_equal_frames():
    a, b = noise(1, 1, 8192, seed=0), noise(1, 1, 8192, seed=1)
    extract = ChromaExtractor(SR, radix2_exp=10)
    equal = (extract(a).argmax(-1) == extract(b).argmax(-1))[:, :32].float().mean()  # ceil(8192 / 256) frames
    assert chroma_similarity(a, b, SR, radix2_exp=10) == pytest.approx(equal.item())
    cut = a[0, :, :5000]
    assert chroma_similarity(a[0], cut, SR, radix2_exp=10, argmax=False) == pytest.approx(1, abs=1e-3)
    assert chroma_agreement(extract(a), extract(a)[:, :7]) == 1
    assert 0 < chroma_similarity(a, b, SR, radix2_exp=10, argmax=False) < 1


# --- the demo ---------------------------------------------------------------------------------------------

def test_demo(tmp_path, capsys):
    tune = 0.3 * np.sin(2 * np.pi * 440 * np.arange(32000) / 32000)
    soundfile.write(tmp_path / "a.wav", np.stack([tune, tune], 1), 32000)
    for args in ([], [str(tmp_path / "a.wav")]):
        chroma_module.main(args)
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  A  ")]
    assert [line.count("#") for line in row[-2:]] == [8, 8]
    with pytest.raises(UserError, match="no.wav"):
        chroma_module.main([str(tmp_path / "no.wav")])
