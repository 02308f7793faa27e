"""Sampling: text and a melody in, music out (MusicGen 2.1 - 2.3, arXiv 2306.05284).

    python sample.py --text "a slow flute tune, alone" --melody assets/ode_to_joy.wav
    python sample.py --checkpoint facebook/musicgen-melody --text "80s driving pop song" --melody tune.mp3
    python sample.py --text "a flute tune" --prompt recording.ogg --duration 20     # continues the recording
    python sample.py --help                             # all flags; they are in sampling/command.py

The life of a sample (`MusicGen.generate`; `MusicGen.stream` gives it in pieces, as they are made):

    melody wav --separate, ChromaExtractor--> chroma (M, Q)      text ----------.
    condition_passes(conditions) ------------> Conditions of 2B rows: with the conditions, and without
    stream_window(...), one after the other -> codes (B, K, t)   one column of the pattern at a time
    codec.decode_stream ---------------------> wav (B, C, L)     written beside a JSON that reproduces it

The model knows segments of one length. Longer music is made in windows of that length (`windows`): each
continues the last codes of the one before, and the melody moves with it.

    |----------- longest -----------|
    |----- stride -----|-- known ---|------- new -------|
                                          |-- known ----|------- new -------|
"""
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from chroma import ChromaExtractor, match_length
from data.audio import LOUD
from data.notes import Notes
from data.stems import as_descriptions, as_wave, as_waves, heard_notes, joint_waves, separate
from data.vocabulary import read_as_known
from encodec import PIECE
from sampling.loading import check_codec, load_models
from system.devices import device_of, inference, inference_steps
from system.errors import UserError


class Settings(NamedTuple):
    """How codes are chosen: see `guide`, `draw`, `condition_passes`."""
    guidance: float = 3.0       # 1 is the conditional model, 0 the unconditional one
    temperature: float = 1.0
    top_k: int = 250
    top_p: float = 0.0
    two_step: bool = False


