"""Every fast way of speed/ against the plain one: in generation, of the codec, in training.

    python -m pytest tests/test_speed.py
    python -m pytest -m slow tests/test_speed.py        # compiled layers, too
"""
import os
import platform
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import encodec
import quality
import speed.training
from checkpoints.files import INT4, INT4_LEVELS, QUANTIZERS, current_name
from config import Config
from constants import ROOT
from data.audio import read_audio
from encodec import EncodecModel
from evaluation.metrics import si_snr
from lm import LMModel, Projection
from models import musicgen_of_transformers
from sample import MusicGen, condition_passes, generate
from sampling import loading
from sampling.loading import load_models
from speed import decoding, fastest_dtype, kernels, optimize_codec, optimize_for_cpu, optimize_training
from speed.decoding import PackedCache, PackedLinear
from system.errors import UserError
from train import DAdaptAdam

SHIPPED = ROOT / "checkpoints" / "tiny"
SMALL = dict(dim=48, num_heads=3, num_layers=2, n_q=4, card=20, t5="bytes", t5_dim=16, t5_layers=1,
             t5_heads=2, sample_rate=8000, ratios=(8, 5, 4), radix2_exp=9, segment_duration=0.5)
KINDS = {
    "melody": {},
    "text": dict(text="cross", melody="none"),
    "no prefix": dict(text="none", melody="none"),
    "rope": dict(positional_embedding="sin_rope"),
    "normed": dict(qk_layer_norm=True),
    "all of it": dict(qk_layer_norm=True, positional_embedding="sin_rope", text="cross"),
    "heads of 72": dict(dim=144, num_heads=2),
    "heads of 64": dict(dim=128, num_heads=2),
    "too odd": dict(dim=36, num_heads=3),   # for kernels.c, which reads eight numbers at once
}
PATH = os.environ["PATH"]
needs_kernels = pytest.mark.skipif(not kernels.kernels(), reason="no C compiler")


def make(**options) -> LMModel:
    torch.manual_seed(0)
    lm = LMModel(Config(**SMALL | options)).eval()
    for parameter in lm.parameters():
        if parameter.dim() == 1:        # of layer norms, which begin as ones and zeros
            parameter.data += 0.2 * torch.randn_like(parameter)
    return lm


def passes_of(lm, texts, T: int, guidance=3.0) -> list:
    """The conditions of texts without melodies."""
    return condition_passes(lm, {"text": texts, "melody": [None] * len(texts)}, T, guidance)


def next_logits(lm, passes, codes):
    """Logits (B, K, S, V) of codes read column by column through the model's own cache."""
    conditions, = passes
    sequence, _ = lm.pattern.build(codes, lm.special)
    S = sequence.shape[-1]
    cache = lm.new_cache(len(codes), S + conditions.prefix_length)
    assert isinstance(cache, PackedCache) == lm.packed
    with torch.inference_mode():
        return torch.cat([lm(sequence[..., s:s + 1], conditions, cache) for s in range(S)], 2)


def plain_way(kind):
    """A model, passes, codes, and the logits (B, K, S, V) that lm.py alone gives for them."""
    lm, T = make(**KINDS[kind]), 10
    passes = passes_of(lm, ["slow flute and a drum", None], T, guidance=1)
    codes = torch.randint(lm.config.card, (2, 4, T), generator=torch.Generator().manual_seed(1))
    sequence, _ = lm.pattern.build(codes, lm.special)
    return lm, passes, codes, lm(sequence, passes[0]).detach()


def without_compiler(monkeypatch):
    monkeypatch.setattr(decoding, "kernels", lambda: None)


