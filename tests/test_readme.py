"""Both READMEs against the code and against each other: commands, flags, defaults, messages, figures, licences."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, save_picture

from models import ENCODERS
from trainer import Config
from training.command_line import flag

READMES = ("README.md", "README.es.md")
SCRIPT = re.compile(r"[\w/]+\.py")
FOREIGN = {"--shm-size", "--ipc", "--nproc-per-node", "--max-restarts"}  # of docker and torchrun
LICENCES = ("MPL", "MIT", "BSD", "Apache", "matplotlib")


def read(name: str) -> str:
    return re.sub(r"<!--.*?-->", "", (ROOT / name).read_text(), flags=re.DOTALL)


@pytest.fixture(params=READMES)
def text(request) -> str:
    return read(request.param)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """What stands in backticks, its line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def commands(text: str) -> list[str]:
    """Those that run a script, of the blocks and of the prose, without comments."""
    lines = [re.split(r"\s+#", line)[0] for block in blocks(text) for line in block.splitlines()]
    parts = [part.strip() for line in [*lines, *spans(text)] for part in line.split("&&")]
    return [part for part in parts if re.search(r"\b(python|torchrun) .*\.py", part)]


def flags_of(script: str) -> set[str]:
    if script == "trainer.py":
        names = {flag(name) for name in vars(Config) if not name.startswith("_")}
        return names | {name.replace("--", "--no-", 1) for name in names} | {"--help"}
    return {"--help", "--version", *re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text())}


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def sections(text: str) -> list[str]:
    return re.split(r"^#+ .*$", text, flags=re.MULTILINE)


def test_every_command_flag_file_and_link_that_is_named_exists(text):
    known = FOREIGN.union(*(flags_of(path) for path in ("trainer.py", "evaluate.py", "predict.py", "tools/export.py")))
    found = commands(text)
    assert len(found) > 15
    for command in found:
        words = shlex.split(command)
        place = next(n for n, word in enumerate(words) if SCRIPT.fullmatch(word))
        given = {word.split("=")[0] for word in words[place:] if word.startswith("--")}
        assert (ROOT / words[place]).is_file(), command
        assert given <= flags_of(words[place]), command
        known |= given
    for span in spans(text):
        assert {*re.findall(r"(?<!\w)--[a-z][\w-]*", span)} <= known, span
        if re.fullmatch(r"(\w+/)*\w+\.py|(loading|training|cutting|tools)/(\w+\.md)?|requirements\S*", span):
            assert (ROOT / span).exists(), span
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


def test_every_default_in_the_table_is_configs(text):
    table = rows(next(part for part in sections(text) if "| `encoder` |" in part))[2:]
    shown = [pair for names, values, _ in table for pair in zip(spans(names), spans(values), strict=True)]
    assert len(shown) > 12
    for name, value in shown:
        expected = vars(Config)[name]
        number = isinstance(expected, float) and float(value) == expected
        assert number or value in (str(expected), repr(expected).replace("'", '"')), name


def test_every_message_in_the_table_is_one_that_the_program_prints(text):
    table = next(part for part in sections(text) if "no COCO data" in part)
    found = [spans(row[0]) for row in rows(table)[2:]]
    assert len(found) == 10
    assert all(found)
    sources = [path for place in ("", "loading", "training", "cutting") for path in (ROOT / place).glob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    printed = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for part in (part for messages in found for message in messages for part in message.split(" ... ")):
        assert any(part in text for text in printed), part


def test_the_encoders_that_the_table_names_are_all_there_are(text):
    row = next(row for row in rows(text) if row[0] == "`encoder`")
    assert set(re.findall("`([^`]+)`", "".join(row[1:]))) == set(ENCODERS)


def test_the_lines_of_python_run(tmp_path, small_checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    shutil.copy(small_checkpoint, "checkpoints/best_model.pth")
    save_picture(Path("photo.jpg"))
    found = {}
    exec(next(block for block in blocks(read("README.md")) if "import load" in block), found)
    assert found["rgba"].shape == (50, 70, 4)


def test_both_are_short_and_say_the_same():
    ours, theirs = map(read, READMES)
    assert max(len(ours.splitlines()), len(theirs.splitlines())) < 180
    code, other_code = ([re.sub(r"(?m)(^|\s+)#.*", "", block) for block in blocks(text)] for text in (ours, theirs))
    assert code == other_code
    assert re.findall(r"(?m)^#+", ours) == re.findall(r"(?m)^#+", theirs)
    for part, other in zip(sections(ours), sections(theirs), strict=True):
        assert set(spans(part)) == set(spans(other))
        assert figures(prose(part)) == figures(prose(other))


def figures(text: str) -> set[str]:
    """Numbers, thousands without their comma; those of names are `spans`."""
    return set(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d{3})", r"\1\2", re.sub(r"`[^`]*`", "", text))))


def requirements() -> list[str]:
    lines = [line for name in ("", "-dev") for line in (ROOT / f"requirements{name}.txt").read_text().splitlines()]
    return [line for line in lines if line[:1] not in "#-"]


@pytest.mark.parametrize("line", requirements())
def test_a_requirement_says_what_it_is_for_and_its_licence_is_what_the_package_says(line):
    package, licence = re.fullmatch(r"([\w-]+).*# .{8,} \((.+)\)", line).groups()
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License")]
    said = " ".join([metadata["License-Expression"] or "", metadata["License"] or "", *classifiers])
    assert any(name in licence and name in said for name in LICENCES), said[:200]
