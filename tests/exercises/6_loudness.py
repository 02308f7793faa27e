"""Exercise 6: a new conditioner with data of its own.

A melody sets the pitches of a piece, but not where it is loud. Prepare a second curve beside the chroma: for
every chroma frame the mean power around it in decibels, one byte (0: -100 dB of full scale or less). Segments
have it as a condition, {"text": ..., "melody": ..., "loudness": floats (M, ...)}. A linear layer makes frames
of it, which enter the language model as `--loudness=prepend` (or cross, sum, interpolate) has it: frames of
zeros where an item has no loudness. By default, "none", nothing changes, and older data can still be read.

    python tests/exercises/6_loudness.py        # checks your solution; 6_loudness.patch is one

Where: a key in `config.py`; a name in CURVES and a method of Preparer in `data/prepare.py`; the curve and the
condition of a segment in `data/segments.py`; a module like ChromaConditioner, and its place in Conditioners,
in `conditioners.py`. Why do shards, dropout, batches, the loss and fine-tuning need no line of yours?
"""
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import numpy as np
import soundfile
import torch

from conditioners import Conditioners
from config import FIELDS, INHERITED, Config
from data import prepare
from data.segments import TokenSegments, collate
from encodec import EncodecModel
from lm import LMModel

CODEC = dict(sample_rate=8000, n_filters=4, ratios=(8, 8), dimension=8, lstm=1, n_q=2, card=16)
SMALL = dict(CODEC, radix2_exp=10, segment_duration=1.0, dim=16, num_heads=2, num_layers=2, delays=(0, 1),
             t5="bytes", t5_dim=8, t5_heads=2)

assert "loudness" in FIELDS, "config.py has no key `loudness` yet: how it enters the model, none by default"
assert "loudness" in INHERITED, "fine-tuning must keep what a checkpoint was made with"
torch.manual_seed(0)
folder = tempfile.TemporaryDirectory()
music, out = Path(folder.name) / "music", Path(folder.name) / "prepared"
music.mkdir()
EncodecModel(Config(task="codec", kmeans_iters=0, **CODEC)).save(Path(folder.name) / "codec")
tone = np.sin(2 * np.pi * 440 * np.arange(2 * 8000) / 8000)
for name, gain in (("1-loud", 0.5), ("2-soft", 0.05)):      # the same tone, 20 dB apart
    soundfile.write(music / f"{name}.wav", gain * tone, 8000)
flags = ["--codec", f"{folder.name}/codec", "--radix2_exp", "10", "--stem", "none", "--device", "cpu"]
assert prepare.main([str(music), "--out", str(out), *flags]) == 0
assert (out / "loudness.00000.u8").exists(), "data/prepare.py has written no loudness: is it in CURVES?"
curve = np.fromfile(out / "loudness.00000.u8", np.uint8).astype(int)
chroma_frames = (out / "chroma.00000.u8").stat().st_size
assert len(curve) == chroma_frames, "as many frames as chroma"
middle = slice(chroma_frames // 8, chroma_frames // 4)
difference = curve[:chroma_frames // 2][middle] - curve[chroma_frames // 2:][middle]
assert (abs(difference - 20) <= 1).all(), f"20 dB between the two tones, not {difference}"

config = Config(data_dir=str(out), loudness="prepend", cfg_dropout=1.0, **SMALL)
data = TokenSegments(config, "train")
loud, soft = (data.segment(track, 0)["conditions"] for track in data.tracks)
assert "loudness" in soft, "the conditions of a segment have no loudness: see data/segments.py"
assert soft["loudness"].is_floating_point(), "floats, for a linear layer to multiply"
assert len(soft["loudness"]) == config.chroma_frames, "M frames"
assert loud["loudness"].mean() > soft["loudness"].mean(), "louder is more"
dropped = data.item(np.random.default_rng(0), train=True)["conditions"]
assert dropped["loudness"] is None, "guidance dropout drops all conditions of an item"

encode = Conditioners(config)
same = {"text": ["a tone"], "melody": [None]}
loud_prefix, soft_prefix = (encode(same | {"loudness": [x["loudness"]]}).prefix for x in (loud, soft))
without = encode(same).prefix       # sampling need not know of loudness
assert loud_prefix.shape == without.shape, "without loudness as many frames: positions must not move"
assert not torch.equal(loud_prefix, soft_prefix), "the frames do not depend on loudness"
assert (loud_prefix != without).any(-1).sum() == config.chroma_frames, "M frames of loudness, else the same"
guided = encode(same | {"loudness": [loud["loudness"]]}, guidance=True).prefix
assert torch.equal(guided[0], loud_prefix[0]) and not guided[1].any(), "guidance: once with it, once without"

lm, batch = LMModel(config), collate([data.segment(track, 0) for track in data.tracks])
for level in batch["conditions"]["loudness"]:
    level.requires_grad_()
lm.loss(batch["codes"], batch["conditions"])[0].backward()
for level in batch["conditions"]["loudness"]:
    assert level.grad is not None and level.grad.abs().sum() > 0, "the loss does not depend on loudness"

for file in out.glob("loudness.*"):
    file.unlink()
plain = Config(data_dir=str(out), **SMALL)
item = TokenSegments(plain, "train").item(np.random.default_rng(0), train=False)
assert item["conditions"].get("loudness") is None, "by default nothing changes"
folder.cleanup()
print("solved: the model has loudness as a condition")
