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
LARGE_FILE, MOST_PROCESSES = 2**24, 4  # bytes from which processes share the drawing; more would wait for the parsing
MAX_SIDE, MAX_PIXELS = 2**20, 2**28  # of a photo: more is taken for a broken record, not for a photo


class DataError(UserError):
    """The data on disk cannot be used; the message is one line for the user."""


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

    def check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no photo {index} among {len(self)}")

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


def open_index(root: str | Path, split: str) -> PersonIndex:
    """Opens the person index of a split, and builds it first where it is missing or out of date.

    Raises:
        DataError: no COCO under `root`, or an annotation file that is not COCO's.
    """
    root = Path(root)
    annotations = _annotation_file(root, split)
    places = index_places(root, split)
    for place in places:
        index = _open_if_current(place, annotations, root / split)
        if index is not None:
            return index
    print(f"Reading {annotations} (once: the person index is kept on disk)", flush=True)
    try:
        content = _build(annotations, root / split)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    for place in places:
        if _write_atomically(content, place):
            return PersonIndex(place)
    folders = " or ".join(str(place.parent) for place in places)
    raise DataError(f"the person index cannot be kept in {folders}: make it writable or set XDG_CACHE_HOME")


def index_places(root: Path, split: str) -> list[Path]:
    """Where the index may lie, best first: under the data root, or in the user's cache folder."""
    name = f"{split}.index"
    places = [root / ".silueta" / name]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not cache.startswith("~"):  # a container's user may have no home
        places.append(Path(cache) / "silueta" / sha256(str(root.resolve()).encode()).hexdigest()[:16] / name)
    return places


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
    paths = {folder: photos / folder for folder in folders}
    listing = {folder: path.stat().st_mtime_ns if path.is_dir() else 0 for folder, path in paths.items()}
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


def _write_atomically(content: dict, path: Path) -> bool:
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


def _build(annotations: Path, photos: Path) -> dict:
    stat = annotations.stat()  # before the reading: a change during it must show
    coco = _parse(annotations)
    left_out: Counter[str] = Counter()
    records = _photos_by_id(coco, left_out)
    segmentations = _segmentations_by_photo(coco, records, annotations, left_out)
    del coco  # most of it is not about persons
    named = len(segmentations)
    folders = sorted({os.path.dirname(_safe_name(records[i].file_name, annotations)) for i in segmentations})
    fingerprint = _fingerprint(stat, photos, folders)  # and so before the listing
    present = {folder: _files_in(photos / folder, photos) for folder in folders}
    segmentations = {i: raw for i, raw in segmentations.items() if _is_present(records[i], present, left_out)}
    rows = _draw(records, segmentations, annotations, left_out)
    if not rows:
        raise DataError(
            f"no photo with a person: {annotations} names {named} photos of persons, "
            f"none of which can be used in {photos}" + (f" ({describe_left_out(left_out)})" if left_out else "")
        )
    return {"fingerprint": fingerprint, "left_out": dict(left_out), "arrays": _flat_arrays(rows)}


def _parse(annotations: Path) -> _CocoFile:
    try:
        return msgspec.json.decode(annotations.read_bytes(), type=_CocoFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{annotations} is cut short or not a COCO annotation file: {error}") from None
    except MemoryError:
        raise DataError(f"{annotations} does not fit into the memory") from None


def _photos_by_id(coco: _CocoFile, left_out: Counter[str]) -> dict[int, _Photo]:
    photos: dict[int, _Photo] = {}
    for photo in coco.images:
        size = (photo.width, photo.height)
        if photo.id in photos:
            left_out["photo records with an id that was taken"] += 1
        elif not 0 < min(size) <= max(size) <= MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
            left_out["photo records of an impossible size"] += 1
        else:
            photos[photo.id] = photo
    return photos


def _segmentations_by_photo(
    coco: _CocoFile, photos: dict[int, _Photo], annotations: Path, left_out: Counter[str]
) -> dict[int, list[bytes]]:
    """The annotations of persons, grouped by the photo they lie on."""
    persons = {category.id for category in coco.categories if category.name == "person"}
    if not persons:
        raise DataError(f"{annotations} has no category named 'person' among its {len(coco.categories)}")
    grouped: dict[int, list[bytes]] = {}
    for annotation in coco.annotations:
        if annotation.category_id not in persons:
            continue
        if annotation.image_id in photos:
            grouped.setdefault(annotation.image_id, []).append(bytes(annotation.segmentation))
        else:
            left_out["annotations of an unknown photo"] += 1
    return grouped


def _safe_name(file_name: str, annotations: Path) -> str:
    parts = file_name.replace("\\", "/").split("/")
    if ".." in parts or not parts[-1] or os.path.isabs(file_name) or re.match("[A-Za-z]:|.*\0", file_name):
        raise DataError(f"{annotations} names a photo outside the photo folder: {file_name!r}")
    return file_name


def _files_in(folder: Path, photos: Path) -> dict[str, bool] | None:
    """The files of a folder; True for those that lie in the photo folder, not merely a link to elsewhere.

    None for a folder that itself is such a link: it is not even listed.
    """
    if not folder.is_dir():
        return {}
    home = os.path.realpath(photos)
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


def _is_present(photo: _Photo, present: dict[str, dict[str, bool] | None], left_out: Counter[str]) -> bool:
    folder, name = os.path.split(photo.file_name)
    files = present[folder]
    inside = False if files is None else files.get(name)
    if inside is None:
        left_out["photos that are not on disk"] += 1
    elif not inside:
        left_out["photos that are links out of the photo folder"] += 1
    return bool(inside)


def _draw(
    records: dict[int, _Photo], segmentations: dict[int, list[bytes]], annotations: Path, left_out: Counter[str]
) -> list[tuple[_Photo, Mask]]:
    """Each photo with its merged mask, without those where nothing can be drawn."""
    photos, rows = [records[image_id] for image_id in segmentations], []
    drawings = [Drawing(segmentations[photo.id], photo.height, photo.width) for photo in photos]
    bar = tqdm(photos, "Drawing the masks", unit="photo", delay=1, leave=False, disable=not sys.stderr.isatty())
    try:
        for photo, mask in zip(bar, draw_all(drawings, _processes(annotations)), strict=True):
            left_out["annotations that cannot be drawn"] += mask.undrawable
            if mask.counts:
                rows.append((photo, mask))
    except BrokenProcessPool as error:
        raise DataError(f"{annotations} cannot be indexed: {error}") from None
    left_out += Counter()  # drops the reasons that never occurred
    return rows


def _processes(annotations: Path) -> int:
    """How many draw the masks; on one core there is nothing to share."""
    cores = usable_cores()
    return min(cores, MOST_PROCESSES) if cores > 1 and annotations.stat().st_size >= LARGE_FILE else 0


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


def _joined(pieces: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.zeros(len(pieces) + 1, dtype=torch.int64)
    offsets[1:] = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    return torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8), offsets


def describe_left_out(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())
