"""Exercise 4: a different guidance rule.

Guidance pushes away from "no text, no melody" with one strength for both. Give the text a strength of its own:

    s = null + guidance * (melody - null) + text_guidance * (both - melody)

with three passes: both conditions, the melody alone, neither. At text_guidance = guidance this is the old rule.
Add `text_guidance=None` (off) to `condition_passes`, `generate` and `MusicGen.generate_codes`.

    python tests/exercises/4_guidance.py        # checks your solution; 4_guidance.patch is one

Where: `lm.py` (`two_step` shows how several passes are made), `sample.py`.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch

from config import Config
from encodec import EncodecModel
from lm import LMModel
from sample import MusicGen

numbers = dict(sample_rate=8000, ratios=(5, 4), n_filters=2, dimension=8, lstm=1, card=16, kmeans_init=False)
config = Config(dim=32, num_heads=2, num_layers=2, t5="bytes", radix2_exp=8, segment_duration=0.25, **numbers)
torch.manual_seed(0)
model = MusicGen(LMModel(config), EncodecModel(Config(task="codec", **numbers)))
for p in model.lm.conditioner.parameters():
    p.data.mul_(3)      # an untrained model hardly hears its conditions
melodies = [torch.eye(12)[torch.randint(12, (config.chroma_frames,))] for _ in range(2)]


def play(**settings):
    return model.generate_codes(["a slow flute", "drums"], melodies, duration=0.25, seeds=[0, 1], guidance=3.0, **settings)


old = play(two_step=True)
assert torch.equal(play(text_guidance=3.0), old), "equal strengths are the old rule"
assert not torch.equal(play(text_guidance=0.0), old), "the strength of the text does nothing"
silent = model.generate_codes([None, None], melodies, duration=0.25, seeds=[0, 1], guidance=3.0, two_step=True)
assert torch.equal(play(text_guidance=0.0), silent), "strength 0: as if there were no text"
assert torch.equal(play(), model.generate_codes(["a slow flute", "drums"], melodies, duration=0.25, seeds=[0, 1], guidance=3.0))
print("solved: text and melody pull with strengths of their own")
