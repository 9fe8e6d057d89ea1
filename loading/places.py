"""The names that data sets and tools give to their folders and annotation files, and what a folder has of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

SPLIT_WORDS = ("train2017", "train", "training"), ("val2017", "val", "valid", "validation")
SPLIT_FILES = (  # the annotation file of a split
    "annotations/instances_{}.json", "annotations/{}.json", "annotations/person_keypoints_{}.json",
    "annotations/lvis_v1_{}.json", "lvis_v1_{}.json", "{}/_annotations.coco.json", "{}/annotation_coco.json",
    "{}/annotations.json", "{}/annotations/instances_{}.json", "{}/labels.json", "{}/instances.json", "{}/coco.json",
    "{}/result.json", "{}/dataset.json", "{}/annotations/coco_instances.json", "instances_{}.json", "{}.json",
    "labels/{}.json", "annotations/stuff_{}.json",
)  # fmt: skip
KEYPOINTS = "annotations/person_keypoints_{}.json"  # COCO's archive has them beside the same persons' masks
COCO_KEY = re.compile(rb'"(images|annotations|categories|licenses)"\s*:\s*[\[n]')
SINGLE_FILES = (  # the annotation file of data without splits
    "annotations/instances_default.json", "annotations/instances.json", "annotations/annotations.json",
    "instances_default.json", "labels.json", "result.json", "_annotations.coco.json", "annotations.json",
    "instances.json", "coco.json",
)  # fmt: skip
PHOTO_FOLDERS = (
    "photos", "images", "imgs", "image", "img", "jpegimages", "pngimages", "img_dir", "data",
    "original", "input", "rgb",
)  # fmt: skip
MASK_FOLDERS = (
    "masks", "mask", "labels", "label", "alpha", "alphas", "mattes", "matte", "gt", "groundtruth", "ground_truth",
    "segmentationclass", "segmentationclasspng", "pedmasks", "annotations", "annotation", "ann_dir", "segmentation",
    "segmentations", "seg", "target", "targets",
)  # fmt: skip
PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif")
CLASS_LIST = "_classes.csv"  # of Roboflow's masks, which lie beside their photos
BESIDE = ("annot", "_masks", "_mask", "_labels")  # of a folder of masks beside its photos': trainannot
SPLIT_LISTS = ("ImageSets/Segmentation/{}.txt", "ImageSets/{}.txt", "splits/{}.txt", "lists/{}.txt",
               "{}.txt", "{}_id.txt")  # Pascal VOC's first
MASK_ENDINGS = ("_mask", "-mask", "_matte", "_alpha", "_seg", "_gt", "_label")  # where masks lie among their photos
LISTED = 10  # entries of a folder in an error
COUNTED = 2000  # files of a folder that are looked at for an error


def synonyms(split: str) -> list[str]:
    """Returns a split's name and then those that mean the same."""
    name = PurePosixPath(split).as_posix()  # without a slash at the end, as the shell completes it
    words = next((words for words in SPLIT_WORDS if name.lower() in words), ())
    return [name, *(word for word in words if word != name)]


def annotation_files(root: Path, split: str) -> list[Path]:
    """Returns the annotation files that a split may have, by its own name or else by the first of its synonyms."""
    for word in synonyms(split):
        names = [name for name in SPLIT_FILES if (root / name.replace("{}", word)).is_file()]
        if len(names) > 1 and KEYPOINTS in names:
            names.remove(KEYPOINTS)
        if names:
            return [root / name.replace("{}", word) for name in names]
    return []


def single_files(root: Path) -> list[Path]:
    """Returns the annotation files of data without splits: one of a usual name, or else all that look like one."""
    usual = [root / name for name in SINGLE_FILES if (root / name).is_file()]
    others = [path for folder in (root, root / "annotations") for path in sorted(folder.glob("*.json"))]
    return [path for path in usual or others if path.is_file() and _looks_like_coco(path)]


