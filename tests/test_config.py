"""Configuration: the paper's numbers, where they come from, and what is refused.

    python -m pytest tests/test_config.py
"""
import dataclasses
import json
import re
from pathlib import Path

import pytest

from config import FIELDS, INHERITED, Config, load, read_assignments
from constants import ROOT
from system.errors import UserError
from training.lora import inherit_architecture

MELODY = str(ROOT / "config" / "melody.py")
PAPER = dict(   # of MusicGen's melody model, but for the precision and memory of training
    task="lm", channels=1, sample_rate=32000, segment_duration=30.0,
    melody="prepend", n_chroma=12, radix2_exp=14, n_eval_wavs=100, melody_dropout=0.5,
    text="prepend", t5="t5-base", t5_finetune=False, word_dropout=0.2,
    merge_text_p=0.25, drop_desc_p=0.5, drop_other_p=0.5, cfg_dropout=0.2, cfg_coef=3.0,
    dim=1536, num_heads=24, num_layers=48, hidden_scale=4, positional_embedding="sin",
    n_q=4, card=2048, pattern="delay", delays=(0, 1, 2, 3),
    codec="facebook/encodec_32khz", n_filters=64, ratios=(8, 5, 4, 4), dimension=128, lstm=2,
    batch_size=192, epochs=500, updates_per_epoch=2000, optim="dadam", lr=1.0, betas=(0.9, 0.95), eps=1e-8,
    weight_decay=0.1, max_norm=1.0, ema_decay=0.99, ema_every=10, warmup=4000, lr_min_ratio=0.0,
    cycle_length=1.0, top_k=250, temperature=1.0)


# --- the paper's numbers ----------------------------------------------------------------------------------

def test_the_defaults_are_the_melody_model_of_the_paper():
    """config/melody.py changes none of them: what it sets is about precision and memory."""
    changes = dict(out_dir="out/melody", dtype="bfloat16", checkpointing=True)
    assert read_assignments(MELODY) == changes
    config = load([MELODY])
    assert {key: getattr(config, key) for key in PAPER} == PAPER
    assert config == Config(**changes)


def test_what_follows_from_the_papers_numbers():
    config = load([MELODY])
    assert (config.stride, config.frame_rate, config.segment_frames) == (640, 50, 1500)
    assert (2 ** config.radix2_exp, config.hop, config.chroma_frames) == (16384, 4096, 235)
    assert config.total_updates == 1_000_000


def test_the_table_of_audiocrafts_keys_has_each_number_of_the_paper_once():
    docstring = Path(MELODY).read_text().split('"""')[1]
    table = re.findall(r"^    ([\w.]+(?: \(\w+\))?)  +(\w+)", docstring, re.MULTILINE)
    assert table.pop(0) == ("audiocraft", "config")     # the heading: config.py
    audiocraft, ours = zip(*table)
    assert set(ours) <= FIELDS.keys()
    assert sorted(ours) == sorted(PAPER.keys() - {"task"} | {"dtype", "checkpointing"})
    assert len(set(audiocraft)) == len(audiocraft)


def test_the_text_model_differs_from_the_melody_model_as_in_the_paper():
    melody, text = load([MELODY]), load([str(ROOT / "config" / "text.py")])
    differs = {key for key in FIELDS if getattr(text, key) != getattr(melody, key)}
    assert {key: getattr(text, key) for key in differs} == dict(
        melody="none", text="cross", dim=1024, num_heads=16, num_layers=24, word_dropout=0.3, cfg_dropout=0.3,
        out_dir="out/text", checkpointing=False)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_file_loads(path):
    config = load([str(path)])
    assert read_assignments(path).items() <= dataclasses.asdict(config).items()


# --- files and flags --------------------------------------------------------------------------------------

def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('"""Mine."""\ndim = 48\nnum_heads = 2   # a comment\nratios = [5, 4]\n')
    for argv in (["--num_heads=4", str(path)], [str(path), "--num_heads=4"]):
        config = load([*argv, "--lr=2", "--causal", "--out_dir=a=b"])
        assert (config.dim, config.num_heads, config.num_layers) == (48, 4, Config().num_layers)
        assert config.ratios == (5, 4) and config.causal is True and config.out_dir == "a=b"
        assert config.lr == 2 and type(config.lr) is float


def test_a_configuration_survives_its_file(tmp_path):
    config = Config(ratios=(5, 4), causal=True, lr=1e-3, t5_words="slow fast", betas=(0.5, 0.75))
    config.save(tmp_path / "config.json")
    assert Config.from_json(tmp_path / "config.json") == config


# --- files of former versions -----------------------------------------------------------------------------

@pytest.fixture
def config_json(tmp_path):
    """A function that writes config.json, the defaults with some changes -> its path."""
    def write(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(dataclasses.asdict(Config()) | changes))
        return path
    return write


