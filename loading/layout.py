"""Finds where the photos and the annotations of a split lie, and chooses the photos of a split that is made here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from loading.annotations import DataError, split_names
from loading.class_lists import values_of
from loading.files import composed, read_text, suffixes
from loading.foreign import converter
from loading.places import (
    annotation_files,
    child,
    describe_folder,
    label_folders,
    mask_folders,
    photo_folders,
    single_files,
    split_lists,
    synonyms,
)
from loading.yolo import class_numbers

COCO_HOME = Path("data/coco")  # where COCO is looked for by default, and downloaded to
OWN_NEGATIVES = "data"  # of --negatives: the data's own
SPLITS = ("train2017", "val2017")  # COCO's names
EXPECTED = (
    "annotations/instances_{split}.json and photos in {split}/, or photos/ beside masks/, or --annotations FILE and "
    "--photos FOLDER, or --photos FOLDER and --masks FOLDER"
)


class DataOptions(NamedTuple):
    """How a user's data are to be read; the defaults are COCO's."""

    category: str = "person"  # of an annotation file, what is a person; several names are separated by commas
    annotations: str = ""  # a COCO annotation file without splits, instead of the data roots
    photos: str = ""  # the folder of its photos, or of the photos of `masks`
    masks: str = ""  # a folder of mask files, instead of the data roots
    mask_values: str = ""  # which values of mask files are persons; "": all masks decide
    val_fraction: float = 0.1  # of the photos, to validate on, where the data have no split
    negatives: str = ""  # folders of photos without persons to use as well; "data": also those of the data


DEFAULT_OPTIONS = DataOptions()


Pair = tuple[Path, Path]  # a folder of photos, and of their masks or labels


class MissingSplitError(DataError):
    """The data have no such split; `has_other` says whether they have another one of those that were named."""

    def __init__(self, message: str, has_other: bool):
        super().__init__(message)
        self.has_other = has_other


class Subset(NamedTuple):
    """The training or the validation photos of a split made here: by their names, so they stay when others come."""

    name: str  # training or validation
    val_fraction: float

    def contains(self, name: str) -> bool:
        """Returns whether the photo of this name, relative to the photo folder, is one of the subset."""
        digest = sha256(composed(name).encode(errors="surrogateescape")).digest()
        position = int.from_bytes(digest[:6], "big") / 2**48  # in [0, 1), the same on every disk
        return (position >= self.val_fraction) == (self.name == "training")


class Listed(NamedTuple):
    """The photos of a split that a text file lists, one at the beginning of each line, as Pascal VOC has them."""

    name: str
    path: Path

    def contains(self, name: str) -> bool:
        """Returns whether the photo of this name is listed, with its ending or without, below some folder or not."""
        return os.path.splitext(name)[0] in _listed_names(self.path, self.path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _listed_names(path: Path, _mtime: int) -> set[str]:
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    names = [*lines, *(re.split(r"[\s,;]", line)[0] for line in lines)]
    return {suffix for name in names for each in (name, re.sub(r"\.\w{3,4}$", "", name)) for suffix in suffixes(each)}


class InFolder(NamedTuple):
    """The photos of a split that lie in one subfolder, where one annotation file has those of all."""

    name: str

    def contains(self, name: str) -> bool:
        """Returns whether the photo of this name lies there."""
        return name.startswith(f"{self.name}/")


Choice = Subset | Listed | InFolder  # which photos of a folder are a split's


class Layout(NamedTuple):
    """Where one split's photos and annotations lie."""

    root: Path  # what the user named
    index_folder: Path  # the person index is kept below it
    index_name: str
    photos: Path
    annotations: Path  # an annotation file, or a folder of mask files or of YOLO's label files
    category: str  # of the annotations; "" for mask files
    label: str  # names what is trained on in checkpoints: without the folder, so that the data can be moved
    subset: Choice | None = None  # of the photos, where the folder has others as well
    mask_values: str = ""
    other_masks: tuple[Pair, ...] = ()  # photos and masks of the other split: all masks decide together
    keeps_empty: bool = False  # photos without persons are samples as well
    has_persons: bool = True  # False: photos without annotations, of which none shows a person