def _looks_like_coco(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(2**16)
    return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and bool(COCO_KEY.search(head))


def photo_folders(root: Path, file: Path, words: Sequence[str]) -> list[Path]:
    """Returns the folders that may hold an annotation file's photos: those nearest to it, or to the split's name."""
    kinds = ("images", "data", "photos")
    own = [file.parent / kind for kind in kinds] if file.parent != root else []
    by_word = [[child(folder, word) for folder in (root, *(child(root, kind) for kind in kinds))] for word in words]
    common = [path for name, path in subfolders_by_name(root).items() if name in PHOTO_FOLDERS]
    for folders in ([*own], [file.parent] if file.parent.name in words else [], *by_word, common):
        if found := [folder for folder in folders if folder.is_dir()]:
            return found
    lie_in_root = any(path.suffix.lower() in PHOTO_ENDINGS for path in root.iterdir())
    return [root] if lie_in_root or (not words and has_files(root, PHOTO_ENDINGS)) else []


def mask_folders(root: Path, words: Sequence[str]) -> list[tuple[Path, Path]]:
    """Returns the pairs of a photo and a mask folder: with one of the words above or below both, or with none."""
    pairs = _by_word(root, words, MASK_FOLDERS, PHOTO_ENDINGS)
    if pairs:
        return pairs
    beside = [(root / word, root / f"{word}{ending}") for word in words for ending in BESIDE]
    if pairs := [pair for pair in beside if all(has_files(folder, PHOTO_ENDINGS) for folder in pair)]:
        return pairs
    kinds = [path for name, path in subfolders_by_name(root).items() if name in PHOTO_FOLDERS]
    own = [root / word for word in words] + [kind / word for kind in kinds for word in words]
    return [(folder, folder) for folder in (own if words else [root, *kinds]) if has_masks_among_photos(folder)]


def label_folders(root: Path, words: Sequence[str]) -> list[tuple[Path, Path]]:
    """Returns the pairs of a photo folder and one of YOLO's label files, as `mask_folders`."""
    return _by_word(root, words, ("labels",), (".txt",))


def _by_word(
    root: Path, words: Sequence[str], names: Sequence[str], endings: Sequence[str]
) -> list[tuple[Path, Path]]:
    in_root = _pairs(root, names, endings)
    for word in words:
        below = [(child(photos, word), child(others, word)) for photos, others in in_root]
        there = [pair for pair in below if all(folder.is_dir() for folder in pair)]
        if pairs := there + _pairs(child(root, word), names, endings):
            return pairs
    return [] if words else in_root


def _pairs(root: Path, names: Sequence[str], endings: Sequence[str]) -> list[tuple[Path, Path]]:
    folders = subfolders_by_name(root)
    photos = [path for name, path in folders.items() if name in PHOTO_FOLDERS and has_files(path, PHOTO_ENDINGS)]
    others = [path for name, path in folders.items() if name in names and has_files(path, endings)]
    return [(photo, other) for photo in photos for other in others]


def has_masks_among_photos(folder: Path) -> bool:
    """Returns whether a folder has masks, known by the ending of their names, or Roboflow's list of their classes."""
    if not folder.is_dir():
        return False
    names = [path.stem for path in folder.iterdir() if path.suffix.lower() in PHOTO_ENDINGS]
    return (folder / CLASS_LIST).is_file() or any(name.endswith(MASK_ENDINGS) for name in names)


def split_lists(root: Path, words: Sequence[str]) -> list[Path]:
    """Returns the files that list the names of a split's photos."""
    paths = [root / place.format(word) for place in SPLIT_LISTS for word in words]
    return [path for path in paths if path.is_file()]


def subfolders_by_name(root: Path) -> dict[str, Path]:
    """Returns the folders in a folder by their name in lower case."""
    if not root.is_dir():
        return {}
    with os.scandir(root) as entries:  # tells files from folders without asking the disk for each
        return {name.lower(): root / name for name in sorted(entry.name for entry in entries if entry.is_dir())}


def child(folder: Path, name: str) -> Path:
    """Returns the path of a file or folder in a folder, in the case that it has there."""
    path = folder / name
    return path if path.exists() else subfolders_by_name(folder).get(name.lower(), path)


def has_files(folder: Path, wanted: Sequence[str]) -> bool:
    """Returns whether a file in a folder or below it has one of these endings; it looks no further than the first."""
    if not folder.is_dir():
        return False
    subfolders = []
    with os.scandir(folder) as entries:
        for entry in (entry for entry in entries if not entry.name.startswith(".")):
            if entry.is_dir(follow_symlinks=False):
                subfolders.append(Path(entry.path))
            elif os.path.splitext(entry.name)[1].lower() in wanted:
                return True
    return any(has_files(subfolder, wanted) for subfolder in subfolders)


def endings(folder: Path) -> Counter[str]:
    """Returns how many files of each ending lie below a folder; of large ones the first thousands are counted."""
    counted: Counter[str] = Counter()
    for _, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        counted.update(os.path.splitext(name)[1].lower() for name in files if not name.startswith("."))
        if counted.total() > COUNTED:
            break
    return counted


def describe_folder(root: Path) -> str:
    """Returns what lies in a folder as text: "holds images/ (12 .png), labels.json"."""
    if not root.is_dir():
        return "is no folder"
    texts = []
    for path in sorted(path for path in root.iterdir() if not path.name.startswith("."))[: LISTED + 1]:
        counts = ", ".join(f"{n} {ending or 'files'}" for ending, n in endings(path).most_common(2)) or "empty"
        texts.append(f"{path.name}/ ({counts})" if path.is_dir() else path.name)
    return "holds " + (", ".join(texts[:LISTED]) + ", ..." * (len(texts) > LISTED) or "nothing")
