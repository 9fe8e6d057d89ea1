"""A dataclass as a command line, in every form in which people write and edit one; the choices of a run's settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import sys
from pathlib import Path

import pytest

import trainer
from training.command_line import UsageError, flag
from training.settings import check, field_help, read_settings
from utils import LossCalculator

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


def read(settings: type, *argv: str, **options: dict) -> tuple[object, set[str]]:
    return read_settings([*argv], settings, "A program.\n\nMore.", **{"presets": {}, "special": {}, **options})


def help_of(settings: type, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        read(settings, "--help")
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("future", [True, False])
@pytest.mark.parametrize(
    ("line", "value", "comment"),
    [
        ("size: int = 8  # pixels", 8, "pixels"), ("size: int=8 #pixels", 8, "pixels"), ("size: int = 8", 8, ""),
        ("size: int = 8.0  # pixels", 8, "pixels"), ("size: int = (  # pixels\n        8\n    )", 8, "pixels"),
        ("size: int = 2 * 4  # 50 % of it", 8, "50 % of it"), ("size: float = 8  # metres", 8.0, "metres"),
        ("size: str = Path('a') / 'b'  # a folder", "a/b", "a folder"),
        ("size: str = '# no comment'", "# no comment", ""), ("size: bool = True  # or not", True, "or not"),
    ],
)  # fmt: skip
def test_a_default_may_be_written_as_python_takes_it(line, value, comment, future, tmp_path, capsys):
    settings = from_source(tmp_path, line, future=future)
    size = read(settings)[0].size
    assert (size, type(size)) == (value, type(value))
    assert field_help(settings)["size"][1] == comment
    assert comment in " ".join(help_of(settings, capsys).split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("size: int = 8.5", "Config.size 8.5 int"), ("size: int = '8'", "Config.size '8' int"),
        ("size: int = True", "Config.size True int"), ("size: bool = 1", "Config.size 1 bool"),
        ("size: float = None", "Config.size None float"), ("size: str = 8", "Config.size 8 str"),
        ("size: int = 8,", "Config.size (8,) int"), ("size: list = None", "Config.size list bool, int, float, str"),
        ("size = 8", "Config.size lost size: int"), ("size: int = float('inf')", "Config.size inf int"),
        ("size: float = 10**400", "Config.size float"),
    ],
)  # fmt: skip
def test_a_default_that_cannot_be_gets_one_line(line, words, tmp_path):
    with pytest.raises(UsageError) as refusal:
        read(from_source(tmp_path, "other: int = 1", line))
    assert len(str(refusal.value).splitlines()) == 1
    assert all(word in str(refusal.value) for word in words.split())


def test_flags_override_presets_and_presets_the_defaults(tmp_path):
    settings = from_source(tmp_path, "size: int = 8", "batch_size: int = 4", "amp: bool = True", "file: str = ''")
    options = {"special": {"file": {"nargs": "?", "const": "newest"}},
               "presets": {"file": lambda name: {"size": 1, "batch_size": len(name)}}}  # fmt: skip
    for arguments, values, explicit in (
        ([], (8, 4, True, ""), set()), (["--size", "8"], (8, 4, True, ""), {"size"}),
        (["--batch_size=4", "--no-amp"], (8, 4, False, ""), {"batch_size", "amp"}),
        (["--file"], (1, 6, True, "newest"), {"file"}), (["--file=a", "--size=2"], (2, 1, True, "a"), {"file", "size"}),
    ):  # fmt: skip
        read_values, names = read(settings, *arguments, **options)
        assert (dataclasses.astuple(read_values), names) == (values, explicit)


def test_a_path_in_the_home_folder_is_one_after_an_equals_sign_and_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = from_source(tmp_path, "root: str = '~/coco'", "file: str = ''", "names: str = '~/a,b'")
    for arguments, values in (
        ([], ("/home/me/coco", "", "/home/me/a,b")),
        (["--root=~/a, ~/b,c~", "--file", "~"], ("/home/me/a,/home/me/b,c~", "/home/me", "/home/me/a,b")),
    ):
        assert dataclasses.astuple(read(settings, *arguments)[0]) == values
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a container's user may have no home
    with pytest.raises(UsageError, match=r"^~/coco is in the home folder, and .* HOME"):
        read(settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--root", ""], "what follows --root is empty"), (["--root="], "what follows --root= is empty"),
        (["--file", " "], "what follows --file is empty"), (["--size=8", ""], "an argument is empty"),
    ],
)  # fmt: skip
def test_an_empty_value_is_a_mistake_unless_it_is_the_default_after_an_equals_sign(arguments, words, tmp_path):
    settings = from_source(tmp_path, "size: int = 8", "root: str = 'a'", "file: str = ''")
    assert read(settings, "--file=")[0].file == ""
    with pytest.raises(UsageError, match=f"^{words}: is it a variable of the shell"):
        read(settings, *arguments)


@pytest.mark.parametrize("name", ["data_root", "train_split", "val_split", "checkpoint_dir"])
def test_an_empty_default_is_not_the_current_folder(name):
    with pytest.raises(UsageError, match=f"^{flag(name)} is empty"):
        check(dataclasses.replace(trainer.Config(), **{name: ""}))


def test_help_is_in_groups_with_defaults(tmp_path, capsys):
    lines = ["# --- the data", "root: str = 'a'  # a folder", "# just a remark", "size: int = 8  # pixels"]
    lines += ["# --- the run", "seed: int = 0", "file: str = ''  # of it", "device: str = 'cuda:{rank}'  # to train on"]
    shown = help_of(from_source(tmp_path, *lines), capsys)
    order = [shown.index(text) for text in ("the data:", "--root", "--size", "the run:", "--seed", "--device")]
    assert order == sorted(order)
    assert "remark" not in shown
    assert "pixels (default 8)" in shown
    assert shown.rstrip().splitlines()[-1].endswith("to train on")


def test_loss_weights_are_those_of_config_with_the_same_defaults():
    parameters = inspect.signature(LossCalculator).parameters
    settings = {name: value for name, value in vars(trainer.Config()).items() if name.endswith("_weight")}
    assert {name: parameter.default for name, parameter in parameters.items()} == settings
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert LossCalculator(**settings).weights == {n.removesuffix("_weight"): v for n, v in settings.items()}
