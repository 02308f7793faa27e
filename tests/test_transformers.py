"""MusicGen against transformers' own classes, with random weights in tiny sizes; checkpoints of others.

    python -m pytest tests/test_transformers.py

transformers writes a checkpoint with save_pretrained, ours reads it: logits, greedy tokens, text embeddings;
and the other way round. Several releases of transformers drop MusicgenMelody's conditions when generating, so
the reference is first made to prove that it reacts to its melody and its text.
"""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import transformers
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file

from checkpoints.lm_formats import export_transformers, name_table
from checkpoints.t5 import load_t5
from commands import sampling, worked
from config import Config
from constants import LM, ROOT
from deviations import near, same
from encodec import EncodecModel
from lm import LMModel
from models import D, K, V, musicgen_of_transformers, word_tokenizer
from sample import MusicGen
from system.errors import UserError

FRAMES = 100


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()


def tokens_of(texts):
    inputs = word_tokenizer()([text or "" for text in texts], return_tensors="pt", padding=True)
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def greedy(model, texts, features=None, frames=FRAMES):
    """transformers' greedy tokens (B, K, T) with guidance 3, before the codec."""
    inputs = tokens_of(texts)
    if features is not None:
        inputs["input_features"] = features
    seen, decode = [], model.audio_encoder.decode

    def record(codes, *args, **kwargs):
        seen.append(codes)
        return decode(codes, *args, **kwargs)
    model.audio_encoder.decode = record
    with torch.no_grad():
        model.generate(**inputs, do_sample=False, guidance_scale=3.0, max_length=frames + K)
    model.audio_encoder.decode = decode
    if len(seen) == 2:      # left and right
        return torch.stack([codes[0] for codes in seen], dim=2).flatten(1, 2)
    return seen[0][0]


def melodies(*classes, M=9):
    """Chroma (B, M, Q): rising by a semitone every other frame."""
    steps = torch.tensor(classes)[:, None] + torch.arange(M) // 2
    return torch.nn.functional.one_hot(steps % 12, 12).float()


def ours(directory, texts, chromas=None, frames=FRAMES):
    model = MusicGen.from_pretrained(directory, "cpu")
    duration = frames / model.frame_rate
    return model.generate_codes(texts, chromas, duration=duration, guidance=3.0, temperature=0)


# --- the numbers of transformers --------------------------------------------------------------------------

TEXTS = ["slow flute", "a fast happy organ tune"]


def skip_where_ignored(tokens, *others):
    """Skips where the reference makes the same music of other conditions."""
    if any(torch.equal(tokens, other) for other in others):
        pytest.skip(f"transformers {transformers.__version__} ignores the melody or the text when generating")


# text_dim = D: transformers then has no projection of the text
@pytest.mark.parametrize("options", [
    dict(), dict(heads=2, layers=3, text_dim=24, shard="20KB"),
    dict(kind="stereo melody", text_dim=D)], ids=str)
def test_melody_model(tmp_path, options):
    reference = musicgen_of_transformers(tmp_path, **{"kind": "melody", **options})
    found = greedy(reference, ["slow flute"], melodies(9), 30)
    skip_where_ignored(found, greedy(reference, ["slow flute"], melodies(3), 30),
                       greedy(reference, ["fast organ"], melodies(9), 30))

    lm = LMModel.from_pretrained(tmp_path)
    books = lm.config.n_q
    codes = torch.randint(V, (2, books, 14))
    for features in (melodies(9, 2), None):     # without: one-hot C, our null melody "c"
        with torch.no_grad():
            expected = reference(**tokens_of(TEXTS), input_features=features,
                              decoder_input_ids=codes.flatten(0, 1)).logits
            chromas = [None] * 2 if features is None else list(features)
            conditions = lm.conditioner({"text": TEXTS, "melody": chromas})
            attended = torch.ones_like(conditions.prefix_mask)      # transformers attends to padding
            logits = lm(codes, conditions._replace(prefix_mask=attended))
        expected = expected.view(2, books, -1, V)[:, :, -14:]
        near("melody model, logits", "transformers", logits, expected, 1e-4)

    tokens, text = "melody model, greedy tokens", ["slow flute"]
    with_melody = ours(tmp_path, text, list(melodies(9)))
    same(tokens, "transformers", with_melody, greedy(reference, text, melodies(9)))
    assert with_melody.shape == (1, books, FRAMES)
    text_only = ours(tmp_path, text)
    same(tokens, "transformers", text_only, greedy(reference, text))
    assert not torch.equal(text_only, with_melody)
    short = melodies(5, M=4)    # shorter melodies repeat
    same(tokens, "transformers", ours(tmp_path, ["sad"], list(short)), greedy(reference, ["sad"], short))
    # a batch of equal text lengths has no padding, which transformers would attend to
    texts, features = ["slow flute", "fast organ"], melodies(1, 8)
    batch = ours(tmp_path, texts, list(features), 40)
    same(tokens, "transformers", batch, greedy(reference, texts, features, 40))