# --- decoding ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compiler", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_in_float32_are_those_of_the_plain_way(kind, compiler, monkeypatch):
    """Texts of several lengths, so that a prefix or a condition has padding; alone and in a batch."""
    lm, texts, T = make(**KINDS[kind]), ["slow flute and a drum", None, "organ"], 8
    if not compiler:
        without_compiler(monkeypatch)
    passes = passes_of(lm, texts, T)
    expected = generate(lm, passes, T, [0, 1, 2], temperature=0)
    optimize_for_cpu(lm)
    assert lm.packed == (compiler and kind != "too odd") and isinstance(lm.lm_heads, PackedLinear)
    assert torch.equal(generate(lm, passes, T, [0, 1, 2], temperature=0), expected)
    alone = generate(lm, passes_of(lm, texts[:1], T), T, [0], temperature=0)
    assert torch.equal(alone, expected[:1])


@needs_kernels
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.int8, 4e-2), (INT4, 0.12)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_cached_columns_are_near_those_of_the_plain_way(kind, dtype, tolerance):
    lm, passes, codes, expected = plain_way(kind)
    optimize_for_cpu(lm, dtype)
    assert lm.packed == (kind != "too odd")
    assert (next_logits(lm, passes, codes) - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("kind", ["text", "rope", "heads of 64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_logits_without_a_compiler_are_near_those_of_the_plain_way(kind, dtype, monkeypatch):
    """By torch's own products and attention; texts of several lengths, so that there is padding."""
    lm, passes, codes, expected = plain_way(kind)
    without_compiler(monkeypatch)
    optimize_for_cpu(lm, dtype)
    assert lm.new_cache(2, 8).dtype == torch.bfloat16 and not lm.packed
    assert (next_logits(lm, passes, codes) - expected).norm() < 4e-2 * expected.norm()


@needs_kernels
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.int8, 4e-2), (INT4, 0.12)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_read_at_once_is_read_as_the_plain_way_reads_it(kind, dtype, tolerance, tiles, monkeypatch):
    """Its last column, and the next one, which sees what the prompt left in the cache; with padding.

    With the attention of processors that have matrix units, and of those that do not.
    """
    monkeypatch.setattr(decoding, "has_tiles", lambda: tiles)
    lm, passes, codes, expected = plain_way(kind)
    optimize_for_cpu(lm, dtype)
    sequence, _ = lm.pattern.build(codes, lm.special)
    cache = lm.new_cache(2, sequence.shape[-1] + passes[0].prefix_length)
    with torch.inference_mode():
        first, second = (lm(sequence[..., part], passes[0], cache) for part in (slice(9), slice(9, 10)))
    assert first.shape[2] == second.shape[2] == 1
    found = torch.cat([first, second], 2)
    assert (found - expected[:, :, 8:10]).norm() < tolerance * expected[:, :, 8:10].norm()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_product_is_that_of_the_rounded_weights_and_does_not_depend_on_other_rows(dtype, rows):
    generator = torch.Generator().manual_seed(0)
    layer = PackedLinear(torch.randn(20, 40, generator=generator), dtype)
    assert layer.weight.dtype == dtype
    weight = layer.weight.float()
    if dtype == torch.int8:
        weight = weight * layer.scale[:, None]
    x = torch.randn(rows, 1, 40, generator=generator)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.rows(x, 8, 16), x @ weight[8:16].T, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x)[:1], layer(x[:1]))


@pytest.mark.slow   # the compiler needs a minute
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.int8])
def test_compiled_layers_give_the_same_tokens(dtype):
    """Plain and packed; eight frames, so that both the first columns and later ones are compiled."""
    lm, texts, T = make(), ["slow flute and a drum", None], 8
    if dtype is not None:
        optimize_for_cpu(lm, dtype)
    passes = passes_of(lm, texts, T)
    expected = generate(lm, passes, T, [0, 1], temperature=0)
    for layer in lm.layers:
        layer.compile()
    assert torch.equal(generate(lm, passes, T, [0, 1], temperature=0), expected)


