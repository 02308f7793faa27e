"""Exercise 5: another codec stride.

Half the frames are half the steps to generate. Write config/slow_codec.py, a tiny codec (16 kHz) with 25 frames a second
and 8 codebooks instead of 50 and 4: as many codes a second, in a sequence half as long. And config/slow.py, a language
model for it with 5.12 s segments (128 frames).

    python tests/exercises/5_stride.py          # checks your solution; 5_stride.patch is one

Where: two files in config/, no code. (What else hangs on the stride? See `Config.stride` and who uses it.)
"""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import numpy as np
import soundfile
import torch

import prepare
import train
from config import load
from encodec import EncodecModel
from sample import MusicGen

codec, lm = (load([str(ROOT / "config" / name)]) for name in ("slow_codec.py", "slow.py"))
for config in (codec, lm):
    assert config.stride == 640 and config.n_q == 8 and config.sample_rate == 16000, (config.stride, config.n_q)
assert lm.segment_frames == 128 and lm.codec == codec.out_dir, (lm.segment_frames, lm.codec)
with tempfile.TemporaryDirectory() as folder:       # all of it, at a thousandth of the length
    (Path(folder) / "audio").mkdir()
    for n in range(3):
        wave = 0.3 * np.sin(2 * np.pi * 220 * (n + 1) * np.arange(6 * 16000) / 16000)
        soundfile.write(f"{folder}/audio/{n}.wav", wave, 16000)
    short = ["--epochs=1", "--updates_per_epoch=2", "--batch_size=2", "--valid_every=0", "--sample_every=0", "--device=cpu"]
    train.main([str(ROOT / "config/slow_codec.py"), *short, f"--data_dir={folder}/audio", f"--out_dir={folder}/codec",
                "--n_filters=2", "--kmeans_iters=1", "--unquantised_steps=0", "--decoder_only_steps=0"])
    made = EncodecModel.from_pretrained(f"{folder}/codec")
    assert made.encode(torch.zeros(1, 1, 16001)).shape == (1, 8, 26), "25 frames a second, the last one filled up"
    assert prepare.main([f"{folder}/audio", "--out", f"{folder}/tokens", "--codec", f"{folder}/codec", "--radix2_exp",
                         str(lm.radix2_exp), "--stem", "none"]) == 0
    train.main([str(ROOT / "config/slow.py"), *short, f"--data_dir={folder}/tokens", f"--out_dir={folder}/lm", f"--codec={folder}/codec",
                "--dim=16", "--num_heads=2", "--num_layers=1", "--t5_dim=16", "--t5_layers=1", "--stem=none"])
    wav = MusicGen.from_pretrained(f"{folder}/lm").generate(["a tune"], duration=1.0)
assert wav.shape == (1, 1, 16000), wav.shape
print("solved: codec, prepared data, language model and music at 25 frames a second")
