"""The data against its sources: pycocotools for masks, OpenCV for pixels, arithmetic by hand for everything else."""

from __future__ import annotations

import io
import os
import platform
import random
import signal
import struct
import zlib
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import (
    add_person,
    edit,
    fresh_python,
    persons_of,
    refusal,
    write_photo,
)
from PIL import Image
from pycocotools.coco import COCO

from datasets import COCOPersonDataset, batches, letterbox, make_loader, restore
from loading.index import open_index
from loading.reading import read_photo
from utils import usable_cores

TRAIN, VAL = "train2017", "val2017"
FIRST = "000000000001.jpg"  # width 48, height 64 in `coco_root`


def union(coco: COCO, image_id: int) -> np.ndarray:
    """What pycocotools draws for a photo, 0 or 255; it reads the annotation file itself."""
    ids = coco.getAnnIds(imgIds=[image_id], catIds=coco.getCatIds(catNms=["person"]))
    return np.bitwise_or.reduce([coco.annToMask(a) for a in coco.loadAnns(ids)]) * np.uint8(255)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.logical_and(a, b).sum() / np.logical_or(a, b).sum()


def centre(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the centre of mass, counted from the image's corner."""
    return np.argwhere(mask).mean(0)[::-1] + 0.5


def disc(height: int, width: int) -> np.ndarray:
    spot = (width * 2 // 5, height * 9 // 20)
    return cv2.circle(np.zeros((height, width), np.uint8), spot, min(height, width) // 4, 255, -1)


def epoch_of(loader, epoch: int) -> torch.Tensor:
    return torch.cat(list(batches(loader, epoch)))


@pytest.fixture
def genuine(shared_coco, tmp_path) -> Path:
    """The genuine photos under a root of our own, so that nothing is written beside them."""
    for name in ("annotations", TRAIN, VAL):
        (tmp_path / name).symlink_to(shared_coco / name)
    return tmp_path


@pytest.fixture
def twins(coco_root) -> Path:
    """Ten samples of the same pixels and the same mask."""

    def copy(content: dict) -> None:
        person = persons_of(content, 1)[0]
        content["annotations"] = [person | {"image_id": n} for n in range(1, 11)]
        content["images"] = [content["images"][0] | {"id": n} for n in range(1, 11)]

    return edit(coco_root, copy).parents[1]


# --- masks and pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [TRAIN, VAL])
def test_genuine_photos_have_the_pixels_of_opencv_and_the_masks_of_pycocotools(genuine, split):
    coco = COCO(genuine / "annotations" / f"instances_{split}.json")
    dataset = COCOPersonDataset(genuine, split)
    shown = [dataset.index.image_id(i) for i in range(len(dataset))]
    assert sorted(shown) == sorted(coco.getImgIds(catIds=coco.getCatIds(catNms=["person"])))
    for i, image_id in enumerate(shown):
        rgba = dataset.original(i)
        stored = cv2.imread(str(genuine / split / dataset.index.file_name(i)), cv2.IMREAD_COLOR)
        assert np.array_equal(rgba[..., 2::-1], stored)
        assert np.array_equal(rgba[..., 3], union(coco, image_id))
        back = restore(*letterbox(rgba, 192))
        assert back.shape == rgba.shape
        assert rgba[..., 3].mean() < 25 or iou(back[..., 3] > 127, rgba[..., 3]) > 0.9


def test_a_genuine_sample_at_its_own_size_has_the_mask_of_pycocotools(genuine):
    coco = COCO(genuine / "annotations" / f"instances_{VAL}.json")
    dataset = COCOPersonDataset(genuine, VAL, image_size=640, store_metadata=True)
    chosen = [i for i in range(len(dataset)) if max(dataset.index.size(i)) == 640]
    assert len(chosen) > 20
    for sample, metadata in map(dataset.__getitem__, chosen):
        left, top, right, bottom = metadata["padding"]
        assert np.array_equal(sample[3, top : 640 - bottom, left : 640 - right], union(coco, metadata["image_id"]))


def test_polygons_and_both_kinds_of_run_lengths_are_drawn_as_pycocotools_draws_them(coco_root):
    leaving_the_photo = [[-20, -30, 30, 20.5, 10, 90], [40, 1, 47, 1, 47, 9, 40, 9]]
    coco = COCO(edit(coco_root, lambda content: add_person(content, leaving_the_photo)))
    dataset = COCOPersonDataset(coco_root, TRAIN)
    for i in range(10):
        expected = union(coco, dataset.index.image_id(i))
        assert 0 < expected.mean() < 255
        assert np.array_equal(dataset.original(i)[..., 3], expected)
    assert dataset.index.left_out == {}


def test_only_photos_with_persons_are_samples(coco_root):
    def renumber(content: dict) -> None:  # the category's name makes a person
        content["categories"] = [{"id": 9, "name": "person"}, {"id": 1, "name": "cat"}]
        for annotation in persons_of(content, 2) + persons_of(content, 4)[:1]:
            annotation["category_id"] = 9

    assert [len(open_index(coco_root, split)) for split in (TRAIN, VAL)] == [10, 5]
    edit(coco_root, renumber)
    index = open_index(coco_root, TRAIN)
    assert [index.file_name(i) for i in range(len(index))] == ["000000000002.jpg", "000000000004.jpg"]
    assert [(index.image_id(i), index.size(i)) for i in range(len(index))] == [(2, (50, 50)), (4, (48, 64))]


def test_channels_are_red_green_blue_alpha_and_a_grey_photo_has_three_equal_ones(coco_root):
    write_photo(coco_root / TRAIN / FIRST, np.full((64, 48, 3), (250, 120, 10), np.uint8))
    grey = np.random.default_rng(0).integers(0, 255, (50, 50), dtype=np.uint8)
    assert cv2.imwrite(str(coco_root / TRAIN / "000000000002.jpg"), grey)
    dataset = COCOPersonDataset(coco_root, TRAIN, image_size=64)
    assert dataset[0][:3, 32, 32].tolist() == pytest.approx([250, 120, 10], abs=4)
    grey = dataset.original(1)[..., :3]
    assert grey.std() > 20
    assert np.array_equal(grey, grey[..., :1].repeat(3, 2))


@pytest.mark.parametrize(("annotated", "quarter_turns"), [((64, 48), 0), ((48, 64), -1)])
def test_a_turned_photo_is_read_in_the_orientation_of_its_annotation(tmp_path, annotated, quarter_turns):
    photo = np.zeros((48, 64, 3), np.uint8)
    photo[:16, :20, 0] = 250
    write_photo(tmp_path / "stored.jpg", photo)
    tags = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)  # orientation 6: shown turned right
    exif = b"\xff\xe1" + struct.pack(">H", len(tags) + 8) + b"Exif\0\0" + tags
    stored = (tmp_path / "stored.jpg").read_bytes()
    (tmp_path / "turned.jpg").write_bytes(stored[:2] + exif + stored[2:])
    expected = np.rot90(read_photo(tmp_path / "stored.jpg", (64, 48)), quarter_turns)
    assert np.array_equal(read_photo(tmp_path / "turned.jpg", annotated), expected)


# --- letterbox and the way back ---------------------------------------------------------------------------


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


# --- samples and augmentation -----------------------------------------------------------------------------


def test_a_sample_is_bytes_of_rgba_with_the_metadata_of_the_contract(coco_root):
    sample, metadata = COCOPersonDataset(coco_root, TRAIN, image_size=96, store_metadata=True)[0]
    assert (sample.dtype, sample.shape) == (torch.uint8, (4, 96, 96))
    assert sample[:, :, :12].max() == sample[:, :, 84:].max() == 0
    samples = list(COCOPersonDataset(coco_root, TRAIN, image_size=96))  # ends by itself
    assert len(samples) == 10
    assert torch.equal(samples[0], sample)
    assert metadata == {"image_id": 1, "file_name": FIRST, "original_size": (48, 64), "scale": 1.5,
                        "padding": (12, 0, 12, 0)}  # fmt: skip


def test_a_sample_is_the_letterboxed_original_and_alpha_stays_0_or_255_under_augmentation(coco_root):
    plain, augmented = (COCOPersonDataset(coco_root, TRAIN, 96, augment=augment) for augment in (False, True))
    for i in range(10):
        square, _ = letterbox(plain.original(i), 96)
        assert np.array_equal(plain[i].numpy(), square.transpose(2, 0, 1))
        assert plain[i][3].unique().tolist() == [0, 255]
    for epoch in range(10):
        augmented.set_epoch(epoch)
        assert {value for sample in augmented for value in sample[3].unique().tolist()} == {0, 255}


def test_a_sample_depends_on_seed_epoch_and_index_alone(twins):
    def sample(seed: int, epoch: int, index: int) -> bytes:
        sets[seed].set_epoch(epoch)
        return sets[seed][index].numpy().tobytes()

    sets = [COCOPersonDataset(twins, TRAIN, image_size=48, augment=True, seed=seed) for seed in (0, 1)]
    wanted = list(product((0, 1), (0, 1), range(10)))
    samples = {key: sample(*key) for key in wanted}
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    assert {key: sample(*key) for key in random.sample(wanted, 40)} == samples
    assert len(set(samples.values())) >= 32  # one in ten stays as it is, one in ten is only flipped


@pytest.mark.parametrize(("workers", "start"), [(0, None), (1, "fork"), (3, "fork"), (1, "spawn")])
def test_workers_change_nothing_and_the_epoch_reaches_them(twins, workers, start):
    dataset, expected = COCOPersonDataset(twins, TRAIN, image_size=48, augment=True), []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected.append(torch.stack(list(dataset)))
    loader = make_loader(dataset, 4, workers, training=False)  # in the dataset's order
    loader.multiprocessing_context = start
    assert [torch.equal(epoch_of(loader, epoch), expected[epoch]) for epoch in (0, 1, 0)] == [True] * 3


def test_importing_is_light_and_augmenting_asks_no_network():
    code = """if True:
        import socket, sys
        asked = []
        socket.getaddrinfo = lambda *args, **kwargs: asked.append(args) or []
        socket.socket.connect = lambda self, address: asked.append(address)
        import datasets
        print("albumentations" in sys.modules)
        from loading.augmentation import augmentations
        augmentations()
        print("albumentations" in sys.modules, asked)"""
    assert fresh_python(code) == ["False", "True []"]


def jpegs() -> dict[str, bytes]:
    """A photo of 47 x 61 pixels as JPEGs of every kind, whole and damaged."""
    pixels = np.random.default_rng(0).integers(0, 256, (61, 47, 3), np.uint8)
    photo = Image.fromarray(cv2.GaussianBlur(pixels, (5, 5), 0))

    def written(mode: str = "RGB", **options: object) -> bytes:
        photo.convert(mode).save(file := io.BytesIO(), "JPEG", **options)
        return file.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    whole = written()
    return {
        "4:2:0": whole, "4:2:2": written(subsampling=1), "4:4:4": written(subsampling=0),
        "progressive": written(progressive=True), "grey": written("L"), "CMYK": written("CMYK"),
        "turned": written(exif=turned.tobytes()), "restarts": written(restart_marker_blocks=2),
        "more behind": whole + b"abc", "more before": whole.replace(b"\xff\xda", b"\0\0\xff\xda", 1),
        "cut in half": whole[: len(whole) // 2],
    }  # fmt: skip


@pytest.mark.parametrize("kind", jpegs())
def test_a_jpeg_is_read_as_opencv_reads_it(tmp_path, kind):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpegs()[kind])
    expected = cv2.imread(str(photo), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if kind == "cut in half":  # which imread takes for whole
        assert "cannot be read" in refusal(read_photo, photo, (47, 61))
    else:
        assert np.array_equal(read_photo(photo, (47, 61)), expected)


def png_of_zeros(width: int, height: int) -> bytes:
    """A hundred of them, whatever the size says."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(100))]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in [*chunks, b"IEND"]]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"a text", png_of_zeros(48, 64), png_of_zeros(10**5, 10**5),
     cv2.imencode(".jpg", np.zeros((65, 48), np.uint8))[1].tobytes()],
    ids=["a folder", "empty", "text", "damaged", "beyond OpenCV", "48 x 65"],
)  # fmt: skip
def test_a_photo_that_cannot_be_used_is_named_when_it_is_read(coco_root, content, request):
    dataset = COCOPersonDataset(coco_root, TRAIN, image_size=32)
    photo = coco_root / TRAIN / FIRST
    photo.unlink()
    assert str(photo) in refusal(dataset.__getitem__, 0)
    photo.mkdir() if content is None else photo.write_bytes(content)
    sizes = ("48 x 65", "48 x 64") if "48 x 65" in request.node.name else ()
    assert all(text in refusal(dataset.__getitem__, 0) for text in (str(photo), *sizes))
    assert dataset[1].shape == (4, 32, 32)


# --- loaders ----------------------------------------------------------------------------------------------


def ids_of(loader, epoch: int = 0) -> list[int]:
    return [n for _, metadata in batches(loader, epoch) for n in metadata["image_id"].tolist()]


def test_training_is_shuffled_by_seed_and_epoch(coco_root):
    sets = [COCOPersonDataset(coco_root, TRAIN, image_size=8, store_metadata=True, seed=seed) for seed in (0, 0, 7)]
    first, again, other = (make_loader(dataset, 4, 0, training=True) for dataset in sets)
    orders = [ids_of(first, 0), ids_of(first, 1), ids_of(first, 2), ids_of(other, 0), [*range(1, 11)]]
    assert all(sorted(order) == [*range(1, 11)] for order in orders)
    assert len(set(map(tuple, orders))) == 5
    assert ids_of(again, 1) == orders[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_every_photo_reaches_a_process_and_in_validation_exactly_one(coco_root, world_size):
    train, val = (COCOPersonDataset(coco_root, split, image_size=8, store_metadata=True) for split in (TRAIN, VAL))
    loaders = [make_loader(train, 1, 0, training=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [ids_of(loader) for loader in loaders]
    assert {n for share in shares for n in share} == {*range(1, 11)}
    assert {len(share) for share in shares} == {len(loader) for loader in loaders} == {-(-10 // world_size)}
    loaders = [make_loader(val, 2, 0, training=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [ids_of(loader) for loader in loaders]
    assert sorted(n for share in shares for n in share) == [*range(101, 106)]
    assert {len(share) for share in shares} <= {5 // world_size, 5 // world_size + 1}


@pytest.mark.parametrize(
    ("batch_size", "world_size", "sizes"),
    [(1, 1, [1] * 10), (3, 1, [3] * 3), (4, 1, [4, 4, 2]), (5, 1, [5, 5]), (9, 1, [9]), (16, 1, [10]),
     (2, 2, [2, 2]), (3, 2, [3, 2]), (2, 10, [1])],
)  # fmt: skip
def test_only_a_last_training_batch_of_one_photo_is_dropped(coco_root, batch_size, world_size, sizes):
    train, val = (COCOPersonDataset(coco_root, split, image_size=8) for split in (TRAIN, VAL))
    made = list(batches(make_loader(train, batch_size, 0, training=True, world_size=world_size), 0))
    assert [images.shape for images in made] == [(size, 4, 8, 8) for size in sizes]
    assert {images.dtype for images in made} == {torch.uint8}
    assert [len(images) for images in batches(make_loader(val, 2, 0, training=False), 0)] == [2, 2, 1]


class Probe(torch.utils.data.Dataset):
    seed = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([cv2.getNumThreads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN])


def test_workers_keep_to_one_thread_ignore_ctrl_c_and_leave_the_dice_of_the_model_alone(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it already
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    dice, threads = torch.get_rng_state(), cv2.getNumThreads()
    for training in (True, False):
        assert torch.cat(list(make_loader(Probe(), 2, 2, training))).tolist() == [[1, 1]] * 4
    assert torch.equal(torch.get_rng_state(), dice)
    assert cv2.getNumThreads() == threads


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_a_worker_keeps_the_memory_that_it_has_freed():
    code = """if True:
        import resource
        import datasets, numpy
        workers.start_worker(0)
        for _ in range(10):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            [numpy.ones(2**23, numpy.uint8) for _ in range(4)]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100)"""
    assert fresh_python(code) == ["True"]  # 8192 pages otherwise


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"),
    [(8, "max 100000", 8), (3, "800000 100000", 3), (8, "250000 100000", 2), (8, "50000 100000", 1), (1, "", 1)],
)
def test_usable_cores_are_those_of_the_affinity_and_the_quota(monkeypatch, affinity, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(affinity)}, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: quota)
    assert usable_cores() == cores
