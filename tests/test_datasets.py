"""The data against its sources: pycocotools for masks, OpenCV for pixels, arithmetic by hand for everything else."""

from __future__ import annotations

import os
import random
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
    write_photo,
)
from pycocotools.coco import COCO

from datasets import COCOPersonDataset, batches, letterbox, make_loader, restore
from loading.index import open_index
from utils import usable_cores

TRAIN, VAL = "train2017", "val2017"
FIRST = "000000000001.jpg"  # width 48, height 64 in `coco_root`


def union(coco: COCO, image_id: int) -> np.ndarray:
    """What pycocotools draws for a photo, 0 or 255; it reads the annotation file itself."""
    ids = coco.getAnnIds(imgIds=[image_id], catIds=coco.getCatIds(catNms=["person"]))
    return np.bitwise_or.reduce([coco.annToMask(a) for a in coco.loadAnns(ids)]) * np.uint8(255)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.logical_and(a, b).sum() / np.logical_or(a, b).sum()


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
        person, first = persons_of(content, 1)[0], content["images"][0]
        content["annotations"] = [person | {"image_id": n} for n in range(1, 11)]
        content["images"] = [first | {"id": n, "file_name": f"twin_{n}.jpg"} for n in range(1, 11)]
        for n in range(1, 11):
            os.link(coco_root / TRAIN / FIRST, coco_root / TRAIN / f"twin_{n}.jpg")

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


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"),
    [(8, "max 100000", 8), (3, "800000 100000", 3), (8, "250000 100000", 2), (8, "50000 100000", 1), (1, "", 1)],
)
def test_usable_cores_are_those_of_the_affinity_and_the_quota(monkeypatch, affinity, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {*range(affinity)}, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: quota)
    assert usable_cores() == cores
