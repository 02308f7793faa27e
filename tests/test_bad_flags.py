"""Bad flags and configuration files: one sentence names the flag, key or line, and nothing is written.

    python -m pytest tests/test_bad_flags.py
"""
import os
import runpy
import shutil
import subprocess
import sys

import pytest

import chroma
import patterns
from commands import Result, command, encodec_demo, forked, refused, sampling, snapshot, train_main, worked
from constants import ROOT, TRAIN, flags
from damage import WAV
from data import prepare

pytestmark = pytest.mark.usefixtures("untouched_world")


def short(flag: str) -> str:
    """The name of a case."""
    return flag[:40].replace("\0", "\\0")


# --- configuration files ----------------------------------------------------------------------------------

FILES = {  # c.py: its content, and what the sentence names beside it
    "binary": (os.urandom(300) + b"\0", ""),
    "latin-1": ("# flûte\ndim = 16".encode("latin-1"), ""),
    "unfinished": (b"dim = (", ""),
    "indented": (b" dim = 16", ""),
    "nested": (b"dim = " + b"(" * 5000, ""),
    "nested minus": (b"dim = " + b"-" * 100_000 + b"1", ""),
    "long number": (b"dim = " + b"9" * 5000, ""),
    "html": (b"<html>404</html>", ""),
    "import": (b"import os", "line 1"),
    "expression": (b"open('ran', 'w')", "line 1"),
    "two names": (b"dim = num_heads = 2", "line 1"),
    "tuple of names": (b"dim, num_heads = 16, 2", "line 1"),
    "augmented": (b"dim += 1", "line 1"),
    "annotated": (b"dim: int = 16", "line 1"),
    "loop": (b"while True: pass", "line 1"),
    "function": (b"def dim(): pass", "line 1"),
    "attribute": (b"config.dim = 16", "line 1"),
    "delete": (b"del dim", "line 1"),
    "json": (b'{"dim": 16}', "line 1"),
    "yaml": (b"dim: 16\nnum_heads: 2", "line 1"),
    "call": (b"dim = print('ran')", "value of dim"),
    "code": (b"dim = __import__('os').system('touch ran')", "value of dim"),
    "name": (b"dim = num_heads", "value of dim"),
    "f-string": (b"out_dir = f'{1}'", "value of out_dir"),
    "power": (b"dim = 10 ** 10 ** 10", "value of dim"),
    "string times": (b"out_dir = 'x' * 10 ** 12", "value of out_dir"),
    "unknown": (b"dimm = 16", "'dimm'; did you mean 'dim'"),
    "dunder": (b"__class__ = 1", "'__class__'"),
    "method": (b"stride = 3", "'stride'"),
    "set": (b"ratios = {5, 4}", "ratios = {4, 5}"),
    "dict": (b"ratios = {5: 4}", "ratios = {5: 4}"),
    "text": (b"dim = '16'", "dim = '16'"),
    "float": (b"dim = 16.0", "dim = 16.0"),
    "bool": (b"dim = True", "dim = True"),
    "none": (b"dim = None", "dim = None"),
    "complex": (b"lr = 1j", "lr = 1j"),
    "bytes": (b"out_dir = b'x'", "out_dir = b'x'"),
    "float overflow": (b"lr = 1e999", "lr = inf"),
}


@pytest.mark.parametrize("name", FILES)
def test_configuration_files(tmp_path, name):
    content, named = FILES[name]
    (tmp_path / "c.py").write_bytes(content)
    refused(command(train_main, "c.py", cwd=tmp_path), "c.py", named)
    assert [path.name for path in tmp_path.iterdir()] == ["c.py"]


# --- train.py ---------------------------------------------------------------------------------------------

