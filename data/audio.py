"""Audio files: any rate, format and number of channels in; wav, flac, ogg and mp3 out.

    from data.audio import read_audio, write_audio
"""
import io
import math
import os
from pathlib import Path

import numpy as np
import soundfile
import torch

from system.errors import UserError, as_user_error
from system.files import write_atomic

FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"),
           ".mp3": ("MP3", "MPEG_LAYER_III")}


def read_audio(path, sample_rate: int, channels: int, start: float = 0.0, duration: float | None = None):
    """Any file that soundfile reads -> wave (C, L), float32, at sample_rate. start and duration in seconds.

    The file is read block by block, so a header that lies about its length costs nothing. Pieces read one
    by one join to what the whole file gives: the resampler sees a little more on both sides. Raises
    UserError naming the file: missing, unreadable, empty there, or with NaN or infinite samples.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such audio file")
    duration = 1e9 if duration is None else duration
    if start < 0 or duration <= 0:
        raise UserError(f"{path}: cannot read {duration} s from {start} s on; start from 0, last more than 0")
    first, length, blocks = round(start * sample_rate), round(duration * sample_rate), []
    with as_user_error(f"{path}: cannot be read as audio"), soundfile.SoundFile(os.fsencode(path)) as file:
        if not 1000 <= file.samplerate <= 400_000:  # damage or malice: to resample 2 GHz takes any memory
            raise UserError(f"{path}: claims {file.samplerate} Hz; save it at a rate from 1,000 to 400,000 "
                            f"Hz")
        divisor = math.gcd(sample_rate, file.samplerate)
        up, down = sample_rate // divisor, file.samplerate // divisor  # `down` samples become `up`
        margin = 10 * max(up, down) // (up * down) + 2                 # half of the filter, in such groups
        begin = max(0, first // up - margin)                           # group where reading begins
        if begin * down > file.frames:
            raise UserError(f"{path}: has {file.frames / file.samplerate:.2f} s, nothing at {start:.2f} s")
        file.seek(begin * down)
        left, size = ((first + length) // up + margin - begin) * down, 2 ** 18 // file.channels
        while left > 0 and len(block := file.read(min(size, left), "float32", always_2d=True)):
            left -= len(block)
            sides = block[:, [0, min(1, block.shape[1] - 1)]]  # the first two channels, or the only one twice
            blocks.append(block.mean(1, keepdims=True) if channels == 1 else sides)
    wav = np.concatenate(blocks) if blocks else np.zeros((0, channels), np.float32)
    if not np.isfinite(wav).all():
        raise UserError(f"{path}: has samples that are not finite numbers")
    if len(wav) and (up, down) != (1, 1):
        from scipy.signal import resample_poly  # half a second that files of the right rate do not need
        wav = resample_poly(wav, up, down, axis=0)
    wav = wav[first - begin * up:][:length]
    if not len(wav):
        raise UserError(f"{path}: no sound" + (f" at {start:.2f} s" if start else ""))
    return torch.from_numpy(np.ascontiguousarray(wav.T, dtype=np.float32))


def write_audio(path, wav, sample_rate: int):
    """Writes wave (C, L) as wav, flac, ogg or mp3, by the ending. A peak above 0.99 is scaled down."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: the ending sets the format, one of {' '.join(FORMATS)}")
    wav = wav.detach().float().cpu()
    if not wav.isfinite().all():
        raise UserError(f"{path}: not written, the wave has samples that are not finite numbers")
    peak = float(wav.abs().max()) if wav.numel() else 0.0
    samples = (wav * (0.99 / peak) if peak > 0.99 else wav).T.numpy()  # (L, C)
    kind, subtype = FORMATS[suffix]
    buffer = io.BytesIO()  # not the file itself: libsndfile reports no error when the disk is full
    with as_user_error(f"{path}: cannot be written"):
        with soundfile.SoundFile(buffer, "w", sample_rate, samples.shape[1], subtype, format=kind) as file:
            for i in range(0, len(samples), 2 ** 16):  # libsndfile's ogg writer fails on long blocks
                file.write(samples[i:i + 2 ** 16])
        write_atomic(path, buffer.getvalue())
