"""A dataclass as a command line, in every form in which people write and edit one."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from training.settings import UsageError, described, read_settings, typed_in

COUNT = itertools.count()


def from_source(tmp_path: Path, *lines: str, future: bool = True) -> type:
    """The class `Config` of a file with these lines in it."""
    name = f"edited_{next(COUNT)}"
    head = ["from dataclasses import dataclass", "from pathlib import Path"]
    head = ["from __future__ import annotations", *head] if future else head
    path = tmp_path / f"{name}.py"
    path.write_text("\n".join([*head, "@dataclass", "class Config:", *(f"    {line}" for line in lines)]) + "\n")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Config


def read(settings: type, *argv: str):
    return read_settings(list(argv), settings, "A program.\n\nMore.", {}, {})


@pytest.mark.parametrize("future", [True, False])
@pytest.mark.parametrize(
    ("line", "value", "comment"),
    [
        ("size: int = 8  # pixels", 8, "pixels"), ("size: int = 8 # pixels", 8, "pixels"),
        ("size: int=8 #pixels", 8, "pixels"), ("size: int = 8", 8, ""), ("size: int = 8.0  # pixels", 8, "pixels"),
        ("size: int = (  # pixels\n        8\n    )", 8, "pixels"),
        ("size: int = 2 * 4  # 50 % of it", 8, "50 % of it"),
        ("size: float = 8  # metres", 8.0, "metres"), ("size: float = 1e3", 1000.0, ""),
        ("size: str = Path('a') / 'b'  # a folder", "a/b", "a folder"),
        ("size: str = '# no comment'", "# no comment", ""),
        ("size: bool = True  # or not", True, "or not"), ("size: int = 1_000", 1000, ""),
    ],
)  # fmt: skip
def test_a_default_may_be_written_as_python_takes_it(tmp_path, line, value, comment, future, capsys):
    settings = from_source(tmp_path, line, future=future)
    found = read(settings).size
    assert (found, type(found)) == (value, type(value))
    assert described(settings)["size"][1] == comment
    with pytest.raises(SystemExit):
        read(settings, "--help")
    assert comment in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("size: int = 8.5", "Config.size 8.5 int"), ("size: int = '8'", "Config.size '8' int"),
        ("size: int = True", "Config.size True int"), ("size: bool = 1", "Config.size 1 bool"),
        ("size: float = None", "Config.size None float"), ("size: str = 8", "Config.size 8 str"),
        ("size: int = 8,", "Config.size (8,) int"), ("size: list = None", "Config.size list bool, int, float, str"),
        ("size = 8", "Config.size lost size: int"), ("size = 8,", "Config.size lost"),
        ("size: int = float('inf')", "Config.size inf int"), ("size: float = 10**400", "Config.size float"),
    ],
)  # fmt: skip
def test_what_cannot_be_gets_one_line(tmp_path, line, words):
    with pytest.raises(UsageError) as caught:
        read(from_source(tmp_path, "other: int = 1", line))
    assert len(str(caught.value).splitlines()) == 1
    for word in words.split():
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--learning-rate"), ("--bs", "--batch-size"), ("--epochs", "--num-epochs"),
        ("--rate", "--learning-rate"),
        ("--learning-rat", "--learning-rate"), ("--batchsize", "--batch-size"), ("--no-amq", "--no-amp"),
        ("--epoch", "--num-epochs"), ("--learn", "--learning-rate"), ("--batches", "--batch-size"),
        ("--size", None), ("--name", None), ("--gpus", None), ("--wandb", None),
    ],
)  # fmt: skip
def test_an_unknown_flag_is_answered_with_the_one_that_was_meant_or_with_none(tmp_path, flag, meant):
    numbers = ("learning_rate", "batch_size", "image_size", "num_epochs")
    lines = [*(f"{name}: int = 1" for name in numbers), "amp: bool = True"]
    with pytest.raises(UsageError) as caught:
        read(from_source(tmp_path, *lines), f"{flag}=1")
    assert str(caught.value).endswith(f"did you mean {meant}?" if meant else "--help lists them all")


def test_what_is_typed_is_neither_a_default_nor_a_preset(tmp_path):
    settings = from_source(tmp_path, "size: int = 8", "batch_size: int = 4", "amp: bool = True", "file: str = ''")
    special = {"file": {"nargs": "?", "const": "newest"}}
    for arguments, names in (
        ([], set()), (["--size", "8"], {"size"}), (["--batch_size=4", "--no-amp"], {"batch_size", "amp"}),
        (["--file"], {"file"}), (["--amp", "--file=a"], {"amp", "file"}),
    ):  # fmt: skip
        assert typed_in(arguments, settings, special) == names


def test_help_is_in_groups(tmp_path, capsys):
    lines = ["# --- the data", "root: str = 'a'  # a folder", "# just a remark", "size: int = 8  # pixels"]
    lines += ["# --- the run", "seed: int = 0"]
    with pytest.raises(SystemExit):
        read(from_source(tmp_path, *lines), "--help")
    shown = capsys.readouterr().out
    places = [shown.index(text) for text in ("the data:", "--root", "--size", "the run:", "--seed")]
    assert places == sorted(places)
    assert "remark" not in shown
