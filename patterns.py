"""Codebook patterns: K parallel streams of codes as the one sequence that a language model walks through.

The codec gives K codes per frame; codebook k refines what codebooks 1 ... k-1 left over. A pattern lays them
out in S columns. The model predicts column after column, all codes of one at once. MusicGen's "delay" (arXiv
2306.05284, section 2.2) takes few more columns than frames, but shows codebook k the earlier ones of a frame:

    column s0 s1 s2 s3 s4 s5 s6 s7
    k1      .  1  2  3  4  .  .  .      T = 4 frames, K = 4 codebooks, delays 0, 1, 2, 3;
    k2      .  .  1  2  3  4  .  .      S = T + max(delays) + 1 = 8 columns;
    k3      .  .  .  1  2  3  4  .      a number is a frame (in code from 0), a dot the special token;
    k4      .  .  .  .  1  2  3  4      `python patterns.py [T]` draws all five patterns

30 s (T = 1,500) are 1,504 columns and 1,503 model calls, as s0 is given. Training keeps 1,501 columns (here
s0 ... s4): in the others codebook 1 has ended, but the track of a training segment goes on. That is why the
last d codes of a codebook delayed by d go untrained.
"""
import sys
from dataclasses import dataclass
from functools import lru_cache

import torch

from system.command import run
from system.errors import UserError


class Pattern:
    """A pattern is its `layout(T)`: S columns, each a list of cells (frame t, codebook k), both from 0.
    It goes on to frames t >= T, whose cells stay empty. With keep_only_valid_steps, in training, as many of
    the last columns are dropped as there are such frames."""

    def build(self, codes, special, keep_only_valid_steps=False, T=None):
        """Codes (B, K, T0), a prompt if T is more -> sequence (B, K, S), `special` outside of mask (K, S)."""
        T = codes.shape[2] if T is None else T
        if T < codes.shape[2]:
            raise ValueError(f"a prompt of {codes.shape[2]} frames is longer than the whole, {T}")
        frames, _ = self._tables(T, keep_only_valid_steps, codes.device)
        return _take(codes, frames, special)

    def revert(self, sequence, T, special, keep_only_valid_steps=False, frames=slice(None)):
        """Sequence (B, K, S) -> codes (B, K, T), mask (K, T); `special` for codes that are in no column."""
        _, columns = self._tables(T, keep_only_valid_steps, sequence.device)
        return _take(sequence, columns[:, frames], special)

    def revert_logits(self, logits, T, keep_only_valid_steps=False, fill=float("nan")):
        """Logits (B, K, S, V) -> those that predict each code (B, K, T, V), mask (K, T); else `fill`."""
        _, columns = self._tables(T, keep_only_valid_steps, logits.device)
        starts_empty = not self.layout(1)[0]
        if starts_empty:
            columns = columns - 1  # each column predicts the next one
        return _take(logits, columns, fill)  # NaN, as in audiocraft: no loss can ignore the mask unnoticed

    def steps(self, T, keep_only_valid_steps=False):
        """S, the number of columns for T frames."""
        frames, _ = self._tables(T, keep_only_valid_steps, torch.device("cpu"))
        return frames.shape[1]

    def first_step(self, T, frame):
        """First column with a code of `frame`, else S: where generation after a prompt starts."""
        for s, cells in enumerate(self.layout(T)):
            if any(t == frame for t, _ in cells):
                return s
        return self.steps(T)

    def whole_frames(self, T):
        """After each column, how many of the T frames are known in all codebooks (S numbers)."""
        _, columns = self._tables(T, False, torch.device("cpu"))
        last = columns.amax(0).cummax(0).values                         # column that completes each frame
        steps = torch.arange(self.steps(T))
        return torch.searchsorted(last, steps, right=True).tolist()

    @lru_cache(maxsize=64)
    @torch.inference_mode(False)  # tensors made in inference mode could not serve training afterwards
    def _tables(self, T, keep_only_valid_steps, device):
        """The layout both ways: frame of each cell (K, S), column of each code (K, T); -1 for none."""
        layout = self.layout(T)
        cells = [(s, t, k) for s, column in enumerate(layout) for t, k in column]
        s, t, k = torch.tensor(cells).T
        K, S = int(k.max()) + 1, len(layout)
        frames = torch.full((K, S), -1)
        frames[k, s] = t
        if keep_only_valid_steps:
            S -= int(t.max()) + 1 - T
        columns = torch.full((K, T), -1)
        real = (t < T) & (s < S)
        columns[k[real], t[real]] = s[real]
        return frames[:, :S].to(device), columns.to(device)


@dataclass(frozen=True)
class DelayPattern(Pattern):
    """Codebook k runs delays[k] columns late: P_s = {(s - k + 1, k)} (equation 6; frames and k from 1)."""
    delays: tuple[int, ...]
    empty_initial: int = 0      # more empty columns at the start; -1: none at all
    flatten_first: int = 0      # frames at the start that are laid out one code per column

    def layout(self, T):
        first, delays = self.flatten_first, list(enumerate(self.delays))
        columns = [[]] * (1 + self.empty_initial)
        for t in range(min(T, first)):
            columns += [[(t, k)] for k, _ in delays]
        for t in range(first, T + max(self.delays, default=0)):     # t: of a codebook without delay
            columns.append([(t - d, k) for k, d in delays if t - d >= first])
        return columns


