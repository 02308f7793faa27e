"""The page to hum into: its server, asked as a browser or a stranger would ask, and the page in a browser.

    python -m pytest tests/test_serve.py
"""
import base64
import http.client
import io
import itertools
import json
import runpy
import shlex
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import soundfile

from browser import CHROMIUM, Browser
from commands import command, refused, sample_main, worked
from config import Config
from constants import LM, RATE, tone
from encodec import EncodecModel
from lm import LMModel
from sample import MusicGen
from system.errors import UserError
from tools import studio
from tools.server import MAX_UPLOAD, open_server

EVIL = """<img src=x onerror="document.title='evil'"> "quoted" 'text' & <b>"""
SHORT = {"text": "a flute", "duration": 0.1}
LONG = {"text": "a flute", "duration": 300}


@pytest.fixture()
def server(loaded, world):
    """A server of the world's model."""
    with running(loaded, world / "lm") as server:
        yield server


class running:
    """Inside, a server of a model answers at `address`; its Studio is `studio`."""

    def __init__(self, model, checkpoint):
        loading = {"checkpoint": str(checkpoint), "device": "cpu", "dtype": "float32", "compile": False}
        self.context = open_server(model, loading, 0)

    def __enter__(self):
        self.server = self.context.__enter__()
        self.studio = self.server.RequestHandlerClass.args[0]
        self.address = self.server.server_address
        self.url = f"http://127.0.0.1:{self.address[1]}/"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.context.__exit__(*error)

    def ask(self, method, path, body=None, **headers):
        """Sends a request -> the connection, and the answer, of which only the head is read."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        body = json.dumps(body) if isinstance(body, dict) else body
        connection.request(method, path, body, {name.replace("_", "-"): v for name, v in headers.items()})
        return connection, connection.getresponse()

    def get(self, path, **headers):
        """-> status, content."""
        connection, answer = self.ask("GET", path, **headers)
        with closing(connection):
            return answer.status, answer.read()

    def post(self, path, body, **headers):
        """-> status, the JSON of the answer."""
        connection, answer = self.ask("POST", path, body, **headers)
        with closing(connection):
            return answer.status, json.loads(answer.read())

    def play(self, wish) -> list[dict]:
        """All events of a wish."""
        connection, answer = self.ask("POST", "/play", wish)
        with closing(connection):
            return [json.loads(line) for line in answer]

    def begin(self, wish):
        """A wish until its first sound or its place in the queue -> connection, answer, last event."""
        connection, answer = self.ask("POST", "/play", wish)
        for line in answer:
            event = json.loads(line)
            if "audio" in event or event.get("queue"):
                return connection, answer, event


def eventually(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def recording(seconds=0.6, frequency=440.0, rate=RATE) -> bytes:
    with io.BytesIO() as file:
        soundfile.write(file, tone(seconds, rate, frequency=frequency), rate, format="WAV")
        return file.getvalue()


# --- who may ask, and for what ----------------------------------------------------------------------------

def test_the_page_loads_nothing_from_elsewhere(server):
    for path in ("/", "/page.css", "/page.js", "/pictures.js"):
        connection, answer = server.ask("GET", path)
        with closing(connection):
            text = answer.read().decode()
        assert answer.status == 200 and "://" not in text and "innerHTML" not in text, path
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "evil.example:7860"}, {"Host": "127.0.0.1.evil.example"}, {"Host": ""},
    {"Host": "localhost@evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
    {"Origin": "http://localhost:1"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}])
def test_a_page_from_elsewhere_is_refused(server, headers):
    for path in ("/", "/about", "/takes", "/take/1.wav"):
        assert server.get(path, **headers)[0] == 403
    for path in ("/play", "/stop", "/melody"):
        assert server.post(path, SHORT, **headers)[0] == 403
    assert not server.studio.takes and not server.studio.melodies and not server.studio.queue


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:7860", "127.0.0.1:1"])
def test_this_machine_may_ask_through_any_port(server, host):
    assert server.get("/about", Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize("path", [
    "/../sample.py", "/index.html", "/../server.py", "//etc/passwd", "/take/1.py", "/take/../take_1.json",
    "/take/%2e%2e/x.wav", "/take/-1.wav", "/take/1.wav/", "/take/99.wav", "/melody/1.flac", "/take/1", "/?x"])
def test_no_path_leads_anywhere_else(server, path):
    assert server.get(path)[0] == 404
    assert server.post(path, SHORT)[0] == 404


def test_only_this_machine_is_listened_to(server):
    assert server.address[0] == "127.0.0.1"
    with pytest.raises(UserError, match="port"):
        with open_server(None, {}, server.address[1]):
            pass


@pytest.mark.parametrize("flags, named", [
    (["--text", "x"], "--text"), (["--loop"], "--loop"), (["--out", "x.wav"], "--out")])
def test_what_a_take_is_to_be_is_told_on_the_page(flags, named):
    refused(command(sample_main, "--serve", *flags), "--serve", named, "--dtype --compile alone")


@pytest.mark.parametrize("port", ["-1", "65536", "x", "1.5"])
def test_a_port_is_a_number(port):
    refused(command(sample_main, f"--serve={port}"), "--serve")


# --- melodies ---------------------------------------------------------------------------------------------

def test_a_recording_becomes_a_melody(server, loaded):
    status, told = server.post("/melody", recording(0.6, frequency=1760.0))
    assert status == 200 and told["seconds"] == 0.6 and not told["notes"]
    assert set(told["classes"]) == {9}      # A
    wav, rate = soundfile.read(io.BytesIO(server.get(f"/melody/{told['melody']}.wav")[1]))
    assert rate == RATE and len(wav) == 0.6 * RATE


@pytest.mark.parametrize("content", [b"no sound, but text", b"", b"RIFF\0\0\0\0WAVE", recording()[:44]])
def test_what_is_no_recording_is_refused(server, content):
    status, told = server.post("/melody", content)
    assert status == 400 and told["error"].startswith("the recording: ") and "tmp" not in told["error"]
    assert not server.studio.melodies and not list(server.studio.folder.iterdir())


def test_an_upload_is_bounded(server, monkeypatch):
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    with closing(connection):        # refused before it is sent
        connection.putrequest("POST", "/melody")
        connection.putheader("Content-Length", str(MAX_UPLOAD + 1))
        connection.endheaders()
        assert connection.getresponse().status == 413
    for header in ({"Transfer_Encoding": "chunked"}, {"Content_Length": "-1"}, {"Content_Length": "1e3"}):
        assert server.post("/melody", b"", **header)[0] == 413
    monkeypatch.setattr(studio, "MAX_MELODY", 0.5)
    _, told = server.post("/melody", recording(0.8))
    assert told["seconds"] == 0.5 and "its first" in told["notes"][0]
    _, told = server.post("/melody", recording(0.4)[:-160])
    assert "the recording: 0.39 s were read" in told["notes"][0] and "/tmp" not in told["notes"][0]


def test_of_many_melodies_the_oldest_are_forgotten(server, monkeypatch):
    monkeypatch.setattr(studio, "MAX_MELODIES", 2)
    numbers = [server.post("/melody", recording(0.1))[1]["melody"] for _ in range(3)]
    assert [server.get(f"/melody/{n}.wav")[0] for n in numbers] == [404, 200, 200]
    assert "record it anew" in server.play(SHORT | {"melody": numbers[0]})[-1]["error"]


def test_a_text_model_has_no_melody(world):
    with running(MusicGen.from_pretrained(world / "text", "cpu"), world / "text") as server:
        about = json.loads(server.get("/about")[1])
        assert about["text"] and not about["melody"]
        assert "text only" in server.post("/melody", recording())[1]["error"]
        assert server.play(SHORT)[-1]["done"]["finished"]


# --- music ------------------------------------------------------------------------------------------------

def sound(events) -> np.ndarray:
    """The samples (L,) of a mono take's events."""
    pieces = [base64.b64decode(event["audio"]) for event in events if "audio" in event]
    return np.frombuffer(b"".join(pieces), "<i2") / 32768


