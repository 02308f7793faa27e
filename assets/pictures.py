"""The pictures of README and docs/, drawn by the code that they are about.

    pip install matplotlib
    python assets/pictures.py                   # all of them, a few minutes on two cores
    python assets/pictures.py patterns melody   # some of them

Every picture is a function and makes assets/NAME.png. Those of the trained model (MODEL below) change with
checkpoints/tiny; `python assets/pictures.py model` draws these again. Nothing is picked: what is shown are
the first command of README, and the first clips of the test split of data/tunes.py with its default seed.
"""
import dataclasses
import functools
import io
import json
import math
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project, wherever this is called from
import patterns
import train
from chroma import PITCH_CLASSES, ChromaExtractor, match_length
from config import Config, load
from data import prepare, render, tunes
from data.audio import read_audio
from data.describe import sidecar
from data.notes import pitch_classes
from data.segments import SPLITS
from data.stems import separate
from encodec import EncodecModel
from evaluation.metrics import chroma_agreement
from lm import LMModel, rotate
from rvq import ResidualVectorQuantizer
from sample import MusicGen
from sampling.takes import DEFAULT_CHECKPOINT
from system.command import run
from system.errors import UserError
from system.files import write_atomic
from training.losses import mel_filters, mel_loss, power_spectrogram

INK, FAINT, PAPER, PANEL = "#22252b", "#8a8f99", "#fdfcf9", "#f1eee6"
BOOKS = ("#24478f", "#2a8c82", "#d99a2b", "#c8503c")    # codebooks 1 - 4
MELODY, WORDS = "#c8503c", "#7a5ea8"
RATE = 16000                                            # of the tiny model, Hz
TEXT = "a slow flute tune, alone"                       # of README's first command
TUNE = ROOT / "assets" / "ode_to_joy.wav"


# --- what is drawn: sounds, spectrograms, chroma ----------------------------------------------------------

@functools.cache
def clip(index: int, seconds: float = 12):
    """Test clip `index` of data/tunes.py -> mix (L,), melody alone (L,), caption, what was rendered."""
    tune = render.tunes_of("test")[index]
    seed = [0, SPLITS.index("test"), index]
    words, rng = np.random.default_rng([*seed, 0]), np.random.default_rng([*seed, 1])
    truth = render.draw_truth(tune, rng)
    caption = sidecar(tune, truth, words)["description"]
    mix, melody = render.render_clip(tune, truth, seconds, RATE, rng)
    return torch.from_numpy(mix), torch.from_numpy(melody), caption, truth


@functools.cache
def codec():
    return EncodecModel.from_pretrained(DEFAULT_CHECKPOINT / "codec")


@functools.cache
def model():
    return MusicGen.from_pretrained(DEFAULT_CHECKPOINT, "cpu")


@functools.cache
def first_command():
    """What README's first call of sample.py makes -> codes (K, T), wav (L,)."""
    melody = model().melody_chroma(read_audio(TUNE, RATE, 1), stem="hpss")
    codes = model().generate_codes([TEXT], [melody], duration=10.0, seeds=[0])
    return codes[0], model().decode(codes, 10.0)[0, 0]


@functools.cache
def eight():
    """The texts of the first eight test clips, each with the melody of the next one, as --eval pairs them.
    -> captions, chroma asked for (8, M, Q), wavs (8, 1, L)."""
    captions, config = [clip(n)[2] for n in range(8)], model().config
    melodies = []
    for n in range(8):
        own = model().melody_chroma(clip((n + 1) % 8)[1], stem="none")
        melodies.append(match_length(own[None], config.chroma_frames)[0])
    codes = model().generate_codes(captions, melodies, duration=config.segment_duration)
    return captions, pitch_classes(torch.stack(melodies), 12), model().decode(codes)


def chroma(wav, argmax=False):
    """Wave (L,) at the rate of the tiny model -> chroma (M, Q)."""
    return ChromaExtractor(RATE, radix2_exp=13, argmax=argmax)(wav[None])[0]


def stem_chroma(wav):
    """Wave (L,) -> chroma (M, Q) of its melody stem, as evaluation/metrics.py takes it."""
    return chroma(separate(wav[None], RATE, "hpss")[0])


def agreement(found, asked) -> str:
    return f"{100 * chroma_agreement(found, asked):.0f} %"


def mel(hz):
    return 2595 * np.log10(1 + hz / 700)


# --- how it is drawn --------------------------------------------------------------------------------------

