"""The words of texts that a model does not know: those with t5 = "words" know the words of t5_words alone.

    unknown_words(config, ["a techno flute tune"])      # ["techno"]

All others share eight entries, by their spelling, and so do punctuation and fillers that are not listed.
Whether "techno" and "xyzzy" give the same music is chance.

    read_as_known(config, "a saxophone solo")           # "a clarinet solo", {"saxophone": "clarinet"}

So texts that music is made from, and these alone, are given the nearest instrument or tempo that the model
knows, by the table "nearest" of data/words.json. Captions of training data stay as they are.
"""
import re

from config import Config

# neither known nor missed: they hold captions together
FILLERS = set("""a an the and or of in on at to for by with over from this that is it its as like per
    play plays played playing tune tunes melody piece song music track bpm beat beats minute line key pace
    tempo""".split())


def knows_words(config: Config) -> bool:
    return config.text != "none" and config.t5 == "words"


def unknown_words(config: Config, texts) -> list[str]:
    """The words of texts (strings or None) that the model does not know, as often as they occur, in order.

    Of models that read bytes, or T5's own pieces of words, there are none.
    """
    if not knows_words(config):
        return []
    known = FILLERS | set(config.t5_words.split())
    words = [word for text in texts for word in re.findall(r"\w+", (text or "").lower())]
    return [word for word in words if word not in known]


def readings(config: Config) -> dict[str, str]:
    """{instrument or tempo that the model does not know: the nearest that it knows}, with an s behind, too.

    Only a model of the embedded tunes (eval_tunes = True) has any: one that was tuned on other music may have
    learned there what a saxophone is.
    """
    if not (config.eval_tunes and knows_words(config)):
        return {}
    from data.describe import NEAREST       # reads words.json, which no other model needs
    known = set(config.t5_words.split())
    pairs = [(word, name) for name, words in NEAREST.items() if name in known for word in words]
    return {form: name for word, name in pairs for form in (word, word + "s") if form not in known}


def read_as_known(config: Config, text: str | None) -> tuple[str | None, dict[str, str]]:
    """-> the text with the words of `readings` replaced, in any case, and which they were, in lower case."""
    nearest, replaced = readings(config), {}

    def read(match):
        word = match[0].lower()
        replaced[word] = nearest[word]
        return nearest[word]
    if text and nearest:
        text = re.sub(rf"\b({'|'.join(nearest)})\b", read, text, flags=re.IGNORECASE)
    return text, replaced
