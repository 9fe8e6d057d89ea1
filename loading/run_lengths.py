"""COCO's segmentations as run lengths: checks them, merges a photo's into one mask, and draws masks as pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import msgspec
import numpy as np
from pycocotools import mask as coco_mask

ONLY_BBOX = "photo{s} with a person who has a bounding box and no mask"
MIN_BOX = 100  # pixels: a smaller person may fill a rectangle
INVALID = "photo{s} with a person whose segmentation is invalid"

MAX_OUTLINE = 2**21  # pixels: drawing a polygon takes about 120 bytes for each
MERGED_AT_ONCE = 16
OVERHANG = 1.05  # of a photo's side: a polygon may reach this far over it and belong to the photo
MAX_CHARACTERS = 7  # of a number: 35 bits, and COCO's have 32


class Mask(NamedTuple):
    """The union of a photo's segmentations, as COCO's compressed run lengths."""

    counts: bytes
    largest: int  # pixels of the largest segmentation
    boxes: int = 0  # how many are rectangles: as a rule what a tool has made of bounding boxes


class _RunLengths(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: list[int] | str


_segmentation = msgspec.json.Decoder(list[list[float]] | _RunLengths)


def merge_segmentations(segmentations: list[msgspec.Raw], height: int, width: int) -> Mask | str:
    """Returns the union of a photo's segmentations, or why one is unusable: without it the union would be wrong.

    Without any it is empty.
    """
    if not segmentations:
        return Mask(coco_mask.encode(np.zeros((height, width), np.uint8, "F"))["counts"], 0)
    try:
        masks, areas = zip(*(_encode(segmentation, height, width) for segmentation in segmentations), strict=True)
    except (ValueError, OverflowError, RecursionError):
        return ONLY_BBOX if any(map(has_only_bbox, segmentations)) else INVALID
    sides = coco_mask.toBbox(list(masks))[:, 2:]
    boxes = sum(area >= MIN_BOX and area == width * height for area, (width, height) in zip(areas, sides, strict=True))
    return Mask(_merge(masks)["counts"], max(areas), boxes)


def _merge(masks: Sequence[dict]) -> dict:
    """Merges a few at a time: pycocotools' time for all at once grows with the square of their number."""
    while len(masks) > 1:
        masks = [coco_mask.merge(masks[k : k + MERGED_AT_ONCE]) for k in range(0, len(masks), MERGED_AT_ONCE)]
    return masks[0]


def _encode(segmentation: msgspec.Raw, height: int, width: int) -> tuple[dict, int]:
    """Returns a segmentation's run lengths and its pixels, by pycocotools; a ValueError if it is unusable."""
    shape = _segmentation.decode(segmentation)
    if isinstance(shape, _RunLengths):
        counts = shape.counts if isinstance(shape.counts, list) else decode_counts(shape.counts.encode()).tolist()
        if shape.size != (height, width) or min(counts, default=-1) < 0 or sum(counts) != height * width:
            raise ValueError("the run lengths are not of the photo's size")
        mask = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        area = sum(counts[1::2])
    else:
        polygons = [points for points in shape if len(points) > 4]  # a stray point or two beside them enclose nothing
        for polygon in polygons:
            _check_polygon(polygon, height, width)
        mask = _merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None
        area = int(coco_mask.area(mask)) if polygons else 0
    if not area:
        raise ValueError("nothing of it lies inside the photo")
    return mask, area


def _check_polygon(polygon: list[float], height: int, width: int) -> None:
    """Raises a ValueError for a polygon that pycocotools, which walks every pixel of an edge, takes long to draw."""
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon has too few points")
    if max(polygon) <= 1:  # fractions of the photo, as YOLO's, or nothing of a photo's size
        raise ValueError("a polygon lies within the first pixel")
    farthest, max_outline = max(max(polygon), -min(polygon)), min(MAX_OUTLINE, 64 * (height + width))
    if farthest > 4 * max(height, width):
        raise ValueError("a polygon has points far outside the photo")
    if len(polygon) * farthest > max_outline:  # it may be too long: no edge is longer than twice `farthest`
        points = np.reshape(polygon, (-1, 2))
        if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > max_outline:
            raise ValueError("a polygon's outline is too long for the photo")


def has_only_bbox(segmentation: msgspec.Raw) -> bool:
    """Returns whether a segmentation is empty or null, as in the annotations of detectors."""
    return bytes(segmentation).strip(b"[] \t\r\n") in (b"", b"null")


def lie_inside(segmentations: list[msgspec.Raw], width: int, height: int) -> bool:
    """Returns whether all may have been drawn on a photo of that size: by run lengths' sizes and polygons' extents."""
    for segmentation in segmentations:
        with contextlib.suppress(ValueError):  # an unusable one tells nothing
            shape = _segmentation.decode(segmentation)
            if isinstance(shape, _RunLengths):
                inside = shape.size == (height, width)
            else:
                right, bottom = (max((max(part[axis::2], default=0) for part in shape), default=0) for axis in (0, 1))
                inside = right <= OVERHANG * width and bottom <= OVERHANG * height
            if not inside:
                return False
    return True


def draw_mask(counts: bytes | np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns compressed run lengths as a mask, uint8 (height, width) of 0 and 255, in half of pycocotools' time.

    A ValueError says that they are damaged, or of another size.
    """
    lengths = decode_counts(counts)
    values = np.zeros(len(lengths), np.uint8)
    values[1::2] = 255
    return cv2.transpose(np.repeat(values, lengths).reshape(width, height))  # they go column by column


def decode_counts(text: bytes | np.ndarray) -> np.ndarray:
    """Returns the length of each run, int64: of the pixels outside, then of those inside, and so on.

    COCO writes a number in characters of 5 bits, the lowest first, with a sixth bit if more follow; from the fourth
    number on it is the difference to the last but one. pycocotools' own decoder reads past the end of a damaged text.

    Args:
        text: as bytes or uint8 (characters,); a ValueError if it is not of this form.
    """
    codes = np.frombuffer(text, np.uint8) - 48
    last = np.flatnonzero(codes < 32)
    first = np.zeros_like(last)
    first[1:] = last[:-1] + 1
    lengths = last - first + 1
    if not len(codes) or codes.max() > 63 or codes[-1] > 31 or lengths.max() > MAX_CHARACTERS:
        raise ValueError("not COCO's compressed run lengths")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(first, lengths))
    counts = np.add.reduceat((codes & 31).astype(np.int64) << shifts, first)
    counts -= (codes[last] >= 16) * (32 << shifts[last])  # the highest bit is the sign
    counts[1::2] = counts[1::2].cumsum()
    counts[2::2] = counts[2::2].cumsum()
    return counts