@pytest.mark.parametrize("kind, options", [
    ("text", dict()), ("text", dict(text_dim=D, heads=2, shard="20KB")), ("stereo", dict(layers=3))])
def test_text_and_stereo_model(tmp_path, kind, options):
    reference = musicgen_of_transformers(tmp_path, kind, **options)
    found = greedy(reference, ["slow flute"])
    skip_where_ignored(found, greedy(reference, ["fast organ"]))
    same("text and stereo model, greedy tokens", "transformers", ours(tmp_path, ["slow flute"]), found)

    lm = LMModel.from_pretrained(tmp_path)
    assert lm.config.n_q == (8 if kind == "stereo" else 4)
    codes = torch.randint(V, (2, lm.config.n_q, 14))
    with torch.no_grad():       # its cross-attention masks padding as ours does
        expected = reference(**tokens_of(TEXTS), decoder_input_ids=codes.flatten(0, 1)).logits
        logits = lm(codes, lm.conditioner({"text": TEXTS, "melody": [None] * 2}))
    near("text and stereo model, logits", "transformers", logits, expected.view(2, -1, 14, V), 1e-4)
    if kind == "stereo":
        wav = MusicGen.from_pretrained(tmp_path, "cpu").generate(["slow flute"], duration=0.1)
        assert wav.shape == (1, 2, 800)


def test_text_conditioner(tmp_path):
    """Embeddings and masks; an empty and a missing description are zeros."""
    reference = musicgen_of_transformers(tmp_path, "melody")
    conditioner = LMModel.from_pretrained(tmp_path).conditioner.text
    texts = ["a slow flute tune", "organ", "", None]
    inputs = tokens_of(texts)
    with torch.no_grad():
        frames, mask, _ = conditioner(texts)
        hidden = reference.text_encoder(**inputs).last_hidden_state
        expected = reference.enc_to_dec_proj(hidden) * inputs["attention_mask"][..., None]
    near("text conditioner, embeddings", "transformers", frames[:2], expected[:2], 1e-5)
    same("text conditioner, mask", "transformers", mask, inputs["attention_mask"].bool())
    assert (frames[2:] == 0).all()
    names = [name for name, _ in conditioner.named_parameters()]
    assert not any("t5" in name for name in names), "a frozen T5 is not trained or saved"


# --- forms of a checkpoint of transformers ----------------------------------------------------------------

def as_bin(path, tensors):
    path.unlink()
    torch.save(tensors, path.with_name("pytorch_model.bin"))


