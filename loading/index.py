"""COCO's annotation file as a person index: one merged mask a photo, as flat arrays on disk."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import zipfile
import zlib
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from tqdm import tqdm

from loading.run_lengths import Drawing, Mask, draw_all, draw_mask
from utils import UserError, usable_cores

INDEX_VERSION = 3  # of the index file's content; another version is built anew
MANY_PHOTOS, MOST_PROCESSES = 2**12, 4  # from as many on processes share the drawing; more would add nothing to it
MAX_SIDE, MAX_PIXELS = 2**20, 2**28  # of a photo: more is taken for a broken record, not for a photo


class DataError(UserError):
    """The data on disk cannot be used; the message is one line for the user."""


class PersonIndex:
    """The photos with persons of one split, memory-mapped: every process shares the pages.

    Attributes:
        path: the index file.
        left_out: what the annotation file holds and the index does not, `{reason: count}`.
    """

    def __init__(self, path: Path):
        self.path = path
        content = torch.load(path, mmap=True, weights_only=True)
        self.fingerprint: dict = content["fingerprint"]
        self.left_out: dict[str, int] = content["left_out"]
        self._arrays = {name: tensor.numpy() for name, tensor in content["arrays"].items()}

    def __reduce__(self):
        return PersonIndex, (self.path,)  # a spawned worker maps the file again instead of copying it

    def __len__(self) -> int:
        return len(self._arrays["image_ids"])

    def image_id(self, index: int) -> int:
        return int(self._arrays["image_ids"][index])

    def file_name(self, index: int) -> str:
        return self._slice("names", index).tobytes().decode()

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels."""
        width, height = self._arrays["sizes"][index]
        return int(width), int(height)

    def largest_person(self, index: int) -> int:
        """Pixels of the largest annotation."""
        return int(self._arrays["largest"][index])

    def alpha(self, index: int) -> np.ndarray:
        """The union of all persons as uint8 (height, width), 0 or 255."""
        width, height = self.size(index)
        return draw_mask(self._slice("masks", index), height, width)

    def checksum(self) -> str:
        """Of all photos' ids, names, sizes and masks in their order, wherever they lie: 8 hexadecimal digits."""
        crc = 0
        for name in ("image_ids", "sizes", "names", "names_offsets", "masks", "masks_offsets"):
            crc = zlib.crc32(self._arrays[name], crc)
        return f"{crc:08x}"

    def _slice(self, name: str, index: int) -> np.ndarray:
        start, end = self._arrays[f"{name}_offsets"][index : index + 2]
        return self._arrays[name][start:end]


# --- one file for each split, kept current ----------------------------------------------------------------


def open_index(root: str | Path, split: str) -> PersonIndex:
    """Opens the person index of a split, and builds it first where it is missing or out of date.

    Raises:
        DataError: no COCO under `root`, or an annotation file that is not COCO's.
    """
    root = Path(root)
    annotations, photos, places = _annotation_file(root, split), root / split, index_places(root, split)
    for place in places:
        if index := _open_if_current(place, annotations, photos):
            return index
    print(f"Reading {annotations} (once: the person index is kept on disk)", flush=True)
    try:
        content = _build(annotations, photos)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    except BrokenProcessPool as error:  # no memory is left, as a rule
        raise DataError(f"{annotations} cannot be indexed: {error}") from None
    for place in places:
        if _write(content, place):
            return PersonIndex(place)
    folders = " or ".join(str(place.parent) for place in places)
    raise DataError(f"the person index cannot be kept in {folders}: make it writable or set XDG_CACHE_HOME")


def index_places(root: Path, split: str) -> list[Path]:
    """Where the index may lie, best first: under the data root, or in the user's cache folder."""
    folders = [root / ".silueta"]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not cache.startswith("~"):  # a container's user may have no home
        folders.append(Path(cache) / "silueta" / sha256(str(root.resolve()).encode()).hexdigest()[:16])
    return [folder / f"{split}.index" for folder in folders]


