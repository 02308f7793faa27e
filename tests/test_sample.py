"""Sampling: the Python class and the command, on a small random model.

    python -m pytest tests/test_sample.py
"""
import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch

import lm as L
import sample as S
from config import Config, UserError, run
from data.audio import read_audio, write_audio
from encodec import EncodecModel

CODEC = Config(task="codec", sample_rate=8000, ratios=(5, 4), n_filters=2, dimension=8, lstm=1, n_q=4, card=32)
LM = dataclasses.replace(CODEC, task="lm", dim=32, num_heads=4, num_layers=2, t5="bytes", t5_dim=16, t5_heads=2, radix2_exp=8,
                         segment_duration=0.25, extend_stride=0.15, stem="none")     # 100 frames, window moves by 60


def model(**options):
    torch.manual_seed(0)
    channels = options.get("channels", 1)
    if channels == 2:
        options |= dict(n_q=8, delays=(0, 0, 1, 1, 2, 2, 3, 3))
    lm = L.LMModel(dataclasses.replace(LM, **options))
    for parameter in lm.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    codec = EncodecModel(CODEC)
    for codebook in codec.quantizer.codebooks:      # as after training: an untrained quantizer knows one code
        codebook.embed.normal_()
        codebook.inited.fill_(1)
    return S.MusicGen(lm, codec)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    model().save(directory)
    return str(directory)


@pytest.fixture()
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tone(frequency=440.0, seconds=0.5, rate=8000, channels=1):
    wav = 0.5 * torch.sin(2 * torch.pi * frequency * torch.arange(round(seconds * rate)) / rate)
    return wav.expand(channels, -1).contiguous()


def command(*argv):
    """Runs the command as a shell would; returns its exit code and what it said last on stderr."""
    try:
        run(S.main, list(argv))
    except SystemExit as stop:
        return stop.code
    return 0


# --- the class -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("duration", [0.02, 0.2, 0.25, 0.5, 1.0])
def test_the_length_asked_for_is_the_length_given(duration):
    wav = model().generate(["x"], duration=duration)
    assert wav.shape == (1, 1, round(duration * 8000)) and wav.isfinite().all()


def test_long_music_continues_its_own_codes_window_by_window():
    m = model()
    long = m.generate_codes(["x"], duration=0.7, seeds=[3])
    assert torch.equal(long[..., :100], m.generate_codes(["x"], duration=0.25, seeds=[3]))
    shorter = m.generate_codes(["x"], duration=0.4, seeds=[3])      # 160 frames: two whole windows
    assert torch.equal(long[..., :157], shorter[..., :157])         # its last frames end in the delay
    assert not torch.equal(long[..., 60:100], long[..., 120:160])


def test_the_melody_moves_with_the_window():
    m = model()
    frames, hop, stride = m.config.chroma_frames, 64, 20
    chroma = torch.nn.functional.one_hot(torch.arange(40) % 12, 12).float()
    for start in (0, 60, 120, 1000):
        window, has = m._window([chroma, None], start)
        expected = (round(start * stride / hop) + torch.arange(frames)) % 40 % 12
        assert torch.equal(window[0].argmax(-1), expected) and has.tolist() == [True, False]


def test_guidance_delays_the_melody_and_nothing_else():
    plain, delayed = (model(positional_embedding="rope", melody_delay=delay) for delay in (0.0, 0.01))
    conditions = plain.lm.conditioner(["a flute", None], torch.rand(2, LM.chroma_frames, 12), None)
    text = conditions.prefix_time < 0
    moved = S.told_late(conditions, 2.5)
    assert 0 < text.sum() < len(text)
    torch.testing.assert_close(moved.prefix_time, conditions.prefix_time + torch.where(text, 0.0, 2.5))
    assert all(a is b for a, b in zip(moved, conditions) if a is not moved.prefix_time)

    def codes(model, guidance):
        chroma = torch.eye(12)[torch.arange(LM.chroma_frames) % 12]
        return model.generate_codes(["a flute"], [chroma], seeds=[0], duration=0.25, guidance=guidance)
    assert torch.equal(codes(plain, 1.0), codes(delayed, 1.0)) and not torch.equal(codes(plain, 3.0), codes(delayed, 3.0))


def test_a_prompt_is_kept_verbatim_and_continued():
    m = model()
    prompt = torch.randint(32, (1, 4, 30))
    codes = m.generate_codes(["x"], prompt=prompt, duration=0.5)
    assert codes.shape == (1, 4, 200) and torch.equal(codes[..., :30], prompt)
    long_prompt = torch.randint(32, (1, 4, 150))                    # longer than the window
    assert torch.equal(m.generate_codes(["x"], prompt=long_prompt, duration=0.5)[..., :150], long_prompt)
    wav = m.generate(["x", "y"], prompt=tone(seconds=0.1), duration=0.3)
    assert wav.shape == (2, 1, 2400)
    with pytest.raises(UserError, match="includes the prompt"):
        m.generate_codes(["x"], prompt=prompt, duration=0.05)


