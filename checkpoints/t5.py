"""T5 and its tokenizer, both of transformers: from a hub id, a directory, or inside a MusicGen directory.

    from checkpoints.t5 import load_t5, load_tokenizer

Also the small T5 of the tiny models: transformers' class with random weights, over bytes or listed words.
"""
import torch
from torch import nn

from checkpoints.files import load_strict, open_checkpoint, read_tensors
from config import Config
from system.errors import as_user_error
from system.files import read_json

SMALL_T5 = ("bytes", "words")       # names of the small ones, which are trained along
# known without a download
T5_WIDTHS = {"t5-small": 512, "t5-base": 768, "t5-large": 1024, "google/flan-t5-base": 768}


def new_t5(config) -> nn.Module:
    """T5's encoder with random weights, of a T5Config."""
    with torch.device("cpu"):  # where "meta" is the default, this import fails with torch 2.6
        from transformers import T5EncoderModel
    t5 = T5EncoderModel(config)
    t5.set_input_embeddings(t5.shared)      # one module under two names: it stays one when weights are loaded
    return t5


def small_t5(config: Config) -> nn.Module:
    """A small T5 encoder over bytes or words with random weights; needs no files and no network."""
    from transformers import T5Config
    vocabulary = 256 if config.t5 == "bytes" else len(config.t5_words.split())
    return new_t5(T5Config(
        vocab_size=3 + vocabulary, d_model=config.t5_dim, d_kv=config.t5_dim // config.t5_heads,
        d_ff=4 * config.t5_dim, num_layers=config.t5_layers, num_heads=config.t5_heads, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False))


def t5_config(name: str):
    """The T5Config of a hub id, a directory, or of the text encoder inside a MusicGen directory."""
    from transformers import AutoConfig
    with as_user_error(f"{name}: holds no T5 to read texts with"):
        config = AutoConfig.from_pretrained(open_checkpoint(name), trust_remote_code=False)
        config = getattr(config, "text_encoder", config)
        if config.model_type != "t5" or config.num_layers > 1000:
            raise ValueError(f"a {config.model_type}")
        return config


def load_t5(name: str) -> nn.Module:
    """T5's encoder from a hub id, a directory, or a MusicGen directory in transformers' format."""
    config = t5_config(name)
    with torch.device("meta"):
        t5 = new_t5(config)
    directory = open_checkpoint(name)
    prefix = "text_encoder." if "text_encoder" in read_json(directory / "config.json") else ""
    tensors = {key: value for key, value in read_tensors(directory, prefix, torch.float32)
               if key.startswith(("shared.", "encoder."))}
    if "shared.weight" in tensors:      # one table under two names
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    load_strict(t5, tensors, f"T5 in {name}")
    return t5


def load_tokenizer(name: str, words: dict):
    """The tokenizer of a hub id or directory; for a small T5, one that gives T5Conditioner's own ids."""
    from transformers import AutoTokenizer, ByT5Tokenizer
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    if name == "words":
        return word_tokenizer(words)
    with as_user_error(f"{name}: holds no tokenizer for its text encoder"):
        return AutoTokenizer.from_pretrained(open_checkpoint(name), trust_remote_code=False)


def word_tokenizer(words: dict):
    """A tokenizer over listed words {word: id}, with one token for all others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    inner = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=512)
