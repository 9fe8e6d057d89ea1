"""Photos that cannot be read in the middle of a run, and loader workers that die."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import edit, refusal
from tiny_runs import ALONE, Tiny, flags, history, run_of, small, unwatched

import trainer
from datasets import COCOPersonDataset, DataError, batches, make_loader
from loading import unreadable
from loading.unreadable import SkipUnreadable, count_unreadable

TRAIN, VAL = "train2017", "val2017"
REASON = "cannot be read: not an image, or damaged"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def photo(root: Path, split: str, index: int) -> Path:
    return sorted((root / split).iterdir())[index]


def skipping(root: Path | str, split: str, folder: Path, limit: float = 0.5) -> SkipUnreadable:
    training = split == TRAIN
    return SkipUnreadable(COCOPersonDataset(root, split, 32, training), training, limit, folder)


def listed(folder: Path) -> list[str]:
    return (folder / "skipped.txt").read_text().splitlines()


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("damage", [Path.unlink, empty, truncate])
def test_the_next_photo_replaces_an_unreadable_one(coco_root, tmp_path, damage, cache):
    dataset = skipping(coco_root, TRAIN, tmp_path)
    whole = COCOPersonDataset(shutil.copytree(coco_root, tmp_path / "whole"), TRAIN, 32, augment=True)
    for path in [photo(coco_root, TRAIN, index) for index in (3, 4, 9)]:
        damage(path)
    if cache:
        dataset.dataset.sources[0].use_cache()
    dataset.set_epoch(2)
    whole.set_epoch(2)
    for index, other in ((2, 2), (3, 5), (4, 5), (5, 5), (9, 0)):
        assert torch.equal(dataset[index], whole[other])
    assert dataset.unreadable() == [3, 4, 9]


@pytest.mark.parametrize(("workers", "start"), [(2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)])
def test_workers_change_nothing_and_tell_what_they_could_not_read(coco_root, tmp_path, workers, start):
    dataset = skipping(coco_root, TRAIN, tmp_path)
    truncate(photo(coco_root, TRAIN, 3))
    alone, loader = (make_loader(dataset, 4, number, training=True) for number in (0, workers))
    loader.multiprocessing_context = start
    expected = [torch.cat(list(batches(alone, epoch))) for epoch in (0, 1)]
    for epoch in (0, 1):  # counted anew in each epoch
        assert torch.equal(torch.cat(list(batches(loader, epoch))), expected[epoch])
        assert dataset.unreadable() == [3]
    dataset.continue_epoch([5])
    dataset.set_epoch(2)
    assert dataset.unreadable() == [5]
    dataset.set_epoch(3)
    assert dataset.unreadable() == []


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_and_lists_each_photo_once(coco_root, tmp_path, capsys, workers):
    run, settings = tmp_path / "run", {"max_unreadable_fraction": 0.2, "num_workers": workers}
    trainer.main(small(coco_root, run, num_epochs=1, **settings))
    assert "unreadable photos" not in capsys.readouterr().out
    assert not (run / "skipped.txt").exists()
    truncate(photo(coco_root, TRAIN, 3))
    empty(photo(coco_root, VAL, 4))
    trainer.main(small(coco_root, run, num_epochs=3, resume="newest", **settings))
    printed = capsys.readouterr().out
    assert printed.count(f"| unreadable photos: 1 replaced, 1 left out of the validation ({run / 'skipped.txt'})") == 2
    assert listed(run) == [f"{TRAIN}/000000000004.jpg: {REASON}", f"{VAL}/000000000105.jpg: {REASON}"]
    assert [row["train_unreadable"] + row["val_unreadable"] for row in history(run)] == ["00", "11", "11"]


@pytest.mark.parametrize(("limit", "broken"), [(0.3, 4), (0, 1), (1, 10)])
def test_more_than_the_limit_stops_the_epoch_at_once(coco_root, tmp_path, limit, broken):
    dataset = skipping(coco_root, TRAIN, tmp_path, limit)
    for index in range(broken):
        if index == broken - 1:
            assert torch.equal(dataset[0], dataset[index])
        empty(photo(coco_root, TRAIN, index))
    message = f"{broken} of 10 photos cannot be read, and --max-unreadable-fraction is {limit}: "
    assert refusal(dataset.__getitem__, 0).startswith(message)
    assert listed(tmp_path) == [f"{TRAIN}/{n + 1:012d}.jpg: {REASON}" for n in range(broken)]


class Broken(list):  # of photos of which none can be read
    seed = 0

    def __getitem__(self, index: int) -> None:
        raise DataError("broken")

    def name(self, index: int) -> str:
        return f"photo {index}"

    path = name


@pytest.mark.parametrize(
    ("photos", "limit", "allowed"),
    [(2, 0.01, 1), (199, 0.004, 1), (199, 0.02, 3), (200, 0.004, 0), (200, 0.01, 2), (100, 0, 0), (1, 0.01, 0)],
)
def test_of_fewer_than_200_photos_one_may_be_unreadable(tmp_path, photos, limit, allowed):
    dataset = SkipUnreadable(Broken([None] * photos), False, limit, tmp_path)
    assert dataset.__getitems__([*range(allowed)]) == []
    message = refusal(dataset.__getitems__, [allowed])
    assert message.startswith(f"{allowed + 1} of {photos} photo{'s' if photos > 1 else ''} cannot be read")
    assert f"--max-unreadable-fraction is {limit:g}: photo 0" in message
    assert listed(tmp_path) == [f"photo {n}: broken" for n in range(allowed + 1)]


def test_processes_within_the_limit_may_exceed_it_together(coco_root, tmp_path, monkeypatch):
    train, val = skipping(coco_root, TRAIN, tmp_path, 0.2), skipping(coco_root, VAL, tmp_path)
    empty(photo(coco_root, TRAIN, 3))
    assert torch.equal(train[3], train[4])
    other = [(6, "cannot be read: Input/output error")]
    monkeypatch.setattr(unreadable, "all_gather_list", lambda rows: rows + other if rows else rows)
    assert count_unreadable(train, val, ALONE) == {"train_unreadable": 2, "val_unreadable": 0}
    assert len(listed(tmp_path)) == 2
    train.limit = 0.1
    assert "2 of 10 photos" in refusal(count_unreadable, train, val, ALONE)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 2), (1, 5)])
def test_the_validation_is_that_of_the_set_without_the_photo(coco_root, tmp_path, workers, batch_size):
    def drop_the_third(content: dict) -> None:
        content["images"].pop(2)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 103]

    without = shutil.copytree(coco_root, tmp_path / "without")
    edit(without, drop_the_third, split=VAL)
    expected = make_loader(COCOPersonDataset(without, VAL, 32), batch_size, 0, training=False)
    truncate(photo(coco_root, VAL, 2))
    loader = make_loader(skipping(coco_root, VAL, tmp_path), batch_size, workers, training=False)
    torch.manual_seed(0)
    run = run_of(Tiny())
    metrics, expected = (trainer.validate(run, it, unwatched(run)) for it in (loader, expected))
    assert metrics["images"] == expected["images"] == 4
    assert metrics == pytest.approx(expected, rel=1e-6)  # other batches, other rounding
    assert loader.dataset.unreadable() == [2]
    assert torch.equal(loader.dataset[2], loader.dataset[3])  # a preview shows the next photo


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGBUS"])
def test_a_worker_that_dies_gives_one_line_with_what_to_do(coco_root, tmp_path, monkeypatch, capfd, name):
    training = os.getpid()

    def die(self, index):
        if os.getpid() != training:
            os.kill(os.getpid(), getattr(signal, name))
        raise AssertionError("not in a worker")

    monkeypatch.setattr(COCOPersonDataset, "__getitem__", die)
    assert trainer.run_command(["trainer.py", *flags(small(coco_root, tmp_path / "run", num_workers=1))]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "Unexpected bus error" not in line]  # PyTorch's
    assert len(errors) == 1
    assert all(word in errors[0] for word in ("a loader worker", "--ipc=host", "--shm-size", "--num-workers"))
