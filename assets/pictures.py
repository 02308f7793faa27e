"""The pictures of the README, drawn by the code that they are about.

    pip install matplotlib
    python assets/pictures.py                   # all of them, a few minutes on two cores
    python assets/pictures.py patterns melody   # some of them

Every picture is a function of its own name and makes assets/NAME.png. Those of the trained model (MODEL below) change
with checkpoints/tiny; `python assets/pictures.py model` draws these again. Nothing is picked: what is shown are the
first command of the README, and the first clips of the test split of data/tunes.py with its default seed.
"""
import functools
import io
import json
import math
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project, wherever this is called from
import patterns
import train
from chroma import PITCH_CLASSES, ChromaExtractor, chroma_agreement, match_length, separate
from config import UserError, run, write_atomic
from data import prepare, tunes
from data.audio import read_audio
from encodec import EncodecModel
from lm import LMModel, rotate
from rvq import ResidualVectorQuantizer
from sample import DEFAULT_CHECKPOINT, MusicGen

INK, FAINT, PAPER, PANEL = "#22252b", "#8a8f99", "#fdfcf9", "#f1eee6"
BOOKS = ("#24478f", "#2a8c82", "#d99a2b", "#c8503c")   # codebooks 1 - 4
MELODY = "#c8503c"
RATE = 16000                                           # of the tiny model, Hz
TEXT, TUNE = "a slow flute tune", ROOT / "assets" / "ode_to_joy.wav"   # of the README's first command


# --- what is drawn: sounds, spectrograms, chroma -----------------------------------------------------------------

@functools.cache
def clip(index: int, seconds: float = 12):
    """Clip `index` of the test split of data/tunes.py -> its mix (L,), its melody alone (L,), caption, ground truth."""
    tune = tunes.split("test")[index]
    words, rng = (np.random.default_rng([0, tunes.SPLITS.index("test"), index, i]) for i in range(2))
    truth = tunes.draw(tune, rng)
    caption = tunes.sidecar(tune, truth, words)["description"]
    shift = tunes.fit(tune, truth["instrument"], tunes.KEYS[tune.mode].index(truth["key"]))
    mix, melody = tunes.render(tune, truth["instrument"], truth["bpm"], shift, truth["drums"], truth["bass"], seconds, RATE, rng)
    return torch.from_numpy(mix), torch.from_numpy(melody), caption, truth


@functools.cache
def codec():
    return EncodecModel.from_pretrained(DEFAULT_CHECKPOINT / "codec")


@functools.cache
def model():
    return MusicGen.from_pretrained(DEFAULT_CHECKPOINT, "cpu")


@functools.cache
def first_command():
    """What `python sample.py --text "a slow flute tune" --melody assets/ode_to_joy.wav` makes -> codes (K, T), wav (L,)."""
    melody = model().melody_chroma(read_audio(TUNE, RATE, 1), stem="hpss")
    codes = model().generate_codes([TEXT], [melody], duration=10.0, seeds=[0])
    return codes[0], model().decode(codes, 10.0)[0, 0]


@functools.cache
def eight():
    """The texts of the first eight test clips, each with the melody of the next one, as `--eval` asks for them.
    -> captions, chroma asked for (8, M, Q), wavs (8, 1, L)."""
    captions, config = [clip(n)[2] for n in range(8)], model().config
    melodies = [match_length(chroma(clip((n + 1) % 8)[1], argmax=True)[None], config.chroma_frames)[0] for n in range(8)]
    codes = model().generate_codes(captions, melodies, duration=config.segment_duration)
    return captions, torch.stack(melodies), model().decode(codes)


def chroma(wav, argmax=False):
    """Wave (L,) at the rate of the tiny model -> chroma (M, Q)."""
    return ChromaExtractor(RATE, radix2_exp=13, argmax=argmax)(wav[None])[0]


def stem_chroma(wav):
    """Wave (L,) -> chroma (M, Q) of its melody stem, as the measures of data/measures.py hear it."""
    return chroma(separate(wav[None], RATE, "hpss")[0])