def figure(width: float, height: float, *grid, **options):
    """A figure of so many inches, and its axes if `grid` says how many (rows, columns)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
        "font.size": 9, "font.family": "DejaVu Sans", "text.color": INK,
        "axes.labelcolor": INK, "axes.edgecolor": FAINT, "axes.titlecolor": INK, "axes.titlesize": 10,
        "axes.titlelocation": "left", "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False,
        "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "xtick.major.width": 0.8, "ytick.major.width": 0.8, "legend.frameon": False,
        "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.08})
    if not grid:
        return plt.figure(figsize=(width, height))
    return plt.subplots(*grid, figsize=(width, height), layout="constrained", **options)


def save(fig, name: str, colors: int = 64, dpi: int = 150):
    """Writes a figure as assets/NAME.png: its few colors do not miss those that a palette leaves out."""
    import matplotlib.pyplot as plt
    raw = io.BytesIO()
    fig.savefig(raw, dpi=dpi)
    plt.close(fig)
    save_small(raw, name, colors)


def save_small(raw, name: str, colors: int):
    """Writes assets/NAME.png of a picture (a file, PNG) with a palette of so many colors."""
    from PIL import Image
    small = io.BytesIO()
    image = Image.open(raw).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    write_atomic(ROOT / "assets" / f"{name}.png", small.getvalue())
    print(f"assets/{name}.png  {len(small.getvalue()) / 1000:.0f} kB")


def mel_axis(axes, top):
    """Ticks in Hz on an axis in mel."""
    ticks = [hz for hz in (250, 500, 1000, 2000, 4000) if hz < top]
    labels = [f"{hz / 1000:g} k" if hz >= 1000 else f"{hz}" for hz in ticks]
    axes.set_yticks([mel(hz) for hz in ticks], labels)


def draw_spectrogram(axes, wav, top=6000, title=None):
    """Wave (L,) -> decibels over time and frequency, the latter on the mel scale."""
    window = torch.hann_window(1024)
    power = torch.stft(wav, 1024, 256, window=window, return_complex=True).abs().square().numpy()
    decibels = 10 * np.log10(power + 1e-9)
    hz, wanted = np.linspace(0, RATE / 2, len(power)), np.linspace(mel(60), mel(top), 160)
    rows = np.array([np.interp(wanted, mel(hz), column) for column in decibels.T]).T
    axes.imshow(rows, origin="lower", aspect="auto", cmap="magma", vmin=rows.max() - 50, vmax=rows.max(),
                interpolation="bilinear", extent=(0, len(wav) / RATE, mel(60), mel(top)))
    mel_axis(axes, top)
    if title:
        axes.set_title(title)


def draw_chroma(axes, chroma, seconds, title=None, labels=True):
    """Chroma (M, Q) over so many seconds."""
    axes.imshow(chroma.T, origin="lower", aspect="auto", cmap=paper_to(MELODY), vmin=0, vmax=1,
                interpolation="nearest", extent=(0, seconds, -0.5, 11.5))
    axes.set_yticks(range(0, 12, 2) if labels else [], PITCH_CLASSES[::2] if labels else [])
    axes.tick_params(axis="y", length=0, labelsize=7)
    if title:
        axes.set_title(title)


def paper_to(color: str):
    from matplotlib.colors import LinearSegmentedColormap
    return LinearSegmentedColormap.from_list("", [PANEL, color])


def draw_wave(axes, wav, color=INK):
    """Wave (L,) as its extremes in 800 places."""
    parts = wav[:len(wav) // 800 * 800].view(800, -1)
    x = np.linspace(0, len(wav) / RATE, 800)
    axes.fill_between(x, parts.amin(1), parts.amax(1), color=color, linewidth=0)
    axes.set_xlim(0, x[-1])
    axes.set_yticks([])


def draw_cells(axes, sequence, special: int, size=8):
    """Codes (K, S) as colored cells, codebook 1 on top; the special token is a dot."""
    K, S = sequence.shape
    for k, row in enumerate(sequence.tolist()):
        for s, value in enumerate(row):
            real = value != special
            axes.add_patch(patch((s + 0.04, K - 1 - k + 0.06), 0.92, 0.88, BOOKS[k] if real else PANEL))
            axes.text(s + 0.5, K - 0.5 - k, str(value) if real else "·", ha="center", va="center", size=size,
                      color="white" if real else FAINT)
    axes.set(xlim=(0, S), ylim=(0, K), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def patch(corner, width, height, color, edge="none", line=1.0, radius=0.12):
    from matplotlib.patches import FancyBboxPatch
    return FancyBboxPatch(corner, width, height, boxstyle=f"round,pad=0,rounding_size={radius}",
                          facecolor=color, edgecolor=edge, linewidth=line)


class Page:
    """A page of boxes and arrows, 130 x 63 units."""

    def __init__(self):
        self.fig = figure(13, 6.3)
        self.axes = self.fig.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, 130), ylim=(0, 63))
        self.axes.axis("off")

    def text(self, x, y, words, **style):
        self.axes.text(x, y, words, **style)

    def panel(self, x, y, width, height):
        """Axes without ticks at a place of the page."""
        axes = self.fig.add_axes((x / 130, y / 63, width / 130, height / 63))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def box(self, x, y, width, height, title, file):
        center = x + width / 2
        self.axes.add_patch(patch((x, y), width, height, "#ffffff", INK, 1.3, 1.2))
        self.text(center, y + height / 2 + 1.3, title, ha="center", va="center", size=11, weight="bold")
        self.file(center, y + height / 2 - 1.7, file)

    def file(self, x, y, name):
        self.text(x, y, name, ha="center", va="center", size=8.5, color=FAINT, family="monospace")

    def bar(self, x, y, width, height, color, name=""):
        self.axes.add_patch(patch((x, y), width, height, color, "none", 0, 0.5))
        self.text(x + width / 2, y + height / 2, name, ha="center", va="center", size=6.5, color="white")

    def arrow(self, x, y, to_x, to_y, label="", color=INK):
        style = dict(arrowstyle="-|>", color=color, linewidth=1.4, shrinkA=0, shrinkB=0, mutation_scale=12)
        self.axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)
        self.text((x + to_x) / 2, (y + to_y) / 2 + 1, label, ha="center", va="bottom", size=8, color=color)


# --- the pictures -----------------------------------------------------------------------------------------

def system():
    """All of it on one page, with real data: README's first command, and what training sees."""
    page = Page()
    codes, wav = first_command()
    draw_conditions(page)
    draw_transformer(page)
    draw_decoding(page, codes, wav)
    draw_encoding(page)
    page.text(2, 3, "Every panel is real data. Dark arrows: sampling (sample.py). "
              "Gray arrows: training (train.py).", size=8, color=FAINT)
    save(page.fig, "system")


