"""Reads YOLO's label files: a text file for each photo, a line for each polygon."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import yaml

from loading.annotations import AnnotatedPhoto, DataError, LeftOut, PhotoRecord, split_names
from loading.files import all_files
from loading.headers import THREADS, read_header, shown_size

NAMES = ("data.yaml", "dataset.yaml", "data.yml")  # of the file that names the classes


def read_yolo(
    photos: Path, labels: Path, root: Path, left_out: LeftOut, category: str, keeps_empty: bool
) -> list[AnnotatedPhoto]:
    """Returns the photos of a folder with the polygons of a category, in pixels of the photo as it is shown.

    Raises:
        DataError: the classes have no names, or none is of the category, or a line of a file is no polygon.
    """
    wanted = class_numbers(root, category)
    texts = {os.path.splitext(name)[0]: labels / name for name, _ in all_files(labels) if name.endswith(".txt")}
    names = [name for name, is_inside in all_files(photos) if is_inside and not name.endswith(".txt")]
    with ThreadPoolExecutor(THREADS) as pool:
        headers = [*pool.map(lambda name: read_header(photos / name), names)]
    annotated = []
    for number, (name, header) in enumerate(zip(names, headers, strict=True), start=1):
        path = texts.get(os.path.splitext(name)[0])
        if header is None:
            left_out["photo{s} that cannot be read"].append(name)
            continue
        size = shown_size(*header)
        segmentations = _polygons(path, wanted, size) if path else []
        if segmentations or keeps_empty:
            annotated.append((PhotoRecord(number, name, *size), segmentations))
    return annotated


def class_numbers(root: Path, category: str) -> set[str]:
    """Returns the numbers of the classes whose names are those of a category, as the label files write them."""
    path = next((root / name for name in NAMES if (root / name).is_file()), None)
    if path is None:
        raise DataError(f"{root / 'labels'} has YOLO's label files, and no {root / NAMES[0]} names their classes")
    try:
        names = (yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}).get("names") or []
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    numbered = {str(number): str(name) for number, name in pairs}
    folded = {name.casefold() for name in split_names(category)}
    wanted = {number for number, name in numbered.items() if name.strip().casefold() in folded}
    if not wanted:
        raise DataError(f"{path} has no class named {category!r}: it has {', '.join(numbered.values()) or 'none'}; "
                        "--category names another, or several: a,b")  # fmt: skip
    return wanted


def _polygons(path: Path, wanted: set[str], size: tuple[int, int]) -> list[msgspec.Raw]:
    """Returns the polygons of the wanted classes as COCO has them, an empty one for a bounding box."""
    segmentations = []
    for row, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        number, *values = line.split() or [""]
        if number not in wanted:
            continue
        try:
            points = [float(value) * size[k % 2] for k, value in enumerate(values)]
        except ValueError:
            raise DataError(f"{path}, line {row}: {line[:60]!r} is no polygon of YOLO's") from None
        segmentations.append(msgspec.Raw(msgspec.json.encode([points] if len(points) > 4 else [])))
    return segmentations
