"""kernels.c: compiled for this processor when it is first needed, and called through ctypes."""
import ctypes
import functools
import hashlib
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from system.errors import UserError
from system.files import write_atomic

KINDS = {torch.int8: 0, torch.bfloat16: 1, torch.float32: 2}    # what kernels.c calls them


def data_pointers(*tensors, kinds=(torch.float32,)) -> list:
    """Addresses of the numbers of tensors, for kernels.c; None for None.

    kernels.c sees neither type nor order: raises TypeError for what is not on the CPU, contiguous and of one
    of these kinds, rather than let it read past the end.
    """
    addresses = []
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in kinds and tensor.is_contiguous()):
            raise TypeError(f"kernels.c: {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}")
        addresses.append(None if tensor is None else tensor.data_ptr())
    return addresses


def packed_pointers(*tensors) -> list:
    """Likewise of weights, keys and values, which may be of any of KINDS."""
    return data_pointers(*tensors, kinds=KINDS)


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()   # torch before 2.10 cannot tell
    return capabilities.get("avx512_bf16", False)


@functools.cache
def kernels():
    """The compiled library; None where there is no C compiler or no place to keep the result."""
    source = Path(__file__).with_name("kernels.c")
    try:
        name = hashlib.sha256(source.read_bytes() + processor().encode()).hexdigest()[:16] + ".so"
        path = Path.home() / ".cache" / "nanomusicgen" / name
        if not path.is_file():
            write_atomic(path, lambda temporary: build(source, temporary))
        library = ctypes.CDLL(str(path))
    except (OSError, UserError, subprocess.SubprocessError, RuntimeError):  # RuntimeError: there is no home
        return None
    declare(library)
    return library


def processor() -> str:
    """What tells one kind of processor from another."""
    info = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and info.is_file():
        return re.search("flags.*", info.read_text())[0]
    return platform.platform()


def build(source: Path, target: str):
    """Compiles the source into a shared library.

    In two steps: linked with -Ofast, a library makes the whole process flush small numbers to zero.
    """
    compiler, compiled = shutil.which("cc") or "gcc", f"{target}.o"
    for work in (["-Ofast", "-c", source, "-o", compiled], ["-shared", compiled, "-o", target, "-lm"]):
        command = [compiler, "-march=native", "-fopenmp", "-fPIC", *map(str, work)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    Path(compiled).unlink()


def declare(library):
    """Tells ctypes the arguments of the functions of kernels.c; none of them returns anything."""
    P, I, L, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_double
    arguments = dict(
        product=[I, *[P] * 5, I, *[P] * 2, *[L] * 3],
        attend=[I, *[P] * 3, L, *[P] * 7, *[L] * 5],
        decode=[I, P, L, *[P] * 4, *[L] * 7],
        dadapt_moments=[*[P] * 4, L, *[D] * 4, P],
        dadapt_step=[*[P] * 3, L, D, D])
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
