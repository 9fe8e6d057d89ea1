"""Reads a photo in the orientation that its annotations were drawn in."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from loading.annotations import DataError
from loading.headers import JPEG_START, Size, claimed_size, orientation, shown_size

MAX_FILE_SIZE = 2**30  # bytes of a photo; a larger file is taken for damaged
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # EXIF orientation -> cv2.flip's code; above 4 it is transposed first


def read_photo(path: Path, size: Size, exif_applied: bool | None = None) -> np.ndarray:
    """Reads a photo as uint8 RGB (height, width, 3).

    Args:
        size: the (width, height) that it was annotated at.
        exif_applied: whether the set was annotated on the photos as shown (EXIF orientation applied) or as stored;
            None: unknown. It decides where the size does not.

    Raises:
        DataError: the file cannot be read, has another size, or nothing tells its orientation; names the file.
    """
    content = _read(path)
    encoded, turn = np.frombuffer(content, np.uint8), orientation(content)
    actual = claimed_size(encoded)
    if actual in (size, size[::-1]):  # before it is decoded: a few kilobytes may claim to be gigabytes
        if actual != shown_size(actual, turn):
            exif_applied = size != actual
        if turn > 1 and exif_applied is None:
            raise DataError(f"the photo {path} is rotated by its EXIF orientation, and nothing tells whether its "
                            "annotation is as well: write the rotated pixels to the file")  # fmt: skip
        photo = _decode(encoded)
        if photo is not None and turn > 1 and exif_applied:
            photo = _apply_orientation(photo, turn)
        actual = photo.shape[1::-1] if photo is not None else None
    if actual is None:
        raise DataError(f"the photo {path} cannot be read: not an image, or damaged")
    if actual != size:
        raise DataError("the photo {} is {} x {} pixels, its annotation says {} x {}".format(path, *actual, *size))
    return photo


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_SIZE:
                raise DataError(f"the photo {path} cannot be read: it is larger than {MAX_FILE_SIZE >> 20} MiB")
            return file.read()
    except OSError as error:
        raise DataError(f"the photo {path} cannot be read: {error.strerror}") from None


def _decode(encoded: np.ndarray) -> np.ndarray | None:
    """Returns the pixels as stored; None for a damaged file."""
    try:
        if encoded[:2].tobytes() == JPEG_START:
            with contextlib.suppress(ValueError):  # OpenCV decides what to make of an unusual JPEG
                return simplejpeg.decode_jpeg(encoded, "RGB")  # the same pixels as OpenCV's, 8 % sooner
        return cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # nothing to decode, or more pixels than OpenCV lets a file claim
        return None


def _apply_orientation(photo: np.ndarray, orientation: int) -> np.ndarray:
    photo = cv2.transpose(photo) if orientation > 4 else photo
    return cv2.flip(photo, FLIPS[orientation]) if orientation in FLIPS else photo