def draw_conditions(page):
    melody = read_audio(TUNE, RATE, 1)[0, :10 * RATE]
    page.text(2, 57, "text", size=9, color=FAINT)
    page.text(2, 53, f"“{TEXT}”", size=9.5, style="italic")
    page.arrow(23.5, 53.5, 28, 53.5)
    page.box(28, 50, 14, 7, "T5", "conditioners.py")
    page.arrow(42, 53.5, 57, 53.5, "(B, P − M, D)")
    page.text(2, 44.5, "melody", size=9, color=FAINT)
    draw_wave(page.panel(2, 36, 17, 8), melody, MELODY)
    page.arrow(19.5, 40, 28, 40)
    page.box(28, 36.5, 14, 7, "chroma", "chroma.py")
    one_hot = chroma(separate(melody[None], RATE, "hpss")[0], argmax=True)
    draw_chroma(page.panel(45, 35, 10.5, 10), one_hot, 10, labels=False)
    page.text(50.3, 32, "(B, M, Q)", size=8, ha="center")
    page.arrow(42, 40, 44.6, 40)
    page.arrow(55.8, 40, 57, 40)


def draw_transformer(page):
    page.axes.add_patch(patch((57, 19), 20, 40, "#ffffff", INK, 1.6, 1.4))
    page.text(67, 56.2, "transformer", ha="center", va="center", size=12, weight="bold")
    page.file(67, 53.4, "lm.py")
    for n in range(6):
        page.bar(60.5, 36.2 + 2.6 * n, 13, 1.9, "#dfe5f2")
    page.text(67, 34.2, "causal layers", ha="center", va="center", size=8)
    page.bar(59, 28.6, 5, 3.2, MELODY, "melody")
    page.bar(64.2, 28.6, 3.6, 3.2, WORDS, "text")
    page.bar(68, 28.6, 7, 3.2, BOOKS[0], "codes")
    page.text(67, 26.2, "prefix, then the music so far", ha="center", size=7.5)
    page.text(67, 21.4, "logits = unconditional + guidance\n× (conditional − unconditional)", ha="center",
              size=7)


