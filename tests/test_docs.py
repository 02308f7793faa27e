"""README.md and docs/ say what is so: commands run, links lead somewhere, numbers are those of the code.

    python -m pytest tests/test_docs.py
"""
import ast
import importlib.util
import json
import re
import runpy
import shlex
import sys
from unittest.mock import create_autospec

import pytest

import browser
import chroma
import conditioners
import lm
import patterns
from commands import command, encodec_demo, train_main, worked
from config import FIELDS, Config, load
from constants import ROOT
from data import prepare, tunes
from data.segments import SPLITS
from sample import MusicGen
from sampling import command as sampling_command
from system.errors import UserError
from training.command import FLAGS, take_flags

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README, PARITY, TOUR = TEXTS["README.md"], TEXTS["docs/parity.md"], TEXTS["docs/tour.md"]
RESULTS, TRAINING = TEXTS["docs/results.md"], TEXTS["docs/training.md"]
PLACEHOLDERS = {"tune.mp3", "song.mp3", "song.txt", "song.json", "song.mp3.txt", "song.mp3.json", "MY_MUSIC",
                "FOLDER_OF_AUDIO"}
MADE = ("out/", "data/tunes/", "data/prepared", "data/mine", "page", "samples/")    # by other commands
RUN_FILES = {"metrics.jsonl", "metadata.jsonl", "metadata.csv", "skipped.txt", "notes.txt", "state_dict.bin",
             "compression_state_dict.bin"}


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def commands_of(text: str) -> list[str]:
    """Commands: indented lines and what stands in backquotes; joined ones apart, without comments."""
    text = without_code_blocks(text)
    lines = re.findall(r"^(?: {4}|\t)+(.*)$", text, flags=re.M)
    lines += re.findall(r"`((?:python|torchrun|pip|git) [^`]+)`", text)
    found = set()
    for line in lines:
        parts = [line] if "python -c " in line else line.split("&&")
        for part in parts:
            part = re.sub(r"\s+# .*", "", part)
            part = part.strip().removeprefix("uv run --with-requirements requirements.txt ")
            part = " ".join(part.split()) if "python -c " not in part else part.strip()
            # a program and what it runs, not `torchrun --nproc_per_node=2` alone
            if re.match(r"(\w+/bin/)?((pip|git) |(python|torchrun) .*(\.py|-[mc])\b)", part):
                found.add(part)
    return sorted(found)


COMMANDS = sorted({line for text in TEXTS.values() for line in commands_of(text)})
EXPERIMENTS = [line for line in COMMANDS if "python -c " in line]


def section(text: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)[1]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text, each a list of rows without the head, a row a list of cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        lines = block.splitlines()[2:]
        found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in lines])
    return found


def rows(text: str) -> list[list[str]]:
    return [row for table in tables(text) for row in table]


def numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)]


def assert_figures(cell: str, figures: list[float]):
    """The numbers of a cell are these figures, rounded as the cell has them."""
    shown = re.findall(r"\d+(?:\.\d+)?", cell.replace(",", "") if len(figures) == 1 else cell)
    assert len(shown) == len(figures), (cell, figures)
    for text, figure in zip(shown, figures):
        decimals = len(text.partition(".")[2])
        assert abs(float(text) - figure) <= 0.501 * 10 ** -decimals, (cell, figures)


# --- README's size ----------------------------------------------------------------------------------------

def test_readme_is_short():
    assert README.count("\n") <= 250 and len(README.split()) <= 2400


def test_versions():
    """What README promises is what the workflow runs and what requirements.txt asks for."""
    promise = re.search(r"Python ([\d.]+) to ([\d.]+), torch ([\d.]+) to", README)
    oldest, newest, torch_version = promise.groups()
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert f'python: ["{oldest}", "{newest}"]' in workflow
    assert f"torch>={torch_version}\n" in (ROOT / "requirements.txt").read_text(encoding="utf-8")


# --- what the tour names to be read -------------------------------------------------------------------------

def reading_list() -> dict[tuple[str, str], int]:
    """{(file, name): lines} of what stands behind **Read** in the tour, and of the docstring of each file."""
    found = {}
    for passage in re.findall(r"^- \*\*Read\*\* (.*?)(?=^- \*\*)", TOUR, flags=re.M | re.S):
        in_a_file = r"in `([\w/]+\.py)`:?(.*?)(?=in `[\w/]+\.py`|\Z)"
        for file, names in re.findall(in_a_file, passage, flags=re.S):
            nodes = {}
            tree = ast.parse((ROOT / file).read_text())
            found[file, ""] = tree.body[0].end_lineno
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
                    nodes |= {f"{node.name}.{child.name}": child for child in methods} | {node.name: node}
            for name in re.findall(r"`([\w.]+)`", names):
                found[file, name] = nodes[name].end_lineno - nodes[name].lineno + 1
    return found


