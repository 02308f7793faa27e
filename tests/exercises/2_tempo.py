"""Exercise 2: a new conditioner.

Captions say "at 104 bpm", but a text encoder sees digits, and has to learn from examples that 104 is near 105. Give the
tempo a frame of its own in front of the text: log2(bpm / 60) as (cos, sin) of a quarter turn an octave, through a linear
layer; a frame of zeros that nobody attends to where the text names no tempo ("104 bpm", "104 beats per minute").
`--tempo=True` turns it on; by default nothing changes.

    python tests/exercises/2_tempo.py           # checks your solution; 2_tempo.patch is one

Where: `conditioners.py`, one small module like `ChromaConditioner` and two lines of `Conditioners`; a field in `config.py`,
and its name in ARCHITECTURE of `checkpoints/tuning.py`. The null condition of guidance and word dropout then work by themselves: why?
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch

from conditioners import Conditioners
from config import Config
from lm import LMModel
from checkpoints.tuning import ARCHITECTURE

config = Config(dim=16, num_heads=2, num_layers=2, card=8, t5="bytes", segment_duration=0.5, melody="none", tempo=True)
assert "tempo" in ARCHITECTURE, "fine-tuning must keep what a checkpoint was made with"
torch.manual_seed(0)
texts, encode = ["a tune at 104 bpm", "a tune, 60 beats per minute", "a tune", None], Conditioners(config)
told, plain = encode(texts), Conditioners(Config(**{**vars(config), "tempo": False}))(texts)
assert told.prefix.shape[1] == plain.prefix.shape[1] + 1, "one frame more"
assert told.prefix_mask[:, 0].tolist() == [True, True, False, False] and not told.prefix[2:, 0].any(), "no tempo, no frame"
first = {bpm: encode([f"a tune at {bpm} bpm"]).prefix[0, 0] for bpm in (60, 61, 120)}
assert (first[60] - first[61]).norm() < 0.2 * (first[60] - first[120]).norm() and first[60].any(), "near tempi are near"
guided = encode(texts, guidance=True)
assert not guided.prefix[4:].any() and torch.equal(guided.prefix_mask[4:], guided.prefix_mask[:4]), "null: as long, and zero"
lm = LMModel(config)        # slow tunes are full of code 1, fast ones of code 6
slow_or_fast = torch.tensor([1, 6])[:, None, None].expand(2, 4, 12)
optimizer = torch.optim.Adam(lm.parameters(), 1e-2)
for _ in range(30):
    loss, _ = lm.loss(slow_or_fast, ["a tune at 60 bpm", "a tune at 150 bpm"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert loss < 0.1, f"cross-entropy {loss:.2f} nats after 30 updates"
print("solved: the model hears the tempo")
