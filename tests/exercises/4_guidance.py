"""Exercise 4: a different guidance rule.

Guidance pushes away from "no text, no melody" with one strength for both. Give the text a strength of its
own, with three passes, under both conditions, under the melody alone, and under neither:

    logits = null + guidance * (melody - null) + text_guidance * (both - melody)

At text_guidance = guidance this is the old rule. Add `text_guidance=None` (off) to `Settings` and
`condition_passes`.

    python tests/exercises/4_guidance.py        # checks your solution; 4_guidance.patch is one

Where: `sample.py` alone; `two_step` shows how several passes are made.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch

from config import Config
from encodec import EncodecModel
from lm import LMModel
from sample import MusicGen

CODEC = dict(sample_rate=8000, ratios=(5, 4), n_filters=2, dimension=8, lstm=1, card=16, kmeans_iters=0)
config = Config(dim=32, num_heads=2, num_layers=2, t5="bytes", radix2_exp=8, segment_duration=0.25, **CODEC)
torch.manual_seed(0)
model = MusicGen(LMModel(config), EncodecModel(Config(task="codec", **CODEC)))
for p in model.lm.conditioner.parameters():
    p.data.mul_(3)      # conditions hardly change what an untrained model plays
texts = ["a slow flute", "drums"]
melodies = [torch.eye(12)[torch.randint(12, (config.chroma_frames,))] for _ in texts]


def play(texts=texts, **settings):
    return model.generate_codes(texts, melodies, duration=0.1, seeds=[0, 1], guidance=3.0, **settings)


assert torch.equal(play(text_guidance=3.0), play(two_step=True)), "equal strengths are the old rule"
assert not torch.equal(play(text_guidance=0.0), play(two_step=True)), "the strength of the text does nothing"
no_text = play([None, None], two_step=True)
assert torch.equal(play(text_guidance=0.0), no_text), "strength 0: as if there were no text"
assert torch.equal(play(text_guidance=None), play()), "None: off"
print("solved: text and melody pull with strengths of their own")
