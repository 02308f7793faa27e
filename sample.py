"""Sampling: text and a melody in, music out.

    python sample.py --text "a slow flute tune" --melody assets/ode_to_joy.wav
    python sample.py --text "calm organ" --text "fast violin with drums" --duration 12 --seed 7
    python sample.py --checkpoint facebook/musicgen-melody --text "80s driving pop song" --melody tune.mp3
    python sample.py --text "a flute tune" --prompt recording.ogg --duration 20      # continues the recording
    python sample.py --text "a flute tune" --page DIR                                # and a page to listen to it
    python sample.py --checkpoint out/mine --export_hf DIR                           # for transformers

The life of a sample (`MusicGen.generate`):

    melody wav --separate, ChromaExtractor--> chroma (M, 12)     text ----------.
    condition_passes(texts, chroma) ---------> Conditions of 2B rows: with the conditions, and without
    lm.generate(...), window by window ------> codes (B, K, T)   one column of the delay pattern per step
    codec.decode(codes) ---------------------> wav (B, C, L)     written beside a JSON that reproduces it
"""
import argparse
import dataclasses
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints.files import open_checkpoint
from checkpoints.precision import has_bfloat16, pick_dtype, quicken
from conditioners import Conditions
from config import Parser, UserError, pick_device, run, write_atomic
from data.audio import FORMATS, read_audio, write_audio
from data.page import page_path, write_page
from encodec import EncodecModel
from lm import Cache, LMModel, condition_passes, generate

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8,
          "auto": None}
MAX_DURATION = 3600.0   # s; a guard against --duration 1e9, not a limit of the method