def test_kmeans_init_of_former_files_is_kmeans_iters(config_json):
    assert Config.from_json(config_json(kmeans_init=False, kmeans_iters=50)).kmeans_iters == 0
    assert Config.from_json(config_json(kmeans_init=True, kmeans_iters=50)).kmeans_iters == 50


def test_argmax_of_former_files_is_dropped_and_false_is_refused(config_json):
    assert Config.from_json(config_json(argmax=True)) == Config()
    with pytest.raises(UserError, match="config.json: argmax"):
        Config.from_json(config_json(argmax=False))


def test_steps_of_former_codecs_are_dropped(config_json):
    assert Config.from_json(config_json(unquantised_steps=4400, decoder_only_steps=400)) == Config()


def test_keys_that_former_files_lack_have_their_defaults(config_json):
    path = config_json()
    values = json.loads(path.read_text())
    del values["early_seconds"]
    path.write_text(json.dumps(values))
    assert Config.from_json(path) == Config()


# --- what is refused --------------------------------------------------------------------------------------

def numbers():
    """Key, type and whether it is a tuple, of all keys that are numbers."""
    for key, field in FIELDS.items():
        several = isinstance(field.default, tuple)
        kind = type(field.default[0] if several else field.default)
        if kind in (int, float):
            yield key, kind, several


@pytest.mark.parametrize("key, kind, several", list(numbers()))
def test_a_number_out_of_range_is_refused_with_its_limits(key, kind, several):
    limits = FIELDS[key].metadata
    least, most = limits["least"], limits["most"]
    allowed = "positive" if 0 < least < 1e-300 else f"{least} or more"
    wrong = [kind(most * 2 + 1), kind(least - 1)] + ([float("nan"), float("inf")] if kind is float else [])
    for value in wrong:
        value = (value,) if several else value
        with pytest.raises(UserError) as caught:
            Config(**{key: value})
        message = str(caught.value)
        assert message.startswith(f"{key} = {value!r}: must be {allowed}, {most} at most"), message
        assert limits["meaning"] in message


@pytest.mark.parametrize("key, value, says", [
    ("dim", 0, "dim = 0: must be positive, 65536 at most (D, width)"),
    ("dim", 1.5, "must be int"),
    ("dim", True, "must be int"),
    ("lr", "fast", "must be float"),
    ("causal", 1, "must be bool"),
    ("ratios", 5, "must be a tuple of int"),
    ("ratios", (), "must be 1 to 64 numbers"),
    ("ratios", (2,) * 65, "must be 1 to 64 numbers"),
    ("betas", ("a", "b"), "must be a tuple of float"),
    ("stem", "drums", "must be one of auto, none, hpss, demucs"),
    ("out_dir", "", "must be a name, not empty"),
    ("t5", "words", "t5_words"),
    ("ratios", (1000, 1000, 2), "their product must be 1000000 at most"),
    ("compress", 65, "n_filters = 64"),
    ("dim", 24, "num_heads = 24"),
    ("delays", (0, 1), "n_q = 4"),
    ("grad_accum", 7, "multiple of grad_accum = 7"),
    ("betas", (0.9,), "two numbers"),
    ("betas", (0.9, 1.0), "below 1"),
    ("mel_range", (7, 7), "(6, 11)"),
])
def test_other_values_are_refused_with_what_is_allowed(key, value, says):
    with pytest.raises(UserError) as caught:
        Config(**{key: value})
    assert key in str(caught.value) and says in str(caught.value)


# --- fine-tuning ------------------------------------------------------------------------------------------

def test_fine_tuning_inherits_the_architecture_and_nothing_else(tmp_path):
    """INHERITED: what makes the weights fit, and what the model has learned to be given."""
    assert sorted(INHERITED) == sorted("""
        channels sample_rate codec n_filters ratios dimension lstm n_residual_layers kernel_size
        last_kernel_size residual_kernel_size dilation_base compress causal pad_mode true_skip norm n_q card
        melody n_chroma radix2_exp melody_form chroma_length null_melody text t5 t5_finetune t5_words t5_dim
        t5_layers t5_heads dim num_heads num_layers hidden_scale positional_embedding positional_scale
        max_period qk_layer_norm pattern delays""".split())
    source = Config(dim=64, num_heads=2, qk_layer_norm=True, codec="my/codec", text="cross", batch_size=3,
                    lr=0.5, segment_duration=10.0, word_dropout=0.75)
    source.save(tmp_path / "config.json")
    config = Config(init_from=str(tmp_path), batch_size=4, segment_duration=5.0)
    tuned = inherit_architecture(config)
    assert tuned.chroma_length == source.chroma_frames != config.chroma_frames
    source.chroma_length = source.chroma_frames
    for key in FIELDS:
        assert getattr(tuned, key) == getattr(source if key in INHERITED else config, key), key
    longer = inherit_architecture(dataclasses.replace(config, segment_duration=20.0))
    whole = dataclasses.replace(source, segment_duration=20.0, chroma_length=0)
    assert longer.chroma_frames == whole.chroma_frames
