"""Photos that cannot be read in the middle of a run, and loader workers that die."""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from conftest import edit, refusal
from test_trainer import ALONE, Tiny, flags, quick, run_of, small, unwatched  # noqa: F401
from test_trainer import refusal as command_refusal

import datasets
import trainer
from datasets import COCOPersonDataset, batches, make_loader
from loading import sources, unreadable
from loading.unreadable import TolerantDataset, add_names, dead_worker
from training import checkpoints
from utils import read_checkpoint

ROOT = Path(trainer.__file__).parent
TRAIN, VAL = "train2017", "val2017"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"deleted": Path.unlink, "empty": lambda path: path.write_bytes(b""), "cut short": truncate}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)


def photo(root: Path, split: str, place: int) -> Path:
    return sorted((root / split).iterdir())[place]


def tolerant(root: Path, split: str, folder: Path, limit: float = 0.5) -> TolerantDataset:
    training = split == TRAIN
    return TolerantDataset(COCOPersonDataset(root, split, 32, augment=training), training, limit, folder)


def lines(folder: Path) -> list[str]:
    return (folder / "skipped.txt").read_text().splitlines()


def history(folder: Path) -> list[dict[str, str]]:
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- in training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_next_photo_stands_in_for_a_broken_one(coco_root, tmp_path, damage):
    whole, dataset = COCOPersonDataset(coco_root, TRAIN, 32, augment=True), tolerant(coco_root, TRAIN, tmp_path)
    for place in (3, 4, 9):
        DAMAGES[damage](coco_root / TRAIN / f"{place + 1:012d}.jpg")
    dataset.set_epoch(2)
    whole.set_epoch(2)
    for place, other in ((2, 2), (3, 5), (4, 5), (5, 5), (9, 0)):
        assert torch.equal(dataset[place], whole[other])
    assert dataset.bad() == [3, 4, 9]


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (1, "spawn")])
def test_workers_change_nothing_and_the_process_learns_what_they_found(coco_root, tmp_path, workers, start):
    dataset = tolerant(coco_root, TRAIN, tmp_path)
    truncate(photo(coco_root, TRAIN, 3))
    expected = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        loader = make_loader(dataset, 4, 0, training=True)
        expected.append(torch.cat(list(batches(loader, epoch))))
    loader = make_loader(dataset, 4, workers, training=True)
    loader.multiprocessing_context = start
    for epoch in (0, 1):  # found anew in each pass
        assert torch.equal(torch.cat(list(batches(loader, epoch))), expected[epoch])
        assert dataset.bad() == [3]
    dataset.set_epoch(2)
    assert dataset.bad() == []


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_and_names_each_photo_once(coco_root, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(trainer, "usable_cores", lambda: 4)
    truncate(photo(coco_root, TRAIN, 3))
    photo(coco_root, VAL, 4).write_bytes(b"")
    run, settings = tmp_path / "run", {"max_bad_photos": 0.2, "num_workers": workers}
    trainer.main(small(coco_root, run, num_epochs=2, **settings))
    out, reason = capsys.readouterr().out, "cannot be read: not an image, or damaged"
    assert out.count(f"| unreadable photos: 1 replaced, 1 left out of the validation ({run / 'skipped.txt'})") == 2
    named = [f"{TRAIN}/000000000004.jpg: {reason}", f"{VAL}/000000000105.jpg: {reason}"]
    assert lines(run) == named
    photo(coco_root, TRAIN, 0).write_bytes(b"")
    trainer.main(small(coco_root, run, num_epochs=3, resume="newest", **settings))
    assert lines(run) == [*named, f"{TRAIN}/000000000001.jpg: {reason}"]
    assert [row["train_bad_photos"] for row in history(run)] == ["1", "1", "2"]
    assert [row["val_bad_photos"] for row in history(run)] == ["1", "1", "1"]


@pytest.mark.usefixtures("tiny")
def test_a_whole_set_has_no_list_and_no_line(coco_root, tmp_path, capsys):
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1))
    assert "unreadable" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "skipped.txt").exists()
    assert {"train_bad_photos": "0", "val_bad_photos": "0"}.items() <= history(tmp_path / "run")[0].items()


@pytest.mark.usefixtures("tiny")
def test_a_run_of_before_this_was_counted_goes_on(coco_root, tmp_path):
    run = tmp_path / "run"
    trainer.main(small(coco_root, run, num_epochs=1))
    content = read_checkpoint(run / "last.pth")
    for row in content["history"]:
        del row["train_bad_photos"], row["val_bad_photos"]
    checkpoints.save(content, run / "last.pth")
    trainer.main(small(coco_root, run, num_epochs=2, resume="newest"))
    assert [row["val_bad_photos"] for row in history(run)] == ["", "0"]


