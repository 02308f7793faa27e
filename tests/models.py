"""Tiny models that several tests share: codecs, language models, and those of transformers."""
import dataclasses

import tokenizers
import torch
import transformers

from checkpoints import lm_formats
from conditioners import Conditions
from config import Config
from encodec import EncodecModel
from lm import LMModel

# --- codecs -----------------------------------------------------------------------------------------------

TINY_CODEC = Config(task="codec", n_filters=2, dimension=8, ratios=(4, 3, 2), n_q=3, card=16, lstm=1,
                    sample_rate=2400, kmeans_iters=0)


def tiny_codec(**changes) -> EncodecModel:
    torch.manual_seed(0)
    return EncodecModel(dataclasses.replace(TINY_CODEC, **changes)).eval()


def noise(*shape, seed=0):
    """A wave (B, C, L) of noise."""
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codec_of_transformers(**changes):
    """A random EncodecModel of transformers: four codebooks of 1,024 entries, 100 frames a second."""
    torch.manual_seed(1)
    values = dict(sampling_rate=2400, upsampling_ratios=[4, 3, 2], num_filters=2, hidden_size=8,
                  codebook_size=1024, target_bandwidths=[1.0, 4.0])
    model = transformers.EncodecModel(transformers.EncodecConfig(**values | changes)).eval()
    with torch.no_grad():
        for layer in model.quantizer.layers:
            layer.codebook.embed.normal_(std=0.05)
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


CODEC_STYLES = {
    "32 kHz": dict(use_causal_conv=False, use_conv_shortcut=False, pad_mode="reflect", num_lstm_layers=2),
    "32 kHz, zeros around it": dict(use_causal_conv=False, use_conv_shortcut=False, pad_mode="constant",
                                    num_lstm_layers=2),
    "24 kHz": dict(use_causal_conv=True, use_conv_shortcut=True, pad_mode="reflect", num_residual_layers=2),
    "group norm, stereo": dict(use_causal_conv=False, norm_type="time_group_norm", audio_channels=2,
                               compress=1),
}

# --- language models --------------------------------------------------------------------------------------

TINY = Config(dim=32, num_heads=4, num_layers=2, n_q=4, card=16, t5="bytes", t5_dim=16, t5_heads=2,
              sample_rate=8000, ratios=(8, 5, 4), radix2_exp=9, segment_duration=0.5)
OPTIONS = [     # every way into the model, all positions, all patterns
    dict(), dict(positional_embedding="rope", qk_layer_norm=True), dict(positional_embedding="sin_rope"),
    dict(text="cross"), dict(melody="cross"), dict(text="sum", melody="interpolate"),
    dict(text="interpolate"), dict(melody="none", pattern="unroll"), dict(pattern="coarse_first"),
    dict(null_melody="c", pattern="parallel")]


def make(seed=0, **options) -> LMModel:
    """A model with random weights that react to their conditions: the initial ones are too small for that."""
    torch.manual_seed(seed)
    lm = LMModel(dataclasses.replace(TINY, **options)).eval()
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return lm


def melody(lm, pitch_class: int) -> torch.Tensor:
    """Chroma (M, Q) of one held note."""
    M, Q = lm.config.chroma_frames, lm.config.melody_classes
    return torch.nn.functional.one_hot(torch.full((M,), pitch_class), Q).float()


def conditions_of(lm, texts, classes) -> dict:
    """The conditions of a batch: texts, and for each a held note or None; no melodies where it takes none."""
    if lm.config.melody == "none":
        classes = [None] * len(texts)
    return {"text": list(texts), "melody": [None if c is None else melody(lm, c) for c in classes]}


def prefix_of(frames) -> Conditions:
    """Frames (B, P, D) in front, none of them padding."""
    mask = torch.ones(frames.shape[:2], dtype=torch.bool)
    return Conditions(prefix=frames, prefix_mask=mask)


def model_of_audiocraft(g: dict, prefix: str, text: str) -> LMModel:
    """A model with the weights that tests/golden holds under `prefix`; text: how it enters the model."""
    lm = LMModel(dataclasses.replace(TINY, text=text, melody="none"))
    table = lm_formats.name_table(lm, audiocraft=True)
    table = {ours: parts for ours, parts in table.items() if "conditioner" not in ours}
    state = prefix + "state."
    tensors = [(key.removeprefix(state), value) for key, value in g.items() if key.startswith(state)]
    shapes = {name: tensor.shape for name, tensor in lm.state_dict().items()}
    packed = lm_formats.pack(tensors, table, shapes, None, "golden")
    missing, unexpected = lm.load_state_dict(packed, strict=False)
    assert not unexpected and all("conditioner" in name for name in missing)
    return lm.eval()


# --- language models of transformers ----------------------------------------------------------------------

K, V, D = 4, 32, 32     # codebooks, entries, width of musicgen_of_transformers
WORDS = "slow fast flute organ tune with drums a the in minor major happy sad".split()


def word_tokenizer():
    """A tokenizer of transformers over WORDS."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>"] + WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>",
                                                unk_token="<unk>")


def musicgen_of_transformers(directory, kind, heads=4, layers=2, text_dim=16, shard=None,
                             dtype=torch.float32, width=D):
    """A random MusicGen of transformers, saved to directory.

    kind: "melody", "text", "stereo" or "stereo melody"; shard: the largest size of a file, such as "20KB".
    """
    torch.manual_seed(0)
    channels, melody = 2 if "stereo" in kind else 1, "melody" in kind
    text = transformers.T5Config(vocab_size=20, d_model=text_dim, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    codec = transformers.EncodecConfig(
        sampling_rate=8000, audio_channels=1, normalize=False, num_filters=2, hidden_size=8, codebook_dim=8,
        codebook_size=V, upsampling_ratios=[5, 4], num_lstm_layers=1, target_bandwidths=[400 * 5 * K / 1000],
        use_causal_conv=False, use_conv_shortcut=False, norm_type="weight_norm", pad_mode="reflect")
    sizes = dict(vocab_size=V, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                 ffn_dim=3 * width, num_codebooks=K * channels, audio_channels=channels, pad_token_id=V,
                 bos_token_id=V, max_position_embeddings=256)
    parts = dict(text_encoder=text.to_dict(), audio_encoder=codec.to_dict())
    if melody:
        decoder = transformers.MusicgenMelodyDecoderConfig(**sizes).to_dict()
        config = transformers.MusicgenMelodyConfig(**parts, decoder=decoder, num_chroma=12, chroma_length=9)
        model = transformers.MusicgenMelodyForConditionalGeneration(config)
    else:
        decoder = transformers.MusicgenDecoderConfig(**sizes).to_dict()
        model = transformers.MusicgenForConditionalGeneration(
            transformers.MusicgenConfig(**parts, decoder=decoder))
    for name, parameter in model.named_parameters():    # initial weights are too small for conditions
        if not name.startswith("audio_encoder"):
            mean = 1.0 if "norm" in name and "bias" not in name else 0.0
            torch.nn.init.normal_(parameter, mean, 0.25)
    model.generation_config.decoder_start_token_id = V
    model.generation_config.pad_token_id = model.generation_config.bos_token_id = V
    model = model.eval().to(dtype)
    model.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    word_tokenizer().save_pretrained(directory)
    return model