def test_music_comes_in_pieces_and_is_kept(server, model, tmp_path, monkeypatch):
    """What is heard is what is saved in every format, and what the command in the JSON makes."""
    number = server.post("/melody", recording())[1]["melody"]
    wish = {"text": EVIL, "melody": number, "duration": 0.6, "seed": 5, "guidance": 2, "top_k": 7}
    events = server.play(wish)
    begun, done = events[1], events[-1]["done"]
    assert events[0] == {"job": 1, "queue": 0} and begun["take"] == 1 and len(begun["classes"]) > 5
    assert sum("audio" in event for event in events) > 1
    heard = sound(events)
    assert len(heard) == 0.6 * RATE and done["finished"] and done["seconds"] == 0.6
    for kind in ("flac", "ogg", "mp3", "wav"):
        content = server.get(f"/take/1.{kind}")[1]
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            assert file.title.startswith("<img src=x") and file.comment == "AI-generated"
        saved, rate = soundfile.read(io.BytesIO(content))
        assert rate == RATE and np.abs(saved).max() > 0
        if kind in ("wav", "flac"):
            assert np.abs(saved * np.abs(heard).max() / np.abs(saved).max() - heard).max() < 2e-4
    about = json.loads(server.get("/take/1.json")[1])
    assert about["text"] == EVIL and about["seed"] == 5 and about["settings"]["guidance"] == 2
    assert about["dtype"] == "float32" and "--device cpu" in about["command"]       # how it was loaded
    (tmp_path / f"melody_{number}.wav").write_bytes(server.get(f"/melody/{number}.wav")[1])
    monkeypatch.chdir(tmp_path)
    worked(command(sample_main, *shlex.split(about["command"])[2:]))       # it makes the same file again
    assert np.abs(soundfile.read("take_1.wav")[0] - soundfile.read(io.BytesIO(content))[0]).max() < 1e-3
    assert json.loads(server.get("/takes")[1]) == [done]


