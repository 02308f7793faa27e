"""Sampling: the Python class and the command, on a small random model.

    python -m pytest tests/test_sample.py
"""
import gc
import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from checkpoints.files import version_of
from commands import command, refused, sample_main, sampling, worked
from config import Config
from constants import CODEC, LM, RATE, ROOT
from data.audio import read_audio, write_audio
from encodec import EncodecModel
from lm import LMModel
from sample import MusicGen
from system.errors import UserError

# a window is 100 frames and moves on by 60
SMALL = LM | dict(dim=32, num_heads=4, num_layers=2, t5_dim=16)
M = Config(**SMALL).chroma_frames


def make(**options) -> MusicGen:
    """A random model that reacts to its conditions, with a codec."""
    torch.manual_seed(0)
    if options.get("channels") == 2:
        options |= dict(n_q=8, delays=(0, 0, 1, 1, 2, 2, 3, 3))
    lm = LMModel(Config(**SMALL | options))
    for parameter in lm.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    codec = EncodecModel(Config(**CODEC | dict(task="codec", kmeans_iters=0)))
    for book in codec.quantizer.codebooks:      # as after training: an untrained quantizer knows one code
        book.embed.normal_()
    return MusicGen(lm, codec)


@pytest.fixture()
def musicgen() -> MusicGen:
    return make()


def wave(frequency=440.0, seconds=0.5, rate=RATE, channels=1):
    """A tone without noise, (C, L)."""
    time = torch.arange(round(seconds * rate)) / rate
    return (0.5 * torch.sin(2 * torch.pi * frequency * time)).expand(channels, -1).contiguous()


# --- the class: lengths, windows, prompts -----------------------------------------------------------------

@pytest.mark.parametrize("duration", [0.02, 0.2, 0.25, 0.5, 1.0])
def test_the_length_asked_for_is_the_length_given(musicgen, duration):
    wav = musicgen.generate(["x"], duration=duration)
    assert wav.shape == (1, 1, round(duration * RATE)) and wav.isfinite().all()


def test_long_music_continues_its_own_codes_window_by_window(musicgen):
    long = musicgen.generate_codes(["x"], duration=0.7, seeds=[3])
    assert torch.equal(long[..., :100], musicgen.generate_codes(["x"], duration=0.25, seeds=[3]))
    shorter = musicgen.generate_codes(["x"], duration=0.4, seeds=[3])   # 160 frames: two whole windows
    assert torch.equal(long[..., :157], shorter[..., :157])             # its last frames end in the delay
    assert not torch.equal(long[..., 60:100], long[..., 120:160])


def test_the_melody_moves_with_the_window(musicgen):
    hop, stride = 64, 20
    chroma = F.one_hot(torch.arange(40) % 12, 12).float()
    for start in (0, 60, 120, 1000):
        conditions = musicgen.window_conditions(["x", "y"], [chroma, None], start)
        expected = (round(start * stride / hop) + torch.arange(M)) % 40 % 12
        melody, none = conditions["melody"]
        assert torch.equal(melody.argmax(-1), expected) and none is None
        assert conditions["text"] == ["x", "y"]


def test_a_prompt_is_kept_verbatim_and_continued(musicgen):
    prompt = torch.randint(32, (1, 4, 30))
    codes = musicgen.generate_codes(["x"], prompt=prompt, duration=0.5)
    assert codes.shape == (1, 4, 200) and torch.equal(codes[..., :30], prompt)
    long = torch.randint(32, (1, 4, 150))                               # longer than the window
    assert torch.equal(musicgen.generate_codes(["x"], prompt=long, duration=0.5)[..., :150], long)
    assert musicgen.generate(["x", "y"], prompt=wave(seconds=0.1), duration=0.3).shape == (2, 1, 2400)
    with pytest.raises(UserError, match="includes the prompt"):
        musicgen.generate_codes(["x"], prompt=prompt, duration=0.05)


# --- the class: music as it is made -------------------------------------------------------------------------

