"""Codebook patterns: how K parallel streams of codes become the one sequence a language model walks through.

The codec gives K codes for every frame, and codebook k refines what codebooks 1 ... k-1 left over. A pattern
lays the K x T codes out in S columns; the model predicts a whole column per step, its codes independent of each
other given the columns before. MusicGen's choice, "delay", needs hardly more steps than frames and still lets
codebook k see the earlier codebooks of its frame (MusicGen, arXiv 2306.05284, section 2.2 and figure 1):

    step  s0 s1 s2 s3 s4 s5 s6 s7
    k1     .  1  2  3  4  .  .  .       T = 4 frames, K = 4 codebooks, S = T + 4 columns;
    k2     .  .  1  2  3  4  .  .       a number is a frame, a dot the special token;
    k3     .  .  .  1  2  3  4  .       training keeps the columns s0 ... s4, generation
    k4     .  .  .  .  1  2  3  4       walks through all of them

`python patterns.py [T]` draws all five. Shapes: codes (B, K, T), sequence (B, K, S), logits (B, K, S, V);
masks (K, S) or (K, T) are True where there is a real code.
"""
import sys
from dataclasses import dataclass
from functools import lru_cache

import torch

from config import UserError, run


class Pattern:
    """What all patterns do with their `layout(T)`: a list of S columns, each a list of (frame t, codebook k).

    A layout may name frames >= T at its end, where the first codebooks have run out and the delayed ones have
    not: those cells stay empty. `keep_only_valid_steps=True` drops these last columns, as the original does in
    training: S = T + 1 for any delay pattern, and the last d codes of a codebook delayed by d go untrained.
    """

    def build(self, codes, special: int, keep_only_valid_steps=False, T=None):
        """Codes (B, K, T) -> (sequence (B, K, S), mask (K, S)); cells without a code hold the special token.

        Fewer codes than `T` (a prompt) fill the beginning of the T-frame layout.
        """
        assert T is None or codes.shape[2] <= T
        return _take(codes, _tables(self, T or codes.shape[2], keep_only_valid_steps, codes.device)[0], special)

    def revert(self, sequence, T: int, special: int, keep_only_valid_steps=False):
        """Sequence (B, K, S) -> (codes (B, K, T), mask (K, T)); codes that are in no column become `special`."""
        return _take(sequence, _tables(self, T, keep_only_valid_steps, sequence.device)[1], special)

    def revert_logits(self, logits, T: int, keep_only_valid_steps=False, fill=float("nan")):
        """Logits (B, K, S, V) -> (logits (B, K, T, V), mask (K, T)): the logits that predict each code.

        Those stand one column before the code itself, because a column predicts the next one. What nothing
        predicts is NaN by default, so that a loss which ignores the mask cannot go unnoticed (as the original).
        """
        lead = 0 if self.layout(1)[0] else 1  # without an initial empty column, nothing comes before
        return _take(logits, _tables(self, T, keep_only_valid_steps, logits.device)[1] - lead, fill)

    def steps(self, T: int, keep_only_valid_steps=False) -> int:
        """S, the number of columns for T frames."""
        return _tables(self, T, keep_only_valid_steps, torch.device("cpu"))[0].shape[1]

    def first_step(self, T: int, frame: int) -> int:
        """First column that holds any code of `frame`, S if none does: generation after a prompt starts there."""
        layout = self.layout(T)
        return next((s for s, cells in enumerate(layout) if any(t == frame for t, _ in cells)), len(layout))


@dataclass(frozen=True)
class DelayPattern(Pattern):
    """Codebook k runs delays[k] columns late: P_s = {(s - k + 1, k)} (equation 6; k from 1).

    empty_initial: more empty columns at the start, -1 for none at all. flatten_first: that many frames are laid out
    one code per column before the delayed part.
    """
    delays: tuple[int, ...]
    empty_initial: int = 0
    flatten_first: int = 0

    def layout(self, T):
        first, delays = self.flatten_first, list(enumerate(self.delays))
        flat = [[(t, k)] for t in range(min(T, first)) for k, _ in delays]
        end = T + max(self.delays, default=0)
        rest = [[(s - d, k) for k, d in delays if s - d >= first] for s in range(first, end)]
        return [[]] * (1 + self.empty_initial) + flat + rest


@dataclass(frozen=True)
class ParallelPattern(Pattern):
    """All codebooks of a frame in one column, P_s = {(s, k)} (equation 5).

    Fewest steps, and blind to what the codebooks owe each other: even a perfect model of each (equation 3) samples
    another music (equation 4).
    """
    n_q: int

    def layout(self, T):
        return DelayPattern((0,) * self.n_q).layout(T)


