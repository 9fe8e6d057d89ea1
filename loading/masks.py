"""A folder of mask files beside the photos: which belongs to which photo, and who is on it."""

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

from loading.annotations import MAX_SIDE, LeftOut, Photo
from loading.files import composed, files_in, folders_of
from loading.headers import MAX_PIXELS, ORIENTATION, PHOTO_KINDS, THREADS, Size, both_sizes
from loading.run_lengths import Mask

EMPTY = "photo{s} without anybody (an empty mask)"
DARK = "photo{s} whose mask is dark everywhere and not empty"
UNREADABLE = "photo{s} whose mask cannot be read"
NO_MASKS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow hands them to other programs, or only names them
JPEG_KINDS = ("JPEG", "MPO")
OTHER_PHOTOS = {".heic", ".heif", ".jxl"}  # are looked for as well, to be named as what cannot be read

warnings.filterwarnings("ignore", module=r"PIL\.")  # of a file's oddities: in threads only all can be turned off

Pair = tuple[Photo, str]  # and its mask's name in the folder of masks


def read_pairs(photos: Path, masks: Path, left_out: LeftOut) -> list[Pair]:
    """The photos of which there is a mask of the same stem in the same subfolder, by their names in order.

    A photo's size is that in which its mask was drawn, on the photo as stored or as shown.
    """
    of_photos = _by_stem(photos, "photo", {*extensions((*PHOTO_KINDS, *JPEG_KINDS)), *OTHER_PHOTOS}, left_out)
    of_masks = _by_stem(masks, "mask", extensions(mask_kinds()), left_out)
    left_out["photo{s} without a mask"] += [of_photos[stem] for stem in sorted(of_photos.keys() - of_masks.keys())]
    left_out["mask{s} without a photo"] += [of_masks[stem] for stem in sorted(of_masks.keys() - of_photos.keys())]
    names = [(of_photos[stem], of_masks[stem]) for stem in sorted(of_photos.keys() & of_masks.keys())]
    with ThreadPoolExecutor(THREADS) as pool:
        found = [*pool.map(lambda pair: _size(photos / pair[0], masks / pair[1]), names)]
    pairs = []
    for number, ((name, mask), size) in enumerate(zip(names, found, strict=True), start=1):
        if isinstance(size, str):
            left_out[size].append(name)
        else:
            pairs.append((Photo(number, name, *size), mask))
    return pairs


@cache
def mask_kinds() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in NO_MASKS)


def extensions(kinds: Sequence[str]) -> set[str]:
    mask_kinds()  # only then are all registered
    return {extension for extension, kind in Image.registered_extensions().items() if kind in kinds}


def _by_stem(folder: Path, what: str, extensions: set[str], left_out: LeftOut) -> dict[str, str]:
    """The files' names without their extensions, and with them; of several with one stem none is trusted."""
    found = defaultdict(list)
    for name, lies_here in all_files(folder):
        stem, extension = os.path.splitext(name)
        if extension.lower() not in extensions:
            continue
        if lies_here and is_text(name):
            found[composed(stem)].append(name)
        else:
            left_out[f"{what}{{s}} behind a link, or of a name that is no text"].append(name)
    several = [name for names in found.values() if len(names) > 1 for name in names]
    left_out[f"{what}{{s}} of a name that another has"] += several
    return {stem: names[0] for stem, names in found.items() if len(names) == 1}


def all_files(folder: Path) -> Iterator[tuple[str, bool]]:
    """The files under a folder by their relative names, hidden ones apart, and whether each does lie there."""
    home = os.path.realpath(folder)
    for subfolder in folders_of(folder):
        files = files_in(folder / subfolder, home) or {}
        for name in sorted(name for name, found in files.items() if found in (name, "") and not name.startswith(".")):
            yield f"{subfolder}/{name}".lstrip("/"), bool(files[name])


def is_text(name: str) -> bool:
    """On Linux a file's name may be any bytes."""
    return name == name.encode(errors="replace").decode()


def state_of(masks: Path) -> str:
    """Of every mask file: one that is edited leaves its folder as it was. The ctime, as of an annotation file."""
    stats = ((name, os.stat(masks / name)) for name, lies_here in all_files(masks) if lies_here)
    listed = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    return sha256(repr(listed).encode(errors="surrogateescape")).hexdigest()


# --- sizes ------------------------------------------------------------------------------------------------


def _size(photo: Path, mask: Path) -> Size | str:
    """Of the photo as the mask was drawn on it, or why there is none."""
    both = both_sizes(photo)
    if both is None:
        return "photo{s} that cannot be read"
    try:
        with Image.open(mask, formats=mask_kinds()) as image:
            drawn = image.size[::-1] if image.getexif().get(ORIENTATION, 1) > 4 else image.size
    except Exception:  # whatever a damaged header makes one of Pillow's readers raise
        return UNREADABLE
    for size in both:
        if max(*size, *drawn) > MAX_SIDE or max(size[0] * size[1], drawn[0] * drawn[1]) > MAX_PIXELS:
            return "photo{s} of an impossible size"
    stored, shown = both
    nearest = (stored, shown) if stored == drawn else (shown, stored)
    return next((size for size in nearest if have_one_shape(size, drawn)), "photo{s} whose mask has another shape")


def have_one_shape(first: Size, second: Size) -> bool:
    """Whether two sizes differ by a common factor alone, but for less than a pixel of the smaller's one side."""
    (width, height), (wide, high) = sorted((first, second), key=lambda size: size[0] * size[1])
    return abs(height - width * high / wide) < 1 or abs(width - height * wide / high) < 1


# --- pixels -----------------------------------------------------------------------------------------------


def draw_files(files: Sequence[tuple[Path, Size]], threads: int) -> Iterator[Mask | str]:
    """For each mask file and its photo's size the mask, in order, or why there is none."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda file: draw_file(*file), files)


def draw_file(path: Path, size: Size) -> Mask | str:
    """One mask file as run lengths of its photo's (width, height), or why there is nobody on it."""
    try:
        with Image.open(path, formats=mask_kinds()) as image:
            values = _values(ImageOps.exif_transpose(image))
    except Exception:  # whatever a damaged file makes one of Pillow's decoders raise
        return UNREADABLE
    if not values.any():
        return EMPTY
    grey = _in_8_bits(values)
    if grey.shape != size[::-1]:
        shrinks = grey.size > size[0] * size[1]
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    person = np.asfortranarray(grey > 127, np.uint8)
    return Mask(coco_mask.encode(person)["counts"], int(person.sum())) if person.any() else DARK


def _values(image: Image.Image) -> np.ndarray:
    """How bright each pixel is, (height, width); of colours the brightest channel counts.

    Where there is an alpha it is the mask, unless nothing is cut out by it: many programs add one to every picture.
    """
    if image.mode[0] in "IF":  # more than 8 bits
        return np.nan_to_num(np.asarray(image))
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    is_cutout = alpha.getextrema() != (255, 255)
    return np.asarray(alpha) if is_cutout else np.asarray(rgba)[..., :3].max(axis=2)


def _in_8_bits(values: np.ndarray) -> np.ndarray:
    """Of a mask of zeros and ones the ones are the person, of integers of more bits those above half of 16."""
    if values.max() <= 1:
        whole = 1
    elif values.dtype == np.uint8:
        return values
    else:
        whole = 65535 if values.dtype.kind in "iu" else 255
    return np.clip(values * np.float32(255 / whole), 0, 255).round().astype(np.uint8)
