"""The command line of sample.py: flags, checks before the slow part begins, and the files of the results.

    python sample.py --help

sample.py hands its class MusicGen over. If it were imported here, that file would be loaded twice: as
`__main__` and as `sample`.
"""
import argparse
import contextlib
import shlex
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from checkpoints.files import is_audiocraft, open_checkpoint
from checkpoints.lm_formats import export_transformers, read_config
from config import FIELDS
from data.audio import check_format, check_recording, read_audio, write_audio
from data.scores import is_notes
from data.vocabulary import read_as_known, unknown_words
from lm import LMModel
from sampling.live import check_live, live_outputs
from sampling.loading import DTYPES, codec_of
from sampling.loops import lead_of, make_loop
from sampling.melodies import flags_alone, notes_of, read_melodies, resolve_duration
from sampling.takes import (DEFAULT_CHECKPOINT, files_of, metadata, output_names, read_codes, tags_of,
                            write_codes)
from system.command import Parser
from system.errors import UserError, naming
from system.files import check_writable, write_atomic

PORT = 7860     # of --serve
LIVE_CHUNK, FILE_CHUNK = 0.5, 3.0      # s that are decoded at once: to be heard soon, and with less overlap


# --- flags ------------------------------------------------------------------------------------------------

def seed(text: str) -> int:
    """The type of --seed."""
    if not 0 <= int(text) < 2 ** 62:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more, and below 2 ** 62")
    return int(text)


def start(text: str) -> float:
    """The type of --prompt_from."""
    if not 0 <= float(text) < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 s or more, and below 1e6")
    return float(text)


def count(text: str) -> int:
    """The type of --bars."""
    if not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text}: must be from 1 to 10,000")
    return int(text)


def port(text: str) -> int:
    """The type of --serve."""
    if not 0 <= int(text) < 2 ** 16:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 (any that is free) to 65535")
    return int(text)


def parse(MusicGen, argv):
    """The flags in argv. The class MusicGen knows the dtypes and the longest duration. Raises UserError."""
    def seconds(text: str) -> float:
        longest = MusicGen.MAX_DURATION
        if not 0 < float(text) <= longest:
            raise argparse.ArgumentTypeError(f"{text}: must be more than 0 and at most {longest:.0f} s")
        return float(text)

    parser = Parser(description="Text and a melody in, music out.", allow_abbrev=False)
    add = parser.add_argument
    add("--text", action="append", metavar="TEXT", help="what to play; several make a batch")
    add("--melody", action="append", metavar="FILE",
        help="melody to follow, a recording or notes (.abc .mid .musicxml .mxl): one for all texts, or one "
             "for each ('' for none)")
    add("--notes", action="append", metavar="NOTES",
        help="melody to follow as notes: 'e2 e2 f2 g2 | g2 f2 e2 d2', in eighths; see docs/sampling.md")
    add("--bpm", type=float, metavar="N", help="beats a minute of the notes (default: the file's, or 120)")
    add("--meter", metavar="N/N", help="of --notes and --bars (default: 4/4)")
    add("--checkpoint", default=str(DEFAULT_CHECKPOINT), metavar="X",
        help="directory or Hugging Face id (default: the shipped model)")
    add("--out", metavar="FILE",
        help="wav, flac, ogg or mp3 (default: samples/TEXT.wav); a batch is numbered; - is a WAV to stdout, "
             "as it is made")
    add("--raw", action="store_true", help="with --out -: float32 samples (little-endian) without a header")
    add("--play", action="store_true", help="also play it while it is made (package sounddevice)")
    add("--duration", type=seconds, metavar="S", help="seconds, a prompt included (default 10)")
    add("--bars", type=count, metavar="N", help="the duration in bars, of --bpm or of the notes")
    add("--loop", action="store_true",
        help="music that repeats without a seam; whole bars where there are any")
    add("--prompt", metavar="FILE", help="recording to continue")
    add("--prompt_from", type=start, metavar="S", help="where the prompt begins in its file (default: 0)")
    add("--prompt_seconds", type=seconds, metavar="S", help="seconds of the prompt (default: all)")
    add("--continue_from", metavar="FILE", help="codes of a take (--save_codes) to continue")
    add("--save_codes", action="store_true", help="write the codes beside the audio, as .npz")
    add("--seed", type=seed, metavar="N", help="of the first item; the next ones count up (default: 0)")
    add("--guidance", type=float, metavar="G", help="classifier-free guidance (default: the model's, 3.0)")
    add("--two_step", action="store_true", help="guidance by two passes, the null text unpadded")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's, 1.0)")
    add("--top_k", type=int, metavar="K",
        help="choose from the K likeliest entries; 0 is all (default: the model's, 250)")
    add("--top_p", type=float, metavar="P",
        help="above 0: choose from the likeliest that add up to P, without --top_k (default: the model's, 0)")
    add("--stem", choices=FIELDS["stem"].metadata["choices"],
        help="how the melody is separated from its recording")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="float32", choices=list(DTYPES), help="of the language model's weights")
    add("--page", metavar="DIR", help="also write DIR/index.html, a page to listen to the results")
    add("--compile", action="store_true",
        help="torch.compile the layers, but on a CPU with a C compiler, where kernels.c is faster")
    add("--overwrite", action="store_true", help="replace an existing --out or --page")
    add("--keep_partial", action="store_true", help="Ctrl-C ends with what is finished, not with nothing")
    add("--no_tags", action="store_true", help="write no title, model and seed into the audio files")
    add("--serve", type=port, nargs="?", const=PORT, metavar="PORT",
        help=f"a page to hum into, for this machine alone (default port {PORT})")
    add("--export", metavar="DIR",
        help="write the checkpoint small, as it is shipped (int8 and float16), and stop")
    add("--export_hf", metavar="DIR", help="write the checkpoint for transformers, and stop")
    return parser.parse_args(argv)


