"""Photos that cannot be read in the middle of a run, and loader workers that die."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import refusal
from tiny_runs import ALONE, Tiny, flags, history, run_of, small, unwatched

import trainer
from datasets import COCOPersonDataset, DataError, batches, make_loader
from loading import unreadable
from loading.unreadable import SkipUnreadable, count_unreadable

TRAIN, VAL = "train2017", "val2017"


def damage(root: Path, split: str, *indices: int) -> None:
    for path in [sorted((root / split).iterdir())[index] for index in indices]:
        os.truncate(path, 500)


def skipping(root: Path | str, split: str, folder: Path, limit: float = 0.5) -> SkipUnreadable:
    return SkipUnreadable(COCOPersonDataset(root, split, 32, split == TRAIN), split == TRAIN, limit, folder)


@pytest.mark.parametrize("cache", [False, True])
def test_the_next_photo_replaces_an_unreadable_one_and_each_epoch_counts_anew(coco_root, tmp_path, cache):
    dataset = skipping(coco_root, TRAIN, tmp_path)
    whole = COCOPersonDataset(shutil.copytree(coco_root, tmp_path / "whole"), TRAIN, 32, augment=True)
    damage(coco_root, TRAIN, 3, 4)
    (coco_root / TRAIN / "000000000010.jpg").unlink()
    if cache:
        dataset.dataset.sources[0].use_cache()
    dataset.set_epoch(2)
    whole.set_epoch(2)
    for index, other in ((2, 2), (3, 5), (4, 5), (5, 5), (9, 0)):
        assert torch.equal(dataset[index], whole[other])
    assert dataset.unreadable() == [3, 4, 9]
    loader = make_loader(dataset, 4, 2, training=True)
    for epoch in (3, 4):
        assert sum(map(len, batches(loader, epoch))) == 10
        assert dataset.unreadable() == [3, 4, 9]  # as its workers tell
    dataset.continue_epoch([5])
    for epoch, expected in ((5, [5]), (6, [])):
        dataset.set_epoch(epoch)
        assert dataset.unreadable() == expected


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_and_lists_each_photo_once(coco_root, tmp_path, capsys, workers):
    run, settings = tmp_path / "run", {"max_unreadable_fraction": 0.2, "num_workers": workers}
    skipped = run / "skipped.txt"
    trainer.main(small(coco_root, run, num_epochs=1, **settings))
    assert "unreadable photos" not in capsys.readouterr().out
    assert not skipped.exists()
    damage(coco_root, TRAIN, 3)
    damage(coco_root, VAL, 4)
    trainer.main(small(coco_root, run, num_epochs=3, resume="newest", **settings))
    counts = f"| unreadable photos: 1 replaced, 1 left out of the validation ({skipped})"
    assert capsys.readouterr().out.count(counts) == 2
    reason = "cannot be read: not an image, or damaged"
    assert skipped.read_text() == f"{TRAIN}/000000000004.jpg: {reason}\n{VAL}/000000000105.jpg: {reason}\n"
    assert [row["train_unreadable"] + row["val_unreadable"] for row in history(run)] == ["00", "11", "11"]


class Broken(list):  # of photos of which none can be read
    seed = 0
    name = path = "photo {}".format

    def __getitem__(self, index: int) -> None:
        raise DataError("broken")


@pytest.mark.parametrize(
    ("photos", "limit", "allowed"),
    [(199, 0.004, 1), (199, 0.02, 3), (200, 0.004, 0), (200, 0.01, 2), (100, 0, 0), (1, 0.01, 0), (5, 1, 4)],
)
@pytest.mark.parametrize("training", [False, True])
def test_more_than_the_limit_stops_the_epoch_at_once(tmp_path, photos, limit, allowed, training):
    """Of fewer than 200 photos one may be unreadable, unless none may or it is the only one."""
    dataset = SkipUnreadable(Broken([None] * photos), training, limit, tmp_path)
    if not training:
        assert dataset.__getitems__([*range(allowed)]) == []
    message = refusal(dataset.__getitems__, [0 if training else allowed])  # in training the next one is tried
    assert message.startswith(f"{allowed + 1} of {photos} photo{'s' if photos > 1 else ''} cannot be read")
    assert f"--max-unreadable-fraction is {limit:g}: photo 0" in message
    assert (tmp_path / "skipped.txt").read_text() == "".join(f"photo {n}: broken\n" for n in range(allowed + 1))


def test_processes_within_the_limit_may_exceed_it_together(coco_root, tmp_path, monkeypatch):
    train, val = skipping(coco_root, TRAIN, tmp_path, 0.2), skipping(coco_root, VAL, tmp_path)
    damage(coco_root, TRAIN, 3)
    assert torch.equal(train[3], train[4])
    other = [(6, "cannot be read: Input/output error")]
    monkeypatch.setattr(unreadable, "all_gather_list", lambda rows: rows + other if rows else rows)
    assert count_unreadable(train, val, ALONE) == {"train_unreadable": 2, "val_unreadable": 0}
    assert (tmp_path / "skipped.txt").read_text().count("\n") == 2
    train.limit = 0.1
    assert "2 of 10 photos" in refusal(count_unreadable, train, val, ALONE)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 2), (1, 5)])
def test_the_validation_is_that_of_the_set_without_the_photo(coco_root, tmp_path, workers, batch_size):
    without = shutil.copytree(coco_root, tmp_path / "without")
    (without / VAL / "000000000103.jpg").unlink()  # before there is an index
    expected = make_loader(COCOPersonDataset(without, VAL, 32), batch_size, 0, training=False)
    damage(coco_root, VAL, 2)
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
