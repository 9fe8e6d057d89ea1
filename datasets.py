"""COCO's persons as RGBA samples, in the order in which a photo meets the code:

person index ► photo and mask ► letterbox ► augmentations ► dataset ► loader.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import struct
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from loading.cache import PhotoCache, open_cache
from loading.index import MAX_PIXELS, DataError, index_places, open_index

if TYPE_CHECKING:
    from loading.augmentation import Augmenter

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this and refuses above its double


# --- a photo, its square, and the way back ----------------------------------------------------------------

MAX_FILE_SIZE = 2**30  # bytes of a photo: more is taken for a broken file
PHOTO_KINDS = ("PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # that OpenCV reads, JPEG apart
JPEG_START = b"\xff\xd8"
MOST_SEGMENTS = 4096  # of a JPEG before its picture: a colour profile may take 255
JPEG_BARE = {0x01, *range(0xD0, 0xDA)}  # markers without a length, that no JPEG has before its size
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers that a picture's size comes after


def read_photo(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Reads a photo as uint8 RGB (height, width, 3) in the orientation that its annotations were drawn in.

    COCO's masks lie on the pixels as stored; sets drawn on the photo as shown (EXIF orientation applied)
    give themselves away by the size.

    Raises:
        DataError: the file cannot be read, or its size is not the annotation's; names the file.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_SIZE:
                raise DataError(f"the photo {path} cannot be read: it is larger than {MAX_FILE_SIZE >> 20} MiB")
            encoded = np.frombuffer(file.read(), np.uint8)
    except OSError as error:
        raise DataError(f"the photo {path} cannot be read: {error.strerror}") from None
    claimed = claimed_size(encoded)
    if claimed not in (size, size[::-1]):  # before it is decoded: a few kilobytes may claim to be gigabytes
        reason = _mismatch(claimed, size) if claimed else "cannot be read: not an image, or damaged"
        raise DataError(f"the photo {path} {reason}")
    as_stored = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    for flags in (as_stored, cv2.IMREAD_COLOR_RGB):
        photo = _decode(encoded, flags)
        if photo is None:
            raise DataError(f"the photo {path} cannot be read: not an image, or damaged")
        if photo.shape[1::-1] == size:
            return photo
    raise DataError(f"the photo {path} {_mismatch(photo.shape[1::-1], size)}")


def _mismatch(found: tuple[int, int], size: tuple[int, int]) -> str:
    return "is {} x {} pixels, its annotation says {} x {}".format(*found, *size)


def claimed_size(encoded: np.ndarray) -> tuple[int, int] | None:
    """The (width, height) in the header of an encoded photo, uint8 (bytes,); None where there is no such header."""
    if encoded[:2].tobytes() == JPEG_START:
        return _claimed_by_jpeg(encoded.data)
    try:
        with Image.open(io.BytesIO(encoded), formats=PHOTO_KINDS) as image:
            return image.size
    except Exception:  # whatever a damaged header makes one of these readers raise
        return None


def _claimed_by_jpeg(data: memoryview) -> tuple[int, int] | None:
    """By hand, because Pillow takes 2 % of the time that decoding takes."""
    at = 2
    for _ in range(MOST_SEGMENTS):
        if at + 9 > len(data) or data[at] != 0xFF or data[at + 1] in JPEG_BARE:
            return None
        if data[at + 1] in JPEG_FRAMES:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        is_fill = data[at + 1] == 0xFF
        at += 1 if is_fill else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _decode(encoded: np.ndarray, flags: int) -> np.ndarray | None:
    try:
        if flags & cv2.IMREAD_IGNORE_ORIENTATION and encoded[:2].tobytes() == JPEG_START:
            with contextlib.suppress(ValueError):  # whatever is unusual about a JPEG: OpenCV decides what to make of it
                return simplejpeg.decode_jpeg(encoded, "RGB")  # the same pixels as OpenCV's, 8 % sooner
        return cv2.imdecode(encoded, flags)
    except cv2.error:  # nothing to decode, or more pixels than OpenCV lets a file claim
        return None


def resize(image: np.ndarray, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """Resizes to (width, height), into `out` if given: averages where it shrinks by more than two, else linear."""
    height, width = image.shape[:2]
    if (width, height) == tuple(size) and out is None:
        return image
    shrinks = max(width / size[0], height / size[1]) > 2
    return cv2.resize(image, size, dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, dict]:
    """Fits an image into a square, its aspect ratio kept, centred, padded with zeros.

    Args:
        image: uint8 (H, W), (H, W, 3) or (H, W, 4). A fourth channel, and a lone one, is a mask of 0 and 255
            and stays one: it is resized like the photo and cut at one half, so that it does not drift.
        size: the square's side in pixels.

    Returns:
        The square, (size, size) with the channels of `image`, and the metadata that `restore` needs:
        original_size (width, height), scale, padding (left, top, right, bottom) in pixels.
    """
    metadata = placement(image.shape[1::-1], size)
    square = np.zeros((size, size, *image.shape[2:]), image.dtype)
    inside = unpadded(square, metadata["padding"])
    resize(image, inside.shape[1::-1], out=inside)
    if image.ndim == 2 or image.shape[2] in (1, 4):
        harden(square)
    return square, metadata


def placement(original_size: tuple[int, int], size: int) -> dict:
    """Where a photo of (width, height) lies in its square: the metadata of `letterbox`."""
    scale = size / max(original_size)
    width, height = fitted_size(original_size, size)
    left, top = (size - width) // 2, (size - height) // 2
    padding = (left, top, size - width - left, size - height - top)
    return {"original_size": original_size, "scale": scale, "padding": padding}


def fitted_size(original_size: tuple[int, int], size: int) -> tuple[int, int]:
    """The (width, height) that a photo of another has inside its square."""
    scale = size / max(original_size)
    return max(1, round(original_size[0] * scale)), max(1, round(original_size[1] * scale))


def unpadded(square: np.ndarray, padding: tuple[int, int, int, int]) -> np.ndarray:
    """The part of a square that is not padding, as a view."""
    left, top, right, bottom = padding
    return square[top : square.shape[0] - bottom, left : square.shape[1] - right]


def pad(fitted: np.ndarray, padding: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The inverse of `unpadded`: the same pixels in a square of zeros."""
    square = np.zeros((size, size, *fitted.shape[2:]), fitted.dtype)
    unpadded(square, padding)[...] = fitted
    return square


