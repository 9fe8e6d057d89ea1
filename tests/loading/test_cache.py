"""The cache against the samples that are made without it, and against everything that can come between."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import add_person, edit, refusal, write_photo
from test_trainer import Tiny, small

import datasets
import trainer
from datasets import COCOPersonDataset, batches, make_loader
from loading import cache, sources
from loading.index import open_index
from utils import read_checkpoint

TRAIN, VAL = "train2017", "val2017"


def cached(root: Path, size: int = 48, **more) -> COCOPersonDataset:
    return COCOPersonDataset(root, TRAIN, size, cache=True, **more)


def samples_of(dataset: COCOPersonDataset) -> torch.Tensor:
    return torch.stack(list(dataset))


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """The photos that are read, by name."""
    names, read = [], sources.read_photo

    def note(path, *rest):
        names.append(Path(path).name)
        return read(path, *rest)

    monkeypatch.setattr(sources, "read_photo", note)
    return names


# --- the same samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 48, 77])
@pytest.mark.parametrize("augment", [False, True])
def test_samples_are_those_without_a_cache_bit_for_bit(coco_root, size, augment):
    plain, kept = (COCOPersonDataset(coco_root, TRAIN, size, augment, True, cache=cache) for cache in (False, True))
    for epoch in range(3):
        for dataset in (plain, kept):
            dataset.set_epoch(epoch)
        for (sample, metadata), (expected, expected_metadata) in zip(kept, plain, strict=True):
            assert torch.equal(sample, expected)
            assert metadata == expected_metadata


def test_genuine_photos_are_the_same_bit_for_bit(shared_coco, tmp_path):
    for name in ("annotations", VAL):
        (tmp_path / name).symlink_to(shared_coco / name)
    plain, kept = (COCOPersonDataset(tmp_path, VAL, 192, augment=True, cache=cache) for cache in (False, True))
    assert all(torch.equal(kept[i], plain[i]) for i in range(len(plain)))


def test_workers_read_the_same_file(coco_root, drawn):
    dataset = cached(coco_root, augment=True)
    drawn.clear()
    expected = samples_of(dataset)
    assert torch.equal(torch.cat(list(batches(make_loader(dataset, 4, 2, training=False), 0))), expected)
    sent = pickle.dumps(dataset)  # as to a worker that is spawned
    assert torch.equal(samples_of(pickle.loads(sent)), expected)
    assert drawn == []
    assert len(sent) < len(expected.numpy().tobytes()) / 4  # the file's name, not its content


def test_a_training_says_where_its_samples_come_from_and_has_the_same_bits(coco_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)
    weights = []
    for cached, said in ((False, "from the photos"), (True, "letterboxed once")):
        trainer.main(small(coco_root, tmp_path / str(cached), num_epochs=1, num_workers=int(cached), cache=cached))
        assert said in capsys.readouterr().out
        weights.append(read_checkpoint(tmp_path / str(cached) / "last.pth")["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_photos_are_not_read_again(coco_root, drawn):
    first = samples_of(cached(coco_root))
    assert len(drawn) == 10
    assert torch.equal(samples_of(cached(coco_root)), first)
    assert len(drawn) == 10


def test_a_row_is_as_small_as_its_pixels(coco_root):
    size = cached(coco_root, 48).cache.path.stat().st_size
    fitted = [(48, 36), (36, 48), (48, 48)]  # of 64 x 48, 48 x 64 and 50 x 50
    of_each = [sum(image_id % 3 == kind for image_id in range(1, 11)) for kind in (1, 0, 2)]
    assert size == 10 * 8 + sum(n * (3 * w * h + w * h // 8) for n, (w, h) in zip(of_each, fitted, strict=True))


# --- what makes it outdated -------------------------------------------------------------------------------


def test_a_changed_photo_alone_is_made_again(coco_root, drawn):
    cached(coco_root)
    drawn.clear()
    path = coco_root / TRAIN / "000000000002.jpg"
    folder_time = path.parent.stat().st_mtime_ns
    path.write_bytes((coco_root / TRAIN / "000000000005.jpg").read_bytes())
    os.utime(path.parent, ns=(folder_time, folder_time))
    dataset = cached(coco_root)
    assert drawn == [path.name]
    assert torch.equal(samples_of(dataset), samples_of(COCOPersonDataset(coco_root, TRAIN, 48)))


def test_changed_annotations_make_a_new_one_and_the_old_one_goes(coco_root):
    before = cached(coco_root).cache.path
    edit(coco_root, lambda content: add_person(content, [[1, 1, 40, 1, 40, 40]]))
    dataset = cached(coco_root)
    assert dataset.cache.path != before
    assert not before.exists()
    assert torch.equal(samples_of(dataset), samples_of(COCOPersonDataset(coco_root, TRAIN, 48)))


def test_sizes_and_splits_have_a_file_each(coco_root, monkeypatch):
    paths = {cached(coco_root, 32).cache.path, cached(coco_root, 48).cache.path}
    paths.add(COCOPersonDataset(coco_root, VAL, 48, cache=True).cache.path)
    assert len(paths) == 3
    assert all(path.exists() for path in paths)
    monkeypatch.setattr(cache, "CACHE_VERSION", -1)
    assert cached(coco_root, 48).cache.path not in paths


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink(),
                                    lambda path: path.write_bytes(b"")])  # fmt: skip
def test_a_file_of_another_length_is_made_again(coco_root, damage):
    damage(cached(coco_root).cache.path)
    assert torch.equal(samples_of(cached(coco_root)), samples_of(COCOPersonDataset(coco_root, TRAIN, 48)))


# --- interruptions and errors -----------------------------------------------------------------------------


def test_what_is_made_stays_after_a_kill(coco_root, drawn):
    code = f"""if True:
        import sys, time
        import datasets
        from loading import cache, sources
        cache.CHUNK, slow = 2, sources.read_photo
        def read(path, *rest):
            if "05.jpg" in str(path):
                print("the fifth", flush=True)
                time.sleep(60)
            return slow(path, *rest)
        sources.read_photo, sources.usable_cores = read, lambda: 1
        datasets.COCOPersonDataset({str(coco_root)!r}, "{TRAIN}", 48, cache=True)"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(datasets.__file__).parent, stdout=subprocess.PIPE)
    while b"the fifth" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    dataset = cached(coco_root)
    assert sorted(drawn) == [f"{n:012d}.jpg" for n in range(5, 11)]
    assert torch.equal(samples_of(dataset), samples_of(COCOPersonDataset(coco_root, TRAIN, 48)))


