"""A released MusicGen tuned on your own music, with low-rank adapters: fits a GPU of 24 GB.

    python data/prepare.py FOLDER --out data/mine --config config/finetune.py
    python train.py config/finetune.py --data_dir=data/mine --out_dir=out/mine --plan
    python train.py config/finetune.py --data_dir=data/mine --out_dir=out/mine
    python sample.py --checkpoint out/mine --text "..." --melody tune.mp3

The architecture is the checkpoint's, whatever is set here. To tune all weights: lora_rank = 0, lr = 1e-5.
Data are prepared with the checkpoint's sample rate, and with the codec that is trained with. That of the
shipped model is to be tuned first (docs/training.md); with the result in out/my_codec:

    python data/prepare.py FOLDER --out data/mine --config config/tiny.py --codec out/my_codec
    python train.py config/finetune.py --init_from=checkpoints/tiny --codec=out/my_codec \
        --segment_duration=10.24
"""
init_from = "facebook/musicgen-melody"  # or the out_dir of a run of your own
out_dir = "out/mine"
data_dir = "data/mine"

lora_rank = 16
optim = "adamw"                # D-Adaptation needs long runs
lr = 2e-4
weight_decay = 0.0
batch_size = 8
grad_accum = 8                 # one item at a time
checkpointing = True
dtype = "bfloat16"             # of the computation; the weights stay in float32

epochs = 4
updates_per_epoch = 250
warmup = 50
ema_every = 1
valid_every = 250
valid_batches = 4
save_every = 100
log_every = 10
sample_every = 250

# a small collection: keep more of the captions, and seldom train without any condition
cfg_dropout = 0.1
word_dropout = 0.1
drop_desc_p = 0.2