class MusicGen:
    """A language model with its codec: `MusicGen.from_pretrained(X).generate([...])`."""

    MAX_DURATION = 3600.0   # s; a guard against --duration 1e9, not a limit of the method

    def __init__(self, lm, codec):
        self.lm = lm.eval()
        self.codec = codec.eval()
        self.config = config = lm.config
        self.settings = Settings(config.cfg_coef, config.temperature, config.top_k, config.top_p)
        self.sample_rate = codec.sample_rate                    # Hz
        self.frame_rate = codec.frame_rate                      # code frames/s
        self.chroma_rate = codec.sample_rate / config.hop       # chroma frames/s
        self.chroma_frames = config.chroma_frames               # M of a window
        self.codec_device = device_of(codec)
        check_codec(codec, config)

    @classmethod
    def from_pretrained(cls, name_or_dir, device="auto", dtype="float32", compile=False):
        """See `load_models` in sampling/loading.py."""
        lm, codec = load_models(name_or_dir, device, dtype, compile)
        return cls(lm, codec)

    def save(self, directory, compact=False):
        """Writes what from_pretrained reads, codec included. compact: int8 matrices, float16 the rest."""
        self.codec.save(Path(directory) / "codec", compact)
        self.lm.save(directory, compact)

    def generate(self, descriptions, melodies=None, melody_sample_rate=None, prompt=None,
                 prompt_sample_rate=None, duration=None, **settings):
        """Descriptions (strings or None) and melodies -> wav (B, C, L) of `duration` seconds.

        melodies: one wave (C, L), Notes or None per description, or one for all, or (B, C, L). prompt: waves
        that the results begin with; the duration includes it. Rates in Hz, default: the model's. What is a
        wave: data/stems.py. settings: see `stream_codes`. Raises UserError for what cannot be done.
        """
        waves = self.stream(descriptions, melodies, melody_sample_rate, prompt, prompt_sample_rate, duration,
                            PIECE / self.frame_rate, **settings)
        return torch.cat(list(waves), dim=-1)

    def stream(self, descriptions, melodies=None, melody_sample_rate=None, prompt=None,
               prompt_sample_rate=None, duration=None, chunk=0.5, **settings):
        """What `generate` gives as it is made: an iterator of waves (B, C, l), `chunk` seconds each.

        The last one is shorter. A wave is made when it is asked for, in memory that does not grow; several
        iterators of a model do not interfere, and one that is closed or forgotten leaves nothing behind.
        """
        if not 0 < chunk <= self.MAX_DURATION:
            raise UserError(f"chunk {chunk} s: must be more than 0 and at most {self.MAX_DURATION:.0f} s")
        B = len(as_descriptions(descriptions))
        chromas = None
        if melodies is not None:
            waves = as_waves(melodies, melody_sample_rate, self.sample_rate, B, "melody")
            chromas = [wav if wav is None else self.melody_chroma(wav) for wav in waves]
        if prompt is not None:
            prompt = self.encode_prompt(prompt, prompt_sample_rate, B)
        codes = self.stream_codes(descriptions, chromas, prompt, duration, **settings)
        return self.decode_stream(codes, duration, chunk)

    def melody_chroma(self, melody, sample_rate=None, stem=None):
        """Notes, or a wave (L,), (C, L) or (L, C) of any rate and length -> its chroma (M, Q)."""
        if isinstance(melody, Notes):
            return melody.chroma(self.config, self.MAX_DURATION + self.config.segment_duration)
        wav = as_wave(melody, sample_rate, self.sample_rate, "melody")
        wav = separate(wav, self.sample_rate, stem or self.config.stem)         # (1, L)
        if self.config.melody_form == "notes":
            return heard_notes(wav, self.config)[0]
        extract = ChromaExtractor(self.sample_rate, self.config.n_chroma, self.config.radix2_exp)
        return extract(wav)[0]

    @inference()
    def encode_prompt(self, prompt, sample_rate, batch):
        """Waves to continue, see `as_waves`, one for all or one an item -> codes (B, K, T0), whole frames."""
        waves = as_waves(prompt, sample_rate, self.sample_rate, batch, "prompt", loudest=LOUD)
        prompt = joint_waves(waves, self.config.channels, self.codec.stride, "prompt")
        codes = self.codec.encode(prompt.to(self.codec_device))
        return codes[:, :self.config.n_q]

    def decode(self, codes, duration=None):
        """Codes (B, K, T) -> wav (B, C, L), cut to `duration` seconds."""
        waves = self.decode_stream([codes], duration, PIECE / self.frame_rate)
        return torch.cat(list(waves), dim=-1)

    @inference_steps
    def decode_stream(self, codes, duration=None, chunk=0.5):
        """Pieces of codes (B, K, t) -> waves (B, C, l) of `chunk` seconds that join to those of `decode`."""
        duration = duration or self.MAX_DURATION
        left = max(1, round(duration * self.sample_rate))                   # samples
        size = max(1, round(chunk * self.sample_rate))
        frames = min(PIECE, math.ceil(size / self.codec.stride))
        pieces = regroup(codes, frames, frames + self.codec.look_ahead)
        pieces = (piece.to(self.codec_device) for piece in pieces)
        waves = self.codec.decode_stream(pieces)
        for wav in regroup(waves, size, size):
            yield wav[..., :left].float().cpu()
            left -= size
            if left <= 0:
                return

    def generate_codes(self, descriptions, chromas=None, prompt=None, duration=None, **settings):
        """The codes of `stream_codes`, joined: (B, K, T)."""
        codes = self.stream_codes(descriptions, chromas, prompt, duration, **settings)
        return torch.cat(list(codes), dim=-1).cpu()

    def stream_codes(self, descriptions, chromas=None, prompt=None, duration=None, seeds=None,
                     **settings):
        """Descriptions and chromas ((M, Q) or None each) -> iterator of codes (B, K, t), see `stream_window`.

        prompt: codes (B, K, T0) to continue, which come first. seeds: a number an item, which in float32
        gives it the same music alone and in a batch. settings: those of `Settings`, None and missing ones as
        in the configuration. Raises UserError for what cannot be done.
        """
        descriptions = as_descriptions(descriptions)
        config = self.config
        descriptions = [read_as_known(config, text)[0] for text in descriptions]
        B = len(descriptions)
        chromas = [None] * B if chromas is None else chromas
        duration = config.segment_duration if duration is None else duration
        seeds = range(config.seed, config.seed + B) if seeds is None else seeds
        given = {name: value for name, value in settings.items() if value is not None}
        settings = self.settings._replace(**given)
        if prompt is None:
            prompt = torch.empty(B, config.n_q, 0, dtype=torch.long)

        if len(chromas) != B or len(seeds) != B:
            raise UserError(f"{B} descriptions need as many melodies and seeds, not {len(chromas)} and "
                            f"{len(seeds)}")
        if not 0 < duration <= self.MAX_DURATION:
            raise UserError(f"duration {duration} s: must be more than 0 and at most "
                            f"{self.MAX_DURATION:.0f} s")
        if not (settings.temperature >= 0 and settings.top_k >= 0 and 0 <= settings.top_p <= 1):
            raise UserError(f"temperature {settings.temperature} and top_k {settings.top_k} must not be "
                            f"negative, top_p {settings.top_p} within 0 and 1")
        if not abs(settings.guidance) <= 1000:
            raise UserError(f"guidance {settings.guidance}: must lie between -1000 and 1000; 3 is usual")
        if config.melody == "none" and any(chroma is not None for chroma in chromas):
            raise UserError("this model was trained on text only and takes no melody; use a melody model or "
                            "leave it out")
        if prompt.shape[:2] != (B, config.n_q):
            raise UserError(f"prompt: must be codes ({B}, {config.n_q}, T0), not {tuple(prompt.shape)}")
        T = self.frames(duration)
        if prompt.shape[-1] >= T:
            raise UserError(f"the duration {duration} s includes the prompt, which is as long or longer; "
                            f"ask for more")
        return self.stream_windows(descriptions, chromas, prompt, T, seeds, settings)

    @inference_steps
    def stream_windows(self, descriptions, chromas, prompt, T, seeds, settings):
        """The prompt, then window by window the codes that it is continued with up to T frames."""
        longest = self.frames(self.config.segment_duration)
        stride = self.frames(self.config.extend_stride)
        codes = prompt.to(self.lm.emb.weight.device)
        yield codes
        for n, (start, known, end) in enumerate(windows(T, prompt.shape[-1], longest, stride)):
            before = codes.shape[-1] - known + start
            codes = codes[..., before:]         # what is before the window is not needed any more
            conditions = self.window_conditions(descriptions, chromas, start)
            passes = condition_passes(self.lm, conditions, end - start, settings.guidance, settings.two_step)
            window_seeds = [seed + 1_000_003 * n for seed in seeds]     # far from those of other items
            for new in stream_window(self.lm, passes, end - start, window_seeds, codes, settings):
                codes = torch.cat([codes, new], dim=-1)
                yield new.clone()               # not of inference mode: callers may change it

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
    """Yields (start, known, end), in frames, of the windows of T frames: what is before `known` is prompt."""
    overlap = max(0, longest - stride)
    while known < T:
        start = 0 if known < longest else known - overlap
        end = min(T, start + longest)
        yield start, known, end
        known = end


