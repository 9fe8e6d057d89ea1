"""docs/first_run.ipynb: stored without outputs, its commands exist, and its cells run from top to bottom."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from trainer import Config
from training.command_line import flag

NOTEBOOK = ROOT / "docs" / "first_run.ipynb"
SECONDS = 600  # for a training on a busy machine
# What a notebook has and Python has not; a command that fails ends the notebook here.
NOTEBOOK_ONLY = """
import subprocess, sys, types
def shell(command):
    subprocess.run(command, shell=True, check=True)
def show(path):
    with open(path, "rb") as file:
        assert file.read(4) == b"\\x89PNG"
    print("shown:", path)
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython.display"] = types.SimpleNamespace(Image=str, display=show)
"""


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def commands() -> list[list[str]]:
    """Returns the words of every command, of code cells and of the blocks and spans in text cells."""
    lines = [line.strip("! ") for cell in cells("code") for line in cell["source"] if line.lstrip()[:1] == "!"]
    text = "\n".join(map(source, cells("markdown")))
    lines += "".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    lines += [span for span in re.findall(r"`([^`\n]+)`", text) if " " in span]
    return [shlex.split(line) for line in lines]


def flags_of(script: str) -> set[str]:
    if script == "trainer.py":
        names = {flag(name) for name in vars(Config) if not name.startswith("_")}
        return names | {name.replace("--", "--no-", 1) for name in names}
    return {*re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text())}


def test_it_is_stored_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_every_command_names_a_script_and_flags_that_it_has():
    found = commands()
    assert {words[1] for words in found} >= {"trainer.py", "predict.py", "evaluate.py", "tools/download_coco.py"}
    for program, script, *rest in found:
        assert program in ("python", "torchrun")
        assert (ROOT / script).is_file(), script
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= flags_of(script), script


def as_python(cell: dict) -> str:
    """Returns a cell's code with a call in the place of each line for the shell; $name is a variable's value."""
    def call(line: re.Match) -> str:
        command = re.sub(r"\$(\w+)", r"{\1}", line[3])
        return f'{line[1]}shell(f"{"python -m pip" if line[2] == "%pip" else ""}{command}")'

    return re.sub(r"^( *)(!|%pip)(.*)$", call, source(cell), flags=re.MULTILINE)


@pytest.fixture
def clone(tmp_path) -> Path:
    """The program's files, without what trainings have left there."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / ".github", clone / ".github")
    for folder in ("cutting", "docs", "loading", "tools", "training"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, clone)
    return clone


@pytest.mark.slow
def test_its_cells_run_from_top_to_bottom(clone, start_process, tmp_path):
    code = "\n".join(map(as_python, cells("code")))
    short = re.sub(r"^EPOCHS = \d+", "EPOCHS = 1", code, flags=re.MULTILINE)
    assert short != code
    (tmp_path / "cells.py").write_text(f"{NOTEBOOK_ONLY}\nimport os\nos.chdir({str(clone / 'docs')!r})\n{short}")
    process = start_process(tmp_path / "cells.py", PYTHONPATH="")  # it has to find everything by itself
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, output
    assert re.findall("shown: (.*)", output) == [
        *("checkpoints/sample/preview.png", "checkpoints/sample/curves.png"),
        *("data/first_run/astronaut.png", "cutouts/astronaut.png"),
    ]
    assert "the best epoch was 1 of 1" in output
    with Image.open(clone / "cutouts" / "astronaut.png") as cutout:
        assert (cutout.mode, cutout.size) == ("RGBA", (512, 512))
        alpha = cutout.getchannel("A")
    assert alpha.getpixel((225, 140)) > 200  # her face
    assert alpha.getpixel((20, 20)) < 50
    assert {path.name for path in tmp_path.iterdir()} <= {"clone", "cells.py", "cache", "torch"}


def test_opened_alone_it_asks_for_the_address(tmp_path, start_process):
    (tmp_path / "cells.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{source(cells('code')[0])}")
    output = start_process(tmp_path / "cells.py").communicate(timeout=SECONDS)[0]
    assert output.splitlines()[-1].startswith("RuntimeError: trainer.py is not here: set REPOSITORY")