def test_a_cache_does_not_change_what_becomes_of_a_broken_photo(coco_root, tmp_path):
    truncate(photo(coco_root, TRAIN, 3))
    plain, cached = (
        TolerantDataset(COCOPersonDataset(coco_root, TRAIN, 32, True, cache=cache), True, 0.5, tmp_path)
        for cache in (False, True)
    )
    assert all(torch.equal(plain[index], cached[index]) for index in range(10))
    assert plain.bad() == cached.bad() == [3]


# --- the limit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "broken", "stops"), [(0.3, 3, False), (0.3, 4, True), (0, 1, True), (1, 9, False),
                                                        (1, 10, True)])  # fmt: skip
def test_more_than_the_limit_stops_the_pass_at_once(coco_root, tmp_path, monkeypatch, limit, broken, stops):
    dataset, tried = tolerant(coco_root, TRAIN, tmp_path, limit), []
    for place in range(broken):
        photo(coco_root, TRAIN, place).write_bytes(b"")
    read = sources.read_photo
    monkeypatch.setattr(sources, "read_photo", lambda path, *rest: (tried.append(path), read(path, *rest))[1])
    if not stops:
        assert torch.equal(dataset[0], dataset[broken])
        return
    error = refusal(dataset.__getitem__, 0)
    assert error.startswith(f"{broken} of 10 photos cannot be read, and --max-bad-photos is {limit}: {tried[0]}")
    assert len(set(tried)) == broken
    assert [line.partition(":")[0] for line in lines(tmp_path)] == [f"{TRAIN}/{n + 1:012d}.jpg" for n in range(broken)]


@pytest.mark.parametrize(
    ("photos", "limit", "allowed"),
    [(2, 0.01, 1), (199, 0.004, 1), (199, 0.02, 3), (200, 0.004, 0), (200, 0.01, 2), (100, 0, 0), (1, 0.01, 0)],
)
def test_of_few_photos_one_may_be_broken(tmp_path, photos, limit, allowed):
    class Broken(torch.utils.data.Dataset):
        seed = 0

        def __len__(self) -> int:
            return photos

        def __getitem__(self, index: int) -> None:
            raise datasets.DataError("broken")

        def name(self, index: int) -> str:
            return f"{TRAIN}/{index}.jpg"

        def path(self, index: int) -> Path:
            return tmp_path / self.name(index)

    dataset = TolerantDataset(Broken(), False, limit, tmp_path)
    assert dataset.__getitems__([*range(allowed)]) == []
    error = refusal(dataset.__getitems__, [allowed])
    number = f"{allowed + 1} of {photos} photo{'s' if photos > 1 else ''}"
    assert error.startswith(f"{number} cannot be read, and --max-bad-photos is {limit:g}: {tmp_path / TRAIN}")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_too_many_ends_with_one_line_and_the_list(coco_root, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)
    monkeypatch.setattr(trainer, "usable_cores", lambda: 4)
    for place in range(5):
        photo(coco_root, TRAIN, place).write_bytes(b"")
    run = tmp_path / "run"
    error = command_refusal(capsys, *flags(small(coco_root, run, max_bad_photos=0.4, num_workers=workers)))
    for worker in multiprocessing.active_children():  # to be collected as garbage would take each of them 5 s
        worker.terminate()
    named = ", ".join(str(photo(coco_root, TRAIN, place)) for place in range(3))
    assert error == (
        f"trainer.py: error: 5 of 10 photos cannot be read, and --max-bad-photos is 0.4: {named}, ... "
        f"({run / 'skipped.txt'} says why)\n"
    )
    assert [line.partition(":")[0] for line in lines(run)] == [f"{TRAIN}/{n + 1:012d}.jpg" for n in range(5)]


def test_processes_that_are_within_the_limit_alone_may_pass_it_together(coco_root, tmp_path, monkeypatch):
    train, val = tolerant(coco_root, TRAIN, tmp_path, 0.1), tolerant(coco_root, VAL, tmp_path)
    photo(coco_root, TRAIN, 3).write_bytes(b"")
    assert torch.equal(train[3], train[4])
    other = [(6, "cannot be read: Input/output error")]
    monkeypatch.setattr(unreadable, "from_all", lambda rows: rows + other if rows else rows)
    assert "2 of 10 photos" in refusal(unreadable.name_bad_photos, train, val, ALONE)
    assert len(lines(tmp_path)) == 2
    train.limit = 0.2
    assert unreadable.name_bad_photos(train, val, ALONE) == {"train_bad_photos": 2, "val_bad_photos": 0}


# --- the list ---------------------------------------------------------------------------------------------


