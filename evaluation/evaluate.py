"""Measures a trained model on held-out data: the command behind `train.py --eval`.

    python train.py config/tiny_codec.py --eval --split=test      # the codec
    python train.py config/tiny.py --eval --split=test            # the language model

Figures are printed and written to out_dir/eval_SPLIT.json. How well a language model follows a melody is
measured on two sets:

    segments_...    held-out segments of data_dir, each with the melody of another track
    tunes_...       freshly rendered tunes, where eval_tunes = True (more figures of these: adherence.py)
"""
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from data.audio import read_audio
from data.captions import clean, parse_object, read_text
from data.segments import AudioCrops, TokenSegments, collate, spread, with_melody_of
from encodec import EncodecModel
from evaluation.adherence import adherence
from evaluation.metrics import (codebook_use, compare_chroma, frechet_distance, latent_vectors, melody_of,
                                reconstruct)
from sample import MusicGen
from system.devices import pick_device
from system.errors import UserError
from system.files import check_writable, write_atomic
from training.figures import rounded, with_perplexity

BATCH = 8       # segments at a time, at most


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
    figures = {key: rounded(value) for key, value in figures.items()}
    width = max(len(key) for key in figures)
    for key, value in figures.items():
        print(f"{key:{width}}  {value}")
    write_atomic(result, (json.dumps(figures, indent=1) + "\n").encode())
    return figures


# --- the codec ------------------------------------------------------------------------------------

def evaluate_codec(config: Config, split: str, out: Path, device) -> dict:
    """Reconstructions of the first 10 s of up to n_eval_wavs files.

    Agreement of their melodies with the originals' (also by instrument, where sidecars name one), SI-SNR, mel
    distance, use of the codebooks. Raises UserError when the split has no files.
    """
    codec = EncodecModel.from_pretrained(str(out)).to(device)
    paths = AudioCrops(config, split).paths
    with_sidecar = [path for path in paths if path.with_suffix(".json").exists()]
    rows, by_instrument = [], {}
    counts = 0  # of each entry (K, V)
    for path in tqdm(spread(with_sidecar or paths, config.n_eval_wavs), disable=None, unit="file"):
        wav = read_audio(path, codec.sample_rate, codec.channels, duration=10.0)
        wav = wav[None].to(device)  # (1, C, L)
        output, quality, counts_of_file = reconstruct(codec, wav)
        agreement = compare_chroma(melody_of(config, output), melody_of(config, wav))[1].item()
        rows.append((agreement, *quality))
        counts = counts + counts_of_file
        if with_sidecar:
            by_instrument.setdefault(instrument_of(path), []).append(agreement)
    if not rows:
        raise UserError(f"{config.data_dir}: has no {split} files to measure on")

    agreement, snr, mel = np.mean(rows, axis=0).tolist()
    figures = {"files": len(rows), "chroma_agreement": agreement, "si_snr": snr, "mel": mel}
    figures |= codebook_use(config, counts)
    figures["live"] = (counts > 0).float().mean(1).tolist()
    for instrument, agreements in sorted(by_instrument.items()):
        figures[f"chroma_agreement {instrument}"] = float(np.mean(agreements))
    return figures


def instrument_of(path: Path) -> str:
    """What the sidecar of a recording names, in any encoding; "None" where it names nothing."""
    try:
        fields = parse_object(read_text(path.with_suffix(".json")))
    except ValueError:      # a stranger's: nothing in it is an error
        fields = {}
    return str(clean(fields).get("instrument"))


# --- the language model ---------------------------------------------------------------------------

def evaluate_lm(config: Config, split: str, out: Path, device) -> dict:
    """Perplexity of up to n_eval_wavs segments, then one sample for the text and melody of each.

    The samples' melodies against those asked for, their Frechet distance to the segments, and that of two
    halves of the segments to each other. Raises UserError when the split has fewer than three tracks.
    """
    model = MusicGen.from_pretrained(str(out), config.device)
    items = held_out(TokenSegments(config, split), config.n_eval_wavs)
    if len(items) < 3:
        raise UserError(f"{config.data_dir}: {split} has {len(items)} tracks of segment_duration; "
                        f"it takes three")
    cross_entropies, own_losses, generated, played = [], [], [], []
    size = min(BATCH, config.batch_size)
    for first in tqdm(range(0, len(items), size), disable=None, unit="batch"):
        batch = collate(items[first:first + size])
        codes = batch["codes"].to(device)
        conditions = batch["conditions"]
        with_own_melody = conditions | {"melody": batch["own_melody"]}
        with torch.no_grad():
            ce = model.lm.loss(codes, conditions)[1].cpu()  # (K,)
            own_ce = model.lm.loss(codes, with_own_melody)[1].cpu()
        cross_entropies += [ce] * len(codes)
        own_losses += [own_ce] * len(codes)
        generated.append(model.generate_codes(conditions["text"], conditions["melody"]))
        if config.melody != "none":
            played.append(melody_of(config, model.decode(generated[-1])))

    ce = torch.stack(cross_entropies).mean(0)
    figures = {"loss": ce.mean().item()}
    for k, x in enumerate(ce.tolist()):
        figures[f"ce_{k + 1}"] = x
    figures = {"items": len(items), **with_perplexity(figures)}
    if config.melody != "none":
        figures["own_loss"] = torch.stack(own_losses).mean().item()
        figures |= melodies_of_segments(config, torch.cat(played), items)
    if config.eval_tunes:
        figures |= adherence(model, split, config.n_eval_wavs)
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
    nothing = torch.zeros(config.chroma_frames, config.n_chroma)
    asked = []
    for item in items:
        melody = item["conditions"]["melody"]
        asked.append(nothing if melody is None else melody)
    asked = torch.stack(asked)
    cosine, agreement = compare_chroma(played, asked)
    _, shuffled = compare_chroma(played, asked.roll(-1, 0))
    names = ("segments_melody_cosine", "segments_melody_agreement", "segments_melody_agreement_shuffled")
    return dict(zip(names, torch.stack([cosine, agreement, shuffled], 1).mean(0).tolist()))
