"""Conditioners: text and melody as vectors that the language model can attend to (MusicGen 2.3).

    "a slow flute tune" --T5--> (B, n, 768) --linear--> (B, n, D)  text,   0 where there is none
    melody.wav -------chroma--> (B, M, 12)  --linear--> (B, M, D)  melody, `null_melody` where there is none

and how the two enter the language model (`Conditions`):

    prepend      [ melody frames | text tokens | music ... ]    the melody model: one sequence, attended to
    cross        music attends to the tokens in a second attention of every layer: the text model
    sum          the mean over the frames is added to every column of the music
    interpolate  the frames are stretched to the length of the music and added column by column

    python conditioners.py          # the prefix of a batch, and what is null in it

An item's conditions are one dict, {"text": a string or None, "melody": chroma (M, Q) or None}, and those of a
batch are a dict of lists. In training, conditions are dropped at random (data/segments.py), so that the model
also learns to play without them: classifier-free guidance needs that.
"""
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from checkpoints.t5 import LISTED, SMALL_T5, T5_WIDTHS, load_t5, load_tokenizer, small_t5, t5_config, word_id
from config import Config


class Conditions(NamedTuple):
    """What the language model is given: frames in front, frames to attend to, frames to add. Any may be None.

    A mask says which frames an item has: in a batch, shorter texts are padded. Padding is neither attended to
    nor counted in positions, so that a batch never changes an item.
    """
    prefix: torch.Tensor | None = None        # (B, P, D)
    prefix_mask: torch.Tensor | None = None   # (B, P) bool
    prefix_time: torch.Tensor | None = None   # (P,) in columns of the music, for rotary positions
    cross: torch.Tensor | None = None         # (B, n, D)
    cross_mask: torch.Tensor | None = None    # (B, n) bool
    added: torch.Tensor | None = None         # (B, S, D) or (B, 1, D)

    @property
    def batch(self):
        """B, or 1 where there is no condition."""
        for frames in (self.prefix, self.cross, self.added):
            if frames is not None:
                return len(frames)
        return 1

    @property
    def prefix_length(self):
        """P"""
        return 0 if self.prefix is None else self.prefix.shape[1]

    def added_to(self, start, S):
        """The frames that are added to the columns start ... start + S."""
        if self.added.shape[1] == 1:
            return self.added
        return self.added[:, start:start + S]


class Frames(NamedTuple):
    """One condition of a batch, on its way into Conditions."""
    values: torch.Tensor        # (B, n, D)
    mask: torch.Tensor          # (B, n) bool: the frames that an item has
    time: torch.Tensor          # (n,) in columns of the music


# --- text -------------------------------------------------------------------------------------------------

