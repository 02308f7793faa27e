"""Conditioners: what the model is told about the music, as vectors it can attend to (MusicGen 2.3).

    "a slow flute tune" --T5--> (B, P, 768) --linear--> (B, P, D)  text,   0 where there is none
    melody.wav -------chroma--> (B, M, 12)  --linear--> (B, M, D)  melody, `null_melody` where there is none

and how the two enter the language model (`Conditions`):

    prepend      [ melody frames | text tokens | music ... ]    the melody model: one sequence, attended to
    cross        music attends to the tokens in a second attention of every layer: the text model
    sum          the mean over the frames is added to every step of the music
    interpolate  the frames are stretched to the length of the music and added step by step

    python conditioners.py          # shows the prefix of a batch, what is null in it, and the text augmentation

In training, conditions are dropped at random so that the model also learns to play without them, which is
what classifier-free guidance needs. All those draws are pure functions of a random generator at the end of
this file, one item at a time (the original draws once for a whole batch), and never happen in evaluation.
"""
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from config import Config, UserError, read_json

SMALL = ("bytes", "words")      # T5s of our own, trained along
T5_WIDTHS = {"t5-small": 512, "t5-base": 768, "t5-large": 1024, "google/flan-t5-base": 768}  # no download to know


class Conditions(NamedTuple):
    """What the language model is given: frames in front, frames to attend to, frames to add. Any may be None.

    A mask says which frames an item has: in a batch, shorter texts are padded, and padding is neither attended
    to nor counted in positions, so that a batch never changes an item. None: every item has every frame.
    """
    prefix: torch.Tensor | None = None        # (B, P, D)
    prefix_mask: torch.Tensor | None = None   # (B, P) bool
    prefix_time: torch.Tensor | None = None   # (P,) time of each frame in steps of the music, for rotary positions
    cross: torch.Tensor | None = None         # (B, P', D)
    cross_mask: torch.Tensor | None = None    # (B, P') bool
    added: torch.Tensor | None = None         # (B, S, D) or (B, 1, D)

    @property
    def batch(self) -> int:
        return next((x.shape[0] for x in (self.prefix, self.cross, self.added) if x is not None), 1)


# --- text ------------------------------------------------------------------------------------------------

class T5Conditioner(nn.Module):
    """Text -> frames of the language model's width: T5's encoder, then a linear layer.

    T5 itself comes from transformers. Frozen, it is no part of this module's parameters or state (its name in
    the configuration is enough); with `t5_finetune`, or as a small T5 of our own, it is trained along. Those read
    "bytes", or "words": those of `t5_words`, every other one as the same unknown word.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.name, self.trained = config.t5, config.t5_finetune or config.t5 in SMALL
        self.words = {word: n for n, word in enumerate(config.t5_words.split(), start=3)}
        self.frozen = []            # [T5] once loaded: a list hides it from parameters() and state_dict()
        self._tokenizer = None
        if config.t5 in SMALL:
            self.t5 = small_t5(config)
            width = config.t5_dim
        elif self.trained:
            self.t5 = load_t5(config.t5)
            width = self.t5.config.d_model
        else:
            width = T5_WIDTHS.get(config.t5) or t5_config(config.t5).d_model
        self.proj = nn.Linear(width, config.dim)

    def encoder(self) -> nn.Module:
        """The T5 encoder on the device of the projection; a frozen one is loaded when first needed."""
        if self.trained:
            return self.t5
        if not self.frozen:
            self.frozen.append(load_t5(self.name).eval().requires_grad_(False))
        if self.frozen[0].device != self.proj.weight.device:
            self.frozen[0].to(self.proj.weight.device)
        return self.frozen[0]

    def tokenize(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts -> token ids (B, P) and their mask (B, P) bool, right-padded, an end token closing each."""
        if self.name in SMALL:      # 0 padding, 1 end; byte + 3, as ByT5; or 2 an unknown word, 3 the first known one
            if self.name == "bytes":
                ids = [[byte + 3 for byte in text.encode()] for text in texts]
            else:
                words = [re.findall(r"\w+|[^\w\s]+", text.lower()) for text in texts]
                ids = [[self.words.get(word, 2) for word in row] for row in words]
            ids = [row[:511] + [1] for row in ids]
            longest = max(map(len, ids))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
            return ids, ids != 0
        # 512 tokens is what T5 was trained on; a text of 4,000 words is cut, not refused
        inputs = self.tokenizer()(texts, return_tensors="pt", padding=True, truncation=True, max_length=512)
        return inputs["input_ids"], inputs["attention_mask"].bool()

    def tokenizer(self):
        """The tokenizer of transformers, loaded when first needed."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name, self.words)
        return self._tokenizer

    def forward(self, texts: list[str | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Descriptions -> frames (B, P, D) and the mask (B, P) of the frames each item has.

        A missing, empty or wholly dropped text is one frame of zeros: the end token of "", masked (as the
        original, where it is padded to the longest text of the batch by further zeros).
        """
        device = self.proj.weight.device
        # a command line may hold bytes that are not UTF-8, which no tokenizer takes
        ids, mask = self.tokenize([(text or "").encode(errors="replace").decode() for text in texts])  # (B, P)
        ids, mask = ids.to(device), mask.to(device)
        given = torch.tensor([bool(text) for text in texts]).to(device)[:, None]       # (B, 1)
        # T5 stays in float32: its feed-forward leaves the range of float16. A text that is not given is run over its
        # end token all the same: a row without any token would give NaN.
        learns = self.trained and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns), torch.autocast(device.type, enabled=False):
            hidden = self.encoder()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        frames = self.proj(hidden.to(self.proj.weight.dtype))                          # (B, P, D)
        return frames * (mask & given)[..., None].to(frames.dtype), mask