@pytest.mark.parametrize("options, arguments", [
    (dict(), dict(descriptions=["x"], duration=0.25)),
    (dict(), dict(descriptions=["x", None], duration=0.7)),         # three windows
    (dict(channels=2), dict(descriptions=["x", "y"], duration=0.5, prompt=[wave(channels=2, seconds=0.1)])),
    (dict(), dict(descriptions=["x"], duration=0.6, prompt=wave(seconds=0.4))),     # over one window
    (dict(positional_embedding="rope"),
     dict(descriptions=["x", None], duration=0.5, melodies=[wave(330), None])),
    (dict(pattern="coarse_first"), dict(descriptions=[None], duration=0.3)),
    (dict(text="cross", melody="none"), dict(descriptions=["x"], duration=0.4, two_step=True)),
], ids=["one window", "windows", "stereo", "prompt", "melody", "coarse first", "text model"])
def test_a_stream_joins_to_what_generate_gives(options, arguments):
    model = make(**options)
    expected = model.generate(**arguments)
    whole = model.codec.decode(model.generate_codes(**without_waves(model, arguments)))
    torch.testing.assert_close(expected, whole[..., :expected.shape[-1]], rtol=0, atol=1e-5)
    for chunk in (0.05, 0.0613, 10.0):
        waves = list(model.stream(**arguments, chunk=chunk))
        torch.testing.assert_close(torch.cat(waves, -1), expected, rtol=0, atol=1e-5)
        size = round(chunk * RATE)
        assert all(part.shape[-1] == size for part in waves[:-1]) and 0 < waves[-1].shape[-1] <= size


def without_waves(model, arguments) -> dict:
    """Arguments of `generate` as those of `generate_codes`."""
    arguments, B = dict(arguments), len(arguments["descriptions"])
    if "prompt" in arguments:
        arguments["prompt"] = model.encode_prompt(arguments["prompt"], None, B)
    melodies = arguments.pop("melodies", [None] * B)
    return arguments | {"chromas": [None if wav is None else model.melody_chroma(wav) for wav in melodies]}


def test_two_streams_do_not_meet(musicgen):
    settings = [dict(descriptions=["x"], seeds=[1]), dict(descriptions=["y", None], seeds=[2, 3])]
    alone = [list(musicgen.stream(duration=0.3, chunk=0.05, **given)) for given in settings]
    together = zip(*(musicgen.stream(duration=0.3, chunk=0.05, **given) for given in settings))
    for parts in zip(alone, zip(*together)):
        assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


def test_nothing_is_made_before_it_is_asked_for_or_after_a_stream_is_closed(musicgen):
    columns = []
    musicgen.lm.register_forward_hook(lambda *args: columns.append(1))
    stream = musicgen.stream(["x"], duration=0.7, chunk=0.05)
    assert not columns
    next(stream)
    ahead = musicgen.codec.look_ahead
    assert len(columns) == 20 + ahead + 3      # of 0.05 s, what the decoder must see, and the delays
    stream.close()
    with pytest.raises(ZeroDivisionError):
        for _ in musicgen.stream(["x"], duration=0.7, chunk=0.05):
            1 / 0
    assert len(columns) == 2 * (20 + ahead + 3)
    del musicgen.lm._forward_hooks
    musicgen.lm._forward_hooks = {}
    assert musicgen.generate(["x"], duration=0.1).shape == (1, 1, 800)


def test_what_a_stream_gives_may_be_changed(musicgen):
    for given in (musicgen.stream_codes(["x"], duration=0.1), musicgen.stream(["x"], duration=0.1)):
        for piece in given:
            piece += 1


def test_memory_does_not_grow_with_the_length(musicgen):
    """After each window a stream holds as many numbers as after the one before it."""
    held = {}
    # pieces of 60 frames, by which a window moves on
    for n, _ in enumerate(musicgen.stream(["x"], duration=2.4, chunk=0.15)):
        if n in (4, 9, 14):
            held[n] = sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor)
    assert n == 15 and held[4] == held[9] == held[14]


# --- the class: items, melodies, settings -----------------------------------------------------------------

def test_items_of_a_batch_are_what_they_are_alone(musicgen):
    chroma = musicgen.melody_chroma(wave(330))

    def generate(texts, chromas, seeds):
        return musicgen.generate_codes(texts, chromas, duration=0.3, seeds=seeds)
    together = generate(["a", "a longer text", None], [None, chroma, None], [5, 6, 7])
    assert torch.equal(generate(["a longer text"], [chroma], [6]), together[1:2])
    assert torch.equal(generate([None], None, [7]), together[2:])
    assert not torch.equal(generate([None], None, [8]), together[2:])


def test_melodies_of_any_rate_and_channels_mean_the_same(musicgen):
    here = musicgen.melody_chroma(wave(440)).argmax(-1)
    assert (here == 9).float().mean() > 0.9                             # an A
    for rate, channels in ((44100, 2), (48000, 1), (22050, 6)):
        other = musicgen.melody_chroma(wave(440, rate=rate, channels=channels), rate).argmax(-1)
        assert (other[:len(here)] == here[:len(other)]).float().mean() > 0.9


