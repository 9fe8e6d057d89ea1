"""Reads the lists of classes that tools write beside their masks: which values of the masks are persons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loading.annotations import DataError, split_names
from loading.files import read_text


def values_of(folders: Sequence[Path], category: str) -> str:
    """Returns the values of a category's masks, behind LISTED, and COLOURS if they are colours; "" without a list.

    Raises:
        DataError: the first list that there is does not have the category.
    """
    wanted = {name.casefold() for name in split_names(category)}
    for path, (read, kind) in ((folder / name, reader) for folder in folders for name, reader in READERS.items()):
        classes = read(read_text(path)) if path.is_file() else []
        if values := [value for label, value in classes if label.strip().casefold() in wanted]:
            return LISTED + kind + ",".join(values)
        if classes:
            there = ", ".join(label.strip() for label, _ in classes)
            raise DataError(f"{path} has no class named {category!r}: it has {there}; --category names another, "
                            "--mask-values its values")  # fmt: skip
    return ""


def _roboflow(text: str) -> list[tuple[str, str]]:
    """A line for each class: its value, its name."""
    rows = [line.split(",") for line in text.splitlines()[1:]]
    return [(row[1], row[0].strip()) for row in rows if len(row) > 1]


def _label_map(text: str) -> list[tuple[str, str]]:
    """CVAT's and datumaro's: a line for each class, its name:red,green,blue:parts:actions."""
    lines = [line.split(":") for line in text.splitlines() if not line.startswith("#")]
    return [(line[0], line[1]) for line in lines if len(line) > 1 and line[1]]


def _labelme(text: str) -> list[tuple[str, str]]:
    """labelme2voc's: a line for each class, from the one that is 0 on, the background, often after __ignore__."""
    names = [name.strip() for name in text.splitlines() if name.strip() not in ("", "__ignore__")]
    has_background = bool(names) and names[0].strip("_").casefold() == "background"
    return [(name, str(value)) for value, name in enumerate(names)] if has_background else []


LISTED, COLOURS = "list:", "rgb:"  # what values of a list begin with, and those that are colours
READERS = {
    "_classes.csv": (_roboflow, ""), "labelmap.txt": (_label_map, COLOURS), "class_names.txt": (_labelme, ""),
}  # fmt: skip
