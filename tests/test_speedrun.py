"""speedrun.sh: its steps, each once and in order, from where an earlier call stopped.

    python -m pytest tests/test_speedrun.py

The steps themselves are tested elsewhere; here `python` and `torchrun` only write down how they were called.
"""
import os
import re
import shutil
import subprocess

import pytest

from constants import ROOT
from test_docs import check_script

RECORD = """#!/bin/sh
echo "$*" >> "$CALLS"
echo "$(basename "$0") ${OMP_NUM_THREADS:-all}" >> "$CALLS.threads"
case "$*" in *"$FAILS"*) sleep 1.1; exit 3;; esac
"""


@pytest.fixture
def run(tmp_path):
    """Calls speedrun.sh in an empty folder -> exit code and the commands that it ran."""
    shutil.copy(ROOT / "speedrun.sh", tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "torchrun"):
        (programs / name).write_text(RECORD)
        (programs / name).chmod(0o755)

    def call(*flags, fails="nothing fails", clips=""):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls),
                                    "FAILS": fails, "CLIPS": clips}
        environment.pop("OMP_NUM_THREADS", None)
        result = subprocess.run(["bash", tmp_path / "speedrun.sh", *flags], env=environment,
                                capture_output=True, text=True)
        call.error = result.stderr
        commands = calls.read_text().splitlines() if calls.exists() else []
        return result.returncode, [line.removeprefix("--nproc_per_node=2 ") for line in commands]
    return call


def test_every_step_runs_once_and_its_flags_exist(run):
    code, commands = run()
    assert code == 0
    scripts = [command.split()[0] for command in commands]
    assert scripts == ["data/tunes.py", "train.py", *3 * ["data/prepare.py"], "train.py", "train.py",
                       "sample.py", "train.py", "train.py"]
    for command in commands:
        script, *argv = command.split()
        check_script(script, argv)
    assert run() == (0, [])


def test_a_stopped_run_goes_on(run, tmp_path):
    code, commands = run("--epochs=1", fails="config/tiny.py --init_from")
    assert code == 3 and commands[-1] == "train.py config/tiny.py --init_from=out/tiny_start --epochs=1"
    assert commands[1] == "train.py config/tiny_codec.py --epochs=1"
    (tmp_path / "out/tiny").mkdir()
    (tmp_path / "out/tiny/state.safetensors").touch()
    code, commands = run("--epochs=1")
    assert code == 0 and len(commands) == 4
    assert commands[0] == "train.py config/tiny.py --resume --init_from=out/tiny_start --epochs=1"


def test_the_parts_of_a_stopped_step_are_added_up(run, tmp_path):
    for _ in range(2):
        assert run(fails="config/tiny_codec.py")[0] == 3
    assert run()[0] == 0
    seconds = dict(line.split() for line in (tmp_path / "out/speedrun/seconds").read_text().splitlines())
    assert int(seconds["codec"]) >= 2 and len(seconds) == 10


def test_other_flags_are_refused_while_a_run_is_there(run, tmp_path):
    """A trial neither ends nor goes on as the real run."""
    trial = ["--epochs=1", "--updates_per_epoch=20"]
    assert run(*trial)[0] == 0
    for flags, clips in (([], ""), (trial[:1], ""), (trial, "1 1 1")):
        assert run(*flags, clips=clips) == (2, [])
        assert len(run.error.splitlines()) == 1
        assert "(CLIPS='' --epochs=1 --updates_per_epoch=20)" in run.error
    for folder in re.search(r"rm -r ([\w/ ]+)", run.error)[1].split():
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    code, commands = run()
    assert code == 0 and commands[1] == "train.py config/tiny_codec.py"


def test_one_thread_a_process_of_torchrun_and_all_elsewhere(run, tmp_path):
    run()
    assert set((tmp_path / "calls.threads").read_text().splitlines()) == {"torchrun 1", "python all"}
