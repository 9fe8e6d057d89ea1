"""A photo as its annotations were drawn on it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from loading.annotations import DataError
from loading.headers import JPEG_START, claimed_size, orientation, shown_size

MAX_FILE_SIZE = 2**30  # bytes of a photo: more is taken for a broken file
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # OpenCV's, of an EXIF orientation; above 4 it is transposed first


def read_photo(path: Path, size: tuple[int, int], is_shown: bool | None = None) -> np.ndarray:
    """Reads a photo as uint8 RGB (height, width, 3) in the orientation that its annotations were drawn in.

    Args:
        size: (width, height), the annotation's.
        is_shown: whether the set was annotated on the photos as shown (EXIF orientation applied), not as stored;
            None: no photo tells. It decides where the size does not.

    Raises:
        DataError: the file cannot be read, its size is not the annotation's, or nothing tells its orientation;
            names the file.
    """
    content = _read(path)
    encoded, turn = np.frombuffer(content, np.uint8), orientation(content)
    found = claimed_size(encoded)
    if found in (size, size[::-1]):  # before it is decoded: a few kilobytes may claim to be gigabytes
        if found != shown_size(found, turn):
            is_shown = size != found
        if turn > 1 and is_shown is None:
            raise DataError(f"the photo {path} is turned by its EXIF orientation, and no other tells whether its "
                            "annotation is as well: write the turned pixels to the file")  # fmt: skip
        photo = _decode(encoded)
        if photo is not None and turn > 1 and is_shown:
            photo = _turned(photo, turn)
        found = photo.shape[1::-1] if photo is not None else None
    if found is None:
        raise DataError(f"the photo {path} cannot be read: not an image, or damaged")
    if found != size:
        raise DataError("the photo {} is {} x {} pixels, its annotation says {} x {}".format(path, *found, *size))
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
    """The pixels as stored."""
    try:
        if encoded[:2].tobytes() == JPEG_START:
            with contextlib.suppress(ValueError):  # whatever is unusual about a JPEG: OpenCV decides what to make of it
                return simplejpeg.decode_jpeg(encoded, "RGB")  # the same pixels as OpenCV's, 8 % sooner
        return cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # nothing to decode, or more pixels than OpenCV lets a file claim
        return None


def _turned(photo: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels as shown."""
    photo = cv2.transpose(photo) if orientation > 4 else photo
    return cv2.flip(photo, FLIPS[orientation]) if orientation in FLIPS else photo
