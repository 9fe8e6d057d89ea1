"""COCO's segmentations as run lengths: what is drawn, what is refused, and the processes that share the work."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import compressed_rle, fresh_python, uncompressed_rle
from pycocotools import mask as coco_mask

from loading import run_lengths
from loading.run_lengths import Drawing


def drawings(count: int) -> list[Drawing]:
    """Three triangles each, one of which lies outside."""
    dice = random.Random(0)
    triangles = [[[[dice.uniform(0, 48) for _ in range(6)]] for _ in range(2)] for _ in range(count)]
    return [Drawing(64, 48, [json.dumps(t).encode() for t in [*two, [[90] * 6]]]) for two in triangles]


def test_the_masks_are_the_unions_of_what_pycocotools_draws():
    for drawing in drawings(20):
        each = [coco_mask.frPyObjects(json.loads(text), 64, 48) for text in drawing.segmentations[:2]]
        union = np.any([coco_mask.decode(polygons) for polygons in each], axis=(0, 3))
        mask = run_lengths.draw(drawing)
        assert np.array_equal(coco_mask.decode({"size": [64, 48], "counts": mask.counts}), union)
        assert mask.undrawable == 1 + sum(coco_mask.area(polygons)[0] == 0 for polygons in each)


def test_many_persons_of_one_photo_are_merged_into_one_mask():
    dots = [[[x, y, x + 2, y, x, y + 2]] for x in range(0, 48, 3) for y in range(0, 64, 3)]
    mask = run_lengths.draw(Drawing(64, 48, [json.dumps(dot).encode() for dot in dots])).counts
    union = np.any([coco_mask.decode(coco_mask.frPyObjects(dot, 64, 48)) for dot in dots], axis=(0, 3))
    assert np.array_equal(coco_mask.decode({"size": [64, 48], "counts": mask}), union)


def test_an_outline_may_cross_the_photo_many_times_but_not_without_end():
    def crossing(times: int) -> bytes:
        return json.dumps([[value for n in range(times) for value in ((0, 47)[n % 2], n % 64)]]).encode()

    assert run_lengths.draw(Drawing(64, 48, [crossing(100)])).undrawable == 0
    assert run_lengths.draw(Drawing(64, 48, [crossing(200)])).undrawable == 1
    side = json.dumps([[0, 0, 2**20, 0, 0, 200] * 9]).encode()
    assert run_lengths.draw(Drawing(256, 2**20, [side])).undrawable == 1


def test_compressed_run_lengths_are_decoded_as_pycocotools_encoded_them():
    rng = np.random.default_rng(0)
    for runs in [rng.integers(1, 4, 60), rng.integers(1, 900, 40), rng.integers(1, 90_000, 12), rng.integers(1, 9, 1)]:
        mask = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8)[None]
        decoded = run_lengths.decode_counts(compressed_rle(mask)["counts"])
        assert decoded == uncompressed_rle(mask)["counts"] == [*runs]
    for damaged in ("/0", "p0", "é", "0P", "P" * 9 + "0"):  # outside the code, cut in a number, beyond 32 bits
        with pytest.raises(ValueError, match="compressed run lengths"):
            run_lengths.decode_counts(damaged)


# --- many photos, shared out ------------------------------------------------------------------------------


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(run_lengths, "BATCH", 7)


def children() -> list[int]:
    """The processes that this one has started and that have not ended."""
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes are found in /proc")


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_processes_draw_the_same_in_the_same_order(count):
    work = drawings(count)
    assert [*run_lengths.draw_all(work, 2)] == [*run_lengths.draw_all(work, 0)] == [*map(run_lengths.draw, work)]


@needs_proc
@pytest.mark.usefixtures("small_batches")
def test_an_interrupted_drawing_leaves_no_process_behind():
    before = children()

    def interrupted():
        yield from drawings(50)
        assert len(children()) == len(before) + 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_lengths.draw_all(interrupted(), 2))
    assert children() == before


@needs_proc
@pytest.mark.usefixtures("small_batches")
def test_a_process_that_dies_is_an_error_and_the_others_end():
    before = children()
    masks = run_lengths.draw_all(drawings(200), 2)
    next(masks)
    os.kill(next(pid for pid in children() if pid not in before), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="-9"):
        list(masks)
    assert children() == before


@needs_proc
def test_the_processes_end_with_the_one_that_started_them():
    code = """if True:
        import os
        from loading import run_lengths
        def endless():
            while True:
                yield run_lengths.Drawing(9, 9, [b"[[1, 1, 5, 1, 5, 5]]"])
        for mask in run_lengths.draw_all(endless(), 2):
            print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)"""
    folder = Path(run_lengths.__file__).parents[1]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True)
    pids = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids):
        time.sleep(0.02)
    assert not any(_is_running(pid) for pid in pids)


def _is_running(pid: str) -> bool:
    try:
        return "run_lengths" in Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return False


def test_the_processes_are_small():
    ours = {"torch", "cv2", "loading.index"}
    code = f"import sys; from loading import run_lengths; print(sorted({ours} & set(sys.modules)))"
    assert fresh_python(code) == ["[]"]


def test_the_largest_annotation_is_counted_in_pixels_and_many_polygons_of_one_are_drawn():
    square, wide = [10, 10, 14, 10, 14, 14, 10, 14], [20, 20, 40, 20, 40, 30, 20, 30]  # 16 and 200 pixels
    drawings = [json.dumps(polygons).encode() for polygons in ([square], [wide, square], [square] * 300)]
    mask = run_lengths.draw(Drawing(64, 48, drawings))
    assert (mask.largest, mask.undrawable) == (216, 0)