def test_auto_takes_what_the_machine_is_fast_with(monkeypatch):
    for instructions, capability, best in (
            (b"AVX2", "AVX2", "int8"), (b"none", "DEFAULT", "bfloat16"),
            (None, "AVX2", "int8"), (None, "DEFAULT", "float32")):
        library = instructions and SimpleNamespace(instructions=lambda: instructions)
        monkeypatch.setattr(decoding, "kernels", lambda: library)
        monkeypatch.setattr(decoding, "ARM", False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        assert fastest_dtype(torch.device("cpu")) == best


@needs_kernels
@pytest.mark.parametrize("columns", [1024, 4096, 12288])
def test_a_sum_of_the_largest_products_does_not_overflow(columns):
    layer = PackedLinear(torch.ones(4, columns), torch.int8)
    torch.testing.assert_close(layer(torch.ones(2, columns)), torch.full((2, 4), float(columns)))


@needs_kernels
def test_threads_share_the_rows_of_a_product():
    """Fewer groups of rows than threads, too."""
    layer, x = PackedLinear(torch.randn(20, 40), torch.float32), torch.randn(2, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = layer(x)
        for threads in 2, 3, 7:
            torch.set_num_threads(threads)
            assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(before)


# --- other processors -------------------------------------------------------------------------------------

X86 = {"AVX-VNNI": "-march=alderlake", "AVX2": "-march=haswell", "SSE2": "-march=x86-64",
       "none": "-march=x86-64 -U__SSE2__"}
ARM = {"NEON with dot products": "-march=armv8.2-a+dotprod", "NEON": "-march=armv8-a"}


def checked(tmp_path, command: str, run="") -> str:
    """What kernels_check.c prints, which compares kernels.c with double precision, by that compiler."""
    names = (command.split()[0], *run.split()[:1])
    missing = [name for name in names if not shutil.which(name)]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    program = str(tmp_path / "check")
    flags = [flag for flag in kernels.FLAGS if flag not in ("-O3", "-shared")]      # in half the time
    source = str(ROOT / "tests" / "kernels_check.c")
    made = subprocess.run([*command.split(), "-O1", *flags, source, "-o", program, "-lm"],
                          capture_output=True, text=True)
    if made.returncode and "-march" in made.stderr:
        pytest.skip(f"{names[0]} does not know that processor")
    assert made.returncode == 0, made.stderr
    return subprocess.run([*run.split(), program], capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="no x86-64")
@pytest.mark.parametrize("instructions, cc", [
    ("AVX2", "gcc"), ("SSE2", "gcc"), ("none", "clang"),
    *(pytest.param(*names, marks=pytest.mark.slow) for names in (
        ("AVX-VNNI", "gcc"), ("AVX-VNNI", "clang"), ("AVX2", "clang"), ("SSE2", "clang"), ("none", "gcc")))])
def test_kernels_of_older_processors(tmp_path, instructions, cc):
    """Products and attention in all dtypes, alone and in a batch, with threads and without."""
    info = Path("/proc/cpuinfo")
    has = info.read_text().split() if info.exists() else []
    if {"AVX2": "avx2", "AVX-VNNI": "avx_vnni"}.get(instructions, "fpu") not in has:
        pytest.skip(f"this processor has no {instructions}")
    assert checked(tmp_path, f"{cc} {X86[instructions]}") == instructions


@pytest.mark.parametrize("instructions", ARM)
@pytest.mark.parametrize("cc", ["aarch64-linux-gnu-gcc", "clang --target=aarch64-linux-gnu"])
def test_kernels_of_arm(tmp_path, instructions, cc):
    """The same under an emulator (packages gcc-aarch64-linux-gnu, clang and qemu-user)."""
    root = "/usr/aarch64-linux-gnu"
    if not Path(root, "lib").exists():
        pytest.skip("no libraries of aarch64 in " + root)
    assert checked(tmp_path, f"{cc} {ARM[instructions]}", f"qemu-aarch64 -L {root}") == instructions


# --- compiling kernels.c ----------------------------------------------------------------------------------

@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without a cache yet, and with no compiler but those of `compiler`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def compiler(home, lines: str):
    """A program `cc` made of lines for the shell."""
    (home / "bin").mkdir()
    script = home / "bin" / "cc"
    script.write_text(f"#!/bin/sh\n{lines}\n")
    script.chmod(0o755)


@pytest.fixture
def counted(home, library):
    """A compiler that writes a line into a file for every library it makes: as long as a compiler takes."""
    compiler(home, f"""
        echo >> '{home}/calls'
        while [ "$1" != -o ]; do shift; done
        /bin/sleep 0.1
        /bin/cp '{library}' "$2" """)
    return lambda: len((home / "calls").read_text())


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """A copy of the compiled library."""
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    shutil.copy(kernels.kernels()._name, path)
    return path


@needs_kernels
@pytest.mark.parametrize("cc, refused", [
    ("gcc", "everything special"), ("clang", "nothing"),
    *(pytest.param(*names, marks=pytest.mark.slow) for names in (
        ("gcc", "nothing"), ("clang", "everything special")))])
def test_rows_alone_and_together_are_equal_by_every_compiler(home, cc, refused, monkeypatch, capfd):
    """gcc and clang, for this processor and, where they take no -march=native or -fopenmp, for any."""
    found = shutil.which(cc, path=PATH)
    if not found:
        pytest.skip(f"{cc} is not installed")
    refuse = "case $flag in -march=*|-mcpu=*|-fopenmp) echo error: $flag >&2; exit 1;; esac"
    compiler(home, f"""
        PATH='{PATH}'
        for flag in "$@"; do {refuse if refused != "nothing" else ":"}; done
        exec '{found}' "$@" """)
    made = kernels.kernels.__wrapped__()
    assert ("-march=native" in capfd.readouterr().err) == (made.instructions() in (b"SSE2", b"none"))
    monkeypatch.setattr(decoding, "kernels", lambda: made)
    for dtype in torch.float32, torch.bfloat16, torch.int8:
        layer, x = PackedLinear(torch.randn(20, 320), dtype), torch.randn(5, 320)
        weight = layer.weight.double() * (1 if layer.scale is None else layer.scale.double()[:, None])
        tolerance = 5e-3 if dtype == torch.int8 else 1e-3   # with weights in int8, x is rounded too
        torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=1e-3, atol=tolerance)
        for n in range(5):
            assert torch.equal(layer(x)[n], layer(x[n]))


@needs_kernels
def test_the_library_brings_no_threads_of_its_own(library):
    """It calls the OpenMP runtime that torch has loaded, which torch.set_num_threads concerns."""
    assert not any(name in library.read_bytes() for name in (b"libgomp", b"libomp", b"libiomp"))
    assert kernels.openmp()


@needs_kernels
def test_without_threads_the_numbers_are_the_same(home, counted, monkeypatch, capfd):
    layer, x = PackedLinear(torch.randn(20, 40), torch.float32), torch.randn(2, 40)
    expected = layer(x)
    monkeypatch.setattr(kernels, "openmp", list)
    alone = kernels.kernels.__wrapped__()
    assert "runs on one thread" in capfd.readouterr().err
    monkeypatch.setattr(decoding, "kernels", lambda: alone)
    assert torch.equal(layer(x), expected)


def test_what_is_missing_is_told_in_one_sentence(home, capfd):
    assert kernels.kernels.__wrapped__() is None
    error = capfd.readouterr().err
    assert error.startswith("speed/kernels.c is not used, for there is no C compiler")
    assert error.count("\n") == 1
    compiler(home, "echo cc: error: no licence; exit 3")
    assert kernels.kernels.__wrapped__() is None
    assert "cc: error: no licence" in capfd.readouterr().err
    assert not list(home.rglob("*.so"))


def test_a_compiler_that_hangs_is_cut_off(home, monkeypatch):
    """Together with what it has started."""
    compiler(home, "/bin/sleep 1000 & echo $! > '%s/child'; wait" % home)
    monkeypatch.setattr(kernels, "MAX_SECONDS", 0.5)
    with pytest.raises(kernels.Unavailable, match="did not come to an end"):
        kernels.find_library()
    command = Path("/proc", (home / "child").read_text().strip(), "cmdline")
    for _ in range(1000):
        if not command.exists() or not command.read_bytes():    # a process that ended has none
            break
        time.sleep(0.02)
    else:
        pytest.fail("what the compiler has started is still running")


@needs_kernels
def test_of_several_at_once_one_compiles(home, counted):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kernels.find_library()._name, range(4)))
    assert len(set(found)) == 1 and counted() == 1
    assert not [path for path in (home / "cache").rglob("*ing-*")]