def as_bin_in_shards(path, tensors):
    path.unlink()
    shards = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        part = {name: tensor for name, tensor in tensors.items() if shards[name] == shard}
        torch.save(part, path.with_name(shard))
    path.with_name("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))


def beside_audiocrafts(path, tensors):
    """As a clone of a released repository holds both."""
    for name in ("state_dict.bin", "compression_state_dict.bin"):
        path.with_name(name).write_bytes(b"not read")


@pytest.mark.parametrize("form", [as_bin, as_bin_in_shards, beside_audiocrafts])
def test_forms_of_a_checkpoint(tmp_path, form):
    musicgen_of_transformers(tmp_path, "melody")
    expected = LMModel.from_pretrained(tmp_path).state_dict()
    file = tmp_path / "model.safetensors"
    form(file, {name: tensor.clone() for name, tensor in load_file(file).items()})
    model = MusicGen.from_pretrained(tmp_path, "cpu")
    for name, tensor in LMModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.generate(["slow"], duration=0.05).isfinite().all()


def test_half_precision_files_and_types_on_load(tmp_path):
    musicgen_of_transformers(tmp_path, "melody", dtype=torch.float16)
    assert LMModel.from_pretrained(tmp_path).emb.weight.dtype == torch.float16
    model = MusicGen.from_pretrained(tmp_path, "cpu", "bfloat16")
    assert model.lm.lm_heads.weight.dtype == torch.bfloat16
    assert model.generate(["slow"], duration=0.05).isfinite().all()


def test_wrong_tensors_are_listed(tmp_path):
    musicgen_of_transformers(tmp_path, "melody")
    path, name = tmp_path / "model.safetensors", "decoder.model.decoder.layers.1.fc1.weight"
    good = load_file(path)
    for change, match in ((lambda t: t.pop(name), f"missing: {name}"),
                          (lambda t: t.update(extra=torch.zeros(2)), "not known: extra"),
                          (lambda t: t.update({name: torch.zeros(3, 3)}), "wrong shape.*fc1")):
        bad = dict(good)
        change(bad)
        save_file(bad, path, {"format": "pt"})
        with pytest.raises(UserError, match=match):
            LMModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", ["shared", "encoder.embed_tokens", "decoder.embed_tokens"])
def test_one_name_of_the_embedding_of_t5_is_enough(tmp_path, kept):
    """A converter that drops tied tensors keeps the one that it meets first."""
    musicgen_of_transformers(tmp_path, "melody")
    expected = load_t5(tmp_path).state_dict()
    path = tmp_path / "model.safetensors"
    tensors = dict(load_file(path))
    tied = {f"text_encoder.{name}.weight" for name in ("shared", "encoder.embed_tokens")} & tensors.keys()
    table = [tensors.pop(name) for name in tied][0]
    save_file(tensors | {f"text_encoder.{kept}.weight": table}, path, {"format": "pt"})
    for name, tensor in load_t5(tmp_path).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert MusicGen.from_pretrained(tmp_path, "cpu").generate(["slow"], duration=0.05).isfinite().all()
    del tensors["text_encoder.encoder.final_layer_norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="missing: .*final_layer_norm.weight, shared.weight"):
        load_t5(tmp_path)


@pytest.mark.parametrize("kept", ["shared", "encoder.embed_tokens"])
def test_one_name_of_the_embedding_of_our_own_t5_is_enough(world, tmp_path, kept):
    folder = shutil.copytree(world / "lm", tmp_path / "model")
    expected, path = LMModel.from_pretrained(folder).state_dict(), folder / "model.safetensors"
    tensors = dict(load_file(path))
    table = tensors.pop("conditioner.text.t5.shared.weight")
    save_file(tensors | {f"conditioner.text.t5.{kept}.weight": table}, path)
    for name, tensor in LMModel.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def without_tokenizer(directory, named=None):
    """Takes the tokenizer out of a directory whose config.json names its T5, if at all."""
    for path in directory.glob("*token*"):
        path.unlink()
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["text_encoder"]["_name_or_path"] = named
    path.write_text(json.dumps(config))


@pytest.mark.usefixtures("put")     # offline
@pytest.mark.parametrize("named", [None, "", 3, "t5-nowhere/x", "/nowhere", "itself", "no tokenizer"])
def test_a_directory_without_a_tokenizer_is_refused(tmp_path, named):
    """transformers would make a vocabulary up, in which every word is unknown."""
    folder = tmp_path / "model"
    musicgen_of_transformers(folder, "melody")
    (tmp_path / "empty").mkdir()
    named = {"itself": str(folder), "no tokenizer": str(tmp_path / "empty")}.get(named, named)
    without_tokenizer(folder, named)
    lm, codec = LMModel.from_pretrained(folder), EncodecModel.from_pretrained(folder)
    for use in (lambda: MusicGen.from_pretrained(folder, "cpu").generate(["slow"], duration=0.05),
                lambda: export_transformers(lm, codec, tmp_path / "out")):
        with pytest.raises(UserError, match=f"{folder}: has no tokenizer") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_the_tokenizer_of_the_t5_that_is_named(tmp_path):
    musicgen_of_transformers(tmp_path / "model", "melody")
    word_tokenizer().save_pretrained(tmp_path / "t5")
    expected = ours(tmp_path / "model", ["slow flute"], frames=20)
    without_tokenizer(tmp_path / "model", str(tmp_path / "t5"))
    assert torch.equal(ours(tmp_path / "model", ["slow flute"], frames=20), expected)
    model = MusicGen.from_pretrained(tmp_path / "model", "cpu")
    export_transformers(model.lm, EncodecModel.from_pretrained(tmp_path / "model"), tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("slow")["input_ids"] == [3, 1]
    path = tmp_path / "t5" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] |= {f"word{n}": n for n in range(19, 30)}      # of another T5
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"{tmp_path / 'model'}: its text encoder has 20 tokens.*token 29"):
        ours(tmp_path / "model", ["slow flute"], frames=20)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(UserError, match=f"{path}: a pointer of Git LFS"):
        ours(tmp_path / "model", ["slow flute"], frames=20)


def generation(directory, **values):
    (directory / "generation_config.json").write_text(json.dumps(values))
    return LMModel.from_pretrained(directory).config


def test_sampling_is_as_generation_config_says(tmp_path):
    musicgen_of_transformers(tmp_path, "melody")

    def sampling(config):
        return config.cfg_coef, config.top_k, config.temperature, config.top_p
    default = (3.0, 250, 1.0, 0.0)
    assert sampling(LMModel.from_pretrained(tmp_path).config) == default
    assert sampling(generation(tmp_path, guidance_scale=4, top_k=50, temperature=0.7, max_length=9)) == (
        4.0, 50, 0.7, 0.0)
    assert sampling(generation(tmp_path, guidance_scale=None, top_k=0, top_p=0.9)) == (3.0, 0, 1.0, 0.9)
    assert sampling(generation(tmp_path, top_k=0, top_p=1.0)) == (3.0, 0, 1.0, 0.0)
    assert sampling(generation(tmp_path, top_k=50, top_p=0.9)) == (3.0, 50, 1.0, 0.0)
    assert sampling(generation(tmp_path, do_sample=True, temperature=0.7)) == (3.0, 250, 0.7, 0.0)
    assert sampling(generation(tmp_path, do_sample=False, temperature=0.7)) == (3.0, 250, 0.0, 0.0)
    for values in (dict(guidance_scale="x"), dict(top_k=-1), dict(top_k=2.5), dict(temperature=[1])):
        with pytest.raises(UserError, match="generation_config.json: (cfg_coef|top_k|temperature) = "):
            generation(tmp_path, **values)
    (tmp_path / "generation_config.json").unlink()
    assert sampling(LMModel.from_pretrained(tmp_path).config) == default


# --- audiocraft's format ----------------------------------------------------------------------------------

XP = """                   # what audiocraft's solver=musicgen/musicgen_melody_32khz writes, in tiny sizes
channels: 1
sample_rate: 8000
compression_model_checkpoint: //pretrained/facebook/encodec_32khz
dataset: {segment_duration: 0.25, train: {merge_text_p: 0.25, drop_desc_p: 0.5, drop_other_p: 0.5}}
lm_model: transformer_lm
codebooks_pattern: {modeling: delay, delay: {delays: [0, 1, 2, 3], flatten_first: 0, empty_initial: 0},
  unroll: {flattening: [0, 1, 2, 3], delays: [0, 0, 0, 0]}, music_lm: {group_by: 2},
  coarse_first: {delays: [0, 0, 0]}}
transformer_lm: {dim: 32, num_heads: 4, num_layers: 2, hidden_scale: 3, n_q: 4, card: 32, dropout: 0.0,
  emb_lr: null, activation: gelu, norm_first: true, bias_ff: false, bias_attn: false, bias_proj: false,
  past_context: null, causal: true, custom: false, memory_efficient: true, attention_as_float32: false,
  layer_scale: null, positional_embedding: sin, xpos: false, checkpointing: none, weight_init: gaussian,
  depthwise_init: current, zero_bias_init: true, norm: layer_norm, cross_attention: false,
  qk_layer_norm: false, qk_layer_norm_cross: false, attention_dropout: null, kv_repeat: 1,
  two_step_cfg: false}
fuser: {cross_attention_pos_emb: false, cross_attention_pos_emb_scale: 1, sum: [],
  prepend: [self_wav, description], cross: [], input_interpolate: []}
conditioners:
  args: {drop_desc_p: 0.5}
  self_wav: {model: chroma_stem, chroma_stem: {sample_rate: '${sample_rate}', n_chroma: 12, radix2_exp: 8,
    argmax: true, match_len_on_eval: false, eval_wavs: null, n_eval_wavs: 100, cache_path: null}}
  description: {model: t5, t5: {name: T5, finetune: false, word_dropout: 0.2, normalize_text: false}}
classifier_free_guidance: {training_dropout: 0.2, inference_coef: 2.5}
"""


def write_as_audiocraft(directory, source, xp=XP):
    """Writes the checkpoint of transformers in `source` as audiocraft would have it: the same weights."""
    directory.mkdir(exist_ok=True)
    lm, state = LMModel.from_pretrained(source), {}
    for name, parts in name_table(lm, audiocraft=True).items():
        pieces = lm.state_dict()[name].chunk(len(parts))
        state |= {part: piece.clone() for part, piece in zip(parts, pieces)}
    window = torch.hann_window(256)     # torchaudio's
    state["condition_provider.conditioners.self_wav.chroma.spec.window"] = window
    package = {"best_state": state, "xp.cfg": xp.replace("T5", str(source)), "version": "0.0.2"}
    torch.save(package, directory / "state_dict.bin")
    torch.save({"pretrained": str(source), "exported": True}, directory / "compression_state_dict.bin")


def with_melodies_of(lm, M):
    """The same model for melodies of another length."""
    again = LMModel(dataclasses.replace(lm.config, chroma_length=M))
    again.load_state_dict(lm.state_dict())
    return again.eval()


def test_the_format_of_audiocraft(tmp_path):
    """The same weights in both formats give the same music; the codec is named, as in the released files."""
    musicgen_of_transformers(tmp_path / "first", "melody")
    write_as_audiocraft(tmp_path / "audiocraft", tmp_path / "first")
    model = MusicGen.from_pretrained(tmp_path / "audiocraft", "cpu")
    config = model.lm.config
    assert (config.null_melody, config.radix2_exp, config.cfg_coef) == ("c", 8, 2.5)
    assert config.segment_duration == 0.25
    first = LMModel.from_pretrained(tmp_path / "first")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, model.lm.state_dict()[name]), name
    # 0.25 s here; transformers' example has 9 frames
    first = MusicGen(with_melodies_of(first, config.chroma_frames), model.codec)
    settings = dict(duration=0.2, temperature=0, guidance=3.0)
    for chromas in (None, list(melodies(4))):
        codes = model.generate_codes(["slow flute"], chromas, **settings)
        assert torch.equal(codes, first.generate_codes(["slow flute"], chromas, **settings))
    assert model.generate(["slow flute"], duration=0.2).shape == (1, 1, 1600)


