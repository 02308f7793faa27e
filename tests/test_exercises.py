"""The exercises: each check refuses the code as it is, and accepts the solution, which is short.

    python -m pytest tests/test_exercises.py
"""
import shutil
import subprocess

import pytest

from commands import afresh, copy_files, forked
from constants import FOLDERS, ROOT

MISSING = {     # exercise -> what the check misses in the code as it is
    "1_pattern": "anchor",
    "2_tempo": "tempo",
    "3_rotary": "rope_counted",
    "4_guidance": "text_guidance",
    "5_stride": "slow_codec.py",
    "6_loudness": "loudness",
}
EXERCISES = ROOT / "tests" / "exercises"


@pytest.fixture()
def copy(tmp_path):
    """A copy of the code and the exercises."""
    folders = [f"{name}/*.py" for name in (*FOLDERS, "config", "tests/exercises")]
    for pattern in ("*.py", "speed/*.c", *folders):
        copy_files(ROOT.glob(pattern), tmp_path)
    return tmp_path


def test_there_are_six():
    assert sorted(path.stem for path in EXERCISES.glob("*.py")) == sorted(MISSING)
    assert sorted(path.stem for path in EXERCISES.glob("*.patch")) == sorted(MISSING)


@pytest.mark.skipif(shutil.which("git") is None, reason="patches are applied with git")
@pytest.mark.parametrize("name", MISSING)
def test_exercise(copy, name):
    check, patch = copy / "tests" / "exercises" / f"{name}.py", EXERCISES / f"{name}.patch"
    unsolved = forked(afresh, check, cwd=copy)
    assert unsolved.code != 0 and "solved" not in unsolved.out and MISSING[name] in unsolved.err, unsolved
    lines = patch.read_text().splitlines()
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(changed) < 30, f"{len(changed)} changed lines"
    # a patch that no longer fits is made anew by hand: the code it changes has moved
    environment = {"GIT_CEILING_DIRECTORIES": str(copy.parent), "PATH": "/usr/bin:/bin"}
    subprocess.run(["git", "apply", patch], cwd=copy, check=True, env=environment)
    solved = forked(afresh, check, cwd=copy)
    assert solved.code == 0 and "solved" in solved.out, solved
