"""Loops: music that can be repeated without an audible seam, and the measure of a seam.

    |-- lead --|---------------------- loop ----------------------|
               ^ begins here                          crossfade ==^ into the end of the lead

The music is made with a lead of two seconds in front. Its last moments, which the beginning of the loop
follows without a break, replace those of the loop: at the join nothing is cut, and the crossfade lies where
the two are most alike. The melody of the lead is the end of the loop's, so both play the same notes there.
"""
import math

import torch
import torch.nn.functional as F

from system.errors import UserError

LEAD = 2.0          # s, if the loop is as long
FADE = 0.4          # s: with 0.1 the attack of a flute was audible in the middle of its tone
FRAME = 0.01        # s, of the measures
NEAR = 0.15         # s


def lead_of(length: float, chroma_rate: float) -> float:
    """Seconds of the lead of a loop of `length` seconds: whole chroma frames, which keep their times."""
    return math.ceil(min(LEAD, length) * chroma_rate) / chroma_rate


def loop_times(time, lead: float, length: float):
    """Times in the lead and the loop -> the times in the melody that they have, 0 to `length`."""
    return (time - lead) % length


def make_loop(wav, rate: int, lead: float, length: float):
    """Wave (C, lead and loop) -> the loop (C, L), its end faded into that of the lead, and where (s)."""
    start, L, fade = round(lead * rate), round(length * rate), round(FADE * rate)
    if wav.shape[-1] < start + L or min(start, L) < 2 * fade:
        raise UserError(f"a loop of {length:g} s takes {lead + length:g} s of music, its lead included, and "
                        f"lasts {2 * FADE:g} s at least")
    loop = wav[:, start:start + L].clone()
    window = min(start, L) // 2         # in its first half the lead is still beginning
    before, end = wav[:, start - window:start], loop[:, L - window:]        # both end at the join
    place = most_alike(before, end, fade)
    a, b = end[:, place:place + fade], before[:, place:place + fade]
    loop[:, L - window + place:] = before[:, place:]
    loop[:, L - window + place:][:, :fade] = crossfade(a, b)
    return loop, (L - window + place + fade / 2) / rate


def most_alike(a, b, size: int) -> int:
    """Where pieces of two waves (C, L) of `size` samples are most correlated, in steps of size / 4."""
    best, place = -math.inf, 0
    for start in range(0, a.shape[-1] - size + 1, size // 4):
        x, y = a[:, start:start + size], b[:, start:start + size]
        alike = correlation(x, y)
        if alike > best:
            best, place = alike, start
    return place


def correlation(x, y) -> float:
    """Of two waves, -1 to 1."""
    return float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-9))


def crossfade(a, b):
    """From wave a (C, L) to b. The power stays the same, whatever of the two is alike and adds up."""
    t = torch.linspace(0, 1, a.shape[-1])
    out, into = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
    r = max(0.0, correlation(a, b))
    power = 1 + 2 * r * out * into      # of the sum, over that of each
    return (a * out + b * into) / power.sqrt()


# --- the measure ------------------------------------------------------------------------------------------

def seam(wav, rate: int, at: float = 0.0, grid: float | None = None) -> dict:
    """How a place of a repeated loop (C, L) compares with all others: name -> (worst there, worst elsewhere).

    The place is NEAR seconds around `at`; 0 is the join. level: change in dB of the mean over 0.1 s. click:
    the second difference of samples, over the level. attack: the rise of the spectrum. grid: seconds between
    lines on which notes are due, such as a beat; off_beat is then the distance in seconds from a line to the
    center of the attacks nearby, the place being a line.
    """
    hop = round(FRAME * rate)
    mono = torch.roll(wav.mean(0), wav.shape[-1] // 2 - round(at * rate))       # the place is in the middle
    mono = mono[:len(mono) // hop * hop]
    middle, near = len(mono) // hop // 2, round(NEAR / FRAME)
    power = mono.view(-1, hop).square().mean(1)
    slow = F.avg_pool1d(power[None, None], 10, 1)[0, 0].clamp(min=1e-8)
    level = (10 * slow.log10()).diff(n=1)
    level = F.avg_pool1d(level[None, None], 10, 1)[0, 0].abs() * 10             # over 0.1 s
    bends = F.pad(mono.diff(n=2), (0, 2)).view(-1, hop).abs().amax(1) / (power.sqrt() + 1e-3)
    window = torch.hann_window(4 * hop)
    spectrum = torch.stft(mono, 4 * hop, hop, window=window, return_complex=True).abs()
    attack = (1 + 100 * spectrum).log().diff(dim=1).clamp(min=0).mean(0)
    figures = {}
    for name, curve, shift in (("level", level, 10), ("click", bends, 0), ("attack", attack, 1)):
        place = torch.arange(len(curve)) + shift
        there = (place - middle).abs() <= near
        figures[name] = curve[there].max().item(), curve[~there].max().item()
    if grid:
        reach = round(min(0.1, grid / 3) / FRAME)
        lines = torch.arange(-(middle - reach) * FRAME // grid + 1, (middle - reach) * FRAME // grid) * grid
        distance = {line: off_beat(attack, middle + line / FRAME, reach) for line in lines.tolist()}
        figures["off_beat"] = distance.pop(0.0), max(distance.values())
    return figures


def off_beat(attack, frame: float, reach: int) -> float:
    """Seconds between a line and the center of the attacks within so many frames of it."""
    place = torch.arange(round(frame) - reach, round(frame) + reach + 1)
    weight = attack[place] ** 2
    center = float((place * weight).sum() / weight.sum().clamp(min=1e-9))
    return abs(center - frame) * FRAME
