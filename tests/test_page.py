"""The listening page: one file that holds all it shows, and plays in a real browser.

    python -m pytest tests/test_page.py
"""
import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import soundfile
import torch

from commands import command, refused, sampling, worked
from constants import RATE, tone
from tools import page

BROWSERS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome",
                                            "google-chrome-stable")]
BROWSER = next(filter(None, BROWSERS), None)
EVIL = """</pre><script>document.title = "evil"</script> "quoted" 'text' & <b>"""


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """A page of two results and their melody, and the folder of the results."""
    folder = tmp_path_factory.mktemp("page")
    soundfile.write(folder / "tune <1>.wav", tone(1.0), RATE)
    result = sampling(world, "--text", "a slow flute", "--text", EVIL, "--melody", folder / "tune <1>.wav",
                      "--duration", "0.5", "--out", folder / "take.wav", "--page", folder / "page")
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

    def attributes(self, wanted: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == wanted]


def source_of(folder) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def read(folder) -> Reader:
    return Reader(source_of(folder))


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition(";base64,")[2])


def test_page_holds_everything(made):
    """Every source is inside the page, and the players play the files that were written."""
    reader = read(made / "page")
    assert not reader.open
    sources = [a[key] for _, a in reader.tags for key in ("src", "href") if key in a]
    assert sources and all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?:|@import|url\(", source_of(made / "page"))
    sounds = [soundfile.read(io.BytesIO(content(audio["src"]))) for audio in reader.attributes("audio")]
    assert len(sounds) == 3 and all(rate == RATE for _, rate in sounds)
    for (wav, _), name in zip(sounds, ("tune <1>.wav", "take_0.wav", "take_1.wav")):
        assert np.abs(wav - soundfile.read(made / name)[0]).max() < 1e-4
    # of the melody; of each result, with what was asked for
    assert len(reader.attributes("img")) == 2 + 3 + 3
    for part in ("a slow flute", EVIL, "tune <1>.wav", "seed 1", "guidance", "python sample.py"):
        assert part in reader.text, part


def test_text_is_not_markup(made):
    assert len(read(made / "page").attributes("script")) == 1


def test_page_is_not_overwritten(made, world, tmp_path):
    before = source_of(made / "page")
    result = sampling(world, "--text", "x", "--out", tmp_path / "x.wav", "--page", made / "page")
    refused(result, "--page", "--overwrite")
    assert source_of(made / "page") == before and not (tmp_path / "x.wav").exists()


def test_page_of_files(made, tmp_path):
    """tools/page.py makes the same page of results that are there; what is no result is refused."""
    worked(command(page.main, tmp_path / "again", made / "take_0.wav", made / "take_1.wav"))
    assert read(tmp_path / "again").attributes("img") == read(made / "page").attributes("img")
    refused(command(page.main, tmp_path / "other", made / "tune <1>.wav"), "tune <1>.json")
    (tmp_path / "odd.json").write_text("{}")
    refused(command(page.main, tmp_path / "other", tmp_path / "odd.wav"), "not written by sample.py")
    assert not (tmp_path / "other").exists()


def test_page_of_an_mp3(made, tmp_path):
    """What is compressed already is in the page as it is."""
    wav, rate = soundfile.read(made / "take_0.wav")
    soundfile.write(tmp_path / "take.MP3", wav, 16000, format="MP3")
    shutil.copy(made / "take_0.json", tmp_path / "take.json")
    worked(command(page.main, tmp_path / "page", tmp_path / "take.MP3"))
    source = read(tmp_path / "page").attributes("audio")[-1]["src"]
    assert source.startswith("data:audio/mpeg;") and content(source) == (tmp_path / "take.MP3").read_bytes()


@pytest.mark.parametrize("changes", [
    dict(melody_form="notes"),                      # heard_notes takes the place of the extractor of chroma
    dict(harmonic_sum=True), dict(harmonic_sum=False),      # of former versions
    dict(n_chroma=16), dict(n_chroma=24, melody_form="notes")])
def test_pages_of_models_that_are_told_melodies_in_other_forms(made, tmp_path, changes):
    """... beside a result of the same melody in the usual form: it is shown as either model hears it."""
    shutil.copy(made / "take_0.wav", tmp_path)
    facts = json.loads((made / "take_0.json").read_text(encoding="utf-8"))
    facts["config"] |= changes
    (tmp_path / "take_0.json").write_text(json.dumps(facts), encoding="utf-8")
    for others in ([], [made / "take_1.wav"]):
        folder = tmp_path / f"page{len(others)}"
        worked(command(page.main, folder, tmp_path / "take_0.wav", *others))
        melodies = 2 if others and any(changes.values()) else 1
        assert len(read(folder).attributes("img")) == 2 * melodies + 3 + 3 * len(others)
    images = read(tmp_path / "page0").attributes("img")
    heights = [int.from_bytes(chunks_of(content(image["src"]))[b"IHDR"][4:8], "big") for image in images]
    classes = changes.get("n_chroma", 12)
    assert heights == [page.HEIGHT, classes, page.HEIGHT, classes, classes]


def test_result_without_melody(world, tmp_path):
    worked(sampling(world, "--out", tmp_path / "x.wav", "--duration", "0.2", "--page", tmp_path / "page",
                    checkpoint="text"))
    reader = read(tmp_path / "page")
    assert len(reader.attributes("audio")) == 1 and len(reader.attributes("img")) == 2


def chunks_of(png: bytes) -> dict[bytes, bytes]:
    """The parts of a PNG file by kind, their checksums verified."""
    chunks, place = {}, 8
    while place < len(png):
        size, kind = int.from_bytes(png[place:place + 4], "big"), png[place + 4:place + 8]
        end = place + 8 + size
        chunks[kind] = png[place + 8:end]
        assert zlib.crc32(kind + chunks[kind]) == int.from_bytes(png[end:end + 4], "big")
        place = end + 4
    return chunks


def test_png():
    """The picture decodes to what was drawn: size, first row on top, colors at both ends."""
    values = np.array([[0.0, 1.0, 2.0], [0.5, -1.0, 0.0]])
    png = page.png(values, ((10, 20, 30), (200, 100, 50)))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = chunks_of(png)
    assert chunks[b"IHDR"] == bytes([0, 0, 0, 3, 0, 0, 0, 2, 8, 3, 0, 0, 0])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(2, 4)
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    assert rows[:, 0].tolist() == [0, 0]
    assert rows[0, 1:].tolist() == [0, 63, 63] and rows[1, 2:].tolist() == [0, 0]
    assert palette[0].tolist() == [10, 20, 30] and palette[63].tolist() == [200, 100, 50]
    assert abs(int(palette[rows[1, 1]][0]) - 105) <= 2


@pytest.mark.parametrize("seconds", [0.001, 0.05, 40.0])
def test_spectrogram_shows_the_pitch(seconds):
    """A tone of 1 kHz is brightest where 1 kHz is; any length fits the page."""
    wav = torch.from_numpy(tone(seconds, 16000, frequency=1000.0).T)
    rows = page.spectrogram(wav, 16000)
    assert rows.shape[0] == page.HEIGHT and rows.shape[1] <= page.WIDTH + 1 and rows.max() == 1
    if seconds > 0.01:
        low, middle, high = (np.log(1 + hz / 700) for hz in (60, 1000, 6000))
        row = (1 - (middle - low) / (high - low)) * (page.HEIGHT - 1)
        assert abs(rows.mean(1).argmax() - row) < 4


CHECK = """<script>
  const audios = [...document.querySelectorAll("audio")];
  const images = [...document.querySelectorAll("img")];
  const loaded = audio => new Promise((yes, no) => {
    if (audio.readyState > 1) yes();
    audio.onloadeddata = yes;
    audio.onerror = no;
  });
  const report = state => document.body.setAttribute("data-state", state);
  Promise.all([...audios.map(loaded), ...images.map(image => image.decode())]).then(() => {
    const place = document.querySelector(".seek"), box = place.getBoundingClientRect();
    place.dispatchEvent(new MouseEvent("click", { clientX: box.left + box.width / 2, bubbles: true }));
    report(["works", audios.map(audio => audio.duration.toFixed(2)), audios[0].currentTime.toFixed(2),
      Math.min(...images.map(image => image.naturalWidth)) > 0, document.title,
      document.documentElement.scrollWidth <= innerWidth].join(" "));
  }, error => report("fails " + error));
</script></body>"""
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=420,800",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000", "--dump-dom"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here; apt-get install chromium")
def test_in_a_browser(made, tmp_path):
    """A headless browser, offline, decodes every sound and picture; a click in one moves the player."""
    path = tmp_path / "page.html"
    path.write_text(source_of(made / "page").replace("</body>", CHECK), encoding="utf-8")
    argv = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"file://{path}"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    state = re.search('data-state="([^"]*)"', result.stdout)
    assert state, result.stderr[-2000:]
    assert state[1] == "works 1.00,0.50,0.50 0.50 true nanoMusicGen: 2 pieces of music true", state[1]


def test_page_does_not_tell_where_the_project_lies(made, tmp_path):
    """... neither a new one nor the one in docs/."""
    shutil.copy(made / "take_0.wav", tmp_path)
    facts = json.loads((made / "take_0.json").read_text(encoding="utf-8"))
    facts["checkpoint"] = str(page.ROOT / "checkpoints" / "tiny")
    (tmp_path / "take_0.json").write_text(json.dumps(facts), encoding="utf-8")
    worked(command(page.main, tmp_path / "page", tmp_path / "take_0.wav"))
    for folder in (tmp_path / "page", page.ROOT / "docs" / "listen"):
        cells = re.findall(r"<td>checkpoint</td><td>(.*?)</td>", source_of(folder))
        assert [cell.replace("\\", "/") for cell in cells] == ["checkpoints/tiny"]
