"""COCO's segmentations as run lengths: what is drawn and what is refused, against pycocotools."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from helpers import compressed_rle, uncompressed_rle
from pycocotools import mask as coco_mask

from loading.run_lengths import INVALID, ONLY_BBOX, Mask, decode_counts, draw_mask, lie_inside, merge_segmentations

TRIANGLE = [[1, 1, 9, 1, 9, 9]]


def merged(*segmentations: object, height: int = 64, width: int = 48) -> Mask | str:
    return merge_segmentations([json.dumps(each).encode() for each in segmentations], height, width)


def drawn_by_pycocotools(*segmentations: list) -> np.ndarray:
    masks = [coco_mask.decode(coco_mask.frPyObjects(each, 64, 48)).max(axis=2) for each in segmentations]
    return np.bitwise_or.reduce(masks)


def test_masks_are_the_unions_of_what_pycocotools_draws():
    rng, refused = random.Random(0), 0
    for _ in range(200):  # two triangles each, of which a few are too thin to be drawn
        two = [[[rng.uniform(0, 48) for _ in range(6)]] for _ in range(2)]
        mask = merged(*two)
        if all(drawn_by_pycocotools(each).any() for each in two):
            assert np.array_equal(draw_mask(mask.counts, 64, 48), 255 * drawn_by_pycocotools(*two))
        else:
            assert mask == INVALID
            refused += 1
    assert 0 < refused < 20


def test_unusable_segmentations_are_refused_beside_good_ones_and_alone():
    unusable = [
        7, "person", [["1"] * 6], [[1, 1, 9, 9]], [[1, 1, 9, 1, 9, 9, 5]], [[1, 1], []], [[90] * 6], [[5, 5] * 3],
        [[1, 1, 1e9, 1, 9, 9]], [[1, 1, 9, 1, 9, 2**70]], {"size": [64, 48]}, {"size": [48, 64], "counts": [3072]},
        {"size": [64, 48], "counts": [3071]}, {"size": [64, 48], "counts": []}, {"size": [64, 48], "counts": [3072]},
        {"size": [64, 48], "counts": [4000, -928]}, {"size": [64, 48], "counts": "é\0"},
    ]  # fmt: skip
    for segmentation in unusable:
        assert merged(TRIANGLE, segmentation) == merged(segmentation) == INVALID
    for nothing in (None, [], [[]]):  # as detectors' annotation files have it
        assert merged(TRIANGLE, nothing) == merged(nothing) == ONLY_BBOX


def test_rectangles_are_counted_unless_they_are_small():
    rectangle = [[7.5, 3.2, 27.5, 3.2, 27.5, 33.2, 7.5, 33.2]]
    drawn = drawn_by_pycocotools(rectangle)
    for box in (rectangle, uncompressed_rle(drawn), compressed_rle(drawn)):
        assert [merged(box).boxes, merged(box, TRIANGLE, box).boxes] == [1, 2]
    drawn[10, 10] = 0
    assert merged(compressed_rle(drawn)).boxes == 0
    assert merged([[5, 6, 14, 6, 14, 17, 5, 17]]).boxes == 0  # 99 pixels


def test_an_outline_may_cross_the_photo_many_times_but_not_without_end():
    crossing = [[value for n in range(200) for value in ((0, 47)[n % 2], n % 64)]]
    assert isinstance(merged([crossing[0][:200]]), Mask)
    assert merged(crossing) == INVALID
    assert merged([[0, 0, 2**20, 0, 0, 200] * 9], height=256, width=2**20) == INVALID


def test_the_largest_annotation_is_counted_in_pixels():
    square, wide = [10, 10, 14, 10, 14, 14, 10, 14], [20, 20, 40, 20, 40, 30, 20, 30]  # 16 and 200 pixels
    assert merged([square], [wide, square], [square] * 300).largest == 216


def test_stray_points_beside_an_outline_are_passed_over_and_damage_is_not():
    outline, other = [10.0, 10, 30, 10, 30, 30, 10, 30], [2.0, 40, 20, 40, 20, 60]
    whole = merged([outline, other])
    for stray in ([], [7], [7, 7], [7, 7, 9], [7, 7, 40, 50]):
        assert merged([stray, outline, other]) == merged([outline, stray, other, stray]) == whole
        assert merged([outline, other], [stray]) in (INVALID, ONLY_BBOX)
    for damage in ([7, 7, 9, 9, 11], [7, 7, 9, 9, 11, 7, 8], [1, 1, 1e9, 1, 9, 9], ["7"] * 6):
        assert merged([outline, damage]) == INVALID


def test_segmentations_tell_which_size_they_may_have_been_drawn_at():
    tall, run_lengths = [10, 2, 40, 2, 40, 90], {"size": [96, 64], "counts": [6144]}
    for segmentation in ([tall], [[5], tall], run_lengths):
        text = json.dumps(segmentation).encode()
        assert lie_inside([text], 64, 96)
        assert not lie_inside([b"[[1, 1, 9, 9, 1, 9]]", text], 96, 64)
    for nothing in (b"null", b"[]", b"[[]]", b"7", b"[[1, 1, 96, 1, 96, 65]]"):  # the last is a slip of the hand
        assert lie_inside([nothing], 96, 64)


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 1), (480, 640)])
@pytest.mark.parametrize("fraction", [0, 0.001, 0.5, 1])
def test_any_mask_comes_back(shape, fraction):
    mask = (np.random.default_rng(0).random(shape) < fraction).astype(np.uint8)
    drawn = draw_mask(coco_mask.encode(np.asfortranarray(mask))["counts"], *shape)
    assert (drawn.dtype, drawn.shape) == (np.uint8, shape)
    assert np.array_equal(drawn, 255 * mask)


def test_run_lengths_of_another_size_or_damaged_are_refused():
    with pytest.raises(ValueError, match="reshape"):
        draw_mask(compressed_rle(np.eye(8, dtype=np.uint8))["counts"].encode(), 8, 9)
    for damaged in ("", "/0", "p0", "é", "0P", "P" * 9 + "0"):  # outside the code, cut in a number, beyond 32 bits
        with pytest.raises(ValueError, match="compressed run lengths"):
            decode_counts(damaged.encode())
