"""Exercise 3: rotary positions as other models have them.

`positional_embedding = "rope"` gives a melody frame the position of the music it belongs to, so that "look at
the melody now" is the same turn everywhere. How much does that help? To find out, add "rope_counted": rotary
too, but positions just count 0, 1, 2, ... over the frames that an item has, melody, text and music alike, as
"sin" does.

    python tests/exercises/3_rotary.py          # checks your solution; 3_rotary.patch is one

Where: `LMModel.positions`, and the choices of the key in `config.py`. Then train both:

    python train.py config/tiny.py --positional_embedding=rope --out_dir=out/aligned --epochs=1
    python train.py config/tiny.py --positional_embedding=rope_counted --out_dir=out/counted --epochs=1
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch

from config import Config
from lm import LMModel

config = Config(dim=32, num_heads=2, num_layers=2, card=8, t5="bytes", segment_duration=0.5,
                positional_embedding="rope_counted")
torch.manual_seed(0)
lm, texts = LMModel(config).eval(), ["a long description", "short"]
encoded = lm.conditioner({"text": texts, "melody": [None, None]}, 9)
P = encoded.prefix_length
lengths = [config.chroma_frames + len(text) + 1 for text in texts]      # melody, bytes, and the end token
positions = lm.positions(encoded, 0, 5, 2)
assert positions[0].tolist() == list(range(P + 5)), positions[0]
assert positions[1, :lengths[1]].tolist() == list(range(lengths[1])), positions[1]
assert positions[1, P:].tolist() == list(range(lengths[1], lengths[1] + 5)), "padding does not count"
with_cache = lm.positions(encoded, 3, 1, 2)
assert with_cache[:, 0].tolist() == [length + 3 for length in lengths], "column 3 with a cache"

sequence = torch.randint(9, (2, 4, 8))
with torch.no_grad():
    together = lm(sequence, encoded)
    alone = lm(sequence[1:], lm.conditioner({"text": texts[1:], "melody": [None]}, 9))
    assert (alone - together[1]).abs().max() < 1e-4, "a neighbor in the batch changes an item"
    cache = lm.new_cache(2, P + 8)
    columns = [lm(sequence[..., s:s + 1], encoded, cache) for s in range(8)]
    assert (torch.cat(columns, 2) - together).abs().max() < 1e-4, "column by column is not all at once"
    other_time = lm(sequence, encoded._replace(prefix_time=encoded.prefix_time * 7))
    assert torch.equal(other_time, together), "the time of the melody must not matter"
print("solved: positions count, in batches and with the cache")
