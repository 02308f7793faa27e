"""Sampling: text and a melody in, music out (MusicGen 2.1 - 2.3, arXiv 2306.05284).

    python sample.py --text "a slow flute tune, alone" --melody assets/ode_to_joy.wav
    python sample.py --checkpoint facebook/musicgen-melody --text "80s driving pop song" --melody tune.mp3
    python sample.py --text "a flute tune" --prompt recording.ogg --duration 20     # continues the recording
    python sample.py --help                             # all flags; they are in sampling/command.py

The life of a sample (`MusicGen.generate`):

    melody wav --separate, ChromaExtractor--> chroma (M, Q)      text ----------.
    condition_passes(conditions) ------------> Conditions of 2B rows: with the conditions, and without
    generate(...), window by window ---------> codes (B, K, T)   one column of the pattern at a time
    codec.decode(codes) ---------------------> wav (B, C, L)     written beside a JSON that reproduces it

The model knows segments of one length. Longer music is made in windows of that length (`windows`): each
continues the last codes of the one before, and the melody moves with it.

    |----------- longest -----------|
    |----- stride -----|-- known ---|------- new -------|
                                          |-- known ----|------- new -------|
"""
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoints.files import open_checkpoint
from chroma import ChromaExtractor, match_length
from data.audio import LOUD
from data.stems import as_wave, as_waves, separate
from encodec import EncodecModel
from lm import LMModel
from system.devices import device_of, inference, pick_device
from system.errors import UserError

try:    # on a CPU PackedLinear and PackedCache (speed/decoding.py) take over from lm.py's layers and cache
    from speed import fastest_dtype, optimize_codec, optimize_for_cpu
except ImportError:     # without that folder everything computes as it is written here
    fastest_dtype = optimize_codec = optimize_for_cpu = None


