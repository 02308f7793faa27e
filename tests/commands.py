"""Commands, run as a shell would run them: with their own directory, stdout and stderr, and limits.

Stdout and stderr are file descriptors, so that what C libraries print is caught too. A command runs in this
process (`command`), which is quick, or in a forked copy of it (`forked`), with limits on its time and memory.
"""
import contextlib
import faulthandler
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import scipy.ndimage  # noqa: F401  these, or every child would import them again
import scipy.signal  # noqa: F401
import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, T5EncoderModel  # noqa: F401

import encodec
import train
from constants import FOLDERS, ROOT
from data import prepare
from encodec import EncodecModel
from lm import LMModel
from sample import MusicGen
from sampling import command as sampling_command
from system.command import run
from training import command as training_command

try:
    import fcntl
    import resource
except ImportError:     # Windows, where no memory is limited and no command is forked
    fcntl = resource = None

torch.set_num_threads(1)  # a forked child has no pool of threads
transformers.logging.set_verbosity_error()
tqdm.set_lock(threading.RLock())  # its own is shared with forked children: one killed with it would stop us


def sample_main(argv):
    """sample.py as a command."""
    return sampling_command.main(MusicGen, argv)


def train_main(argv):
    """train.py as a command."""
    return training_command.main(train.train, argv)


def encodec_demo(argv):
    """encodec.py as a command."""
    return encodec.demo(*argv)


for main in (sample_main, train_main, encodec_demo):
    main.__module__ = main.__name__.split("_")[0]   # the name that messages begin with


def load_model(argv):
    """Loads a language model, alone and with its codec."""
    LMModel.from_pretrained(argv[0])
    MusicGen.from_pretrained(argv[0], "cpu")


def load_codec(argv):
    EncodecModel.from_pretrained(argv[0])


# --- running ----------------------------------------------------------------------------------------------

class Result(NamedTuple):
    code: int           # exit code, or minus the signal that ended it
    out: str
    err: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """What was said on stderr, progress bars, notes of the mp3 library and what is held out aside."""
        lines = [line.strip() for line in re.split(r"[\r\n]", self.err)]
        progress = re.compile(r"^Note: |^held out for |\d/\d+ \[|it/s|frame/s|file/s")
        return [line for line in lines if line and not progress.search(line)]


def call(main, argv) -> int:
    """Runs a command as the shell would -> its exit code; a traceback on stderr and 70 if it crashes."""
    sys.argv = [f"{main.__module__}.py", *map(str, argv)]
    try:
        code = run(main, [str(arg) for arg in argv])
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
    """Inside, no more than so many seconds of processor time and bytes of memory are to be had.

    By the clock ten times as long: a busy machine is slow, but what waits for ever must end. Only Linux can
    limit both; elsewhere the handlers of signals are put back, no more.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with linux_limits(seconds, memory) if sys.platform == "linux" else contextlib.nullcontext():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def linux_limits(seconds: int, memory: int):
    def stop(number, frame):
        raise TimeoutError(f"took longer than {seconds} s")
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    # of what can be written to: addresses alone are reserved by the gigabyte, for threads above all
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (now + memory, hard))
    signal.alarm(10 * seconds)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(main, *argv, cwd=None, seconds=120, memory=2 ** 30) -> Result:
    """Runs main(argv) in this process: quick, for commands that leave nothing behind."""
    sys.stdout.flush(), sys.stderr.flush()
    kept, streams = [os.dup(n) for n in range(3)], (sys.stdin, sys.stdout, sys.stderr)
    place, begun = os.getcwd(), time.monotonic()
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
    """Forks a child that runs main(argv) -> its pid. memory: bytes it may take beyond what we have."""
    if not hasattr(os, "fork"):
        pytest.skip("the command runs in a fork of this process: Windows has none")
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
    """Runs main(argv) in a child to its end: for commands that start threads, or might take all down."""
    with pipe() as (out, to_out), pipe() as (err, to_err):  # no files: their size may be limited
        begun = time.monotonic()
        pid = start(main, *argv, out=to_out, err=to_err, **options)
        code = exit_code(pid)
        to_out.close(), to_err.close()
        texts = [file.read().decode("utf-8", "backslashreplace") for file in (out, err)]
        return Result(code, *texts, time.monotonic() - begun)


def exit_code(pid: int) -> int:
    """Waits for the end of a process -> its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until_written(path: Path, pid: int):
    """Waits until a process has written something into a file. Raises AssertionError if it ends before."""
    while not (path.exists() and path.stat().st_size):
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, f"{path}: not written"
        time.sleep(0.002)