def test_items_of_a_batch_are_what_they_are_alone():
    m = model()
    melody = tone(330)
    together = m.generate_codes(["a", "a longer text", None], [None, m.melody_chroma(melody), None], duration=0.3, seeds=[5, 6, 7])
    alone = m.generate_codes(["a longer text"], [m.melody_chroma(melody)], duration=0.3, seeds=[6])
    assert torch.equal(together[1:2], alone)
    assert torch.equal(m.generate_codes([None], duration=0.3, seeds=[7]), together[2:])
    assert not torch.equal(m.generate_codes([None], duration=0.3, seeds=[8]), together[2:])


def test_melodies_of_any_rate_and_channels_mean_the_same():
    m = model()
    here = m.melody_chroma(tone(440)).argmax(-1)
    assert (here == 9).float().mean() > 0.9                          # an A
    for rate, channels in ((44100, 2), (48000, 1), (22050, 6)):
        other = m.melody_chroma(tone(440, rate=rate, channels=channels), rate).argmax(-1)
        assert (other[:len(here)] == here[:len(other)]).float().mean() > 0.9


@pytest.mark.parametrize("options", [dict(), dict(null_melody="c"), dict(melody="cross", text="cross")], ids=str)
def test_two_tones_a_tritone_apart_and_none_give_three_results(options):
    m = model(**options)
    results = {tuple(m.generate_codes(["flute"], [wav if wav is None else m.melody_chroma(wav)], duration=0.2, seeds=[1],
                                      temperature=0).flatten().tolist()) for wav in (tone(440.0), tone(622.25), None)}
    assert len(results) == 3


def test_stereo():
    m = model(channels=2)
    wav = m.generate(["x"], prompt=tone(channels=2, seconds=0.1), duration=0.3)
    assert wav.shape == (1, 2, 2400) and not torch.equal(wav[0, 0], wav[0, 1])


def test_settings_at_their_edges():
    m = model()
    greedy = m.generate_codes(["x"], duration=0.1, temperature=0)
    assert torch.equal(greedy, m.generate_codes(["x"], duration=0.1, top_k=1))
    for settings in (dict(guidance=0), dict(guidance=1), dict(guidance=50), dict(top_k=10 ** 6), dict(top_p=1.0), dict(top_k=0),
                     dict(top_p=1e-9), dict(temperature=100.0)):
        codes = m.generate_codes(["x"], duration=0.05, **settings)
        assert codes.shape == (1, 4, 20) and 0 <= codes.min() and codes.max() < 32, settings
    silent = m.melody_chroma(torch.zeros(1, 4000))
    assert m.generate_codes(["x"], [silent], duration=0.05).shape == (1, 4, 20)


@pytest.mark.parametrize("arguments, match", [
    (dict(descriptions=[]), "at least one"), (dict(descriptions=["x"], duration=0), "duration"),
    (dict(descriptions=["x"], duration=float("nan")), "duration"), (dict(descriptions=["x"], duration=1e9), "duration"),
    (dict(descriptions=["x"], temperature=-1), "temperature"), (dict(descriptions=["x"], top_p=2), "top_p"),
    (dict(descriptions=["x"], top_k=-1), "top_k"), (dict(descriptions=["x", "y"], seeds=[1]), "seeds"),
    (dict(descriptions=["x"], melodies=[torch.zeros(1, 0)]), "melody"),
    (dict(descriptions=["x"], melodies=[torch.full((1, 900), float("nan"))]), "melody"),
    (dict(descriptions=["x"], prompt=torch.zeros(1, 5)), "prompt")])
def test_what_cannot_be_done_is_said(arguments, match):
    with pytest.raises(UserError, match=match):
        model().generate(**arguments)


def test_a_text_model_takes_no_melody():
    with pytest.raises(UserError, match="text only"):
        model(melody="none", text="cross").generate(["x"], [tone()])


# --- the command -----------------------------------------------------------------------------------------------------

