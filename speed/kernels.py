"""kernels.c: compiled for this processor when it is first needed, and called through ctypes.

    library = kernels()     # None where it cannot be had; then a sentence on stderr says why

The compiled library is kept in a folder of the user's (`folders`) under a name that says of which source, for
which processor and by which compilers it was made, and ends in the hash of its own bytes: a file that is
damaged, or another one of that name, is never loaded.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from checkpoints.files import INT4, int4_table

KINDS = {torch.int8: 0, torch.bfloat16: 1, torch.float32: 2, INT4: 3}   # what kernels.c calls them
COMPILERS = "cc", "gcc", "clang"
FLAGS = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fPIC -shared".split()
MAX_SECONDS = 60        # of one call of a compiler, which takes one or two
ARM = platform.machine() in ("arm64", "aarch64")
NO_KERNELS = "generation takes two to three times as long"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


# --- what is handed to C ------------------------------------------------------------------------------------

def readable(tensor, dtype) -> bool:
    """Whether kernels.c can read a tensor where it lies: of this dtype, on the CPU, without gaps."""
    return tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous()


def data_pointers(*tensors, dtype=torch.float32) -> list:
    """Addresses of the numbers of tensors, for kernels.c; None for None.

    Raises TypeError for a tensor of another dtype, on another device or with gaps: C would misread it.
    """
    for tensor in tensors:
        if tensor is not None and not readable(tensor, dtype):
            raise TypeError(f"kernels.c needs contiguous {dtype} on the CPU, not {tensor.dtype} of shape "
                            f"{tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}")
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def capability(name: str):
    """What torch knows of the processor, False for nothing."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()   # torch before 2.10 cannot tell
    return capabilities.get(name, False)


def onednn_may_use(*kinds: str) -> bool:
    """Whether its switch ONEDNN_MAX_CPU_ISA, with which other processors are tried, leaves one of these."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    return most in ("ALL", "DEFAULT") or any(kind in most for kind in kinds)


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    return capability("avx512_bf16") and onednn_may_use("BF16", "FP16", "AMX", "AVX10")


def has_tiles() -> bool:
    """Whether it has matrix units for bfloat16 (AMX), beside which all that is no product takes long."""
    return capability("amx_bf16") and onednn_may_use("AMX")


# --- the library --------------------------------------------------------------------------------------------

class Unavailable(Exception):
    """Why there is no library, as the beginning of a sentence."""


@functools.cache
def kernels():
    """The compiled library, or None; says once on stderr what is missing and what that costs."""
    library = message = None
    try:
        library = find_library()
        has_threads = use_threads(library)
        if library.instructions() in (b"SSE2", b"none"):
            message = ("was compiled without AVX2, for the processor has none or the compiler does not take "
                       "-march=native: generation takes up to twice as long")
        elif not has_threads:
            message = "runs on one thread, for torch has no OpenMP here: generation does not use other cores"
    except Unavailable as reason:
        message = f"is not used, for {reason}: {NO_KERNELS}"
    if message and sys.stderr:
        print(f"speed/kernels.c {message}", file=sys.stderr)
    return library


def find_library():
    """The library from the first folder that can keep it, compiled if it is not there. Raises Unavailable."""
    if os.name == "nt":
        raise Unavailable("it was never tried on Windows")
    compilers = [found for found in map(shutil.which, COMPILERS) if found]
    if not compilers:
        raise Unavailable("there is no C compiler (cc, gcc or clang); install one")
    source = Path(__file__).with_name("kernels.c")
    key = library_key(source, compilers)
    content = reason = None
    for folder in folders():
        try:
            make_private(folder)
            path = cached(folder, key)
            if path is None:
                with locked(folder):    # of several processes one compiles, the others find the file
                    path = cached(folder, key)
                    if path is None:
                        content = content or compiled(source, compilers, folder)
                        path = keep(folder, key, content)
            return load(path)
        except OSError as error:    # read-only, full, of another user, or programs may not lie there
            reason = reason or f"it cannot be compiled and kept in {folder} ({error.strerror or error})"
    raise Unavailable(reason)


def library_key(source: Path, compilers: list) -> str:
    """What a library depends on, as a hash."""
    parts = [source.read_bytes(), *map(str.encode, (*FLAGS, processor()))]
    for compiler in map(Path, compilers):
        parts.append(f"{compiler.resolve()} {compiler.stat().st_mtime_ns}".encode())
    return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]


def processor(info=Path("/proc/cpuinfo")) -> str:
    """What tells one kind of processor from another; where nothing does, the name of the machine.

    A home may be shared between machines, and a program for one processor crashes on another.
    """
    try:
        first = info.read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        first = []
    telling = ("flags", "Features", "vendor_id", "model name", "CPU implementer", "CPU part", "CPU variant")
    lines = [line for line in first if line.partition(":")[0].strip() in telling]
    if not any(line.startswith(("flags", "Features")) for line in lines):
        lines = [platform.platform(), platform.processor(), platform.node()]
    return "\n".join([platform.machine(), *lines])


def load(path: Path):
    """The library in a file. Raises OSError."""
    library = ctypes.CDLL(str(path))
    P, I, L, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_double
    arguments = dict(       # the first is the number of threads
        product=[I, I, *[P] * 4, *[L] * 3],
        attend=[I, I, *[P] * 3, L, *[P] * 7, *[L] * 5],
        decode=[I, I, P, L, *[P] * 6, *[L] * 7],
        add_norm=[I, P, I, *[P] * 4, L, L],
        unpack_int8=[I, I, P, P, P, L, L],
        store_first=[I, I, P, I, P, P, *[L] * 6],
        dadapt_moments=[I, *[P] * 4, L, *[D] * 4, P],
        dadapt_step=[I, *[P] * 3, L, D, D],
        unpack_int4=[I, P, P, L, L],
        use_int4_table=[P],
        use_threads=[P] * 3)
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.instructions.restype = ctypes.c_char_p
    library.use_int4_table(int4_table().data_ptr())     # it keeps a copy
    return library


def openmp() -> list:
    """Addresses of the functions of the OpenMP runtime that torch has loaded, for use_threads of kernels.c.

    With another runtime there would be threads of which torch.set_num_threads knows nothing. Empty where
    torch has none.
    """
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"    # LLVM's runtime has them, too
    for path in (None, *sorted(Path(torch.__file__).with_name("lib").glob("lib*omp*"))):
        with contextlib.suppress(OSError, AttributeError):
            runtime = ctypes.CDLL(path and str(path))       # None: all that is loaded for everybody
            return [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names]
    return []


def use_threads(library) -> bool:
    """Lets the library compute on torch's threads, where there are any; returns whether there are."""
    addresses = openmp()
    if addresses:
        library.use_threads(*addresses)
    return bool(addresses)


