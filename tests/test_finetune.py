"""Fine-tuning: adapters alone are trained, and the architecture comes from the checkpoint.

    python -m pytest tests/test_finetune.py
"""
import json
import re
import shutil

import pytest
import torch

from checkpoints.files import weights_sha256
from commands import train_main
from config import Config
from constants import flags
from encodec import EncodecModel
from lm import LMModel
from system.errors import UserError
from train import train
from training.lora import inherit_architecture
from training_runs import CODEC_RUN, lines, losses, settings, state, weights


def test_lora_trains_adapters_alone_and_merges_on_export(lm_run, training_data, tmp_path):
    """dim is the checkpoint's, whatever is asked for."""
    changes = dict(init_from=str(lm_run), lora_rank=2, optim="adamw", lr=1e-2, dim=32)
    train_main(flags(settings(training_data, tmp_path / "out", "lm", **changes)))
    start, tuned, exported = weights(lm_run), state(tmp_path / "out"), weights(tmp_path / "out")
    assert exported.keys() == start.keys()
    for name, tensor in tuned.items():
        if name.startswith("model.") and not re.search(r"\.0\.|embed_tokens", name):
            before = start[name[6:].replace("parametrizations.weight.original", "weight")]
            assert torch.equal(tensor, before), name
    assert all(".0." in name for name in tuned if name.startswith("optim.")), "states of adapters only"
    name = "layers.0.attn.qkv"
    up, down = (tuned[f"ema.{name}.parametrizations.weight.0.{key}"] for key in ("up", "down"))
    torch.testing.assert_close(exported[f"{name}.weight"], start[f"{name}.weight"] + 8.0 * up @ down)
    assert up.abs().max() > 0 and losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    LMModel.from_pretrained(tmp_path / "out")


def test_tuning_tells_what_is_held_out_and_what_it_starts_from(lm_run, training_data, tmp_path, capsys):
    train_main(flags(settings(training_data, tmp_path / "out", "lm", init_from=str(lm_run), lr=1e-9,
                              valid_every=3, epochs=1, updates_per_epoch=3)))
    first, last = lines(tmp_path / "out", "valid")
    assert first["update"] == 0 and abs(first["loss"] - last["loss"]) < 1e-3
    told = re.findall(r"held out for (\w+): (\d+) of the recordings: (.+)", capsys.readouterr().err)
    held_out = [name for _, _, names in told for name in names.split(", ")]
    assert [line[:2] for line in told] == [("validation", "3"), ("testing", "1")]
    assert len(set(held_out)) == 4


def test_tuning_that_begins_again_leaves_one_line_of_what_it_starts_from(lm_run, training_data, tmp_path):
    """Stopped before its first checkpoint, a run begins anew, and so does its log."""
    config = Config(**settings(training_data, tmp_path / "out", "lm", init_from=str(lm_run), save_every=0))
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupted=Killed())
    assert [line["update"] for line in lines(config.out_dir, "valid")] == [0]
    train(config)
    assert [line["update"] for line in lines(config.out_dir, "valid")] == [0, 7, 14, 20]


class Killed:
    """Ends a run that asks whether it is to end."""

    def __bool__(self):
        raise KeyboardInterrupt


def test_a_codec_that_is_asked_for_is_the_one_that_is_tuned_with(lm_run, training_data, tmp_path):
    """Without --codec it is the checkpoint's, even where a file for training anew names another."""
    torch.manual_seed(1)
    EncodecModel(Config(**CODEC_RUN | dict(kmeans_iters=0))).save(tmp_path / "tuned")
    (tmp_path / "file.py").write_text(f"codec = '{training_data}/codec'")
    values = settings(training_data, "out", "lm", init_from=str(lm_run), epochs=1, updates_per_epoch=1)
    del values["codec"]
    for name, asked, source in (("a", [f"--codec={tmp_path / 'tuned'}"], tmp_path / "tuned"),
                                ("b", [], lm_run / "codec")):
        train_main([str(tmp_path / "file.py"), *flags(values, out_dir=tmp_path / name), *asked])
        assert Config.from_json(tmp_path / name / "config.json").codec == str(source)
        found, wanted = (weights(folder) for folder in (tmp_path / name / "codec", source))
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_tokens_of_another_codec_are_refused(training_data, tmp_path):
    """Whether the codec is read from its own folder or from that of a model, its checksum is the same."""
    shutil.copytree(training_data / "tokens", tmp_path / "tokens")
    path = tmp_path / "tokens" / "index.json"
    checksum = weights_sha256(EncodecModel.from_pretrained(training_data / "codec"))
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(codec="my/codec", codec_sha256=checksum)))
    values = settings(training_data, tmp_path / "a", "lm", data_dir=str(tmp_path / "tokens"), epochs=1,
                      updates_per_epoch=1)
    train(Config(**values))
    train(Config(**values | dict(codec=str(tmp_path / "a" / "codec"), out_dir=str(tmp_path / "b"))))
    torch.manual_seed(1)
    EncodecModel(Config(**CODEC_RUN | dict(kmeans_iters=0))).save(tmp_path / "tuned")
    with pytest.raises(UserError, match="another codec .'my/codec'.*tuned.*train with --codec=DIR.*prepare"):
        train(Config(**values | dict(codec=str(tmp_path / "tuned"), out_dir=str(tmp_path / "c"))))
    assert not (tmp_path / "c").exists()


def inherited(training_data, checkpoint, **changes) -> Config:
    """The configuration of a run that fine-tunes a checkpoint."""
    values = settings(training_data, "out", "lm", init_from=str(checkpoint), **changes)
    return inherit_architecture(Config(**values))


def test_a_tuned_model_keeps_the_length_of_melodies_that_it_knows(lm_run, training_data):
    assert Config.from_json(lm_run / "config.json").chroma_frames == 17
    assert Config(**settings(training_data, "out", "lm", segment_duration=0.08)).chroma_frames == 9
    assert inherited(training_data, lm_run, segment_duration=0.08).chroma_frames == 17


def test_a_tuned_model_takes_over_all_that_its_layers_depend_on(lm_run, training_data, tmp_path):
    """Keys that no weight's shape shows, yet that change what a model says."""
    shutil.copytree(lm_run, tmp_path / "from")
    path = tmp_path / "from" / "config.json"
    other = dict(positional_embedding="sin_rope", positional_scale=0.1, max_period=500.0, num_heads=1,
                 null_melody="c", pattern="parallel")
    assert all(value != getattr(Config(), key) for key, value in other.items())
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    config = inherited(training_data, tmp_path / "from")
    assert {key: getattr(config, key) for key in other} == other