@needs_kernels
@pytest.mark.parametrize("damage", ["truncated", "empty", "another", "writable"])
def test_a_damaged_or_strange_library_is_compiled_anew(home, counted, damage):
    path = Path(kernels.find_library()._name)
    content = path.read_bytes()
    path.unlink()       # it stays loaded
    if damage == "another":     # a sound library, but not this one
        content = Path(torch.__file__).with_name("lib").joinpath("libtorch.so").read_bytes()
    path.write_bytes(content[:{"truncated": 5000, "empty": 0}.get(damage)])
    path.chmod(0o666 if damage == "writable" else 0o600)
    assert kernels.find_library().product
    assert counted() == 2


@needs_kernels
def test_the_library_is_found_again_without_compiling(home, counted):
    names = [kernels.find_library()._name for _ in range(2)]
    assert names[0] == names[1] and counted() == 1
    assert Path(names[0]).parent == home / "cache" / "nanomusicgen"


@needs_kernels
def test_folders_that_cannot_keep_the_library_are_passed_over(home, counted, monkeypatch):
    """One that cannot be made, one that is a link, one from which nothing may run, another user's."""
    temporary = home / f"nanomusicgen-kernels-{os.geteuid()}"
    (home / "file").touch()
    (home / "others").mkdir()
    (home / "link").mkdir()
    (home / "link" / "nanomusicgen").symlink_to(home / "others")
    for cache in home / "file", home / "link":
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(Path, "home", raise_no_home)
        assert Path(kernels.find_library()._name).parent == temporary
    load = kernels.load

    def from_temporary_alone(path):
        if path.parent != temporary:
            raise OSError("failed to map segment from shared object")
        return load(path)
    monkeypatch.setattr(kernels, "load", from_temporary_alone)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert Path(kernels.find_library()._name).parent == temporary
    assert counted() == 2       # into the temporary folder, and into the one from which it did not run
    kernels.find_library()
    assert counted() == 2 and not list((home / "others").iterdir())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(kernels.Unavailable, match="not a folder of this user's alone"):
        kernels.find_library()