# --- compiling ----------------------------------------------------------------------------------------------

def compiled(source: Path, compilers: list, folder: Path) -> bytes:
    """The library by the first compiler that can make it for this processor, or else for any of its kind.

    Temporary files lie in `folder`. Raises OSError with what the first compiler complained of first.
    """
    native = "-mcpu=native" if ARM else "-march=native"
    reason = None
    with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-", ignore_cleanup_errors=True) as work:
        target = Path(work) / "kernels.so"
        for more in ([native], []):
            for compiler in compilers:
                command = [compiler, *FLAGS, *more, str(source), "-o", str(target), "-lm"]
                complaint = run_compiler(command, work)
                reason = reason or complaint
                if complaint is None and target.is_file() and target.stat().st_size:
                    return target.read_bytes()
    raise OSError(reason)


def run_compiler(command: list, work: str) -> str | None:
    """Runs a compiler. Returns its first complaint, None if there is none. Raises Unavailable if it hangs."""
    with tempfile.TemporaryFile("w+", dir=work, errors="replace") as output:
        try:    # in a group of its own, so that what the compiler has started ends with it
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env=os.environ | {"TMPDIR": work})
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        try:
            process.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{command[0]} did not come to an end in {MAX_SECONDS} seconds") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read().splitlines() or [f"exit code {process.returncode}"]
    if process.returncode == 0:
        return None
    return f"{command[0]}: {next((line for line in lines if 'error' in line), lines[0])}"


# --- the folder that keeps it -------------------------------------------------------------------------------

def folders() -> list[Path]:
    """Where the library may lie: the user's cache, or a temporary folder."""
    found = []
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):        # others are to be ignored
        found.append(Path(cache))
    with contextlib.suppress(RuntimeError, KeyError):   # no HOME and no entry in passwd
        found.append(Path.home() / ".cache")
    found = [folder / "nanomusicgen" for folder in found]
    with contextlib.suppress(OSError):
        found.append(Path(tempfile.gettempdir()) / f"nanomusicgen-kernels-{os.geteuid()}")
    return found


def make_private(folder: Path):
    """Makes a folder to which nobody else can write; raises OSError where there is one of another kind.

    What lies there is run, so it must come from this user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_own(folder, stat.S_ISDIR) and folder.lstat().st_mode & OTHERS_WRITE:
        folder.chmod(0o700)
    if not is_own(folder, stat.S_ISDIR) or folder.lstat().st_mode & OTHERS_WRITE:
        raise PermissionError(f"{folder} is not a folder of this user's alone")


def is_own(path: Path, is_kind) -> bool:
    """Whether the path is itself of that kind, not a link to such, and belongs to this user."""
    info = path.lstat()
    return is_kind(info.st_mode) and info.st_uid == os.geteuid()


@contextlib.contextmanager
def locked(folder: Path):
    """Waits until no other process has locked the folder; not longer than one may compile."""
    import fcntl        # not on Windows
    with open(folder / "lock", "w") as file:
        until = time.monotonic() + len(COMPILERS) * MAX_SECONDS
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:     # this file system has no locks: at worst several processes compile
                break
        yield


def cached(folder: Path, key: str) -> Path | None:
    """The file that has the library of that key; one that is damaged is removed."""
    for path in folder.glob(f"{key}-*.so"):
        own = is_own(path, stat.S_ISREG) and not path.lstat().st_mode & OTHERS_WRITE
        if own and path.name == library_name(key, path.read_bytes()):
            return path
        path.unlink()
    return None


def library_name(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def keep(folder: Path, key: str, content: bytes) -> Path:
    """Writes the library into the folder, whole or not at all. Raises OSError."""
    path = folder / library_name(key, content)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix="writing-")     # readable by this user alone
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