@pytest.mark.parametrize("options", [dict(), dict(null_melody="c"), dict(melody="cross", text="cross")],
                         ids=str)
def test_two_tones_a_tritone_apart_and_none_give_three_results(options):
    model, results = make(**options), set()
    for melody in (wave(440.0), wave(622.25), None):
        chroma = None if melody is None else model.melody_chroma(melody)
        codes = model.generate_codes(["flute"], [chroma], duration=0.2, seeds=[1], temperature=0)
        results.add(tuple(codes.flatten().tolist()))
    assert len(results) == 3


def test_stereo():
    wav = make(channels=2).generate(["x"], prompt=wave(channels=2, seconds=0.1), duration=0.3)
    assert wav.shape == (1, 2, 2400) and not torch.equal(wav[0, 0], wav[0, 1])


@pytest.mark.parametrize("settings", [
    dict(guidance=0), dict(guidance=1), dict(guidance=50), dict(top_k=10 ** 6), dict(top_k=0),
    dict(top_p=1.0), dict(top_p=1e-9), dict(temperature=100.0)], ids=str)
def test_settings_at_their_edges(musicgen, settings):
    codes = musicgen.generate_codes(["x"], duration=0.05, **settings)
    assert codes.shape == (1, 4, 20) and 0 <= codes.min() and codes.max() < 32


def test_greedy_is_temperature_zero_or_one_entry(musicgen):
    greedy = musicgen.generate_codes(["x"], duration=0.1, temperature=0)
    assert torch.equal(greedy, musicgen.generate_codes(["x"], duration=0.1, top_k=1))


def test_silence_is_a_melody(musicgen):
    silent = musicgen.melody_chroma(torch.zeros(1, 4000))
    assert musicgen.generate_codes(["x"], [silent], duration=0.05).shape == (1, 4, 20)


@pytest.mark.parametrize("arguments, match", [
    (dict(descriptions=[]), "at least one"),
    (dict(duration=0), "duration"),
    (dict(chunk=0), "chunk"),
    (dict(chunk=float("nan")), "chunk"),
    (dict(duration=float("nan")), "duration"),
    (dict(duration=1e9), "duration"),
    (dict(temperature=-1), "temperature"),
    (dict(top_p=2), "top_p"),
    (dict(top_k=-1), "top_k"),
    (dict(descriptions=["x", "y"], seeds=[1]), "seeds"),
    (dict(melodies=[torch.zeros(1, 0)]), "melody"),
    (dict(melodies=[torch.full((1, 900), float("nan"))]), "melody"),
    (dict(prompt=torch.zeros(1, 5)), "prompt"),
], ids=str)
def test_what_cannot_be_done_is_refused(musicgen, arguments, match):
    with pytest.raises(UserError, match=match):
        musicgen.stream(**dict(descriptions=["x"]) | arguments)     # at once, not at the first wave


# --- the class: waves and lists as Python has them --------------------------------------------------------

LONG = wave(seconds=0.1)
PAIR = torch.cat([wave(440.0, 0.1), wave(550.0, 0.1)])      # (2, L)


@pytest.mark.parametrize("given", [
    PAIR.T, PAIR.T.numpy(), PAIR.numpy()[::-1], PAIR.double(), (PAIR * 2 ** 15).to(torch.int16),
    (PAIR * 2 ** 15).to(torch.int16).T.numpy(), [PAIR.T], PAIR[None], PAIR.mT[None]],
    ids=["(L, C)", "array (L, C)", "turned over", "double", "int16", "int16 array", "list", "(1, C, L)",
         "(1, L, C)"])
def test_a_wave_is_read_rightly_however_it_comes(musicgen, given):
    asked = dict(descriptions=["x"], duration=0.2)
    expected = musicgen.generate(prompt=PAIR, **asked)
    got = musicgen.generate(prompt=given, **asked)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    melody = given[0] if isinstance(given, list) or given.ndim == 3 else given
    assert torch.equal(musicgen.melody_chroma(melody), musicgen.melody_chroma(PAIR))
    expected = musicgen.generate(melodies=[PAIR], **asked)
    assert torch.equal(musicgen.generate(melodies=given, **asked), expected)


def test_the_scale_of_a_melody_does_not_matter(musicgen):
    assert torch.equal(musicgen.melody_chroma(2 ** 15 * LONG), musicgen.melody_chroma(LONG))


def test_one_string_is_one_description(musicgen):
    assert musicgen.generate("a slow flute tune", duration=0.05).shape[0] == 1
    assert musicgen.generate_codes("a slow flute tune", duration=0.05).shape[0] == 1


