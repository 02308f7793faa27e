"""Fixtures that several files need, each made once: a small world of models, and a few runs of training."""
from pathlib import Path

import pytest
import soundfile
import torch

from checkpoints.lm_formats import export_transformers
from commands import snapshot
from config import Config
from constants import CODEC, LM, RATE, tone
from data import prepare
from encodec import EncodecModel
from lm import LMModel
from sample import MusicGen
from sampling.takes import write_codes
from side_by_side import run_tests
from train import train
from training_runs import ADVERSARIAL, all_runs, begun_on_two_processes, settings, write_data


def pytest_runtest_setup():
    """A test's random numbers are its own: not those that the tests before it in its process leave over."""
    torch.manual_seed(0)


def pytest_runtestloop(session):
    return run_tests(session)


def make_world(root: Path) -> Path:
    """Models, recordings and prepared data in root: codec, hf_codec, lm, text, hf, audio, tokens, take."""
    torch.manual_seed(0)
    codec = EncodecModel(Config(**CODEC | dict(task="codec", kmeans_iters=0))).eval()
    for book in codec.quantizer.codebooks:
        book.embed.normal_()
    codec.save(root / "codec")
    codec.to_hf(root / "hf_codec")
    lm = LMModel(Config(**LM)).eval()
    MusicGen(lm, codec).save(root / "lm")
    MusicGen(LMModel(Config(**LM | dict(melody="none", text="cross"))), codec).save(root / "text")
    export_transformers(lm, codec, root / "hf")
    (root / "audio").mkdir()
    for n in range(4):
        soundfile.write(root / "audio" / f"{n}.wav", tone(0.6, frequency=220.0 * (n + 1), seed=n), RATE)
    argv = ["--codec", str(root / "codec"), "--radix2_exp", "8", "--stem", "none", "--device", "cpu"]
    assert prepare.main([str(root / "audio"), "--out", str(root / "tokens"), *argv]) == 0
    write_codes(root / "take.npz", torch.randint(32, (4, 40)))
    return root


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture()
def untouched_world(world):
    """Whatever a test does, the models, recordings and data of the world stay as they are."""
    before = snapshot(world)
    yield
    assert snapshot(world) == before


@pytest.fixture(scope="session")
def loaded(world):
    """The language model of the world, with its codec."""
    return MusicGen.from_pretrained(world / "lm", "cpu")


@pytest.fixture()
def model(loaded, monkeypatch):
    """sample.py finds the model loaded: to load it each time would take longer than all the rest."""
    monkeypatch.setattr(MusicGen, "from_pretrained", lambda *_: loaded)


# --- runs of training (training_runs.py) ------------------------------------------------------------------

@pytest.fixture(scope="session")
def training_data(tmp_path_factory):
    """A folder with recordings in `audio`, prepared tokens in `tokens`, a codec for them in `codec`."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def lm_run(training_data, tmp_path_factory):
    """The reference for a language model: 20 updates on one process."""
    out = tmp_path_factory.mktemp("lm") / "out"
    train(Config(**settings(training_data, out, "lm")))
    return out


@pytest.fixture(scope="session")
def codec_run(training_data, tmp_path_factory):
    """The reference for a codec: 20 updates on one process, with all that its training can have."""
    out = tmp_path_factory.mktemp("codec") / "out"
    train(Config(**settings(training_data, out, "codec", sample_every=20, **ADVERSARIAL)))
    return out


@pytest.fixture(scope="session", autouse=True)
def two_processes_begun(request, tmp_path_factory):
    """The runs on two processes begin before the first test, if any test needs them, and go on beside it."""
    if not any("two_processes" in item.fixturenames for item in request.session.items):
        yield
        return
    data, root = request.getfixturevalue("training_data"), tmp_path_factory.mktemp("two")
    with begun_on_two_processes(all_runs(data, root), root / "log") as runs:
        yield root, runs


@pytest.fixture(scope="session")
def two_processes(two_processes_begun):
    """A folder with a run of each name in TWO_PROCESSES, IN_HALF and RESUMED, and one of the codec."""
    root, runs = two_processes_begun
    assert runs.wait() == 0, (root / "log").read_text()[-3000:]
    return root
