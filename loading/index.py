"""The person index: the photos of a split that show persons, one merged mask each, as flat arrays in a file."""

from __future__ import annotations

import os
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from loading.annotations import DataError, LeftOut, PhotoRecord, describe_left_out, read_persons, with_example
from loading.files import PhotoFolder, subfolders
from loading.foreign import converter
from loading.headers import Size, find_rotated
from loading.layout import Choice, Layout, Listed, Subset
from loading.mask_values import MaskRule
from loading.masks import find_rule, masks_state, pair_files, read_masks, read_pairs, read_photos, refuse_wrong_masks
from loading.run_lengths import ONLY_BBOX, Mask, draw_mask, lie_inside, merge_segmentations
from loading.workers import usable_cores
from loading.yolo import read_yolo
from utils import atomic_write, counted

INDEX_VERSION = 7  # of the file's content; a file of another version is built again
MISLED_FRACTION = 0.1  # of the rotated photos; more whose outlines contradict their sizes make all sizes doubtful

MIN_BOXES = 5  # rectangles in a set: bounding boxes; of COCO's persons none is one
EMPTY = "photo{s} with an empty mask"

Rows = list[tuple[PhotoRecord, Mask]]
Photos = Sequence[tuple[PhotoRecord, Any]]  # with their segmentations, or with the name of their mask file


class PersonIndex:
    """The photos with persons of one split, memory-mapped: all processes share the pages.

    Attributes:
        left_out: the photos and annotations that are not in the index: reason with an example -> number.
        meaning: what the values of mask files mean, as text; "" for COCO's annotations.
        exif_applied: whether the set was annotated on the photos as shown (EXIF orientation applied); None: unknown.
    """

    def __init__(self, path: Path):
        self.path = path
        content = torch.load(path, mmap=True, weights_only=True)
        self.fingerprint: dict = content["fingerprint"]
        self.left_out: dict[str, int] = content["left_out"]
        self.exif_applied: bool | None = content.get("exif_applied")
        self.meaning: str = content.get("meaning", "")  # older versions have none
        self._arrays = {name: tensor.numpy() for name, tensor in content["arrays"].items()}

    def __reduce__(self):
        return PersonIndex, (self.path,)  # a spawned worker maps the file again instead of copying it

    def __len__(self) -> int:
        return len(self._arrays["image_ids"])

    def image_id(self, index: int) -> int:
        return int(self._arrays["image_ids"][index])

    def file_name(self, index: int) -> str:
        """Returns the photo's path relative to the photo folder."""
        return self._slice("names", index).tobytes().decode()

    def size(self, index: int) -> Size:
        """Returns the (width, height) that the photo was annotated at."""
        width, height = self._arrays["sizes"][index]
        return int(width), int(height)

    def largest_person(self, index: int) -> int:
        """Returns the pixels of the largest annotation."""
        return int(self._arrays["largest"][index])

    def alpha(self, index: int) -> np.ndarray:
        """Returns the union of all persons as uint8 (height, width), 0 or 255."""
        width, height = self.size(index)
        return draw_mask(self._slice("masks", index), height, width)

    def checksum(self) -> str:
        """Returns 8 hexadecimal digits that depend on all photos' ids, names, sizes and masks, and on nothing else."""
        crc = zlib.crc32({None: b"", False: b"stored", True: b"shown"}[self.exif_applied])
        for name in ("image_ids", "sizes", "names", "names_offsets", "masks", "masks_offsets"):
            crc = zlib.crc32(self._arrays[name], crc)
        return f"{crc:08x}"

    def _slice(self, name: str, index: int) -> np.ndarray:
        start, end = self._arrays[f"{name}_offsets"][index : index + 2]
        return self._arrays[name][start:end]


def index_of(layout: Layout) -> PersonIndex:
    """Opens the person index of a split, and builds it first if it is missing or out of date.

    Raises:
        DataError: the annotations cannot be read, no photo can be used, or the index cannot be written.
    """
    candidates = index_candidates(layout.index_folder, layout.index_name)
    for path in candidates:
        if index := _open_if_current(path, layout):
            return index
    print(f"Reading {layout.annotations} (once: the person index is kept on disk)", flush=True)
    try:
        content = _build(layout)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    for path in candidates:
        if _write(content, path):
            return PersonIndex(path)
    folders = " or ".join(str(path.parent) for path in candidates)
    raise DataError(f"the person index cannot be kept in {folders}: make it writable or set XDG_CACHE_HOME")


def index_candidates(folder: Path, name: str) -> list[Path]:
    """Returns where an index may be kept, best first: below the data, or in the user's cache folder."""
    folders = [folder / ".silueta"]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not cache.startswith("~"):  # a container's user may have no home
        folders.append(Path(cache) / "silueta" / sha256(str(folder.resolve()).encode()).hexdigest()[:16])
    return [folder / f"{name}.index" for folder in folders]


