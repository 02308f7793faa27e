"""Every number of every stage, in one place.

    python config.py config/melody.py --batch_size=8        # prints the resolved configuration

`Config` is one flat dataclass: a field per number, with its default, its unit and what it means. The
defaults are the melody model of the paper (MusicGen, arXiv 2306.05284). A file in config/ is a few plain
assignments (`dim = 256`) that override them; `--key=value` on the command line overrides those:

    defaults of Config  <-  config/X.py  <-  --key=value

`load(argv)` is the one way in. The resolved configuration is stored as config.json beside every
checkpoint, and a checkpoint can be loaded from that alone.

What every stage shares also lives here, because a second copy would be one too many: `UserError` with
`run` and `blaming` (bad input ends in one sentence and exit code 2), `read_json`, and `write_atomic` (a
file appears whole or not at all).
"""
import argparse
import ast
import contextlib
import ctypes
import dataclasses
import difflib
import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # of values in messages


@dataclass
class Config:
    """Flat configuration of codec, conditioners, language model, training and sampling."""
    # --- what is run -----------------------------------------------------------------------------------
    task: str = "lm"                    # what train.py trains: "lm" or "codec"
    out_dir: str = "out"                # checkpoints, metrics and samples go here
    data_dir: str = "data/prepared"     # lm: made by data/prepare.py; codec: a folder of audio files
    seed: int = 1234                    # of everything random: weights, crops, dropouts, sampling
    device: str = "auto"                # "auto" takes cuda, then mps, then cpu
    dtype: str = "float32"              # of the computation in training: float32, bfloat16 or float16 autocast

    # --- audio -----------------------------------------------------------------------------------------
    channels: int = 1                   # C, audio channels: 1 mono, 2 stereo
    sample_rate: int = 32000            # Hz
    segment_duration: float = 30.0      # s, length of a training example
    start_p: float = 0.0                # a segment of training begins where its track does with this probability

    # --- codec: EnCodec (encodec.py, rvq.py) ---------------------------------------------------------
    codec: str = "facebook/encodec_32khz"  # lm: the codec it speaks; a hub id or a directory
    n_filters: int = 64                 # channels of the outermost convolution, doubled at every ratio
    ratios: tuple[int, ...] = (8, 5, 4, 4)  # strides of the decoder, outermost last; product = samples per frame
    dimension: int = 128                # Z, width of the latent frames
    lstm: int = 2                       # LSTM layers in the middle, 0 for none
    n_residual_layers: int = 1          # residual units per ratio
    kernel_size: int = 7                # of the first convolution
    last_kernel_size: int = 7           # of the last one
    residual_kernel_size: int = 3       # of the residual units
    dilation_base: int = 2              # dilation grows as dilation_base ** unit
    compress: int = 2                   # residual units narrow by this factor inside
    causal: bool = False                # True: a frame sees only the past (the 24 kHz codec)
    pad_mode: str = "constant"          # "constant" (zeros) or "reflect"
    true_skip: bool = True              # residual skip is the identity; False: a 1x1 convolution
    norm: str = "weight_norm"           # or "time_group_norm" (the 48 kHz codec) or "none"
    n_q: int = 4                        # K, codebooks per frame (stereo: 2 x 4)
    card: int = 2048                    # entries of each codebook
    codebook_decay: float = 0.99        # EMA of the codebook entries
    kmeans_init: bool = True            # codebooks start as k-means centres of the first batch
    kmeans_iters: int = 50
    threshold_dead: float = 2.0         # an entry with an EMA count below this is restarted
    q_dropout: bool = False             # train with a random number of codebooks

    # --- melody conditioner (chroma.py) ---------------------------------------------------------------
    melody: str = "prepend"             # how melody enters the model: prepend, cross, sum, interpolate or none
    n_chroma: int = 12                  # pitch classes
    radix2_exp: int = 14                # window = 2 ** radix2_exp samples, hop = a quarter of it
    argmax: bool = True                 # keep only the strongest pitch class of a frame (one-hot)
    stem: str = "auto"                  # what chroma hears: "none", "hpss", "demucs"; "auto" takes demucs if installed
    n_eval_wavs: int = 100              # tracks whose melodies evaluation takes, never a track's own
    melody_dropout: float = 0.5         # melody of an item dropped in training ("attribute dropout")
    chroma_length: int = 0              # M, chroma frames of the prefix; 0: what segment_duration gives (235)
    null_melody: str = "zeros"          # "no melody" is: "zeros" (as in training), "c" (one-hot C: released models)

    # --- text conditioner ------------------------------------------------------------------------------
    text: str = "prepend"               # how text enters: prepend, cross, sum, interpolate or none
    t5: str = "t5-base"                 # a hub id or directory; "bytes", "words": a small T5 of our own, trained along
    t5_finetune: bool = False           # train T5 too (one of our own always is)
    t5_words: str = ""                  # what "words" tells apart, with blanks between; all other words are one
    t5_dim: int = 128                   # width, layers and heads of a T5 of our own (others bring theirs)
    t5_layers: int = 2
    t5_heads: int = 4
    word_dropout: float = 0.2           # each word of a description is dropped with this probability
    merge_text_p: float = 0.25          # description is merged with the metadata with this probability;
    drop_desc_p: float = 0.5            #   then the description itself is dropped with this one
    drop_other_p: float = 0.5           #   and each metadata field is KEPT with this one (the original's name)

    # --- language model (patterns.py, lm.py) -----------------------------------------------------------
    dim: int = 1536                     # D, width
    num_heads: int = 24
    num_layers: int = 48
    hidden_scale: int = 4               # feed-forward width / dim
    dropout: float = 0.0                # after the feed-forward
    positional_embedding: str = "sin"   # "sin" (the original), "rope", the prefix aligned in time, or both, "sin_rope"
    positional_scale: float = 1.0       # what the sinusoids are multiplied by
    max_period: float = 10000.0         # longest wavelength of the positions
    qk_layer_norm: bool = False         # normalise queries and keys (helps short training of small models)
    pattern: str = "delay"              # delay, parallel, unroll, coarse_first or musiclm
    delays: tuple[int, ...] = (0, 1, 2, 3)  # of the delay pattern, one a codebook
    cfg_dropout: float = 0.2            # all conditions of an item dropped in training (classifier-free guidance)
    history_dropout: float = 0.0        # an item sees few of its own codes in training, a random share (half as likely
    #                                     with a melody): where what has sounded tells little, the text is read (ours)
    early_weight: float = 1.0           # of the first EARLY frames in the loss of training: as music begins it goes on,
    #                                     and all that is not told by what has sounded is decided there (ours)
    cfg_coef: float = 3.0               # guidance at sampling
    melody_delay: float = 0.0           # s by which a melody is told late for every 1 that guidance is above 1 (ours,
    #                                     see sample.told_late; only where its frames have times: "rope", "sin_rope")

    # --- training (train.py) -----------------------------------------------------------------------------
    batch_size: int = 192               # over all processes
    grad_accum: int = 1                 # micro-batches per update; batch_size is their sum
    epochs: int = 500
    updates_per_epoch: int = 2000
    optim: str = "dadam"                # dadam (D-Adaptation), adamw, or muon
    lr: float = 1.0                     # D-Adaptation: a factor on its own estimate; 1e-4 or so for adamw
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1           # decoupled
    max_norm: float = 1.0               # gradient norm is clipped to this; 0 is off
    ema_decay: float = 0.99             # unbiased EMA of the weights; 0: none
    ema_every: int = 10                 # updates between two of its steps
    warmup: int = 4000                  # updates
    lr_min_ratio: float = 0.0           # of the cosine schedule
    cycle_length: float = 1.0           # of the cosine schedule
    init_from: str = ""                 # start from the weights of this checkpoint (fine-tuning)
    lora_rank: int = 0                  # > 0: train only low-rank adapters of this rank
    lora_alpha: float = 16.0            # their scale is lora_alpha / lora_rank
    sharding: str = "ddp"               # "ddp", or "fsdp" when the states outgrow a GPU
    checkpointing: bool = False         # recompute activations in the backward pass
    compile: bool = False               # torch.compile
    valid_every: int = 2000             # updates between validations
    valid_batches: int = 10             # batches per validation
    save_every: int = 500               # updates between checkpoints
    log_every: int = 50                 # updates between lines of metrics.jsonl
    sample_every: int = 10000           # updates between validation samples written as audio; 0 is off
    eval_tunes: bool = False            # --eval also asks for instruments, tempi and drums (data/obedience.py)

    # --- codec training (encodec.py, train.py) -----------------------------------------------------------
    l1: float = 0.1                     # weights of the losses; the balancer makes them shares of the gradient
    msspec: float = 2.0                 # multi-scale mel
    adv: float = 4.0                    # adversarial; 0 and feat 0: no discriminator is built
    feat: float = 4.0                   # feature matching
    sc: float = 0.0                     # spectral convergence (ours: helps the tiny codec)
    commit: float = 1.0                 # commitment loss, outside the balancer
    n_mels: int = 64
    mel_range: tuple[int, ...] = (6, 11)  # windows 2 ** 6 ... 2 ** 10 (the end is exclusive)
    mel_floor: float = 1e-5             # added before the logarithm
    balancer: bool = True               # gradient balancer (EnCodec, equation 5)
    balancer_decay: float = 0.999
    disc_filters: int = 32
    disc_windows: tuple[int, ...] = (1024, 2048, 512, 256, 128)
    unquantised_steps: int = 0          # first updates without the quantizer (ours: helps the tiny codec)
    decoder_only_steps: int = 0         # last updates with encoder and codes frozen (ours)

    # --- sampling (sample.py) --------------------------------------------------------------------------
    top_k: int = 250                    # 0: all entries
    top_p: float = 0.0                  # 0: off
    temperature: float = 1.0
    extend_stride: float = 18.0         # s, step of the window when sampling beyond segment_duration

    def __post_init__(self):
        for field in dataclasses.fields(self):
            setattr(self, field.name, _cast(field, getattr(self, field.name)))
        _check(self)

    @property
    def stride(self) -> int:
        """Samples per code frame (32 kHz model: 640)."""
        product = 1
        for ratio in self.ratios:
            product *= ratio
        return product

    @property
    def segment_frames(self) -> int:
        """T: code frames of a training segment."""
        return round(self.segment_duration * self.sample_rate / self.stride)

    @property
    def hop(self) -> int:
        """Samples per chroma frame: a quarter of the window."""
        return 2 ** self.radix2_exp // 4

    @property
    def chroma_frames(self) -> int:
        """M: chroma frames of a training segment, the length that the melody prefix always has."""
        return self.chroma_length or int(self.segment_duration * self.sample_rate) // self.hop + 1

    @property
    def total_updates(self) -> int:
        return self.epochs * self.updates_per_epoch

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def save(self, path):
        """Writes config.json; the whole file or nothing."""
        write_atomic(path, self.to_json().encode())

    @classmethod
    def from_json(cls, path) -> "Config":
        """Reads a config.json that `save` wrote. Raises UserError naming the file and the key."""
        values = read_json(path)
        try:
            return cls(**_known(values, str(path)))
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