def draw_decoding(page, codes, wav):
    page.arrow(77, 40, 84, 40, "K linear\nheads")
    few, _ = patterns.DelayPattern((0, 1, 2, 3)).build(codes[None, :, 200:204], 512)
    draw_cells(page.panel(84.5, 35, 19, 10), few[0], 512, size=6.5)
    page.text(94, 46.5, "codes, one column of the pattern a call", ha="center", size=8)
    page.file(94, 32.4, "patterns.py")
    page.arrow(104, 40, 109, 40, "(B, K, T)")
    page.box(109, 36.5, 18, 7, "EnCodec decoder", "encodec.py")
    page.arrow(118, 36.5, 118, 31.5)
    spectrogram = page.panel(103, 14, 25, 17)
    draw_spectrogram(spectrogram, wav, top=4000)
    spectrogram.set_yticks([])
    page.text(103, 11.7, "music (B, C, L), from the shipped model", size=8.5)


def draw_encoding(page):
    page.text(2, 17, "training: music", size=9, color=FAINT)
    draw_wave(page.panel(2, 8.5, 17, 8), clip(1)[0][:5 * RATE], FAINT)
    page.arrow(19.5, 12.5, 24, 12.5, color=FAINT)
    page.box(24, 9, 17, 7, "EnCodec encoder", "encodec.py")
    page.arrow(41, 12.5, 45, 12.5, color=FAINT)
    page.box(45, 9, 17, 7, "residual quantizer", "rvq.py")
    page.arrow(62, 12.5, 72, 12.5, color=FAINT)
    page.axes.plot([72, 72], [12.5, 12.5], color=FAINT)
    page.arrow(72, 12.5, 72, 19, color=FAINT)
    page.text(63, 9.4, "codes (B, K, T)\ncross-entropy of the next column", size=8, va="center")


def output():
    """What README's first command makes: the melody asked for, and the spectrogram of the music."""
    codes, wav = first_command()
    asked = pitch_classes(model().melody_chroma(read_audio(TUNE, RATE, 1), stem="hpss"), 12)
    asked = match_length(asked[None], math.ceil(10 * RATE / 2048))[0]
    fig, (top, bottom) = figure(11, 4.6, 2, 1, height_ratios=(1, 2.6), sharex=True)
    draw_chroma(top, asked, 10, f"asked for: the pitch classes of Ode to Joy, and “{TEXT}”")
    followed = f"{agreement(stem_chroma(wav), asked)} of its frames have the pitch class asked for"
    draw_spectrogram(bottom, wav, top=4000, title=f"what comes out, in Hz ({followed})")
    bottom.set_xlabel("seconds")
    save(fig, "output", 40, 115)


def five_patterns():
    """The five layouts, four frames of four codebooks (figure 1 of the paper)."""
    shown = {                                           # name: (pattern, column and row on the page)
        "delay": (patterns.DelayPattern((0, 1, 2, 3)), 0, 0),
        "parallel": (patterns.ParallelPattern(4), 10.5, 0),
        "coarse first": (patterns.CoarseFirstPattern((0, 0, 0)), 17.5, 0),
        "flattening (unroll)": (patterns.UnrollPattern((0, 1, 2, 3)), 0, 1),
        "MusicLM, groups of two": (patterns.MusicLMPattern(4), 0, 2)}
    codes, fig = torch.arange(1, 5).expand(1, 4, -1), figure(11, 4.9)
    for name, (pattern, x, row) in shown.items():
        sequence = pattern.build(codes, special=0)[0][0]
        S = sequence.shape[1]
        left, bottom = (0.9 + x * 0.365) / 11, (3.55 - 1.6 * row) / 4.9
        axes = fig.add_axes((left, bottom, S * 0.365 / 11, 1.02 / 4.9))
        draw_cells(axes, sequence, 0)
        axes.set_title(f"{name}: {S} columns", size=10, pad=5)
        if x == 0:
            axes.set_yticks([3.5, 2.5, 1.5, 0.5], ["k1", "k2", "k3", "k4"])
            axes.tick_params(length=0)
    fig.text(0.68, 0.46, "Each column but the first is predicted\nby one call of the model. A number is a\n"
             "frame, a color a codebook, a dot the\nspecial token.", size=9, va="top", color=FAINT)
    save(fig, "patterns")