VALUES = [  # the sentence names the key of (the last of) them as `key = value`
    "--dim=",
    "--dim=x",
    "--dim=16.0",
    "--dim=1e3",
    "--dim==16",
    "--dim=-16",
    "--dim=0",
    "--dim=True",
    "--dim=None",
    "--dim=[16]",
    "--dim=16,",
    "--dim=0x",
    "--dim=__import__('os')",
    "--dim=10**9",
    "--num_heads=3",
    "--num_layers=0",
    "--lr=nan",
    "--lr=inf",
    "--lr=-1",
    "--lr=1e309",
    "--lr='1'",
    "--dropout=2",
    "--dropout=-0.1",
    "--ratios=8",
    "--ratios=()",
    "--ratios=(0,)",
    "--ratios=(2.5,)",
    "--ratios=('a',)",
    "--ratios=(5,4",
    "--delays=(0,)",
    "--delays=(0,1,2,-3)",
    "--delays=()",
    "--melody=1",
    "--task=both",
    "--optim=sgd",
    "--dtype=int8",
    "--sharding=zero",
    "--device=",
    "--channels=3",
    "--channels=0",
    "--card=0",
    "--betas=(0.9,)",
    "--betas=(1.0,1.0)",
    "--betas=0.9",
    "--mel_range=(6,6)",
    "--mel_range=(6,99)",
    "--radix2_exp=60",
    "--radix2_exp=0",
    "--batch_size=3 --grad_accum=2",
    "--batch_size=0",
    "--causal=maybe",
    "--causal=2",
    "--compress=0",
    "--segment_duration=0",
    "--segment_duration=-1",
    "--temperature=-1",
    "--top_k=-1",
    "--top_p=1.5",
    "--cfg_coef=nan",
    "--stem=vocals",
    "--n_q=0",
    "--seed=-1",
    "--seed=1.5",
    "--epochs=0",
    "--out_dir=",
    "--data_dir=",
]
SIZES = [  # that would take all memory, or for ever
    "--dim=1000000000",
    "--dim=" + "9" * 5000,
    "--num_heads=1000000000",
    "--num_layers=1000000000",
    "--hidden_scale=1000000000",
    "--t5_dim=1000000000",
    "--t5_layers=1000000000",
    "--t5_heads=1000000000",
    "--n_q=1000000000",
    "--delays=(0,1,2,1000000000)",
    "--n_chroma=1000000000",
    "--chroma_length=1000000000",
    "--segment_duration=1e12",
    "--sample_rate=1000000000",
    "--n_filters=1000000000",
    "--dimension=1000000000",
    "--lstm=1000000000",
    "--n_residual_layers=1000000000",
    "--kernel_size=1000000000",
    "--residual_kernel_size=1000000000",
    "--last_kernel_size=1000000000",
    "--dilation_base=1000000000",
    "--ratios=(" + "2," * 1000 + ")",
    "--ratios=(1000000000,)",
    "--n_mels=1000000000",
    "--disc_filters=1000000000",
    "--disc_windows=(1000000000,)",
    "--disc_windows=(0,)",
    "--batch_size=1000000000",
    "--epochs=" + "9" * 30,
    "--seed=" + "9" * 30,
    "--lora_rank=1000000000",
]
OTHERS = {  # and what the sentence names
    "--dimm=16": "'dim'",
    "--=3": "''",
    "--": "''",
    "---dim=16": "'-dim'",
    "--dim": "--dim=VALUE",
    "--dim=17": "num_heads = 2",
    "--n_q=5": "delays = (0, 1, 2, 3)",
    "--card=65536": "65535",
    "--card=100000": "65535",
    "--pattern=diagonal": "delay, parallel",
    "--text=maybe": "prepend",
    "--device=tpu": "device = 'tpu'",
    "--device=cuda:99": "device = 'cuda:99'",
    "--split=all": "train, valid, test",
    "--resume=yes": "'resume'",
    "--help": "'help'",
    "-h": "-h",
    "config.json": "config.json",
    "absent.py": "absent.py",
    "absent\0.py": "absent",
    ".": ".",
    "/dev/null /dev/null": "--key=value",
    "--out_dir=" + "x" * 300: "File name too long",
}


@pytest.mark.parametrize("option", [*VALUES, *SIZES, *OTHERS], ids=short)
def test_flags_of_training(world, tmp_path, option):
    base = flags(TRAIN, data_dir=world / "tokens", codec=world / "codec", out_dir="out")
    result = command(train_main, *base, *option.split(" "), cwd=tmp_path, seconds=20)
    key = option.split(" ")[-1].removeprefix("--").split("=")[0]
    refused(result, OTHERS.get(option, f"{key} = "))
    assert not list(tmp_path.iterdir())


# --- sample.py --------------------------------------------------------------------------------------------

