"""Every kind of photo as 8 bits of RGB, and on another background."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from loading.letterbox import resize
from utils import UserError

LARGEST_PROFILE = 2**20  # bytes: Pillow refuses to open a PNG with a larger colour profile
RAW = (
    *(".3fr", ".ari", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".kdc", ".mef"),
    *(".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)
OTHER_KINDS = {  # photos, by extension, that Pillow cannot decode by itself, or not everywhere; and what helps
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "pip install pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pip install --upgrade pillow"),
    ".jxl": "pip install pillow-jxl-plugin",
    **dict.fromkeys(RAW, "camera raw, develop them to JPEG, PNG or TIFF"),
    **dict.fromkeys((".bpg", ".jxr", ".wdp", ".hdp", ".xcf"), "save them as JPEG, PNG or TIFF"),
}
NO_PHOTOS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow names them, but cannot decode them by itself


class PhotoError(UserError):
    """A photo that cannot be read; the message is one line for the user."""


@dataclass
class Photo:
    """A photo as it is shown: uint8 RGB (H, W, 3); straight alpha (H, W) and a colour profile where it has them."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None


def open_photo(photo: str | Path | Image.Image | np.ndarray) -> Photo:
    """Any photo that Pillow knows, its EXIF orientation applied; of several frames the first.

    Args:
        photo: its path, a Pillow image, or a uint8 array (H, W, 3 or 4); the last two stay as they are.

    Raises:
        PhotoError: missing, damaged, cut short, no image, or of more pixels than Pillow takes; names the file.
    """
    if isinstance(photo, np.ndarray):
        return from_array(photo)
    try:
        if isinstance(photo, Image.Image):
            return to_photo(photo.copy())
        with Image.open(photo, formats=photo_formats()) as image:
            return to_photo(image)
    except Exception as error:  # whatever a damaged file makes one of forty decoders raise
        if isinstance(photo, Image.Image):
            raise PhotoError(f"the photo cannot be read: {reason(error)}") from None
        advice = what_helps(photo) if isinstance(error, UnidentifiedImageError) else ""
        raise PhotoError(f"{photo} cannot be read: {advice or reason(error)}") from None


def from_array(pixels: np.ndarray) -> Photo:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or not pixels.size:
        raise PhotoError(f"expected a uint8 array (H, W, 3) or (H, W, 4), got {pixels.dtype} {pixels.shape}")
    return Photo(np.ascontiguousarray(pixels[..., :3]), pixels[..., 3] if pixels.shape[2] == 4 else None)


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def photo_formats() -> tuple[str, ...]:
    with contextlib.suppress(ImportError):  # an extra, as `OTHER_KINDS` has it
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401 - that registers it
    Image.init()
    return tuple(name for name in Image.ID if name not in NO_PHOTOS)


@functools.cache
def readable_extensions() -> frozenset[str]:
    formats = photo_formats()
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


def what_helps(path: str | Path) -> str:
    """Against a photo's being of a kind that cannot be read here; "" where it can, and for what is no photo."""
    extension = os.path.splitext(path)[1].lower()
    return "" if extension in readable_extensions() else OTHER_KINDS.get(extension, "")


def to_photo(image: Image.Image) -> Photo:
    """Any Pillow image as a `Photo`; the image itself may be turned."""
    image.load()
    with contextlib.suppress(Exception):  # an EXIF block that nobody can read does not spoil the photo
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a fixed white")
    return Photo(*(deep_grey if image.mode.startswith("I") else channels)(image), fitting_profile(image))


def fitting_profile(image: Image.Image) -> bytes | None:
    """The image's colour profile, if it describes RGB: one of CMYK or grey does not fit the pixels that come out."""
    icc = image.info.get("icc_profile") or b""
    return icc if icc[16:20] == b"RGB " and image.mode != "CMYK" and len(icc) <= LARGEST_PROFILE else None


def channels(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """An image of 8 bits as RGB, uint8 (H, W, 3), and alpha (H, W) or None."""
    mode = "RGBA" if image.has_transparency_data else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    if mode == "RGB":
        return pixels, None
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), cv2.extractChannel(pixels, 3)


def deep_grey(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """The same of grey of more than 8 bits: its highest 8, as Pillow does it with 16-bit colours."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF may have 12; all else comes scaled to 16
    values, key = np.asarray(image), image.info.get("transparency")
    grey = np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)
    alpha = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), alpha


def strips(height: int, rows: int = 256) -> Iterator[slice]:
    """For what Pillow does with copies of the photo: they are of a few rows only."""
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


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
