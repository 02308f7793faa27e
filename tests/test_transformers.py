"""MusicGen against transformers' own classes, with random weights in tiny sizes.

    python -m pytest tests/test_transformers.py

transformers writes a checkpoint with save_pretrained, ours reads it: logits, greedy tokens, text embeddings; and
the other way round. Several releases of transformers drop MusicgenMelody's conditions when generating, so the
reference is first made to prove that it reacts to its melody and its text.
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
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import lm as L
from checkpoints import formats
from conditioners import T5Conditioner, load_t5
from config import UserError
from deviations import near, same
from encodec import EncodecModel
from sample import MusicGen

ROOT = Path(__file__).parent.parent
WORDS = "slow fast flute organ tune with drums a the in minor major happy sad".split()
K, V, D, FRAMES = 4, 32, 32, 100


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>"] + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def reference(directory, kind, heads=4, layers=2, text_dim=16, shard=None, dtype=torch.float32, seed=0):
    """A random MusicGen of transformers, saved to directory: kind "melody", "text", "stereo" or "stereo melody"."""
    torch.manual_seed(seed)
    channels = 2 if "stereo" in kind else 1
    text = transformers.T5Config(vocab_size=20, d_model=text_dim, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    codec = transformers.EncodecConfig(
        sampling_rate=8000, audio_channels=1, normalize=False, num_filters=2, hidden_size=8, codebook_dim=8, codebook_size=V,
        upsampling_ratios=[5, 4], num_lstm_layers=1, target_bandwidths=[400 * 5 * K / 1000], use_causal_conv=False,
        use_conv_shortcut=False, norm_type="weight_norm", pad_mode="reflect")
    sizes = dict(vocab_size=V, hidden_size=D, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=3 * D,
                 num_codebooks=K * channels, audio_channels=channels, pad_token_id=V, bos_token_id=V, max_position_embeddings=256)
    if "melody" in kind:
        config = transformers.MusicgenMelodyConfig(
            text_encoder=text.to_dict(), audio_encoder=codec.to_dict(), num_chroma=12, chroma_length=9,
            decoder=transformers.MusicgenMelodyDecoderConfig(**sizes).to_dict())
        model = transformers.MusicgenMelodyForConditionalGeneration(config)
    else:
        config = transformers.MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=codec.to_dict(),
                                             decoder=transformers.MusicgenDecoderConfig(**sizes).to_dict())
        model = transformers.MusicgenForConditionalGeneration(config)
    for name, parameter in model.named_parameters():    # initial weights are too small for conditions to matter
        if not name.startswith("audio_encoder"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "bias" not in name else 0.0, 0.25)
    model.generation_config.decoder_start_token_id = V
    model.generation_config.pad_token_id = model.generation_config.bos_token_id = V
    model = model.eval().to(dtype)
    model.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    tokenizer().save_pretrained(directory)
    return model


def greedy(model, directory, texts, features=None, frames=FRAMES):
    """transformers' greedy tokens (B, K, T) with guidance 3, before the codec."""
    inputs = tokenizer()(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    if features is not None:
        inputs["input_features"] = features
    seen = []
    decode = model.audio_encoder.decode
    model.audio_encoder.decode = lambda codes, *args, **kwargs: seen.append(codes) or decode(codes, *args, **kwargs)
    with torch.no_grad():
        model.generate(**inputs, do_sample=False, guidance_scale=3.0, max_length=frames + K)
    model.audio_encoder.decode = decode
    if len(seen) == 2:      # left and right
        return torch.stack([s[0] for s in seen], dim=2).flatten(1, 2)
    return seen[0][0]


def melody(*classes, M=9):
    rows = [torch.nn.functional.one_hot(torch.tensor([(c + i // 2) % 12 for i in range(M)]), 12) for c in classes]
    return torch.stack(rows).float()


def ours(directory, texts, chromas=None, frames=FRAMES):
    model = MusicGen.from_pretrained(directory, "cpu")
    return model.generate_codes(texts, chromas, duration=frames / model.frame_rate, guidance=3.0, temperature=0)


# text_dim = D: transformers then has no projection of the text
@pytest.mark.parametrize("options", [dict(), dict(heads=2, layers=3, text_dim=24, shard="20KB"), dict(kind="stereo melody", text_dim=D)],
                         ids=str)
def test_melody_model(tmp_path, options):
    theirs = reference(tmp_path, **{"kind": "melody", **options})
    a = greedy(theirs, tmp_path, ["slow flute"], melody(9), frames=30)
    if torch.equal(a, greedy(theirs, tmp_path, ["slow flute"], melody(3), frames=30)) or \
            torch.equal(a, greedy(theirs, tmp_path, ["fast organ"], melody(9), frames=30)):
        pytest.skip(f"transformers {transformers.__version__} ignores the melody or the text when generating")

    lm = L.LMModel.from_pretrained(tmp_path)
    texts, features = ["slow flute", "a fast happy organ tune"], melody(9, 2)
    inputs = tokenizer()(texts, return_tensors="pt", padding=True)
    books = lm.config.n_q
    codes = torch.randint(V, (2, books, 14))
    with torch.no_grad():
        for chroma in (features, None):     # without: their one-hot C is our null melody "c"
            expected = theirs(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                              input_features=chroma, decoder_input_ids=codes.flatten(0, 1)).logits
            conditions = lm.conditioner(texts, chroma)._replace(prefix_mask=None)   # they attend to padding
            logits = lm(codes, conditions)
            near("melody model, logits", "transformers", logits, expected.view(2, books, -1, V)[:, :, -14:], 1e-4)

    with_melody = ours(tmp_path, ["slow flute"], [melody(9)[0]])
    tokens = "melody model, greedy tokens"
    same(tokens, "transformers", with_melody, greedy(theirs, tmp_path, ["slow flute"], melody(9)))
    assert with_melody.shape == (1, books, FRAMES)
    text_only = ours(tmp_path, ["slow flute"])
    same(tokens, "transformers", text_only, greedy(theirs, tmp_path, ["slow flute"]))
    assert not torch.equal(text_only, with_melody)
    short = melody(5, M=4)      # shorter melodies repeat
    same(tokens, "transformers", ours(tmp_path, ["sad"], [short[0]]), greedy(theirs, tmp_path, ["sad"], short))
    # a batch of equal text lengths has no padding, so theirs is right too
    same(tokens, "transformers", ours(tmp_path, ["slow flute", "fast organ"], list(melody(1, 8)), 40),
         greedy(theirs, tmp_path, ["slow flute", "fast organ"], melody(1, 8), 40))


@pytest.mark.parametrize("kind, options", [("text", dict()), ("text", dict(text_dim=D, heads=2, shard="20KB")), ("stereo", dict(layers=3))])
def test_text_and_stereo_model(tmp_path, kind, options):
    theirs = reference(tmp_path, kind, **options)
    a = greedy(theirs, tmp_path, ["slow flute"])
    if torch.equal(a, greedy(theirs, tmp_path, ["fast organ"])):
        pytest.skip(f"transformers {transformers.__version__} ignores the text when generating")
    same("text and stereo model, greedy tokens", "transformers", ours(tmp_path, ["slow flute"]), a)

    lm = L.LMModel.from_pretrained(tmp_path)
    assert lm.config.n_q == (8 if kind == "stereo" else 4)
    texts = ["slow flute", "a fast happy organ tune"]
    inputs = tokenizer()(texts, return_tensors="pt", padding=True)
    codes = torch.randint(V, (2, lm.config.n_q, 14))
    with torch.no_grad():
        expected = theirs(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                          decoder_input_ids=codes.flatten(0, 1)).logits
        # their cross-attention masks padding as ours does
        logits = lm(codes, lm.conditioner(texts))
        near("text and stereo model, logits", "transformers", logits, expected.view(2, -1, 14, V), 1e-4)
    if kind == "stereo":
        wav = MusicGen.from_pretrained(tmp_path, "cpu").generate(["slow flute"], duration=0.1)
        assert wav.shape == (1, 2, 800)


def test_text_conditioner(tmp_path):
    """Embeddings and masks; an empty and a missing description are zeros."""
    theirs = reference(tmp_path, "melody")
    conditioner = L.LMModel.from_pretrained(tmp_path).conditioner.text
    texts = ["a slow flute tune", "organ", "", None]
    with torch.no_grad():
        frames, mask = conditioner(texts)
        inputs = tokenizer()([t or "" for t in texts], return_tensors="pt", padding=True)
        hidden = theirs.text_encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        expected = theirs.enc_to_dec_proj(hidden) * inputs["attention_mask"][..., None]
    near("text conditioner, embeddings", "transformers", frames[:2], expected[:2], 1e-5)
    same("text conditioner, mask", "transformers", mask, inputs["attention_mask"].bool())
    assert (frames[2:] == 0).all()
    assert not list(p for n, p in conditioner.named_parameters() if "t5" in n), "a frozen T5 is not trained or saved"
    assert isinstance(conditioner, T5Conditioner)


@pytest.mark.parametrize("form", ["bin", "bin in shards", "beside the original's"])
def test_forms_of_a_checkpoint(tmp_path, form):
    from safetensors.torch import load_file
    reference(tmp_path, "melody")
    expected = L.LMModel.from_pretrained(tmp_path).state_dict()
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    if form == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    elif form == "bin in shards":
        shard = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(tensors)}
        for part in set(shard.values()):
            torch.save({name: t for name, t in tensors.items() if shard[name] == part}, tmp_path / part)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard}))
    if "bin" in form:
        file.unlink()
    else:   # as a clone of a released repository holds both
        for name in ("state_dict.bin", "compression_state_dict.bin"):
            (tmp_path / name).write_bytes(b"not read")
    model = MusicGen.from_pretrained(tmp_path, "cpu")
    for name, tensor in L.LMModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.generate(["slow"], duration=0.05).isfinite().all()


XP = """                   # what the original's solver=musicgen/musicgen_melody_32khz writes, in tiny sizes
channels: 1
sample_rate: 8000
compression_model_checkpoint: //pretrained/facebook/encodec_32khz
dataset: {segment_duration: 0.25, train: {merge_text_p: 0.25, drop_desc_p: 0.5, drop_other_p: 0.5}}
lm_model: transformer_lm
codebooks_pattern: {modeling: delay, delay: {delays: [0, 1, 2, 3], flatten_first: 0, empty_initial: 0},
  unroll: {flattening: [0, 1, 2, 3], delays: [0, 0, 0, 0]}, music_lm: {group_by: 2}, coarse_first: {delays: [0, 0, 0]}}
transformer_lm: {dim: 32, num_heads: 4, num_layers: 2, hidden_scale: 3, n_q: 4, card: 32, dropout: 0.0, emb_lr: null,
  activation: gelu, norm_first: true, bias_ff: false, bias_attn: false, bias_proj: false, past_context: null, causal: true,
  custom: false, memory_efficient: true, attention_as_float32: false, layer_scale: null, positional_embedding: sin,
  xpos: false, checkpointing: none, weight_init: gaussian, depthwise_init: current, zero_bias_init: true, norm: layer_norm,
  cross_attention: false, qk_layer_norm: false, qk_layer_norm_cross: false, attention_dropout: null, kv_repeat: 1,
  two_step_cfg: false}
fuser: {cross_attention_pos_emb: false, cross_attention_pos_emb_scale: 1, sum: [], prepend: [self_wav, description],
  cross: [], input_interpolate: []}
conditioners:
  args: {drop_desc_p: 0.5}
  self_wav: {model: chroma_stem, chroma_stem: {sample_rate: '${sample_rate}', n_chroma: 12, radix2_exp: 8, argmax: true,
    match_len_on_eval: false, eval_wavs: null, n_eval_wavs: 100, cache_path: null}}
  description: {model: t5, t5: {name: T5, finetune: false, word_dropout: 0.2, normalize_text: false}}
classifier_free_guidance: {training_dropout: 0.2, inference_coef: 2.5}
"""


def original(directory, transformers_directory, xp=XP):
    """The checkpoint in transformers_directory as the original would have it: the same weights under its names."""
    lm = L.LMModel.from_pretrained(transformers_directory)
    state = {part: piece.clone() for ours, parts in formats.name_table(lm, original=True).items()
             for part, piece in zip(parts, lm.state_dict()[ours].chunk(len(parts)))}
    state["condition_provider.conditioners.self_wav.chroma.spec.window"] = torch.hann_window(256)  # torchaudio's
    torch.save({"best_state": state, "xp.cfg": xp.replace("T5", str(transformers_directory)), "version": "0.0.2"},
               directory / "state_dict.bin")
    torch.save({"pretrained": str(transformers_directory), "exported": True}, directory / "compression_state_dict.bin")


def test_the_originals_own_format(tmp_path):
    """The same weights in both formats give the same music; the codec is named, as in the released files."""
    (tmp_path / "original").mkdir()
    reference(tmp_path / "first", "melody")
    original(tmp_path / "original", tmp_path / "first")
    model = MusicGen.from_pretrained(tmp_path / "original", "cpu")
    config = model.lm.config
    assert (config.null_melody, config.radix2_exp, config.cfg_coef, config.segment_duration) == ("c", 8, 2.5, 0.25)
    first = L.LMModel.from_pretrained(tmp_path / "first")
    for (name, a), b in zip(first.state_dict().items(), model.lm.state_dict().items()):
        assert torch.equal(a, b[1]), name
    first.config.chroma_length = config.chroma_frames       # 0.25 s here; transformers' example has 9 frames
    for chromas in (None, list(melody(4))):
        a = model.generate_codes(["slow flute"], chromas, duration=0.2, temperature=0, guidance=3.0)
        b = MusicGen(first, model.codec).generate_codes(["slow flute"], chromas, duration=0.2, temperature=0, guidance=3.0)
        assert torch.equal(a, b)
    assert model.generate(["slow flute"], duration=0.2).shape == (1, 1, 1600)


@pytest.mark.parametrize("there, instead", [
    ("norm_first: true", "norm_first: false"), ("activation: gelu", "activation: relu"), ("kv_repeat: 1", "kv_repeat: 2"),
    ("flatten_first: 0", "flatten_first: 3"), ("modeling: delay", "modeling: unroll"), ("pos_emb: false", "pos_emb: true")])
def test_what_the_original_can_do_and_we_cannot_is_named(tmp_path, there, instead):
    torch.save({"best_state": {}, "xp.cfg": XP.replace(there, instead, 1)}, tmp_path / "state_dict.bin")
    with pytest.raises(UserError, match=there.partition(":")[0] + ".*not supported"):
        L.LMModel.from_pretrained(tmp_path)


def test_half_precision_files_and_types_on_load(tmp_path):
    reference(tmp_path, "melody", dtype=torch.float16)
    assert L.LMModel.from_pretrained(tmp_path).emb.weight.dtype == torch.float16
    model = MusicGen.from_pretrained(tmp_path, "cpu", "bfloat16")
    assert model.lm.heads.weight.dtype == torch.bfloat16
    assert model.generate(["slow"], duration=0.05).isfinite().all()


@pytest.mark.parametrize("kind, text_dim", [("melody", 16), ("text", D), ("stereo", 16), ("stereo melody", D)])
def test_exported_and_read_back(tmp_path, kind, text_dim):
    """Ours -> transformers' classes -> ours: bit-identical weights, and their greedy tokens equal ours."""
    reference(tmp_path / "first", kind, text_dim=text_dim)
    lm, codec = L.LMModel.from_pretrained(tmp_path / "first"), EncodecModel.from_pretrained(tmp_path / "first")
    lm.config.segment_duration = 5.0    # which transformers has no word for, but our reader finds again
    formats.export_transformers(lm, codec, tmp_path / "second")
    name = "MusicgenMelodyForConditionalGeneration" if "melody" in kind else "MusicgenForConditionalGeneration"
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    again = L.LMModel.from_pretrained(tmp_path / "second")
    assert again.config == dataclasses.replace(lm.config, codec=str(tmp_path / "second"), t5=str(tmp_path / "second"), segment_duration=5.0)
    for a, b in zip(lm.state_dict().values(), again.state_dict().values()):
        same("exported and read back, weights", "itself", a, b)
    for a, b in zip(codec.state_dict().values(), EncodecModel.from_pretrained(tmp_path / "second").state_dict().values()):
        same("exported and read back, weights", "itself", a, b)
    features = melody(9) if "melody" in kind else None
    expected = greedy(theirs.eval(), tmp_path / "second", ["slow flute"], features)
    again = ours(tmp_path / "second", ["slow flute"], None if features is None else list(features))
    same("exported, greedy tokens", "transformers", again, expected)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "second")("slow")["input_ids"] == [3, 1]
    if "melody" not in kind or transformers.utils.is_torchaudio_available():    # the melody processor needs that package
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "second")
        assert type(processor).__name__ == ("MusicgenMelodyProcessor" if "melody" in kind else "MusicgenProcessor")
        assert processor(text=["slow"], return_tensors="pt")["input_ids"].tolist() == [[3, 1]]
    assert json.loads((tmp_path / "second" / "preprocessor_config.json").read_text())["sampling_rate"] == 8000


