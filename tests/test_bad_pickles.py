"""Checkpoints of strangers as pickles: nothing in them is run, and none takes all memory.

    python -m pytest tests/test_bad_pickles.py
"""
import io
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from commands import command, load_codec, load_model, refused
from damage import HUGE, Bomb, archive, saved, zip_bomb

pytestmark = pytest.mark.usefixtures("untouched_world")


class Claim:
    """Pickles as a tensor of this size and stride on a storage of four numbers."""

    def __init__(self, size, stride, dtype=torch.float32):
        self.size, self.stride, self.dtype = size, stride, dtype

    def __reduce__(self):
        storage = torch.zeros(4, dtype=self.dtype).untyped_storage()
        storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=self.dtype, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.size, self.stride, False, {})


def entries_claiming(n: int) -> bytes:
    """A file of torch.save whose storage claims n numbers."""
    data = saved({"x": torch.zeros(4)})
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        files = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    assert files[name].count(b"K\x04") >= 1  # the number of elements, before the tensor's own size
    files[name] = files[name].replace(b"K\x04", b"\x8a\x08" + struct.pack("<q", n), 1)
    return archive(files)


EXPANDED = Claim((2 ** 16, 2 ** 16), (0, 0), torch.float16)     # to 16 GB as float32
PICKLES = {  # in the place of a .bin; bombs would make the file `ran`
    "empty": b"",
    "text": b"hello",
    "zip of nothing": archive({}),
    "zip of text": archive({"a.txt": b"x"}),
    "escaping zip": archive({"../../gone": b"x", "archive/data.pkl": b"x"}),
    "bomb: system": saved(Bomb(os.system, "touch ran")),
    "bomb in a dict": saved({"x": Bomb(os.system, "touch ran")}),
    "bomb: popen": saved({"best_state": Bomb(subprocess.Popen, ("touch", "ran"))}),
    "bomb: eval": saved({"x": Bomb(eval, "open('ran', 'w')")}),
    "bomb: exec": saved({"x": Bomb(exec, "open('ran', 'w')")}),
    "bomb: import": saved({"x": Bomb(__import__, "this")}),
    "bomb: open": saved({"x": Bomb(open, "ran", "w")}),
    "bomb: torch.load": saved({"x": Bomb(torch.load, "ran")}),
    "bare pickle bomb": pickle.dumps(Bomb(os.system, "touch ran")),
    "old pickle bomb": pickle.dumps({"x": Bomb(os.system, "touch ran")}, protocol=0),
    "class": saved({"x": Path("x")}),
    "module": saved(torch.nn.Linear(2, 2)),
    "list": saved([1, 2]),
    "tensor": saved(torch.zeros(3)),
    "no tensors": saved({"x": 1}),
    "nested": saved({"x": {"y": torch.zeros(2)}}),
    "expanded to 2^50": saved({"x": Claim((2 ** 25, 2 ** 25), (0, 0))}),
    "expanded to 16 GB": saved({"audio_encoder.x": EXPANDED, "best_state": {"model": {"x": EXPANDED}},
                                "xp.cfg": "a: 1"}),
    "stride outside": saved({"x": Claim((4, 4), (1000, 1))}),
    "size of 2^50": saved({"x": Claim((2 ** 50,), (1,))}),
    "storage of 2^60": entries_claiming(2 ** 60),
    "storage of 2^40": entries_claiming(2 ** 40),
    "storage negative": entries_claiming(-4),
    "zip bomb": None,   # made when it is used
    "deep pickle": b"\x80\x02" + b"(" * 100_000 + b".",
    "recursive": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "state_dict.bin", "compression_state_dict.bin"])
def test_pickles(world, tmp_path, file, name):
    folder = tmp_path / "model"
    if file == "pytorch_model.bin":
        shutil.copytree(world / "hf", folder)
        (folder / "model.safetensors").unlink()
    else:
        folder.mkdir()
    (folder / file).write_bytes(zip_bomb("archive/data.pkl") if name == "zip bomb" else PICKLES[name])
    refused(command(load_codec if "compression" in file else load_model, folder, cwd=tmp_path), "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- the YAML inside those of audiocraft ------------------------------------------------------------------

CONFIGURATION = """
sample_rate: 8000
channels: 1
dataset: {segment_duration: 0.25}
transformer_lm: {dim: 16, num_heads: 2, num_layers: 1, hidden_scale: 4, n_q: 4, card: 32}
codebooks_pattern: {modeling: delay, delay: {delays: [0, 1, 2, 3]}}
fuser: {prepend: [self_wav, description]}
classifier_free_guidance: {inference_coef: 3.0}
conditioners:
    self_wav: {model: chroma_stem, chroma_stem: {n_chroma: 12, radix2_exp: 8, argmax: true}}
"""
LETTERS = "abcdefghijklmnopqrs"
YAMLS = {  # in its place
    "not YAML": "a: [1",
    "a list": "[1, 2]",
    "empty": "",
    "python": "!!python/object/apply:os.system ['touch ran']",
    "laughs": "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n"
                                         for a, b in zip(LETTERS, LETTERS[1:])),
    "recursive": "&a {transformer_lm: *a}",
    "half": "transformer_lm: {dim: 16}",
    "nested": "[" * 500,
}
VALUES = [  # in it
    ("transformer_lm.dim", HUGE),
    ("transformer_lm.dim", "16"),
    ("transformer_lm.dim", None),
    ("transformer_lm.num_layers", HUGE),
    ("transformer_lm.n_q", [4]),
    ("transformer_lm", 3),
    ("transformer_lm", None),
    ("codebooks_pattern.delay", None),
    ("codebooks_pattern.delay.delays", HUGE),
    ("codebooks_pattern.modeling", "x"),
    ("codebooks_pattern", []),
    ("dataset", None),
    ("dataset.segment_duration", "long"),
    ("dataset.segment_duration", float("nan")),
    ("dataset.segment_duration", HUGE),
    ("fuser", "x"),
    ("fuser.prepend", 3),
    ("conditioners", [1]),
    ("conditioners", {"a": None}),
    ("conditioners", "x"),
    ("conditioners.self_wav.chroma_stem", None),
    ("conditioners.self_wav.chroma_stem.radix2_exp", HUGE),
    ("sample_rate", -1),
    ("channels", "two"),
    ("classifier_free_guidance", 3),
    ("classifier_free_guidance.inference_coef", "much"),
]


def with_value(path: str, value) -> str:
    """The configuration with another value at a path such as "a.b.c"."""
    import yaml
    tree = place = yaml.safe_load(CONFIGURATION)
    *way, last = path.split(".")
    for key in way:
        place = place[key]
    place[last] = value
    return yaml.safe_dump(tree)


@pytest.mark.parametrize("case", [*YAMLS, *VALUES], ids=lambda case: case if isinstance(case, str) else
                         f"{case[0]} = {str(case[1])[:20]}")
def test_configurations_of_audiocraft(tmp_path, case):
    pytest.importorskip("yaml", reason="audiocraft's configuration is YAML")
    text = YAMLS[case] if isinstance(case, str) else with_value(*case)
    torch.save({"best_state": {"x": torch.zeros(2)}, "xp.cfg": text}, tmp_path / "state_dict.bin")
    shutil.copy(tmp_path / "state_dict.bin", tmp_path / "compression_state_dict.bin")
    refused(command(load_model, tmp_path, cwd=tmp_path), str(tmp_path))
    refused(command(load_codec, tmp_path, cwd=tmp_path), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
