"""The edge of numbers: settings and input at the edge of sense, which have a meaning all the same.

    python -m pytest tests/test_edges.py
"""
import math

import numpy as np
import pytest
import soundfile
import torch

from commands import sampling, worked
from config import Config
from constants import CODEC, LM, RATE
from damage import encoded
from encodec import EncodecModel
from lm import LMModel
from sample import MusicGen, draw
from system.errors import UserError

pytestmark = pytest.mark.usefixtures("untouched_world")
EDGES = {  # flags of sample.py
    "guidance 0": "--guidance 0",
    "guidance 1": "--guidance 1",
    "guidance 50": "--guidance 50",
    "guidance -3": "--guidance -3",
    "temperature 0": "--temperature 0",
    "temperature 1e-30": "--temperature 1e-30",
    "temperature 1e30": "--temperature 1e30",
    "temperature inf": "--temperature inf",
    "top_k above": "--top_k 1000000",
    "top_k 1": "--top_k 1",
    "top_k 0": "--top_k 0",
    "top_p 1": "--top_p 1",
    "top_p tiny": "--top_p 1e-30",
    "0.02 s": "--duration 0.02",
    "1e-9 s": "--duration 1e-9",
    "two_step": "--two_step",
    "seed huge": f"--seed {2 ** 62 - 1}",
    "long": "--duration 0.7",
    "all": "--guidance 50 --temperature 1e-30 --top_k 1 --top_p 1",
    "stem hpss": "--stem hpss",
}
MELODIES = {
    "none": None,
    "silent": encoded(wave=np.zeros((4000, 1))),
    "short": encoded(wave=np.full((1, 1), 0.5)),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("melody", MELODIES)
def test_edges_of_sampling(world, model, tmp_path, edge, melody):
    argv = EDGES[edge].split()
    duration = float(argv[argv.index("--duration") + 1]) if "--duration" in argv else 0.05
    if MELODIES[melody]:
        (tmp_path / "melody.wav").write_bytes(MELODIES[melody])
        argv += ["--melody", "melody.wav"]
    worked(sampling(world, "--out", "x.wav", "--text", "a tune", *argv, cwd=tmp_path))
    wav, rate = soundfile.read(tmp_path / "x.wav")
    assert rate == RATE and len(wav) == max(1, round(duration * RATE)) and np.isfinite(wav).all()


def test_extreme_temperatures_are_greedy_and_uniform():
    logits = torch.tensor([[[1.0, 5.0, 3.0, -2.0]]])
    for temperature in (0, 1e-45, 1e-30, 1e-6, 1e-3):
        assert draw(logits, torch.tensor([[0.999]]), temperature).item() == 1
    draws = [draw(logits, torch.tensor([[u]]), math.inf).item() for u in (0.1, 0.3, 0.6, 0.9)]
    assert sorted(draws) == [0, 1, 2, 3]


def test_all_zero_chroma_is_a_melody_like_any_other(loaded):
    codes = loaded.generate_codes(["x"], [torch.zeros(9, 12)], duration=0.1)
    assert codes.shape == (1, 4, 40) and 0 <= codes.min() and codes.max() < 32


EMPTY = {  # arguments of MusicGen.generate
    "nothing": dict(descriptions=[]),
    "nothing, no melodies": dict(descriptions=[], melodies=[]),
    "no melodies": dict(descriptions=["a"], melodies=[]),
    "no seeds": dict(descriptions=["a"], seeds=[]),
    "empty melody": dict(descriptions=["a"], melodies=[torch.zeros(1, 0)]),
    "melody of nan": dict(descriptions=["a"], melodies=[torch.full((1, 99), math.nan)]),
    "empty prompt": dict(descriptions=["a"], prompt=torch.zeros(1, 0)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_batches_are_refused(loaded, name):
    with pytest.raises(UserError):
        loaded.generate(**EMPTY[name], duration=0.05)


@pytest.mark.slow  # half a minute
def test_ten_minutes_of_a_slow_model():
    """2,400 frames, four a second: a window moves on 30 times."""
    slow = dict(ratios=(20, 10, 10))
    torch.manual_seed(0)
    codec = EncodecModel(Config(**CODEC | slow | dict(task="codec", kmeans_iters=0)))
    model = MusicGen(LMModel(Config(**LM | slow | dict(segment_duration=30.0, extend_stride=18.0))), codec)
    chroma = torch.nn.functional.one_hot(torch.arange(5000) % 12, 12).float()
    wav = model.decode(model.generate_codes(["x"], [chroma], duration=600.0), 600.0)
    assert wav.shape == (1, 1, 600 * 8000) and wav.isfinite().all()
