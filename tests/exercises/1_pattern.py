"""Exercise 1: a new interleaving pattern.

Flattening (`UnrollPattern`) assumes nothing and costs K steps a frame; parallel costs one step and assumes the codebooks
of a frame independent. Write one between them: "anchor", which flattens every fourth frame, codebook after codebook, and
lays out the three after it in parallel. 8 frames of 4 codebooks then take 1 + 2 * (4 + 3) = 15 columns. Make
`--pattern=anchor` choose it.

    python tests/exercises/1_pattern.py         # checks your solution; 1_pattern.patch is one

Where: `patterns.py` (a `layout`, `from_config`) and the choices of `pattern` in `config.py`. Nothing else: training,
sampling and prompts learn of a pattern from its layout alone.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch

from config import Config
from lm import LMModel, condition_passes, generate
from patterns import from_config

config = Config(dim=16, num_heads=2, num_layers=1, card=8, t5="bytes", segment_duration=0.5, pattern="anchor")
pattern, codes = from_config(config), torch.randint(8, (2, 4, 8), generator=torch.Generator().manual_seed(0))
assert pattern.steps(8) == 15, f"{pattern.steps(8)} columns for 8 frames"
assert pattern.layout(8)[1:6] == [[(0, 0)], [(0, 1)], [(0, 2)], [(0, 3)], [(1, k) for k in range(4)]], pattern.layout(8)
for T in range(1, 9):       # every code is in the sequence once, and comes back
    sequence, mask = pattern.build(codes[..., :T], special=8)
    assert mask.sum() == 4 * T and torch.equal(pattern.revert(sequence, T, 8)[0], codes[..., :T])
torch.manual_seed(0)
lm = LMModel(config)
loss, ce = lm.loss(codes, ["a tune", None])
loss.backward()
assert ce.isfinite().all() and all(p.grad.isfinite().all() for p in lm.parameters() if p.grad is not None)
out = generate(lm.eval(), condition_passes(lm, ["a tune", None], 8), 8, [0, 1], prompt=codes[..., :3])
assert torch.equal(out[..., :3], codes[..., :3]) and out.min() >= 0 and out.max() < 8, out
print("solved: the model trains and plays with the pattern")
