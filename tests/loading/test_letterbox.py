"""The letterbox against arithmetic by hand, and the way back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from datasets import letterbox, restore


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.logical_and(a, b).sum() / np.logical_or(a, b).sum()


def centre(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the centre of mass, counted from the image's corner."""
    return np.argwhere(mask).mean(0)[::-1] + 0.5


def disc(height: int, width: int) -> np.ndarray:
    spot = (width * 2 // 5, height * 9 // 20)
    return cv2.circle(np.zeros((height, width), np.uint8), spot, min(height, width) // 4, 255, -1)


@pytest.mark.parametrize(
    ("width", "height", "size", "scale", "padding"),
    [(640, 480, 384, 0.6, (0, 48, 0, 48)), (333, 500, 384, 0.768, (64, 0, 64, 0)), (100, 50, 200, 2.0, (0, 50, 0, 50)),
     (384, 384, 384, 1, (0, 0, 0, 0)), (1000, 3, 64, 0.064, (0, 31, 0, 32)), (1, 90, 64, 64 / 90, (31, 0, 32, 0))],
)  # fmt: skip
def test_letterbox_fits_centres_and_pads_with_zeros(width, height, size, scale, padding):
    square, metadata = letterbox(np.full((height, width, 3), 255, np.uint8), size)
    assert metadata == {"original_size": (width, height), "scale": pytest.approx(scale), "padding": padding}
    left, top, right, bottom = padding
    expected = np.zeros((size, size, 3), np.uint8)
    expected[top : size - bottom, left : size - right] = 255
    assert np.array_equal(square, expected)


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
@pytest.mark.parametrize("shape", [(1, 90), (90, 1), (3, 1000), (1000, 3), (64, 64), (50, 50), (129, 127), (1, 1)])
def test_restore_returns_the_size_the_dtype_and_the_content(shape, channels):
    image = np.full((*shape, *channels), 255, np.uint8)
    image[tuple(slice(n // 2) if n == max(shape) else slice(None) for n in shape)] = 0
    square, metadata = letterbox(image, 64)
    back, fractions = restore(square, metadata), restore(square.astype(np.float32) / 255, metadata)
    assert square.shape == (64, 64, *channels)
    assert (back.shape, back.dtype) == (image.shape, np.uint8)
    assert (fractions.shape, fractions.dtype) == (image.shape, np.float32)
    assert np.abs(fractions - back / 255.0).max() <= 1 / 255
    assert np.abs(back - image.astype(int)).mean() < 4


@pytest.mark.parametrize("shape", [(30, 40), (480, 640), (384, 384), (999, 667), (1230, 1640)])
def test_the_content_comes_back_undistorted_and_where_it_was(shape):
    ys, xs = np.mgrid[: shape[0], : shape[1]]
    smooth = [30 + 200 * xs / shape[1], 30 + 200 * ys / shape[0], 30 + 100 * (xs + ys) / sum(shape)]
    image = np.dstack([*smooth, disc(*shape)]).round().astype(np.uint8)
    square, metadata = letterbox(image, 384)
    back, mask, small = restore(square, metadata), image[..., 3], square[..., 3]
    left, top, right, bottom = metadata["padding"]
    scale = np.array([384 - left - right, 384 - top - bottom]) / shape[::-1]
    assert np.abs(back.astype(int) - image)[..., :3].max() <= max(2, 100 // max(shape))
    assert iou(back[..., 3] > 127, mask) > 0.97
    assert centre(small) == pytest.approx(centre(mask) * scale + (left, top), abs=0.1)
    assert centre(back[..., 3] > 127) == pytest.approx(centre(mask), abs=0.15 / metadata["scale"])
    assert abs(np.subtract(*np.ptp(np.argwhere(small), axis=0))) <= 1 + metadata["scale"]  # round, as it was


@pytest.mark.parametrize("channels", [(), (1,), (4,)])
@pytest.mark.parametrize("side", [20, 64, 77, 150])
def test_masks_stay_0_or_255_and_the_input_as_it_was(side, channels):
    noise = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (side, side - 5, *channels))
    before = noise.copy()
    square, _ = letterbox(noise, 64)
    assert np.unique(square[..., -1] if channels else square).tolist() == [0, 255]
    assert np.array_equal(noise, before)


def test_what_shrinks_by_more_than_two_is_averaged():
    board = (np.indices((1000, 1000)).sum(0) % 2 * 255).astype(np.uint8)
    square, _ = letterbox(np.dstack([board] * 3), 200)  # picking every fifth pixel would give the board again
    assert np.abs(square.astype(int) - 127).max() <= 8
