"""The text + melody model of the paper (1.5 B with T5 and codec): its numbers are the defaults of config.py.

    torchrun --nproc_per_node=8 train.py config/melody.py

The keys of audiocraft's musicgen_melody_32khz.yaml, and of the nine files that it merges, and ours:

    audiocraft                                      config.py
    sample_rate                                     sample_rate
    channels                                        channels
    dataset.segment_duration                        segment_duration
    dataset.batch_size                              batch_size
    optim.epochs                                    epochs
    optim.updates_per_epoch                         updates_per_epoch
    optim.optimizer                                 optim
    optim.lr                                        lr
    optim.adam.betas                                betas
    optim.adam.eps                                  eps
    optim.adam.weight_decay                         weight_decay
    optim.max_norm                                  max_norm
    optim.ema.decay                                 ema_decay
    optim.ema.updates                               ema_every
    schedule.cosine.warmup                          warmup
    schedule.cosine.lr_min_ratio                    lr_min_ratio
    schedule.cosine.cycle_length                    cycle_length
    autocast_dtype                                  dtype           (another value: see below)
    transformer_lm.dim                              dim
    transformer_lm.num_heads                        num_heads
    transformer_lm.num_layers                       num_layers
    transformer_lm.hidden_scale                     hidden_scale
    transformer_lm.positional_embedding             positional_embedding
    transformer_lm.n_q                              n_q
    transformer_lm.card                             card
    transformer_lm.checkpointing                    checkpointing   (another value: see below)
    codebooks_pattern.modeling                      pattern
    codebooks_pattern.delay.delays                  delays
    fuser.prepend (self_wav)                        melody
    fuser.prepend (description)                     text
    classifier_free_guidance.training_dropout       cfg_dropout
    classifier_free_guidance.inference_coef         cfg_coef
    attribute_dropout.wav.self_wav                  melody_dropout
    chroma_stem.n_chroma                            n_chroma
    chroma_stem.radix2_exp                          radix2_exp
    chroma_stem.argmax                              (no key: melodies are always one-hot)
    chroma_stem.n_eval_wavs                         n_eval_wavs
    t5.name                                         t5
    t5.finetune                                     t5_finetune
    t5.word_dropout                                 word_dropout
    dataset.train.merge_text_p                      merge_text_p
    dataset.train.drop_desc_p                       drop_desc_p
    dataset.train.drop_other_p                      drop_other_p
    compression_model_checkpoint                    codec           (or the out_dir of config/encodec.py)
    seanet.n_filters                                n_filters
    seanet.ratios                                   ratios
    seanet.dimension                                dimension
    seanet.lstm                                     lstm
    generate.lm.top_k                               top_k
    generate.lm.temp                                temperature

The model is pre-norm, with GELU, without biases, and starts from a truncated normal whose standard deviation
falls with depth ("current" in audiocraft): lm.py has no other.
"""
out_dir = "out/melody"
dtype = "bfloat16"      # audiocraft: float16 with a gradient scaler; the range of bfloat16 needs none
checkpointing = True    # so eight GPUs of 80 GB hold it (see --plan); with 32, False is a quarter faster
