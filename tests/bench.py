"""How fast everything is: beside its peers, and beside what the machine can do at all.

    python tests/bench.py                    # every row, half an hour on two cores; nothing else should run meanwhile
    python tests/bench.py --quick            # fewer sizes and repetitions, two minutes
    python tests/bench.py decode codec       # these rows alone, of: decode clip codec prepare chroma train optimizer ema start
    python tests/bench.py decode --shapes "1.5 B" --dtypes bf16 int8 --contexts 300

Prints a Markdown table. Every row is measured in this run: ours and its peer called in turn, once to warm up, then
several times, of which the median counts. Models have random weights of the real shapes; ours and its peer share them.
"Of the limit" is the share of the bytes or products that the machine can move or make in that time, as measured at the
start; "memory" is what the peak adds to the process (Linux only). Peers are transformers, and encodec, dadaptation and
librosa where they can be imported (audiocraft needs another torch). int8 has transformers in bfloat16 beside it.
"""
import argparse
import ctypes
import gc
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import lm as L
from checkpoints import precision
from checkpoints.formats import name_table
from chroma import ChromaExtractor
from conditioners import Conditions
from config import Config, keep_memory
from encodec import EncodecModel
from train import EMA, DAdaptAdam

SHAPES = {"tiny": dict(dim=256, num_heads=4, num_layers=6, card=512), "300 M": dict(dim=1024, num_heads=16, num_layers=24),
          "1.5 B": dict(dim=1536, num_heads=24, num_layers=48)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
PREFIX = 255        # frames of melody and text in front
ROWS = {}           # name -> function that prints rows


def row_of(function):
    ROWS[function.__name__] = function
    return function


# --- measuring ------------------------------------------------------------------------------------------------------

def seconds(*functions, runs=5) -> list[float]:
    """Median duration of each function, called in turn; the first round, in which everything is cold, does not count."""
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
    """Bytes that a call adds at most to what the process holds; None where Linux does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def now(key):
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")   # the peak begins anew
    before = now("VmRSS")
    function()
    return now("VmHWM") - before


def alone(function, *args):
    """The result of a function in a process of its own: what ours asks of the C library must not serve the peer, too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def limits() -> dict:
    """Bytes read, bytes read or written when one is copied, products (with an addition) made, in a second at best."""
    data, copy = torch.ones(2, 2 ** 27)
    found = {"bytes": data.nbytes / min(seconds(data.sum, data.amax, lambda: data @ data))}
    found["moved"] = 2 * data.nbytes / seconds(lambda: copy.copy_(data))[0]
    products = []
    for name in ("fp32", "bf16"):
        a = torch.randn(2048, 2048).to(DTYPES[name])
        ours, plain = (2048 ** 3 / time for time in seconds(lambda: precision.product(a, a), lambda: a @ a))
        found[name] = max(ours, plain)
        products.append(f"{name} {2 * ours / 1e9:.0f} (torch's own {2 * plain / 1e9:.0f})")
    print(f"{torch.get_num_threads()} threads; memory {found['bytes'] / 1e9:.1f} GB/s read, {found['moved'] / 1e9:.1f} copied; products "
          f"{', '.join(products)} GFLOP/s; torch {torch.__version__}\n")
    return found


def row(what, ours, peer="", theirs=None, unit="", limit=None, memory=(), invert=False):
    """Prints one row. Numbers in `unit`, more is better unless `invert`; limit in the unit of ours."""
    ratio = "" if theirs is None else f"{theirs / ours if invert else ours / theirs:.2f}"
    share = "" if limit is None else f"{100 * (limit / ours if invert else ours / limit):.0f} %"
    used = " / ".join(f"{m / 1e9:.2f} GB" for m in memory if m is not None)
    other = "" if theirs is None else f"{theirs:.4g} ({peer})"
    print(f"| {what} | {ours:.4g} {unit} | {other} | {ratio} | {share} | {used} |", flush=True)


# --- models ---------------------------------------------------------------------------------------------------------

def fill(module):
    """Numbers into a module without any: of the size that a random start has; fast for billions of them."""
    noise = torch.randn(2 ** 20, generator=torch.Generator().manual_seed(0))
    for name, t in module.state_dict().items():
        if t.dtype == torch.int8:
            t.view(-1).copy_((40 * noise).clamp(-127, 127).repeat(-(-t.numel() // 2 ** 20))[:t.numel()])
        elif t.dim() == 1:
            t.fill_(t.numel() ** -0.5 / 40 if name.endswith("scale") else name.endswith("weight"))
        else:
            for part in t.view(-1).split(2 ** 20):
                part.copy_(noise[:len(part)] * t.shape[-1] ** -0.5)
    return module.eval()


def language_model(shape: str, dtype=None) -> L.LMModel:
    """A random model of a shape of SHAPES; with a dtype the quick one for generation."""
    with torch.device("meta"):
        lm = L.LMModel(Config(t5="bytes", t5_dim=16, t5_layers=1, t5_heads=2, **SHAPES[shape]))
    lm = lm if dtype is None else precision.quicken(lm, dtype)
    return fill(lm.to_empty(device="cpu"))


def transformers_of(lm):
    """The same model in transformers, on the same memory."""
    from transformers import GenerationConfig, MusicgenMelodyDecoderConfig, MusicgenMelodyForCausalLM
    c = lm.config
    with torch.device("meta"):
        theirs = MusicgenMelodyForCausalLM(MusicgenMelodyDecoderConfig(
            vocab_size=c.card, hidden_size=c.dim, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
            ffn_dim=c.hidden_scale * c.dim, num_codebooks=c.n_q, pad_token_id=c.card, bos_token_id=c.card, dropout=0.0))
    own, weights = lm.state_dict(), {}
    for name, parts in name_table(lm, original=False).items():
        weights |= {part.removeprefix("decoder."): t for part, t in zip(parts, own[name].chunk(len(parts)))}
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()}, assign=True)
    positions = theirs.model.decoder.embed_positions    # not part of its state
    del positions.weights
    positions.make_weights(2100, c.dim)
    theirs.generation_config = GenerationConfig(decoder_start_token_id=c.card, pad_token_id=c.card, bos_token_id=c.card)
    return theirs.eval()


def times_of_ours(lm, context: int, frames: int) -> list[float]:
    """Seconds of every step of a generation with guidance behind `context` positions; the first includes the prefill."""
    times, T = [time.perf_counter()], max(1, context - PREFIX)
    conditions, prompt = Conditions(prefix=0.1 * torch.randn(2, PREFIX, lm.config.dim)), torch.randint(lm.config.card, (1, 4, T))
    L.generate(lm, [conditions], T + frames + 1, [0], prompt,
               progress=lambda *_: times.append(time.perf_counter()) or len(times) > frames)
    return [b - a for a, b in zip(times, times[1:])]


@torch.inference_mode()
def times_of_transformers(model, context: int, frames: int) -> list[float]:
    times, T = [time.perf_counter()], max(1, context - PREFIX)
    prefix = 0.1 * torch.randn(1, PREFIX, model.config.hidden_size).to(model.dtype)

    def stamp(ids, scores):
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)
    model.generate(torch.randint(model.config.vocab_size, (4, T)), encoder_hidden_states=prefix, max_length=T + frames + 2,
                   attention_mask=torch.ones(1, T, dtype=torch.long), guidance_scale=3.0, do_sample=True, top_k=250,
                   stopping_criteria=[stamp])
    return [b - a for a, b in zip(times, times[1:])]


def median_step(function, *args, runs) -> tuple[float, float]:
    """(first step with the prefill, one later step) in seconds, warm."""
    runs = [function(*args) for _ in range(runs)]
    return statistics.median(times[0] for times in runs), statistics.median(t for times in runs for t in times[1:])


def bytes_of_a_frame(c: Config, dtype, context) -> int:
    """Weights and, for the two rows of guidance, the cache."""
    size = torch.empty(0, dtype=dtype).element_size()
    weights = 12 * c.num_layers * c.dim ** 2 + c.n_q * c.card * c.dim
    return weights * size + 2 * 2 * c.num_layers * context * (c.dim * size + (4 * c.num_heads if dtype == torch.int8 else 0))


# --- the rows -------------------------------------------------------------------------------------------------------

@row_of
def decode(args, limit):
    """Frames a second with guidance, and the prefill, at several contexts and precisions."""
    for shape in args.shapes:
        theirs = {}
        for name in args.dtypes:
            lm, runs = language_model(shape, DTYPES[name]), 1 if args.quick or shape == "1.5 B" else 3
            model = None if name == "int8" else transformers_of(lm).to(DTYPES[name])
            times_of_ours(lm, 300, 5)
            if model is not None:
                times_of_transformers(model, 300, 2)
            for context in args.contexts:
                first, step = median_step(times_of_ours, lm, context, 20 if args.quick else 40, runs=runs)
                if model is not None:
                    steps = median_step(times_of_transformers, model, context, 5 if args.quick else 10, runs=1)
                    theirs[context] = f"transformers {name}", *steps
                peer, their_first, their_step = theirs.get(context, ("", None, None))
                row(f"decode, {shape}, {name}, context {context}", 1 / step, peer, their_step and 1 / their_step, "frames/s",
                    limit["bytes"] / bytes_of_a_frame(lm.config, DTYPES[name], context))
                products = 2 * context * 12 * lm.config.num_layers * lm.config.dim ** 2
                if not args.quick:
                    row(f"prefill, {shape}, {name}, context {context}", first, peer, their_first, "s",
                        products / limit["fp32" if name == "fp32" else "bf16"], invert=True)
            del lm, model


@row_of
def clip(args, limit):
    """A whole clip of 30 s with guidance: prefill and 1,500 frames behind a prefix of 255."""
    for shape in set(args.shapes) - {"tiny"}:
        made = []

        def whole():
            lm = language_model(shape, torch.int8)
            times_of_ours(lm, 300, 5)
            made.extend(times_of_ours(lm, 0, 150 if args.quick else 1500))
        memory = peak(whole)
        mean = limit["bytes"] / bytes_of_a_frame(Config(**SHAPES[shape]), torch.int8, PREFIX + len(made) // 2)
        row(f"a clip of {len(made) / 50:g} s, {shape}, int8", len(made) / sum(made), "real time", 50, "frames/s", mean, [memory])


def encodec_of_the_original(**options):
    """The codec of the package encodec, whose name ours has too; None where it cannot be imported."""
    ours, path = sys.modules.pop("encodec"), sys.path[:]
    sys.path[:] = [p for p in path if Path(p).resolve() not in (ROOT, ROOT / "tests")]
    try:
        from encodec.model import EncodecModel as Model
        from encodec.modules import SEANetDecoder, SEANetEncoder
        from encodec.quantization import ResidualVectorQuantizer
    except Exception:       # or of what it needs
        return None
    finally:
        sys.path[:], sys.modules["encodec"] = path, ours
    quantizer = ResidualVectorQuantizer(128, 4, 2048)
    return Model(SEANetEncoder(**options), SEANetDecoder(**options), quantizer, [2.2], 32000, 1).eval()


def coding(whose, dtype, duration, runs):
    """A codec of the shape of the released one at 32 kHz: seconds and peak bytes of encoding and of decoding, None without it."""
    from transformers import EncodecModel as Theirs
    torch.manual_seed(0)
    codec, kind = EncodecModel(Config(task="codec", kmeans_init=False, pad_mode="reflect")).eval(), DTYPES[dtype]
    wav, codes = 0.1 * torch.randn(1, 1, duration * 32000), torch.randint(2048, (1, 4, duration * 50))
    if whose == "ours":
        keep_memory()
        codec.fold(kind)
        encode, decode = lambda: codec.encode(wav), lambda: codec.decode(codes)
    elif whose == "transformers":
        with tempfile.TemporaryDirectory() as directory:
            codec.to_hf(directory)
            theirs = Theirs.from_pretrained(directory).eval().to(kind)
        wav = wav.to(kind)
        encode, decode = lambda: theirs.encode(wav, return_dict=False), lambda: theirs.decode(codes[None], [None], return_dict=False)
    else:
        original = encodec_of_the_original(channels=1, dimension=128, n_filters=64, ratios=[8, 5, 4, 4], lstm=2)
        if original is None:
            return None
        encode, decode = lambda: original.encode(wav), lambda: original.decode([(codes, None)])
    with torch.inference_mode():
        return {what: (seconds(function, runs=runs)[0], peak(function)) for what, function in (("encode", encode), ("decode", decode))}


@row_of
def codec(args, limit):
    """Seconds of audio coded in a second, by codecs of the shape of the released one at 32 kHz."""
    duration, runs = (5, 2) if args.quick else (30, 3)
    for name in ("fp32", "bf16"):
        peers = ("transformers", "encodec") if name == "fp32" else ("transformers",)
        found = {whose: alone(coding, whose, name, duration, runs) for whose in ("ours", *peers)}
        for peer in peers:
            for what, (time_of_ours, memory) in found["ours"].items():
                if found[peer]:
                    theirs = found[peer][what]
                    row(f"codec, {what}, {name}", duration / time_of_ours, f"{peer} {name}", duration / theirs[0], "s/s",
                        memory=[memory, theirs[1]])


def preparing(minutes, stem):
    """A recording through data/prepare.py with a codec of the released one's shape -> seconds, in the codec, peak bytes."""
    import soundfile
    from data.prepare import Preparer
    keep_memory()
    torch.manual_seed(0)
    codec, spent = EncodecModel(Config(task="codec", kmeans_init=False)).eval().fold(), []

    def timed(function):
        def call(*args):
            begun = time.perf_counter()
            result = function(*args)
            spent.append(time.perf_counter() - begun)
            return result
        return call
    for layer in codec.encoder:     # what `encodec.stream` calls
        name = "step" if hasattr(layer, "step") else "forward"
        setattr(layer, name, timed(getattr(layer, name)))
    codec.quantizer.encode = timed(codec.quantizer.encode)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.wav"
        with soundfile.SoundFile(path, "w", 44100, 2) as file:      # a rate of its own, stereo
            for _ in range(minutes):
                file.write(0.1 * torch.randn(60 * 44100, 2).numpy())
        prepare = Preparer(codec, codec.config, stem, "cpu")
        begun = time.perf_counter()
        memory = peak(lambda: prepare(path, path))
    return time.perf_counter() - begun, sum(spent), memory


@row_of
def prepare(args, limit):
    """An hour of stereo at 44.1 kHz to codes and chroma; "of the limit" is the share of its time spent in the codec."""
    minutes = 1 if args.quick else 60
    for stem in ("none", "hpss"):
        total, codec, memory = alone(preparing, minutes, stem)
        row(f"prepare, {minutes} min, --stem {stem}", 60 * minutes / total, unit="s/s", limit=60 * minutes / codec, memory=[memory])


@row_of
def chroma(args, limit):
    wav = 0.1 * torch.randn(1, 30 * 32000)
    extract = ChromaExtractor(32000)
    try:
        from librosa.feature import chroma_stft
    except ImportError:
        return row("chroma of 30 s", 30 / seconds(lambda: extract(wav))[0], unit="s/s")
    options = dict(y=wav[0].numpy(), sr=32000, n_fft=2 ** 14, hop_length=2 ** 12, tuning=0.0)
    a, b = seconds(lambda: extract(wav), lambda: chroma_stft(**options))
    row("chroma", 30 / a, "librosa", 30 / b, "s/s")


def training_step(whose, dtype, B, T=500):
    """Forward, loss and backward of the 300 M shape, ours or theirs -> median seconds, peak bytes."""
    lm = language_model("300 M").train()
    c, codes, prefix = lm.config, torch.randint(lm.config.card, (B, 4, T)), torch.randn(B, 100, lm.config.dim)
    if whose == "ours":     # as train.py does
        keep_memory()
        precision.quicken_training(lm, {"fp32": "float32", "bf16": "bfloat16"}[dtype])

        def loss():
            logits, mask = lm.compute_predictions(codes, Conditions(prefix=prefix))
            return L.codebook_cross_entropy(logits, codes, mask).mean()
    else:
        sequence = lm.pattern.build(codes, lm.special, True)[0]          # (B, K, T + 1)
        inputs, labels = sequence[..., :-1].reshape(B * 4, T), sequence[..., 1:].transpose(1, 2)
        theirs = transformers_of(lm).train()

        def loss():
            return theirs(inputs, encoder_hidden_states=prefix, labels=labels).loss

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            value = loss()
        value.backward()
        (lm if whose == "ours" else theirs).zero_grad()
    return seconds(step, runs=3)[0], peak(step)


@row_of
def train(args, limit):
    """Forward, loss and backward of the 300 M shape on segments of 10 s, behind 100 frames of conditions."""
    B, T, rounds = 1 if args.quick else 2, 500, 1 if args.quick else 3
    c = Config(**SHAPES["300 M"])
    products = 3 * B * (12 * c.num_layers * c.dim ** 2 * (T + 100) + c.n_q * c.card * c.dim * T)
    for name in args.dtypes:
        if name != "int8":
            runs = [[alone(training_step, whose, name, B) for whose in ("ours", "theirs")] for _ in range(rounds)]
            (a, ours), (b, theirs) = ([statistics.median(x) for x in zip(*side)] for side in zip(*runs))
            row(f"train, 300 M, {name}", B * 4 * T / a, f"transformers {name}", B * 4 * T / b, "tokens/s",
                B * 4 * T / (products / limit[name]), [ours, theirs])


@row_of
def optimizer(args, limit):
    """A step of D-Adaptation on 100 M weights in 96 matrices: 11 numbers a weight read or written at least."""
    def weights():
        params = [torch.randn(1024, 1024).requires_grad_() for _ in range(96)]
        for p in params:
            p.grad = 0.01 * torch.randn_like(p)
        return params
    ours = DAdaptAdam(weights(), betas=(0.9, 0.95), weight_decay=0.1)
    least = 11 * 4 * 96 * 2 ** 20 / limit["moved"]
    try:
        from dadaptation import DAdaptAdam as Theirs
        peer, theirs = "dadaptation", Theirs(weights(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, decouple=True, log_every=0)
    except ImportError:
        peer, theirs = "AdamW of torch", torch.optim.AdamW(weights(), betas=(0.9, 0.95), weight_decay=0.1)
    a, b = seconds(ours.step, theirs.step, runs=3 if args.quick else 7)
    memory = [peak(ours.step), peak(theirs.step)]
    row("optimizer, D-Adaptation, 100 M weights", 1000 * a, peer, 1000 * b, "ms", 1000 * least, memory, invert=True)


@row_of
def ema(args, limit):
    """The moving average of 100 M weights: 3 numbers a weight read or written."""
    module = torch.nn.ParameterList(torch.randn(1024, 1024) for _ in range(96))
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    ours, theirs = EMA(module), AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    a, b = seconds(ours.update, lambda: theirs.update_parameters(module), runs=3 if args.quick else 7)
    row("EMA, 100 M weights", 1000 * a, "torch", 1000 * b, "ms", 1000 * 3 * 4 * 96 * 2 ** 20 / limit["moved"], invert=True)


@row_of
def start(args, limit):
    """sample.py from the shell to its first frame (and to the end of its file), with the shipped model."""
    with tempfile.TemporaryDirectory() as directory:
        def run():
            subprocess.run([sys.executable, "sample.py", "--text", "a slow flute tune", "--duration", "0.02", "--overwrite",
                            "--out", f"{directory}/a.wav"], cwd=ROOT, check=True, capture_output=True)
        row("start of sample.py to the first frame", seconds(run, runs=1 if args.quick else 3)[0], unit="s")


def main():
    parser = argparse.ArgumentParser(description="Speed, beside peers and the machine's limits.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}; all of them by default")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), metavar="S", help=f"of language models: {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), metavar="D", help=f"of their weights: {', '.join(DTYPES)}")
    parser.add_argument("--contexts", nargs="+", type=int, metavar="N", help="positions before the frames that are timed")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    args.shapes = args.shapes or (["tiny", "300 M"] if args.quick else list(SHAPES))
    args.dtypes = args.dtypes or (["bf16", "int8"] if args.quick else list(DTYPES))
    args.contexts = args.contexts or ([300, 1000] if args.quick else [300, 1000, 1700])
    found = limits()
    print("| what | ours | peer | ratio | of the limit | memory, ours / peer |\n| --- | --- | --- | --- | --- | --- |")
    for name in args.rows or ROWS:
        ROWS[name](args, found)
        gc.collect()


if __name__ == "__main__":
    main()
