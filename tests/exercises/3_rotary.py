"""Exercise 3: rotary positions as other models have them.

`positional_embedding = "rope"` gives a melody frame the position of the music it belongs to, so that "look at the melody
now" is the same turn everywhere. How much does that help? To find out, add "rope_counted": rotary too, but positions just
count 0, 1, 2, ... over the frames that an item has, melody, text and music alike, as "sin" does.

    python tests/exercises/3_rotary.py          # checks your solution; 3_rotary.patch is one

Where: `LMModel.positions`, and what `LMModel` does for positions that turn. Then train both:

    python train.py config/tiny.py --positional_embedding=rope --out_dir=out/aligned --epochs=1
    python train.py config/tiny.py --positional_embedding=rope_counted --out_dir=out/counted --epochs=1
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch

from config import Config
from lm import Cache, LMModel, condition_passes

config = Config(dim=32, num_heads=2, num_layers=2, card=8, t5="bytes", segment_duration=0.5, positional_embedding="rope_counted")
torch.manual_seed(0)
lm, texts = LMModel(config).eval(), ["a long description", "short"]
conditions, = condition_passes(lm, texts, 8, guidance=1)
positions, M = lm.positions(conditions, 0, 5, 2, "cpu"), config.chroma_frames
lengths = [M + len(text) + 1 for text in texts]             # bytes, and the end token
P = conditions.prefix.shape[1]
assert positions[0].tolist() == list(range(P + 5)), positions[0]
assert positions[1, :lengths[1]].tolist() == list(range(lengths[1])), positions[1]
assert positions[1, P:].tolist() == list(range(lengths[1], lengths[1] + 5)), "padding does not count"
assert lm.positions(conditions, 3, 1, 2, "cpu")[:, 0].tolist() == [n + 3 for n in lengths], "step 3 with a cache"
sequence = torch.randint(9, (2, 4, 8))
with torch.no_grad():
    together, (one,) = lm(sequence, conditions), condition_passes(lm, texts[1:], 8, guidance=1)
    assert (lm(sequence[1:], one) - together[1]).abs().max() < 1e-4, "a neighbour in the batch changes an item"
    cache = Cache(config, 2, P + 8, "cpu", torch.float32)
    steps = torch.cat([lm(sequence[..., s:s + 1], conditions, cache) for s in range(8)], 2)
    assert (steps - together).abs().max() < 1e-4, "step by step is not all at once"
    still = lm(sequence, conditions._replace(prefix_time=conditions.prefix_time * 7))
    assert torch.equal(still, together), "the time of the melody must not matter"
print("solved: positions count, in batches and with the cache")
