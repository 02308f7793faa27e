"""Adherence: does the music have the melody, instrument, tempo and drums that were asked for?

    python train.py config/tiny.py --eval --split=test      # eval_tunes = True measures this too

For models of the embedded tunes (data/tunes.py). Captions name an instrument, a tempo, and whether there are
drums and bass; the melody is the clip's own tune, played by another instrument. One sample for each, none
picked. What is heard is compared with the notes that were played and with what the words say, never with
what the model was told: notes.py, drums.py, classifiers.py. Each figure stands in a row with columns

    real            clips of test tunes as rendered: the most that there is to reach; the measure errs, too
    codec           the same clips through the codec
    with_melody     samples for texts and melodies
    text_only       samples for texts

Beside these: `out_of_domain_...`, melodies recorded unlike all training clips; `long_...`, pieces of LONG
seconds with drums, in windows; `users_...`, the texts of users_words.json; and the caption gain, by how many
nats a wrong caption makes a clip less likely.
"""
import functools
import json
from pathlib import Path

import numpy as np
import torch

from data import render
from data.notes import pitch_classes
from evaluation.classifiers import INSTRUMENTS, correct, train_classifiers
from evaluation.clips import caption, clip, other_instrument, out_of_domain_recording
from evaluation.drums import drum_figures, has_drums
from evaluation.metrics import chroma_similarity, melody_accuracy
from evaluation.notes import note_figures
from evaluation.probes import log_mel_frechet
from evaluation.waves import BATCH, as_written, codec_roundtrip, encode, flatness, generate, to_batch
from lm import codebook_cross_entropy

ATTRIBUTES = ("instrument", "drums", "tempo")
ALONE = {"bass": False, "chords": None}     # a truth for which notes are measured: a single voice and drums
LONG = 20.0             # s
BEAT = 0.6              # s, where a text says no tempo


# --- the gain of a caption ------------------------------------------------------------------------

