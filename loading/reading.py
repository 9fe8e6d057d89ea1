"""A photo as its annotations were drawn on it."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from loading.index import MAX_PIXELS, DataError

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this and refuses above its double
MAX_FILE_SIZE = 2**30  # bytes of a photo: more is taken for a broken file
PHOTO_KINDS = ("PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # that OpenCV reads, JPEG apart
JPEG_START = b"\xff\xd8"


def read_photo(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Reads a photo as uint8 RGB (height, width, 3) in the orientation that its annotations were drawn in.

    COCO's masks lie on the pixels as stored; sets drawn on the photo as shown (EXIF orientation applied)
    give themselves away by the size.

    Args:
        size: (width, height), the annotation's.

    Raises:
        DataError: the file cannot be read, or its size is not the annotation's; names the file.
    """
    encoded = _read(path)
    found = claimed_size(encoded)
    if found in (size, size[::-1]):  # before it is decoded: a few kilobytes may claim to be gigabytes
        for flags in (cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION, cv2.IMREAD_COLOR_RGB):
            photo = _decode(encoded, flags)
            found = photo.shape[1::-1] if photo is not None else None
            if found in (size, None):
                break
    if found is None:
        raise DataError(f"the photo {path} cannot be read: not an image, or damaged")
    if found != size:
        raise DataError("the photo {} is {} x {} pixels, its annotation says {} x {}".format(path, *found, *size))
    return photo


def _read(path: Path) -> np.ndarray:
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_SIZE:
                raise DataError(f"the photo {path} cannot be read: it is larger than {MAX_FILE_SIZE >> 20} MiB")
            return np.frombuffer(file.read(), np.uint8)
    except OSError as error:
        raise DataError(f"the photo {path} cannot be read: {error.strerror}") from None


def claimed_size(encoded: np.ndarray) -> tuple[int, int] | None:
    """The (width, height) in the header of an encoded photo, uint8 (bytes,); None where there is no such header."""
    try:
        if encoded[:2].tobytes() == JPEG_START:  # a tenth of the time that Pillow takes
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded, strict=False)
            return width, height
        with Image.open(io.BytesIO(encoded), formats=PHOTO_KINDS) as image:
            return image.size
    except Exception:  # whatever a damaged header makes one of these readers raise
        return None


def _decode(encoded: np.ndarray, flags: int) -> np.ndarray | None:
    try:
        if flags & cv2.IMREAD_IGNORE_ORIENTATION and encoded[:2].tobytes() == JPEG_START:
            with contextlib.suppress(ValueError):  # whatever is unusual about a JPEG: OpenCV decides what to make of it
                return simplejpeg.decode_jpeg(encoded, "RGB")  # the same pixels as OpenCV's, 8 % sooner
        return cv2.imdecode(encoded, flags)
    except cv2.error:  # nothing to decode, or more pixels than OpenCV lets a file claim
        return None
