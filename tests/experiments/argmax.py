"""What the argmax of chroma hides: the instrument, which a small network tells from whole chroma.

    python tests/experiments/argmax.py                  # two minutes

The strongest pitch class of every frame is the same in both, and with it the tune. What else is in a melody
the model could copy from it, and would not have to read in the text. Training and test clips share no tune.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from chroma import ChromaExtractor
from config import load
from data.render import INSTRUMENTS
from evaluation.clips import clip

SECONDS = 5.12
VOICE = {"drums": False, "bass": False, "chords": None}     # one instrument: the melody's


class Listener(nn.Module):
    """Chroma (B, M, Q) -> logits of the instruments (B, I)."""

    def __init__(self, classes=12, width=64):
        super().__init__()
        self.first = nn.Conv1d(classes, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(2 * width, len(INSTRUMENTS))

    def forward(self, chroma):
        x = self.first(chroma.mT).relu()
        x = self.second(x).relu()
        return self.head(torch.cat([x.mean(-1), x.amax(-1)], 1))


def chroma_and_instruments(config, split: str, count: int):
    """Whole chroma (count, M, Q) of clips of a split, and the index of each one's instrument (count,)."""
    extract = ChromaExtractor(config.sample_rate, config.n_chroma, config.radix2_exp, argmax=False)
    clips = [clip(config, split, n, SECONDS, **VOICE) for n in range(count)]
    chroma = torch.cat([extract(torch.from_numpy(one.mix)[None]) for one in clips])
    names = list(INSTRUMENTS)
    return chroma, torch.tensor([names.index(one.truth["instrument"]) for one in clips])


def share_right(train, test, updates: int) -> float:
    """The share of test clips whose instrument a Listener tells that has learned from the training clips."""
    torch.manual_seed(0)
    (chroma, instrument), (unseen, expected) = train, test
    listener = Listener(chroma.shape[-1])
    optimizer = torch.optim.AdamW(listener.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, updates)
    for _ in range(updates):
        rows = torch.randint(len(chroma), (64,))
        up = int(torch.randint(12, ()))         # semitones: no instrument has keys of its own
        loss = F.cross_entropy(listener(chroma[rows].roll(up, -1)), instrument[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (listener(unseen).argmax(1) == expected).float().mean().item()


def one_hot(chroma):
    return F.one_hot(chroma.argmax(-1), chroma.shape[-1]).float()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1200, help="to learn from; a quarter as many to test")
    parser.add_argument("--updates", type=int, default=1500)
    args = parser.parse_args(argv)
    config = load([str(ROOT / "config" / "tiny.py")])
    train = chroma_and_instruments(config, "train", args.clips)
    test = chroma_and_instruments(config, "test", args.clips // 4)
    guess = test[1].bincount().max().item() / len(test[1])
    for name, form in (("whole chroma", lambda chroma: chroma), ("one-hot (argmax)", one_hot)):
        right = share_right((form(train[0]), train[1]), (form(test[0]), test[1]), args.updates)
        print(f"{name:16}  instrument right: {right:.2f}", flush=True)
    print(f"{'nothing':16}  instrument right: {guess:.2f} (always the most frequent one)")


if __name__ == "__main__":
    main()
