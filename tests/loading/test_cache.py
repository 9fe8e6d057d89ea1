"""The cache: the samples without it, and everything that can come between."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import add_person, edit, refusal, write_photo

from datasets import COCOPersonDataset, batches, make_loader
from loading import cache, sources

TRAIN = "train2017"


def cached(root: Path, size: int = 48, **more: object) -> COCOPersonDataset:
    return COCOPersonDataset(root, TRAIN, size, cache=True, **more)


def cache_path(dataset: COCOPersonDataset) -> Path:
    return dataset.sources[0].cache.path


def samples_of(dataset: COCOPersonDataset) -> torch.Tensor:
    return torch.stack(list(dataset))


def assert_as_without_cache(dataset: COCOPersonDataset, root: Path) -> None:
    assert torch.equal(samples_of(dataset), samples_of(COCOPersonDataset(root, TRAIN, 48)))


@pytest.fixture
def photos_read(monkeypatch) -> list[str]:
    """The photos that are read, by name."""
    names, read = [], sources.read_photo
    monkeypatch.setattr(sources, "read_photo", lambda path, *rest: (names.append(path.name), read(path, *rest))[1])
    return names


@pytest.mark.parametrize(("size", "bars"), [(32, "black"), (77, "reflect")])
def test_augmented_samples_and_metadata_are_those_without_a_cache(coco_root, size, bars):
    plain, kept = (COCOPersonDataset(coco_root, TRAIN, size, True, True, cache=cache, bars=bars)
                   for cache in (False, True))  # fmt: skip
    for epoch in range(2):
        for dataset in (plain, kept):
            dataset.set_epoch(epoch)
        for (sample, metadata), (expected, expected_metadata) in zip(kept, plain, strict=True):
            assert torch.equal(sample, expected)
            assert metadata == expected_metadata


def test_photos_are_read_once_and_workers_map_the_same_file(coco_root, photos_read):
    expected = samples_of(cached(coco_root, augment=True))
    assert len(photos_read) == 10
    dataset = cached(coco_root, augment=True)
    assert torch.equal(torch.cat(list(batches(make_loader(dataset, 4, 2, training=False), 0))), expected)
    sent = pickle.dumps(dataset)  # as to a worker that is spawned
    assert torch.equal(samples_of(pickle.loads(sent)), expected)
    assert len(photos_read) == 10
    assert len(sent) < len(expected.numpy().tobytes()) / 4  # the file's name, not its content


def test_only_a_changed_photo_is_made_again(coco_root, photos_read):
    cached(coco_root)
    photos_read.clear()
    path = coco_root / TRAIN / "000000000002.jpg"
    folder_time = path.parent.stat().st_mtime_ns
    path.write_bytes((coco_root / TRAIN / "000000000005.jpg").read_bytes())
    os.utime(path.parent, ns=(folder_time, folder_time))
    dataset = cached(coco_root)
    assert photos_read == [path.name]
    assert_as_without_cache(dataset, coco_root)


def test_changed_annotations_make_a_new_file_and_the_old_one_goes(coco_root, monkeypatch):
    before, small = cache_path(cached(coco_root)), cache_path(cached(coco_root, 32))
    edit(coco_root, lambda content: add_person(content, [[1, 1, 40, 1, 40, 40]]))
    dataset = cached(coco_root)
    assert_as_without_cache(dataset, coco_root)
    assert not before.exists()
    assert small.exists()  # each size has its own
    monkeypatch.setattr(cache, "CACHE_VERSION", -1)
    assert cache_path(cached(coco_root)) not in (before, cache_path(dataset))


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 1000), Path.unlink], ids=["cut", "deleted"])
def test_a_file_of_another_length_is_made_again(coco_root, damage):
    damage(cache_path(cached(coco_root)))
    assert_as_without_cache(cached(coco_root), coco_root)


def test_a_photo_that_cannot_be_read_is_made_once_it_can(coco_root):
    path = coco_root / TRAIN / "000000000002.jpg"
    whole = path.read_bytes()
    path.write_bytes(b"no photo")
    assert str(path) in refusal(cached(coco_root).__getitem__, 1)
    path.write_bytes(whole)
    assert_as_without_cache(cached(coco_root), coco_root)


def test_it_is_not_begun_where_it_does_not_fit(coco_root, monkeypatch, photos_read):  # 55 kB: a mask takes bits
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 50_000))
    assert "--cache needs 0.00 GB" in refusal(cached, coco_root)
    assert photos_read == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 60_000))
    assert len(cached(coco_root)) == 10


@pytest.mark.parametrize("fault", ["raised", "short"])
def test_a_disk_that_fills_up_gives_one_line_and_what_is_made_stays(coco_root, monkeypatch, photos_read, fault):
    rows, write = [], os.pwrite

    def full(descriptor: int, content: bytes, offset: int) -> int:
        rows.extend([offset] if len(content) > 8 else [])
        if len(rows) > 4 and fault == "raised":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[: 5 if len(rows) > 4 else None], offset)

    monkeypatch.setattr(cache, "CHUNK", 2)
    monkeypatch.setattr(sources, "usable_cores", lambda: 1)
    monkeypatch.setattr(os, "pwrite", full)
    assert "No space left" in refusal(cached, coco_root)
    monkeypatch.setattr(os, "pwrite", write)
    photos_read.clear()
    assert_as_without_cache(cached(coco_root), coco_root)
    assert len(photos_read) == 6 + 10  # 10 without the cache


def test_the_next_folder_is_used_if_one_cannot_be_written(tmp_path):
    photo, mask = np.full((2, 3, 3), 7, np.uint8), np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    write_photo(tmp_path / "photo.png", photo)
    (tmp_path / "a file").touch()
    folders = [tmp_path / "a file", tmp_path / "folder"]
    settings = dict(files=[tmp_path / "photo.png"], sizes=np.array([[3, 2]]), make=lambda i: (photo, mask), threads=1)
    made = cache.open_cache("name", "state", folders, **settings)
    assert made.path.parent == folders[1]
    assert all(np.array_equal(kept, given) for kept, given in zip(made.get(0), (photo, mask), strict=True))
    assert "cannot be kept" in refusal(lambda: cache.open_cache("n", "s", folders[:1], **settings))


@pytest.mark.slow
def test_two_runs_may_fill_the_same_file(coco_root, start_process):
    code = f"import sys, datasets; datasets.COCOPersonDataset(sys.argv[1], '{TRAIN}', 48, cache=True)"
    COCOPersonDataset(coco_root, TRAIN, 48)
    processes = [start_process("-c", code, coco_root) for _ in range(2)]
    assert [process.communicate() and process.returncode for process in processes] == [0, 0]
    assert_as_without_cache(cached(coco_root), coco_root)
