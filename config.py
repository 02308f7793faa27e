"""Every number of every stage, in one place.

    python config.py config/melody.py --batch_size=8        # prints the resolved configuration

`Config` is one flat dataclass. A key is one line of it: name, type, default, unit and meaning, limits.
The defaults are the melody model of the paper (MusicGen, arXiv 2306.05284). A file in config/ is a few plain
assignments (`dim = 256`) that override them; `--key=value` on the command line overrides those. The resolved
configuration is stored as config.json beside every checkpoint, and a checkpoint loads from that alone.
"""
import ast
import dataclasses
import difflib
import json
import math
import sys
from functools import partial
from pathlib import Path
from reprlib import repr as short  # of values in messages

from system.command import run
from system.errors import UserError, as_user_error
from system.files import read_json, write_atomic

Ints, Floats = tuple[int, ...], tuple[float, ...]
FUSIONS = "prepend cross sum interpolate none"      # how a condition enters the language model
ABOVE_ZERO = math.ulp(0.0)                          # the smallest positive float


def setting(default, meaning, choices="", least=ABOVE_ZERO, most=10 ** 9, inherited=False):
    """A key of Config: a number (in a tuple, each) from least to most, or one of the choices, or any text."""
    return dataclasses.field(default=default, metadata=dict(
        meaning=meaning, choices=tuple(choices.split()), least=least, most=most, inherited=inherited))


amount = partial(setting, least=0)
fraction = partial(setting, least=0, most=1)
# of the model itself: fine-tuning takes it from the checkpoint, which must not ask for all memory
architecture = partial(setting, most=65_536, inherited=True)


