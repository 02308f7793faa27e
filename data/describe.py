"""What was played -> a caption of it in one of many wordings, always true, and the sidecar of a clip.

    describe(truth, rng)        # "A slow flute tune over broken harp chords, no drums."

data/words.json has the words: for each instrument, tempo, mood, accompaniment and style those that users
write, the plainest first. Users name more instruments than the clips have; theirs stand with the nearest one.
Those under "nearest" are in no caption: data/vocabulary.py has the texts of users read as if they named ours.
"""
import json
import re
from pathlib import Path

import numpy as np

WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
NEAREST = WORDS.pop("nearest")      # ours: [words that are read as it]


def all_words(tree=WORDS) -> set:
    """Every word that captions are made of, names of styles and instruments included."""
    if isinstance(tree, dict):
        return set().union(*map(all_words, tree), *map(all_words, tree.values()))
    if isinstance(tree, list):
        return set().union(*map(all_words, tree))
    return set(re.findall(r"\w+", tree.lower())) if isinstance(tree, str) else set()


KNOWN = all_words()


def article(words: str) -> str:
    return ("an " if words[0] in "aeio" or words.startswith(("un", "up")) else "a ") + words


def backing(truth: dict, pick, maybe) -> list[str]:
    """Phrases for what accompanies the melody. Drums are always told: where none are named there are none."""
    phrases = []
    if truth["drums"]:
        phrases.append(pick(WORDS["drums"]))
    elif maybe(0.4):
        phrases.append(pick(WORDS["no drums"]))
    if truth["bass"] and maybe(0.8):
        phrases.append(pick(WORDS["bass"]))
    elif not truth["bass"] and maybe(0.2):
        phrases.append("no bass")
    if truth["chords"] and maybe(0.8):
        name = WORDS["instruments"][truth["chords_on"]][0]
        phrases.append(pick(WORDS["chords"][truth["chords"]]).format(name))
    if not (truth["drums"] or truth["bass"] or truth["chords"]) and maybe(0.6):
        phrases.append(pick(WORDS["alone"]))
    return phrases


def describe(truth: dict, rng: np.random.Generator) -> str:
    """A caption of a clip in one of many wordings. Fields may be left out, but what it says is so."""
    def pick(words):
        return words[int(rng.integers(len(words)))]

    def maybe(probability):
        return rng.random() < probability

    names = WORDS["instruments"][truth["instrument"]]
    name = names[0] if maybe(0.5) else pick(names)
    extras = backing(truth, pick, maybe)
    if maybe(0.1):          # a bare name, as users type it
        return ", ".join([name, *extras])

    adjectives = []
    if truth["soft"] and maybe(0.8):
        adjectives.append(pick(WORDS["soft"]))
    if maybe(0.25):
        adjectives.append(pick(WORDS["moods"][truth["tempo"]][truth["mode"]]))
    if maybe(0.85):
        adjectives.append(pick(WORDS["tempi"][truth["tempo"]]))
    adjectives = " ".join(adjectives)
    styles = [style for style, needs in WORDS["styles"].items()
              if all(truth[key] == value for key, value in needs.items())]
    genre = truth["genre"] + (" tune" if truth["genre"] in ("folk", "classical") else "")
    piece = pick(WORDS["pieces"]) if maybe(0.6) else pick([genre, *styles])

    what = article(f"{adjectives} {piece}".strip())
    appended = f", {adjectives}" if adjectives else ""
    lead = pick((
        article(f"{adjectives} {name} {piece}".strip()),
        f"{what} {pick(('played on', 'for', 'on'))} {name}",
        f"{name} playing {what}",
        f"{name} {piece}{appended}",
        f"{adjectives} {name}".strip(),
        f"{name}{appended}"))

    if maybe(0.5):
        extras.append(pick(("at {} bpm", "{} bpm", "{} beats per minute")).format(truth["bpm"]))
    title = truth["tune"].replace("-", " ")
    if maybe(0.15) and not set(title.split()) & KNOWN:
        extras.append(pick(('called "{}"', "{}", '"{}"')).format(title))    # says nothing of the sound
    if maybe(0.2):
        extras.append(f"in {truth['key']} {truth['mode']}" if maybe(0.6) else f"{truth['mode']} key")
    rng.shuffle(extras)
    if extras and "," not in lead and maybe(0.6) and extras[0].startswith(("with", "over", "at ", "in ")):
        lead = f"{lead} {extras.pop(0)}"
    text = ", ".join([lead, *extras])
    if maybe(0.4):
        text = text[0].upper() + text[1:]
        text += "." if maybe(0.6) else ""
    return text


def sidecar(tune, truth: dict, rng: np.random.Generator) -> dict:
    """The .json beside a clip, as data/prepare.py reads it, with the ground truth for evaluation."""
    drums = "drums" if truth["drums"] else "no drums"
    bass = "bass" if truth["bass"] else "no bass"
    fields = {
        "genre": tune.genre,
        "key": f"{truth['key']} {truth['mode']}",
        "bpm": truth["bpm"],
        "moods": WORDS["moods"][truth["tempo"]][truth["mode"]][:2],
    }
    # some are missing, as in real data
    fields = {key: value for key, value in fields.items() if rng.random() < 0.8}
    return fields | {
        "title": tune.title,
        "artist": tune.origin,
        "instrument": WORDS["instruments"][truth["instrument"]][0],
        "keywords": [truth["tempo"], drums, bass, f"{tune.metre} time"],
        "description": describe(truth, rng),
        "truth": truth,
    }