def test_a_new_setting_can_be_wished_for(monkeypatch):
    """A line in SETTINGS is enough: its limits are those of its key of the configuration."""
    monkeypatch.setitem(studio.SETTINGS, "start", "start_p")
    fresh = runpy.run_path(studio.__file__)
    assert set(studio.SETTINGS) <= set(fresh["check_wish"]({}))
    assert fresh["check_wish"]({"start": 0.5})["start"] == 0.5
    with pytest.raises(UserError, match="start: must be a number from 0 to 1"):
        fresh["check_wish"]({"start": 2})


def test_notes(server):
    events = server.play(SHORT | {"notes": "c4 a4", "bpm": 600, "duration": 1.0})
    assert [pitch for pitch, _ in itertools.groupby(events[1]["classes"])] == [0, 9] * 2 + [0] and \
        events[-1]["done"]["finished"]
    about = json.loads(server.get("/take/1.json")[1])
    assert about["notes"] == "c4 a4" and about["bpm"] == 600 and "--notes 'c4 a4'" in about["command"]
    assert server.play(SHORT | {"notes": "c4 h4"})[-1]["error"].startswith("notes: bar 1, note 2")


def test_a_take_is_continued(server):
    first = server.play(SHORT | {"duration": 0.5})[-1]["done"]
    events = server.play(SHORT | {"duration": 0.4, "continue": first["take"]})
    assert events[1]["continues_at"] == 0.5 and events[-1]["done"]["seconds"] == pytest.approx(0.9)
    about = json.loads(server.get("/take/2.json")[1])
    assert about["prompt"] == "take_1.wav" and about["duration"] == 0.9
    assert "no longer kept" in server.play(SHORT | {"continue": 77})[-1]["error"]


