"""Bad checkpoints: damaged, contradictory or malicious files of a model are refused, naming its directory.

    python -m pytest tests/test_bad_checkpoints.py      # pickles: test_bad_pickles.py
"""
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import command, either, load_codec, load_model, refused, sampling, snapshot, worked
from damage import HUGE, ODD, TEXTS, WEIGHTS, flipped, largest, tensors, values, write_odd
from sample import MusicGen

pytestmark = pytest.mark.usefixtures("untouched_world")


def loader(file: str):
    """The command that reads a file of a checkpoint."""
    return load_codec if file.startswith("codec/") else load_model


# --- weights ----------------------------------------------------------------------------------------------

HARMLESS = {  # what is done to model.safetensors that may work, if the result is right
    "float8": largest(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "float64": largest(lambda tensor: tensor.double()),
    "half": tensors(lambda state, name: state.update({name: state[name].half() for name in state})),
    "one bfloat16": largest(lambda tensor: tensor.bfloat16()),
    "flipped in the data": lambda data: flipped(data, len(data) - 100, bits=1),
}
FILES = [("lm", "model.safetensors"), ("lm", "codec/model.safetensors"), ("hf", "model.safetensors")]


@pytest.mark.parametrize("harm", WEIGHTS | HARMLESS)
@pytest.mark.parametrize("kind, file", FILES, ids=["lm", "codec", "hf"])
def test_damaged_weights(world, tmp_path, kind, file, harm):
    path = shutil.copytree(world / kind, tmp_path / "model") / file
    path.write_bytes((WEIGHTS | HARMLESS)[harm](path.read_bytes()))
    before = snapshot(tmp_path)
    result = command(loader(file), path.parent)
    if harm in WEIGHTS:
        refused(result, str(path.parent))
    else:
        either(result, str(path.parent))
    assert snapshot(tmp_path) == before


SCALES = {  # what is done to a scale of a compact checkpoint
    "scalar": lambda scale: torch.tensor(1.0),
    "longer": lambda scale: torch.ones(len(scale) + 1),
    "matrix": lambda scale: torch.ones(len(scale), 2),
    "nan": lambda scale: scale * math.nan,
    "integers": lambda scale: scale.long(),
    "empty": lambda scale: scale[:0],
    "huge": lambda scale: torch.ones(2 ** 20),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_a_compact_checkpoint(world, tmp_path, name):
    MusicGen.from_pretrained(world / "lm", "cpu").save(tmp_path / "model", compact=True)
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    scale = next(key for key in state if key.endswith(".scale"))
    save_file(state | {scale: SCALES[name](state[scale]).contiguous()}, path)
    refused(command(load_model, tmp_path / "model"), "model")


@pytest.mark.parametrize("kind", [*ODD, "gone"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "codec/config.json",
                                  "codec/model.safetensors", "codec"])
def test_what_is_no_file_in_a_checkpoint(world, tmp_path, file, kind):
    path = shutil.copytree(world / "lm", tmp_path / "model") / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind != "gone":
        write_odd(path, ODD[kind])
    # without a folder codec the one that config.json names is looked for
    named = "codec" if file == "codec" and kind != "folder.wav" else "model"
    refused(command(load_model, tmp_path / "model", seconds=20), named)


# --- our config.json --------------------------------------------------------------------------------------

def replaced(*pairs):
    """What puts other bytes in the place of some."""
    def harm(data):
        for old, new in pairs:
            data = data.replace(old, new)
        return data
    return harm


CONFIGS = {  # what is done to config.json, of a codec or a language model
    **TEXTS,
    "nothing": lambda data: b"{}",
    "unknown key": values(batchsize=3),
    "text": values(dim="16"),
    "float": values(n_q=4.0),
    "bool": values(num_layers=True),
    "null value": replaced((b'"dim": 16', b'"dim": null'), (b'"dimension": 8', b'"dimension": null')),
    "negative": values(card=-1),
    "zero": values(n_q=0),
    "nan": replaced((b'"sample_rate": 8000', b'"sample_rate": NaN')),
    "infinite": values(sample_rate=math.inf),
    "long number": replaced((b"8000", b"9" * 5000)),
    "ratios text": values(ratios="54"),
    "ratios nested": values(ratios=[[5], 4]),
    "ratios none": values(ratios=[]),
    "ratios many": values(ratios=[2] * 100_000),
    "ratios huge": values(ratios=[HUGE, 4]),
    "ratios zero": values(ratios=[0, 4]),
    "other card": values(card=64),
    "other ratios": values(ratios=[4, 4]),
    "other n_q": values(n_q=3, delays=[0, 1, 2]),
    "not a choice": values(pad_mode="wrap"),
    "norm": values(norm="none"),
    "card": values(card=HUGE),
    "n_q": values(n_q=HUGE),
    "sample_rate": values(sample_rate=HUGE),
    "dimension": values(dimension=HUGE),
    "n_filters": values(n_filters=HUGE),
    "lstm": values(lstm=HUGE),
    "n_residual_layers": values(n_residual_layers=HUGE),
    "kernel_size": values(kernel_size=HUGE),
    "text of 10 MB": values(pad_mode="x" * 10_000_000),
    "key of 1 MB": values(**{"x" * 1_000_000: 1}),
    "code": values(pad_mode="__import__('os').system('touch ran')"),
}
OF_THE_CODEC = ("norm", "dimension", "other ratios", "card")    # a language model need not look at them


@pytest.mark.parametrize("harm", CONFIGS)
@pytest.mark.parametrize("file", ["codec/config.json", "config.json"], ids=["codec", "lm"])
def test_damaged_configurations(world, tmp_path, file, harm):
    path = shutil.copytree(world / "lm", tmp_path / "model") / file
    path.write_bytes(CONFIGS[harm](path.read_bytes()))
    result = command(loader(file), path.parent, cwd=tmp_path)
    if file == "config.json" and harm in OF_THE_CODEC:
        either(result, str(path.parent))
    else:
        refused(result, str(path.parent))
    assert not (tmp_path / "ran").exists()


LM_CONFIGS = {  # keys of a language model with other values: what the sentence names
    "dim": (dict(dim=HUGE), "dim = "),
    "dim odd": (dict(dim=17), "dim = 17"),
    "dim other": (dict(dim=32), "model"),
    "dim largest": (dict(dim=2 ** 16), "model"),
    "num_layers": (dict(num_layers=HUGE), "num_layers = "),
    "num_layers more": (dict(num_layers=200), "model"),
    "hidden_scale": (dict(hidden_scale=HUGE), "hidden_scale = "),
    "heads": (dict(num_heads=3), "num_heads = 3"),
    "t5_layers": (dict(t5_layers=HUGE), "t5_layers = "),
    "t5_dim": (dict(t5_dim=HUGE), "t5_dim = "),
    "t5 folder": (dict(t5="/etc"), "/etc"),
    "t5 above": (dict(t5="../../.."), "../../.."),
    "t5 hub": (dict(t5="nobody/there-is-none"), "nobody/there-is-none"),
    "t5 odd": (dict(t5="-rf /; x"), "-rf /; x"),
    "n_chroma": (dict(n_chroma=HUGE), "n_chroma = "),
    "n_chroma 0": (dict(n_chroma=0), "n_chroma = 0"),
    "delays": (dict(delays=[0, 1, 2, HUGE]), "delays = "),
    "delays few": (dict(delays=[0]), "delays = "),
    "delays negative": (dict(delays=[0, -1, 0, 0]), "delays = "),
    "radix2_exp": (dict(radix2_exp=60), "radix2_exp = 60"),
    "text": (dict(text="sideways"), "text = 'sideways'"),
    "melody": (dict(melody="cross"), "model"),
    "no melody": (dict(melody="none"), "model"),
    "pattern": (dict(pattern="spiral"), "pattern = 'spiral'"),
    "segment_duration": (dict(segment_duration=1e300), "segment_duration = 1e+300"),
    "positional": (dict(positional_embedding="none"), "positional_embedding = 'none'"),
    "channels": (dict(channels=9), "channels = 9"),
    "temperature": (dict(temperature=-1), "temperature = -1"),
    "qk": (dict(qk_layer_norm=True), "model"),
}


@pytest.mark.parametrize("harm", LM_CONFIGS)
def test_damaged_configurations_of_a_language_model(world, tmp_path, harm):
    path = shutil.copytree(world / "lm", tmp_path / "model") / "config.json"
    changes, named = LM_CONFIGS[harm]
    path.write_bytes(values(**changes)(path.read_bytes()))
    argv = ["--checkpoint", path.parent, "--melody", world / "audio" / "0.wav"]
    refused(sampling(world, *argv, cwd=tmp_path), "" if harm.startswith("t5 ") else "model", named)


# --- files of transformers --------------------------------------------------------------------------------

def in_part(part: str, key: str, value):
    """What gives a key of a part of a JSON object another value."""
    def harm(data):
        config = json.loads(data)
        config[part][key] = value
        return json.dumps(config).encode()
    return harm


HF = {  # what is done to its config.json
    **TEXTS,
    "nothing": lambda data: b"{}",
    "other model": values(model_type="bert"),
    "no such model": values(model_type="x"),
    "model_type list": values(model_type=["musicgen"]),
    "no decoder": values(decoder=None),
    "decoder text": values(decoder="x"),
    "decoder list": values(decoder=[]),
    "codec text": values(audio_encoder="x"),
    "codec other": values(audio_encoder={"model_type": "dac"}),
    "codec empty": values(audio_encoder={}),
    "text encoder": values(text_encoder={"model_type": "bert"}),
    "text encoder text": values(text_encoder="x"),
    "chroma": values(num_chroma=HUGE),
    "chroma text": values(num_chroma="x"),
    "chroma_length": values(chroma_length=-1),
    "remote code": values(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
                          model_type="evil"),
}
DECODER = {  # keys of its part `decoder`: values, each of which is refused
    "hidden_size": [HUGE, "x", -1, 0, None, 32, 1.5],
    "num_hidden_layers": [HUGE, "x", -1, 0],
    "num_attention_heads": [0, 3, "x"],
    "ffn_dim": [HUGE, -1],
    "num_codebooks": [HUGE, 0, 5, "x"],
    "vocab_size": [HUGE, -1, 64],
    "activation_function": ["relu", "os.system"],
    "audio_channels": [0, 9],
    "scale_embedding": [True],
}
CODEC = {  # keys of its part `audio_encoder`
    "sampling_rate": [HUGE, 0, "x"],
    "upsampling_ratios": [[HUGE], [], "x", [0]],
    "num_filters": [HUGE, -1],
    "hidden_size": [HUGE, "x"],
    "codebook_size": [0, 64, HUGE],
    "target_bandwidths": [[], "x", [1e300]],
    "num_lstm_layers": [HUGE],
    "normalize": [True],
    "norm_type": ["none"],
}
for key, bad in DECODER.items():
    HF |= {f"{key} {value}": in_part("decoder", key, value) for value in bad}
for key, bad in CODEC.items():
    HF |= {f"codec {key} {value}": in_part("audio_encoder", key, value) for value in bad}


def write_evil(folder, ran):
    """A module that makes the file `ran` when it is imported."""
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')")


@pytest.mark.parametrize("harm", HF)
def test_damaged_configurations_of_transformers(world, tmp_path, harm):
    path = shutil.copytree(world / "hf", tmp_path / "model") / "config.json"
    write_evil(path.parent, tmp_path / "ran")
    path.write_bytes(HF[harm](path.read_bytes()))
    refused(command(load_model, path.parent, cwd=tmp_path), "model")
    assert not (tmp_path / "ran").exists()


REMOTE = {"AutoTokenizer": ["evil.T", None], "AutoFeatureExtractor": "evil.F"}
BESIDE = {  # what is done to the JSON files beside it
    **TEXTS,
    "n_fft text": values(n_fft="x"),
    "n_fft huge": values(n_fft=HUGE),
    "n_fft 0": values(n_fft=0),
    "remote tokenizer": values(auto_map=REMOTE, tokenizer_class="EvilTokenizer"),
}


@pytest.mark.parametrize("harm", [*BESIDE, "gone", "folder"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json"])
def test_damaged_files_beside_a_model_of_transformers(world, tmp_path, file, harm):
    path = shutil.copytree(world / "hf", tmp_path / "model") / file
    data = path.read_bytes()
    path.unlink()
    write_evil(path.parent, tmp_path / "ran")
    if harm == "folder":
        path.mkdir()
    elif harm != "gone":
        path.write_bytes(BESIDE[harm](data))
    either(sampling(world, "--text", "a", "--checkpoint", path.parent, cwd=tmp_path), "model")
    assert not (tmp_path / "ran").exists()


# --- what is no checkpoint, but nearly --------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2364000000\n"


@pytest.mark.parametrize("kind, file", [
    *FILES, ("hf", "pytorch_model.bin"), ("none", "state_dict.bin"), ("none", "compression_state_dict.bin")])
def test_pointers_of_git_lfs(world, tmp_path, kind, file):
    """What a clone holds in place of large files where Git LFS is not installed."""
    folder = tmp_path / "model"
    folder.mkdir() if kind == "none" else shutil.copytree(world / kind, folder)
    path = folder / file
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    path.write_bytes(POINTER)
    load = load_codec if "codec" in file or "compression" in file else load_model
    refused(command(load, path.parent), str(path), "Git LFS", "git lfs pull")


@pytest.mark.parametrize("load", [load_model, load_codec])
@pytest.mark.parametrize("base", ["facebook/musicgen-small", None, [3], "x" * 10_000])
def test_an_adapter_without_its_model(world, tmp_path, load, base):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(world / "hf" / "config.json", folder)       # some trainers copy it
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    refused(command(load, folder), str(folder), "adapter of PEFT", str(base)[:20], "merge_and_unload")


def test_a_model_with_an_adapter_beside_it_is_a_model(world, tmp_path):
    folder = shutil.copytree(world / "hf", tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    worked(command(load_model, folder))


@pytest.mark.parametrize("more", [(), ("config.json",)])
def test_a_language_model_of_audiocraft_without_its_codec(world, tmp_path, more):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"best_state": {"x": torch.zeros(2)}, "xp.cfg": "a: 1"}, folder / "state_dict.bin")
    for name in more:
        shutil.copy(world / "hf" / name, folder)
    refused(command(load_codec, folder), str(folder), "compression_state_dict.bin", "beside it")


@pytest.mark.parametrize("flag", [("--text", "a"), ("--export", "x"), ("--export_hf", "x")])
@pytest.mark.parametrize("kind", ["audiocraft", "ours"])
def test_a_missing_codec_is_told_before_the_language_model_is_read(world, tmp_path, kind, flag):
    folder = tmp_path / "model"
    folder.mkdir()
    if kind == "audiocraft":
        (folder / "state_dict.bin").write_bytes(b"would be an error by itself")
        named = "compression_state_dict.bin"
    else:
        (folder / "config.json").write_bytes(
            values(codec="gone/far/away")((world / "lm" / "config.json").read_bytes()))
        (folder / "model.safetensors").write_bytes(b"would be an error by itself")
        named = "gone/far/away"
    refused(sampling(world, "--checkpoint", folder, *flag, cwd=tmp_path), named)


@pytest.mark.parametrize("name, said", [
    ("lm/model.safetensors", "a file; give the directory"),
    ("codec", "holds a codec without a language model"),
    ("~nobody_of_this_name/model", "neither a directory nor"),
])
def test_what_is_nearly_the_directory_of_a_model(world, tmp_path, name, said):
    path = name if name.startswith("~") else world / name
    refused(sampling(world, "--text", "a", "--checkpoint", path, cwd=tmp_path), str(path), said)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_configuration_as_editors_of_windows_save_it(world, tmp_path, encoding):
    path = shutil.copytree(world / "lm", tmp_path / "lm") / "config.json"
    path.write_bytes(path.read_text().replace("\n", "\r\n").encode(encoding))
    worked(command(load_model, path.parent))


SHARDS = {  # weight_map of model.safetensors.index.json
    "escaping": {"x": "../lm/model.safetensors"},
    "absolute": {"x": "/etc/passwd"},
    "number": {"x": 3},
    "absent": {"x": "absent.safetensors"},
    "dot": {"x": "."},
    "parent": {"x": ".."},
    "nul": {"x": "a\0b"},
    "list": ["x"],
    "none": {},
    "text": "x",
    "itself": {"x": "model.safetensors.index.json"},
    "odd ending": {"x": "config.json"},
    "long": {"x": "x" * 5000},
}


@pytest.mark.parametrize("name", SHARDS)
def test_index_of_shards(world, tmp_path, name):
    folder = shutil.copytree(world / "hf", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": SHARDS[name]}))
    refused(command(load_model, folder), "model")
