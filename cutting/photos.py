"""Every kind of photo as 8 bits of RGB, and PNGs as what becomes of it."""

from __future__ import annotations

import contextlib
import functools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from loading.letterbox import resize
from utils import UserError

# OpenCV's own (level 1, run lengths, one filter; a level given here would turn on all filters). On COCO's photos over
# 2 times as fast as Pillow's level 1 and 8 times as fast as its default of 6, for files 6 and 14 % larger.
PNG_SETTINGS: list[int] = []
LARGEST_PROFILE = 2**20  # bytes: Pillow refuses to open a PNG with a larger colour profile
NO_PHOTOS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow names them, but cannot decode them by itself


class PhotoError(UserError):
    """A photo that cannot be read; the message is one line for the user."""


# --- reading ----------------------------------------------------------------------------------------------


@dataclass
class Photo:
    """A photo as it is shown: uint8 RGB (H, W, 3); straight alpha (H, W) and a colour profile where it has them."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None


def read_photo(path: str | Path) -> Photo:
    """Reads any photo that Pillow knows, its EXIF orientation applied; of several frames the first.

    Raises:
        PhotoError: missing, damaged, cut short, no image, or of more than `MAX_PIXELS` pixels; names the file.
    """
    try:
        with Image.open(path, formats=photo_formats()) as image:
            scale_colour_key(image)
            return to_photo(image)
    except Exception as error:  # whatever a damaged file makes one of forty decoders raise
        raise PhotoError(f"{path} cannot be read: {reason(error)}") from None


def reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image of a kind that Pillow knows"
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def photo_formats() -> tuple[str, ...]:
    with contextlib.suppress(ImportError):  # HEIC is an extra: pip install pillow-heif
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in NO_PHOTOS)


def scale_colour_key(image: Image.Image) -> None:
    """Brings a PNG's transparent colour to 8 bits, in place: Pillow does so for the pixels alone."""
    key, stored = image.info.get("transparency"), image.tile[0][3] if image.tile else None
    if key and stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif key and stored in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[stored]


def to_photo(image: Image.Image) -> Photo:
    """Any Pillow image as a `Photo`; the image itself may be turned."""
    image.load()
    with contextlib.suppress(Exception):  # an EXIF block that nobody can read does not spoil the photo
        ImageOps.exif_transpose(image, in_place=True)
    icc = fitting_profile(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a fixed white")
    if image.mode.startswith("I"):
        return Photo(*deep_grey(image), icc)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return Photo(*channels(image if image.mode == mode else image.convert(mode)), icc)


def fitting_profile(image: Image.Image) -> bytes | None:
    """The image's colour profile, if it describes RGB: one of CMYK or grey does not fit the pixels that come out."""
    icc = image.info.get("icc_profile") or b""
    return icc if icc[16:20] == b"RGB " and image.mode != "CMYK" and len(icc) <= LARGEST_PROFILE else None


def deep_grey(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey of more than 8 bits as `channels` gives it: its highest 8, as Pillow does it with 16-bit colours."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF says how many; all else comes scaled to 16
    values = np.asarray(image)
    grey = np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
    key = image.info.get("transparency")
    alpha = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), alpha


def channels(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """An RGB or RGBA image as uint8 (H, W, 3) and (H, W) or None."""
    width, height = image.size
    rgb = np.empty((height, width, 3), np.uint8)
    alpha = np.empty((height, width), np.uint8) if image.mode == "RGBA" else None
    for rows in strips(height):
        strip = np.asarray(image.crop((0, rows.start, width, rows.stop)))
        rgb[rows] = strip[..., :3]
        if alpha is not None:
            alpha[rows] = strip[..., 3]
    return rgb, alpha


def strips(height: int, rows: int = 256) -> Iterator[slice]:
    """For what Pillow does with copies of the photo: they are of a few rows only."""
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def as_photo(photo: str | Path | Image.Image | np.ndarray) -> Photo:
    """A path, a Pillow image or a uint8 array (H, W, 3 or 4) as a `Photo`; what is given is not changed."""
    if isinstance(photo, Image.Image):
        try:
            return to_photo(photo.copy())
        except Exception as error:  # a file that was opened lazily is decoded only now
            raise PhotoError(f"the photo cannot be read: {reason(error)}") from None
    if not isinstance(photo, np.ndarray):
        return read_photo(photo)
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] not in (3, 4) or not photo.size:
        raise PhotoError(f"expected a uint8 array (H, W, 3) or (H, W, 4), got {photo.dtype} {photo.shape}")
    return Photo(np.ascontiguousarray(photo[..., :3]), photo[..., 3] if photo.shape[2] == 4 else None)


# --- writing ----------------------------------------------------------------------------------------------


def compose(rgb: np.ndarray, opacity: np.ndarray, background: tuple[int, ...] | np.ndarray) -> np.ndarray:
    """The photo over a colour, or over a photo that covers all of it: uint8 BGR (H, W, 3)."""
    one_colour = isinstance(background, tuple)
    composed = np.full_like(rgb, background) if one_colour else cover(background, opacity.shape[::-1])
    for rows in strips(len(rgb)):
        canvas = Image.fromarray(composed[rows])
        canvas.paste(Image.fromarray(rgb[rows]), mask=Image.fromarray(opacity[rows]))
        composed[rows] = np.asarray(canvas)[..., ::-1]
    return composed


def cover(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crops the middle of a picture to the shape of (width, height) and scales it to that size; always a copy."""
    height, width = picture.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    new_width, new_height = (min(old, max(1, round(n / scale))) for old, n in ((width, size[0]), (height, size[1])))
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return np.array(resize(picture[top : top + new_height, left : left + new_width], size))


def encode_png(picture: np.ndarray, icc: bytes | None = None) -> list[bytes | memoryview]:
    """The pieces of a PNG of uint8 (H, W), BGR (H, W, 3) or BGRA (H, W, 4), colours kept where alpha is 0 as well."""
    ok, encoded = cv2.imencode(".png", picture, PNG_SETTINGS)
    if not ok:
        raise ValueError("larger than a PNG may be")
    data = memoryview(encoded)
    if icc is None:
        return [data]
    profile = b"iCCP" + b"photo\0\0" + zlib.compress(icc)
    chunk = struct.pack(">I", len(profile) - 4) + profile + struct.pack(">I", zlib.crc32(profile))
    return [data[:33], chunk, data[33:]]  # right after the header, whose length is fixed
