"""The random draws of training: captions with metadata, words and conditions that are dropped.

    python -m pytest tests/test_segments.py
"""
from collections import Counter

import numpy as np
import torch

from config import Config
from data.segments import (TokenSegments, augment_description, collate, drop_conditions, split_of,
                           word_dropout)

TINY = dict(sample_rate=8000, ratios=(8, 5, 4), radix2_exp=9, segment_duration=0.25)
META = dict(description="A tune...", key="d minor", bpm=104.0, moods=["calm", "sad"], instrument="flute",
            title="Secret", genre=None)


def test_augmentation_follows_audiocrafts_rules():
    config, rng = Config(merge_text_p=0.25, drop_desc_p=0.5, drop_other_p=0.5), np.random.default_rng(0)
    texts = [augment_description(META, config, rng) for _ in range(8000)]
    plain = sum(t == "A tune." for t in texts) / 8000
    lost = sum(t is None or not t.startswith("A tune.") for t in texts) / 8000
    assert abs(plain - (0.75 + 0.25 * 0.5 * 0.5 ** 4)) < 0.02 and abs(lost - 0.125) < 0.015
    merged = [t for t in texts if t and "bpm" in t]
    assert abs(len(merged) / 8000 - 0.125) < 0.015 and any("bpm: 104.0" in t for t in merged)
    assert any("moods: calm, sad" in t for t in texts if t) and not any("Secret" in t for t in texts if t)
    first = Counter(t.removeprefix("A tune. ").split(":")[0] for t in merged)
    assert len(first) == 4, "fields are shuffled"


def test_augmentation_at_its_limits():
    never, rng = Config(merge_text_p=0.0), np.random.default_rng(0)
    assert augment_description(META, never, rng) == "A tune..."         # switched off: untouched
    keep = Config(merge_text_p=1.0, drop_desc_p=0.0, drop_other_p=1.0)  # the latter a probability of KEEPING
    assert set(augment_description(META, keep, rng).split(". ")[1:]) == {
        "key: d minor", "bpm: 104.0", "moods: calm, sad", "instrument: flute"}
    assert augment_description({}, keep, rng) is None
    assert augment_description(dict(description="Hey!"), Config(), np.random.default_rng(1)) == "Hey!."
    assert META["description"] == "A tune..."


def test_word_dropout():
    rng = np.random.default_rng(0)
    text = " ".join(map(str, range(1000)))
    kept = word_dropout(text, 0.3, rng).split(" ")
    assert abs(len(kept) - 700) < 50 and sorted(kept, key=int) == kept
    assert word_dropout(text, 0.0, rng) == text and word_dropout(None, 0.5, rng) is None
    assert word_dropout("all gone", 1.0, rng) is None


def test_condition_dropout_has_both_rates_and_follows_its_seed():
    melody = torch.zeros(3, 12)

    def draws(seed, **options):
        rng, config = np.random.default_rng(seed), Config(cfg_dropout=0.2, **options)
        dropped = [drop_conditions({"text": "text", "melody": melody}, config, rng) for _ in range(8000)]
        return [(item["text"], item["melody"] is melody) for item in dropped]
    texts, melodies = zip(*draws(0, melody_dropout=0.5))
    assert abs(texts.count(None) / 8000 - 0.2) < 0.015
    assert abs(sum(melodies) / 8000 - 0.8 * 0.5) < 0.02
    assert all(text for text, melody in zip(texts, melodies) if melody), "all conditions are dropped together"
    assert draws(0, melody_dropout=0.5) == draws(0, melody_dropout=0.5) != draws(1, melody_dropout=0.5)
    other = [text for text, _ in draws(0, melody_dropout=0.0)]
    assert other == list(texts), "one rate does not change the other's outcome"


