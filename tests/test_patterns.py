"""Codebook patterns against audiocraft's numbers, and what must hold for any pattern.

    python -m pytest tests/test_patterns.py
"""
import pytest
import torch

import patterns
from config import Config
from deviations import golden, same
from patterns import (CoarseFirstPattern, DelayPattern, MusicLMPattern, ParallelPattern, UnrollPattern,
                      from_config)
from system.errors import UserError

GOLDEN = golden("patterns")
CODES, SPECIAL = GOLDEN["codes"], int(GOLDEN["special_token"])      # (B, K, T)
PATTERNS = {
    "delay": DelayPattern((0, 1, 2, 3)),
    "parallel": ParallelPattern(4),
    "unroll": UnrollPattern((0, 1, 2, 3)),
    "coarse_first": CoarseFirstPattern((0, 0, 0)),
    "musiclm": MusicLMPattern(4, group_by=2),
    "delay_empty2": DelayPattern((0, 1, 2, 3), empty_initial=2),
    "delay_noinit": DelayPattern((0, 1, 2, 3), empty_initial=-1),
    "delay_flat3": DelayPattern((0, 1, 2, 3), flatten_first=3),
    "delay_uneven": DelayPattern((0, 0, 2, 5)),
    "unroll_partial": UnrollPattern((0, 1, 1, 2)),
    "unroll_delayed": UnrollPattern((0, 1, 1, 1), (0, 2, 2, 2)),
    "coarse_first_delay": CoarseFirstPattern((0, 1, 3)),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("keep", [False, True])
def test_equals_audiocraft(name, keep):
    pattern, T, prefix = PATTERNS[name], CODES.shape[2], f"{name}.keep{int(keep)}"

    sequence, mask = pattern.build(CODES, SPECIAL, keep)
    same("patterns", "audiocraft", sequence, GOLDEN[f"{prefix}.seq"])
    same("patterns", "audiocraft", mask, GOLDEN[f"{prefix}.mask"].bool())

    reverted, mask = pattern.revert(sequence, T, -1, keep)
    same("patterns", "audiocraft", reverted, GOLDEN[f"{prefix}.rev_codes"])
    same("patterns", "audiocraft", mask, GOLDEN[f"{prefix}.rev_mask"].bool())

    logits = GOLDEN[f"{prefix}.logits"].permute(0, 2, 3, 1)     # audiocraft keeps V second
    realigned, mask = pattern.revert_logits(logits, T, keep, fill=-100.)
    same("patterns", "audiocraft", realigned.permute(0, 3, 1, 2), GOLDEN[f"{prefix}.rev_logits"])
    same("patterns", "audiocraft", mask, GOLDEN[f"{prefix}.rev_logits_mask"].bool())
    assert torch.equal(pattern.revert_logits(logits, T, keep)[0].isnan().all(-1)[0], ~mask)


@pytest.mark.parametrize("name", PATTERNS)
def test_prompt_and_first_step_equal_audiocraft(name):
    pattern, T, short = PATTERNS[name], CODES.shape[2], int(GOLDEN["short_T"])
    sequence, mask = pattern.build(CODES[:, :, :short], SPECIAL, T=T)
    same("patterns", "audiocraft", sequence, GOLDEN[f"{name}.short_seq"])
    same("patterns", "audiocraft", mask, GOLDEN[f"{name}.short_mask"].bool())
    assert len(pattern.layout(T)) == pattern.steps(T) == int(GOLDEN[f"{name}.S"])
    assert pattern.steps(T, keep_only_valid_steps=True) == GOLDEN[f"{name}.keep1.seq"].shape[2]
    assert [pattern.first_step(T, t) for t in range(T)] == GOLDEN[f"{name}.first_step"].tolist()
    assert pattern.first_step(T, T + 100) == len(pattern.layout(T))


def plain_build(pattern, codes, special):
    """The definition, cell by cell."""
    B, K, T = codes.shape
    layout = pattern.layout(T)
    sequence = torch.full((B, K, len(layout)), special)
    for s, cells in enumerate(layout):
        for t, k in cells:
            if t < T:
                sequence[:, k, s] = codes[:, k, t]
    return sequence


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("T", [1, 2, 3, 7, 40])
def test_every_code_has_one_cell_in_order_of_time(name, T):
    pattern = PATTERNS[name]
    codes = torch.randint(0, 100, (2, 4, T), generator=torch.Generator().manual_seed(T))
    sequence, mask = pattern.build(codes, special=100)
    assert torch.equal(sequence, plain_build(pattern, codes, 100))
    assert mask.sum(1).tolist() == [T] * 4
    for k in range(4):  # a codebook's frames keep their order, so that the model never goes back in time
        assert torch.equal(sequence[:, k, mask[k]], codes[:, k])
    back, mask = pattern.revert(sequence, T, special=-1)
    assert torch.equal(back, codes) and mask.all()


def test_a_shorter_sequence_is_reverted_as_far_as_it_goes():
    pattern = PATTERNS["delay"]
    sequence, _ = pattern.build(CODES, 1024)
    back, mask = pattern.revert(sequence[:, :, :6], CODES.shape[2], -1)
    assert mask.sum(1).tolist() == [5, 4, 3, 2]
    assert torch.equal(back[:, mask], CODES[:, mask])
    assert (back[:, ~mask] == -1).all()


def test_gradient_reaches_exactly_the_logits_that_are_read():
    pattern, T = PATTERNS["delay"], 6
    with torch.inference_mode():  # index tensors first made while sampling must serve training later
        pattern.revert_logits(torch.zeros(1, 4, T + 1, 3), T, True)
    logits = torch.zeros(1, 4, T + 1, 3, requires_grad=True)
    realigned, mask = pattern.revert_logits(logits, T, keep_only_valid_steps=True)
    realigned[:, mask].sum().backward()
    assert mask.sum(1).tolist() == [6, 5, 4, 3]
    for k in range(4):
        assert logits.grad[0, k, :, 0].tolist() == [float(k <= s < T) for s in range(T + 1)]


def test_misuse_is_caught():
    with pytest.raises(ValueError, match="4 codebooks, not 3"):
        PATTERNS["delay"].build(torch.zeros(1, 3, 5, dtype=torch.long), 7)
    with pytest.raises(ValueError, match="longer than the whole"):
        PATTERNS["delay"].build(torch.zeros(1, 4, 5, dtype=torch.long), 7, T=4)
    with pytest.raises(ValueError, match="one delay"):
        UnrollPattern((0, 1, 1), (0, 1, 2)).layout(3)


def test_from_config():
    assert from_config(Config()) == DelayPattern((0, 1, 2, 3))
    stereo = from_config(Config(n_q=8, delays=(0, 0, 1, 1, 2, 2, 3, 3), channels=2))
    assert stereo.build(torch.zeros(1, 8, 5, dtype=torch.long), 9)[0].shape == (1, 8, 9)
    for name in ("parallel", "unroll", "coarse_first", "musiclm"):
        assert from_config(Config(pattern=name)) == PATTERNS[name]
        one = from_config(Config(pattern=name, n_q=1))  # a single codebook: nothing to interleave
        codes = torch.arange(5)[None, None]
        assert torch.equal(one.revert(one.build(codes, 9)[0], 5, 9)[0], codes)


def test_demo_draws_the_figure(capsys):
    patterns.main([])
    drawn = capsys.readouterr().out
    assert "  k3  .  .  .  1  2  3  4  ." in drawn.splitlines()
    assert drawn.count("k4") == 5
    for wrong in (["many"], ["0"], ["1000"], ["1", "2"]):
        with pytest.raises(UserError, match=wrong[0]):
            patterns.main(wrong)