# --- the way in --------------------------------------------------------------------------------------------

FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def load(argv) -> Config:
    """Config from `[config/X.py] [--key=value ...]`. Raises UserError naming key, file or type."""
    values, given = {}, []
    for arg in argv:
        if not arg.startswith("--"):
            given.append(arg)
            values |= _read_assignments(arg)
        else:
            key, equals, text = arg[2:].partition("=")
            if not equals and key in FIELDS and FIELDS[key].type is not bool:
                raise UserError(f"--{key} needs a value: write --{key}=VALUE")
            values |= _known({key: _parse(FIELDS.get(key), text if equals else "True")}, "command line")
    if len(given) > 1:
        raise UserError(f"one configuration file at a time, not {' and '.join(given)}; override with --key=value")
    return Config(**values)


def _read_assignments(path) -> dict:
    """The `name = literal` lines of a configuration file. Nothing in it is executed."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), filename=path)
    except OSError as error:
        raise UserError(f"{path}: cannot read this configuration file ({error.strerror})") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: not a configuration file of `name = value` lines ({error})") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{path}, line {node.lineno}: only plain assignments such as `dim = 256` belong here")
        name = node.targets[0].id
        try:
            values[name] = ast.literal_eval(node.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise UserError(f"{path}, line {node.lineno}: the value of {name} must be a plain literal") from None
    return _known(values, str(path))


def _known(values: dict, where: str) -> dict:
    """The values, each of its field's type. Raises UserError for others, and for unknown names."""
    for key in values:
        if key not in FIELDS:
            near = difflib.get_close_matches(key[:50], FIELDS, 1, cutoff=0)
            raise UserError(f"{where}: there is no setting {short(key)}; did you mean {short(near[0])}?")
    return {key: _cast(FIELDS[key], value, f"{where}: ") for key, value in values.items()}


