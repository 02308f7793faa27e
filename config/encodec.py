"""EnCodec at 32 kHz as MusicGen uses it, trained adversarially (EnCodec, arXiv 2210.13438).

    torchrun --nproc_per_node=8 train.py config/encodec.py --data_dir=FOLDER_OF_AUDIO
"""
task = "codec"
out_dir = "out/encodec"
sample_rate = 32000
segment_duration = 1.0         # s, random crops
n_filters = 64
ratios = (8, 5, 4, 4)
dimension = 128
lstm = 2
n_q = 4
card = 2048

# losses: with the balancer these are shares of the gradient
l1 = 0.1
msspec = 2.0
adv = 4.0
feat = 4.0
mel_range = (6, 11)            # windows 64 ... 1,024
n_mels = 64
disc_filters = 32
disc_windows = (1024, 2048, 512, 256, 128)
balancer = True
balancer_decay = 0.999

# training
batch_size = 64
epochs = 200
updates_per_epoch = 2000
optim = "adamw"                # Adam: no weight decay
lr = 3e-4
betas = (0.5, 0.9)
weight_decay = 0.0
max_norm = 0.0
ema_decay = 0.99
ema_every = 1
warmup = 0
lr_min_ratio = 1.0             # constant rate