def test_the_tour_is_short():
    """A training update and a sample take fewer than 1,500 lines, nothing is named twice, all stages are."""
    lines = reading_list()
    claimed = numbers(re.search(r"\*\*Read\*\* is about ([\d,]+) lines", " ".join(TOUR.split()))[1])
    assert sum(lines.values()) < 1500 and abs(sum(lines.values()) - claimed[0]) <= 50, sum(lines.values())
    whole = {name for _, name in lines}
    assert not [name for name in whole if "." in name and name.partition(".")[0] in whole], "is named twice"
    assert {"train.py", "sample.py", "lm.py", "patterns.py", "conditioners.py", "chroma.py", "encodec.py",
            "rvq.py", "data/segments.py"} == {file for file, _ in lines} - {"data/stems.py"}


# --- commands ---------------------------------------------------------------------------------------------

def test_there_are_commands():
    scripts = {word for line in COMMANDS for word in line.split() if word.endswith(".py")}
    assert len(COMMANDS) > 60
    assert {"train.py", "sample.py", "data/prepare.py", "data/tunes.py", "tools/page.py", "tests/bench.py",
            "tests/deviations.py", "assets/pictures.py"} <= scripts


def check_train(argv):
    flags, settings = take_flags(argv)
    assert flags.get("--split", "valid") in SPLITS
    load([str(ROOT / word) if word.startswith("config/") else word for word in settings])


def check_tunes(argv):
    tunes.parse(argv)


def check_prepare(argv):
    args = prepare.parse(argv)
    if args.config:
        load([str(ROOT / args.config)])


def check_sample(argv):
    if "--help" not in argv:
        sampling_command.parse(MusicGen, argv)


def check_pictures(argv):
    assert set(argv) <= set(pictures().PICTURES) | {"model"}


PARSERS = {"train.py": check_train, "data/tunes.py": check_tunes, "data/prepare.py": check_prepare,
           "sample.py": check_sample, "assets/pictures.py": check_pictures}


def check_script(script: str, argv: list[str]):
    """The script is there, and its flags exist."""
    assert (ROOT / script).is_file(), script
    if script in PARSERS:
        return PARSERS[script](argv)
    known = set(re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text()))
    assert {word.partition("=")[0] for word in argv if word.startswith("--")} <= known


def check_paths(words: list[str]):
    """Files and folders among the arguments are there, or come from another command, or from the reader."""
    for word in words:
        path = word.rpartition("=")[2] if word.startswith("--") else word
        looks_so = re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+\.(py|txt|wav|mp3|json|md)", path)
        if looks_so and path not in PLACEHOLDERS and not path.startswith((*MADE, "facebook/")):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line):
    """The script is there, its flags exist, and the files it is given are there (or another command's)."""
    program, *words = shlex.split(line)
    words = words[:words.index("|")] if "|" in words else words     # a pipe, not the bar lines of notes
    program = program.rpartition("/")[2]
    if program == "git":
        assert words[0] in ("apply", "checkout", "lfs")
    elif program == "pip":
        assert words[0] == "install"
    elif words[0] == "-m":
        assert words[1] in ("pytest", "venv")
    elif words[0] != "-c":
        words = [word for word in words if not word.startswith("--nproc_per_node=")]
        check_script(words[0], words[1:])
    if words[0] != "-c":
        check_paths(words)


@pytest.mark.parametrize("line", EXPERIMENTS)
def test_experiment_prints_what_is_promised(line, capsys):
    exec(shlex.split(line)[2], {})
    printed = capsys.readouterr().out.strip()
    text = next(text for text in TEXTS.values() if line in text)
    promised = re.sub(r"(\d),(\d)", r"\1\2", text[:text.index(line)])[-600:]
    expected = [printed] if printed[0] == "[" else printed.split()
    assert expected and all(value in promised for value in expected), (printed, promised)


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if "```python" in text])
def test_python_runs(name, monkeypatch, capsys):
    """Examples in Python run, but for the music itself: its arguments are checked, nothing is generated.

    A block that follows at once is what the example prints.
    """
    monkeypatch.setattr(MusicGen, "generate", create_autospec(MusicGen.generate))
    monkeypatch.chdir(ROOT)
    blocks = r"^```python\n(.*?)^```\n(?:\n^```\n(.*?)^```)?"
    for code, promised in re.findall(blocks, TEXTS[name], flags=re.M | re.S):
        capsys.readouterr()
        exec(code, {})
        printed = capsys.readouterr().out
        assert not promised or printed == promised