def new_t5(config) -> nn.Module:
    """T5's encoder with random weights, of a T5Config."""
    with torch.device("cpu"):  # where "meta" is the default, torch 2.6 fails at what transformers imports of it
        from transformers import T5EncoderModel
    t5 = T5EncoderModel(config)
    t5.set_input_embeddings(t5.shared)      # one module under two names: it stays one whatever is loaded into it
    return t5


def small_t5(config: Config) -> nn.Module:
    """A small T5 encoder over bytes or words with random weights; needs no files and no network."""
    from transformers import T5Config
    return new_t5(T5Config(
        vocab_size=3 + (256 if config.t5 == "bytes" else len(config.t5_words.split())),
        d_model=config.t5_dim, d_kv=config.t5_dim // config.t5_heads, d_ff=4 * config.t5_dim,
        num_layers=config.t5_layers, num_heads=config.t5_heads, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False))


def t5_config(name: str):
    """The T5Config of a hub id, a directory, or of the text encoder inside a MusicGen directory."""
    from transformers import AutoConfig
    from checkpoints.files import open_checkpoint
    try:
        config = AutoConfig.from_pretrained(open_checkpoint(name), trust_remote_code=False)
        config = getattr(config, "text_encoder", config)
        assert config.model_type == "t5" and config.num_layers <= 1000, f"a {config.model_type}"
        return config
    except UserError:
        raise
    except Exception as error:  # transformers has errors of all kinds
        raise UserError(f"{name}: holds no T5 to read texts with ({' '.join(str(error).split())[:150]})") from None


def load_t5(name: str) -> nn.Module:
    """T5's encoder from a hub id, a directory, or a MusicGen directory in transformers' format."""
    from checkpoints.files import load_strict, open_checkpoint, read_tensors
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
    """The tokenizer of a hub id or directory; for "bytes" and "words" one that makes the ids that `tokenize` makes."""
    from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
    from checkpoints.files import open_checkpoint
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    if name == "words":
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        inner = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2} | words, unk_token="<unk>"))
        inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                       model_max_length=512)
    try:
        return AutoTokenizer.from_pretrained(open_checkpoint(name), trust_remote_code=False)
    except Exception as error:  # of all kinds
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{name}: holds no tokenizer for its text encoder ({reason})") from None


# --- melody --------------------------------------------------------------------------------------------------

