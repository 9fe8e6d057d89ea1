"""Where the photos of a split lie and what says who is on them, and which photos a split has that is made here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from loading.annotations import DataError, wanted_names
from loading.files import composed

COCO_HOME = Path("data/coco")  # where COCO is looked for by default, and downloaded to
SPLITS = ("train2017", "val2017")  # COCO's names
PHOTO_FOLDERS = ("photos", "images")  # names of the one that lies beside masks/


class Choices(NamedTuple):
    """How a user's data is to be read; as it stands, COCO's."""

    category: str = "person"  # of an annotation file what is a person; several names between commas
    annotations: str = ""  # a COCO-format file without splits, instead of the roots
    photos: str = ""  # the folder of its photos
    val_share: float = 0.1  # of photos without a split: so many are validated on


AS_COCO = Choices()


class Part(NamedTuple):
    """One of the two sides of a split that is made. A photo's name decides: it stays when others are added."""

    is_training: bool
    val_share: float

    @property
    def name(self) -> str:
        return "training" if self.is_training else "validation"

    def has(self, name: str) -> bool:
        return (_position(name) >= self.val_share) == self.is_training

    def share_for_one(self, names: Iterable[str]) -> float:
        """The --val-share nearest to this one by which the part has a photo of those names."""
        positions = [_position(name) for name in names]
        return math.floor(1000 * (max(positions) if self.is_training else min(positions) + 0.001)) / 1000


def _position(name: str) -> float:
    """Of a photo between 0 and 1, by its name in the photo folder: the same on every disk and in every year."""
    return int.from_bytes(sha256(composed(name).encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


class Layout(NamedTuple):
    """Where one split's photos and masks lie."""

    root: Path  # what the user named
    home: Path  # the index is kept under it
    index: str  # its name there
    photos: Path
    masks: Path  # what says who is on them: an annotation file, or a folder of mask files
    category: str  # of the annotation file; "" where there are mask files
    label: str  # what is trained on, in words that do not change when it is moved
    part: Part | None = None  # of the photos, where the split is made here


def find_layout(root: Path, split: str, splits: Sequence[str] = (), choices: Choices = AS_COCO) -> Layout:
    """Where a split's data lie.

    Args:
        root: the data root.
        split: the photo folder's name.
        splits: of the training and of the validation; where the data have none, the name tells which part is meant.
        choices: how the data are to be read.

    Raises:
        DataError: there are no such data, or the split is none of the two.
    """
    if not wanted_names(choices.category):
        raise DataError("--category names no category")
    if choices.annotations:
        return _single_file(Path(choices.annotations), Path(choices.photos), _part(split, splits, choices), choices)
    if not (root / "annotations" / f"instances_{split}.json").exists():
        homes = [root / split] if (root / "annotations").exists() else [root / split, root]
        for home in (home for home in homes if (home / "masks").is_dir()):
            return _mask_folder(root, home, split, splits, choices)
    return _coco(root, split, choices)


def _coco(root: Path, split: str, choices: Choices) -> Layout:
    path, photos = root / "annotations" / f"instances_{split}.json", root / split
    for missing in [place for place in (path, photos) if not place.exists()]:
        others = f", or {root / 'photos'} beside {root / 'masks'}, or --annotations FILE and --photos FOLDER: "
        fetch = f": `python tools/download_coco.py --root {root}` fetches COCO 2017 (https://cocodataset.org), "
        raise DataError(
            f"no COCO data: {missing} is missing. Expected are {path} and photos in {photos}"
            f"{fetch if root == COCO_HOME else others}--data-root names another folder, "
            "--sample trains on built-in drawings"
        )
    index = split if choices.category == AS_COCO.category else f"{split}.{_key(choices.category)}"
    return Layout(root, root, index, photos, path, choices.category, f"annotations/instances_{split}.json")


def _mask_folder(root: Path, home: Path, split: str, splits: Sequence[str], choices: Choices) -> Layout:
    names = [name for name in PHOTO_FOLDERS if (home / name).is_dir()]
    if len(names) != 1:
        raise DataError(f"{home / 'masks'} needs its photos in one folder beside it, {' or '.join(PHOTO_FOLDERS)}: "
                        f"there {'are both' if names else 'is none'}")  # fmt: skip
    part = _part(split, splits, choices) if home == root else None
    name, label = (part.name, f"masks for {part.name}") if part else (split, f"{split}/masks")
    return Layout(root, root, f"{name}.{_key(names, part)}", home / names[0], home / "masks", "", label, part)


def _single_file(path: Path, photos: Path, part: Part, choices: Choices) -> Layout:
    for place, is_there, kind in ((path, path.is_file(), "file"), (photos, photos.is_dir(), "folder")):
        if not is_there:
            raise DataError(f"there is no {kind} {place}: --annotations names a file, --photos its photos' folder")
    inside = path.resolve().is_relative_to(photos.resolve())  # which a new index there would change
    key = _key(os.path.realpath(path), os.path.realpath(photos), part, choices.category)
    home = photos.resolve().parent if inside else path.parent
    index = f"{photos.name}.{part.name}.{key}"
    return Layout(photos, home, index, photos, path, choices.category, f"{path.name} for {part.name}", part)


def _part(split: str, splits: Sequence[str], choices: Choices) -> Part:
    training, validation = splits or SPLITS
    if training == validation:
        raise DataError(f"--train-split and --val-split are both {split}: without a split in the data their names "
                        "tell which part is trained on, and which validated")  # fmt: skip
    if split not in (training, validation):
        raise DataError(f"the data have no split {split}: what is made of them is {training} to train on, "
                        f"and {validation} to validate")  # fmt: skip
    return Part(split == training, choices.val_share)


def _key(*choices: object) -> str:
    """Of what an index depends on: each choice has its own, and two runs do not take turns in making one again."""
    return sha256(repr(choices).encode()).hexdigest()[:8]
