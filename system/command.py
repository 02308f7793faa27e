"""What all commands share: how flags are parsed, exit codes, the streams of the shell.

    if __name__ == "__main__":
        run(main, sys.argv[1:])

Exit codes: 0 done, 2 a mistake of the caller's (one sentence on stderr), 130 interrupted by Ctrl-C, 1 when
nobody reads the output any more.
"""
import argparse
import contextlib
import ctypes
import os
import platform
import sys
from pathlib import Path

from system.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # of glibc's malloc.h


class Parser(argparse.ArgumentParser):
    """Mistakes in flags are UserErrors, reported as all others are."""

    def error(self, message):
        raise UserError(f"{message}; `python {self.prog} --help` lists all flags")


def run(main, *args):
    """main(*args); what the caller can put right becomes one sentence on stderr and exit code 2."""
    prepare_streams()
    disable_malloc_trim()
    try:
        result = main(*args)
        sys.stdout.flush()
        return result
    except UserError as error:
        sentence = str(error)
    except BrokenPipeError:  # `| head` closed the pipe; Python would flush once more, and complain
        sys.stdout = open(os.devnull, "w")
        os.dup2(sys.stdout.fileno(), 1)
        sys.exit(1)
    except OSError as error:
        sentence = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (RuntimeError, MemoryError) as error:  # on the CPU torch raises RuntimeError when memory runs out
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        sentence = ("out of memory; a smaller model, batch or duration takes less "
                    "(`train.py --plan` tells how much)")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    try:
        sys.stdout.flush()
    except OSError:     # a full disk: at the end Python would flush once more, complain, and exit with 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    lines = [line.strip() for line in sentence.splitlines()]
    with contextlib.suppress(OSError):  # stderr may be what fails
        print(f"{Path(sys.argv[0]).name}:", *lines, file=sys.stderr)
    sys.exit(2)


def prepare_streams():
    """Makes stdout and stderr fit to be written to: closed (`>&-`), None (pythonw), those of a notebook."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:     # else the next file that is opened gets this number, and what C libraries print
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")   # names of files need not be UTF-8


def disable_malloc_trim():
    """Lets this process keep the memory that it frees, for the next update or piece. Without glibc: nothing.

    By default glibc returns large blocks to the system and gets them anew, page by page, which takes a fifth
    of an update on the CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 25)     # blocks up to 32 MB, the most it takes, are on the heap,
        libc.mallopt(M_TRIM_THRESHOLD, -1)          # whose end is never returned
