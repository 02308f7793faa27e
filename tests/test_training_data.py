"""What training reads: segments of prepared tracks, crops of recordings, batches of both.

    python -m pytest tests/test_training_data.py
"""
import dataclasses
import shutil

import numpy as np
import pytest
import torch

from config import Config
from data.segments import SPLITS, AudioCrops, TokenSegments, get_batch, spread
from evaluation.evaluate import held_out
from system.errors import UserError
from training_runs import settings


@pytest.fixture()
def config(training_data) -> Config:
    """Of a run of the language model."""
    return Config(**settings(training_data, "out", "lm"))


def test_segments_lie_where_codes_and_chroma_meet(config, training_data):
    tokens = TokenSegments(config, "train")
    track = tokens.tracks[0]
    item = tokens.segment(track, 3 * tokens.grid)
    codes = np.fromfile(training_data / "tokens" / "codes.00000.u16", np.uint16).reshape(-1, 2)
    chroma = np.fromfile(training_data / "tokens" / "chroma.00000.u8", np.uint8)
    assert tokens.grid == 16
    assert sum(len(TokenSegments(config, split)) for split in SPLITS) == 8
    assert (item["codes"].T.numpy() == codes[track["codes_start"] + 6:][:32]).all()
    melody = item["conditions"]["melody"].argmax(-1).numpy()
    assert (melody[:10] == chroma[track["chroma_start"] + 3:][:10]).all()


def test_tracks_are_drawn_by_their_weights(config):
    tokens = TokenSegments(config, "train")
    heavy = next(track["file"] for track in tokens.tracks if track["weight"] == 3.0)
    drawn = [tokens.item(np.random.default_rng([0, n]), True)["where"].split()[0] for n in range(600)]
    assert abs(drawn.count(heavy) / 600 - 3 / (len(tokens.tracks) + 2)) < 0.08


def test_items_depend_on_seed_update_and_number_alone(config):
    tokens = TokenSegments(config, "train")
    whole = get_batch(tokens, config, 5)
    accumulated = dataclasses.replace(config, grad_accum=2)
    halves = [get_batch(tokens, accumulated, 5, micro) for micro in (0, 1)]
    assert torch.equal(whole["codes"], torch.cat([half["codes"] for half in halves]))
    assert whole["where"] == halves[0]["where"] + halves[1]["where"]
    assert whole["where"] != get_batch(tokens, config, 6)["where"]


def test_processes_share_a_batch(config):
    tokens = TokenSegments(config, "train")
    whole = get_batch(tokens, config, 5)
    shares = [get_batch(tokens, config, 5, rank=rank, world=2) for rank in (0, 1)]
    assert torch.equal(whole["codes"], torch.cat([share["codes"] for share in shares]))
    assert whole["where"] == shares[0]["where"] + shares[1]["where"]


@pytest.fixture()
def nine_tracks(training_data, tmp_path) -> TokenSegments:
    """All tracks, as held-out ones; the melodies of three are used."""
    (tmp_path / "valid").symlink_to(training_data / "tokens")
    values = settings(training_data, "out", "lm", data_dir=str(tmp_path), n_eval_wavs=3)
    return TokenSegments(Config(**values), "valid")


def test_validation_never_conditions_a_track_on_itself(nine_tracks):
    own = {}
    for track in nine_tracks.tracks:
        own[track["file"]] = nine_tracks.segment(track, 0)["conditions"]["melody"]
    pool = [own[track["file"]] for track in spread(nine_tracks.tracks, 3)]
    seen = set()
    for update in range(20):
        batch = get_batch(nine_tracks, nine_tracks.config, update, split="valid")
        for where, melody, own_melody in zip(batch["where"], batch["conditions"]["melody"],
                                             batch["own_melody"], strict=True):
            file, _, start = where.partition(" at ")
            same = [i for i, other in enumerate(pool) if torch.equal(melody, other)]
            assert len(same) == 1 and pool[same[0]] is not own[file]
            assert start != "0.000 s" or torch.equal(own_melody, own[file])
            seen.add(same[0])
    assert seen == {0, 1, 2}


def test_evaluation_never_conditions_a_track_on_itself(nine_tracks):
    items = held_out(nine_tracks, 8)
    for item, following in zip(items, items[1:] + items[:1]):
        assert torch.equal(item["conditions"]["melody"], following["own_melody"])


def test_a_track_that_is_held_out_alone_has_no_melody(config):
    alone = TokenSegments(config, "valid")
    alone.tracks, alone.sums = alone.tracks[:1], alone.sums[:1]
    batch = get_batch(alone, config, 0, split="valid")
    assert batch["conditions"]["melody"] == [None] * len(batch["where"])


def test_data_of_other_settings_are_refused(training_data):
    def of(task, **changes):
        return Config(**settings(training_data, "out", task, **changes))
    with pytest.raises(UserError, match="card = 16"):
        TokenSegments(of("lm", card=32), "train")
    with pytest.raises(UserError, match="segment_duration"):
        TokenSegments(of("lm", segment_duration=10.0), "train")
    with pytest.raises(UserError, match="no readable"):
        AudioCrops(of("codec", data_dir="nowhere"), "train")


def test_melody_stems_are_no_recordings_of_their_own(training_data, tmp_path):
    for folder in (tmp_path / "train", tmp_path / "train" / "melodies"):
        shutil.copytree(training_data / "audio" / "deep", folder)
    crops = AudioCrops(Config(**settings(training_data, "out", "codec", data_dir=str(tmp_path))), "train")
    assert [path.parent.name for path in crops.paths] == 6 * ["train"]