def agreement(heard, asked) -> str:
    return f"{100 * chroma_agreement(heard, asked):.0f} %"


def mel(hz):
    return 2595 * np.log10(1 + hz / 700)


# --- how it is drawn --------------------------------------------------------------------------------------------

def figure(width: float, height: float, *grid, **options):
    """A figure of so many inches, and its axes if `grid` says how many (rows, columns)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "font.size": 9,
        "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
        "axes.titlecolor": INK, "axes.titlesize": 10,
        "axes.titlelocation": "left", "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "xtick.major.width": 0.8,
        "ytick.major.width": 0.8, "legend.frameon": False, "figure.constrained_layout.h_pad": 0.08,
        "figure.constrained_layout.w_pad": 0.08})
    if not grid:
        return plt.figure(figsize=(width, height))
    return plt.subplots(*grid, figsize=(width, height), layout="constrained", **options)


def save(fig, name: str, colours: int = 64, dpi: int = 150):
    """Writes assets/NAME.png with a palette, which a picture of few colours does not miss."""
    import matplotlib.pyplot as plt
    from PIL import Image
    raw, small = io.BytesIO(), io.BytesIO()
    fig.savefig(raw, dpi=dpi)
    plt.close(fig)
    Image.open(raw).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    write_atomic(ROOT / "assets" / f"{name}.png", small.getvalue())
    print(f"assets/{name}.png  {len(small.getvalue()) / 1000:.0f} kB")


def draw_spectrogram(axes, wav, seconds=None, top=6000, title=None):
    """Wave (L,) -> decibels over time and frequency, the latter as the ear has it (mel)."""
    wav = wav[:round(seconds * RATE)] if seconds else wav
    power = torch.stft(wav, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs().square().numpy()
    decibels = 10 * np.log10(power + 1e-9)
    hz, places = np.linspace(0, RATE / 2, len(power)), np.linspace(mel(60), mel(top), 160)
    rows = np.array([np.interp(places, mel(hz), column) for column in decibels.T]).T
    axes.imshow(rows, origin="lower", aspect="auto", cmap="magma", vmin=rows.max() - 50, vmax=rows.max(),
                interpolation="bilinear", extent=(0, len(wav) / RATE, mel(60), mel(top)))
    ticks = [hz for hz in (250, 500, 1000, 2000, 4000) if hz < top]
    axes.set_yticks([mel(hz) for hz in ticks], [f"{hz / 1000:g} k" if hz >= 1000 else f"{hz}" for hz in ticks])
    if title:
        axes.set_title(title)


def draw_chroma(axes, chroma, seconds, title=None, labels=True):
    """Chroma (M, Q) over so many seconds."""
    axes.imshow(chroma.T, origin="lower", aspect="auto", cmap=paper_to(MELODY), vmin=0, vmax=1, interpolation="nearest",
                extent=(0, seconds, -0.5, 11.5))
    axes.set_yticks(range(0, 12, 2) if labels else [], PITCH_CLASSES[::2] if labels else [])
    axes.tick_params(axis="y", length=0, labelsize=7)
    if title:
        axes.set_title(title)


def paper_to(colour: str):
    from matplotlib.colors import LinearSegmentedColormap
    return LinearSegmentedColormap.from_list("", [PANEL, colour])


def draw_wave(axes, wav, colour=INK):
    """Wave (L,) as its extremes in 800 places."""
    parts = wav[:len(wav) // 800 * 800].view(800, -1)
    x = np.linspace(0, len(wav) / RATE, 800)
    axes.fill_between(x, parts.amin(1), parts.amax(1), color=colour, linewidth=0)
    axes.set_xlim(0, x[-1])
    axes.set_yticks([])


def draw_cells(axes, sequence, special: int, colours=BOOKS, numbers=True, size=8):
    """Codes (K, S) as coloured cells, codebook 1 on top; the special token is a dot."""
    K, S = sequence.shape
    for k, row in enumerate(sequence.tolist()):
        for s, value in enumerate(row):
            real = value != special
            axes.add_patch(patch((s + 0.04, K - 1 - k + 0.06), 0.92, 0.88, colours[k] if real else PANEL))
            if numbers:
                axes.text(s + 0.5, K - 0.5 - k, str(value) if real else "·", ha="center", va="center", size=size,
                          color="white" if real else FAINT)
    axes.set(xlim=(0, S), ylim=(0, K), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def patch(corner, width, height, colour, edge="none", line=1.0, radius=0.12):
    from matplotlib.patches import FancyBboxPatch
    return FancyBboxPatch(corner, width, height, boxstyle=f"round,pad=0,rounding_size={radius}", facecolor=colour, edgecolor=edge,
                          linewidth=line)


# --- the pictures ------------------------------------------------------------------------------------------------

def system():
    """All of it on one page, with real data: the README's first command, and what training sees."""
    fig = figure(13, 6.3)
    page = fig.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, 130), ylim=(0, 63))
    page.axis("off")

    def place(x, y, width, height):
        axes = fig.add_axes((x / 130, y / 63, width / 130, height / 63))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def box(x, y, width, height, title, below, colour="#ffffff"):
        page.add_patch(patch((x, y), width, height, colour, INK, 1.3, 1.2))
        page.text(x + width / 2, y + height / 2 + 1.3, title, ha="center", va="center", size=11, weight="bold")
        page.text(x + width / 2, y + height / 2 - 1.7, below, ha="center", va="center", size=8.5, color=FAINT, family="monospace")

    def arrow(x, y, to_x, to_y, label="", colour=INK, style="-"):
        page.annotate("", (to_x, to_y), (x, y), arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=1.4, linestyle=style,
                                                                shrinkA=0, shrinkB=0, mutation_scale=12))
        page.text((x + to_x) / 2, (y + to_y) / 2 + 1, label, ha="center", va="bottom", size=8, color=colour)

    melody = read_audio(TUNE, RATE, 1)[0, :10 * RATE]
    codes, wav = first_command()
    # text and melody
    page.text(2, 57, "text", size=9, color=FAINT)
    page.text(2, 53, f"“{TEXT}”", size=11, style="italic")
    arrow(19.5, 53.5, 28, 53.5)
    box(28, 50, 14, 7, "T5", "conditioners.py")
    arrow(42, 53.5, 57, 53.5, "(B, P, D)")
    page.text(2, 44.5, "melody", size=9, color=FAINT)
    draw_wave(place(2, 36, 17, 8), melody, MELODY)
    arrow(19.5, 40, 28, 40)
    box(28, 36.5, 14, 7, "chroma", "chroma.py")
    heard = chroma(separate(melody[None], RATE, "hpss")[0], argmax=True)
    draw_chroma(place(45, 35, 10.5, 10), heard, 10, labels=False)
    page.text(50.3, 32, "(B, M, 12)", size=8, ha="center")
    arrow(42, 40, 44.6, 40)
    arrow(55.8, 40, 57, 40)
    # the transformer
    page.add_patch(patch((57, 19), 20, 40, "#ffffff", INK, 1.6, 1.4))
    page.text(67, 56.2, "transformer", ha="center", va="center", size=12, weight="bold")
    page.text(67, 53.4, "lm.py", ha="center", va="center", size=8.5, color=FAINT, family="monospace")
    for n in range(6):
        page.add_patch(patch((60.5, 35 + 2.7 * n), 13, 1.9, "#dfe5f2", "none", 0, 0.6))
    page.text(67, 33, "N causal layers", ha="center", va="center", size=8)
    for x, width, colour, name in ((59, 5, MELODY, "melody"), (64.2, 3.6, "#7a5ea8", "text"), (68, 7, BOOKS[0], "codes")):
        page.add_patch(patch((x, 27), width, 3.2, colour, "none", 0, 0.5))
        page.text(x + width / 2, 28.6, name, ha="center", va="center", size=6.5, color="white")
    page.text(67, 24.7, "prefix, then the music so far", ha="center", size=7.5)
    page.text(67, 21.4, "$s_{u} + g\\,(s_{c} - s_{u})$", ha="center", size=10)
    # codes, codec, music
    arrow(77, 40, 84, 40, "K heads")
    pattern = patterns.DelayPattern((0, 1, 2, 3))
    few, _ = pattern.build(codes[None, :, 200:204], 512)
    draw_cells(place(84.5, 35, 19, 10), few[0], 512, size=6.5)
    page.text(94, 46.5, "codes, a delayed column a step", ha="center", size=8)
    page.text(94, 32, "patterns.py", ha="center", size=8.5, color=FAINT, family="monospace")
    arrow(104, 40, 109, 40, "(B, K, T)")
    box(109, 36.5, 18, 7, "EnCodec decoder", "encodec.py")
    arrow(118, 36.5, 118, 31.5)
    spectrum = place(103, 14, 25, 17)
    draw_spectrogram(spectrum, wav, top=4000)
    spectrum.set_yticks([])
    page.text(103, 11.7, "music (B, C, L), from the shipped model", size=8.5)
    # training
    mix = clip(1)[0][:5 * RATE]
    page.text(2, 17, "training: music", size=9, color=FAINT)
    draw_wave(place(2, 8.5, 17, 8), mix, FAINT)
    arrow(19.5, 12.5, 24, 12.5, colour=FAINT)
    box(24, 9, 17, 7, "EnCodec encoder", "encodec.py")
    arrow(41, 12.5, 45, 12.5, colour=FAINT)
    box(45, 9, 17, 7, "residual quantizer", "rvq.py")
    arrow(62, 12.5, 72, 12.5, colour=FAINT)
    page.plot([72, 72], [12.5, 12.5], color=FAINT)
    arrow(72, 12.5, 72, 19, colour=FAINT)
    page.text(63, 9.4, "codes (B, K, T)\ncross-entropy of the next column", size=8, va="center")
    page.text(2, 3, "Every panel is real data. Dark arrows: sampling (sample.py). Grey arrows: training (train.py).", size=8,
              color=FAINT)
    save(fig, "system")