THREE = ["x", "y", "z"]


@pytest.mark.parametrize("arguments, match", [
    (dict(prompt=torch.full((1, 900), float("nan"))), "prompt.*finite"),
    (dict(prompt=torch.full((1, 900), float("inf"))), "prompt.*finite"),
    (dict(prompt=20000 * LONG), "prompt.*peak.*32768"),
    (dict(prompt=LONG.long()), "prompt.*int64"),
    (dict(prompt="song.wav"), "prompt.*song.wav"),
    (dict(prompt=torch.zeros(1, 1, 1, 900)), "prompt"),
    (dict(prompt=torch.zeros(900, 900)), "prompt.*900 channels"),
    (dict(prompt=[None]), "prompt"),
    (dict(prompt=LONG, prompt_sample_rate=0), "prompt.*rate 0"),
    (dict(prompt=LONG, prompt_sample_rate=-8000), "prompt.*rate -8000"),
    (dict(prompt=LONG, prompt_sample_rate=44100.5), "prompt.*rate"),
    (dict(prompt=LONG, prompt_sample_rate=float("nan")), "prompt.*rate nan"),
    (dict(prompt=LONG, prompt_sample_rate="44100"), "prompt.*rate '44100'"),
    (dict(melodies=[LONG], melody_sample_rate=0), "melody.*rate 0"),
    (dict(melodies=["tune.wav"]), "melody.*tune.wav"),
    (dict(descriptions=THREE, prompt=LONG.expand(2, 1, -1)), "3 descriptions .* not 2"),
    (dict(descriptions=THREE, prompt=[LONG, LONG]), "3 descriptions .* not 2"),
    (dict(descriptions=THREE, prompt=[LONG, LONG, wave(seconds=0.2)]), "length"),
    (dict(descriptions=THREE, prompt=LONG.expand(3, -1)), "3 waves or 3 channels"),
    (dict(descriptions=THREE, melodies=[LONG, None]), "3 descriptions .* not 2"),
    (dict(descriptions=["x", "y"], melodies=PAIR), "2 waves or 2 channels"),
    (dict(descriptions={"text": "x"}), "descriptions"),
    (dict(descriptions=[1, 2]), "descriptions"),
    (dict(descriptions=None), "descriptions"),
], ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_waves_and_lists_that_are_none(musicgen, arguments, match):
    settings = dict(descriptions=["x"], duration=0.3)
    with pytest.raises(UserError, match=match):
        musicgen.generate(**settings | arguments)


def test_a_text_model_takes_no_melody():
    with pytest.raises(UserError, match="text only"):
        make(melody="none", text="cross").generate(["x"], [wave()])


# --- files of models --------------------------------------------------------------------------------------

def test_saving_small_leaves_the_model_as_it_was(musicgen, tmp_path):
    musicgen.save(tmp_path, compact=True)
    for part in (musicgen.lm, musicgen.codec):
        assert all(parameter.dtype == torch.float32 for parameter in part.parameters())
    loaded = MusicGen.from_pretrained(tmp_path, "cpu")
    assert loaded.generate(["x"], duration=0.05).isfinite().all()


def test_no_code_runs_from_a_checkpoint(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))
    torch.save({"best_state": Bomb(), "xp.cfg": "a: 1"}, tmp_path / "state_dict.bin")
    with pytest.raises(UserError, match="state_dict.bin"):
        LMModel.from_pretrained(tmp_path)


# --- the command ------------------------------------------------------------------------------------------

def test_the_command_in_the_metadata_makes_the_same_file(world, tmp_path):
    write_audio(tmp_path / "my tune.ogg", wave(rate=44100, channels=2), 44100)
    result = sampling(world, "--text=--it's slow", "--melody", "my tune.ogg", "--duration", "0.3",
                      "--seed", "9", "--top_k", "20", cwd=tmp_path)
    worked(result)
    out = tmp_path / result.out.strip()
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["text"] == "--it's slow" and about["seed"] == 9
    assert about["settings"]["top_k"] == 20 and about["settings"]["guidance"] == 3.0
    first = out.read_bytes()
    again = shlex.split(about["command"])
    assert again[:2] == ["python", "sample.py"]
    refused(command(sample_main, *again[2:], cwd=tmp_path), "exists")
    assert out.read_bytes() == first
    out.unlink(), out.with_suffix(".json").unlink()
    worked(command(sample_main, *again[2:], cwd=tmp_path))
    assert out.read_bytes() == first


