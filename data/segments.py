"""Items and batches of training: segments of prepared tracks, or, for the codec, crops of recordings.

    data = TokenSegments(config, "train")           # what data/prepare.py wrote
    batch = get_batch(data, config, update=0)       # codes (B, K, T); conditions: a list of B for each

An item of TokenSegments is {"codes": (K, T), "conditions": {"text": description or None, "melody": chroma
(M, Q) or None}, "where": which piece of a track}, one of AudioCrops {"wav": (C, L), "where": ...}.
Everything random about item i of update u is drawn from a generator seeded (seed, u, i): neither the number
of processes nor stopping and resuming changes what a model is trained on.

In training, conditions are augmented, and dropped at random, so that the model also learns to play without
them, which is what classifier-free guidance needs. Held-out items keep theirs.

    python data/segments.py     # training captions of one track: augmented, words dropped
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

if __name__ == "__main__":  # the demo: find the project
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoints.files import weights_sha256
from config import Config
from data.audio import read_audio, seconds_of
from data.captions import clean, is_recording, walk
from data.shards import is_whole, melody_form, open_shard
from system import processes
from system.errors import UserError
from system.files import read_json

SPLITS = ("train", "valid", "test")
AHEAD = 2       # updates whose batches are read before they are needed


def split_of(data_dir, split: str):
    """Folder of a split, and a function that picks its part of the names in it.

    train/, valid/ and test/ inside data_dir are the splits. Without them every twentieth name, by its
    checksum, is for validation and another one for testing; of few names one is for testing, and up to three,
    but no more than a third, for validation.
    """
    folder = Path(data_dir)
    if any((folder / name).is_dir() for name in SPLITS):
        return folder / split, list

    def part(names):
        order = sorted(names, key=lambda name: (zlib.crc32(os.fsencode(name)), name))
        valid = max(min(3, len(order) // 3), len(order) // 20)
        end = valid + max(min(1, len(order) // 3), len(order) // 20)    # of those for testing
        return sorted({"valid": order[:valid], "test": order[valid:end], "train": order[end:]}[split])
    return folder, part


def pick(sums, rng) -> int:
    """An index, drawn in proportion to weights of which `sums` are the cumulative sums."""
    return min(int(np.searchsorted(sums, rng.random() * sums[-1], "right")), len(sums) - 1)


def spread(things: list, n: int) -> list:
    """Up to n of the things, evenly spread over the list."""
    n = min(n, len(things))
    return [things[i * len(things) // n] for i in range(n)]


# --- for the codec: crops of recordings -------------------------------------------------------------------

class AudioCrops:
    """Random crops (C, L) of a folder of recordings, any rate and format, at any depth, linked ones too.

    Folders named `melodies` are passed over: they hold the melody stems of recordings, as data/tunes.py
    writes them.
    """

    def __init__(self, config: Config, split: str):
        self.config, self.paths, self.seconds = config, [], []
        folder, part = split_of(config.data_dir, split)
        names, complaints = [], []
        for directory, folders, files in walk(folder, complaints) if folder.is_dir() else ():
            place = directory.relative_to(folder)
            if "melodies" not in place.parts:
                names += [str(place / name) for name in folders + files if is_recording(name)]
        for complaint in complaints:
            print(f"skipped {folder}/{complaint}", file=sys.stderr)
        for name in sorted(part(names)):
            try:
                # no more than its bytes can hold: a header may claim ages, and nothing else would be drawn
                seconds = min(seconds_of(folder / name), os.path.getsize(folder / name) / 100)
            except (UserError, OSError) as error:
                print(f"skipped {error}", file=sys.stderr)
                continue
            self.paths.append(folder / name)
            self.seconds.append(seconds)
        if split == "train" and not self.paths:
            raise UserError(f"data_dir = {config.data_dir!r}: no readable recordings (wav, flac, ogg, mp3, "
                            f"...) to train on")
        self.sums = np.cumsum(np.maximum(self.seconds, config.segment_duration))  # all seconds of music alike

    def __len__(self):
        return len(self.paths)

    @property
    def names(self) -> list[str]:
        return [path.name for path in self.paths]

    def item(self, rng, train: bool) -> dict:
        """One crop of segment_duration; silence follows a shorter file, another replaces a damaged one."""
        sample_rate, duration = self.config.sample_rate, self.config.segment_duration
        L = round(duration * sample_rate)
        for attempt in range(20):
            n = rng.integers(len(self)) if attempt else pick(self.sums, rng)
            start = rng.random() * max(0.0, self.seconds[n] - duration)
            start = int(start * sample_rate) / sample_rate
            try:
                crop = read_audio(self.paths[n], sample_rate, self.config.channels, start, duration)
            except UserError as error:
                print(f"skipped: {error}", file=sys.stderr)
                continue
            wav = F.pad(crop, (0, max(0, L - crop.shape[1])))[:, :L]
            return {"wav": wav, "where": f"{self.paths[n]} at {start:.3f} s"}
        raise UserError(f"data_dir = {self.config.data_dir!r}: 20 recordings drawn one after the other "
                        f"cannot be read")


# --- for the language model: segments of prepared tracks --------------------------------------------------

def check_codec(codec, *splits):
    """Raises UserError where the tokens of TokenSegments are known to be another codec's: other sounds."""
    checksum = weights_sha256(codec)
    for data in splits:
        if data.index.get("codec_sha256") not in (None, checksum):
            raise UserError(f"{data.folder}: prepared with another codec ({data.index.get('codec')!r:.200}) "
                            f"than codec = {data.config.codec!r}; train with --codec=DIR, that codec's "
                            f"folder, or prepare it again with --codec {data.config.codec}")


