"""What the tests of bad input and of faults share: a tiny world of models and music, and commands run in a child.

A command runs as a shell would run it: its own directory, its own stdout and stderr (file descriptors, so that C
libraries are heard too), a limit on its time and on the memory it may take; in this process (`command`), which is
quick, or in a forked copy of it (`forked`).
"""
import contextlib
import faulthandler
import fcntl
import os
import re
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy.ndimage  # noqa: F401  these, or every child would import them again
import scipy.signal  # noqa: F401
import soundfile
import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, T5EncoderModel  # noqa: F401

import config as C
import lm as L
import prepare
import sample as S
from checkpoints import formats
from config import Config
from encodec import EncodecModel

torch.set_num_threads(1)  # a forked child has no pool of threads
transformers.logging.set_verbosity_error()
ROOT = Path(__file__).parent.parent
RATE = 8000
tqdm.set_lock(threading.RLock())  # its own is shared with forked children: one that is killed while holding it would stop us
CODEC = dict(sample_rate=RATE, ratios=(5, 4), n_filters=2, dimension=8, lstm=1, n_q=4, card=32)
LM = dict(CODEC, task="lm", dim=16, num_heads=2, num_layers=1, t5="bytes", t5_dim=8, t5_heads=2, t5_layers=1, radix2_exp=8,
          segment_duration=0.25, extend_stride=0.15, stem="none", device="cpu")
TRAIN = dict(LM, batch_size=2, epochs=1, updates_per_epoch=2, warmup=1, ema_every=1, valid_every=0, save_every=1, log_every=1,
             sample_every=0)
TRAIN_CODEC = dict(CODEC, task="codec", device="cpu", batch_size=2, epochs=1, updates_per_epoch=2, optim="adamw", lr=1e-3,
                   warmup=0, ema_every=1, adv=0.0, feat=0.0, mel_range=(4, 6), n_mels=4, kmeans_iters=2, valid_every=0,
                   save_every=1, log_every=1, sample_every=0, segment_duration=0.1)


# --- commands ------------------------------------------------------------------------------------------------------

class Result(NamedTuple):
    code: int           # exit code, or minus the signal that ended it
    out: str
    err: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """What was said on stderr, progress bars and notes of the mp3 library aside."""
        lines = [line.strip() for line in re.split(r"[\r\n]", self.err)]
        return [line for line in lines if line and not line.startswith("Note: ") and not re.search(r"\d/\d+ \[|it/s|frame/s|file/s", line)]


def call(main, argv) -> int:
    """Runs a command as the shell would -> its exit code; a traceback on stderr and 70 if it crashes."""
    sys.argv = [f"{main.__module__}.py", *map(str, argv)]
    try:
        code = C.run(main, [str(arg) for arg in argv])
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70


def own_streams():
    """What Python makes of the file descriptors 0, 1 and 2."""
    return (open(0, closefd=False), open(1, "w", encoding="utf-8", closefd=False),
            open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False))


@contextlib.contextmanager
def limits(seconds: int, memory: int):
    """Inside, no more time and no more memory than this are to be had."""
    def stop(number, frame):
        raise TimeoutError(f"took longer than {seconds} s")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(main, *argv, cwd=None, seconds=120, memory=2 ** 30) -> Result:
    """Runs main(argv) in this process: quick, for commands that leave nothing behind."""
    sys.stdout.flush(), sys.stderr.flush()
    kept, streams, place, begun = [os.dup(n) for n in range(3)], (sys.stdin, sys.stdout, sys.stderr), os.getcwd(), time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as null:
        try:
            for number, file in enumerate((null, out, err)):
                os.dup2(file.fileno(), number)
            sys.stdin, sys.stdout, sys.stderr = own_streams()
            if cwd is not None:
                os.chdir(cwd)
            with limits(seconds, memory):
                code = call(main, argv)
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            sys.stdin, sys.stdout, sys.stderr = streams
            for number, fd in enumerate(kept):
                os.dup2(fd, number)
                os.close(fd)
            os.chdir(place)
        return Result(code, *map(text_of, (out, err)), time.monotonic() - begun)