PATTERN = "codebooks_pattern: {modeling: delay, delay: {delays: [0, 1, 2, 3]"


@pytest.mark.parametrize("instead", [
    "codebooks_pattern: {modeling: null, delay: {delays: [0, 0, 0, 0]",
    "codebooks_pattern: {modeling: null, delay: {x: 1",
    "codebooks_pattern: {modeling: delay, delay: {x: 1"])
def test_the_pattern_of_june_2023_is_a_key_of_the_language_model(tmp_path, instead):
    """Its delays are then 0, 1, 2 ..., which is also what they are where none are given."""
    musicgen_of_transformers(tmp_path / "first", "melody")
    assert PATTERN in XP
    xp = XP.replace(PATTERN, instead).replace("transformer_lm: {", "transformer_lm: {q_modeling: delay, ")
    write_as_audiocraft(tmp_path / "audiocraft", tmp_path / "first", xp)
    config = LMModel.from_pretrained(tmp_path / "audiocraft").config
    assert (config.pattern, config.delays) == ("delay", (0, 1, 2, 3))


def test_a_model_of_audiocraft_without_any_pattern(tmp_path):
    xp = XP.replace("modeling: delay", "modeling: null", 1)
    torch.save({"best_state": {}, "xp.cfg": xp}, tmp_path / "state_dict.bin")
    with pytest.raises(UserError, match="transformer_lm.q_modeling"):
        LMModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("there, instead", [
    ("norm_first: true", "norm_first: false"),
    ("lm_model: transformer_lm", "lm_model: transformer_lm_magnet"),
    ("positional_embedding: sin", "positional_embedding: rope"),
    ("positional_embedding: sin", "positional_embedding: sin_rope"),
    ("model: chroma_stem", "model: style"),
    ("model: t5", "model: clap"),
    ("model: t5", "model: lut"),
    ("conditioners:\n", "conditioners:\n  chords: {model: chords_emb}\n"),
    ("activation: gelu", "activation: relu"),
    ("kv_repeat: 1", "kv_repeat: 2"),
    ("flatten_first: 0", "flatten_first: 3"),
    ("modeling: delay", "modeling: unroll"),
    ("pos_emb: false", "pos_emb: true"),
    ("argmax: true", "argmax: false"),
])
def test_what_audiocraft_can_do_and_we_cannot_is_named(tmp_path, there, instead):
    assert there in XP
    package = {"best_state": {}, "xp.cfg": XP.replace(there, instead, 1)}
    torch.save(package, tmp_path / "state_dict.bin")
    with pytest.raises(UserError, match=there.partition(":")[0] + ".*not supported") as caught:
        LMModel.from_pretrained(tmp_path)
    if "style" in instead:
        assert "facebook/musicgen-style" in str(caught.value)


