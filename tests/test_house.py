"""The house rules: sizes, imports, what a training update and a sample touch, what can be deleted.

    python -m pytest tests/test_house.py
"""
import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

from commands import Result, afresh, copy_files, forked, is_ours, worked
from constants import FOLDERS, ROOT, TRAIN, flags

STAGES = "patterns rvq encodec chroma conditioners lm train sample config".split()
BUDGET = {"train": 430}                 # lines; any other stage has OTHER
OTHER, TOGETHER, TOKENS, TOKENS_EACH, COLUMNS, FUNCTION = 460, 2800, 11, 12, 110, 60
OPTIONAL = "speed evaluation tools".split()
COMMANDS = """train data.prepare data.tunes tools.page training.command sampling.command evaluation.evaluate
    sample""".split()                   # sample.py is MusicGen, too, but only commands may import it


def modules() -> dict[str, Path]:
    """Name -> file of all modules but tests and pictures."""
    found = {}
    for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in FOLDERS)):
        for path in ROOT.glob(pattern):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def test_a_virtual_environment_in_the_clone_is_not_ours():
    ours = "", "/lm.py", "/tests", "/tests/commands.py", "/speed/codec.py"
    others = "/.venv/lib/python3.11/site-packages", "/env/lib/speed/codec.py", "2", "2/lm.py", "/data2/x.py"
    assert all(is_ours(f"{ROOT}{path}") for path in ours)
    assert not any(is_ours(f"{ROOT}{path}") for path in others) and not is_ours("/usr/lib/lm.py")


def code_tokens(source: str) -> tuple[int, int]:
    """Names, operators, numbers and strings outside docstrings, and the lines that have any.

    An f-string is one token, as it was before Python 3.12, which takes it apart.
    """
    count, lines, inside = 0, set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        docstring = kind == "STRING" and token.line.strip().startswith(('"""', 'r"""'))
        if kind in ("NAME", "OP", "NUMBER", "STRING", "FSTRING_START") and not inside and not docstring:
            count += 1
            lines.add(token.start[0])
        inside += (kind == "FSTRING_START") - (kind == "FSTRING_END")
    return count, len(lines)


def imports_of(name: str) -> set[str]:
    """Modules of ours that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return (found & MODULES.keys()) - {name}


# --- sizes ------------------------------------------------------------------------------------------------

def test_the_top_level_has_the_nine_stages_and_no_other_python_file():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_short_and_its_lines_are_plain(stage):
    source = MODULES[stage].read_text()
    assert source.count("\n") <= BUDGET.get(stage, OTHER)
    count, lines = code_tokens(source)
    assert count / lines <= TOKENS_EACH


def test_the_stages_together():
    sources = [MODULES[stage].read_text() for stage in STAGES]
    assert sum(source.count("\n") for source in sources) <= TOGETHER
    counts, lines = zip(*map(code_tokens, sources))
    assert sum(counts) / sum(lines) <= TOKENS


def test_lines_and_functions_are_not_too_long():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("tests/*/*.py")]:
        source = path.read_text()
        long = [n for n, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS]
        assert not long, f"{path.relative_to(ROOT)}: lines {long} are longer than {COLUMNS} columns"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                assert size <= FUNCTION, f"{path.relative_to(ROOT)}: {node.name} has {size} lines"


def test_no_assert_outside_of_tests():
    """`python -O` leaves them out: a check of what a caller, a file or a model gives would be gone."""
    for name, tree in TREES.items():
        lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert not lines, f"{name}: assert in lines {lines}"


def test_nothing_stands_twice():
    """No run of six lines of code, blank lines and comments aside, in two places that are not tests."""
    seen = {}
    for name, path in MODULES.items():
        lines = [(n, line.strip()) for n, line in enumerate(path.read_text().splitlines(), 1)]
        lines = [(n, line) for n, line in lines if line and not line.startswith(("#", "import ", "from "))]
        for run in zip(*(lines[i:] for i in range(6))):
            text = "\n".join(line for _, line in run)
            place = f"{name}:{run[0][0]}"
            assert text not in seen, f"{place} repeats {seen[text]}"
            seen[text] = place


# --- imports ----------------------------------------------------------------------------------------------

def test_no_import_circles():
    """Lazy imports count."""
    graph = {name: imports_of(name) for name in MODULES}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in circles, or above one: {sorted(graph)}"


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(COMMANDS)))
def test_a_library_module_imports_no_command(name):
    assert not imports_of(name) & set(COMMANDS)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_without_the_optional_folders(stage):
    optional = [node for node in ast.walk(TREES[stage]) if isinstance(node, (ast.Import, ast.ImportFrom))
                and re.search(rf"\b({'|'.join(OPTIONAL)})\b", ast.unparse(node))]
    assert len(optional) <= (1 if stage in ("train", "sample") else 0)
    assert all("import" in ast.unparse(node) and node.module == "speed" for node in optional)


ONE_NAME = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
import train, sample, data.prepare, tools.page, evaluation.evaluate
names = {}
for name, module in list(sys.modules.items()):
    path = Path(getattr(module, "__file__", None) or "/").resolve()
    if path.is_relative_to(Path.cwd()) and path.exists() and "site-packages" not in path.parts:
        names.setdefault(path, []).append(name)
assert all(len(several) == 1 for several in names.values()), names
"""


