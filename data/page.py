"""The listening page: results of sample.py in one HTML file, to open anywhere and to hand on.

    python sample.py --text "a slow flute tune" --melody assets/ode_to_joy.wav --page page
    python data/page.py page samples/*.wav        # of results that are there already

Everything is inside: audio (FLAC), spectrograms and chromagrams (PNG) as data URIs, a little CSS and JavaScript. No
network, no framework. What is known of a result is read from the JSON that sample.py writes beside it.
"""
import base64
import html
import io
import math
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project, wherever this is called from
from chroma import ChromaExtractor, chroma_agreement, match_length, separate
from config import Config, Parser, UserError, blaming, read_json, run, write_atomic
from data.audio import read_audio

WIDTH, HEIGHT = 1000, 150       # pixels of a spectrogram, at most
FLOOR = 60                      # dB below the loudest that is black
LOUDNESS = "spectrogram, 60 Hz to 6 kHz"
HEAT = ((0, 0, 4), (40, 17, 89), (114, 31, 129), (183, 55, 121), (241, 96, 93), (254, 176, 120), (252, 253, 191))
NOTES = ((241, 238, 230), (200, 80, 60))


# --- pictures -------------------------------------------------------------------------------------------------

def png(values, colours) -> bytes:
    """Picture of values (rows, columns) in 0 ... 1, the first row on top, in 64 steps between the colours (RGB)."""
    places = np.linspace(0, len(colours) - 1, 64)
    palette = np.array([np.interp(places, range(len(colours)), band) for band in np.transpose(colours)]).T.round()
    index = (np.asarray(values).clip(0, 1) * 63).round().astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in index)     # filter 0: as they are

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", *index.shape[::-1], 8, 3, 0, 0, 0)     # 8 bits, of a palette
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", palette.astype(np.uint8).tobytes()) + \
        chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def spectrogram(wav, sample_rate: int):
    """Wave (C, L) -> loudness (HEIGHT, up to WIDTH) in 0 ... 1 from 60 Hz to 6 kHz, high on top, even in mel."""
    wav = wav.mean(0)
    n_fft = 2 ** round(math.log2(sample_rate * 0.064))
    hop = max(n_fft // 8, math.ceil(len(wav) / WIDTH))
    spectrum = torch.stft(wav, n_fft, hop, window=torch.hann_window(n_fft), pad_mode="constant", return_complex=True)
    decibels = 10 * (spectrum.abs().square() + 1e-10).log10().numpy()               # (n_fft/2 + 1, columns)
    mel = np.linspace(math.log(1 + 60 / 700), math.log(1 + min(6000, sample_rate / 2) / 700), HEIGHT)[::-1]
    bins = 700 * (np.exp(mel) - 1) / sample_rate * n_fft
    rows = np.array([np.interp(bins, np.arange(len(decibels)), column) for column in decibels.T]).T
    return (rows - rows.max()) / FLOOR + 1


# --- HTML -----------------------------------------------------------------------------------------------------

def uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(values, colours, name: str) -> str:
    sharp = " sharp" if colours is NOTES else ""
    return (f'<figure><figcaption>{html.escape(name)}</figcaption><div class="seek{sharp}">'
            f'<img alt="{html.escape(name)}" src="{uri("image/png", png(values, colours))}"><i></i></div></figure>')


def player(wav, sample_rate: int, pictures: list, name: str) -> str:
    """Wave (C, L) and HTML pictures of it: a player whose place shows in the pictures; a click in one goes there."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wav.T.numpy().clip(-1, 1), sample_rate, format="FLAC", subtype="PCM_16")
    source = uri("audio/flac", buffer.getvalue())
    save = f'<a download="{html.escape(name, quote=True)}.flac" href="{source}">save</a>'
    bar = f'<div class="bar"><audio controls preload="auto" src="{source}"></audio>{save}</div>'
    return f'<div class="player">{bar}{"".join(pictures)}</div>'


def melody_card(path: Path, wav, chroma, sample_rate: int) -> str:
    heard = "what the model hears of it: one pitch class a frame, C at the bottom, B on top"
    pictures = [picture(spectrogram(wav, sample_rate), HEAT, LOUDNESS), picture(chroma.T.flip(0), NOTES, heard)]
    sound = player(wav, sample_rate, pictures, path.stem)
    return f"<section><h2><b>melody</b> {html.escape(path.name)}</h2>{sound}</section>"


def result_card(told: dict, wav, asked, heard, sample_rate: int, name: str) -> str:
    facts, pictures = [f"seed {told.get('seed')}"], [picture(spectrogram(wav, sample_rate), HEAT, LOUDNESS)]
    if asked is not None:
        M = min(len(asked), len(heard))
        share = 100 * chroma_agreement(heard[:M], asked[:M])
        facts += [f"melody {Path(told['melody']).name}", f"followed in {share:.0f} % of the frames"]
        pictures.append(picture(asked.T.flip(0), NOTES, "melody asked for"))
    stem = ", melody stem" if asked is not None else ""
    pictures.append(picture(heard.T.flip(0), NOTES, "chromagram of the music" + stem))
    text = f"“{told['text']}”" if told.get("text") else "no text"
    return (f'<section><h2>{html.escape(text)}</h2><p>{html.escape(" · ".join(facts))}</p>'
            f'{player(wav, sample_rate, pictures, name)}<pre>{html.escape(told.get("command", ""))}</pre></section>')


STYLE = """
:root { --ink: #22252b; --faint: #757b86; --paper: #fdfcf9; --card: #fff; --line: #e3dfd4; --accent: #c8503c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e1; --faint: #9a9fa9; --paper: #16181c; --card: #1e2126; --line: #343841; --accent: #e8806d } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem; max-width: 860px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 0; font-size: 1.15rem; font-weight: 600 } h2 b { color: var(--accent) }
p { margin: .2rem 0 0; color: var(--faint); font-size: .9rem }
section { margin-top: 1.4rem; padding: 1.2rem 1.3rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px }
.bar { display: flex; gap: .9rem; align-items: center; margin: .8rem 0 .3rem }
audio { flex: 1; min-width: 0; height: 40px }
a { color: var(--accent) } figure { margin: .7rem 0 0 } figcaption { font-size: .78rem; color: var(--faint) }
.seek { position: relative; margin-top: .2rem; cursor: pointer; border-radius: 6px; overflow: hidden; line-height: 0 }
.seek img { width: 100%; height: 150px } .seek.sharp img { height: 84px; image-rendering: pixelated }
.seek i { position: absolute; top: 0; bottom: 0; left: 0; width: 2px; background: #3f8cff; opacity: 0 }
pre { margin: 1rem 0 0; padding: .7rem .9rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .78rem; background: var(--paper); border: 1px solid var(--line); border-radius: 8px }
table { margin-top: .7rem; border-collapse: collapse; font-size: .88rem }
td { padding: .15rem 1.6rem .15rem 0 } td:first-child { color: var(--faint) }
"""
SCRIPT = """
for (const player of document.querySelectorAll(".player")) {
  const audio = player.querySelector("audio"), lines = player.querySelectorAll(".seek i");
  const show = () => { for (const line of lines) {
    line.style.opacity = 1; line.style.left = 100 * audio.currentTime / audio.duration + "%" } };
  const follow = () => { show(); if (!audio.paused) requestAnimationFrame(follow) };
  audio.onplay = () => {
    for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause(); follow() };
  audio.onseeked = show;
  for (const place of player.querySelectorAll(".seek")) place.onclick = event => {
    const box = place.getBoundingClientRect();
    audio.currentTime = (event.clientX - box.left) / box.width * audio.duration };
}
"""


def page_path(directory, overwrite: bool = False) -> Path:
    """Where the page of a directory is. Raises UserError when there is one already."""
    path = Path(directory) / "index.html"
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"--page {directory}: {path} exists; choose another directory or add --overwrite")
    return path


def write_page(path, outs, command: str = ""):
    """Writes the page of the results `outs` (audio files of sample.py, its JSON beside each) to `path`.

    Raises UserError naming a file that is missing or no result of sample.py.
    """
    melodies, results = {}, []     # melody and how it is heard -> (wav, chroma); HTML
    for out in map(Path, outs):
        told = read_json(out.with_suffix(".json"))
        with blaming(f"{out.with_suffix('.json')}: not written by sample.py"):
            config, settings = Config(**told["config"]), dict(told.get("settings") or {})
            for key in ("text", "melody", "stem", "command"):
                assert isinstance(told.get(key, ""), str), f"its {key} is no text"
        rate, stem = config.sample_rate, told.get("stem") or config.stem
        extract = {argmax: ChromaExtractor(rate, config.n_chroma, config.radix2_exp, argmax)
                   for argmax in (False, True)}
        wav, asked = read_audio(out, rate, config.channels), None                       # (C, L)
        M = extract[True].frames(wav.shape[1])
        if told.get("melody"):
            key = str(told["melody"]), stem
            if key not in melodies:
                melody = read_audio(key[0], rate, 1, duration=wav.shape[1] / rate + 60)
                melodies[key] = melody, extract[True](separate(melody, rate, stem))[0], rate
            asked = match_length(melodies[key][1][None], M)[0]                          # (M, Q)
        heard = extract[False](separate(wav, rate, stem if told.get("melody") else "none"))[0]
        results.append(result_card(told, wav, asked, heard, rate, out.stem))
    cards = [melody_card(Path(key[0]), *value) for key, value in melodies.items()]
    rows = {"checkpoint": told.get("checkpoint", ""), "duration": f"{told.get('duration')} s", **settings,
            "torch": told.get("torch", "")}
    table = "".join(f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(x))}</td></tr>"
                    for name, x in rows.items())
    again = f"<pre>{html.escape(command)}</pre>" if command else ""
    made = f"<section><h2>How it was made</h2><table>{table}</table>{again}</section>"
    count = f"{len(results)} piece{'s' * (len(results) > 1)} of music"
    write_atomic(path, f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>nanoMusicGen: {count}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><h1>nanoMusicGen</h1><p>{count}</p>{"".join(cards)}{"".join(results)}{made}<script>{SCRIPT}</script></body></html>
""".encode(errors="replace"))


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