class ChromaConditioner(nn.Module):
    """Chromagram (chroma.py) -> frames of the language model's width: one linear layer, and the null melody."""

    def __init__(self, config: Config):
        super().__init__()
        self.null = config.null_melody
        self.proj = nn.Linear(config.n_chroma, config.dim)

    def forward(self, chroma: torch.Tensor, has_melody: torch.Tensor) -> torch.Tensor:
        """Chroma (B, M, Q) and whether each item has a melody (B,) bool -> frames (B, M, D)."""
        return null_melody(self.proj, chroma, has_melody, self.null)


def null_melody(proj: nn.Linear, chroma: torch.Tensor, has_melody: torch.Tensor, kind: str) -> torch.Tensor:
    """Project chroma (B, M, Q) to (B, M, D), with "no melody" where has_melody (B,) is False.

    kind "zeros": zero frames. How the original trains, and how our models train and sample.
    kind "c": the projection of one-hot C in every frame. What the original's generation wrapper feeds its
    released checkpoints, with and without guidance (its chroma of silence is C and its mask is switched off);
    transformers does the same. Both keep the M frames of training, so that positions never move.
    """
    has_melody = has_melody[:, None, None]                                              # (B, 1, 1)
    c = F.one_hot(torch.zeros_like(chroma[..., 0], dtype=torch.long), chroma.shape[-1]).to(chroma.dtype)
    frames = proj(torch.where(has_melody, chroma, c))                                   # (B, M, D)
    return frames * has_melody.to(frames.dtype) if kind == "zeros" else frames


# --- both ------------------------------------------------------------------------------------------------------

