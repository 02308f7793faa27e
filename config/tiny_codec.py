"""A codec that two CPU cores train: 16 kHz, 50 frames/s, 4 codebooks of 512 entries.

    python data/tunes.py --out data/tunes
    python train.py config/tiny_codec.py

The same EnCodec at a quarter of the width. What differs from config/encodec.py, because the run is short:
spectral losses alone (no discriminator), in decibels above a floor that falls meanwhile; Muon; and a start
without the quantizer.
"""
task = "codec"
out_dir = "out/tiny_codec"
data_dir = "data/tunes"
sample_rate = 16_000
segment_duration = 1.0         # s
n_filters = 16
ratios = (5, 4, 4, 4)          # 320 samples a frame
dimension = 64
lstm = 1
card = 512

l1 = 1.0
msspec = 0.0
log_mel = 1.5
sc = 0.6                       # summed over windows, log_mel is averaged
adv = 0.0
feat = 0.0
commit = 0.25
balancer = False
mel_range = (8, 13)            # windows 256 ... 4,096
mel_floor = 1e-6
mel_floor_start = 0.1
unquantised = 0.4              # of the run: a latent worth quantizing comes first

batch_size = 12
epochs = 11
updates_per_epoch = 1000
optim = "muon"
lr = 0.01
weight_decay = 0.0
warmup = 50
ema_every = 1
valid_every = 500
valid_batches = 4
save_every = 200
log_every = 20
sample_every = 1000
