"""The text + melody model at a size that two CPU cores train: 10-second segments at 16 kHz.

    python train.py config/tiny_codec.py
    python data/prepare.py data/tunes/train/songs --out data/prepared/train --config config/tiny.py \
        --stem none
    python train.py config/tiny.py --segment_duration=2.56 --batch_size=16 --epochs=28 \
        --out_dir=out/tiny_start
    python train.py config/tiny.py --init_from=out/tiny_start

A caption says what its first seconds are like. So the model learns to read from short segments, four times as
many in the same time (after 1,000 updates as much as after 7,200 of long ones), and then to play on for ten.

What ships in checkpoints/tiny is wider and was trained on a GPU in five minutes (docs/training.md).

The architecture is config/melody.py's: melody and text in front, delay pattern, guidance. What differs helps
so small a model in so short a run: a small T5 with a vocabulary of words, trained along, instead of t5-base;
rotary positions that give a melody frame the time of the music it belongs to, beside quiet sinusoids;
normalized queries and keys; and Muon.
"""
out_dir = "out/tiny"
sample_rate = 16_000
segment_duration = 10.24       # s: 512 frames
start_p = 0.7                  # clips begin on a bar line: only from there does a tempo say when notes begin
codec = "out/tiny_codec"
ratios = (5, 4, 4, 4)          # config/tiny_codec.py
card = 512

radix2_exp = 13                # window 8,192 samples, hop 2,048: 128 ms
melody_form = "notes"          # which note, in which of two octaves, and where it begins: more than chroma
stem = "hpss"                  # for what a user gives; the melodies of the training set have no accompaniment
melody_dropout = 0.5           # without a melody, the tempo is learned from the words

t5 = "words"                   # t5 = "bytes" learns next to nothing from text in the first thousand updates
t5_words = ("accordion acoustic adagio allegro alone ambient andante arpeggiated arpeggios ballad banjo "
            "bass bassoon bell bells box brass bright brisk broken bugle calm carol celesta cello cellos "
            "cheerful chime chimes chiptune choir choirs chords church clarinet clarinets classical "
            "cornet dance dark dramatic dreamy drum drums electronic energetic fast fiddle fiddles flute "
            "flutes folk friendly gentle glockenspiel grand guitar guitars happy harmonium harp harps "
            "held horn horns humming hushed hymn jig joyful keyboard keys largo lead leisurely lento "
            "lively lonely long lullaby lute lyre major mandolin march medium melancholic mid minor "
            "moderate moderato mournful music no nylon oboe organ organs pads pan peaceful percussion "
            "piano pianos piccolo pipe playful polka presto quick quiet rapid recorder recorders reed "
            "relaxed restless sad serious singers singing slow slowly soft softly solo steady string "
            "strings strummed strumming sunny synth synthesizer synthesizers synths tender tense "
            "thoughtful tin trombone trumpet trumpets ukulele unaccompanied unhurried upbeat upright "
            "viola violin violins violoncello violoncellos vivace vocal vocals voice voices walking waltz "
            "warm whistle wistful with without woodwind woodwinds xylophone zither 73 74 75 76 77 97 98 "
            "99 100 101 102 103 146 147 148 149 150 151 152 153 154 a an at beat beats bpm called for in "
            "key line melody minute on over pace per piece played playing song tempo tune , . - # \" \", \".")
word_dropout = 0.05
merge_text_p = 0.1
drop_desc_p = 0.3

dim = 256
num_heads = 4
num_layers = 6
dropout = 0.1
positional_embedding = "sin_rope"
positional_scale = 0.1         # as large as the embeddings are at first
qk_layer_norm = True
cfg_dropout = 0.1
early_weight = 4.0             # whether there are drums, and how fast, is decided within the first second
history_dropout = 0.8          # past codes predict the instrument better than any caption: hide them at times

batch_size = 4
epochs = 8
updates_per_epoch = 300
dtype = "bfloat16"             # half the time where the processor has it; else --dtype=float32
optim = "muon"
lr = 0.02
weight_decay = 0.0
warmup = 50
ema_every = 1
valid_every = 500
valid_batches = 8
save_every = 250
log_every = 25
sample_every = 0
eval_tunes = True              # --eval: does it play the instrument, the tempo, the drums asked for
extend_stride = 6.4            # s
