"""What weights in fewer bits cost a trained model: its cross-entropy, and how often its first choice changes.

    python tests/quality.py                                         # the shipped model in int8 and int4
    python tests/quality.py --checkpoint out/larger --dtypes int4 --clips 32

On music of test tunes under their own texts, which training never saw: for models trained on data/tunes.py.
Codes are read column by column, as generation does, with keys and values in fewer bits, too.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation.clips import caption, clip
from lm import codebook_cross_entropy
from sample import MusicGen, condition_passes
from system.command import run

BATCH = 8


def clips(model, count: int, T: int):
    """Codes (count, K, T) of clips of test tunes, and their texts."""
    asked = [clip(model.config, "test", n) for n in range(count)]
    waves = torch.from_numpy(np.stack([one.mix for one in asked]))[:, None]
    codes = torch.cat([model.codec.encode(part) for part in waves.split(BATCH)])
    return codes[..., :T], [caption(one.truth, np.random.default_rng(0)) for one in asked]


@torch.inference_mode()
def predictions(lm, codes, texts):
    """Logits (B, K, T, V) of codes (B, K, T), read through the model's own cache, and their mask (K, T)."""
    B, _, T = codes.shape
    conditions, = condition_passes(lm, {"text": texts, "melody": [None] * B}, T, guidance=1)
    sequence, _ = lm.pattern.build(codes, lm.special)
    S = sequence.shape[-1]
    cache = lm.new_cache(B, S + conditions.prefix_length)
    columns = [lm(sequence[..., s:s + 1], conditions, cache) for s in range(S)]
    return lm.pattern.revert_logits(torch.cat(columns, 2), T)


def measure(lm, codes, texts):
    """Cross-entropy in nats, and the likeliest entries (B, K, T) where there are any, else -1."""
    losses, choices = [], []
    for start in range(0, len(codes), BATCH):
        part = codes[start:start + BATCH]
        logits, mask = predictions(lm, part, texts[start:start + BATCH])
        losses += [codebook_cross_entropy(logits, part, mask).mean()] * len(part)
        choices.append(logits.nan_to_num().argmax(-1).where(mask, -1))
    return torch.stack(losses).mean().item(), torch.cat(choices)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", default=str(ROOT / "checkpoints" / "tiny"))
    add("--dtypes", nargs="+", default=["int8", "int4"])
    add("--clips", type=int, default=16)
    add("--frames", type=int, default=200, help="of each clip")
    args = parser.parse_args(argv)
    plain = MusicGen.from_pretrained(args.checkpoint, "cpu")
    codes, texts = clips(plain, args.clips, args.frames)
    loss, choices = measure(plain.lm, codes, texts)
    weights = sum(tensor.numel() for tensor in plain.lm.state_dict().values()) / 1e6
    print(f"{weights:.1f} M weights; {args.clips} clips of {codes.shape[-1]} frames; "
          f"float32: {loss:.4f} nats\n")
    print("| dtype | cross-entropy | against float32 | the same first choice |\n| --- | --- | --- | --- |")
    for dtype in args.dtypes:
        model = MusicGen.from_pretrained(args.checkpoint, "cpu", dtype)
        found, chosen = measure(model.lm, codes, texts)
        same = (chosen == choices)[choices >= 0].float().mean()
        print(f"| {dtype} | {found:.4f} | {found / loss - 1:+.2%} | {same:.1%} |", flush=True)


if __name__ == "__main__":
    run(main, sys.argv[1:])
