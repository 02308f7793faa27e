"""Audio files: any rate, format and number of channels in; wav, flac, ogg and mp3 out.

    from data.audio import read_audio, write_audio
"""
import io
import math
import shlex
import struct
import sys
from pathlib import Path

import numpy as np
import soundfile

from data.recordings import UNKNOWN, Recording
from system.errors import UserError, as_user_error
from system.files import write_atomic

FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"),
           ".mp3": ("MP3", "MPEG_LAYER_III")}
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)     # Hz
MOST_RATE = {".ogg": 200_000, ".flac": 655_350}     # Hz; beyond, libsndfile's ogg writer ends the process
LOWEST, HIGHEST = 1000, 400_000     # Hz; beyond is damage or malice: to resample 2 GHz takes any memory
TAGS = {"title": b"TIT2", "software": b"TSSE", "comment": b"COMM"}     # and what they are called in an mp3
MAX_TAG = 500   # characters; of 2,048 bytes and more libsndfile makes a WAV file that it cannot read itself
LOUD = 16.0     # no recording of samples within -1 and 1 has peaks beyond; one of 16-bit integers has


printed = set()     # sentences


def warn_once(sentence: str):
    """A line on stderr, if it is not one of before."""
    if sentence not in printed:
        printed.add(sentence)
        print(sentence, file=sys.stderr)


def read_audio(path, sample_rate: int, channels: int, start: float = 0.0, duration: float | None = None,
               tell=warn_once):
    """Any file that soundfile reads -> wave (C, L), float32, at sample_rate. start and duration in seconds.

    The file is read block by block, so a header that lies about its length costs nothing. Pieces read one
    by one join to what the whole file gives: the resampler sees a little more on both sides. What is damaged
    is read as far as it is good; `tell` is then given a sentence that names the file and the seconds read.
    Raises UserError naming the file: missing, unreadable, empty there, or with NaN or infinite samples.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such audio file")
    duration = 1e9 if duration is None else duration
    if not (start >= 0 and duration > 0):
        raise UserError(f"{path}: cannot read {duration} s from {start} s on; start from 0, last more than 0")
    first, length, blocks = round(start * sample_rate), round(duration * sample_rate), []
    with as_user_error(f"{path}: cannot be read as audio; {conversion(path)}"):
        recording = Recording(path)
        if not LOWEST <= recording.rate <= HIGHEST:
            raise UserError(f"{path}: claims {recording.rate} Hz; save it at a rate from {LOWEST:,} to "
                            f"{HIGHEST:,} Hz")
        divisor = math.gcd(sample_rate, recording.rate)
        up, down = sample_rate // divisor, recording.rate // divisor    # `down` samples become `up`
        margin = 10 * max(up, down) // (up * down) + 2                  # half of the filter, in such groups
        begin = max(0, first // up - margin)                            # group where reading begins
        if begin * down > recording.frames:
            raise UserError(f"{path}: has {recording.frames / recording.rate:.2f} s, nothing at "
                            f"{start:.2f} s")
        left = ((first + length) // up + margin - begin) * down
        for block in recording.blocks(begin * down):
            block = block[:left]
            left -= len(block)
            sides = block[:, [0, min(1, block.shape[1] - 1)]]  # the first two channels, or the only one twice
            blocks.append(block.mean(1, keepdims=True) if channels == 1 else sides)
            if left <= 0:
                break
    wav = np.concatenate(blocks) if blocks else np.zeros((0, channels), np.float32)
    if not np.isfinite(wav).all():
        raise UserError(f"{path}: has samples that are not finite numbers")
    if len(wav) and (up, down) != (1, 1):
        from scipy.signal import resample_poly  # half a second that files of the right rate do not need
        wav = resample_poly(wav, up, down, axis=0)
    wav = wav[first - begin * up:][:length]
    if not len(wav):
        at = f" at {start:.2f} s" if start else ""
        raise UserError(f"{path}: no sound{at}" + (f"; {recording.problem}" if recording.problem else ""))
    if recording.problem:
        tell(f"{path}: {recording.end / recording.rate:.2f} s were read; {recording.problem}")
    import torch    # two seconds that data/tunes.py does not need, which only writes
    return torch.from_numpy(np.ascontiguousarray(wav.T, dtype=np.float32))


def conversion(path) -> str:
    """What to do with a file in a format that libsndfile does not know, such as m4a."""
    path = Path(path)
    return f"if a player plays it, convert it: {shlex.join(['ffmpeg', '-i', str(path), f'{path.stem}.flac'])}"


def check_recording(path):
    """Raises UserError, as read_audio does, for a file that is missing or no recording. Reads its head."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such audio file")
    with as_user_error(f"{path}: cannot be read as audio; {conversion(path)}"):
        Recording(path)


