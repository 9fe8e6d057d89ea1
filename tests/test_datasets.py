"""The data against their sources: pycocotools for masks, OpenCV for pixels, arithmetic by hand for everything else."""

from __future__ import annotations

import random
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from helpers import fresh_python
from pycocotools.coco import COCO

from datasets import COCOPersonDataset, batches, letterbox, make_loader

TRAIN, VAL = "train2017", "val2017"


def test_genuine_photos_have_the_pixels_of_opencv_and_the_masks_of_pycocotools(shared_coco, tmp_path):
    for name in ("annotations", VAL):  # under a root of our own, so that nothing is written beside them
        (tmp_path / name).symlink_to(shared_coco / name)
    coco, dataset = COCO(tmp_path / "annotations" / f"instances_{VAL}.json"), COCOPersonDataset(tmp_path, VAL)
    ids, persons = [dataset.image_id(i) for i in range(len(dataset))], coco.getCatIds(catNms=["person"])
    assert sorted(ids) == sorted(coco.getImgIds(catIds=persons))
    for i, image_id in enumerate(ids):
        drawn = [coco.annToMask(each) for each in coco.loadAnns(coco.getAnnIds([image_id], persons))]
        rgba = dataset.original(i)
        assert np.array_equal(rgba[..., 2::-1], cv2.imread(str(dataset.path(i)), cv2.IMREAD_COLOR))
        assert np.array_equal(rgba[..., 3], 255 * np.bitwise_or.reduce(drawn))


def test_a_sample_is_the_letterboxed_original_with_its_metadata(coco_root):
    dataset = COCOPersonDataset(coco_root, TRAIN, image_size=96, store_metadata=True)
    samples = list(dataset)  # ends by itself
    assert len(samples) == 10
    for i, (sample, _) in enumerate(samples):
        assert (sample.dtype, sample.shape) == (torch.uint8, (4, 96, 96))
        assert np.array_equal(sample.numpy(), letterbox(dataset.original(i), 96)[0].transpose(2, 0, 1))
    assert samples[0][1] == {"image_id": 1, "file_name": "000000000001.jpg", "original_size": (48, 64), "scale": 1.5,
                             "padding": (12, 0, 12, 0)}  # fmt: skip
    own = dataset.own_pixels([0])[0]
    assert (own.sum(), own[:, 12:84].all()) == (96 * 72, True)


def test_a_sample_depends_on_seed_epoch_and_index_only(coco_root):
    def sample(seed: int, epoch: int, index: int) -> bytes:
        sets[seed].set_epoch(epoch)
        return sets[seed][index].numpy().tobytes()

    sets = [COCOPersonDataset(coco_root, TRAIN, image_size=48, augment=True, seed=seed) for seed in (0, 1)]
    wanted = list(product((0, 1), (0, 1), range(10)))
    samples = {key: sample(*key) for key in wanted}
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    assert {key: sample(*key) for key in random.sample(wanted, 40)} == samples
    assert len({*samples.values()}) >= 32  # one in ten stays as it is, one in ten is only flipped


@pytest.mark.slow
def test_importing_is_light_and_augmenting_asks_no_network():
    code = """if True:
        import socket, sys
        socket.getaddrinfo = socket.socket.connect = lambda *args, **kwargs: print("asked")
        import datasets
        print("albumentations" in sys.modules)
        from loading.augmentation import augmentations
        augmentations()"""
    assert fresh_python(code) == ["False"]


def ids_of(loader, epoch: int = 0) -> list[int]:
    return [n for _, metadata in batches(loader, epoch) for n in metadata["image_id"].tolist()]


def test_training_is_shuffled_by_seed_and_epoch(coco_root):
    sets = [COCOPersonDataset(coco_root, TRAIN, image_size=8, store_metadata=True, seed=seed) for seed in (0, 0, 7)]
    first, again, other = (make_loader(dataset, 4, 0, training=True) for dataset in sets)
    orders = [ids_of(first, 0), ids_of(first, 1), ids_of(first, 2), ids_of(other, 0), [*range(1, 11)]]
    assert all(sorted(order) == [*range(1, 11)] for order in orders)
    assert len({*map(tuple, orders)}) == 5
    assert ids_of(again, 1) == orders[1]


@pytest.mark.parametrize("world_size", [1, 3, 6])
def test_every_photo_reaches_a_process_and_in_validation_exactly_one(coco_root, world_size):
    train, val = (COCOPersonDataset(coco_root, split, image_size=8, store_metadata=True) for split in (TRAIN, VAL))
    loaders = [make_loader(train, 1, 0, training=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    shards = [ids_of(loader) for loader in loaders]
    assert {n for shard in shards for n in shard} == {*range(1, 11)}
    assert {len(shard) for shard in shards} == {len(loader) for loader in loaders} == {-(-10 // world_size)}
    loaders = [make_loader(val, 2, 0, training=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    shards = [ids_of(loader) for loader in loaders]
    assert sorted(n for shard in shards for n in shard) == [*range(101, 106)]
    assert {len(shard) for shard in shards} <= {5 // world_size, 5 // world_size + 1}


@pytest.mark.parametrize(
    ("batch_size", "world_size", "sizes"),
    [(1, 1, [1] * 10), (3, 1, [3] * 3), (4, 1, [4, 4, 2]), (3, 2, [3, 2]), (2, 10, [1])],
)
def test_only_a_last_training_batch_of_one_photo_is_dropped(coco_root, batch_size, world_size, sizes):
    train, val = (COCOPersonDataset(coco_root, split, image_size=8) for split in (TRAIN, VAL))
    made = list(batches(make_loader(train, batch_size, 0, training=True, world_size=world_size), 0))
    assert [images.shape for images in made] == [(size, 4, 8, 8) for size in sizes]
    assert [len(images) for images in batches(make_loader(val, 2, 0, training=False), 0)] == [2, 2, 1]