# --- what they ask for ------------------------------------------------------------------------------------

def main(MusicGen, argv):
    """What `python sample.py` does with its arguments: cheap checks first, then the model, then the files."""
    args = parse(MusicGen, argv)
    if args.export or args.export_hf:
        return export(MusicGen, args)
    if args.serve is not None:
        return serve_page(MusicGen, args)
    check_together(args)
    texts, melodies = pair(args.text, args.melody or args.notes)
    nothing = [None] * len(melodies)
    typed, files = (melodies, nothing) if args.notes else (nothing, melodies)
    notes = [notes_of(*item, args.bpm, args.meter) for item in zip(typed, files)]
    resolve_duration(args, notes, MusicGen.MAX_DURATION)
    seeds = [(args.seed or 0) + i for i in range(len(texts))]
    check_live(args, len(texts))
    outs = output_names(args, texts)
    if args.page:
        from tools.page import page_path, write_page
        page = page_path(args.page, args.overwrite)
        check_writable(page)
    check_files(args, melodies, outs)

    with contextlib.ExitStack() as stack:
        stdout = sys.stdout
        if args.out == "-":     # nothing but sound goes there
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        model = MusicGen.from_pretrained(args.checkpoint, args.device, args.dtype, args.compile)
        tell_unknown_words(model.config, args.checkpoint, texts)
        lead = lead_of(args.duration, model.sample_rate / model.config.hop) if args.loop else 0.0
        chromas = read_melodies(model, args, melodies, notes, lead)
        prompt = read_prompt(model, args, len(texts))
        live = [stack.enter_context(output) for output in live_outputs(args, model, stdout)]
        interrupted = catch_interrupt() if args.keep_partial else []
        take = make(model, args, texts, chromas, prompt, seeds, lead, live, interrupted)
        if outs:
            write_results(model, args, take, outs, texts, melodies, notes, seeds)
        if args.page:
            write_page(page, outs, "python sample.py " + shlex.join(argv))
            print(page)
        if interrupted:
            print(f"interrupted: the first {take.seconds:.2f} s are written", file=sys.stderr)
            sys.exit(130)
        signal.signal(signal.SIGINT, signal.default_int_handler)    # all is there: playing may be cut short


class Take(NamedTuple):
    """What has been made; codes and waves only where files are to be written."""
    seconds: float
    codes: torch.Tensor | None      # (B, K, T)
    wav: torch.Tensor | None        # (B, C, L)


