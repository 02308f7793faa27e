"""The command line of sample.py: flags, checks before the slow part begins, and the files of the results.

    python sample.py --help

sample.py hands its class MusicGen over. If it were imported here, that file would be loaded twice: as
`__main__` and as `sample`.
"""
import argparse
import shlex
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints.files import is_audiocraft, open_checkpoint
from checkpoints.lm_formats import export_transformers, read_config
from config import FIELDS
from data.audio import check_format, check_recording, read_audio, write_audio
from lm import LMModel
from sampling.loading import DTYPES, codec_of
from sampling.takes import (DEFAULT_CHECKPOINT, files_of, metadata, output_names, read_codes, tags_of,
                            write_codes)
from system.command import Parser
from system.errors import UserError, naming
from system.files import check_writable, write_atomic


# --- flags ------------------------------------------------------------------------------------------------

def seed(text: str) -> int:
    """The type of --seed."""
    if not 0 <= int(text) < 2 ** 62:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more, and below 2 ** 62")
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
        help="melody to follow: one for all texts, or one for each ('' for none)")
    add("--checkpoint", default=str(DEFAULT_CHECKPOINT), metavar="X",
        help="directory or Hugging Face id (default: the shipped model)")
    add("--out", metavar="FILE",
        help="wav, flac, ogg or mp3 (default: samples/TEXT.wav); a batch is numbered")
    add("--duration", type=seconds, default=10.0, metavar="S", help="seconds, a prompt included (default 10)")
    add("--prompt", metavar="FILE", help="recording to continue")
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
    texts, melodies = pair(args.text, args.melody)
    if args.prompt and args.continue_from:
        raise UserError("--prompt and --continue_from: give one of the two")
    seeds = [(args.seed or 0) + i for i in range(len(texts))]
    outs = output_names(args, texts)
    if args.page:
        from tools.page import page_path, write_page
        page = page_path(args.page, args.overwrite)
        check_writable(page)

    check_files(args, melodies, outs)
    model = MusicGen.from_pretrained(args.checkpoint, args.device, args.dtype, args.compile)
    tags = [tags_of(args, *item) for item in zip(texts, seeds)]
    chromas = read_melodies(model, args, melodies)
    prompt = read_prompt(model, args, len(texts))
    interrupted = catch_interrupt() if args.keep_partial else []
    pieces = []
    with tqdm(total=round(args.duration * model.frame_rate), unit="frame", desc="sampling") as bar:
        for new in model.stream_codes(texts, chromas, prompt, args.duration, seeds, guidance=args.guidance,
                                      temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                                      two_step=args.two_step):
            pieces.append(new)
            bar.update(new.shape[-1])
            if interrupted:
                break
    codes = torch.cat(pieces, dim=-1).cpu()
    if not codes.shape[-1]:
        raise UserError("interrupted before the first frame was whole: nothing is written")
    wav = model.decode(codes, args.duration)                                # (B, C, L)
    for i, out in enumerate(outs):
        write_audio(out, wav[i], model.sample_rate, tags[i])
        if args.save_codes:
            write_codes(out.with_suffix(".npz"), codes[i])
        about = metadata(args, texts[i], melodies[i], seeds[i], out, model.config)
        write_atomic(out.with_suffix(".json"), about.encode())
        print(out)
    if args.page:
        write_page(page, outs, "python sample.py " + shlex.join(argv))
        print(page)
    if interrupted:
        seconds = wav.shape[-1] / model.sample_rate
        print(f"interrupted: the first {seconds:.2f} s are written", file=sys.stderr)
        sys.exit(130)


def export(MusicGen, args):
    """--export and --export_hf: the checkpoint in other forms."""
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


def check_files(args, melodies, outs):
    """What would fail later, found before the model is loaded. Raises UserError naming file or flag."""
    for path in [*melodies, args.prompt]:
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
        raise UserError(f"{args.checkpoint} was trained on text only; leave out --melody, or take a melody "
                        f"model")
    for out in outs:
        check_format(out, config.sample_rate)
    if args.continue_from:
        read_codes(args.continue_from, config)


def max_seconds(model, args) -> float:
    """How much is read of a recording, which may last hours: no more than can matter."""
    return args.duration + model.config.segment_duration + 10


def read_melodies(model, args, melodies) -> list:
    """The chroma (M, Q) of each item's melody, None for none; each file is read once."""
    chroma = {None: None}
    for path in melodies:
        if path not in chroma:
            wav = read_audio(path, model.sample_rate, 1, duration=max_seconds(model, args))
            with naming(f"--melody {path}"):
                chroma[path] = model.melody_chroma(wav, stem=args.stem)
    return [chroma[path] for path in melodies]


def read_prompt(model, args, B: int):
    """The codes (B, K, T0) of --prompt or --continue_from, None for none."""
    if args.prompt:
        wav = read_audio(args.prompt, model.sample_rate, model.config.channels,
                         duration=max_seconds(model, args))
        with naming(f"--prompt {args.prompt}"):
            return model.encode_prompt(wav, None, B)
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
