"""A photo in its square, and the way back. Needs numpy and OpenCV alone: a prediction has no use for more."""

from __future__ import annotations

import cv2
import numpy as np


def resize(image: np.ndarray, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """Resizes to (width, height), into `out` if given: averages where it shrinks by more than two, else linear."""
    height, width = image.shape[:2]
    if (width, height) == tuple(size) and out is None:
        return image
    shrinks = max(width / size[0], height / size[1]) > 2
    return cv2.resize(image, size, dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, dict]:
    """Fits an image into a square, its aspect ratio kept, centred, padded with zeros.

    Args:
        image: uint8 (H, W), (H, W, 3) or (H, W, 4). A fourth channel, and a lone one, is a mask of 0 and 255
            and stays one: it is resized like the photo and cut at one half, so that it does not drift.
        size: the square's side in pixels.

    Returns:
        The square, (size, size) with the channels of `image`, and the metadata that `restore` needs:
        original_size (width, height), scale, padding (left, top, right, bottom) in pixels.
    """
    metadata = placement(image.shape[1::-1], size)
    square = np.zeros((size, size, *image.shape[2:]), image.dtype)
    inside = unpadded(square, metadata["padding"])
    resize(image, inside.shape[1::-1], out=inside)
    if image.ndim == 2 or image.shape[2] in (1, 4):
        mask = square[..., -1] if image.ndim == 3 else square
        mask[...] = cv2.threshold(np.ascontiguousarray(mask), 127, 255, cv2.THRESH_BINARY)[1]
    return square, metadata


def placement(original_size: tuple[int, int], size: int) -> dict:
    """Where a photo of (width, height) lies in its square: the metadata of `letterbox`."""
    width, height = fitted_size(original_size, size)
    left, top = (size - width) // 2, (size - height) // 2
    padding = (left, top, size - width - left, size - height - top)
    return {"original_size": original_size, "scale": size / max(original_size), "padding": padding}


def fitted_size(original_size: tuple[int, int], size: int) -> tuple[int, int]:
    """The (width, height) that a photo of another has inside its square."""
    scale = size / max(original_size)
    return max(1, round(original_size[0] * scale)), max(1, round(original_size[1] * scale))


def unpadded(square: np.ndarray, padding: tuple[int, int, int, int]) -> np.ndarray:
    """The part of a square that is not padding, as a view."""
    left, top, right, bottom = padding
    return square[top : square.shape[0] - bottom, left : square.shape[1] - right]


def pad(fitted: np.ndarray, padding: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The inverse of `unpadded`: the same pixels in a square of zeros."""
    square = np.zeros((size, size, *fitted.shape[2:]), fitted.dtype)
    unpadded(square, padding)[...] = fitted
    return square


def to_rgba(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) and mask (H, W) as one RGBA image (H, W, 4)."""
    return cv2.insertChannel(mask, cv2.cvtColor(photo, cv2.COLOR_RGB2RGBA), 3)


def restore(array: np.ndarray, metadata: dict) -> np.ndarray:
    """The way back from `letterbox`: crops the padding, resizes to the original size.

    Args:
        array: (S, S) or (S, S, C), uint8 or float32, S as it was given to `letterbox`.
        metadata: what `letterbox` returned.

    Returns:
        (height, width) or (height, width, C) of the same dtype; interpolated, so a mask is to be cut again.
    """
    cropped = unpadded(array, metadata["padding"])
    width, height = metadata["original_size"]
    return resize(cropped, (width, height)).reshape(height, width, *array.shape[2:])
