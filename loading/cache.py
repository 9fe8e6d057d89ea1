"""Letterboxed photos and their masks, kept on disk once and memory-mapped by every process."""

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
from utils import flush

CACHE_VERSION = 1  # of a file's content; another version is made anew
CHUNK = 256  # photos between two moments at which what is made is safe from a kill and from a power cut

Pixels = tuple[np.ndarray, np.ndarray]  # photo uint8 (height, width, 3) and mask (height, width), 0 or 255


class PhotoCache:
    """One split's photos at one size, without the square's padding.

    The file holds a stamp a photo (int64), which is 0 until its row is there, and then the rows: RGB, a byte each,
    and the mask, a bit a pixel. A stamp says which state of the photo's file the row was made from.

    Args:
        path: the file.
        sizes: (width, height) of each photo in it.
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
        """A photo and its mask, the photo as a read-only view; None where there is no row: it could not be made."""
        if not self._stamps[index]:
            return None
        width, height = self.sizes[index].tolist()
        pixels, offset = width * height, int(self._offsets[index])
        row = np.frombuffer(self._bytes, np.uint8, row_bytes(pixels), offset)
        mask = np.unpackbits(row[3 * pixels :], count=pixels).reshape(height, width)
        return row[: 3 * pixels].reshape(height, width, 3), np.negative(mask, out=mask)  # 1 becomes 255


def row_bytes(pixels: int) -> int:
    return 3 * pixels + (pixels + 7) // 8


def row_offsets(sizes: np.ndarray) -> np.ndarray:
    """Where each row starts in the file and, last, where the file ends: int64 (N + 1,)."""
    lengths = row_bytes(sizes.prod(axis=1, dtype=np.int64))
    return np.concatenate([[0], lengths.cumsum()]) + 8 * len(sizes)


def open_cache(
    name: str, state: str, folders: list[Path], files: list[Path], sizes: np.ndarray,
    draw: Callable[[int], Pixels], threads: int,
) -> PhotoCache:  # fmt: skip
    """Opens a cache, and first makes what is missing in it or was made from a photo that has changed since.

    Args:
        name: of the split and the image size; one file is kept of each name.
        state: what the rows depend on besides the photos' files; another state is another file.
        folders: where the file may lie, best first.
        files: of the photos.
        sizes: (width, height) of each photo as `draw` gives it.
        draw: makes the pixels of one photo; a DataError leaves its row out.
        threads: that draw at a time.

    Raises:
        DataError: no room for it on the disk, or no folder that can be written.
    """
    key = sha256(repr((CACHE_VERSION, state)).encode()).hexdigest()[:16]
    path = _place(f"{name}.{key}.photos", folders, int(row_offsets(sizes)[-1]))
    for file in path.parent.iterdir():
        if file.name.startswith(f"{name}.") and file.suffix == ".photos" and file != path:
            file.unlink(missing_ok=True)  # of another state
    stamps = np.fromfile(path, np.int64, len(files))
    wanted = np.array([_stamp(file) for file in files], np.int64)
    missing = np.flatnonzero((stamps != wanted) | (wanted == 0))
    if (wanted[missing] != 0).any() or stamps[missing].any():
        try:
            _fill(path, missing, wanted, sizes, draw, threads)
        except OSError as error:
            raise DataError(f"the cache {path} cannot be written: {error.strerror}; what is made stays") from None
    return PhotoCache(path, sizes)


def _place(name: str, folders: list[Path], size: int) -> Path:
    """The file where there is one, else a new one, all holes, in the first folder that can be written."""
    paths = [folder / name for folder in folders]
    for path in paths:
        if path.is_file() and path.stat().st_size == size:
            return path
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:  # not "wb": another run may just have made it, and have rows in it
                if file.tell() != size:
                    file.truncate(0)
                file.truncate(size)
        except OSError:  # a folder that is read-only: the next one may do
            continue
        return path
    raise DataError(f"the cache cannot be kept in {' or '.join(map(str, folders))}: make one of them writable")


def _stamp(file: Path) -> int:
    """The state of a photo's file as a positive int64; 0 where it cannot be told."""
    try:
        stat = os.stat(file)
    except OSError:
        return 0
    return (stat.st_mtime_ns * 1000003 + stat.st_size) % (2**63 - 1) or 1


def _fill(
    path: Path, missing: np.ndarray, wanted: np.ndarray, sizes: np.ndarray, draw: Callable[[int], Pixels], threads: int
) -> None:
    offsets = row_offsets(sizes)
    _check_room(path, int(np.diff(offsets)[missing].sum()))
    bar = tqdm(desc=f"caching {path.name.split('.')[0]}", total=len(wanted), initial=len(wanted) - len(missing),
               unit="photo", disable=not sys.stderr.isatty())  # fmt: skip
    with open(path, "r+b", buffering=0) as file, ThreadPoolExecutor(threads) as pool, bar:
        _write_stamps(file.fileno(), missing, np.zeros_like(missing))
        for chunk in np.split(missing, range(CHUNK, len(missing), CHUNK)):
            made = list(pool.map(lambda index: _write_row(file.fileno(), int(offsets[index]), draw, index), chunk))
            flush(file.fileno())  # the rows before the stamps that vouch for them
            _write_stamps(file.fileno(), chunk, wanted[chunk] * made)
            bar.update(len(chunk))


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    sizes = f"{needed / 1e9:.2f} GB for letterboxed photos in {path.parent}, where {free / 1e9:.2f} GB are free"
    if needed > free:
        raise DataError(f"--cache needs {sizes}: make room, or train without it")
    print(f"The cache takes {sizes} (once: it is kept)", flush=True)


def _write_row(descriptor: int, offset: int, draw: Callable[[int], Pixels], index: int) -> bool:
    """Whether the photo could be drawn; one that cannot is met again, and named, by whoever asks for the sample."""
    try:
        photo, mask = draw(int(index))
    except DataError:
        return False
    _write(descriptor, photo.tobytes() + np.packbits(mask).tobytes(), offset)
    return True


def _write_stamps(descriptor: int, indices: np.ndarray, stamps: np.ndarray) -> None:
    for index, stamp in zip(indices.tolist(), stamps.astype(np.int64), strict=True):
        _write(descriptor, stamp.tobytes(), 8 * index)  # one by one: another run may be filling the same file


def _write(descriptor: int, content: bytes, offset: int) -> None:
    if os.pwrite(descriptor, content, offset) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the kernel writes what fits, and says no word
