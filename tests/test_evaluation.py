"""`train.py --eval`: figures of a language model and of a codec on held-out data.

    python -m pytest tests/test_evaluation.py
"""
import json

import numpy as np

from config import Config
from evaluation.evaluate import evaluate
from evaluation.metrics import frechet_distance
from training_runs import settings


def test_evaluation_of_a_language_model(lm_run, training_data):
    figures = evaluate(Config(**settings(training_data, lm_run, "lm", n_eval_wavs=3)), "train")
    melody = {"segments_melody_cosine", "segments_melody_agreement", "segments_melody_agreement_shuffled"}
    assert {"ppl_1", "ppl_2", "own_loss", "frechet"} | melody <= figures.keys()
    assert figures == json.loads((lm_run / "eval_train.json").read_text()) and figures["frechet"] >= 0


def test_an_evaluation_samples_as_its_command_says(lm_run, training_data):
    def frechet(**changes):
        config = Config(**settings(training_data, lm_run, "lm", n_eval_wavs=3, **changes))
        return evaluate(config, "train")["frechet"]
    assert frechet(temperature=0.0) == frechet(temperature=0.0, seed=2) != frechet()
    assert frechet(cfg_coef=1.0) != frechet() != frechet(seed=2)


def test_evaluation_of_a_codec(codec_run, training_data):
    figures = evaluate(Config(**settings(training_data, codec_run, "codec")), "test")
    assert 0 <= figures["chroma_agreement"] <= 1 and figures["files"] == 1 and len(figures["perplexity"]) == 2


def test_frechet_distance_of_known_gaussians():
    x = np.random.default_rng(0).standard_normal((4000, 3))
    assert frechet_distance(x, x) < 1e-3
    assert abs(frechet_distance(x, 2 * x + [3, 0, 0]) - (9 + 3)) < 0.5