def _annotation_file(root: Path, split: str) -> Path:
    path = root / "annotations" / f"instances_{split}.json"
    for missing in [part for part in (path, root / split) if not part.exists()]:
        raise DataError(
            f"no COCO data: {missing} is missing. Expected are {path} and photos in {root / split}: "
            f"`python tools/download_coco.py --root {root}` fetches COCO 2017 (https://cocodataset.org), "
            "--data-root names another folder, --sample trains on built-in drawings"
        )
    return path


def _fingerprint(stat: os.stat_result, photos: Path, folders: list[str]) -> dict:
    """What the index was made from: a change of the file, or of what lies in a photo folder, shows here.

    The ctime, because an archive cannot bring it along: an index that came with a stranger's data is not taken.
    """
    listing = {name: (photos / name).stat().st_mtime_ns if (photos / name).is_dir() else 0 for name in folders}
    file = {"size": stat.st_size, "mtime": stat.st_mtime_ns, "ctime": stat.st_ctime_ns}
    return {"version": INDEX_VERSION, **file, "folders": listing}


def _open_if_current(path: Path, annotations: Path, photos: Path) -> PersonIndex | None:
    try:
        if not path.is_file():
            return None
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load itself takes flipped bits for data
                raise zipfile.BadZipFile
        index = PersonIndex(path)
        current = _fingerprint(annotations.stat(), photos, list(index.fingerprint["folders"]))
    except Exception as error:  # whatever a damaged file raises: it holds nothing that cannot be made again
        print(f"{path} cannot be read ({type(error).__name__}) and is built again", flush=True)
        return None
    return index if index.fingerprint == current else None


def _write(content: dict, path: Path) -> bool:
    """Writes beside the place, then renames; False where the folder is read-only, by its mode or its mount."""
    draft = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")  # machines may share the folder
    try:
        existing = next(folder for folder in path.parents if folder.exists())
        if not existing.stat().st_mode & 0o222:  # root could, but whoever took the write bits away meant it
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        print(f"The person index cannot be kept at {path}: {str(error).splitlines()[0]}", flush=True)
        with contextlib.suppress(OSError):  # there may be no draft, or no folder
            draft.unlink()
        return False
    return True


# --- what it is built from --------------------------------------------------------------------------------

_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # what an array can hold


class _Photo(msgspec.Struct, gc=False):
    id: _Id
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    segmentation: msgspec.Raw = msgspec.Raw(b"null")  # parsed only for persons: most of the file is not


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str


class _CocoFile(msgspec.Struct, gc=False):
    images: list[_Photo]
    annotations: list[_Annotation]
    categories: list[_Category]


def _build(annotations: Path, photos: Path) -> dict:
    left_out: Counter[str] = Counter()
    stat = annotations.stat()  # before the reading: a change during it must show
    persons = _persons(_parse(annotations), annotations, left_out)
    folders = sorted({os.path.dirname(_safe_name(photo, annotations)) for photo, _ in persons})
    fingerprint = _fingerprint(stat, photos, folders)  # and so before the listing
    rows = _drawn(_present(persons, photos, folders, left_out), left_out)
    left_out += Counter()  # drops the reasons that never occurred
    if not rows:
        raise DataError(
            f"no photo with a person: {annotations} names {len(persons)} photos of persons, "
            f"none of which can be used in {photos}" + (f" ({describe_left_out(left_out)})" if left_out else "")
        )
    return {"fingerprint": fingerprint, "left_out": dict(left_out), "arrays": _flat_arrays(rows)}


