"""The house: what lies at the top level, and that its stairs go down only."""

from __future__ import annotations

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = {
    *("trainer.py", "evaluate.py", "predict.py", "datasets.py", "models.py", "utils.py"),
    *("loading", "training", "cutting", "tools", "tests", "checkpoints"),
    *("README.md", "README.es.md", "LICENSE", "requirements.txt", "requirements-dev.txt", "pyproject.toml"),
}
ALLOWED = {  # on each floor a file may import from these
    "utils": set(),
    "models": {"utils"},
    "loading": {"loading", "utils", "models"},
    "datasets": {"loading", "utils", "models"},
    "cutting": {"cutting", "datasets", "loading", "utils", "models"},
    "training": {"training", "datasets", "loading", "utils", "models"},
}
COMMAND = {"training", "cutting", "datasets", "loading", "utils", "models"}
ALLOWED |= {"trainer": COMMAND | {"tools"}, "evaluate": COMMAND, "predict": COMMAND}  # trainer.py --sample draws it
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")])
SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0].removesuffix(".py") in ALLOWED]


def imported_by(path: Path) -> set[str]:
    """The modules of the project that a file imports, wherever in it and for whatever purpose."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{name.name}" for name in node.names}
            found |= {part for part in parts if (ROOT / (part.replace(".", "/") + ".py")).exists()} or {node.module}
    return {name for name in found if name.split(".")[0] in {*ALLOWED, "tools", "tests"}}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_its_own_wing_or_from_below(path):
    floor = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert {name.split(".")[0] for name in imported_by(path)} <= ALLOWED[floor]


def test_no_two_files_import_each_other():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    TopologicalSorter({name: imported_by(path) for name, path in names.items()}).prepare()  # raises on a circle


def test_no_wing_knows_config():
    for path in SOURCES:
        if path.parent != ROOT:
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert "Config" not in names


def test_the_top_level_is_the_designs():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no clone of the repository")
    assert {line.split("/")[0] for line in listed.stdout.splitlines() if line[0] != "."} == TOP