SAMPLING = {  # flags, and what the sentence names
    "--tempo 3": "--tempo",
    "--text": "--text",
    "--dur 1": "--dur",
    "--duration": "--duration",
    "--duration 0": "--duration",
    "--duration -1": "--duration",
    "--duration nan": "--duration",
    "--duration inf": "--duration",
    "--duration 1e9": "--duration",
    "--duration many": "--duration",
    "--seed x": "--seed",
    "--seed -1": "--seed",
    "--seed 1.5": "--seed",
    "--seed " + "9" * 30: "--seed",
    "--guidance x": "--guidance",
    "--guidance nan": "guidance",
    "--guidance inf": "guidance",
    "--guidance 1e30": "guidance",
    "--temperature -1": "temperature",
    "--temperature nan": "temperature",
    "--temperature x": "--temperature",
    "--top_k -1": "top_k",
    "--top_k 1.5": "--top_k",
    "--top_p 2": "top_p",
    "--top_p nan": "top_p",
    "--top_p -0.1": "top_p",
    "--stem vocals": "--stem",
    "--dtype int3": "--dtype",
    "--device tpu": "tpu",
    "--device cuda:7": "cuda:7",
    "--melody absent.wav": "absent.wav",
    "--melody .": ".",
    "--prompt absent.wav": "absent.wav",
    "--prompt there.wav --continue_from take.npz": "--prompt",
    "--continue_from absent.npz": "absent.npz",
    "--continue_from .": "--continue_from",
    "--out x.txt": ".flac",
    "--out x": ".flac",
    "--out .": ".flac",
    "--out there.wav": "there.wav",
    "--out here.wav": "here.json",
    "--out codes.wav --save_codes": "codes.npz",
    "--out dangling.wav": "dangling.wav",
    "--out there.wav/x.wav": "there.wav",
    "--out folder.wav": "folder.wav",
    "--out /dev/null/x.wav": "/dev/null",
    "--out " + "x" * 300 + ".wav": "File name too long",
    "--out /proc/x.wav": "/proc",
    "--checkpoint absent": "absent",
    "--checkpoint .": ".",
    "--checkpoint there.wav": "there.wav",
    "--checkpoint /dev/null": "/dev/null",
    "--checkpoint a/b/c": "a/b/c",
    "--checkpoint ../..": "..",
    "--checkpoint nobody/nothing": "nobody/nothing",
    "--checkpoint http://x/y": "http",
    "--checkpoint " + "x" * 300: "x" * 100,
    "--text a --text b --melody x --melody y --melody z": "--melody",
    "--export_hf there.wav": "there.wav",
    "--export there.wav": "there.wav",
    "--export new --text a": "--export and --text",
    "--export_hf new --serve": "--export_hf and --serve",
    "stray": "stray",
}


@pytest.mark.parametrize("flag", SAMPLING, ids=short)
def test_flags_of_sampling(world, tmp_path, flag):
    (tmp_path / "there.wav").write_bytes(WAV)
    (tmp_path / "here.json").write_bytes(b"a sidecar")
    (tmp_path / "codes.npz").write_bytes(b"codes")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "dangling.wav").symlink_to("gone.wav")
    before = snapshot(tmp_path)
    refused(sampling(world, *flag.split(" "), cwd=tmp_path), SAMPLING[flag])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("flag", ["--melody 0.wav", "--stem demucs --melody 0.wav"])
def test_flags_of_sampling_with_a_text_model(world, tmp_path, flag):
    """What is missing is the melody model, not the package of the stem."""
    shutil.copy(world / "audio" / "0.wav", tmp_path)
    result = sampling(world, *flag.split(), checkpoint="text", cwd=tmp_path)
    refused(result, str(world / "text"), "--melody")
    assert "x.wav" not in result.err


# --- data/prepare.py --------------------------------------------------------------------------------------

PREPARING = {  # flags, and what the sentence names
    "": "folder",
    "music": "--out",
    "music --out": "--out",
    "absent --out o": "absent",
    "file --out o": "file",
    "empty --out o": "empty",
    "music --out file": "file",
    "music --out file/o": "file",
    "music --out /proc/o": "/proc",
    "music --out o --codec absent": "absent",
    "music --out o --codec empty": "empty",
    "music --out o --codec nobody/nothing": "nobody/nothing",
    "music --out o --config absent.py": "absent.py",
    "music --out o --config file": "file",
    "music --out o --stem both": "stem",
    "music --out o --device tpu": "tpu",
    "music --out o --n_chroma x": "--n_chroma",
    "music --out o --n_chroma 0": "n_chroma",
    "music --out o --n_chroma 1000000000": "n_chroma",
    "music --out o --radix2_exp 99": "radix2_exp",
    "music --out o --radix2_exp -1": "radix2_exp",
    "music --out o --sample_rate 44100": "sample_rate",
    "music --out o --sample_rate 0": "sample_rate",
    "music --out o --tempo 3": "--tempo",
    "music more --out o": "more",
    "music --out others": "others",
    "music --out " + "x" * 300: "File name too long",
    "music --out damaged": "damaged",
    "music --out foreign": "foreign",
}


