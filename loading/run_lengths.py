"""COCO's segmentations as run lengths: checked, drawn by pycocotools, and merged into one mask a photo.

Many photos are shared out among processes that run this file as a script. They import neither torch nor OpenCV, so that
they are small and start at once; they copy nothing of the training process, and end with it because their input ends.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

LONGEST_OUTLINE = 2**21  # pixels: drawing a polygon takes about 120 bytes for each
BATCH = 256  # photos that are sent to a process at once
MERGED_AT_ONCE = 16


class Drawing(NamedTuple):
    """What has to be drawn of one photo: its annotations' segmentations, as JSON."""

    height: int
    width: int
    segmentations: list[bytes]


class Mask(NamedTuple):
    """The union of what could be drawn, as COCO's compressed run lengths (None: nothing could)."""

    counts: bytes | None
    largest: int  # pixels of the largest annotation
    undrawable: int  # annotations that could not be drawn


class _RunLengths(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: list[int] | str


_segmentation = msgspec.json.Decoder(list[list[float]] | _RunLengths)


# --- one photo --------------------------------------------------------------------------------------------


def draw(drawing: Drawing) -> Mask:
    """The union of a photo's segmentations; those that cannot be drawn are counted."""
    drawn, undrawable = [], 0
    for segmentation in drawing.segmentations:
        try:
            drawn.append(_merge(_draw_one(segmentation, drawing.height, drawing.width)))
        except (ValueError, OverflowError, RecursionError, msgspec.DecodeError):
            undrawable += 1
    if not drawn:
        return Mask(None, 0, undrawable)
    return Mask(_merge(drawn)["counts"], max(int(coco_mask.area(one)) for one in drawn), undrawable)


def _merge(drawn: list[dict]) -> dict:
    """A few at a time: pycocotools merges one after the other, which takes the square of their number."""
    while len(drawn) > 1:
        drawn = [coco_mask.merge(drawn[k : k + MERGED_AT_ONCE]) for k in range(0, len(drawn), MERGED_AT_ONCE)]
    return drawn[0]


def _draw_one(segmentation: bytes, height: int, width: int) -> list[dict]:
    """One annotation's run lengths, drawn by pycocotools after the checks that it leaves out.

    Raises:
        ValueError: run lengths that do not fill the photo, a polygon that `check_polygon` refuses, or none inside.
    """
    shape = _segmentation.decode(segmentation)
    if isinstance(shape, _RunLengths):
        counts = decode_counts(shape.counts) if isinstance(shape.counts, str) else shape.counts
        if shape.size != (height, width) or min(counts, default=-1) < 0 or sum(counts) != height * width:
            raise ValueError("the run lengths are not of the photo's size")
        return [coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)]
    if not shape:
        raise ValueError("there is no polygon")
    for polygon in shape:
        check_polygon(polygon, height, width)
    drawn = coco_mask.frPyObjects(shape, height, width)
    if not any(coco_mask.area(part) for part in drawn):  # of a list of more than 255 it fails
        raise ValueError("nothing of it lies inside the photo")
    return drawn


def check_polygon(polygon: list[float], height: int, width: int) -> None:
    """pycocotools walks every pixel of an edge, wherever it leads.

    Raises:
        ValueError: too few points, points far outside the photo, or an outline that crosses it some 60 times.
    """
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon has too few points")
    farthest, longest = max(map(abs, polygon)), min(LONGEST_OUTLINE, 64 * (height + width))
    if farthest > 4 * max(height, width):
        raise ValueError("a polygon has points far outside the photo")
    if len(polygon) * farthest > longest:  # it may be too long: no edge is longer than twice `farthest`
        points = np.reshape(polygon, (-1, 2))
        if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > longest:
            raise ValueError("a polygon's outline is too long for the photo")


def decode_counts(text: str) -> list[int]:
    """COCO's compressed run lengths as numbers: 5 bits a character, from the third on as differences.

    Written out here because pycocotools' own decoder reads past the end of a damaged text.

    Raises:
        ValueError: a character outside the code, or an end in the middle of a number.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode():
        bits = code - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("not COCO's compressed run lengths")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (bits & 0x10) << (shift - 4)  # the sign bit of the last five
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end in the middle of a number")
    return counts


# --- many photos, shared out ------------------------------------------------------------------------------


def draw_all(drawings: Iterable[Drawing], processes: int) -> Iterator[Mask]:
    """`draw` for each, in order, by that many processes besides this one; with 0 by this one.

    Raises:
        RuntimeError: a process ended before its work did (out of memory, or killed).
    """
    if not processes:
        yield from map(draw, drawings)
        return
    idle: SimpleQueue[_Process] = SimpleQueue()

    def draw_batch(batch: list[Drawing]) -> list[Mask]:
        process = idle.get()
        try:
            return process.draw(batch)
        finally:
            idle.put(process)

    with contextlib.ExitStack() as stack:
        for _ in range(processes):
            idle.put(stack.enter_context(_Process()))
        threads = ThreadPoolExecutor(processes)
        stack.callback(threads.shutdown, cancel_futures=True)  # before the processes end, after an interrupt too
        yield from itertools.chain.from_iterable(_in_order(threads, draw_batch, _batches(drawings), 2 * processes))


def _batches(drawings: Iterable[Drawing]) -> Iterator[list[Drawing]]:
    drawings = iter(drawings)
    while batch := list(itertools.islice(drawings, BATCH)):
        yield batch


def _in_order(threads: ThreadPoolExecutor, work, batches: Iterator, ahead: int) -> Iterator:
    """Executor.map, but it takes no more than a few batches ahead: all of them at once are a copy of the file."""
    pending = [threads.submit(work, batch) for batch in itertools.islice(batches, ahead)]
    while pending:
        yield pending.pop(0).result()
        pending += [threads.submit(work, batch) for batch in itertools.islice(batches, 1)]


class _Process:
    """This file as a script: batches of drawings in on its input, batches of masks out on its output."""

    def __enter__(self) -> _Process:
        pipe = subprocess.PIPE  # a session of its own: Ctrl-C is for the training process
        self._script = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, start_new_session=True)
        return self

    def draw(self, batch: list[Drawing]) -> list[Mask]:
        try:
            pickle.dump([tuple(drawing) for drawing in batch], self._script.stdin)
            self._script.stdin.flush()
            return [Mask(*mask) for mask in pickle.load(self._script.stdout)]
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            code = self._script.wait()
            raise RuntimeError(f"a process that draws the masks ended early (exit code {code})") from None

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._script.stdin.close()
        self._script.stdout.close()
        self._script.wait()


def serve() -> None:
    """Draws what arrives on the standard input until it ends."""
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump([tuple(draw(Drawing(*drawing))) for drawing in batch], sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
