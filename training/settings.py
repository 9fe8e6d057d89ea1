"""A dataclass of settings as a command line: every field is a flag, and the comment beside it is its help."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import sys
import textwrap
import tokenize
from collections.abc import Callable
from typing import NoReturn, TypeVar

from utils import UserError

Settings = TypeVar("Settings")
KINDS = {"bool": bool, "int": int, "float": float, "str": str}


class UsageError(UserError):
    """A command line, or a default in the file, that cannot be understood."""


class OneLineParser(argparse.ArgumentParser):
    """A mistake gets one line and exit code 2, without the usage of thirty flags before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: list[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As argparse does it, but an unknown flag is answered with the one that was meant.

        Raises:
            UsageError: an unknown flag, a value of a wrong type, or something that is missing.
        """
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [option for option in self._option_string_actions if "_" not in option]  # that is tolerated
            meant = resembling(dashed(unknown[0]).split("=")[0], flags)
            hint = f"did you mean {meant}?" if meant else "--help lists them all"
            raise UsageError(f"unknown argument {unknown[0]}: {hint}")
        return known


def answer(program: str, work: Callable[[], object]) -> int:
    """Does a command's work. Returns its exit code: 0, or 2 for a user's mistake, which gets one line."""
    try:
        work()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    return 0


def resembling(name: str, flags: list[str]) -> str:
    """The flag of these initials (--lr), with this word in it (--epochs), or misspelt so (it or a word); "" if none."""
    words = {flag: flag.strip("-").split("-") for flag in flags}
    by_initials = [flag for flag in flags if "".join(word[:1] for word in words[flag]) == name.strip("-")]
    by_word = [flag for flag in flags if name.strip("-") in words[flag]]
    misspelt = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
    by_part = [flag for flag in flags if difflib.get_close_matches(name.strip("-"), words[flag], cutoff=0.75)]
    return next((found[0] for found in (by_initials, by_word, misspelt, by_part) if len(found) == 1), "")


def read_settings(
    argv: list[str], settings: type[Settings], description: str,
    presets: dict[str, Callable[[object], dict]], special: dict[str, dict],
) -> Settings:  # fmt: skip
    """The settings: the defaults, a preset's over them, the flags over both.

    Args:
        argv: the arguments, without the program's name.
        settings: a dataclass of bool, int, float and str fields; `# --- title` above a field begins a group of --help.
        description: of the program, in its first line.
        presets: by the field that turns each on; each makes its settings of that field's value.
        special: more of argparse's options, by field.

    Raises:
        UsageError: an unknown flag, or a value of a wrong type, in `argv` or as a default.
    """
    parser, argv = parser_of(settings, description, special), [dashed(argument) for argument in argv]
    given = parser.parse_args(argv)
    for name, preset in presets.items():
        if value := getattr(given, name):
            parser.set_defaults(**preset(value))
    return settings(**vars(parser.parse_args(argv)))


def typed_in(argv: list[str], settings: type, special: dict[str, dict]) -> set[str]:
    """The fields that a command line names itself: neither a default nor a preset is among them."""
    unset = object()
    names = argparse.Namespace(**{field.name: unset for field in dataclasses.fields(settings)})
    given = parser_of(settings, "", special).parse_args([dashed(argument) for argument in argv], names)
    return {name for name, value in vars(given).items() if value is not unset}


def parser_of(settings: type, description: str, special: dict[str, dict]) -> OneLineParser:
    first_line = (description or "").strip().partition("\n")[0]  # there is none under python -OO
    parser = OneLineParser(usage="%(prog)s [--SETTING VALUE ...]", description=first_line, allow_abbrev=False)
    defaults, groups = checked_defaults(settings), {}
    for name, (title, comment) in described(settings).items():
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag(name), **flag_options(defaults[name], comment), **special.get(name, {}))
    return parser


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def dashed(argument: str) -> str:
    """--batch_size=8 as --batch-size=8; values and file names are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def flag_options(default: object, comment: str) -> dict:
    """argparse's options of a setting."""
    kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
    return {"default": default, "help": f"{comment.replace('%', '%%')} (%(default)s)".strip(), **kind}


# --- the file that a user edits ---------------------------------------------------------------------------


def checked_defaults(settings: type) -> dict[str, object]:
    """Each default in its field's type: people write 8.0 for an integer, 1 for a float, a Path for a text.

    Raises:
        UsageError: it is of another type, or a field has lost its own.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name, value in vars(settings).items():
        if name not in fields and not name.startswith("_") and not hasattr(value, "__get__"):
            kinds = " or ".join(KINDS)
            raise UsageError(f"{settings.__name__}.{name} has lost its type: write `{name}: int = ...` ({kinds})")
    return {name: in_its_type(f"{settings.__name__}.{name}", field) for name, field in fields.items()}


def in_its_type(name: str, field: dataclasses.Field) -> object:
    value, kind = field.default, KINDS.get(getattr(field.type, "__name__", field.type))
    if kind is None:
        raise UsageError(f"{name} is of the type {field.type}: settings are {', '.join(KINDS)}")
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):  # Python takes True for a 1
        return value
    with contextlib.suppress(OverflowError, ValueError):  # infinity is no integer
        if {kind, type(value)} == {int, float} and value == kind(value):
            return kind(value)
    if value is dataclasses.MISSING:
        raise UsageError(f"{name} has no default")
    raise UsageError(f"{name} is {value!r}, and it has to be of the type {kind.__name__}")


def described(settings: type) -> dict[str, tuple[str, str]]:
    """By field the title of its group and the comment beside it, "" where it has none."""
    found = dict.fromkeys((field.name for field in dataclasses.fields(settings)), ("settings", ""))
    try:
        source = textwrap.dedent(inspect.getsource(settings))
    except OSError:  # a program that was packed without its source
        return found
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    titles = {row: text.strip("- ") for row, text in comments.items() if text.startswith("---")}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            beside = [comments[row] for row in range(node.lineno, node.end_lineno + 1) if row in comments]
            above = [title for row, title in titles.items() if row < node.lineno]
            found[node.target.id] = (above[-1] if above else "settings", beside[-1] if beside else "")
    return found