def test_a_missing_melody_stays_missing():
    item, rng = {"text": "text", "melody": None}, np.random.default_rng(0)
    assert drop_conditions(item, Config(cfg_dropout=0.0, melody_dropout=0.0), rng) == item
    assert drop_conditions(item, Config(cfg_dropout=0.0, melody_dropout=1.0), rng) == item
    assert drop_conditions(item, Config(cfg_dropout=1.0), rng) == {"text": None, "melody": None}


def two_tracks() -> TokenSegments:
    """Two tracks of one segment each, without files; their melodies are pitch classes 3 and 4."""
    data = TokenSegments.__new__(TokenSegments)
    config = Config(**TINY, word_dropout=0.5, cfg_dropout=0.2, melody_dropout=0.5, merge_text_p=0.5)
    T, M = config.segment_frames, config.chroma_frames
    meta = dict(description="a slow and sad flute", key="d minor")
    track = dict(file="a", shard=0, codes_start=0, frames=T, chroma_start=0, chroma_frames=M, weight=1,
                 meta=meta)
    data.config = config
    data.tracks = [track, dict(track, file="b", chroma_start=M)]
    data.sums, data.T, data.M, data.grid = np.array([1.0, 2.0]), T, M, 10 ** 6
    data.stride, data.hop = config.stride, config.hop
    classes = np.repeat(np.array([3, 4], np.uint8), M)
    data.shards = [{"codes": np.zeros((T, 4), np.uint16), "chroma": classes}]
    return data


def test_small_collections_hold_out_more_than_one_recording(tmp_path):
    """A twentieth each for validation and testing, of few three and one; none is in two parts."""
    for count, *held_out in ((1, 0, 0), (2, 0, 0), (3, 1, 1), (6, 2, 1), (12, 3, 1), (40, 3, 2), (100, 5, 5)):
        names = [f"{n}.wav" for n in range(count)]
        parts = [split_of(tmp_path, split)[1](names) for split in ("valid", "test", "train")]
        assert [len(part) for part in parts] == [*held_out, count - sum(held_out)]
        assert sorted(sum(parts, [])) == sorted(names)


def test_nothing_is_dropped_in_evaluation():
    """Batches of training and of validation from the same tracks: only the former lose conditions."""
    data = two_tracks()
    for train in (False, True):
        items = [data.item(np.random.default_rng(n), train) for n in range(200)]
        conditions = [item["conditions"] for item in items]
        texts = {c["text"] for c in conditions}
        melodies = {c["melody"] is not None for c in conditions}
        if train:
            assert len(texts) > 20 and None in texts and melodies == {False, True}
            again = [data.item(np.random.default_rng(n), train)["conditions"]["text"] for n in range(200)]
            assert again == [c["text"] for c in conditions], "the draws follow the seed"
        else:
            assert texts == {"a slow and sad flute"} and melodies == {True}


def test_a_held_out_item_has_another_tracks_melody_and_its_own_beside_it():
    data = two_tracks()
    own = {"a": 3, "b": 4}
    for n in range(20):
        item = data.item(np.random.default_rng(n), train=False)
        melodies = item["own_melody"], item["conditions"]["melody"]
        played, asked = (melody.argmax(-1).unique().item() for melody in melodies)
        assert played == own[item["where"][0]] != asked
    data.tracks, data.sums = data.tracks[:1], data.sums[:1]     # no other track: no melody
    item = data.item(np.random.default_rng(0), train=False)
    assert item["conditions"]["melody"] is None and item["own_melody"] is not None


def test_items_become_a_batch_of_lists():
    data = two_tracks()
    items = [data.item(np.random.default_rng(n), train=False) for n in range(3)]
    batch = collate(items)
    assert batch.keys() == {"codes", "conditions", "where", "own_melody"}
    assert torch.equal(batch["codes"], torch.stack([item["codes"] for item in items]))
    assert batch["conditions"].keys() == {"text", "melody"}
    for name, values in batch["conditions"].items():
        assert all(value is item["conditions"][name] for value, item in zip(values, items, strict=True))