@pytest.mark.parametrize("flag", PREPARING, ids=short)
def test_flags_of_preparing(world, tmp_path, flag):
    for name in ("music", "empty", "others", "damaged", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "music" / "a.wav").write_bytes(WAV)
    (tmp_path / "file").write_bytes(b"x = 3")
    (tmp_path / "others" / "settings.json").write_bytes(b'{"colour": "blue"}')
    (tmp_path / "damaged" / "settings.json").write_bytes(b"{")
    for name in ("index.json", "codes.00000.u16", "chroma.00000.u8"):  # as they are handed on, without logs
        shutil.copy(world / "tokens" / name, tmp_path / "foreign" / name)
    before = snapshot(tmp_path)
    argv = flag.split(" ") if flag else []
    if "--codec" not in argv:
        argv += ["--codec", world / "codec"]
    refused(command(prepare.main, *argv, cwd=tmp_path), PREPARING[flag])
    after = snapshot(tmp_path)
    assert all(after[path] == look for path, look in before.items() if path.is_file())


# --- the demos, and streams -------------------------------------------------------------------------------

DEMOS = [  # of which stage, its arguments, what the sentence names
    (patterns.main, ["0"], "0"),
    (patterns.main, ["-1"], "-1"),
    (patterns.main, ["x"], "x"),
    (patterns.main, ["1" * 30], "1 to 20"),
    (patterns.main, ["3", "4"], "3 4"),
    (patterns.main, ["²"], "²"),
    (chroma.main, ["a", "b"], "a b"),
    (chroma.main, ["absent.wav"], "absent.wav"),
    (chroma.main, ["."], "."),
    (encodec_demo, ["absent.wav"], "absent.wav"),
    (encodec_demo, [""], "audio"),
]


@pytest.mark.parametrize("main, argv, named", DEMOS)
def test_flags_of_the_demos(main, argv, named):
    refused(command(main, *argv), named)


@pytest.mark.parametrize("name", ["patterns", "rvq", "conditioners", "lm", "config", "encodec"])
def test_demos_run_from_anywhere(tmp_path, name):
    demo = str(ROOT / f"{name}.py")
    result = forked(lambda argv: runpy.run_path(demo, run_name="__main__"), cwd=tmp_path)
    worked(result)
    assert result.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("out, code", [("closed", 1), ("full", 2)])
def test_nobody_listens_to_what_is_said(out, code):
    """`| head` has gone, or stdout is on a full disk."""
    if out == "full" and not os.path.exists("/dev/full"):
        pytest.skip("Linux alone has /dev/full")
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, ROOT / "config.py", ROOT / "config" / "melody.py"]
    with os.fdopen(write, "w") if out == "closed" else open("/dev/full", "w") as stream:
        result = subprocess.run(argv, stdout=stream, stderr=subprocess.PIPE, text=True, timeout=100,
                                env={**os.environ, "PYTHONUNBUFFERED": ""})     # as most have it
    assert result.returncode == code and "Traceback" not in result.stderr, result
    assert ("No space" in result.stderr) == (out == "full"), result


def test_the_commands_themselves(world, tmp_path):
    """In processes of their own: the file of the same seed, and a mistake that is refused above."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "bad.wav").write_bytes(b"not music")
    argv = ["--text", "a", "--checkpoint", world / "lm", "--duration", "0.1", "--device", "cpu"]

    def begin(*more):
        return subprocess.Popen([sys.executable, ROOT / "sample.py", *argv, *more], cwd=tmp_path, env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(process) -> Result:
        out, err = process.communicate(timeout=600)
        return Result(process.returncode, out, err, 0.0)
    good, bad = begin("--out", "1.wav"), begin("--melody", "bad.wav")
    worked(sampling(world, *argv, "--out", "2.wav", cwd=tmp_path))
    worked(end(good)), refused(end(bad), "bad.wav")
    assert (tmp_path / "1.wav").read_bytes() == (tmp_path / "2.wav").read_bytes()