def melody():
    """From a recording to the chroma of it: the first test clip with drums and bass, these made 10 dB louder.
    (As they are, the melody of most clips is loud enough to win the argmax unseparated.)"""
    both = (n for n in range(100) if clip(n)[3]["drums"] and clip(n)[3]["bass"])
    mix, alone, caption, _ = clip(next(both))
    mix, alone = (alone + 3 * (mix - alone))[:8 * RATE], alone[:8 * RATE]
    stem, truth = separate(mix[None], RATE, "hpss")[0], chroma(alone, argmax=True)
    before, after = agreement(chroma(mix), truth), agreement(chroma(stem), truth)
    fig, axes = figure(11, 8, 5, 1, sharex=True, height_ratios=(1, 1.5, 1.5, 1.5, 1.5))
    draw_wave(axes[0], mix, FAINT)
    axes[0].set_title(f"a recording (“{caption}”) with loud drums and bass")
    draw_chroma(axes[1], chroma(mix), 8, f"its chroma: in {before} of frames the melody's class is strongest")
    draw_chroma(axes[2], chroma(stem), 8, f"after stem separation (hpss): {after}")
    draw_chroma(axes[3], chroma(stem, argmax=True), 8, "after argmax: what the model gets")
    draw_chroma(axes[4], truth, 8, "the same of the melody alone")
    axes[4].set_xlabel("seconds")
    save(fig, "chroma", 32, 100)


def residual():
    """Four codebooks of eight entries close in on a vector in the plane; the distances of the shipped codec.

    The vector is the first of those that every codebook brings nearer by a third. (One that is near already
    may be pushed away a little.)
    """
    torch.manual_seed(0)
    rvq, vectors = ResidualVectorQuantizer(2, 4, 8, kmeans_iters=20), torch.randn(1, 2, 4096)
    for _ in range(20):
        rvq(vectors)
    codes = rvq.eval().encode(vectors)
    errors = [(vectors - rvq.decode(codes[:, :k])).norm(dim=1)[0] for k in range(1, 5)]
    errors = torch.stack(errors)                                            # (K, 4096)
    nearer = (errors[1:] < errors[:-1] / 1.5).all(0) & (vectors[0].norm(dim=0) < 2)
    first = int(nearer.nonzero()[0])
    x, codes = vectors[0, :, first], codes[0, :, first]
    fig, here, reach = figure(13, 3.5), torch.zeros(2), 2.6
    for k, book in enumerate(rvq.codebooks):
        axes = fig.add_axes((0.01 + 0.195 * k, 0.05, 0.185, 0.8))
        center = torch.zeros(2) if k == 0 else x
        entries, chosen = here + book.embed, int(codes[k])
        draw_regions(axes, entries, chosen, center, reach)
        inside = (here - center).abs().max() < reach
        arrow = dict(arrowstyle="-|>", color=BOOKS[k], linewidth=2, shrinkA=0, shrinkB=0)
        axes.annotate("", entries[chosen].tolist(), here.tolist(), arrowprops=arrow,
                      annotation_clip=not inside)
        axes.plot(*entries[chosen], "o", color=BOOKS[k], markersize=6)
        axes.plot(*x, "x", color=INK, markersize=9, markeredgewidth=2)
        here = entries[chosen]
        error = float((here - x).norm() / x.norm())
        axes.set_title(f"codebook {k + 1}: entry {chosen}, error {error:.3f}", size=9.5)
        reach = max(1.35 * float((here - x).norm()), 0.02)
    draw_distances(fig.add_axes((0.835, 0.19, 0.155, 0.64)))
    save(fig, "rvq")


def draw_regions(axes, entries, chosen, center, reach):
    """Which entry is nearest where, in a window of half width `reach` around `center`."""
    line = torch.linspace(-reach, reach, 200)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + center
    nearest = torch.cdist(grid.view(-1, 2), entries).argmin(1).view(200, 200)
    window = [float(center[axis]) + side * reach for axis in (0, 1) for side in (-1, 1)]
    shade = paper_to("#cfd6e6")
    axes.imshow(nearest == chosen, origin="lower", cmap=shade, vmin=0, vmax=1, extent=window)
    borders = dict(levels=np.arange(8) + 0.5, colors="white", linewidths=0.8)
    axes.contour(grid[..., 0], grid[..., 1], nearest, **borders)
    axes.plot(*entries.T, "o", color=FAINT, markersize=4)
    axes.set(xticks=[], yticks=[], xlim=window[:2], ylim=window[2:])
    axes.spines[:].set_visible(False)


def audible() -> Config:
    """The codec's configuration with the floor that its training starts from: silence has no color."""
    return dataclasses.replace(codec().config, mel_floor=codec().config.mel_floor_start)


