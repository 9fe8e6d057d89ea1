"""Whole runs on a user's own data: trained, resumed and evaluated by the commands."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
from helpers import PICTURE, save_picture
from tiny_runs import command_error, flags, small

import evaluate
import trainer
from datasets import COCOPersonDataset
from models import read_checkpoint
from training import checkpoints, resuming
from training.command_line import flag
from utils import UserError

EXPORT = {"annotations": "export.json", "photos": "pictures", "category": "pedestrian"}


@pytest.fixture
def export(coco_root, tmp_path, monkeypatch) -> None:
    """In the working folder a single annotation file without splits, whose category is the pedestrian."""
    monkeypatch.chdir(tmp_path)
    text = (coco_root / "annotations" / "instances_train2017.json").read_text()
    Path("export.json").write_text(text.replace('"person"', '"pedestrian"'))
    shutil.copytree(coco_root / "train2017", "pictures")


@pytest.fixture
def own(coco_root, tmp_path) -> Path:
    """The training photos of `coco_root` beside mask files of theirs, and one of nobody."""
    dataset, root = COCOPersonDataset(coco_root, "train2017"), tmp_path / "own"
    for i in range(len(dataset)):
        save_picture(root / "photos" / f"{i}.jpg", dataset.original(i)[..., :3])
        save_picture(root / "masks" / f"{i}.png", dataset.alpha(i))
    save_picture(root / "photos" / "nobody.jpg")
    save_picture(root / "masks" / "nobody.png", 0 * PICTURE[..., 0])
    return root


@pytest.mark.usefixtures("tiny", "export")
def test_a_single_file_is_trained_on_and_resumed(capsys):
    settings = small("data/coco", "run", num_epochs=1, val_fraction=0.3, **EXPORT)
    trainer.main(settings)
    text = " ".join(capsys.readouterr().out.split())
    assert "6 photos to train on, 4 to validate" in text
    assert "split made here: the names of the photos in pictures choose 0.3 of them to validate" in text
    more = flags(dataclasses.replace(settings, num_epochs=2, resume="newest"))
    assert "with --val-fraction 0.3 and cannot go on with 0.4" in command_error(capsys, *more, "--val-fraction=0.4")
    assert "with --category pedestrian and" in command_error(capsys, *more, "--category=dog")
    shutil.move("pictures/000000000003.jpg", "away.jpg")
    assert " export.json for " in command_error(capsys, *more)
    shutil.move("away.jpg", "pictures/000000000003.jpg")
    assert trainer.run_command(["trainer.py", *more]) == 0
    assert read_checkpoint("run/last.pth")["epoch"] == 2


@pytest.mark.usefixtures("tiny")
def test_photos_beside_masks_are_trained_on_and_resumed(own, tmp_path, capsys):
    settings = small(own, tmp_path / "run", num_epochs=1, val_fraction=0.3, cache=True)
    trainer.main(settings)
    assert "photos: 1 photo with an empty mask (nobody.jpg)" in " ".join(capsys.readouterr().out.split())
    none = f"--category dog was given, and the masks of {own / 'masks'} have no categories: leave it out"
    assert none in command_error(capsys, *flags(settings), "--category=dog")
    more, mask = dataclasses.replace(settings, num_epochs=2, resume="newest"), own / "masks" / "3.png"
    whole = mask.read_bytes()
    cv2.imwrite(str(mask), cv2.imread(str(mask))[::-1])
    assert f"{own / 'masks'} for " in command_error(capsys, *flags(more))
    mask.write_bytes(whole)
    shutil.move(own, tmp_path / "moved")
    trainer.main(dataclasses.replace(more, data_root=str(tmp_path / "moved")))
    assert read_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 2


VALIDATION = {"annotations": "coco/annotations/instances_val2017.json", "photos": "coco/val2017", "val_fraction": 0.99}
EVALUATIONS = [  # the settings of a training, and the flags of an evaluation
    ({}, {}), ({"category": "dog", "val_split": "my"}, {}), ({"data_root": "own,coco"}, {}), ({"data_root": "own"}, {}),
    (EXPORT, {}), (EXPORT, {"data_root": "coco", "category": "person"}), (EXPORT, VALIDATION | {"category": "person"}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "options"), EVALUATIONS)
@pytest.mark.usefixtures("export", "own")
def test_an_evaluation_reads_what_was_validated_or_what_its_flags_name(coco_root, monkeypatch, settings, options):
    shutil.copytree(coco_root / "val2017", coco_root / "my")
    shutil.copy(coco_root / "annotations/instances_val2017.json", coco_root / "annotations/instances_my.json")
    opened = []
    monkeypatch.setattr(evaluate, "load", lambda *_: SimpleNamespace(image_size=32))
    monkeypatch.setattr(evaluate, "evaluate_shard", lambda _cutter, dataset, _: (opened.append(dataset), 1 / 0))
    config = small("coco", "run", val_fraction=0.3)
    trained = dataclasses.replace(config, **settings)
    checkpoints.save({"model": {}, "epoch": 1, "config": vars(trained)}, Path("model.pth"))
    parsed = evaluate.parse(["model.pth", "--device=cpu", *(f"{flag(name)}={options[name]}" for name in options)])
    with pytest.raises(ZeroDivisionError):
        evaluate.main(parsed)
    config = dataclasses.replace(config, **(options or settings))
    assert parsed.data_root == (config.photos or config.data_root)  # in the name of the results' folder
    expected = trainer.open_split(config, False).dataset
    assert resuming.describe_data(opened[0]) == resuming.describe_data(expected)
    assert [*map(opened[0].path, range(len(opened[0])))] == [*map(expected.path, range(len(expected)))]


@pytest.mark.usefixtures("tiny")
def test_training_and_validating_on_the_same_photos_is_warned_of(coco_root, tmp_path, capsys):
    (coco_root / "link").symlink_to(coco_root / "train2017")
    shutil.copy(coco_root / "annotations/instances_train2017.json", coco_root / "annotations/instances_link.json")
    trainer.main(small(coco_root, tmp_path / "run", num_epochs=1, val_split="link"))
    assert "are trained on and validated" in " ".join(capsys.readouterr().out.split())


def test_photos_of_nobody_are_trained_on_and_not_validated(own, coco_root):
    def sizes(root: Path, negatives: str) -> list[int]:
        return [*map(len, trainer.open_splits(small(root, "run", negatives=negatives, val_fraction=0.3)))]

    assert sizes(coco_root, "") == [10, 5]
    assert sizes(coco_root, f"data,{own / 'photos'}") == [10 + 1 + 11, 5]
    assert sum(sizes(own, "data")) - sum(sizes(own, "")) == 1  # nobody.jpg, whose name makes it a training photo


@pytest.mark.parametrize(
    ("options", "words"),
    [("--photos=a", "--photos goes with --annotations, a COCO-format file, or --masks, a folder of mask files"),
     ("--annotations=a.json --photos=a --data-root=b", "--photos and --data-root (or --sample) both name the data"),
     ("--masks=b --photos=a --sample", "--photos and --data-root (or --sample) both name the data")],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(options, words, capsys):
    assert words in command_error(capsys, *options.split())
    with pytest.raises(UserError):
        evaluate.parse(["bundled", *options.split()])