def make(model, args, texts, chromas, prompt, seeds, lead: float, live: list, interrupted: list) -> Take:
    """Makes what the flags ask for, with a bar; `live` is given the waves as they come.

    Ends early, with what is whole, once `interrupted` holds something. Raises UserError if that is nothing.
    """
    duration = exact = lead + args.duration
    if args.bars or args.loop:      # these are exact: no frame less, where they end within one
        duration += 1 / model.frame_rate
    codes = model.stream_codes(texts, chromas, prompt, duration, seeds, guidance=args.guidance,
                               temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                               two_step=args.two_step)
    to_file = args.out != "-"       # else memory need not hold what is gone
    made, waves, samples = [], [], 0
    with tqdm(total=model.frames(duration), unit="frame", desc="sampling") as bar:
        def noted():
            for new in codes:
                bar.update(new.shape[-1])
                if to_file:
                    made.append(new)        # .cpu() would wait for the device, once a frame
                yield new
                if interrupted:
                    return
        for wav in model.decode_stream(noted(), exact, LIVE_CHUNK if live else FILE_CHUNK):
            for output in live:
                output.write(wav[0])
            if to_file:
                waves.append(wav)
            samples += wav.shape[-1]
    if not samples:
        raise UserError("interrupted before the first frame was whole: nothing is written")
    seconds = samples / model.sample_rate
    if not to_file:
        return Take(seconds, None, None)
    wav = torch.cat(waves, dim=-1)
    if args.loop:
        wav = torch.stack([make_loop(item, model.sample_rate, lead, args.duration)[0] for item in wav])
    return Take(seconds, torch.cat(made, dim=-1).cpu(), wav)


def write_results(model, args, take: Take, outs, texts, melodies, notes, seeds):
    """Writes the files of each item, audio, codes and JSON, and prints the names."""
    for i, out in enumerate(outs):
        write_audio(out, take.wav[i], model.sample_rate, tags_of(args, texts[i], seeds[i]))
        if args.save_codes:
            write_codes(out.with_suffix(".npz"), take.codes[i])
        flags = flags_alone(args, notes[i], notes)
        about = metadata(flags, texts[i], melodies[i], seeds[i], out, model.config)
        write_atomic(out.with_suffix(".json"), about.encode())
        print(out)


def serve_page(MusicGen, args):
    """--serve: the page asks what to play; the command line says which model plays it."""
    check_alone(MusicGen, args, "serve", "checkpoint", "device", "dtype", "compile")
    from tools.server import serve
    loading = {"checkpoint": args.checkpoint, "device": args.device, "dtype": args.dtype,
               "compile": args.compile}
    serve(MusicGen.from_pretrained(*loading.values()), loading, args.serve)


def check_alone(MusicGen, args, flag: str, *others):
    """Raises UserError for flags beside --`flag` that it does not take."""
    defaults = vars(parse(MusicGen, []))
    for name, value in vars(args).items():
        if value != defaults[name] and name not in (flag, *others):
            takes = " ".join(f"--{other}" for other in others)
            raise UserError(f"--{flag} and --{name}: leave --{name} out; --{flag} goes with {takes} alone")


def export(MusicGen, args):
    """--export and --export_hf: the checkpoint in other forms."""
    flag, other = ("export", "export_hf") if args.export else ("export_hf", "export")
    check_alone(MusicGen, args, flag, other, "checkpoint", "device")
    for directory in (args.export, args.export_hf):
        if directory:
            check_writable(Path(directory) / "config.json")
    lm = LMModel.from_pretrained(open_checkpoint(args.checkpoint, with_codec=True))
    codec = codec_of(args.checkpoint, lm)
    if args.export:
        MusicGen(lm, codec).save(args.export, compact=True)
    if args.export_hf:
        export_transformers(lm, codec, args.export_hf)
        if lm.config.melody != "none":
            print("Note: transformers 5.0 to 5.17 silently ignore the melody and the text of MusicgenMelody; "
                  "use 5.18 or newer with this export", file=sys.stderr)
    print(args.export or args.export_hf)


