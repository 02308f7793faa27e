"""A released MusicGen tuned on your own music, with low-rank adapters: fits a GPU of 24 GB.

    python data/prepare.py FOLDER --out data/mine --config config/finetune.py
    python train.py config/finetune.py --data_dir=data/mine --out_dir=out/mine --plan
    python train.py config/finetune.py --data_dir=data/mine --out_dir=out/mine
    python sample.py --checkpoint out/mine --text "..." --melody tune.mp3

The architecture is the checkpoint's, whatever is set here. To tune all weights: lora_rank = 0, lr = 1e-5. From a
checkpoint of your own, or the shipped one, rate and codec are those of its training:

    python data/prepare.py FOLDER --out data/mine --config config/tiny.py --codec checkpoints/tiny/codec
    python train.py config/finetune.py --init_from=checkpoints/tiny --segment_duration=5.12
"""
task = "lm"
init_from = "facebook/musicgen-melody"  # or the out_dir of a run of your own
codec = "facebook/encodec_32khz"
out_dir = "out/mine"
data_dir = "data/mine"
segment_duration = 30.0

lora_rank = 16
lora_alpha = 16.0
optim = "adamw"                # D-Adaptation wants long runs
lr = 2e-4
betas = (0.9, 0.95)
weight_decay = 0.0
batch_size = 8
grad_accum = 8                 # one item at a time
checkpointing = True
dtype = "bfloat16"             # of the computation; the weights stay in float32

epochs = 4
updates_per_epoch = 250
warmup = 50
ema_decay = 0.99
ema_every = 1
valid_every = 250
valid_batches = 4
save_every = 100
log_every = 10
sample_every = 250

# a small collection: keep the captions, drop the melody and all conditions now and then
melody_dropout = 0.5
cfg_dropout = 0.1
word_dropout = 0.1
merge_text_p = 0.25
drop_desc_p = 0.2
drop_other_p = 0.5