class Conditioners(nn.Module):
    """Text and melody of a batch -> Conditions."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.text = T5Conditioner(config) if config.text != "none" else None
        self.melody = ChromaConditioner(config) if config.melody != "none" else None

    def forward(self, texts, chroma=None, has_melody=None, steps: int = 1, guidance: bool = False) -> Conditions:
        """texts: B strings or None; chroma (B, M, Q) or None; has_melody (B,) bool or None for all -> Conditions.

        steps: S of the music, which "interpolate" stretches to. guidance: a batch of 2B is returned, first the
        items, then the same items without text and melody, each keeping the number of frames it had.
        """
        text = melody = mask = None
        if self.text is not None:
            text, mask = self.text(texts)
            if guidance:
                text, mask = torch.cat([text, torch.zeros_like(text)]), torch.cat([mask, mask])
        if self.melody is not None:
            weight = self.melody.proj.weight
            if chroma is None:
                chroma = weight.new_zeros(len(texts), self.config.chroma_frames, self.config.n_chroma)
                has_melody = weight.new_zeros(len(texts), dtype=torch.bool)
            if has_melody is None:
                has_melody = weight.new_ones(len(chroma), dtype=torch.bool)
            chroma, has_melody = chroma.to(weight), has_melody.to(weight.device)
            if guidance:
                chroma, has_melody = torch.cat([chroma, chroma]), torch.cat([has_melody, torch.zeros_like(has_melody)])
            melody = self.melody(chroma, has_melody)
        return self.fuse(text, mask, melody, steps)

    def fuse(self, text, mask, melody, steps: int) -> Conditions:
        """Frames of text (B, P, D) with mask (B, P), of melody (B, M, D) -> Conditions; either may be None."""
        prefix, cross, added = [], [], []       # lists of (frames, mask, time)
        config = self.config
        if melody is not None:                  # melody comes first in the prefix, then text
            everywhere = torch.ones(melody.shape[:2], dtype=torch.bool, device=melody.device)
            hop = config.hop / config.stride    # code frames per chroma frame
            time = torch.arange(melody.shape[1], device=melody.device) * hop
            _place(config.melody, (melody, everywhere, time), prefix, cross, added, steps)
        if text is not None:
            time = -1.0 - torch.arange(text.shape[1], device=text.device)   # before the music
            _place(config.text, (text, mask, time), prefix, cross, added, steps)

        def join(parts):
            return [torch.cat(x, dim=d) for x, d in zip(zip(*parts), (1, 1, 0))] if parts else (None, None, None)
        frames, mask, time = join(prefix)
        attended, attended_mask, _ = join(cross)
        return Conditions(frames, mask, time, attended, attended_mask, sum(added) if added else None)


def _place(fusion, part, prefix, cross, added, steps):
    frames, mask, _ = part
    length = mask.sum(1, keepdim=True)                                                  # (B, 1)
    if fusion == "prepend":
        prefix.append(part)
    elif fusion == "cross":
        cross.append(part)
    elif fusion == "sum":           # one frame a condition in the original; more are averaged
        added.append((frames.sum(1) / length.to(frames.dtype))[:, None])               # (B, 1, D)
    else:                           # nearest neighbour, over the frames that the item has
        nearest = torch.arange(steps, device=frames.device) * length // steps           # (B, S)
        added.append(frames.gather(1, nearest[..., None].expand(-1, -1, frames.shape[-1])))


# --- random draws of training: augmentation and dropout ---------------------------------------------------------

METADATA = ("key", "bpm", "genre", "moods", "keywords", "instrument")


def augment_description(meta: dict, config: Config, rng) -> str | None:
    """Description of a track, at times merged with its metadata, as the original's text augmentation.

    meta: fields of the track (title, description, key, bpm, moods as a list, ...); rng: numpy Generator.
    With probability merge_text_p each metadata field is kept with probability drop_other_p (sic), shuffled, and
    appended as "key: a minor. bpm: 104.0"; the description itself is then dropped with probability drop_desc_p.
    """
    description, extra = meta.get("description"), ""
    if config.merge_text_p == 0:
        return description
    if rng.random() < config.merge_text_p:
        fields = [f"{name}: {', '.join(value) if isinstance(value, list) else value}"
                  for name in METADATA if (value := meta.get(name)) and rng.random() < config.drop_other_p]
        rng.shuffle(fields)
        extra = ". ".join(fields)
        if rng.random() < config.drop_desc_p:
            description = None
    if not description:
        return extra or None
    return f"{description.rstrip('.')}. {extra}".strip()


def word_dropout(text: str | None, p: float, rng) -> str | None:
    """Text without some of its words, each dropped with probability p; None where nothing is left."""
    return " ".join(word for word in text.split(" ") if rng.random() >= p) or None if text and p else text


def drop_conditions(text: str | None, has_melody: bool, config: Config, rng) -> tuple[str | None, bool]:
    """An item's text and melody after guidance dropout (both at once) and attribute dropout (the melody).

    Both draws are always made, so that one rate never changes the other's outcome. The original draws once per
    batch and process; one draw an item has the same rates and less noise, and does not depend on the batch.
    """
    everything, melody = rng.random() < config.cfg_dropout, rng.random() < config.melody_dropout
    return (None if everything else text), bool(has_melody and not everything and not melody)


def demo():
    import numpy as np
    config = Config(dim=16, num_heads=2, num_layers=1, t5="bytes", segment_duration=2.0)
    torch.manual_seed(0)
    conditioner = Conditioners(config).eval()
    texts = ["slow flute", "loud", None]
    chroma = F.one_hot(torch.arange(config.chroma_frames).expand(3, -1) % 12, 12).float()
    has_melody = torch.tensor([True, False, True])
    with torch.no_grad():
        conditions = conditioner(texts, chroma, has_melody)
    print("the prefix: melody frames, then text (# a frame, 0 a frame of zeros, . padding that nobody attends to)\n")
    for text, frames, mask in zip(texts, conditions.prefix, conditions.prefix_mask):
        cells = ["." if not m else "#" if f.abs().sum() > 0 else "0" for f, m in zip(frames, mask)]
        m = config.chroma_frames
        print(f"  {str(text):>10}  {''.join(cells[:m])} | {''.join(cells[m:])}")
    meta = dict(description="A slow air for a flute, alone in a large hall.", key="d minor", bpm=72.0,
                moods=["calm", "sad"], instrument="flute")
    print(f"\ntraining captions of one track, merged with metadata at a rate of {config.merge_text_p}, words dropped:")
    rng = np.random.default_rng(1)
    for _ in range(6):
        print("  ", word_dropout(augment_description(meta, config, rng), config.word_dropout, rng))


if __name__ == "__main__":
    demo()