def _parse(field, text: str):
    """The text of --key=value as a Python value; strings need no quotes."""
    if field is None or field.type is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return {"true": True, "false": False}.get(text.lower(), text)  # else a str, which _cast refuses by name


def _cast(field, value, where=""):
    """Value as the field's type: an int may stand for a float, a list for a tuple, nothing else."""
    if typing_name(field).startswith("tuple"):
        item = float if "float" in typing_name(field) else int
        if isinstance(value, (list, tuple)) and all(_is(v, item) for v in value):
            return tuple(item(v) for v in value)
    elif _is(value, field.type):
        return field.type(value)
    expected = "finite float" if field.type is float else typing_name(field)
    raise UserError(f"{where}{field.name} = {short(value)}: expected {expected}, got {type(value).__name__}")


def typing_name(field) -> str:
    """'int', 'float', 'tuple[int, ...]', as the field is declared."""
    plain = isinstance(field.type, type) and not hasattr(field.type, "__args__")
    return field.type.__name__ if plain else str(field.type)


def _is(value, kind) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) < 1e300
    return type(value) is kind


CHOICES = dict(
    task=("lm", "codec"), dtype=("float32", "bfloat16", "float16"), pad_mode=("constant", "reflect"),
    norm=("weight_norm", "time_group_norm", "none"), stem=("auto", "none", "hpss", "demucs"),
    melody=("prepend", "cross", "sum", "interpolate", "none"), text=("prepend", "cross", "sum", "interpolate", "none"),
    null_melody=("zeros", "c"), positional_embedding=("sin", "rope", "sin_rope"),
    pattern=("delay", "parallel", "unroll", "coarse_first", "musiclm"),
    optim=("dadam", "adamw", "muon"), sharding=("ddp", "fsdp"), channels=(1, 2))
