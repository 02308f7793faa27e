"""What the page of tools/server.py asks for: melodies, a queue of wishes, and the takes that come of them.

    studio = Studio(model, {"checkpoint": "checkpoints/tiny"}, folder)
    wish = check_wish({"text": "a slow flute", "duration": 5})
    for event in studio.play(wish):     # {"job", "queue"}, {"take", ...}, {"audio"}, ..., {"done"}
        ...

One take is made at a time. Takes and melodies are files in `folder`; of many, the oldest are forgotten.
"""
import base64
import itertools
import math
import re
import tempfile
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from config import FIELDS
from data.audio import conversion, read_audio, to_int16, write_audio
from data.notes import FASTEST, SLOWEST, parse_notes, pitch_classes
from data.vocabulary import FILLERS, readings
from sampling.melodies import BPM, melody_chroma
from sampling.takes import DEFAULT_CHECKPOINT, SETTINGS, metadata, tags_of
from system.errors import UserError, naming
from system.files import write_atomic

MAX_MELODY, MAX_DURATION = 120.0, 300.0     # seconds of a melody that are used, of music asked for at once
CHUNK = 0.25                                # seconds that are sent at once
MAX_WAITING = 50                            # wishes in the queue
MAX_TAKES, MAX_MELODIES = 50, 50            # kept
MAX_SECONDS = 3600.0                        # of all takes together
NUMBERS = {     # what a wish can say: type, lowest, highest, default
    "duration": (float, 0.1, MAX_DURATION, 10.0), "seed": (int, 0, 2 ** 53, 0),
    "melody": (int, 0, 10 ** 9, None), "continue": (int, 0, 10 ** 9, None),
    "bpm": (float, SLOWEST, FASTEST, None),
    "guidance": (float, -1000, 1000, None)}
for name, key in SETTINGS.items():      # those without a line above have the limits of config.py
    limits = FIELDS[key].metadata
    NUMBERS.setdefault(name, (type(FIELDS[key].default), limits["least"], limits["most"], None))
TEXTS = {"text": 1000, "notes": 10_000}     # characters at most


def check_wish(wish) -> dict:
    """A wish with all of its keys, None for what it leaves open. Raises UserError naming a bad one."""
    if not isinstance(wish, dict):
        raise UserError("a wish is a JSON object")
    unknown = set(wish) - set(NUMBERS) - set(TEXTS)
    if unknown:
        known = ", ".join(NUMBERS | TEXTS)
        raise UserError(f"{sorted(unknown)[0]!r:.40}: no wish has this; known are {known}")
    checked = {}
    for name, longest in TEXTS.items():
        text = wish.get(name) or None
        if text is not None and not (isinstance(text, str) and len(text) <= longest):
            raise UserError(f"{name}: must be text of at most {longest:,} characters")
        checked[name] = text
    for name, (kind, lowest, highest, default) in NUMBERS.items():
        value = default if wish.get(name) is None else wish[name]
        if value is not None:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and lowest <= value <= highest and kind(value) == value):
                whole = "whole " if kind is int else ""
                raise UserError(f"{name}: must be a {whole}number from {lowest:,} to {highest:,}")
            value = kind(value)
        checked[name] = value
    if checked["notes"] and checked["melody"] is not None:
        raise UserError("notes and melody: give one of the two")
    if checked["bpm"] and not checked["notes"]:
        raise UserError("bpm: says how fast the notes are, which are missing")
    return checked


def strongest_classes(melody, n_chroma: int) -> list[int]:
    """Melody (M, Q) -> the strongest pitch class of each frame, -1 where there is none."""
    chroma = pitch_classes(melody, n_chroma)
    silent = chroma.amax(-1) == 0
    return chroma.argmax(-1).masked_fill(silent, -1).tolist()


def without_path(sentence, path) -> str:
    """What is said of a temporary file, as the page is to show it."""
    sentence = re.sub(r"Error opening b'[^']*': ", "", str(sentence))       # of libsndfile
    sentence = sentence.replace(conversion(path), "if a player plays it, convert it to .flac")
    return sentence.replace(str(path), "the recording")


class Job:
    """A wish in the queue; its number becomes that of its take."""

    def __init__(self, number: int):
        self.number, self.stopped = number, False