def test_names_are_added_once_whoever_writes(tmp_path):
    path = tmp_path / "skipped.txt"
    add_names(path, {"train/ab.jpg": "gone"})
    add_names(path, {"train/ab.jpg": "broken", "in/train/ab.jpg": "gone", "train/a": "odd\nlines"})
    assert path.read_text() == "train/ab.jpg: gone\nin/train/ab.jpg: gone\ntrain/a: odd lines\n"

    def write(name: str) -> None:
        for n in range(20):
            add_names(path, {f"{name}/{n}": "gone", f"both/{n}": "gone"})

    writers = [multiprocessing.get_context("fork").Process(target=write, args=[name]) for name in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    written = path.read_text().splitlines()
    assert len(written) == len(set(written)) == 3 + 60


@pytest.mark.usefixtures("tiny")
def test_a_list_that_cannot_be_written_is_said_and_stops_nothing(coco_root, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unreadable, "atomic_write", full)
    photo(coco_root, TRAIN, 3).write_bytes(b"")
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, max_bad_photos=0.1))
    assert f"{tmp_path / 'run' / 'skipped.txt'} cannot be written: No space left" in capsys.readouterr().out
    assert len(history(tmp_path / "run")) == 1


def test_photos_of_two_roots_are_told_apart(coco_root, tmp_path):
    other = tmp_path / "my: photos"
    shutil.copytree(coco_root, other)
    dataset = tolerant(f"{other},{coco_root}", TRAIN, tmp_path)
    broken = {3: photo(other, TRAIN, 3), 7: photo(other, TRAIN, 7), 13: photo(coco_root, TRAIN, 3)}
    for count, (place, path) in enumerate(broken.items(), 1):
        path.write_bytes(b"")
        assert torch.equal(dataset[place], dataset[place + 1])
        assert dataset.name_bad(True) == count
    dataset.limit = 0
    reason = "cannot be read: not an image, or damaged"
    assert lines(tmp_path) == [f"{path}: {reason}" for path in broken.values()]
    assert all(str(path) in refusal(dataset.name_bad, True) for path in broken.values())


# --- in the validation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_validation_is_that_of_the_set_without_the_photo(coco_root, tmp_path, workers, batch_size):
    without = tmp_path / "without"
    shutil.copytree(coco_root, without)
    edit(without, lambda content: content["images"].pop(2), split=VAL)
    edit(without, lambda content: content.update(
        annotations=[a for a in content["annotations"] if a["image_id"] != 103]), split=VAL)  # fmt: skip
    expected = make_loader(COCOPersonDataset(without, VAL, 32), batch_size, 0, training=False)
    truncate(photo(coco_root, VAL, 2))
    loader = make_loader(tolerant(coco_root, VAL, tmp_path), batch_size, workers, training=False)
    torch.manual_seed(0)
    run = run_of(Tiny())
    found, expected = (trainer.validate(run, it, unwatched(run)) for it in (loader, expected))
    assert found["images"] == expected["images"] == 4
    assert found == pytest.approx(expected, rel=1e-6)  # other batches, other roundings
    assert loader.dataset.bad() == [2]


@pytest.mark.usefixtures("tiny")
def test_a_preview_shows_the_next_photo(coco_root, tmp_path):
    truncate(photo(coco_root, VAL, 2))
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, max_bad_photos=0.2))
    picture = cv2.imread(str(tmp_path / "run" / "preview.png"))
    rows = [picture[24 + place * 36 :][:32] for place in range(5)]
    assert (rows[2] == rows[3]).all()
    assert (rows[3] != rows[4]).any()


# --- workers that die -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGKILL", "SIGBUS"])
def test_a_worker_that_dies_gives_one_line_with_what_to_do(coco_root, tmp_path, monkeypatch, capfd, name):
    training = os.getpid()

    def die(self, index):
        if os.getpid() != training:
            os.kill(os.getpid(), getattr(signal, name))
        raise AssertionError("not in a worker")

    monkeypatch.setattr(trainer, "UNetAutoencoder", Tiny)
    monkeypatch.setattr(COCOPersonDataset, "__getitem__", die)
    assert trainer.run_command(["trainer.py", *flags(small(coco_root, tmp_path / "run", num_workers=1))]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "Unexpected bus error" not in line]  # PyTorch's
    assert len(errors) == 1
    assert all(word in errors[0] for word in ("a loader worker", "--ipc=host", "--shm-size", "--num-workers"))


def test_a_worker_without_shared_memory_gives_the_same_line(coco_root, tmp_path):
    command = [sys.executable, "trainer.py", *flags(small(coco_root, tmp_path / "run", num_workers=1, image_size=256))]
    script = 'mount -t tmpfs -o size=200k tmpfs /dev/shm || exit 77; exec "$0" "$@"'  # a batch takes a megabyte
    unshare = shutil.which("unshare") or pytest.skip("no way to a /dev/shm of its own")
    command = [unshare, "-rm", "sh", "-c", script, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("may not mount")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "Unexpected bus error" not in line]  # PyTorch 2.9's own
    assert len(errors) == 1, done.stderr
    assert "a loader worker" in errors[0]
    assert "--shm-size" in errors[0]


def test_other_errors_are_left_alone(coco_root, tmp_path, monkeypatch):
    assert dead_worker(RuntimeError("CUDA error: out of shared memory")) == ""

    def fail(*_):
        raise RuntimeError("a mistake of the program's")

    monkeypatch.setattr(trainer, "UNetAutoencoder", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        trainer.run_command(["trainer.py", *flags(small(coco_root, tmp_path / "run"))])
