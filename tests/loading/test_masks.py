"""Run lengths against pycocotools, which wrote them."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from loading.masks import draw_mask


def drawn(encoded: dict) -> np.ndarray:
    height, width = encoded["size"]
    return draw_mask(np.frombuffer(encoded["counts"], np.uint8), width, height)


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 1), (63, 1), (8, 8), (7, 9), (480, 640), (3, 1000)])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999, 1])
def test_any_mask_comes_back(shape, share):
    mask = (np.random.default_rng(0).random(shape) < share).astype(np.uint8)
    found = drawn(coco_mask.encode(np.asfortranarray(mask)))
    assert (found.dtype, found.shape) == (np.uint8, shape)
    assert np.array_equal(found, 255 * mask)


@pytest.mark.parametrize("longest", [1, 3, 20, 600, 50_000])
def test_runs_of_any_length_and_empty_ones_are_drawn_as_pycocotools_draws_them(longest):
    rng = np.random.default_rng(longest)
    for runs in (1, 2, 3, 4, 5, 30, 31):
        counts = [*rng.integers(0, longest + 1, runs).tolist(), 1]
        encoded = coco_mask.frPyObjects({"size": [sum(counts), 1], "counts": counts}, sum(counts), 1)
        assert np.array_equal(drawn(encoded), 255 * coco_mask.decode(encoded))


def test_run_lengths_of_another_size_are_refused():
    encoded = coco_mask.encode(np.asfortranarray(np.eye(8, dtype=np.uint8)))
    with pytest.raises(ValueError, match="reshape"):
        drawn({**encoded, "size": [8, 9]})