def condition_passes(lm, conditions, T, guidance=3.0, two_step=False):
    """The conditions of the forward passes that each column of `generate` takes, for T frames.

    One batch of 2B: the items, then the same without text and melody, each keeping its number of frames.
    With two_step two batches of B, where the null text is a single frame. Where both are the same, with
    guidance 1 or without any text and melody, the items alone.
    """
    S = lm.pattern.steps(T)
    values = itertools.chain(*conditions.values())
    given = any(value is not None for value in values)
    if guidance == 1 or not given:
        return [lm.conditioner(conditions, S)]
    if two_step:
        nothing = {name: [None] * len(values) for name, values in conditions.items()}
        return [lm.conditioner(conditions, S), lm.conditioner(nothing, S)]
    return [lm.conditioner(conditions, S, guidance=True)]


def generate(lm, passes, T, seeds, prompt=None, **settings):
    """Codes (B, K, T), one item per seed: the prompt, and what `stream_window` continues it with."""
    if prompt is None:
        prompt = torch.empty(len(seeds), lm.config.n_q, 0, dtype=torch.long)
    prompt = prompt.to(lm.emb.weight.device)
    settings = Settings(**settings)
    new = stream_window(lm, passes, T, seeds, prompt, settings)
    return torch.cat([prompt, *new], dim=-1)


@torch.inference_mode()
def stream_window(lm, passes, T, seeds, prompt, settings):
    """Continues a prompt (B, K, T0), which may be empty, to T frames, under `condition_passes`.

    After each column it yields the codes (B, K, t) of the frames that are whole now: none or one, mostly.
    """
    guidance, temperature, top_k, top_p, _ = settings
    B, K, T0 = prompt.shape
    rows = max(B, passes[0].batch)
    if rows not in (B, 2 * B):
        raise ValueError(f"{rows} conditions for {B} items")
    codes = F.pad(prompt, (0, T - T0), value=-1)                            # -1: not known yet
    sequence, real = lm.pattern.build(codes, lm.special)                    # (B, K, S), (K, S)
    S = sequence.shape[-1]
    uniform = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        uniform.append(torch.rand(S, K, generator=generator))
    uniform = torch.stack(uniform).to(prompt.device)                        # (B, S, K)
    caches = [lm.new_cache(rows, S + conditions.prefix_length) for conditions in passes]

    whole = lm.pattern.whole_frames(T)
    done = T0
    previous = 0
    for s in range(max(1, lm.pattern.first_step(T, T0)), S):
        columns = sequence[..., previous:s]
        columns = columns.repeat(rows // B, 1, 1)
        logits = []
        for conditions, cache in zip(passes, caches):
            predictions = lm(columns, conditions, cache)
            logits.append(predictions[:, :, -1])
        logits = torch.cat(logits)                                          # (B or 2B, K, V)
        if len(logits) == 2 * B:
            conditional, null = logits.float().chunk(2)
            logits = guide(conditional, null, guidance)
        new = draw(logits, uniform[:, s], temperature, top_k, top_p)        # (B, K)
        new = torch.where(real[:, s], new, lm.special)      # cells of the pattern without a code stay special
        known = sequence[..., s]
        sequence[..., s] = torch.where(known == -1, new, known)
        previous = s
        frames = slice(done, whole[s])
        codes, _ = lm.pattern.revert(sequence, T, lm.special, frames=frames)
        yield codes
        done = max(done, whole[s])


def regroup(pieces, size, first):
    """Consecutive pieces (..., any length) -> pieces of length `size`, but for the first and the last one."""
    held = None
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], dim=-1)
        while held.shape[-1] >= first:
            yield held[..., :first]
            held, first = held[..., first:], size
    if held is not None and held.shape[-1]:
        yield held


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
