"""How far every stage is from its reference: comparisons of the tests, and a table of largest deviations.

    python tests/deviations.py          # runs the tests that compare, then prints the table

The references: "audiocraft", its numbers as kept in tests/golden, and "transformers", its classes with random
weights. A deviation is max|a - b| / max|b| over an array; codes, tokens and masks must be equal.
"""
import sys
from pathlib import Path

import numpy as np
import torch

seen = {}       # (stage, reference) -> [largest deviation, its limit, numbers compared]; 0: equal


def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of tests/golden/NAME.npz, which audiocraft computed."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def near(stage: str, reference: str, found, expected, limit: float):
    """Asserts that `found`, arrays or numbers, deviates from the reference by less than limit."""
    a, b = (torch.as_tensor(x).detach().double() for x in (found, expected))
    assert a.shape == b.shape, f"{stage}: {tuple(a.shape)}, not {tuple(b.shape)}"
    deviation = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
    note(stage, reference, deviation, limit, a.numel())
    assert deviation < limit, f"{stage}: deviates from {reference} by {deviation:.1e}, not below {limit:.0e}"


def same(stage: str, reference: str, found, expected):
    """Asserts that `found` equals the reference."""
    assert torch.equal(found, expected), f"{stage}: differs from {reference}"
    note(stage, reference, 0.0, 0.0, found.numel())


def note(stage, reference, deviation, limit, count):
    row = seen.setdefault((stage, reference), [0.0, 0.0, 0])
    row[:] = max(row[0], deviation), max(row[1], limit), row[2] + count


def main():
    import pytest
    stages = "patterns rvq encodec chroma lm generation optim losses transformers".split()
    files = [str(Path(__file__).with_name(f"test_{stage}.py")) for stage in stages]
    code = pytest.main(["-q", "-k", "(audiocraft or transformers) and not memory", *files])
    import deviations       # the tests know this file by that name
    print(f"\n{'stage':42} {'reference':13} {'deviation':>10} {'limit':>7} {'numbers compared':>17}")
    for (stage, reference), (deviation, limit, count) in deviations.seen.items():
        found = f"{deviation:10.1e} {limit:7.0e}" if limit else f"{'equal':>10} {'equal':>7}"
        print(f"{stage:42} {reference:13} {found} {count:17,}")
    return code


if __name__ == "__main__":
    sys.exit(main())