def test_the_metadata_keep_settings_that_are_zero(world, tmp_path):
    zeros = ["--temperature", "0", "--guidance", "0", "--top_k", "0", "--top_p", "0"]
    worked(sampling(world, "--out", "x.wav", *zeros, cwd=tmp_path))
    about = json.loads((tmp_path / "x.json").read_text())
    assert about["settings"] == {"guidance": 0.0, "temperature": 0.0, "top_k": 0, "top_p": 0.0}
    assert all(flag in shlex.split(about["command"]) for flag in zeros[::2])


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats(world, tmp_path, suffix):
    worked(sampling(world, "--duration", "0.5", "--out", f"x.{suffix}", cwd=tmp_path))
    wav = read_audio(tmp_path / f"x.{suffix}", RATE, 1)
    assert abs(wav.shape[-1] - 4000) < 2400 and wav.abs().max() <= 1.0


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_results_say_what_they_are(world, tmp_path, suffix):
    argv = ["--text", "Flöte", "--text", "b", "--seed", "3", "--out", f"x.{suffix}"]
    worked(sampling(world, *argv, cwd=tmp_path))
    with soundfile.SoundFile(tmp_path / f"x_0.{suffix}") as file:
        assert file.title == "Flöte" and file.comment == "AI-generated"
        software = f"nanoMusicGen, model lm {version_of(world / 'lm')}, seed 3"
        assert file.software.startswith(software) and str(world) not in file.software
    with soundfile.SoundFile(tmp_path / f"x_1.{suffix}") as file:
        assert file.title == "b" and "seed 4" in file.software
    worked(sampling(world, *argv, "--no_tags", "--overwrite", cwd=tmp_path))
    data = (tmp_path / f"x_0.{suffix}").read_bytes()
    assert b"nano" not in data and b"AI-gen" not in data and "Flöte".encode() not in data
    assert "--no_tags" in json.loads((tmp_path / "x_0.json").read_text())["command"]


def test_another_version_of_a_model_is_told_apart(world, tmp_path):
    folder = shutil.copytree(world / "lm", tmp_path / "lm")
    assert version_of(folder) == version_of(world / "lm")
    lm = LMModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 1e-3
    lm.save(folder)
    assert version_of(folder) != version_of(world / "lm")


def test_a_batch_and_a_continued_take(world, tmp_path):
    def take(*argv):
        worked(sampling(world, *argv, "--save_codes", cwd=tmp_path))

    def codes(name):
        with np.load(tmp_path / name) as file:
            return file["codes"]
    take("--text", "a", "--text", "b", "--duration", "0.2", "--out", "take.wav")
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"take_{i}.{suffix}" for i in (0, 1) for suffix in ("wav", "json", "npz")}
    take("--text", "a", "--continue_from", "take_1.npz", "--duration", "0.4", "--out", "more.wav")
    assert codes("more.npz").shape == (4, 160) and (codes("more.npz")[:, :80] == codes("take_1.npz")).all()
    take("--text", "b", "--seed", "1", "--duration", "0.2", "--out", "one.wav")
    assert (codes("take_1.npz") == codes("one.npz")).all(), "an item's seed is one more than that before it"


@pytest.mark.parametrize("argv, named", [
    ("--melody missing.wav", "missing.wav"),
    ("--duration -1", "duration"),
    ("--duration many", "duration"),
    ("--tempo 3", "--tempo"),
    ("--checkpoint no/such/dir", "no/such/dir"),
    ("--out x.aiff", ".flac"),
    ("--text a --text b --melody x --melody y --melody z", "--melody"),
    ("--continue_from bad.npz", "bad.npz"),
    ("--melody bad.npz", "bad.npz"),
    ("--prompt bad.npz", "bad.npz"),
    ("--out bad.npz/x.wav", "bad.npz"),
])
def test_mistakes_end_in_one_sentence(world, tmp_path, argv, named):
    (tmp_path / "bad.npz").write_bytes(b"not what it seems")
    refused(sampling(world, *argv.split(), cwd=tmp_path), named)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"], "nothing is left behind"


# --- start ------------------------------------------------------------------------------------------------

IMPORTS = """
import sys
sys.path.insert(0, ".")
import torch.utils.checkpoint
brought = set(sys.modules)      # by torch itself: sympy, before 2.7
from sample import MusicGen
import sampling.command
MusicGen.from_pretrained("checkpoints/tiny", "cpu").generate(["a slow flute tune"], duration=0.1)
slow = "transformers", "torch._dynamo", "sympy", "scipy"
print(*[name for name in slow if name in sys.modules and name not in brought])
"""


def test_the_shipped_model_is_loaded_and_plays_without_slow_imports():
    run = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
