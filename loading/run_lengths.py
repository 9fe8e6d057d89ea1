"""COCO's segmentations as run lengths: checked, drawn by pycocotools, merged into one mask a photo; and as pixels."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import starmap
from threading import Thread
from types import ModuleType
from typing import NamedTuple

import cv2
import msgspec
import numpy as np
from pycocotools import mask as coco_mask

LONGEST_OUTLINE = 2**21  # pixels: drawing a polygon takes about 120 bytes for each
MERGED_AT_ONCE = 16
OVERHANG = 1.05  # of a photo's side: so far a polygon may reach over it without having been drawn on a larger one
CHUNK = 256  # photos that are sent to a process at once
MOST_CHARACTERS = 7  # of a number: 35 bits, and COCO's have 32


class Drawing(NamedTuple):
    """What has to be drawn of one photo: its annotations' segmentations, as JSON."""

    segmentations: list[msgspec.Raw]
    height: int
    width: int


class Mask(NamedTuple):
    """The union of a photo's segmentations, as COCO's compressed run lengths."""

    counts: bytes
    largest: int  # pixels of the largest annotation


class _RunLengths(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: list[int] | str


_segmentation = msgspec.json.Decoder(list[list[float]] | _RunLengths)


# --- from an annotation file ------------------------------------------------------------------------------


def draw(segmentations: list[msgspec.Raw], height: int, width: int) -> Mask | None:
    """The union of a photo's segmentations; None where one cannot be drawn: without it the union would be wrong."""
    try:
        masks, areas = zip(*(_draw_one(segmentation, height, width) for segmentation in segmentations), strict=True)
    except (ValueError, OverflowError, RecursionError):
        return None
    return Mask(_merge(masks)["counts"], max(areas))


def _merge(drawn: Sequence[dict]) -> dict:
    """A few at a time: pycocotools merges one after the other, which takes the square of their number."""
    while len(drawn) > 1:
        drawn = [coco_mask.merge(drawn[k : k + MERGED_AT_ONCE]) for k in range(0, len(drawn), MERGED_AT_ONCE)]
    return drawn[0]


def _draw_one(segmentation: msgspec.Raw, height: int, width: int) -> tuple[dict, int]:
    """One annotation's run lengths and its pixels, drawn by pycocotools after the checks that it leaves out.

    Raises:
        ValueError: run lengths that do not fill the photo, a polygon that `_check_polygon` refuses, or no pixel inside.
    """
    shape = _segmentation.decode(segmentation)
    if isinstance(shape, _RunLengths):
        counts = shape.counts if isinstance(shape.counts, list) else decode_counts(shape.counts.encode()).tolist()
        if shape.size != (height, width) or min(counts, default=-1) < 0 or sum(counts) != height * width:
            raise ValueError("the run lengths are not of the photo's size")
        drawn = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        area = sum(counts[1::2])
    else:
        polygons = [part for part in shape if len(part) > 4]  # beside an outline a stray point or two enclose nothing
        for polygon in polygons:
            _check_polygon(polygon, height, width)
        drawn = _merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None
        area = int(coco_mask.area(drawn)) if polygons else 0
    if not area:
        raise ValueError("nothing of it lies inside the photo")
    return drawn, area


def _check_polygon(polygon: list[float], height: int, width: int) -> None:
    """pycocotools walks every pixel of an edge, wherever it leads.

    Raises:
        ValueError: too few points, points far outside the photo, or an outline that crosses it some 60 times.
    """
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon has too few points")
    farthest, longest = max(max(polygon), -min(polygon)), min(LONGEST_OUTLINE, 64 * (height + width))
    if farthest > 4 * max(height, width):
        raise ValueError("a polygon has points far outside the photo")
    if len(polygon) * farthest > longest:  # it may be too long: no edge is longer than twice `farthest`
        points = np.reshape(polygon, (-1, 2))
        if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > longest:
            raise ValueError("a polygon's outline is too long for the photo")


def is_box_alone(segmentation: msgspec.Raw) -> bool:
    """Whether there is no segmentation: detectors' annotations have a box and leave it out, empty or null."""
    return bytes(segmentation).strip(b"[] \t\r\n") in (b"", b"null")


def lie_inside(segmentations: list[msgspec.Raw], width: int, height: int) -> bool:
    """Whether they may have been drawn on a photo of that size: run lengths are of it, no polygon is far outside."""
    for segmentation in segmentations:
        with contextlib.suppress(ValueError):  # of what cannot be drawn nothing can be told
            shape = _segmentation.decode(segmentation)
            if isinstance(shape, _RunLengths):
                inside = shape.size == (height, width)
            else:
                reach = [max((max(part[axis::2], default=0) for part in shape), default=0) for axis in (0, 1)]
                inside = reach[0] <= OVERHANG * width and reach[1] <= OVERHANG * height
            if not inside:
                return False
    return True


def draw_all(drawings: list[Drawing], processes: int) -> Iterator[Mask | None]:
    """`draw` for each, in order, by that many processes besides this one, or by this one where it is 1.

    What they are worth at COCO's size: 10 s of work, of which 8 s are the drawing, take 6 s on two quiet cores.

    Raises:
        BrokenProcessPool: one of them was ended before its work was done.
    """
    if processes < 2:
        yield from starmap(draw, drawings)
        return
    main = sys.modules["__main__"]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        sys.modules["__main__"] = ModuleType("__main__")  # each would import the real one, the training, and torch
        try:
            masks = pool.map(draw, *zip(*drawings, strict=True), chunksize=CHUNK)
        finally:
            sys.modules["__main__"] = main
        yield from masks


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


# --- from the index ---------------------------------------------------------------------------------------


def draw_mask(text: bytes | np.ndarray, height: int, width: int) -> np.ndarray:
    """Compressed run lengths as a mask, uint8 (height, width) of 0 and 255, in half the time of pycocotools.

    Raises:
        ValueError: the run lengths do not fill the photo, or are damaged.
    """
    counts = decode_counts(text)
    values = np.zeros(len(counts), np.uint8)
    values[1::2] = 255
    return cv2.transpose(np.repeat(values, counts).reshape(width, height))  # they go column by column


def decode_counts(text: bytes | np.ndarray) -> np.ndarray:
    """The length of each run, int64: of the pixels outside, then of those inside, and so on.

    A number is written in characters of 5 bits, the lowest first, with a sixth that says whether more follow;
    from the fourth number on it is the difference to the last but one. pycocotools' own decoder reads past the end
    of a damaged text.

    Args:
        text: COCO's "counts", as bytes or uint8 (characters,).

    Raises:
        ValueError: a character outside the code, a number that is too long, or an end in the middle of one.
    """
    codes = np.frombuffer(text, np.uint8) - 48
    last = np.flatnonzero(codes < 32)
    first = np.zeros_like(last)
    first[1:] = last[:-1] + 1
    lengths = last - first + 1
    if not len(codes) or codes.max() > 63 or codes[-1] > 31 or lengths.max() > MOST_CHARACTERS:
        raise ValueError("not COCO's compressed run lengths")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(first, lengths))
    counts = np.add.reduceat((codes & 31).astype(np.int64) << shifts, first)
    counts -= (codes[last] >= 16) * (32 << shifts[last])  # the highest bit is the sign
    counts[1::2] = counts[1::2].cumsum()
    counts[2::2] = counts[2::2].cumsum()
    return counts
