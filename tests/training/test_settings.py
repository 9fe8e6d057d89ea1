"""A dataclass as a command line, in every form in which people write and edit one; the choices of a run's settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import trainer
from training.command_line import UsageError, flag
from training.settings import check, field_help, read_settings


def from_source(tmp_path: Path, *lines: str, future: bool = True) -> type:
    """The class `Config` of a file with these lines in it."""
    name, head = tmp_path.name, ["from __future__ import annotations"] * future
    head += ["from dataclasses import dataclass", "from pathlib import Path", "@dataclass", "class Config:"]
    path = tmp_path / f"{name}.py"
    path.write_text("\n".join([*head, *(f"    {line}" for line in lines)]) + "\n")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Config


def read(settings: type, *argv: str) -> object:
    config, _ = read_settings([*argv], settings, None, presets={}, special={})  # None: as under python -OO
    return config


@pytest.mark.parametrize("future", [True, False])
@pytest.mark.parametrize(
    ("line", "value", "comment"),
    [("size: int=8 #pixels", 8, "pixels"), ("size: int = (  # pixels\n        8.0\n    )", 8, "pixels"),
     ("size: float = 8  # 50 % of it", 8.0, "50 % of it"), ("size: bool = True  # or not", True, "or not"),
     ("size: str = Path('a') / 'b'  # a file", "a/b", "a file"), ("size: str = '# no'", "# no", "")],
)  # fmt: skip
def test_a_default_may_be_written_as_python_takes_it(line, value, comment, future, tmp_path, capsys):
    settings = from_source(tmp_path, "# --- run", "seed: int = 0", "# --- data", "# a remark", line, future=future)
    size = read(settings).size
    assert (size, type(size)) == (value, type(value))
    assert field_help(settings)["size"] == ("data", comment)
    with pytest.raises(SystemExit):
        read(settings, "--help")
    assert re.search(f"data: --size.*{re.escape(comment)}", " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize(
    ("line", "words"),
    [("size: int = 8.5", "8.5 int"), ("size: int = True", "True int"), ("size: float = None", "None float"),
     ("size: str = 8", "8 str"), ("size: list = None", "list bool, int, float, str"), ("size = 8", "lost size: int"),
     ("size: int = float('inf')", "inf int"), ("size: float = 10**400", "float"), ("size: int", "default")],
)  # fmt: skip
def test_a_default_that_cannot_be_gets_one_line(line, words, tmp_path):
    with pytest.raises(UsageError) as refusal:
        read(from_source(tmp_path, line, "other: int = 1"))
    assert len(str(refusal.value).splitlines()) == 1
    assert all(word in str(refusal.value) for word in ("Config.size", *words.split()))


def test_a_path_in_the_home_folder_is_one_after_an_equals_sign_and_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = from_source(tmp_path, "root: str = '~/coco'", "file: str = ''", "names: str = '~/a,b'")
    for arguments, values in (
        ([], ("/home/me/coco", "", "/home/me/a,b")),
        (["--root=~/a, ~/b,c~", "--file", "~"], ("/home/me/a,/home/me/b,c~", "/home/me", "/home/me/a,b")),
    ):
        assert dataclasses.astuple(read(settings, *arguments)) == values
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a container's user may have no home
    with pytest.raises(UsageError, match=r"^~/coco is in the home folder, and .* HOME"):
        read(settings)


@pytest.mark.parametrize(
    ("arguments", "what"), [(["--root="], "what follows --root="), (["--file", " "], "what follows --file"),
                            (["--size=8", ""], "an argument")]
)  # fmt: skip
def test_an_empty_value_is_a_mistake_unless_it_is_the_default_after_an_equals_sign(arguments, what, tmp_path):
    settings = from_source(tmp_path, "size: int = 8", "root: str = 'a'", "file: str = ''")
    assert read(settings, "--file=").file == ""
    with pytest.raises(UsageError, match=f"^{what} is empty: is it a variable of the shell"):
        read(settings, *arguments)


@pytest.mark.parametrize("name", ["data_root", "checkpoint_dir"])
def test_an_empty_default_is_not_the_current_folder(name):
    with pytest.raises(UsageError, match=f"^{flag(name)} is empty"):
        check(dataclasses.replace(trainer.Config(), **{name: ""}))