class T5Conditioner(nn.Module):
    """Text -> frames of the language model's width: T5's encoder, then a linear layer.

    T5 itself comes from transformers. Frozen, it is no part of this module's parameters or state: its name in
    the configuration is enough. With `t5_finetune`, or as a small T5 of our own, it is trained along. A T5 of
    our own reads "bytes", or "words": those of `t5_words`, with a few tokens for all others.
    """

    def __init__(self, config):
        super().__init__()
        self.name = config.t5
        self.trained = config.t5_finetune or config.t5 in SMALL_T5
        words = config.t5_words.split()
        self.words = {word: n for n, word in enumerate(words, start=LISTED)}
        self.frozen = []            # [T5] once loaded: a list hides it from parameters() and state_dict()
        self._tokenizer = None
        if config.t5 in SMALL_T5:
            self.t5 = small_t5(config)
            width = config.t5_dim
        elif self.trained:
            self.t5 = load_t5(config.t5)
            width = self.t5.config.d_model
        else:
            width = T5_WIDTHS.get(config.t5) or t5_config(config.t5).d_model
        self.proj = nn.Linear(width, config.dim)

    def encoder(self):
        """The T5 encoder on the device of the projection; a frozen one is loaded when first needed."""
        if self.trained:
            return self.t5
        if not self.frozen:
            t5 = load_t5(self.name).eval()
            self.frozen.append(t5.requires_grad_(False))
        t5, device = self.frozen[0], self.proj.weight.device
        if t5.device != device:
            t5.to(device)
        return t5

    def tokenize(self, texts):
        """Texts -> token ids (B, n) and their mask (B, n) bool, right-padded, an end token closing each."""
        if self.name in SMALL_T5:
            return self.tokenize_small(texts)
        # 512 tokens is what T5 was trained on; a text of 4,000 words is cut, not refused
        tokenizer = self.tokenizer()
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=512)
        return inputs["input_ids"], inputs["attention_mask"].bool()

    def tokenize_small(self, texts):
        """For a T5 of our own: 0 padding, 1 end; byte + 3 as ByT5, or `word_id`."""
        rows = []
        for text in texts:
            if self.name == "bytes":
                ids = [byte + 3 for byte in text.encode()]
            else:
                words = re.findall(r"\w+|[^\w\s]+", text.lower())
                ids = [word_id(word, self.words) for word in words]
            ids = ids[:511] + [1]
            rows.append(torch.tensor(ids))
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return padded, padded != 0

    def tokenizer(self):
        """The tokenizer of transformers, loaded when first needed."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name, self.words)
        return self._tokenizer

    def forward(self, texts):
        """B descriptions -> Frames: values (B, n, D), mask (B, n) of the tokens that each item has, times.

        A missing, empty or wholly dropped text is one frame of zeros: the end token of "". (Audiocraft
        pads it to the longest text of the batch with further zeros.) Tokens have the times -1, -2, ...,
        which is a choice of ours.
        """
        device = self.proj.weight.device
        # a command line may hold bytes that are not UTF-8, which no tokenizer takes
        texts = [(text or "").encode(errors="replace").decode() for text in texts]
        ids, mask = self.tokenize(texts)                                    # (B, n)
        ids, mask = ids.to(device), mask.to(device)
        given = torch.tensor([bool(text) for text in texts])
        given = given.to(device)[:, None]                                   # (B, 1)
        # T5 stays in float32: its feed-forward leaves the range of float16. A row without a token gives NaN.
        learns = self.trained and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns), torch.autocast(device.type, enabled=False):
            output = self.encoder()(input_ids=ids, attention_mask=mask.long())
        hidden = output.last_hidden_state.to(self.proj.weight.dtype)
        frames = self.proj(hidden)                                          # (B, n, D)
        frames = frames * (mask & given)[..., None].to(frames.dtype)
        time = -1 - torch.arange(ids.shape[1], device=device, dtype=torch.float32)  # before the music
        return Frames(frames, mask, time)


# --- melody -----------------------------------------------------------------------------------------------

class ChromaConditioner(nn.Module):
    """Chromagram (chroma.py) -> frames of the language model's width: a linear layer, and the null melody."""

    def __init__(self, config):
        super().__init__()
        self.null = config.null_melody
        self.shape = config.chroma_frames, config.melody_classes            # M, Q
        self.hop = config.hop / config.stride                               # columns per chroma frame
        self.proj = nn.Linear(config.melody_classes, config.dim)

    def forward(self, melodies):
        """B chroma (M, Q), or None where an item has no melody -> Frames: values (B, M, D), mask, times."""
        weight = self.proj.weight
        given = torch.tensor([melody is not None for melody in melodies])
        given = given.to(weight.device)                                     # (B,)
        nothing = weight.new_zeros(self.shape)
        chroma = torch.stack([nothing if melody is None else melody.to(nothing) for melody in melodies])
        frames = null_melody(self.proj, chroma, given, self.null)
        B, M, _ = frames.shape
        mask = torch.ones(B, M, dtype=torch.bool, device=weight.device)
        time = torch.arange(M, device=weight.device, dtype=torch.float32) * self.hop
        return Frames(frames, mask, time)


def null_melody(proj, chroma, given, kind):
    """Projects chroma (B, M, Q) to (B, M, D), with "no melody" where given (B,) is False.

    kind "zeros": frames of zeros, which are still attended to. So audiocraft trains, and our models train and
    sample. kind "c": the projection of one-hot C in every frame. In generation audiocraft gives the released
    models the chroma of silence, which is C, with and without guidance, and so does transformers. Both kinds
    keep the M frames of training, so that positions never move.
    """
    given = given[:, None, None]                                            # (B, 1, 1)
    zeros = torch.zeros_like(chroma[..., 0], dtype=torch.long)
    c = F.one_hot(zeros, chroma.shape[-1]).to(chroma.dtype)
    frames = proj(torch.where(given, chroma, c))                            # (B, M, D)
    return frames * given.to(frames.dtype) if kind == "zeros" else frames


