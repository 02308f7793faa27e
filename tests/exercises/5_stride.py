"""Exercise 5: another codec stride.

Half the frames are half the columns to generate. Write config/slow_codec.py, a tiny codec (16 kHz) with 25
frames a second and 8 codebooks instead of 50 and 4: as many codes a second, in a sequence half as long. And
config/slow.py, a language model for it with 5.12 s segments (128 frames).

    python tests/exercises/5_stride.py          # checks your solution; 5_stride.patch is one

Where: two files in config/, no code. (What else depends on the stride? See `Config.stride` and who uses it.)
"""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import soundfile
import torch

from config import load
from data import prepare
from encodec import EncodecModel
from sample import MusicGen
from train import train

CODEC, LM = str(ROOT / "config/slow_codec.py"), str(ROOT / "config/slow.py")
codec, lm = load([CODEC]), load([LM])
for config in (codec, lm):
    assert config.stride == 640 and config.n_q == 8, (config.stride, config.n_q)
    assert config.sample_rate == 16000
assert lm.segment_frames == 128 and lm.codec == codec.out_dir, (lm.segment_frames, lm.codec)

SHORT = ["--epochs=1", "--updates_per_epoch=2", "--batch_size=2", "--valid_every=0", "--sample_every=0",
         "--device=cpu"]
NARROW_CODEC = ["--n_filters=2", "--kmeans_iters=1", "--unquantised=0"]
NARROW_LM = ["--dim=16", "--num_heads=2", "--num_layers=1", "--t5_dim=16", "--t5_layers=1", "--stem=none"]
with tempfile.TemporaryDirectory() as folder:       # all of it, at a thousandth of the length
    audio, tokens, codec_dir, lm_dir = (f"{folder}/{name}" for name in ("audio", "tokens", "codec", "lm"))
    Path(audio).mkdir()
    t = np.arange(6 * 16000) / 16000
    for n in range(3):
        soundfile.write(f"{audio}/{n}.wav", 0.3 * np.sin(2 * np.pi * 220 * (n + 1) * t), 16000)
    train(load([CODEC, *SHORT, *NARROW_CODEC, f"--data_dir={audio}", f"--out_dir={codec_dir}"]))
    made = EncodecModel.from_pretrained(codec_dir)
    frames = made.encode(torch.zeros(1, 1, 16001)).shape
    assert frames == (1, 8, 26), "25 frames a second, the last one filled up"
    argv = ["--codec", codec_dir, "--radix2_exp", str(lm.radix2_exp), "--stem", "none"]
    assert prepare.main([audio, "--out", tokens, *argv]) == 0
    folders = [f"--data_dir={tokens}", f"--out_dir={lm_dir}", f"--codec={codec_dir}"]
    train(load([LM, *SHORT, *NARROW_LM, *folders]))
    wav = MusicGen.from_pretrained(lm_dir).generate(["a tune"], duration=1.0)
assert wav.shape == (1, 1, 16000), wav.shape
print("solved: codec, prepared data, language model and music at 25 frames a second")
