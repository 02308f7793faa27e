"""What is known of recordings: the fields of captions cleaned, read in any encoding, and from manifests.

    python -m pytest tests/test_captions.py
"""
import json

import pytest

from data.captions import clean, scan


@pytest.mark.parametrize("content, meta", [
    (dict(title=" A Song ", artist="None", description="", genre="Folk", instrument="FLUTE", key="A Minor"),
     dict(title="A Song", genre="folk", instrument="flute", key="a minor")),
    (dict(bpm="120"), dict(bpm=120.0)),
    (dict(key="C, D", bpm="fast", moods="Happy, calm\tsoft", keywords=["One", " two words ", ""]),
     dict(moods=["happy", "calm", "soft"], keywords=["one", "two words"])),
    (dict(title=5, artist=["x"], description={"a": 1}, bpm=float("inf"), moods=3, keywords=[None, 1, "k"]),
     dict(title="5", keywords=["k"])),
    (dict(description="x" * 20000, genre=None, bpm=True, moods=[]), dict(description="x" * 10000)),
    (dict(description="half \ud800 a pair"), dict(description="half ? a pair")),
])
def test_captions_are_cleaned(content, meta):
    assert clean(json.loads(json.dumps(content))) == meta


def as_json(data: bytes, text: str, kind: str) -> bytes:
    """The description `text`, as the bytes `data` have it, in a sidecar or manifest of the same encoding."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        value = {"file_name": "a.wav", "text": text, "description": text}
        return json.dumps(value, ensure_ascii=False).encode("utf-16")
    fields = b'{"file_name": "a.wav", "text": "%s"}' if kind == "jsonl" else b'{"description": "%s"}'
    bom = data[:3] if data[:3] == b"\xef\xbb\xbf" else b""
    return bom + fields % data[len(bom):].replace(b"\n", b"")


@pytest.mark.parametrize("data, text", [
    pytest.param("flûte".encode(), "flûte", id="utf-8"),
    pytest.param("flûte".encode("utf-8-sig"), "flûte", id="bom"),
    pytest.param("flûte".encode("utf-16"), "flûte", id="utf-16"),
    pytest.param("flûte".encode("latin-1"), "flûte", id="latin-1"),
    pytest.param(b"", None, id="empty"),
    pytest.param(b"  \n", None, id="blank"),
    pytest.param(b"\x89PNG\0\0\x01", None, id="binary"),
    pytest.param(b"a" * 11_000_000, "a" * 10_000, id="huge"),
])
@pytest.mark.parametrize("kind", ["txt", "json", "jsonl"])
def test_captions_in_any_encoding(tmp_path, data, text, kind):
    (tmp_path / "a.wav").touch()
    name = "metadata.jsonl" if kind == "jsonl" else f"a.{kind}"
    (tmp_path / name).write_bytes(data if kind == "txt" else as_json(data, text, kind))
    found, complaints = scan(tmp_path)
    if kind == "json" and len(data) > 10_000_000:
        assert found[0].meta == {} and "larger than" in complaints[0]
    else:
        assert found[0].meta.get("description") == text
        assert len(complaints) == (b"\0" in data and b"PNG" in data)


@pytest.mark.parametrize("content", [
    "{",
    "[1, 2]",
    pytest.param("[" * 100_000, id="deep"),
    '"text"',
    "{'a': 1}",
    "\0\1",
    pytest.param('{"bpm": %s}' % ("9" * 5000), id="a number of 5000 digits"),
])
def test_broken_sidecars_are_named_and_the_recording_is_used(tmp_path, content):
    (tmp_path / "a.wav").touch()
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "a.txt").write_text("a tune")
    found, complaints = scan(tmp_path)
    assert found[0].meta == {"description": "a tune"} and not found[0].problem
    assert len(complaints) == 1 and complaints[0].startswith("a.json: ")


LINES = [
    dict(file_name="a.wav", text="first", genre="Folk"),
    dict(file_name="a.wav", text="second"),
    dict(text="who?"),
    dict(file_name="../b.wav", text="x"),
    dict(file_name="/etc/passwd", text="x"),
    dict(file_name="no.wav", text="x"),
    dict(file_name="sub/../b.wav", text="b"),
    [1],
]
COMPLAINTS = [
    "line 2: a.wav was named before",
    "line 3: has no file_name",
    "line 4: '../b.wav' does not lie",
    "line 5: '/etc/passwd'",
    "line 8: should be",
    "line 10: is not valid JSON",
    "no.wav: named in",
    "a.wav: its weight '-1'",
]


def test_manifest(tmp_path):
    for name in ("a.wav", "b.wav", "sub/c.wav", "d.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n\n{\n")
    (tmp_path / "sub/metadata.jsonl").write_text(json.dumps(dict(file_name="c.wav", text="c")))
    (tmp_path / "a.json").write_text(json.dumps(dict(genre="jazz", weight=-1)))
    found, complaints = scan(tmp_path)
    assert {track.file: track.meta for track in found} == {
        "a.wav": {"description": "first", "genre": "jazz"},
        "b.wav": {"description": "b"},
        "d.wav": {},
        "sub/c.wav": {"description": "c"},
    }
    assert [track.file for track in found] == ["a.wav", "b.wav", "d.wav", "sub/c.wav"]
    assert found[0].weight == 1.0
    for part in COMPLAINTS:
        assert any(part in complaint for complaint in complaints), part
    assert len(complaints) == len(COMPLAINTS)