class MusicGen:
    """A language model with its codec: `MusicGen.from_pretrained(X).generate([...])`."""

    DTYPES = ("float32", "bfloat16", "float16", "int8", "auto")
    MAX_DURATION = 3600.0   # s; a guard against --duration 1e9, not a limit of the method

    def __init__(self, lm, codec):
        self.lm, self.codec = lm.eval(), codec.eval()
        self.config = config = lm.config
        self.sample_rate, self.frame_rate = codec.sample_rate, codec.frame_rate
        self.chroma_rate = codec.sample_rate / config.hop       # chroma frames/s
        self.chroma_frames = config.chroma_frames               # M of a window
        self.codec_device = device_of(codec)
        streams = max(1, config.channels // codec.channels)     # 2 of a mono codec, interleaved, for stereo
        K = config.n_q // streams
        if codec.num_codebooks < K or codec.cardinality != config.card:
            raise UserError(f"the language model speaks {K} codebooks of {config.card} entries, its codec "
                            f"{codec.num_codebooks} of {codec.cardinality}; set codec = to the one it was "
                            f"trained with")

    @classmethod
    def from_pretrained(cls, name_or_dir, device="auto", dtype="float32", compile=False):
        """Loads our directory, a transformers directory or hub id, or a directory in audiocraft's format.

        dtype: of the language model's weights; "int8" is for the CPU, "auto" the fastest for the device. The
        codec stays in float32, but for its decoder on a CPU that computes in bfloat16. compile: the layers by
        torch.compile, where speed/kernels.c does not run them. Raises UserError for what does not fit.
        """
        # oneDNN, and torch beside it, keep code for up to 1,024 lengths: memory would grow for hours
        for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(variable, "16")
        if dtype not in cls.DTYPES:
            raise UserError(f"dtype {dtype!r}: must be one of {', '.join(cls.DTYPES)}")
        device, directory = pick_device(device), open_checkpoint(name_or_dir, with_codec=True)
        if dtype == "auto":
            dtype = fastest_dtype(device) if fastest_dtype else "float32"
        if dtype == "int8" and device.type != "cpu":
            raise UserError(f"dtype 'int8' is for the CPU; on {device.type} take bfloat16 or float16")
        if dtype == "int8" and not optimize_for_cpu:
            raise UserError("dtype 'int8' needs the folder speed/, which is not here; take float32")

        prepare = optimize_for_cpu if device.type == "cpu" and dtype != "float16" else None
        lm = LMModel.from_pretrained(directory, getattr(torch, dtype), prepare).to(device)
        if compile and not lm.packed:
            for layer in lm.layers:     # they are alike and compile once
                layer.compile()
        # the codec's convolutions and nearest-neighbor search can be wrong on mps; it is a small part
        codec_device = "cpu" if device.type == "mps" else device
        codec = cls.load_codec(directory, lm).fold().to(codec_device)
        if optimize_codec and device_of(codec).type == "cpu":
            narrow = device.type == "cpu" and dtype in ("bfloat16", "int8")
            codec = optimize_codec(codec, torch.bfloat16 if narrow else torch.float32)
        return cls(lm, codec)

    @staticmethod
    def load_codec(name_or_dir, lm):
        """The codec inside a model's directory, else the one that its configuration names."""
        inside = open_checkpoint(name_or_dir) / "codec"
        return EncodecModel.from_pretrained(inside if inside.is_dir() else lm.config.codec)

    def save(self, directory, compact=False):
        """Writes what from_pretrained reads, codec included. compact: int8 matrices, float16 the rest."""
        self.codec.save(Path(directory) / "codec", compact)
        self.lm.save(directory, compact)

    def generate(self, descriptions, melodies=None, melody_sample_rate=None, prompt=None,
                 prompt_sample_rate=None, duration=None, **settings):
        """Descriptions (strings or None) and melodies -> wav (B, C, L) of `duration` seconds.

        melodies: one wave (C, L) or None per description, or (B, C, L), or one for all. prompt: waves alike
        that the results begin with; the duration includes it. Rates in Hz, default: the model's. What is a
        wave: data/stems.py. settings: see `generate_codes`. Raises UserError for what cannot be done.
        """
        descriptions = as_descriptions(descriptions)
        B = len(descriptions)
        if prompt is not None:
            prompt = self.encode_prompt(prompt, prompt_sample_rate, B)
        chromas = None
        if melodies is not None:
            waves = as_waves(melodies, melody_sample_rate, self.sample_rate, B, "melody")
            chromas = [wav if wav is None else self.melody_chroma(wav) for wav in waves]
        codes = self.generate_codes(descriptions, chromas, prompt, duration, **settings)
        return self.decode(codes, duration)

    def melody_chroma(self, melody, sample_rate=None, stem=None):
        """Melody wave (L,), (C, L) or (L, C), any rate and length -> chroma (M, Q) of its separated stem."""
        wav = as_wave(melody, sample_rate, self.sample_rate, "melody")
        wav = separate(wav, self.sample_rate, stem or self.config.stem)         # (1, L)
        extract = ChromaExtractor(self.sample_rate, self.config.n_chroma, self.config.radix2_exp)
        return extract(wav)[0]

    @inference()
    def encode_prompt(self, prompt, sample_rate, batch):
        """Waves to continue, see `as_waves`, one for all or one an item -> codes (B, K, T0), whole frames."""
        C, stride = self.config.channels, self.config.stride
        waves = []
        for wav in as_waves(prompt, sample_rate, self.sample_rate, batch, "prompt", loudest=LOUD):
            if wav is None:
                raise UserError("prompt: one for all, or one for each description; None is none")
            if C == 1 or wav.shape[0] == 1:
                wav = wav.mean(0, keepdim=True).expand(C, -1)
            frames = wav.shape[-1] // stride
            if not frames:
                raise UserError(f"the prompt is shorter than one frame of {1 / self.frame_rate:.3f} s; give "
                                f"a longer one")
            waves.append(wav[:C, :frames * stride])
        if len({wav.shape for wav in waves}) != 1:
            raise UserError("the prompts differ in length; cut them to that of the shortest")
        codes = self.codec.encode(torch.stack(waves).to(self.codec_device))
        return codes[:, :self.config.n_q]

    @inference()
    def decode(self, codes, duration=None):
        """Codes (B, K, T) -> wav (B, C, L), cut to `duration` seconds."""
        wav = self.codec.decode(codes.to(self.codec_device)).float().cpu()
        if duration is None:
            return wav
        L = max(1, round(duration * self.sample_rate))
        return wav[..., :L]

    @inference()
    def generate_codes(self, descriptions, chromas=None, prompt=None, duration=None, seeds=None,
                       guidance=None, two_step=False, temperature=None, top_k=None, top_p=None,
                       progress=False, interrupted=()):
        """Descriptions and chromas ((M, Q) or None each) -> codes (B, K, T).

        prompt: codes (B, K, T0) to continue. seeds: a number an item, which in float32 gives it the same
        music alone and in a batch. Defaults are the configuration's. progress: show a bar. `interrupted`: turns
        true when generation is to end with the frames that are whole. Raises UserError for what cannot be done.
        """
        descriptions = as_descriptions(descriptions)
        config, B = self.config, len(descriptions)
        chromas = [None] * B if chromas is None else chromas
        duration = config.segment_duration if duration is None else duration
        seeds = range(config.seed, config.seed + B) if seeds is None else seeds
        guidance = config.cfg_coef if guidance is None else guidance
        temperature = config.temperature if temperature is None else temperature
        top_k = config.top_k if top_k is None else top_k
        top_p = config.top_p if top_p is None else top_p
        codes = torch.empty(B, config.n_q, 0, dtype=torch.long)
        if prompt is not None:
            codes = prompt.cpu()
            if codes.shape[:2] != (B, config.n_q):
                raise UserError(f"prompt: must be codes ({B}, {config.n_q}, T0), not {tuple(codes.shape)}")
        T0 = codes.shape[-1]
        self.check_arguments(B, chromas, T0, duration, seeds, guidance, temperature, top_k, top_p)

        T = self.frames(duration)
        longest = self.frames(config.segment_duration)
        stride = self.frames(config.extend_stride)
        delay = config.melody_delay * max(0, guidance - 1) * self.frame_rate        # frames
        with tqdm(total=T - T0, unit="frame", disable=not progress, desc="sampling") as bar:
            for n, (start, known, end) in enumerate(windows(T, T0, longest, stride)):
                if interrupted:
                    break
                conditions = self.window_conditions(descriptions, chromas, start)
                passes = condition_passes(self.lm, conditions, end - start, guidance, two_step)
                passes = [delay_melody(encoded, delay) for encoded in passes]
                window_seeds = [seed + 1_000_003 * n for seed in seeds]     # far from those of other items
                on_column = partial(advance, bar, end - known, interrupted)
                window = generate(self.lm, passes, end - start, window_seeds, codes[..., start:], guidance,
                                  temperature, top_k, top_p, on_column)
                new = window[..., known - start:]
                codes = torch.cat([codes, new.cpu()], dim=-1)
        known_frames = (codes >= 0).all(dim=1).all(dim=0)       # all, unless interrupted: (T,)
        return codes[..., :known_frames.cumprod(0).sum()]

    def check_arguments(self, B, chromas, T0, duration, seeds, guidance, temperature, top_k, top_p):
        """Raises UserError for arguments of `generate_codes` that make no sense, alone or together."""
        if len(chromas) != B or len(seeds) != B:
            raise UserError(f"{B} descriptions need as many melodies and seeds, not {len(chromas)} and "
                            f"{len(seeds)}")
        if not 0 < duration <= self.MAX_DURATION:
            raise UserError(f"duration {duration} s: must be more than 0 and at most "
                            f"{self.MAX_DURATION:.0f} s")
        if not (temperature >= 0 and top_k >= 0 and 0 <= top_p <= 1):
            raise UserError(f"temperature {temperature} and top_k {top_k} must not be negative, top_p "
                            f"{top_p} within 0 and 1")
        if not abs(guidance) <= 1000:
            raise UserError(f"guidance {guidance}: must lie between -1000 and 1000; 3 is usual")
        if self.config.melody == "none" and any(chroma is not None for chroma in chromas):
            raise UserError("this model was trained on text only and takes no melody; use a melody model or "
                            "leave it out")
        if T0 >= self.frames(duration):
            raise UserError(f"the duration {duration} s includes the prompt, which is as long or longer; "
                            f"ask for more")

    def frames(self, duration):
        """T of so many seconds."""
        return max(1, round(duration * self.frame_rate))

    def window_conditions(self, descriptions, chromas, start):
        """Conditions of the window from frame `start` on: the texts, and the melodies from there on."""
        first = round(start * self.chroma_rate / self.frame_rate)           # chroma frame
        parts = []
        for chroma in chromas:
            if chroma is not None:
                chroma = match_length(chroma[None], self.chroma_frames, first)[0]
            parts.append(chroma)
        return {"text": descriptions, "melody": parts}


def windows(T, known, longest, stride):
    """Yields (start, known, end) of each window that T frames take; its frames before `known` are prompt."""
    overlap = max(0, longest - stride)
    while known < T:
        start = 0 if known < longest else known - overlap
        end = min(T, start + longest)
        yield start, known, end
        known = end


def advance(bar, frames, interrupted, done, columns):
    """Moves the bar by a frame in the first `frames` columns of a window; the delays add a few columns."""
    bar.update(int(done <= frames))
    return bool(interrupted)    # true ends the generation


def delay_melody(conditions, frames):
    """Conditions whose melody frames have the times of music that comes `frames` later (ours).

    A melody makes it likelier that a note begins now, at every column while one is due. Guidance raises that
    factor to a power: the higher it is, the earlier notes begin. A delay makes up for it ("rope" models).
    """
    time = conditions.prefix_time                                           # (P,), of text below 0
    if time is None:
        return conditions
    time = torch.where(time >= 0, time + frames, time)
    return conditions._replace(prefix_time=time)


def as_descriptions(texts):
    """Texts, strings or None, as a list; a single string is one. Raises UserError for anything else."""
    texts = [texts] if isinstance(texts, str) else texts
    known = isinstance(texts, (list, tuple)) and all(isinstance(x, (str, type(None))) for x in texts)
    if not known:
        raise UserError(f"descriptions: must be a list of strings or None, not {texts!r:.60}")
    if not texts:
        raise UserError("nothing to generate: give at least one description (None for none)")
    return list(texts)


def condition_passes(lm, conditions, T, guidance=3.0, two_step=False):
    """The conditions of the forward passes that each column of `generate` takes, for T frames.

    One batch of 2B: the items, then the same without text and melody, each keeping its number of frames.
    With two_step two batches of B, where the null text is a single frame; with guidance 1 the items alone.
    """
    S = lm.pattern.steps(T)
    if guidance == 1 or lm.config.text == lm.config.melody == "none":
        return [lm.conditioner(conditions, S)]
    if two_step:
        nothing = {name: [None] * len(values) for name, values in conditions.items()}
        return [lm.conditioner(conditions, S), lm.conditioner(nothing, S)]
    return [lm.conditioner(conditions, S, guidance=True)]


@torch.inference_mode()
def generate(lm, passes, T, seeds, prompt=None, guidance=3.0, temperature=1.0, top_k=250,
             top_p=0.0, progress=None):
    """Codes (B, K, T), one item per seed, under the conditions of `condition_passes`.

    prompt: codes (B, K, T0 < T) that the result begins with. guidance 1 is the conditional model, 0 the
    unconditional one. progress(columns_done, columns): called after every column; if what it returns is true,
    generation ends, with -1 for the codes that are not known yet.
    """
    device = lm.emb.weight.device
    B, K = len(seeds), lm.config.n_q
    rows = max(B, passes[0].batch)
    if rows not in (B, 2 * B):
        raise ValueError(f"{rows} conditions for {B} items")
    codes = torch.full((B, K, T), -1, device=device)                        # -1: not known yet
    T0 = 0 if prompt is None else prompt.shape[-1]
    if T0:
        codes[..., :T0] = prompt.to(device)
    sequence, real = lm.pattern.build(codes, lm.special)                    # (B, K, S), (K, S)
    S = sequence.shape[-1]
    uniform = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        uniform.append(torch.rand(S, K, generator=generator))
    uniform = torch.stack(uniform).to(device)                               # (B, S, K)
    caches = [lm.new_cache(rows, S + conditions.prefix_length) for conditions in passes]

    first = max(1, lm.pattern.first_step(T, T0))
    previous = 0
    for s in range(first, S):
        columns = sequence[..., previous:s].repeat(rows // B, 1, 1)
        logits = []
        for conditions, cache in zip(passes, caches):
            logits.append(lm(columns, conditions, cache)[:, :, -1])
        logits = torch.cat(logits)                                          # (B or 2B, K, V)
        if len(logits) == 2 * B:
            conditional, null = logits.float().chunk(2)
            logits = guide(conditional, null, guidance)
        new = draw(logits, uniform[:, s], temperature, top_k, top_p)        # (B, K)
        new = torch.where(real[:, s], new, lm.special)      # cells of the pattern without a code stay special
        known = sequence[..., s]
        sequence[..., s] = torch.where(known == -1, new, known)
        previous = s
        if progress is not None and progress(s - first + 1, S - first):
            break
    return lm.pattern.revert(sequence, T, lm.special)[0]


def guide(conditional, null, guidance):
    """Classifier-free guidance: null + guidance * (conditional - null)."""
    return null + guidance * (conditional - null)


def draw(logits, uniform, temperature=1.0, top_k=0, top_p=0.0):
    """Logits (B, K, V) and uniform numbers (B, K) in [0, 1) -> codes (B, K).

    With top_p above 0 the entries chosen from are the likeliest ones that add up to it, whatever top_k says;
    else they are the top_k likeliest (audiocraft's rule). Every codebook is drawn independently (MusicGen,
    equation 4), by inverse transform sampling over the sorted entries: the draw depends on the item's own
    numbers alone, so a batch, a device or a neighbor cannot change it. Temperature 0 or top_k 1 is greedy.
    """
    V = logits.shape[-1]
    k = V if top_p or not top_k else min(top_k, V)
    if temperature < 1e-5 or k == 1:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    values, index = logits.topk(k, dim=-1)                                  # sorted
    cumulative = values.softmax(-1).cumsum(-1)                              # (B, K, k)
    total = cumulative[..., -1]
    if top_p:       # the entries before which no more than top_p has been collected: at least the first
        inside = F.pad(cumulative, (1, -1)) <= top_p
        total = cumulative.masked_fill(~inside, 0.0).amax(-1)
    target = (uniform * total)[..., None]
    place = torch.searchsorted(cumulative, target, right=True)
    place = place.clamp(max=k - 1)
    return index.gather(-1, place)[..., 0]


if __name__ == "__main__":
    from sampling.command import main
    from system.command import run
    run(main, MusicGen, sys.argv[1:])