def raise_no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_folder_that_others_can_write_to_is_closed_to_them(home):
    folder = home / "cache" / "nanomusicgen"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    kernels.make_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_where_the_cache_is(home, monkeypatch):
    temporary = home / f"nanomusicgen-kernels-{os.geteuid()}"
    monkeypatch.setattr(Path, "home", lambda: home / "user")
    usual = home / "user" / ".cache" / "nanomusicgen"
    assert kernels.folders() == [home / "cache" / "nanomusicgen", usual, temporary]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kernels.folders() == [usual, temporary]
    monkeypatch.setattr(Path, "home", raise_no_home)
    assert kernels.folders() == [temporary]


def test_a_home_shared_between_processors(tmp_path):
    """Each has its own library: what tells them apart is in the name, and their clocks are not."""
    def told(text):
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        return kernels.processor(path)
    x86 = "processor\t: 0\nmodel name\t: A\ncpu MHz\t\t: {}\nflags\t\t: fpu {}\n\nprocessor\t: 1\n\n"
    arm = "processor\t: 0\nFeatures\t: fp {}\nCPU part\t: {}\n\n"
    assert told(x86.format(2000, "avx2")) == told(x86.format(3000, "avx2")) != told(x86.format(2000, "sse2"))
    texts = arm.format("asimd", "0xd0c"), arm.format("asimddp", "0xd0c"), arm.format("asimd", "0xd08")
    assert len({told(text) for text in texts}) == 3
    for unknown in told("processor\t: 0\n\n"), kernels.processor(tmp_path / "missing"):
        assert platform.node() in unknown