def test_a_photo_that_cannot_be_read_is_named_when_its_sample_is_asked_for(coco_root):
    path = coco_root / TRAIN / "000000000002.jpg"
    genuine = path.read_bytes()
    path.write_bytes(b"no photo")
    dataset = cached(coco_root)
    assert str(path) in refusal(dataset.__getitem__, 1)
    assert dataset[0].shape == dataset[2].shape == (4, 48, 48)
    path.write_bytes(genuine)
    assert torch.equal(cached(coco_root)[1], COCOPersonDataset(coco_root, TRAIN, 48)[1])


def test_it_is_not_begun_where_it_does_not_fit(coco_root, monkeypatch, drawn):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 50_000))
    assert "--cache needs 0.00 GB" in refusal(cached, coco_root, 48)
    assert drawn == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 60_000))
    assert len(cached(coco_root, 48)) == 10


@pytest.mark.parametrize("fault", ["raised", "short"])
def test_a_disk_that_fills_up_gives_one_line_and_what_is_made_stays(coco_root, monkeypatch, drawn, fault):
    rows, write = [], os.pwrite

    def full(descriptor: int, content: bytes, offset: int) -> int:
        rows.extend([offset] if len(content) > 8 else [])
        if len(rows) <= 4:
            return write(descriptor, content, offset)
        if fault == "short":
            return write(descriptor, content[:5], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "CHUNK", 2)
    monkeypatch.setattr(sources, "usable_cores", lambda: 1)
    monkeypatch.setattr(os, "pwrite", full)
    assert "No space left" in refusal(cached, coco_root)
    monkeypatch.setattr(os, "pwrite", write)
    drawn.clear()
    dataset = cached(coco_root)
    assert len(drawn) == 6
    assert torch.equal(samples_of(dataset), samples_of(COCOPersonDataset(coco_root, TRAIN, 48)))


def test_a_folder_that_cannot_be_written_gives_way_to_the_next(tmp_path, coco_root):
    photo, mask = np.full((2, 3, 3), 7, np.uint8), np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    write_photo(tmp_path / "photo.png", photo)
    (tmp_path / "a file").touch()
    folders = [tmp_path / "a file", tmp_path / "folder"]
    settings = dict(files=[tmp_path / "photo.png"], sizes=np.array([[3, 2]]), draw=lambda i: (photo, mask))
    made = cache.open_cache("name", "state", folders, threads=1, **settings)
    assert made.path.parent == folders[1]
    assert all(np.array_equal(found, given) for found, given in zip(made.get(0), (photo, mask), strict=True))
    assert "cannot be kept" in refusal(lambda: cache.open_cache("n", "s", folders[:1], threads=1, **settings))


def test_two_runs_may_fill_the_same_file(coco_root):
    code = f"import datasets; datasets.COCOPersonDataset({str(coco_root)!r}, '{TRAIN}', 48, cache=True)"
    open_index(coco_root, TRAIN)
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=Path(datasets.__file__).parent) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert torch.equal(samples_of(cached(coco_root)), samples_of(COCOPersonDataset(coco_root, TRAIN, 48)))
