"""Both READMEs against the code and against each other: commands, flags, defaults, messages, figures, licences."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import save_picture

from models import ENCODERS
from trainer import Config
from training.command_line import flag

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.es.md")
SCRIPT = re.compile(r"[\w/]+\.py")
FOREIGN = {"--shm-size", "--ipc", "--nproc-per-node", "--max-restarts"}  # of docker and torchrun
LICENCES = ("MPL", "MIT", "BSD", "Apache", "matplotlib")


@pytest.fixture(params=READMES)
def text(request) -> str:
    return read(request.param)


@functools.cache
def read(name: str) -> str:
    return re.sub(r"<!--.*?-->", "", (ROOT / name).read_text(), flags=re.DOTALL)


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


def test_every_command_names_a_script_and_flags_that_it_has(text):
    found = commands(text)
    assert len(found) > 15
    for command in found:
        words = shlex.split(command)
        place = next(n for n, word in enumerate(words) if SCRIPT.fullmatch(word))
        assert (ROOT / words[place]).is_file(), command
        given = {word.split("=")[0] for word in words[place:] if word.startswith("--")}
        assert given <= flags_of(words[place]), command


def test_every_flag_and_file_that_is_named_exists(text):
    known = FOREIGN.union(*(flags_of(path) for path in ("trainer.py", "evaluate.py", "predict.py", "tools/export.py")))
    known |= {option for command in commands(text) for option in re.findall(r"--[\w-]+", command)}  # tested above
    named = {option for span in spans(text) for option in re.findall(r"(?<!\w)--[a-z][\w-]*", span)}
    assert named <= known
    for span in spans(text):
        if re.fullmatch(r"(\w+/)*\w+\.py|(loading|training|cutting|tools)/(\w+\.md)?|requirements\S*", span):
            assert (ROOT / span).exists(), span
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


def test_every_default_in_the_table_is_configs(text):
    defaults, seen = vars(Config), set()
    for names, values, *_ in rows(text):
        pairs = list(zip(re.findall("`([^`]+)`", names), re.findall("`([^`]+)`", values), strict=False))
        if not pairs or pairs[0][0] not in defaults:
            continue
        assert len(pairs) == names.count("`") / 2 == values.count("`") / 2, names
        for name, value in pairs:
            expected = defaults[name]
            number = isinstance(expected, float) and float(value) == expected
            assert number or value in (str(expected), repr(expected).replace("'", '"')), name
            seen.add(name)
    assert len(seen) > 12


def test_every_message_in_the_table_is_one_that_the_program_prints(text):
    table = next(part for part in sections(text) if "no COCO data" in part)
    found = [spans(row[0]) for row in rows(table)[2:]]
    assert len(found) == 10
    assert all(found)
    for message in (message for messages in found for message in messages):
        assert all(part in printed() for part in message.split(" ... ")), message


@functools.cache
def printed() -> str:
    """All texts of the programs, what stands between the pieces of an f-string as a gap."""
    found = []
    for path in (path for place in ("", "loading", "training", "cutting") for path in (ROOT / place).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


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


@pytest.mark.parametrize(("name", "lines"), [("README.md", 180), ("README.es.md", 180)])
def test_it_stays_short(name, lines):
    assert len(read(name).splitlines()) < lines


def test_both_have_the_same_code():
    ours, theirs = ([re.sub(r"(?m)(^|\s+)#.*", "", block) for block in blocks(read(name))] for name in READMES)
    assert ours == theirs


def test_both_have_the_same_headings_and_tables():
    ours, theirs = map(read, READMES)
    assert re.findall(r"(?m)^#+", ours) == re.findall(r"(?m)^#+", theirs)
    for row, other in zip(rows(ours), rows(theirs), strict=True):
        assert list(map(spans, row[:2])) == list(map(spans, other[:2]))


def test_both_have_the_same_figures_and_names_in_every_section():
    for part, other in zip(*(sections(read(name)) for name in READMES), strict=True):
        assert set(spans(part)) == set(spans(other))
        ours, theirs = (figures(prose(text)) for text in (part, other))
        assert ours == theirs


def figures(text: str) -> set[str]:
    """Numbers, thousands without their comma; those of names are `spans`."""
    return set(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d{3})", r"\1\2", re.sub(r"`[^`]*`", "", text))))


def test_each_leads_to_the_other():
    assert f"({READMES[1]})" in read(READMES[0]).partition("##")[0]
    assert f"({READMES[0]})" in read(READMES[1]).partition("##")[0]


def requirements() -> list[tuple[str, str]]:
    """Every package that is required, with the comment beside it."""
    files = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt")]
    lines = [line for file in files for line in file.splitlines()]
    return [(re.match(r"[\w-]+", line).group(), line.partition("#")[2]) for line in lines if line[:1] not in "#-"]


@pytest.mark.parametrize(("package", "comment"), requirements(), ids=[package for package, _ in requirements()])
def test_a_requirement_says_what_it_is_for_and_its_licence_is_what_the_package_says(package, comment):
    assert re.fullmatch(r" .{8,} \(.+\)", comment)
    named = [name for name in LICENCES if name in comment.rpartition("(")[2]]
    assert named
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License")]
    said = " ".join([metadata["License-Expression"] or "", metadata["License"] or "", *classifiers])
    assert any(name in said for name in named), said[:200]


def test_the_licence_is_mits():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 the Silueta authors\n")