# --- export -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, text_dim", [
    ("melody", 16), ("text", D), ("stereo", 16), ("stereo melody", D)])
def test_exported_and_read_back(tmp_path, kind, text_dim):
    """Ours -> transformers' classes -> ours: bit-identical weights, and equal greedy tokens."""
    first, second = tmp_path / "first", tmp_path / "second"
    musicgen_of_transformers(first, kind, text_dim=text_dim)
    lm, codec = LMModel.from_pretrained(first), EncodecModel.from_pretrained(first)
    lm.config.segment_duration = 5.0    # which transformers has no word for, but our reader finds again
    lm.config.cfg_coef, lm.config.top_k, lm.config.temperature = 4.0, 20, 0.75
    export_transformers(lm, codec, second)
    model = "MusicgenMelody" if "melody" in kind else "Musicgen"
    model_class = getattr(transformers, f"{model}ForConditionalGeneration")
    reference, report = model_class.from_pretrained(second, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]

    again = LMModel.from_pretrained(second)
    assert again.config == dataclasses.replace(lm.config, codec=str(second), t5=str(second))
    for before, after in ((lm, again), (codec, EncodecModel.from_pretrained(second))):
        for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True):
            same("exported and read back, weights", "itself", a, b)
    features = melodies(9) if "melody" in kind else None
    expected = greedy(reference.eval(), ["slow flute"], features)
    found = ours(second, ["slow flute"], None if features is None else list(features))
    same("exported, greedy tokens", "transformers", found, expected)

    assert transformers.AutoTokenizer.from_pretrained(second)("slow")["input_ids"] == [3, 1]
    if "melody" not in kind or transformers.utils.is_torchaudio_available():    # melodies need that package
        processor = transformers.AutoProcessor.from_pretrained(second)
        assert type(processor).__name__ == f"{model}Processor"
        assert processor(text=["slow"], return_tensors="pt")["input_ids"].tolist() == [[3, 1]]
    assert json.loads((second / "preprocessor_config.json").read_text())["sampling_rate"] == 8000