# --- both -------------------------------------------------------------------------------------------------

class Conditioners(nn.Module):
    """Text and melody of a batch -> Conditions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text = T5Conditioner(config) if config.text != "none" else None
        self.melody = ChromaConditioner(config) if config.melody != "none" else None

    def forward(self, conditions, S=1, guidance=False):
        """{"text": B strings or None, "melody": B chroma (M, Q) or None} -> Conditions for S columns.

        guidance: a batch of 2B is returned, the items, then the same items without text and melody, each
        keeping the number of frames it had.
        """
        parts = []      # (way into the model, Frames); the melody comes first in the prefix
        if self.melody is not None:
            melodies = list(conditions["melody"])
            if guidance:
                melodies += [None] * len(melodies)
            parts.append((self.config.melody, self.melody(melodies)))
        if self.text is not None:
            text = self.text(conditions["text"])
            if guidance:
                values = torch.cat([text.values, torch.zeros_like(text.values)])
                mask = torch.cat([text.mask, text.mask])
                text = Frames(values, mask, text.time)
            parts.append((self.config.text, text))
        return fuse(parts, S)


def fuse(parts, S):
    """[(way into the model, Frames)] -> Conditions for S columns of music."""
    prefix = [frames for way, frames in parts if way == "prepend"]
    cross = [frames for way, frames in parts if way == "cross"]
    added = [mean(frames) for way, frames in parts if way == "sum"]
    added += [stretched(frames, S) for way, frames in parts if way == "interpolate"]
    cross_frames, cross_mask, _ = joined(cross)
    total = sum(added) if added else None
    return Conditions(*joined(prefix), cross_frames, cross_mask, total)


def joined(several):
    """Several Frames, one behind the other -> values, mask and time of all, or three times None."""
    if not several:
        return None, None, None
    values, mask, time = zip(*several)
    values, mask = torch.cat(values, 1), torch.cat(mask, 1)
    return values, mask, torch.cat(time)


def mean(frames):
    """The mean over the frames that an item has, (B, 1, D). Audiocraft sums one frame a condition."""
    count = frames.mask.sum(1, keepdim=True).to(frames.values.dtype)
    return (frames.values.sum(1) / count)[:, None]


def stretched(frames, S):
    """The frames that an item has, stretched to S columns by nearest neighbor, (B, S, D)."""
    count = frames.mask.sum(1, keepdim=True)                                # (B, 1)
    nearest = torch.arange(S, device=count.device) * count // S             # (B, S)
    D = frames.values.shape[-1]
    index = nearest[..., None].expand(-1, -1, D)
    return frames.values.gather(1, index)


def padding_last(x, angles, prefix_mask):
    """Moves padding of the prefix to the end of its row, where causal attention cannot see it.

    x (B, n, D), angles (B, n, E/2) or None, prefix_mask (B, P) bool -> x, angles, and the way back: for each
    place of the old row where its frame is now, (B, n).
    """
    S = x.shape[1] - prefix_mask.shape[1]
    real = F.pad(prefix_mask, (0, S), value=True)                           # (B, n)
    order = (~real).byte().argsort(dim=1, stable=True)
    x = x.gather(1, order[..., None].expand_as(x))
    if angles is not None:
        angles = angles.gather(1, order[..., None].expand_as(angles))
    return x, angles, order.argsort(dim=1)


def demo():
    config = Config(dim=16, num_heads=2, num_layers=1, t5="bytes", segment_duration=2.0)
    torch.manual_seed(0)
    M = config.chroma_frames
    scale = F.one_hot(torch.arange(M) % 12, 12).float()
    texts = ["slow flute", "loud", None]
    conditioners = Conditioners(config).eval()
    with torch.no_grad():
        conditions = conditioners({"text": texts, "melody": [scale, None, scale]})
    print("the prefix: melody frames, then text tokens")
    print("(# a frame, 0 a frame of zeros, . padding that nobody attends to)\n")
    for text, frames, mask in zip(texts, conditions.prefix, conditions.prefix_mask):
        sizes = frames.abs().sum(1)
        cells = ["." if not m else "#" if size > 0 else "0" for size, m in zip(sizes, mask)]
        print(f"  {str(text):>10}  {''.join(cells[:M])} | {''.join(cells[M:])}")


if __name__ == "__main__":
    demo()