def test_text_and_melody_make_a_file_and_its_recipe(checkpoint, folder, capsys):
    write_audio("my tune.ogg", tone(rate=44100, channels=2), 44100)
    argv = ["--checkpoint", checkpoint, "--text", "it's slow", "--melody", "my tune.ogg", "--duration", "0.3", "--seed", "9", "--top_k", "20"]
    assert command(*argv) == 0
    out = folder / capsys.readouterr().out.strip()
    recipe = json.loads(out.with_suffix(".json").read_text())
    assert recipe["text"] == "it's slow" and recipe["seed"] == 9 and recipe["settings"]["top_k"] == 20
    assert recipe["settings"]["guidance"] == 3.0
    first = out.read_bytes()
    again = shlex.split(recipe["command"])
    assert again[:2] == ["python", "sample.py"]
    assert command(*again[2:]) == 2 and "exists" in capsys.readouterr().err and out.read_bytes() == first
    out.unlink(), out.with_suffix(".json").unlink()
    assert command(*again[2:]) == 0 and out.read_bytes() == first, "the command in the JSON makes the same file"


def test_a_recipe_keeps_settings_that_are_zero(checkpoint, folder, capsys):
    zeros = ["--temperature", "0", "--guidance", "0", "--top_k", "0", "--top_p", "0"]
    assert command("--checkpoint", checkpoint, "--duration", "0.1", "--out", "x.wav", *zeros) == 0
    recipe = json.loads((folder / "x.json").read_text())
    assert recipe["settings"] == {"guidance": 0.0, "temperature": 0.0, "top_k": 0, "top_p": 0.0}
    assert all(flag in shlex.split(recipe["command"]) for flag in zeros[::2])


def test_saving_small_leaves_the_model_as_it_was(tmp_path):
    m = model()
    m.save(tmp_path, compact=True)
    assert all(p.dtype == torch.float32 for part in (m.lm, m.codec) for p in part.parameters())
    assert S.MusicGen.from_pretrained(tmp_path, "cpu").generate(["x"], duration=0.05).isfinite().all()


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats(checkpoint, folder, suffix):
    assert command("--checkpoint", checkpoint, "--duration", "0.5", "--out", f"x.{suffix}") == 0
    wav = read_audio(f"x.{suffix}", 8000, 1)
    assert abs(wav.shape[-1] - 4000) < 2400 and wav.abs().max() <= 1.0


def test_a_batch_and_a_continued_take(checkpoint, folder, capsys):
    assert command("--checkpoint", checkpoint, "--text", "a", "--text", "b", "--duration", "0.2", "--save_codes", "--out", "take.wav") == 0
    assert {p.name for p in folder.iterdir()} == {f"take_{i}.{s}" for i in (0, 1) for s in ("wav", "json", "npz")}
    assert command("--checkpoint", checkpoint, "--text", "a", "--continue_from", "take_1.npz", "--duration", "0.4",
                   "--save_codes", "--out", "more.wav") == 0
    with np.load("take_1.npz") as old, np.load("more.npz") as new:
        assert new["codes"].shape == (4, 160) and (new["codes"][:, :80] == old["codes"]).all()
    assert command("--checkpoint", checkpoint, "--text", "b", "--seed", "1", "--duration", "0.2", "--save_codes", "--out", "one.wav") == 0
    with np.load("take_1.npz") as old, np.load("one.npz") as new:
        assert (new["codes"] == old["codes"]).all(), "the second of a batch is the first of the next seed"


@pytest.mark.parametrize("argv, says", [
    (["--melody", "missing.wav"], "missing.wav"), (["--duration", "-1"], "duration"), (["--duration", "many"], "duration"),
    (["--tempo", "3"], "--tempo"), (["--checkpoint", "no/such/dir"], "no/such/dir"), (["--out", "x.aiff"], ".flac"),
    (["--text", "a", "--text", "b", "--melody", "x", "--melody", "y", "--melody", "z"], "--melody"),
    (["--continue_from", "bad.npz"], "bad.npz"), (["--melody", "bad.npz"], "bad.npz"), (["--prompt", "bad.npz"], "bad.npz"),
    (["--out", "bad.npz/x.wav"], "bad.npz")])
def test_mistakes_end_in_one_sentence(checkpoint, folder, capsys, argv, says):
    (folder / "bad.npz").write_bytes(b"not what it seems")
    if "--checkpoint" not in argv:
        argv = ["--checkpoint", checkpoint, *argv]
    assert command("--duration", "0.05", *argv) == 2
    error = capsys.readouterr().err.strip()
    assert says in error.splitlines()[-1] and "Traceback" not in error
    assert [p.name for p in folder.iterdir()] == ["bad.npz"], "nothing is left behind"


def test_no_code_runs_from_a_checkpoint(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))
    torch.save({"best_state": Bomb(), "xp.cfg": "a: 1"}, tmp_path / "state_dict.bin")
    with pytest.raises(UserError, match="state_dict.bin"):
        L.LMModel.from_pretrained(tmp_path)
