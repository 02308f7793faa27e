"""Measures a trained model on held-out data: the command behind `train.py --eval`.

    python train.py config/tiny_codec.py --eval --split=test      # the codec
    python train.py config/tiny.py --eval --split=test            # the language model

Figures are printed as a table and written to out_dir/eval_SPLIT.json: a number each, or one for each column.
Of a language model: cross-entropy on held-out segments of data_dir, and how it follows what it is told. Where
eval_tunes = True, the notes and words of newly rendered tunes are known (adherence.py). Of other music one
knows only chroma: `segments_...` compare that of a sample with that of the melody asked for, another track's.
"""
import functools
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from data.audio import read_audio
from data.captions import clean, parse_object, read_text
from data.notes import pitch_classes
from data.segments import AudioCrops, TokenSegments, collate, spread, with_melody_of
from encodec import EncodecModel
from evaluation.adherence import adherence, enter
from evaluation.metrics import (codebook_use, compare_chroma, frechet_distance, latent_vectors, melody_of,
                                reconstruct)
from evaluation.probes import OPUS, distances, has_opus, opus_roundtrip, probes
from evaluation.waves import codec_roundtrip
from sample import MusicGen
from sampling.loading import load_models
from system.devices import pick_device
from system.errors import UserError
from system.files import check_writable, write_atomic
from training.figures import rounded, with_perplexity

BATCH = 8       # segments at a time, at most
HOW_TO_SAMPLE = ("seed", "cfg_coef", "temperature", "top_k", "top_p")   # as this command says, not the model


def evaluate(config: Config, split: str) -> dict:
    """Measures the model in out_dir on a split -> {name: figure}, printed and written as well."""
    out = Path(config.out_dir)
    device = pick_device(config.device)
    result = out / f"eval_{split}.json"
    if out.is_dir():    # else there is no model, which is said below
        check_writable(result)
    torch.manual_seed(config.seed)
    measure = evaluate_codec if config.task == "codec" else evaluate_lm
    figures = measure(config, split, out, device)
    figures = rounded(figures)
    print_table(figures)
    write_atomic(result, (json.dumps(figures, indent=1) + "\n").encode())
    return figures


def print_table(figures: dict):
    """Prints {name: figure} as lines, and all {name: {column: figure}} as one table below."""
    table = {name: row for name, row in figures.items() if isinstance(row, dict)}
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        if name not in table:
            print(f"{name:{width}}  {value}")
    if table:
        print(" " * width, *(f"{column:>12}" for column in columns))
    for name, row in table.items():
        cells = [f"{row[column]:.4g}" if column in row else "-" for column in columns]
        print(f"{name:{width}}", *(f"{cell:>12}" for cell in cells))


# --- the codec ------------------------------------------------------------------------------------

def evaluate_codec(config: Config, split: str, out: Path, device) -> dict:
    """Reconstructions of the first 10 s of up to n_eval_wavs files, and probes (probes.py).

    Agreement of their melodies with the originals' (also by instrument, where sidecars name one), distances,
    use of the codebooks, beside what Opus makes of the same, where that is installed. Raises UserError when
    the split has no files.
    """
    codec = EncodecModel.from_pretrained(str(out)).to(device)
    paths = AudioCrops(config, split).paths
    with_sidecar = [path for path in paths if path.with_suffix(".json").exists()]
    agreements, by_instrument, pairs = [], {}, []
    counts = 0  # of each entry (K, V)
    for path in tqdm(spread(with_sidecar or paths, config.n_eval_wavs), disable=None, unit="file"):
        wav = read_audio(path, codec.sample_rate, codec.channels, duration=10.0)
        wav = wav[None].to(device)  # (1, C, L)
        output, _, counts_of_file = reconstruct(codec, wav)
        agreement = compare_chroma(melody_of(config, output), melody_of(config, wav))[1].item()
        agreements.append(agreement)
        pairs.append(tuple(wave[0].mean(0).cpu().numpy() for wave in (wav, output)))
        counts = counts + counts_of_file
        if with_sidecar:
            by_instrument.setdefault(instrument_of(path), []).append(agreement)
    if not pairs:
        raise UserError(f"{config.data_dir}: has no {split} files to measure on")

    figures = {"files": len(pairs), "chroma_agreement": float(np.mean(agreements))}
    figures |= codebook_use(config, counts)
    figures["live"] = (counts > 0).float().mean(1).tolist()
    for instrument, values in sorted(by_instrument.items()):
        figures[f"chroma_agreement {instrument}"] = float(np.mean(values))
    return figures | codec_table(codec, pairs)


