"""The README says what is so: commands, names, numbers, pictures.

    python -m pytest tests/test_readme.py
"""
import ast
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

import chroma
import conditioners
import lm
import patterns
import rvq
import sample
import train
from config import FIELDS, Config, UserError, load
from helpers import command, worked

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
MODULES = [importlib.import_module(name) for name in (
    "patterns", "rvq", "encodec", "chroma", "conditioners", "lm", "train", "sample", "config", "data.audio", "data.segments", "data.measures")]
PLACEHOLDERS = {"tune.mp3", "song.mp3", "song.txt", "song.json", "MY_MUSIC", "FOLDER_OF_AUDIO"}


def commands() -> list[str]:
    """All commands: indented lines, and what stands in backquotes; joined ones apart, without comments."""
    lines = re.findall(r"^(?: {4}|\t)+(.*)$", README, flags=re.M) + re.findall(r"`((?:python|torchrun|pip|git) [^`]+)`", README)
    lines = [part.strip() for line in lines for part in (line.split("&&") if " -c " not in line else [line])]
    return sorted({re.sub(r"\s+# .*", "", line).strip() for line in lines if re.match(r"(pip|git) |(python|torchrun) .*(\.py|-[mc])\b", line)})


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, flags=re.M | re.S)[1]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables in a text, without their heads."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    lines = [[cell.strip(" |") for cell in line] for line in lines]
    return [line for n, line in enumerate(lines) if not set("".join(line)) <= set("- |") and
            not (n + 1 < len(lines) and set("".join(lines[n + 1])) <= set("- |"))]


# --- commands -------------------------------------------------------------------------------------------------------

def test_there_are_commands():
    scripts = {word for line in commands() for word in line.split() if word.endswith(".py")}
    assert len(commands()) > 30 and {"train.py", "sample.py", "data/prepare.py", "data/tunes.py", "assets/pictures.py"} <= scripts


@pytest.mark.parametrize("line", commands())
def test_command_parses(line):
    """The script is there, its flags exist, and the files it is given are there (or made by an earlier command)."""
    words = shlex.split(line)
    if words[0] == "git":
        assert words[1] == "checkout" or (ROOT / words[-1]).is_file()
        return
    if words[0] == "pip":
        assert words[1] == "install" and ("-r" not in words or (ROOT / words[words.index("-r") + 1]).is_file())
        return
    words = [word for word in words[1:] if not word.startswith("--nproc_per_node=")]
    if words[0] in ("-m", "-c"):
        assert words[0] == "-c" or words[1] in ("pytest", "venv")
        return
    script, argv = words[0], words[1:]
    assert (ROOT / script).is_file(), script
    if script == "sample.py" and "--help" not in argv:
        args = sample.parse(argv)
        for path in [*(args.melody or []), args.prompt or "assets"]:
            assert path in PLACEHOLDERS or (ROOT / path).exists(), path
    elif script == "train.py":
        own = [word for n, word in enumerate(argv) if word in ("--plan", "--eval", "--resume", "--split") or argv[n - 1] == "--split"]
        config = load([str(ROOT / word) if word.startswith("config/") else word for word in argv if word not in own])
        assert "--split" not in argv or argv[argv.index("--split") + 1] in train.SPLITS
        assert config.task in ("lm", "codec")
    else:
        known = set(re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text())) | {"--help"}
        assert {word.partition("=")[0] for word in argv if word.startswith("--")} <= known
        if "--config" in argv:
            load([str(ROOT / argv[argv.index("--config") + 1])])
        if script == "assets/pictures.py":
            assert set(argv) <= set(pictures().PICTURES) | {"model"}


@pytest.mark.parametrize("line", [line for line in commands() if " -c " in line])
def test_experiment_prints_what_is_promised(line, capsys):
    exec(shlex.split(line)[2], {})
    printed = capsys.readouterr().out.strip()
    promised = re.sub(r"(\d),(\d)", r"\1\2", README[:README.index(line)])[-600:]
    expected = [printed] if printed[0] == "[" else printed.split()
    assert expected and all(value in promised for value in expected), (printed, promised)


def test_flags_in_prose_exist():
    """Flags of sample.py take a blank, keys of the configuration an equals sign."""
    for flag in set(re.findall(r"`(--\w+)[^`]*`", PROSE)):
        source = "".join((ROOT / name).read_text() for name in ("sample.py", "train.py", "data/prepare.py"))
        assert flag[2:] in FIELDS or f'"{flag}"' in source, flag
    for key in set(re.findall(r"`--(\w+)=", PROSE)):
        assert key in FIELDS, key


# --- names --------------------------------------------------------------------------------------------------------

def found(name: str) -> bool:
    first, *rest = name.split(".")
    if (ROOT / name.replace(".", "/")).with_suffix(".py").exists() or first == "data":
        module = importlib.import_module(".".join(name.split(".")[:2]))
        return all(hasattr(module, part) for part in name.split(".")[2:])
    for module in MODULES:
        if hasattr(module, first):
            thing = getattr(module, first)
            for part in rest:
                thing = getattr(thing, part, None)
            if thing is not None:
                return True
    return False


@pytest.mark.parametrize("chapter", range(1, 9))
def test_chapter_names_what_is_there(chapter):
    text = re.search(rf"^### {chapter}\. .*?\n(.*?)(?=^### |^## )", README, flags=re.M | re.S)[1]
    file = re.search(r"\*`(\w+\.py)`", text)[1]
    source = (ROOT / file).read_text()
    read = re.search(r"- \*\*Read\*\*(.*)", text)[1]
    names = re.findall(r"`([A-Za-z_][\w.]*)`", read)
    assert names and all(found(name) for name in names), [name for name in names if not found(name)]
    for name in names:     # and in this chapter's file
        assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", source, re.M), (file, name)
    assert "![" in text and ("```math" in text or chapter == 8)
    assert "- **Try**" in text and "xpect" in text


