"""Music while it is made: sample.py --out - and --play, with pipes that close and devices that fail.

    python -m pytest tests/test_live.py
"""
import io
import os
import signal
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from commands import command, exit_code, forked, pipe, refused, sample_main, start, text_of, worked
from constants import RATE
from data.audio import to_int16
from sample import MusicGen

ASKED = ["--device", "cpu", "--text", "slow flute", "--seed", "3"]


@pytest.fixture()
def asked(world):
    return ["--checkpoint", str(world / "lm"), *ASKED]


def piped(argv, tmp_path, **options) -> tuple[int, bytes, str]:
    """Exit code, bytes on stdout and text on stderr."""
    with open(tmp_path / "out", "w+b") as out, open(tmp_path / "err", "w+b") as err:
        code = exit_code(start(sample_main, *argv, "--out", "-", cwd=tmp_path, out=out, err=err, **options))
        (tmp_path / "out").unlink(), (tmp_path / "err").unlink()
        out.seek(0)
        return code, out.read(), text_of(err)


# --- down a pipe ------------------------------------------------------------------------------------------

def test_stdout_is_the_music_and_nothing_else(asked, world, tmp_path):
    code, raw, err = piped([*asked, "--duration", "0.71", "--raw"], tmp_path)
    assert code == 0, err
    raw = np.frombuffer(raw, "<f4")
    made = MusicGen.from_pretrained(world / "lm", "cpu").generate(["slow flute"], duration=0.71, seeds=[3])
    torch.testing.assert_close(torch.from_numpy(raw.copy()), made[0, 0], rtol=0, atol=1e-5)
    code, wav, err = piped([*asked, "--duration", "0.71"], tmp_path)
    assert code == 0 and wav[4:8] == wav[40:44] == b"\xff" * 4, err     # the length is not known
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    assert rate == RATE and np.array_equal(samples, to_int16(raw))
    assert not list(tmp_path.iterdir()), "neither a file nor a JSON"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux alone has /dev/full")
def test_a_full_disk_is_told(asked, tmp_path):
    with open("/dev/full", "wb") as full, open(tmp_path / "err", "w+b") as err:
        argv = [*asked, "--duration", "0.1", "--out", "-"]
        assert exit_code(start(sample_main, *argv, out=full, err=err)) == 2
        assert text_of(err).splitlines()[-1].endswith("--out -: cannot be written (No space left on device)")


def test_a_closed_pipe_ends_it_quietly(asked, tmp_path):
    with pipe() as (out, to_out), open(tmp_path / "err", "w+b") as err:
        begun = time.monotonic()
        pid = start(sample_main, *asked, "--duration", "3000", "--out", "-", out=to_out, err=err,
                    before=out.close)       # or the child would be a reader, too
        to_out.close()
        assert out.read(44)[:4] == b"RIFF"
        out.close()
        assert exit_code(pid) == 1
        assert time.monotonic() - begun < 60 and "rror" not in text_of(err)


@pytest.mark.parametrize("flags, said", [([], "interrupted"), (["--keep_partial"], "s are written")])
def test_ctrl_c_leaves_whole_samples(asked, tmp_path, flags, said):
    with pipe() as (out, to_out), open(tmp_path / "err", "w+b") as err:
        argv = [*asked, *flags, "--duration", "3000", "--out", "-", "--raw"]
        pid = start(sample_main, *argv, out=to_out, err=err, before=out.close)
        to_out.close()
        begin = out.read(1000)
        os.kill(pid, signal.SIGINT)
        rest = out.read()
        assert exit_code(pid) == 130
        last = text_of(err).splitlines()[-1]
    raw = np.frombuffer(begin + rest, "<f4")
    assert np.isfinite(raw).all()
    assert last.endswith(said) and (not flags or f"first {len(raw) / RATE:.2f} s" in last)


@pytest.mark.parametrize("argv, named", [
    ("--raw", "--raw"),
    ("--out - --text b", "--out -: takes one item, not 2"),
    ("--play --text b", "--play: takes one item, not 2"),
    ("--out - --page p", "--page"),
    ("--out - --loop", "--loop"),
    ("--play --loop", "--play"),
    ("--out - --save_codes", "--save_codes"),
    ("--play", "pip install sounddevice"),
])
def test_flags_that_do_not_go_together(asked, tmp_path, monkeypatch, argv, named):
    monkeypatch.setitem(sys.modules, "sounddevice", None)       # as if it were not installed
    refused(command(sample_main, *asked, *argv.split(), cwd=tmp_path), named)
    assert not list(tmp_path.iterdir())


# --- out of the loudspeaker -------------------------------------------------------------------------------

DEVICE = """
import os, time
import numpy as np
class OutputStream:
    def __init__(self, samplerate, channels, dtype):
        assert dtype == "float32"
        self.shape, self.heard, self.calls = (samplerate, channels), [], []
    def start(self):
        self.calls.append("start")
    def write(self, samples):
        if not self.heard:
            self.early = not os.path.exists("x.wav")
        assert samples.flags.c_contiguous and samples.dtype == np.float32
        self.heard.append(samples)
        if FAILS:
            raise RuntimeError("unplugged")
        time.sleep(0.01)
    def stop(self):
        self.calls.append("stop")
    def abort(self):
        self.calls.append("abort")
    def close(self):
        rate, channels = self.shape
        np.savez("heard.npz", samples=np.concatenate(self.heard), rate=rate, channels=channels,
                 early=self.early, calls=[*self.calls, "close"])
"""


def with_device(folder, fails=False):
    """For `before`: a package sounddevice that notes what it plays."""
    (folder / "packages").mkdir()
    (folder / "packages" / "sounddevice.py").write_text(f"FAILS = {fails}\n{DEVICE}")
    return lambda: sys.path.insert(0, str(folder / "packages"))


def test_play_sounds_while_it_is_made_and_writes_the_file(asked, world, tmp_path):
    argv = [*asked, "--duration", "2.3", "--out", "x.wav", "--play"]
    worked(forked(sample_main, *argv, cwd=tmp_path, before=with_device(tmp_path)))
    with np.load(tmp_path / "heard.npz") as heard:
        assert heard["early"] and (heard["rate"], heard["channels"]) == (RATE, 1)
        assert heard["calls"].tolist() == ["start", "stop", "abort", "close"]
        made = MusicGen.from_pretrained(world / "lm", "cpu").generate(["slow flute"], duration=2.3, seeds=[3])
        expected = made[0].T.clamp(-1, 1)
        torch.testing.assert_close(torch.from_numpy(heard["samples"]), expected, rtol=0, atol=1e-5)
    assert soundfile.info(tmp_path / "x.wav").frames == len(expected)
    assert "play" not in (tmp_path / "x.json").read_text()


def test_a_device_that_fails_costs_no_music(asked, tmp_path):
    argv = [*asked, "--duration", "0.7", "--out", "x.wav", "--play"]
    result = forked(sample_main, *argv, cwd=tmp_path, before=with_device(tmp_path, fails=True))
    assert result.code == 0 and "unplugged" in result.sentences[-1], result
    assert soundfile.info(tmp_path / "x.wav").frames == round(0.7 * RATE)
