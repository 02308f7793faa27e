"""Music while it is made: down a pipe (`--out -`), out of the loudspeaker (`--play`).

    python sample.py --text "a slow flute tune" --duration 60 --out - | ffplay -nodisp -autoexit -
    python sample.py --text "a slow flute tune" --duration 60 --play

Both are given waves (C, l) one after the other.
"""
import importlib
import queue
import struct
import sys
import threading

import numpy as np

from data.audio import to_int16
from system.errors import UserError, as_user_error

UNKNOWN = 0xFFFFFFFF    # bytes of a WAV that is still being written, as ffmpeg has it


def check_live(args, items: int):
    """Raises UserError for flags that do not go together, and where --play has nothing to play with."""
    if args.raw and args.out != "-":
        raise UserError("--raw: is for --out -; a file has the format of its ending")
    for flag, given in (("--out -", args.out == "-"), ("--play", args.play)):
        if given and items > 1:
            raise UserError(f"{flag}: takes one item, not {items}")
    for flag in ("page", "save_codes", "loop"):
        if args.out == "-" and getattr(args, flag):
            raise UserError(f"--out -: writes no file, so leave out --{flag}, or name a file")
    if args.out == "-" and sys.stdout.isatty():
        raise UserError("--out -: would fill the terminal; pipe it, as in `--out - | ffplay -nodisp -`")
    if args.play:
        sound_device()


def live_outputs(args, model, stdout) -> list:
    """The outputs that the flags ask for, as contexts. stdout: the shell's, though it may be redirected."""
    rate, channels, outputs = model.sample_rate, model.config.channels, []
    if args.out == "-":
        outputs.append(Pipe(stdout.buffer, rate, channels, args.raw))
    if args.play:
        outputs.append(Player(rate, channels))
    return outputs


class Pipe:
    """Standard output: a WAV of 16 bits without a length, or the float32 samples alone, little-endian."""

    def __init__(self, file, sample_rate: int, channels: int, raw: bool):
        self.file, self.raw = file, raw
        self.header = b"" if raw else wav_header(sample_rate, channels)

    def write(self, wav):
        samples = wav.T.numpy()                                             # (l, C)
        samples = samples.astype("<f4") if self.raw else to_int16(samples).astype("<i2")
        try:
            self.file.write(self.header + samples.tobytes())
            self.file.flush()
        except BrokenPipeError:     # nobody listens any more: system/command.py ends the work quietly
            raise
        except OSError as error:
            raise UserError(f"--out -: cannot be written ({error.strerror})") from None
        self.header = b""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass    # what is written is written


def wav_header(sample_rate: int, channels: int) -> bytes:
    """The 44 bytes in front of 16-bit samples whose number nobody knows yet."""
    size = 2 * channels     # bytes of a sample of all channels
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, sample_rate, sample_rate * size, size, 16)
    return struct.pack("<4sI4s", b"RIFF", UNKNOWN, b"WAVE") + form + struct.pack("<4sI", b"data", UNKNOWN)


def sound_device():
    """The optional package sounddevice. Raises UserError where it or its library is missing."""
    try:
        return importlib.import_module("sounddevice")
    except ImportError:
        raise UserError("--play: needs the package sounddevice (pip install sounddevice); without it, take "
                        "`--out - | ffplay -nodisp -`") from None
    except OSError as error:
        raise UserError(f"--play: sounddevice does not find its library PortAudio ({error}); on Debian: "
                        f"apt install libportaudio2") from None


class Player:
    """The loudspeaker, fed by a thread of its own: it waits for the device while the next wave is made."""

    def __init__(self, sample_rate: int, channels: int):
        self.waves = queue.Queue()
        self.problem = None
        with as_user_error("--play: no sound device takes this music; leave the flag out"):
            self.device = sound_device().OutputStream(sample_rate, channels=channels, dtype="float32")
            self.device.start()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def write(self, wav):
        samples = wav.T.numpy().clip(-1, 1)                                 # (l, C)
        self.waves.put(np.ascontiguousarray(samples))

    def run(self):
        """What the thread does."""
        try:
            while (samples := self.waves.get()) is not None:
                self.device.write(samples)      # waits until the device has taken them
            self.device.stop()                  # waits until they have sounded
        except Exception as problem:            # somebody unplugs the headphones
            self.problem = problem

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Waits for the end of the music, or ends it where something went wrong."""
        self.waves.put(None)
        try:
            while self.thread.is_alive() and error == (None, None, None):
                self.thread.join(0.1)           # with a limit, so that Ctrl-C gets through everywhere
        finally:
            self.device.abort()
            self.device.close()
        if self.problem:
            print(f"--play: the sound device failed ({self.problem}); the music itself is complete",
                  file=sys.stderr)