@pytest.mark.parametrize("wish, named", [
    ({"text": 3}, "text"), ({"text": "x" * 1001}, "text"), ({"notes": "c" * 10_001}, "notes"),
    ({"duration": 301}, "duration"), ({"duration": 0}, "duration"), ({"duration": "5"}, "duration"),
    ({"duration": float("nan")}, "duration"), ({"seed": -1}, "seed"), ({"seed": 1.5}, "seed"),
    ({"seed": True}, "seed"), ({"melody": "../x"}, "melody"), ({"continue": 1e99}, "continue"),
    ({"guidance": float("inf")}, "guidance"), ({"top_p": 2}, "top_p"), ({"bpm": 90}, "bpm"),
    ({"melody": 1, "notes": "c"}, "melody"), ({"out": "/etc/x"}, "out"),
    ("[]", "JSON object"), ("{", "JSON object"), ("[" * 60_000, "JSON object"), ("", "JSON object"),
    ('{"seed": ' + "9" * 5000 + "}", "seed|JSON object")])
def test_a_bad_wish_is_told(server, wish, named):
    status, told = server.post("/play", wish)
    assert status == 400 and any(name in told["error"] for name in named.split("|")), told
    assert not server.studio.queue


def test_one_at_a_time_and_the_others_see_their_place(server):
    """A tab that is closed ends its own work: in the queue at once, in the making with what is there."""
    first, _, _ = server.begin(LONG)
    second, _, event = server.begin(LONG)
    assert event["queue"] == 1
    third, answer, event = server.begin(SHORT)
    assert event["queue"] == 2
    second.close()
    eventually(lambda: len(server.studio.queue) == 2)
    first.close()
    events = [json.loads(line) for line in answer]
    third.close()
    assert events[-1]["done"]["finished"]
    eventually(lambda: not server.studio.queue)
    partial, whole = server.studio.list_takes()
    assert not partial["finished"] and 0 < partial["seconds"] < 300 and whole["finished"]


def test_stop(server):
    """It ends a take in the making, which is kept as far as it came, and one that waits."""
    first, answer, _ = server.begin(LONG)
    waiting, waiting_answer, event = server.begin(LONG)
    server.post("/stop", {"job": event["job"]})
    assert json.loads(list(waiting_answer)[-1]) == {"done": None}
    server.post("/stop", {"job": 1})
    events = [json.loads(line) for line in answer]
    first.close(), waiting.close()
    assert not events[-1]["done"]["finished"] and list(server.studio.takes) == [1]
    assert server.get("/take/1.wav")[0] == 200


def test_the_queue_is_bounded(server, monkeypatch):
    monkeypatch.setattr(studio, "MAX_WAITING", 1)
    first, _, _ = server.begin(LONG)
    status, told = server.post("/play", SHORT)
    first.close()
    assert status == 400 and "waiting" in told["error"]


