"""How fast everything is: beside its peers, and beside what the machine can do at all.

    python tests/bench.py                   # every row: half an hour on two cores with nothing else running
    python tests/bench.py --quick           # fewer sizes and repetitions, two minutes
    python tests/bench.py decode codec      # some: decode prefill clip codec prepare chroma train optimizer
                                            # ema start first_sound
    python tests/bench.py decode --shapes "1.5 B" --dtypes bf16 int8 --contexts 300

Prints a Markdown table. Every row is measured in this run: ours and its peer called in turn, once to warm up,
then several times, of which the median counts. Models have random weights of the real shapes; ours and its
peer share them. "Of the limit" is the share of the bytes or products that the machine can move or make in
that time, as measured at the start; "memory" is what the peak adds to the process (Linux only). Peers are
transformers, and encodec, dadaptation and librosa where they can be imported (audiocraft needs another
torch). int8 and int4 have transformers in bfloat16 beside them, if that is measured too.
"""
import argparse
import ctypes
import dataclasses
import gc
import itertools
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import soundfile
import torch
import transformers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoints.files import INT4, QUANTIZERS
from checkpoints.lm_formats import name_table
from chroma import ChromaExtractor
from conditioners import Conditions
from config import Config
from data.prepare import Preparer
from encodec import EncodecModel
from lm import LMModel, codebook_cross_entropy
from sample import MusicGen, Settings, stream_window
from speed import optimize_codec, optimize_for_cpu, optimize_training
from speed.products import product
from system.command import disable_malloc_trim
from train import EMA, DAdaptAdam