def start(main, *argv, cwd=None, seconds=120, memory=2 ** 30, before=None, out=None, err=None) -> int:
    """Forks a child that runs main(argv) -> its pid. memory: bytes it may take beyond what this process has."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        tqdm.set_lock(threading.RLock())    # nor what another thread held as we forked
        faulthandler.disable()
        null = os.open(os.devnull, os.O_RDWR)
        for number, file in ((0, None), (1, out), (2, err)):
            os.dup2(null if file is None else file.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = own_streams()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if cwd is not None:
            os.chdir(cwd)
        if before:
            before()
        with limits(seconds, memory):
            code = call(main, argv)
            sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def forked(main, *argv, **options) -> Result:
    """Runs main(argv) in a child to its end: for commands that start threads, or might take all down with them."""
    with pipe() as (out, to_out), pipe() as (err, to_err):  # no files: their size may be limited
        begun = time.monotonic()
        pid = start(main, *argv, out=to_out, err=to_err, **options)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        to_out.close(), to_err.close()
        texts = [file.read().decode("utf-8", "backslashreplace") for file in (out, err)]
        return Result(code, *texts, time.monotonic() - begun)


def two_of(main, *argv, err) -> list[int]:
    """Two processes of one run, as torchrun would start them, with their files for stderr -> their pids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [start(main, *argv, memory=2 ** 32, err=err[rank], before=lambda: os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))) for rank in (0, 1)]


@contextlib.contextmanager
def pipe():
    """Both ends of a pipe that holds a megabyte."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 2 ** 20)
    with open(read, "rb") as read, open(write, "wb") as write:
        yield read, write


def text_of(file) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "backslashreplace")


def refused(result: Result, *says: str):
    """Exit code 2, and the last and only sentence names what it should."""
    assert result.code == 2 and "Traceback" not in result.err, result
    assert len(result.sentences) == 1 and len(result.err) < 5000, result.err
    for part in says:
        assert part in result.err, (part, result.err)


def worked(result: Result):
    assert result.code == 0 and "Traceback" not in result.err, result


def either(result: Result, *says: str):
    """Worked, or was refused: for damage that need not show."""
    worked(result) if result.code == 0 else refused(result, *says)


def flags(values: dict, **changes) -> list[str]:
    """A dict as --key=value."""
    return [f"--{key}={value}" for key, value in {**values, **changes}.items()]


def snapshot(folder) -> dict:
    """{path: what tells that it has changed} of all that is in a folder."""
    def look(path):
        stat = os.lstat(path)
        return stat.st_mode, stat.st_mtime_ns, stat.st_size, stat.st_ino
    return {path: look(path) for path in Path(folder).rglob("*")}


# --- the world ------------------------------------------------------------------------------------------------------

def tone(seconds=0.5, rate=RATE, channels=1, frequency=440.0, seed=0):
    """Samples (L, C) of a tone with a little noise."""
    t = np.arange(max(1, round(seconds * rate))) / rate
    wave = 0.4 * np.sin(2 * np.pi * frequency * t)[:, None]
    return (wave + 0.01 * np.random.default_rng(seed).standard_normal((len(t), channels))).astype(np.float32)


def make_world(root: Path) -> Path:
    """Models, recordings and prepared data in root: codec, lm, text, hf, original, audio, tokens, take.npz."""
    torch.manual_seed(0)
    codec = EncodecModel(Config(task="codec", kmeans_init=False, **CODEC)).eval()
    for book in codec.quantizer.codebooks:
        book.embed.normal_()
    codec.save(root / "codec")
    codec.to_hf(root / "hf_codec")
    lm = L.LMModel(Config(**LM)).eval()
    S.MusicGen(lm, codec).save(root / "lm")
    S.MusicGen(L.LMModel(Config(**{**LM, "melody": "none", "text": "cross"})), codec).save(root / "text")
    formats.export_transformers(lm, codec, root / "hf")
    (root / "audio").mkdir()
    for n in range(4):
        soundfile.write(root / "audio" / f"{n}.wav", tone(0.6, frequency=220.0 * (n + 1), seed=n), RATE)
    assert prepare.main([str(root / "audio"), "--out", str(root / "tokens"), "--codec", str(root / "codec"), "--radix2_exp", "8",
                         "--stem", "none", "--device", "cpu"]) == 0
    S.write_codes(root / "take.npz", torch.randint(32, (4, 40)))
    return root


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def sampling(world, *argv, checkpoint="lm", **options) -> Result:
    """sample.py on the tiny model, 0.05 s unless argv says otherwise."""
    argv = [str(arg) for arg in argv]
    argv = ([] if "--duration" in argv else ["--duration", "0.05"]) + argv
    argv = ([] if "--checkpoint" in argv else ["--checkpoint", str(world / checkpoint)]) + argv
    return command(S.main, "--device", "cpu", *argv, **options)


def preparing(world, folder, out, *argv, run=command, **options) -> Result:
    """data/prepare.py with the tiny codec."""
    return run(prepare.main, folder, "--out", out, "--codec", world / "codec", "--radix2_exp", "8", "--stem", "none",
                   "--device", "cpu", *argv, **options)
