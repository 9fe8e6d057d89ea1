"""Finds where the photos and the annotations of a split lie, and chooses the photos of a split that is made here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from loading.annotations import DataError, split_names
from loading.files import composed

COCO_HOME = Path("data/coco")  # where COCO is looked for by default, and downloaded to
SPLITS = ("train2017", "val2017")  # COCO's names
PHOTO_FOLDERS = ("photos", "images")  # one of these lies beside masks/


class DataOptions(NamedTuple):
    """How a user's data are to be read; the defaults are COCO's."""

    category: str = "person"  # of an annotation file, what is a person; several names are separated by commas
    annotations: str = ""  # a COCO annotation file without splits, instead of the data roots
    photos: str = ""  # the folder of its photos
    val_fraction: float = 0.1  # of the photos, to validate on, where the data have no split


DEFAULT_OPTIONS = DataOptions()


class Subset(NamedTuple):
    """The training or the validation photos of a split made here: by their names, so they stay when others come."""

    name: str  # training or validation
    val_fraction: float

    def contains(self, name: str) -> bool:
        """Returns whether the photo of this name, relative to the photo folder, is one of the subset."""
        digest = sha256(composed(name).encode(errors="surrogateescape")).digest()
        position = int.from_bytes(digest[:6], "big") / 2**48  # in [0, 1), the same on every disk
        return (position >= self.val_fraction) == (self.name == "training")


class Layout(NamedTuple):
    """Where one split's photos and annotations lie."""

    root: Path  # what the user named
    index_folder: Path  # the person index is kept below it
    index_name: str
    photos: Path
    annotations: Path  # an annotation file, or a folder of mask files
    category: str  # of the annotation file; "" for mask files
    label: str  # names what is trained on in checkpoints: without the folder, so that the data can be moved
    subset: Subset | None = None  # of the photos, where the split is made here


def find_layout(root: Path, split: str, splits: Sequence[str] = (), options: DataOptions = DEFAULT_OPTIONS) -> Layout:
    """Returns where a split's data lie.

    Args:
        root: the data root.
        split: the photo folder's name.
        splits: the names of the training and the validation split, by default COCO's; where the data have no split,
            they tell which subset is meant.

    Raises:
        DataError: there are no such data.
    """
    if not split_names(options.category):
        raise DataError("--category names no category")
    if options.annotations:
        return _single_file(Path(options.annotations), Path(options.photos), _subset(split, splits, options), options)
    if not (root / "annotations" / f"instances_{split}.json").exists():
        folders = [root / split] if (root / "annotations").exists() else [root / split, root]
        for folder in (folder for folder in folders if (folder / "masks").is_dir()):
            return _mask_folder(root, folder, split, splits, options)
    return _coco(root, split, options)


def _coco(root: Path, split: str, options: DataOptions) -> Layout:
    path, photos = root / "annotations" / f"instances_{split}.json", root / split
    for missing in (path for path in (path, photos) if not path.exists()):
        fetch = f": `python tools/download_coco.py --root {root}` fetches COCO 2017 (https://cocodataset.org), "
        others = f", or {root / 'photos'} beside {root / 'masks'}, or --annotations FILE and --photos FOLDER: "
        raise DataError(
            f"no COCO data: {missing} is missing. Expected are {path} and photos in {photos}"
            f"{fetch if root == COCO_HOME else others}--data-root names another folder, "
            "--sample trains on built-in drawings"
        )
    name = split if options.category == DEFAULT_OPTIONS.category else f"{split}.{_key(options.category)}"
    return Layout(root, root, name, photos, path, options.category, f"annotations/instances_{split}.json")


def _mask_folder(root: Path, folder: Path, split: str, splits: Sequence[str], options: DataOptions) -> Layout:
    if options.category != DEFAULT_OPTIONS.category:
        raise DataError(f"--category {options.category} was given, and the masks of {folder / 'masks'} have no "
                        f"categories: leave it out, or give --category {DEFAULT_OPTIONS.category}")  # fmt: skip
    names = [name for name in PHOTO_FOLDERS if (folder / name).is_dir()]
    if len(names) != 1:
        raise DataError(f"{folder / 'masks'} needs its photos in one folder beside it, {' or '.join(PHOTO_FOLDERS)}: "
                        f"there {'are both' if names else 'is none'}")  # fmt: skip
    subset = _subset(split, splits, options) if folder == root else None
    name, label = (subset.name, f"masks for {subset.name}") if subset else (split, f"{split}/masks")
    index_name = f"{name}.{_key(names, subset)}"
    return Layout(root, root, index_name, folder / names[0], folder / "masks", "", label, subset)


def _single_file(path: Path, photos: Path, subset: Subset, options: DataOptions) -> Layout:
    for missing, exists, kind in ((path, path.is_file(), "file"), (photos, photos.is_dir(), "folder")):
        if not exists:
            raise DataError(f"there is no {kind} {missing}: --annotations names a file, --photos its photos' folder")
    is_inside = path.resolve().is_relative_to(photos.resolve())  # an index beside it would change the photo folder
    index_folder = photos.resolve().parent if is_inside else path.parent
    key = _key(os.path.realpath(path), os.path.realpath(photos), subset, options.category)
    index_name, label = f"{photos.name}.{subset.name}.{key}", f"{path.name} for {subset.name}"
    return Layout(photos, index_folder, index_name, photos, path, options.category, label, subset)


def _subset(split: str, splits: Sequence[str], options: DataOptions) -> Subset:
    training, validation = splits or SPLITS
    if training == validation:
        raise DataError(f"--train-split and --val-split are both {split}: where the data have no split, their names "
                        "tell the training photos from the validation photos")  # fmt: skip
    if split not in (training, validation):
        raise DataError(f"the data have no split {split}: what is made of them is {training} to train on, "
                        f"and {validation} to validate")  # fmt: skip
    return Subset("training" if split == training else "validation", options.val_fraction)


def _key(*parts: object) -> str:
    """Returns a hash of what an index depends on: two runs with other options keep an index each."""
    return sha256(repr(parts).encode()).hexdigest()[:8]
