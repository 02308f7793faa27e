"""EnCodec at 32 kHz as MusicGen uses it, trained adversarially (EnCodec, arXiv 2210.13438).

    torchrun --nproc_per_node=8 train.py config/encodec.py --data_dir=FOLDER_OF_AUDIO

The architecture and the losses are the defaults of config.py; how it is trained is here.
"""
task = "codec"
out_dir = "out/encodec"
segment_duration = 1.0         # s, random crops

batch_size = 64
epochs = 200
optim = "adamw"                # as Adam: without weight decay
lr = 3e-4
betas = (0.5, 0.9)
weight_decay = 0.0
max_norm = 0.0                 # not clipped
ema_every = 1
warmup = 0
lr_min_ratio = 1.0             # constant rate
