"""Reads every kind of photo as 8 bits of RGB, and composes a photo onto another background."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import UserError, reason

MAX_PIXELS = 2**28  # of a photo, as in loading.headers: phones take 200 million
PILLOW_LIMIT = 1024**3 // 4 // 3  # pixels; Pillow refuses photos of twice as many unless a program sets another limit
MAX_ICC_BYTES = 2**20  # Pillow refuses to open a PNG with a larger colour profile
RAW = (".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw", ".x3f")
DECODER_ADVICE = {  # by extension: what helps to read photos that Pillow cannot decode by itself, or not everywhere
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), "pip install pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pip install --upgrade pillow"),
    **dict.fromkeys(RAW, "camera raw, develop them to JPEG, PNG or TIFF"),
    **dict.fromkeys((".jxl", ".jxr", ".xcf"), "save them as JPEG, PNG or TIFF"),
}
# As in loading.headers, whose import sets Pillow's limit of pixels: not in a program that only cuts out photos.
UNREADABLE_BY_PILLOW = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


class PhotoError(UserError):
    """A photo that cannot be read; the message is one line for the user."""


@dataclass
class Photo:
    """A photo as it is displayed: uint8 RGB (H, W, 3), straight alpha (H, W) and colour profile if it has them."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None


def open_photo(photo: str | Path | Image.Image | np.ndarray) -> Photo:
    """Reads any photo that Pillow knows, with its EXIF orientation applied; of several frames the first.

    Args:
        photo: a path, a Pillow image, or a uint8 array (H, W, 3 or 4); the last two are not modified.

    Raises:
        PhotoError: it is missing, damaged, no image or of more pixels than Pillow takes; the message names the file.
    """
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] not in (3, 4) or not photo.size:
            raise PhotoError(f"expected a uint8 array (H, W, 3) or (H, W, 4), got {photo.dtype} {photo.shape}")
        return Photo(np.ascontiguousarray(photo[..., :3]), photo[..., 3] if photo.shape[2] == 4 else None)
    try:
        if isinstance(photo, Image.Image):
            return convert(photo.copy())
        with open_image(photo) as image:
            return convert(image)
    except Exception as error:  # whatever a damaged file makes one of forty decoders raise
        name = "the photo" if isinstance(photo, Image.Image) else photo
        advice = decoder_advice(name) if isinstance(error, UnidentifiedImageError) else ""
        raise PhotoError(f"{name} cannot be read: {advice or reason(error)}") from None


_limit_lock = threading.Lock()  # of Pillow's limit, which all threads share


def open_image(path: str | Path) -> Image.Image:
    """Opens a photo of up to MAX_PIXELS pixels. Pillow's limit is put back, and one that the program has set stays."""
    with _limit_lock:
        before = Image.MAX_IMAGE_PIXELS
        try:
            if before == PILLOW_LIMIT:
                Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses photos above its double
            return Image.open(path, formats=readable_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = before


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Returns Pillow's names of the formats that can be read here, HEIC among them if its plug-in is installed."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in UNREADABLE_BY_PILLOW)


@functools.cache
def readable_extensions() -> frozenset[str]:
    """Returns the extensions, such as ".jpg", of the formats that can be read here."""
    formats = readable_formats()
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


def decoder_advice(path: str | Path) -> str:
    """Returns what helps to read photos of this extension, or "" if they can be read here or are no photos."""
    extension = os.path.splitext(path)[1].lower()
    return "" if extension in readable_extensions() else DECODER_ADVICE.get(extension, "")


def convert(image: Image.Image) -> Photo:
    """Converts a Pillow image, which may be modified. Raises ValueError if its pixels are floating-point numbers."""
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF does not spoil the photo
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a fixed white")
    rgb, alpha = (deep_grey_to_rgb(image), None) if image.mode.startswith("I") else to_rgb(image)
    icc = image.info.get("icc_profile") or b""
    fits = icc[16:20] == b"RGB " and image.mode != "CMYK" and len(icc) <= MAX_ICC_BYTES  # a profile of grey does not
    return Photo(rgb, alpha, icc if fits else None)


def to_rgb(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns an 8-bit image of any mode as RGB, uint8 (H, W, 3), and its alpha, uint8 (H, W) or None."""
    mode = "RGBA" if image.has_transparency_data else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    if mode == "RGB":
        return pixels, None
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), cv2.extractChannel(pixels, 3)


def deep_grey_to_rgb(image: Image.Image) -> np.ndarray:
    """Returns grey of more than 8 bits as RGB, uint8 (H, W, 3): its highest 8, as Pillow reduces 16-bit colours."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # a TIFF may have 12; all else comes scaled to 16
    grey = np.clip(np.asarray(image) >> (bits - 8), 0, 255).astype(np.uint8)
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


def compose(rgb: np.ndarray, opacity: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Returns the photo over the middle of another one, uint8 RGB (h, w, 3): uint8 BGR (H, W, 3)."""
    canvas = ImageOps.fit(Image.fromarray(background), opacity.shape[::-1], Image.Resampling.BILINEAR)
    canvas.paste(Image.fromarray(rgb), mask=Image.fromarray(opacity))
    return cv2.cvtColor(np.asarray(canvas), cv2.COLOR_RGB2BGR)