def draw_distances(axes):
    """Mel distance of eight test clips from their reconstructions with 1 to 4 codebooks."""
    music = torch.stack([clip(n)[0][:10 * RATE] for n in range(8)])[:, None]
    codes = codec().encode(music)
    left = [float(mel_loss(audible(), music, codec().decode(codes[:, :k]))) for k in range(1, 5)]
    axes.bar(range(1, 5), left, color=BOOKS, width=0.7)
    axes.set_ylim(0, 1.15 * left[0])
    for k, value in enumerate(left, 1):
        axes.text(k, value * 1.01 + 0.0002, f"{value:.4f}", ha="center", size=8)
    axes.set(xticks=range(1, 5), yticks=[], xlabel="codebooks")
    axes.spines["left"].set_visible(False)
    axes.set_title("mel distance, shipped codec,\neight test clips", size=9.5)


def codebooks():
    """Where the shipped codec errs with one to four codebooks: the cells whose mean is the mel distance."""
    wav, seconds, top = read_audio(TUNE, RATE, 1, duration=10.0)[0], 10, 3000
    codes = codec().encode(wav[None, None])
    fig, axes = figure(13, 3.3, 1, 5, sharey=True)
    draw_spectrogram(axes[0], wav, top=top, title="Ode to Joy, 256 kb/s")
    for k in range(1, 5):
        output = codec().decode(codes[:, :k])[0, 0, :len(wav)]
        distance = float(mel_loss(audible(), wav[None, None], output[None, None]))
        image = axes[k].imshow(mel_errors(wav, output), origin="lower", aspect="auto", vmin=0, vmax=0.6,
                               cmap=paper_to("#8a1f10"), extent=(0, seconds, mel(64), mel(RATE / 2)))
        axes[k].set_title(f"{k} codebook{'s' * (k > 1)}, {k * codec().bandwidth:.2f} kb/s:\n"
                          f"distance {distance:.4f}", size=9.5)
    axes[0].set(ylabel="Hz", ylim=(mel(64), mel(top)))
    axes[2].set_xlabel("seconds")
    bar = fig.colorbar(image, ax=axes[4], aspect=30, extend="max")
    bar.set_label("error of the mel spectrogram")
    bar.outline.set_visible(False)
    save(fig, "codebooks", 128, 100)


def mel_errors(wav, output, n_fft=1024):
    """Two waves (L,) -> (n_mels, frames), whose mean is one window's part of the mel distance."""
    config = audible()
    filters = mel_filters(n_fft, RATE, config.n_mels, "cpu")
    x, y = (power_spectrogram(w[None, None], n_fft)[0, 0].mT @ filters for w in (wav, output))
    log_x, log_y = (x + config.mel_floor).log10(), (y + config.mel_floor).log10()
    return ((x - y).abs() + (log_x - log_y).square()).mT


def attention():
    """Where the music attends to in the melody prefix: the trained model, test clip 0 and its own melody."""
    config = model().config
    weights = attention_weights()                                           # (layers, H, S, M)
    share = weights.sum(-1).mean(-1)                                        # of attention, to the melody
    n, h = divmod(int(share.flatten().argmax()), config.num_heads)
    fig, (left, middle, right) = figure(13, 4.4, 1, 3, width_ratios=(1, 1, 0.8))
    span, hop = config.segment_duration, config.hop / RATE
    for axes, image, title in (
            (left, weights.mean((0, 1)), "mean over all layers and heads"),
            (middle, weights[n, h], f"layer {n + 1}, head {h + 1}, which attends to the melody most")):
        axes.imshow(image.numpy() ** 0.5, origin="lower", aspect="auto", cmap=paper_to(BOOKS[0]),
                    extent=(0, weights.shape[-1] * hop, 0, span), interpolation="nearest")
        axes.set(xlabel="melody frame, its time in s", title=title)
    left.set_ylabel("column of the music, its time in s")
    right.imshow(100 * share.numpy(), cmap=paper_to(BOOKS[0]), vmin=0, aspect="auto")
    for i, j in np.ndindex(*share.shape):
        right.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", size=9,
                   color="white" if share[i, j] > 0.6 * share.max() else INK)
    right.set(xticks=range(config.num_heads), yticks=range(config.num_layers), xlabel="head", ylabel="layer",
              title="% of the music's attention\nthat goes to the melody")
    right.set_xticklabels(range(1, config.num_heads + 1))
    right.set_yticklabels(range(1, config.num_layers + 1))
    right.tick_params(length=0)
    save(fig, "attention")