class MusicGen:
    """A language model with its codec: `MusicGen.from_pretrained(X).generate([...])`."""

    def __init__(self, lm: LMModel, codec: EncodecModel):
        self.lm, self.codec, self.config = lm.eval(), codec.eval(), lm.config
        per_channel = self.config.n_q // (2 if self.stereo else 1)
        if codec.num_codebooks < per_channel or codec.cardinality != self.config.card:
            raise UserError(f"the language model speaks {per_channel} codebooks of {self.config.card} entries, its "
                            f"codec {codec.num_codebooks} of {codec.cardinality}; set codec = to the one it was "
                            f"trained with")

    @property
    def stereo(self) -> bool:
        """Stereo by two interleaved streams of a mono codec."""
        return self.config.channels == 2 and self.codec.channels == 1

    @property
    def sample_rate(self) -> int:
        return self.codec.sample_rate

    @property
    def frame_rate(self) -> float:
        return self.codec.frame_rate

    @classmethod
    def from_pretrained(cls, name_or_dir, device: str = "auto", dtype: str = "float32",
                        compile: bool = False) -> "MusicGen":
        """Loads our directory, a transformers directory or hub id, or a directory in the original's format.

        dtype: of the language model's weights, "float32", "bfloat16", "float16", "int8" (on the CPU) or "auto", the
        fastest for the device; the codec stays in float32, but for its decoder on a CPU that computes in bfloat16.
        compile: the layers by torch.compile, but where kernels.c, compiled as it is, serves them.
        Raises UserError naming what is missing or does not fit.
        """
        # oneDNN, and torch beside it, keep code and buffers for up to 1,024 lengths: memory would grow for hours
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(cache, "16")
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
        device, directory = pick_device(device), open_checkpoint(name_or_dir)
        dtype = pick_dtype(dtype, device)
        if dtype == "int8" and device.type != "cpu":
            raise UserError(f"dtype 'int8' is for the CPU; on {device.type} take bfloat16 or float16")
        lm = LMModel.from_pretrained(directory, DTYPES[dtype]).to(device)
        if device.type == "cpu" and dtype != "float16":
            quicken(lm)
        if compile and lm.cache is Cache:
            lm.compile_layers()
        codec = load_codec(directory, lm).fold()
        if dtype in ("bfloat16", "int8") and device.type == "cpu" and has_bfloat16():
            codec.decoder.bfloat16()
        # the codec's convolutions and nearest-neighbour search are not to be trusted on mps; it is a small part
        return cls(lm, codec.to("cpu" if device.type == "mps" else device))

    def save(self, directory, compact: bool = False):
        """Writes a directory that from_pretrained reads, codec included. compact: int8 matrices, float16 the rest."""
        self.codec.save(Path(directory) / "codec", compact)
        self.lm.save(directory, compact)

    # --- conditions ---------------------------------------------------------------------------------------------

    def melody_chroma(self, melody, sample_rate: int | None = None, stem: str | None = None) -> torch.Tensor:
        """Melody wave (L,) or (C, L) of any rate -> chroma (M, Q) of its separated stem, however long it is."""
        from chroma import ChromaExtractor, separate
        wav = torch.as_tensor(melody).detach().float().cpu()
        wav = wav[None] if wav.dim() == 1 else wav
        if wav.dim() != 2 or not wav.numel() or not wav.isfinite().all():
            raise UserError(f"a melody must be a non-empty wave (C, L) of finite numbers, not {tuple(wav.shape)}")
        wav = resample(wav, sample_rate or self.sample_rate, self.sample_rate)
        config = self.config
        wav = separate(wav, self.sample_rate, stem or config.stem)                      # (1, L)
        extract = ChromaExtractor(self.sample_rate, config.n_chroma, config.radix2_exp, config.argmax)
        return extract(wav)[0]

    def _window(self, chromas, start: int):
        """The M chroma frames that belong to music from code frame `start` on: chroma (B, M, Q), has_melody (B,)."""
        from chroma import match_length
        if self.lm.conditioner.melody is None or all(c is None for c in chromas):
            return None, None
        M, first = self.config.chroma_frames, round(start * self.config.stride / self.config.hop)
        nothing = torch.zeros(1, M, self.config.n_chroma)
        rows = [nothing if c is None else match_length(c[None], M, first) for c in chromas]
        return torch.cat(rows), torch.tensor([c is not None for c in chromas])

    # --- generation ------------------------------------------------------------------------------------------------

    def generate(self, descriptions, melodies=None, melody_sample_rate=None, prompt=None, prompt_sample_rate=None,
                 duration=None, **settings) -> torch.Tensor:
        """Descriptions (strings or None) and melodies -> wav (B, C, L) of `duration` seconds.

        melodies: one wave (C, L) or None per description, or a tensor (B, C, L), at melody_sample_rate (default:
        the model's). prompt: wave (C, L) or (B, C, L) which the result begins with and continues; the duration
        includes it. settings: see `generate_codes`. Raises UserError for what cannot be done.
        """
        if prompt is not None:
            prompt = self.encode_prompt(prompt, prompt_sample_rate, len(descriptions))
        chromas = None if melodies is None else [
            None if m is None else self.melody_chroma(m, melody_sample_rate) for m in melodies]
        codes = self.generate_codes(descriptions, chromas, prompt, duration, **settings)
        return self.decode(codes, duration)

    def encode_prompt(self, prompt, sample_rate: int | None, batch: int) -> torch.Tensor:
        """A wave to continue -> its codes (B, K, T0), whole frames only."""
        wav = torch.as_tensor(prompt).detach().float()
        wav = wav[None] if wav.dim() == 1 else wav                                      # (C, L) or (B, C, L)
        wav = resample(wav.cpu(), sample_rate or self.sample_rate, self.sample_rate)
        wav = wav[None].expand(batch, -1, -1) if wav.dim() == 2 else wav                # (B, C, L)
        C = self.config.channels
        wav = wav.mean(1, keepdim=True) if C == 1 else wav.expand(-1, C, -1) if wav.shape[1] == 1 else wav[:, :C]
        whole = wav.shape[-1] // self.config.stride * self.config.stride
        if not whole:
            raise UserError(f"the prompt is shorter than one frame of {1 / self.frame_rate:.3f} s; give a longer one")
        with torch.inference_mode():
            return self.codec.encode(wav[..., :whole].to(device_of(self.codec)))[:, :self.config.n_q]

    def generate_codes(self, descriptions, chromas=None, prompt=None, duration=None, seeds=None, guidance=None,
                       two_step=False, temperature=None, top_k=None, top_p=None, progress=False,
                       interrupted=()) -> torch.Tensor:
        """Descriptions and chromas ((M, Q) or None each) -> codes (B, K, T).

        Beyond the training length the window moves on by `extend_stride` seconds and continues its own codes; the
        melody moves with it. prompt: codes (B, K, T0). seeds: one number an item (default: the configuration's
        seed and the ones after it); the same seed gives an item the same music, alone or in a batch. `interrupted`
        turns true when it is to end with the frames that are whole.
        """
        config, B = self.config, len(descriptions)
        duration = config.segment_duration if duration is None else duration
        guidance = config.cfg_coef if guidance is None else guidance
        temperature = config.temperature if temperature is None else temperature
        top_k, top_p = config.top_k if top_k is None else top_k, config.top_p if top_p is None else top_p
        seeds = [config.seed + i for i in range(B)] if seeds is None else seeds
        chromas = [None] * B if chromas is None else chromas
        if not B:
            raise UserError("nothing to generate: give at least one description (None for none)")
        if len(chromas) != B or len(seeds) != B:
            raise UserError(f"{B} descriptions need as many melodies and seeds, not {len(chromas)} and {len(seeds)}")
        if not 0 < duration <= MAX_DURATION:
            raise UserError(f"duration {duration} s: must be more than 0 and at most {MAX_DURATION:.0f} s")
        if not (temperature >= 0 and top_k >= 0 and 0 <= top_p <= 1):
            raise UserError(f"temperature {temperature} and top_k {top_k} must not be negative, top_p {top_p} within 0 "
                            f"and 1")
        if not abs(guidance) <= 1000:
            raise UserError(f"guidance {guidance}: must lie between -1000 and 1000; 3 is usual")
        if any(c is not None for c in chromas) and self.lm.conditioner.melody is None:
            raise UserError("this model was trained on text only and takes no melody; use a melody model or leave it "
                            "out")

        T = max(1, round(duration * self.frame_rate))
        longest = round(config.segment_duration * self.frame_rate)
        overlap = longest - max(1, min(longest, round(config.extend_stride * self.frame_rate)))
        late = config.melody_delay * max(0, guidance - 1) * self.frame_rate
        done = torch.empty(B, config.n_q, 0, dtype=torch.long) if prompt is None else prompt.cpu()
        if done.shape[-1] >= T:
            raise UserError(f"the duration {duration} s includes the prompt, which is as long or longer; ask for more")
        with tqdm(total=T - done.shape[-1], unit="frame", disable=not progress, desc="sampling") as bar:
            for window in range(T):
                p = done.shape[-1]
                if p >= T or interrupted:
                    break
                start = 0 if p < longest else p - overlap
                end = min(T, start + longest)
                passes = condition_passes(self.lm, descriptions, end - start, *self._window(chromas, start), guidance,
                                          two_step)
                begun = p - (T - bar.total)
                passes = [told_late(conditions, late) for conditions in passes]

                def show(step, steps):      # a window has a few steps more than frames: the delays
                    bar.update(begun + min(step, end - p) - bar.n)
                    return bool(interrupted)
                codes = generate(self.lm, passes, end - start, [seed + 1_000_003 * window for seed in seeds],
                                 done[..., start:] if p > start else None, guidance, temperature, top_k, top_p, show)
                codes = codes[..., p - start:].cpu()
                whole = int((codes >= 0).all(1).all(0).cumprod(0).sum())    # all of them, unless interrupted
                done = torch.cat([done, codes[..., :whole]], dim=-1)
        return done

    @torch.inference_mode()
    def decode(self, codes, duration: float | None = None) -> torch.Tensor:
        """Codes (B, K, T) -> wav (B, C, L), cut to `duration` seconds."""
        wav = self.codec.decode(codes.to(device_of(self.codec))).float().cpu()
        return wav if duration is None else wav[..., :max(1, round(duration * self.sample_rate))]


