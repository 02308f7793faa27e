"""How good is it: what validation and `train.py --eval` measure on held-out data.

    python train.py config/tiny_codec.py --eval --split=test      # the codec
    python train.py config/tiny.py --eval --split=test            # the language model

A codec is measured by what its reconstructions keep of the music (SI-SNR, mel distance, chroma) and by how evenly it
uses its codebooks; a language model by its perplexity, by how well its music follows the melody asked for, and by
the Frechet distance of its music to real music.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from chroma import ChromaExtractor, chroma_agreement, separate
from config import Config, UserError, pick_device, read_json, write_atomic
from data.audio import read_audio
from data.segments import AudioCrops, TokenSegments, collate, spread, with_melody_of
from encodec import EncodecModel, mel_loss
from sample import MusicGen, device_of

# --- of a codec -------------------------------------------------------------------------------------------------

def si_snr(wav, output):
    """Scale-invariant signal-to-noise ratio in dB (arXiv 1811.02508): (B, C, L) twice -> (B,)"""
    wav, output = (w.flatten(1) - w.flatten(1).mean(1, keepdim=True) for w in (wav, output))
    target = (wav * output).sum(1, keepdim=True) / (wav.square().sum(1, keepdim=True) + 1e-8) * wav
    return 10 * ((target.square().sum(1) + 1e-8) / ((output - target).square().sum(1) + 1e-8)).log10()


@torch.no_grad()
def reconstruct(codec, wav):
    """Waves (B, C, L) -> their reconstruction, [SI-SNR in dB, mel distance], how often each entry occurs (K, V)."""
    codes = codec.encode(wav)
    output = codec.decode(codes)[..., :wav.shape[-1]]
    counts = torch.stack([torch.bincount(k, minlength=codec.cardinality) for k in codes.transpose(0, 1).flatten(1)])
    return output, [si_snr(wav, output).mean().item(), mel_loss(codec.config, wav, output).item()], counts


def codebook_use(config: Config, used) -> dict:
    """Counts (K, V) -> entropy (bits) and perplexity per codebook; nominal bitrate, and what the entropy allows."""
    share = used.cpu().double() / used.sum(1, keepdim=True).cpu()
    entropy = -(share * share.clamp(min=1e-12).log2()).sum(1)
    rate = config.sample_rate / config.stride / 1000
    return {"entropy": entropy.tolist(), "perplexity": (2 ** entropy).tolist(),
            "kbps": config.n_q * math.log2(config.card) * rate, "kbps_entropy": float(entropy.sum()) * rate}


# --- of a melody ------------------------------------------------------------------------------------------------

def chroma_of(config: Config, wavs):
    """Waves (B, C, L) -> chroma (B, M, Q) as it is heard, not reduced to one pitch class a frame."""
    extract = ChromaExtractor(config.sample_rate, config.n_chroma, config.radix2_exp, argmax=False)
    return extract.to(wavs.device)(wavs)


def melody_of(config: Config, wavs):
    """Waves (B, C, L) -> chroma (B, M, Q) of their melody stems, on the CPU."""
    return chroma_of(config, torch.stack([separate(wav.cpu(), config.sample_rate, config.stem) for wav in wavs]))


def compare_chroma(heard, asked):
    """Melodies heard (`melody_of`) against those asked for, chroma (B, M, Q): cosine similarity, and the share of
    frames whose strongest pitch class is the one asked for, each (B,)."""
    M = min(heard.shape[1], asked.shape[1])
    heard, asked = heard[:, :M], asked[:, :M].cpu()
    agreement = torch.tensor([chroma_agreement(*pair) for pair in zip(heard, asked)])
    return F.cosine_similarity(heard, asked, dim=-1).mean(1), agreement


# --- of a language model ----------------------------------------------------------------------------------------

def with_perplexity(logged: dict) -> dict:
    """Adds ppl = exp(loss), the loss being the mean of the codebooks' cross-entropies, and ppl_k = exp(ce_k)."""
    return logged | {name.replace("loss", "ppl").replace("ce", "ppl"): math.exp(min(50.0, ce))
                     for name, ce in logged.items() if name == "loss" or name[:3] == "ce_"}


def held_out(data: TokenSegments, n: int) -> list[dict]:
    """The beginnings of up to n tracks, each with the melody of the next one, never its own."""
    items = [data.segment(track, 0) for track in spread(data.tracks, n)]
    return [with_melody_of(item, other) for item, other in zip(items, items[1:] + items[:1])]


def generate_for(model, batch: dict):
    """Codes (B, K, T) for the texts and melodies of a batch."""
    melodies = [chroma if has else None for chroma, has in zip(batch["chroma"], batch["has_melody"])]
    return model.generate_codes(batch["text"], melodies)


@torch.no_grad()
def latents(codec, codes):
    """codes (B, K, T) -> the codec's latent vectors (B * T, Z)"""
    per_channel = codes[:, :codec.num_codebooks]  # of stereo in two streams: the first
    return codec.quantizer.decode(per_channel.to(device_of(codec))).transpose(1, 2).flatten(0, 1).cpu().double().numpy()


