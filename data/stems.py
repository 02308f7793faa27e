"""The melody's stem of a recording, without drums and bass, and the notes that are heard in it.

    from data.stems import separate
    stem = separate(wav, sample_rate, "auto")       # (C, L) -> (1, L)
    wav = as_wave(samples, 44100, 32000, "melody")  # whatever a caller of MusicGen calls a wave -> (C, L)
"""
import importlib.util
import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from config import FIELDS
from data.audio import HIGHEST, LOWEST
from data.notes import REST, Notes, one_hot_notes
from system.devices import inference
from system.errors import UserError, as_user_error

MOST_CHANNELS = 64
BASS, TREBLE = 120, 6000      # Hz: no melody is looked for below and above


def pick_stem(stem: str) -> str:
    """"auto" -> "demucs" if that package is installed, else "hpss". Raises UserError if demucs is not."""
    choices = FIELDS["stem"].metadata["choices"]
    if stem not in choices:
        raise UserError(f"stem = {stem!r}: must be one of {', '.join(choices)}")
    installed = importlib.util.find_spec("demucs") is not None
    if stem == "demucs" and not installed:
        raise UserError("stem = 'demucs': that package is not installed; pip install demucs, or use stem = "
                        "'hpss'")
    if stem == "auto":
        return "demucs" if installed else "hpss"
    return stem


@inference()
def separate(wav, sample_rate: int, stem: str = "auto"):
    """Recording (C, L) -> its melody stem (1, L), on the same device.

    "none" only averages the channels. "hpss" takes out percussion and bass (see below). "demucs" is what
    audiocraft does: vocals + other of the network htdemucs. Raises UserError if that is not installed or its
    weights do not load.
    """
    stem = pick_stem(stem)
    if stem == "demucs":
        return _demucs(wav, sample_rate)
    mono = wav.float().mean(0, keepdim=True)
    if stem == "hpss":
        harmonic = hpss(mono[0].cpu(), sample_rate)
        return harmonic[None].to(wav.device)
    return mono


# --- hpss: harmonic/percussive source separation -----------------------------------------------------------

def hpss(wav, sample_rate: int):
    """Wave (L,) -> its harmonic part (L,) between bass and treble.

    By medians (Fitzgerald 2010): in a spectrogram a note is a horizontal line, a drum stroke a vertical one.
    The median of 7 frames (0.2 s) along time keeps lines H, that of 17 bins (270 Hz) along frequency keeps
    strokes P, and the mask H^2 / (H^2 + P^2) keeps what is more line than stroke. Blocks bound the memory and
    do not show in the result.
    """
    L = len(wav)
    n_fft = 2 ** round(math.log2(sample_rate * 0.064))
    hop = n_fft // 2
    block = 1000 * hop
    margin = 7 * hop  # covers the median and the windows on both sides of a block
    out = torch.empty(L)
    for start in range(0, L, block):
        begin = max(0, start - margin)
        end = min(L, start + block)
        harmonic = _harmonic(wav[begin:end + margin], sample_rate, n_fft)
        out[start:end] = harmonic[start - begin:end - begin]
    return out


