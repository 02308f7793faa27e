"""Prepared data of strangers, and runs to resume: both train, or are refused with nothing damaged.

    python -m pytest tests/test_bad_data.py
"""
import json
import math
import os
import shutil

import pytest

from commands import either, forked, refused, snapshot, train_main, worked
from constants import TRAIN, flags
from damage import HUGE, TEXTS, WEIGHTS, Bomb, header, saved, values, write_odd

pytestmark = pytest.mark.usefixtures("untouched_world")


# --- index.json -------------------------------------------------------------------------------------------

def tracks(**changes):
    """What makes an index.json one whose tracks have other values; None leaves one out."""
    def harm(data):
        changed = [track | changes for track in json.loads(data)["tracks"]]
        for track in changed:
            for key in [key for key, value in track.items() if value is None]:
                del track[key]
        return values(tracks=changed)(data)
    return harm


def meta(**fields):
    return tracks(meta=fields)


INDEXES = {  # what is done to index.json, which is then refused
    **TEXTS,
    "nothing": lambda data: b"{}",
    "no tracks": values(tracks=[]),
    "tracks none": values(tracks=None),
    "tracks text": values(tracks="x"),
    "tracks null": values(tracks=[None]),
    "tracks object": values(tracks={"a": 1}),
    "tracks empty": values(tracks=[{}]),
    "shards none": values(shards=None),
    "shards huge": values(shards=HUGE),
    "shards -1": values(shards=-1),
    "shards 0": values(shards=0),
    "shards text": values(shards="1"),
    "shards nan": values(shards=math.nan),
    "n_q": values(n_q=3),
    "card": values(card=64),
    "stride": values(stride=0),
    "rate": values(sample_rate="8000"),
    "outside": tracks(codes_start=2 ** 40),
    "negative": tracks(codes_start=-5),
    "start float": tracks(codes_start=0.5),
    "frames": tracks(frames=HUGE),
    "frames negative": tracks(frames=-HUGE),
    "frames text": tracks(frames="9"),
    "frames none": tracks(frames=None),
    "frames nan": tracks(frames=math.nan),
    "frames float": tracks(frames=200.5),
    "frames 0": tracks(frames=0),
    "frames true": tracks(frames=True),
    "chroma outside": tracks(chroma_start=HUGE),
    "chroma negative": tracks(chroma_start=-1),
    "chroma frames": tracks(chroma_frames=HUGE),
    "chroma frames negative": tracks(chroma_frames=-3),
    "shard": tracks(shard=7),
    "shard negative": tracks(shard=-1),
    "shard text": tracks(shard="../x"),
    "weight": tracks(weight="heavy"),
    "weight nan": tracks(weight=math.nan),
    "weight inf": tracks(weight=math.inf),
    "weight negative": tracks(weight=-1),
    "weight list": tracks(weight=[1]),
    "file none": tracks(file=None),
    "file list": tracks(file=["a"]),
    "meta none": tracks(meta=None),
    "meta text": tracks(meta="x"),
    "meta list": tracks(meta=[1]),
}
HARMLESS = {  # that may work
    "hop": values(hop=-64),
    "chroma 0": tracks(chroma_frames=0),
    "file escapes": tracks(file="../../x"),
    "description": meta(description=3),
    "description list": meta(description=["x"]),
    "description huge": meta(description="word " * 100_000),
    "surrogate": meta(description="\ud800"),
    "moods": meta(description="x", moods=[1, None]),
    "moods object": meta(moods={"a": 1}),
    "key object": meta(key={}, bpm=[]),
    "meta null": meta(description=None, moods=None),
}


@pytest.mark.parametrize("name", INDEXES | HARMLESS)
def test_prepared_data_of_strangers(world, tmp_path, name):
    folder = shutil.copytree(world / "tokens", tmp_path / "tokens")
    (folder / "index.json").write_bytes((INDEXES | HARMLESS)[name]((folder / "index.json").read_bytes()))
    before = snapshot(folder)
    argv = flags(TRAIN, data_dir=folder, codec=world / "codec", out_dir=tmp_path / "run", batch_size=4,
                 merge_text_p=0.5, drop_other_p=1.0, word_dropout=0.0, cfg_dropout=0.0)
    result = forked(train_main, *argv)
    (refused if name in INDEXES else either)(result, str(folder))
    assert snapshot(folder) == before


# --- shards -----------------------------------------------------------------------------------------------

CODES, CHROMA, INDEX = "codes.00000.u16", "chroma.00000.u8", "index.json"
SHARDS = [
    (CODES, "missing"),
    (CODES, "empty"),
    (CODES, "odd"),
    (CODES, "short"),
    (CODES, "too large"),
    (CODES, "folder"),
    (CODES, "pipe"),
    (CHROMA, "missing"),
    (CHROMA, "empty"),
    (CHROMA, "short"),
    (CHROMA, "too large"),
    (CHROMA, "pipe"),
    (INDEX, "missing"),
    (INDEX, "folder"),
    (INDEX, "pipe"),
    (INDEX, "device"),
]