# --- the codec --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, dict(causal=True), dict(pad_mode="reflect"), dict(channels=2, lstm=0),
    dict(n_residual_layers=2, true_skip=False), dict(norm="time_group_norm")], ids=str)
@pytest.mark.parametrize("L", [1, 7, 40, 2345])
def test_a_folded_codec_is_the_same(options, L, monkeypatch):
    """The products with frames against torch's convolutions, the last length in pieces; saved as it was."""
    monkeypatch.setattr(encodec, "PIECE", 8)
    values = dict(task="codec", n_filters=8, dimension=16, card=32, ratios=(5, 4), kmeans_iters=0)
    codec, folded = (EncodecModel(Config(**values | options)).eval() for _ in "ab")
    folded.load_state_dict(codec.state_dict())
    optimize_codec(folded.fold())
    wav = torch.randn(2, codec.channels, L)
    codes = codec.encode(wav)
    with torch.no_grad():
        torch.testing.assert_close(folded.encoder(wav), codec.encoder(wav), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.decode(codes), codec.decode(codes), rtol=1e-4, atol=1e-4)
    saved = folded.state_dict()
    for name, module in codec.named_modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            assert torch.allclose(saved[f"{name}.weight"], module.weight), name
    assert not any("packed" in name for name in saved)


@pytest.mark.parametrize("most, bfloat16, tiles", [
    ("", True, True), ("ALL", True, True), ("avx512_core_amx", True, True), ("AVX512_CORE_BF16", True, False),
    ("AVX512_CORE", False, False), ("AVX2", False, False)])