PROBABILITIES = ("start_p melody_dropout word_dropout merge_text_p drop_desc_p drop_other_p dropout cfg_dropout "
                 "history_dropout top_p lr_min_ratio").split()
LARGEST = {key: most for most, keys in (  # a stranger's checkpoint or a slip must not take all memory, or for ever
    (64, "n_q lstm n_residual_layers hidden_scale dilation_base"),
    (1024, "num_layers t5_layers t5_heads kernel_size last_kernel_size residual_kernel_size n_chroma n_mels"),
    (2 ** 16, "dim t5_dim n_filters dimension disc_filters lora_rank chroma_length batch_size"),
    (86_400, "segment_duration extend_stride"), (400_000, "sample_rate"), (2 ** 32, "seed")) for key in keys.split()}
ZERO_OK = ("seed chroma_length lstm q_dropout threshold_dead top_k temperature cfg_coef melody_delay lora_rank warmup "
           "max_norm weight_decay adv feat l1 msspec sc commit unquantised_steps decoder_only_steps sample_every "
           "valid_every save_every").split()


def _check(c: Config):
    """Ranges and contradictions, each told with the way out."""
    for key, allowed in CHOICES.items():
        if getattr(c, key) not in allowed:
            raise UserError(f"{key} = {short(getattr(c, key))}: must be one of {', '.join(map(str, allowed))}")
    for key in PROBABILITIES:
        if not 0 <= getattr(c, key) <= 1:
            raise UserError(f"{key} = {getattr(c, key)}: must lie between 0 and 1")
    for key, field in FIELDS.items():
        value = getattr(c, key)
        if field.type in (int, float) and key not in PROBABILITIES and (value < 0 or value == 0 and key not in ZERO_OK):
            raise UserError(f"{key} = {value}: must be {'zero or ' if key in ZERO_OK else ''}positive")
        if field.type in (int, float) and value > LARGEST.get(key, 1e9):
            raise UserError(f"{key} = {short(value)}: must be {LARGEST.get(key, 10 ** 9):,} at most")
        if field.type is str and key not in ("init_from", "t5_words") and not value:
            raise UserError(f"{key} = '': must not be empty")
    for key, few, most in (("ratios", 1, 1000), ("delays", 0, 10_000), ("disc_windows", 16, 2 ** 20)):
        value = getattr(c, key)
        if not 1 <= len(value) <= 64 or not few <= min(value) <= max(value) <= most:
            raise UserError(f"{key} = {short(value)}: must be 1 to 64 integers from {few} to {most:,}")
    if c.t5 == "words" and not c.t5_words.strip():
        raise UserError("t5 = 'words': t5_words must say which")
    if c.stride > 10 ** 6:
        raise UserError(f"ratios = {c.ratios}: their product must be 1,000,000 at most")
    if c.compress > c.n_filters:
        raise UserError(f"compress = {c.compress}: must be n_filters = {c.n_filters} at most")
    if c.dim % c.num_heads or (c.dim // c.num_heads) % 2:
        raise UserError(f"dim = {c.dim} must be num_heads = {c.num_heads} times an even number; change one of the two")
    if c.task == "lm" and c.pattern == "delay" and len(c.delays) != c.n_q:
        raise UserError(f"delays = {c.delays}: needs one delay for each of the n_q = {c.n_q} codebooks")
    if c.card > 65535:
        raise UserError(f"card = {c.card}: codes are stored as 16-bit numbers, 65535 entries at most")
    if not 4 <= c.radix2_exp <= 20:
        raise UserError(f"radix2_exp = {c.radix2_exp}: must lie between 4 and 20 (a window of 2 ** radix2_exp samples)")
    if c.batch_size % c.grad_accum:
        raise UserError(f"batch_size = {c.batch_size} must be a multiple of grad_accum = {c.grad_accum}")
    if len(c.betas) != 2 or not all(0 <= beta < 1 for beta in c.betas):
        raise UserError(f"betas = {c.betas}: two numbers from 0 up to, not including, 1")
    if len(c.mel_range) != 2 or not 1 <= c.mel_range[0] < c.mel_range[1] <= 20:
        raise UserError(f"mel_range = {c.mel_range}: first exponent and one past the last, such as (6, 11)")


# --- shared by every stage -----------------------------------------------------------------------------------

class UserError(ValueError):
    """A mistake of the caller's, told in one sentence that names the culprit and the way out."""


@contextlib.contextmanager
def blaming(sentence: str):
    """Whatever goes wrong inside (other libraries have errors of all kinds) becomes a UserError of this sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{sentence} ({type(error).__name__}: {' '.join(str(error).split())[:150]})") from None


def read_json(path) -> dict:
    """The object in a JSON file. Raises UserError naming it."""
    with blaming(f"{path}: cannot be read as JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        assert isinstance(value, dict), f"a {type(value).__name__}, not an object"
        return value


class Parser(argparse.ArgumentParser):
    """Mistakes in flags are told as all others are."""

    def error(self, message):
        raise UserError(f"{message}; `python {self.prog} --help` lists all flags")


def run(main, *args):
    """Runs a command: what its caller can put right becomes one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    keep_memory()
    try:
        result = main(*args)
        sys.stdout.flush()
        return result
    except UserError as error:
        sentence = error
    except BrokenPipeError:  # `| head` closed the pipe; Python would flush once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sentence = f"{error.filename}: {error.strerror}" if error.filename else error
    except (RuntimeError, MemoryError) as error:  # on the CPU torch has no kind of its own
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        sentence = "out of memory; a smaller model, batch or duration takes less (`train.py --plan` tells how much)"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"{Path(sys.argv[0]).name}:", *map(str.strip, str(sentence).splitlines()), file=sys.stderr)
    sys.exit(2)


def keep_memory():
    """Lets this process keep the memory that it frees, for the next update or piece.

    Else glibc gives large blocks back to the system and gets them anew, page by page: a fifth of an update on the CPU.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2 ** 25)   # M_MMAP_THRESHOLD: blocks up to 32 MB, the most it takes, come from the heap
        libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD: whose end is never given back


def write_atomic(path, content):
    """Writes bytes, or calls content(temporary_path): the file appears whole or not at all.

    Temporary file beside it, fsync, rename. Raises UserError when the place cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the suffix is kept: writers such as soundfile choose their format by it
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
        os.close(handle)
        if callable(content):
            content(temporary)
        else:
            Path(temporary).write_bytes(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def pick_device(name: str):
    """'auto' or a device's name -> torch.device. Raises UserError when it is not there."""
    import torch  # here, so that reading a configuration does not load torch
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device = {name!r}: not available on this machine; try --device=auto") from None


if __name__ == "__main__":
    run(lambda: print(load(sys.argv[1:]).to_json(), end=""))
