"""The letterbox against arithmetic by hand, and the way back."""

from __future__ import annotations

import numpy as np
import pytest

from datasets import letterbox, restore


@pytest.mark.parametrize(
    ("width", "height", "size", "scale", "padding"),
    [(640, 480, 384, 0.6, (0, 48, 0, 48)), (333, 500, 384, 0.768, (64, 0, 64, 0)), (100, 50, 200, 2.0, (0, 50, 0, 50)),
     (384, 384, 384, 1, (0, 0, 0, 0)), (1000, 3, 64, 0.064, (0, 31, 0, 32)), (1, 90, 64, 64 / 90, (31, 0, 32, 0))],
)  # fmt: skip
def test_letterbox_fits_and_centres_and_black_bars_are_zeros(width, height, size, scale, padding):
    square, metadata = letterbox(np.full((height, width, 3), 255, np.uint8), size, "black")
    assert metadata == {"original_size": (width, height), "scale": pytest.approx(scale), "padding": padding}
    left, top, right, bottom = padding
    expected = np.zeros((size, size, 3), np.uint8)
    expected[top : size - bottom, left : size - right] = 255
    assert np.array_equal(square, expected)


@pytest.mark.parametrize("shape", [(48, 64), (5, 64), (64, 20)])  # bars wider than the photo: mirrored many times
def test_bars_go_on_with_the_photo_and_its_mask_as_in_a_mirror(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)
    image[..., 3] = np.where(image[..., 3] > 127, 255, 0)
    square, metadata = letterbox(image, 64)  # at its own size
    left, top, right, bottom = metadata["padding"]
    assert np.array_equal(square, np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="reflect"))


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
@pytest.mark.parametrize("shape", [(1, 90), (1000, 3), (64, 64), (129, 127), (1, 1)])
def test_restore_returns_the_size_the_dtype_and_the_content(shape, channels):
    image = np.full((*shape, *channels), 255, np.uint8)
    image[tuple(slice(n // 2) if n == max(shape) else slice(None) for n in shape)] = 0
    before = image.copy()
    square, metadata = letterbox(image, 64)
    assert np.array_equal(image, before)
    assert square.shape == (64, 64, *channels)
    if channels != (3,):  # a mask stays one
        assert {*np.unique(square[..., -1] if channels else square)} <= {0, 255}
    back, fractions = restore(square, metadata), restore(square.astype(np.float32) / 255, metadata)
    assert (back.shape, back.dtype) == (image.shape, np.uint8)
    assert (fractions.shape, fractions.dtype) == (image.shape, np.float32)
    assert np.abs(fractions - back / 255.0).max() <= 1 / 255
    assert np.abs(back - image.astype(int)).mean() < 4


@pytest.mark.parametrize("shape", [(30, 40), (384, 384), (999, 667)])
def test_the_content_comes_back_undistorted_and_in_its_place(shape):
    height, width = shape
    ys, xs = np.mgrid[:height, :width]
    disc = np.hypot(xs - width * 2 // 5, ys - height * 9 // 20) < min(shape) // 4
    smooth = [30 + 200 * xs / width, 30 + 200 * ys / height, 30 + 100 * (xs + ys) / sum(shape)]
    image = np.dstack([*smooth, 255 * disc]).round().astype(np.uint8)
    back = restore(*letterbox(image, 384, "black"))
    assert np.abs(back.astype(int) - image)[..., :3].max() <= max(2, 100 // max(shape))
    assert np.count_nonzero((back[..., 3] > 127) != disc) < 0.03 * disc.sum()


def test_what_shrinks_by_more_than_two_is_averaged():
    board = np.dstack([(np.indices((1000, 1000)).sum(0) % 2 * 255).astype(np.uint8)] * 3)
    square, _ = letterbox(board, 200)  # picking every fifth pixel would give the board again
    assert np.abs(square.astype(int) - 127).max() <= 8