def harden(image: np.ndarray) -> None:
    """Cuts a mask, or an RGBA image's fourth channel, at one half: 0 or 255, in place."""
    mask = image[..., -1] if image.ndim == 3 else image
    if mask.flags.c_contiguous:
        cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY, dst=mask)
    else:
        mask[...] = cv2.threshold(np.ascontiguousarray(mask), 127, 255, cv2.THRESH_BINARY)[1]


def to_rgba(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) and mask (H, W) as one RGBA image (H, W, 4)."""
    return cv2.insertChannel(mask, cv2.cvtColor(photo, cv2.COLOR_RGB2RGBA), 3)


def to_sample(photo: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """uint8 RGB (S, S, 3) and mask (S, S) as a sample (4, S, S), the mask cut at one half."""
    sample = np.empty((4, *mask.shape), np.uint8)
    cv2.split(photo, [*sample[:3]])  # straight into the sample's memory
    cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY, dst=sample[3])
    return torch.from_numpy(sample)


def restore(array: np.ndarray, metadata: dict) -> np.ndarray:
    """The way back from `letterbox`: crops the padding, resizes to the original size.

    Args:
        array: (S, S) or (S, S, C), uint8 or float32, S as it was given to `letterbox`.
        metadata: what `letterbox` returned.

    Returns:
        (height, width) or (height, width, C) of the same dtype; interpolated, so a mask is to be cut again.
    """
    cropped = unpadded(array, metadata["padding"])
    width, height = metadata["original_size"]
    return resize(cropped, (width, height)).reshape(height, width, *array.shape[2:])


# --- the dataset and its loaders --------------------------------------------------------------------------


class COCOPersonDataset(Dataset):
    """The photos of a COCO-format set that show at least one person, as RGBA squares.

    Args:
        root: the folder that holds `annotations/` and the photo folder.
        split: the photo folder's name, e.g. "train2017".
        image_size: the square's side in pixels.
        augment: whether to apply `augmentations()`.
        store_metadata: whether a sample is (tensor, metadata) instead of the tensor alone.
        seed: of the augmentations. A sample depends on (seed, epoch, index) and on nothing else.
        cache: whether to keep the letterboxed photos on disk, for faster epochs; the samples are the same.

    Raises:
        DataError: the data cannot be used, or the cache does not fit on the disk.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        image_size: int = 384,
        augment: bool = False,
        store_metadata: bool = False,
        seed: int = 0,
        cache: bool = False,
    ):
        self.photos = Path(root) / split
        self.index = open_index(root, split, usable_cores())
        self.image_size = image_size
        self.store_metadata = store_metadata
        self.seed = seed
        self.cache: PhotoCache | None = None
        self._augment = _augmenter() if augment else None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        if cache:
            self.cache = self._open_cache(index_places(Path(root), split))

    def __len__(self) -> int:
        return len(self.index)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """uint8 (4, S, S): R, G, B, A; A is 0 or 255. With `store_metadata`, (that, metadata)."""
        self.index.check(index)
        photo, mask, metadata = self._square(index)
        if self._augment is not None:
            photo, mask = self._augment(photo, mask, [self.seed, int(self._epoch), index])
        sample = to_sample(photo, mask)
        if not self.store_metadata:
            return sample
        return sample, {
            "image_id": self.index.image_id(index),
            "file_name": self.index.file_name(index),
            **metadata,
        }

    def _square(self, index: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """The letterboxed photo, uint8 (S, S, 3), its mask (S, S), 0 or 255, and the metadata of `letterbox`."""
        fitted = self.cache.get(index) if self.cache is not None else None
        if fitted is None:
            photo, metadata = letterbox(self._photo(index), self.image_size)
            return photo, letterbox(self.index.alpha(index), self.image_size)[0], metadata
        metadata = placement(self.index.size(index), self.image_size)
        photo, mask = (pad(image, metadata["padding"], self.image_size) for image in fitted)
        return photo, mask, metadata

    def _open_cache(self, places: list[Path]) -> PhotoCache:
        everything = range(len(self))

        def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
            photo, mask, metadata = self._square(index)
            return unpadded(photo, metadata["padding"]), unpadded(mask, metadata["padding"])

        return open_cache(
            name=f"{self.photos.name}.{self.image_size}",
            state=repr(self.index.fingerprint),
            folders=list(dict.fromkeys([self.index.path.parent, *(place.parent for place in places)])),
            files=[self._file(index) for index in everything],
            sizes=np.array([fitted_size(self.index.size(index), self.image_size) for index in everything]),
            draw=draw,
            threads=usable_cores(),
        )

    def _file(self, index: int) -> Path:
        return self.photos / self.index.file_name(index)

    def _photo(self, index: int) -> np.ndarray:
        return read_photo(self._file(index), self.index.size(index))

    def original(self, index: int) -> np.ndarray:
        """The photo and its mask before any resizing: uint8 RGBA (height, width, 4)."""
        return to_rgba(self._photo(index), self.index.alpha(index))


def _augmenter() -> Augmenter:
    from loading.augmentation import (
        Augmenter,  # here, because a prediction needs none and albumentations takes a second
    )

    return Augmenter()


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2 here, or its quota reads "max"
        return cores


class ResumableSampler(DistributedSampler):
    """One process's photos in an epoch's order, from the one at place `first` on."""

    first = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.first, None)


