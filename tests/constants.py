"""Numbers and sounds that several tests share."""
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
FOLDERS = "checkpoints data evaluation sampling speed system tools training".split()     # with code
RATE = 8000     # Hz
CODEC = dict(sample_rate=RATE, ratios=(5, 4), n_filters=2, dimension=8, lstm=1, n_q=4, card=32)
LM = dict(CODEC, task="lm", dim=16, num_heads=2, num_layers=1, t5="bytes", t5_dim=8, t5_heads=2, t5_layers=1,
          radix2_exp=8, segment_duration=0.25, extend_stride=0.15, stem="none", device="cpu")
RUN = dict(device="cpu", batch_size=2, epochs=1, updates_per_epoch=2, ema_every=1, valid_every=0,
           save_every=1, log_every=1, sample_every=0)
TRAIN = LM | RUN | dict(warmup=1)
TRAIN_CODEC = CODEC | RUN | dict(task="codec", optim="adamw", lr=1e-3, warmup=0, segment_duration=0.1,
                                 kmeans_iters=2, adv=0.0, feat=0.0, mel_range=(4, 6), n_mels=4)


def flags(values: dict, **changes) -> list[str]:
    """A dict as --key=value."""
    return [f"--{key}={value}" for key, value in {**values, **changes}.items()]


def tone(seconds=0.5, rate=RATE, channels=1, frequency=440.0, seed=0):
    """Samples (L, C) of a tone with a little noise."""
    t = np.arange(max(1, round(seconds * rate))) / rate
    wave = 0.4 * np.sin(2 * np.pi * frequency * t)[:, None]
    noise = np.random.default_rng(seed).standard_normal((len(t), channels))
    return (wave + 0.01 * noise).astype(np.float32)