def output():
    """What the README's first command makes: the melody asked for, and the spectrogram of the music."""
    codes, wav = first_command()
    asked = model().melody_chroma(read_audio(TUNE, RATE, 1), stem="hpss")
    fig, (top, bottom) = figure(11, 4.6, 2, 1, height_ratios=(1, 2.6), sharex=True)
    asked = match_length(asked[None], math.ceil(10 * RATE / 2048))[0]
    draw_chroma(top, asked, 10, "asked for: the pitch classes of Ode to Joy, and “a slow flute tune”")
    heard = stem_chroma(wav)
    followed = f"{agreement(heard, asked)} of its frames have the pitch class asked for"
    draw_spectrogram(bottom, wav, top=4000, title=f"what comes out, in Hz ({followed})")
    bottom.set_xlabel("seconds")
    save(fig, "output", 40, 115)


def five_patterns():
    """The five layouts, four frames of four codebooks (figure 1 of the paper)."""
    shown = {"delay": patterns.DelayPattern((0, 1, 2, 3)), "parallel": patterns.ParallelPattern(4),
             "coarse first": patterns.CoarseFirstPattern((0, 0, 0)),
             "flattening (unroll)": patterns.UnrollPattern((0, 1, 2, 3)),
             "MusicLM, groups of two": patterns.MusicLMPattern(4)}
    codes, fig = torch.arange(1, 5).expand(1, 4, -1), figure(11, 4.9)
    sequences = {name: pattern.build(codes, special=0)[0][0] for name, pattern in shown.items()}
    places = {"delay": (0, 0), "parallel": (10.5, 0), "coarse first": (17.5, 0), "flattening (unroll)": (0, 1),
              "MusicLM, groups of two": (0, 2)}
    for name, sequence in sequences.items():
        (x, row), S = places[name], sequence.shape[1]
        axes = fig.add_axes(((0.9 + x * 0.365) / 11, (3.55 - 1.6 * row) / 4.9, S * 0.365 / 11, 1.02 / 4.9))
        draw_cells(axes, sequence, 0)
        axes.set_title(f"{name}: {S} columns", size=10, pad=5)
        if x == 0:
            axes.set_yticks([3.5, 2.5, 1.5, 0.5], ["k1", "k2", "k3", "k4"])
            axes.tick_params(length=0)
    fig.text(0.68, 0.46, "A column is one step of the model;\na number is a frame, a colour a codebook,\n"
             "a dot the special token.", size=9, va="top", color=FAINT)
    save(fig, "patterns")


