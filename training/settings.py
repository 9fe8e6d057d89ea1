"""A dataclass of settings as a command line: every field is a flag, and the comment beside it is its help."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import inspect
import re
from typing import NoReturn, TypeVar

from utils import UserError

Settings = TypeVar("Settings")


class UsageError(UserError):
    """A command line that cannot be understood; the message is one line for the user."""


class OneLineParser(argparse.ArgumentParser):
    """A mistake gets one line and exit code 2, without the usage of thirty flags before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: list[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As argparse does it, but an unknown flag is answered with the one that it resembles.

        Raises:
            UsageError: an unknown flag, a value of a wrong type, or something that is missing.
        """
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [option for option in self._option_string_actions if "_" not in option]  # that is tolerated
            close = difflib.get_close_matches(dashed(unknown[0]).split("=")[0], flags, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists them all"
            raise UsageError(f"unknown argument {unknown[0]}: {hint}")
        return known


def read_settings(
    argv: list[str],
    settings: type[Settings],
    description: str,
    presets: dict[str, dict],
    special: dict[str, dict],
) -> Settings:
    """The settings: the defaults, a preset's over them, the flags over both.

    Args:
        argv: the arguments, without the program's name.
        settings: a dataclass of bool, int, float and str fields, a line and a comment each.
        description: of the program, in its first line.
        presets: by the flag that turns each on, or whose field is True by default.
        special: more of argparse's options, by field.

    Raises:
        UsageError: an unknown flag, or a value of a wrong type.
    """
    parser = OneLineParser(description=description.splitlines()[0], allow_abbrev=False)
    for field in dataclasses.fields(settings):
        options = flag_options(field, comments(settings)[field.name])
        parser.add_argument(flag(field.name), **options, **special.get(field.name, {}))
    argv = [dashed(argument) for argument in argv]
    for name, preset in presets.items():
        if name in argv or getattr(settings, name.strip("-")):
            parser.set_defaults(**preset)
    return settings(**vars(parser.parse_args(argv)))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def dashed(argument: str) -> str:
    """--batch_size=8 as --batch-size=8; values and file names are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


@functools.cache
def comments(settings: type) -> dict[str, str]:
    """The comment beside each setting."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(settings), re.MULTILINE))


def flag_options(field: dataclasses.Field, comment: str) -> dict:
    """argparse's options of a setting."""
    options = {"default": field.default, "help": f"{comment.replace('%', '%%')} (%(default)s)"}
    if field.type == "bool":
        return options | {"action": argparse.BooleanOptionalAction}
    return options | {"type": {"int": int, "float": float, "str": str}[field.type]}