@torch.no_grad()
def attention_weights():
    """Attention of every layer and head from the music to the melody, (layers, H, S, M)."""
    lm, (mix, alone, caption, _) = LMModel.from_pretrained(DEFAULT_CHECKPOINT, torch.float32).eval(), clip(0)
    config, seen = lm.config, []
    L, M = round(config.segment_duration * RATE), config.chroma_frames

    def look(module, args):     # what Attention.forward does, with the weights that it never forms
        x, angles = args[:2]
        qkv = module.qkv(x).view(*x.shape[:2], 3, module.num_heads, -1)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(module.q_norm(q), angles), rotate(module.k_norm(k), angles)
        scores = (q @ k.mT * q.shape[-1] ** -0.5)[0]
        later = torch.ones_like(scores).triu(1) > 0
        seen.append(scores.masked_fill(later, float("-inf")).softmax(-1))   # (H, P + S, P + S)

    for layer in lm.layers:
        layer.attn.register_forward_pre_hook(look)
    codes = codec().encode(mix[None, None, :L])
    asked = match_length(model().melody_chroma(alone, stem="none")[None], M)
    lm.compute_predictions(codes, lm.conditioner({"text": [caption], "melody": [asked[0]]}))
    P = seen[0].shape[-1] - codes.shape[-1] - 1
    return torch.stack(seen)[:, :, P:, :M]


def training():
    """Cross-entropy of each codebook over the training that made the language model of checkpoints/tiny."""
    lines = [json.loads(line) for line in (DEFAULT_CHECKPOINT / "metrics.jsonl").read_text().splitlines()]
    uniform = math.log(model().config.card)
    fig, axes = figure(11, 4.2, 1, 1)
    for k in range(4):
        for split, name, look in (
                ("train", f"ce_{k + 1}", dict(linewidth=1.2, alpha=0.85, label=f"codebook {k + 1}")),
                ("valid", f"own_ce_{k + 1}", dict(marker="o", markersize=6, linestyle="none"))):
            rows = [line for line in lines if line["split"] == split]
            x, y = [line["update"] for line in rows], [line[name] for line in rows]
            axes.plot(x, y, color=BOOKS[k], **look)
        axes.annotate(f"{y[-1]:.2f}", (x[-1], y[-1]), (8, 0), textcoords="offset points", va="center", size=9,
                      color=BOOKS[k])
    axes.axhline(uniform, color=FAINT, linestyle=":", linewidth=1)
    axes.text(axes.get_xlim()[1], uniform, f"ln {model().config.card}, all codes alike ", ha="right",
              va="bottom", size=8, color=FAINT)
    title = "how checkpoints/tiny was trained (lines: training, with its dropouts; dots: validation)"
    axes.set(xlabel="update", ylabel="cross-entropy, nats", title=title)
    axes.set_ylim(top=uniform + 0.9)    # room for the legend
    axes.legend(ncols=4, loc="upper center")
    save(fig, "training")


def dadaptation():
    """D-Adaptation finds its learning rate: a run of train.py, small enough to be made while you wait."""
    with tempfile.TemporaryDirectory() as folder:
        lines = short_run(folder)
    x, d = [line["update"] for line in lines], [line["d_lr"] / line["lr"] for line in lines]
    fig, (left, right) = figure(11, 3.6, 1, 2)
    left.semilogy(x, d, color=BOOKS[0], linewidth=2, label="d, the estimate")
    left.semilogy(x, [line["d_lr"] for line in lines], color=BOOKS[2], linewidth=1.5,
                  label="d_lr, d times the schedule: the step size")
    left.set(xlabel="update", title=f"d grows from 1e-6 to {d[-1]:.1e}, and never falls")
    left.legend(loc="lower center")
    right.plot(x, [line["loss"] for line in lines], color=BOOKS[3], linewidth=1.5)
    right.set(xlabel="update", title="cross-entropy meanwhile, nats")
    save(fig, "dadaptation", 24, 110)


def short_run(folder) -> list[dict]:
    """400 updates of a small language model with D-Adaptation -> the lines of its metrics.jsonl."""
    tunes.main(["--out", f"{folder}/tunes", "--clips", "0", "2", "0", "--workers", "1"])
    codec_folder = str(DEFAULT_CHECKPOINT / "codec")
    config = str(ROOT / "config" / "tiny.py")
    prepare.main([f"{folder}/tunes/valid/songs", "--out", f"{folder}/prepared/train", "--config", config,
                  "--codec", codec_folder, "--stem", "none"])
    train.train(load([
        config, f"--codec={codec_folder}", f"--data_dir={folder}/prepared",
        f"--out_dir={folder}/run", "--optim=dadam", "--lr=1", "--weight_decay=0.1", "--dim=128",
        "--num_layers=3", "--segment_duration=1.28", "--batch_size=4", "--epochs=1",
        "--updates_per_epoch=400", "--warmup=50", "--log_every=2", "--valid_every=0", "--save_every=0",
        "--dtype=float32"]))
    lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train" and line["lr"]]


