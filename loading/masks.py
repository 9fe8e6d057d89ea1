"""Reads a folder of mask files: which mask belongs to which photo, and which of its pixels are the person."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from loading.annotations import LeftOut, PhotoRecord, is_possible_size
from loading.files import all_files, composed
from loading.headers import ORIENTATION, PHOTO_FORMATS, THREADS, UNREADABLE_BY_PILLOW, Size, read_header, shown_size
from loading.run_lengths import Mask

EMPTY = "photo{s} with an empty mask"
DARK = "photo{s} whose mask is dark everywhere but not empty"
UNREADABLE = "photo{s} whose mask cannot be read"
UNSUPPORTED = {".heic", ".heif", ".jxl"}  # photos that OpenCV does not read: found, and named as unreadable

warnings.filterwarnings("ignore", module=r"PIL\.")  # of a file's oddities; a filter cannot be set for threads alone


def read_pairs(photos: Path, masks: Path, left_out: LeftOut) -> list[tuple[PhotoRecord, str]]:
    """Returns the photos that have a mask file of the same stem in the same subfolder, and its path, sorted by name.

    A photo's size is the one that its mask was drawn on, as stored or as shown; what is left out joins `left_out`.
    """
    photos_by_stem = _by_stem(photos, "photo", extensions((*PHOTO_FORMATS, "JPEG", "MPO")) | UNSUPPORTED, left_out)
    masks_by_stem = _by_stem(masks, "mask", extensions(mask_formats()), left_out)
    left_out["photo{s} without a mask"] += [photos_by_stem[s] for s in sorted(photos_by_stem.keys() - masks_by_stem)]
    left_out["mask{s} without a photo"] += [masks_by_stem[s] for s in sorted(masks_by_stem.keys() - photos_by_stem)]
    names = [(photos_by_stem[s], masks_by_stem[s]) for s in sorted(photos_by_stem.keys() & masks_by_stem)]
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = [*pool.map(lambda pair: _annotated_size(photos / pair[0], masks / pair[1]), names)]
    pairs = []
    for number, ((photo, mask), size) in enumerate(zip(names, sizes, strict=True), start=1):
        if isinstance(size, str):
            left_out[size].append(photo)
        else:
            pairs.append((PhotoRecord(number, photo, *size), mask))
    return pairs


@cache
def mask_formats() -> tuple[str, ...]:
    """Returns the names of the formats that Pillow can decode."""
    Image.init()
    return tuple(name for name in Image.ID if name not in UNREADABLE_BY_PILLOW)


def extensions(formats: Sequence[str]) -> set[str]:
    """Returns the file extensions of formats, in lower case."""
    mask_formats()  # registers them
    return {extension for extension, name in Image.registered_extensions().items() if name in formats}


def _by_stem(folder: Path, what: str, extensions: set[str], left_out: LeftOut) -> dict[str, str]:
    """Returns the relative paths of files by their path without extension; of several with one stem none is used."""
    by_stem = defaultdict(list)
    for name, is_inside in all_files(folder):
        stem, extension = os.path.splitext(name)
        if extension.lower() not in extensions:
            continue
        if is_inside and name == name.encode(errors="replace").decode():  # Linux allows any bytes in a name
            by_stem[composed(stem)].append(name)
        else:
            left_out[f"{what}{{s}} behind a link, or with a name that is not Unicode"].append(name)
    several = [name for names in by_stem.values() if len(names) > 1 for name in names]
    left_out[f"{what}{{s}} with the same name as another"] += several
    return {stem: names[0] for stem, names in by_stem.items() if len(names) == 1}


def masks_state(masks: Path) -> str:
    """Returns a hash of all mask files' sizes and times: a change of any shows in it, unlike in the folder's time."""
    stats = ((name, os.stat(masks / name)) for name, is_inside in all_files(masks) if is_inside)
    listed = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    return sha256(repr(listed).encode(errors="surrogateescape")).hexdigest()


def _annotated_size(photo: Path, mask: Path) -> Size | str:
    """Returns the size of the photo, as stored or as shown, that a mask was drawn on; or why there is none."""
    header = read_header(photo)
    if header is None:
        return "photo{s} that cannot be read"
    try:
        with Image.open(mask, formats=mask_formats()) as image:
            mask_size = shown_size(image.size, image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever a damaged header makes one of Pillow's readers raise
        return UNREADABLE
    stored, shown = header[0], shown_size(*header)
    if not (is_possible_size(*stored) and is_possible_size(*mask_size)):
        return "photo{s} with an impossible size"
    candidates = (stored, shown) if stored == mask_size else (shown, stored)
    return next((size for size in candidates if same_shape(size, mask_size)), "photo{s} whose mask has another shape")


def same_shape(first: Size, second: Size) -> bool:
    """Returns whether two sizes have one aspect ratio, to less than a pixel of the smaller one."""
    (width, height), (wide, high) = sorted((first, second), key=lambda size: size[0] * size[1])
    return abs(height - width * high / wide) < 1 or abs(width - height * wide / high) < 1


def read_masks(files: Sequence[tuple[Path, Size]], threads: int) -> Iterator[Mask | str]:
    """Yields for each mask file and its photo's size what `read_mask` returns, in order."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda file: read_mask(*file), files)


def read_mask(path: Path, size: Size) -> Mask | str:
    """Returns a mask file at its photo's (width, height) as run lengths, or why there is nobody on it."""
    try:
        with Image.open(path, formats=mask_formats()) as image:
            values = _brightness(ImageOps.exif_transpose(image))
    except Exception:  # whatever a damaged file makes one of Pillow's decoders raise
        return UNREADABLE
    if not values.any():
        return EMPTY
    grey = _to_8_bits(values)
    if grey.shape != size[::-1]:
        shrinks = grey.size > size[0] * size[1]
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    person = np.asfortranarray(grey > 127, np.uint8)
    return Mask(coco_mask.encode(person)["counts"], int(person.sum())) if person.any() else DARK


def _brightness(image: Image.Image) -> np.ndarray:
    """Returns the brightness of each pixel, (height, width), in the image's own range; of colours the maximum channel.

    An alpha channel is the mask instead, unless it is opaque: many programs add one to every picture.
    """
    if image.mode[0] in "IF":  # more than 8 bits
        return np.nan_to_num(np.asarray(image))
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    is_cutout = alpha.getextrema() != (255, 255)
    return np.asarray(alpha) if is_cutout else np.asarray(rgba)[..., :3].max(axis=2)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Returns uint8 values of 0 to 255: white is 1 if no value is larger, 65535 for integers of more than 8 bits."""
    if values.max() <= 1:
        white = 1
    elif values.dtype == np.uint8:
        return values
    else:
        white = 65535 if values.dtype.kind in "iu" else 255
    return np.clip(values * np.float32(255 / white), 0, 255).round().astype(np.uint8)