def _fingerprint(layout: Layout, folders: Sequence[str]) -> dict:
    """Returns what shows a change of the annotations, or of the files in the photo folder and these subfolders.

    It has the annotations' ctime, which no archive can set: an index that came with a stranger's data is not used.
    """
    if layout.annotations.is_file():
        stat = layout.annotations.stat()
        state: dict[str, Any] = {"size": stat.st_size, "mtime": stat.st_mtime_ns, "ctime": stat.st_ctime_ns}
    else:
        folders_of_masks = [layout.annotations, *(masks for _, masks in layout.other_masks)]
        state = {"masks": [masks_state(masks) for masks in folders_of_masks]}
    if isinstance(layout.subset, Listed):
        state["list"] = layout.subset.path.stat().st_mtime_ns
    paths = {folder: layout.photos / folder for folder in folders}
    times = {folder: path.stat().st_mtime_ns if path.is_dir() else 0 for folder, path in paths.items()}
    return {"version": INDEX_VERSION, **state, "folders": times}


def _open_if_current(path: Path, layout: Layout) -> PersonIndex | None:
    try:
        if not path.is_file():
            return None
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not check for flipped bits
                raise zipfile.BadZipFile
        index = PersonIndex(path)
        current = _fingerprint(layout, [*index.fingerprint["folders"]])
    except Exception as error:  # whatever a damaged file raises: it can be built again
        print(f"{path} cannot be read ({type(error).__name__}) and is built again", flush=True)
        return None
    return index if index.fingerprint == current else None


def _write(content: dict, path: Path) -> bool:
    """Writes the index file whole or not at all; returns False, and prints why, if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        print(f"The person index cannot be kept at {path}: {str(error).splitlines()[0]}", flush=True)
        return False
    return True


def _build(layout: Layout) -> dict:
    fingerprint = _fingerprint(layout, subfolders(layout.photos))  # before the reading: a change during it must show
    left_out: LeftOut = defaultdict(list)
    listed, affix = _list_photos(layout, left_out)
    photos = _on_disk(listed, layout, left_out) if layout.annotations.is_file() else listed
    rule = _rule(layout, listed) if listed and layout.has_persons and not layout.category else None
    exif_applied, photos = _infer_exif_applied(photos, layout, left_out)
    if layout.subset and photos:
        photos, left_out = _select_subset(photos, layout, layout.subset, left_out)
    rows = [*_draw_masks(photos, layout, left_out, rule)]
    rows = _without_boxes(rows, left_out)
    if rule:
        refuse_wrong_masks(left_out, len(photos), rule, layout.annotations)
    counts = {with_example(reason, names): len(names) for reason, names in left_out.items() if names}
    if not rows:
        raise DataError(
            f"no photo with a person: of {len(listed)} in {layout.annotations} none can be used in {layout.photos}"
            + (f" ({describe_left_out(counts)})" if counts else "")
            + (f". {how}" if not listed and (how := converter(layout.root)) else "")
        )
    meaning = (rule.described if rule else "") + f", names {affix}" * bool(affix)
    content = {"fingerprint": fingerprint, "left_out": counts, "exif_applied": exif_applied, "meaning": meaning}
    return {**content, "arrays": _flat_arrays(rows)}


def _list_photos(layout: Layout, left_out: LeftOut) -> tuple[Photos, str]:
    """Returns the photos with their segmentations or masks, and how the names of masks differ from the photos'."""
    if layout.annotations.is_file():
        return read_persons(layout.annotations, left_out, layout.category, layout.keeps_empty), ""
    if layout.category:
        category, keeps_empty = layout.category, layout.keeps_empty
        return read_yolo(layout.photos, layout.annotations, layout.root, left_out, category, keeps_empty), ""
    if layout.has_persons:
        return read_pairs(layout.photos, layout.annotations, left_out)
    return read_photos(layout.photos, left_out), ""


def _rule(layout: Layout, pairs: Photos) -> MaskRule:
    """Returns what the mask files mean, by those of all splits."""
    masks = [layout.annotations / mask for _, mask in pairs]
    for photos, folder in layout.other_masks:
        masks += [folder / mask for _, mask in pair_files(photos, folder, defaultdict(list))[0]]
    return find_rule(masks, layout.mask_values, layout.annotations, usable_cores())


def _on_disk(listed: Photos, layout: Layout, left_out: LeftOut) -> Photos:
    """Returns the photos of which there is one file, under its name on disk.

    Where several records have one file, its persons may be shared out among them: all of them are left out.
    """
    folder, by_file = PhotoFolder(layout.photos), defaultdict(list)
    for photo, segmentations in listed:
        name, files = photo.file_name, folder.find(photo.file_name)
        if not files:
            left_out["photo{s} not on disk"].append(f"{name}, tried as {layout.photos / name}")
        elif len(files) > 1:
            left_out["photo{s} whose name matches several files"].append(name)
        elif not files[0]:
            left_out["photo{s} behind a link, or in a hidden folder"].append(name)
        else:
            photo.file_name = files[0]
            by_file[photo.file_name].append((photo, segmentations))
    several = [photo.file_name for records in by_file.values() if len(records) > 1 for photo, _ in records]
    left_out["photo record{s} of a file that has several"] += several
    return [records[0] for records in by_file.values() if len(records) == 1]


