"""A codec that two CPU cores train: 16 kHz, 50 frames/s, 4 codebooks of 512 entries.

    python data/tunes.py --out data/tunes
    python train.py config/tiny_codec.py

The same EnCodec at a quarter of the width. What differs from config/encodec.py, because the run is short:
spectral losses alone (no discriminator), Muon, a start without the quantizer, and a last part in which the
decoder alone is tuned on frozen codes.
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
q_dropout = True

l1 = 1.0
msspec = 1.0
sc = 1.0
adv = 0.0
feat = 0.0
commit = 0.25
balancer = False
mel_range = (8, 13)            # windows 256 ... 4,096
mel_floor = 0.1
unquantised_steps = 200
decoder_only_steps = 400

batch_size = 10
epochs = 2
updates_per_epoch = 1000
optim = "muon"
lr = 0.02
weight_decay = 0.0
warmup = 50
ema_every = 1
valid_every = 500
valid_batches = 4
save_every = 200
log_every = 20
sample_every = 1000