def melody():
    """From a recording to what the model hears of it: the first test clip with drums and bass, these turned up by 14 dB.
    (As they are, the melody of most clips is loud enough to win the argmax unseparated.)"""
    mix, alone, caption, _ = next(clip(n) for n in range(100) if clip(n)[3]["drums"] and clip(n)[3]["bass"])
    mix, alone = (alone + 5 * (mix - alone))[:8 * RATE], alone[:8 * RATE]
    stem, truth = separate(mix[None], RATE, "hpss")[0], chroma(alone, argmax=True)
    fig, axes = figure(11, 8, 5, 1, sharex=True, height_ratios=(1, 1.5, 1.5, 1.5, 1.5))
    draw_wave(axes[0], mix, FAINT)
    axes[0].set_title(f"a recording (“{caption}”) with loud drums and bass")
    before = agreement(chroma(mix), truth)
    draw_chroma(axes[1], chroma(mix), 8, f"its chromagram: the strongest class is the melody's in {before} of the frames")
    draw_chroma(axes[2], chroma(stem), 8, f"after stem separation (hpss): {agreement(chroma(stem), truth)}")
    draw_chroma(axes[3], chroma(stem, argmax=True), 8, "after argmax: all that the model hears")
    draw_chroma(axes[4], truth, 8, "the same of the melody alone")
    axes[4].set_xlabel("seconds")
    save(fig, "chroma")