def test_wrong_tensors_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file
    reference(tmp_path, "melody")
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    name = "decoder.model.decoder.layers.1.fc1.weight"
    for change, match in ((lambda t: t.pop(name), name), (lambda t: t.update(extra=torch.zeros(2)), "extra"),
                          (lambda t: t.update({name: torch.zeros(3, 3)}), "wrong shape.*fc1")):
        bad = dict(good)
        change(bad)
        save_file(bad, path, {"format": "pt"})
        with pytest.raises(UserError, match=match):
            L.LMModel.from_pretrained(tmp_path)


# --- ids of the hub, without the hub: what its cache holds -------------------------------------------------------------

def hub(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, offline; -> put(id, directory) which puts a repository there."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(name, directory):
        place = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        shutil.copytree(directory, place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0" * 40)
    return put


def test_ids_of_the_hub_are_read_from_its_cache(tmp_path, monkeypatch):
    put = hub(tmp_path, monkeypatch)
    reference(tmp_path / "melody", "melody", shard="20KB")
    put("facebook/musicgen-melody", tmp_path / "melody")
    EncodecModel.from_pretrained(tmp_path / "melody").to_hf(tmp_path / "codec")
    put("facebook/encodec_32khz", tmp_path / "codec")
    text = transformers.MusicgenMelodyForConditionalGeneration.from_pretrained(tmp_path / "melody").text_encoder
    text.save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    put("google/t5-tiny", tmp_path / "t5")
    model = MusicGen.from_pretrained("facebook/musicgen-melody", "cpu")
    wav = model.generate(["slow"], [torch.ones(1, 800)], duration=0.1)

    # the original's format names its text encoder and its codec by id
    (tmp_path / "original").mkdir()
    original(tmp_path / "original", tmp_path / "melody")
    for name in ("state_dict.bin", "compression_state_dict.bin"):
        package = torch.load(tmp_path / "original" / name)
        package = {"pretrained": "facebook/encodec_32khz"} if "pretrained" in package else {
            **package, "xp.cfg": XP.replace("T5", "google/t5-tiny")}
        torch.save(package, tmp_path / "original" / name)
    named = MusicGen.from_pretrained(tmp_path / "original", "cpu")
    named.config.chroma_length = model.config.chroma_frames
    assert torch.equal(named.generate(["slow"], [torch.ones(1, 800)], duration=0.1), wav)


@pytest.mark.parametrize("name", ["facebook/musicgen-small", "t5-base"])
def test_what_is_not_in_the_cache_is_told_in_one_sentence(tmp_path, monkeypatch, name):
    hub(tmp_path, monkeypatch)
    for read in (lambda: MusicGen.from_pretrained(name, "cpu"), lambda: load_t5(name), lambda: EncodecModel.from_pretrained(name)):
        with pytest.raises(UserError, match=f"{name}: not a directory here, and the Hugging Face hub did not give it") as caught:
            read()
        assert "\n" not in str(caught.value)


# --- memory ---------------------------------------------------------------------------------------------------------

MEMORY = """
import gc, sys, torch
from pathlib import Path
from lm import LMModel

def memory(key):    # of this process, in bytes
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key)))

LMModel.from_pretrained(sys.argv[1])    # imports what it needs
for directory in sys.argv[1:]:
    for dtype in (None, torch.float32):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")     # the peak from here on
        before = memory("VmRSS")
        lm = LMModel.from_pretrained(directory, dtype)
        print((memory("VmHWM") - before) / sum(t.nbytes for t in lm.state_dict().values()))
        del lm
"""


def full_size(directory, text=(), codec=(), **decoder):
    """A melody model of the released sizes, but for those given, random and untrained; written by transformers in float16."""
    text = transformers.T5Config(**dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12) | dict(text))
    codec = transformers.EncodecConfig(**dict(
        sampling_rate=32000, num_filters=64, upsampling_ratios=[8, 5, 4, 4], codebook_size=2048, target_bandwidths=[2.2],
        use_causal_conv=False, use_conv_shortcut=False) | dict(codec))
    decoder = dict(hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, ffn_dim=6144, num_codebooks=4) | decoder
    config = transformers.MusicgenMelodyConfig(text_encoder=text.to_dict(), audio_encoder=codec.to_dict(),
                                               decoder=transformers.MusicgenMelodyDecoderConfig(**decoder).to_dict())
    with torch.device("meta"):
        model = transformers.MusicgenMelodyForConditionalGeneration(config).half()
    model = model.to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        tensor.normal_(0, 0.02) if tensor.dim() > 1 else tensor.fill_(float("norm" in name and "weight" in name))
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak of a part of a program")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """At its peak, over the weights of the model that is loaded; 60 M of them, in files of float16."""
    from safetensors.torch import load_file
    full_size(tmp_path / "transformers", dict(d_model=64, num_layers=2), dict(num_filters=4), hidden_size=768,
              num_hidden_layers=6, num_attention_heads=12, ffn_dim=3072)
    (tmp_path / "bin").mkdir()
    (tmp_path / "original").mkdir()
    torch.save(load_file(tmp_path / "transformers" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "transformers" / "config.json").read_bytes())
    xp = XP.replace("dim: 32, num_heads: 4, num_layers: 2, hidden_scale: 3, n_q: 4, card: 32",
                    "dim: 768, num_heads: 12, num_layers: 6, hidden_scale: 4, n_q: 4, card: 2048")
    original(tmp_path / "original", tmp_path / "transformers", xp)
    L.LMModel.from_pretrained(tmp_path / "transformers").save(tmp_path / "ours")
    environment = dict(os.environ, PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="65536")    # what is freed is given back
    names = ["transformers", "bin", "original", "ours"]
    done = subprocess.run([sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in names)], env=environment,
                          capture_output=True, text=True, check=True)
    shares = dict(zip([(name, dtype) for name in names for dtype in ("as it is", "float32")], map(float, done.stdout.split())))
    assert max(shares.values()) < 1.4, shares     # a second copy would make it 1.5 or 2


@pytest.mark.slow
def test_a_full_size_melody_model_in_10_gb(tmp_path):
    """5 s of audio; needs 4 GB on the disk and a few minutes. The command prints its own peak."""
    full_size(tmp_path / "model")
    code = ("import resource, sys, config, sample; config.run(sample.main, sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code, "--checkpoint", str(tmp_path / "model"), "--text", "slow flute", "--melody",
                           str(ROOT / "assets/ode_to_joy.wav"), "--duration", "5", "--device", "cpu", "--out", str(tmp_path / "x.wav")],
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gigabytes = int(done.stdout.split()[-1]) * 1024 / 1e9
    print(f"peak {gigabytes:.2f} GB")
    assert gigabytes < 10 and soundfile.info(tmp_path / "x.wav").frames == 5 * 32000