SHAPES = {
    "tiny": dict(dim=256, num_heads=4, num_layers=6, card=512),
    "300 M": dict(dim=1024, num_heads=16, num_layers=24),
    "1.5 B": dict(dim=1536, num_heads=24, num_layers=48),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": INT4}
PREFIX = 255        # frames of melody and text in front


# --- measuring --------------------------------------------------------------------------------------------

def seconds(*functions, runs=5) -> list[float]:
    """Median duration of each function, called in turn; the first round, all cold, does not count."""
    rounds = []
    for _ in range(1 + runs):
        times = []
        for function in functions:
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        rounds.append(times)
    return [statistics.median(times) for times in zip(*rounds[1:])]


def peak(function):
    """Bytes that a call adds at most to what the process holds; None where Linux does not say."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def now(key):
        for line in status.read_text().splitlines():
            if line.startswith(key):
                return 1024 * int(line.split()[1])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")   # the peak begins anew
    before = now("VmRSS")
    function()
    return now("VmHWM") - before


def alone(function, *args):
    """function(*args) in a process of its own: settings of malloc that ours makes must not help a peer."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def limits() -> dict:
    """What the machine can do in a second at best.

    "bytes" read; bytes "moved", read or written in a copy; products (with an addition) in "fp32" and "bf16".
    """
    data, copy = torch.ones(2, 2 ** 27)
    found = {"bytes": data.nbytes / min(seconds(data.sum, data.amax, lambda: data @ data))}
    found["moved"] = 2 * data.nbytes / seconds(lambda: copy.copy_(data))[0]
    products = []
    for name in ("fp32", "bf16"):
        a = torch.randn(2048, 2048).to(DTYPES[name])
        ours, plain = (2048 ** 3 / each for each in seconds(lambda: product(a, a), lambda: a @ a))
        found[name] = max(ours, plain)
        products.append(f"{name} {2 * ours / 1e9:.0f} (torch's own {2 * plain / 1e9:.0f})")
    print(f"{torch.get_num_threads()} threads; memory {found['bytes'] / 1e9:.1f} GB/s read, "
          f"{found['moved'] / 1e9:.1f} copied; products {', '.join(products)} GFLOP/s; "
          f"torch {torch.__version__}\n")
    return found


def row(what, ours, peer="", theirs=None, unit="", limit=None, memory=(), invert=False):
    """Prints one row. ours, theirs and limit in `unit`, where more is better unless `invert`."""
    ratio = share = other = ""
    if theirs is not None:
        ratio = f"{theirs / ours if invert else ours / theirs:.2f}"
        other = f"{theirs:.4g} ({peer})"
    if limit is not None:
        share = f"{100 * (limit / ours if invert else ours / limit):.0f} %"
    used = " / ".join(f"{size / 1e9:.2f} GB" for size in memory if size is not None)
    print(f"| {what} | {ours:.4g} {unit} | {other} | {ratio} | {share} | {used} |", flush=True)


# --- language models --------------------------------------------------------------------------------------

def fill(module):
    """Numbers into a module without any: of the size that a random start has; fast for billions of them."""
    noise = torch.randn(2 ** 20, generator=torch.Generator().manual_seed(0))
    for name, t in module.state_dict().items():
        if t.dtype in QUANTIZERS:
            repeated = (40 * noise).clamp(-127, 127).to(torch.int8).repeat(-(-t.numel() // 2 ** 20))
            t.view(-1).copy_(repeated[:t.numel()].view(t.dtype))
        elif t.dim() == 1:
            t.fill_(t.numel() ** -0.5 / 40 if name.endswith("scale") else name.endswith("weight"))
        else:
            for part in t.view(-1).split(2 ** 20):
                part.copy_(noise[:len(part)] * t.shape[-1] ** -0.5)
    return module.eval()


def language_model(shape: str, dtype=None) -> LMModel:
    """A random model of a shape of SHAPES; with a dtype packed, for generation."""
    with torch.device("meta"):
        lm = LMModel(Config(t5="bytes", t5_dim=16, t5_layers=1, t5_heads=2, **SHAPES[shape]))
    if dtype is not None:
        lm = optimize_for_cpu(lm, dtype)
    return fill(lm.to_empty(device="cpu"))


def transformers_of(lm):
    """The same model in transformers, on the same memory."""
    c = lm.config
    tokens = dict(pad_token_id=c.card, bos_token_id=c.card)
    config = transformers.MusicgenMelodyDecoderConfig(
        vocab_size=c.card, hidden_size=c.dim, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        ffn_dim=c.hidden_scale * c.dim, num_codebooks=c.n_q, dropout=0.0, **tokens)
    with torch.device("meta"):
        model = transformers.MusicgenMelodyForCausalLM(config)
    own, weights = lm.state_dict(), {}
    for name, parts in name_table(lm, audiocraft=False).items():
        for part, tensor in zip(parts, own[name].chunk(len(parts))):
            weights[part.removeprefix("decoder.")] = tensor
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    positions = model.model.decoder.embed_positions     # not part of its state
    del positions.weights
    positions.make_weights(2100, c.dim)
    model.generation_config = transformers.GenerationConfig(decoder_start_token_id=c.card, **tokens)
    return model.eval()


def prefix_of(frames) -> Conditions:
    """Frames (B, P, D) in front, none of them padding."""
    return Conditions(prefix=frames, prefix_mask=torch.ones(frames.shape[:2], dtype=torch.bool))


def times_of_ours(lm, context: int, frames: int) -> list[float]:
    """Seconds of every column of a generation with guidance behind `context` positions.

    The first includes the prefill.
    """
    T = max(1, context - PREFIX)
    times = [time.perf_counter()]
    conditions = prefix_of(0.1 * torch.randn(2, PREFIX, lm.config.dim))
    prompt = torch.randint(lm.config.card, (1, 4, T))
    columns = stream_window(lm, [conditions], T + frames + 1, [0], prompt, Settings())
    for _ in itertools.islice(columns, frames):
        times.append(time.perf_counter())
    return [b - a for a, b in zip(times, times[1:])]


@torch.inference_mode()
def times_of_transformers(model, context: int, frames: int) -> list[float]:
    T = max(1, context - PREFIX)
    times = [time.perf_counter()]
    prefix = 0.1 * torch.randn(1, PREFIX, model.config.hidden_size).to(model.dtype)

    def stamp(ids, scores):
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)
    model.generate(torch.randint(model.config.vocab_size, (4, T)), encoder_hidden_states=prefix,
                   max_length=T + frames + 2, attention_mask=torch.ones(1, T, dtype=torch.long),
                   guidance_scale=3.0, do_sample=True, top_k=250, stopping_criteria=[stamp])
    return [b - a for a, b in zip(times, times[1:])]


def median_step(function, *args, runs) -> float:
    """A step after the first one, in seconds, warm."""
    runs = [function(*args) for _ in range(runs)]
    return statistics.median(each for times in runs for each in times[1:])


def bytes_of_a_frame(c: Config, dtype, context) -> float:
    """Weights and, for the two rows of guidance, the cache."""
    size = torch.empty(0, dtype=dtype).element_size()
    layer, heads = 12 * c.dim ** 2 * size, c.n_q * c.card * c.dim * size
    scales = 4 * c.num_heads if dtype in QUANTIZERS else 0
    cache = 2 * 2 * c.num_layers * context * (c.dim * size + scales)
    layers = c.num_layers if dtype != INT4 else 1 + (c.num_layers - 1) * 17 / 32    # the first is in int8
    return layers * layer + heads + cache


def decode(args, limit):
    """Frames a second with guidance, at several contexts and precisions."""
    for shape in args.shapes:
        peers = {}      # context -> name and a step of transformers; at last those of bf16
        for name in args.dtypes:
            lm, quantized = language_model(shape, DTYPES[name]), DTYPES[name] in QUANTIZERS
            runs = 1 if args.quick or shape == "1.5 B" else 3
            times_of_ours(lm, 300, 5)
            if not quantized:
                model = transformers_of(lm).to(DTYPES[name])
                times_of_transformers(model, 300, 2)
            for context in args.contexts:
                step = median_step(times_of_ours, lm, context, 20 if args.quick else 40, runs=runs)
                if not quantized:
                    frames = 5 if args.quick else 10
                    peer_step = median_step(times_of_transformers, model, context, frames, runs=1)
                    peers[context] = f"transformers {name}", peer_step
                peer, peer_step = peers.get(context, ("", None))
                most = limit["bytes"] / bytes_of_a_frame(lm.config, DTYPES[name], context)
                row(f"decode, {shape}, {name}, context {context}", 1 / step, peer,
                    None if peer_step is None else 1 / peer_step, "frames/s", most)
            lm = model = None   # before the next ones are made


def first_steps(whose, shape, dtype, contexts, runs) -> list[float]:
    """Seconds to the first column behind each of `contexts`, by ours or transformers."""
    if whose == "ours":     # as sample.py does
        disable_malloc_trim()
        model, times = language_model(shape, DTYPES[dtype]), times_of_ours
    else:
        model, times = transformers_of(language_model(shape)).to(DTYPES[dtype]), times_of_transformers
    times(model, 300, 1)
    return [statistics.median(times(model, context, 1)[0] for _ in range(runs)) for context in contexts]


def prefill(args, limit):
    """The prefix and the prompt with guidance, at several lengths and precisions; each side by itself."""
    for shape, name in itertools.product(args.shapes, args.dtypes):
        runs = 3 if args.quick or shape == "1.5 B" else 5
        peer = "bf16" if DTYPES[name] in QUANTIZERS else name
        ours = alone(first_steps, "ours", shape, name, args.contexts, runs)
        theirs = alone(first_steps, "transformers", shape, peer, args.contexts, runs)
        c = Config(**SHAPES[shape])
        for context, time_of_ours, time_of_peer in zip(args.contexts, ours, theirs):
            products = 2 * context * 12 * c.num_layers * c.dim ** 2
            row(f"prefill, {shape}, {name}, {context} positions", time_of_ours, f"transformers {peer}",
                time_of_peer, "s", products / limit["fp32" if name == "fp32" else "bf16"], invert=True)


def clip(args, limit):
    """A whole clip of 30 s with guidance: prefill and 1,500 frames behind a prefix of 255."""
    for shape in set(args.shapes) - {"tiny"}:
        made = []

        def whole():
            lm = language_model(shape, torch.int8)
            times_of_ours(lm, 300, 5)
            made.extend(times_of_ours(lm, 0, 150 if args.quick else 1500))
        memory = peak(whole)
        frame = bytes_of_a_frame(Config(**SHAPES[shape]), torch.int8, PREFIX + len(made) // 2)
        row(f"a clip of {len(made) / 50:g} s, {shape}, int8", len(made) / sum(made), "real time", 50,
            "frames/s", limit["bytes"] / frame, [memory])


# --- codecs and what is prepared with them ----------------------------------------------------------------

def model_of_package_encodec():
    """The 32 kHz codec in the package encodec, whose name ours has too; None where it cannot be imported."""
    ours, path = sys.modules.pop("encodec"), sys.path[:]
    sys.path[:] = [place for place in path if Path(place).resolve() not in (ROOT, ROOT / "tests")]
    try:
        from encodec.model import EncodecModel as Model
        from encodec.modules import SEANetDecoder, SEANetEncoder
        from encodec.quantization import ResidualVectorQuantizer
    except Exception:       # or of what it needs
        return None
    finally:
        sys.path[:], sys.modules["encodec"] = path, ours
    options = dict(channels=1, dimension=128, n_filters=64, ratios=[8, 5, 4, 4], lstm=2)
    quantizer = ResidualVectorQuantizer(128, 4, 2048)
    return Model(SEANetEncoder(**options), SEANetDecoder(**options), quantizer, [2.2], 32000, 1).eval()


def random_codec(**options) -> EncodecModel:
    """A codec of the shape of the released one at 32 kHz."""
    torch.manual_seed(0)
    return EncodecModel(Config(task="codec", kmeans_iters=0, **options)).eval()


def coding(whose, dtype, duration, runs):
    """Encoding and decoding by a codec of ours or of a package -> {what: (seconds, peak bytes)}.

    None without the package. In bfloat16 our encoder computes in it too, which sample.py and prepare avoid.
    """
    codec, kind = random_codec(pad_mode="reflect"), DTYPES[dtype]
    wav, codes = 0.1 * torch.randn(1, 1, duration * 32000), torch.randint(2048, (1, 4, duration * 50))
    if whose == "ours":
        disable_malloc_trim()
        codec.fold().encoder.to(kind)
        optimize_codec(codec, kind)
        functions = {"encode": lambda: codec.encode(wav), "decode": lambda: codec.decode(codes)}
    elif whose == "transformers":
        with tempfile.TemporaryDirectory() as directory:
            codec.to_hf(directory)
            model = transformers.EncodecModel.from_pretrained(directory).eval().to(kind)
        wav = wav.to(kind)
        functions = {"encode": lambda: model.encode(wav, return_dict=False),
                     "decode": lambda: model.decode(codes[None], [None], return_dict=False)}
    else:
        package = model_of_package_encodec()
        if package is None:
            return None
        functions = {"encode": lambda: package.encode(wav), "decode": lambda: package.decode([(codes, None)])}
    with torch.inference_mode():
        return {what: (seconds(function, runs=runs)[0], peak(function))
                for what, function in functions.items()}


def codec(args, limit):
    """Seconds of audio coded in a second, by codecs of the shape of the released one at 32 kHz."""
    duration, runs = (5, 2) if args.quick else (30, 3)
    for name in ("fp32", "bf16"):
        peers = ("transformers", "encodec") if name == "fp32" else ("transformers",)
        found = {whose: alone(coding, whose, name, duration, runs) for whose in ("ours", *peers)}
        for peer in peers:
            if found[peer] is None:
                continue
            for what, (time_of_ours, memory) in found["ours"].items():
                time_of_peer, memory_of_peer = found[peer][what]
                row(f"codec, {what}, {name}", duration / time_of_ours, f"{peer} {name}",
                    duration / time_of_peer, "s/s", memory=[memory, memory_of_peer])


def timed(iterator, spent: list):
    """The items of an iterator; the seconds that each of them takes to come are added to `spent`."""
    while True:
        begun = time.perf_counter()
        item = next(iterator, None)
        spent.append(time.perf_counter() - begun)
        if item is None:
            return
        yield item


def preparing(minutes, stem):
    """A recording through data/prepare.py with a codec of the released one's shape.

    -> seconds, those of them that are spent in the codec, peak bytes
    """
    disable_malloc_trim()
    codec = optimize_codec(random_codec().fold())
    encode_stream = codec.encode_stream
    coding, reading = [], []    # seconds; those of the codec's stream include reading its input
    codec.encode_stream = lambda pieces, n_q=None: timed(
        encode_stream(timed(iter(pieces), reading), n_q), coding)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.wav"
        with soundfile.SoundFile(path, "w", 44100, 2) as file:      # a rate of its own, stereo
            for _ in range(minutes):
                file.write(0.1 * torch.randn(60 * 44100, 2).numpy())
        preparer = Preparer(codec, codec.config, stem, "cpu")
        begun = time.perf_counter()
        memory = peak(lambda: preparer(path, path))
        total = time.perf_counter() - begun
    return total, sum(coding) - sum(reading), memory


def prepare(args, limit):
    """An hour of stereo at 44.1 kHz to codes and chroma; "of the limit": share of time spent in the codec."""
    minutes = 1 if args.quick else 60
    for stem in ("none", "hpss"):
        total, in_codec, memory = alone(preparing, minutes, stem)
        row(f"prepare, {minutes} min, --stem {stem}", 60 * minutes / total, unit="s/s",
            limit=60 * minutes / in_codec, memory=[memory])


def chroma(args, limit):
    """The chromagram of 30 s."""
    wav = 0.1 * torch.randn(1, 30 * 32000)
    extract = ChromaExtractor(32000)
    try:
        from librosa.feature import chroma_stft
    except ImportError:
        return row("chroma of 30 s", 30 / seconds(lambda: extract(wav))[0], unit="s/s")
    options = dict(y=wav[0].numpy(), sr=32000, n_fft=2 ** 14, hop_length=2 ** 12, tuning=0.0)
    a, b = seconds(lambda: extract(wav), lambda: chroma_stft(**options))
    row("chroma", 30 / a, "librosa", 30 / b, "s/s")


# --- training ---------------------------------------------------------------------------------------------

def training_update(whose, dtype, B, T=500):
    """Forward, loss and backward of the 300 M shape, ours or transformers' -> median seconds, peak bytes."""
    lm = language_model("300 M").train()
    codes = torch.randint(lm.config.card, (B, 4, T))
    prefix = torch.randn(B, 100, lm.config.dim)
    if whose == "ours":     # as train.py does
        disable_malloc_trim()
        names = {"fp32": "float32", "bf16": "bfloat16"}
        optimize_training(lm, [], dataclasses.replace(lm.config, dtype=names[dtype]))
        model = lm

        def loss():
            logits, mask = lm.compute_predictions(codes, prefix_of(prefix))
            return codebook_cross_entropy(logits, codes, mask).mean()
    else:
        sequence = lm.pattern.build(codes, lm.special, True)[0]             # (B, K, T + 1)
        inputs = sequence[..., :-1].reshape(B * 4, T)
        labels = sequence[..., 1:].transpose(1, 2)
        model = transformers_of(lm).train()

        def loss():
            return model(inputs, encoder_hidden_states=prefix, labels=labels).loss

    def update():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        model.zero_grad()
    return seconds(update, runs=3)[0], peak(update)


def train(args, limit):
    """Forward, loss and backward of the 300 M shape on segments of 10 s, behind 100 frames of conditions."""
    B, T, rounds = 1 if args.quick else 2, 500, 1 if args.quick else 3
    c = Config(**SHAPES["300 M"])
    products = 3 * B * (12 * c.num_layers * c.dim ** 2 * (T + 100) + c.n_q * c.card * c.dim * T)
    tokens = B * c.n_q * T
    for name in args.dtypes:
        if DTYPES[name] in QUANTIZERS:
            continue
        ours, peers = [], []        # (seconds, bytes) of each round
        for _ in range(rounds):
            ours.append(alone(training_update, "ours", name, B))
            peers.append(alone(training_update, "transformers", name, B))
        time_of_ours, memory = map(statistics.median, zip(*ours))
        time_of_peer, memory_of_peer = map(statistics.median, zip(*peers))
        row(f"train, 300 M, {name}", tokens / time_of_ours, f"transformers {name}", tokens / time_of_peer,
            "tokens/s", tokens * limit[name] / products, [memory, memory_of_peer])


def random_weights(gradients=False) -> torch.nn.ParameterList:
    """100 M weights in 96 matrices."""
    weights = torch.nn.ParameterList(torch.randn(1024, 1024) for _ in range(96))
    for p in weights:
        p.grad = 0.01 * torch.randn_like(p) if gradients else None
    return weights


def optimizer(args, limit):
    """An update of D-Adaptation on 100 M weights: 11 numbers a weight read or written at least."""
    weights = random_weights(gradients=True)
    settings = dict(betas=(0.9, 0.95), weight_decay=0.1)
    ours = DAdaptAdam(weights, **settings)
    optimize_training(weights, [ours], Config())
    try:
        from dadaptation import DAdaptAdam as Package
        name = "dadaptation"
        peer = Package(random_weights(gradients=True), lr=1.0, decouple=True, log_every=0, **settings)
    except ImportError:
        name, peer = "AdamW of torch", torch.optim.AdamW(random_weights(gradients=True), **settings)
    a, b = seconds(ours.step, peer.step, runs=3 if args.quick else 7)
    memory = [peak(ours.step), peak(peer.step)]
    least = 11 * 4 * 96 * 2 ** 20 / limit["moved"]
    row("optimizer, D-Adaptation, 100 M weights", 1000 * a, name, 1000 * b, "ms", 1000 * least, memory,
        invert=True)


def ema(args, limit):
    """The moving average of 100 M weights: 3 numbers a weight read or written."""
    module = random_weights()
    ours, peer = EMA(module), AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    a, b = seconds(ours.update, lambda: peer.update_parameters(module), runs=3 if args.quick else 7)
    least = 3 * 4 * 96 * 2 ** 20 / limit["moved"]
    row("EMA, 100 M weights", 1000 * a, "torch", 1000 * b, "ms", 1000 * least, invert=True)


# --- the command ------------------------------------------------------------------------------------------

def start(args, limit):
    """sample.py from the shell to its first frame (and to the end of its file), with the shipped model."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "sample.py", "--text", "a slow flute tune", "--duration", "0.02",
                   "--overwrite", "--out", f"{directory}/a.wav"]

        def sample():
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        duration, = seconds(sample, runs=1 if args.quick else 3)
        row("start of sample.py to the first frame", duration, unit="s")


def music_in_time(shape: str, dtype: str, duration: float) -> tuple[float, float, float]:
    """Behind a melody, in chunks of 0.5 s.

    -> seconds to the first sound, seconds of music made in one second, bytes that a whole stream adds
    """
    disable_malloc_trim()
    if shape == "shipped":
        model = MusicGen.from_pretrained(ROOT / "checkpoints/tiny", "cpu", dtype)
    else:
        codec = optimize_codec(random_codec().fold(), torch.bfloat16)
        model = MusicGen(language_model(shape, getattr(torch, dtype)), codec)
    M, Q = model.config.chroma_frames, model.config.melody_classes
    chroma = torch.eye(Q)[torch.arange(M) // 20 % Q]
    rates = []

    def waves():
        codes = model.stream_codes(["a slow flute tune"], [chroma], None, duration)
        return model.decode_stream(codes, duration)

    def whole():
        begun = time.perf_counter()
        for _ in waves():
            pass
        rates.append(duration / (time.perf_counter() - begun))
    first, = seconds(lambda: next(waves()))
    memory = peak(whole)
    return first, rates[0], memory


def first_sound(args, limit):
    """The first half second of music: with the model loaded, and from the shell, down a pipe."""
    for shape, dtype in (("shipped", "float32"), ("shipped", "int8"), ("300 M", "int8")):
        first, rate, memory = alone(music_in_time, shape, dtype, 10.0 if args.quick else 60.0)
        row(f"first sound after the call, {shape}, {dtype}, behind a melody", first, unit="s")
        row(f"music as it is made, {shape}, {dtype}", rate, unit="s/s", memory=[memory])
    command = [sys.executable, "sample.py", "--text", "a slow flute tune", "--out", "-", "--raw"]

    def sample():
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.DEVNULL) as process:
            process.stdout.read(1)
            process.stdout.close()
    duration, = seconds(sample, runs=1 if args.quick else 5)
    row("first sound from the shell, shipped", duration, unit="s")


ROWS = {"decode": decode, "prefill": prefill, "clip": clip, "codec": codec, "prepare": prepare,
        "chroma": chroma, "train": train, "optimizer": optimizer, "ema": ema, "start": start,
        "first_sound": first_sound}


def parse():
    parser = argparse.ArgumentParser(description="Speed, beside peers and the machine's limits.")
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}; all of them by default")
    add("--quick", action="store_true", help="fewer sizes and repetitions")
    add("--shapes", nargs="+", choices=list(SHAPES), metavar="S",
        help=f"of language models: {', '.join(SHAPES)}")
    add("--dtypes", nargs="+", choices=list(DTYPES), metavar="D",
        help=f"of their weights: {', '.join(DTYPES)}")
    add("--contexts", nargs="+", type=int, metavar="N", help="positions before the frames that are timed")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    args.shapes = args.shapes or (["tiny", "300 M"] if args.quick else list(SHAPES))
    args.dtypes = args.dtypes or (["bf16", "int8"] if args.quick else list(DTYPES))
    args.contexts = args.contexts or ([300, 1000] if args.quick else [300, 1000, 1700])
    return args


def main():
    args = parse()
    limit = limits()
    print("| what | ours | peer | ratio | of the limit | memory, ours / peer |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in args.rows or ROWS:
        ROWS[name](args, limit)
        gc.collect()


if __name__ == "__main__":
    main()
