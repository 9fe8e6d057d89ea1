"""Writes PNGs, each with a note of how it was made, and reads that note."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

HEADER_BYTES = 33  # of a PNG's signature and its first chunk
KEYWORD = "Silueta"  # of the text chunk that holds the note


def encode_png(picture: np.ndarray, icc: bytes | None = None, note: str = "") -> list[bytes | memoryview]:
    """Returns a PNG file, in pieces, of a picture: uint8 (H, W), BGR (H, W, 3) or BGRA (H, W, 4).

    The note, in ASCII, is for `read_note`. Raises ValueError if the picture is larger than a PNG may be.
    """
    # OpenCV's own settings (level 1, run lengths, one filter; a level given here would turn on all filters): on COCO's
    # photos over 2 times as fast as Pillow's level 1 and 8 times as its default of 6, for files 6 and 14 % larger.
    ok, encoded = cv2.imencode(".png", picture)
    if not ok:
        raise ValueError("larger than a PNG may be")
    data = encoded.data
    chunks = b"" if icc is None else _chunk(b"iCCP", b"photo\0\0" + zlib.compress(icc))
    if note:  # the length of all the rest shows later whether another program has written the file
        text = f"{KEYWORD}\0{note}; {len(data) + len(chunks)} bytes"
        chunks = _chunk(b"tEXt", text.encode("ascii")) + chunks
    return [data[:HEADER_BYTES], chunks, data[HEADER_BYTES:]]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def read_note(path: Path) -> str:
    """Returns the note of a file that `encode_png` made, or "" if it is another's or its length has changed."""
    try:
        with Image.open(path, formats=["PNG"]) as image:  # reads no further than the pixels begin
            text = image.info.get(KEYWORD, "")
        size = os.path.getsize(path) - len(_chunk(b"tEXt", f"{KEYWORD}\0{text}".encode("latin-1")))
    except Exception:  # a folder, or whatever a file that is no PNG makes Pillow raise
        return ""
    note, _, length = text.rpartition("; ")
    return note if length == f"{size} bytes" else ""
