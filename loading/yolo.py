"""Reads YOLO's label files: a text file for each photo, a line for each polygon."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import yaml

from loading.annotations import AnnotatedPhoto, DataError, LeftOut, split_names
from loading.files import all_files, read_text
from loading.masks import read_photos

MIN_BOXES = 5  # polygons, all of four corners: turned bounding boxes
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
    annotated: list[AnnotatedPhoto] = []
    for photo, _ in read_photos(photos, left_out):
        path = texts.get(os.path.splitext(photo.file_name)[0])
        segmentations = _polygons(path, wanted, (photo.width, photo.height)) if path else []
        if segmentations or keeps_empty:
            annotated.append((photo, segmentations))
    polygons = [each for _, segmentations in annotated for each in segmentations]
    if len(polygons) >= MIN_BOXES and all(bytes(each).count(b",") == 7 for each in polygons):  # boxes that are turned
        return [(photo, [msgspec.Raw(b"[]") for _ in segmentations]) for photo, segmentations in annotated]
    return annotated


def class_numbers(root: Path, category: str) -> set[str]:
    """Returns the numbers of the classes whose names are those of a category, as the label files write them."""
    path = next((root / name for name in NAMES if (root / name).is_file()), None)
    if path is None:
        raise DataError(f"{root / 'labels'} has YOLO's label files, and no {root / NAMES[0]} names their classes")
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    content = content if isinstance(content, dict) else {}
    if "kpt_shape" in content:
        raise DataError(f"{path} is of keypoints, which are no masks")
    names = content.get("names")
    pairs = names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else [])
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
    for row, line in enumerate(read_text(path).splitlines(), start=1):
        number, *values = line.split() or ["-1"]
        try:
            if f"{float(number):g}" not in wanted:
                continue
            points = [float(value) * size[k % 2] for k, value in enumerate(values)]
        except ValueError:
            raise DataError(f"{path}, line {row}: {line[:60]!r} is no polygon of YOLO's") from None
        segmentations.append(msgspec.Raw(msgspec.json.encode([points] if len(points) > 4 else [])))
    return segmentations
