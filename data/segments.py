"""What data/prepare.py wrote, read back: segments for training. For the codec: crops of a folder of recordings.

    from data.segments import TokenSegments, get_batch      # `data` of the project's folder; see train.py

An item is a dict: codes (K, T), chroma (M, Q), text and has_melody of TokenSegments, wav (C, L) of AudioCrops, both
with `where` it comes from. Everything random about item i of update u is drawn from a generator seeded (seed, u, i).
"""
import math
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from conditioners import augment_description, drop_conditions, word_dropout
from config import Config, UserError, read_json
from data.audio import read_audio
from data.prepare import clean
from rvq import process_count, rank

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
SPLITS = ("train", "valid", "test")


def split_of(data_dir, split: str):
    """Folder of a split, and a function that picks its part of the names in it.

    train/, valid/ and test/ inside data_dir are the splits. Without them every twentieth name, by its checksum, is
    for validation and another one for testing.
    """
    folder = Path(data_dir)
    if any((folder / name).is_dir() for name in SPLITS):
        return folder / split, list

    def part(names):
        order = sorted(names, key=lambda name: (zlib.crc32(os.fsencode(name)), name))
        n = max(1, len(order) // 20) if len(order) >= 3 else 0
        return sorted({"valid": order[:n], "test": order[n:2 * n], "train": order[2 * n:]}[split])
    return folder, part


def pick(sums, rng) -> int:
    """An index, drawn in proportion to weights of which `sums` are the cumulative sums."""
    return min(int(np.searchsorted(sums, rng.random() * sums[-1], "right")), len(sums) - 1)


class AudioCrops:
    """Random crops (C, L) of a folder of recordings, any rate and format, at any depth.

    Folders named `melodies` are passed over: they hold the melody stems of recordings, as data/tunes.py writes them.
    """

    def __init__(self, config: Config, split: str):
        import soundfile
        folder, part = split_of(config.data_dir, split)
        names = [str(p.relative_to(folder)) for p in folder.rglob("*")
                 if p.suffix.lower() in SUFFIXES and p.name[0] != "." and
                 "melodies" not in p.relative_to(folder).parts[:-1]]
        self.config, self.paths, self.seconds = config, [], []
        for name in sorted(part(names)):
            try:
                assert (folder / name).is_file(), "not a file"  # a pipe, say, which would be waited for
                info = soundfile.info(os.fsencode(folder / name))
                assert info.frames > 0, "empty"
                self.paths.append(folder / name)
                # no more than its bytes can hold: a header may claim ages, and nothing else would be drawn
                self.seconds.append(min(info.frames / info.samplerate, os.path.getsize(folder / name) / 100))
            except (RuntimeError, OSError, AssertionError) as error:
                print(f"skipped {folder / name}: {error}", file=sys.stderr)
        if split == "train" and not self.paths:
            raise UserError(f"data_dir = {config.data_dir!r}: no readable {' '.join(SUFFIXES)} files to train on")
        self.sums = np.cumsum(np.maximum(self.seconds, config.segment_duration))  # all seconds of music alike

    def __len__(self):
        return len(self.paths)

    def item(self, rng, train: bool) -> dict:
        """One crop of segment_duration; a shorter file is followed by silence, a damaged one gives way to another."""
        config, L = self.config, round(self.config.segment_duration * self.config.sample_rate)
        for attempt in range(20):
            n = rng.integers(len(self)) if attempt else pick(self.sums, rng)
            start = rng.random() * max(0.0, self.seconds[n] - config.segment_duration)
            start = int(start * config.sample_rate) / config.sample_rate
            try:
                crop = read_audio(self.paths[n], config.sample_rate, config.channels, start, config.segment_duration)
                return {"wav": F.pad(crop, (0, max(0, L - crop.shape[1])))[:, :L],
                        "where": f"{self.paths[n]} at {start:.3f} s"}
            except UserError as error:
                print(f"skipped: {error}", file=sys.stderr)
        raise UserError(f"data_dir = {config.data_dir!r}: 20 recordings drawn one after the other cannot be read")


class TokenSegments:
    """Random segments of the tracks that data/prepare.py prepared, read from its memory-mapped shards.

    Segments start where a code frame and a chroma frame fall on the same sample: every lcm(stride, hop) samples.
    """

    def __init__(self, config: Config, split: str):
        folder, part = split_of(config.data_dir, split)
        self.config, self.tracks = config, []
        self.T, self.grid = config.segment_frames, math.lcm(config.stride, config.hop)
        if split != "train" and not folder.exists():
            return
        if not (folder / "index.json").is_file():
            raise UserError(f"data_dir = {config.data_dir!r}: {folder} has no index.json; data/prepare.py makes it")
        index = read_json(folder / "index.json")
        for key in ("n_q", "card", "stride", "sample_rate", "channels", "n_chroma", "radix2_exp"):
            if index.get(key) != getattr(config, key):
                raise UserError(f"{folder}: prepared with {key} = {index.get(key)}, the configuration says "
                                f"{getattr(config, key)}; prepare it again, or train with what it has")
        try:
            self.shards = [(memmap(folder / f"codes.{n:05d}.u16", np.uint16).reshape(-1, config.n_q),
                            memmap(folder / f"chroma.{n:05d}.u8", np.uint8)) for n in range(index["shards"])]
            kept = set(part([t["file"] for t in index["tracks"]]))
            tracks = [t for t in index["tracks"] if t["file"] in kept]
            for t in tracks:  # somebody else may have written this
                places = [t[key] for key in ("shard", "codes_start", "frames", "chroma_start", "chroma_frames")]
                assert all(type(n) is int and n >= 0 for n in places) and 0 <= t["weight"] < 1e9, t["file"]
                codes, chroma = self.shards[t["shard"]]
                assert t["codes_start"] + t["frames"] <= len(codes), t["file"]
                assert t["chroma_start"] + t["chroma_frames"] <= len(chroma), t["file"]
                t["meta"] = clean(t["meta"])
            self.tracks = [t for t in tracks if t["frames"] >= self.T and t["weight"] > 0]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError) as error:
            raise UserError(f"{folder}: index and shards do not fit ({error!r:.200}); prepare it again") from None
        if split == "train" and not self.tracks:
            raise UserError(f"{folder}: no track has segment_duration = {config.segment_duration} s; lower it")
        if len(self.tracks) < len(tracks) and rank() == 0:
            print(f"{folder}: {len(tracks) - len(self.tracks)} of {len(tracks)} tracks are left out: shorter than "
                  f"segment_duration = {config.segment_duration} s, or of weight 0", file=sys.stderr)
        self.sums = np.cumsum([t["frames"] * t["weight"] for t in self.tracks])

    def __len__(self):
        return len(self.tracks)

    def item(self, rng, train: bool) -> dict:
        """A random segment; in training with its conditions augmented and dropped at random.

        Held out, it is never conditioned on itself: its melody is that of another of n_eval_wavs tracks, and its own
        is beside it as own_chroma, own_has_melody.
        """
        track = self.tracks[pick(self.sums, rng)]
        places = (track["frames"] - self.T) * self.config.stride // self.grid + 1
        place = int(rng.integers(places))
        if train and self.config.start_p and rng.random() < self.config.start_p:
            place = 0
        segment = self.segment(track, place * self.grid, rng if train else None)
        if train:
            return segment
        others = [t for t in spread(self.tracks, self.config.n_eval_wavs) if t is not track]
        other = self.segment(others[rng.integers(len(others))], 0) if others else {}
        return with_melody_of(segment, other)

    def segment(self, track: dict, start: int, rng=None) -> dict:
        """Codes (K, T), text, chroma (M, Q) and has_melody of a track from sample `start` on."""
        config, where = self.config, f"{track['file']} at {start / self.config.sample_rate:.3f} s"
        all_codes, all_chroma = self.shards[track["shard"]]
        codes = all_codes[track["codes_start"] + start // config.stride:][:self.T].T.astype(np.int64)
        chroma, frames = torch.zeros(config.chroma_frames, config.n_chroma), track["chroma_frames"]
        has_melody, text = frames > 0 and config.melody != "none", track["meta"].get("description")
        if has_melody:  # repeats from the track's start should it end first, as in sampling
            places = track["chroma_start"] + (start // config.hop + np.arange(len(chroma))) % frames
            classes = all_chroma[places].astype(np.int64)
            chroma[torch.arange(len(chroma)), torch.from_numpy(classes % config.n_chroma)] = 1.0
        if codes.max() >= config.card or has_melody and classes.max() >= config.n_chroma:
            raise UserError(f"{config.data_dir}: {where} has codes beyond card = {config.card}, or pitch classes "
                            f"beyond {config.n_chroma}; the shard is damaged, prepare it again")
        if rng is not None:
            text = word_dropout(augment_description(track["meta"], config, rng), config.word_dropout, rng)
            text, has_melody = drop_conditions(text, has_melody, config, rng)
        return {"codes": torch.from_numpy(codes), "text": text, "chroma": chroma,
                "has_melody": torch.tensor(has_melody), "where": where}


def with_melody_of(segment: dict, other: dict) -> dict:
    """A segment with another one's melody (none, of an empty dict), its own beside it."""
    own = {f"own_{key}": segment[key] for key in ("chroma", "has_melody")}
    none = {"chroma": torch.zeros_like(segment["chroma"]), "has_melody": torch.tensor(False)}
    return segment | own | {key: other.get(key, none[key]) for key in none}


def spread(things: list, n: int) -> list:
    """Up to n of the things, evenly spread over the list."""
    n = min(n, len(things))
    return [things[i * len(things) // n] for i in range(n)]


def memmap(path, dtype):
    """A file as an array that is read from the disk where it is touched."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def get_batch(data, config: Config, update: int, micro: int = 0, split: str = "train") -> dict:
    """This process' share of a micro-batch. Item i of update u is drawn from (seed, u, i), i over all processes."""
    size = config.batch_size // (config.grad_accum * process_count())
    first = (micro * process_count() + rank()) * size
    return collate([data.item(np.random.default_rng([config.seed, SPLITS.index(split), update, first + j]),
                              split == "train") for j in range(size)])


def collate(items: list[dict]) -> dict:
    """Items -> a batch: tensors stacked, the rest as lists."""
    return {key: torch.stack([item[key] for item in items]) if torch.is_tensor(items[0][key]) else
            [item[key] for item in items] for key in items[0]}


class Prefetcher:
    """Reads the batches of the next updates in a thread while this update is computed, and measures the waiting."""

    def __init__(self, data, config: Config, ahead: int = 2):
        self.data, self.config, self.ahead, self.waited = data, config, ahead, 0.0
        self.pool, self.pending = ThreadPoolExecutor(1), {}

    def __call__(self, update: int) -> list[dict]:
        """The micro-batches of an update."""
        for u in range(update, min(update + 1 + self.ahead, self.config.total_updates)):
            if u not in self.pending:
                self.pending[u] = self.pool.submit(lambda u: [get_batch(self.data, self.config, u, micro)
                                                              for micro in range(self.config.grad_accum)], u)
        start = time.perf_counter()
        batches = self.pending.pop(update).result()
        self.waited += time.perf_counter() - start
        return batches