class TokenSegments:
    """Random segments of the tracks that data/prepare.py prepared, read from its memory-mapped shards.

    Segments start where a code frame and a chroma frame fall on the same sample: every lcm(stride, hop)
    samples.
    """

    def __init__(self, config: Config, split: str):
        self.config, self.tracks = config, []
        self.stride, self.hop = config.stride, config.hop               # samples per code frame, chroma frame
        self.T, self.M = config.segment_frames, config.chroma_frames
        self.grid = math.lcm(self.stride, self.hop)                     # samples
        self.index = {}
        self.curves = ("chroma",)                                       # of those that were prepared
        folder, part = split_of(config.data_dir, split)
        if split != "train" and not folder.exists():
            return
        tracks = self._open(folder, part)
        self.tracks = [t for t in tracks if t["frames"] >= self.T and t["weight"] > 0]
        if split == "train" and not self.tracks:
            raise UserError(f"{folder}: no track has segment_duration = {config.segment_duration} s; lower "
                            f"it")
        if len(self.tracks) < len(tracks) and processes.rank() == 0:
            print(f"{folder}: {len(tracks) - len(self.tracks)} of {len(tracks)} tracks are left out: shorter "
                  f"than segment_duration = {config.segment_duration} s, or of weight 0", file=sys.stderr)
        self.sums = np.cumsum([t["frames"] * t["weight"] for t in self.tracks])

    def _open(self, folder: Path, part) -> list[dict]:
        """Opens the shards, returns the tracks of this split. UserError where files and config disagree."""
        config = self.config
        if not (folder / "index.json").is_file():
            raise UserError(f"data_dir = {config.data_dir!r}: {folder} has no index.json; data/prepare.py "
                            f"makes it")
        self.folder, self.index = folder, read_json(folder / "index.json")
        index = self.index
        index["melody_form"] = melody_form(index)
        for key in ("n_q", "card", "stride", "sample_rate", "channels", "n_chroma", "melody_form",
                    "radix2_exp"):
            if index.get(key) != getattr(config, key):
                raise UserError(f"{folder}: prepared with {key} = {index.get(key)}, the configuration says "
                                f"{getattr(config, key)}; prepare it again, or train with what it has")
        try:
            self.shards = [open_shard(folder, n, config.n_q, self.curves) for n in range(index["shards"])]
            frames = [{name: len(array) for name, array in shard.items()} for shard in self.shards]
            names = set(part([track["file"] for track in index["tracks"]]))
            tracks = [track for track in index["tracks"] if track["file"] in names]
            for track in tracks:  # somebody else may have written this
                shard = track["shard"]
                has_shard = type(shard) is int and shard >= 0
                if not (has_shard and is_whole(track, frames[shard]) and 0 <= track["weight"] < 1e9):
                    raise ValueError(track["file"])
                track["meta"] = clean(track["meta"])
            return tracks
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{folder}: index and shards do not fit ({error!r:.200}); prepare it "
                            f"again") from None

    def __len__(self):
        return len(self.tracks)

    @property
    def names(self) -> list[str]:
        return [track["file"] for track in self.tracks]

    def item(self, rng, train: bool) -> dict:
        """A random segment; in training with its conditions augmented and dropped at random.

        A held-out segment gets the melody of another of n_eval_wavs tracks, never its own, which is beside
        it as "own_melody".
        """
        track = self.tracks[pick(self.sums, rng)]
        starts = (track["frames"] - self.T) * self.stride // self.grid + 1
        start = int(rng.integers(starts)) * self.grid
        if train and self.config.start_p and rng.random() < self.config.start_p:
            start = 0
        if train:
            return self.segment(track, start, rng)
        item = self.segment(track, start)
        others = [other for other in spread(self.tracks, self.config.n_eval_wavs) if other is not track]
        if not others:
            return with_melody_of(item, None)
        return with_melody_of(item, self.segment(others[rng.integers(len(others))], 0))

    def segment(self, track: dict, start: int, rng=None) -> dict:
        """The item of a track from sample `start` on; with rng, its conditions are augmented and dropped.

        Raises UserError where the shard is damaged.
        """
        config, where = self.config, f"{track['file']} at {start / self.config.sample_rate:.3f} s"
        first = track["codes_start"] + start // self.stride
        codes = self.shards[track["shard"]]["codes"][first:first + self.T].T.astype(np.int64)
        classes = self.curve(track, "chroma", start) if config.melody != "none" else None
        if codes.max() >= config.card or classes is not None and classes.max() > config.melody_classes:
            raise UserError(f"{config.data_dir}: {where} has codes beyond card = {config.card}, or pitch "
                            f"classes beyond {config.melody_classes}; the shard is damaged, prepare it again")
        melody = None
        if classes is not None:     # class Q is silence: no class at all
            melody = F.one_hot(classes, config.melody_classes + 1)[:, :-1].float()
        conditions = {"text": track["meta"].get("description"), "melody": melody}
        if rng is not None:
            text = augment_description(track["meta"], config, rng)
            conditions["text"] = word_dropout(text, config.word_dropout, rng)
            conditions = drop_conditions(conditions, config, rng)
        return {"codes": torch.from_numpy(codes), "conditions": conditions, "where": where}

    def curve(self, track: dict, name: str, start: int) -> torch.Tensor | None:
        """The M numbers of a curve of a track from sample `start` on (int64); None where the track has none.

        A curve that ends before begins again, as in sampling.
        """
        length = track[f"{name}_frames"]
        if length == 0:
            return None
        frames = (start // self.hop + np.arange(self.M)) % length
        values = self.shards[track["shard"]][name][track[f"{name}_start"] + frames]
        return torch.from_numpy(values.astype(np.int64))


def with_melody_of(item: dict, other: dict | None) -> dict:
    """An item with the melody of another one, or without any; its own is beside it as "own_melody"."""
    melody = other["conditions"]["melody"] if other else None
    own = item["conditions"]["melody"]
    return item | {"conditions": item["conditions"] | {"melody": melody}, "own_melody": own}


# --- what is random about conditions in training: augmentation and dropout --------------------------------

METADATA = ("key", "bpm", "genre", "moods", "keywords", "instrument")


def augment_description(meta: dict, config: Config, rng) -> str | None:
    """Description of a track, at times merged with its metadata, as audiocraft's text augmentation.

    meta: fields of the track (title, description, key, bpm, moods as a list, ...); rng: numpy Generator.
    With probability merge_text_p each metadata field is kept with probability drop_other_p (sic), shuffled,
    and appended as "key: a minor. bpm: 104.0"; the description itself is then dropped with probability
    drop_desc_p.
    """
    description = meta.get("description")
    if config.merge_text_p == 0:
        return description
    extra = ""
    if rng.random() < config.merge_text_p:
        fields = []
        for name in METADATA:
            value = meta.get(name)
            if value and rng.random() < config.drop_other_p:
                fields.append(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
        rng.shuffle(fields)
        extra = ". ".join(fields)
        if rng.random() < config.drop_desc_p:
            description = None
    if not description:
        return extra or None
    return f"{description.rstrip('.')}. {extra}".strip()


def word_dropout(text: str | None, p: float, rng) -> str | None:
    """Text without some of its words, each dropped with probability p; None where nothing is left."""
    if not text or not p:
        return text
    words = [word for word in text.split(" ") if rng.random() >= p]
    return " ".join(words) or None


def drop_conditions(conditions: dict, config: Config, rng) -> dict:
    """An item's conditions after guidance dropout (all at once) and attribute dropout (the melody).

    Both draws are always made, so that one rate never changes the other's outcome. Audiocraft draws once
    per batch and process; one draw an item has the same rates and less noise, and does not depend on the
    batch.
    """
    drop_all = rng.random() < config.cfg_dropout
    drop_melody = rng.random() < config.melody_dropout
    if drop_all:
        return {name: None for name in conditions}
    if drop_melody:
        return conditions | {"melody": None}
    return conditions


# --- batches ----------------------------------------------------------------------------------------------

def get_batch(data, config: Config, update: int, micro=0, split="train", rank=0, world=1) -> dict:
    """The share that process `rank` of `world` has in a micro-batch of an update.

    Item i of update u is drawn from (seed, u, i), i over all micro-batches and processes.
    """
    size = config.batch_size // (config.grad_accum * world)
    first = (micro * world + rank) * size
    items = []
    for i in range(first, first + size):
        rng = np.random.default_rng([config.seed, SPLITS.index(split), update, i])
        items.append(data.item(rng, train=split == "train"))
    return collate(items)


def collate(items: list[dict]) -> dict:
    """Items -> a batch: codes or waves stacked, conditions a dict of lists, all else a list."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    for key in ("codes", "wav"):
        if key in batch:
            batch[key] = torch.stack(batch[key])
    if "conditions" in batch:
        names = batch["conditions"][0]
        batch["conditions"] = {name: [item[name] for item in batch["conditions"]] for name in names}
    return batch


class Prefetcher:
    """Reads the batches of the next updates in a thread while this one is computed; measures the waiting."""

    def __init__(self, data, config: Config, rank=0, world=1):
        self.data, self.config, self.rank, self.world = data, config, rank, world
        self.waited = 0.0       # s
        self.pool, self.pending = ThreadPoolExecutor(1), {}

    def __call__(self, update: int) -> list[dict]:
        """The micro-batches of an update."""
        for u in range(update, min(update + 1 + AHEAD, self.config.total_updates)):
            if u not in self.pending:
                self.pending[u] = self.pool.submit(self.read, u)
        start = time.perf_counter()
        batches = self.pending.pop(update).result()
        self.waited += time.perf_counter() - start
        return batches

    def read(self, update: int) -> list[dict]:
        micros = range(self.config.grad_accum)
        return [get_batch(self.data, self.config, update, n, "train", self.rank, self.world) for n in micros]


def demo():
    config, rng = Config(), np.random.default_rng(1)
    meta = dict(description="A slow air for a flute, alone in a large hall.", key="d minor", bpm=72.0,
                moods=["calm", "sad"], instrument="flute")
    print(f"training captions of one track, merged with metadata at a rate of {config.merge_text_p}, words "
          f"dropped:")
    for _ in range(6):
        text = augment_description(meta, config, rng)
        print("  ", word_dropout(text, config.word_dropout, rng))


if __name__ == "__main__":
    demo()
