"""An annotation file, or a folder of masks, as a person index: one merged mask a photo, as flat arrays on disk."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import zipfile
import zlib
from collections import defaultdict
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import torch
from tqdm import tqdm

from loading.annotations import (
    DataError,
    LeftOut,
    Person,
    Photo,
    describe_left_out,
    read_persons,
    safe_name,
    with_example,
)
from loading.files import PhotoFolder, folders_of
from loading.headers import Size, which_way_up
from loading.layout import Layout, find_layout
from loading.masks import Pair, draw_files, read_pairs, state_of
from loading.run_lengths import Drawing, Mask, draw_all, draw_mask, is_box_alone, lie_inside
from utils import counted, usable_cores

INDEX_VERSION = 5  # of the index file's content; another version is built anew
MANY_PHOTOS, MOST_PROCESSES = 2**12, 4  # from as many on processes share the drawing; more would add nothing to it


class OtherVersionError(Exception):
    """An index of an older program, or of a newer one: nothing is wrong with it, and it is made anew."""


class PersonIndex:
    """The photos with persons of one split, memory-mapped: every process shares the pages.

    Attributes:
        path: the index file.
        left_out: what the annotation file holds and the index does not, `{what and why, with an example: count}`.
        is_shown: whether the set was annotated on the photos as shown; None: no photo tells.
    """

    def __init__(self, path: Path):
        self.path = path
        content = torch.load(path, mmap=True, weights_only=True)
        if content["fingerprint"]["version"] != INDEX_VERSION:
            raise OtherVersionError
        self.fingerprint: dict = content["fingerprint"]
        self.left_out: dict[str, int] = content["left_out"]
        self.is_shown: bool | None = content["is_shown"]
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
        crc = zlib.crc32({None: b"", False: b"stored", True: b"shown"}[self.is_shown])
        for name in ("image_ids", "sizes", "names", "names_offsets", "masks", "masks_offsets"):
            crc = zlib.crc32(self._arrays[name], crc)
        return f"{crc:08x}"

    def _slice(self, name: str, index: int) -> np.ndarray:
        start, end = self._arrays[f"{name}_offsets"][index : index + 2]
        return self._arrays[name][start:end]


# --- one file for each split, kept current ----------------------------------------------------------------


def open_index(root: str | Path, split: str) -> PersonIndex:
    """That of a split in COCO's layout."""
    return index_of(find_layout(Path(root), split))


def index_of(layout: Layout) -> PersonIndex:
    """Opens the person index of a split, and builds it first where it is missing or out of date.

    Raises:
        DataError: an annotation file that is not COCO's, or no photo that can be used.
    """
    places = index_places(layout.home, layout.index)
    for place in places:
        if index := _open_if_current(place, layout):
            return index
    print(f"Reading {layout.masks} (once: the person index is kept on disk)", flush=True)
    try:
        content = _build(layout)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
    except BrokenProcessPool as error:  # no memory is left, as a rule
        raise DataError(f"{layout.masks} cannot be indexed: {error}") from None
    for place in places:
        if _write(content, place):
            return PersonIndex(place)
    folders = " or ".join(str(place.parent) for place in places)
    raise DataError(f"the person index cannot be kept in {folders}: make it writable or set XDG_CACHE_HOME")


def index_places(home: Path, name: str) -> list[Path]:
    """Where the index may lie, best first: under the data, or in the user's cache folder."""
    folders = [home / ".silueta"]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not cache.startswith("~"):  # a container's user may have no home
        folders.append(Path(cache) / "silueta" / sha256(str(home.resolve()).encode()).hexdigest()[:16])
    return [folder / f"{name}.index" for folder in folders]


def _fingerprint(state: dict, photos: Path, folders: list[str]) -> dict:
    """What the index was made from: a change of the masks, or of what lies in a photo folder, shows here."""
    listing = {name: (photos / name).stat().st_mtime_ns if (photos / name).is_dir() else 0 for name in folders}
    return {"version": INDEX_VERSION, **state, "folders": listing}


def _state(layout: Layout) -> dict:
    """Of what says who is on the photos.

    The ctime, because an archive cannot bring it along: an index that came with a stranger's data is not taken.
    """
    if not layout.category:
        return {"masks": state_of(layout.masks)}
    stat = layout.masks.stat()
    return {"size": stat.st_size, "mtime": stat.st_mtime_ns, "ctime": stat.st_ctime_ns}


def _open_if_current(path: Path, layout: Layout) -> PersonIndex | None:
    try:
        if not path.is_file():
            return None
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load itself takes flipped bits for data
                raise zipfile.BadZipFile
        index = PersonIndex(path)
        current = _fingerprint(_state(layout), layout.photos, list(index.fingerprint["folders"]))
    except OtherVersionError:
        return None
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

def _build(layout: Layout) -> dict:
    left_out: LeftOut = defaultdict(list)
    state = _state(layout)  # before the reading: a change during it must show
    fingerprint, number, persons = (_from_file if layout.category else _from_folder)(layout, state, left_out)
    is_shown, upright = _upright(persons, layout, left_out)
    if layout.part and upright:
        upright, left_out = _of_part(upright, left_out, layout)
    rows = _drawn(upright, layout, left_out)
    counts = {with_example(reason, names): len(names) for reason, names in left_out.items() if names}
    if not rows:
        raise DataError(
            f"no photo with a person: of {number} in {layout.masks} none can be used in {layout.photos}"
            + (f" ({describe_left_out(counts)})" if counts else "")
        )
    return {"fingerprint": fingerprint, "left_out": counts, "is_shown": is_shown, "arrays": _flat_arrays(rows)}


