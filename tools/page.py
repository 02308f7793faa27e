"""The listening page: results of sample.py in one HTML file, to open anywhere and to hand on.

    python sample.py --text "a slow flute tune" --melody assets/ode_to_joy.wav --page page
    python tools/page.py page samples/*.wav       # of results that are there already

Everything is inside: audio (as it was written, a wav as FLAC), spectrograms and chromagrams (PNG) as data
URIs, a little CSS and JavaScript. No network, no framework. `--out take.mp3` makes a page a quarter as large.
What is known of a result comes from the JSON beside it, as sample.py writes it.
"""
import base64
import html
import io
import math
import os
import struct
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project, wherever this is called from
from chroma import ChromaExtractor
from config import Config, without_former_keys
from data.audio import read_audio
from data.notes import pitch_classes
from data.stems import heard_notes, separate
from evaluation.metrics import chroma_agreement
from sampling.melodies import again, notes_of
from system.command import Parser, run
from system.errors import UserError, as_user_error
from system.files import read_json, write_atomic

WIDTH, HEIGHT = 1000, 150       # pixels of a spectrogram, at most
FLOOR = 60                      # dB below the loudest that is black
LOUDNESS = "spectrogram, 60 Hz to 6 kHz"
MELODY = "the pitch classes that the model hears in it, C at the bottom"
HEAT = ((0, 0, 4), (40, 17, 89), (114, 31, 129), (183, 55, 121), (241, 96, 93), (254, 176, 120),
        (252, 253, 191))
NOTES = ((241, 238, 230), (200, 80, 60))
AUDIO = {".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg"}      # what browsers are told


# --- pictures ---------------------------------------------------------------------------------------------