def told_late(conditions: Conditions, steps: float) -> Conditions:
    """Conditions whose melody frames have the times of music `steps` later (ours).

    Guidance raises to a power by how much likelier the melody makes it that a note begins now, again at every step
    while one is due: notes begin early, the more so the higher it is. Where melody frames have times that can be put
    right.
    """
    time = conditions.prefix_time                   # (P,), of text below 0
    return conditions if time is None else conditions._replace(prefix_time=torch.where(time >= 0, time + steps, time))


def load_codec(name_or_dir, lm: LMModel) -> EncodecModel:
    """The codec inside a model's directory, else the one that its configuration names."""
    inside = open_checkpoint(name_or_dir) / "codec"
    return EncodecModel.from_pretrained(inside if inside.is_dir() else lm.config.codec)


def device_of(module) -> torch.device:
    return next(module.parameters()).device


def resample(wav: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Wave (..., L) from rate old to rate new."""
    if old == new:
        return wav
    from math import gcd
    from scipy.signal import resample_poly
    divisor = gcd(int(old), int(new))
    return torch.from_numpy(resample_poly(wav.numpy(), new // divisor, old // divisor, axis=-1).copy()).float()


# --- the command line ------------------------------------------------------------------------------------------------

def seconds(text: str) -> float:
    if not 0 < float(text) <= MAX_DURATION:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0 and at most {MAX_DURATION:.0f} s")
    return float(text)


def seed(text: str) -> int:
    if not 0 <= int(text) < 2 ** 62:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more, and below 2 ** 62")
    return int(text)


def parse(argv):
    parser = Parser(description="Text and a melody in, music out.", allow_abbrev=False)
    add = parser.add_argument
    add("--text", action="append", metavar="TEXT", help="what to play; several make a batch")
    add("--melody", action="append", metavar="FILE",
        help="melody to follow: one for all texts, or one for each ('' for none)")
    add("--checkpoint", default=str(DEFAULT_CHECKPOINT), metavar="X",
        help="directory or Hugging Face id (default: the shipped model)")
    add("--out", metavar="FILE", help="wav, flac, ogg or mp3 (default: samples/TEXT.wav); a batch is numbered")
    add("--duration", type=seconds, default=10.0, metavar="S", help="seconds, a prompt included (default 10)")
    add("--prompt", metavar="FILE", help="recording to continue")
    add("--continue_from", metavar="FILE", help="codes of a take (--save_codes) to continue")
    add("--save_codes", action="store_true", help="write the codes beside the audio, as .npz")
    add("--seed", type=seed, default=None, metavar="N", help="of the first item; the next ones count up (default: 0)")
    add("--guidance", type=float, metavar="G", help="classifier-free guidance (default: the model's, 3.0)")
    add("--two_step", action="store_true", help="guidance by two passes, the null text unpadded")
    add("--temperature", type=float, metavar="T", help="default 1.0; 0 is greedy")
    add("--top_k", type=int, metavar="K", help="default 250; 0 is all entries")
    add("--top_p", type=float, metavar="P", help="default 0, off")
    add("--stem", choices=("auto", "none", "hpss", "demucs"), help="how the melody is separated from its recording")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="float32", choices=list(DTYPES), help="of the language model's weights")
    add("--page", metavar="DIR", help="also write DIR/index.html, a page to listen to the results")
    add("--compile", action="store_true",
        help="torch.compile the layers, but on a CPU with a C compiler, where kernels.c is faster")
    add("--overwrite", action="store_true", help="replace an existing --out or --page")
    add("--keep_partial", action="store_true", help="Ctrl-C ends with what is finished, not with nothing")
    add("--export", metavar="DIR", help="write the checkpoint small, as it is shipped (int8 and float16), and stop")
    add("--export_hf", metavar="DIR", help="write the checkpoint for transformers, and stop")
    return parser.parse_args(argv)


def main(argv):
    """The command line, thin over MusicGen."""
    args = parse(argv)
    if args.export or args.export_hf:
        from checkpoints.formats import export_transformers
        lm = LMModel.from_pretrained(args.checkpoint)
        codec = load_codec(args.checkpoint, lm)
        if args.export:
            MusicGen(lm, codec).save(args.export, compact=True)
        if args.export_hf:
            export_transformers(lm, codec, args.export_hf)
        print(args.export or args.export_hf)
        return
    texts = [text or None for text in args.text or [None]]
    melodies = [path or None for path in args.melody or [None]]
    if len(texts) == 1 and len(melodies) > 1:
        texts *= len(melodies)
    if len(melodies) == 1:
        melodies *= len(texts)
    if len(melodies) != len(texts):
        raise UserError(f"{len(melodies)} --melody for {len(texts)} --text: give one for all, or one for each")
    if args.prompt and args.continue_from:
        raise UserError("--prompt and --continue_from: give one of the two")
    seeds = [(args.seed or 0) + i for i in range(len(texts))]
    outs, page = output_names(args, texts), args.page and page_path(args.page, args.overwrite)

    model = MusicGen.from_pretrained(args.checkpoint, args.device, args.dtype, args.compile)
    if any(melodies) and model.lm.conditioner.melody is None:
        raise UserError(f"{args.checkpoint} was trained on text only; leave out --melody, or take a melody model")
    heard = args.duration + model.config.segment_duration + 10   # of a recording of hours, no more than can matter
    chroma = {path: model.melody_chroma(read_audio(path, model.sample_rate, 1, duration=heard), stem=args.stem)
              for path in set(melodies) if path}
    prompt = None
    if args.prompt:
        wav = read_audio(args.prompt, model.sample_rate, model.config.channels, duration=heard)
        prompt = model.encode_prompt(wav, None, len(texts))
    elif args.continue_from:
        prompt = read_codes(args.continue_from, model.config).expand(len(texts), -1, -1)
    interrupted = []

    def ask_to_stop(number, frame):
        interrupted.append(number)
        signal.signal(number, signal.default_int_handler)   # the second Ctrl-C ends it at once
    if args.keep_partial:
        signal.signal(signal.SIGINT, ask_to_stop)
    codes = model.generate_codes(texts, [path and chroma[path] for path in melodies], prompt, args.duration, seeds,
                                 args.guidance, args.two_step, args.temperature, args.top_k, args.top_p,
                                 progress=True, interrupted=interrupted)
    if not codes.shape[-1]:
        raise UserError("interrupted before the first frame was whole: nothing is written")
    wav = model.decode(codes, args.duration)
    for i, out in enumerate(outs):
        write_audio(out, wav[i], model.sample_rate)
        if args.save_codes:
            write_codes(out.with_suffix(".npz"), codes[i])
        told = describe(args, texts[i], melodies[i], seeds[i], out, model.config)
        write_atomic(out.with_suffix(".json"), told.encode())
        print(out)
    if page:
        write_page(page, outs, "python sample.py " + shlex.join(argv))
        print(page)
    if interrupted:
        print(f"interrupted: the first {wav.shape[-1] / model.sample_rate:.2f} s are written", file=sys.stderr)
        sys.exit(130)


def output_names(args, texts) -> list[Path]:
    """Where each item goes. A name made here never meets an existing file; one that was given must be free."""
    if args.out:
        out = Path(args.out)
        outs = [out] if len(texts) == 1 else [out.with_name(f"{out.stem}_{i}{out.suffix}") for i in range(len(texts))]
        if out.suffix.lower() not in FORMATS:
            raise UserError(f"--out {out}: the ending tells the format, one of {' '.join(FORMATS)}")
        taken = [path for o in outs for path in written(o, args) if os.path.lexists(path)]
        if taken and not args.overwrite:
            raise UserError(f"--out {out}: {taken[0]} exists; choose another name or add --overwrite")
        return outs
    outs = []

    def free(out):
        return out not in outs and not any(map(os.path.lexists, written(out, args)))
    for text in texts:
        stem = re.sub(r"[^\w-]+", "_", text or "music")[:60].strip("_") or "music"
        names = (Path("samples") / f"{stem}{f'_{n}' if n else ''}.wav" for n in range(10 ** 6))
        outs.append(next(filter(free, names)))
    return outs


def written(out: Path, args) -> list[Path]:
    """All files that an item makes."""
    return [out, out.with_suffix(".json")] + [out.with_suffix(".npz")] * args.save_codes


def describe(args, text, melody, seed, out, config) -> str:
    """The JSON beside a result: what was asked for, with what settings, and the command that does it again."""
    apart = ("text", "melody", "seed", "out", "page", "overwrite", "keep_partial")
    given = {k: v for k, v in vars(args).items() if v is not None and v is not False and k not in apart}
    item = {name: value for name, value in (("text", text), ("melody", melody)) if value}
    flags = {**item, **given, "seed": seed, "out": str(out)}
    said = {k: v for k, v in flags.items() if (k, v) != ("checkpoint", str(DEFAULT_CHECKPOINT))}
    command = [w for k, v in said.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    used = {name: given.get(name, getattr(config, key)) for name, key in (
        ("guidance", "cfg_coef"), ("temperature", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"))}
    told = {**flags, "settings": used, "torch": torch.__version__, "command": "python sample.py " + shlex.join(command),
            "config": dataclasses.asdict(config)}
    return json.dumps(told, indent=1) + "\n"


def write_codes(path, codes: torch.Tensor):
    """Codes (K, T) as .npz, from which a take can be continued."""
    import io
    import numpy as np
    buffer = io.BytesIO()
    np.savez_compressed(buffer, codes=codes.numpy().astype(np.uint16))
    write_atomic(path, buffer.getvalue())


def read_codes(path, config) -> torch.Tensor:
    """Codes (1, K, T) from a file of --save_codes. Raises UserError when it is none of this model's."""
    import numpy as np
    import zipfile
    try:
        with zipfile.ZipFile(path) as file:     # a small archive can unpack to anything
            assert sum(info.file_size for info in file.infolist()) < 2 ** 28, "it claims more than 256 MB"
        with np.load(path, allow_pickle=False) as file:
            assert file["codes"].dtype.kind in "iu", "its codes are no integers"
            codes = torch.from_numpy(file["codes"].astype(np.int64))
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise UserError(f"--continue_from {path}: not a file of --save_codes ({str(error)[:100]})") from None
    shaped = codes.dim() == 2 and len(codes) == config.n_q and codes.numel() > 0
    if not (shaped and 0 <= codes.min() <= codes.max() < config.card):
        raise UserError(f"--continue_from {path}: codes {tuple(codes.shape)} are not {config.n_q} codebooks of "
                        f"{config.card} entries")
    return codes[None]


if __name__ == "__main__":
    run(main, sys.argv[1:])
