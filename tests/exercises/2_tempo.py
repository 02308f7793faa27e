"""Exercise 2: a new conditioner.

Captions say "at 104 bpm", but a text encoder sees digits, and has to learn from examples that 104 is near
105. Give the tempo that a text names ("104 bpm", "104 beats per minute") a frame of its own in front of the
text: log2(bpm / 60) as (cos, sin) of a quarter turn an octave, through a linear layer. Where the text names
none, it is a frame of zeros that nobody attends to. `--tempo=True` turns it on; by default nothing changes.

    python tests/exercises/2_tempo.py           # checks your solution; 2_tempo.patch is one

Where: a key in `config.py`, one that fine-tuning inherits (`architecture`); in `conditioners.py` one small
module like `ChromaConditioner`, and two or three lines of `Conditioners`. The null condition of guidance and
word dropout then work by themselves: why?
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch

from conditioners import Conditioners
from config import FIELDS, INHERITED, Config
from lm import LMModel

assert "tempo" in FIELDS, "config.py has no key `tempo` yet"
assert "tempo" in INHERITED, "fine-tuning must keep what a checkpoint was made with"
plain = Config(dim=16, num_heads=2, num_layers=2, card=8, t5="bytes", segment_duration=0.5, melody="none")
config = dataclasses.replace(plain, tempo=True)
torch.manual_seed(0)


def conditions(*texts):
    return {"text": list(texts), "melody": [None] * len(texts)}


encode = Conditioners(config)
batch = conditions("a tune at 104 bpm", "a tune, 60 beats per minute", "a tune", None)
given, without = encode(batch), Conditioners(plain)(batch)
assert given.prefix.shape[1] == without.prefix.shape[1] + 1, "one frame more"
assert given.prefix_mask[:, 0].tolist() == [True, True, False, False], "no tempo, no frame"
assert not given.prefix[2:, 0].any(), "no tempo, a frame of zeros"
first = {bpm: encode(conditions(f"a tune at {bpm} bpm")).prefix[0, 0] for bpm in (60, 61, 120)}
near, far = (first[60] - first[61]).norm(), (first[60] - first[120]).norm()
assert near < 0.2 * far and first[60].any(), "near tempi are near"
guided = encode(batch, guidance=True)
assert not guided.prefix[4:].any(), "the null condition is zeros"
assert torch.equal(guided.prefix_mask[4:], guided.prefix_mask[:4]), "the null condition is as long"

lm = LMModel(config)        # slow tunes are full of code 1, fast ones of code 6
slow_and_fast = torch.tensor([1, 6])[:, None, None].expand(2, 4, 12)
optimizer = torch.optim.Adam(lm.parameters(), 1e-2)
for _ in range(30):
    loss, _ = lm.loss(slow_and_fast, conditions("a tune at 60 bpm", "a tune at 150 bpm"))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert loss < 0.1, f"cross-entropy {loss:.2f} nats after 30 updates"
print("solved: the model knows the tempo")