def _from_file(layout: Layout, state: dict, left_out: LeftOut) -> tuple[dict, int, list[Person]]:
    """The fingerprint, the number of photos with persons, and those that can be used, of an annotation file."""
    persons = read_persons(layout.masks, left_out, layout.category)
    folder = PhotoFolder(layout.photos, [safe_name(photo, layout.masks) for photo, _ in persons])
    fingerprint = _fingerprint(state, layout.photos, folder.watched)  # and so before the listing
    return fingerprint, len(persons), _present(persons, folder, left_out)


def _from_folder(layout: Layout, state: dict, left_out: LeftOut) -> tuple[dict, int, list[Pair]]:
    """The same of a folder of mask files."""
    fingerprint = _fingerprint(state, layout.photos, folders_of(layout.photos))
    pairs = read_pairs(layout.photos, layout.masks, left_out)
    return fingerprint, len(pairs), pairs


def _of_part(persons: list[Person], left_out: LeftOut, layout: Layout) -> tuple[list[Person], LeftOut]:
    """The photos of one side of a made split; what is left out is counted on one side as well."""
    names, has = [photo.file_name for photo, _ in persons], layout.part.has
    chosen = [person for person, name in zip(persons, names, strict=True) if has(name)]
    if not chosen:
        raise DataError(
            f"of {counted(len(names), 'photo')} in {layout.photos} none is for {layout.part.name}: their names decide, "
            f"with --val-share {layout.part.val_share:g}; {layout.part.share_for_one(names):g} would give it one"
        )
    return chosen, defaultdict(list, {reason: [*filter(has, names)] for reason, names in left_out.items()})


def _present(persons: list[Person], folder: PhotoFolder, left_out: LeftOut) -> list[Person]:
    """Those whose file lies in the photo folder and is no other's.

    A file of several records may belong to one of them, to none, or be annotated in parts: all are left out.
    """
    present = {}
    for photo, segmentations in persons:
        name = photo.file_name
        found = folder.find(name)
        if len(found) == 1 and found[0]:
            photo.file_name = found[0]
            present.setdefault(photo.file_name, []).append((photo, segmentations))
        elif found == [""]:
            left_out["photo{s} behind a link out of the photo folder"].append(name)
        elif found:
            left_out["photo{s} of which the last parts of the name fit several files"].append(name)
        else:
            left_out["photo{s} not on disk"].append(f"{name}, tried as {folder.path / name}")
    left_out["photo record{s} of a file that has several"] += [
        photo.file_name for records in present.values() if len(records) > 1 for photo, _ in records
    ]
    return [records[0] for records in present.values() if len(records) == 1]


def _upright(persons: list[Person | Pair], layout: Layout, left_out: LeftOut) -> tuple[bool | None, list]:
    """Whether the set was annotated as shown, and the photos without those of which nobody can tell."""
    files = [f"{layout.photos}/{photo.file_name}" for photo, _ in persons]
    sizes = [(photo.width, photo.height) for photo, _ in persons]

    def fits(place: int, size: Size) -> bool:
        return lie_inside(persons[place][1], *size) if layout.category else size == sizes[place]

    is_shown, turned = which_way_up(files, sizes, fits)
    names = [persons[place][0].file_name for place in turned]
    if is_shown is None:
        left_out["photo{s} that EXIF turns, and nothing tells whether the annotation is turned as well"] += names
        return None, [person for place, person in enumerate(persons) if place not in turned]
    for place, size in turned.items():
        persons[place][0].width, persons[place][0].height = size
    if names:
        print(f"{len(names)} {with_example('photo{s}', names)} that EXIF turns: taken as annotated on the "
              f"{'turned' if is_shown else 'stored'} pixels, as others of the set are", flush=True)  # fmt: skip
    return is_shown, persons


def _drawn(persons: list[Person | Pair], layout: Layout, left_out: LeftOut) -> list[tuple[Photo, Mask]]:
    """Each photo with its merged mask, without those where a person cannot be drawn."""
    rows = []
    if layout.category:
        processes = min(usable_cores(), MOST_PROCESSES) if len(persons) >= MANY_PHOTOS else 1
        masks = draw_all([Drawing(shapes, photo.height, photo.width) for photo, shapes in persons], processes)
    else:
        files = [(layout.masks / mask, (photo.width, photo.height)) for photo, mask in persons]
        masks = draw_files(files, usable_cores())
    bar = tqdm(masks, "Drawing the masks", len(persons), False, unit="photo", delay=1, disable=not sys.stderr.isatty())
    for (photo, shapes), mask in zip(persons, bar, strict=True):
        if isinstance(mask, Mask):
            rows.append((photo, mask))
        else:
            left_out[mask or _why_not_drawn(shapes)].append(photo.file_name)
    return rows


def _why_not_drawn(segmentations: list[msgspec.Raw]) -> str:
    is_box = any(map(is_box_alone, segmentations))
    return f"photo{{s}} with a person who {'has a box and no mask' if is_box else 'cannot be drawn'}"


def _flat_arrays(rows: list[tuple[Photo, Mask]]) -> dict[str, torch.Tensor]:
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