def residual():
    """Four codebooks of eight entries close in on a vector in the plane, each dividing up what the one before left: the first
    of the vectors that every codebook brings nearer by a third. (One that is near already may be pushed away a little.)"""
    torch.manual_seed(0)
    rvq, vectors = ResidualVectorQuantizer(2, 4, 8, kmeans_iters=20), torch.randn(1, 2, 4096)
    for _ in range(20):
        rvq(vectors)
    codes, here, reach, fig = rvq.eval().encode(vectors), torch.zeros(2), 2.6, figure(13, 3.5)
    errors = torch.stack([(vectors - rvq.decode(codes[:, :k])).norm(dim=1)[0] for k in range(1, 5)])     # (K, 4096)
    first = int(((errors[1:] < errors[:-1] / 1.5).all(0) & (vectors[0].norm(dim=0) < 2)).nonzero()[0])
    x, codes = vectors[0, :, first], codes[..., first:first + 1]
    for k, book in enumerate(rvq.codebooks):
        axes = fig.add_axes((0.01 + 0.195 * k, 0.05, 0.185, 0.8))
        centre = torch.zeros(2) if k == 0 else x
        entries, chosen = here + book.embed, int(codes[0, k, 0])
        line = torch.linspace(-reach, reach, 200)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + centre
        nearest = torch.cdist(grid.view(-1, 2), entries).argmin(1).view(200, 200)
        window = dict(extent=[float(centre[axis]) + side * reach for axis in (0, 1) for side in (-1, 1)])
        axes.imshow(nearest == chosen, origin="lower", cmap=paper_to("#cfd6e6"), vmin=0, vmax=1, **window)
        axes.contour(grid[..., 0], grid[..., 1], nearest, levels=np.arange(8) + 0.5, colors="white", linewidths=0.8)
        axes.plot(*entries.T, "o", color=FAINT, markersize=4)
        inside = (here - centre).abs().max() < reach
        axes.annotate("", entries[chosen].tolist(), here.tolist(), arrowprops=dict(
            arrowstyle="-|>", color=BOOKS[k], linewidth=2, shrinkA=0, shrinkB=0), annotation_clip=not inside)
        axes.plot(*entries[chosen], "o", color=BOOKS[k], markersize=6)
        axes.plot(*x, "x", color=INK, markersize=9, markeredgewidth=2)
        here = entries[chosen]
        axes.set(xticks=[], yticks=[], xlim=window["extent"][:2], ylim=window["extent"][2:])
        axes.spines[:].set_visible(False)
        axes.set_title(f"codebook {k + 1}: entry {chosen}, error {float((here - x).norm() / x.norm()):.3f}", size=9.5)
        reach = max(1.35 * float((here - x).norm()), 0.02)
    axes = fig.add_axes((0.835, 0.19, 0.155, 0.64))
    music = torch.stack([clip(n)[0][:10 * RATE] for n in range(8)])[:, None]
    with torch.no_grad():
        latent = codec().encoder(music)
        power = (latent - latent.mean((0, 2), keepdim=True)).square().mean()
        codes = codec().encode(music)
        left = [float((latent - codec().quantizer.decode(codes[:, :k])).square().mean() / power) for k in range(1, 5)]
    axes.bar(range(1, 5), [100 * v for v in left], color=BOOKS, width=0.7)
    axes.set_ylim(0, 115 * left[0])
    for k, value in enumerate(left, 1):
        axes.text(k, 100 * value + 1, f"{100 * value:.0f} %", ha="center", size=8)
    axes.set(xticks=range(1, 5), yticks=[], xlabel="codebooks")
    axes.spines["left"].set_visible(False)
    axes.set_title("left over, shipped codec,\neight test clips", size=9.5)
    save(fig, "rvq")