def frechet_distance(x, y) -> float:
    """Distance of two sets of vectors (n, Z), taken as Gaussians (arXiv 1812.08466, as FAD, in our codec's latents):
    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))"""
    from scipy.linalg import sqrtm
    c_x, c_y = np.cov(x.T), np.cov(y.T)
    root = sqrtm(c_x @ c_y + 1e-12 * np.eye(len(c_x)))
    return max(0.0, float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c_x + c_y - 2 * np.real(root))))


# --- of what a run has made: --eval -----------------------------------------------------------------------------

def evaluate(config: Config, split: str) -> dict:
    """Measures the model in out_dir on a split; prints the figures and writes them to out_dir/eval_SPLIT.json."""
    out, device = Path(config.out_dir), pick_device(config.device)
    torch.manual_seed(config.seed)
    figures = (evaluate_codec if config.task == "codec" else evaluate_lm)(config, split, out, device)
    figures = {key: rounded(value) for key, value in figures.items()}
    for key, value in figures.items():
        print(f"{key:25}  {value}")
    write_atomic(out / f"eval_{split}.json", (json.dumps(figures, indent=1) + "\n").encode())
    return figures


def evaluate_codec(config: Config, split: str, out: Path, device) -> dict:
    """Chroma agreement of reconstructions with originals (by instrument, where sidecars tell), SI-SNR, mel distance,
    use of the codebooks; on the first 10 s of up to n_eval_wavs files."""
    codec, data = EncodecModel.from_pretrained(str(out)).to(device), AudioCrops(config, split)
    told = [path for path in data.paths if path.with_suffix(".json").exists()] or data.paths
    rows, used, by_instrument = [], 0, {}
    for path in tqdm(spread(told, config.n_eval_wavs), disable=None, unit="file"):
        wav = read_audio(path, codec.sample_rate, codec.channels, duration=10.0)[None].to(device)
        output, quality, counts = reconstruct(codec, wav)
        agreement = compare_chroma(melody_of(config, output), melody_of(config, wav))[1].item()
        rows.append((agreement, *quality))
        used = used + counts
        if path.with_suffix(".json").exists():
            name = str(read_json(path.with_suffix(".json")).get("instrument"))
            by_instrument.setdefault(name, []).append(agreement)
    if not rows:
        raise UserError(f"{config.data_dir}: has no {split} files to measure on")
    agreement, si, mel = np.mean(rows, axis=0).tolist()
    return {"files": len(rows), "chroma_agreement": agreement, "si_snr": si, "mel": mel, **codebook_use(config, used),
            "live": (used > 0).float().mean(1).tolist(),
            **{f"chroma_agreement {name}": float(np.mean(x)) for name, x in sorted(by_instrument.items())}}


def evaluate_lm(config: Config, split: str, out: Path, device) -> dict:
    """Perplexity of held-out segments under their text and the melody of another track (and own_loss, under their own);
    then one sample for each such text and melody: its chroma against that melody (and, shuffled, against a third), and
    the Frechet distance to the segments."""
    model, data = MusicGen.from_pretrained(str(out), config.device), TokenSegments(config, split)
    items = held_out(data, config.n_eval_wavs)
    if len(items) < 3:
        raise UserError(f"{config.data_dir}: {split} has {len(items)} tracks of segment_duration; it takes three")
    ces, own, made, rows, size = [], [], [], [], min(8, config.batch_size)
    for first in tqdm(range(0, len(items), size), disable=None, unit="batch"):
        numbers = range(first, min(first + size, len(items)))
        batch = collate([items[n] for n in numbers])
        codes = batch["codes"].to(device)
        with torch.no_grad():
            for losses, which in ((ces, ""), (own, "own_")):
                melody = batch[which + "chroma"].to(device), batch[which + "has_melody"].to(device)
                losses += [model.lm.loss(codes, batch["text"], *melody)[1].cpu()] * len(numbers)
        made.append(generate_for(model, batch))
        if config.melody != "none":
            heard = melody_of(config, model.decode(made[-1]))
            others = torch.stack([items[(n + 1) % len(items)]["chroma"] for n in numbers])
            rows.append(torch.stack([*compare_chroma(heard, batch["chroma"]), compare_chroma(heard, others)[1]], 1))
    ces, own = torch.stack(ces).mean(0), torch.stack(own).mean().item()
    figures = with_perplexity({"loss": ces.mean().item(), **{f"ce_{k + 1}": x for k, x in enumerate(ces.tolist())}})
    if rows:
        figures["own_loss"] = own
        names = ("chroma_cosine", "chroma_agreement", "chroma_agreement_shuffled")
        figures |= dict(zip(names, torch.cat(rows).mean(0).tolist()))
    if config.eval_tunes:
        from data.obedience import obedience
        figures |= obedience(model, split, config.n_eval_wavs)
    real = [latents(model.codec, item["codes"][None]) for item in items]
    generated = latents(model.codec, torch.cat(made))
    return {"items": len(items), **figures, "frechet": frechet_distance(generated, np.concatenate(real)),
            "frechet_of_real_halves": frechet_distance(np.concatenate(real[::2]), np.concatenate(real[1::2]))}


def rounded(value):
    """Numbers to six digits, lists too: enough for a log, and short."""
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