def seconds_of(path) -> float:
    """How long a recording is, as far as its structure tells. Raises UserError if it cannot be read."""
    if not Path(path).is_file():    # a pipe, say, which would be waited for
        raise UserError(f"{path}: not a file")
    with as_user_error(f"{path}: cannot be read as audio; {conversion(path)}"):
        recording = Recording(path)
        frames = recording.frames
        if frames >= UNKNOWN:   # FLAC as it is written into a pipe: only decoding shows
            frames = sum(map(len, recording.blocks()))
        if not frames:
            raise UserError(f"{path}: empty")
        return frames / recording.rate


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Samples within -1 and 1 as 16-bit integers, rounded: in wav libsndfile cuts their fractions off."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def check_format(path, sample_rate: int | None = None):
    """Raises UserError if no format has this ending, or if it has no such sample rate (Hz)."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: the ending tells the format, one of {' '.join(FORMATS)}; for another one "
                        f"write a .flac and convert that: ffmpeg -i X.flac X{suffix}")
    if sample_rate is None:
        return
    if suffix == ".mp3" and sample_rate not in MP3_RATES:
        raise UserError(f"{path}: there is no mp3 of {sample_rate} Hz, only of {MP3_RATES}; choose .wav")
    if sample_rate > MOST_RATE.get(suffix, sample_rate):
        raise UserError(f"{path}: {sample_rate} Hz are too many for {suffix}, {MOST_RATE[suffix]} is the "
                        f"most; choose .wav")


def write_audio(path, wav, sample_rate: int, tags: dict | None = None):
    """Writes wave (C, L) as wav, flac, ogg or mp3, by the ending. A peak above 0.99 is scaled down.

    tags: texts by their names, those of TAGS, which the file carries; of each the first MAX_TAG characters.
    Raises UserError naming the file that cannot be written.
    """
    check_format(path, sample_rate)
    suffix = Path(path).suffix.lower()
    wav = wav.detach().float().cpu()
    if not wav.isfinite().all():
        raise UserError(f"{path}: not written, the wave has samples that are not finite numbers")
    peak = float(wav.abs().max()) if wav.numel() else 0.0
    samples = (wav * (0.99 / peak) if peak > 0.99 else wav).T.numpy()  # (L, C)
    kind, subtype = FORMATS[suffix]
    buffer = io.BytesIO()  # not the file itself: libsndfile reports no error when the disk is full
    if subtype == "PCM_16":
        samples = to_int16(samples)
    texts = {name: as_tag(text) for name, text in (tags or {}).items() if text}
    with as_user_error(f"{path}: cannot be written"):
        with soundfile.SoundFile(buffer, "w", sample_rate, samples.shape[1], subtype, format=kind) as file:
            for name, text in texts.items() if kind != "MP3" else ():
                setattr(file, name, text)
            for i in range(0, len(samples), 2 ** 16):  # libsndfile's ogg writer fails on long blocks
                file.write(samples[i:i + 2 ** 16])
        in_front = id3(texts) if kind == "MP3" and texts else b""
        write_atomic(path, in_front + buffer.getvalue())


def as_tag(text: str) -> str:
    """A text as the tags of all formats can hold it: no NUL, no half characters, not too long."""
    return text[:MAX_TAG].replace("\0", " ").encode("utf-8", "replace").decode()


def id3(texts: dict) -> bytes:
    """Tags as ID3 2.3 in UTF-16, for the beginning of an mp3: libsndfile's own can only be Latin-1."""
    frames = b""
    for name, text in texts.items():
        description = "".encode("utf-16") + b"\0\0"      # an empty one, of the comment
        language = b"eng" + description if name == "comment" else b""
        content = b"\1" + language + text.encode("utf-16")
        frames += TAGS[name] + struct.pack(">IH", len(content), 0) + content
    size = [len(frames) >> shift & 127 for shift in (21, 14, 7, 0)]
    return b"ID3\3\0\0" + bytes(size) + frames