def codec_table(codec, pairs: list) -> dict:
    """Probes of a codec, distances of pairs of waves (L,): {name: {"codec" or "opus_...": figure}}."""
    rate = codec.sample_rate

    def through_codec(wave):
        wav = torch.from_numpy(wave).expand(1, codec.channels, -1)
        return codec_roundtrip(codec, wav)[0].mean(0).numpy()

    table = {}
    enter(table, "codec", distances(pairs, rate) | probes(through_codec, rate))
    for kbps in OPUS if has_opus() else ():
        through_opus = functools.partial(opus_roundtrip, sample_rate=rate, kbps=kbps)
        with_opus = [(wave, through_opus(wave)) for wave, _ in pairs]
        enter(table, f"opus_{kbps}", distances(with_opus, rate) | probes(through_opus, rate))
    return table


def instrument_of(path: Path) -> str:
    """What the sidecar of a recording names, in any encoding; "None" where it names nothing."""
    try:
        fields = parse_object(read_text(path.with_suffix(".json")))
    except ValueError:      # a stranger's: nothing in it is an error
        fields = {}
    return str(clean(fields).get("instrument"))


# --- the language model ---------------------------------------------------------------------------

def evaluate_lm(config: Config, split: str, out: Path, device) -> dict:
    """Perplexity of up to n_eval_wavs segments, and figures of samples: `adherence` or `figures_of_samples`.

    Raises UserError when the split has fewer than three tracks.
    """
    lm, codec = load_models(str(out), config.device)
    for key in HOW_TO_SAMPLE:
        setattr(lm.config, key, getattr(config, key))
    model = MusicGen(lm, codec)
    items = held_out(TokenSegments(config, split), config.n_eval_wavs)
    if len(items) < 3:
        raise UserError(f"{config.data_dir}: {split} has {len(items)} tracks of segment_duration; "
                        f"it takes three")
    cross_entropies, own_losses = [], []
    for batch in batches(config, items):
        codes = batch["codes"].to(device)
        with_own_melody = batch["conditions"] | {"melody": batch["own_melody"]}
        with torch.no_grad():
            ce = model.lm.loss(codes, batch["conditions"])[1].cpu()  # (K,)
            own_ce = model.lm.loss(codes, with_own_melody)[1].cpu()
        cross_entropies += [ce] * len(codes)
        own_losses += [own_ce] * len(codes)

    ce = torch.stack(cross_entropies).mean(0)
    figures = {"loss": ce.mean().item()}
    for k, x in enumerate(ce.tolist()):
        figures[f"ce_{k + 1}"] = x
    figures = {"items": len(items), **with_perplexity(figures)}
    if config.melody != "none":
        figures["own_loss"] = torch.stack(own_losses).mean().item()
    if config.eval_tunes:
        return figures | adherence(model, split, config.n_eval_wavs)
    return figures | figures_of_samples(model, config, items)


def batches(config: Config, items: list[dict]):
    """The items in batches, see `collate`."""
    size = min(BATCH, config.batch_size)
    for first in tqdm(range(0, len(items), size), disable=None, unit="batch"):
        yield collate(items[first:first + size])


def figures_of_samples(model, config: Config, items: list[dict]) -> dict:
    """One sample for the text and melody of each item: chroma against that asked for, Frechet distance.

    frechet: from the items, in latents of the codec; frechet_of_real_halves: of two halves of the items.
    """
    generated, played, figures = [], [], {}
    for batch in batches(config, items):
        conditions = batch["conditions"]
        generated.append(model.generate_codes(conditions["text"], conditions["melody"]))
        if config.melody != "none":
            played.append(melody_of(config, model.decode(generated[-1])))
    if config.melody != "none":
        figures |= melodies_of_segments(config, torch.cat(played), items)
    real = [latent_vectors(model.codec, item["codes"][None]) for item in items]
    samples = latent_vectors(model.codec, torch.cat(generated))
    figures["frechet"] = frechet_distance(samples, np.concatenate(real))
    halves = np.concatenate(real[::2]), np.concatenate(real[1::2])
    figures["frechet_of_real_halves"] = frechet_distance(*halves)
    return figures


def held_out(data: TokenSegments, n: int) -> list[dict]:
    """The beginnings of up to n tracks, each with the melody of the next one, never its own."""
    items = [data.segment(track, 0) for track in spread(data.tracks, n)]
    others = items[1:] + items[:1]
    return [with_melody_of(item, other) for item, other in zip(items, others)]


def melodies_of_segments(config: Config, played, items: list[dict]) -> dict:
    """Melodies played, chroma (N, M, Q), against those that the N items asked for, and shuffled ones."""
    nothing = torch.zeros(config.chroma_frames, config.melody_classes)
    asked = []
    for item in items:
        melody = item["conditions"]["melody"]
        asked.append(nothing if melody is None else melody)
    asked = pitch_classes(torch.stack(asked), config.n_chroma)
    cosine, agreement = compare_chroma(played, asked)
    _, shuffled = compare_chroma(played, asked.roll(-1, 0))
    names = ("segments_melody_cosine", "segments_melody_agreement", "segments_melody_agreement_shuffled")
    return dict(zip(names, torch.stack([cosine, agreement, shuffled], 1).mean(0).tolist()))