def codebooks():
    """One clip through the shipped codec with one to four codebooks."""
    wav, _, caption, _ = clip(5)
    wav = wav[:5 * RATE]
    codes = codec().encode(wav[None, None])
    fig, axes = figure(13, 3.1, 1, 5, sharey=True)
    for k in range(1, 5):
        draw_spectrogram(axes[k - 1], codec().decode(codes[:, :k])[0, 0], top=7000,
                         title=f"{k} codebook{'s' * (k > 1)}, {k * codec().bandwidth:.2f} kb/s")
    draw_spectrogram(axes[4], wav, top=7000, title=f"original, {16 * RATE / 1000:.0f} kb/s")
    axes[0].set_ylabel("Hz")
    axes[2].set_xlabel("seconds")
    save(fig, "codebooks", 32, 100)


def attention():
    """Where the frames of the music look in the melody prefix: the trained model on test clip 0 and its own melody."""
    lm, (mix, alone, caption, _) = LMModel.from_pretrained(DEFAULT_CHECKPOINT, torch.float32).eval(), clip(0)
    config, seen, handles = lm.config, [], []
    L, M = round(config.segment_duration * RATE), config.chroma_frames

    def look(module, args):     # what Attention.forward does, with the weights that it never forms
        x, angles = args[:2]
        q, k, _ = module.qkv(x).view(*x.shape[:2], 3, module.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(module.q_norm(q), angles), rotate(module.k_norm(k), angles)
        scores = (q @ k.mT * q.shape[-1] ** -0.5)[0]
        later = torch.ones_like(scores).triu(1) > 0
        seen.append(scores.masked_fill(later, float("-inf")).softmax(-1))   # (H, P + S, P + S)
    for layer in lm.layers:
        handles.append(layer.attn.register_forward_pre_hook(look))
    with torch.no_grad():
        codes = codec().encode(mix[None, None, :L])
        asked = match_length(chroma(alone, argmax=True)[None], M)
        lm.compute_predictions(codes, lm.conditioner([caption], asked))
    P = seen[0].shape[-1] - codes.shape[-1] - 1
    weights = torch.stack(seen)[:, :, P:, :M]                               # (N, H, S, M)
    share = weights.sum(-1).mean(-1)                                        # (N, H) of all attention goes to the melody
    best = int(share.flatten().argmax())
    n, h = divmod(best, config.num_heads)
    fig, (left, middle, right) = figure(13, 4.4, 1, 3, width_ratios=(1, 1, 0.8))
    span, hop = config.segment_duration, config.hop / RATE
    for axes, image, title in ((left, weights.mean((0, 1)), "mean over all layers and heads"),
                               (middle, weights[n, h], f"layer {n + 1}, head {h + 1}, the one that looks there most")):
        axes.imshow(image.numpy() ** 0.5, origin="lower", aspect="auto", cmap=paper_to(BOOKS[0]), extent=(0, M * hop, 0, span),
                    interpolation="nearest")
        axes.set(xlabel="melody frame, its time in s", title=title)
    left.set_ylabel("frame of the music, its time in s")
    image = right.imshow(100 * share.numpy(), cmap=paper_to(BOOKS[0]), vmin=0, aspect="auto")
    for i, j in np.ndindex(*share.shape):
        right.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", size=9,
                   color="white" if share[i, j] > 0.6 * share.max() else INK)
    right.set(xticks=range(config.num_heads), yticks=range(config.num_layers), xlabel="head", ylabel="layer",
              title="% of the music's attention\nthat goes to the melody")
    right.set_xticklabels(range(1, config.num_heads + 1))
    right.set_yticklabels(range(1, config.num_layers + 1))
    right.tick_params(length=0)
    save(fig, "attention")


