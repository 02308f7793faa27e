"""Measures of reconstructions, melodies and sets of music: what validation and `train.py --eval` report.

    a codec             SI-SNR, STFT and mel distances, use of the codebooks, chroma against the original's
    a language model    chroma of its music and of the melody asked for, Frechet distance to real music
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from scipy.signal import butter, filtfilt

from chroma import ChromaExtractor
from config import Config
from data.stems import separate
from system.devices import device_of
from training.losses import mel_loss, power_spectrogram

MIDDLE_C = 261.2        # Hz, as MuseControlLite has it


# --- of a codec -----------------------------------------------------------------------------------

def si_snr(wav, output):
    """Scale-invariant signal-to-noise ratio in dB (arXiv 1811.02508): (B, C, L) twice -> (B,).

    10 log10 |s|^2 / |y - s|^2, s = (x . y / |x|^2) x, of a wave x and its reconstruction y less their means.
    """
    x = wav.flatten(1)
    y = output.flatten(1)
    x = x - x.mean(1, keepdim=True)
    y = y - y.mean(1, keepdim=True)
    target = (x * y).sum(1, keepdim=True) / (x.square().sum(1, keepdim=True) + 1e-8) * x
    signal = target.square().sum(1) + 1e-8
    noise = (y - target).square().sum(1) + 1e-8
    return 10 * (signal / noise).log10()


def stft_distance(wav, output) -> float:
    """Multi-resolution STFT distance (Parallel WaveGAN, arXiv 1910.11480, equations 3 to 6) of two (B, C, L).

    |X - Y| / |X| (Frobenius norms) + mean |ln X - ln Y|, X and Y: magnitudes of wave x and reconstruction y,
    averaged over Hann windows of 512, 1024 and 2048 samples, each with a hop of a quarter.
    """
    distances = []
    for n_fft in (512, 1024, 2048):
        magnitudes = []
        for wave in (wav, output):
            power = power_spectrogram(wave, n_fft) * n_fft * 3 / 8      # the window's energy
            magnitudes.append(power.clamp(min=1e-7).sqrt())
        x, y = magnitudes
        convergence = (x - y).norm() / x.norm()
        distances.append(convergence + (x.log() - y.log()).abs().mean())
    return torch.stack(distances).mean().item()


@torch.no_grad()
def reconstruct(codec, wav):
    """Waves (B, C, L) -> their reconstruction, [SI-SNR in dB, mel distance], uses of each entry (K, V)."""
    codes = codec.encode(wav)
    output = codec.decode(codes)[..., :wav.shape[-1]]
    counts = []
    for k in range(codes.shape[1]):
        counts.append(torch.bincount(codes[:, k].flatten(), minlength=codec.cardinality))
    snr = si_snr(wav, output).mean().item()
    mel = mel_loss(codec.config, wav, output).item()
    return output, [snr, mel], torch.stack(counts)


def codebook_use(config: Config, counts) -> dict:
    """Uses of each entry (K, V) -> entropy (bits) and perplexity of each codebook, and bitrates in kb/s.

    kbps is the nominal rate, kbps_entropy what the same codes would take if each cost its information.
    """
    counts = counts.cpu()
    share = counts.double() / counts.sum(1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-12).log2()).sum(1)
    kiloframes = config.sample_rate / config.stride / 1000  # a second
    return {
        "entropy": entropy.tolist(),
        "perplexity": (2 ** entropy).tolist(),
        "kbps": config.n_q * math.log2(config.card) * kiloframes,
        "kbps_entropy": float(entropy.sum()) * kiloframes,
    }


# --- of a melody ----------------------------------------------------------------------------------

def chroma_of(config: Config, wavs):
    """Waves (B, C, L) -> chroma (B, M, Q), all pitch classes of a frame."""
    extract = ChromaExtractor(config.sample_rate, config.n_chroma, config.radix2_exp, argmax=False)
    return extract.to(wavs.device)(wavs)


def melody_of(config: Config, wavs):
    """Waves (B, C, L) -> chroma (B, M, Q) of their melody stems, on the CPU."""
    stems = [separate(wav.cpu(), config.sample_rate, config.stem) for wav in wavs]
    return chroma_of(config, torch.stack(stems))


def compare_chroma(played, asked):
    """Melodies played (`melody_of`) and asked for, chroma (B, M, Q) -> cosine (B,), agreement (B,).

    Agreement: the share of frames whose strongest pitch class is the one asked for. The longer one is cut.
    """
    M = min(played.shape[1], asked.shape[1])
    played = played[:, :M]
    asked = asked[:, :M].cpu()
    agreement = torch.tensor([chroma_agreement(a, b) for a, b in zip(played, asked)])
    return F.cosine_similarity(played, asked, dim=-1).mean(1), agreement


def chroma_agreement(chroma_a, chroma_b) -> float:
    """Share of frames with the same strongest class of two chromagrams (..., M, Q); the longer one is cut."""
    M = min(chroma_a.shape[-2], chroma_b.shape[-2])
    strongest_a = chroma_a[..., :M, :].argmax(-1)
    strongest_b = chroma_b[..., :M, :].argmax(-1)
    return (strongest_a == strongest_b).float().mean().item()


def chroma_similarity(wav_a, wav_b, sample_rate: int, n_chroma=12, radix2_exp=14, argmax=True) -> float:
    """Chroma cosine similarity, 0 to 1, of two waves (B, C, L) or (C, L): MusicGen's measure of melodies.

    Mean of the cosine between their chroma, of the whole waves and not of their melody stems, over the first
    ceil(L / hop) frames of the shorter wave, as in audiocraft. With argmax, audiocraft's default, that is the
    share of frames with the same class.
    """
    extract = ChromaExtractor(sample_rate, n_chroma, radix2_exp, argmax).to(wav_a.device)
    L = min(wav_a.shape[-1], wav_b.shape[-1])
    frames = math.ceil(L / extract.hop)
    wav_a, wav_b = wav_a[..., :L], wav_b[..., :L]
    chroma_a = extract(wav_a if wav_a.dim() == 3 else wav_a[None])
    chroma_b = extract(wav_b if wav_b.dim() == 3 else wav_b[None])
    return F.cosine_similarity(chroma_a, chroma_b, dim=-1, eps=1e-8)[:, :frames].mean().item()


def melody_accuracy(wav_a, wav_b, sample_rate: int) -> float:
    """MuseControlLite's measure of melodies (arXiv 2506.18729): two waves (B, C, L) -> 0 to 1.

    Share of frames with the same strongest pitch class above middle C, of the whole waves. As in its code: a
    Butterworth filter of order 2, forwards and backwards, before chroma of short windows, 46 ms. Here they
    have the nearest power of two of samples, a hop of a quarter of that and not 5.8 ms, and no tuning.
    """
    filters = butter(2, MIDDLE_C, "high", fs=sample_rate)
    above = [torch.from_numpy(filtfilt(*filters, wav.numpy()).copy()) for wav in (wav_a, wav_b)]
    return chroma_similarity(*above, sample_rate, radix2_exp=round(math.log2(0.046 * sample_rate)))


# --- of sets of music -----------------------------------------------------------------------------

@torch.no_grad()
def latent_vectors(codec, codes) -> np.ndarray:
    """Codes (B, K, T) -> latents of the codec (B * T, Z), a row a frame; of its stereo pairs one side."""
    if codec.channels == 1 and codes.shape[1] == 2 * codec.num_codebooks:
        codes = codes[:, 0::2]      # rows 1L 1R 2L 2R ...
    latents = codec.latents(codes.to(device_of(codec)))  # (B, Z, T)
    return latents.transpose(1, 2).flatten(0, 1).cpu().double().numpy()


def frechet_distance(x, y) -> float:
    """Distance of two sets of vectors (n, Z), taken as Gaussians of means m and covariances C.

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)): the Frechet audio distance (arXiv 1812.08466), but with
    the latents of our codec as vectors.
    """
    covariance_x = np.cov(x.T)
    covariance_y = np.cov(y.T)
    root = sqrtm(covariance_x @ covariance_y + 1e-12 * np.eye(len(covariance_x)))
    means = np.square(x.mean(0) - y.mean(0)).sum()
    spread = np.trace(covariance_x + covariance_y - 2 * np.real(root))
    return max(0.0, float(means + spread))
