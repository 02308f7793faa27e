"""Figures for logs and evaluations: perplexities beside cross-entropies, numbers short enough to read."""
import math


def with_perplexity(figures: dict) -> dict:
    """Adds ppl = exp(loss) and ppl_k = exp(ce_k) of each codebook; loss is the mean of all ce_k."""
    perplexities = {}
    for name, value in figures.items():
        if name == "loss" or name.startswith("ce_"):
            name = name.replace("loss", "ppl").replace("ce", "ppl")
            perplexities[name] = math.exp(min(50.0, value))  # no overflow
    return figures | perplexities


def rounded(value):
    """A float, or those of a list, to six digits; all else as it is."""
    if isinstance(value, list):
        return [rounded(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value