def test_a_parameter_that_transformers_lacks_is_not_left_out_of_an_export(world, tmp_path):
    lm = LMModel.from_pretrained(world / "hf")
    lm.layers[0].gate = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UserError, match="layers.0.gate") as caught:
        export_transformers(lm, EncodecModel.from_pretrained(world / "hf"), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [
    dict(top_k=7, top_p=0.5), dict(temperature=0.0), dict(cfg_coef=0.0)], ids=str)
def test_sampling_settings_survive_an_export(world, tmp_path, changes):
    lm = LMModel.from_pretrained(world / "lm")
    for name, value in changes.items():
        setattr(lm.config, name, value)
    export_transformers(lm, EncodecModel.from_pretrained(world / "lm"), tmp_path)
    again = LMModel.from_pretrained(tmp_path).config
    changes |= {"top_k": 0} if "top_p" in changes else {}   # transformers would apply both
    assert {name: getattr(again, name) for name in changes} == changes
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert settings.do_sample == (again.temperature > 0) and settings.top_p == (again.top_p or 1.0)


def test_a_model_that_is_told_notes_is_not_exported(world, tmp_path):
    lm = LMModel(Config(**LM | dict(melody_form="notes")))
    with pytest.raises(UserError, match="transformers has no melody_form = 'notes'"):
        export_transformers(lm, EncodecModel.from_pretrained(world / "lm"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("checkpoint, noted", [("lm", True), ("text", False)])
def test_an_export_says_which_transformers_ignore_a_melody(world, tmp_path, checkpoint, noted):
    done = sampling(world, "--export_hf", tmp_path / "out", checkpoint=checkpoint)
    worked(done)
    assert ("5.0 to 5.17 silently ignore" in done.err) == noted
    assert done.out.strip() == str(tmp_path / "out")


# --- ids of the hub, without the hub: what its cache holds ------------------------------------------------

@pytest.fixture
def put(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, offline; put(id, directory) puts a repository there."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(name, directory):
        place = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        shutil.copytree(directory, place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0" * 40)
    return put


def test_ids_of_the_hub_are_read_from_its_cache(tmp_path, put):
    source = tmp_path / "melody"
    reference = musicgen_of_transformers(source, "melody", shard="20KB")
    put("facebook/musicgen-melody", source)
    EncodecModel.from_pretrained(source).to_hf(tmp_path / "codec")
    put("facebook/encodec_32khz", tmp_path / "codec")
    reference.text_encoder.save_pretrained(tmp_path / "t5")
    word_tokenizer().save_pretrained(tmp_path / "t5")
    put("google/t5-tiny", tmp_path / "t5")
    model = MusicGen.from_pretrained("facebook/musicgen-melody", "cpu")
    wav = model.generate(["slow"], [torch.ones(1, 800)], duration=0.1)

    # audiocraft's format names its text encoder and its codec by id
    directory = tmp_path / "audiocraft"
    write_as_audiocraft(directory, source)
    package = torch.load(directory / "state_dict.bin")
    package["xp.cfg"] = XP.replace("T5", "google/t5-tiny")
    torch.save(package, directory / "state_dict.bin")
    torch.save({"pretrained": "facebook/encodec_32khz"}, directory / "compression_state_dict.bin")
    named = MusicGen.from_pretrained(directory, "cpu")
    named = MusicGen(with_melodies_of(named.lm, model.config.chroma_frames), named.codec)
    assert torch.equal(named.generate(["slow"], [torch.ones(1, 800)], duration=0.1), wav)


@pytest.mark.parametrize("name", ["facebook/musicgen-small", "t5-base"])
@pytest.mark.parametrize("read", [
    lambda name: MusicGen.from_pretrained(name, "cpu"), load_t5, EncodecModel.from_pretrained],
    ids=["MusicGen", "T5", "codec"])
def test_what_is_not_in_the_cache_is_refused_in_one_sentence(put, name, read):
    says = f"{name}: not a directory here, and the Hugging Face hub did not give it"
    with pytest.raises(UserError, match=says) as caught:
        read(name)
    assert "\n" not in str(caught.value)


# --- memory -----------------------------------------------------------------------------------------------

MEMORY = """
import gc, sys, torch
from pathlib import Path
from checkpoints.files import INT4
from lm import LMModel
from speed import optimize_for_cpu
from speed.kernels import kernels

def memory(key):    # of this process, in bytes
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key)))

for dtype in (None, INT4):      # imports what it needs
    LMModel.from_pretrained(sys.argv[1], dtype, optimize_for_cpu if kernels() else None)
for directory in sys.argv[1:]:
    for dtype in (None, torch.float32, INT4):
        if dtype == INT4 and not (kernels() and Path(directory, "model.safetensors").exists()):
            print(0)    # other files are read as a whole
            continue
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")     # the peak from here on
        before = memory("VmRSS")
        lm = LMModel.from_pretrained(directory, dtype, optimize_for_cpu if dtype == INT4 else None)
        weights = sum(t.nbytes for t in lm.state_dict().values())
        print((memory("VmHWM") - before - weights) / 1e6)
        del lm
"""


def full_size(directory, text=(), codec=(), **decoder):
    """A melody model of the released sizes, but for those given; random, in transformers' files (float16)."""
    text = dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12) | dict(text)
    codec = dict(sampling_rate=32000, num_filters=64, upsampling_ratios=[8, 5, 4, 4], codebook_size=2048,
                 target_bandwidths=[2.2], use_causal_conv=False, use_conv_shortcut=False) | dict(codec)
    decoder = dict(hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, ffn_dim=6144,
                   num_codebooks=4) | decoder
    config = transformers.MusicgenMelodyConfig(
        text_encoder=transformers.T5Config(**text).to_dict(),
        audio_encoder=transformers.EncodecConfig(**codec).to_dict(),
        decoder=transformers.MusicgenMelodyDecoderConfig(**decoder).to_dict())
    with torch.device("meta"):
        model = transformers.MusicgenMelodyForConditionalGeneration(config).half()
    model = model.to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(0, 0.02)
        else:
            tensor.fill_(float("norm" in name and "weight" in name))
    model.tie_weights()
    model.save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(),
                    reason="Linux alone tells the peak of a part of a program")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """At its peak, over the weights of the model that is loaded; 27 M of them, in files of float16."""
    names = ["transformers", "bin", "audiocraft", "ours"]
    source, as_bin, audiocraft, own = (tmp_path / name for name in names)
    full_size(source, dict(d_model=64, num_layers=2), dict(num_filters=4), hidden_size=512,
              num_hidden_layers=6, num_attention_heads=8, ffn_dim=2048)
    as_bin.mkdir()
    torch.save(load_file(source / "model.safetensors"), as_bin / "pytorch_model.bin")
    (as_bin / "config.json").write_bytes((source / "config.json").read_bytes())
    sizes = "dim: {}, num_heads: {}, num_layers: {}, hidden_scale: {}, n_q: 4, card: {}"
    there, instead = sizes.format(32, 4, 2, 3, 32), sizes.format(512, 8, 6, 4, 2048)
    assert there in XP
    write_as_audiocraft(audiocraft, source, XP.replace(there, instead))
    LMModel.from_pretrained(source).save(own)
    # what is freed is given back
    environment = dict(os.environ, PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="65536")
    argv = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    cases = [(name, dtype) for name in names for dtype in ("as it is", "float32", "int4")]
    more = dict(zip(cases, map(float, done.stdout.split()), strict=True))
    assert max(more.values()) < 40, more    # MB; a second copy would make it 55 or more


SAMPLE = """
import resource, sys
from sample import MusicGen
from sampling.command import main
from system.command import run
run(main, MusicGen, sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_full_size_melody_model_in_10_gb(tmp_path):
    """5 s of audio; needs 4 GB on the disk and a few minutes. The command prints its own peak."""
    full_size(tmp_path / "model")
    argv = ["--checkpoint", tmp_path / "model", "--text", "slow flute",
            "--melody", ROOT / "assets/ode_to_joy.wav", "--duration", "5", "--device", "cpu",
            "--out", tmp_path / "x.wav"]
    done = subprocess.run([sys.executable, "-c", SAMPLE, *map(str, argv)],
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gigabytes = int(done.stdout.split()[-1]) * 1024 / 1e9
    print(f"peak {gigabytes:.2f} GB")
    assert gigabytes < 10 and soundfile.info(tmp_path / "x.wav").frames == 5 * 32000