def test_lives_name_what_is_there():
    names = [name for title in ("The life of a batch", "The life of a sample") for row in rows(section(title))
             for name in re.findall(r"`([A-Za-z_][\w.]*)`", row[1])]
    assert len(names) > 25 and all(found(name) for name in names), [name for name in names if not found(name)]


def test_files_and_links_exist():
    ours = re.sub(r"^(\| [^|]*\| [\d,]+ \|).*$", r"\1", PROSE, flags=re.M)  # of the comparison the first column
    for path in set(re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|c|txt|jsonl|patch))`", ours)) - PLACEHOLDERS:
        assert (ROOT / path).exists() or path in ("metrics.jsonl", "skipped.txt"), path
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        if target.startswith("#"):
            heads = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", README, flags=re.M)]
            assert target[1:] in heads, target
        elif not target.startswith("https://"):
            assert (ROOT / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", [p for p in sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), ROOT / "assets" / "pictures.py"])
                                  if "__main__" in p.read_text()], ids=lambda p: p.name)
def test_docstring_holds_the_command(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python {path.relative_to(ROOT)}" in docstring


# --- numbers ------------------------------------------------------------------------------------------------------

def test_every_number_of_the_original():
    config, lines = load([str(ROOT / "config/melody.py")]), (ROOT / "config/melody.py").read_text().splitlines()
    told = set()
    for original, value, ours, *_ in rows(section("Every number of the original")):
        key, line, other = re.fullmatch(r"\[`(\w+)`\]\(config/melody\.py#L(\d+)\)(?: = (\w+))?", ours).groups()
        assert lines[int(line) - 1].startswith(f"{key} = "), (key, line)
        value = other or value
        expected = getattr(config, key)
        value = value if isinstance(expected, str) else ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
        assert value == expected, (key, value, expected)
        told.add(key)
    held = {line.partition(" = ")[0] for line in lines if re.match(r"\w+ = ", line)}
    assert told == held - {"task", "out_dir"}


def test_letters():
    config = Config()
    cells = [cell for row in rows(section("The tour").partition("### 1.")[0]) for cell in row]
    letters = dict(zip(cells[::2], cells[1::2]))
    numbers = {letter: [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", meaning)] for letter, meaning in letters.items()}
    assert numbers["K"] == [config.n_q] and numbers["V"] == [config.card] and numbers["M"] == [config.chroma_frames]
    assert numbers["T"] == [config.sample_rate / config.stride] and numbers["Q"] == [config.n_chroma]
    assert numbers["Z"] == [config.dimension] and numbers["D"] == [config.dim]
    assert numbers["N, H, E"] == [config.num_layers, config.num_heads, config.dim // config.num_heads]
    assert len(letters) == 13 and {"B", "S", "C", "L", "P"} <= set(letters)


def test_sizes_in_the_life_of_a_batch():
    config, text = Config(), section("The life of a batch")
    for name, value in (("B", config.batch_size), ("T", config.segment_frames), ("M", config.chroma_frames), ("D", config.dim),
                        ("S", patterns.from_config(config).steps(config.segment_frames, keep_only_valid_steps=True))):
        assert f"{name} = {value:,}" in text, name


def test_line_counts():
    """Within a fifth: of lines that change every week no more can be promised."""
    for row in rows(section("How it differs")):
        files = re.findall(r"`([\w./]+\.py)`", row[0])
        lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
        assert files and abs(lines - int(row[1].replace(",", ""))) <= lines / 5, (files, lines, row[1])


# --- demos --------------------------------------------------------------------------------------------------------

def test_demo_of_the_quantizer():
    """Half a bit a number: the error halves with every codebook, and no more."""
    import runpy
    result = command(lambda argv: runpy.run_path(str(ROOT / "rvq.py"), run_name="__main__"))
    worked(result)
    errors = [float(error) for error in re.findall(r"error +([\d.]+) %", result.out)]
    assert len(errors) == 6 and all(0.4 < b / a < 0.55 for a, b in zip([100.0, *errors], errors)), errors


def test_demos_show_what_is_promised():
    result = command(lambda argv: lm.demo())
    worked(result)
    assert "1.39 B" in result.out and "0.42 B" in result.out
    assert float(re.search(r"largest difference (\S+)", result.out)[1]) < 1e-5
    result = command(lambda argv: conditioners.demo())
    worked(result)
    assert re.search(r"loud  0+ \| #+\.+", result.out), result.out
    result = command(chroma.main)
    worked(result)
    assert result.out.count("########") >= 8
    result = command(train.main, str(ROOT / "config/melody.py"), "--plan", "--device=cpu")
    worked(result)
    assert "1,385.6 M" in result.out and "1,152,000 tokens" in result.out and "1,385.6 M" in README and "1,152,000" in README


# --- pictures -----------------------------------------------------------------------------------------------------

def pictures():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "assets" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_drawn_shown_described_and_small():
    shown = dict((path, alt) for alt, path in re.findall(r"!\[(.*?)\]\((.*?)\)", README))
    assert set(shown) == {f"assets/{name}.png" for name in pictures().PICTURES}
    assert all(len(alt) > 20 for alt in shown.values())
    sizes = {path: (ROOT / path).stat().st_size for path in shown}
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
