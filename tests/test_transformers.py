"""MusicGen against transformers' own classes, with random weights in tiny sizes.

    python -m pytest tests/test_transformers.py

transformers writes a checkpoint with save_pretrained, ours reads it: logits, greedy tokens, text embeddings; and
the other way round. Several releases of transformers drop MusicgenMelody's conditions when generating, so the
reference is first made to prove that it reacts to its melody and its text.
"""
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import lm as L
from checkpoints import formats
from conditioners import T5Conditioner
from config import UserError
from encodec import EncodecModel
from sample import MusicGen

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


def reference(kind, directory, heads=4, layers=2, text_dim=16, shard=None, dtype=torch.float32, seed=0):
    """A random MusicGen of transformers, saved to directory: kind "melody", "text" or "stereo"."""
    torch.manual_seed(seed)
    channels = 2 if kind == "stereo" else 1
    text = transformers.T5Config(vocab_size=20, d_model=text_dim, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    codec = transformers.EncodecConfig(
        sampling_rate=8000, audio_channels=1, normalize=False, num_filters=2, hidden_size=8, codebook_dim=8, codebook_size=V,
        upsampling_ratios=[5, 4], num_lstm_layers=1, target_bandwidths=[400 * 5 * K / 1000], use_causal_conv=False,
        use_conv_shortcut=False, norm_type="weight_norm", pad_mode="reflect")
    sizes = dict(vocab_size=V, hidden_size=D, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=3 * D,
                 num_codebooks=K * channels, audio_channels=channels, pad_token_id=V, bos_token_id=V, max_position_embeddings=64)
    if kind == "melody":
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


@pytest.mark.parametrize("options", [dict(), dict(heads=2, layers=3, text_dim=24, shard="20KB")], ids=str)
def test_melody_model(tmp_path, options):
    theirs = reference("melody", tmp_path, **options)
    a = greedy(theirs, tmp_path, ["slow flute"], melody(9), frames=30)
    if torch.equal(a, greedy(theirs, tmp_path, ["slow flute"], melody(3), frames=30)) or \
            torch.equal(a, greedy(theirs, tmp_path, ["fast organ"], melody(9), frames=30)):
        pytest.skip(f"transformers {transformers.__version__} ignores the melody or the text when generating")

    lm = L.LMModel.from_pretrained(tmp_path)
    texts, features = ["slow flute", "a fast happy organ tune"], melody(9, 2)
    inputs = tokenizer()(texts, return_tensors="pt", padding=True)
    codes = torch.randint(V, (2, K, 14))
    with torch.no_grad():
        for chroma in (features, None):     # without: their one-hot C is our null melody "c"
            expected = theirs(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                              input_features=chroma, decoder_input_ids=codes.flatten(0, 1)).logits
            conditions = lm.conditioner(texts, chroma)._replace(prefix_mask=None)   # they attend to padding
            logits = lm(codes, conditions)
            torch.testing.assert_close(logits, expected.view(2, K, -1, V)[:, :, -14:], rtol=1e-4, atol=1e-4)

    with_melody = ours(tmp_path, ["slow flute"], [melody(9)[0]])
    assert torch.equal(with_melody, greedy(theirs, tmp_path, ["slow flute"], melody(9)))
    assert with_melody.shape == (1, K, FRAMES)
    text_only = ours(tmp_path, ["slow flute"])
    assert torch.equal(text_only, greedy(theirs, tmp_path, ["slow flute"]))
    assert not torch.equal(text_only, with_melody)
    short = melody(5, M=4)      # shorter melodies repeat
    assert torch.equal(ours(tmp_path, ["sad"], [short[0]]), greedy(theirs, tmp_path, ["sad"], short))
    # a batch of equal text lengths has no padding, so theirs is right too
    assert torch.equal(ours(tmp_path, ["slow flute", "fast organ"], list(melody(1, 8)), 40),
                       greedy(theirs, tmp_path, ["slow flute", "fast organ"], melody(1, 8), 40))


@pytest.mark.parametrize("kind", ["text", "stereo"])
def test_text_and_stereo_model(tmp_path, kind):
    theirs = reference(kind, tmp_path)
    a = greedy(theirs, tmp_path, ["slow flute"])
    if torch.equal(a, greedy(theirs, tmp_path, ["fast organ"])):
        pytest.skip(f"transformers {transformers.__version__} ignores the text when generating")
    assert torch.equal(ours(tmp_path, ["slow flute"]), a)

    lm = L.LMModel.from_pretrained(tmp_path)
    assert lm.config.n_q == (8 if kind == "stereo" else 4)
    texts = ["slow flute", "a fast happy organ tune"]
    inputs = tokenizer()(texts, return_tensors="pt", padding=True)
    codes = torch.randint(V, (2, lm.config.n_q, 14))
    with torch.no_grad():
        expected = theirs(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                          decoder_input_ids=codes.flatten(0, 1)).logits
        # their cross-attention masks padding as ours does
        torch.testing.assert_close(lm(codes, lm.conditioner(texts)), expected.view(2, -1, 14, V), rtol=1e-4, atol=1e-4)
    if kind == "stereo":
        wav = MusicGen.from_pretrained(tmp_path, "cpu").generate(["slow flute"], duration=0.1)
        assert wav.shape == (1, 2, 800)


def test_text_conditioner(tmp_path):
    """Embeddings and masks; an empty and a missing description are zeros."""
    theirs = reference("melody", tmp_path)
    conditioner = L.LMModel.from_pretrained(tmp_path).conditioner.text
    texts = ["a slow flute tune", "organ", "", None]
    with torch.no_grad():
        frames, mask = conditioner(texts)
        inputs = tokenizer()([t or "" for t in texts], return_tensors="pt", padding=True)
        hidden = theirs.text_encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        expected = theirs.enc_to_dec_proj(hidden) * inputs["attention_mask"][..., None]
    torch.testing.assert_close(frames[:2], expected[:2], rtol=1e-5, atol=1e-5)
    assert (frames[2:] == 0).all() and mask.tolist() == inputs["attention_mask"].bool().tolist()
    assert not list(p for n, p in conditioner.named_parameters() if "t5" in n), "a frozen T5 is not trained or saved"
    assert isinstance(conditioner, T5Conditioner)


def test_half_precision_files_and_types_on_load(tmp_path):
    reference("melody", tmp_path, dtype=torch.float16)
    assert L.LMModel.from_pretrained(tmp_path).emb.weight.dtype == torch.float16
    model = MusicGen.from_pretrained(tmp_path, "cpu", "bfloat16")
    assert model.lm.heads.weight.dtype == torch.bfloat16
    assert model.generate(["slow"], duration=0.05).isfinite().all()


@pytest.mark.parametrize("kind", ["melody", "text", "stereo"])
def test_exported_and_read_back(tmp_path, kind):
    """Ours -> transformers' classes -> ours: bit-identical weights, and their greedy tokens equal ours."""
    reference(kind, tmp_path / "first")
    lm, codec = L.LMModel.from_pretrained(tmp_path / "first"), EncodecModel.from_pretrained(tmp_path / "first")
    formats.export_transformers(lm, codec, tmp_path / "second")
    name = "MusicgenMelodyForConditionalGeneration" if kind == "melody" else "MusicgenForConditionalGeneration"
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    again = L.LMModel.from_pretrained(tmp_path / "second")
    for (name, a), b in zip(lm.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    for (name, a), b in zip(codec.state_dict().items(), EncodecModel.from_pretrained(tmp_path / "second").state_dict().values()):
        assert torch.equal(a, b), name
    features = melody(9) if kind == "melody" else None
    expected = greedy(theirs.eval(), tmp_path / "second", ["slow flute"], features)
    assert torch.equal(ours(tmp_path / "second", ["slow flute"], None if features is None else list(features)), expected)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "second")("slow")["input_ids"] == [3, 1]
    if kind != "melody" or transformers.utils.is_torchaudio_available():    # the melody processor needs that package
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "second")
        assert type(processor).__name__ == ("MusicgenMelodyProcessor" if kind == "melody" else "MusicgenProcessor")
        assert processor(text=["slow"], return_tensors="pt")["input_ids"].tolist() == [[3, 1]]
    assert json.loads((tmp_path / "second" / "preprocessor_config.json").read_text())["sampling_rate"] == 8000


def test_wrong_tensors_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file
    reference("melody", tmp_path)
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