def describe_left_out(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


def _parse(annotations: Path) -> _CocoFile:
    try:
        return msgspec.json.decode(annotations.read_bytes(), type=_CocoFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{annotations} is cut short or not a COCO annotation file: {error}") from None
    except MemoryError:
        raise DataError(f"{annotations} does not fit into the memory") from None


def _persons(coco: _CocoFile, annotations: Path, left_out: Counter[str]) -> list[tuple[_Photo, list[msgspec.Raw]]]:
    """The photos with persons and their persons' segmentations, as copies: the rest of the file can go."""
    categories = {category.id for category in coco.categories if category.name == "person"}
    if not categories:
        raise DataError(f"{annotations} has no category named 'person' among its {len(coco.categories)}")
    photos, grouped = _photos_by_id(coco.images, left_out), {}
    for annotation in coco.annotations:
        if annotation.category_id not in categories:
            continue
        if annotation.image_id in photos:
            grouped.setdefault(annotation.image_id, []).append(annotation.segmentation)
        else:
            left_out["annotations of an unknown photo"] += 1
    return [(photos[image_id], segmentations) for image_id, segmentations in grouped.items()]


def _photos_by_id(images: list[_Photo], left_out: Counter[str]) -> dict[int, _Photo]:
    photos: dict[int, _Photo] = {}
    for photo in images:
        sides = sorted((photo.width, photo.height))
        if photo.id in photos:
            left_out["photo records with an id that was taken"] += 1
        elif sides[0] <= 0 or sides[1] > MAX_SIDE or sides[0] * sides[1] > MAX_PIXELS:
            left_out["photo records of an impossible size"] += 1
        else:
            photos[photo.id] = photo
    return photos


def _safe_name(photo: _Photo, annotations: Path) -> str:
    name = photo.file_name
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or not parts[-1] or os.path.isabs(name) or re.match("[A-Za-z]:|.*\0", name):
        raise DataError(f"{annotations} names a photo outside the photo folder: {name!r}")
    return name


def _present(
    persons: list[tuple[_Photo, list[msgspec.Raw]]], photos: Path, folders: list[str], left_out: Counter[str]
) -> list[tuple[_Photo, list[msgspec.Raw]]]:
    """Those whose file lies in the photo folder, which itself may lie wherever its owner wants it."""
    home, present = os.path.realpath(photos), []
    inside = {folder: _files_in(photos / folder, home) for folder in folders}
    for photo, segmentations in persons:
        folder, name = os.path.split(photo.file_name)
        is_inside = False if inside[folder] is None else inside[folder].get(name)
        if is_inside:
            present.append((photo, segmentations))
        else:
            reason = "are not on disk" if is_inside is None else "are links out of the photo folder"
            left_out[f"photos that {reason}"] += 1
    return present


def _files_in(folder: Path, home: str) -> dict[str, bool] | None:
    """Whether each file lies under `home`; None for a folder that does not: it is not even listed."""
    if not folder.is_dir():
        return {}
    if not _lies_in(folder, home):
        return None
    files = {}
    with os.scandir(folder) as entries:  # tells files and links apart without opening any
        for entry in entries:
            if entry.is_file(follow_symlinks=False):  # a pipe or a device would never end
                files[entry.name] = True
            elif entry.is_symlink() and os.path.isfile(entry.path):
                files[entry.name] = _lies_in(entry.path, home)
    return files


def _lies_in(path: str | Path, home: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(home)


def _drawn(persons: list[tuple[_Photo, list[msgspec.Raw]]], left_out: Counter[str]) -> list[tuple[_Photo, Mask]]:
    """Each photo with its merged mask, without those where nothing can be drawn."""
    processes, rows = min(usable_cores(), MOST_PROCESSES) if len(persons) >= MANY_PHOTOS else 1, []
    masks = draw_all([Drawing(shapes, photo.height, photo.width) for photo, shapes in persons], processes)
    bar = tqdm(masks, "Drawing the masks", len(persons), False, unit="photo", delay=1, disable=not sys.stderr.isatty())
    for (photo, _), mask in zip(persons, bar, strict=True):
        left_out["annotations that cannot be drawn"] += mask.undrawable
        if mask.counts:
            rows.append((photo, mask))
    return rows


def _flat_arrays(rows: list[tuple[_Photo, Mask]]) -> dict[str, torch.Tensor]:
    names, names_offsets = _joined([photo.file_name.encode() for photo, _ in rows])
    masks, masks_offsets = _joined([mask.counts for _, mask in rows])
    return {
        "image_ids": torch.tensor([photo.id for photo, _ in rows]),
        "sizes": torch.tensor([(photo.width, photo.height) for photo, _ in rows]),
        "largest": torch.tensor([mask.largest for _, mask in rows]),
        "names": names, "names_offsets": names_offsets,
        "masks": masks, "masks_offsets": masks_offsets,
    }  # fmt: skip


def _joined(pieces: list[msgspec.Raw]) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.zeros(len(pieces) + 1, dtype=torch.int64)
    offsets[1:] = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    return torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8), offsets
