"""Figures for logs and evaluations: perplexities, numbers short enough to read, signs of a collapse."""
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
    """A float, or those of a list or a dict, to six digits; all else as it is."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value


FEW_LIVE = 0.3      # of the entries of a codebook
POOR = -10.0        # dB SI-SNR; config/tiny_codec.py has -3 when its quantizer has learned for 5 % of the run


def signs_of_collapse(config, figures: dict) -> list[str]:
    """What a validation of the codec shows to be wrong, in sentences.

    Nothing until the quantizer has learned for a tenth of the run: without it there is no reconstruction.
    """
    early = (config.unquantised + 0.1) * config.total_updates
    if "live" not in figures or figures["update"] <= early:
        return []
    sentences = []
    for k, live in enumerate(figures["live"], start=1):
        if live < FEW_LIVE:
            sentences.append(f"codebook {k} collapses: {live:.0%} of its entries are in use")
    if not figures["si_snr"] >= POOR:   # nor NaN
        sentences.append(f"the reconstruction has next to nothing of the recordings: SI-SNR "
                         f"{figures['si_snr']:.1f} dB")
    if sentences:
        dtype = ", --dtype=float32" if config.dtype != "float32" else ""
        sentences.append(f"Often the learning rate is too high, or the encoder moves faster than its "
                         f"codebooks: try --lr={config.lr / 4:g}{dtype}, or a longer --warmup and "
                         f"--unquantised")
    return sentences