@dataclass(frozen=True)
class ParallelPattern(Pattern):
    """All codebooks of a frame in one column, P_s = {(s, k)} (equation 5), as if they were independent."""
    n_q: int

    def layout(self, T):
        return DelayPattern((0,) * self.n_q).layout(T)


@dataclass(frozen=True)
class UnrollPattern(Pattern):
    """Flattening: a frame takes max(flattening) + 1 columns, codebook k the one numbered flattening[k].
    Nothing is assumed independent (equation 1), at K times the columns. A column has one delay."""
    flattening: tuple[int, ...]
    delays: tuple[int, ...] = ()

    def layout(self, T):
        delays = self.delays or (0,) * len(self.flattening)
        end = T + max(delays)
        columns = [(-1, [])]  # (sort key, cells)
        for inner in range(max(self.flattening) + 1):
            group = [k for k, column in enumerate(self.flattening) if column == inner]
            late = {delays[k] for k in group}
            if len(late) > 1:
                raise ValueError("codebooks of one column need one delay")
            delay = max(late, default=0)
            columns += [(t + delay, [(t, k) for k in group]) for t in range(end)]
        columns.sort()  # at equal keys the delayed column, which is of an older frame, comes first
        return [cells for key, cells in columns if key < end]


@dataclass(frozen=True)
class CoarseFirstPattern(Pattern):
    """Codebook 1 of all frames, then the K - 1 others together, delayed by `delays` (as VALL-E). These see
    the future of codebook 1, so T must be the same in training and in generation."""
    delays: tuple[int, ...]

    def layout(self, T):
        columns = [[]]
        columns += [[(t, 0)] for t in range(T)]
        for cells in DelayPattern(self.delays, empty_initial=-1).layout(T):
            columns.append([(t, k + 1) for t, k in cells])
        return columns


@dataclass(frozen=True)
class MusicLMPattern(Pattern):
    """Groups of `group_by` codebooks one after the other, each flattened over all frames (like MusicLM's)."""
    n_q: int
    group_by: int = 2

    def layout(self, T):
        columns = [[]]
        for first in range(0, self.n_q, self.group_by):
            group = range(self.n_q)[first:first + self.group_by]
            columns += [[(t, k)] for t in range(T) for k in group]
        return columns


def from_config(config):
    """The pattern that `config.pattern`, `config.n_q` and `config.delays` name."""
    K = config.n_q
    return {"delay": DelayPattern(config.delays),
            "parallel": ParallelPattern(K),
            "unroll": UnrollPattern(tuple(range(K))),
            "coarse_first": CoarseFirstPattern((0,) * (K - 1)),
            "musiclm": MusicLMPattern(K)}[config.pattern]


def _take(x, index, fill):
    """x (B, K, n, ...) -> x[:, k, index[k, m]] (B, K, m, ...), mask (K, m); `fill` outside of 0 ... n - 1."""
    K, n = x.shape[1:3]
    if K != len(index):
        raise ValueError(f"this pattern has {len(index)} codebooks, not {K}")
    mask = (index >= 0) & (index < n)
    row = torch.arange(K, device=index.device)[:, None]
    place = index.clamp(0, n - 1) + n * row                             # in x[b].flatten()
    taken = x.flatten(1, 2).index_select(1, place.flatten()).unflatten(1, index.shape)
    outside = ~mask if x.dim() == 3 else ~mask[..., None]
    return taken.masked_fill(outside, fill), mask


def main(argv):
    """Draws the five patterns with four codebooks, a row per codebook, as figure 1 of the paper."""
    T = argv[0] if argv else "4"
    sensible = T.isdecimal() and 1 <= int(T[:9]) <= 20
    if len(argv) > 1 or not sensible:
        raise UserError(f"{' '.join(argv)}: give one number of frames, 1 to 20, as in `python patterns.py 4`")
    frames = torch.arange(1, int(T) + 1)
    codes = frames.expand(1, 4, -1)     # each code is the number of its frame
    patterns = [
        DelayPattern((0, 1, 2, 3)),
        ParallelPattern(4),
        UnrollPattern((0, 1, 2, 3)),
        CoarseFirstPattern((0, 0, 0)),
        MusicLMPattern(4)]
    for pattern in patterns:
        sequence, _ = pattern.build(codes, special=0)
        print(f"{type(pattern).__name__}: {codes.shape[2]} frames in {sequence.shape[2]} columns, s0 first")
        for k, row in enumerate(sequence[0].tolist(), 1):
            print(f"  k{k}" + "".join(f"{t or '.':>3}" for t in row))


if __name__ == "__main__":
    run(main, sys.argv[1:])
