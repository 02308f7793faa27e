"""The listening page: one file that holds all it shows, and plays in a real browser.

    python -m pytest tests/test_page.py
"""
import base64
import html.parser
import io
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import soundfile
import torch


import page as P
from helpers import RATE, command, refused, sampling, tone, world, worked  # noqa: F401

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
EVIL = """</pre><script>document.title = "evil"</script> "quoted" 'text' & <b>"""


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """A page of two results and their melody, and the folder of the results."""
    folder = tmp_path_factory.mktemp("page")
    soundfile.write(folder / "tune <1>.wav", tone(1.0), RATE)
    result = sampling(world, "--text", "a slow flute", "--text", EVIL, "--melody", folder / "tune <1>.wav", "--duration", "0.5",
                      "--out", folder / "take.wav", "--page", folder / "page")
    worked(result)
    assert result.out.split("\n")[2] == str(folder / "page" / "index.html")
    return folder


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def read(folder):
    return Reader((folder / "page" / "index.html").read_text(encoding="utf-8"))


def content(uri):
    return base64.b64decode(uri.partition(";base64,")[2])


def test_page_holds_everything(made):
    """Every source is inside the page, and the players play the files that were written."""
    page = read(made)
    assert not page.open
    sources = [a[key] for _, a in page.tags for key in ("src", "href") if key in a]
    assert sources and all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?:|@import|url\(", (made / "page" / "index.html").read_text(encoding="utf-8"))
    sounds = [soundfile.read(io.BytesIO(content(a["src"]))) for tag, a in page.tags if tag == "audio"]
    assert len(sounds) == 3 and all(rate == RATE for _, rate in sounds)
    for (wav, _), name in zip(sounds[1:], ("take_0.wav", "take_1.wav")):
        assert np.abs(wav - soundfile.read(made / name)[0]).max() < 1e-4
    assert np.abs(sounds[0][0] - soundfile.read(made / "tune <1>.wav")[0]).max() < 1e-4
    assert sum(tag == "img" for tag, _ in page.tags) == 2 + 3 + 3       # of the melody; of each result, with what was asked for
    for told in ("a slow flute", EVIL, "tune <1>.wav", "seed 1", "guidance", "python sample.py"):
        assert told in page.text, told


def test_text_is_not_markup(made):
    assert sum(tag == "script" for tag, _ in read(made).tags) == 1


def test_page_is_not_overwritten(made, world, tmp_path):
    before = (made / "page" / "index.html").read_bytes()
    refused(sampling(world, "--text", "x", "--out", tmp_path / "x.wav", "--page", made / "page"), "--page", "--overwrite")
    assert (made / "page" / "index.html").read_bytes() == before and not (tmp_path / "x.wav").exists()


def test_page_of_files(made, tmp_path):
    """data/page.py makes the same page of results that are there; what is no result is refused."""
    worked(command(P.main, tmp_path / "again", made / "take_0.wav", made / "take_1.wav"))
    again = Reader((tmp_path / "again" / "index.html").read_text(encoding="utf-8"))
    assert [t for t in again.tags if t[0] == "img"] == [t for t in read(made).tags if t[0] == "img"]
    refused(command(P.main, tmp_path / "other", made / "tune <1>.wav"), "tune <1>.json")
    (tmp_path / "odd.json").write_text("{}")
    refused(command(P.main, tmp_path / "other", tmp_path / "odd.wav"), "not written by sample.py")
    assert not (tmp_path / "other").exists()


def test_result_without_melody(world, tmp_path):
    worked(sampling(world, "--out", tmp_path / "x.wav", "--duration", "0.2", "--page", tmp_path / "page", checkpoint="text"))
    page = read(tmp_path)
    assert sum(tag == "audio" for tag, _ in page.tags) == 1 and sum(tag == "img" for tag, _ in page.tags) == 2


def test_png():
    """The picture decodes to what was drawn: size, first row on top, colours at both ends."""
    values = np.array([[0.0, 1.0, 2.0], [0.5, -1.0, 0.0]])
    data = P.png(values, ((10, 20, 30), (200, 100, 50)))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        size, kind = int.from_bytes(data[place:place + 4], "big"), data[place + 4:place + 8]
        chunks[kind] = data[place + 8:place + 8 + size]
        assert zlib.crc32(kind + chunks[kind]) == int.from_bytes(data[place + 8 + size:place + 12 + size], "big")
        place += 12 + size
    assert chunks[b"IHDR"] == bytes([0, 0, 0, 3, 0, 0, 0, 2, 8, 3, 0, 0, 0])
    rows, palette = zlib.decompress(chunks[b"IDAT"]), np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    drawn = np.frombuffer(rows, np.uint8).reshape(2, 4)
    assert drawn[:, 0].tolist() == [0, 0] and drawn[0, 1:].tolist() == [0, 63, 63] and drawn[1, 2:].tolist() == [0, 0]
    assert palette[0].tolist() == [10, 20, 30] and palette[63].tolist() == [200, 100, 50] and abs(int(palette[drawn[1, 1]][0]) - 105) <= 2


@pytest.mark.parametrize("seconds", [0.001, 0.05, 40.0])
def test_spectrogram_shows_the_pitch(seconds):
    """A tone of 1 kHz is brightest where 1 kHz is; any length fits the page."""
    rows = P.spectrogram(torch.from_numpy(tone(seconds, 16000, frequency=1000.0).T), 16000)
    assert rows.shape[0] == P.HEIGHT and rows.shape[1] <= P.WIDTH + 1 and rows.max() == 1
    if seconds > 0.01:
        mel = [np.log(1 + hz / 700) for hz in (60, 1000, 6000)]
        assert abs(rows.mean(1).argmax() - (1 - (mel[1] - mel[0]) / (mel[2] - mel[0])) * (P.HEIGHT - 1)) < 4


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here; apt-get install chromium")
def test_in_a_browser(made, tmp_path):
    """A headless browser, without network, decodes every sound and picture; a click in a picture moves the player."""
    check = """<script>
      const audios = [...document.querySelectorAll("audio")], images = [...document.querySelectorAll("img")];
      Promise.all([...audios.map(a => new Promise((yes, no) => { if (a.readyState > 1) yes(); a.onloadeddata = yes; a.onerror = no })),
                   ...images.map(i => i.decode())]).then(() => {
        const place = document.querySelector(".seek"), box = place.getBoundingClientRect();
        place.dispatchEvent(new MouseEvent("click", { clientX: box.left + box.width / 2, bubbles: true }));
        document.body.setAttribute("data-state", ["works", audios.map(a => a.duration.toFixed(2)), audios[0].currentTime.toFixed(2),
          Math.min(...images.map(i => i.naturalWidth)) > 0, document.title,
          document.documentElement.scrollWidth <= innerWidth].join(" "));
      }, error => document.body.setAttribute("data-state", "fails " + error));
    </script></body>"""
    text = (made / "page" / "index.html").read_text(encoding="utf-8").replace("</body>", check)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    result = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=420,800",
                             "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000",
                             "--dump-dom", f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120)
    state = re.search('data-state="([^"]*)"', result.stdout)
    assert state, result.stderr[-2000:]
    assert state[1] == "works 1.00,0.50,0.50 0.50 true nanoMusicGen: 2 pieces of music true", state[1]
