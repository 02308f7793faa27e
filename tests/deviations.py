"""How far every stage is from its reference: the comparisons of the tests, and a table of the largest deviations.

    python tests/deviations.py          # runs the tests that compare, then prints the table

The references: "original", numbers of audiocraft kept in tests/golden, and "transformers", its classes with random
weights. A deviation is max|a - b| / max|b| over an array; codes, tokens and masks must be equal.
"""
import sys
from pathlib import Path

import torch

seen = {}       # (stage, reference) -> [largest deviation, its limit, numbers compared]; a limit of 0: must be equal


def near(stage: str, reference: str, ours, theirs, limit: float):
    """Asserts that ours deviates from theirs, arrays or numbers, by less than limit."""
    a, b = (torch.as_tensor(x).detach().double() for x in (ours, theirs))
    assert a.shape == b.shape, f"{stage}: {tuple(a.shape)}, not {tuple(b.shape)}"
    deviation = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
    note(stage, reference, deviation, limit, a.numel())
    assert deviation < limit, f"{stage}: deviates from {reference} by {deviation:.1e}, not below {limit:.0e}"


def same(stage: str, reference: str, ours, theirs):
    """Asserts that ours equals theirs."""
    assert torch.equal(ours, theirs), f"{stage}: differs from {reference}"
    note(stage, reference, 0.0, 0.0, ours.numel())


def note(stage, reference, deviation, limit, count):
    row = seen.setdefault((stage, reference), [0.0, 0.0, 0])
    row[:] = max(row[0], deviation), max(row[1], limit), row[2] + count


def main():
    import pytest
    names = "chroma patterns rvq encodec lm optim transformers".split()
    code = pytest.main(["-q", "-k", "(original or golden or transformers) and not memory", *(str(Path(__file__).with_name(f"test_{name}.py")) for name in names)])
    import deviations       # the tests know this file by that name
    print(f"\n{'stage':42} {'reference':13} {'deviation':>10} {'limit':>7} {'numbers compared':>17}")
    for (stage, reference), (deviation, limit, count) in deviations.seen.items():
        found = f"{deviation:10.1e} {limit:7.0e}" if limit else f"{'equal':>10} {'equal':>7}"
        print(f"{stage:42} {reference:13} {found} {count:17,}")
    return code


if __name__ == "__main__":
    sys.exit(main())