@dataclass(frozen=True)
class UnrollPattern(Pattern):
    """Flattening: a frame takes max(flattening) + 1 columns, codebook k stands in the one flattening[k] names.

    Nothing is assumed independent (equations 1 and 2), at K times the steps. Codebooks of one column may be delayed
    together.
    """
    flattening: tuple[int, ...]
    delays: tuple[int, ...] = ()

    def layout(self, T):
        delays = self.delays or (0,) * len(self.flattening)
        columns = [(-1, [])]  # (sort key, cells)
        for t in range(T + max(delays)):
            for inner in range(max(self.flattening) + 1):
                group = [k for k, step in enumerate(self.flattening) if step == inner]
                assert len({delays[k] for k in group}) <= 1, "codebooks of one column need one delay"
                columns.append((t + max((delays[k] for k in group), default=0), [(t, k) for k in group]))
        # at equal keys the delayed column, which is of an older frame, comes first
        return [cells for key, cells in sorted(columns) if key < T + max(delays)]


@dataclass(frozen=True)
class CoarseFirstPattern(Pattern):
    """Codebook 1 of all frames, then the K - 1 others together, delayed by `delays` (as VALL-E). The fine
    codebooks see the coarse future, so T must be the same in training and in generation."""
    delays: tuple[int, ...]

    def layout(self, T):
        fine = DelayPattern(self.delays, empty_initial=-1).layout(T)
        return [[]] + [[(t, 0)] for t in range(T)] + [[(t, k + 1) for t, k in cells] for cells in fine]


@dataclass(frozen=True)
class MusicLMPattern(Pattern):
    """Groups of `group_by` codebooks one after the other, each flattened over all frames (almost MusicLM's)."""
    n_q: int
    group_by: int = 2

    def layout(self, T):
        groups = [range(k, min(k + self.group_by, self.n_q)) for k in range(0, self.n_q, self.group_by)]
        return [[]] + [[(t, k)] for group in groups for t in range(T) for k in group]


def from_config(config) -> Pattern:
    """The pattern that `config.pattern`, `config.n_q` and `config.delays` name."""
    K = config.n_q
    return {"delay": DelayPattern(config.delays), "parallel": ParallelPattern(K), "musiclm": MusicLMPattern(K),
            "coarse_first": CoarseFirstPattern((0,) * (K - 1)),
            "unroll": UnrollPattern(tuple(range(K)))}[config.pattern]


def _take(x, index, fill):
    """x (B, K, N, ...) -> x[:, k, index[k, m]] (B, K, M, ...), mask (K, M); `fill` where index is outside N."""
    K, N = x.shape[1:3]
    assert K == len(index), f"this pattern has {len(index)} codebooks, not {K}"
    mask = (index >= 0) & (index < N)
    flat = index.clamp(0, N - 1) + N * torch.arange(K, device=index.device)[:, None]
    taken = x.flatten(1, 2).index_select(1, flat.flatten()).unflatten(1, index.shape)
    return taken.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 3)), fill), mask


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # tensors made in inference mode could not serve training afterwards
def _tables(pattern, T, keep_only_valid_steps, device):
    """The layout both ways: the frame in each cell (K, S), the column of each code (K, T); -1 for none."""
    layout = pattern.layout(T)
    s, t, k = torch.tensor([(s, t, k) for s, cells in enumerate(layout) for t, k in cells]).T
    S = len(layout) - (int(t.max()) + 1 - T if keep_only_valid_steps else 0)
    frames, columns = torch.full((int(k.max()) + 1, len(layout)), -1), torch.full((int(k.max()) + 1, T), -1)
    frames[k, s] = t
    real = (t < T) & (s < S)
    columns[k[real], t[real]] = s[real]
    return frames[:, :S].to(device), columns.to(device)


def main(argv):
    """Draws the five patterns with four codebooks, a row per codebook, as figure 1 of the paper."""
    if len(argv) > 1 or argv and not (argv[0].isdecimal() and 1 <= int(argv[0][:9]) <= 20):
        raise UserError(f"{' '.join(argv)}: give one number of frames from 1 to 20, such as `python patterns.py 4`")
    codes = torch.arange(1, int(argv[0] if argv else 4) + 1).expand(1, 4, -1)  # drawn as the number of the frame
    for pattern in (DelayPattern((0, 1, 2, 3)), ParallelPattern(4), UnrollPattern((0, 1, 2, 3)),
                    CoarseFirstPattern((0, 0, 0)), MusicLMPattern(4)):
        sequence, _ = pattern.build(codes, special=0)
        print(f"{type(pattern).__name__}: {codes.shape[2]} frames in {sequence.shape[2]} columns, s0 first")
        for k, row in enumerate(sequence[0].tolist(), 1):
            print(f"  k{k}" + "".join(f"{t or '.':>3}" for t in row))


if __name__ == "__main__":
    run(main, sys.argv[1:])