def find_layout(
    root: Path, split: str, splits: Sequence[str] = (), options: DataOptions = DEFAULT_OPTIONS, is_only: bool = True
) -> Layout:
    """Returns where a split's data lie.

    Args:
        root: the data root.
        split: the photo folder's name, or one that means the same: val, valid, validation.
        splits: the names of the training and the validation split, by default COCO's; where the data have no split,
            they tell which subset is meant.
        options: how the data are to be read.
        is_only: whether the split may be made here of a root that has training data alone; of several roots another
            one may have it.

    Raises:
        MissingSplitError: there are no such data.
        DataError: it is not clear which data are meant.
    """
    if not split_names(options.category):
        raise DataError("--category names no category")
    if options.annotations:
        return _named_file(Path(options.annotations), Path(options.photos), _subset(split, splits, options), options)
    if options.masks:
        return _named_masks(Path(options.photos), Path(options.masks), split, splits, options)
    found = {name: _first(root, name, splits, options, is_only) for name in {split, *(splits or SPLITS)}}
    if not (own := found[split]):
        raise MissingSplitError(_missing(root, split), any(found[name] for name in splits))
    kinds = {name: each[0] for name, each in found.items() if each}
    if len({*kinds.values()}) > 1:
        texts = ", ".join(f"{name} from {kind}" for name, kind in sorted(kinds.items()))
        raise DataError(f"the splits in {root} are of different kinds ({texts}): name what is meant by --annotations, "
                        "or by --photos and --masks")  # fmt: skip
    return own[1]


def _first(
    root: Path, split: str, splits: Sequence[str], options: DataOptions, is_only: bool
) -> tuple[str, Layout] | None:
    """Returns the first kind of data that has a split, and where they lie."""
    for kind, find in (("a COCO file", _coco), ("masks", _masks), ("YOLO's labels", _yolo)):
        if layout := find(root, split, splits, options, is_only):
            return kind, layout
    return None


def _missing(root: Path, split: str) -> str:
    other = "--data-root names another folder, --sample trains on built-in drawings"
    if root == COCO_HOME:
        return (f"no COCO data: {root / 'annotations' / f'instances_{split}.json'} or {root / split} is missing: "
                f"`python tools/download_coco.py --root {root}` fetches COCO 2017 (https://cocodataset.org), "
                f"{other}")  # fmt: skip
    missing = [path for path in (_standard(root, split), root / split) if not path.exists()]
    why = f"{missing[0]} is missing; " if len(missing) == 1 else ""
    found = f"no data of the split {split}: {why}{root} {describe_folder(root)}"
    if how := converter(root):
        return f"{found}. {how}"
    return f"{found}. Expected are {EXPECTED.format(split=split)}; {other}"


def _coco(root: Path, split: str, splits: Sequence[str], options: DataOptions, is_only: bool) -> Layout | None:
    """Returns the layout of a COCO annotation file, None if there is none."""
    training, validation = splits or SPLITS
    by_split = {name: annotation_files(root, name) for name in (split, training, validation)}
    files, words, candidates = by_split[split], synonyms(split), by_split[training]
    subset: Choice | None = None
    if is_only and split in (training, validation) and candidates and not by_split[validation]:
        if _standard(root, training) not in candidates:  # half of a download of COCO is no set
            files, subset, words = candidates, _subset(split, splits, options), synonyms(training)
    elif not any(by_split.values()) and (files := single_files(root)) and photo_folders(root, files[0], ()):
        subset, words = _subset(split, splits, options), []
    if not files:
        return None
    path = _only(files, "annotation files", "--annotations FILE and --photos FOLDER name one")
    folders = photo_folders(root, path, words)
    if not folders:
        return None
    photos = _only(folders, f"folders for the photos of {path}", "--annotations FILE and --photos FOLDER name one")
    if subset and not words:
        subset = _user_split(photos, split, splits) or subset
    name = _file_name(subset.name if subset else split)
    keeps_empty = _keeps_empty(options)
    is_plain = (path, photos) == (_standard(root, split), root / split) and not keeps_empty
    if not is_plain or options.category != DEFAULT_OPTIONS.category:
        paths = () if is_plain else (path.relative_to(root), photos.relative_to(root), subset, keeps_empty)
        name = f"{name}.{_key(options.category, *map(str, paths))}"
    label = path.relative_to(root).as_posix() + (f" for {subset.name}" if subset else "")
    return Layout(root, root, name, photos, path, options.category, label, subset, keeps_empty=keeps_empty)