def pair(texts, melodies):
    """--text and --melody -> those of each item, None for none; a single one is for all items."""
    texts = [text or None for text in texts or [None]]
    melodies = [path or None for path in melodies or [None]]
    if len(texts) == 1:
        texts *= len(melodies)
    if len(melodies) == 1:
        melodies *= len(texts)
    if len(melodies) != len(texts):
        raise UserError(f"{len(melodies)} --melody for {len(texts)} --text: give one for all, or one for "
                        f"each")
    return texts, melodies


def check_together(args):
    """Raises UserError for flags that exclude or need each other; resolve_duration has more."""
    for one, other in (("prompt", "continue_from"), ("melody", "notes"), ("loop", "prompt"),
                       ("loop", "continue_from"), ("loop", "save_codes"), ("loop", "keep_partial"),
                       ("loop", "play")):
        if getattr(args, one) and getattr(args, other):
            raise UserError(f"--{one} and --{other}: give one of the two")
    for flag in ("prompt_from", "prompt_seconds"):
        if getattr(args, flag) is not None and not args.prompt:
            raise UserError(f"--{flag}: says which part of --prompt is meant, which is missing")


def tell_unknown_words(config, checkpoint: str, texts):
    """Says on stderr which words of the texts the model does not know, and which are read as others."""
    texts, replaced = zip(*[read_as_known(config, text) for text in texts])
    for word, known in dict(pair for words in replaced for pair in words.items()).items():
        print(f"--text: {word!r} is not known: read as {known!r}", file=sys.stderr)
    words = list(dict.fromkeys(unknown_words(config, texts)))
    if words:
        more = f" and {len(words) - 10} more" if len(words) > 10 else ""
        print(f"--text: {checkpoint} does not know {', '.join(words[:10])}{more}; such words share "
              f"eight entries, by their spelling. The words that it knows: t5_words in its config.json",
              file=sys.stderr)


def check_files(args, melodies, outs):
    """What would fail later, found before the model is loaded. Raises UserError naming file or flag."""
    recordings = [] if args.notes else [path for path in melodies if path and not is_notes(path)]
    for path in [*recordings, args.prompt]:
        if path:
            check_recording(path)
    for out in outs:
        for path in files_of(out, args):
            check_writable(path)
    directory = open_checkpoint(args.checkpoint)
    if is_audiocraft(directory, "state_dict.bin"):
        return      # its configuration lies among the weights
    config, _ = read_config(directory)
    if any(melodies) and config.melody == "none":
        raise UserError(f"{args.checkpoint} was trained on text only; leave out --melody or --notes, or take "
                        f"a melody model")
    for out in outs:
        check_format(out, config.sample_rate)
    if args.continue_from:
        read_codes(args.continue_from, config)


def read_prompt(model, args, B: int):
    """The codes (B, K, T0) of --prompt or --continue_from, None for none."""
    if args.prompt:
        seconds = args.prompt_seconds or args.duration + 1      # of a recording that may last hours
        wav = read_audio(args.prompt, model.sample_rate, model.config.channels, args.prompt_from or 0.0,
                         seconds)
        found = wav.shape[-1] / model.sample_rate
        if args.prompt_seconds and found < args.prompt_seconds - 0.01:
            print(f"Note: --prompt {args.prompt}: ends after {found:.2f} s of the {args.prompt_seconds:g} s "
                  f"of --prompt_seconds", file=sys.stderr)
        with naming(f"--prompt {args.prompt}"):
            codes = model.encode_prompt(wav, None, B)
        if codes.shape[-1] >= model.frames(args.duration):
            raise UserError(f"--prompt {args.prompt}: the duration {args.duration:g} s includes the prompt, "
                            f"which is as long or longer; ask for more, or take a part of it with "
                            f"--prompt_from and --prompt_seconds")
        return codes
    if args.continue_from:
        return read_codes(args.continue_from, model.config).expand(B, -1, -1)
    return None


def catch_interrupt() -> list:
    """From now on the first Ctrl-C only fills the returned list; the second one ends the command at once."""
    interrupted = []

    def note(number, frame):
        interrupted.append(number)
        signal.signal(number, signal.default_int_handler)
    signal.signal(signal.SIGINT, note)
    return interrupted
