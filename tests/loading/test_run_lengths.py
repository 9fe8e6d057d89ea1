"""COCO's segmentations as run lengths: what is drawn, what is refused, and the processes that share the work."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from conftest import compressed_rle, fresh_python, uncompressed_rle
from pycocotools import mask as coco_mask

from loading import run_lengths
from loading.run_lengths import Drawing, decode_counts, draw_mask


def drawings(count: int) -> list[Drawing]:
    """Two triangles each, of which a few are too thin to be drawn."""
    dice = random.Random(0)
    triangles = [[[[dice.uniform(0, 48) for _ in range(6)]] for _ in range(2)] for _ in range(count)]
    return [Drawing([json.dumps(triangle).encode() for triangle in two], 64, 48) for two in triangles]


def test_the_masks_are_the_unions_of_what_pycocotools_draws():
    undrawn = 0
    for drawing in drawings(200):
        each = [coco_mask.frPyObjects(json.loads(text), 64, 48) for text in drawing.segmentations]
        union = np.any([coco_mask.decode(polygons) for polygons in each], axis=(0, 3))
        mask = run_lengths.draw(*drawing)
        if any(coco_mask.area(polygons)[0] == 0 for polygons in each):
            assert mask is None
            undrawn += 1
        else:
            assert np.array_equal(coco_mask.decode({"size": [64, 48], "counts": mask.counts}), union)
    assert 0 < undrawn < 20


def test_many_persons_of_one_photo_are_merged_into_one_mask():
    dots = [[[x, y, x + 2, y, x, y + 2]] for x in range(0, 48, 3) for y in range(0, 64, 3)]
    mask = run_lengths.draw([json.dumps(dot).encode() for dot in dots], 64, 48).counts
    union = np.any([coco_mask.decode(coco_mask.frPyObjects(dot, 64, 48)) for dot in dots], axis=(0, 3))
    assert np.array_equal(coco_mask.decode({"size": [64, 48], "counts": mask}), union)


def test_an_outline_may_cross_the_photo_many_times_but_not_without_end():
    def crossing(times: int) -> bytes:
        return json.dumps([[value for n in range(times) for value in ((0, 47)[n % 2], n % 64)]]).encode()

    assert run_lengths.draw([crossing(100)], 64, 48)
    assert run_lengths.draw([crossing(200)], 64, 48) is None
    side = json.dumps([[0, 0, 2**20, 0, 0, 200] * 9]).encode()
    assert run_lengths.draw([side], 256, 2**20) is None


def test_the_largest_annotation_is_counted_in_pixels_and_many_polygons_of_one_are_drawn():
    square, wide = [10, 10, 14, 10, 14, 14, 10, 14], [20, 20, 40, 20, 40, 30, 20, 30]  # 16 and 200 pixels
    drawings = [json.dumps(polygons).encode() for polygons in ([square], [wide, square], [square] * 300)]
    assert run_lengths.draw(drawings, 64, 48).largest == 216


def test_beside_an_outline_stray_points_are_passed_over_and_damage_is_not():
    outline, other = [10.0, 10, 30, 10, 30, 30, 10, 30], [2.0, 40, 20, 40, 20, 60]
    whole = run_lengths.draw([json.dumps([outline, other]).encode()], 64, 48)
    for stray in ([], [7], [7, 7], [7, 7, 9], [7, 7, 40, 50]):
        for parts in ([stray, outline, other], [outline, stray, other, stray]):
            assert run_lengths.draw([json.dumps(parts).encode()], 64, 48) == whole
        assert run_lengths.draw([json.dumps([outline, other]).encode(), json.dumps([stray]).encode()], 64, 48) is None
    damaged = ([7, 7, 9, 9, 11], [7, 7, 9, 9, 11, 7, 8], [1, 1, 1e9, 1, 9, 9], ["7"] * 6)
    for part in damaged:
        assert run_lengths.draw([json.dumps([outline, part]).encode()], 64, 48) is None


def test_what_a_size_holds_tells_on_which_photo_it_was_drawn():
    tall, run_lengths_of_it = [10, 2, 40, 2, 40, 90], {"size": [96, 64], "counts": [6144]}
    for segmentation in ([tall], [[5], tall], run_lengths_of_it):
        text = json.dumps(segmentation).encode()
        assert run_lengths.lie_inside([text], 64, 96)
        assert not run_lengths.lie_inside([b"[[1, 1, 9, 9, 1, 9]]", text], 96, 64)
    for nothing in (b"null", b"[]", b"[[]]", b"7", b"[[1, 1, 96, 1, 96, 65]]"):  # the last is a slip of the hand
        assert run_lengths.lie_inside([nothing], 96, 64)


# --- as pixels --------------------------------------------------------------------------------------------


def drawn(encoded: dict) -> np.ndarray:
    height, width = encoded["size"]
    return draw_mask(np.frombuffer(encoded["counts"], np.uint8), height, width)


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


def test_compressed_run_lengths_are_decoded_as_pycocotools_encoded_them():
    rng = np.random.default_rng(0)
    for runs in [rng.integers(1, 4, 60), rng.integers(1, 900, 40), rng.integers(1, 90_000, 12), rng.integers(1, 9, 1)]:
        mask = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8)[None]
        decoded = decode_counts(compressed_rle(mask)["counts"].encode())
        assert decoded.tolist() == uncompressed_rle(mask)["counts"] == [*runs]
    for damaged in ("", "/0", "p0", "é", "0P", "P" * 9 + "0"):  # outside the code, cut in a number, beyond 32 bits
        with pytest.raises(ValueError, match="compressed run lengths"):
            decode_counts(damaged.encode())


# --- many photos, shared out ------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(run_lengths, "CHUNK", 7)


def drawing_processes(parent: int) -> list[int]:
    """The processes that draw for another, and have not ended."""
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        return [int(pid) for pid in file.read().split() if "spawn_main" in command(int(pid))]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes are found in /proc")


@needs_proc
@pytest.mark.usefixtures("small_chunks")
def test_processes_draw_the_same_in_the_same_order_and_end_also_when_one_dies():
    for count in (0, 1, 7, 100):
        work = drawings(count)
        assert [*run_lengths.draw_all(work, 2)] == [*run_lengths.draw_all(work, 1)]
    masks = run_lengths.draw_all(drawings(3000), 2)
    next(masks)
    os.kill(drawing_processes(os.getpid())[0], signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        list(masks)
    masks = run_lengths.draw_all(drawings(3000), 2)
    next(masks)
    begun = time.monotonic()
    masks.close()  # as an interrupt does
    assert time.monotonic() - begun < 5
    assert drawing_processes(os.getpid()) == []


@needs_proc
def test_the_processes_end_with_the_one_that_started_them():
    code = """if True:
        import os, time
        from loading import run_lengths
        work = [run_lengths.Drawing([b"[[1, 1, 5, 1, 5, 5]]"] * 1000, 9, 9)] * 9000
        masks = run_lengths.draw_all(work, 2)
        next(masks)
        print("begun", flush=True)
        time.sleep(60)"""
    folder = Path(run_lengths.__file__).parents[1]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "begun\n"
    pids = drawing_processes(parent.pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(command, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_processes_import_neither_torch_nor_the_program_that_starts_them(tmp_path):
    ours = {"torch", "albumentations", "loading.index"}
    code = f"import sys; from loading import run_lengths; print(sorted({ours} & set(sys.modules)))"
    assert fresh_python(code) == ["[]"]
    program = """if True:
        print("begun", flush=True)
        from loading import run_lengths
        print([mask.largest for mask in run_lengths.draw_all([([b"[[1, 1, 5, 1, 5, 5]]"], 9, 9)], 2)])"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, tmp_path / "program.py"]
    environment = os.environ | {"PYTHONPATH": str(Path(run_lengths.__file__).parents[1])}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "begun\n[6]\n"
