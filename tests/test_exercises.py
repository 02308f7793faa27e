"""The exercises of the README: each check refuses the code as it is, and accepts the solution, which is short.

    python -m pytest tests/test_exercises.py
"""
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import forked

ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "tests" / "exercises").glob("*.patch"))
MISSING = {"1_pattern": "anchor", "2_tempo": "tempo", "3_rotary": "rope_counted", "4_guidance": "text_guidance", "5_stride": "slow_codec.py"}
MODULES = {path.stem for path in ROOT.glob("*.py")} | {"data", "checkpoints", "prepare", "tunes"}


def solve(argv):
    """Runs a check as `python path` does, but for torch, which this child of the tests has loaded already."""
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "data")]
    runpy.run_path(argv[0], run_name="__main__")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Copies of the code, one for each exercise."""
    made = {}
    for patch in PATCHES:
        made[patch.stem] = tmp_path_factory.mktemp(patch.stem)
        for name in ("*.py", "*.c", "config/*.py", "data/*.py", "checkpoints/*.py", "tests/exercises/*"):
            for file in ROOT.glob(name):
                (made[patch.stem] / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, made[patch.stem] / file.relative_to(ROOT))
    return made


def test_there_are_five():
    assert [patch.stem for patch in PATCHES] == [p.stem for p in sorted((ROOT / "tests" / "exercises").glob("*.py"))]
    assert len(PATCHES) == 5


@pytest.mark.skipif(shutil.which("git") is None, reason="patches are applied with git")
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_exercise(copies, patch):
    check, folder = str(copies[patch.stem] / "tests" / "exercises" / f"{patch.stem}.py"), copies[patch.stem]
    unsolved = forked(solve, check, cwd=folder)
    assert unsolved.code != 0 and "solved" not in unsolved.out and MISSING[patch.stem] in unsolved.err, unsolved
    changed = [line for line in patch.read_text().splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(changed) < 30, f"{len(changed)} changed lines"
    # a patch that no longer fits is made anew by hand: the code it changes has moved
    subprocess.run(["git", "apply", patch], cwd=folder, check=True, env={"GIT_CEILING_DIRECTORIES": str(folder.parent), "PATH": "/usr/bin:/bin"})
    solved = forked(solve, check, cwd=folder)
    assert solved.code == 0 and "solved" in solved.out, solved
