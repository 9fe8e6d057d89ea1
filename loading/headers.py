"""Reads the headers of photos: their sizes, and the orientation in their EXIF data."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 2**28  # of a photo; a larger one is taken for damaged
PHOTO_FORMATS = ("PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # that OpenCV reads, besides JPEG
UNREADABLE_BY_PILLOW = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # it names them, but cannot decode them itself
JPEG_START, JPEG_EXIF, JPEG_SCAN = b"\xff\xd8", b"Exif\0\0", b"\xda"
EXIF_CHUNKS = {b"\x89PNG": (b"eXIf", 4), b"RIFF": (b"EXIF", 8)}  # by the file's start: the mark and its length
ORIENTATION, SHORT = 0x0112, 3  # EXIF's tag and its data type
HEAD_BYTES, MAX_EXIF_OFFSET = 2**16, 2**20  # EXIF data are no longer than the first, and must begin before the second
MAX_HEADER_BYTES = 2**25  # read of a file to learn its size
THREADS = 16  # on a network disk they wait most of the time
SAMPLED_FILES = 2000  # opened to learn whether any of a set has an orientation

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this and refuses above its double

Size = tuple[int, int]  # width, height


def claimed_size(encoded: np.ndarray) -> Size | None:
    """Returns the (width, height) in the header of an encoded photo, uint8 (bytes,); None if it has no such header."""
    try:
        if encoded[:2].tobytes() == JPEG_START:  # a tenth of the time that Pillow takes
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded, strict=False)
            return width, height
        with Image.open(io.BytesIO(encoded), formats=PHOTO_FORMATS) as image:
            return image.size
    except Exception:  # whatever a damaged header makes one of these readers raise
        return None


def orientation(encoded: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8: 3 is a half turn, 6 and 8 quarter turns, 2, 4, 5 and 7 mirrored.

    It is 1 for photos without one, and for a TIFF: every reader applies that by itself.
    """
    exif = _exif(encoded)
    order = "<" if exif.startswith(b"II") else ">"
    with contextlib.suppress(struct.error):  # it ends before that
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        for entry in range(struct.unpack_from(f"{order}H", exif, directory)[0]):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, directory + 2 + 12 * entry)
            if (tag, kind) == (ORIENTATION, SHORT):
                return value if value in range(1, 9) else 1
    return 1


def _exif(encoded: bytes) -> bytes:
    if not encoded.startswith(JPEG_START):
        mark, length = EXIF_CHUNKS.get(encoded[:4], (b"", len(encoded)))
        start = encoded.find(mark)
        return encoded[start + length : start + length + HEAD_BYTES].removeprefix(JPEG_EXIF) if start >= 0 else b""
    start = _jpeg_exif_offset(encoded)
    return encoded[start + 10 : start + 10 + HEAD_BYTES] if encoded[start + 4 : start + 10] == JPEG_EXIF else b""


def _jpeg_exif_offset(encoded: bytes) -> int:
    """Returns where a JPEG's EXIF segment begins, or where the segments end that were read."""
    offset = 2
    while offset < MAX_EXIF_OFFSET and encoded[offset : offset + 1] == b"\xff":
        kind = encoded[offset + 1 : offset + 2]
        if kind == JPEG_SCAN or encoded[offset + 4 : offset + 10] == JPEG_EXIF:
            break
        offset += 1 if kind == b"\xff" else 2 + int.from_bytes(encoded[offset + 2 : offset + 4], "big")
    return offset


def shown_size(stored: Size, orientation: int) -> Size:
    """Returns the size of a photo once its orientation is applied."""
    return stored[::-1] if orientation > 4 else stored


def read_header(path: str | Path) -> tuple[Size, int] | None:
    """Returns a photo's size as stored, and its EXIF orientation; None if it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        encoded = file.read(HEAD_BYTES)
        if encoded.startswith(JPEG_START) and _jpeg_exif_offset(encoded) >= len(encoded):
            encoded += file.read(MAX_EXIF_OFFSET)
        size = claimed_size(np.frombuffer(encoded, np.uint8))
        if encoded[8:12] == b"WEBP" or not size:  # WebP has its EXIF data at the end
            encoded += file.read(MAX_HEADER_BYTES)
            size = claimed_size(np.frombuffer(encoded, np.uint8))
        return (size, orientation(encoded)) if size else None
    return None


def find_rotated(files: Sequence[str]) -> dict[int, tuple[Size, Size]]:
    """Returns the sizes, stored and shown, of the photos with an orientation, by index; {} if a sample has none."""
    for step in (len(files) // SAMPLED_FILES + 1, 1):
        indices = range(0, len(files), step)
        with ThreadPoolExecutor(THREADS) as pool:
            headers = [*pool.map(read_header, (files[i] for i in indices))]
        rotated = {i: header for i, header in zip(indices, headers, strict=True) if header and header[1] > 1}
        if step == 1 or not rotated:
            break
    return {i: (size, shown_size(size, turn)) for i, (size, turn) in rotated.items()}
