"""Fits a photo into a square, and back. Needs numpy and OpenCV only: predictions import it."""

from __future__ import annotations

import cv2
import numpy as np

# What fills a letterbox's bars, and what an augmentation brings in from beyond the square. Black bars in which nobody
# is teach a network that persons end where the photo does; a reflected photo with its reflected mask does not.
BARS = {"reflect": cv2.BORDER_REFLECT_101, "black": cv2.BORDER_CONSTANT}


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes to (width, height): averages where it shrinks by more than two, else linearly."""
    height, width = image.shape[:2]
    if (width, height) == tuple(size):
        return image
    shrinks = max(width / size[0], height / size[1]) > 2
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def letterbox(image: np.ndarray, size: int, bars: str = "reflect") -> tuple[np.ndarray, dict]:
    """Fits an image into a square, centred and padded, its aspect ratio kept.

    Args:
        image: uint8 (H, W), (H, W, 3) or (H, W, 4). A fourth or only channel is a mask of 0 and 255 and stays one: it
            is resized like the photo and thresholded at one half.
        size: the square's side in pixels.
        bars: one of `BARS`: the padding goes on with the image, reflected, or is 0.

    Returns:
        The square, (size, size) with the channels of `image`, and the metadata that `restore` needs:
        original_size (width, height), scale, padding (left, top, right, bottom) in pixels.
    """
    metadata = placement(image.shape[1::-1], size)
    square = pad(resize(image, fitted_size(image.shape[1::-1], size)), metadata["padding"], bars)
    square = square.reshape(size, size, *image.shape[2:])  # OpenCV drops an only channel
    if image.ndim == 2 or image.shape[2] in (1, 4):
        mask = square[..., -1] if image.ndim == 3 else square
        mask[...] = cv2.threshold(np.ascontiguousarray(mask), 127, 255, cv2.THRESH_BINARY)[1]
    return square, metadata


def placement(original_size: tuple[int, int], size: int) -> dict:
    """Returns the metadata of `letterbox` for a photo of (width, height)."""
    width, height = fitted_size(original_size, size)
    left, top = (size - width) // 2, (size - height) // 2
    padding = (left, top, size - width - left, size - height - top)
    return {"original_size": original_size, "scale": size / max(original_size), "padding": padding}


def fitted_size(original_size: tuple[int, int], size: int) -> tuple[int, int]:
    """Returns the (width, height) that a photo has inside its square."""
    scale = size / max(original_size)
    return max(1, round(original_size[0] * scale)), max(1, round(original_size[1] * scale))


def pad(fitted: np.ndarray, padding: tuple[int, int, int, int], bars: str) -> np.ndarray:
    """Returns a square of what lies in it and of its padding (left, top, right, bottom); `bars` is one of `BARS`."""
    left, top, right, bottom = padding
    return cv2.copyMakeBorder(fitted, top, bottom, left, right, BARS[bars])


def unpadded(square: np.ndarray, padding: tuple[int, int, int, int]) -> np.ndarray:
    """Returns a view of a square without its padding."""
    left, top, right, bottom = padding
    return square[top : square.shape[0] - bottom, left : square.shape[1] - right]


def to_rgba(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns uint8 RGB (H, W, 3) and a mask (H, W) as one RGBA image (H, W, 4)."""
    return cv2.insertChannel(mask, cv2.cvtColor(photo, cv2.COLOR_RGB2RGBA), 3)


def restore(array: np.ndarray, metadata: dict) -> np.ndarray:
    """Reverts `letterbox`: crops the padding and resizes to the original size.

    Args:
        array: (S, S) or (S, S, C), uint8 or float32, S the size that `letterbox` was given.
        metadata: what `letterbox` returned.

    Returns:
        (height, width) or (height, width, C) of the same dtype; interpolated: a mask has to be thresholded again.
    """
    cropped = unpadded(array, metadata["padding"])
    width, height = metadata["original_size"]
    return resize(cropped, (width, height)).reshape(height, width, *array.shape[2:])
