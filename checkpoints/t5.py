"""T5 and its tokenizer, both of transformers: from a hub id, a directory, or inside a MusicGen directory.

    from checkpoints.t5 import load_t5, load_tokenizer

Also the small T5 of the tiny models: transformers' class with random weights, over bytes or listed words.
"""
import zlib
from pathlib import Path

import torch
from torch import nn

from checkpoints.files import load_strict, open_checkpoint, read_tensors, refuse_pointer, shapes_only
from checkpoints.small_t5 import SmallT5
from config import Config
from system.errors import UserError, as_user_error
from system.files import read_json

SMALL_T5 = ("bytes", "words")       # names of the small ones, which are trained along
LISTED = 10     # a small T5's id of the first listed word; 0 padding, 1 end, 2 ... 9 all others
# one table, of which a file may keep any of the names: the decoder's is tied to it, too
EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
VOCABULARIES = ("tokenizer.json", "spiece.model")   # files of T5's tokenizer: one of them is enough
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
    vocabulary = 3 + 256 if config.t5 == "bytes" else LISTED + len(config.t5_words.split())
    values = dict(
        vocab_size=vocabulary, d_model=config.t5_dim, d_kv=config.t5_dim // config.t5_heads,
        d_ff=4 * config.t5_dim, num_layers=config.t5_layers, num_heads=config.t5_heads, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
    read_from_file = torch.empty(0).is_meta     # made on "meta", without initial weights
    if read_from_file:
        return SmallT5(values)
    from transformers import T5Config
    return new_t5(T5Config(**values))


def word_id(word: str, words: dict) -> int:
    """The id of a word among the listed ones {word: id}; all others share eight: they are not all alike."""
    return words.get(word) or 2 + zlib.crc32(word.encode()) % (LISTED - 2)


def t5_config(name: str):
    """The T5Config of a hub id, a directory, or of the text encoder inside a MusicGen directory."""
    from transformers import AutoConfig
    with as_user_error(f"{name}: holds no T5 to read texts with"):
        config = AutoConfig.from_pretrained(open_checkpoint(name), trust_remote_code=False)
        config = getattr(config, "text_encoder", config)
        if config.model_type != "t5" or config.num_layers > 1000:
            raise ValueError(f"a {config.model_type}")
        return config


@torch.inference_mode(False)    # a caller may be in it, and want to train what is loaded afterwards
def load_t5(name: str) -> nn.Module:
    """T5's encoder from a hub id, a directory, or a MusicGen directory in transformers' format."""
    config = t5_config(name)
    with shapes_only():
        t5 = new_t5(config)
    directory = open_checkpoint(name)
    prefix = "text_encoder." if "text_encoder" in read_json(directory / "config.json") else ""
    tensors = {key: value for key, value in read_tensors(directory, prefix, torch.float32)
               if key in EMBEDDING or key.startswith("encoder.")}
    found = [tensors.pop(key) for key in EMBEDDING if key in tensors]
    if found:
        tensors |= {"shared.weight": found[0], "encoder.embed_tokens.weight": found[0]}
    load_strict(t5, tensors, f"T5 in {name}")
    return t5


def load_tokenizer(name: str, words: dict):
    """The tokenizer of a hub id or directory; for a small T5, one with T5Conditioner's ids of known words."""
    from transformers import AutoTokenizer, ByT5Tokenizer
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    if name == "words":
        return word_tokenizer(words)
    directory, entries = tokenizer_directory(name), t5_config(name).vocab_size
    with as_user_error(f"{name}: holds no tokenizer for its text encoder"):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= entries:
        raise UserError(f"{name}: its text encoder has {entries} tokens, the tokenizer in {directory} makes "
                        f"token {largest}; copy the tokenizer of the T5 that it was made with into {name}")
    return tokenizer


def tokenizer_directory(name: str) -> Path:
    """The directory with the tokenizer of a T5: its own, or that of the T5 which its configuration names.

    Where there is no vocabulary, transformers makes one up, in which every word is unknown. Raises UserError.
    """
    directory = open_checkpoint(name)
    if has_tokenizer(directory):
        return directory
    values = read_json(directory / "config.json")
    values = values.get("text_encoder", values)
    named = values.get("_name_or_path") if isinstance(values, dict) else None
    reason = "its config.json names no T5 with one"
    if isinstance(named, str) and named:
        try:
            directory = open_checkpoint(named)
        except UserError as error:
            reason = f"that of its text encoder cannot be had: {error}"
        if has_tokenizer(directory):
            return directory
    raise UserError(f"{name}: has no tokenizer ({' or '.join(VOCABULARIES)}); copy that of its T5 into it, "
                    f"which is t5-base for the released models ({reason})")


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a vocabulary, or the name of the one tokenizer that needs none."""
    found = [path for path in (directory / name for name in VOCABULARIES) if path.is_file()]
    for path in found:
        refuse_pointer(path)
    about = directory / "tokenizer_config.json"
    return bool(found) or about.is_file() and read_json(about).get("tokenizer_class") == "ByT5Tokenizer"


def word_tokenizer(words: dict):
    """A tokenizer over listed words {word: id}, with one token for all others: it knows no `word_id`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    inner = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=512)
