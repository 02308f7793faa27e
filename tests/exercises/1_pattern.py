"""Exercise 1: a new interleaving pattern.

Flattening (`UnrollPattern`) assumes nothing and takes K columns a frame; parallel takes one column and
assumes that the codebooks of a frame are independent. Write one between them: "anchor", which flattens every
fourth frame, codebook after codebook, and lays out the three after it in parallel. 8 frames of 4 codebooks
then take 1 + 2 * (4 + 3) = 15 columns. Make `--pattern=anchor` choose it.

    python tests/exercises/1_pattern.py         # checks your solution; 1_pattern.patch is one

Where: `patterns.py` (a `layout`, `from_config`) and the choices of `pattern` in `config.py`. Nothing else:
training, sampling and prompts need no more of a pattern than its layout.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch

from config import Config
from lm import LMModel
from patterns import from_config
from sample import condition_passes, generate

config = Config(dim=16, num_heads=2, num_layers=1, card=8, t5="bytes", segment_duration=0.5, pattern="anchor")
pattern = from_config(config)
codes = torch.randint(8, (2, 4, 8), generator=torch.Generator().manual_seed(0))
assert pattern.steps(8) == 15, f"{pattern.steps(8)} columns for 8 frames"
flattened, parallel = [[(0, k)] for k in range(4)], [(1, k) for k in range(4)]
assert pattern.layout(8)[1:6] == [*flattened, parallel], pattern.layout(8)
for T in range(1, 9):       # every code is in the sequence once, and comes back
    sequence, mask = pattern.build(codes[..., :T], special=8)
    back, _ = pattern.revert(sequence, T, special=8)
    assert mask.sum() == 4 * T and torch.equal(back, codes[..., :T])

torch.manual_seed(0)
lm = LMModel(config)
conditions = {"text": ["a tune", None], "melody": [None, None]}
loss, ce = lm.loss(codes, conditions)
loss.backward()
gradients = [p.grad for p in lm.parameters() if p.grad is not None]
assert ce.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
passes = condition_passes(lm.eval(), conditions, T=8)
out = generate(lm, passes, T=8, seeds=[0, 1], prompt=codes[..., :3])
assert torch.equal(out[..., :3], codes[..., :3]) and out.min() >= 0 and out.max() < 8, out
print("solved: the model trains and plays with the pattern")