def _infer_exif_applied(photos: Photos, layout: Layout, left_out: LeftOut) -> tuple[bool | None, Photos]:
    """Infers whether a set was annotated on its photos as shown (EXIF orientation applied) or as stored.

    The photos that a quarter turn resizes decide, by their sizes in the annotations. Some tools write the stored size
    beside outlines drawn on the photo as shown: where outlines fit the other size only, the sizes are not believed.
    Returns None for unknown, and the photos without those whose masks may be wrong.
    """
    sizes = [(photo.width, photo.height) for photo, _ in photos]
    rotated = find_rotated([f"{layout.photos}/{photo.file_name}" for photo, _ in photos])
    rotated = {i: both for i, both in rotated.items() if sizes[i] in both}
    votes = {i: sizes[i] == shown for i, (stored, shown) in rotated.items() if stored != shown}
    misled = [i for i in votes if layout.category and not lie_inside(photos[i][1], *sizes[i])
              and lie_inside(photos[i][1], *sizes[i][::-1])]  # fmt: skip
    if len(misled) > MISLED_FRACTION * len(votes):
        votes = {}
    exif_applied = next(iter(votes.values())) if len({*votes.values()}) == 1 else None
    names = [photos[i][0].file_name for i in rotated if i not in votes]
    if exif_applied is None:
        left_out["photo{s} with an EXIF orientation that the annotations may or may not follow"] += names
        return None, [photo for i, photo in enumerate(photos) if i not in rotated or i in votes]
    if names:
        print(f"{len(names)} {with_example('photo{s}', names)} with an EXIF orientation: taken as annotated on the "
              f"{'rotated' if exif_applied else 'stored'} pixels, as others of the set are", flush=True)  # fmt: skip
    return exif_applied, photos


def _select_subset(
    photos: Photos, layout: Layout, subset: Choice, left_out: LeftOut
) -> tuple[Photos, LeftOut]:
    """Returns the photos of one subset, and of what is left out the part that belongs to it by name."""
    names = [photo.file_name for photo, _ in photos]
    contains = subset.contains
    chosen = [photo for photo, name in zip(photos, names, strict=True) if contains(name)]
    if not chosen:
        none = f"of {counted(len(names), 'photo')} in {layout.photos} none is for {subset.name}"
        if not isinstance(subset, Subset):
            raise DataError(f"{none}: {getattr(subset, 'path', layout.photos / subset.name)} has none of their names")
        if len(names) == 1:
            raise DataError(f"{none}: one photo is not enough, it takes one to train on and another one to validate")
        change = "smaller" if subset.name == "training" else "larger"
        raise DataError(f"{none}: their names decide, with --val-fraction {subset.val_fraction:g}; try a {change} one")
    return chosen, defaultdict(list, {reason: [*filter(contains, names)] for reason, names in left_out.items()})


def _draw_masks(
    photos: Photos, layout: Layout, left_out: LeftOut, rule: MaskRule | None
) -> Iterator[tuple[PhotoRecord, Mask]]:
    """Yields each photo with its mask, without those whose mask is unusable."""
    if rule:
        files = [(layout.annotations / mask, (photo.width, photo.height)) for photo, mask in photos]
        masks = read_masks(files, rule, usable_cores())
    else:
        masks = (merge_segmentations(segmentations, photo.height, photo.width) for photo, segmentations in photos)
    bar = tqdm(masks, "Drawing the masks", len(photos), False, unit="photo", delay=1, disable=not sys.stderr.isatty())
    for (photo, _), mask in zip(photos, bar, strict=True):
        if not isinstance(mask, Mask):
            left_out[mask].append(photo.file_name)
        elif mask.largest or layout.keeps_empty:
            yield photo, mask
        else:
            left_out[EMPTY].append(photo.file_name)


def _without_boxes(rows: Rows, left_out: LeftOut) -> Rows:
    """Returns the photos without those with a person who is a rectangle, where these are too many to be hand-drawn."""
    if sum(mask.boxes for _, mask in rows) < MIN_BOXES:
        return rows
    left_out[ONLY_BBOX] += [photo.file_name for photo, mask in rows if mask.boxes]
    return [row for row in rows if not row[1].boxes]


def _flat_arrays(rows: Rows) -> dict[str, torch.Tensor]:
    arrays = {
        "image_ids": torch.tensor([photo.id for photo, _ in rows]),
        "sizes": torch.tensor([(photo.width, photo.height) for photo, _ in rows]),
        "largest": torch.tensor([mask.largest for _, mask in rows]),
    }
    names, masks = [photo.file_name.encode() for photo, _ in rows], [mask.counts for _, mask in rows]
    for name, pieces in (("names", names), ("masks", masks)):
        arrays[name] = torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8)
        arrays[f"{name}_offsets"] = torch.tensor([0, *accumulate(map(len, pieces))])
    return arrays
