"""What guidance does: music of the shipped model with guidance 1, 3 and 5, beside what was asked for.

    python tests/experiments/guidance.py                # a few minutes, most of them to train classifiers

Each piece has the text of a test tune, and its melody played by another instrument. It is measured as --eval
does (evaluation/): are the notes those of the tune, the instrument and the drums those of the text, and how
far is the sound from that of real clips? `real` are these clips: what the measures get wrong themselves.
"""
import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from evaluation import classifiers
from evaluation.adherence import ALONE, melody_figures, melody_for, waves_of, word_figures
from evaluation.clips import caption, clip
from evaluation.probes import log_mel_frechet
from evaluation.waves import generate, to_batch
from sample import MusicGen

FIGURES = "notes_right instrument drums log_mel_frechet".split()


def figures_of(wavs, others, asked, listeners, rate: int) -> dict:
    """Figures of waves (B, 1, L) that were to be like the clips `asked`; `others`: waves of other clips."""
    distance = log_mel_frechet(waves_of(others), waves_of(wavs), rate)
    words = word_figures(wavs, [one.truth for one in asked], listeners, rate)
    return words | melody_figures(wavs, asked, rate) | {"log_mel_frechet": distance}


def measure(model, count: int, strengths):
    """Yields ("real" or a strength of guidance, figures) of `count` pieces."""
    config = dataclasses.replace(model.config, segment_duration=classifiers.SECONDS)
    asked = [clip(config, "test", n, **ALONE) for n in range(count)]
    rng = np.random.default_rng(9)
    texts = [caption(one.truth, rng) for one in asked]
    melodies = [melody_for(config, "test", n, one.truth) for n, one in enumerate(asked)]
    torch.manual_seed(config.seed)
    listeners = classifiers.train_classifiers(config, model.codec)
    real = to_batch([one.mix for one in asked])
    others = to_batch([clip(config, "test", n + count, **ALONE).mix for n in range(count)])
    yield "real", figures_of(real, others, asked, listeners, config.sample_rate)
    for guidance in strengths:
        model.settings = model.settings._replace(guidance=guidance)
        wavs = generate(model, texts, melodies, config.segment_duration)
        yield guidance, figures_of(wavs, others, asked, listeners, config.sample_rate)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", default=str(ROOT / "checkpoints" / "tiny"))
    add("--clips", type=int, default=60, help="pieces for each strength")
    add("--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0])
    add("--classifier_clips", type=int, default=1200,
        help="that the classifiers learn from; --eval takes twice as many")
    args = parser.parse_args(argv)
    classifiers.CLIPS, classifiers.RECONSTRUCTED = args.classifier_clips, args.classifier_clips // 4
    model = MusicGen.from_pretrained(args.checkpoint, "cpu")
    print("guidance  " + "  ".join(FIGURES))
    for name, figures in measure(model, args.clips, args.guidance):
        print(f"{name!s:8}  " + "  ".join(f"{figures[key]:{len(key)}.3f}" for key in FIGURES), flush=True)


if __name__ == "__main__":
    main()