def killed_at(moment: int, folder):
    """For `before`: SIGKILL as a process touches (opens, renames, removes) files in a folder for that time.

    What is on the disk changes at these moments alone, so that all of them are all that a kill can leave.
    """
    def before():
        touched = 0

        def touch(event, arguments):
            nonlocal touched
            if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(f"{folder}/"):
                touched += 1
                if touched == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(touch)
    return before


def is_ours(path: str) -> bool:
    """Whether a file or folder is the project's, which may also hold a virtual environment, data and runs."""
    if not Path(path).is_relative_to(ROOT):
        return False
    parts = Path(path).relative_to(ROOT).parts
    return len(parts) <= 1 or parts[0] in (*FOLDERS, "tests")


def copy_files(paths, folder: Path):
    """Copies files of the project to the same places in a folder, where they can be written to."""
    for path in paths:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def afresh(argv):
    """Runs a file in the current folder as `python path` does, but for packages, which are loaded already."""
    for name, module in list(sys.modules.items()):
        if is_ours(getattr(module, "__file__", None) or ""):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not is_ours(os.path.realpath(entry))]
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def two_of(main, *argv, err) -> list[int]:
    """Two processes of one run, as torchrun would start them, with their files for stderr -> their pids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    def environment(rank):
        return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port))
    return [start(main, *argv, memory=2 ** 32, err=err[rank],
                  before=lambda: os.environ.update(environment(rank))) for rank in (0, 1)]


@contextlib.contextmanager
def pipe():
    """Both ends of a pipe that holds a megabyte."""
    read, write = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):      # Linux
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 2 ** 20)
    with open(read, "rb") as read, open(write, "wb") as write:
        yield read, write


def text_of(file) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "backslashreplace")


def refused(result: Result, *says: str):
    """Exit code 2, and the last and only sentence names what it should."""
    assert result.code == 2 and "Traceback" not in result.err, result
    assert len(result.sentences) == 1, result.err
    assert len(result.sentences[0]) < 5000, result.err      # a bar is as long as the machine is slow
    for part in says:
        assert part in result.err, (part, result.err)


def worked(result: Result):
    assert result.code == 0 and "Traceback" not in result.err, result


def either(result: Result, *says: str):
    """Worked, or was refused: for damage that need not show."""
    worked(result) if result.code == 0 else refused(result, *says)


def snapshot(folder) -> dict:
    """{path: what tells that it has changed} of all that is in a folder."""
    def look(path):
        stat = os.lstat(path)
        return stat.st_mode, stat.st_mtime_ns, stat.st_size, stat.st_ino
    return {path: look(path) for path in Path(folder).rglob("*")}


def sampling(world, *argv, checkpoint="lm", **options) -> Result:
    """sample.py on the tiny model, 0.05 s unless argv says otherwise or makes no music."""
    argv = [str(arg) for arg in argv]
    others = {"--duration", "--bars", "--export", "--export_hf"}
    argv = ([] if others & set(argv) else ["--duration", "0.05"]) + argv
    argv = ([] if "--checkpoint" in argv else ["--checkpoint", str(world / checkpoint)]) + argv
    return command(sample_main, "--device", "cpu", *argv, **options)


def preparing(world, folder, out, *argv, run=command, **options) -> Result:
    """data/prepare.py with the tiny codec."""
    argv = ["--codec", world / "codec", "--radix2_exp", "8", "--stem", "none", "--device", "cpu", *argv]
    return run(prepare.main, folder, "--out", out, *argv, **options)