def run_afresh(program: str, folder: Path, path: Path, *argv) -> Result:
    """Runs a program, put into a file at `path`, in a folder with a copy of the project."""
    path.write_text(program)
    result = forked(afresh, path, *argv, cwd=folder)
    worked(result)
    return result


def test_one_name_is_one_module(tmp_path):
    """No module is imported under two names: a second copy would have classes and caches of its own."""
    run_afresh(ONE_NAME, ROOT, tmp_path / "one_name.py")


# --- short ways: which files an update and a sample enter ---------------------------------------------------

TRACE = """
import json, sys, threading
from pathlib import Path
ROOT = Path.cwd()
sys.path.insert(0, str(ROOT))
entered = set()
def enter(frame, event, argument):
    name = frame.f_code.co_filename
    if event == "call" and name.startswith(str(ROOT)) and frame.f_code.co_name != "<module>":
        entered.add(str(Path(name).relative_to(ROOT)))
def trace(on):
    threading.setprofile(enter if on else None)
    sys.setprofile(enter if on else None)
"""
MEASURED = TRACE + """
import torch
torch.set_num_threads(1)
import train
from config import load
from data.audio import read_audio
from sample import MusicGen
class Stop:                   # asked once an update
    updates = 0
    def __bool__(self):
        self.updates += 1
        trace(self.updates == 2)
        return False
train.train(load(sys.argv[2:]), False, Stop())
trace(False)
update, entered = entered, set()
lines = [json.loads(line) for line in Path(sys.argv[1], "metrics.jsonl").read_text().splitlines()]
losses = [line["loss"] for line in lines if line["split"] == "train"]
model = MusicGen.from_pretrained("checkpoints/tiny", "cpu")
codes = model.generate_codes(["a slow flute tune"], duration=1.0, temperature=0)
melody = read_audio("assets/ode_to_joy.wav", model.sample_rate, 1)
trace(True)
model.generate(["a slow flute tune"], [melody], duration=0.2)
trace(False)
print(json.dumps([sorted(update), sorted(entered), losses, codes.tolist()]))
"""
RUN = flags(TRAIN, updates_per_epoch=6, save_every=0, log_every=3)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The project without what is optional: speed/, evaluation/, tools/, and training of the codec."""
    folder = tmp_path_factory.mktemp("bare")
    kept = [f"{name}/*.*" for name in (*FOLDERS, "config") if name not in OPTIONAL]
    for pattern in ("*.py", *kept, "checkpoints/tiny/**/*.*", "assets/ode_to_joy.wav"):
        copy_files(ROOT.glob(pattern), folder / "project")
    for name in "codec losses discriminator muon plan samples command".split():
        (folder / "project" / "training" / f"{name}.py").unlink()
    return folder / "project"


def measured(folder: Path, world, out: Path) -> list:
    """Files that an update and a sample enter, losses of six updates, greedy codes of the shipped model."""
    data = [f"--codec={world / 'codec'}", f"--data_dir={world / 'tokens'}", f"--out_dir={out}"]
    done = run_afresh(MEASURED, folder, out.parent / "measured.py", out, *RUN, *data)
    return json.loads(done.out.splitlines()[-1])


@pytest.fixture(scope="module")
def bare_figures(bare, world, tmp_path_factory):
    return measured(bare, world, tmp_path_factory.mktemp("bare_run") / "out")


def test_an_update_enters_six_files(bare_figures):
    entered = bare_figures[0]
    assert {"train.py", "data/segments.py", "conditioners.py", "lm.py", "patterns.py"} <= set(entered)
    assert len(entered) <= 6, entered


def test_a_sample_enters_nine_files(bare_figures):
    # not counted: what the shipped model has in place of T5 and its words, and beside chroma
    own = {"checkpoints/small_t5.py", "checkpoints/t5.py", "data/vocabulary.py", "data/notes.py"}
    entered = [name for name in bare_figures[1] if name not in own]
    stages = "sample conditioners chroma lm patterns encodec rvq".split()
    assert {f"{stage}.py" for stage in stages} <= set(entered)
    assert len(entered) <= 9, entered


def test_without_the_optional_folders_the_numbers_are_the_same(bare, bare_figures, world, tmp_path):
    assert not any((bare / name).exists() for name in [*OPTIONAL, "training/codec.py"])
    _, _, losses, codes = measured(ROOT, world, tmp_path / "out")
    assert len(losses) == 2 and losses == pytest.approx(bare_figures[2], rel=1e-5)
    assert codes == bare_figures[3]