def png(values, colors) -> bytes:
    """Picture of values (rows, columns) in 0 ... 1, first row on top, in 64 steps between colors (RGB)."""
    steps = np.linspace(0, len(colors) - 1, 64)
    bands = [np.interp(steps, range(len(colors)), band) for band in np.transpose(colors)]
    palette = np.array(bands).T.round()                         # (64, 3)
    index = (np.asarray(values).clip(0, 1) * 63).round().astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in index)     # filter 0: as they are
    height, width = index.shape
    return b"".join((
        b"\x89PNG\r\n\x1a\n",
        png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),     # 8 bits, of a palette
        png_chunk(b"PLTE", palette.astype(np.uint8).tobytes()),
        png_chunk(b"IDAT", zlib.compress(rows, 9)),
        png_chunk(b"IEND", b"")))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Length, kind, data and checksum, as every part of a PNG file has them."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def spectrogram(wav, sample_rate: int):
    """Wave (C, L) -> loudness (HEIGHT, up to WIDTH) in 0 ... 1, 60 Hz to 6 kHz, high on top, even in mel."""
    wav = wav.mean(0)
    n_fft = 2 ** round(math.log2(sample_rate * 0.064))
    hop = max(n_fft // 8, math.ceil(len(wav) / WIDTH))
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(wav, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    decibels = 10 * (spectrum.abs().square() + 1e-10).log10().numpy()       # (n_fft/2 + 1, columns)
    lowest = math.log(1 + 60 / 700)
    highest = math.log(1 + min(6000, sample_rate / 2) / 700)
    mel = np.linspace(lowest, highest, HEIGHT)[::-1]
    bins = 700 * (np.exp(mel) - 1) / sample_rate * n_fft
    rows = np.array([np.interp(bins, np.arange(len(decibels)), column) for column in decibels.T]).T
    return (rows - rows.max()) / FLOOR + 1


# --- HTML -------------------------------------------------------------------------------------------------

def uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(values, colors, name: str) -> str:
    """Values in 0 ... 1 as an HTML figure; of a chromagram its cells stay sharp."""
    sharp = " sharp" if colors is NOTES else ""
    name = html.escape(name)
    return (f'<figure><figcaption>{name}</figcaption><div class="seek{sharp}">'
            f'<img alt="{name}" src="{uri("image/png", png(values, colors))}"><i></i></div></figure>')


def flac(wav, sample_rate: int) -> bytes:
    """Wave (C, L) as the content of a FLAC file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wav.T.numpy().clip(-1, 1), sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def player(sound: bytes, suffix: str, pictures: list, name: str) -> str:
    """A player of an audio file: it shows where it is in the HTML pictures, and a click in one goes there."""
    save = f'<a download="{html.escape(name, quote=True)}{suffix}">save</a>'
    audio = f'<audio controls preload="auto" src="{uri(AUDIO[suffix], sound)}"></audio>'
    return f'<div class="player"><div class="bar">{audio}{save}</div>{"".join(pictures)}</div>'


def melody_card(path: Path, wav, heard, sample_rate: int) -> str:
    """A melody: wave (C, L) and the pitch classes that a model is told (M, n_chroma)."""
    loudness = picture(spectrogram(wav, sample_rate), HEAT, LOUDNESS)
    notes = picture(heard.T.flip(0), NOTES, MELODY)
    sound = player(flac(wav, sample_rate), ".flac", [loudness, notes], path.stem)
    return f"<section><h2><b>melody</b> {html.escape(path.name)}</h2>{sound}</section>"


def result_card(metadata: dict, out: Path, wav, asked, played, sample_rate: int) -> str:
    """A result: its wave (C, L), the chroma asked for (None for none) and that played, (M, n_chroma)."""
    facts = [f"seed {metadata.get('seed')}"]
    pictures = [picture(spectrogram(wav, sample_rate), HEAT, LOUDNESS)]
    stem = ""
    if asked is not None:
        share = 100 * chroma_agreement(played, asked)
        facts.append(f"melody {metadata.get('notes') or Path(metadata['melody']).name}")
        facts.append(f"followed in {share:.0f} % of the frames")
        pictures.append(picture(asked.T.flip(0), NOTES, "melody asked for"))
        stem = ", melody stem"
    pictures.append(picture(played.T.flip(0), NOTES, "chromagram of the music" + stem))
    text = f"“{metadata['text']}”" if metadata.get("text") else "no text"
    heading = f'<h2>{html.escape(text)}</h2><p>{html.escape(" · ".join(facts))}</p>'
    command = f"<pre>{html.escape(metadata.get('command', ''))}</pre>"
    suffix = out.suffix.lower()
    if suffix in AUDIO:
        sound = player(out.read_bytes(), suffix, pictures, out.stem)
    else:
        sound = player(flac(wav, sample_rate), ".flac", pictures, out.stem)
    return f"<section>{heading}{sound}{command}</section>"


def made_card(metadata: dict, command: str) -> str:
    """The settings of the last result, and the command that made all of them."""
    checkpoint = str(metadata.get("checkpoint", ""))
    if Path(checkpoint).is_relative_to(ROOT):       # a page is handed on: not where the project lies here
        checkpoint = str(Path(checkpoint).relative_to(ROOT))
    rows = {"checkpoint": checkpoint, "duration": f"{metadata.get('duration')} s"}
    rows |= metadata["settings"]
    rows |= {"torch": metadata.get("torch", "")}
    table = ""
    for name, value in rows.items():
        table += f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
    command = f"<pre>{html.escape(command)}</pre>" if command else ""
    return f"<section><h2>How it was made</h2><table>{table}</table>{command}</section>"


STYLE = """
:root { --ink: #22252b; --faint: #757b86; --paper: #fdfcf9; --card: #fff; --line: #e3dfd4; --accent: #c8503c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e1; --faint: #9a9fa9; --paper: #16181c; --card: #1e2126; --line: #343841; \
--accent: #e8806d } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem; max-width: 860px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 0; font-size: 1.15rem; font-weight: 600 } \
h2 b { color: var(--accent) }
p { margin: .2rem 0 0; color: var(--faint); font-size: .9rem }
section { margin-top: 1.4rem; padding: 1.2rem 1.3rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px }
.bar { display: flex; gap: .9rem; align-items: center; margin: .8rem 0 .3rem }
audio { flex: 1; min-width: 0; height: 40px }
a { color: var(--accent) } figure { margin: .7rem 0 0 } figcaption { font-size: .78rem; color: var(--faint) }
.seek { position: relative; margin-top: .2rem; cursor: pointer; border-radius: 6px; overflow: hidden; \
line-height: 0 }
.seek img { width: 100%; height: 150px } .seek.sharp img { height: 84px; image-rendering: pixelated }
.seek i { position: absolute; top: 0; bottom: 0; left: 0; width: 2px; background: #3f8cff; opacity: 0 }
pre { margin: 1rem 0 0; padding: .7rem .9rem; overflow-x: auto; white-space: pre-wrap; \
overflow-wrap: anywhere;
  font-size: .78rem; background: var(--paper); border: 1px solid var(--line); border-radius: 8px }
table { margin-top: .7rem; border-collapse: collapse; font-size: .88rem }
td { padding: .15rem 1.6rem .15rem 0 } td:first-child { color: var(--faint) }
"""
SCRIPT = """
for (const player of document.querySelectorAll(".player")) {
  const audio = player.querySelector("audio"), lines = player.querySelectorAll(".seek i");
  const show = () => { for (const line of lines) {
    line.style.opacity = 1; line.style.left = 100 * audio.currentTime / audio.duration + "%" } };
  player.querySelector("a").href = audio.src;
  const follow = () => { show(); if (!audio.paused) requestAnimationFrame(follow) };
  audio.onplay = () => {
    for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause(); follow() };
  audio.onseeked = show;
  for (const place of player.querySelectorAll(".seek")) place.onclick = event => {
    const box = place.getBoundingClientRect();
    audio.currentTime = (event.clientX - box.left) / box.width * audio.duration };
}
"""


# --- the page ---------------------------------------------------------------------------------------------

def page_path(directory, overwrite: bool = False) -> Path:
    """Where the page of a directory is. Raises UserError when there is one already."""
    path = Path(directory) / "index.html"
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"--page {directory}: {path} exists; choose another directory or add --overwrite")
    return path


def read_metadata(path: Path) -> tuple[dict, Config]:
    """What sample.py wrote beside a result, and the configuration in it. Raises UserError naming the file."""
    metadata = read_json(path)
    with as_user_error(f"{path}: not written by sample.py"):
        values = dict(metadata["config"])
        if values.pop("harmonic_sum", False):       # of a former model: pitch classes of what is now "notes"
            values["melody_form"] = "notes"
        config = Config(**without_former_keys(values, path))
        metadata["settings"] = dict(metadata.get("settings") or {})
        for key in ("text", "melody", "notes", "meter", "stem", "command"):
            if not isinstance(metadata.get(key, ""), str):
                raise TypeError(f"its {key} is no text")
        metadata["bpm"] = float(metadata.get("bpm") or 0)
    return metadata, config


def listener(config: Config, stem: str):
    """A function from a wave (C, L) to the pitch classes (M, n_chroma) that a model is told of it."""
    hear = ChromaExtractor(config.sample_rate, config.n_chroma, config.radix2_exp)
    if config.melody_form == "notes":
        hear = partial(heard_notes, config=config)
    return lambda wav: pitch_classes(hear(separate(wav, config.sample_rate, stem))[0], config.n_chroma)


def write_page(path, outs, command: str = ""):
    """Writes the page of the results `outs` (audio files of sample.py, its JSON beside each) to `path`.

    command: the one that made them. Raises UserError naming a file that is missing or no result of sample.py.
    """
    melodies, results = {}, []      # (file, how it is heard): (wave, pitch classes, sample rate); HTML
    for out in map(Path, outs):
        metadata, config = read_metadata(out.with_suffix(".json"))
        rate, stem = config.sample_rate, metadata.get("stem") or config.stem
        hear = listener(config, stem)
        all_classes = ChromaExtractor(rate, config.n_chroma, config.radix2_exp, argmax=False)
        wav, asked = read_audio(out, rate, config.channels), None           # (C, L)
        notes = notes_of(*(metadata.get(key) for key in ("notes", "melody", "bpm", "meter")))
        if notes is not None:
            asked = pitch_classes(notes.chroma(config, wav.shape[1] / rate), config.n_chroma)
        elif metadata.get("melody"):
            file = str(metadata["melody"])
            key = file, stem, rate, config.n_chroma, config.radix2_exp, config.melody_form
            if key not in melodies:
                melody = read_audio(file, rate, 1, duration=wav.shape[1] / rate + 60)
                melodies[key] = melody, hear(melody), rate
            melody, heard, _ = melodies[key]
            repeated = again(melody, rate, wav.shape[1] / rate + config.segment_duration)
            if repeated.shape != melody.shape:
                heard = hear(repeated)
            asked = heard[:all_classes.frames(wav.shape[1])]                # (M, n_chroma)
        played = all_classes(separate(wav, rate, stem if asked is not None else "none"))[0]
        results.append(result_card(metadata, out, wav, asked, played, rate))
    cards = [melody_card(Path(file), *melody) for (file, *_), melody in melodies.items()]
    cards += results + [made_card(metadata, command)]
    count = f"{len(results)} piece{'s' * (len(results) > 1)} of music"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>nanoMusicGen: {count}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><h1>nanoMusicGen</h1><p>{count}</p>{"".join(cards)}<script>{SCRIPT}</script></body></html>
"""
    write_atomic(path, page.encode(errors="replace"))


def main(argv):
    parser = Parser(description="a listening page of results of sample.py")
    parser.add_argument("page", help="directory for index.html")
    parser.add_argument("results", nargs="+", help="audio files, each with its .json beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    args = parser.parse_args(argv)
    path = page_path(args.page, args.overwrite)
    write_page(path, args.results)
    print(path)


if __name__ == "__main__":
    run(main, sys.argv[1:])
