"""Rows of the table that tests/cuda.sh prints, one a call. Not collected by pytest.

    python tests/cuda_rows.py decode_300M                           # on a CUDA device
    python tests/cuda_rows.py decode_300M --device cpu --quick      # the same code with tiny shapes

Every number is measured in this run. A check that fails ends the process with a sentence on stderr.
"""
import argparse
import contextlib
import copy
import dataclasses
import io
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench import PREFIX, SHAPES, bytes_of_a_frame, language_model, prefix_of, random_codec, transformers_of
from chroma import ChromaExtractor
from config import Config, load
from data.audio import read_audio
from data.segments import get_batch
from encodec import EncodecModel
from evaluation.metrics import si_snr
from lm import LMModel
from sample import MusicGen, Settings, condition_passes, generate, stream_window
from sampling.loading import load_models
from speed import fastest_dtype, optimize_for_cuda
from system.errors import UserError
from train import LMLoss, LMTraining, build, gradient_norm, train
from training.log import memory_gb
from training.plan import plan
from training_runs import losses, settings, write_data

TINY, MELODY = ROOT / "checkpoints" / "tiny", ROOT / "assets" / "ode_to_joy.wav"


# --- measuring --------------------------------------------------------------------------------------------

def row(what, measured, beside="", ratio=""):
    print(f"| {what} | {measured} | {beside} | {ratio} |", flush=True)


def check(condition, sentence: str):
    if not condition:
        raise UserError(sentence)


def wait(args):
    """Until the device has done what it was asked to do."""
    if args.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(args, function, runs=3) -> float:
    """The shortest duration of several calls, after one that does not count."""
    times = []
    for _ in range(1 + runs):
        wait(args)
        begun = time.perf_counter()
        function()
        wait(args)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def bandwidth(args) -> float:
    """Bytes a second that the device's memory gives at best, read or copied."""
    data, copied = torch.ones(2, 2 ** (20 if args.quick else 28), device=args.device)
    read = data.nbytes / seconds(args, data.sum)
    return max(read, 2 * data.nbytes / seconds(args, lambda: copied.copy_(data)))


def shape_of(args, name: str) -> str:
    return "tiny" if args.quick else name


def difference(a, b) -> float:
    """|a - b| / |b|"""
    return float((a.float().cpu() - b.float()).norm() / b.float().norm())


def equal_share(a, b) -> float:
    return float((a.cpu() == b.cpu()).float().mean())


def heading(args):
    name = f"a CPU, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        found = torch.cuda.get_device_properties(0)
        name = f"{found.name}, {found.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    print(f"on {name}; torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| what | measured | beside it | ratio |\n| --- | --- | --- | --- |")
    a = torch.randn(2, 256 if args.quick else 8192, 256 if args.quick else 8192, device=args.device)
    a = a.bfloat16()
    products = 2 * a.shape[-1] ** 3 / seconds(args, lambda: a[0] @ a[1])
    row("memory; products in bfloat16", f"{bandwidth(args) / 1e9:.0f} GB/s; {products / 1e12:.3g} TFLOP/s")