def _harmonic(wav, sample_rate: int, n_fft: int):
    """Wave (L,) -> its harmonic part (max(L, n_fft),)."""
    missing = max(0, n_fft - len(wav))
    wav = F.pad(wav, (0, missing))
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(wav, n_fft, n_fft // 2, window=window, return_complex=True)  # (n_fft/2 + 1, frames)
    frequency = torch.arange(n_fft // 2 + 1) * sample_rate / n_fft
    frequency = frequency[frequency < TREBLE]
    octaves = torch.log2(frequency / BASS)
    fade = 0.5 - 0.5 * torch.cos(math.pi * octaves.clamp(0, 1))  # the bass fades out over an octave
    band = spectrum[:len(fade)]
    magnitude = band.abs().numpy()
    H = torch.from_numpy(_median(magnitude, 7)) ** 2
    P = torch.from_numpy(_median(magnitude.T, 17).T) ** 2
    band *= H / (H + P).clamp(min=1e-20) * fade[:, None]  # in place: a part of the spectrum
    spectrum[len(fade):] = 0
    return torch.istft(spectrum, n_fft, n_fft // 2, window=window, length=len(wav))


def _median(x, size: int):
    """Running median along the rows of x (rows, n)."""
    from scipy.ndimage import median_filter  # here: it takes 0.25 s to import, and most runs do not need it
    half = size // 2
    padded = np.pad(x, ((0, 0), (half, half)), mode="edge")
    median = median_filter(padded.ravel(), size=size)  # as one long row: scipy is several times faster in 1-D
    return median.reshape(padded.shape)[:, half:-half]


# --- the notes of a stem ------------------------------------------------------------------------------------

HARMONICS = [0.8 ** h for h in range(8)]    # weights of the first eight harmonics of a pitch
LOWEST_NOTE, HIGHEST_NOTE = 65, 2100        # Hz: C2 to C7
CHANGE = 0.05                               # the salience that a change of note costs
NEW = 10.0                                  # weight of what has got louder since the frame before
QUIET = 0.01                                # level of silence over that of the loudest frame: -40 dB
ATTACK = 0.12                               # s after a beginning in which a note is not struck again
STRUCK = 2.0                                # dB by which a note gets louder where it is struck again


def heard_notes(wavs, config):
    """Stems (B, L) -> their notes, see `one_hot_notes` of data/notes.py, (B, M, Q), M = L // hop + 1.

    For melody_form = "notes". Chroma counts each partial for its own class, and hears a bright sound, whose
    third harmonic is the loudest, a fifth too high. Here a pitch is as strong as its harmonics together.
    Pitches are a semitone apart (for n_chroma = 12) in the recording's tuning. A frame sees 0.13 s, where
    that of chroma sees 0.5 s, and what has just got louder counts most, because a bell rings on into the next
    notes. A note begins where the pitch changes, where sound follows silence, and where it is struck again.
    """
    hop = 2 ** config.radix2_exp // 4       # as in chroma.py
    notes = [_notes(wav.cpu().float(), config.sample_rate, hop, config.n_chroma) for wav in wavs]
    return torch.stack(notes).to(wavs.device)


def _notes(wav, sample_rate: int, hop: int, n_chroma: int):
    """Stem (L,) -> one-hot (M, Q)"""
    window = 2 ** round(math.log2(sample_rate * 0.128))
    n_fft = 4 * window                      # zeros around it: the nearest bin is near enough
    hann = torch.hann_window(window)
    spectrum = torch.stft(wav, n_fft, hop, window, hann, pad_mode="constant",
                          return_complex=True).abs()                        # (bins, M)
    level = spectrum.square().sum(0).sqrt()
    sounds = level > QUIET * level.max()
    frequency = torch.arange(len(spectrum)) * sample_rate / n_fft
    tuning = _tuning(normalized(spectrum), frequency, n_chroma)
    new = (spectrum - F.pad(spectrum, (1, 0))[:, :-1]).clamp(min=0)     # what rings on is not
    spectrum = normalized(spectrum + NEW * new)

    # the square root lets many weak harmonics count; the bell over octaves plays down bass and treble
    octave = torch.log2(frequency.clamp(min=1) / 1200)
    loudness = spectrum.sqrt() * torch.exp(-0.5 * (octave / 2) ** 2)[:, None]
    first = math.ceil(n_chroma * math.log2(LOWEST_NOTE / 440))                     # in steps from A4
    last = math.floor(n_chroma * math.log2(HIGHEST_NOTE / 440))
    steps = torch.arange(first, last + 1)
    pitch = 440 * 2 ** ((steps + tuning) / n_chroma)                               # Hz
    salience = torch.zeros(len(steps), spectrum.shape[1])
    for h, weight in enumerate(HARMONICS, start=1):
        nearest = (h * pitch * n_fft / sample_rate).round().long()
        inside = nearest < len(spectrum)
        salience[inside] += weight * loudness[nearest[inside]]
    path = _steadiest_path(salience / sum(HARMONICS))
    begins = F.pad(path[1:] != path[:-1], (1, 0), value=True) | ~F.pad(sounds[:-1], (1, 0))
    struck = _struck(wav, sample_rate, hop, pitch[path])
    again = math.ceil(ATTACK * sample_rate / hop)                       # frames: an attack is one beginning
    for m in range(len(begins)):
        begins[m] |= struck[m] & ~begins[max(0, m - again):m].any()
    notes = steps[path] - 3 * (n_chroma // 12) + 6 * n_chroma               # as data/notes.py counts them
    return one_hot_notes(torch.where(sounds, notes, REST), begins, n_chroma)


def normalized(spectrum):
    """Spectrum (bins, M) with 1 as the largest value of each frame."""
    return spectrum / spectrum.amax(0).clamp(min=1e-9)


def _struck(wav, sample_rate: int, hop: int, pitch):
    """Stem (L,) and the pitch of each frame (M,), Hz -> (M,) bool: whether it is struck around that frame.

    Its first six harmonics together, heard through 40 ms, get STRUCK dB louder than in the 80 ms before, and
    stay so for 130 ms: a tremolo does not.
    """
    size, step = round(0.04 * sample_rate), round(0.008 * sample_rate)
    places = torch.arange(-hop // 2 - 10 * step, hop // 2 + 16 * step, step)    # (J,) around a frame's center
    side = hop + 16 * step + size
    pieces = F.pad(wav, (side, side)).unfold(0, size, 1)
    time = torch.arange(size) / sample_rate
    harmonic = torch.arange(1, 7)
    struck = []
    for first in range(0, len(pitch), 64):      # frames: all at once would be 20 times the recording
        some = pitch[first:first + 64, None] * harmonic                     # (m, 6) Hz
        angle = 2 * math.pi * some[..., None] * time
        waves = torch.polar(torch.hann_window(size).expand_as(angle), angle)
        waves = waves * (some < 0.45 * sample_rate)[..., None]              # (m, 6, size)
        center = torch.arange(first, first + len(some)) * hop
        starts = center[:, None] + places + side - size // 2
        heard = pieces[starts].to(waves.dtype) @ waves.mT                   # (m, J, 6)
        level = 10 * (heard.abs().square().sum(-1) + 1e-9).log10()
        before = level[:, :-17].unfold(1, 10, 1).amin(-1)                   # (m, J - 26)
        after = level[:, 10:].unfold(1, 17, 1).amin(-1)
        struck.append((after - before).amax(1) >= STRUCK)
    return torch.cat(struck)


def _tuning(spectrum, frequency, n_chroma: int) -> float:
    """How far the peaks of a spectrum (bins, M) lie above the notes of A4 = 440 Hz: -0.5 to 0.5 of a step."""
    band = (frequency > 150) & (frequency < 2500)
    spectrum, frequency = spectrum[band], frequency[band]
    inner = spectrum[1:-1]
    peak = (inner > spectrum[:-2]) & (inner >= spectrum[2:]) & (inner > 0.1)
    angle = 2 * math.pi * n_chroma * torch.log2(frequency[1:-1, None] / 440)    # a whole turn a note
    turn = torch.polar(inner * peak, angle.expand_as(inner)).sum()
    return float(turn.angle() / (2 * math.pi))


def _steadiest_path(salience):
    """The strongest way through salience (pitches, M), where each change of pitch costs CHANGE -> (M,)."""
    stay = torch.arange(len(salience))
    score, before = salience[:, 0], []
    for column in salience.T[1:]:
        best = score.argmax()
        change = score < score[best] - CHANGE
        before.append(torch.where(change, best, stay))
        score = torch.where(change, score[best] - CHANGE, score) + column
    path = [int(score.argmax())]
    for origin in reversed(before):
        path.append(int(origin[path[-1]]))
    return torch.tensor(path[::-1])


# --- demucs, an optional package ---------------------------------------------------------------------------

@lru_cache(maxsize=1)
def _load_demucs(device):
    from demucs import pretrained
    with as_user_error("stem = 'demucs': its weights do not load; use stem = 'hpss'"):
        return pretrained.get_model("htdemucs").to(device).eval()


@torch.no_grad()
def _demucs(wav, sample_rate: int):
    """Recording (C, L) -> vocals and everything but drums and bass (1, L)."""
    from demucs.apply import apply_model
    from demucs.audio import convert_audio
    L = wav.shape[1]
    model = _load_demucs(wav.device)
    mix = convert_audio(wav[None].float(), sample_rate, model.samplerate, model.audio_channels)
    stems = apply_model(model, mix, device=wav.device)  # (1, sources, channels, samples)
    kept = [model.sources.index("vocals"), model.sources.index("other")]
    melody = stems[:, kept].sum(1)
    melody = convert_audio(melody, model.samplerate, sample_rate, 1)[0]
    missing = max(0, L - melody.shape[1])
    return F.pad(melody, (0, missing))[:, :L]


# --- texts and waves from Python ---------------------------------------------------------------------------

INTEGERS = {torch.int16: 2.0 ** 15, torch.int32: 2.0 ** 31}     # what stands for 1.0


def as_descriptions(texts):
    """Texts, strings or None, as a list; a single string is one. Raises UserError for anything else."""
    texts = [texts] if isinstance(texts, str) else texts
    known = isinstance(texts, (list, tuple)) and all(isinstance(x, (str, type(None))) for x in texts)
    if not known:
        raise UserError(f"descriptions: must be a list of strings or None, not {texts!r:.60}")
    if not texts:
        raise UserError("nothing to generate: give at least one description (None for none)")
    return [text or None for text in texts]


def as_waves(waves, old: int | None, new: int, B: int, name: str, loudest=math.inf) -> list:
    """Waves of B items, of rate old (None: new) -> a list of B waves (C, L) of rate new, None for none.

    A list of them, or (B, C, L), or a single one for all. Raises UserError for what is neither, and for what
    could be either: B channels of one wave or B waves. Notes of a melody pass as they are. For `loudest` and
    messages see `as_wave`.
    """
    several = isinstance(waves, (list, tuple)) and not all(isinstance(x, (int, float)) for x in waves)
    shape = tuple(getattr(waves, "shape", ()))
    if not several and len(shape) != 3:
        if len(shape) == 2 and 1 < B == min(shape):
            raise UserError(f"{name}: {shape} could be {B} waves or {B} channels of one; give a list of "
                            f"waves (C, L), or (B, C, L)")
        waves = [waves]
    if len(waves) not in (1, B):
        raise UserError(f"{B} descriptions need one {name} for all or {B}, not {len(waves)}")
    given = []
    for n, wav in enumerate(waves):
        label = name if len(waves) == 1 else f"{name} {n + 1}"
        ready = wav is None or name == "melody" and isinstance(wav, Notes)
        given.append(wav if ready else as_wave(wav, old, new, label, loudest))
    return given * (B // len(given)) if B else []


def joint_waves(waves: list, C: int, stride: int, name: str):
    """Waves of `as_waves` -> (B, C, L), whole strides. Raises UserError if one is missing or too short."""
    cut = []
    for wav in waves:
        if wav is None:
            raise UserError(f"{name}: one for all, or one for each description; None is none")
        if C == 1 or wav.shape[0] == 1:
            wav = wav.mean(0, keepdim=True).expand(C, -1)
        frames = wav.shape[-1] // stride
        if not frames:
            raise UserError(f"the {name} is shorter than one frame of {stride} samples; give a longer one")
        cut.append(wav[:C, :frames * stride])
    if len({wav.shape for wav in cut}) != 1:
        raise UserError(f"the {name}s differ in length; cut them to that of the shortest")
    return torch.stack(cut)


@inference()
def as_wave(samples, old: int | None, new: int, name: str, loudest=math.inf):
    """A wave of rate old (None: new), tensor or array -> (C, L) of rate new, float32, on the CPU.

    (L,), (C, L), or (L, C) as soundfile returns them: there are fewer channels than samples. 16-bit and
    32-bit integers are scaled to -1 and 1. Raises UserError, which calls it by its name, for what is no wave,
    has peaks above `loudest` or no sensible rate.
    """
    old = new if old is None else old
    number = isinstance(old, (int, float, np.number)) and not isinstance(old, bool)
    if not number or not LOWEST <= old <= HIGHEST or old != int(old):
        raise UserError(f"{name}: the sample rate {old!r} must be a whole number of Hz from {LOWEST:,} to "
                        f"{HIGHEST:,}")
    try:
        wav = torch.as_tensor(samples.copy() if isinstance(samples, np.ndarray) else samples).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name}: must be a wave (C, L), a tensor or an array, not {samples!r:.60}") from None
    if wav.dtype in INTEGERS:
        wav = wav.double() / INTEGERS[wav.dtype]
    wav = wav[None] if wav.dim() == 1 else wav
    if not wav.is_floating_point() or wav.dim() != 2 or not wav.numel() or not wav.isfinite().all():
        raise UserError(f"{name}: must be a non-empty wave (C, L) of finite floats, or of 16- or 32-bit "
                        f"integers, not {tuple(wav.shape)} of {str(wav.dtype).removeprefix('torch.')}")
    wav = wav.T if wav.shape[0] > wav.shape[1] else wav
    if wav.shape[0] > MOST_CHANNELS:
        raise UserError(f"{name}: must be a wave (C, L), and has {wav.shape[0]} channels")
    peak = float(wav.abs().max())
    if peak > loudest:
        raise UserError(f"{name}: has a peak of {peak:.6g}; scale it to within -1 and 1 (16-bit samples: "
                        f"divide by 32768)")
    return resample(wav.float().contiguous(), int(old), new)


def resample(wav, old: int, new: int):
    """Wave (..., L) from rate old to rate new, in Hz."""
    if old == new:
        return wav
    from scipy.signal import resample_poly      # here, because it takes half a second to import
    resampled = resample_poly(wav.numpy(), new, old, axis=-1)
    return torch.from_numpy(resampled.copy()).float()