@pytest.mark.parametrize("name", TEXTS)
def test_flags_in_prose_exist(name):
    """Flags of the commands take a blank, keys of the configuration an equals sign."""
    text = without_code_blocks(TEXTS[name])
    sources = ["sampling/command.py", "data/prepare.py", "data/tunes.py", "tests/bench.py"]
    source = "".join((ROOT / path).read_text() for path in sources)
    for flag in set(re.findall(r"`(--\w+)[^`]*`", text)):
        assert flag[2:] in FIELDS or flag in FLAGS or f'"{flag}"' in source, flag
    for key in set(re.findall(r"`--(\w+)=", text)):
        assert key in FIELDS or f"--{key}" in FLAGS, key


SCRIPTS = [path for pattern in ("*.py", "data/*.py", "tools/*.py", "assets/*.py")
           for path in sorted(ROOT.glob(pattern)) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_docstring_holds_the_command(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python {path.relative_to(ROOT)}" in docstring


# --- links and files --------------------------------------------------------------------------------------

def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", without_code_blocks(text), flags=re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", TEXTS)
def test_links_resolve(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", TEXTS)
def test_files_exist(name):
    text = without_code_blocks(TEXTS[name])
    # of a comparison the first column is ours
    ours = re.sub(r"^(\| [^|]*\| [\d,]+ \|).*$", r"\1", text, flags=re.M)
    for path in set(re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|c|txt|jsonl|patch|bin))`", ours)):
        # as in `kernels.c`, where its folder has been named
        there = (ROOT / path).exists() or list(ROOT.glob(f"*/{path}"))
        assert there or path in PLACEHOLDERS | RUN_FILES, path


# --- numbers of the configuration -------------------------------------------------------------------------

def audiocraft_keys() -> dict[str, str]:
    """{audiocraft's key: ours} as the docstring of config/melody.py has them."""
    docstring = ast.get_docstring(ast.parse((ROOT / "config/melody.py").read_text()))
    return dict(re.findall(r"^    ([a-z]\w*(?:\.\w+)*(?: \(\w+\))?)  +(\w+)", docstring, flags=re.M))


def python_value(text: str):
    """A number, tuple, bool or name as audiocraft's YAML writes it."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text


def test_every_number_of_audiocraft():
    melody, changed = load([str(ROOT / "config/melody.py")]), {}
    pairs = {}
    for audiocraft, value, ours, _ in rows(section(PARITY, "Every number of audiocraft's configuration")):
        audiocraft = audiocraft.strip("`")
        if ours == "always":
            assert audiocraft == "chroma_stem.argmax"
            continue
        key, other = re.fullmatch(r"`(\w+)`(?: = (\w+))?", ours).groups()
        name = f"{audiocraft} ({value})" if audiocraft == "fuser.prepend" else audiocraft
        pairs[name] = key
        if other:
            changed[key] = python_value(other)
        expected = changed[key] if other else python_value(value)
        assert getattr(melody, key) == expected, (key, expected)
    keys = audiocraft_keys()
    assert pairs == {name: key for name, key in keys.items() if key in FIELDS} and len(pairs) > 45
    different = {key for key in FIELDS if getattr(melody, key) != getattr(Config(), key)} - {"out_dir"}
    assert different <= changed.keys()


def test_letters():
    config = Config()
    letters = {}
    for row in rows(section(TOUR, "Letters")):
        letters |= dict(zip(row[::2], row[1::2]))
    values = {letter: numbers(meaning) for letter, meaning in letters.items()}
    head_width = config.dim // config.num_heads
    assert values["C, L"] == [config.channels] and values["Z"] == [config.dimension]
    assert values["T"] == [config.segment_frames, config.segment_duration]
    assert values["K"] == [config.n_q] and values["V"] == [config.card]
    assert values["M"] == [config.chroma_frames] and values["Q"] == [config.n_chroma]
    assert values["D"] == [config.dim] and values["H, E"] == [config.num_heads, head_width]
    assert {"B", "S", "P"} <= letters.keys()


def test_sizes_in_the_life_of_a_batch():
    config, text = Config(), section(TOUR, "Two walks")
    S = patterns.from_config(config).steps(config.segment_frames, keep_only_valid_steps=True)
    for name, value in (("B", config.batch_size), ("T", config.segment_frames), ("S", S),
                        ("M", config.chroma_frames), ("D", config.dim)):
        assert f"{name} = {value:,}" in text, name


def test_line_counts():
    """Within a fifth: of lines that change every week no more can be promised."""
    of_codec = {"codec.py", "losses.py", "discriminator.py"}
    for ours, count, *_ in rows(section(PARITY, "Sizes")):
        files = [ROOT / name for name in re.findall(r"`([\w./]+\.py)`", ours)]
        if "`training/`" in ours:
            files += [path for path in ROOT.glob("training/*.py") if path.name not in of_codec]
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert files and abs(lines - numbers(count)[0]) <= lines / 5, (ours, lines, count)


# --- numbers of the shipped model -------------------------------------------------------------------------

TINY = ROOT / "checkpoints" / "tiny"
FIGURES = json.loads((TINY / "eval_test.json").read_text())
CODEC_FIGURES = json.loads((TINY / "codec" / "eval_test.json").read_text())


def assert_table(title: str, figures: dict, columns: list[str]):
    """The cells of the table of a section of docs/results.md are those of an eval_test.json."""
    found, = tables(section(RESULTS, title))
    for name, *cells in found:
        for column, cell in zip(columns, cells, strict=True):
            value = figures[name.strip("`")].get(column)
            assert (value is None) == (not cell), (name, column)
            if cell:
                assert_figures(cell.lstrip("-"), [abs(value)])
                assert cell.startswith("-") == (value < 0) or float(cell) == 0, (name, column)


def test_figures_of_the_language_model():
    assert_table("The language model", FIGURES, ["real", "codec", "with_melody", "text_only"])
    text = section(RESULTS, "The language model")
    losses = re.search(r"track is ([\d.]+) nats, of codebooks 1 to 4 (.*?);\s.*?([\d.]+)\. What", text, re.S)
    assert_figures(losses[1], [FIGURES["loss"]])
    assert_figures(losses[2], [FIGURES[f"ce_{k}"] for k in range(1, 5)])
    assert_figures(losses[3], [FIGURES["own_loss"]])


def test_order_of_the_codebooks_in_the_log_of_a_run():
    """As docs/troubleshooting.md has it: codebook 1 is lowest after about a hundred updates, not before."""
    log = ROOT / "docs/records/2_start.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    orders = {"train": [], "valid": []}
    for line in lines:
        orders[line["split"]].append((line["update"], sorted(range(1, 5), key=lambda k: line[f"ce_{k}"])))
    assert all(order == [1, 2, 3, 4] for _, order in orders["valid"])
    assert all(order[0] == 1 for update, order in orders["train"] if update > 120)
    assert any(order[0] != 1 for update, order in orders["train"] if update < 100)


def test_caption_gains():
    gains = rows(section(RESULTS, "Why a small model learns to read text only with help"))
    for row, attribute in zip(gains, ("instrument", "drums", "tempo"), strict=True):
        for cell, suffix in zip(row[1:], ("", "_codes_hidden"), strict=True):
            name = f"caption_gain_{attribute}{suffix}"
            assert_figures(cell.lstrip("-"), [abs(FIGURES[name])])
            assert cell.startswith("-") == (FIGURES[name] < 0)


def test_figures_of_the_codec():
    figures = CODEC_FIGURES
    assert_table("The codec", figures, ["codec", "opus_6", "opus_8", "opus_12", "opus_16"])
    of_instruments = [value for name, value in figures.items() if name.startswith("chroma_agreement ")]
    text = section(RESULTS, "The codec")
    agreement = re.search(r"class of ([\d.]+) of the chroma frames survives \(.*?, ([\d.]+)\)", text, re.S)
    assert_figures(agreement[1], [figures["chroma_agreement"]])
    assert_figures(agreement[2], [min(of_instruments)])
    use = re.search(r"In use are (.*?) of the entries.*?codes\s+is\s+(.*?)\.\n", text, re.S)
    assert_figures(use[1], figures["live"])
    assert_figures(use[2], figures["perplexity"])


def test_our_rows_beside_published_figures():
    first = rows(section(RESULTS, "Beside published figures"))[:3]
    for cells, column in zip(first, ("with_melody", "real", "text_only"), strict=True):
        for cell, name in zip(cells[-2:], ("melody_accuracy", "chroma_agreement"), strict=True):
            assert_figures(cell, [FIGURES[name][column]])


def test_results_in_readme():
    row, _ = rows(section(README, "Results"))      # the second one is of speed
    names = [("notes_right", "with_melody"), ("instrument", "with_melody"), ("drums", "with_melody"),
             ("tempo", "text_only"), ("octave_leaps", "with_melody")]
    for cell, (name, column) in zip(row, names):
        shown, real = cell.rstrip(")").split(" (")
        assert_figures(shown, [FIGURES[name][column]])
        assert_figures(real, [FIGURES[name]["real"]])
    assert_figures(row[-1], [FIGURES["loss"]])


# --- numbers of the demos and of --plan -------------------------------------------------------------------

def test_demo_of_the_quantizer():
    """Half a bit a number: no codebook can leave less than half of the power of Gaussian numbers."""
    result = command(lambda argv: runpy.run_path(str(ROOT / "rvq.py"), run_name="__main__"))
    worked(result)
    errors = [float(error) for error in re.findall(r"error +([\d.]+) %", result.out)]
    assert len(errors) == 6
    assert all(0.5 < b / a < 0.7 for a, b in zip([100.0, *errors], errors)), errors
    promised = numbers(re.search(r"Expect ([\d %,]+) \.\.\. of their power", " ".join(TOUR.split()))[1])
    assert promised == pytest.approx(errors[:3], abs=1)


def test_demo_of_the_codec():
    result = command(encodec_demo, ROOT / "assets/ode_to_joy.wav")
    worked(result)
    errors = re.findall(r"error .* = ([\d.]+)", result.out)
    assert len(errors) == 4 and ", ".join(errors) in " ".join(TOUR.split())


def test_demo_of_the_language_model():
    result = command(lambda argv: lm.demo())
    worked(result)
    assert "1.39 B" in result.out and "0.42 B" in result.out
    assert float(re.search(r"largest difference (\S+)", result.out)[1]) < 1e-5


def test_demo_of_the_conditioners():
    result = command(lambda argv: conditioners.demo())
    worked(result)
    assert re.search(r"loud  0+ \| #+\.+", result.out), result.out


def test_demo_of_chroma():
    result = command(chroma.main)
    worked(result)
    assert result.out.count("########") >= 8


PLANS = [row for row in rows(TRAINING) if "--plan" in row[0]]


@pytest.mark.parametrize("row", PLANS, ids=lambda row: row[0].strip("`"))
def test_memory_by_plan(row):
    _, _, *argv = shlex.split(row[0].strip("`"))
    argv = [str(ROOT / word) if "/" in word else word for word in argv]
    result = command(train_main, *argv, "--device=cpu")
    worked(result)
    planned = re.findall(r"^  \w+ +([\d.]+) GB", result.out, flags=re.M)
    for cell, figure in zip(row[1:], planned, strict=True):
        assert_figures(cell, [float(figure)])


def test_plan_of_the_melody_model():
    result = command(train_main, ROOT / "config/melody.py", "--plan=8", "--device=cpu")
    worked(result)
    for number in ("1,385.6 M", "1,152,000 tokens"):
        assert number in result.out and number in TOUR
    together = re.search(r"together +([\d.]+) GB", result.out)[1]
    shown = re.findall(r"([\d.]+) GB\s+(?:a\s+process|for each of eight processes)", README + TOUR)
    assert len(shown) == 2
    for number in shown:
        assert_figures(number, [float(together)])


# --- pictures ---------------------------------------------------------------------------------------------

def pictures():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "assets" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_drawn_shown_described_and_small():
    shown = []
    for name, text in TEXTS.items():
        for alt, path in re.findall(r"!\[(.*?)\]\((.*?)\)", text):
            shown.append((alt, ((ROOT / name).parent / path).resolve()))
    assert {path for _, path in shown} == {ROOT / "assets" / f"{name}.png" for name in pictures().PICTURES}
    assert all(len(alt) > 20 for alt, _ in shown)
    sizes = {path: path.stat().st_size for _, path in shown}
    assert max(sizes.values()) < 170_000 and sum(sizes.values()) < 1_500_000, sizes


def test_a_picture_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, an optional extra")
    module = pictures()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    worked(command(module.main, "patterns"))
    assert (tmp_path / "assets" / "patterns.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_mistakes_about_pictures(monkeypatch):
    with pytest.raises(UserError, match="no such picture"):
        pictures().main(["portrait"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        pictures().main(["patterns"])
    monkeypatch.setattr(browser, "CHROMIUM", None)
    with pytest.raises(UserError, match="needs Chromium"):
        pictures().served()


@pytest.mark.slow
def test_the_short_run_of_a_picture(tmp_path):
    lines = pictures().short_run(tmp_path)
    assert lines[0]["d_lr"] < 1e-6 and max(line["d_lr"] for line in lines) > 1e-4
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
