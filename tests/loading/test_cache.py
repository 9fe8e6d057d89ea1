"""The cache: the samples without it, and everything that can come between."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import add_person, edit, refusal

from datasets import COCOPersonDataset, batches, make_loader
from loading import cache, sources

TRAIN = "train2017"


def cached(root: Path, size: int = 48, **more: object) -> COCOPersonDataset:
    return COCOPersonDataset(root, TRAIN, size, cache=True, **more)


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
def test_samples_are_those_without_a_cache_and_photos_are_read_once(coco_root, photos_read, size, bars):
    expected = samples_of(COCOPersonDataset(coco_root, TRAIN, size, augment=True, bars=bars))
    cached(coco_root, size)
    photos_read.clear()
    dataset = cached(coco_root, size, augment=True, bars=bars)
    assert torch.equal(torch.cat(list(batches(make_loader(dataset, 4, 2, training=False), 0))), expected)
    sent = pickle.dumps(dataset)  # as to a worker that is spawned
    assert torch.equal(samples_of(pickle.loads(sent)), expected)
    assert photos_read == []
    assert len(sent) < len(expected.numpy().tobytes()) / 4  # the file's name, not its content


def test_only_a_photo_that_has_changed_or_could_not_be_read_is_made_again(coco_root, photos_read):
    path, other = (coco_root / TRAIN / f"00000000000{number}.jpg" for number in (2, 5))
    whole = path.read_bytes()
    path.write_bytes(b"no photo")
    assert str(path) in refusal(cached(coco_root).__getitem__, 1)
    for content in (whole, other.read_bytes()):
        path.write_bytes(content)
        photos_read.clear()
        dataset = cached(coco_root)
        assert photos_read == [path.name]
        assert_as_without_cache(dataset, coco_root)
    os.truncate(dataset.sources[0].cache.path, 1000)
    assert_as_without_cache(cached(coco_root), coco_root)


def test_changed_annotations_make_a_new_file_and_the_old_one_goes(coco_root, monkeypatch):
    before, small = (cached(coco_root, size).sources[0].cache.path for size in (48, 32))
    edit(coco_root, lambda content: add_person(content, [[1, 1, 40, 1, 40, 40]]))
    dataset = cached(coco_root)
    assert_as_without_cache(dataset, coco_root)
    assert (before.exists(), small.exists()) == (False, True)  # each size has its own
    monkeypatch.setattr(cache, "CACHE_VERSION", -1)
    assert cached(coco_root).sources[0].cache.path != dataset.sources[0].cache.path


def test_it_is_not_begun_where_it_does_not_fit(coco_root, monkeypatch, photos_read):  # 55 kB: a mask takes bits
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000))
    assert "--cache needs 0.00 GB" in refusal(cached, coco_root)
    assert photos_read == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=60_000))
    assert len(cached(coco_root)) == 10


def test_a_disk_that_fills_up_gives_one_line_and_what_is_made_stays(coco_root, monkeypatch, photos_read):
    rows, write = [], os.pwrite

    def full(descriptor: int, content: bytes, offset: int) -> int:
        rows.extend([offset] if len(content) > 8 else [])
        return write(descriptor, content[: 5 if len(rows) > 4 else None], offset)  # what fits, without an error

    monkeypatch.setattr(cache, "CHUNK", 2)
    monkeypatch.setattr(sources, "usable_cores", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert "No space left" in refusal(cached, coco_root)
    photos_read.clear()
    assert_as_without_cache(cached(coco_root), coco_root)
    assert len(photos_read) == 6 + 10  # 10 without the cache


def test_the_next_folder_is_used_if_one_cannot_be_written(tmp_path):
    photo, mask = np.full((2, 3, 3), 7, np.uint8), np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    (tmp_path / "a file").touch()
    folders = [tmp_path / "a file", tmp_path / "folder"]
    settings = dict(files=[folders[0]], sizes=np.array([[3, 2]]), make=lambda i: (photo, mask), threads=1)
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
