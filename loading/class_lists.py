"""Reads the lists of classes that tools write beside their masks: which values of the masks are persons."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from loading.annotations import DataError, split_names


def values_of(folders: Sequence[Path], category: str) -> str:
    """Returns the values of a category's masks, as --mask-values takes them; "" if the folders have no list.

    Raises:
        DataError: the first list that there is does not have the category.
    """
    wanted = {name.casefold() for name in split_names(category)}
    for folder in folders:
        for name, read in READERS.items():
            if (path := folder / name).is_file():
                classes = [(label.strip(), value) for label, value in read(path)]
                if values := [value for label, value in classes if label.casefold() in wanted]:
                    return ",".join(values)
                there = ", ".join(label for label, _ in classes) or "none"
                raise DataError(f"{path} has no class named {category!r}: it has {there}; --category names another")
    return ""


def _roboflow(path: Path) -> list[tuple[str, str]]:
    """A line for each class: its value, its name."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [(row[1], row[0].strip()) for row in [*csv.reader(file)][1:] if len(row) > 1]


def _label_map(path: Path) -> list[tuple[str, str]]:
    """CVAT's and datumaro's: a line for each class, its name:red,green,blue:parts:actions."""
    lines = [line.split(":") for line in path.read_text(encoding="utf-8-sig").splitlines() if not line.startswith("#")]
    return [(line[0], line[1]) for line in lines if len(line) > 1 and line[1]]


def _labelme(path: Path) -> list[tuple[str, str]]:
    """labelme2voc's: a line for each class, from the one that is 0 on, often after __ignore__."""
    names = [name for name in path.read_text(encoding="utf-8-sig").split("\n") if name != "__ignore__"]
    return [(name, str(value)) for value, name in enumerate(names)]


READERS = {"_classes.csv": _roboflow, "labelmap.txt": _label_map, "class_names.txt": _labelme}