def training():
    """Cross-entropy of each codebook over the run that made checkpoints/tiny: its metrics.jsonl."""
    lines = [json.loads(line) for line in (DEFAULT_CHECKPOINT / "metrics.jsonl").read_text().splitlines()]
    config = model().config
    fig, axes = figure(11, 4.2, 1, 1)
    for k in range(4):
        for split, look in (("train", dict(linewidth=1.2, alpha=0.85)),
                            ("valid", dict(marker="o", markersize=6, linestyle="none"))):
            rows = [line for line in lines if line["split"] == split]
            name = f"own_ce_{k + 1}" if split == "valid" else f"ce_{k + 1}"      # with the track's own melody, as in training
            x, y = [line["update"] for line in rows], [line[name] for line in rows]
            axes.plot(x, y, color=BOOKS[k], label=f"codebook {k + 1}" if split == "train" else None, **look)
            if split == "valid" and rows:
                axes.annotate(f"{y[-1]:.2f}", (x[-1], y[-1]), (8, 0), textcoords="offset points", va="center", size=9,
                              color=BOOKS[k])
    axes.axhline(math.log(config.card), color=FAINT, linestyle=":", linewidth=1)
    axes.text(axes.get_xlim()[1], math.log(config.card), f"ln {config.card}, knowing nothing ", ha="right", va="bottom",
              size=8, color=FAINT)
    axes.set(xlabel="update", ylabel="cross-entropy, nats",
             title="the run that made checkpoints/tiny: lines training, with its dropouts; dots tunes never trained on")
    axes.legend(ncols=4, loc="upper center")
    save(fig, "training")