def test_twenty_at_once_and_many_in_a_row(server, monkeypatch):
    """No take is lost; of many, the oldest are forgotten, which is told; nothing else is left."""
    monkeypatch.setattr(studio, "MAX_TAKES", 20)
    before = threading.active_count()
    ends = []
    threads = [threading.Thread(target=lambda: ends.append(server.play(SHORT)[-1])) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(end["done"]["take"] for end in ends) == list(range(1, 21))
    ends += [server.play(SHORT)[-1] for _ in range(5)]
    assert [n for end in ends for n in end["forgotten"]] == list(range(1, 6))
    assert len(server.studio.takes) == 20
    files = {f"take_{n}{suffix}" for n in server.studio.takes for suffix in (".wav", ".json")}
    assert {path.name for path in server.studio.folder.iterdir()} == files
    eventually(lambda: threading.active_count() <= before + 1)      # the one that works


# --- in a browser -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def words_model(world, tmp_path_factory):
    """A model whose T5 knows words, which the page offers."""
    lm = LMModel(Config(**LM | dict(t5="words", t5_words="flute organ slow 75", eval_tunes=True))).eval()
    return MusicGen(lm, EncodecModel.from_pretrained(world / "codec"))


STATUS = "document.getElementById('status').textContent"
NAMELESS = """[...document.querySelectorAll("button, input, a, audio, summary, canvas")].filter(e =>
  e.checkVisibility() && !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
  .map(e => e.outerHTML)"""


def record_hum(browser):
    browser.click("#record")
    browser.wait("/Done, (0.[6-9]|[1-9])/.test(document.getElementById('record').textContent)")
    browser.click("#record")
    browser.wait(f"{STATUS}.startsWith('Melody ready')")
    assert browser.text("#melody-name").startswith("your recording, ")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome here; apt-get install chromium")
def test_in_a_browser(words_model, world, tmp_path):
    """Records a hum, plays what is made of it, stops, saves, compares, refuses a text file."""
    soundfile.write(tmp_path / "hum.wav", tone(3.0, 16000, frequency=880.0), 16000)
    (tmp_path / "text.txt").write_text("no sound")
    with running(words_model, world / "lm") as server, Browser(tmp_path, tmp_path / "hum.wav") as browser:
        browser.resize(360, 740, "dark")
        browser.open(server.url)
        browser.wait("document.body.dataset.ready")
        assert browser.run("document.documentElement.scrollWidth == document.documentElement.clientWidth")
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
        assert browser.run(NAMELESS) == []

        record_hum(browser)
        classes = server.post("/melody", server.get("/melody/1.wav")[1])[1]["classes"]
        assert max(set(classes), key=classes.count) == 9        # A, as it was hummed

        browser.run("document.getElementById('known').open = true")
        browser.click("#chips button")                          # words: "flute"
        browser.run("document.getElementById('text').focus()")
        browser.call("Input.insertText", text=" line, fifes, " + EVIL)
        told = browser.text("#unknown")
        assert told.startswith("fifes is not known: read as flute. ") and "does not know: img, src" in told
        browser.run("document.getElementById('duration').value = 1")
        browser.press("Enter")                                  # plays it
        browser.wait(f"{STATUS}.startsWith('Playing')")
        browser.wait(f"{STATUS} == 'Take 1 is ready.'")
        take = server.studio.takes[1]
        assert take["finished"] and take["wish"]["melody"] == 1
        assert take["wish"]["text"] == "flute line, fifes, " + EVIL
        assert EVIL in browser.text("#takes b") and browser.run("document.title") == "nanoMusicGen"

        browser.run("document.getElementById('duration').value = 300")
        browser.click("#play")
        browser.wait(f"{STATUS}.startsWith('Playing')")
        browser.press("Escape")                                 # stops it
        browser.wait(f"{STATUS}.startsWith('Stopped; take 2 has ')")
        assert not server.studio.queue and not server.studio.takes[2]["finished"]

        for side, number in ("A", 1), ("B", 2):                 # compares both
            browser.click(f"#take-{number} [data-side={side}]")
        browser.click("#switch")
        browser.wait(f"{STATUS} == 'Playing take 1.'")
        browser.run("document.getElementById('switch').focus()")
        browser.press("x")
        browser.wait(f"{STATUS} == 'Playing take 2.'")

        browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"))
        browser.click("#take-1 [download$=flac]")
        eventually((tmp_path / "saved" / "take_1.flac").is_file)
        assert soundfile.info(tmp_path / "saved" / "take_1.flac").duration == 1

        browser.choose_file("#file", tmp_path / "text.txt")
        browser.wait("document.getElementById('error').textContent")
        assert "cannot be read as audio" in browser.text("#error")
        assert [error for error in browser.errors if "400 (Bad Request)" not in error] == []

        browser.click("#play")                                  # a closed tab ends its work
        browser.wait(f"{STATUS}.startsWith('Playing')")
        browser.close_page()
        eventually(lambda: not server.studio.queue)
