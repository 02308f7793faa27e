"""Music by the model of a run for four held-out segments, every sample_every updates: progress to listen to.

    out_dir/samples/0_update0010000.wav     the text of segment 0 with the melody of segment 1
    out_dir/samples/0_update0010000.json    the text, and which segment the melody is of
"""
import json
from pathlib import Path

import torch

from config import Config
from data.audio import write_audio
from data.notes import pitch_classes
from data.segments import TokenSegments, spread
from system.files import write_atomic

try:
    from evaluation.metrics import compare_chroma, melody_of
except ModuleNotFoundError:     # without evaluation/ there are samples, but no figures of them
    compare_chroma = None


def write_samples(model, data: TokenSegments, out: Path, update: int) -> dict:
    """Writes what a MusicGen plays. -> how closely it follows the melodies"""
    items = [data.segment(track, 0) for track in spread(data.tracks, 4)]
    others = items[1:] + items[:1]      # whose melodies are taken: never an item's own
    texts = [item["conditions"]["text"] for item in items]
    melodies = [other["conditions"]["melody"] for other in others]
    wavs = model.decode(model.generate_codes(texts, melodies))
    for n, wav in enumerate(wavs):
        path = out / "samples" / f"{n}_update{update:07d}.wav"
        write_audio(path, wav, model.sample_rate)
        about = {"text": texts[n], "melody_of": others[n]["where"]}
        write_atomic(path.with_suffix(".json"), json.dumps(about).encode())
    if compare_chroma is None or data.config.melody == "none":
        return {}
    return melody_figures(data.config, wavs, melodies)


def melody_figures(config: Config, wavs, melodies: list) -> dict:
    """Waves (B, C, L) against the melodies asked for, chroma (M, Q) or None each: means over the batch."""
    none = torch.zeros(config.chroma_frames, config.melody_classes)
    asked = torch.stack([none if melody is None else melody for melody in melodies])
    cosine, agreement = compare_chroma(melody_of(config, wavs), pitch_classes(asked, config.n_chroma))
    return {"chroma_cosine": cosine.mean().item(), "chroma_agreement": agreement.mean().item()}
