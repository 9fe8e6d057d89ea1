"""A dataclass of settings as a command line: every field is a flag, and the comment beside it is its help."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import os
import textwrap
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from loading.letterbox import BARS
from models import ENCODERS, MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from training.command_line import OneLineParser, UsageError, expand_home, flag
from utils import SCORES

Settings = TypeVar("Settings")  # a dataclass
TYPES = {"bool": bool, "int": int, "float": float, "str": str}


def read_settings(
    argv: list[str], settings: type[Settings], description: str,
    presets: dict[str, Callable[[object], dict]], special: dict[str, dict],
) -> tuple[Settings, set[str]]:  # fmt: skip
    """Returns the settings: the defaults, a preset's over them, the flags over both; and the names of the flags.

    `# --- title` above a field of the dataclass begins a group of --help. A preset is a function of the value of the
    field that turns it on, and returns settings; `special` has further options of argparse, by field.
    """
    parser, unset = build_parser(settings, description, special), object()
    values = checked_defaults(settings)
    names = argparse.Namespace(**dict.fromkeys(values, unset))
    explicit = {name: value for name, value in vars(parser.parse_args(argv, names)).items() if value is not unset}
    for name, preset in presets.items():
        if value := explicit.get(name, values[name]):
            values |= preset(value)
    return settings(**values | explicit), {*explicit}


def build_parser(settings: type, description: str, special: dict[str, dict]) -> OneLineParser:
    """Returns a parser with a flag for every field."""
    first_line = (description or "").strip().partition("\n")[0]  # there is none under python -OO
    parser = OneLineParser(usage="%(prog)s [--SETTING VALUE ...]", description=first_line)
    defaults, groups = checked_defaults(settings), {}
    for name, (title, comment) in field_help(settings).items():
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options = flag_options(name, defaults[name], comment) | special.get(name, {})
        groups[title].add_argument(flag(name), **options)
    return parser


def flag_options(name: str, default: object, comment: str) -> dict:
    """Returns argparse's options of a setting; its help ends with the choices and the default, if it has them."""
    kind = {"type": type(default), "metavar": {int: "N", float: "X", str: "TEXT"}.get(type(default))}
    kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else kind
    notes = [", ".join(CHOICES[name])] if name in CHOICES else []
    notes += [f"default {default}"] if default != "" and "{" not in str(default) else []  # a device for every rank
    text = f"{comment} ({'; '.join(notes)})" if notes else comment
    return {"default": default, "help": text.replace("%", "%%"), **kind}


def checked_defaults(settings: type) -> dict[str, object]:
    """Returns each default in its field's type: people write 8.0 for an integer, 1 for a float, a Path for a text."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name, value in vars(settings).items():
        if name not in fields and not name.startswith("_") and not hasattr(value, "__get__"):
            raise UsageError(f"{settings.__name__}.{name} has lost its type: write `{name}: int = ...`, for example")
    return {name: coerce_default(f"{settings.__name__}.{name}", field) for name, field in fields.items()}


def coerce_default(name: str, field: dataclasses.Field) -> object:
    """Returns a field's default in the field's type."""
    kind_name = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    value, kind = field.default, TYPES.get(kind_name)
    if kind is None:
        raise UsageError(f"{name} is of the type {field.type}: settings are {', '.join(TYPES)}")
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and kind is str:
        return expand_home(value)
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):  # Python takes True for a 1
        return value
    with contextlib.suppress(OverflowError, ValueError):  # infinity is no integer
        if {kind, type(value)} == {int, float} and value == kind(value):
            return kind(value)
    if value is dataclasses.MISSING:
        raise UsageError(f"{name} has no default")
    raise UsageError(f"{name} is {value!r}, and it has to be of the type {kind.__name__}")


def field_help(settings: type) -> dict[str, tuple[str, str]]:
    """Returns by field the title of its group and the comment beside it, "" where it has none."""
    source, help_texts = textwrap.dedent(inspect.getsource(settings)), {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    titles = {row: text.strip("- ") for row, text in comments.items() if text.startswith("---")}
    for node in cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            rows = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            beside = [comments[row] for row in rows if row in comments]
            above = [title for row, title in titles.items() if row < node.lineno]
            help_texts[node.target.id] = (above[-1] if above else "settings", beside[-1] if beside else "")
    return help_texts


CHOICES = {
    "bars": tuple(BARS), "encoder": ENCODERS, "precision": ("auto", "float32", "bfloat16"),
    "best_metric": tuple(SCORES),
}  # fmt: skip
LIMITS = {  # smallest and largest value of each number
    "image_size": (MIN_IMAGE_SIZE, MAX_IMAGE_SIZE), "batch_size": (1, 65536), "grad_accum_steps": (1, 65536),
    "copy_paste": (0, 1), "num_workers": (0, 1024), "val_fraction": (0.001, 0.999),
    "max_unreadable_fraction": (0, 1), "num_epochs": (1, 10**6), "learning_rate": (1e-12, 10),
    "decoder_lr_mult": (1, 1000), "weight_decay": (0, 1), "restart_period": (0, 10**6), "restart_mult": (1, 100),
    "grad_clip": (0, 1e6), "ema_decay": (0, 1 - 1e-9), "seed": (0, 2**32 - 1), "save_every_minutes": (0, 1e6),
    "keep_checkpoints": (0, 10**6), "log_every": (1, 10**6),
}  # fmt: skip
NOT_EMPTY = ("data_root", "train_split", "val_split", "checkpoint_dir")  # others are off if they are empty
WEIGHT_LIMITS = (0, 1e6)  # of every term of the loss


def check(config: Any) -> None:
    """Raises a UsageError if a setting, or two of them together, cannot be; before anything is read or written."""
    weights = [name for name in vars(config) if name.endswith("_weight")]
    for name, (low, high) in (LIMITS | dict.fromkeys(weights, WEIGHT_LIMITS)).items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise UsageError(f"{flag(name)} {value} is out of range: from {low} to {high}")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UsageError(f"{flag(name)} {getattr(config, name)} is not known: there are {', '.join(choices)}")
    for name in NOT_EMPTY:
        if not getattr(config, name).strip():
            raise UsageError(f"{flag(name)} is empty, which would be the current folder: write . if you mean that")
    named = bool(config.annotations) + bool(config.masks)
    if named != bool(config.photos):
        raise UsageError("--photos goes with --annotations, a COCO-format file, or --masks, a folder of mask files")
    if named and config.data_root != expand_home(type(config).data_root):
        raise UsageError("--photos and --data-root (or --sample) both name the data: choose one")
    if config.encoder_weights and not config.pretrained:
        raise UsageError("--encoder-weights needs --pretrained, which --no-pretrained or --sample has turned off")
    if config.encoder_weights and config.start_from:
        raise UsageError("--encoder-weights and --start-from both name the weights to start from: choose one")
    folder = Path(config.checkpoint_dir, config.run_name).resolve()
    named = config.start_from not in ("", "bundled")
    if named and Path(config.start_from).resolve().parent == folder:
        raise UsageError(f"--start-from {config.start_from} lies in the run's own folder, whose files a new run moves "
                         "aside: give it a --run-name")  # fmt: skip
    if {*config.run_name} & {*"/\\"} or config.run_name in (".", ".."):
        raise UsageError(f"--run-name {config.run_name} is not the name of a folder: --checkpoint-dir takes a path")
    if config.batch_size == 1 and config.image_size == MIN_IMAGE_SIZE:
        raise UsageError(f"--batch-size 1 at --image-size {MIN_IMAGE_SIZE} leaves BatchNorm a single value: "
                         "make one of them larger")  # fmt: skip