def make_loader(
    dataset: COCOPersonDataset,
    batch_size: int,
    num_workers: int,
    training: bool,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """One process's share of the data, in batches of uint8 (N, 4, S, S).

    Training: shuffled by (the dataset's seed, epoch), and every process gets the same number of batches.
    Validation: in order, each photo in exactly one process, nothing padded and nothing dropped.
    """
    if training:
        sampler = ResumableSampler(dataset, world_size, rank, shuffle=True, seed=dataset.seed)
        drop_last = len(sampler) > 1 and len(sampler) % batch_size == 1  # BatchNorm needs two
    else:
        sampler, drop_last = range(rank, len(dataset), world_size), False
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=drop_last,
        collate_fn=stack,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_loader_worker,
        generator=torch.Generator().manual_seed(dataset.seed),  # workers must not draw from the model's dice
    )


def stack(samples: list) -> torch.Tensor:
    """Samples as a batch, which may be one of no photos: uint8 (0, 4, 0, 0)."""
    return default_collate(samples) if samples else torch.empty(0, 4, 0, 0, dtype=torch.uint8)


def _start_loader_worker(worker: int) -> None:
    """A signal to all processes of a run is the training one's: it finishes its step, then ends the workers."""
    start_worker(worker)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: it says who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(training: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)


def start_worker(_worker: int) -> None:
    """What a process that makes samples and nothing else begins with."""
    cv2.setNumThreads(0)  # each worker is a core's worth of work already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the training one ends the workers
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Without it, glibc returns a photo's memory after each sample, and the kernel clears each page anew."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h, in bytes


def batches(loader: DataLoader, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
    """Iterates over one epoch, from its batch `first` on: order and augmentations both depend on the epoch's number."""
    loader.dataset.set_epoch(epoch)
    if isinstance(loader.sampler, ResumableSampler):
        loader.sampler.set_epoch(epoch)
        loader.sampler.first = first * loader.batch_size
    return iter(loader)
