"""docs/first_run.ipynb: stored without outputs, its commands exist, and its cells run from top to bottom."""

from __future__ import annotations

import json
import re
import shutil

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


def test_it_is_stored_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_every_command_names_a_script_and_flags_that_it_has():
    text = "\n".join(map(source, cells("code") + cells("markdown")))
    found = re.findall(r"\b(?:python|torchrun) (\S+\.py)([^`\n]*)", text)
    assert {script for script, _ in found} >= {"trainer.py", "predict.py", "evaluate.py", "tools/download_coco.py"}
    for script, arguments in found:
        known = {*re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text())}
        known |= {flag(name) for name in vars(Config)} if script == "trainer.py" else set()
        assert {*re.findall(r"--[\w-]+", arguments)} <= known, script


def as_python(cell: dict) -> str:
    """Returns a cell's code with a call in the place of each line for the shell; $name is a variable's value."""
    def call(line: re.Match) -> str:
        command = re.sub(r"\$(\w+)", r"{\1}", line[3])
        return f'{line[1]}shell(f"{"python -m pip" if line[2] == "%pip" else ""}{command}")'

    return re.sub(r"^( *)(!|%pip)(.*)$", call, source(cell), flags=re.MULTILINE)


@pytest.mark.slow
def test_its_cells_run_from_top_to_bottom(start_process, tmp_path):
    clone = tmp_path / "clone"  # the program's files, without what trainings have left there
    for folder in (".github", "cutting", "docs", "loading", "tools", "training"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, clone)
    code = "\n".join(map(as_python, cells("code")))
    short = re.sub(r"^EPOCHS = \d+", "EPOCHS = 1", code, flags=re.MULTILINE)
    assert short != code
    (tmp_path / "cells.py").write_text(f"{NOTEBOOK_ONLY}\nimport os\nos.chdir({str(clone / 'docs')!r})\n{short}")
    process = start_process(tmp_path / "cells.py", PYTHONPATH="")  # it has to find everything by itself
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, output
    shown = ["sample/preview.png", "sample/curves.png", "first_run/astronaut.png", "cutouts/astronaut.png"]
    assert re.findall(r"shown: .*?([^/\n]+/[^/\n]+)$", output, re.MULTILINE) == shown
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
