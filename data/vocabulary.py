"""The words of texts that a model does not know: those with t5 = "words" know the words of t5_words alone.

    unknown_words(config, ["a techno flute tune"])      # ["techno"]

All others share eight entries, by their spelling, and so do punctuation and fillers that are not listed.
Whether "techno" and "xyzzy" give the same music is chance.
"""
import re

from config import Config

# neither known nor missed: they hold captions together
FILLERS = set("""a an the and or of in on at to for by with over from this that is it its as like per
    play plays played playing tune tunes melody piece song music track bpm beat beats minute line key pace
    tempo""".split())


def unknown_words(config: Config, texts) -> list[str]:
    """The words of texts (strings or None) that the model does not know, as often as they occur, in order.

    Of models that read bytes, or T5's own pieces of words, there are none.
    """
    if config.text == "none" or config.t5 != "words":
        return []
    known = FILLERS | set(config.t5_words.split())
    words = [word for text in texts for word in re.findall(r"\w+", (text or "").lower())]
    return [word for word in words if word not in known]