def perturbed(truth: dict, attribute: str) -> dict:
    """A truth with another instrument, drums or tempo."""
    if attribute == "drums":
        return truth | {"drums": not truth["drums"]}
    if attribute == "instrument":
        return truth | {"instrument": other_instrument(truth, 4)}
    tempo = {"slow": "fast", "medium": "slow", "fast": "medium"}[truth["tempo"]]
    low, high = render.TEMPI[tempo]
    return truth | {"tempo": tempo, "bpm": (low + high) // 2}


@torch.no_grad()
def nll(lm, codes, texts: list[str], hide: bool) -> float:
    """Negative log-likelihood of clips, codes (B, K, T), given their texts alone: nats a clip.

    hide: the model does not see the codes before the one that it predicts, either.
    """
    T = codes.shape[2]
    total = 0.0
    for first in range(0, len(codes), BATCH):
        part = codes[first:first + BATCH]
        conditions = {"text": texts[first:first + BATCH], "melody": [None] * len(part)}
        sequence, _ = lm.pattern.build(part, lm.special, keep_only_valid_steps=True)  # (B, K, S)
        if hide:
            sequence = torch.full_like(sequence, lm.special)
        logits = lm(sequence, lm.conditioner(conditions, sequence.shape[-1]))
        logits, mask = lm.pattern.revert_logits(logits, T, keep_only_valid_steps=True)
        ce = codebook_cross_entropy(logits, part, mask)  # (K,)
        total += (ce * mask.sum(1)).sum().item() * len(part)
    return total / len(codes)


def caption_gain(lm, codes, truths: list[dict]) -> dict:
    """How much likelier a caption with the right instrument, drums or tempo makes a clip: nats a clip."""
    def captions(truths):
        return [caption(truth, np.random.default_rng(n)) for n, truth in enumerate(truths)]
    figures = {}
    for hide, suffix in ((False, ""), (True, "_codes_hidden")):
        right = nll(lm, codes, captions(truths), hide)
        for attribute in ATTRIBUTES:
            wrong_truths = [perturbed(truth, attribute) for truth in truths]
            wrong = nll(lm, codes, captions(wrong_truths), hide)
            figures[f"caption_gain_{attribute}{suffix}"] = wrong - right
    return figures


# --- the measurement ------------------------------------------------------------------------------

def adherence(model, split: str, count: int) -> dict:
    """Figures of a MusicGen on `count` tunes of a split: {name: {column: figure}}."""
    config, codec = model.config, model.codec
    clips = [clip(config, split, n, **(ALONE if n % 2 else {})) for n in range(count)]
    truths = [asked.truth for asked in clips]
    rng = np.random.default_rng(9)
    texts = [caption(truth, rng) for truth in truths]
    real = to_batch([asked.mix for asked in clips])
    figures = caption_gain(model.lm, encode(codec, real), truths)
    torch.manual_seed(config.seed)
    classifiers = train_classifiers(config, codec)

    melodies = [melody_for(config, split, n, truth) for n, truth in enumerate(truths)]
    sets = {
        "real": real,
        "codec": codec_roundtrip(codec, real),
        "with_melody": generate(model, texts, melodies),
        "text_only": generate(model, texts),
    }
    enter(figures, "real", {"notes_told": notes_told(model, [(asked.mix, asked.notes) for asked in clips])})
    for column, wavs in sets.items():
        enter(figures, column, word_figures(wavs, truths, classifiers, config.sample_rate))
        if column != "text_only":
            enter(figures, column, melody_figures(wavs, clips, config.sample_rate))
        enter(figures, column, chroma_figures(wavs, to_batch(melodies), config))
        others = waves_of(sets["real"])
        others, wavs = (others[::2], others[1::2]) if column == "real" else (others, waves_of(wavs))
        enter(figures, column, {"log_mel_frechet": log_mel_frechet(others, wavs, config.sample_rate)})
    enter(figures, "text_only", {"valid": valid(sets["text_only"], config)})
    alone = [text for text, truth in zip(texts, truths) if is_alone(truth)]
    out_of_domain_figures(figures, model, split, alone[:count // 2])
    long_figures(figures, model, split, max(2, count // 4))
    enter(figures, "text_only", users_figures(model, classifiers))
    return figures


def enter(figures: dict, column: str, values: dict):
    """Puts {name: figure} into a column of the table {name: {column: figure}}."""
    for name, value in values.items():
        figures.setdefault(name, {})[column] = value


def waves_of(wavs) -> list:
    """(B, 1, L) -> B numpy waves (L,)"""
    return list(wavs[:, 0].numpy())


def melody_for(config, split: str, number: int, truth: dict, seconds: float | None = None):
    """The melody of a clip, played by another instrument: it says nothing about the one that is asked for."""
    other = other_instrument(truth, 1 + number % (len(INSTRUMENTS) - 1))
    return clip(config, split, number, seconds, **truth | {"instrument": other}).melody


def is_alone(truth: dict) -> bool:
    """Whether the melody is heard without bass and chords, through which the tracker does not hear."""
    return not any(truth.get(name) for name in ALONE)


def share(values) -> float:
    return float(np.mean(values))


def word_figures(wavs, truths: list[dict], classifiers, sample_rate: int) -> dict:
    """Shares of waves (B, 1, L) that are as the words of their captions say: ATTRIBUTES, by classifiers.

    instrument flute ...    of those for which a flute was asked
    drums_against_words     share with strokes, by evaluation/drums.py, of those that were to have no drums
    """
    right = correct(classifiers, wavs, truths)
    figures = {name: right[name].float().mean().item() for name in ATTRIBUTES}
    for name in INSTRUMENTS:
        rows = [n for n, truth in enumerate(truths) if truth["instrument"] == name]
        if rows:
            figures[f"instrument {name}"] = right["instrument"][rows].float().mean().item()
    drums = []
    for wav, truth in zip(waves_of(wavs), truths):
        if not truth["drums"]:
            drums.append(has_drums(wav, sample_rate, 60 / truth["bpm"]))
    if drums:
        figures["drums_against_words"] = share(drums)
    return figures


def melody_figures(wavs, clips, sample_rate: int) -> dict:
    """What `note_figures` finds in waves (B, 1, L) of the notes of clips; notes_right by instrument, too.

    Of clips without bass and chords alone, through which the tracker does not hear.
    """
    pieces, instruments = [], []
    for wav, asked in zip(waves_of(wavs), clips):
        if is_alone(asked.truth):
            pieces.append((wav, asked.notes))
            instruments.append(asked.truth["instrument"])
    return note_figures(pieces, sample_rate, instruments)


def chroma_figures(wavs, melodies, config) -> dict:
    """Waves (B, 1, L) against the melodies that were given, recordings (B, 1, L), by the measures of others.

    melody_accuracy     MuseControlLite's: pitch classes of short frames, above middle C
    chroma_agreement    MusicGen's chroma cosine similarity: pitch classes of frames of half a second
    chroma_cosine       the same of all twelve classes of a frame, not of the strongest alone
    """
    compare = functools.partial(chroma_similarity, wavs, melodies, config.sample_rate, config.n_chroma,
                                config.radix2_exp)
    return {
        "melody_accuracy": melody_accuracy(wavs, melodies, config.sample_rate),
        "chroma_agreement": compare(argmax=True),
        "chroma_cosine": compare(argmax=False),
    }


def notes_told(model, pieces) -> float:
    """Share of the notes of recordings, (mix (L,), notes) each, whose pitch class the model is told of them.

    In the frame nearest to the middle of a note. What is told wrong here, no model can play right.
    """
    right = []
    for mix, notes in pieces:
        melody = model.melody_chroma(torch.from_numpy(mix))
        melody = pitch_classes(melody, model.config.n_chroma)       # (M, Q)
        for start, length, pitch in notes:
            middle = round((start + length / 2) * model.sample_rate / model.config.hop)
            frame = melody[min(middle, len(melody) - 1)]
            right.append(bool(frame.max() > 0) and int(frame.argmax()) == pitch % 12)
    return share(right)


def valid(wavs, config) -> float:
    """Share of waves (B, 1, L) that are tonal, audible, not clipped and as long as asked for, in a file."""
    wavs = torch.stack([as_written(wav, config.sample_rate) for wav in wavs])
    tonal = flatness(wavs) < 0.1
    audible = wavs.square().mean((1, 2)).sqrt() > 0.01
    unclipped = wavs.abs().amax((1, 2)) < 1
    complete = wavs.shape[2] == round(config.segment_duration * config.sample_rate)
    return (tonal & audible & unclipped & complete).float().mean().item()


def out_of_domain_figures(figures: dict, model, split: str, texts):
    """Texts without bass and chords, melodies recorded unlike any training clip: are the notes played?"""
    rate = model.config.sample_rate
    recordings = [out_of_domain_recording(model.config, split, 2 * n) for n in range(len(texts))]
    wavs = generate(model, texts, [wave for wave, _ in recordings])
    generated = [(wav, notes) for wav, (_, notes) in zip(waves_of(wavs), recordings)]
    enter(figures, "real", {"out_of_domain_notes_told": notes_told(model, recordings)})
    for column, pieces in (("real", recordings), ("with_melody", generated)):
        right = note_figures(pieces, rate)["notes_right"]
        enter(figures, column, {"out_of_domain_notes_right": right})


def long_figures(figures: dict, model, split: str, count: int):
    """Pieces of LONG seconds with drums, half of them with a melody: strokes over time, notes, leaps."""
    config, codec = model.config, model.codec
    clips = [clip(config, split, n, LONG, drums=True, **ALONE) for n in range(count)]
    rng = np.random.default_rng(10)
    texts = [caption(asked.truth, rng) for asked in clips]
    melodies = []
    for n, asked in enumerate(clips[::2]):
        melodies.append(melody_for(config, split, 2 * n, asked.truth, LONG))
    real = to_batch([asked.mix for asked in clips])
    sets = {
        "real": (real, clips),
        "codec": (codec_roundtrip(codec, real), clips),
        "with_melody": (generate(model, texts[::2], melodies, LONG), clips[::2]),
        "text_only": (generate(model, texts[1::2], None, LONG), clips[1::2]),
    }
    for column, (wavs, asked) in sets.items():
        pieces = [(wav, one.beat) for wav, one in zip(waves_of(wavs), asked)]
        values = drum_figures(pieces, config.sample_rate)
        if column != "text_only":
            pieces = [(wav, one.notes) for wav, one in zip(waves_of(wavs), asked)]
            values |= note_figures(pieces, config.sample_rate)
        enter(figures, column, {f"long_{name}": value for name, value in values.items()})


# --- a user's words ---------------------------------------------------------------------------------

OF_INSTRUMENTS = ("names", "synonyms", "unseen")    # kinds of users_words.json; the others are of tempi


@functools.lru_cache(maxsize=1)
def users_words() -> dict:
    """users_words.json, without instruments that there are none of: {kind: [(text, expected)]}."""
    path = Path(__file__).with_name("users_words.json")
    words = json.loads(path.read_text(encoding="utf-8"))
    del words["about"]
    for kind in OF_INSTRUMENTS:
        words[kind] = [(text, names) for text, names in words[kind] if set(names) & set(INSTRUMENTS)]
    return words


def users_figures(model, classifiers) -> dict:
    """One sample for each text of users_words.json: shares that are as expected, and share with drums.

    A tempo is right up to 8 % beyond the expected ones.
    """
    figures, drums = {}, []
    for kind, words in users_words().items():
        wavs = generate(model, [text for text, _ in words])
        instruments, _, tempi = classifiers.predict(wavs)
        right = []
        for (_, expected), instrument, bpm in zip(words, instruments.tolist(), tempi.tolist()):
            if kind in OF_INSTRUMENTS:
                right.append(INSTRUMENTS[instrument] in expected)
            else:
                right.append(expected[0] / 1.08 <= bpm <= expected[1] * 1.08)
        figures[f"users_{kind}"] = share(right)
        drums += [has_drums(wav, model.sample_rate, BEAT) for wav in waves_of(wavs)]
    return figures | {"users_drums_unasked": share(drums)}