def followed():
    """The melody asked for against the melody of the music made, for the first three of the eight samples."""
    captions, asked, wavs = eight()
    found, span = [stem_chroma(wav[0]) for wav in wavs], model().config.segment_duration
    fig, axes = figure(13, 3.7, 2, 3, sharex=True)
    for n in range(3):
        M = asked.shape[1]
        draw_chroma(axes[0, n], asked[n], span, "asked for", labels=n == 0)
        title = f"found in what was made: the same in {agreement(found[n][:M], asked[n])} of frames"
        draw_chroma(axes[1, n], found[n][:M], span, title, labels=n == 0)
        axes[1, n].set_xlabel("seconds")
    save(fig, "melody")


def samples():
    """Eight unpicked samples beside their prompts: text, melody (red) and the spectrogram of the music."""
    captions, asked, wavs = eight()
    span = model().config.segment_duration
    fig, axes = figure(13, 9, 4, 4, height_ratios=(1, 2.4) * 2, sharex=True)
    for n in range(8):
        row, column = 2 * (n // 4), n % 4
        title = "\n".join(textwrap.wrap(f"“{captions[n]}”", 42)[:3])
        draw_chroma(axes[row, column], asked[n], span, labels=column == 0)
        axes[row, column].set_title(title, size=8.5)
        draw_spectrogram(axes[row + 1, column], wavs[n, 0], top=5000)
        found = stem_chroma(wavs[n, 0])[:asked.shape[1]]
        axes[row + 1, column].set_title(f"melody agreement {agreement(found, asked[n])}", size=8.5)
        if column:
            axes[row + 1, column].set_yticks([])
    for column in range(4):
        axes[3, column].set_xlabel("seconds")
    save(fig, "samples", 20, 78)


def served():
    """The page of `python sample.py --serve` after a take, in a browser."""
    sys.path.append(str(ROOT / "tests"))
    from browser import CHROMIUM, Browser
    if CHROMIUM is None:
        raise UserError("the picture `serve` needs Chromium or Chrome; install it, or name other pictures")
    from tools.server import open_server
    ready = "document.getElementById('status').textContent.endsWith(%r)"
    loading = {"checkpoint": str(DEFAULT_CHECKPOINT)}
    with open_server(model(), loading, 0) as server, tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Browser(folder) as browser:
            browser.resize(1100, 940)
            browser.open(f"http://127.0.0.1:{server.server_port}/")
            browser.wait("document.body.dataset.ready")
            browser.choose_file("#file", TUNE)
            browser.wait(ready % "Melody ready.")
            for word in ("slow", "flute", "alone"):
                browser.run(f"[...chips.children].find(chip => chip.textContent == {word!r}).click()")
            browser.run("document.getElementById('new-seed').checked = false")
            browser.click("#play")
            browser.wait(ready % "is ready.", 120)
            browser.wait("document.getElementById('player').duration > 0")
            browser.screenshot(f"{folder}/page.png")
        save_small(f"{folder}/page.png", "serve", 48)
        server.shutdown()


PICTURES = {"system": system, "output": output, "patterns": five_patterns, "rvq": residual,
            "codebooks": codebooks, "chroma": melody, "attention": attention, "training": training,
            "dadaptation": dadaptation, "melody": followed, "samples": samples,
            "serve": served}
MODEL = ("system", "output", "rvq", "codebooks", "attention", "training", "melody", "samples",
         "serve")


def main(argv):
    names = list(MODEL) if argv == ["model"] else argv or list(PICTURES)
    for name in names:
        if name not in PICTURES:
            raise UserError(f"{name}: no such picture; there are {', '.join(PICTURES)}, and `model` for "
                            f"those of the trained model")
    try:
        import matplotlib  # noqa: F401  an optional extra
    except ImportError:
        raise UserError("the pictures need matplotlib; pip install matplotlib") from None
    torch.manual_seed(0)
    for name in names:
        PICTURES[name]()


if __name__ == "__main__":
    run(main, sys.argv[1:])