def _user_split(photos: Path, split: str, splits: Sequence[str]) -> InFolder | None:
    """Returns the subfolder of a split, where a folder of photos has one for each."""
    found = {name: [child(photos, word) for word in synonyms(name) if child(photos, word).is_dir()]
             for name in splits or SPLITS}  # fmt: skip
    return InFolder(found[split][0].name) if all(found.values()) and split in found else None


def _standard(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _masks(root: Path, split: str, splits: Sequence[str], options: DataOptions, is_only: bool) -> Layout | None:
    """Returns the layout of a folder of mask files, None if there is none."""
    if not (folders := _folders(root, split, splits, options, is_only, mask_folders)):
        return None
    (photos, masks), others, subset = folders
    name = subset.name if subset else PurePosixPath(split).as_posix()
    label = f"masks for {name}" if subset else f"{name}/masks"
    return _mask_layout(root, root, photos, masks, name, label, subset, others, options)


def _yolo(root: Path, split: str, splits: Sequence[str], options: DataOptions, is_only: bool) -> Layout | None:
    """Returns the layout of a folder of YOLO's label files, None if there is none."""
    if not (folders := _folders(root, split, splits, options, is_only, label_folders)):
        return None
    (photos, labels), _, subset = folders
    name, keeps_empty = subset.name if subset else PurePosixPath(split).as_posix(), _keeps_empty(options)
    classes = sorted(class_numbers(root, options.category))
    key = _key(os.path.relpath(photos, root), subset, options.category, keeps_empty, classes)
    index_name, category, label = f"{_file_name(name)}.{key}", options.category, f"labels for {name}"
    return Layout(root, root, index_name, photos, labels, category, label, subset, keeps_empty=keeps_empty)


def _folders(
    root: Path, split: str, splits: Sequence[str], options: DataOptions, is_only: bool,
    find: Callable[[Path, Sequence[str]], list[Pair]],
) -> tuple[Pair, tuple[Pair, ...], Choice | None] | None:  # fmt: skip
    """Returns a split's folders of photos and masks, those of the other split, and which photos are meant."""
    training, validation = splits or SPLITS
    other = validation if split == training else training
    pairs, others = find(root, synonyms(split)), find(root, synonyms(other))
    subset: Choice | None = None
    of_training = pairs if split == training else others
    if is_only and split in (training, validation) and of_training and not (pairs and others):
        pairs, others, subset = of_training, [], _subset(split, splits, options)
    if not pairs and (pairs := find(root, ())):
        if others:
            raise DataError(f"{others[0][0]} is of the split {other}, and {split} has no folder of its own: "
                            "--train-split and --val-split name them")  # fmt: skip
        lists = {name: split_lists(root, synonyms(name)) for name in (split, other)}
        if bool(lists[split]) != bool(lists[other]):
            raise DataError(f"{(lists[split] or lists[other])[0]} lists the photos of one split, and no file those of "
                            "the other one: --train-split and --val-split name them")  # fmt: skip
        listed = lists[split] and lists[other]
        subset = Listed(split, lists[split][0]) if listed else _subset(split, splits, options)
    if not pairs:
        return None
    advice = "--photos FOLDER and --masks FOLDER name one"
    return _only(pairs, "pairs of photos and masks", advice), tuple(others), subset


def _named_masks(photos: Path, masks: Path, split: str, splits: Sequence[str], options: DataOptions) -> Layout:
    """Returns the layout of the folders of --photos and --masks, which have subfolders for the splits or not."""
    for folder in (photos, masks):
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: --photos and --masks name those of the photos and masks")
    names = splits or SPLITS
    by_word = {word: (child(photos, word), child(masks, word)) for name in names for word in synonyms(name)}
    there = {word: pair for word, pair in by_word.items() if all(folder.is_dir() for folder in pair)}
    subset: Subset | None = _subset(split, splits, options)
    others: tuple[Pair, ...] = ()
    mine = [there.pop(word) for word in synonyms(split) if word in there]
    of_training = [by_word[word] for word in synonyms(names[0]) if all(each.is_dir() for each in by_word[word])]
    if mine and there:
        (photos, masks), others, subset = mine[0], tuple(there.values()), None
    elif of_training:
        photos, masks = of_training[0]
    name = subset.name if subset else PurePosixPath(split).as_posix()
    is_inside = masks.resolve().is_relative_to(photos.resolve())
    index_folder = photos.resolve().parent if is_inside else masks.resolve().parent
    return _mask_layout(photos, index_folder, photos, masks, name, f"{masks.name} for {name}", subset, others, options)


def _mask_layout(
    root: Path, index_folder: Path, photos: Path, masks: Path, name: str, label: str, subset: Choice | None,
    others: tuple[Pair, ...], options: DataOptions,
) -> Layout:  # fmt: skip
    values = options.mask_values or values_of((masks, masks.parent, root), options.category)
    if options.category != DEFAULT_OPTIONS.category and not values:
        raise DataError(f"--category {options.category} was given, and the masks of {masks} have no categories: "
                        f"leave it out, or give --category {DEFAULT_OPTIONS.category}")  # fmt: skip
    paths = (os.path.relpath(os.path.realpath(path), os.path.realpath(index_folder)) for path in (photos, masks))
    keeps_empty = _keeps_empty(options)
    index_name = f"{_file_name(name)}.{_key(*paths, subset, values, keeps_empty)}"
    return Layout(root, index_folder, index_name, photos, masks, "", label, subset, values, others, keeps_empty)


def _named_file(path: Path, photos: Path, subset: Subset, options: DataOptions) -> Layout:
    for missing, exists, kind in ((path, path.is_file(), "file"), (photos, photos.is_dir(), "folder")):
        if not exists:
            raise DataError(f"there is no {kind} {missing}: --annotations names a file, --photos its photos' folder")
    is_inside = path.resolve().is_relative_to(photos.resolve())  # an index beside it would change the photo folder
    index_folder = photos.resolve().parent if is_inside else path.parent
    keeps_empty = _keeps_empty(options)
    parts = (os.path.realpath(path), os.path.realpath(photos), subset, options.category, *[True] * keeps_empty)
    index_name, label = f"{photos.name}.{subset.name}.{_key(*parts)}", f"{path.name} for {subset.name}"
    category = options.category
    return Layout(photos, index_folder, index_name, photos, path, category, label, subset, keeps_empty=keeps_empty)


def negative_layout(folder: Path) -> Layout:
    """Returns the layout of a folder of photos without persons; it has no annotations."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: --negatives names one of photos without persons")
    name = f"negatives.{_key(os.path.realpath(folder))}"
    return Layout(folder, folder.resolve().parent, name, folder, folder, "", "photos without persons",
                  keeps_empty=True, has_persons=False)  # fmt: skip


def _file_name(split: str) -> str:
    """Returns a split's name as that of a file: it may be a path."""
    return re.sub(r"[/\\]+", "_", split.strip("/\\"))


def _keeps_empty(options: DataOptions) -> bool:
    return OWN_NEGATIVES in split_names(options.negatives)


def _only(candidates: list, kind: str, advice: str) -> Any:
    """Returns the only one of several places; a DataError names them otherwise."""
    if len(candidates) > 1:
        texts = [" with ".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in candidates]
        raise DataError(f"there are several {kind}: {', '.join(texts)}. {advice}")
    return candidates[0]


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
