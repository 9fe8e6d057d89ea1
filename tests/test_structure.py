"""The structure of the project: what lies at the top level, and imports that run one way."""

from __future__ import annotations

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

TOP_LEVEL = """
    trainer.py evaluate.py predict.py datasets.py models.py utils.py loading training cutting tools tests docs
    README.md README.es.md CONTRIBUTING.md CHANGELOG.md LICENSE requirements.txt requirements-dev.txt checkpoints
    pyproject.toml
"""
BELOW = {"datasets", "loading", "utils", "models"}
ALLOWED = {  # what files of each package, or a file at the top level, may import from
    "utils": set(),
    "models": {"utils"},
    "loading": {"loading", "utils", "models"},
    "datasets": {"loading", "utils", "models"},
    "cutting": {"cutting", *BELOW},
    "training": {"training", *BELOW},
    "evaluate": {"training", "cutting", *BELOW},
    "predict": {"training", "cutting", *BELOW},
    "trainer": {"training", "cutting", "tools", *BELOW},  # --sample draws the sample
}


def imports_of(path: Path) -> set[str]:
    """Returns the project's modules that a file imports, wherever in it and for whatever purpose."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{name.name}" for name in node.names}
            modules |= {name for name in names if (ROOT / (name.replace(".", "/") + ".py")).exists()} or {node.module}
    return {name for name in modules if name.split(".")[0] in {*ALLOWED, "tools", "tests"}}


def test_a_file_imports_from_its_own_package_or_from_below_and_never_in_a_circle():
    imports = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]:
        package, *names = path.relative_to(ROOT).with_suffix("").parts
        if package in ALLOWED:
            imports[".".join([package, *names])] = found = imports_of(path)
            assert {name.split(".")[0] for name in found} <= ALLOWED[package], path
    assert len(imports) > 40
    TopologicalSorter(imports).prepare()  # raises on a cycle


def test_the_top_level_is_the_designs():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no clone of the repository")
    assert {line.split("/")[0] for line in listed.stdout.splitlines() if line[0] != "."} == {*TOP_LEVEL.split()}