def test_a_processor_that_is_tried_by_onednns_switch(monkeypatch, most, bfloat16, tiles):
    """Products that oneDNN may not use would be emulated, many times slower than those of float32."""
    monkeypatch.setattr(kernels, "capability", lambda name: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if most:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert (kernels.has_bfloat16(), kernels.has_tiles()) == (bfloat16, tiles)


def test_the_shipped_codec_in_bfloat16():
    """At least 35 dB above its error, and the same codes: the encoder stays in float32."""
    plain, half = (optimize_codec(EncodecModel.from_pretrained(SHIPPED).fold(), dtype)
                   for dtype in (torch.float32, torch.bfloat16))
    wav = read_audio(ROOT / "assets" / "ode_to_joy.wav", plain.sample_rate, 1, duration=2.0)[None]
    codes = plain.encode(wav)
    output = half.decode(codes)
    assert output.dtype == torch.float32
    if kernels.has_bfloat16():
        assert not torch.equal(output, plain.decode(codes))
    assert si_snr(plain.decode(codes), output).min() > 35
    assert torch.equal(half.encode(wav), codes)


# --- weights in fewer bits --------------------------------------------------------------------------------

def test_rows_of_an_int8_file_are_kept_and_written_again(tmp_path):
    lm = LMModel.from_pretrained(SHIPPED, torch.int8, optimize_for_cpu)
    stored = load_file(SHIPPED / "model.safetensors")
    stored = {current_name(name): tensor for name, tensor in stored.items()}
    assert torch.equal(lm.layers[0].attn.qkv.weight, stored["layers.0.attn.qkv.weight"])
    lm.save(tmp_path, compact=True)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype, name
        assert torch.allclose(again[name].float(), tensor.float(), rtol=1e-3), name


@pytest.mark.parametrize("dtype", [torch.int8, pytest.param(INT4, marks=needs_kernels)])
@pytest.mark.parametrize("file", ["ours", "compact", "transformers"])
def test_fewer_bits_are_made_of_every_format(tmp_path, file, dtype):
    """The same rows as rounding the loaded model would give; most are in int4, where that is asked for."""
    if file == "transformers":
        musicgen_of_transformers(tmp_path, "melody", width=64)
    else:
        make(dim=64, num_heads=2).save(tmp_path, compact=file == "compact")
    plain = LMModel.from_pretrained(tmp_path, torch.float32)
    lm = LMModel.from_pretrained(tmp_path, dtype, optimize_for_cpu)
    assert lm.layers[1].attn.qkv.weight.dtype == dtype and lm.lm_heads.weight.dtype == torch.int8
    for name, module in plain.named_modules():
        if isinstance(module, Projection):
            stored = lm.get_submodule(name)
            weight, scale = QUANTIZERS[stored.weight.dtype](module.weight)
            assert torch.equal(stored.weight, weight)
            torch.testing.assert_close(stored.scale, scale, rtol=1e-5, atol=0)
    assert torch.equal(lm.emb.weight, plain.emb.weight)


@pytest.fixture(scope="module")
def unseen_music():
    """Codes (B, K, T) and captions of test tunes, which training never saw, and their cross-entropy."""
    model = MusicGen.from_pretrained(SHIPPED, "cpu")
    plain = LMModel.from_pretrained(SHIPPED, torch.float32)
    codes, texts = quality.clips(model, 4, 100)
    return codes, texts, quality.measure(plain, codes, texts)[0]


@pytest.mark.parametrize("dtype, most", [
    ("float32", 0.005), ("bfloat16", 0.005), ("int8", 0.005),
    pytest.param("int4", 0.02, marks=needs_kernels)])      # 0.0103 on 24 clips, 0.0141 on these
def test_quality_of_the_shipped_model_in_fewer_bits(unseen_music, dtype, most):
    """How far from float32, weights and cache."""
    codes, texts, expected = unseen_music
    model = MusicGen.from_pretrained(SHIPPED, "cpu", dtype)
    stored = {"int4": torch.uint8}.get(dtype) or getattr(torch, dtype)
    assert model.lm.layers[1].ff1.weight.dtype == stored
    assert model.lm.packed == bool(kernels.kernels())
    assert abs(quality.measure(model.lm, codes, texts)[0] / expected - 1) < most


@needs_kernels
@pytest.mark.parametrize("columns", [64, 192, 1024])
def test_a_product_in_int4_is_that_of_what_its_bits_stand_for(columns):
    """Against double precision; few rows, and many, which are multiplied otherwise."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(20, columns, generator=generator)
    plain[3] = 0
    layer = PackedLinear(plain, INT4)
    assert layer.weight.nbytes == 20 * columns * 17 // 32
    pairs, groups = layer.weight[:, :columns // 2], layer.weight[:, columns // 2:].view(torch.int8)
    weight = torch.empty(20, columns, dtype=torch.double)
    for c in range(columns):
        pair = pairs[:, c // 64 * 32 + c % 32]
        bits = pair >> 4 if c % 64 >= 32 else pair & 15
        level = torch.tensor(INT4_LEVELS)[bits.int()]
        weight[:, c] = (groups[:, c // 32] * level).round() * layer.scale
    assert (weight - plain).norm() < 0.085 * plain.norm() and not weight[3].any()
    for rows in 1, 2, 3, 8, 40:
        x = torch.randn(rows, columns, generator=generator)
        expected, y = x.double() @ weight.T, layer(x)
        bound = 1e-4 if rows <= decoding.FEW else 1e-2      # many may be in bfloat16
        assert (y - expected).norm() < bound * expected.norm()
        assert torch.equal(layer.rows(x, 8, 16)[:1], layer.rows(x[:1], 8, 16)) or rows > decoding.FEW


def test_int4_is_refused_without_a_compiler_on_other_devices_and_in_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'int4' is for the CPU"):
        monkeypatch.setattr(loading, "pick_device", torch.device)
        load_models(SHIPPED, "cuda", "int4")
    if kernels.kernels():
        lm = LMModel.from_pretrained(SHIPPED, INT4, optimize_for_cpu)
        with pytest.raises(UserError, match="loaded in int4 is not written"):
            lm.save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        damaged = make(dim=64, num_heads=2)
        damaged.layers[1].ff1.weight.data[3, 5] = float("nan")
        damaged.save(tmp_path / "damaged")
        with pytest.raises(UserError, match="not finite"):
            LMModel.from_pretrained(tmp_path / "damaged", INT4, optimize_for_cpu)
    without_compiler(monkeypatch)
    with pytest.raises(UserError, match="'int4' needs speed/kernels.c, and a C compiler"):
        load_models(SHIPPED, "cpu", "int4")


# --- training ---------------------------------------------------------------------------------------------

def plain_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("S", [1, 128, 300])
def test_attention_in_blocks_is_causal_attention(S):
    """Its output and gradients are as near to those in float64 as those of torch's attention in bfloat16."""
    q, k, v, grad = torch.randn(4, 2, 3, S, 16).bfloat16()

    def run(attend, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad.to(dtype))
    ours = run(speed.training.BlockAttention.apply, torch.bfloat16)
    torchs = run(plain_attention, torch.bfloat16)
    exact = run(plain_attention, torch.float64)
    for a, b, c in zip(ours, torchs, exact):
        assert a.dtype == torch.bfloat16
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-3 * c.norm() + 1e-6


def test_layers_for_training_have_the_gradients_of_plain_ones():
    """In float32 nearly the same; in bfloat16 as near to them as the plain way in bfloat16 comes."""
    codes = torch.randint(20, (2, 4, 40))
    conditions = {"text": ["a flute", None], "melody": [torch.rand(make().config.chroma_frames, 12), None]}

    def gradients(dtype, optimize):
        lm = make(dim=64, num_heads=2, dtype=dtype).train()
        if optimize:
            optimize_training(lm, [], lm.config)
        assert isinstance(lm.layers[0], speed.training.FasterLayer) == optimize
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, _ = lm.loss(codes, conditions)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in [lm.lm_heads.weight, *lm.layers.parameters()]])
    plain, fast = gradients("float32", False), gradients("float32", True)
    assert (fast - plain).norm() < 1e-5 * plain.norm()
    plain_half, fast_half = gradients("bfloat16", False), gradients("bfloat16", True)
    error, plain_error = (fast_half - plain).norm(), (plain_half - plain).norm()
    assert 0 < error < 1.3 * plain_error < 0.1 * plain.norm()


@needs_kernels
def test_a_step_of_d_adaptation_in_one_pass_is_that_of_its_formulas():
    """Weights of several sizes, one of them more than a block of kernels.c; gradients of zero at first."""
    def run(fused):
        generator = torch.Generator().manual_seed(0)
        shapes = (3,), (40, 500), (7, 5)
        weights = nn.ParameterList(torch.randn(*shape, generator=generator) for shape in shapes)
        optimizer = DAdaptAdam(weights, betas=(0.9, 0.95), weight_decay=0.1)
        if fused:
            optimize_training(weights, [optimizer], Config())
        assert isinstance(optimizer, speed.training.FusedLoops) == fused
        for update in range(12):
            for p in weights:
                p.grad = torch.randn(p.shape, generator=generator) * (update > 0)
            optimizer.step()
        return optimizer.param_groups[0]["d"], *weights
    for x, y in zip(run(fused=True), run(fused=False)):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
