"""Places: any name of a file is a name; what may not be read or written is named, and all else goes on.

    python -m pytest tests/test_bad_places.py
"""
import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest

from commands import forked, preparing, refused, sample_main, sampling, train_main, worked
from constants import TRAIN, TRAIN_CODEC, flags
from damage import WAV
from data import prepare

pytestmark = pytest.mark.usefixtures("untouched_world")


# --- names ------------------------------------------------------------------------------------------------

NAMES = [
    "a b",
    "it's",
    'say "x"',
    "new\nline",
    "tab\t",
    "ünï",
    "音楽",
    "🎵",
    "-dash",
    "--text",
    "$(touch gone)",
    "`ls`",
    "a;b",
    "%s%n",
    "{x}",
    "back\\slash",
    " leading",
    "trailing ",
    "dots..",
    "e\u0301",
    "\u202eltr",
    os.fsdecode(b"latin\xff"),
    "#",
    "*",
    "~",
    "x" * 230,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(world, model, tmp_path, name):
    (tmp_path / f"{name}.wav").write_bytes(WAV)
    worked(sampling(world, f"--melody={name}.wav", f"--out=to {name}.wav", cwd=tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}.wav", f"to {name}.wav", f"to {name}.json"}


def test_names_of_files_in_a_folder(world, tmp_path):
    folder = tmp_path / "music"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.wav").write_bytes(WAV)
        (folder / f"{name}.txt").write_text("a tune")
    worked(preparing(world, "music", "out", cwd=tmp_path))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert {track["file"] for track in index["tracks"]} == {f"{name}.wav" for name in NAMES}
    assert all(track["meta"] == {"description": "a tune"} for track in index["tracks"])
    argv = flags(TRAIN, data_dir="out", codec=world / "codec", out_dir="run")
    worked(forked(train_main, *argv, cwd=tmp_path))
    argv = flags(TRAIN_CODEC, data_dir="music", out_dir="run_codec")
    worked(forked(train_main, *argv, cwd=tmp_path))


# --- permissions ------------------------------------------------------------------------------------------

def somebody():
    """Makes this process somebody who may not read and write everything, as root may."""
    if os.geteuid() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)


@pytest.fixture()
def street(world):
    """A folder that everybody may enter, with models and data; what is named secret may not be read."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.chmod(folder, 0o777)
        for name in ("lm", "tokens"):
            shutil.copytree(world / name, folder / name)
            shutil.copytree(world / name, folder / f"secret_{name}")
        (folder / "music").mkdir()
        (folder / "secret").mkdir()
        (folder / "secret.wav").write_bytes(WAV)
        (folder / "secret.npz").write_bytes((world / "take.npz").read_bytes())
        (folder / "secret.py").write_text("dim = 16")
        (folder / "music" / "good.wav").write_bytes(WAV)
        (folder / "music" / "good.txt").write_text("a tune")
        (folder / "music" / "secret.wav").write_bytes(WAV)
        for name in ("secret", "secret.wav", "secret.npz", "secret.py", "music/good.txt", "music/secret.wav",
                     "secret_lm/model.safetensors", "secret_tokens/index.json"):
            os.chmod(folder / name, 0)
        yield folder


SAMPLE = "--device cpu --duration 0.05"
PREPARE = "music --codec lm/codec --radix2_exp 8 --stem none --device cpu"
TRAINING = shlex.join(flags(TRAIN, codec="lm/codec"))
TRAINING_CODEC = shlex.join(flags(TRAIN_CODEC, data_dir="music", out_dir="run"))
FORBIDDEN = {  # a command, its flags, what the sentence names
    "melody": (sample_main, f"{SAMPLE} --checkpoint lm --melody secret.wav", "secret.wav"),
    "prompt": (sample_main, f"{SAMPLE} --checkpoint lm --prompt secret.wav", "secret.wav"),
    "continue_from": (sample_main, f"{SAMPLE} --checkpoint lm --continue_from secret.npz", "secret.npz"),
    "checkpoint": (sample_main, f"{SAMPLE} --checkpoint secret", "secret"),
    "weights": (sample_main, f"{SAMPLE} --checkpoint secret_lm", "secret_lm/model.safetensors"),
    "out": (sample_main, f"{SAMPLE} --checkpoint lm --out secret/x.wav", "secret"),
    "prepare out": (prepare.main, f"{PREPARE} --out secret/out", "secret"),
    "config": (train_main, "secret.py", "secret.py"),
    "train data": (train_main, f"{TRAINING} --data_dir=secret_tokens --out_dir=run", "index.json"),
    "train out": (train_main, f"{TRAINING} --data_dir=tokens --out_dir=secret/run", "secret"),
}
GOES_ON = {  # a command, its flags, its exit code, what stderr names
    "prepare": (prepare.main, f"{PREPARE} --out out", 1, "secret.wav: "),
    "sidecar": (prepare.main, f"{PREPARE} --out out", 1, "good.txt: cannot be read"),
    "codec data": (train_main, TRAINING_CODEC, 0, "secret.wav"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_may_not_be_read_or_written(street, what):
    main, argv, named = FORBIDDEN[what]
    refused(forked(main, *shlex.split(argv), cwd=street, before=somebody), named)


@pytest.mark.parametrize("what", GOES_ON)
def test_what_may_not_be_read_is_passed_over(street, what):
    main, argv, code, named = GOES_ON[what]
    result = forked(main, *shlex.split(argv), cwd=street, before=somebody)
    assert result.code == code and "Traceback" not in result.err and named in result.err, result
