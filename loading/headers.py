"""What the headers of photos say: their sizes, and how EXIF turns them where they are shown."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 2**28  # of a photo: more is taken for a broken one
PHOTO_KINDS = ("PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # that OpenCV reads, JPEG apart
JPEG_START = b"\xff\xd8"
JPEG_EXIF, JPEG_SCAN = b"Exif\0\0", b"\xda"
EXIF = {b"\x89PNG": (b"eXIf", 4), b"RIFF": (b"EXIF", 8)}  # by the file's start, the mark and its length
ORIENTATION, SHORT = 0x0112, 3  # EXIF's tag and its type
HEAD, LAST_SEGMENT = 2**16, 2**20  # bytes: EXIF is no longer and as a rule begins before; before there it must
MOST = 2**25  # bytes that are read of a file to learn its size
FEW = 10  # of so many photos one is a few
EXAMINED, THREADS = 2000, 16  # files that are opened, evenly spread, to learn whether any is turned; those at a time

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this and refuses above its double

Size = tuple[int, int]  # width, height


def claimed_size(encoded: np.ndarray) -> Size | None:
    """The (width, height) in the header of an encoded photo, uint8 (bytes,); None where there is no such header."""
    try:
        if encoded[:2].tobytes() == JPEG_START:  # a tenth of the time that Pillow takes
            height, width, *_ = simplejpeg.decode_jpeg_header(encoded, strict=False)
            return width, height
        with Image.open(io.BytesIO(encoded), formats=PHOTO_KINDS) as image:
            return image.size
    except Exception:  # whatever a damaged header makes one of these readers raise
        return None


def orientation(encoded: bytes) -> int:
    """EXIF's: 3 a half turn, 6 and 8 quarter turns, 2, 4, 5 and 7 mirrored; 1 as stored, or nothing is said.

    A TIFF has none here: every reader turns it as it says. Pillow would warn of every oddity.
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
        mark, length = EXIF.get(encoded[:4], (b"", len(encoded)))
        at = encoded.find(mark)
        return encoded[at + length : at + length + HEAD].removeprefix(JPEG_EXIF) if at >= 0 else b""
    at = _exif_place(encoded)
    return encoded[at + 10 : at + 10 + HEAD] if encoded[at + 4 : at + 10] == JPEG_EXIF else b""


def _exif_place(encoded: bytes) -> int:
    """Where a JPEG's EXIF begins, or the segments before its picture end; beyond what was read, if they lead there."""
    at = 2
    while at < LAST_SEGMENT and encoded[at : at + 1] == b"\xff" and encoded[at + 4 : at + 10] != JPEG_EXIF:
        kind = encoded[at + 1 : at + 2]
        if kind == JPEG_SCAN:
            break
        at += 1 if kind == b"\xff" else 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return at


def shown_size(stored: Size, orientation: int) -> Size:
    return stored[::-1] if orientation > 4 else stored


def which_way_up(
    files: Sequence[str], sizes: Sequence[Size], fits: Callable[[int, Size], bool]
) -> tuple[bool | None, dict[int, Size | None]]:
    """Whether a set was annotated on the photos as shown, not as stored: told by those that a quarter turn resizes.

    Some annotation tools write the stored size beside outlines drawn on the photo as shown. Where the outlines give
    that away, they decide.

    Args:
        sizes: of the files, in the annotation file.
        fits: whether the outlines of the photo at a place lie inside a size.

    Returns:
        The answer, None where no photo tells or they disagree; by their places the sizes of the turned photos that
        need it, None where there is none.
    """
    turned = {place: both for place, both in _turned(files).items() if sizes[place] in both}
    by_size = {place: sizes[place] == shown for place, (stored, shown) in turned.items() if stored != shown}
    inside = {place: [fits(place, size) for size in turned[place]] for place in by_size}
    by_outline = {place: shown for place, (stored, shown) in inside.items() if stored != shown}
    against = sum(by_size[place] != shown for place, shown in by_outline.items())
    misled = against > max(len(by_outline) - against, len(by_size) / FEW)  # and not by a careless outline or two
    told = {*(by_outline if misled else by_size).values()}
    is_shown = told.pop() if len(told) == 1 else None
    needed = {place: both for place, both in turned.items() if misled or place not in by_size}
    return is_shown, {place: None if is_shown is None else both[is_shown] for place, both in needed.items()}


def _turned(files: Sequence[str]) -> dict[int, tuple[Size, Size]]:
    """The sizes, stored and shown, of the files that EXIF turns, by their places; a few tell whether there are any."""
    found = _look_at(files, range(0, len(files), len(files) // EXAMINED + 1))
    return _look_at(files, range(len(files))) if found else {}


def _look_at(files: Sequence[str], places: range) -> dict[int, tuple[Size, Size]]:
    """In threads, which on a network disk wait most of the time; each has a share, since to hand out costs more."""

    def look(share: range) -> list[tuple[int, tuple[Size, Size]]]:
        return [(place, both) for place in share if (both := _both_sizes(files[place]))]

    with ThreadPoolExecutor(THREADS) as pool:
        shares = pool.map(look, (places[k::THREADS] for k in range(THREADS)))
        return dict(sorted(found for share in shares for found in share))


def _both_sizes(path: str) -> tuple[Size, Size] | None:
    """None for a photo that is not turned."""
    return both_sizes(path, turned_alone=True)


def both_sizes(path: str | Path, turned_alone: bool = False) -> tuple[Size, Size] | None:
    """Stored and shown; None for a photo that cannot be read, as whoever reads it will say, or is not turned."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        encoded = file.read(HEAD)
        if encoded.startswith(JPEG_START) and _exif_place(encoded) >= len(encoded):
            encoded += file.read(LAST_SEGMENT)
        is_turned = encoded[8:12] == b"WEBP" or orientation(encoded) > 1  # of WebP that stands at the end
        if turned_alone and not is_turned:
            return None
        if is_turned or not claimed_size(np.frombuffer(encoded, np.uint8)):
            encoded += file.read(MOST)
        turn, stored = orientation(encoded), claimed_size(np.frombuffer(encoded, np.uint8))
        return (stored, shown_size(stored, turn)) if stored and (turn > 1 or not turned_alone) else None
    return None