@pytest.mark.parametrize("file, harm", SHARDS)
def test_damaged_shards(world, tmp_path, file, harm):
    path = shutil.copytree(world / "tokens", tmp_path / "tokens") / file
    data = path.read_bytes()
    contents = {"empty": b"", "odd": data[:-3], "short": data[:100], "too large": b"\xff" * len(data)}
    path.unlink()
    if harm in contents:
        path.write_bytes(contents[harm])
    elif harm != "missing":
        write_odd(path, harm)
    argv = flags(TRAIN, data_dir=tmp_path / "tokens", codec=world / "codec", out_dir=tmp_path / "run",
                 melody_dropout=0.0, cfg_dropout=0.0, batch_size=8)
    refused(forked(train_main, *argv, seconds=20), "tokens")


# --- runs to resume ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def half_a_run(world, tmp_path_factory):
    """Half of a run: its folder, and the flags that go on with it."""
    out = tmp_path_factory.mktemp("half") / "run"
    argv = flags(TRAIN, data_dir=world / "tokens", codec=world / "codec")
    worked(forked(train_main, *argv, f"--out_dir={out}"))
    return out, [*argv, "--updates_per_epoch=4", "--resume"]


def metadata(**changes):
    """What changes the metadata of a state."""
    def change(fields):
        info = json.loads(fields["__metadata__"]["info"])
        fields["__metadata__"] = {"info": json.dumps(info | changes)}
    return header(change)


STATES = {  # what is done to state.safetensors, which is then refused
    "empty": WEIGHTS["empty"],
    "cut in the header": WEIGHTS["cut in the header"],
    "cut in the data": WEIGHTS["cut in the data"],
    "last byte missing": WEIGHTS["last byte missing"],
    "header of 1 TB": WEIGHTS["header of 1 TB"],
    "not JSON": WEIGHTS["not JSON"],
    "offset outside": WEIGHTS["offset outside"],
    "shape of 2^60": WEIGHTS["shape of 2^60"],
    "page": WEIGHTS["page"],
    "missing": WEIGHTS["missing"],
    "surplus": WEIGHTS["surplus"],
    "transposed": WEIGHTS["transposed"],
    "scalar": WEIGHTS["scalar"],
    "flipped 5": WEIGHTS["flipped 5"],
    "flipped 60": WEIGHTS["flipped 60"],
    "no tensors": WEIGHTS["no tensors"],
    "pickle": lambda data: saved({"x": Bomb(os.system, "touch ran")}),
    "no metadata": header(lambda fields: fields.update(__metadata__={})),
    "update text": metadata(update="x"),
    "update negative": metadata(update=-3),
    "update none": metadata(update=None),
    "ema_count": metadata(ema_count="x"),
}
HARMLESS_STATES = {
    "update huge": metadata(update=HUGE),
    "scaler": metadata(scaler=3),
}


@pytest.mark.parametrize("name", STATES | HARMLESS_STATES)
def test_damaged_states_to_resume(half_a_run, tmp_path, name):
    run, argv = half_a_run
    out = shutil.copytree(run, tmp_path / "run")
    path = out / "state.safetensors"
    path.write_bytes((STATES | HARMLESS_STATES)[name](path.read_bytes()))
    before = snapshot(out)
    result = forked(train_main, *argv, f"--out_dir={out}", cwd=tmp_path)
    (refused if name in STATES else either)(result, "state.safetensors")
    assert result.code == 0 or snapshot(out) == before, "nothing that existed is damaged"
    assert not (tmp_path / "ran").exists()


METRICS = {  # what stands behind the lines of metrics.jsonl
    "garbage": b"garbage\n{\n{}\n",
    "half a line": b'{"update": 1, "sp',
    "binary": bytes(range(256)),
    "other": b'{"x": 1}\n[]\n3}\n',
    "empty": b"",
}


@pytest.mark.parametrize("name", METRICS)
def test_damaged_metrics_do_not_stop_a_run(half_a_run, tmp_path, name):
    run, argv = half_a_run
    out = shutil.copytree(run, tmp_path / "run")
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(METRICS[name])
    worked(forked(train_main, *argv, f"--out_dir={out}"))
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["update"] == 4


RESUMED = {  # --resume with other flags: what the sentence names
    "other shape": ("--dim=32", "state.safetensors"),
    "other task": ("--task=codec", ""),
    "other optimizer": ("--optim=adamw", "state.safetensors"),
    "another model there": ("--out_dir={world}/hf", "already holds"),
    "somebody's file": ("--out_dir=somebody", "somebody"),
    "somebody's folder": ("--out_dir=somebody's", "somebody's"),
    "below a file": ("--out_dir=somebody/x", "somebody"),
}
STARTED = {  # a new run
    "init_from nothing": ("--init_from=nowhere/at/all", "nowhere"),
    "init_from a codec": ("--init_from={world}/codec", "codec"),
}


@pytest.mark.parametrize("name", RESUMED | STARTED)
def test_runs_that_do_not_fit(world, half_a_run, tmp_path, name):
    run, argv = half_a_run
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "somebody").write_text("a file")
    (tmp_path / "somebody's").mkdir()
    (tmp_path / "somebody's" / "config.json").write_text('{"colour": "blue"}')
    before = snapshot(tmp_path)
    if name in RESUMED:
        argv = [*argv, "--out_dir=run"]
    else:
        argv = [*argv[:-1], "--out_dir=new"]    # without --resume
    flag, named = (RESUMED | STARTED)[name]
    refused(forked(train_main, *argv, flag.format(world=world), cwd=tmp_path), named)
    after = snapshot(tmp_path)
    assert all(after[path] == look for path, look in before.items() if path.is_file())
