"""The text-only model (the paper's 300 M): text by cross-attention, no melody. All else as config/melody.py.

    torchrun --nproc_per_node=8 train.py config/text.py
"""
out_dir = "out/text"
melody = "none"
text = "cross"
dim = 1024
num_heads = 16
num_layers = 24
word_dropout = 0.3
cfg_dropout = 0.3
dtype = "bfloat16"
