"""The text + melody model of the paper (1.5 B with T5 and codec), number for number.

    torchrun --nproc_per_node=8 train.py config/melody.py

These are also the defaults of config.py; they are repeated here so that one page says all of them.
"""
task = "lm"
out_dir = "out/melody"

# audio
channels = 1
sample_rate = 32000            # Hz
segment_duration = 30.0        # s

# melody conditioner `self_wav`: chroma of the separated stem
melody = "prepend"             # prepended, in front of the text
n_chroma = 12
radix2_exp = 14                # window 16,384, hop 4,096 samples
argmax = True                  # one-hot
n_eval_wavs = 100              # tracks of --eval; each is asked for the melody of another one, never its own
melody_dropout = 0.5

# text conditioner `description`
text = "prepend"
t5 = "t5-base"
t5_finetune = False            # frozen
word_dropout = 0.2

# description augmentation over key, bpm, genre, moods, instrument, keywords
merge_text_p = 0.25
drop_desc_p = 0.5
drop_other_p = 0.5

# fusion and guidance
cfg_dropout = 0.2
cfg_coef = 3.0

# language model: pre-norm, GELU, no biases, truncated-normal start with depth-scaled ("current") std, as lm.py has it
dim = 1536
num_heads = 24
num_layers = 48
hidden_scale = 4
positional_embedding = "sin"
n_q = 4
card = 2048
pattern = "delay"
delays = (0, 1, 2, 3)

# codec: the released one; or the out_dir of `train.py config/encodec.py`
codec = "facebook/encodec_32khz"
n_filters = 64
ratios = (8, 5, 4, 4)          # 640 samples a frame: 50 frames/s
dimension = 128
lstm = 2

# training
batch_size = 192               # over all processes
epochs = 500
updates_per_epoch = 2000
optim = "dadam"
lr = 1.0                       # a factor on D-Adaptation's own estimate
betas = (0.9, 0.95)
eps = 1e-8
weight_decay = 0.1
max_norm = 1.0
ema_decay = 0.99
ema_every = 10
warmup = 4000
lr_min_ratio = 0.0
cycle_length = 1.0
dtype = "bfloat16"             # the original: float16 with a gradient scaler; the range of bfloat16 needs none

# sampling
top_k = 250
temperature = 1.0

# memory: eight GPUs of 80 GB hold it so (see --plan); 32 of them and more are a quarter faster with False
checkpointing = True