def dadaptation():
    """D-Adaptation finds its learning rate: a run of train.py, small enough to be made while you wait."""
    with tempfile.TemporaryDirectory() as folder:
        run_tunes = ["--out", f"{folder}/tunes", "--clips", "0", "2", "0", "--workers", "1"]
        kept, sys.argv = sys.argv, ["data/tunes.py", *run_tunes]
        tunes.main()
        sys.argv = kept
        settings = [str(ROOT / "config" / "tiny.py"), f"--codec={DEFAULT_CHECKPOINT / 'codec'}", f"--data_dir={folder}/prepared",
                    f"--out_dir={folder}/run", "--optim=dadam", "--lr=1", "--weight_decay=0.1", "--dim=128", "--num_layers=3",
                    "--segment_duration=1.28", "--batch_size=4", "--epochs=1", "--updates_per_epoch=400", "--warmup=50",
                    "--log_every=2", "--valid_every=0", "--save_every=0", "--dtype=float32"]
        prepare.main([f"{folder}/tunes/valid", "--out", f"{folder}/prepared/train", "--codec", str(DEFAULT_CHECKPOINT / "codec"),
                      "--radix2_exp", "13", "--stem", "none"])
        train.main(settings)
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "train" and line["lr"]]
    x, d = [line["update"] for line in lines], [line["d_lr"] / line["lr"] for line in lines]
    fig, (left, right) = figure(11, 3.6, 1, 2)
    left.semilogy(x, d, color=BOOKS[0], linewidth=2, label="d, the estimate")
    left.semilogy(x, [line["d_lr"] for line in lines], color=BOOKS[2], linewidth=1.5,
                  label="d times the schedule: the step size")
    left.set(xlabel="update", title=f"d grows from 1e-6 to {d[-1]:.1e}, and never falls")
    left.legend(loc="lower right")
    right.plot(x, [line["loss"] for line in lines], color=BOOKS[3], linewidth=1.5)
    right.set(xlabel="update", title="cross-entropy meanwhile, nats")
    save(fig, "dadaptation")


def followed():
    """The melody asked for against the melody of the music made, for the first three of the eight samples."""
    captions, asked, wavs = eight()
    heard, span = torch.stack([stem_chroma(wav[0]) for wav in wavs]), model().config.segment_duration
    fig, axes = figure(13, 3.7, 2, 3, sharex=True)
    for n in range(3):
        M = asked.shape[1]
        draw_chroma(axes[0, n], asked[n], span, "asked for", labels=n == 0)
        title = f"heard in what was made: {agreement(heard[n, :M], asked[n])} of the frames"
        draw_chroma(axes[1, n], heard[n, :M], span, title, labels=n == 0)
        axes[1, n].set_xlabel("seconds")
    save(fig, "melody")


def samples():
    """Eight unpicked samples beside their prompts: text, melody (red) and the spectrogram of the music."""
    captions, asked, wavs = eight()
    heard, span = torch.stack([stem_chroma(wav[0]) for wav in wavs]), model().config.segment_duration
    fig, axes = figure(13, 9, 4, 4, height_ratios=(1, 2.4) * 2, sharex=True)
    for n in range(8):
        row, column = 2 * (n // 4), n % 4
        title = "\n".join(textwrap.wrap(f"“{captions[n]}”", 42)[:3])
        draw_chroma(axes[row, column], asked[n], span, labels=column == 0)
        axes[row, column].set_title(title, size=8.5)
        draw_spectrogram(axes[row + 1, column], wavs[n, 0], top=5000)
        axes[row + 1, column].set_title(f"melody followed: {agreement(heard[n, :asked.shape[1]], asked[n])}", size=8.5)
        if column:
            axes[row + 1, column].set_yticks([])
    for column in range(4):
        axes[3, column].set_xlabel("seconds")
    save(fig, "samples", 20, 78)


PICTURES = {"system": system, "output": output, "patterns": five_patterns, "rvq": residual, "codebooks": codebooks,
            "chroma": melody, "attention": attention, "training": training, "dadaptation": dadaptation, "melody": followed, "samples": samples}
MODEL = ("system", "output", "rvq", "codebooks", "attention", "training", "melody", "samples")


def main(argv):
    names = list(MODEL) if argv == ["model"] else argv or list(PICTURES)
    for name in names:
        if name not in PICTURES:
            raise UserError(f"{name}: no such picture; there are {', '.join(PICTURES)}, and `model` for those of the "
                            f"trained model")
    try:
        import matplotlib  # noqa: F401  an optional extra
    except ImportError:
        raise UserError("the pictures need matplotlib; pip install matplotlib") from None
    torch.manual_seed(0)
    for name in names:
        PICTURES[name]()


if __name__ == "__main__":
    run(main, sys.argv[1:])
