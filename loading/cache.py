"""Keeps letterboxed photos and their masks in one file, which all processes memory-map."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loading.annotations import DataError
from utils import fsync

CACHE_VERSION = 1  # of the file's content; a file of another version is made again
CHUNK = 256  # photos per fsync: no more are lost by a kill or a power cut

Pixels = tuple[np.ndarray, np.ndarray]  # photo uint8 (height, width, 3) and mask (height, width), 0 or 255


class PhotoCache:
    """One split's photos at one size, without the square's padding; `sizes` are their (width, height).

    The file holds a stamp for each photo (int64), then a row for each: RGB, a byte each, and the mask, a bit a pixel.
    A stamp tells which state of the photo's file its row was made from; 0: there is no row.
    """

    def __init__(self, path: Path, sizes: np.ndarray):
        self.path, self.sizes = path, np.asarray(sizes, np.int64)
        self._offsets = row_offsets(self.sizes)
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._stamps = np.frombuffer(self._bytes, np.int64, len(self.sizes))

    def __reduce__(self):
        return PhotoCache, (self.path, self.sizes)  # a spawned worker maps the file again instead of copying it

    def get(self, index: int) -> Pixels | None:
        """Returns a photo, as a read-only view, and its mask; None if the photo could not be read for the cache."""
        if not self._stamps[index]:
            return None
        width, height = self.sizes[index].tolist()
        pixels, (start, end) = width * height, self._offsets[index : index + 2].tolist()
        row = np.frombuffer(self._bytes, np.uint8, end - start, start)
        mask = np.unpackbits(row[3 * pixels :], count=pixels).reshape(height, width)
        return row[: 3 * pixels].reshape(height, width, 3), np.negative(mask, out=mask)  # 1 becomes 255


def row_offsets(sizes: np.ndarray) -> np.ndarray:
    """Returns where each row begins in the file and, last, the file's length: int64 (N + 1,)."""
    pixels = sizes.prod(axis=1, dtype=np.int64)
    lengths = 3 * pixels + (pixels + 7) // 8
    return np.concatenate([[0], lengths.cumsum()]) + 8 * len(sizes)


def open_cache(
    name: str, state: str, folders: list[Path], files: list[Path], sizes: np.ndarray,
    make: Callable[[int], Pixels], threads: int,
) -> PhotoCache:  # fmt: skip
    """Opens a cache, and first makes the rows that are missing or whose photo has changed.

    Args:
        name: of the split and the image size; one file is kept of each.
        state: what the rows depend on besides the photos' files.
        folders: where the file may lie, best first.
        files: of the photos.
        sizes: (width, height) of each photo as `make` returns it.
        make: returns the pixels of the photo at an index, in threads; if it raises a DataError, the row stays missing.

    Raises:
        DataError: no folder can be written, or the disk is full.
    """
    key = sha256(repr((CACHE_VERSION, state)).encode()).hexdigest()[:16]
    path = _find_or_create(f"{name}.{key}.photos", folders, int(row_offsets(sizes)[-1]))
    for other in path.parent.glob("*.photos"):
        if other.name.startswith(f"{name}.") and other != path:
            other.unlink(missing_ok=True)  # of another state
    stamps = np.array([_stamp(file) for file in files], np.int64)
    outdated = np.flatnonzero(np.fromfile(path, np.int64, len(files)) != stamps)
    if len(outdated):
        try:
            _fill(path, outdated, stamps, sizes, make, threads)
        except OSError as error:
            raise DataError(f"the cache {path} cannot be written: {error.strerror}; what is made stays") from None
    return PhotoCache(path, sizes)


def _find_or_create(name: str, folders: list[Path], size: int) -> Path:
    """Returns the file if there is one, else a new one, all holes, in the first folder that can be written."""
    paths = [folder / name for folder in folders]
    for path in paths:
        if path.is_file() and path.stat().st_size == size:
            return path
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:  # not "wb": another run may have made it just now, and have rows in it
                if file.tell() != size:
                    file.truncate(0)
                file.truncate(size)
        except OSError:  # a read-only folder: the next one may do
            continue
        return path
    raise DataError(f"the cache cannot be kept in {' or '.join(map(str, folders))}: make one of them writable")


def _stamp(file: Path) -> int:
    """Returns the state of a photo's file as a positive int64; 0 if there is no such file."""
    try:
        stat = os.stat(file)
    except OSError:
        return 0
    return (stat.st_mtime_ns * 1000003 + stat.st_size) % (2**63 - 1) or 1


def _fill(
    path: Path, indices: np.ndarray, stamps: np.ndarray, sizes: np.ndarray, make: Callable[[int], Pixels], threads: int
) -> None:
    offsets = row_offsets(sizes)
    needed, free = np.diff(offsets)[indices].sum(), shutil.disk_usage(path.parent).free
    space = f"{needed / 1e9:.2f} GB for letterboxed photos in {path.parent}, where {free / 1e9:.2f} GB are free"
    if needed > free:
        raise DataError(f"--cache needs {space}: make room, or train without it")
    print(f"The cache takes {space} (once: it is kept)", flush=True)
    bar = tqdm(desc=f"caching {path.name.split('.')[0]}", total=len(stamps), initial=len(stamps) - len(indices),
               unit="photo", disable=not sys.stderr.isatty())  # fmt: skip
    with open(path, "r+b", buffering=0) as file, ThreadPoolExecutor(threads) as pool, bar:
        _write_stamps(file.fileno(), indices, np.zeros_like(indices))
        for chunk in np.split(indices, range(CHUNK, len(indices), CHUNK)):
            made = list(pool.map(lambda index: _write_row(file.fileno(), int(offsets[index]), make, index), chunk))
            fsync(file.fileno())  # the rows before their stamps, which declare them complete
            _write_stamps(file.fileno(), chunk, stamps[chunk] * made)
            bar.update(len(chunk))


def _write_row(descriptor: int, offset: int, make: Callable[[int], Pixels], index: int) -> bool:
    """Writes a row; returns False if the photo cannot be read, which is reported when its sample is asked for."""
    try:
        photo, mask = make(int(index))
    except DataError:
        return False
    _write(descriptor, photo.tobytes() + np.packbits(mask).tobytes(), offset)
    return True


def _write_stamps(descriptor: int, indices: np.ndarray, stamps: np.ndarray) -> None:
    for index, stamp in zip(indices.tolist(), stamps.astype(np.int64), strict=True):
        _write(descriptor, stamp.tobytes(), 8 * index)  # one by one: another run may be filling the same file


def _write(descriptor: int, content: bytes, offset: int) -> None:
    if os.pwrite(descriptor, content, offset) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a full disk takes what fits, without an error