def tests(args):
    """The tests of decoding by graphs, on the device, too."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-k", "not script"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    row("tests/test_cuda.py", done.stdout.strip().splitlines()[-1].strip("= "))
    check(done.returncode == 0, "\n".join(done.stdout.splitlines()[-30:]))


# --- parity with the CPU ----------------------------------------------------------------------------------

@torch.inference_mode()
def parity(args, dtype: str):
    """The shipped model, stage by stage, against float32 on the CPU."""
    kind, where = getattr(torch, dtype), f"{dtype} against the CPU's float32"
    lm, codec = LMModel.from_pretrained(TINY, torch.float32), EncodecModel.from_pretrained(TINY / "codec")
    wav = read_audio(MELODY, codec.sample_rate, 1, 0.0, 1.0 if args.quick else 5.0)[None]
    there, wav_there = copy.deepcopy(codec).to(args.device, kind), wav.to(args.device, kind)
    codes, worst = codec.encode(wav), {}
    latents, latents_there = codec.encoder(wav), there.encoder(wav_there)
    row(f"codes, {where}", f"{equal_share(there.encode(wav_there), codes):.2%} equal")
    if dtype == "float32" and args.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        share = equal_share(there.encode(wav_there), codes)
        row(f"codes, {where}, no TF32", f"{share:.2%} equal")
        check(share > 0.99, "codes differ from the CPU's")
        latents_there = there.encoder(wav_there)
    error = difference(latents_there, latents)
    row(f"latents, {where}", f"{error:.1e} off")
    if args.device.type == "cuda":      # on a CPU with AMX oneDNN's convolutions of 16 channels are wrong
        worst["latents"] = error
    same = equal_share(there.quantizer.encode(latents.to(latents_there)), codec.quantizer.encode(latents))
    row(f"codes of the same latents, {where}", f"{same:.2%} equal")
    snr = si_snr(codec.decode(codes), there.decode(codes.to(args.device)).float().cpu())
    row(f"decoded wave, {where}", f"{float(snr):.0f} dB SI-SNR")
    extract = ChromaExtractor(codec.sample_rate)
    chroma = extract(wav[0])
    if dtype == "float32":
        same = equal_share(extract.to(args.device)(wav_there[0]), chroma)
        row(f"chroma, {where}", f"{same:.2%} equal")
        check(same > 0.99, "chroma differs from the CPU's")

    fast, _ = load_models(TINY, str(args.device), dtype)
    T = 10 if args.quick else 100
    conditions = {"text": ["a slow flute tune", None], "melody": [None, None]}
    passes, passes_there = condition_passes(lm, conditions, T), condition_passes(fast, conditions, T)
    worst["prefix"] = difference(passes_there[0].prefix, passes[0].prefix)
    sequence, _ = lm.pattern.build(codes.expand(4, -1, -1), lm.special)
    logits = lm(sequence, passes[0])
    logits_there = fast(sequence.to(args.device), passes_there[0])
    worst["logits"] = difference(logits_there, logits)
    row(f"{', '.join(worst)}, {where}", "; ".join(f"{value:.1e}" for value in worst.values()))
    same = equal_share(logits_there.argmax(-1), logits.argmax(-1))
    row(f"likeliest entries, {where}", f"{same:.2%} equal")
    tokens, tokens_there = (generate(model, given, T, [0, 1], temperature=0).cpu()
                            for model, given in ((lm, passes), (fast, passes_there)))
    row(f"greedy tokens, {where}", f"{equal_share(tokens_there, tokens):.2%} equal")
    bound = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
    check(all(value < bound for value in worst.values()), f"more than {bound} off: {worst}")
    check(dtype != "float32" or torch.equal(tokens_there, tokens), "greedy tokens differ from the CPU's")


# --- sampling ---------------------------------------------------------------------------------------------

def sampling(args, name: str):
    """Music from a text, codec included: the shipped model with a melody, or random weights without one."""
    dtype, duration = fastest_dtype(args.device), 1.0 if args.quick else 10.0
    given = {}
    if name == "shipped":
        model = MusicGen.from_pretrained(TINY, str(args.device), "auto")
        given = dict(melodies=read_audio(MELODY, model.sample_rate, 1)[None])
    else:
        kind = torch.float32 if dtype == "int8" else getattr(torch, dtype)
        lm = optimize_for_cuda(language_model(shape_of(args, name)).to(args.device, kind))
        options = dict(n_filters=4, lstm=1) if args.quick else {}
        codec = random_codec(card=lm.config.card, **options)
        model = MusicGen(lm, codec.fold().to(args.device))
    model.generate(["a slow tune"], duration=0.1, **given)
    for which in ("first", "second"):
        begun, first = time.perf_counter(), None
        for wav in model.stream(["a slow tune"], duration=duration, **given):
            first = first or time.perf_counter() - begun
            check(wav.isfinite().all(), "samples that are not finite")
        spent = time.perf_counter() - begun
        what = f"{duration:g} s of music, {name}, {dtype}, {which} time"
        row(what, f"{spent:.2f} s, {first:.2f} s to begin", f"{memory_gb():.1f} GB",
            f"{duration / spent:.1f} x real time")


def columns(lm, args, frames: int, start=1):
    """Runs stream_window for so many frames with guidance, behind a prefix and `start` frames of prompt."""
    generator = torch.Generator().manual_seed(0)
    prefix = 0.1 * torch.randn(2, PREFIX, lm.config.dim, generator=generator)
    conditions = prefix_of(prefix.to(lm.emb.weight.dtype))
    conditions = conditions._replace(prefix=conditions.prefix.to(args.device),
                                     prefix_mask=conditions.prefix_mask.to(args.device))
    prompt = torch.zeros(1, 4, start, dtype=torch.long, device=args.device)
    return stream_window(lm, [conditions], start + frames + 1, [0], prompt, Settings())


def frames_per_second(lm, args, frames: int) -> float:
    """Of the columns after the prefix, as one run without waiting."""
    made = columns(lm, args, frames)
    next(made)
    wait(args)
    begun = time.perf_counter()
    count = sum(1 for _ in made)
    wait(args)
    return count / (time.perf_counter() - begun)


def no_waiting(lm, args):
    """Fails where the host waits for the device between columns."""
    made = columns(lm, args, 40)
    next(made), next(made)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in made:
            pass
    except RuntimeError as error:
        raise UserError(f"the host waits for the device in the loop: {error}") from None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def decode(args, name: str, dtype: str, compile=False):
    """Frames a second: by graphs, beside what the memory would allow, graphs without
    speed/cuda_kernels.py, lm.py alone, and transformers."""
    shape, frames = shape_of(args, name), 20 if args.quick else 500
    lm = language_model(shape).to(args.device, getattr(torch, dtype))
    what = f"decode, {name}, {dtype}" + ", compiled" * compile
    plain = None if compile else frames_per_second(lm, args, frames // 5)
    optimize_for_cuda(lm, kernels=not compile)
    if compile:
        for layer in lm.layers:
            layer.compile()
    first = frames_per_second(lm, args, frames)
    rate = max(frames_per_second(lm, args, frames) for _ in range(2))
    limit = bandwidth(args) / bytes_of_a_frame(lm.config, getattr(torch, dtype), PREFIX + frames // 2)
    row(f"{what}: of the memory's limit", f"{rate:.0f} frames/s", f"{limit:.0f}", f"{rate / limit:.0%}")
    row(f"{what}: the first time, with recording", f"{first:.0f} frames/s")
    graphs = [graph for buffers in lm.spare for graph in buffers.graphs.values()]
    if args.device.type == "cuda":
        check(graphs and None not in graphs, "columns were not recorded as graphs")
        check(compile or lm.kernels, "speed/cuda_kernels.py was not used")
        no_waiting(lm, args)
    if not compile:
        optimize_for_cuda(lm, kernels=False)
        without = max(frames_per_second(lm, args, frames) for _ in range(2))
        row(f"{what}: without Triton", f"{rate:.0f} frames/s", f"{without:.0f}", f"{rate / without:.1f}")
        row(f"{what}: lm.py alone", f"{rate:.0f} frames/s", f"{plain:.0f}", f"{rate / plain:.1f}")
        theirs = of_transformers(lm, args, 5 if args.quick else 60)
        row(f"{what}: transformers", f"{rate:.0f} frames/s", f"{theirs:.0f}", f"{rate / theirs:.1f}")


def profile(args, name: str, dtype: str):
    """Time of the eight kernels that take most of a column; of one that starts early, its waiting, too."""
    lm = optimize_for_cuda(language_model(shape_of(args, name)).to(args.device, getattr(torch, dtype)))
    made, n, cuda = columns(lm, args, 40), 20, args.device.type == "cuda"
    for _ in range(10):
        next(made)
    wait(args)
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        begun = time.perf_counter()
        for _ in range(n):
            next(made)
        wait(args)
        spent = 1e6 * (time.perf_counter() - begun) / n
    times = {event.key: ((event.self_device_time_total if cuda else event.self_cpu_time_total) / n,
                         event.count / n) for event in profiler.key_averages()}
    total, calls = map(sum, zip(*times.values()))
    row(f"profile, {name}, {dtype}: a column", f"{spent:.0f} us", f"{total:.0f} us in {calls:.0f} kernels")
    for key, (each, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:8]:
        key = key.replace("|", "/")[:70]
        row(f"profile, {name}: {key}", f"{each:.1f} us", f"{calls:.0f} times", f"{each / total:.0%}")


@torch.inference_mode()
def of_transformers(lm, args, frames: int) -> float:
    """Frames a second of transformers with guidance, of the later half."""
    model, times = transformers_of(lm).to(args.device, lm.emb.weight.dtype), []
    prefix = 0.1 * torch.randn(1, PREFIX, lm.config.dim, device=args.device, dtype=lm.emb.weight.dtype)

    def stamp(ids, scores):
        wait(args)
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    ids = torch.zeros(4, 1, dtype=torch.long, device=args.device)
    model.generate(ids, encoder_hidden_states=prefix, max_length=frames + 3, guidance_scale=3.0,
                   attention_mask=torch.ones(1, 1, dtype=torch.long, device=args.device), do_sample=True,
                   top_k=250, stopping_criteria=[stamp])
    later = times[len(times) // 2:]
    return (len(later) - 1) / (later[-1] - later[0])


@torch.inference_mode()
def codec(args):
    """Seconds of audio coded in a second, by the shape of the released codec at 32 kHz."""
    duration, options = (1, dict(n_filters=4, lstm=1)) if args.quick else (30, {})
    ours = random_codec(pad_mode="reflect", **options)
    with tempfile.TemporaryDirectory() as directory:
        ours.to_hf(directory)
        theirs = transformers.EncodecModel.from_pretrained(directory).eval().to(args.device)
    ours = ours.fold().to(args.device)
    wav = 0.1 * torch.randn(1, 1, duration * 32000, device=args.device)
    codes = torch.randint(2048, (1, 4, duration * 50), device=args.device)
    both = {"encode": (lambda: ours.encode(wav), lambda: theirs.encode(wav)),
            "decode": (lambda: ours.decode(codes), lambda: theirs.decode(codes[None], [None]))}
    for what, functions in both.items():
        a, b = (duration / seconds(args, function) for function in functions)
        row(f"codec, {what}, float32", f"{a:.0f} s/s", f"transformers {b:.0f}", f"{a / b:.2f}")


# --- training ---------------------------------------------------------------------------------------------

def write_random_data(folder: Path, config: Config):
    """One track of random codes and chroma, a little longer than a segment."""
    rng, frames = np.random.default_rng(0), config.segment_frames + 200
    rng.integers(config.card, size=(frames, config.n_q)).astype(np.uint16).tofile(folder / "codes.00000.u16")
    rng.integers(config.n_chroma, size=frames).astype(np.uint8).tofile(folder / "chroma.00000.u8")
    track = dict(file="one.wav", shard=0, weight=1.0, codes_start=0, frames=frames, chroma_start=0,
                 chroma_frames=frames, meta=dict(description="a slow tune"))
    keys = "sample_rate channels n_q card stride n_chroma melody_form radix2_exp".split()
    index = {key: getattr(config, key) for key in keys} | dict(version=1, hop=config.hop, shards=1)
    (folder / "index.json").write_text(json.dumps(index | dict(tracks=[track])))


def training(args, name: str, batch_size: int, compile=False):
    """Updates of config/melody.py with D-Adaptation; memory beside what --plan says."""
    with tempfile.TemporaryDirectory() as folder:
        small = dict(n_filters=4, lstm=1, segment_duration=2.0) if args.quick else {}
        config = dataclasses.replace(
            load([str(ROOT / "config/melody.py")]), batch_size=1 if args.quick else batch_size, t5="bytes",
            data_dir=folder, codec=f"{folder}/codec", device=str(args.device), compile=compile,
            **SHAPES[shape_of(args, name)], **small)
        random_codec(card=config.card, **small).save(Path(folder) / "codec")
        write_random_data(Path(folder), config)
        with contextlib.redirect_stdout(io.StringIO()):
            planned = plan(config)["together"] / 1e9
        task, ema, (optimizer,), _ = build(config, args.device, 0, 1)
    tokens, times, values = config.batch_size * config.n_q * config.segment_frames, [], []
    for update in range(6):
        wait(args)
        begun = time.perf_counter()
        loss, _ = task.loss(get_batch(task.train_data, config, update), update)
        loss.backward()
        norm = gradient_norm(task.module)
        torch.nn.utils.clip_grads_with_norm_(task.module.parameters(), config.max_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        values.append(loss.item())
        times.append(time.perf_counter() - begun)
    what = f"train, {name}, {config.dtype}, batch {config.batch_size}" + ", compiled" * compile
    row(what, f"{tokens / min(times[2:]):,.0f} tokens/s", f"first update {times[0]:.1f} s")
    used = memory_gb()
    row(f"{what}: memory, --plan", f"{used:.1f} GB", f"{planned:.1f} GB", f"{used / planned:.2f}")
    check(np.isfinite(values).all(), f"losses {values}")


def parallel(args):
    """FSDP2 and DDP with one process against none: losses of 20 updates, gradients."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data")
        runs = {way: Path(folder) / way for way in ("ddp", "fsdp")}
        device = dict(device=str(args.device), valid_every=0)
        train(Config(**settings(data, runs["ddp"], "lm", **device)))
        backend = "nccl" if args.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        train(Config(**settings(data, runs["fsdp"], "lm", sharding="fsdp", **device)))
        a, b = (torch.tensor(losses(run)) for run in runs.values())
        config = Config(**settings(data, runs["ddp"], "lm", **device))
        task = LMTraining(config, args.device)
    row("20 updates with FSDP2, one process: losses", f"{(a - b).abs().max():.1e} off", "without", "")
    check(len(a) == 20 and torch.allclose(a, b, atol=1e-3), f"losses without and with FSDP: {a}, {b}")
    batch, norms = get_batch(task.train_data, config, 0), []
    for forward in (LMLoss(task.module), DistributedDataParallel(LMLoss(task.module))):
        forward(batch["codes"].to(args.device), batch["conditions"])[0].backward()
        norms.append(float(gradient_norm(task.module)))
        task.module.zero_grad()
    row("DDP, one process: length of the gradient", f"{norms[1]:.6f}", f"without {norms[0]:.6f}")
    check(abs(norms[1] / norms[0] - 1) < 1e-3, "gradients with DDP differ")
    dist.destroy_process_group()


ROWS = {
    "heading": heading, "tests": tests, "codec": codec, "parallel": parallel,
    **{f"parity_{dtype}": partial(parity, dtype=dtype) for dtype in ("float32", "float16", "bfloat16")},
    "sample_tiny": partial(sampling, name="shipped"), "sample_300M": partial(sampling, name="300 M"),
    "sample_1.5B": partial(sampling, name="1.5 B"),
    "decode_300M": partial(decode, name="300 M", dtype="float16"),
    "decode_1.5B": partial(decode, name="1.5 B", dtype="bfloat16"),
    "profile_1.5B": partial(profile, name="1.5 B", dtype="bfloat16"),
    "compile_decode": partial(decode, name="300 M", dtype="float16", compile=True),
    "compile_train": partial(training, name="300 M", batch_size=8, compile=True),
    "train_300M": partial(training, name="300 M", batch_size=8),
    "train_1.5B": partial(training, name="1.5 B", batch_size=4),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    torch.manual_seed(0)
    try:
        ROWS[args.row](args)
    except UserError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