@dataclasses.dataclass
class Config:
    """Flat configuration of codec, conditioners, language model, training and sampling."""
    # --- what is run, on what audio ------------------------------------------------------------------------
    task: str = setting("lm", "what train.py trains: the language model or its codec", choices="lm codec")
    out_dir: str = setting("out", "folder of checkpoints, metrics and samples")
    data_dir: str = setting("data/prepared", "lm: made by data/prepare.py; codec: a folder of audio files")
    seed: int = amount(1234, "of weights, crops, dropout and sampling", most=2 ** 32)
    device: str = setting("auto", "auto takes cuda, then mps, then cpu")
    dtype: str = setting("float32", "autocast in training", choices="float32 bfloat16 float16")
    channels: int = architecture(1, "C, audio channels: 1 mono, 2 stereo", most=2)
    sample_rate: int = architecture(32_000, "Hz", most=400_000)
    segment_duration: float = setting(30.0, "s, length of a training example", most=86_400)
    start_p: float = fraction(0.0, "share of training segments that begin where their track does")

    # --- codec: EnCodec (encodec.py, rvq.py) ---------------------------------------------------------------
    codec: str = architecture("facebook/encodec_32khz", "of the language model: a hub id or a directory")
    n_filters: int = architecture(64, "channels of the outermost convolution, then doubled")
    ratios: Ints = architecture((8, 5, 4, 4), "strides; their product is samples a frame", most=1000)
    dimension: int = architecture(128, "Z, width of the latent frames")
    lstm: int = architecture(2, "LSTM layers in the middle", least=0, most=64)
    n_residual_layers: int = architecture(1, "residual units for each ratio", most=64)
    kernel_size: int = architecture(7, "of the first convolution", most=1024)
    last_kernel_size: int = architecture(7, "of the last convolution", most=1024)
    residual_kernel_size: int = architecture(3, "of the residual units", most=1024)
    dilation_base: int = architecture(2, "dilation is dilation_base ** residual unit", most=64)
    compress: int = architecture(2, "factor by which residual units narrow inside")
    causal: bool = architecture(False, "a frame sees only the past, as in the 24 kHz codec")
    pad_mode: str = architecture("constant", "of convolutions; constant: zeros", choices="constant reflect")
    true_skip: bool = architecture(True, "the residual skip is the identity, not a 1x1 convolution")
    norm: str = architecture("weight_norm", "of convolutions", choices="weight_norm time_group_norm none")
    n_q: int = architecture(4, "K, codebooks; stereo: 2 x 4", most=64)
    card: int = architecture(2048, "V, entries of a codebook; codes are stored in 16 bits", most=65_535)
    codebook_decay: float = setting(0.99, "of the moving averages that are the codebook entries", most=1)
    kmeans_iters: int = amount(50, "k-means steps on the first batch, to start codebooks; 0: random start")
    threshold_dead: float = amount(2.0, "vectors a batch; an entry used less is replaced")
    q_dropout: bool = setting(False, "train with a random number of codebooks")

    # --- melody conditioner (chroma.py) --------------------------------------------------------------------
    melody: str = architecture("prepend", "how the melody enters the language model", choices=FUSIONS)
    n_chroma: int = architecture(12, "pitch classes", most=1024)
    radix2_exp: int = architecture(14, "the window has 2 ** radix2_exp samples", least=4, most=20)
    melody_form: str = architecture("chroma", "what a model is told; notes: ours", choices="chroma notes")
    stem: str = setting("auto", "that chroma is taken from", choices="auto none hpss demucs")
    n_eval_wavs: int = setting(100, "tracks whose melodies evaluation uses, each for another track")
    melody_dropout: float = fraction(0.5, "share of items trained without their melody")
    chroma_length: int = architecture(0, "M, chroma frames; 0: those of segment_duration", least=0)
    null_melody: str = architecture("zeros", "no melody; c: one-hot C, as released models", choices="zeros c")

    # --- text conditioner (conditioners.py) ----------------------------------------------------------------
    text: str = architecture("prepend", "how the text enters the language model", choices=FUSIONS)
    t5: str = architecture("t5-base", "a hub id or directory; bytes or words: a small T5, trained along")
    t5_finetune: bool = architecture(False, "train T5 too; a small T5 always is")
    t5_words: str = architecture("", "vocabulary of t5 = words, with blanks between; others share eight")
    t5_dim: int = architecture(128, "width of a small T5")
    t5_layers: int = architecture(2, "of a small T5", most=1024)
    t5_heads: int = architecture(4, "of a small T5", most=1024)
    word_dropout: float = fraction(0.2, "share of words left out of descriptions in training")
    merge_text_p: float = fraction(0.25, "share of descriptions merged with metadata in training; of these:")
    drop_desc_p: float = fraction(0.5, "share whose description itself is left out")
    drop_other_p: float = fraction(0.5, "share of metadata fields that are KEPT; the name is audiocraft's")

    # --- language model (patterns.py, lm.py) ---------------------------------------------------------------
    dim: int = architecture(1536, "D, width")
    num_heads: int = architecture(24, "H, attention heads")
    num_layers: int = architecture(48, "layers", most=1024)
    hidden_scale: int = architecture(4, "feed-forward width over D", most=64)
    dropout: float = fraction(0.0, "share of feed-forward outputs zeroed in training")
    # rope: rotations; with them (and both, sin_rope) a melody frame has the time of the music it belongs to
    positional_embedding: str = architecture("sin", "sin: sinusoids", choices="sin rope sin_rope")
    positional_scale: float = architecture(1.0, "factor on the sinusoids")
    max_period: float = architecture(10_000.0, "longest wavelength of the positions, over 2 pi", most=10 ** 9)
    qk_layer_norm: bool = architecture(False, "normalize queries and keys: helps short training")
    pattern: str = architecture("delay", "of codebooks", choices="delay parallel unroll coarse_first musiclm")
    delays: Ints = architecture((0, 1, 2, 3), "steps, one for each codebook", least=0, most=10_000)
    cfg_dropout: float = fraction(0.2, "share of items trained without any condition")
    cfg_coef: float = amount(3.0, "guidance at sampling")
    # The next three are not in audiocraft. Hidden codes, and weight on the start, make a model heed captions.
    history_dropout: float = fraction(0.0, "share of items with codes hidden; half of it with a melody")
    early_weight: float = setting(1.0, "weight of the first frames in the loss of training")
    early_seconds: float = setting(1.0, "s from the start that early_weight counts for", most=86_400)

    # --- training (train.py) -------------------------------------------------------------------------------
    batch_size: int = setting(192, "items an update, over all processes", most=65_536)
    grad_accum: int = setting(1, "micro-batches an update; batch_size is their sum")
    epochs: int = setting(500, "of updates_per_epoch, whatever the size of the data")
    updates_per_epoch: int = setting(2000, "updates")
    optim: str = setting("dadam", "dadam: Adam with D-Adaptation", choices="dadam adamw muon")
    lr: float = setting(1.0, "dadam: a factor on its own estimate; adamw: 1e-4 or so; muon: 0.02 or so")
    betas: Floats = fraction((0.9, 0.95), "decay of the averages of gradient and square")
    eps: float = setting(1e-8, "of Adam")
    weight_decay: float = amount(0.1, "decoupled from the gradient")
    max_norm: float = amount(1.0, "largest norm of the gradient; 0: not clipped")
    ema_decay: float = fraction(0.99, "of the averaged weights, which go into model.safetensors")
    ema_every: int = setting(10, "updates between two steps of that average")
    warmup: int = amount(4000, "updates of linear rise of the learning rate")
    lr_min_ratio: float = fraction(0.0, "where the cosine of the learning rate ends, as a share of lr")
    cycle_length: float = setting(1.0, "share of the run that half a cosine takes")
    init_from: str = setting("", "checkpoint whose weights training starts from, to fine-tune it")
    lora_rank: int = amount(0, "of the low-rank adapters; 0: all weights are trained", most=65_536)
    lora_alpha: float = setting(16.0, "adapters are scaled by lora_alpha / lora_rank")
    sharding: str = setting("ddp", "fsdp: for states that outgrow a GPU", choices="ddp fsdp")
    checkpointing: bool = setting(False, "recompute activations in the backward pass")
    compile: bool = setting(False, "use torch.compile")
    valid_every: int = amount(2000, "updates between validations; 0: none")
    valid_batches: int = setting(10, "batches a validation")
    save_every: int = amount(500, "updates between checkpoints; 0: only at the end")
    log_every: int = setting(50, "updates between lines of metrics.jsonl")
    sample_every: int = amount(10_000, "updates between validation samples as audio; 0: none")
    eval_tunes: bool = setting(False, "--eval also measures adherence to captions, evaluation/adherence.py")

    # --- codec training (training/codec.py); with the balancer the first five are shares of the gradient ---
    l1: float = amount(0.1, "weight of the L1 loss of waves")
    msspec: float = amount(2.0, "weight of the multi-scale mel loss")
    adv: float = amount(4.0, "weight of the adversarial loss; adv and feat 0: no discriminator")
    feat: float = amount(4.0, "weight of feature matching")
    log_mel: float = amount(0.0, "weight of the L1 loss of log-mel spectrograms; not in audiocraft's recipe")
    sc: float = amount(0.0, "weight of spectral convergence; not in audiocraft's recipe")
    commit: float = amount(1.0, "weight of the commitment loss, outside the balancer")
    n_mels: int = setting(64, "mel bands", most=1024)
    mel_range: Ints = setting((6, 11), "windows of 2 ** 6 ... 2 ** 10 samples", most=20)
    mel_floor: float = setting(1e-5, "added before the logarithm")
    mel_floor_start: float = amount(0.0, "above 0: mel_floor of the first update, which then falls")
    balancer: bool = setting(True, "balance gradients: EnCodec, equation 5")
    balancer_decay: float = setting(0.999, "of the averaged norms of gradients", most=1)
    disc_filters: int = setting(32, "channels of the discriminator", most=65_536)
    disc_windows: Ints = setting((1024, 2048, 512, 256, 128), "samples", least=16, most=2 ** 20)
    unquantised: float = fraction(0.0, "share of the run before the quantizer starts; not in audiocraft")

    # --- sampling (sample.py) ------------------------------------------------------------------------------
    top_k: int = amount(250, "likeliest entries that sampling chooses from; 0: all")
    top_p: float = fraction(0.0, "above 0: choose from entries that add up to it, without top_k")
    temperature: float = amount(1.0, "0: always the likeliest entry")
    extend_stride: float = setting(18.0, "s, step of the window beyond segment_duration", most=86_400)

    # --- what follows from them ----------------------------------------------------------------------------
    stride = property(lambda c: math.prod(c.ratios))                    # samples a code frame (32 kHz: 640)
    frame_rate = property(lambda c: c.sample_rate / c.stride)           # code frames a second
    segment_frames = property(lambda c: round(c.segment_duration * c.sample_rate / c.stride))      # T
    hop = property(lambda c: 2 ** c.radix2_exp // 4)                    # samples a chroma frame: 1/4 window
    chroma_frames = property(                                           # M, of every melody prefix
        lambda c: c.chroma_length or int(c.segment_duration * c.sample_rate) // c.hop + 1)
    melody_classes = property(lambda c: c.n_chroma * (1 if c.melody_form == "chroma" else 4))      # Q
    total_updates = property(lambda c: c.epochs * c.updates_per_epoch)

    def __post_init__(self):
        for name, field in FIELDS.items():
            setattr(self, name, checked(field, getattr(self, name)))
        check_together(self)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def save(self, path):
        """Writes config.json; the whole file or nothing."""
        write_atomic(path, self.to_json().encode())

    @classmethod
    def from_json(cls, path) -> "Config":
        """Reads what `save` wrote, now or in a former version. Raises UserError naming file and key."""
        values = known(without_former_keys(read_json(path), path), path)
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
INHERITED = [name for name, field in FIELDS.items() if field.metadata["inherited"]]


def load(argv) -> Config:
    """Config from `[config/X.py] [--key=value ...]`. Raises UserError naming key, file or type."""
    values, files = {}, []
    for arg in argv:
        key, equals, text = arg[2:].partition("=")
        if not arg.startswith("--"):
            files.append(arg)
            values = read_assignments(arg) | values     # flags override it wherever they stand
        elif not equals and key in FIELDS and FIELDS[key].type is not bool:
            raise UserError(f"--{key} needs a value: write --{key}=VALUE")
        else:
            values |= known({key: parse(key, text if equals else "True")}, "command line")
    if len(files) > 1:
        raise UserError(f"{files[1]}: one configuration file at a time; override it with --key=value")
    return Config(**values)


def read_assignments(path) -> dict:
    """The `name = literal` lines of a configuration file. Nothing in it is executed."""
    with as_user_error(f"{path}: cannot be read as a configuration file of `name = value` lines"):
        lines = ast.parse(Path(path).read_text(encoding="utf-8")).body
    values = {}
    for node in lines:
        line = f"{path}, line {node.lineno}"
        match node:
            case ast.Expr(ast.Constant()):
                pass  # a docstring
            case ast.Assign([ast.Name(name)], value):
                try:
                    values[name] = ast.literal_eval(value)
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    raise UserError(f"{line}: the value of {name} must be a plain literal") from None
            case _:
                raise UserError(f"{line}: only plain assignments such as `dim = 256` belong here")
    return known(values, path)


def parse(key: str, text: str):
    """The text of --key=value as a Python value; strings need no quotes."""
    if key not in FIELDS or FIELDS[key].type is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return {"true": True, "false": False}.get(text.lower(), text)  # else a str, which `checked` refuses


def known(values: dict, where) -> dict:
    """The values, checked, of keys that there are. Raises UserError naming `where`, the key and the value."""
    for key in values:
        if key not in FIELDS:
            near = difflib.get_close_matches(key[:50], FIELDS, 1, cutoff=0)
            raise UserError(f"{where}: there is no setting {short(key)}; did you mean {short(near[0])}?")
    return {key: checked(FIELDS[key], value, f"{where}: ") for key, value in values.items()}


def without_former_keys(values: dict, where) -> dict:
    """The values of a config.json without the keys that only former versions had."""
    former = "unquantised_steps", "decoder_only_steps", "melody_delay"
    values = {key: values[key] for key in values if key not in former}
    if not values.pop("kmeans_init", True):
        values["kmeans_iters"] = 0
    if not values.pop("argmax", True):
        raise UserError(f"{where}: argmax = false: melodies are one-hot, as in training; delete the key")
    if values.pop("harmonic_sum", False):
        raise UserError(f"{where}: harmonic_sum = true: melodies are told in another form now; train anew")
    return values


def checked(field, value, where=""):
    """The value as its key's type, if allowed: an int may stand for a float, a list for a tuple."""
    several, limits = isinstance(field.default, tuple), field.metadata
    kind = type(field.default[0] if several else field.default)
    items = value if isinstance(value, (list, tuple)) else [value]
    types = (int, float) if kind is float else (kind,)
    choices, least, most = limits["choices"], limits["least"], limits["most"]
    if several != (items is value) or not all(type(item) in types for item in items):
        expected = f"a tuple of {kind.__name__}" if several else kind.__name__
    elif choices and value not in choices:
        expected = f"one of {', '.join(choices)}"
    elif value == "" and field.default:
        expected = "a name, not empty"
    elif not 1 <= len(items) <= 64:
        expected = "1 to 64 numbers"
    elif kind in (int, float) and not all(least <= item <= most for item in items):   # nor NaN
        expected = f"{'positive' if least == ABOVE_ZERO else f'{least} or more'}, {most} at most"
    else:
        return tuple(map(kind, items)) if several else kind(value)
    raise UserError(f"{where}{field.name} = {short(value)}: must be {expected} ({limits['meaning']})")


def check_together(c: Config):
    """Raises UserError for values that contradict each other."""
    if c.t5 == "words" and not c.t5_words.strip():
        raise UserError("t5 = 'words': t5_words must say which")
    if c.stride > 10 ** 6:
        raise UserError(f"ratios = {c.ratios}: their product must be 1000000 at most")
    if c.compress > c.n_filters:
        raise UserError(f"compress = {c.compress}: must be n_filters = {c.n_filters} at most")
    if c.dim % (2 * c.num_heads):
        raise UserError(f"dim = {c.dim}: must be num_heads = {c.num_heads} times an even number")
    if c.task == "lm" and c.pattern == "delay" and len(c.delays) != c.n_q:
        raise UserError(f"delays = {c.delays}: needs one delay for each of the n_q = {c.n_q} codebooks")
    if c.batch_size % c.grad_accum:
        raise UserError(f"batch_size = {c.batch_size}: must be a multiple of grad_accum = {c.grad_accum}")
    if len(c.betas) != 2 or max(c.betas) == 1:
        raise UserError(f"betas = {c.betas}: must be two numbers, each below 1")
    if len(c.mel_range) != 2 or c.mel_range[0] >= c.mel_range[1]:
        raise UserError(f"mel_range = {c.mel_range}: must be first exponent and one past the last: (6, 11)")


if __name__ == "__main__":
    run(lambda: print(load(sys.argv[1:]).to_json(), end=""))