class Studio:
    """The model, the queue in front of it, and the takes in a folder.

    loading: the flags of sample.py that load this model; the command of each take repeats them.
    """

    def __init__(self, model, loading: dict, folder):
        self.model, self.loading, self.folder = model, loading, Path(folder)
        self.melody_numbers, self.job_numbers = itertools.count(1), itertools.count(1)
        self.changed = threading.Condition()    # guards all that follows
        self.queue = []                         # jobs; the first one is being made
        self.takes = {}                         # number: what the page shows of it; the oldest first
        self.melodies = []                      # numbers; the oldest first
        # one thread does all that takes long, piece by piece: memory does not grow with the requests
        self.worker = ThreadPoolExecutor(1)

    def work(self, function, *args):
        """function(*args) in the thread that works."""
        return self.worker.submit(function, *args).result()

    def about(self) -> dict:
        """What the page must know of the model."""
        config = self.model.config
        words = None
        if config.t5 == "words":
            words = [word for word in config.t5_words.split() if word.isalnum() and word not in FILLERS]
        checkpoint = self.loading["checkpoint"]
        shipped = checkpoint == str(DEFAULT_CHECKPOINT)
        settings = {flag: getattr(config, key) for flag, key in SETTINGS.items()}
        return {"checkpoint": "the shipped model" if shipped else checkpoint,
                "text": config.text != "none", "words": words, "fillers": sorted(FILLERS),
                "readings": readings(config),
                "melody": config.melody != "none",
                "sample_rate": self.model.sample_rate, "settings": settings, "longest": MAX_DURATION}

    # --- melodies -----------------------------------------------------------------------------------------

    def add_melody(self, path) -> dict:
        """An uploaded file becomes a melody. Raises UserError when it cannot be read as audio."""
        if self.model.config.melody == "none":
            raise UserError("this model was trained on text only and takes no melody")
        return self.work(self._add_melody, path)

    def _add_melody(self, path) -> dict:
        notes, rate = [], self.model.sample_rate
        try:
            wav = read_audio(path, rate, 1, duration=MAX_MELODY + 1, tell=notes.append)
        except UserError as error:
            raise UserError(without_path(error, path)) from None
        if wav.shape[1] > MAX_MELODY * rate:
            wav = wav[:, :round(MAX_MELODY * rate)]
            notes.append(f"the recording is long: its first {MAX_MELODY:g} s are used")
        number = next(self.melody_numbers)
        write_audio(self.melody_file(number), wav, rate)
        classes = strongest_classes(self.model.melody_chroma(wav), self.model.config.n_chroma)
        self.melodies.append(number)
        while len(self.melodies) > MAX_MELODIES:
            self.melody_file(self.melodies.pop(0)).unlink()
        return {"melody": number, "seconds": wav.shape[1] / rate, "classes": classes,
                "frame": self.frame_seconds(), "notes": [without_path(note, path) for note in notes]}

    def melody_file(self, number: int) -> Path:
        return self.folder / f"melody_{number}.wav"

    def take_file(self, number: int) -> Path:
        return self.folder / f"take_{number}.wav"

    def read(self, path, channels: int, missing: str):
        if not path.is_file():
            raise UserError(missing)
        return read_audio(path, self.model.sample_rate, channels)

    def frame_seconds(self) -> float:
        return self.model.config.hop / self.model.sample_rate

    # --- music --------------------------------------------------------------------------------------------

    def play(self, wish: dict):
        """A checked wish -> yields events as they come: {"queue"}, {"take"}, {"audio"} and so on, {"done"}.

        Closing the iterator ends the work. Raises UserError, before the first event when the queue is full.
        """
        with self.changed:
            if len(self.queue) >= MAX_WAITING:
                raise UserError(f"{MAX_WAITING} wishes are waiting already; try again in a minute")
            job = Job(next(self.job_numbers))
            self.queue.append(job)
        try:
            yield from self.wait(job)
            if job.stopped:
                yield {"done": None}
            else:
                yield from self.music(job, wish)
        finally:
            with self.changed:
                self.queue.remove(job)
                self.changed.notify_all()

    def wait(self, job):
        """Yields the job's place in the queue, twice a second, until it is the first."""
        def is_due():
            return self.queue[0] is job or job.stopped
        while True:
            with self.changed:
                place = self.queue.index(job)
            yield {"job": job.number, "queue": place}
            with self.changed:
                if self.changed.wait_for(is_due, timeout=0.5):
                    return

    def music(self, job, wish):
        """Yields the events of a wish whose turn it is."""
        waves, about = self.work(self._begin, wish)
        yield {"take": job.number, **about}
        pieces, finished, take, forgotten = [], False, None, []
        try:
            while not job.stopped:
                wave = self.work(next, waves, None)                         # (1, C, l)
                if wave is None:
                    finished = True
                    break
                pieces.append(wave[0])
                samples = to_int16(wave[0].T.numpy()).astype("<i2")         # (l, C)
                yield {"audio": base64.b64encode(samples.tobytes()).decode()}
        finally:
            self.work(waves.close)
            if pieces:
                take, forgotten = self.work(self._keep, job, wish, about, pieces, finished)
        yield {"done": take, "forgotten": forgotten}

    def _begin(self, wish):
        """-> iterator of waves (1, C, l), and what the page must know of them."""
        model, prompt, before = self.model, None, 0.0
        if wish["continue"] is not None:
            earlier = wish["continue"]
            missing = f"take {earlier} is no longer kept"
            wav = self.read(self.take_file(earlier), model.config.channels, missing)
            prompt, before = model.encode_prompt(wav, None, 1), wav.shape[1] / model.sample_rate
        args = self.flags(wish, before + wish["duration"])
        chromas, classes = None, []
        if args.notes or args.melody:
            melody = self.folder / args.melody if args.melody else None
            if melody and not melody.is_file():
                raise UserError(f"melody {wish['melody']} is no longer kept; record it anew")
            with naming("notes"):
                notes = parse_notes(args.notes, args.bpm or BPM) if args.notes else None
            chromas = [melody_chroma(model, args, melody, notes, 0.0)]
            classes = strongest_classes(chromas[0], self.model.config.n_chroma)
            classes = classes[:math.ceil(args.duration / self.frame_seconds())]
        settings = {name: wish[name] for name in SETTINGS if wish[name] is not None}
        codes = model.stream_codes([wish["text"]], chromas, prompt, args.duration, [wish["seed"]], **settings)
        waves = model.decode_stream(codes, args.duration, CHUNK)
        return waves, {"sample_rate": model.sample_rate, "channels": model.config.channels,
                       "classes": classes, "frame": self.frame_seconds(), "duration": args.duration,
                       "continues_at": before}

    def _keep(self, job, wish, about, pieces, finished):
        """Makes a take of what was made, even of a part -> it, and the numbers of takes that had to go."""
        wav, rate = torch.cat(pieces, dim=-1), self.model.sample_rate
        out, args = self.take_file(job.number), self.flags(wish, about["duration"])
        write_audio(out, wav, rate, tags_of(args, wish["text"], wish["seed"]))
        facts = metadata(args, wish["text"], args.notes or args.melody, wish["seed"], Path(out.name),
                         self.model.config)
        write_atomic(out.with_suffix(".json"), facts.encode())
        take = {"take": job.number, "wish": wish, "seconds": wav.shape[1] / rate, "finished": finished,
                "classes": about["classes"], "frame": about["frame"]}
        forgotten = []
        with self.changed:
            self.takes[job.number] = take
            while len(self.takes) > MAX_TAKES or sum(t["seconds"] for t in self.takes.values()) > MAX_SECONDS:
                oldest = next(iter(self.takes))
                del self.takes[oldest]
                for suffix in (".wav", ".json"):
                    self.take_file(oldest).with_suffix(suffix).unlink()
                forgotten.append(oldest)
        return take, forgotten

    def flags(self, wish, duration=None) -> Namespace:
        """What the command line would be given for a wish: files of the studio are named without a folder."""
        melody = None if wish["melody"] is None else self.melody_file(wish["melody"]).name
        prompt = None if wish["continue"] is None else self.take_file(wish["continue"]).name
        settings = {name: wish[name] for name in ("notes", "bpm", *SETTINGS)}
        return Namespace(**self.loading, duration=duration, melody=melody, prompt=prompt, loop=False,
                         stem=None, no_tags=False, **settings)

    def stop(self, number):
        with self.changed:
            for job in self.queue:
                if job.number == number:
                    job.stopped = True
            self.changed.notify_all()

    def close(self):
        """Stops everything, and returns when it has stopped."""
        with self.changed:
            for job in self.queue:
                job.stopped = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.queue)
        self.worker.shutdown()

    def list_takes(self) -> list[dict]:
        with self.changed:
            return list(self.takes.values())

    def file(self, name: str, number: int, kind: str) -> bytes:
        """A take or melody as a file of a format. Raises UserError when it is not there."""
        return self.work(self._file, name, number, kind)

    def _file(self, name, number, kind) -> bytes:
        path = self.folder / f"{name}_{number}.{kind if kind == 'json' else 'wav'}"
        missing = f"{name} {number} is not kept"
        if kind in ("wav", "json"):
            if not path.is_file():
                raise UserError(missing)
            return path.read_bytes()
        wav, tags = self.read(path, self.model.config.channels, missing), {}
        if name == "take":
            wish = self.takes[number]["wish"]
            tags = tags_of(self.flags(wish), wish["text"], wish["seed"])
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / f"{name}.{kind}"
            write_audio(converted, wav, self.model.sample_rate, tags)
            return converted.read_bytes()
